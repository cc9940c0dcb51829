"""datatrove: DatatroveFolderDataset over the raw files, which are its own format.

It has no mixing ratios: languages come in proportion to their size.
"""

from typing import Any

import torch
from datatrove.utils.dataset import DatatroveFolderDataset

from benchmarks.data_job import BATCH_SIZE, LANGUAGES, SEED, SEQ_LENGTH
from benchmarks.data_peers.measure import Loader, run


class DatatroveLoader(Loader):
    package = "datatrove"
    length = "data"

    def prepare(self) -> None:
        for name in LANGUAGES:
            (self.work / f"{name}.ds").unlink(missing_ok=True)
            (self.work / f"{name}.ds").symlink_to(self.raw / f"{name}.u16")

    def open(self, planned: int) -> None:
        self._dataset = DatatroveFolderDataset(
            str(self.work), SEQ_LENGTH, shuffle=True, seed=SEED, token_size=2
        )
        self._next, self.numbers = 0, len(self._dataset)

    def sample(self) -> Any:
        self._next += 1
        return self.sample_at((self._next - 1) % self.numbers)

    def sample_at(self, number: int) -> Any:
        return self._dataset[number]["input_ids"]

    def batch(self) -> Any:
        return torch.stack([self.sample() for _ in range(BATCH_SIZE)])

    def state(self) -> int:
        return self._next

    def resume(self, state: int) -> None:
        self._next = state


if __name__ == "__main__":
    run(DatatroveLoader)

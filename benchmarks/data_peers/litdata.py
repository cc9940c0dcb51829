"""litdata: optimize() with the TokensLoader, CombinedStreamingDataset with weights."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from litdata import CombinedStreamingDataset, StreamingDataLoader, StreamingDataset, optimize
from litdata.streaming.item_loader import TokensLoader

from benchmarks.data_job import BATCH_SIZE, LANGUAGES, RATIOS, SEED, SEQ_LENGTH, raw
from benchmarks.data_peers.measure import Loader, run


def documents(language_and_folder: tuple[int, str]) -> Iterator[torch.Tensor]:
    """Called by its worker processes."""
    language, folder = language_and_folder
    ids, lengths = raw(Path(folder), language)
    for document in np.split(ids, np.cumsum(lengths)[:-1]):
        yield torch.from_numpy(document.astype(np.int32))


class LitdataLoader(Loader):
    package = "litdata"
    length = "data"  # it ends when the first language is used up; begun again here

    def prepare(self) -> None:
        for language, name in enumerate(LANGUAGES):
            with contextlib.redirect_stdout(sys.stderr):
                optimize(
                    documents,
                    [(language, str(self.raw))],
                    str(self.work / name),
                    num_workers=1,
                    chunk_bytes="16MB",
                    item_loader=TokensLoader(),
                    verbose=False,
                )

    def open(self, planned: int) -> None:
        self._singles = StreamingDataLoader(self._combined(), batch_size=1, num_workers=0)
        self._samples: Any = iter(self._singles)
        self._batched: Any = None
        self._batches: Any = None

    def _combined(self) -> CombinedStreamingDataset:
        return CombinedStreamingDataset(
            [
                StreamingDataset(
                    str(self.work / name),
                    item_loader=TokensLoader(block_size=SEQ_LENGTH),
                    shuffle=True,
                    drop_last=True,
                    seed=SEED,
                )
                for name in LANGUAGES
            ],
            weights=RATIOS.tolist(),
            iterate_over_all=False,
            seed=SEED,
        )

    def sample(self) -> Any:
        while True:
            for row in self._samples:
                return row[0]
            self._samples = iter(self._singles)

    def batch(self) -> Any:
        if self._batched is None:
            self._batched = StreamingDataLoader(
                self._combined(), batch_size=BATCH_SIZE, num_workers=0
            )
            self._batches = iter(self._batched)
        while True:
            for rows in self._batches:
                return rows
            self._batches = iter(self._batched)

    def state(self) -> Any:
        return self._singles.state_dict()

    def resume(self, state: Any) -> None:
        self._singles = StreamingDataLoader(self._combined(), batch_size=1, num_workers=0)
        self._singles.load_state_dict(state)
        self._samples = iter(self._singles)


if __name__ == "__main__":
    run(LitdataLoader)

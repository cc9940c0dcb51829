"""The ceiling: the same bytes, copied from places that are known beforehand.

variant "": one copy for each sample. "block": a whole batch in one copy.
"""

from pathlib import Path

import numpy as np

from benchmarks.data_job import Copying
from benchmarks.data_peers.measure import Loader, run


class CopyingLoader(Loader):
    package = "numpy"
    length = "endless"

    def __init__(self, raw: Path, work: Path, variant: str):
        super().__init__(raw, work, variant)

    def open(self, planned: int) -> None:
        self._copying = Copying(self.raw)

    def sample(self) -> np.ndarray:
        return self._copying.sample()

    def batch(self) -> np.ndarray:
        return self._copying.block() if self.variant == "block" else self._copying.batch()


if __name__ == "__main__":
    run(CopyingLoader)

"""Hugging Face datasets: memory-mapped Arrow tables, interleave_datasets with probabilities.

variant "map": datasets by number. "iterable": streams.
"""

from typing import Any

import datasets
import numpy as np
import pyarrow

from benchmarks.data_job import BATCH_SIZE, LANGUAGES, RATIOS, SEED, SEQ_LENGTH, raw
from benchmarks.data_peers.measure import Loader, run

datasets.disable_progress_bars()


class DatasetsLoader(Loader):
    package = "datasets"
    length = "data"

    def prepare(self) -> None:
        for language, name in enumerate(LANGUAGES):
            ids, _ = raw(self.raw, language)
            whole = len(ids) // SEQ_LENGTH * SEQ_LENGTH
            rows = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(ids[:whole]), SEQ_LENGTH)
            table = pyarrow.table({"tokens": rows})
            datasets.Dataset(table).save_to_disk(str(self.work / name))

    def open(self, planned: int) -> None:
        parts = [datasets.load_from_disk(str(self.work / name)) for name in LANGUAGES]
        if self.variant == "iterable":
            parts = [part.to_iterable_dataset().with_format("numpy") for part in parts]
        self._mixed = datasets.interleave_datasets(
            parts,
            probabilities=RATIOS.tolist(),
            seed=SEED,
            stopping_strategy="all_exhausted",
        )
        if self.variant == "map":
            self._mixed = self._mixed.with_format("numpy")
            self.numbers = len(self._mixed)
        self._next = 0
        self._samples: Any = None
        self._batches: Any = None

    def sample(self) -> Any:
        if self.variant == "map":
            self._next += 1
            return self.sample_at((self._next - 1) % self.numbers)
        while True:
            if self._samples is None:
                self._samples = iter(self._mixed)
            for row in self._samples:
                return row["tokens"]
            self._samples = None

    def sample_at(self, number: int) -> Any:
        return self._mixed[number]["tokens"]

    def batch(self) -> Any:
        if self.variant == "map":
            first = self._next % (self.numbers - BATCH_SIZE)
            self._next = first + BATCH_SIZE
            return self._mixed[first : self._next]["tokens"]
        while True:
            if self._batches is None:
                self._batches = iter(self._mixed.batch(BATCH_SIZE))
            for rows in self._batches:
                return np.stack(rows["tokens"])
            self._batches = None

    def state(self) -> Any:
        return self._next if self.variant == "map" else self._mixed.state_dict()

    def resume(self, state: Any) -> None:
        if self.variant == "map":
            self._next = state
        else:
            self._mixed.load_state_dict(state)
            self._samples = None


if __name__ == "__main__":
    run(DatasetsLoader)

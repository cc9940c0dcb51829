"""mosaicml-streaming: a Stream with a `proportion` for each language, StreamingDataset."""

import importlib.machinery
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np

# imported for its vision datasets only; the registry's build is for a CUDA torch and fails here
for _name, _classes in {
    "torchvision": [],
    "torchvision.transforms": [],
    "torchvision.transforms.functional": ["to_tensor"],
    "torchvision.datasets": ["VisionDataset"],
}.items():
    _module = types.ModuleType(_name)
    _module.__spec__ = importlib.machinery.ModuleSpec(_name, None)
    for _class in _classes:
        setattr(_module, _class, type(_class, (), {}))
    sys.modules[_name] = _module

from streaming import MDSWriter, Stream, StreamingDataset  # noqa: E402
from streaming.base.util import clean_stale_shared_memory  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from benchmarks.data_job import (  # noqa: E402
    BATCH_SIZE,
    LANGUAGES,
    RATIOS,
    SEED,
    SEQ_LENGTH,
    raw,
)
from benchmarks.data_peers.measure import Loader, run  # noqa: E402


class StreamingLoader(Loader):
    package = "mosaicml-streaming"

    def __init__(self, raw: Path, work: Path, variant: str):
        super().__init__(raw, work, variant)
        clean_stale_shared_memory()

    def prepare(self) -> None:
        for language, name in enumerate(LANGUAGES):
            ids, _ = raw(self.raw, language)
            whole = len(ids) // SEQ_LENGTH * SEQ_LENGTH
            columns = {"tokens": "ndarray:uint16"}
            folder = str(self.work / name)
            with MDSWriter(out=folder, columns=columns, size_limit=1 << 26) as writer:
                for row in ids[:whole].reshape(-1, SEQ_LENGTH):
                    writer.write({"tokens": np.ascontiguousarray(row)})

    def open(self, planned: int) -> None:
        self._dataset = StreamingDataset(
            streams=[
                Stream(local=str(self.work / name), proportion=float(ratio))
                for name, ratio in zip(LANGUAGES, RATIOS, strict=True)
            ],
            epoch_size=planned,
            shuffle=True,
            shuffle_seed=SEED,
            batch_size=BATCH_SIZE,
            num_canonical_nodes=1,
            predownload=1000,
        )
        self._drawn = 0
        self._iterator: Any = None
        self._batches: Any = None

    def sample(self) -> Any:
        if self._iterator is None:
            # one iterator a process: beginning one ends the other, here and in `batch`
            self._iterator, self._batches = iter(self._dataset), None
        self._drawn += 1
        return next(self._iterator)["tokens"]

    def batch(self) -> Any:
        if self._batches is None:
            self._iterator = None
            self._batches = iter(DataLoader(self._dataset, batch_size=BATCH_SIZE))
        return next(self._batches)["tokens"]

    def state(self) -> Any:
        return self._dataset.state_dict(self._drawn, False)

    def resume(self, state: Any) -> None:
        self._dataset.load_state_dict(state)


if __name__ == "__main__":
    run(StreamingLoader)

"""torchdata.nodes: MultiNodeWeightedSampler over a shuffled memory map for each language.

variant "": the languages are shuffled by a sampler of ours that knows its epoch. "random-sampler":
by torch's RandomSampler, which SamplerWrapper cannot bring back into a later epoch.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, RandomSampler, Sampler
from torchdata.nodes import Batcher, Mapper, MultiNodeWeightedSampler, SamplerWrapper

from benchmarks.data_job import BATCH_SIZE, LANGUAGES, RATIOS, SEED, SEQ_LENGTH, raw
from benchmarks.data_peers.measure import Loader, run


class Tokens(Dataset):
    def __init__(self, ids: np.ndarray):
        self._ids = ids

    def __len__(self) -> int:
        return len(self._ids) // SEQ_LENGTH

    def __getitem__(self, number: int) -> torch.Tensor:
        ids = self._ids[number * SEQ_LENGTH : (number + 1) * SEQ_LENGTH]
        return torch.from_numpy(ids.astype(np.int64))


class EpochShuffle(Sampler):
    def __init__(self, size: int, seed: int):
        self._size, self._seed, self._epoch = size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng((self._seed, self._epoch))
        return iter(random.permutation(self._size).tolist())


class TorchdataLoader(Loader):
    package = "torchdata"
    length = "endless"

    def open(self, planned: int) -> None:
        self._node = self._mixture()
        self._node.reset()
        self._batches: Any = None

    def _mixture(self) -> MultiNodeWeightedSampler:
        sources = {}
        for language, name in enumerate(LANGUAGES):
            tokens = Tokens(raw(self.raw, language)[0])
            if self.variant == "random-sampler":
                generator = torch.Generator().manual_seed(language)
                order = SamplerWrapper(RandomSampler(tokens, generator=generator))
            else:
                shuffle = EpochShuffle(len(tokens), language)
                order = SamplerWrapper(shuffle, epoch_updater=lambda epoch: epoch + 1)
            sources[name] = Mapper(order, tokens.__getitem__)
        weights = dict(zip(LANGUAGES, RATIOS.tolist(), strict=True))
        return MultiNodeWeightedSampler(sources, weights, stop_criteria="CYCLE_FOREVER", seed=SEED)

    def sample(self) -> Any:
        return next(self._node)

    def batch(self) -> Any:
        if self._batches is None:
            self._batches = Mapper(Batcher(self._mixture(), BATCH_SIZE), torch.stack)
            self._batches.reset()
        return next(self._batches)

    def state(self) -> Any:
        return self._node.state_dict()

    def resume(self, state: Any) -> None:
        self._node = self._mixture()
        self._node.reset(state)


if __name__ == "__main__":
    run(TorchdataLoader)

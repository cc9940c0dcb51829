"""This project: token stores and LanguageMixture.

variant "mixture": locate and read, as numpy arrays. "loader": through MicroBatchLoader, as the
tensors a training step takes (tokens, labels and loss mask, twice the bytes and more).
"""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data_job import (
    BATCH_SIZE,
    EOD_ID,
    LANGUAGES,
    RATIOS,
    SEED,
    SEQ_LENGTH,
    VOCAB_SIZE,
    raw,
)
from benchmarks.data_peers.measure import Loader, run
from data.config import MixtureConfig, Weighting
from data.language_mixture import LanguageMixture
from data.store_writer import TokenStoreWriter
from data.token_store import TokenStore


class MagnetronLoader(Loader):
    package = "magnetron"
    length = "endless"
    numbers = 10**10

    def __init__(self, raw: Path, work: Path, variant: str):
        super().__init__(raw, work, variant)
        if variant == "loader":
            from data.loader import MicroBatchLoader  # imports torch, before any clock runs

            self._loader_class = MicroBatchLoader
            self.numbers = 0  # it goes from step to step

    def prepare(self) -> None:
        for language, name in enumerate(LANGUAGES):
            ids, lengths = raw(self.raw, language)
            # a family for each, so that the ratios hold for languages as the peers' do
            with TokenStoreWriter(
                self.work / name,
                language=name,
                family=name,
                tokenizer_fingerprint="benchmark",
                vocab_size=VOCAB_SIZE,
                eod_id=EOD_ID,
            ) as writer:
                for document in np.split(ids, np.cumsum(lengths)[:-1]):
                    writer.add_document(document)

    def open(self, planned: int) -> None:
        stores = [TokenStore(self.work / name) for name in LANGUAGES]
        ratios = dict(zip(LANGUAGES, RATIOS.tolist(), strict=True))
        mixture = MixtureConfig(weighting=Weighting.ratios, ratios=ratios)
        self._mixture = LanguageMixture(stores, SEQ_LENGTH, mixture, SEED)
        self._next = 0
        # nothing may be left for later: the last planned sample is read as well
        self.sample_at(planned - 1)
        if self.variant == "loader":
            self._single, self._batch = (
                self._loader_class(
                    self._mixture,
                    micro_batch_size=size,
                    global_batch_size=size,
                    data_parallel_rank=0,
                    data_parallel_size=1,
                )
                for size in (1, BATCH_SIZE)
            )

    def sample(self) -> Any:
        self._next += 1
        if self.variant == "loader":
            (batch,) = self._single.micro_batches(self._next - 1)
            return batch.tokens[0]
        return self.sample_at(self._next - 1)

    def sample_at(self, number: int) -> np.ndarray:
        """Ids [s + 1]."""
        language, sequence = self._mixture.locate_one(number)
        ids = np.empty(SEQ_LENGTH + 1, np.int64)
        self._mixture.sequences[language].fill(sequence, ids)
        return ids

    def batch(self) -> Any:
        first, self._next = self._next, self._next + BATCH_SIZE
        if self.variant == "loader":
            (batch,) = self._batch.micro_batches(first)
            return batch
        languages, numbers = self._mixture.locate(np.arange(first, self._next))
        return self._mixture.read(languages, numbers).ids

    def state(self) -> int:
        return self._next

    def resume(self, state: int) -> None:
        self._next = state

    def exact_counts(self, samples: int) -> np.ndarray:
        counts = self._mixture.counts(samples)
        return np.array([counts[name] for name in LANGUAGES])


if __name__ == "__main__":
    run(MagnetronLoader)

"""This data-parallel rank's micro-batches of a training step, and of the validation set.

Ranks come in as plain numbers. Neither class keeps a position: what a step holds is a function of
how much was consumed before, so resuming is asking for the next step, and the sequences of a step
are the same set for every layout.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from data.batch import Batch
from data.objectives import causal_lm
from data.packed_sequences import PackedSequences, RowReader, Rows, Tail
from data.packing_config import PackingConfig
from data.token_store import TokenStore


class SampleSource(Protocol):
    """What the loader needs of data.language_mixture.LanguageMixture."""

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Language id and sequence number of each sample, shaped like `samples`."""
        ...

    def read(self, languages: np.ndarray, numbers: np.ndarray) -> Rows:
        """The packed rows of b sequences."""
        ...

    def fingerprint(self) -> dict[str, Any]: ...


class MicroBatchLoader:
    """Cuts the stream of samples into steps, ranks and micro-batches.

    A step that begins after c consumed sequences holds samples [c, c + G) for G =
    global_batch_size; micro-batch j of rank r of R holds the m = micro_batch_size samples from
    c + (j R + r) m on. num_micro_batches is G / (m R), the same on every rank. Counting sequences
    and not steps lets a resumed run change its batch size without repeating or skipping any.

    packing: how the source packs, for what the model is told of it.

    Raises ValueError if global_batch_size is not a multiple of micro_batch_size times the
    data-parallel size.
    """

    def __init__(
        self,
        source: SampleSource,
        *,
        micro_batch_size: int,
        global_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        packing: PackingConfig | None = None,
    ):
        _check_rank(micro_batch_size, data_parallel_rank, data_parallel_size)
        samples_at_once = micro_batch_size * data_parallel_size
        if global_batch_size < 1 or global_batch_size % samples_at_once:
            below = global_batch_size // samples_at_once * samples_at_once
            works = [str(n) for n in (below, below + samples_at_once) if n > 0]
            raise ValueError(
                f"train.global_batch_size={global_batch_size} must be a positive multiple of "
                f"train.micro_batch_size={micro_batch_size} times the data-parallel size "
                f"{data_parallel_size} (= {samples_at_once}); "
                f"train.global_batch_size={' or '.join(works)} would work"
            )
        self._source, self._packing = source, packing or PackingConfig()
        self._micro_batch_size, self.global_batch_size = micro_batch_size, global_batch_size
        self._rank, self._ranks = data_parallel_rank, data_parallel_size
        self.num_micro_batches = global_batch_size // samples_at_once

    def micro_batches(self, consumed_sequences: int) -> Iterator[Batch]:
        """This rank's num_micro_batches batches of the next step, read as they are asked for."""
        if consumed_sequences < 0:
            raise ValueError(f"consumed_sequences={consumed_sequences}: counts from 0")
        # once a step: each call costs about 10 us, and 1 to 3 ms where it enters another block
        languages, numbers = self._source.locate(self._samples(consumed_sequences))
        return (
            batch_of(self._source.read(language_ids, places), language_ids, self._packing)
            for language_ids, places in zip(languages, numbers, strict=True)
        )

    def fingerprint(self) -> dict[str, Any]:
        """Of the stream, for the checkpoint; batch sizes and layout may change between runs."""
        return self._source.fingerprint()

    def _samples(self, consumed_sequences: int) -> np.ndarray:
        """Sample numbers `[num_micro_batches, micro_batch_size]` of this rank."""
        order = np.arange(self.global_batch_size, dtype=np.int64)
        by_rank = order.reshape(self.num_micro_batches, self._ranks, self._micro_batch_size)
        return consumed_sequences + by_rank[:, self._rank]


class ValidationSet:
    """The first sequences of each language's validation store, in a fixed order.

    Up to sequences_per_language of each store, cut with Tail.pad, so that short stores count every
    token once (with best-fit packing: every token but the first of each sequence, if nothing masks
    it). They are dealt out like a training step; the last round is filled with padding
    sequences (loss_mask all 0) until every rank has the same number of micro-batches, because
    pipeline schedules and collectives need equal counts, and until that number is a multiple of
    micro_batch_multiple, because the interleaved schedule asks for a multiple of the pipeline size.

    languages: of the training data; the language ids count in it.
    """

    def __init__(
        self,
        stores: Sequence[TokenStore],
        seq_length: int,
        *,
        languages: Sequence[str],
        sequences_per_language: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        micro_batch_multiple: int = 1,
        packing: PackingConfig | None = None,
        plan_folder: Path | None = None,
    ):
        _check_rank(micro_batch_size, data_parallel_rank, data_parallel_size)
        if sequences_per_language < 1:
            raise ValueError(
                f"train.eval_sequences={sequences_per_language}: must be at least 1 a language"
            )
        if not stores:
            raise ValueError(
                "there are no validation stores; raise data.validation_fraction so that some "
                "documents fall into validation, or give a store_dir with a validation folder"
            )
        self._seq_length, self._eod_id = seq_length, stores[0].info.eod_id
        self._rank, self._ranks = data_parallel_rank, data_parallel_size
        self._micro_batch_size = micro_batch_size
        self._packing = packing or PackingConfig()
        stores = sorted(stores, key=lambda store: store.language)
        self._stores = [
            PackedSequences(store, seq_length, Tail.pad, self._packing, plan_folder)
            for store in stores
        ]
        self._reader = RowReader(self._stores)
        taken = [min(sequences_per_language, len(packed)) for packed in self._stores]
        # of each sequence: place of its store, number in it, language id
        self._store = np.repeat(np.arange(len(stores)), taken)
        self._number = np.concatenate([np.arange(count) for count in taken])
        self._language = np.repeat([languages.index(store.language) for store in stores], taken)
        in_one_round = micro_batch_size * data_parallel_size * micro_batch_multiple
        rounds = -(-len(self._store) // in_one_round)
        self.num_micro_batches = rounds * micro_batch_multiple

    def __len__(self) -> int:
        """Sequences in all, padding not counted."""
        return len(self._store)

    def micro_batches(self) -> Iterator[Batch]:
        """This rank's num_micro_batches batches, the same every time."""
        return (self._micro_batch(number) for number in range(self.num_micro_batches))

    def _micro_batch(self, number: int) -> Batch:
        first = (number * self._ranks + self._rank) * self._micro_batch_size
        there = slice(first, first + self._micro_batch_size)
        language_ids = self._language[there]
        rows = self._reader.read(self._store[there], self._number[there])
        missing = self._micro_batch_size - len(language_ids)
        if missing:  # the last round: rows of padding
            rows = Rows(
                _padded(rows.ids, missing, self._eod_id),
                _padded(rows.valid, missing, 0),
                None if rows.documents is None else _padded(rows.documents, missing, 0),
                None if rows.label_mask is None else _padded(rows.label_mask, missing, False),
            )
            language_ids = _padded(language_ids, missing, 0)
        return batch_of(rows, language_ids, self._packing)


def fingerprint_differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Where two fingerprints differ, one readable line each; empty if the streams are the same."""
    lines = []
    for name in sorted(set(saved) | set(current)):
        was, now = saved.get(name), current.get(name)
        if was == now:
            continue
        if isinstance(was, dict) and isinstance(now, dict):
            inner = [k for k in sorted(set(was) | set(now)) if was.get(k) != now.get(k)]
            lines += [f"{name} of {k}: was {was.get(k)}, is {now.get(k)}" for k in inner]
        else:
            lines.append(f"{name}: was {was}, is {now}")
    return lines


def _check_rank(micro_batch_size: int, rank: int, ranks: int) -> None:
    if micro_batch_size < 1:
        raise ValueError(f"train.micro_batch_size={micro_batch_size}: must be at least 1")
    if not 0 <= rank < ranks:
        raise ValueError(f"data-parallel rank {rank} of {ranks}: must lie in [0, {ranks})")


def _padded(rows: np.ndarray, missing: int, fill: int) -> np.ndarray:
    return np.concatenate([rows, np.full((missing, *rows.shape[1:]), fill, rows.dtype)])


def batch_of(rows: Rows, language_ids: np.ndarray, packing: PackingConfig) -> Batch:
    """Rows of b sequences and their language ids [b] int64, as the objective asks for them."""
    # a source that forgot the borders would train as if reset_attention were off, without a word
    assert (rows.documents is not None) == packing.reset_attention
    documents = None
    if rows.documents is not None:
        documents = torch.from_numpy(rows.documents[:, :-1])
    return Batch(
        *causal_lm(rows),
        language_ids=torch.from_numpy(language_ids),
        documents=documents,
        reset_positions=packing.reset_positions,
    )

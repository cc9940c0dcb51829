"""From a spike to the documents: which of a step's documents made its loss or gradient what it was.

    token losses of every rank -> losses by document, against what their language usually has
    not finite                 -> the sequences, then each of their documents, forward by itself
    the gradient alone         -> sequences, then documents, forward and backward by themselves

The token losses of the last steps stay on the device, where training computed them anyway; nothing
is moved, and no sequence is run again, before an anomaly.

Shapes: G sequences of a step, s tokens of a sequence, R data-parallel ranks, m sequences of a
micro-batch.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data.batch import Batch
from data.loader import batch_of
from data.open_data import Data
from data.packed_sequences import Rows
from data.replay import replay_sample
from parallel.context_parallel import shard_sequence
from parallel.engine import Engine
from parallel.runtime import Runtime
from pretrain.anomaly import Verdict
from pretrain.anomaly_report import (
    DocumentRow,
    EarlierStep,
    Findings,
    LanguageRow,
    SequenceRow,
)
from pretrain.config import AnomalyConfig, TrainConfig
from pretrain.loss import LanguageLosses
from pretrain.train_step import StepMetrics, forward_step

# Sequences whose documents are run by themselves once the sequence is found.
_SEQUENCES_TAKEN_APART = 3
_DOCUMENTS_OF_EARLIER_STEPS = 3
_CHARACTERS = 400  # of a document's text in a report

_Read = TypeVar("_Read")


class UnreadableError(RuntimeError):
    """A rank cannot read what is to be run again; raised on all ranks alike."""


@dataclass(frozen=True)
class KeptStep:
    step: int
    first: int  # sample; the step has global_batch_size of them
    losses: LanguageLosses
    token_losses: list[Tensor]  # see StepMetrics


class Culprits:
    """Keeps the last steps' token losses, and finds the documents that stand out in them.

    All ranks hold one and call its methods in the same order.
    """

    def __init__(
        self,
        config: AnomalyConfig,
        train: TrainConfig,
        engine: Engine,
        runtime: Runtime,
        data: Data,
    ) -> None:
        self.config = config
        self.engine = engine
        self.runtime = runtime
        self.data = data
        self.sequences = train.global_batch_size
        self.micro_batch_size = train.micro_batch_size
        self._kept: deque[KeptStep] = deque(maxlen=config.keep_batches)

    def keep(self, step: int, first: int, metrics: StepMetrics) -> None:
        """Step number `step`, made of the samples from `first` on. Moves nothing."""
        self._kept.append(KeptStep(step, first, metrics.losses, metrics.token_losses))

    def forget(self) -> None:
        """What was kept belongs to steps that a rollback takes back."""
        self._kept.clear()

    def find(self, verdict: Verdict, *, rerun: bool) -> Findings:
        """What is known of the step kept last; on rank 0, the others get empty findings.

        All ranks must call it. rerun: run sequences again where the losses do not say enough;
        neither weights nor what the model counts are touched, gradients are lost.
        """
        kept = list(self._kept)
        step, before = kept[-1], kept[:-1]
        usual = UsualLosses(before or kept, self.data.languages)
        found = Findings(languages=self._languages(step, usual))
        documents = self._documents(step, usual, found)
        found.nonfinite_samples = sorted({d.sample for d in documents if d.nonfinite_labels})
        if rerun and self.config.rerun_sequences:
            with undisturbed(self.engine):
                self._run_again(verdict, step, documents, found)
        elif self.sequences > 1 and len(found.nonfinite_samples) == self.sequences:
            found.no_culprit = _EVERYWHERE
        found.documents = self._worst(documents, self.config.max_documents, found)
        for earlier in reversed(before):
            found.earlier.append(
                EarlierStep(
                    earlier.step,
                    [earlier.first, earlier.first + self.sequences],
                    earlier.losses.mean(),
                    self._worst(
                        self._documents(earlier, usual, found), _DOCUMENTS_OF_EARLIER_STEPS, found
                    ),
                )
            )
        return found

    # ---- what the losses say ---------------------------------------------------------------------

    def _documents(self, step: KeptStep, usual: UsualLosses, found: Findings) -> list[DocumentRow]:
        """Every document of the step, in the order of the samples; on rank 0 only.

        None, and a remark, where they cannot be read: the other ranks are at the next collective.
        """
        rounds = self.sequences // (self.micro_batch_size * self.runtime.data_parallel_size)
        losses = self._gather(step.token_losses, rounds, self.micro_batch_size)
        if self.runtime.rank != 0:
            return []
        try:
            return self._rows(step, usual, losses)
        except Exception as error:
            found.remarks.append(f"the documents of step {step.step} cannot be read: {error!r}")
            return []

    def _rows(self, step: KeptStep, usual: UsualLosses, losses: Tensor) -> list[DocumentRow]:
        """losses: of all sequences of the step, [G, s]."""
        languages, numbers = self.data.mixture.locate(
            np.arange(step.first, step.first + self.sequences)
        )
        mask = self._batch(self.data.mixture.read(languages, numbers), languages).loss_mask != 0
        counted = int(mask.sum())
        rows = []
        for place, (language, number) in enumerate(
            zip(languages.tolist(), numbers.tolist(), strict=True)
        ):
            pieces = self.data.mixture.sequences[language].pieces(number)
            spans = label_spans([tokens for _, tokens in pieces], losses.shape[1])
            for (start, tokens), (begin, end) in zip(pieces, spans, strict=True):
                of_document = losses[place, begin:end][mask[place, begin:end]].double()
                piece = (step.first + place, start, tokens)
                rows.append(self._row(piece, language, of_document, usual, counted))
        return rows

    def _row(
        self,
        piece: Piece,
        language: int,
        losses: Tensor,
        usual: UsualLosses,
        counted: int,
    ) -> DocumentRow:
        code = self.data.languages[language]
        labels, total, expected = len(losses), float(losses.sum()), usual.of(code)
        sample, first_token, tokens = piece
        return DocumentRow(
            sample=sample,
            language=code,
            family=self.data.family_of[code],
            store=str(self.data.mixture.stores[language].prefix),
            first_token=first_token,
            tokens=tokens,
            labels=labels,
            mean_loss=total / labels if labels else math.nan,
            expected_loss=expected,
            contribution=total / counted,
            excess=(total - labels * expected) / counted,
            nonfinite_labels=labels - int(losses.isfinite().sum()),
        )

    def _worst(
        self, documents: list[DocumentRow], count: int, found: Findings
    ) -> list[DocumentRow]:
        """The most suspicious ones, named and with their text.

        Those that cannot be named keep their place and numbers, with a remark.
        """
        worst = sorted(documents, key=_suspicion)[:count]
        for row in worst:
            try:
                self._name(row)
            except Exception as error:  # the other ranks are at the next collective
                found.remarks.append(
                    f"the document at token {row.first_token} of {row.store} cannot be read: "
                    f"{error!r}"
                )
        return worst

    def _name(self, row: DocumentRow) -> None:
        pieces = replay_sample(self.data, row.sample).pieces
        piece = next(piece for piece in pieces if piece.start == row.first_token)
        row.document, row.source = piece.document, piece.source
        row.doc_id = piece.doc_id
        row.text = piece.text[:_CHARACTERS]

    def _languages(self, step: KeptStep, usual: UsualLosses) -> list[LanguageRow]:
        family_of, totals = self.data.family_of, step.losses.totals
        return [
            LanguageRow(code, family_of[code], loss, usual.of(code), int(tokens))
            for (code, loss), tokens in zip(
                step.losses.per_language().items(), totals[totals[:, 1] > 0, 1], strict=True
            )
        ]

    def _gather(self, token_losses: list[Tensor], rounds: int, m: int) -> Tensor:
        """Every rank's token losses in the order of the samples: [rounds * R * m, s], on the host.

        Micro-batch by micro-batch, so that the device needs room for one of each rank.
        """
        runtime = self.runtime
        gathered = []
        mine = runtime.is_last_pipeline_stage and runtime.tensor_parallel_rank == 0
        places = shard_sequence(
            torch.arange(self.data.mixture.seq_length, device=runtime.device),
            runtime.context_parallel_rank,
            runtime.context_parallel_size,
        )
        shape = (runtime.data_parallel_size, m, self.data.mixture.seq_length)
        for number in range(rounds):
            whole = torch.zeros(shape, dtype=torch.float32, device=runtime.device)
            if mine:
                whole[runtime.data_parallel_rank][:, places] = token_losses[number].float()
            dist.all_reduce(whole)
            gathered.append(whole.flatten(0, 1).cpu())
        return torch.cat(gathered)

    # ---- running sequences again -----------------------------------------------------------------

    def _run_again(
        self, verdict: Verdict, step: KeptStep, documents: list[DocumentRow], found: Findings
    ) -> None:
        by_loss = verdict.kind == "spike" and verdict.loss_z > self.config.spike_threshold
        readable, nonfinite = from_rank_zero((bool(documents), bool(found.nonfinite_samples)))
        if not readable:
            return
        try:
            if nonfinite:
                self._find_nonfinite_losses(documents, found)
            elif verdict.kind == "nonfinite":
                self._find_nonfinite_gradients(step, documents, found)
            elif not by_loss:
                self._find_large_gradients(documents, found)
        except UnreadableError as error:
            found.remarks.append(f"running sequences again was given up: {error}")

    def _find_nonfinite_losses(self, documents: list[DocumentRow], found: Findings) -> None:
        """Each sequence that was not finite forward by itself, and each document of it."""
        samples = from_rank_zero(found.nonfinite_samples[: self.config.rerun_sequences])
        pieces = self._pieces(samples)
        units = self._read(
            lambda: [
                self._padding(counts=True),
                *map(self._whole, samples),
                *(self._alone(*piece) for piece in pieces),
            ]
        )
        losses = self._forward(units)
        finite = [
            bool(row[unit.loss_mask[0] != 0].isfinite().all())
            for row, unit in zip(losses, units, strict=True)
        ]
        padding, whole, alone = finite[0], finite[1 : 1 + len(samples)], finite[1 + len(samples) :]
        found.remarks.append(
            f"{len(found.nonfinite_samples)} of {self.sequences} sequences have a loss that is not "
            f"finite; of {len(samples)} run again by themselves, {whole.count(False)} are not "
            "finite again"
        )
        if not padding:
            found.no_culprit = _NOTHING_IS_FINITE
            return
        if all(whole):
            found.no_culprit = _NOT_AGAIN
        self._note(documents, dict(zip(pieces, alone, strict=True)))

    def _find_nonfinite_gradients(
        self, step: KeptStep, documents: list[DocumentRow], found: Findings
    ) -> None:
        """By halving: 2 log2(G) runs for one sequence, whatever the batch."""
        samples = list(range(step.first, step.first + self.sequences))
        broken = self._nonfinite_within(samples, self.config.rerun_sequences)
        found.remarks.append(
            f"all losses are finite; the gradient of {len(broken)} sequences is not, run by "
            "themselves"
        )
        if not broken:
            found.no_culprit = _NOT_AGAIN
        found.nonfinite_samples = broken
        pieces = self._pieces(broken[:_SEQUENCES_TAKEN_APART])
        norms = {piece: self._gradient_norm_alone(piece) for piece in pieces}
        self._note(documents, {piece: math.isfinite(norm) for piece, norm in norms.items()}, norms)

    def _nonfinite_within(self, samples: list[int], most: int) -> list[int]:
        if math.isfinite(self._gradient_norm(samples)):
            return []
        if len(samples) == 1:
            return samples
        half = len(samples) // 2
        found = self._nonfinite_within(samples[:half], most)
        if len(found) < most:
            found += self._nonfinite_within(samples[half:], most - len(found))
        return found

    def _find_large_gradients(self, documents: list[DocumentRow], found: Findings) -> None:
        """The sequences of the highest losses one by one, then the documents of the worst."""
        labels: dict[int, int] = {}
        excess: dict[int, float] = {}
        for row in documents:
            labels[row.sample] = labels.get(row.sample, 0) + row.labels
            excess[row.sample] = excess.get(row.sample, 0.0) + row.excess
        ranked = sorted(excess, key=lambda sample: (-excess[sample], sample))
        samples = from_rank_zero(ranked[: self.config.rerun_sequences])
        norms = {sample: self._gradient_norm([sample]) for sample in samples}
        language = {row.sample: row.language for row in documents}
        counted = sum(labels.values())
        for sample in samples if self.runtime.rank == 0 else []:
            weighted = norms[sample] * labels[sample] / counted
            code = language[sample]
            found.sequences.append(SequenceRow(sample, code, norms[sample], weighted))
            shares = found.gradient_share_by_language
            shares[code] = shares.get(code, 0.0) + weighted
        found.sequences.sort(key=lambda row: -row.gradient_share)
        found.remarks.append(
            f"the {len(samples)} sequences of the highest losses were run again by themselves"
        )
        worst = from_rank_zero([row.sample for row in found.sequences[:_SEQUENCES_TAKEN_APART]])
        alone = {piece: self._gradient_norm_alone(piece) for piece in self._pieces(worst)}
        self._note(documents, {}, alone)

    def _note(
        self,
        documents: list[DocumentRow],
        finite: dict[Piece, bool],
        norms: dict[Piece, float] | None = None,
    ) -> None:
        for row in documents:
            piece = (row.sample, row.first_token, row.tokens)
            if piece in finite:
                row.alone = "finite" if finite[piece] else "not finite"
            if norms and piece in norms:
                row.gradient_norm = norms[piece]

    def _forward(self, units: list[Batch]) -> Tensor:
        """Token losses of batches of one sequence, without gradients: [len(units), s]."""
        mine = self._deal(units)
        metrics = self.engine.forward_backward(mine, **self._schedule(), forward_only=True)
        losses = self._gather([entry["loss"] for entry in metrics], len(mine), 1)
        return losses[: len(units)]

    def _gradient_norm(self, samples: list[int]) -> float:
        """Global gradient norm of the mean loss over these sequences, as they stood in the step."""
        return self._norm_of(self._read(lambda: [self._whole(sample) for sample in samples]))

    def _gradient_norm_alone(self, piece: Piece) -> float:
        return self._norm_of(self._read(lambda: [self._alone(*piece)]))

    def _norm_of(self, units: list[Batch]) -> float:
        self.engine.forward_backward(self._deal(units), **self._schedule())
        norm = self.engine.step(0.0, accept=lambda grad_norm: False).grad_norm
        return float(from_rank_zero(norm))

    def _schedule(self) -> dict[str, Any]:
        return {
            "forward_step": partial(forward_step, device=self.runtime.device),
            "seq_length": self.data.mixture.seq_length,
            "micro_batch_size": 1,
        }

    def _deal(self, units: list[Batch]) -> list[Batch]:
        """This rank's share, and padding to whole rounds of the pipeline's schedule."""
        ranks, stages = self.runtime.data_parallel_size, self.runtime.pipeline_parallel_size
        mine = units[self.runtime.data_parallel_rank :: ranks]
        rounds = -(-len(units) // (ranks * stages)) * stages
        return mine + [self._padding()] * (rounds - len(mine))

    # ---- batches of one sequence -----------------------------------------------------------------

    def _read(self, action: Callable[[], _Read]) -> _Read:
        """What `action` makes of the data. Raises UnreadableError on all ranks where it fails on
        one: a spike is no reason to end a run, and the others would wait in the next pass."""
        failure, result = "", None
        try:
            result = action()
        except Exception as error:
            failure = f"rank {self.runtime.rank} cannot read them: {error!r}"
        failures = [""] * self.runtime.world_size
        dist.all_gather_object(failures, failure)
        if any(failures):
            raise UnreadableError(next(filter(None, failures)))
        return cast(_Read, result)

    def _batch(self, rows: Rows, language_ids: np.ndarray) -> Batch:
        return batch_of(rows, language_ids, self.data.mixture.packing)

    def _whole(self, sample: int) -> Batch:
        """The sequence as it stood in the step."""
        languages, numbers = self.data.mixture.locate(np.array([sample]))
        return self._batch(self.data.mixture.read(languages, numbers), languages)

    def _pieces(self, samples: Sequence[int]) -> list[Piece]:
        """(sample, first token, tokens) of their documents, each once."""
        return self._read(lambda: [piece for one in samples for piece in self._pieces_of(one)])

    def _pieces_of(self, sample: int) -> list[Piece]:
        language, number = self.data.mixture.locate_one(sample)
        pieces = self.data.mixture.sequences[language].pieces(number)
        return list(dict.fromkeys((sample, start, tokens) for start, tokens in pieces))

    def _alone(self, sample: int, start: int, tokens: int) -> Batch:
        """One document at the beginning of a sequence that has nothing else in it."""
        language, _ = self.data.mixture.locate_one(sample)
        ids = self.data.mixture.stores[language].read(start, start + tokens)
        return self._filled(ids, language, counts=tokens)

    def _padding(self, *, counts: bool = False) -> Batch:
        """A sequence of end-of-document tokens; `counts`: its labels do."""
        return self._filled(np.empty(0, np.int64), 0, counts=self.data.mixture.seq_length * counts)

    def _filled(self, ids: np.ndarray, language: int, *, counts: int) -> Batch:
        """`ids`, then end-of-document tokens; the first `counts` labels count, one behind the ids'
        own included, so that every id is something's context."""
        mixture = self.data.mixture
        s = mixture.seq_length
        row = np.full((1, s + 1), mixture.stores[language].info.eod_id, np.int64)
        row[0, : len(ids)] = ids
        documents = (np.arange(s + 1) >= len(ids)).astype(np.int32)[None]
        rows = Rows(
            row,
            np.array([s]),
            documents if mixture.packing.reset_attention else None,
            np.arange(s)[None] < counts,
        )
        return self._batch(rows, np.array([language]))


Piece = tuple[int, int, int]  # sample, first token in the store, tokens

_NOTHING_IS_FINITE = (
    "a sequence of nothing but end-of-document tokens is not finite either: the weights or the "
    "machine are broken, and no document is to blame"
)
_EVERYWHERE = (
    "no sequence of the step has a finite loss: it is more likely that the weights or the machine "
    "are broken than that every one of them holds a document to blame"
)
_NOT_AGAIN = (
    "it did not happen again: a fault of the machine or of its network is more likely than the data"
)


class UsualLosses:
    """Mean losses by language over steps; those of a step that is not finite do not count."""

    def __init__(self, steps: Sequence[KeptStep], languages: Sequence[str]) -> None:
        losses = LanguageLosses(languages)
        for step in steps:
            finite = step.losses.totals.isfinite().all(dim=1, keepdim=True)
            losses.totals += torch.where(finite, step.losses.totals, 0.0)
        self._by_language, self._mean = losses.per_language(), losses.mean()

    def of(self, language: str) -> float:
        """The mean over all languages where it has not been seen."""
        return self._by_language.get(language, self._mean)


def label_spans(lengths: Sequence[int], seq_length: int) -> list[tuple[int, int]]:
    """[begin, end) of the labels that are tokens of each document of a row, in order.

    lengths: ids of each document of the row. Label i is id i + 1 of the row, so the first id of
    all is nobody's label.
    """
    spans, at = [], 0
    for length in lengths:
        spans.append((max(at - 1, 0), min(at + length - 1, seq_length)))
        at += length
    return spans


@contextlib.contextmanager
def undisturbed(engine: Engine) -> Iterator[None]:
    """Forward and backward passes in here leave no trace in the model but its gradients.

    Routers count tokens, and move by what they counted, in every pass that has gradients.
    """
    models = [chunk.module for chunk in engine.chunks]
    buffers = [(buffer, buffer.clone()) for model in models for buffer in model.buffers()]
    healths = [model.router_health for model in models if model.router_health is not None]
    totals = [health.totals for health in healths]
    before_clipping, engine.before_clipping = engine.before_clipping, None
    for health in healths:
        health.totals = None
    try:
        yield
    finally:
        engine.before_clipping = before_clipping
        for health, total in zip(healths, totals, strict=True):
            health.totals = total
        with torch.no_grad():
            for buffer, content in buffers:
                buffer.copy_(content)


def _suspicion(row: DocumentRow) -> tuple[bool, bool, float, float, int, int]:
    """Sorts the most suspicious first: not finite by itself, not finite, gradient, loss."""
    gradient = 0.0 if row.gradient_norm is None else row.gradient_norm * row.labels
    return (
        row.alone != "not finite",
        not row.nonfinite_labels,
        -gradient if math.isfinite(gradient) else -math.inf,
        -row.excess if math.isfinite(row.excess) else -math.inf,
        row.sample,
        row.first_token,
    )


def from_rank_zero(value: Any) -> Any:
    """What rank 0 has of it: ranks that sort alike may still round differently."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]

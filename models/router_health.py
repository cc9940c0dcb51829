"""What routers do: load by expert and language, entropy, dropped tokens, and collapse.

Routers call `RouterHealth.record`; `pretrain.router_report` starts the counting, adds up the ranks
and names the numbers. Counting stays on the device and never makes the host wait.

Shapes: t tokens this rank routes, b sequences, E experts, h hidden size, n sparse layers of the
whole model, L languages. Tokens are sequence-first: token index = position * b + sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# below the smallest probability that changes an entropy in fp32, and above its denormals
_SMALLEST_PROBABILITY = 1e-30


class RouterTotals:
    """Sums over tokens, of this rank until ranks are added up: a row for each sparse layer.

    load [n, L, E] int64: choices of an expert, by language, before tokens are dropped.
    kept [n, E] int64: those that the expert's capacity let through.
    sums [n, 3] float64: of tokens, of their entropies (nats), of their balance loss.
    """

    def __init__(self, layers: int, languages: int, experts: int, device: torch.device) -> None:
        self.load = torch.zeros(layers, languages, experts, dtype=torch.int64, device=device)
        self.kept = torch.zeros(layers, experts, dtype=torch.int64, device=device)
        self.sums = torch.zeros(layers, 3, dtype=torch.float64, device=device)

    def packed(self) -> Tensor:
        """All of it in one vector, to be added over ranks. float64: exact up to 2^53 tokens."""
        return torch.cat([part.double().flatten() for part in self._parts()])

    def unpack(self, packed: Tensor) -> RouterTotals:
        """Take over what `packed` gave, on any device; returns self."""
        sizes = [part.numel() for part in self._parts()]
        load, kept, sums = packed.split(sizes)
        self.load = load.view_as(self.load).to(torch.int64)
        self.kept = kept.view_as(self.kept).to(torch.int64)
        self.sums = sums.view_as(self.sums)
        return self

    def zero(self) -> None:
        for part in self._parts():
            part.zero_()

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.load, self.kept, self.sums


@dataclass
class Probe:
    """Which sequences of the coming evaluation are looked at, and what was seen of them.

    sequences: for each micro-batch of this rank in order, places in [0, b).
    hidden, experts: by layer, one tensor a micro-batch that has any: router inputs [k, h], and the
        first choice of each of these tokens [k]. Masked tokens are left out.
    """

    sequences: Sequence[Sequence[int]]
    hidden: dict[int, list[Tensor]] = field(default_factory=dict)
    experts: dict[int, list[Tensor]] = field(default_factory=dict)
    _micro_batches_seen: dict[int, int] = field(default_factory=dict)

    def next_sequences(self, layer: int) -> Sequence[int]:
        """Of the micro-batch that `layer` routes now: schedules run them in order."""
        number = self._micro_batches_seen.get(layer, 0)
        self._micro_batches_seen[layer] = number + 1
        return self.sequences[number]


class RouterHealth:
    """Counts what the routers of one model chunk do; does nothing until `start`.

    `language_ids` [b] and `loss_mask` [b, s] (s as this context-parallel rank sees it) describe
    the micro-batch in the forward pass: the model sets them before its layers run. None: all
    tokens are of language 0, and none is masked.
    """

    def __init__(self) -> None:
        self.language_ids: Tensor | None = None
        self.loss_mask: Tensor | None = None
        self.totals: RouterTotals | None = None
        self.probe: Probe | None = None

    def start(
        self,
        *,
        num_experts: int,
        layers: Sequence[int],
        languages: int,
        device: torch.device,
        tensor_parallel_rank: int = 0,
        sequence_parallel: bool = False,
    ) -> None:
        """Count from now on.

        Args:
            num_experts, languages: E and L.
            layers: the sparse layers of the whole model, counted from 1, so that every rank's
                totals have the same shape whichever layers it holds.
            tensor_parallel_rank, sequence_parallel: without sequence parallelism the ranks route
                copies of the same tokens, and only the first one counts them.
        """
        self.totals = RouterTotals(len(layers), languages, num_experts, device)
        self._row = {layer: row for row, layer in enumerate(layers)}
        self._tensor_parallel_rank = tensor_parallel_rank
        self._sequence_parallel = sequence_parallel

    def wants(self, *, training: bool) -> bool:
        """Whether `record` would use a forward pass; routers may skip the call otherwise."""
        if self.totals is None or (self._tensor_parallel_rank and not self._sequence_parallel):
            return False
        return training or self.probe is not None

    @torch.no_grad()
    def record(
        self,
        layer_number: int,
        *,
        first: Tensor,
        chosen: Tensor,
        kept: Tensor,
        probs: Tensor,
        balance_loss: Tensor | None,
        batch_size: int,
        hidden: Tensor | None = None,
        training: bool = True,
    ) -> None:
        """One micro-batch of one router; a pass that recomputes activations must not come here.

        Args:
            layer_number: counted from 1 over the whole model.
            first: [t] the expert chosen first.
            chosen: [t, E] bool, before tokens are dropped.
            kept: [t, E] bool, after; the same tensor as `chosen` where nothing is dropped.
            probs: [t, E] each token's distribution over experts.
            balance_loss: scalar, without its coefficient; the mean over the tokens of all ranks
                is what is reported. None: the router has none.
            batch_size: b.
            hidden: [t, h] what the router saw; used in evaluations only.
            training: False in an evaluation, which counts nothing and serves the probe.
        """
        if not self.wants(training=training):
            return
        if not training:
            assert hidden is not None
            self._look(layer_number, first, hidden, batch_size)
            return
        totals, row = self.totals, self._row[layer_number]
        assert totals is not None
        # [b, E]; of all types int32 adds up booleans fastest on CPUs
        tokens, experts = chosen.shape
        by_sequence = chosen.view(-1, batch_size, experts).sum(0, dtype=torch.int32).long()
        if self.language_ids is None:
            totals.load[row, 0].add_(by_sequence.sum(0))
        else:
            totals.load[row].index_add_(0, self.language_ids, by_sequence)
        totals.kept[row].add_(
            by_sequence.sum(0) if kept is chosen else kept.sum(0, dtype=torch.int32)
        )
        sums = totals.sums[row]
        sums[0].add_(tokens)
        # a dot product: torch.special.entr takes seven times as long on CPUs
        flat = probs.flatten()
        sums[1].sub_(torch.dot(flat, flat.clamp(min=_SMALLEST_PROBABILITY).log()))
        if balance_loss is not None:
            sums[2].add_(balance_loss, alpha=tokens)

    def _look(self, layer: int, first: Tensor, hidden: Tensor, batch_size: int) -> None:
        assert self.probe is not None
        sequences = list(self.probe.next_sequences(layer))
        if not sequences:
            return
        first = first.view(-1, batch_size)[:, sequences]
        states = hidden.view(-1, batch_size, hidden.shape[-1])[:, sequences]
        valid = self._valid_tokens(len(first), batch_size)[:, sequences]
        self.probe.experts.setdefault(layer, []).append(first[valid])
        self.probe.hidden.setdefault(layer, []).append(states[valid])

    def _valid_tokens(self, positions: int, batch_size: int) -> Tensor:
        """Which of this rank's tokens the loss counts: [positions, b] bool."""
        if self.loss_mask is None:
            return torch.ones(positions, batch_size, dtype=torch.bool)
        first = self._tensor_parallel_rank * positions if self._sequence_parallel else 0
        return self.loss_mask.t()[first : first + positions] != 0


def class_sums(hidden: Tensor, experts: Tensor, num_experts: int) -> Tensor:
    """Sums of the hidden states [k, h] sent to each expert, and in the last column how many.

    [E, h + 1] float64: to be added over micro-batches and ranks.
    """
    ones = torch.ones(len(hidden), 1, dtype=torch.float64, device=hidden.device)
    sums = torch.zeros(num_experts, hidden.shape[1] + 1, dtype=torch.float64, device=hidden.device)
    return sums.index_add_(0, experts, torch.cat([hidden.double(), ones], dim=1))


class CollapseMeasure:
    """Representation collapse of hidden states grouped by expert: Tr(Σ_W pinv(Σ_B)).

    X-MoE (arXiv 2204.09179 section 4.5). Σ_W = (1/N) Σ_i (x_i - m_k(i)) (x_i - m_k(i))^T is the
    covariance within groups, Σ_B = Σ_k (N_k/N) (m_k - m) (m_k - m)^T that between their means; with
    these weights they add up to the covariance of all states. Small: states crowd around their
    expert's mean, which is collapse.

    Neither [h, h] matrix is made. Σ_B = A^T A with A's E rows sqrt(N_k/N) (m_k - m), so that
    pinv(Σ_B) = P P^T with P = A^T U / λ, from A A^T = U λ U^T. The trace is then the mean over
    tokens of |(x_i - m_k(i)) P|²: after the sums of all ranks are known, each rank adds up its own
    tokens (`scatter`). Eigenvalues below max(h, E) machine epsilons of the largest count as zero,
    as in torch.linalg.pinv.

    Args:
        sums: [E, h + 1], what `class_sums` gave, over all ranks.
    """

    def __init__(self, sums: Tensor) -> None:
        totals, counts = sums[:, :-1], sums[:, -1:]
        self.tokens = counts.sum()
        used = counts.clamp(min=1.0)
        means = totals / used  # [E, h]
        weights = (counts / self.tokens).sqrt()
        rows = weights * (means - totals.sum(0) / self.tokens)  # A
        eigenvalues, vectors = torch.linalg.eigh(rows @ rows.t())
        cutoff = max(rows.shape) * torch.finfo(rows.dtype).eps * eigenvalues[-1]
        there = (eigenvalues > cutoff) & (counts.count_nonzero() > 1)
        inverse = torch.where(there, 1.0 / eigenvalues, 0.0)
        self._defined = there.any()
        self._projection = rows.t() @ (vectors * inverse)  # P [h, E]
        self._means = means @ self._projection  # [E, E]

    def scatter(self, hidden: Tensor, experts: Tensor) -> Tensor:
        """Of these tokens [k, h] and their experts [k]: their part of the sum over tokens."""
        deviations = hidden.double() @ self._projection - self._means[experts]
        return deviations.square().sum()

    def value(self, scatter: Tensor) -> Tensor:
        """The measure from all tokens' `scatter`; NaN where fewer than two groups differ."""
        nothing = torch.full_like(scatter, torch.nan)
        return torch.where(self._defined, scatter / self.tokens, nothing)

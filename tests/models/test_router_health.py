"""What is counted, against loops; the collapse measure against its formula; what a probe sees."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from models.router_health import CollapseMeasure, Probe, RouterHealth, class_sums

POSITIONS, BATCH, EXPERTS, LANGUAGES = 7, 3, 5, 4
LAYERS = [2, 4]


@dataclass
class Routed:
    """What one router did with one micro-batch."""

    first: Tensor
    chosen: Tensor
    kept: Tensor
    probs: Tensor
    balance_loss: Tensor
    languages: Tensor


def routed(seed: int, topk: int = 2) -> Routed:
    generator = torch.Generator().manual_seed(seed)
    tokens = POSITIONS * BATCH
    probs = torch.rand(tokens, EXPERTS, generator=generator).softmax(1)
    chosen = torch.zeros(tokens, EXPERTS, dtype=torch.bool)
    chosen.scatter_(1, probs.topk(topk).indices, True)
    kept = chosen & (torch.rand(tokens, EXPERTS, generator=generator) < 0.8)
    languages = torch.randint(0, LANGUAGES, (BATCH,), generator=generator)
    return Routed(
        probs.argmax(1), chosen, kept, probs, 1 + torch.rand((), generator=generator), languages
    )


def started(**place: int | bool) -> RouterHealth:
    health = RouterHealth()
    health.start(
        num_experts=EXPERTS,
        layers=LAYERS,
        languages=LANGUAGES,
        device=torch.device("cpu"),
        **place,  # type: ignore[arg-type]
    )
    return health


def record(health: RouterHealth, layer: int, one: Routed) -> None:
    health.language_ids = one.languages
    health.record(
        layer,
        first=one.first,
        chosen=one.chosen,
        kept=one.kept,
        probs=one.probs,
        balance_loss=one.balance_loss,
        batch_size=BATCH,
    )


def test_counts_are_those_of_a_loop_over_tokens() -> None:
    health = started()
    passes = [(2, routed(1)), (4, routed(2)), (2, routed(3))]
    load = torch.zeros(2, LANGUAGES, EXPERTS, dtype=torch.int64)
    kept = torch.zeros(2, EXPERTS, dtype=torch.int64)
    sums = torch.zeros(2, 3, dtype=torch.float64)
    for layer, one in passes:
        record(health, layer, one)
        row = LAYERS.index(layer)
        for token in range(POSITIONS * BATCH):
            language = one.languages[token % BATCH]  # sequence-first
            for expert in range(EXPERTS):
                load[row, language, expert] += int(one.chosen[token, expert])
                kept[row, expert] += int(one.kept[token, expert])
                p = float(one.probs[token, expert])
                sums[row, 1] -= p * math.log(p)
            sums[row, 0] += 1
            sums[row, 2] += float(one.balance_loss)
    totals = health.totals
    assert totals is not None
    assert torch.equal(totals.load, load) and torch.equal(totals.kept, kept)
    torch.testing.assert_close(totals.sums, sums, rtol=1e-6, atol=0)


def test_numbers_survive_packing_and_start_anew() -> None:
    health, other = started(), started()
    record(health, 2, routed(1))
    record(other, 4, routed(2))
    assert health.totals is not None and other.totals is not None
    packed = health.totals.packed() + other.totals.packed()
    both = started().totals
    assert both is not None
    both.unpack(packed)
    assert torch.equal(both.load, health.totals.load + other.totals.load)
    assert both.load.dtype is torch.int64 and both.kept.shape == (2, EXPERTS)
    assert both.sums[0, 0] == POSITIONS * BATCH
    health.totals.zero()
    assert not health.totals.packed().any()


def test_nothing_dropped_no_language_no_balance_loss_and_certain_routers() -> None:
    one = routed(1, topk=1)
    health = started()
    health.record(
        4,
        first=one.first,
        chosen=one.chosen,
        kept=one.chosen,
        probs=one.chosen.float(),  # all others exactly 0: entropy 0, not NaN
        balance_loss=None,
        batch_size=BATCH,
    )
    totals = health.totals
    assert totals is not None
    assert torch.equal(totals.load[1, 0], one.chosen.sum(0)) and not totals.load[1, 1:].any()
    assert torch.equal(totals.kept[1], one.chosen.sum(0))
    assert totals.sums[1].tolist() == [POSITIONS * BATCH, 0.0, 0.0]


def test_who_counts() -> None:
    assert not RouterHealth().wants(training=True)  # not started
    record(RouterHealth(), 2, routed(1))
    alone, copy = started(), started(tensor_parallel_rank=1)
    part = started(tensor_parallel_rank=1, sequence_parallel=True)
    assert [h.wants(training=True) for h in (alone, copy, part)] == [True, False, True]
    record(copy, 2, routed(1))
    assert copy.totals is not None and not copy.totals.packed().any()
    assert not alone.wants(training=False)
    for health in (alone, copy, part):
        health.probe = Probe([[0]])
    assert [h.wants(training=False) for h in (alone, copy, part)] == [True, False, True]


def test_recording_leaves_gradients_alone() -> None:
    one = routed(1)
    one.probs = one.probs.clone().requires_grad_()
    one.balance_loss = one.probs.sum()
    health = started()
    record(health, 2, one)
    assert health.totals is not None and not health.totals.sums.requires_grad


@pytest.mark.parametrize("tensor_parallel_rank", [0, 1])
def test_a_probe_sees_its_sequences_and_no_masked_token(tensor_parallel_rank: int) -> None:
    """Two micro-batches of which the second has two sequences in the probe; SP ranks hold half."""
    health = started(tensor_parallel_rank=tensor_parallel_rank, sequence_parallel=True)
    health.probe = Probe([[], [2, 0]])
    mask = torch.ones(BATCH, 2 * POSITIONS)
    mask[0, 3:] = 0
    mask[2, POSITIONS + 1 :] = 0
    mask[1] = 0
    health.loss_mask = mask
    first_position = tensor_parallel_rank * POSITIONS
    for number, seed in enumerate((1, 2)):
        one = routed(seed)
        hidden = torch.arange(POSITIONS * BATCH * 2).view(-1, 2) + 1000.0 * number
        health.record(
            4,
            first=one.first,
            chosen=one.chosen,
            kept=one.kept,
            probs=one.probs,
            balance_loss=None,
            batch_size=BATCH,
            hidden=hidden,
            training=False,
        )
    assert health.totals is not None and not health.totals.packed().any()
    expected, choices = [], []
    for position in range(POSITIONS):
        for sequence in (2, 0):
            if mask[sequence, first_position + position]:
                token = position * BATCH + sequence
                expected.append(hidden[token])
                choices.append(int(one.first[token]))
    (states,), (experts,) = health.probe.hidden[4], health.probe.experts[4]
    assert torch.equal(states, torch.stack(expected)) and experts.tolist() == choices
    assert list(health.probe.hidden) == [4]


def direct_collapse(hidden: Tensor, experts: Tensor) -> float:
    """Tr(Σ_W pinv(Σ_B)), matrices and all."""
    x, width = hidden.double(), hidden.shape[1]
    within, between = torch.zeros(2, width, width, dtype=torch.float64)
    for expert in experts.unique():
        group = x[experts == expert]
        centred = group - group.mean(0)
        within += centred.t() @ centred / len(x)
        offset = group.mean(0) - x.mean(0)
        between += len(group) / len(x) * torch.outer(offset, offset)
    torch.testing.assert_close(within + between, x.t().cov(correction=0).view(width, width))
    return float(torch.trace(within @ torch.linalg.pinv(between, hermitian=True)))


def measured(hidden: Tensor, experts: Tensor, num_experts: int, ranks: int = 1) -> float:
    parts = list(zip(hidden.chunk(ranks), experts.chunk(ranks), strict=True))
    measure = CollapseMeasure(
        torch.stack([class_sums(*part, num_experts) for part in parts]).sum(0)
    )
    return float(measure.value(torch.stack([measure.scatter(*part) for part in parts]).sum()))


@pytest.mark.parametrize(
    ("num_experts", "width", "unused"), [(4, 12, 0), (8, 24, 3), (8, 5, 0), (2, 1, 0)]
)
def test_collapse_is_the_formula(num_experts: int, width: int, unused: int) -> None:
    """Also with experts nobody is sent to, and with more experts than dimensions."""
    torch.manual_seed(num_experts)
    experts = torch.randint(0, num_experts - unused, (300,))
    hidden = torch.randn(300, width) * torch.rand(width) + torch.randn(num_experts, width)[experts]
    expected = direct_collapse(hidden, experts)
    assert measured(hidden, experts, num_experts) == pytest.approx(expected, rel=1e-9)
    assert measured(hidden, experts, num_experts, ranks=3) == pytest.approx(expected, rel=1e-9)
    # what the measure is for: the closer tokens are to their expert's mean, the smaller
    centres = class_sums(hidden, experts, num_experts)
    means = (centres[:, :-1] / centres[:, -1:])[experts].float()
    crowded = measured(0.1 * hidden + 0.9 * means, experts, num_experts)
    assert crowded == pytest.approx(0.01 * expected, rel=1e-3)


def test_collapse_of_one_group_or_of_equal_means_is_undefined() -> None:
    hidden = torch.randn(20, 6)
    assert math.isnan(measured(hidden, torch.full((20,), 3), 4))
    twice = torch.cat([hidden, hidden])
    assert math.isnan(measured(twice.round(), torch.arange(40) // 20, 4))

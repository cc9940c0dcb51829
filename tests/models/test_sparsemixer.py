"""SparseMixer-v2 (arXiv 2409.12136): choices, gates and gradients against its rules.

Statistics are over 20 000 tokens with a fixed seed, within 4 standard deviations.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from models.moe_config import RouterType
from models.sparsemixer import sparsemixer_choice
from parallel.config import ParallelConfig
from parallel.megatron import tensor_parallel
from parallel.runtime import initialize
from tests.distributed import run_on_gloo
from tests.models.routers import (
    EXPERTS,
    HIDDEN,
    Gradients,
    assert_near,
    gradients,
    make_router,
    moe_settings,
    pull,
    tokens,
)

MANY = 20_000
WIDE = 0.25  # ε at which a few experts stay in the running
LOGITS = torch.tensor([2.0, 1.6, 1.3, 0.5, -3.0])
IN_THE_RUNNING = [0, 1, 2]  # (2 - s) / 2 <= 0.5


def choose(
    logits: Tensor, *, sample: bool, excluded: Tensor | None = None, jitter_eps: float = WIDE
) -> tuple[Tensor, Tensor]:
    if excluded is None:
        excluded = torch.zeros_like(logits, dtype=torch.bool)
    return sparsemixer_choice(logits, excluded, jitter_eps, sample=sample)


def masked_softmax(logits: Tensor, jitter_eps: float) -> Tensor:
    """By the rule as it is written, with its division."""
    best = logits.max(dim=1, keepdim=True).values
    far = (best - logits) / logits.abs().maximum(best) > 2 * jitter_eps
    return logits.masked_fill(far, -math.inf).softmax(dim=1)


def test_evaluation_takes_the_best_and_its_masked_probability() -> None:
    logits = tokens().view(-1, HIDDEN)[:, :EXPERTS]
    expert, gate = choose(logits, sample=False)
    probabilities = masked_softmax(logits, WIDE)
    assert torch.equal(expert[:, 0], logits.argmax(1))
    torch.testing.assert_close(gate[:, 0], probabilities.amax(1))
    assert (probabilities == 0).any()
    assert not torch.allclose(gate[:, 0], logits.softmax(1).amax(1))


def test_experts_far_from_the_best_are_never_drawn() -> None:
    torch.manual_seed(0)
    expert, _ = choose(LOGITS.expand(MANY, -1), sample=True)
    assert sorted(expert.unique().tolist()) == IN_THE_RUNNING


def test_experts_are_drawn_by_their_probability() -> None:
    torch.manual_seed(0)
    expert, _ = choose(LOGITS.expand(MANY, -1), sample=True)
    share = torch.bincount(expert.flatten(), minlength=5) / MANY
    expected = masked_softmax(LOGITS[None], WIDE)[0]
    bound = 4 * (expected * (1 - expected) / MANY).sqrt()
    assert ((share - expected).abs() <= bound).all()


def test_gates_are_whole_for_the_best_and_a_third_for_most_others() -> None:
    torch.manual_seed(0)
    expert, gate = choose(LOGITS.expand(MANY, -1), sample=True)
    omega = masked_softmax(LOGITS[None], WIDE)[0][expert]
    factor = gate / omega
    best = expert == 0
    torch.testing.assert_close(factor[best], torch.ones_like(factor[best]))
    others = factor[~best]
    whole = (others - 1).abs() < 1e-5
    third = (others - 1 / 3).abs() < 1e-5
    assert (whole | third).all()
    bound = 4 * math.sqrt(0.25 * 0.75 / len(others))
    assert whole.float().mean().item() == pytest.approx(0.25, abs=bound)


@pytest.mark.parametrize("sample", [False, True])
def test_the_gradient_is_that_of_the_probability_whatever_the_factor(sample: bool) -> None:
    torch.manual_seed(0)
    logits = LOGITS.double().repeat(200, 1).requires_grad_()
    expert, gate = choose(logits, sample=sample)
    upstream = torch.randn_like(gate)
    gate.backward(upstream)
    probabilities = masked_softmax(logits.detach(), WIDE)
    omega = probabilities.gather(1, expert)
    delta = torch.zeros_like(probabilities).scatter(1, expert, 1.0)
    expected = upstream * omega * (delta - probabilities)
    torch.testing.assert_close(logits.grad, expected)
    if sample:
        assert ((gate / omega).detach() < 0.5).any()


def test_the_second_expert_is_chosen_among_the_rest() -> None:
    torch.manual_seed(0)
    logits = LOGITS.expand(MANY, -1)
    excluded = torch.zeros_like(logits, dtype=torch.bool)
    excluded[:, 0] = True
    expert, gate = choose(logits, excluded=excluded, sample=False)
    # (1.6 - s) / max(|s|, 1.6) leaves 1.3 in the running, and takes 0.5 and -3 out
    expected = torch.tensor([1.6, 1.3]).softmax(0)[0].expand(MANY, 1)
    assert (expert == 1).all()
    torch.testing.assert_close(gate, expected)
    drawn, _ = choose(logits, excluded=excluded, sample=True)
    assert sorted(drawn.unique().tolist()) == [1, 2]


def test_negative_and_zero_logits_divide_nothing_by_zero() -> None:
    logits = torch.tensor([[0.0, -1.0, 0.0], [-2.0, -2.5, -9.0], [0.0, 0.0, 0.0]])
    _, gate = choose(logits, sample=False)
    # -2.5 is near enough (0.5 / 2.5), -9 is not (7 / 9)
    expected = torch.tensor([[0.5], [torch.tensor([-2.0, -2.5]).softmax(0)[0]], [1 / 3]])
    torch.testing.assert_close(gate, expected)


# --------------------------------------------------------------------------------- as a router

SETTINGS = moe_settings(
    RouterType.sparsemixer,
    router_topk=2,
    router_jitter_eps=WIDE,
    aux_loss_coeff=0.3,
    z_loss_coeff=0.1,
)


def test_the_router_sends_each_token_to_two_experts_with_their_gates() -> None:
    router = make_router(SETTINGS).eval()
    gates, routing_map = router(tokens())
    logits = tokens().view(-1, HIDDEN) @ router.weight.t()
    assert (routing_map.sum(1) == 2).all()
    assert torch.equal(
        routing_map, torch.zeros_like(routing_map).scatter(1, logits.topk(2).indices, True)
    )
    first = masked_softmax(logits, WIDE).amax(1)
    torch.testing.assert_close(gates.gather(1, logits.argmax(1, keepdim=True))[:, 0], first)


def test_training_draws_and_repeats_with_the_seed() -> None:
    router = make_router(SETTINGS)
    maps = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        maps.append(router(tokens())[1])
    assert torch.equal(maps[0], maps[1])
    assert not torch.equal(maps[0], maps[2])
    assert all((drawn.sum(1) == 2).all() for drawn in maps)


def draws_on_rank(parallel: ParallelConfig) -> Gradients:
    """Every rank is given the same tokens."""
    groups = initialize(parallel, seed=1).groups
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    router = make_router(SETTINGS, parallel=parallel, groups=groups)
    torch.manual_seed(4)
    return gradients(router, tokens(), pull())


def test_tensor_parallel_ranks_draw_alike_unless_their_tokens_differ() -> None:
    torch.manual_seed(4)
    expected = gradients(make_router(SETTINGS), tokens(), pull())
    one, other = run_on_gloo(2, draws_on_rank, ParallelConfig(tensor_model_parallel_size=2))
    assert torch.equal(one.hidden, other.hidden)
    assert_near(one.parameters["weight"], expected.parameters["weight"])
    sharded = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
    one, other = run_on_gloo(2, draws_on_rank, sharded)
    assert not torch.allclose(one.hidden, other.hidden)

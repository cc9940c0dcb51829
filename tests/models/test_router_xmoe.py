"""X-MoE's router against its formulas (arXiv 2204.09179 section 3.1)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from models.moe_config import (
    SMALLEST_TEMPERATURE,
    MoEConfig,
    RouterType,
    ScoreFunction,
    TokenDropPolicy,
)
from models.router import ExpertRouter
from models.xmoe_router import cosine_scores, directions
from tests.models.routers import (
    EXPERTS,
    HIDDEN,
    backward,
    gradients,
    make_router,
    moe_settings,
    pull,
    tokens,
)


def rows(count: int, width: int, *, seed: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------------------- scores


def test_scores_are_cosines() -> None:
    projected, experts = rows(50, 4, seed=1), rows(EXPERTS, 4, seed=2)
    scores = cosine_scores(projected, experts)
    assert scores.abs().max() <= 1 + 1e-6
    for t, i in ((0, 0), (17, 3), (49, 5)):
        dot = math.fsum((projected[t].double() * experts[i].double()).tolist())
        lengths = projected[t].double().norm() * experts[i].double().norm()
        assert scores[t, i].item() == pytest.approx(dot / lengths.item(), abs=1e-6)
    torch.testing.assert_close(cosine_scores(experts, experts).diagonal(), torch.ones(EXPERTS))
    torch.testing.assert_close(cosine_scores(-experts, experts).diagonal(), -torch.ones(EXPERTS))


@pytest.mark.parametrize("factor", [1e-3, 7.0, 1e3])
@pytest.mark.parametrize("what", ["hidden", "projection", "expert_embeddings"])
def test_lengths_of_tokens_projection_and_embeddings_do_not_matter(
    what: str, factor: float
) -> None:
    router = make_router(moe_settings(router_topk=2)).eval()
    hidden = tokens()
    expected, chosen = router(hidden)
    if what == "hidden":
        hidden = hidden * factor
    else:
        getattr(router, what).data.mul_(factor)
    gates, routing_map = router(hidden)
    assert torch.equal(routing_map, chosen)
    torch.testing.assert_close(gates, expected)


def test_one_embedding_may_be_scaled_by_itself() -> None:
    router = make_router(moe_settings(router_topk=2)).eval()
    expected, _ = router(tokens())
    router.expert_embeddings.data[2].mul_(50.0)
    torch.testing.assert_close(router(tokens())[0], expected)


def test_tokens_of_length_zero_score_zero_and_have_no_gradient() -> None:
    router = make_router(moe_settings(aux_loss_coeff=0.1, z_loss_coeff=0.1))
    hidden = tokens()
    hidden[0] = 0.0
    hidden[1] *= 1e-9
    found = gradients(router, hidden, pull())
    assert found.hidden[:2].count_nonzero() == 0
    assert all(g.isfinite().all() for g in (found.hidden, *found.parameters.values()))
    # all logits are 0: the gate is that of an even choice
    gates, _ = router(hidden)
    torch.testing.assert_close(gates.view(*hidden.shape[:2], EXPERTS)[0].amax(-1)[0].item(), 1 / 6)


def test_directions_keep_everything_longer_than_the_shortest() -> None:
    vectors = torch.tensor([[3e-5, 4e-5], [3e-7, 4e-7], [0.0, 0.0]])
    expected = torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(directions(vectors), expected)


# ---------------------------------------------------------------------------------------- gates


@pytest.mark.parametrize("topk", [1, 2])
@pytest.mark.parametrize("score", ScoreFunction)
def test_gates_are_the_papers(score: ScoreFunction, topk: int) -> None:
    moe = moe_settings(router_topk=topk, router_score_function=score)
    assert moe.temperature == {"softmax": 0.3, "sigmoid": 0.07}[score.value]
    router = make_router(moe)
    with torch.no_grad():
        router.temperature.fill_(0.2)
    gates, routing_map = router(tokens())
    flat = tokens().view(-1, HIDDEN).double()
    projected = flat @ router.projection.double().t()
    embeddings = router.expert_embeddings.double()
    lengths = projected.norm(dim=1)[:, None] * embeddings.norm(dim=1)
    scores = projected @ embeddings.t() / lengths
    if score is ScoreFunction.softmax:
        expected = torch.exp(scores / 0.2)
        expected = expected / expected.sum(1, keepdim=True)  # over all, and not renormalised
    else:
        expected = 1 / (1 + torch.exp(-scores / 0.2))
    places = scores.argsort(dim=1, descending=True)[:, :topk]
    chosen = torch.zeros_like(scores).scatter(1, places, 1.0).bool()
    assert torch.equal(routing_map, chosen)
    torch.testing.assert_close(gates.double(), expected * chosen, rtol=1e-5, atol=1e-6)


def test_the_balance_loss_keeps_the_first_temperature() -> None:
    router = make_router(moe_settings(aux_loss_coeff=1.0))
    flat = tokens().view(-1, HIDDEN)
    before = router.route(flat)
    with torch.no_grad():
        router.temperature.fill_(0.1)
    after = router.route(flat)
    assert torch.equal(before.scores, after.scores)
    assert not torch.allclose(before.gates, after.gates)
    torch.testing.assert_close(
        before.scores, (before.logits * router.moe.temperature / 0.3).softmax(1)
    )
    # and does not pull on the learnable one
    found = gradients(router, tokens(), torch.zeros_like(pull()))
    assert found.parameters["temperature"].count_nonzero() == 0
    assert found.parameters["projection"].count_nonzero() > 0


# -------------------------------------------------------------------------- what stays, and when


def train(router: ExpertRouter, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        gates, _ = router(tokens(seed=step))
        backward(gates, pull())
        optimizer.step()
        router.after_optimizer_step()


def adam(router: ExpertRouter) -> torch.optim.Optimizer:
    return torch.optim.AdamW(router.parameters(), lr=0.03)


def test_embeddings_keep_their_length_and_turn() -> None:
    router = make_router(moe_settings())
    start = router.expert_embeddings.detach().clone()
    train(router, adam(router), range(5))
    assert (router.expert_embeddings.norm(dim=1) - 0.1).abs().max() > 1e-3
    router.settle()
    lengths = router.expert_embeddings.double().norm(dim=1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, 0.1), rtol=1e-7, atol=0)
    assert (torch.cosine_similarity(router.expert_embeddings, start) < 0.99).all()


def test_the_temperature_stops_at_its_floor_and_can_leave_it() -> None:
    router = make_router(moe_settings())
    with torch.no_grad():
        router.temperature.fill_(-0.5)
    router(tokens())  # nothing was updated
    assert router.temperature.item() == -0.5
    router.after_optimizer_step()
    router(tokens())
    assert router.temperature.item() == pytest.approx(SMALLEST_TEMPERATURE)
    assert gradients(router, tokens(), pull()).parameters["temperature"].count_nonzero() == 1


def test_settling_happens_once_for_each_update() -> None:
    router = make_router(moe_settings())
    router.expert_embeddings.data.mul_(3.0)
    before = router.expert_embeddings.detach().clone()
    router.settle()
    router(tokens())
    assert torch.equal(router.expert_embeddings, before)
    router.after_optimizer_step()
    router(tokens())
    settled = router.expert_embeddings.detach().clone()
    assert not torch.equal(settled, before)
    router.expert_embeddings.data.mul_(3.0)
    router(tokens())
    torch.testing.assert_close(router.expert_embeddings.detach(), 3.0 * settled)


def test_a_resumed_run_is_bit_equal() -> None:
    whole = make_router(moe_settings())
    train(whole, adam(whole), range(6))
    whole.settle()

    first = make_router(moe_settings())
    optimizer = adam(first)
    train(first, optimizer, range(3))
    first.settle()  # as before every save
    resumed = make_router(moe_settings())
    resumed.load_state_dict(first.state_dict())
    again = adam(resumed)
    again.load_state_dict(optimizer.state_dict())
    train(resumed, again, range(3, 6))
    resumed.settle()
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_capacity_and_frozen_settings_reach_the_router() -> None:
    moe = MoEConfig(
        num_experts=EXPERTS,
        router=RouterType.xmoe,
        router_dim=5,
        expert_capacity_factor=0.5,
        token_drop_policy=TokenDropPolicy.position,
        freeze_routing=True,
    )
    router = make_router(moe)
    assert router.projection.shape == (5, HIDDEN)
    assert not any(parameter.requires_grad for parameter in router.parameters())
    _, routing_map = router(tokens())
    assert routing_map.sum(0).max() <= math.ceil(routing_map.shape[0] / EXPERTS * 0.5)

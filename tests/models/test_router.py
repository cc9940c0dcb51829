"""Routers against megatron-core's, against formulas in fp64, and under layouts."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from models.aux_free_router import AuxFreeRouter
from models.moe_config import BalanceScope, MoEConfig, RouterType, ScoreFunction, TokenDropPolicy
from models.router import (
    ExpertRouter,
    LinearRouter,
    balance_loss,
    within_capacity,
)
from models.router_health import RouterHealth
from models.sparsemixer import SparseMixerRouter
from models.torchscale_router import TorchScaleRouter
from models.xmoe_router import XMoERouter
from parallel.config import ParallelConfig
from parallel.megatron import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    MoEAuxLossAutoScaler,
    finalize_model_grads,
    tensor_parallel,
)
from parallel.runtime import initialize
from tests.distributed import run_on_gloo
from tests.models.routers import (
    BATCH,
    EXPERTS,
    HIDDEN,
    SEQUENCE,
    Alone,
    Gradients,
    OneRank,
    assert_near,
    backward,
    gradients,
    make_router,
    moe_settings,
    pull,
    route_on_rank,
    tokens,
    transformer_settings,
)

# after parallel.megatron, which insists on coming first
MEGATRON = importlib.import_module("megatron.core.transformer.moe.router")
OWN = [RouterType.xmoe, RouterType.linear, RouterType.aux_free, RouterType.sparsemixer]
# one ulp or two of sums over a few dozen numbers near 1
CLOSE = {"rtol": 2e-5, "atol": 2e-6}


# -------------------------------------------------------------- against megatron-core's TopKRouter


def megatron_router(moe: MoEConfig, weight: Tensor, groups: Any = Alone, **changes: Any) -> Any:
    config = transformer_settings(moe)
    config.moe_router_topk = moe.router_topk
    config.moe_router_dtype = "fp32"
    config.moe_router_score_function = moe.router_score_function.value
    config.moe_router_enable_expert_bias = False
    # Switch's gate of one expert is softmax over all; of several, megatron-core's default softmax
    # over the chosen is GShard's division by the sum
    config.moe_router_pre_softmax = moe.router_topk == 1
    for name, value in changes.items():
        setattr(config, name, value)
    router = MEGATRON.TopKRouter(config, groups)
    router.set_layer_number(1)
    with torch.no_grad():
        router.weight.copy_(weight)
    return router


@pytest.mark.parametrize("topk", [1, 2, 3])
@pytest.mark.parametrize("score", ScoreFunction)
def test_linear_chooses_and_weighs_like_megatron(score: ScoreFunction, topk: int) -> None:
    moe = moe_settings(
        RouterType.linear, router_topk=topk, router_score_function=score, aux_loss_coeff=0.0
    )
    ours = make_router(moe)
    theirs = megatron_router(moe, ours.weight)
    (gates, routing_map), (expected, expected_map) = ours(tokens()), theirs(tokens())
    torch.testing.assert_close(routing_map, expected_map)
    torch.testing.assert_close(gates, expected, **CLOSE)


def losses_beside_megatrons(moe: MoEConfig) -> tuple[Gradients, Gradients]:
    groups = initialize(ParallelConfig(), seed=1).groups
    ours = make_router(moe)
    theirs = megatron_router(
        moe,
        ours.weight,
        groups=groups,
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=moe.aux_loss_coeff,
        moe_z_loss_coeff=moe.z_loss_coeff,
    )
    mine, expected = (gradients(router, tokens(), pull()) for router in (ours, theirs))
    return mine, expected


def test_losses_of_one_expert_are_those_of_megatron() -> None:
    moe = moe_settings(RouterType.linear, aux_loss_coeff=0.3, z_loss_coeff=0.1)
    [(mine, expected)] = run_on_gloo(1, losses_beside_megatrons, moe)
    assert_near(mine.parameters["weight"], expected.parameters["weight"])
    assert_near(mine.hidden, expected.hidden)


@pytest.mark.parametrize("topk", [1, 2])
def test_aux_free_is_megatrons_expert_bias(topk: int) -> None:
    moe = moe_settings(RouterType.aux_free, router_topk=topk)
    ours = make_router(moe)
    theirs = megatron_router(
        moe,
        ours.weight,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
    )
    bias = torch.linspace(-0.5, 0.5, EXPERTS)
    ours.expert_bias.copy_(bias)
    theirs.expert_bias.copy_(bias)
    (gates, routing_map), (expected, expected_map) = ours(tokens()), theirs(tokens())
    assert torch.equal(routing_map, expected_map)
    assert torch.equal(gates, expected)
    mine, other = (gradients(router, tokens(), pull()) for router in (ours, theirs))
    assert torch.equal(mine.parameters["weight"], other.parameters["weight"])
    assert torch.equal(ours.local_tokens_per_expert, theirs.local_tokens_per_expert)
    ours.expert_bias.zero_()
    assert not torch.equal(ours(tokens())[1], expected_map)


# ---------------------------------------------------------------------------- the balance loss


def test_uniform_gates_and_even_choices_have_balance_1() -> None:
    scores = torch.full((4 * EXPERTS, EXPERTS), 1 / EXPERTS)
    first = torch.arange(4 * EXPERTS) % EXPERTS
    for sequences in (1, 4):
        loss = balance_loss(scores, first, sequences, OneRank())
        torch.testing.assert_close(loss, torch.tensor(1.0))


def test_balance_is_the_number_of_experts_when_one_has_all() -> None:
    scores = torch.zeros(8, EXPERTS)
    scores[:, 2] = 1.0
    loss = balance_loss(scores, torch.full((8,), 2), 1, OneRank())
    torch.testing.assert_close(loss, torch.tensor(float(EXPERTS)))


def test_balance_loss_is_its_formula() -> None:
    scores = tokens()[..., :EXPERTS].softmax(-1)  # [s, b, E]
    first = scores.flip(-1).argmax(-1)

    def formula(scores: Tensor, first: Tensor) -> float:
        return EXPERTS * sum(
            (first == i).double().mean().item() * scores[..., i].double().mean().item()
            for i in range(EXPERTS)
        )

    flat, flat_first = scores.view(-1, EXPERTS), first.flatten()
    whole = balance_loss(flat, flat_first, 1, OneRank())
    each = balance_loss(flat, flat_first, BATCH, OneRank())
    assert whole.item() == pytest.approx(formula(scores, first), rel=1e-6)
    by_sequence = [formula(scores[:, b], first[:, b]) for b in range(BATCH)]
    assert each.item() == pytest.approx(sum(by_sequence) / BATCH, rel=1e-6)
    assert abs(whole.item() - each.item()) > 1e-3


@pytest.mark.parametrize("router", [RouterType.xmoe, RouterType.linear])
@pytest.mark.parametrize("scope", BalanceScope)
def test_scope_sequence_does_not_depend_on_the_micro_batch_size(
    router: RouterType, scope: BalanceScope
) -> None:
    moe = moe_settings(router, aux_loss_coeff=0.5, balance_scope=scope, z_loss_coeff=0.1)
    together = gradients(make_router(moe), tokens(), pull())
    apart = [
        gradients(make_router(moe), tokens()[:, b : b + 1], pull()[:, b : b + 1])
        for b in range(BATCH)
    ]
    same = all(
        torch.allclose(sum(one.parameters[name] for one in apart), gradient, **CLOSE)
        for name, gradient in together.parameters.items()
    )
    assert same is (scope is BalanceScope.sequence)


def objective(router: ExpertRouter, hidden: Tensor, upstream: Tensor) -> Tensor:
    """What training minimises, spelled out: gates times `upstream`, and the two losses."""
    moe = router.moe
    flat = hidden.view(-1, HIDDEN)
    routing = router.route(flat)
    total = (routing.gates * upstream.view(-1, EXPERTS)).sum()
    for i in range(EXPERTS):
        share = (routing.first == i).double().mean()
        balance = EXPERTS * share * routing.scores[:, i].mean()
        total = total + moe.aux_loss_coeff * balance * len(flat)
    return total + moe.z_loss_coeff * routing.logits.exp().sum(1).log().square().sum()


@pytest.mark.parametrize("score", ScoreFunction)
@pytest.mark.parametrize("topk", [1, 2])
@pytest.mark.parametrize("router_type", [RouterType.xmoe, RouterType.linear])
def test_gradients_agree_with_finite_differences(
    router_type: RouterType, topk: int, score: ScoreFunction
) -> None:
    moe = moe_settings(
        router_type,
        router_topk=topk,
        router_score_function=score,
        aux_loss_coeff=0.3,
        z_loss_coeff=0.01,
    )
    router = make_router(moe).double()
    router.track_gap = True
    hidden, upstream = tokens().double(), pull().double()
    found = gradients(router, hidden, upstream)
    assert router.smallest_gap is not None
    step = 1e-6
    assert router.smallest_gap > 10 * step
    values = {**dict(router.named_parameters()), "hidden": hidden}
    for name, value in values.items():
        gradient = found.hidden if name == "hidden" else found.parameters[name]
        for place in range(0, value.numel(), max(1, value.numel() // 7)):
            entry = value.data.view(-1)[place : place + 1]
            kept = entry.clone()
            with torch.no_grad():
                entry.copy_(kept + step)
                above = objective(router, hidden, upstream)
                entry.copy_(kept - step)
                below = objective(router, hidden, upstream)
                entry.copy_(kept)
            expected = ((above - below) / (2 * step)).item()
            assert gradient.flatten()[place].item() == pytest.approx(expected, rel=2e-6, abs=2e-7)


@pytest.mark.parametrize("router_type", OWN)
def test_losses_are_attached_in_training_only(router_type: RouterType) -> None:
    moe = moe_settings(router_type, aux_loss_coeff=0.5, z_loss_coeff=0.5)
    bare = moe_settings(router_type, aux_loss_coeff=0.0)
    evaluated, plain = make_router(moe).eval(), make_router(bare).eval()
    mine = gradients(evaluated, tokens(), pull())
    assert torch.equal(mine.hidden, gradients(plain, tokens(), pull()).hidden)
    assert not torch.allclose(mine.hidden, gradients(evaluated.train(), tokens(), pull()).hidden)


def test_losses_are_scaled_like_the_main_loss() -> None:
    router = make_router(moe_settings(aux_loss_coeff=0.5, z_loss_coeff=0.5))
    nothing = torch.zeros_like(pull())
    single = gradients(router, tokens(), nothing)
    before = MoEAuxLossAutoScaler.main_loss_backward_scale
    MoEAuxLossAutoScaler.main_loss_backward_scale = torch.tensor([2.0])
    try:
        double = gradients(router, tokens(), nothing)
    finally:
        MoEAuxLossAutoScaler.main_loss_backward_scale = before
    torch.testing.assert_close(double.hidden, 2 * single.hidden)


# ------------------------------------------------------------------------------------ layouts

LAYOUTS = {
    "tp2": (2, ParallelConfig(tensor_model_parallel_size=2)),
    "tp2_sp": (2, ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)),
    "cp2": (2, ParallelConfig(context_parallel_size=2)),
    "dp2": (2, ParallelConfig()),
    "tp2_sp_cp2": (
        4,
        ParallelConfig(
            tensor_model_parallel_size=2, sequence_parallel=True, context_parallel_size=2
        ),
    ),
}


PAIRS = [(RouterType.xmoe, BalanceScope.micro_batch), (RouterType.linear, BalanceScope.sequence)]


@pytest.mark.parametrize(
    ("layout", "router_type", "scope"),
    [
        *((layout, *pair) for layout in LAYOUTS for pair in PAIRS),
        ("tp2_sp_cp2", RouterType.xmoe, BalanceScope.sequence),
        ("tp2_sp_cp2", RouterType.aux_free, BalanceScope.micro_batch),
    ],
)
def test_layouts_give_the_gradients_of_one_process(
    layout: str, router_type: RouterType, scope: BalanceScope
) -> None:
    world_size, parallel = LAYOUTS[layout]
    moe = moe_settings(
        router_type, router_topk=2, aux_loss_coeff=0.3, z_loss_coeff=0.1, balance_scope=scope
    )
    ranks = run_on_gloo(world_size, route_on_rank, parallel, moe)
    micro_batches = 2 if layout == "dp2" else 1
    expected = [
        gradients(make_router(moe), *parts)
        for parts in zip(
            tokens().chunk(micro_batches, dim=1), pull().chunk(micro_batches, dim=1), strict=True
        )
    ]
    for rank in ranks:
        for name, gradient in rank.parameters.items():
            total = sum(one.parameters[name] for one in expected)
            assert_near(gradient, total)
    copies = 2 if layout == "tp2" else 1
    hidden = sum(rank.hidden for rank in ranks) / copies
    assert_near(hidden, torch.cat([one.hidden for one in expected], dim=1))


def two_steps_of_expert_bias() -> tuple[Tensor, Tensor, Tensor, list[str]]:
    runtime = initialize(ParallelConfig(), seed=1)
    moe = moe_settings(RouterType.aux_free, router_bias_update_rate=0.25)
    router = make_router(moe, groups=runtime.groups)
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    model = DistributedDataParallel(router.config, ddp_config, router)
    hidden = tokens().chunk(2, dim=1)[dist.get_rank()]
    counts = []
    for _ in range(2):
        model.zero_grad_buffer()
        for micro_batch in hidden.split(1, dim=1):
            gates, _ = model(micro_batch)
            gates.sum().backward()
        counts.append(router.local_tokens_per_expert.clone())
        finalize_model_grads([model], num_tokens=torch.tensor(64))
    keys = list(router.sharded_state_dict(prefix="router."))
    return counts[0], router.expert_bias.clone(), router.local_tokens_per_expert, keys


def test_expert_bias_moves_against_the_load_of_all_ranks() -> None:
    (first, bias, left, keys), (second, other_bias, _, _) = run_on_gloo(2, two_steps_of_expert_bias)
    load = first + second
    assert load.sum() == SEQUENCE * BATCH
    assert torch.equal(bias, other_bias)
    after_one = 0.25 * torch.sign(load.mean() - load)
    assert (
        torch.equal((bias - after_one).abs().unique(), torch.tensor([0.0, 0.25])[-1:])
        or ((bias - after_one).abs() <= 0.25).all()
    )
    assert not torch.equal(bias, after_one)
    assert left.count_nonzero() == 0
    assert set(keys) == {"router.weight", "router.expert_bias"}


# ----------------------------------------------------------------------- types, freezing, gaps


@pytest.mark.parametrize("router_type", [RouterType.xmoe, RouterType.linear, RouterType.aux_free])
def test_bf16_tokens_are_routed_in_fp32(router_type: RouterType) -> None:
    router = make_router(moe_settings(router_type, router_topk=2))
    hidden = tokens().bfloat16()
    gates, routing_map = router(hidden)
    expected, expected_map = router(hidden.float())
    assert gates.dtype is torch.float32
    assert torch.equal(gates, expected)
    assert torch.equal(routing_map, expected_map)
    assert gradients(router, hidden, pull()).hidden.dtype is torch.bfloat16


@pytest.mark.parametrize("router_type", [*OWN, RouterType.torchscale_xmoe])
def test_frozen_routers_keep_their_parameters_and_pull_on_what_is_below(
    router_type: RouterType,
) -> None:
    moe = moe_settings(router_type, freeze_routing=True, aux_loss_coeff=0.5)
    router = make_router(moe)
    before = {name: value.clone() for name, value in router.state_dict().items()}
    found = gradients(router, tokens(), torch.zeros_like(pull()))
    router.after_optimizer_step()
    gradients(router, tokens(), pull())
    assert found.parameters == {}
    for name, value in router.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert (found.hidden.abs().sum() > 0) == router.balances
    if router_type is RouterType.aux_free:  # else the bias would move
        assert router.local_tokens_per_expert.count_nonzero() == 0


def test_parameters_say_what_they_are() -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
    router = make_router(moe_settings(), parallel=parallel)
    found = dict(router.named_parameters())
    assert {name: tuple(p.shape) for name, p in found.items()} == {
        "projection": (EXPERTS // 2, HIDDEN),
        "expert_embeddings": (EXPERTS, EXPERTS // 2),
        "temperature": (1,),
    }
    assert all(p.keep_fp32 and p.sequence_parallel for p in found.values())
    undecayed = {name for name, p in found.items() if hasattr(p, "no_weight_decay")}
    assert undecayed == {"expert_embeddings", "temperature"}


@pytest.mark.parametrize("router_type", OWN)
def test_gaps_are_kept_only_when_asked_for(router_type: RouterType) -> None:
    router = make_router(moe_settings(router_type, router_topk=2)).eval()
    router(tokens())
    assert router.smallest_gap is None
    router.track_gap = True
    gaps = []
    for seed in (1, 2):
        router.smallest_gap = None
        router(tokens(seed=seed))
        gaps.append(router.smallest_gap)
    router(tokens(seed=1))
    assert router.smallest_gap == min(gaps)
    assert gaps[0] != gaps[1]


def test_the_gap_is_between_neighbours_of_the_best() -> None:
    router = make_router(moe_settings(router_topk=2))
    router.track_gap = True
    router.note_gap(torch.tensor([[9.0, 1.0, 5.0, 3.0, 0.9, 0.0], [6.0, 5.5, 1.0, 0.0, 0.0, 0.0]]))
    assert router.smallest_gap == 0.5  # 1.0 - 0.9 lies behind the third best
    router.note_gap(torch.tensor([[9.0, 5.0, 4.75, 4.7, 0.9, 0.0]]))
    assert router.smallest_gap == 0.25


# ------------------------------------------------------------------------------------ capacity


@pytest.mark.parametrize("capacity", [1, 5, SEQUENCE * BATCH])
def test_dropping_by_gates_is_megatrons(capacity: int) -> None:
    router = make_router(moe_settings(router_topk=2))
    gates, chosen = router.eval()(tokens())
    kept = within_capacity(gates, chosen, capacity, TokenDropPolicy.probs)
    tokens_routed = len(chosen) * 2
    _, expected = MEGATRON.apply_router_token_dropping(
        gates, chosen, router_topk=2, capacity_factor=capacity * EXPERTS / tokens_routed
    )
    assert torch.equal(kept, expected)
    assert (kept.sum() < chosen.sum()) == (capacity < 6)


def test_dropping_by_position_keeps_the_first() -> None:
    chosen = torch.tensor([[1, 0], [1, 1], [1, 0], [0, 1], [0, 1], [0, 1]]).bool()
    kept = within_capacity(chosen.float(), chosen, 2, TokenDropPolicy.position)
    expected = torch.tensor([[1, 0], [1, 1], [0, 0], [0, 1], [0, 0], [0, 0]]).bool()
    assert torch.equal(kept, expected)


@pytest.mark.parametrize("policy", TokenDropPolicy)
@pytest.mark.parametrize("router_type", [RouterType.xmoe, RouterType.linear, RouterType.aux_free])
def test_capacity_limits_each_expert(router_type: RouterType, policy: TokenDropPolicy) -> None:
    free, chosen = make_router(moe_settings(router_type, router_topk=2))(tokens())
    limited = moe_settings(
        router_type, router_topk=2, token_drop_policy=policy, expert_capacity_factor=0.9
    )
    router = make_router(limited)
    gates, routing_map = router(tokens())
    capacity = math.ceil(SEQUENCE * BATCH * 2 / EXPERTS * 0.9)
    assert routing_map.sum(0).tolist() == chosen.sum(0).clamp(max=capacity).tolist()
    assert (routing_map <= chosen).all()
    assert torch.equal(gates, free * routing_map)
    assert not torch.equal(routing_map, chosen)
    # what a token gets outside training must not depend on those that follow it
    gates, routing_map = router.eval()(tokens())
    assert torch.equal(routing_map, chosen) and torch.equal(gates, free)


# ------------------------------------------------------------------ watching, and recomputation


def watched_router(router_type: RouterType = RouterType.xmoe, **changes: Any) -> ExpertRouter:
    health = RouterHealth()
    health.start(num_experts=EXPERTS, layers=[1], languages=2, device=torch.device("cpu"))
    health.language_ids = torch.tensor([0, 0, 1, 0])
    return make_router(moe_settings(router_type, **changes), health=health)


def through_checkpoint(router: ExpertRouter, hidden: Tensor, upstream: Tensor) -> Gradients:
    router.zero_grad()
    hidden = hidden.clone().requires_grad_()
    gates = tensor_parallel.checkpoint(lambda x: router(x)[0], False, hidden)
    if router.health is not None:
        router.health.language_ids = None  # another micro-batch has come
    backward(gates, upstream)
    assert hidden.grad is not None
    return Gradients({n: p.grad for n, p in router.named_parameters()}, hidden.grad)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("router_type", [RouterType.xmoe, RouterType.aux_free])
def test_each_micro_batch_is_reported_once(router_type: RouterType, recompute: bool) -> None:
    router = watched_router(router_type, expert_capacity_factor=0.8)
    (through_checkpoint if recompute else gradients)(router, tokens(), pull())
    totals = router.health.totals
    with torch.no_grad():
        routing = router.route(tokens().view(-1, HIDDEN))
    by_sequence = routing.chosen.view(SEQUENCE, BATCH, EXPERTS).sum(0)
    assert torch.equal(totals.load[0, 0], by_sequence[[0, 1, 3]].sum(0))
    assert torch.equal(totals.load[0, 1], by_sequence[2])
    assert torch.equal(totals.kept[0], routing.routing_map.sum(0))
    assert totals.kept.sum() < totals.load.sum()
    count, _, balance = totals.sums[0]
    assert count == SEQUENCE * BATCH
    if router.balances:
        expected = balance_loss(routing.scores, routing.first, 1, OneRank())
        assert balance / count == pytest.approx(expected.item(), rel=1e-6)
    else:
        assert balance == 0
        assert router.local_tokens_per_expert.sum() == SEQUENCE * BATCH


@pytest.mark.parametrize("router_type", OWN)
def test_recomputation_changes_nothing(router_type: RouterType) -> None:
    moe = moe_settings(router_type, router_topk=2, aux_loss_coeff=0.5, z_loss_coeff=0.1)
    torch.manual_seed(3)
    expected = gradients(make_router(moe), tokens(), pull())
    torch.manual_seed(3)
    found = through_checkpoint(make_router(moe), tokens(), pull())
    assert torch.equal(found.hidden, expected.hidden)
    for name, gradient in expected.parameters.items():
        assert torch.equal(found.parameters[name], gradient)


def test_evaluation_is_reported_to_the_probe_only() -> None:
    router = watched_router().eval()
    with torch.no_grad():
        router(tokens())  # nobody looks
    assert router.health.totals.load.sum() == 0


# -------------------------------------------------------------------------- choosing, and errors


@pytest.mark.parametrize(
    ("router_type", "expected"),
    [
        (RouterType.xmoe, XMoERouter),
        (RouterType.linear, LinearRouter),
        (RouterType.aux_free, AuxFreeRouter),
        (RouterType.sparsemixer, SparseMixerRouter),
        (RouterType.torchscale, TorchScaleRouter),
        (RouterType.torchscale_xmoe, TorchScaleRouter),
    ],
)
def test_each_router_type_has_its_class(router_type: RouterType, expected: type) -> None:
    assert type(make_router(moe_settings(router_type))) is expected
    assert set(RouterType) == {
        *OWN,
        RouterType.torchscale,
        RouterType.torchscale_xmoe,
    }


@pytest.mark.parametrize("router_type", OWN)
def test_only_sampling_routers_ask_for_seeds(router_type: RouterType) -> None:
    assert make_router(moe_settings(router_type)).draws is (router_type is RouterType.sparsemixer)


def test_padding_is_refused() -> None:
    router = make_router(moe_settings())
    with pytest.raises(ValueError, match="padding_mask is given"):
        router(tokens(), torch.zeros(SEQUENCE, BATCH, dtype=torch.bool))


def test_a_router_must_say_how_it_routes() -> None:
    moe = moe_settings()
    router = ExpertRouter(transformer_settings(moe), Alone, moe=moe)
    with pytest.raises(NotImplementedError, match="ExpertRouter does not say"):
        router(tokens())

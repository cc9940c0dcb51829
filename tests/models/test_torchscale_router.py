"""TorchScale's gates, layer and whole models against ours: same weights, tokens, random numbers.

Both compute in fp32, and forward with the same operations, but tokens stand in another order, and
so do the summands of gradients: to 1e-5 of the largest. Which tokens are dropped is equal.
"""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from models.build import build_model
from models.config import ModelConfig
from models.initialize import global_parameters
from models.moe_config import MoEConfig, RouterType, SecondExpertPolicy
from models.router import Routing
from models.router_health import RouterHealth
from models.torchscale_router import (
    TorchScaleRouter,
    expert_capacity,
    gumbel,
    make_finite,
    queue_places,
    rescaled_rows,
    route_top2,
)
from parallel.config import ParallelConfig
from parallel.megatron import MoEAuxLossAutoScaler, tensor_parallel
from parallel.runtime import initialize
from tests import torchscale_reference
from tests.distributed import run_on_gloo
from tests.models.routers import HIDDEN, make_router

SUMS = 1e-5
TOP2 = MoEConfig(
    num_experts=4, router_topk=2, router=RouterType.torchscale_xmoe, aux_loss_coeff=0.1
)


def router_of(moe: MoEConfig, gate: nn.Module, **settings: Any) -> TorchScaleRouter:
    """`make_router` with the weights of TorchScale's gate."""
    router = make_router(moe, **settings)
    assert isinstance(router, TorchScaleRouter)
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0))
    weights = gate.state_dict()
    with torch.no_grad():
        for name, parameter in router.named_parameters():
            # with xmoe wg is a parameter there, else the weight of a linear, as wg_reduction is
            parameter.copy_(weights[name if name in weights else f"{name}.weight"])
    return router


def route_top2_plainly(logits: Tensor, capacity: int) -> Routing:
    """One sequence, and no random numbers."""
    return route_top2(
        logits,
        capacity,
        1,
        policy=SecondExpertPolicy.all,
        normalize_before_dropping=True,
        uniform=None,
    )


@st.composite
def gate_settings(draw: st.DrawFn) -> MoEConfig:
    topk = draw(st.sampled_from([1, 2]))
    return MoEConfig(
        num_experts=draw(st.integers(topk, 9)),
        router_topk=topk,
        router=draw(st.sampled_from([RouterType.torchscale, RouterType.torchscale_xmoe])),
        second_expert_policy=draw(st.sampled_from(SecondExpertPolicy)),
        normalize_gate_prob_before_dropping=draw(st.booleans()),
        eval_capacity_token_fraction=draw(st.sampled_from([-1.0, 0.0, 0.1, 0.25, 1.0])),
        aux_loss_coeff=0.1,
    )


def relative(one: Tensor, other: Tensor) -> float:
    one, other = one.detach(), other.detach()
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-6))


@given(
    moe=gate_settings(),
    sequences=st.integers(1, 4),
    length=st.integers(1, 20),
    size=st.sampled_from([0.1, 1.0, 5.0]),
    training=st.booleans(),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_gates_drops_loss_and_gradients_equal_torchscale(
    moe: MoEConfig, sequences: int, length: int, size: float, training: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    gate = torchscale_reference.gate(moe, HIDDEN).train(training)
    health = RouterHealth()
    health.start(num_experts=moe.num_experts, layers=[1], languages=1, device=torch.device("cpu"))
    router = router_of(moe, gate, health=health).train(training)
    # a common part, so that some experts are liked by most
    x = torch.randn(sequences, length, HIDDEN) * size + torch.randn(HIDDEN)
    x.requires_grad_()
    tokens = sequences * length
    weights = torch.randn(tokens, moe.num_experts)  # of the gates in the loss

    torch.manual_seed(seed)
    with torchscale_reference.integer_histograms():
        aux, combine, dispatch, _ = gate(x.flatten(0, 1))
    theirs = combine.sum(-1)
    loss = (theirs * weights).sum() + (moe.aux_loss_coeff * tokens * aux if training else 0)
    leaves = [x, *(p for _, p in sorted(gate.named_parameters()))]
    expected = torch.autograd.grad(loss, leaves)

    def sequence_after_sequence(per_token: Tensor) -> Tensor:
        return per_token.unflatten(0, (length, sequences)).transpose(0, 1).flatten(0, 1)

    torch.manual_seed(seed)
    gates, routing_map = (sequence_after_sequence(t) for t in router(x.transpose(0, 1)))
    leaves = [x, *(p for _, p in sorted(router.named_parameters()))]
    gradients = torch.autograd.grad((gates * weights).sum(), leaves)
    torch.testing.assert_close(gates, theirs, rtol=0, atol=SUMS)
    assert torch.equal(routing_map, dispatch.any(-1))
    for ours, other in zip(gradients, expected, strict=True):
        assert relative(ours, other) < SUMS
    if training:
        totals = health.totals
        assert totals is not None
        assert float(totals.sums[0, 2] / tokens) == pytest.approx(float(aux.detach()), rel=SUMS)
        assert int(totals.kept.sum()) == int(routing_map.sum())
        assert tokens <= int(totals.load.sum()) <= moe.router_topk * tokens


def layers_equal(moe: MoEConfig, training: bool) -> None:
    """TorchScale's MOELayer, einsum dispatch and all, against gate times expert, summed."""
    torch.manual_seed(7)
    experts = nn.ModuleList(
        nn.Sequential(nn.Linear(HIDDEN, 9), nn.GELU(), nn.Linear(9, HIDDEN))
        for _ in range(moe.num_experts)
    )
    layer = torchscale_reference.moe_layer(moe, HIDDEN, experts).train(training)
    router = router_of(moe, layer.gate).train(training)
    x = (torch.randn(3, 11, HIDDEN) + torch.randn(HIDDEN)).requires_grad_()  # [b, s, h]
    weights = torch.randn(3, 11, HIDDEN)

    torch.manual_seed(8)
    with torchscale_reference.integer_histograms():
        theirs, _ = layer(x)
    expected = torch.autograd.grad((theirs * weights).sum(), [x, *experts.parameters()])

    torch.manual_seed(8)
    gates, routing_map = router(x.transpose(0, 1))
    hidden = x.transpose(0, 1).flatten(0, 1)
    output = torch.zeros_like(hidden)
    for number, expert in enumerate(experts):
        mine = routing_map[:, number].nonzero()[:, 0]
        output = output.index_add(0, mine, gates[mine, number, None] * expert(hidden[mine]))
    output = output.view(11, 3, HIDDEN).transpose(0, 1)
    assert relative(output, theirs) < SUMS
    gradients = torch.autograd.grad((output * weights).sum(), [x, *experts.parameters()])
    for ours, other in zip(gradients, expected, strict=True):
        assert relative(ours, other) < SUMS
    places = moe.router_topk * len(hidden)
    assert 0 < int(routing_map.sum()) < places, "nothing was dropped"


@pytest.mark.parametrize("router", [RouterType.torchscale, RouterType.torchscale_xmoe])
@pytest.mark.parametrize("topk", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_layer_output_and_gradients_equal_torchscale(
    router: RouterType, topk: int, training: bool
) -> None:
    # the balance loss has a test of its own, above
    moe = replace(TOP2, router=router, router_topk=topk, aux_loss_coeff=0.0)
    run_on_gloo(1, layers_equal, moe, training)


@given(st.lists(st.sampled_from([0.5, -3.0, 2.0, math.inf, -math.inf, math.nan]), max_size=9))
@example([1.0, math.nan])
@settings(deadline=None)
def test_logits_that_are_not_finite_as_in_torchscale(values: list[float]) -> None:
    """Also their gradient: that of the smallest finite one, in equal parts where there are more."""
    logits = torch.tensor([*values, -1.0, -3.0], requires_grad=True)
    weights = torch.arange(1.0, len(logits) + 1)
    theirs = torchscale_reference.gate(TOP2, HIDDEN)._make_finite(logits * 1)
    ours = make_finite(logits)
    assert torch.equal(ours, theirs)
    expected = torch.autograd.grad((theirs * weights).sum(), logits)[0]
    torch.testing.assert_close(torch.autograd.grad((ours * weights).sum(), logits)[0], expected)


@given(st.integers(1, 64), st.floats(1e-3, 1e3), st.integers(0, 10**6))
@settings(deadline=None)
def test_rescaling_rows_twice_is_rescaling_once(experts: int, size: float, seed: int) -> None:
    rows = rescaled_rows(torch.randn(experts, 16, generator=torch.manual_seed(seed)) * size)
    torch.testing.assert_close(rows.norm(dim=1), torch.full((experts,), 1.5), rtol=1e-6, atol=0)
    assert torch.equal(rescaled_rows(rows), rows)


def test_a_forward_may_overtake_a_backward_unlike_in_torchscale() -> None:
    """Two forward passes, then the two backward passes, as in a pipeline."""
    gate = torchscale_reference.gate(TOP2, HIDDEN)
    router = router_of(TOP2, gate)
    x = torch.randn(10, HIDDEN)
    with torchscale_reference.integer_histograms():
        losses = [gate(x)[1].square().sum() for _ in range(2)]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum(losses).backward()
    for _ in range(2):
        losses = [router(x.view(5, 2, HIDDEN))[0].square().sum() for _ in range(2)]
        sum(losses).backward()
        lengths = router.wg.detach().norm(dim=1)
        torch.testing.assert_close(lengths, torch.full_like(lengths, 1.5))
        router.wg.data.mul_(1.01)  # an update
        router.after_optimizer_step()


def gates_of_ranks(parallel: ParallelConfig, policy: SecondExpertPolicy) -> Tensor:
    """Gates of the same tokens on each rank, without and with recomputation."""
    runtime = initialize(parallel, seed=1)
    moe = replace(TOP2, second_expert_policy=policy)
    router = router_of(
        moe,
        torchscale_reference.gate(moe, HIDDEN),
        parallel=parallel,
        groups=runtime.groups,
    )
    x = torch.randn(32, 2, HIDDEN, generator=torch.manual_seed(4)).requires_grad_()
    weights = torch.randn(64, moe.num_experts)
    results = []
    for recompute in (False, True):
        tensor_parallel.model_parallel_cuda_manual_seed(5, tp_rank=runtime.tensor_parallel_rank)
        torch.manual_seed(5)
        if recompute:
            gates = tensor_parallel.checkpoint(lambda x: router(x)[0], False, x)
        else:
            gates = router(x)[0]
        torch.rand(7)  # what other layers draw between the two passes
        with tensor_parallel.get_cuda_rng_tracker().fork():
            torch.rand(7)
        router.wg.grad = None
        (gates * weights).sum().backward()
        results.append((gates.detach(), router.wg.grad))
    for once, again in zip(*results, strict=True):
        assert torch.equal(once, again)
    return results[0][0]


@pytest.mark.parametrize("policy", [SecondExpertPolicy.random, SecondExpertPolicy.sampling])
@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_ranks_with_other_tokens_draw_other_numbers(
    policy: SecondExpertPolicy, sequence_parallel: bool
) -> None:
    """And a recomputed pass draws its own again."""
    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=sequence_parallel)
    one, other = run_on_gloo(2, gates_of_ranks, parallel, policy)
    assert torch.equal(one, other) is not sequence_parallel


MODEL = ModelConfig(
    name="reference",
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    max_position_embeddings=32,
    make_vocab_size_divisible_by=8,
    share_embeddings_and_output_weights=False,
)


def models_differ_by(moe: MoEConfig, training: bool) -> tuple[float, float]:
    """Whole models: relative differences of the logits, and the largest of gradients."""
    vocab, model = 48, replace(MODEL, moe=moe)
    torch.manual_seed(5)
    reference = torchscale_reference.decoder(model, vocab, subln=True, xpos_rel_pos=True)
    reference.train(training)
    tokens, labels = torch.randint(0, vocab, (2, 3, 17))
    torch.manual_seed(6)
    with torchscale_reference.integer_histograms():
        expected, extra = reference(tokens)
    loss = F.cross_entropy(expected.flatten(0, 1), labels.flatten(), reduction="sum")
    if training:
        aux = sum(layer for layer in extra["l_aux"] if layer is not None)
        loss = loss + moe.aux_loss_coeff * labels.numel() * aux
    loss.backward()

    runtime = initialize(ParallelConfig(), seed=1)
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0))
    chunk = build_model(model, ParallelConfig(), runtime, vocab_size=vocab, seed=1)[0]
    torchscale_reference.load(chunk, torchscale_reference.weights_of(reference, model))
    chunk.train(training)
    for parameter in chunk.parameters():  # the fused weight gradients go here
        parameter.main_grad = torch.zeros_like(parameter)
    hidden: list[Tensor] = []
    chunk.decoder.register_forward_hook(lambda *args: hidden.append(args[2].detach()))
    torch.manual_seed(6)
    chunk(tokens, labels, torch.ones(3, 17)).loss_sum.backward()
    logits = F.linear(hidden[0], chunk.output_weight()).transpose(0, 1)
    theirs = torchscale_reference.gradients_of(reference, model)
    worst = 0.0
    for name, parameter in global_parameters(chunk):
        ours = parameter.main_grad if parameter.grad is None else parameter.grad
        worst = max(worst, relative(ours, theirs[name]))
    return relative(logits, expected), worst


@pytest.mark.parametrize("router", [RouterType.torchscale, RouterType.torchscale_xmoe])
@pytest.mark.parametrize("topk", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_whole_models_equal_torchscale(router: RouterType, topk: int, training: bool) -> None:
    moe = replace(TOP2, router=router, router_topk=topk)
    logits, gradients = run_on_gloo(1, models_differ_by, moe, training)[0]
    assert logits < SUMS
    assert gradients < SUMS


AWKWARD = {
    # the lower expert is the first one, though the other one's logit is larger
    "gates that round to the same": [[1e-9, 2e-9, -1.0, -1.0]],
    "a tiny gate is all that is left": [[20.0, 0.0, -1.0, -1.0], [20.0, -1.0, 0.0, -1.0]],
    "a gate of 0": [[200.0, 0.0, -1.0, -1.0]],
}


@pytest.mark.parametrize("case", AWKWARD)
@pytest.mark.parametrize("topk", [1, 2])
def test_awkward_logits_as_in_torchscale(case: str, topk: int) -> None:
    moe = replace(
        TOP2,
        router=RouterType.torchscale,
        router_topk=topk,
        second_expert_policy=SecondExpertPolicy.all,
        normalize_gate_prob_before_dropping=False,
    )
    logits = torch.tensor(AWKWARD[case])
    gate = torchscale_reference.gate(moe, HIDDEN).eval()
    gate.wg.weight.data.zero_()[:, : len(logits)] = logits.T
    x = torch.eye(HIDDEN)[: len(logits)]
    with torchscale_reference.integer_histograms():
        _, combine, dispatch, _ = gate(x)
    gates, routing_map = router_of(moe, gate).eval()(x[:, None])
    assert torch.equal(gates, combine.sum(-1))
    assert torch.equal(routing_map, dispatch.any(-1))


def test_a_token_that_is_not_finite_as_in_torchscale() -> None:
    gate = torchscale_reference.gate(TOP2, HIDDEN)
    x = torch.randn(9, HIDDEN, generator=torch.manual_seed(6))
    x[3, 2] = math.inf
    torch.manual_seed(6)
    with torchscale_reference.integer_histograms():
        _, combine, _, _ = gate(x)
    torch.manual_seed(6)
    gates, _ = router_of(TOP2, gate)(x[:, None])
    assert gates.isfinite().all()
    assert torch.equal(gates, combine.sum(-1))


@pytest.mark.parametrize("topk", [1, 2])
@pytest.mark.parametrize("policy", SecondExpertPolicy)
def test_a_router_says_whether_it_draws_random_numbers(
    topk: int, policy: SecondExpertPolicy
) -> None:
    moe = replace(TOP2, router_topk=topk, second_expert_policy=policy)
    router = router_of(moe, torchscale_reference.gate(moe, HIDDEN))
    state = torch.get_rng_state()
    router(torch.ones(2, 2, HIDDEN))
    assert torch.equal(torch.get_rng_state(), state) is not router.draws


def test_gumbel_numbers_are_finite_at_both_ends() -> None:
    ends = gumbel(torch.tensor([0.0, 1 - 2**-24]))
    assert ends.isfinite().all()
    assert ends[0] < -4 and ends[1] > 15


def test_places_go_to_first_choices_and_sequence_after_sequence() -> None:
    # two positions of two sequences: tokens are 0:0, 1:0, 0:1, 1:1
    experts = torch.tensor([[0, 1], [0, 1], [0, 1], [1, 0]])
    asked = torch.tensor([[True, True], [True, False], [True, True], [True, True]])
    places = queue_places(experts, asked, sequences=2)
    assert places[:, 0].tolist() == [0, 2, 1, 0]
    assert places[:, 1][asked[:, 1]].tolist() == [1, 2, 3]


def test_drops_depend_on_how_tokens_are_spread_over_ranks() -> None:
    """Six tokens that all want experts 0 and 1: 4 places each on one rank, 2 on each of two."""

    def kept(logits: Tensor) -> Tensor:
        capacity = expert_capacity(len(logits), 4, 2, 0.0)
        return route_top2_plainly(logits, capacity).routing_map[:, 0]

    logits = torch.tensor([[4.0, 3.0, 0.0, 0.0]] * 6)
    assert kept(logits).tolist() == [True, True, True, True, False, False]
    halves = torch.cat([kept(half) for half in logits.chunk(2)])
    assert halves.tolist() == [True, True, False, True, True, False]


def test_memory_is_linear_in_tokens() -> None:
    """TorchScale's tensors [t, E, capacity] would take 34 GB each."""
    logits = torch.randn(1 << 16, 16, generator=torch.manual_seed(3))
    capacity = expert_capacity(1 << 16, 16, 2, 0.0)
    routing = route_top2_plainly(logits, capacity)
    assert capacity * logits.numel() * 4 > 34e9
    assert int(routing.routing_map.sum(0).max()) <= capacity
    assert int(routing.routing_map.sum()) > 1.9 * (1 << 16)

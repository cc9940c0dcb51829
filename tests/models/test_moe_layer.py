"""models.moe_layer and models.experts against a loop over experts in fp64, on every layout."""

import os
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import Activation, LayerNormPlacement, ModelConfig, Normalization
from models.experts import expert_spec
from models.moe_config import MoEConfig
from models.moe_layer import DISPATCHERS, MoELayer, sort_by_expert, sum_rows
from parallel import checkpoint_io
from parallel.config import ParallelConfig, TokenDispatcher
from parallel.layers import SubLayerNormRowParallelLinear
from parallel.megatron import (
    MLP,
    ColumnParallelLinear,
    DistributedDataParallel,
    DistributedDataParallelConfig,
    MegatronModule,
    MLPSubmodules,
    ModuleSpec,
    MoESubmodules,
    ProcessGroupCollection,
    TransformerConfig,
    finalize_model_grads,
    parallel_state,
)
from tests.distributed import run_on_gloo
from tests.parallel.test_sub_layernorm import ignore_warnings_about_megatron
from tests.parity import MODEL, train

SEQUENCE, BATCH, HIDDEN, FFN, EXPERTS = 6, 4, 16, 24, 4
SHARED_FFN = 8
EPS = 1e-5
# relative Frobenius error of fp32 against fp64; seen: at most 6e-7
FP32_BOUND = 2e-6


@dataclass(frozen=True)
class Case:
    tp: int = 1
    ep: int = 1
    etp: int = 1
    dispatcher: str = "alltoall"
    topk: int = 2
    activation: str = "gelu"
    bias: bool = True
    placement: str = "sub_ln"
    normalization: str = "LayerNorm"
    sublayers: int = 0  # of stacked experts; 0: not stacked
    shared: bool = False
    drop: bool = False
    ranks: int = 0  # 0: as few as the layout needs

    @property
    def world_size(self) -> int:
        return self.ranks or max(self.tp, self.ep * self.etp)

    def model(self) -> ModelConfig:
        return ModelConfig(
            name="moe",
            num_layers=2,
            hidden_size=HIDDEN,
            ffn_hidden_size=FFN,
            num_attention_heads=2,
            layer_norm_placement=LayerNormPlacement(self.placement),
            normalization=Normalization(self.normalization),
            activation=Activation(self.activation),
            add_bias_linear=self.bias,
            moe=MoEConfig(
                num_experts=EXPERTS,
                router_topk=self.topk,
                stacked_sublayers=self.sublayers or 1,
                sparse_after_layer=1 if self.sublayers else 0,
                shared_expert_intermediate_size=SHARED_FFN if self.shared else 0,
            ),
        )

    def config(self) -> TransformerConfig:
        gated = self.activation == "swiglu"
        config = TransformerConfig(
            num_layers=2,
            hidden_size=HIDDEN,
            num_attention_heads=2,
            ffn_hidden_size=FFN,
            num_moe_experts=EXPERTS,
            moe_ffn_hidden_size=FFN,
            moe_router_topk=self.topk,
            moe_router_pre_softmax=True,  # megatron-core asks for it with topk=1
            moe_token_dispatcher_type=self.dispatcher,
            gated_linear_unit=gated,
            activation_func=F.silu if gated else F.gelu,
            add_bias_linear=self.bias,
            normalization=self.normalization,
            layernorm_epsilon=EPS,
            tensor_model_parallel_size=self.tp,
            expert_model_parallel_size=self.ep,
            # megatron-core's configuration refuses biases with it above 1: its experts have none
            expert_tensor_parallel_size=1,
            sequence_parallel=self.tp > 1,
            calculate_per_token_loss=True,
            use_cpu_initialization=True,
            cuda_graph_scope=[],
        )
        config.expert_tensor_parallel_size = self.etp
        config.sub_layernorm_reduction = "folded"
        return config


class LinearRouter(MegatronModule):
    """Softmax scores of a linear map; with `drop` every fifth token loses its last expert."""

    def __init__(self, config: TransformerConfig, pg_collection: Any, *, drop: bool) -> None:
        super().__init__(config)
        self.weight = nn.Parameter(torch.empty(config.num_moe_experts, config.hidden_size))
        self.drop = drop

    def set_layer_number(self, layer_number: int) -> None:
        self.layer_number = layer_number

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        return route(
            hidden_states.flatten(0, 1), self.weight, self.config.moe_router_topk, self.drop
        )


def route(tokens: Tensor, weight: Tensor, topk: int, drop: bool) -> tuple[Tensor, Tensor]:
    scores = (tokens.to(weight.dtype) @ weight.t()).softmax(-1)
    best, experts = scores.topk(topk + 1, -1)
    assert (best[:, topk - 1] - best[:, topk]).min() > 1e-4  # a tie would be broken by rounding
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen[torch.arange(len(tokens))[:, None], experts[:, :topk]] = True
    if drop:
        unlucky = tokens[:, 0] < -0.8  # whatever rank they are on
        chosen[unlucky, experts[unlucky, topk - 1]] = False
    return scores * chosen, chosen


def values(name: str, *shape: int) -> Tensor:
    """Numbers that depend on the name only, of the size that suits it, in fp32."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    noise = torch.randn(*shape, generator=generator)
    if "norm" in name and name.endswith("weight"):
        return 1 + 0.3 * noise
    return noise if name in ("x", "dy") else noise * shape[-1] ** -0.5


def build(case: Case) -> MoELayer:
    ignore_warnings_about_megatron()
    shared = MLPSubmodules(
        linear_fc1=ColumnParallelLinear, linear_fc2=SubLayerNormRowParallelLinear
    )
    submodules = MoESubmodules(
        router=partial(LinearRouter, drop=case.drop),
        experts=expert_spec(case.model()),
        shared_experts=(
            ModuleSpec(module=MLP, params={"ffn_hidden_size": SHARED_FFN}, submodules=shared)
            if case.shared
            else None
        ),
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    layer = MoELayer(case.config(), submodules, layer_number=1, pg_collection=groups)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            whole = values(name, *whole_shape(parameter))
            parameter.copy_(whole[place_of(parameter)])
    return layer


def shards_of(parameter: Tensor) -> dict[int, tuple[int, int]]:
    if hasattr(parameter, "shards"):
        return parameter.shards
    if getattr(parameter, "tensor_model_parallel", False):
        tp, rank = (
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_tensor_model_parallel_rank(),
        )
        return {parameter.partition_dim: (tp, rank)}  # type: ignore[attr-defined]
    return {}


def whole_shape(parameter: Tensor) -> list[int]:
    pieces = {axis: count for axis, (count, _) in shards_of(parameter).items()}
    return [size * pieces.get(axis, 1) for axis, size in enumerate(parameter.shape)]


def place_of(parameter: Tensor) -> tuple[slice, ...]:
    place = [slice(None)] * parameter.dim()
    for axis, (_, index) in shards_of(parameter).items():
        size = parameter.shape[axis]
        place[axis] = slice(index * size, (index + 1) * size)
    return tuple(place)


def share(case: Case) -> tuple[slice, slice]:
    """Which positions and sequences of the whole batch this rank has."""
    tp = parallel_state.get_tensor_model_parallel_rank()
    dp = parallel_state.get_data_parallel_rank()
    s, b = SEQUENCE // case.tp, BATCH * case.tp // case.world_size
    return slice(tp * s, (tp + 1) * s), slice(dp * b, (dp + 1) * b)


def initialize(case: Case) -> None:
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=case.tp,
        expert_model_parallel_size=case.ep,
        expert_tensor_parallel_size=case.etp,
    )


def run_layer(case: Case) -> dict[str, Any]:
    """This rank's part of the output and of every gradient, with its place in the whole."""
    initialize(case)
    layer = build(case)
    mine = share(case)
    x = values("x", SEQUENCE, BATCH, HIDDEN)[mine].clone().requires_grad_()
    y, bias = layer(x)
    assert bias is None
    y.backward(values("dy", SEQUENCE, BATCH, HIDDEN)[mine])
    parts: dict[str, Any] = {"y": (y.detach(), mine, None), "x": (x.grad, mine, None)}
    for name, parameter in layer.named_parameters():
        parts[name] = (parameter.grad, place_of(parameter), whole_shape(parameter))
    with torch.no_grad():
        assert torch.equal(layer.eval()(x)[0], y)
    return parts


def run_whole(case: Case) -> dict[str, Tensor]:
    """`run_layer` on all ranks, put together; parts in the same place are summands."""
    whole: dict[str, Tensor] = {}
    for parts in run_on_gloo(case.world_size, run_layer, case):
        for name, (part, place, shape) in parts.items():
            if name in ("y", "x"):
                shape = (SEQUENCE, BATCH, HIDDEN)
            whole.setdefault(name, torch.zeros(*shape))[place] += part
    return whole


def feed_forward(case: Case, w: dict[str, Tensor], prefix: str, expert: int, x: Tensor) -> Tensor:
    """One expert's feed-forward as plain torch; without `expert` axis for the shared one."""

    def get(name: str) -> Tensor | None:
        return w[prefix + name][expert] if prefix + name in w else None

    if (gain := get("input_norm_weight")) is not None:
        x = norm(case, x, gain, get("input_norm_bias"))
    fc1, fc1_bias = get("fc1_weight"), get("fc1_bias")
    assert fc1 is not None
    x = F.linear(x, fc1.flatten(0, 1), None if fc1_bias is None else fc1_bias.flatten())
    x = F.silu(x[:, :FFN]) * x[:, FFN:] if case.activation == "swiglu" else F.gelu(x)
    if (gain := get("norm_weight")) is not None:
        x = norm(case, x, gain, get("norm_bias"))
    fc2 = get("fc2_weight")
    assert fc2 is not None
    return F.linear(x, fc2, get("fc2_bias"))


def norm(case: Case, x: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    if case.normalization == "RMSNorm":
        return F.rms_norm(x, gain.shape, gain, EPS)
    return F.layer_norm(x, gain.shape, gain, bias, EPS)


def reference(case: Case, names: dict[str, Tensor]) -> dict[str, Tensor]:
    """The layer in fp64 as a loop over experts; `names` has the whole parameters' shapes."""
    w = {n: values(n, *t.shape).double().requires_grad_() for n, t in names.items() if n != "y"}
    tokens = w["x"].flatten(0, 1)
    gates, chosen = route(tokens, w["router.weight"], case.topk, case.drop)
    out = torch.zeros_like(tokens)
    for expert in range(EXPERTS):
        x = tokens[chosen[:, expert]]
        if case.sublayers:
            u = x
            for j in range(case.sublayers):
                u = u + feed_forward(case, w, f"experts.sublayers.{j}.", expert, u)
            y = u - x
        else:
            y = feed_forward(case, w, "experts.", expert, x)
        row = gates[chosen[:, expert], expert].unsqueeze(-1)
        out = out.index_add(0, chosen[:, expert].nonzero()[:, 0], row * y)
    if case.shared:
        s = {n.removeprefix("shared_experts."): p for n, p in w.items() if n.startswith("shared")}
        z = F.gelu(F.linear(tokens, s["linear_fc1.weight"], s.get("linear_fc1.bias")))
        z = norm(case, z, s["linear_fc2.norm_weight"], s.get("linear_fc2.norm_bias"))
        out = out + F.linear(z, s["linear_fc2.weight"], s.get("linear_fc2.bias"))
    out = out.view_as(w["x"])
    out.backward(values("dy", *out.shape).double())
    grads = {name: p.grad for name, p in w.items()}
    assert all(grad is not None for grad in grads.values())
    return {"y": out.detach()} | grads  # type: ignore[return-value]


def errors(case: Case) -> dict[str, float]:
    """Relative Frobenius errors of the output and of every gradient against fp64."""
    actual = run_whole(case)
    expected = reference(case, actual)
    return {
        name: float((actual[name].double() - e).norm() / e.norm()) for name, e in expected.items()
    }


ONE_PROCESS = [
    Case(),
    Case(topk=1),
    Case(drop=True),
    Case(bias=False, normalization="RMSNorm"),
    Case(activation="swiglu"),
    Case(activation="swiglu", placement="pre_ln", bias=False),
    Case(placement="pre_ln", topk=1, drop=True),
    Case(shared=True),
    Case(sublayers=3),
    Case(sublayers=1, normalization="RMSNorm", activation="swiglu"),
]


@pytest.mark.parametrize("case", ONE_PROCESS, ids=str)
def test_equals_a_loop_over_experts(case: Case) -> None:
    seen = errors(case)
    assert max(seen.values()) < FP32_BOUND, seen


LAYOUTS: list[dict[str, Any]] = [
    {"ep": 2},
    {"ep": 4},
    {"etp": 2},
    {"ep": 2, "etp": 2},
    {"tp": 2, "ep": 2},
    {"tp": 2, "etp": 2},
    {"tp": 2},
    {"ranks": 2},
    {"ep": 2, "ranks": 4},
]


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layouts(layout: dict[str, Any], dispatcher: str) -> None:
    for case in (
        Case(**layout, dispatcher=dispatcher, shared=True),
        Case(
            **layout,
            dispatcher=dispatcher,
            drop=True,
            normalization="RMSNorm",
            activation="swiglu",
        ),
    ):
        seen = errors(case)
        assert max(seen.values()) < FP32_BOUND, (case, seen)


def local_and_dispatched(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Output and gradients by the local path and through megatron-core's dispatcher, one rank."""
    initialize(case)
    results = []
    for dispatched in (False, True):
        layer = build(case)
        if dispatched:
            layer.token_dispatcher = DISPATCHERS[case.dispatcher](
                layer.num_local_experts,
                layer.local_expert_indices,
                config=layer.config,
                pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
            )
        x = values("x", SEQUENCE, BATCH, HIDDEN).requires_grad_()
        y, _ = layer(x)
        y.backward(values("dy", *y.shape))
        grads = {name: p.grad for name, p in layer.named_parameters()}
        results.append({"y": y.detach(), "x": x.grad} | grads)
    return results[0], results[1]


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("topk", [1, 3])
def test_the_local_path_is_the_dispatchers(topk: int, dispatcher: str) -> None:
    """Experts get the same rows in the same order; only sums over a token's rows may round."""
    case = Case(topk=topk, dispatcher=dispatcher, drop=True)
    local, dispatched = run_on_gloo(1, local_and_dispatched, case)[0]
    for name, tensor in local.items():
        if topk == 1 or name not in ("y", "x", "router.weight"):
            assert torch.equal(tensor, dispatched[name]), name
        else:
            torch.testing.assert_close(tensor, dispatched[name], rtol=1e-5, atol=1e-6)


def test_rows_are_sorted_by_expert_and_summed_by_token() -> None:
    chosen = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 0, 0], [0, 1, 0]], dtype=torch.bool)
    order = sort_by_expert(chosen)
    assert order.rows_per_expert == [1, 2, 1]
    assert order.tokens.tolist() == [2, 0, 3, 0]
    assert order.choices.tolist() == [6, 1, 10, 2]
    rows = torch.tensor([[1.0], [10.0], [100.0], [1000.0]])
    assert sum_rows(rows, order).tolist() == [[1010.0], [0.0], [1.0], [100.0]]


def test_without_any_row_the_output_is_zero() -> None:
    order = sort_by_expert(torch.zeros(3, 2, dtype=torch.bool))
    assert order.rows_per_expert == [0, 0]
    assert torch.equal(sum_rows(torch.empty(0, 4), order), torch.zeros(3, 4))


def save(case: Case, folder: Path) -> None:
    initialize(case)
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    state = build(case).sharded_state_dict("mlp.", metadata={"dp_cp_group": group})
    checkpoint_io.save(state, folder, metadata={})


def load(case: Case, folder: Path) -> list[str]:
    """Names of parameters that are not bit-equal to what was saved."""
    initialize(case)
    layer = build(case)
    expected = {name: p.detach().clone() for name, p in layer.named_parameters()}
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(7.0)
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    state = layer.sharded_state_dict("mlp.", metadata={"dp_cp_group": group})
    loaded = checkpoint_io.load(state, folder)
    layer.load_state_dict({name.removeprefix("mlp."): loaded[name] for name in state})
    return [n for n, p in layer.named_parameters() if not torch.equal(p, expected[n])]


@pytest.mark.parametrize("sublayers", [0, 2])
def test_a_checkpoint_is_read_under_any_layout(tmp_path: Path, sublayers: int) -> None:
    written = Case(ep=2, ranks=4, activation="swiglu", sublayers=sublayers)
    run_on_gloo(4, save, written, tmp_path / "c")
    layouts: list[dict[str, Any]] = [{}, {"tp": 2, "ep": 2}]
    if not sublayers:
        layouts = [{}, {"ep": 4}, {"etp": 2}, {"ep": 2, "etp": 2}]
    for layout in layouts:
        case = Case(**layout, activation="swiglu", sublayers=sublayers)
        for differing in run_on_gloo(case.world_size, load, case, tmp_path / "c"):
            assert differing == []


def main_grads(case: Case, fusion: bool, dtype: torch.dtype) -> dict[str, Any]:
    """DistributedDataParallel's gradients of two micro-batches, one rank's part."""
    initialize(case)
    layer = build(case).to(dtype)
    layer.router.float()
    layer.config.gradient_accumulation_fusion = fusion
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=True)
    model = DistributedDataParallel(layer.config, ddp, layer)
    model.zero_grad_buffer()
    x = values("x", SEQUENCE, BATCH, HIDDEN)[share(case)].to(dtype)
    for micro_batch in range(2):
        with model.no_sync() if micro_batch == 0 else nullcontext():
            y, _ = model((micro_batch + 1) * x)
            y.float().square().sum().backward()
    finalize_model_grads([model], num_tokens=None)
    fused = {n for n, p in layer.named_parameters() if p.grad_added_to_main_grad}
    assert fused == ({"experts.fc1_weight", "experts.fc2_weight"} if fusion else set())
    return {
        name: (p.main_grad.clone(), place_of(p), whole_shape(p))
        for name, p in layer.named_parameters()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "layout", [{}, {"ep": 2}, {"ep": 2, "ranks": 4}, {"ep": 2, "etp": 2}], ids=str
)
def test_gradients_through_data_parallelism(layout: dict[str, Any], dtype: torch.dtype) -> None:
    """Fused into the gradient buffer or not, on any layout, the sum over all tokens."""
    whole: dict[tuple[str, Case, bool], Tensor] = {}
    for at, fusion in ((Case(), False), (Case(**layout), False), (Case(**layout), True)):
        for parts in run_on_gloo(at.world_size, main_grads, at, fusion, dtype):
            for name, (part, place, shape) in parts.items():
                whole.setdefault((name, at, fusion), torch.zeros(*shape))[place] = part
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    for (name, at, fusion), tensor in whole.items():
        expected = whole[name, Case(), False]
        error = float((tensor - expected).norm() / expected.norm())
        assert error < bound, (name, at, fusion, error)


def train_without_sequence_parallel() -> str:
    case = Case(tp=2)
    initialize(case)
    layer = build(case)
    layer.config.sequence_parallel = False
    x = values("x", SEQUENCE, BATCH, HIDDEN)
    layer.eval()(x)
    try:
        layer.train()(x)
    except ValueError as error:
        return str(error)
    return ""


def test_tensor_parallel_training_needs_sequence_parallelism() -> None:
    for text in run_on_gloo(2, train_without_sequence_parallel):
        assert "sequence_parallel=False" in text and "tensor_model_parallel_size=2" in text


def threads_of_this_process() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.parametrize("dispatcher", TokenDispatcher)
def test_a_model_that_is_done_with_is_freed(dispatcher: TokenDispatcher) -> None:
    """megatron-core's dispatchers keep gates, and so the graph, the model and its process groups:
    every training would leave the threads of its groups behind."""
    model = replace(MODEL, moe=MoEConfig(num_experts=4))
    parallel = ParallelConfig(expert_model_parallel_size=2, moe_token_dispatcher_type=dispatcher)
    train(parallel, model, world_size=2)
    before = run_on_gloo(2, threads_of_this_process)
    train(parallel, model, world_size=2)
    assert run_on_gloo(2, threads_of_this_process) == before

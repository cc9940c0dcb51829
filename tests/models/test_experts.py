"""models.experts on one rank: blocks, empty experts, frozen ones, attributes, and what is refused.

That they compute the right thing, on every layout: tests/models/test_moe_layer.py.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import models.experts
from models.experts import ExpertFeedForward, StackedExperts, expert_spec
from models.moe_config import MoEConfig
from parallel.megatron import ProcessGroupCollection, build_module, parallel_state
from tests.distributed import run_on_gloo
from tests.models.test_moe_layer import EXPERTS, FFN, HIDDEN, Case, initialize, values
from tests.parallel.test_sub_layernorm import ignore_warnings_about_megatron

ROWS = [5, 0, 9, 2]


def build(case: Case, frozen: bool = False) -> Any:
    ignore_warnings_about_megatron()
    if not parallel_state.model_parallel_is_initialized():
        initialize(case)
    model = case.model()
    model = replace(model, moe=replace(model.moe, freeze_routing=frozen))
    groups = ProcessGroupCollection.use_mpu_process_groups()
    experts = build_module(
        expert_spec(model), EXPERTS // case.ep, case.config(), pg_collection=groups
    )
    with torch.no_grad():
        for name, parameter in experts.named_parameters():
            parameter.copy_(values(name, *parameter.shape))
    return experts


def run(experts: Any, rows: list[int], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Output and all gradients."""
    total = sum(rows)
    x = values("x", total, HIDDEN).to(dtype).requires_grad_()
    gates = values("gates", total, 1).sigmoid().squeeze(1).requires_grad_()
    experts.zero_grad()
    y, bias = experts(x, torch.tensor(rows), gates)
    assert bias is None and y.dtype == dtype
    y.backward(values("dy", total, HIDDEN).to(dtype))
    grads = {name: parameter.grad for name, parameter in experts.named_parameters()}
    return {"y": y.detach(), "x": x.grad, "gates": gates.grad} | grads


def in_blocks_and_whole(dtype: torch.dtype) -> None:
    """Blocks of 64 rows are the smallest; one block for everything is what a GPU works with."""
    experts = build(Case(activation="swiglu")).to(dtype)
    rows = [130, 0, 64, 3]
    blocks = experts.blocks
    assert [block.rows for block in blocks(rows)] == [[130], [64], [3]]
    models.experts.BLOCK_ELEMENTS, before = 1, models.experts.BLOCK_ELEMENTS
    try:
        assert [block.rows for block in blocks(rows)] == [[64], [64], [2], [64], [3]]
        small = run(experts, rows, dtype)
    finally:
        models.experts.BLOCK_ELEMENTS = before
    whole = list(models.experts.blocks_of(rows, None))
    experts.blocks = lambda _: whole
    bound = 1e-5 if dtype == torch.float32 else 3e-2
    for name, tensor in run(experts, rows, dtype).items():
        error = (tensor.float() - small[name].float()).norm() / small[name].float().norm()
        assert error < bound, (name, error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_change_nothing(dtype: torch.dtype) -> None:
    run_on_gloo(1, in_blocks_and_whole, dtype)


def against_fp32() -> dict[str, float]:
    experts = build(Case())
    exact = run(experts, ROWS)
    rounded = run(experts.to(torch.bfloat16), ROWS, torch.bfloat16)
    return {
        name: float((rounded[name].float() - tensor).norm() / tensor.norm())
        for name, tensor in exact.items()
    }


def test_bf16_is_as_exact_as_its_type() -> None:
    """Weights and input are rounded once, then each product and each sum: 2⁻⁹ apiece."""
    seen = run_on_gloo(1, against_fp32)[0]
    assert max(seen.values()) < 0.02, seen


def with_idle_experts(sublayers: int) -> None:
    experts = build(Case(sublayers=sublayers))
    prefix = "sublayers.0." if sublayers else ""
    some = run(experts, ROWS)
    for name, gradient in some.items():
        if name.startswith(prefix + "fc"):
            assert bool((gradient[1] == 0).all()) and bool((gradient[2] != 0).any()), name
    # a rank whose experts nobody asked still has gradients: data parallelism waits for them
    none = run(experts, [0, 0, 0, 0])
    assert none["y"].shape == none["x"].shape == (0, HIDDEN)
    for name, gradient in none.items():
        assert gradient is not None and bool((gradient == 0).all()), name
    # one expert for all
    one = run(experts, [0, 0, 0, sum(ROWS)])
    assert bool((one[prefix + "fc1_weight"][:3] == 0).all())


@pytest.mark.parametrize("sublayers", [0, 2])
def test_experts_without_tokens(sublayers: int) -> None:
    run_on_gloo(1, with_idle_experts, sublayers)


def frozen_and_not(sublayers: int) -> None:
    case = Case(sublayers=sublayers)
    learning = run(build(case), ROWS)
    frozen = run(build(case, frozen=True), ROWS)
    for name, gradient in frozen.items():
        if name in ("y", "x", "gates"):
            assert torch.equal(gradient, learning[name]), name
        else:
            assert gradient is None, name


@pytest.mark.parametrize("sublayers", [0, 2])
def test_frozen_experts_pass_gradients_on(sublayers: int) -> None:
    run_on_gloo(1, frozen_and_not, sublayers)


def describe(case: Case) -> dict[str, Any]:
    experts = build(case)
    state = experts.sharded_state_dict("experts.", sharded_offsets=((0, 1, 3),))
    described = {}
    for name, p in experts.named_parameters():
        assert p.allreduce is False and p.tensor_model_parallel and p.partition_stride == 1
        shard = state[f"experts.{name}"]
        described[name] = (
            tuple(p.shape),
            p.shards,
            p.partition_dim,
            getattr(p, "no_weight_decay", False),
            tuple(shard.global_shape),
            tuple(shard.global_offset),
        )
    return described


def test_parameters_know_their_place() -> None:
    last = run_on_gloo(4, describe, Case(ep=2, etp=2, activation="swiglu"))[3]
    n, e = FFN // 2, EXPERTS // 2
    assert last == {
        "fc1_weight": (
            (e, 2, n, HIDDEN),
            {0: (2, 1), 2: (2, 1)},
            2,
            False,
            (3, EXPERTS, 2, FFN, HIDDEN),
            (1, e, 0, n, 0),
        ),
        "fc2_weight": (
            (e, HIDDEN, n),
            {0: (2, 1), 2: (2, 1)},
            2,
            False,
            (3, EXPERTS, HIDDEN, FFN),
            (1, e, 0, n),
        ),
        "fc1_bias": (
            (e, 2, n),
            {0: (2, 1), 2: (2, 1)},
            2,
            True,
            (3, EXPERTS, 2, FFN),
            (1, e, 0, n),
        ),
        "fc2_bias": (
            (e, HIDDEN // 2),
            {0: (2, 1), 1: (2, 1)},
            1,
            True,
            (3, EXPERTS, HIDDEN),
            (1, e, HIDDEN // 2),
        ),
        **{
            name: ((e, n), {0: (2, 1), 1: (2, 1)}, 1, True, (3, EXPERTS, FFN), (1, e, n))
            for name in ("norm_weight", "norm_bias")
        },
    }


def test_an_input_norm_is_whole_on_every_rank() -> None:
    described = run_on_gloo(2, describe, Case(ep=2, sublayers=1))[1]
    expected = ((2, HIDDEN), {0: (2, 1)}, 0, True, (3, EXPERTS, HIDDEN), (1, 2, 0))
    assert described["sublayers.0.input_norm_weight"] == expected


def test_spec_follows_the_settings() -> None:
    model = Case().model()
    assert expert_spec(model).module is ExpertFeedForward
    assert expert_spec(model).params == {"sub_layernorm": True, "frozen": False}
    moe = MoEConfig(num_experts=4, sparse_after_layer=1, stacked_sublayers=3, freeze_routing=True)
    stacked = expert_spec(replace(Case(placement="pre_ln").model(), moe=moe))
    assert stacked.module is StackedExperts
    assert stacked.params == {"sub_layernorm": False, "frozen": True, "sublayers": 3}


def refusal(case: Case, changes: dict[str, Any]) -> str:
    ignore_warnings_about_megatron()
    initialize(case)
    config = case.config()
    for name, value in changes.items():
        setattr(config, name, value)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    try:
        build_module(expert_spec(case.model()), EXPERTS, config, pg_collection=groups)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("case", "changes", "expected"),
    [
        (Case(), {"activation_func": F.relu}, "activation_func=relu with gated_linear_unit=False"),
        (Case(), {"gated_linear_unit": True}, "activation_func=gelu with gated_linear_unit=True"),
        (Case(etp=2), {"moe_ffn_hidden_size": 25}, "moe_ffn_hidden_size=25 must be a multiple"),
        (Case(etp=2), {"hidden_size": 15}, "hidden_size=15 must be a multiple"),
        (Case(etp=2, sublayers=2), {}, "expert_tensor_parallel_size=2: stacked experts"),
    ],
    ids=["activation", "gate", "width", "hidden", "stacked"],
)
def test_what_cannot_work_is_refused(case: Case, changes: dict[str, Any], expected: str) -> None:
    for text in run_on_gloo(case.world_size, refusal, case, changes):
        assert expected in text

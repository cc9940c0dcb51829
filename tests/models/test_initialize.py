"""Initial weights: right scales, one function of (seed, name, position), bounded memory."""

import math
from dataclasses import replace

import pytest
import torch

from models.build import build_model
from models.config import Activation, InitMethod, LayerNormPlacement, ModelConfig
from models.initialize import (
    EMBEDDING,
    counter_normal,
    counter_uniform,
    global_parameters,
    parameter_key,
    weight_scale,
)
from models.moe_config import MoEConfig, RouterType
from parallel.config import ParallelConfig
from parallel.runtime import initialize, shutdown
from pretrain.parity import Shard, assemble, shards
from tests.distributed import run_on_gloo

MEDIUM = ModelConfig(  # the acceptance shape: d = 1024, ffn 4096, 24 layers
    name="medium", num_layers=24, hidden_size=1024, ffn_hidden_size=4096, num_attention_heads=16
)
SMALL = ModelConfig(
    name="small",
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=128,
    num_attention_heads=8,
    num_query_groups=4,
    make_vocab_size_divisible_by=8,
    activation=Activation.swiglu,
)


def stds(name: str, model: ModelConfig) -> list[float]:
    return [scale.std for _, scale in weight_scale(name, model)]


def test_magneto_scales_value_output_and_feed_forward_only() -> None:
    assert stds("x.linear_qkv.weight", MEDIUM) == pytest.approx(
        [0.031250, 0.031250, 0.061486], abs=5e-7
    )
    assert stds("x.linear_proj.weight", MEDIUM) == pytest.approx([0.061486], abs=5e-7)
    assert stds("x.linear_fc1.weight", MEDIUM) == pytest.approx([0.038887], abs=5e-7)
    assert stds("x.linear_fc2.weight", MEDIUM) == pytest.approx([0.038887], abs=5e-7)
    assert stds(EMBEDDING, MEDIUM) == pytest.approx([1 / 32])


def test_fans_are_those_of_the_separate_matrices() -> None:
    grouped = replace(MEDIUM, num_query_groups=4, layer_norm_placement=LayerNormPlacement.post_ln)
    key = math.sqrt(2 / (1024 + 256))
    assert stds("x.linear_qkv.weight", grouped) == pytest.approx([1 / 32, key, key])
    assert [rows for rows, _ in weight_scale("x.linear_qkv.weight", grouped)] == [256, 64, 64]
    gated = replace(grouped, activation=Activation.swiglu)
    assert stds("x.linear_fc1.weight", gated) == pytest.approx([math.sqrt(2 / 5120)] * 2)


def test_normal_init_is_gpt2s() -> None:
    model = replace(
        MEDIUM, layer_norm_placement=LayerNormPlacement.pre_ln, init_method=InitMethod.normal
    )
    assert stds("x.linear_qkv.weight", model) == [0.02] * 3
    assert stds("x.linear_proj.weight", model) == pytest.approx([0.02 / math.sqrt(48)])
    assert stds("x.linear_fc2.weight", model) == pytest.approx([0.02 / math.sqrt(48)])


def test_unknown_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no initial scale is known for the parameter 'x\.y'"):
        weight_scale("x.y", MEDIUM)


def test_counter_normal_is_standard_normal() -> None:
    n = 1_000_000
    x = counter_normal(parameter_key(1, "w"), torch.arange(n)).double()
    assert abs(x.mean()) < 4 / math.sqrt(n)
    assert abs(x.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((x**4).mean() - 3) < 4 * math.sqrt(96 / n)
    assert abs((x[1:] * x[:-1]).mean()) < 4 / math.sqrt(n)  # neighbours are independent
    other = counter_normal(parameter_key(1, "v"), torch.arange(n)).double()
    assert abs((x * other).mean()) < 4 / math.sqrt(n)  # and so are parameters
    quantiles = torch.quantile(x[:200_000], torch.tensor([0.001, 0.5, 0.999], dtype=torch.float64))
    assert quantiles.tolist() == pytest.approx([-3.0902, 0, 3.0902], abs=0.05)


def test_counter_uniform_is_uniform() -> None:
    x = counter_uniform(parameter_key(1, "w"), torch.arange(1_000_000)).double()
    assert abs(x.mean()) < 4 * math.sqrt(1 / 3 / 1e6)
    assert abs(x.var() - 1 / 3) < 4 * math.sqrt(4 / 45 / 1e6)
    assert x.min() > -1 and x.max() < 1


def test_golden_values() -> None:
    """A change here changes every run's initial weights; the counter is part of the contract."""
    assert parameter_key(1234, EMBEDDING) == GOLDEN_KEY
    values = counter_normal(GOLDEN_KEY, torch.tensor([0, 1, 2, 10**12]))
    assert values.tolist() == pytest.approx(GOLDEN_VALUES, abs=1e-6)


GOLDEN_KEY = -3980152529109243613
GOLDEN_VALUES = [-1.7684423, 0.4809814, -0.283594, -1.6213106]


def weights(parallel: ParallelConfig, model: ModelConfig) -> dict[str, Shard]:
    runtime = initialize(parallel, seed=3)
    chunks = build_model(model, parallel, runtime, vocab_size=100, seed=11)
    found = shards(chunks, lambda parameter: parameter.data)
    shutdown(runtime)
    return found


def assert_same_weights(model: ModelConfig, parallel: ParallelConfig, world_size: int) -> None:
    expected, _ = assemble(run_on_gloo(1, weights, ParallelConfig(), model))
    found, differ = assemble(run_on_gloo(world_size, weights, parallel, model))
    assert differ == []
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


@pytest.mark.parametrize(("tp", "pp", "vpp"), [(2, 1, 1), (1, 2, 1), (4, 1, 1), (2, 2, 1)])
def test_weights_do_not_know_the_layout(tp: int, pp: int, vpp: int) -> None:
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
    )
    assert_same_weights(SMALL, parallel, tp * pp)


SPARSE = replace(
    SMALL, moe=MoEConfig(num_experts=4, shared_expert_intermediate_size=32, ffn_hidden_size=96)
)


@pytest.mark.parametrize(
    ("tp", "pp", "ep", "etp", "world_size"),
    [(1, 1, 2, 1, 2), (1, 1, 4, 1, 4), (1, 1, 1, 4, 4), (2, 1, 2, 2, 4), (2, 2, 2, 1, 4)],
)
@pytest.mark.parametrize("init", InitMethod)
def test_experts_do_not_know_the_layout(
    tp: int, pp: int, ep: int, etp: int, world_size: int, init: InitMethod
) -> None:
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp,
        sequence_parallel=tp > 1,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
    )
    assert_same_weights(replace(SPARSE, init_method=init), parallel, world_size)


@pytest.mark.parametrize("router", RouterType)
def test_routers_start_as_their_papers_have_them(router: RouterType) -> None:
    model = replace(SPARSE, moe=replace(SPARSE.moe, router=router))
    found, _ = assemble(run_on_gloo(1, weights, ParallelConfig(), model))
    start = "decoder.layers.1.mlp.router."
    parts = {name.removeprefix(start): w for name, w in found.items() if name.startswith(start)}
    if router is RouterType.xmoe:
        assert parts["expert_embeddings"].norm(dim=1).tolist() == pytest.approx([0.1] * 4)
        assert parts["temperature"].tolist() == pytest.approx([0.3])
        assert float(parts["projection"].std()) == pytest.approx(math.sqrt(2 / 66), rel=0.2)
    elif router is RouterType.torchscale_xmoe:
        gram = parts["wg"] @ parts["wg"].t() / 0.32**2  # 4 experts in 16 dimensions: orthogonal
        assert torch.allclose(gram, torch.eye(4), atol=1e-5)
        assert 0.9 / 8 < float(parts["wg_reduction"].abs().max()) < 1 / 8
    elif router is RouterType.torchscale:
        assert 0.9 / 8 < float(parts["wg"].abs().max()) < 1 / 8
    else:
        assert float(parts["weight"].std()) == pytest.approx(math.sqrt(2 / 68), rel=0.2)


# aux_free: no parameter of its router is shaped after being drawn
EXPERTS = replace(SPARSE, name="experts", moe=replace(SPARSE.moe, router=RouterType.aux_free))


def built_spreads(model: ModelConfig) -> dict[str, float]:
    runtime = initialize(ParallelConfig(), seed=3)
    chunk = build_model(model, ParallelConfig(), runtime, vocab_size=500, seed=11)[0]
    shutdown(runtime)
    out = {}
    for name, parameter in global_parameters(chunk):
        if parameter.dim() >= 2 and "bias" not in name and "norm" not in name:
            rows_of_it = parameter.detach().flatten(0, -2)
            start = 0
            pattern = weight_scale(name, model)
            period = sum(rows for rows, _ in pattern)
            for part, (rows, scale) in enumerate(pattern):
                block = rows_of_it.unflatten(0, (-1, period))[:, start : start + rows]
                out[f"{name}[{part}]"] = float(block.std()) / scale.std
                start += rows
        elif "norm" in name and name.endswith("weight"):
            assert bool((parameter == 1).all()), name
        else:
            assert bool((parameter == 0).all()), name
    return out


@pytest.mark.parametrize("model", [SMALL, EXPERTS], ids=lambda model: model.name)
def test_built_model_has_the_scales(model: ModelConfig) -> None:
    for name, ratio in run_on_gloo(1, built_spreads, model)[0].items():
        assert ratio == pytest.approx(1, abs=0.08), name

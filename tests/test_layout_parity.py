"""Every layout trains the same model: losses, every gradient, and weights after three steps.

Bounds. All arithmetic is fp32 (unit roundoff 6e-8). Layouts differ in the order of sums only: over
up to 128 tokens, 4 layers and up to 64 channels, so a gradient's error is a few tens of roundoffs
relative to the largest entry of its tensor. 2e-6 of that entry is the bound for gradients, and for
losses near 5; measured values lie below 1e-6. Weights move by lr times Adam's ratio, three times;
its eps (see tests.parity) bounds the ratio's sensitivity, and measured differences lie below 5e-6.
"""

import pytest

from models.config import (
    Activation,
    InitMethod,
    LayerNormPlacement,
    Normalization,
    PositionEmbedding,
)
from parallel.config import ParallelConfig, RecomputeGranularity, SubLayerNormReduction
from tests.parity import MODEL, Result, reference, train, variant

LOSS_BOUND = 2e-6
GRADIENT_BOUND = 2e-6  # of the tensor's largest entry
NORM_BOUND = 2e-6  # relative
WEIGHT_BOUND = 1e-5  # absolute; weights are of order 0.1


def assert_same(result: Result, expected: Result) -> None:
    assert result.losses == pytest.approx(expected.losses, abs=LOSS_BOUND)
    assert result.grad_norms == pytest.approx(expected.grad_norms, rel=NORM_BOUND)
    assert result.family_totals[:, 1].tolist() == expected.family_totals[:, 1].tolist()
    assert (result.family_totals - expected.family_totals).abs().max() < 1e-3
    assert result.gradients.keys() == expected.gradients.keys()
    worst = {
        name: float((result.gradients[name] - gradient).abs().max() / gradient.abs().max())
        for name, gradient in expected.gradients.items()
    }
    assert max(worst.values()) < GRADIENT_BOUND, sorted(worst.items(), key=lambda x: -x[1])[:5]
    moved = {
        name: float((result.weights[name] - weight).abs().max())
        for name, weight in expected.weights.items()
    }
    assert max(moved.values()) < WEIGHT_BOUND, sorted(moved.items(), key=lambda x: -x[1])[:5]


def layout(tp: int = 1, pp: int = 1, vpp: int = 1, sp: bool = False, zero: bool = True, **more):
    return ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        sequence_parallel=sp,
        use_distributed_optimizer=zero,
        **more,
    )


LAYOUTS = {
    "one process, zero": (1, layout()),
    "tp2": (2, layout(tp=2)),
    "tp2 sp": (2, layout(tp=2, sp=True)),
    "tp2 sp no zero": (2, layout(tp=2, sp=True, zero=False)),
    "tp2 no zero": (2, layout(tp=2, zero=False)),
    "tp4": (4, layout(tp=4)),
    "tp4 sp": (4, layout(tp=4, sp=True)),
    "pp2": (2, layout(pp=2)),
    "pp2 no zero": (2, layout(pp=2, zero=False)),
    "pp4": (4, layout(pp=4)),
    "pp2 vpp2": (2, layout(pp=2, vpp=2)),
    "pp2 vpp2 no zero": (2, layout(pp=2, vpp=2, zero=False)),
    "dp2": (2, layout()),
    "dp4": (4, layout()),
    "dp2 no zero": (2, layout(zero=False)),
    "dp2 overlap": (2, layout(overlap_grad_reduce=True, overlap_param_gather=True)),
    "tp2 pp2": (4, layout(tp=2, pp=2)),
    "tp2 pp2 sp": (4, layout(tp=2, pp=2, sp=True)),
    "tp2 pp2 vpp2 sp": (4, layout(tp=2, pp=2, vpp=2, sp=True)),
    "tp2 dp2": (4, layout(tp=2)),
    "tp2 dp2 sp": (4, layout(tp=2, sp=True)),
    "tp2 dp2 sp no zero": (4, layout(tp=2, sp=True, zero=False)),
    "pp2 dp2": (4, layout(pp=2)),
    "pp2 dp2 no zero": (4, layout(pp=2, zero=False)),
    "pp2 vpp2 dp2 overlap": (
        4,
        layout(pp=2, vpp=2, overlap_grad_reduce=True, overlap_param_gather=True),
    ),
    "tp2 pp2 dp2": (8, layout(tp=2, pp=2)),
    "tp2 pp2 dp2 sp": (8, layout(tp=2, pp=2, sp=True)),
    "tp2 pp2 dp2 sp no zero": (8, layout(tp=2, pp=2, sp=True, zero=False)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_process(name: str) -> None:
    world_size, parallel = LAYOUTS[name]
    assert_same(train(parallel, world_size=world_size), reference())


MODELS = {
    "pre_ln": variant(
        layer_norm_placement=LayerNormPlacement.pre_ln, init_method=InitMethod.normal
    ),
    "post_ln": variant(layer_norm_placement=LayerNormPlacement.post_ln),
    "deepnorm": variant(layer_norm_placement=LayerNormPlacement.deepnorm),
    "deepnorm_pre_ln": variant(layer_norm_placement=LayerNormPlacement.deepnorm_pre_ln),
    "rms swiglu gqa": variant(
        normalization=Normalization.rms_norm,
        activation=Activation.swiglu,
        num_query_groups=2,
        add_bias_linear=False,
    ),
    "swiglu with biases": variant(activation=Activation.swiglu),
    "untied rope": variant(
        share_embeddings_and_output_weights=False,
        position_embedding_type=PositionEmbedding.rope,
    ),
    "no positions": variant(position_embedding_type=PositionEmbedding.none),
    "torchscale init": variant(init_method=InitMethod.torchscale),
}


@pytest.mark.parametrize("name", MODELS)
def test_model_variant_equals_one_process(name: str) -> None:
    model = MODELS[name]
    result = train(layout(tp=2, pp=2, sp=True), model, world_size=4)
    assert_same(result, reference(model))


def test_query_groups_fewer_than_tensor_ranks_are_still_right() -> None:
    model = variant(num_query_groups=2)
    assert_same(train(layout(tp=4), model, world_size=4), reference(model))


@pytest.mark.parametrize("sp", [False, True])
def test_all_reduced_sub_layernorm_equals_one_process(sp: bool) -> None:
    parallel = layout(tp=2, sp=sp, sub_layernorm_reduction=SubLayerNormReduction.all_reduce)
    assert_same(train(parallel, world_size=2), reference())


@pytest.mark.parametrize("granularity", ["selective", "full"])
def test_recomputation_changes_nothing(granularity: str) -> None:
    parallel = layout(tp=2, sp=True, recompute_granularity=RecomputeGranularity[granularity])
    assert_same(train(parallel, world_size=2), reference())


def test_micro_batching_does_not_change_the_loss() -> None:
    assert_same(train(layout(), MODEL, micro_batch_size=4), reference())


def test_two_runs_of_one_layout_are_bit_equal() -> None:
    first, second = (train(layout(tp=2), world_size=2) for _ in range(2))
    assert first.losses == second.losses
    assert all((first.weights[name] == second.weights[name]).all() for name in first.weights)

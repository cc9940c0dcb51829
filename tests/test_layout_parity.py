"""Every layout trains the same model: losses, every gradient, and weights after two steps.

Bounds and their reasons stand in `pretrain.parity`. Here each pair of values that two axes of a
layout can have together occurs once, with axes of 1 and 2, and each axis is 4 once; all layouts up
to 8 ranks are `make parity` (tests/parity_matrix.py, docs/parity.md).
"""

import pytest

from models.config import (
    Activation,
    InitMethod,
    LayerNormPlacement,
    Normalization,
    PositionEmbedding,
)
from parallel.config import RecomputeGranularity, SubLayerNormReduction
from pretrain.layouts import Layout, each_value_once, pairwise_cover
from tests.parity import (
    MODEL,
    MODELS,
    assert_same,
    exercise_of,
    layout,
    legal_layouts_of,
    reference,
    reference_of,
    train,
    train_exercise,
    variant,
)

EXERCISES = {kind: exercise_of(model, global_batch_size=4) for kind, model in MODELS.items()}


def chosen_layouts(kind: str) -> list[Layout]:
    chosen = pairwise_cover(legal_layouts_of(EXERCISES[kind], sizes=(1, 2)))
    if kind != "xmoe shared":  # shared experts are shared out as dense layers are
        chosen += each_value_once(legal_layouts_of(EXERCISES[kind], max_ranks=4))
    return list({layout.name: layout for layout in chosen}.values())


CASES = {
    f"{kind}, {layout.name}": (EXERCISES[kind], layout)
    for kind in EXERCISES
    for layout in chosen_layouts(kind)
}


@pytest.mark.parametrize("name", CASES)
def test_layout_equals_one_process(name: str) -> None:
    exercise, chosen = CASES[name]
    result = train_exercise(exercise, chosen.parallel, chosen.world_size)
    assert_same(result, reference_of(exercise))


VARIANTS = {
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


@pytest.mark.parametrize("name", VARIANTS)
def test_model_variant_equals_one_process(name: str) -> None:
    model = VARIANTS[name]
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

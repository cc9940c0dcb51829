"""Every layout trains the same model: losses, every gradient, and weights after two steps.

Bounds and their reasons stand in `pretrain.parity`. Here each pair of values that two axes of a
layout can have together occurs once, with axes of 1 and 2, and each axis is 4 once; all layouts up
to 8 ranks are `make parity` (tests/parity_matrix.py, docs/parity.md).
"""

from dataclasses import replace

import pytest

from models.config import (
    Activation,
    InitMethod,
    LayerNormPlacement,
    Normalization,
    PositionEmbedding,
)
from models.moe_config import BalanceScope, MoEConfig, RouterType, ScoreFunction
from parallel.config import RecomputeGranularity, SubLayerNormReduction
from pretrain.layouts import Layout, each_value_once, pairwise_cover
from pretrain.parity import compare, table
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


# In a router's space of two dimensions some token is so short that rounding shows, on one processor
# more than on another.
EXPERTS = MoEConfig(num_experts=4, router_dim=8)
SPARSE_VARIANTS = {
    "the paper's placement": variant(
        layer_norm_placement=LayerNormPlacement.pre_ln,
        moe=replace(EXPERTS, sparse_after_layer=2, stacked_sublayers=2),
    ),
    "stacked with sub-LN": variant(moe=replace(EXPERTS, sparse_after_layer=3, stacked_sublayers=2)),
    "aux-free, top-2": variant(
        moe=MoEConfig(num_experts=4, router=RouterType.aux_free, router_topk=2)
    ),
    "sigmoid gate, balance by sequence": variant(
        moe=replace(
            EXPERTS,
            router_score_function=ScoreFunction.sigmoid,
            balance_scope=BalanceScope.sequence,
        )
    ),
    "switch, swiglu, rms": variant(
        normalization=Normalization.rms_norm,
        activation=Activation.swiglu,
        moe=MoEConfig(num_experts=4, router=RouterType.linear, layer_freq=1),
    ),
    "frozen routing": variant(moe=replace(EXPERTS, freeze_routing=True)),
    "deepnorm": variant(layer_norm_placement=LayerNormPlacement.deepnorm, moe=EXPERTS),
}


@pytest.mark.parametrize("name", SPARSE_VARIANTS)
def test_sparse_variant_equals_one_process(name: str) -> None:
    model = SPARSE_VARIANTS[name]
    parallel = layout(tp=2, pp=2, sp=True, expert_model_parallel_size=2)
    result = train(parallel, model, world_size=4)
    assert_same(result, reference(model))


@pytest.mark.parametrize(("name", "size"), [("balance", 2), ("frozen", 4)])
def test_micro_batches_of_a_sparse_model(name: str, size: int) -> None:
    """Balance counted by sequence, or switched off by freezing, does not know micro-batches."""
    (model,) = (m for n, m in SPARSE_VARIANTS.items() if name in n)
    if name == "frozen":
        model = replace(model, moe=replace(model.moe, aux_loss_coeff=0.0))
    parallel = layout(expert_model_parallel_size=2)
    result = train(parallel, model, world_size=2, micro_batch_size=size)
    expected = reference(model)
    differences = [row for row in compare(result, expected) if row.what != "auxiliary losses"]
    assert all(row.ok for row in differences), table(differences)


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

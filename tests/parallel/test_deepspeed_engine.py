"""engine=deepspeed trains what megatron-core's engine trains, at every ZeRO stage.

What DeepSpeed holds is read with its own functions (`deepspeed.utils.safe_get_full_*`): nothing of
our view of its memory takes part in the comparison.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from models.build import build_model
from models.config import Activation, LayerNormPlacement, Normalization
from models.moe_config import MoEConfig, RouterType
from parallel.config import ParallelConfig, Precision, RecomputeGranularity
from parallel.deepspeed_config import DeepSpeedConfig, Launch, problems_of
from parallel.deepspeed_engine import DeepSpeedEngine
from parallel.deepspeed_reading import whole_weight
from parallel.engine import MegatronEngine
from parallel.gradient_norms import NormsByBlock
from parallel.runtime import initialize, shutdown
from parallel.stage_clock import StageClock
from pretrain import parity
from pretrain.parity import Exercise, merge
from pretrain.train_step import forward_step, reduce_losses
from tests.distributed import run_on_gloo
from tests.parity import (
    LANGUAGES,
    MODEL,
    OPTIMIZER,
    SEQ_LENGTH,
    VOCAB,
    X_MOE,
    assert_same,
    exercise_of,
    layout,
    micro_batches,
    reference_of,
)

PATIENCE = 280.0  # seconds: DeepSpeed is slow to start where others keep the machine busy
run_on = partial(run_on_gloo, timeout=PATIENCE)
DENSE = exercise_of(replace(MODEL, activation=Activation.swiglu), steps=3)
TIED = exercise_of(replace(MODEL, share_embeddings_and_output_weights=True), steps=3)
XMOE = exercise_of(replace(MODEL, moe=X_MOE), steps=3)
AUX_FREE = MoEConfig(num_experts=8, router_topk=2, router=RouterType.aux_free)


def assert_parity(
    exercise: Exercise, parallel: ParallelConfig, world_size: int, deepspeed: DeepSpeedConfig
) -> None:
    ranks = run_on(world_size, parity.train_on_rank, exercise, parallel, deepspeed)
    assert_same(merge(ranks), reference_of(exercise))


def zero(stage: int, **more: Any) -> DeepSpeedConfig:
    return DeepSpeedConfig(zero_stage=stage, param_persistence_threshold=200, **more)


EP2: dict[str, Any] = {"expert_model_parallel_size": 2}
TP2_SP = layout(tp=2, sp=True)
LAYOUTS: dict[str, tuple[int, ParallelConfig]] = {
    "single": (1, layout()),
    "dp2": (2, layout()),
    "tp2": (2, layout(tp=2)),
    "tp2 sp": (2, TP2_SP),
    "cp2": (2, layout(context_parallel_size=2)),
    "tp2 sp dp2": (4, TP2_SP),
    "ep2": (2, layout(**EP2)),
    "ep2 dp4": (4, layout(**EP2)),
    "tp2 sp ep2": (4, layout(tp=2, sp=True, **EP2)),
    "tp2 sp etp2": (2, layout(tp=2, sp=True, expert_tensor_parallel_size=2)),
    "full": (
        2,
        layout(recompute_granularity=RecomputeGranularity.full, recompute_num_layers=2),
    ),
    "selective": (2, layout(recompute_granularity=RecomputeGranularity.selective)),
}
# one of each kind; the rest is slow
SHORT: dict[str, tuple[Exercise, ParallelConfig, int, DeepSpeedConfig]] = {
    "zero 0, tp2": (DENSE, layout(tp=2), 2, zero(0)),
    "zero 1, dp2": (DENSE, layout(), 2, zero(1)),
    "zero 2, tp2 sp": (TIED, TP2_SP, 2, zero(2)),
    "zero 3, dp2": (DENSE, layout(), 2, zero(3)),
    "zero 2, xmoe, ep2": (XMOE, layout(**EP2), 2, zero(2)),
    "zero 1, tp2 sp, offload": (TIED, TP2_SP, 2, zero(1, offload_optimizer=True)),
}
EXERCISES = {
    "dense": DENSE,
    "tied": TIED,
    "xmoe": XMOE,
    "aux-free": exercise_of(replace(MODEL, moe=AUX_FREE), steps=3),
    "frozen": exercise_of(replace(MODEL, moe=replace(X_MOE, freeze_routing=True)), steps=3),
}


@pytest.mark.parametrize("name", SHORT)
def test_trains_what_the_other_engine_trains(name: str) -> None:
    assert_parity(*SHORT[name])


OFFLOADED = {
    "optimizer, zero 1": zero(1, offload_optimizer=True),
    "optimizer, zero 2": zero(2, offload_optimizer=True),
    "optimizer, zero 3": zero(3, offload_optimizer=True),
    "all, zero 3": zero(3, offload_optimizer=True, offload_parameters=True),
    "overlap, zero 1": zero(1, overlap_comm=True, reduce_bucket_size=3000),
    "overlap, zero 2": zero(2, overlap_comm=True, reduce_bucket_size=3000),
    "overlap, zero 3": zero(3, overlap_comm=True, reduce_bucket_size=3000),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OFFLOADED)
def test_offloaded_and_overlapped(name: str) -> None:
    assert_parity(DENSE, layout(), 2, OFFLOADED[name])


@pytest.mark.slow
@pytest.mark.parametrize("layout_name", ["tp2 sp", "cp2", "tp2 sp dp2"])
@pytest.mark.parametrize("name", OFFLOADED)
def test_offloaded_and_overlapped_in_other_layouts(name: str, layout_name: str) -> None:
    world_size, parallel = LAYOUTS[layout_name]
    assert_parity(DENSE, parallel, world_size, OFFLOADED[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OFFLOADED if "3" not in name])
def test_experts_offloaded_and_overlapped(name: str) -> None:
    assert_parity(XMOE, layout(**EP2), 2, OFFLOADED[name])


# ---- what a run asks of an engine besides --------------------------------------------------------


def story(
    settings: DeepSpeedConfig | None, parallel: ParallelConfig
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Evaluation, passes whose gradients are lost, refused and broken updates, dropout, norms and
    times: numbers of all of them, and the weights at the end. None: megatron-core's engine."""
    model = replace(MODEL, hidden_dropout=0.1)
    runtime = initialize(parallel, 1)
    chunks = build_model(model, parallel, runtime, vocab_size=VOCAB, seed=7)
    engine: Any
    if settings is None:
        engine = MegatronEngine(chunks, parallel, OPTIMIZER, runtime)
    else:
        engine = DeepSpeedEngine(chunks, parallel, OPTIMIZER, settings, runtime)
    norms, clock = NormsByBlock(engine, model.num_layers), StageClock(engine, runtime.device)
    found: dict[str, Any] = {}

    def run(name: str, step: int, **options: Any) -> None:
        engine.seed_random_numbers(3, step)
        batches = micro_batches(step, 1, runtime.data_parallel_rank, runtime.data_parallel_size)
        metrics = engine.forward_backward(
            batches,
            partial(forward_step, device=runtime.device),
            seq_length=SEQ_LENGTH,
            micro_batch_size=1,
            **options,
        )
        found[name] = reduce_losses(metrics, runtime, LANGUAGES, False)[0].mean()

    def update(name: str, accept: Any = None) -> None:
        result = engine.step(OPTIMIZER.lr, accept)
        found[f"{name}: norm"], found[f"{name}: applied"] = result.grad_norm, result.applied

    run("evaluation", 0, forward_only=True)
    run("lost", 4)
    run("refused", 0)
    update("refused", lambda norm: False)
    with clock.measure():
        run("first", 0)
        with norms.measuring():
            update("first", lambda norm: norm > 0)
    found |= norms.metrics()
    stages = {name for name, times in clock.table().items() if sum(times) > 0}
    found["stages"] = len(stages & {"forward", "backward", "gradients", "optimizer"})
    norm = chunks[0].decoder.final_layernorm.weight
    fault = norm.register_hook(lambda gradient: torch.full_like(gradient, math.nan))
    run("broken", 1)
    fault.remove()
    update("broken")
    run("second", 1)
    update("second")
    run("evaluation at the end", 0, forward_only=True)
    if settings is None:
        engine.sharded_state_dict()
        weights = {name: p.detach().float() for name, p in chunks[0].named_parameters()}
    else:
        weights = {name: whole_weight(p) for name, p in chunks[0].named_parameters()}
    shutdown(runtime)
    return found, weights


def assert_same_story(
    settings: DeepSpeedConfig,
    parallel: ParallelConfig,
    within: float = 1e-4,
    size: Callable[[torch.Tensor], torch.Tensor] = torch.max,
) -> None:
    """size: of a weight's deviations, which is held against lr, about what it moved by."""
    expected, weights = run_on(2, story, None, parallel)[0]
    found, others = run_on(2, story, settings, parallel)[0]
    assert found == pytest.approx(expected, rel=within, nan_ok=True)
    assert [found[f"{step}: applied"] for step in ("refused", "first", "broken", "second")] == [
        False,
        True,
        False,
        True,
    ]
    assert found["stages"] == 4
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert size((weight - others[name]).abs()) <= OPTIMIZER.lr * within, name


def test_a_run_with_all_that_may_happen() -> None:
    assert_same_story(zero(2), layout())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "offload"), [(0, False), (1, False), (3, False), (1, True), (2, True), (3, True)]
)
def test_a_run_with_all_that_may_happen_at_other_stages(stage: int, offload: bool) -> None:
    assert_same_story(zero(stage, offload_optimizer=offload), layout())


def assert_same_story_in_bf16(
    settings: DeepSpeedConfig, parallel: ParallelConfig, within: float = 3e-2
) -> None:
    """Gradients of a micro-batch are rounded to 3 digits here, and there not; masters that differ
    by little are rounded to weights that differ by more, so here means are compared."""
    parallel = replace(parallel, precision=Precision.bf16)
    assert_same_story(settings, parallel, within=within, size=torch.mean)


# Under TP a gain near 1 is a tensor of 32 numbers 0.0078 apart: two of them rounded the other way
# are a mean of 5e-4, 5 % of lr.
WITHIN_UNDER_TP = 6e-2


def test_bf16_with_tensor_and_sequence_parallelism() -> None:
    assert_same_story_in_bf16(zero(2), TP2_SP, WITHIN_UNDER_TP)


@pytest.mark.slow
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16(stage: int, offload: bool) -> None:
    assert_same_story_in_bf16(zero(stage, offload_optimizer=offload), layout())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tp2", "tp2 sp", "cp2"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_in_other_layouts(stage: int, name: str) -> None:
    _, parallel = LAYOUTS[name]
    within = WITHIN_UNDER_TP if parallel.tensor_model_parallel_size > 1 else 3e-2
    assert_same_story_in_bf16(zero(stage), parallel, within)


def with_a_weight_of_its_own() -> str:
    parallel = layout()
    runtime = initialize(parallel, 1)
    chunks = build_model(MODEL, parallel, runtime, vocab_size=VOCAB, seed=7)
    engine = DeepSpeedEngine(chunks, parallel, OPTIMIZER, zero(1), runtime)
    parameter = chunks[0].decoder.final_layernorm.weight
    assert torch.equal(whole_weight(parameter), parameter)
    parameter.data.add_(1.0)
    with pytest.raises(RuntimeError) as caught:
        whole_weight(parameter)
    del engine
    shutdown(runtime)
    return str(caught.value)


def test_weights_and_what_adam_updates_are_held_against_each_other() -> None:
    assert "is not the number" in run_on(1, with_a_weight_of_its_own)[0]


def decays_and_rates() -> dict[str, tuple[float, float]]:
    """Of each parameter its weight decay, and the learning rate of the last step."""
    parallel = layout()
    runtime = initialize(parallel, 1)
    model = replace(MODEL, moe=X_MOE)
    chunks = build_model(model, parallel, runtime, vocab_size=VOCAB, seed=7)
    optimizer = replace(OPTIMIZER, weight_decay=0.3)
    engine = DeepSpeedEngine(chunks, parallel, optimizer, zero(0), runtime)
    engine.forward_backward(
        micro_batches(0, 1, 0, 1),
        partial(forward_step, device=runtime.device),
        seq_length=SEQ_LENGTH,
        micro_batch_size=1,
    )
    engine.step(0.125)
    of = {
        id(parameter): (group["weight_decay"], group["lr"])
        for group in engine.optimizer.param_groups
        for parameter in group["params"]
    }
    shutdown(runtime)
    return {name: of[id(parameter)] for name, parameter in chunks[0].named_parameters()}


def test_weight_decay_skips_biases_and_norms() -> None:
    also = ("router.temperature", "router.expert_embeddings")
    for name, (decay, rate) in run_on(1, decays_and_rates)[0].items():
        spared = name.endswith(("bias", *also)) or "norm" in name
        assert decay == (0.0 if spared else 0.3), name
        assert rate == 0.125


TINY = exercise_of(
    replace(
        MODEL,
        num_layers=1,
        hidden_size=2,
        ffn_hidden_size=4,
        num_attention_heads=1,
        num_query_groups=None,
        kv_channels=None,
        normalization=Normalization.rms_norm,
        add_bias_linear=False,
        layer_norm_placement=LayerNormPlacement.pre_ln,
    ),
    steps=3,
)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_rank_without_a_part_of_a_parameter_group(stage: int) -> None:
    """Gains of three norms of width 2, on four ranks, are padded to eight: none for the last."""
    assert_parity(TINY, layout(), 4, zero(stage))


FINAL_NORM, QUERY_NORM = (
    "decoder.final_layernorm.weight",
    "decoder.layers.0.self_attention.q_layernorm.weight",
)


def with_gradients_to_be_summed(name: str) -> str:
    runtime = initialize(TP2_SP, 1)
    chunks = build_model(MODEL, TP2_SP, runtime, vocab_size=VOCAB, seed=7)
    if name == FINAL_NORM:
        dict(chunks[0].named_parameters())[name].average_gradients_across_tp_domain = True
    else:
        chunks[0].config.qk_layernorm = True
        attention = chunks[0].decoder.layers[0].self_attention
        attention.q_layernorm = torch.nn.LayerNorm(attention.hidden_size_per_attention_head)
    with pytest.raises(ValueError) as caught:
        DeepSpeedEngine(chunks, TP2_SP, OPTIMIZER, zero(1), runtime)
    shutdown(runtime)
    return str(caught.value)


@pytest.mark.parametrize("name", [FINAL_NORM, QUERY_NORM])
def test_gradients_that_nobody_would_reduce_are_refused(name: str) -> None:
    for text in run_on(2, with_gradients_to_be_summed, name):
        assert f"engine=deepspeed does not reduce the gradients of {name}" in text
        assert "over tensor-parallel ranks; use engine=megatron" in text


# ---- every stage and layout ----------------------------------------------------------------------


# what these models add is not about layouts
ONLY = {"tied": ["dp2", "tp2 sp"], "aux-free": ["ep2"], "frozen": ["dp2", "ep2"]}


def legal() -> list[tuple[str, str, int]]:
    return [
        (kind, name, stage)
        for kind, exercise in EXERCISES.items()
        for name, (_, parallel) in LAYOUTS.items()
        if name in ONLY.get(kind, LAYOUTS)
        for stage in range(4)
        if not problems_of(Launch(parallel, zero(stage), exercise.model.moe.num_experts))
        and validates(exercise, parallel)
    ]


def validates(exercise: Exercise, parallel: ParallelConfig) -> bool:
    """Whether the layout is for a model of this kind."""
    sparse = exercise.model.moe.num_experts > 0
    experts = parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size > 1
    plain_tensor = parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel
    return not plain_tensor if sparse else not experts


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name", "stage"), legal())
def test_all_stages_and_layouts(kind: str, name: str, stage: int) -> None:
    world_size, parallel = LAYOUTS[name]
    assert_parity(EXERCISES[kind], parallel, world_size, zero(stage))

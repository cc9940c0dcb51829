"""The arithmetic of predicted memory, by hand. What it predicts is measured in
tests/benchmarks/test_memory.py."""

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from models import activation_memory, expert_memory
from models.config import ModelConfig
from models.memory import MemoryPrediction, predict_memory, readable, worst_expert_load
from models.moe_config import MoEConfig
from models.parameter_count import parameter_count
from parallel.config import ParallelConfig, Precision, RecomputeGranularity
from parallel.pipeline_order import Pass, in_flight, passes

MODEL = ModelConfig(
    name="by hand",
    num_layers=8,
    hidden_size=256,
    ffn_hidden_size=1024,
    num_attention_heads=4,
    vocab_size=1024,
)
BF16 = ParallelConfig(precision=Precision.bf16)


def predict(
    model: ModelConfig = MODEL, parallel: ParallelConfig = BF16, **settings: Any
) -> MemoryPrediction:
    usual: dict[str, Any] = {
        "world_size": 1,
        "seq_length": 512,
        "micro_batch_size": 2,
        "micro_batches": 8,
    }
    return predict_memory(model, parallel, **(usual | settings))


# ---- the order of passes ------------------------------------------------------------------------


def test_one_stage_goes_forward_and_back() -> None:
    assert passes(0, 1, 1, 2) == [Pass(True, 0), Pass(False, 0)] * 2


@pytest.mark.parametrize("stages", [2, 4])
def test_1f1b_holds_fewer_micro_batches_on_later_stages(stages: int) -> None:
    """arXiv 2104.04473 section 2.2: at most as many as there are stages from here on."""
    assert [in_flight(stage, stages, 1, 8) for stage in range(stages)] == [
        stages - stage for stage in range(stages)
    ]
    assert in_flight(0, stages, 1, 1) == 1  # no more than there are


def test_interleaved_chunks_take_groups_of_micro_batches() -> None:
    chunks = [step.chunk for step in passes(0, 2, 2, 4) if step.forward]
    assert chunks == [0, 0, 1, 1, 0, 0, 1, 1]
    assert [step.chunk for step in passes(1, 2, 2, 4) if not step.forward] == [
        1,
        1,
        0,
        0,
        1,
        1,
        0,
        0,
    ]
    # a warm-up of 2 (2 - 0 - 1) + (2 - 1) 2 = 4 passes, and one more before the first comes back
    assert in_flight(0, 2, 2, 4) == 5
    assert in_flight(1, 2, 2, 4) == 3


# ---- state --------------------------------------------------------------------------------------


def test_state_of_one_rank() -> None:
    """bf16: 2 bytes a weight, 4 of its gradient, 4 of its master and 8 of its moments."""
    stage = predict().peak
    count = parameter_count(MODEL).total
    padded = -(-count // 128) * 128
    assert (stage.parameters, stage.gradients, stage.optimizer) == (
        2 * padded,
        4 * padded,
        12 * padded,
    )


def test_state_in_fp32_without_the_distributed_optimizer() -> None:
    parallel = ParallelConfig(precision=Precision.fp32, use_distributed_optimizer=False)
    stage = predict(parallel=parallel, world_size=4).peak
    count = parameter_count(MODEL).total
    assert (stage.parameters, stage.gradients, stage.optimizer) == (4 * count, 4 * count, 8 * count)


def test_zero_shares_the_optimizer_out_over_data_and_context_ranks() -> None:
    whole = predict().peak
    for parallel in (BF16, replace(BF16, context_parallel_size=2)):
        shared = predict(parallel=parallel, world_size=4).peak
        assert shared.parameters == whole.parameters
        assert abs(4 * shared.optimizer - whole.optimizer) <= 12 * 512


def test_experts_are_shared_out_over_their_own_ranks() -> None:
    """Of 8 experts a rank has 2; of 8 ranks 2 have the same."""
    model = replace(MODEL, moe=MoEConfig(num_experts=8))
    parallel = replace(BF16, expert_model_parallel_size=4)
    count = parameter_count(model)
    dense = count.total - count.experts - count.routers
    stage = predict(model, parallel, world_size=8).peak
    expected = 2 * (dense + count.experts // 4) + 4 * count.routers
    assert abs(stage.parameters - expected) < 4 * 3 * 128
    expected = 12 * (dense // 8 + count.experts // 4 // 2) + 8 * count.routers // 8
    assert abs(stage.optimizer - expected) < 12 * 3 * 128


def test_frozen_experts_and_routers_have_no_gradients() -> None:
    frozen = MoEConfig(num_experts=8, freeze_routing=True, aux_loss_coeff=0.0)
    trained = predict(replace(MODEL, moe=MoEConfig(num_experts=8))).peak
    stage = predict(replace(MODEL, moe=frozen)).peak
    count = parameter_count(replace(MODEL, moe=frozen))
    dense = count.total - count.experts - count.routers
    assert abs(stage.parameters - trained.parameters) < 4 * 3 * 128
    assert abs(stage.gradients - 4 * dense) < 4 * 128


# ---- activations --------------------------------------------------------------------------------


def test_a_dense_layer_by_hand() -> None:
    """On a GPU in bf16, in units of e t h: two norms' inputs and outputs 4, queries and keys turned
    and not 2 + 3, attention's output 1, feed-forward 4 + 4; beside it norms and attention keep a
    few fp32 numbers a token, and the loss its input's gradient."""
    eight, four = (predict(replace(MODEL, num_layers=n)).peak for n in (8, 4))
    tokens = 2 * 512
    unit = 2 * tokens * 256
    small = tokens * (2 * 8 + 4 * 4)
    assert eight.moment == four.moment.replace("layer 4", "layer 8")
    assert eight.activations - four.activations == 4 * (18 * unit + small)


def test_recomputation_keeps_the_inputs_of_groups() -> None:
    unit = 2 * 2 * 512 * 256
    full = RecomputeGranularity.full
    for size in (1, 2):
        parallel = replace(BF16, recompute_granularity=full, recompute_num_layers=size)
        stage = predict(parallel=parallel, device="cpu").peak
        assert stage.activations == 8 // size * unit
        # and all of a group while it is run again
        assert stage.temporary > 16 * size * unit
    selective = replace(BF16, recompute_granularity=RecomputeGranularity.selective)
    assert predict(parallel=selective).peak.activations < predict().peak.activations


def test_the_first_stage_holds_most() -> None:
    parallel = replace(BF16, pipeline_model_parallel_size=4)
    prediction = predict(parallel=parallel, world_size=4)
    activations = [stage.activations for stage in prediction.stages]
    assert activations == sorted(activations, reverse=True)
    assert prediction.peak is prediction.stages[0] and prediction.peak.in_flight == 4
    assert prediction.of_rank(3) is prediction.stages[3]
    with pytest.raises(ValueError, match="rank 4 is not among"):
        prediction.of_rank(4)


@pytest.mark.parametrize("chunks", [1, 2])
def test_more_micro_batches_change_nothing_but_the_batches(chunks: int) -> None:
    parallel = replace(
        BF16, pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=chunks
    )
    few, many = (predict(parallel=parallel, world_size=4, micro_batches=n) for n in (8, 100_000))
    for one, other in zip(few.stages, many.stages, strict=True):
        assert one == replace(other, other=one.other)


@pytest.mark.parametrize(
    "changes",
    [{"tensor_model_parallel_size": 2, "sequence_parallel": True}, {"context_parallel_size": 2}],
    ids=["TP and SP", "CP"],
)
def test_shards_of_activations(changes: dict[str, Any]) -> None:
    whole = predict().peak
    half = predict(parallel=replace(BF16, **changes), world_size=2).peak
    assert 0.45 < half.activations / whole.activations < 0.6


def test_sequence_parallelism_cuts_what_tensor_parallelism_repeats() -> None:
    parallel = replace(BF16, tensor_model_parallel_size=2)
    without = predict(parallel=parallel, world_size=2).peak
    with_it = predict(parallel=replace(parallel, sequence_parallel=True), world_size=2).peak
    unit = 2 * 2 * 512 * 256
    # of a layer: norms' inputs and outputs, and the outputs of both folded sub-LayerNorms
    assert without.activations - with_it.activations > 8 * (4 + 2) * unit // 2


def test_dropout_keeps_masks() -> None:
    plain, dropped = predict().peak, predict(replace(MODEL, hidden_dropout=0.1)).peak
    assert 0 < dropped.activations - plain.activations <= (2 * 8 + 1) * 2 * 512 * 256


def test_a_large_vocabulary_peaks_in_the_loss() -> None:
    stage = predict(replace(MODEL, vocab_size=200_000, num_layers=1)).peak
    assert stage.moment == "forward pass of loss"
    rows = -(-200_000 // 128) * 128
    chunk = 2**29 // (4 * rows) // 128 * 128
    assert stage.temporary == chunk * (6 * rows + 2 * 256) + 2 * 1024 * 256


# ---- experts ------------------------------------------------------------------------------------


def test_the_load_of_experts_counts() -> None:
    model = replace(MODEL, moe=MoEConfig(num_experts=8, router_topk=2))
    parallel = replace(BF16, expert_model_parallel_size=4)
    even = predict(model, parallel, world_size=4).peak
    worst = predict(
        model, parallel, world_size=4, expert_load=worst_expert_load(model, parallel)
    ).peak
    rows = 2 * 512 * 2
    # four sparse layers: rows, outputs, and what comes before the activation, and gates
    assert worst.activations - even.activations >= 4 * 3 * rows * (2 * (256 + 256 + 1024) + 4)


@pytest.mark.parametrize(
    ("moe", "ranks", "load"),
    [
        (MoEConfig(), 1, 1.0),
        (MoEConfig(num_experts=8, router_topk=2), 4, 4.0),  # both of a token's experts are here
        (MoEConfig(num_experts=8, router_topk=2), 8, 4.0),  # one of them can be
        (MoEConfig(num_experts=8, router_topk=2, expert_capacity_factor=1.25), 4, 1.25),
    ],
    ids=["dense", "two a rank", "one a rank", "capacity"],
)
def test_worst_load(moe: MoEConfig, ranks: int, load: float) -> None:
    parallel = ParallelConfig(expert_model_parallel_size=ranks)
    assert worst_expert_load(replace(MODEL, moe=moe), parallel) == load


# ---- constants, text and refusals ---------------------------------------------------------------


def test_constants_are_those_of_the_code() -> None:
    from models import experts
    from parallel import cross_entropy

    assert activation_memory.LOGITS_CHUNK_BYTES == {
        "cpu": cross_entropy.LOGITS_CHUNK_BYTES_CPU,
        "cuda": cross_entropy.LOGITS_CHUNK_BYTES_GPU,
    }
    assert expert_memory.BLOCK_ELEMENTS_CPU == experts.BLOCK_ELEMENTS


def test_the_table() -> None:
    parallel = replace(BF16, pipeline_model_parallel_size=2)
    lines = predict(parallel=parallel, world_size=2).lines()
    assert lines[0].split() == ["bytes", "of", "a", "rank", "stage", "0", "stage", "1"]
    assert [line.split()[0] for line in lines[1:]] == [
        "parameters",
        "gradients",
        "optimizer",
        "activations",
        "temporary",
        "other",
        "total",
        "most",
    ]
    assert len({len(line) for line in lines[:-1]}) == 1
    assert lines[-1].startswith("most on stage 0, in the backward pass of layer 4's")


def test_the_line_of_the_log() -> None:
    stage = predict().peak
    line = stage.describe()
    assert line.startswith(f"memory: {readable(stage.total)} of torch's allocator predicted for")
    assert f"optimizer {readable(stage.optimizer)}" in line and stage.moment in line


def test_readable() -> None:
    assert [readable(n) for n in (3, 2**10, 3 * 2**20, 2**40)] == [
        "3 B",
        "1.0 KiB",
        "3.0 MiB",
        "1024.0 GiB",
    ]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="device=tpu: memory is predicted for cpu and cuda"):
        predict(device="tpu")
    with pytest.raises(ValueError, match="pass vocab_size"):
        predict(replace(MODEL, vocab_size=None))


def test_prediction_imports_no_torch() -> None:
    code = """
import json, sys
import models.memory, pretrain.memory
print(json.dumps(sorted({"torch", "megatron"} & set(sys.modules))))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(found.stdout) == []

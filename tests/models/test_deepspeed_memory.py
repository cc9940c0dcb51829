"""What engine=deepspeed is predicted to hold, by hand. What it holds is measured in
tests/benchmarks/test_memory.py."""

from dataclasses import replace
from typing import Any

import pytest

from models.config import ModelConfig
from models.memory import StageMemory, predict_memory
from models.moe_config import MoEConfig
from models.parameter_count import parameter_count
from parallel.config import ParallelConfig, Precision
from parallel.deepspeed_config import DeepSpeedConfig

VOCABULARY = 128  # so few that the loss is not what takes most
MODEL = ModelConfig(
    name="by hand",
    num_layers=8,
    hidden_size=256,
    ffn_hidden_size=1024,
    num_attention_heads=4,
    vocab_size=VOCABULARY,
)
P = parameter_count(MODEL).total
LARGEST = 256 * 1024
SMALL_BUCKET = 300_000
RANKS = 4
FP32, BF16 = (ParallelConfig(precision=kind) for kind in (Precision.fp32, Precision.bf16))
PREDICTED: dict[str, Any] = {"seq_length": 2048, "micro_batch_size": 8, "micro_batches": 4}


def predict(
    zero_stage: int,
    parallel: ParallelConfig = FP32,
    model: ModelConfig = MODEL,
    *,
    device: str = "cuda",
    micro_batches: int = 4,
    **settings: Any,
) -> StageMemory:
    """With activations that outweigh all else."""
    deepspeed = DeepSpeedConfig(
        zero_stage=zero_stage, **{"reduce_bucket_size": SMALL_BUCKET} | settings
    )
    sizes = PREDICTED | {"micro_batches": micro_batches}
    return predict_memory(
        model, parallel, world_size=RANKS, device=device, deepspeed=deepspeed, **sizes
    ).peak


@pytest.mark.parametrize(
    ("stage", "parallel", "parameters", "gradients", "optimizer"),
    [
        (0, FP32, 4 * P, 4 * P, 8 * P),
        (1, FP32, 4 * P, 4 * P + 4 * SMALL_BUCKET, 12 * P // RANKS),
        (2, FP32, 4 * P, 4 * P // RANKS + 4 * SMALL_BUCKET, 12 * P // RANKS),
        (3, FP32, 4 * P // RANKS + 4 * P, 4 * P // RANKS + 4 * SMALL_BUCKET, 12 * P // RANKS),
        (1, BF16, 2 * P, 6 * P, 12 * P // RANKS),
        (2, BF16, 2 * P, 4 * P // RANKS + 2 * SMALL_BUCKET, 12 * P // RANKS),
        (3, BF16, 2 * P // RANKS + 2 * P, 4 * P // RANKS + 4 * SMALL_BUCKET, 12 * P // RANKS),
    ],
    ids=["0", "1", "2", "3", "1 bf16", "2 bf16", "3 bf16"],
)
def test_state(
    stage: int, parallel: ParallelConfig, parameters: int, gradients: int, optimizer: int
) -> None:
    found = predict(stage, parallel)
    assert found.moment == "backward pass of layer 8's linear_fc2"
    assert found.parameters == pytest.approx(parameters, abs=16)
    assert found.gradients == pytest.approx(gradients, abs=16)
    assert found.optimizer == pytest.approx(optimizer, abs=64)
    assert found.host == 0


@pytest.mark.parametrize(("stage", "parallel"), [(1, FP32), (1, BF16), (2, FP32), (2, BF16)])
def test_offload_leaves_a_bucket_of_the_largest_parameter(
    stage: int, parallel: ParallelConfig
) -> None:
    e = 4 if parallel is FP32 else 2
    found = predict(stage, parallel, offload_optimizer=True)
    assert found.optimizer == 0
    sums = 4 * P // RANKS if (stage, e) == (2, 4) else 0
    there = (16 + e) * P // RANKS + e * LARGEST + sums
    assert found.host == pytest.approx(there, abs=128)
    waiting = 4 * P if stage == 1 else 0 if e == 4 else 4 * P // RANKS
    bucket = (4 if stage == 1 else e) * SMALL_BUCKET
    assert found.gradients == pytest.approx(waiting + bucket + e * LARGEST, abs=128)


def test_offload_of_all() -> None:
    found = predict(3, BF16, offload_optimizer=True, offload_parameters=True)
    assert found.host == pytest.approx(22 * P // RANKS, abs=128)
    assert found.parameters == 2 * P  # gathered
    assert (found.gradients, found.optimizer) == (4 * SMALL_BUCKET, 0)
    assert "host memory offloaded" in found.describe()


def test_the_memory_of_a_cpu_is_that_of_its_host() -> None:
    on_gpu, on_cpu = (
        predict(2, offload_optimizer=True, device=device) for device in ("cuda", "cpu")
    )
    assert (on_cpu.host, on_cpu.optimizer) == (0, on_gpu.host)


def test_one_micro_batch_has_its_gradients_later() -> None:
    """Most is kept when only the loss has gone back."""
    found = predict(0, micro_batches=1)
    assert found.gradients == 4 * VOCABULARY * 256
    assert predict(2, micro_batches=1).gradients == 4 * SMALL_BUCKET


def test_gradients_are_reduced_with_all_of_them_in_hand() -> None:
    """Where activations are few: a copy of each bucket, in bf16 another in fp32."""
    few: dict[str, Any] = {"seq_length": 16, "micro_batch_size": 1, "micro_batches": 2}

    def reduction(zero_stage: int, parallel: ParallelConfig) -> StageMemory:
        return predict_memory(
            MODEL,
            parallel,
            world_size=RANKS,
            deepspeed=DeepSpeedConfig(zero_stage=zero_stage),
            **few,
        ).peak

    for stage, parallel, temporary in [
        (0, FP32, 4 * P),
        (1, BF16, 4 * P),
        (2, BF16, 6 * P),
        (3, FP32, 8 * P),
    ]:
        found = reduction(stage, parallel)
        assert found.moment == "reduction of gradients" and found.activations == 0
        expected = temporary + (4 * P // RANKS if (stage, parallel) == (2, BF16) else 0)
        assert found.temporary == pytest.approx(expected, abs=16)


def test_overlapping_takes_another_bucket() -> None:
    plain, overlapped = predict(2), predict(2, overlap_comm=True)
    assert overlapped.gradients - plain.gradients == 4 * SMALL_BUCKET


def test_one_rank_gathers_nothing() -> None:
    tensor = replace(FP32, tensor_model_parallel_size=RANKS)
    assert predict(3, tensor).parameters == predict(2, tensor).parameters


def test_experts_are_shared_out_over_their_own_ranks() -> None:
    """Of 8 experts a rank has 4; of 4 ranks 2 have the same."""
    model = replace(MODEL, moe=MoEConfig(num_experts=8))
    count = parameter_count(model)
    found = predict(2, replace(FP32, expert_model_parallel_size=2), model)
    dense, experts = count.total - count.experts, count.experts // 2
    assert found.parameters == 4 * (dense + experts)
    assert found.optimizer == pytest.approx(12 * (dense // 4 + experts // 2), abs=64)


def test_frozen_experts_have_no_optimizer() -> None:
    moe = MoEConfig(num_experts=8, freeze_routing=True, aux_loss_coeff=0.0)
    count = parameter_count(replace(MODEL, moe=moe))
    dense = count.total - count.experts - count.routers
    found = predict(1, FP32, replace(MODEL, moe=moe))
    assert found.parameters == 4 * count.total
    assert found.optimizer == pytest.approx(12 * dense // RANKS, abs=64)

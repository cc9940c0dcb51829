"""A run's memory from its configuration, and the sizes of devices."""

from dataclasses import replace

import pytest

from data.config import DataConfig
from data.packing_config import PackingConfig
from models.config import ModelConfig
from models.memory import predict_memory
from models.moe_config import MoEConfig
from parallel.config import ParallelConfig
from pretrain.config import PretrainConfig, TrainConfig
from pretrain.memory import (
    DEVICES,
    device_memory_bytes,
    predict_memory_of_run,
    worst_memory_of_run,
)

MODEL = ModelConfig(
    name="m", num_layers=4, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4
)
PARALLEL = ParallelConfig(pipeline_model_parallel_size=2)


def run(model: ModelConfig = MODEL, *, resets: bool = False) -> PretrainConfig:
    packing = PackingConfig(reset_attention=resets, reset_positions=resets)
    return PretrainConfig(
        model=model,
        data=DataConfig(seq_length=128, packing=packing),
        parallel=PARALLEL,
        train=TrainConfig(micro_batch_size=2, global_batch_size=16),
    )


def test_settings_arrive() -> None:
    """16 sequences in micro-batches of 2 over 4 / 2 = 2 replicas are 4 micro-batches."""
    expected = predict_memory(
        MODEL,
        PARALLEL,
        world_size=4,
        seq_length=128,
        micro_batch_size=2,
        micro_batches=4,
        vocab_size=500,
    )
    assert predict_memory_of_run(run(), 4, vocab_size=500) == expected
    wider = run(replace(MODEL, vocab_size=2000))
    assert predict_memory_of_run(wider, 4, vocab_size=500) == predict_memory_of_run(wider, 4)
    on_cpu = predict_memory_of_run(run(), 4, vocab_size=500, device="cpu")
    assert on_cpu.peak.parameters == pytest.approx(2 * expected.peak.parameters, rel=0.01)


def test_documents_count() -> None:
    """Positions that start anew: a table entry of 8 bytes for each token and pair of channels, of
    queries and of keys."""
    plain, reset = (
        predict_memory_of_run(run(resets=resets), 4, vocab_size=500, device="cpu").peak
        for resets in (False, True)
    )
    in_flight, layers, tokens, pairs = 2, 2, 2 * 128, 8
    assert reset.activations - plain.activations == in_flight * layers * tokens * pairs * 2 * 8


def test_the_worst_load() -> None:
    sparse = run(replace(MODEL, moe=MoEConfig(num_experts=4)))
    sparse.parallel = replace(PARALLEL, expert_model_parallel_size=2)
    even = predict_memory_of_run(sparse, 4, vocab_size=500)
    worst = worst_memory_of_run(sparse, 4, vocab_size=500)
    assert worst.peak.activations > even.peak.activations
    assert worst == predict_memory_of_run(sparse, 4, vocab_size=500, expert_load=2.0)
    assert worst_memory_of_run(run(), 4, vocab_size=500).peak == (
        predict_memory_of_run(run(), 4, vocab_size=500).peak
    )


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("a100-80gb", DEVICES["a100-80gb"]),
        (" H100_80GB ", 80 * 10**9),
        ("80GiB", 80 * 2**30),
        ("40 GB", 40 * 10**9),
        ("81559MiB", 81559 * 2**20),
        ("0.5tb", 500 * 10**9),
    ],
)
def test_sizes_of_devices(text: str, size: int) -> None:
    assert device_memory_bytes(text) == size


@pytest.mark.parametrize("text", ["h100", "80", "0GiB", "80 gallons", ""])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is no device memory: use a size with its unit, as in"):
        device_memory_bytes(text)

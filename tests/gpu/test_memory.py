"""Predicted memory against `torch.cuda.max_memory_allocated` (`pytest -m gpu`).

In this process, as a world of one.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from models.config import ModelConfig
from parallel.config import ParallelConfig, RecomputeGranularity

pytestmark = pytest.mark.gpu

MODEL = ModelConfig(
    name="gpu",
    num_layers=8,
    hidden_size=1024,
    ffn_hidden_size=4096,
    num_attention_heads=8,
    vocab_size=32_000,
)
MICRO_BATCH, SEQUENCE = 4, 2048
# the kernels' own workspaces are in what torch counts and in no formula
BOUND = 0.05


@pytest.fixture
def runtime() -> Iterator:
    from parallel.runtime import initialize, shutdown

    found = initialize(ParallelConfig(), seed=1)
    yield found
    shutdown(found)


@pytest.mark.parametrize("recompute", list(RecomputeGranularity))
def test_the_first_step(runtime: Any, recompute: RecomputeGranularity) -> None:
    from models.build import build_model
    from models.memory import predict_memory
    from parallel.config import OptimizerConfig
    from parallel.engine import MegatronEngine
    from pretrain.parity import Exercise, micro_batches
    from pretrain.train_step import train_step
    from tests.parity import LANGUAGES

    parallel = ParallelConfig(recompute_granularity=recompute)
    model = replace(MODEL, max_position_embeddings=SEQUENCE)
    exercise = Exercise(
        model=model,
        vocab_size=32_000,
        seq_length=SEQUENCE,
        micro_batch_size=MICRO_BATCH,
        global_batch_size=2 * MICRO_BATCH,
    )
    before = torch.cuda.memory_allocated()
    chunks = build_model(model, parallel, runtime, vocab_size=32_000, seed=1)
    engine = MegatronEngine(chunks, parallel, OptimizerConfig(), runtime)
    torch.cuda.reset_peak_memory_stats()
    train_step(
        engine,
        micro_batches(exercise, 0, 0, 1),
        runtime,
        learning_rate=1e-3,
        languages=LANGUAGES,
        stop_requested=False,
    )
    measured = torch.cuda.max_memory_allocated() - before
    predicted = predict_memory(
        model,
        parallel,
        world_size=1,
        seq_length=SEQUENCE,
        micro_batch_size=MICRO_BATCH,
        micro_batches=2,
    ).peak
    assert abs(predicted.total / measured - 1) < BOUND, (predicted, measured)

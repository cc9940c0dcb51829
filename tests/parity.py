"""The exercise that most tests train, and `train`: a layout of it on gloo processes.

What is compared and within which bounds stands in `pretrain.parity`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from data.batch import Batch
from models.config import ModelConfig
from models.moe_config import MoEConfig
from parallel.config import ParallelConfig
from pretrain import parity
from pretrain.config import PretrainConfig, TrainConfig
from pretrain.layouts import Layout, legal_layouts
from pretrain.parity import LANGUAGES as LANGUAGES
from pretrain.parity import OPTIMIZER as OPTIMIZER
from pretrain.parity import Exercise, Result, compare, merge, table
from tests.distributed import run_on_gloo

SEQ_LENGTH, VOCAB, GLOBAL_BATCH = 16, 120, 8
MODEL = ModelConfig(
    name="parity",
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    max_position_embeddings=SEQ_LENGTH,
    make_vocab_size_divisible_by=8,
)
ONE_PROCESS = ParallelConfig(use_distributed_optimizer=False)
EXERCISE = Exercise(
    model=MODEL, vocab_size=VOCAB, seq_length=SEQ_LENGTH, global_batch_size=GLOBAL_BATCH
)

# cosines amplify rounding by how much shorter a token becomes in the router's space: not too narrow
X_MOE = MoEConfig(num_experts=8, router_topk=2, router_dim=8, z_loss_coeff=1e-3)
# what every layout is tried with
MODELS = {
    "dense": MODEL,
    "xmoe": replace(MODEL, moe=X_MOE),
    "xmoe shared": replace(MODEL, moe=replace(X_MOE, shared_expert_intermediate_size=32)),
}

_references: dict[str, Result] = {}


def reference(model: ModelConfig = MODEL, *, resets: bool = False) -> Result:
    """The same training in one process; run once a model."""
    return reference_of(exercise_of(model, resets=resets))


def reference_of(exercise: Exercise) -> Result:
    key = repr(exercise)
    if key not in _references:
        _references[key] = train_exercise(exercise, ONE_PROCESS, 1)
    return _references[key]


def train(
    parallel: ParallelConfig,
    model: ModelConfig = MODEL,
    *,
    world_size: int = 1,
    micro_batch_size: int = 1,
    timeout: float = 180,
    resets: bool = False,
) -> Result:
    """resets: several documents in each sequence; attention and positions start anew in each."""
    exercise = exercise_of(model, resets=resets, micro_batch_size=micro_batch_size)
    return train_exercise(exercise, parallel, world_size, timeout=timeout)


def train_exercise(
    exercise: Exercise, parallel: ParallelConfig, world_size: int, *, timeout: float = 180
) -> Result:
    ranks = run_on_gloo(world_size, parity.train_on_rank, exercise, parallel, timeout=timeout)
    return merge(ranks)


def legal_layouts_of(exercise: Exercise, **limits: Any) -> list[Layout]:
    """Every layout that the exercise's model and batch allow; see `pretrain.layouts`."""
    config = PretrainConfig(
        model=exercise.model,
        train=TrainConfig(
            micro_batch_size=exercise.micro_batch_size,
            global_batch_size=exercise.global_batch_size,
        ),
    )
    return list(legal_layouts(config, **limits))


def exercise_of(model: ModelConfig = MODEL, **changes: Any) -> Exercise:
    return replace(EXERCISE, model=model, **changes)


def assert_same(result: Result, expected: Result) -> None:
    differences = compare(result, expected)
    assert all(row.ok for row in differences), "\n" + table(differences)


def micro_batches(
    step: int, micro_batch_size: int, rank: int, ranks: int, resets: bool = False
) -> list[Batch]:
    exercise = exercise_of(micro_batch_size=micro_batch_size, resets=resets)
    return parity.micro_batches(exercise, step, rank, ranks)


def layout(
    tp: int = 1, pp: int = 1, vpp: int = 1, sp: bool = False, zero: bool = True, **more: Any
) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        sequence_parallel=sp,
        use_distributed_optimizer=zero,
        **more,
    )


def variant(**changes: Any) -> ModelConfig:
    return replace(MODEL, **changes)

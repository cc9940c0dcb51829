"""Rules between experts and the layout, each broken once; a launch refuses before any process
group exists."""

from typing import Any

import pytest

from models.config import ModelConfig
from models.moe_config import MoEConfig
from parallel.config import ConfigError, ParallelConfig
from pretrain.config import PretrainConfig, TrainConfig
from pretrain.config_rules import validate


def check(
    world_size: int, moe: dict[str, Any], parallel: dict[str, Any], **shape: Any
) -> tuple[str, ...]:
    model = ModelConfig(
        **{
            "name": "tiny",
            "num_layers": 4,
            "hidden_size": 32,
            "ffn_hidden_size": 64,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "moe": MoEConfig(**({"num_experts": 8} | moe)),
        }
        | shape
    )
    config = PretrainConfig(
        model=model,
        parallel=ParallelConfig(**parallel),
        train=TrainConfig(global_batch_size=16),
    )
    try:
        validate(config, world_size)
    except ConfigError as error:
        return error.problems
    return ()


@pytest.mark.parametrize(
    ("world_size", "moe", "parallel", "words"),
    [
        (
            2,
            {"num_experts": 0},
            {"expert_model_parallel_size": 2},
            "parallel.expert_model_parallel_size=2 shares out experts, and tiny has none; use 1",
        ),
        (
            4,
            {"num_experts": 6},
            {"expert_model_parallel_size": 4},
            "parallel.expert_model_parallel_size=4 must divide model.moe.num_experts=6; 1 and 2 do",
        ),
        (
            4,
            {"ffn_hidden_size": 62},
            {"expert_tensor_parallel_size": 4},
            "parallel.expert_tensor_parallel_size=4 must divide the width of an expert, 62; "
            "1 and 2 do",
        ),
        (
            2,
            {"sparse_after_layer": 2, "stacked_sublayers": 3},
            {"expert_tensor_parallel_size": 2},
            "parallel.expert_tensor_parallel_size=2 must be 1 with model.moe.sparse_after_layer=2",
        ),
        (
            2,
            {"shared_expert_intermediate_size": 33},
            {"tensor_model_parallel_size": 2, "sequence_parallel": True},
            "must divide model.moe.shared_expert_intermediate_size=33; 1, 3, 11 and 33 do",
        ),
        (
            2,
            {},
            {"tensor_model_parallel_size": 2},
            "parallel.tensor_model_parallel_size=2 needs parallel.sequence_parallel=true",
        ),
        (
            4,
            {},
            {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 4},
            "parallel.expert_model_parallel_size=4 must divide the 2 ranks of a pipeline stage",
        ),
    ],
)
def test_rules(world_size: int, moe: dict[str, Any], parallel: dict[str, Any], words: str) -> None:
    (problem,) = check(world_size, moe, parallel)
    assert words in problem


@pytest.mark.parametrize(
    ("world_size", "moe", "parallel"),
    [
        (1, {}, {}),
        (2, {}, {"expert_model_parallel_size": 2}),
        (2, {}, {"expert_tensor_parallel_size": 2}),
        (
            8,
            {"shared_expert_intermediate_size": 32},
            {
                "tensor_model_parallel_size": 2,
                "pipeline_model_parallel_size": 2,
                "sequence_parallel": True,
                "expert_model_parallel_size": 4,
            },
        ),
        (4, {"sparse_after_layer": 2}, {"expert_model_parallel_size": 4}),
    ],
)
def test_what_is_allowed(world_size: int, moe: dict[str, Any], parallel: dict[str, Any]) -> None:
    assert check(world_size, moe, parallel) == ()

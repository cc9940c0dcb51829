"""Rules of sparse layers, each broken once."""

from typing import Any

import pytest

from models.config import LayerNormPlacement, ModelConfig
from models.moe_config import MoEConfig, RouterType, ScoreFunction
from parallel.config import ConfigError


def problem(**settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        MoEConfig(**settings)
    assert len(caught.value.problems) == 1
    return caught.value.problems[0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_experts": -1}, "model.moe.num_experts=-1 must be 0 or more"),
        ({"layer_freq": 0}, "model.moe.layer_freq=0 must be 1 or more"),
        ({"ffn_hidden_size": 0}, "model.moe.ffn_hidden_size=0 must be 1 or more"),
        ({"router_dim": 0}, "model.moe.router_dim=0 must be 1 or more"),
        ({"aux_loss_coeff": -0.1}, "model.moe.aux_loss_coeff=-0.1 must be 0 or"),
        ({"router_temperature": 0.0}, "model.moe.router_temperature=0.0 must be a finite number"),
        (
            {"num_experts": 4, "router_topk": 5},
            "model.moe.router_topk=5 must not exceed model.moe.num_experts=4; use 4 or less",
        ),
        (
            {"num_experts": 8, "router_topk": 3, "router": RouterType.sparsemixer},
            "model.moe.router_topk=3: model.moe.router=sparsemixer is defined for 1 and 2",
        ),
        (
            {"expert_capacity_factor": 1.5, "router": RouterType.torchscale},
            "model.moe.router=torchscale brings its own capacity",
        ),
        (
            {"expert_capacity_factor": 1.5, "router": RouterType.sparsemixer},
            "model.moe.router=sparsemixer never drops a token",
        ),
        (
            {"stacked_sublayers": 3},
            "model.moe.stacked_sublayers=3 belongs to X-MoE's placement",
        ),
    ],
)
def test_rules(settings: dict[str, Any], words: str) -> None:
    assert words in problem(**settings)


def test_temperature_and_dimension_are_the_papers() -> None:
    moe = MoEConfig(num_experts=32)
    assert (moe.temperature, moe.dim) == (0.3, 16)
    assert MoEConfig(router_score_function=ScoreFunction.sigmoid).temperature == 0.07
    assert MoEConfig(router_temperature=0.5, num_experts=1).temperature == 0.5
    assert MoEConfig(num_experts=1).dim == 1


def test_which_layers_are_sparse() -> None:
    assert MoEConfig().sparse_layers(6) == []
    assert MoEConfig(num_experts=2).sparse_layers(6) == [1, 3, 5]
    assert MoEConfig(num_experts=2, layer_freq=3).sparse_layers(7) == [2, 5]
    assert MoEConfig(num_experts=2, sparse_after_layer=6).sparse_layers(12) == [5]


def model(**settings: Any) -> ModelConfig:
    return ModelConfig(
        **{
            "name": "tiny",
            "num_layers": 4,
            "hidden_size": 32,
            "ffn_hidden_size": 64,
            "num_attention_heads": 4,
        }
        | settings
    )


@pytest.mark.parametrize(
    ("moe", "settings", "words"),
    [
        (
            {"sparse_after_layer": 5},
            {},
            "model.moe.sparse_after_layer=5 must not exceed model.num_layers=4; the paper has "
            "half: 2",
        ),
        ({"layer_freq": 5}, {}, "model.moe.layer_freq=5 leaves none of model.num_layers=4"),
        (
            {"sparse_after_layer": 2},
            {"layer_norm_placement": LayerNormPlacement.post_ln},
            "model.layer_norm_placement=post_ln norms after the sublayer",
        ),
    ],
)
def test_rules_with_the_model(moe: dict[str, Any], settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        model(moe=MoEConfig(num_experts=2, **moe), **settings)
    assert len(caught.value.problems) == 1
    assert words in caught.value.problems[0]


def test_experts_are_as_wide_as_the_dense_layers_unless_told() -> None:
    assert model().expert_ffn_hidden_size == 64
    assert model(moe=MoEConfig(ffn_hidden_size=16)).expert_ffn_hidden_size == 16

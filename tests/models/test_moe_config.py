"""Rules of sparse layers, each broken once."""

import math
from typing import Any

import pytest

from models.config import LayerNormPlacement, ModelConfig
from models.moe_config import (
    SETTINGS_OF_ROUTERS,
    BalanceScope,
    MoEConfig,
    RouterType,
    ScoreFunction,
    SecondExpertPolicy,
    TokenDropPolicy,
)
from parallel.config import ConfigError


def problem(**settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        MoEConfig(**({"num_experts": 4} | settings))
    assert len(caught.value.problems) == 1
    return caught.value.problems[0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_experts": -1}, "model.moe.num_experts=-1 must be 0 or more"),
        ({"layer_freq": 0}, "model.moe.layer_freq=0 must be 1 or more"),
        ({"ffn_hidden_size": 0}, "model.moe.ffn_hidden_size=0 must be 1 or more"),
        ({"aux_loss_coeff": -0.1}, "model.moe.aux_loss_coeff=-0.1 must be 0 or"),
        ({"router_temperature": 0.0}, "model.moe.router_temperature=0.0 must be a finite number"),
        ({"router_temperature": 1e-3}, "model.moe.router_temperature=0.001 must be 0.01 or more"),
        (
            {"router": RouterType.torchscale, "eval_capacity_token_fraction": math.nan},
            "model.moe.eval_capacity_token_fraction=nan must be a number",
        ),
        ({"router_topk": 5}, "must not exceed model.moe.num_experts=4; use 4 or less"),
        (
            {"router_topk": 3, "router": RouterType.sparsemixer},
            "model.moe.router_topk=3: model.moe.router=sparsemixer is defined for 1 and 2",
        ),
        ({"router_dim": 1}, "model.moe.router_dim=1 must be 2 or more"),
        ({"stacked_sublayers": 3}, "model.moe.stacked_sublayers=3 belongs to X-MoE's placement"),
        (
            {"sparse_after_layer": 2, "layer_freq": 3},
            "model.moe.layer_freq=3 changes nothing beside model.moe.sparse_after_layer=2",
        ),
        (
            {"token_drop_policy": TokenDropPolicy.position},
            "model.moe.token_drop_policy=position drops nothing without",
        ),
        ({"num_experts": 0, "router_topk": 2}, "model.moe.router_topk=2 sets up experts, and"),
    ],
)
def test_rules(settings: dict[str, Any], words: str) -> None:
    assert words in problem(**settings)


OTHERS: dict[str, Any] = {
    "router_score_function": ScoreFunction.sigmoid,
    "router_dim": 8,
    "router_temperature": 0.5,
    "router_bias_update_rate": 0.1,
    "router_jitter_eps": 0.1,
    "aux_loss_coeff": 0.1,
    "balance_scope": BalanceScope.sequence,
    "expert_capacity_factor": 1.5,
    "second_expert_policy": SecondExpertPolicy.all,
    "normalize_gate_prob_before_dropping": False,
    "eval_capacity_token_fraction": 0.5,
}


@pytest.mark.parametrize("name", SETTINGS_OF_ROUTERS)
@pytest.mark.parametrize("router", RouterType)
def test_settings_of_another_router_are_refused(name: str, router: RouterType) -> None:
    settings = {"router": router, name: OTHERS[name]}
    if router.value in SETTINGS_OF_ROUTERS[name]:
        MoEConfig(num_experts=4, **settings)
        return
    text = problem(**settings)
    value = getattr(OTHERS[name], "value", OTHERS[name])
    assert text.startswith(f"model.moe.{name}={value} belongs to model.moe.router=")
    assert f"changes nothing for model.moe.router={router.value}" in text


def test_temperature_and_dimension_are_the_papers() -> None:
    moe = MoEConfig(num_experts=32)
    assert (moe.temperature, moe.dim) == (0.3, 16)
    sigmoid = MoEConfig(num_experts=4, router_score_function=ScoreFunction.sigmoid)
    assert sigmoid.temperature == 0.07
    assert MoEConfig(router_temperature=0.5, num_experts=2).temperature == 0.5
    assert MoEConfig(num_experts=2).dim == 2


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
            "model.layer_norm_placement=post_ln has not; use sub_ln or pre_ln",
        ),
        (
            {"sparse_after_layer": 2},
            {"layer_norm_placement": LayerNormPlacement.deepnorm_pre_ln},
            "model.layer_norm_placement=deepnorm_pre_ln has not",
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
    assert model(moe=MoEConfig(num_experts=2, ffn_hidden_size=16)).expert_ffn_hidden_size == 16

"""Rules of ModelConfig, each broken once."""

import pytest

from models.config import ModelConfig, PositionEmbedding, nearest_divisor
from parallel.config import ConfigError


def tiny(**settings: object) -> ModelConfig:
    shape: dict[str, object] = {
        "name": "tiny",
        "num_layers": 2,
        "hidden_size": 48,
        "ffn_hidden_size": 96,
        "num_attention_heads": 6,
    }
    return ModelConfig(**(shape | settings))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_layers": 0}, "model.num_layers=0 must be 1 or more"),
        ({"hidden_size": 0}, "model.hidden_size=0 must be 1 or more"),
        ({"ffn_hidden_size": -1}, "model.ffn_hidden_size=-1 must be 1 or more"),
        ({"num_attention_heads": 0}, "model.num_attention_heads=0 must be 1 or more"),
        ({"max_position_embeddings": 0}, "model.max_position_embeddings=0 must be 1 or more"),
        ({"make_vocab_size_divisible_by": 0}, "model.make_vocab_size_divisible_by=0 must be 1"),
        ({"num_query_groups": 0}, "model.num_query_groups=0 must be 1 or more"),
        ({"kv_channels": 0}, "model.kv_channels=0 must be 1 or more"),
        ({"vocab_size": 0}, "model.vocab_size=0 must be 1 or more"),
        (
            {"num_attention_heads": 5},
            "model.num_attention_heads=5 must divide model.hidden_size=48; use 6 heads",
        ),
        (
            {"num_query_groups": 4},
            "model.num_query_groups=4 must divide model.num_attention_heads=6; use 3",
        ),
        (
            {"kv_channels": 7},
            "model.position_embedding_type=xpos turns pairs of channels, and a head has an odd "
            "number of them: 7; set model.kv_channels=8",
        ),
        ({"num_attention_heads": 16}, "odd number of them: 3; set model.kv_channels=4"),
        ({"layernorm_epsilon": 0.0}, "model.layernorm_epsilon=0.0 must be a finite number above"),
        ({"rotary_base": -1.0}, "model.rotary_base=-1.0 must be"),
        ({"xpos_scale_base": 0.0}, "model.xpos_scale_base=0.0 must be"),
        ({"init_method_std": 0.0}, "model.init_method_std=0.0 must be"),
        ({"hidden_dropout": 1.0}, "model.hidden_dropout=1.0 must be at least 0 and below 1"),
        ({"attention_dropout": -0.1}, "model.attention_dropout=-0.1 must be at least 0"),
        ({"name": ""}, "model.name= is empty"),
    ],
)
def test_rules(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny(**settings)
    assert len(caught.value.problems) == 1
    assert words in caught.value.problems[0]


def test_what_is_allowed() -> None:
    assert tiny().query_groups == 6
    assert tiny().head_width == 8
    grouped = tiny(num_query_groups=2, kv_channels=16)
    assert (grouped.query_groups, grouped.head_width) == (2, 16)
    tiny(num_attention_heads=5, kv_channels=8)  # the heads need not fill the hidden size
    tiny(num_attention_heads=16, position_embedding_type=PositionEmbedding.none)


def test_problems_are_told_together() -> None:
    with pytest.raises(ConfigError) as caught:
        tiny(num_attention_heads=5, num_query_groups=4, hidden_dropout=2.0)
    assert len(caught.value.problems) == 3


def test_nearest_divisor() -> None:
    assert [nearest_divisor(48, wish) for wish in (5, 7, 20, 100)] == [6, 8, 24, 48]

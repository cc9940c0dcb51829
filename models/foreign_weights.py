"""Which weights of TorchScale and Megatron-LM are which of ours.

`recipes` says for each of our names (those of `models.initialize.global_parameters`) what it is
made of; TorchScale is its release 0.3.0, Megatron-LM a checkpoint of its --ckpt-format torch_dist.

Shapes: h hidden size, n heads, g key heads, d head width, E experts, f an expert's width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from models.config import LayerNormPlacement, ModelConfig, PositionEmbedding
from models.initialize import EMBEDDING
from models.moe_config import RouterType

OUTPUT = "output_layer.weight"


class Origin(Enum):
    torchscale = "torchscale"
    megatron = "megatron"


@dataclass(frozen=True)
class Recipe:
    """The foreign weights that one of ours is made of, and how."""

    names: tuple[str, ...]
    make: Callable[[list[Tensor]], Tensor]


def recipes(
    origin: Origin,
    model: ModelConfig,
    ours: Collection[str],
    theirs: Collection[str],
    *,
    rotary_interleaved: bool,
) -> dict[str, Recipe]:
    """Our name -> recipe, for each of `ours`; its names need not be among `theirs`.

    rotary_interleaved: Megatron's setting; False (its default): RoPE turns channels (i, i + d/2),
    and rows of queries and keys are put into our order.
    """
    if origin is Origin.torchscale:
        return {name: _torchscale(name, model, theirs) for name in ours}
    turn = model.position_embedding_type is PositionEmbedding.rope and not rotary_interleaved
    return {name: _megatron(name, model, theirs, turn) for name in ours}


# ---------------------------------------------------------------- TorchScale

_TORCHSCALE_OUTER = {
    EMBEDDING: "embed_tokens.weight",
    OUTPUT: "output_projection.weight",
    "decoder.final_layernorm.weight": "layer_norm.weight",
    "decoder.final_layernorm.bias": "layer_norm.bias",
}
_TORCHSCALE_LAYER = {
    "input_layernorm.": "self_attn_layer_norm.",
    "self_attention.linear_proj.norm_": "self_attn.inner_attn_ln.",
    "self_attention.linear_proj.": "self_attn.out_proj.",
    "pre_mlp_layernorm.": "final_layer_norm.",
    "mlp.linear_fc1.": "ffn.fc1.",
    "mlp.linear_fc2.norm_": "ffn.ffn_layernorm.",
    "mlp.linear_fc2.": "ffn.fc2.",
}
_TORCHSCALE_EXPERTS = {"fc1": "fc1", "fc2": "fc2", "norm": "ffn_layernorm"}


def _torchscale(name: str, model: ModelConfig, theirs: Collection[str]) -> Recipe:
    if name in _TORCHSCALE_OUTER:
        return _renamed(_TORCHSCALE_OUTER[name])
    layer, inner = _split(name)
    place = f"layers.{layer}."
    if found := re.fullmatch(r"self_attention\.linear_qkv\.(weight|bias)", inner):
        names = tuple(f"{place}self_attn.{part}_proj.{found[1]}" for part in "qkv")
        return Recipe(names, lambda parts: _join_heads(parts, model))
    if found := re.fullmatch(r"mlp\.router\.(\w+)", inner):
        plain, inside = (f"{place}moe_layer.gate.{found[1]}{end}" for end in ("", ".weight"))
        return _renamed(plain if plain in theirs else inside)
    if found := re.fullmatch(r"mlp\.experts\.(fc1|fc2|norm)_(weight|bias)", inner):
        part = f"{_TORCHSCALE_EXPERTS[found[1]]}.{found[2]}"
        experts = range(model.moe.num_experts)
        names = tuple(f"{place}moe_layer.experts.{expert}.{part}" for expert in experts)
        if found[1] == "fc1":  # [E, 1, f, h]: there is no gate
            return Recipe(names, lambda parts: torch.stack(parts).unsqueeze(1))
        return Recipe(names, torch.stack)
    for ours, other in _TORCHSCALE_LAYER.items():
        if inner.startswith(ours) and inner.removeprefix(ours) in ("weight", "bias"):
            return _renamed(place + other + inner.removeprefix(ours))
    return _nowhere(name)


def _join_heads(parts: list[Tensor], model: ModelConfig) -> Tensor:
    """Query, key and value rows of a group next to each other, as megatron-core keeps them."""
    by_group = [part.unflatten(0, (model.query_groups, -1)) for part in parts]
    return torch.cat(by_group, dim=1).flatten(0, 1)


# ---------------------------------------------------------------- Megatron-LM

# Transformer Engine's linear layers hold the norm in front of them
_MEGATRON_FUSED = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def not_of_megatron(model: ModelConfig) -> list[str]:
    """Settings of `model` that no model of Megatron-LM has, a line each.

    Names and shapes do not show them: what another placement or xPos lacks, or has in another order
    of rows, would be made up without a word.
    """
    choices: dict[str, tuple[Enum, tuple[Enum, ...]]] = {
        "layer_norm_placement": (model.layer_norm_placement, (LayerNormPlacement.pre_ln,)),
        "position_embedding_type": (
            model.position_embedding_type,
            (PositionEmbedding.rope, PositionEmbedding.none),
        ),
    }
    if model.moe.num_experts:
        choices["moe.router"] = (model.moe.router, (RouterType.linear, RouterType.aux_free))
    return [
        f"model.{name}={ours.value}, which Megatron-LM does not have; set model.{name}="
        + " or ".join(one.value for one in theirs)
        for name, (ours, theirs) in choices.items()
        if ours not in theirs
    ]


def _megatron(name: str, model: ModelConfig, theirs: Collection[str], turn: bool) -> Recipe:
    if not name.startswith("decoder.layers."):
        return _renamed(name)
    layer, inner = _split(name)
    place = f"decoder.layers.{layer}."
    if inner.startswith("self_attention.linear_qkv.") and turn:
        return Recipe((name,), lambda parts: _interleave(parts[0], model))
    if found := re.fullmatch(r"mlp\.experts\.(fc[12])_(weight|bias)", inner):
        source = f"{place}mlp.experts.experts.linear_{found[1]}.{found[2]}"
        if found[1] == "fc1":  # theirs is [E, g f, ...]: gate and up one after the other
            gates = 2 if model.activation.value == "swiglu" else 1
            return Recipe((source,), lambda parts: parts[0].unflatten(1, (gates, -1)))
        return _renamed(source)
    for ours, fused in _MEGATRON_FUSED.items():
        other = place + fused + inner.removeprefix(ours)
        if inner.startswith(ours) and name not in theirs and other in theirs:
            return _renamed(other)
    return _renamed(name)


def _interleave(rows: Tensor, model: ModelConfig) -> Tensor:
    """Rows of linear_qkv whose queries and keys have channels (0, d/2, 1, d/2 + 1, ...)."""
    groups, d = model.query_groups, model.head_width
    per_group = model.num_attention_heads // groups
    by_head = rows.unflatten(0, (groups, per_group + 2, d))
    turned = by_head[:, :-1].unflatten(2, (2, d // 2)).transpose(2, 3).flatten(2, 3)
    return torch.cat([turned, by_head[:, -1:]], dim=1).flatten(0, 2)


# ---------------------------------------------------------------- both


def _split(name: str) -> tuple[str, str]:
    """Number of the layer, and the name within it; ("", "") outside of the layers."""
    found = re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", name)
    return (found[1], found[2]) if found else ("", "")


def _renamed(name: str) -> Recipe:
    return Recipe((name,), lambda parts: parts[0])


def _nowhere(name: str) -> Recipe:
    """TorchScale has no such weight; the name stands for itself in the list of what is missing."""
    return _renamed(f"(nothing like our {name})")

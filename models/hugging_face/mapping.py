"""Which `transformers` architecture a model is, its config there, and where each weight goes.

    llama      pre-LN, RMSNorm, SwiGLU, RoPE
    gpt_neox   pre-LN, LayerNorm, GELU, biases, RoPE, as many key heads as heads
    magneto    everything else: `modeling_magneto.py`, which is copied beside the weights

A weight's source is its name in the whole model, as in `models.initialize.global_parameters`.
Shapes: h hidden size, n heads, g key heads (query groups), d head width.

megatron-core keeps queries, keys and values of a group together: [g, n/g + 2, d, h]. RoPE turns
neighbouring channels (2i, 2i + 1) here and (i, i + d/2) in Llama and GPT-NeoX: for these the rows
of queries and keys are put into their order, which changes no score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from models.config import (
    Activation,
    LayerNormPlacement,
    ModelConfig,
    Normalization,
    PositionEmbedding,
)
from models.initialize import EMBEDDING
from models.magneto import residual_scale
from models.moe_config import RouterType

Take = Callable[[Tensor], Tensor]


class Architecture(Enum):
    llama = "llama"
    gpt_neox = "gpt_neox"
    magneto = "magneto"


@dataclass(frozen=True)
class Source:
    """One of our weights, and the exported ones that are made of it: (name, how)."""

    name: str
    parts: tuple[tuple[str, Take], ...]


def architecture_of(model: ModelConfig) -> Architecture:
    """The one that computes exactly what `model` does."""
    if (
        model.layer_norm_placement is not LayerNormPlacement.pre_ln
        or model.position_embedding_type is not PositionEmbedding.rope
        or model.moe.num_experts
    ):
        return Architecture.magneto
    if model.normalization is Normalization.rms_norm:
        gated = model.activation is Activation.swiglu
        return Architecture.llama if gated else Architecture.magneto
    plain = model.activation is Activation.gelu and model.add_bias_linear
    whole_heads = (
        model.query_groups == model.num_attention_heads
        and model.head_width * model.num_attention_heads == model.hidden_size
    )
    return Architecture.gpt_neox if plain and whole_heads else Architecture.magneto


# ---------------------------------------------------------------- configs


def config_of(model: ModelConfig, architecture: Architecture) -> dict[str, Any]:
    """What stands in config.json; `model.vocab_size` must be set.

    The vocabulary is the tokenizer's: rows that only pad the embedding are left out.
    """
    assert model.vocab_size is not None
    common = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "max_position_embeddings": model.max_position_embeddings,
        "tie_word_embeddings": model.share_embeddings_and_output_weights,
        "use_cache": True,
    }
    return common | {
        Architecture.llama: _llama_config,
        Architecture.gpt_neox: _gpt_neox_config,
        Architecture.magneto: _magneto_config,
    }[architecture](model)


def _llama_config(model: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_key_value_heads": model.query_groups,
        "head_dim": model.head_width,
        "hidden_act": "silu",
        "rms_norm_eps": model.layernorm_epsilon,
        "attention_bias": model.add_bias_linear,
        "mlp_bias": model.add_bias_linear,
        "rope_theta": model.rotary_base,  # until version 5
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rotary_base},
    }


def _gpt_neox_config(model: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "hidden_act": "gelu",
        "layer_norm_eps": model.layernorm_epsilon,
        "use_parallel_residual": False,
        "attention_bias": True,
        "rotary_pct": 1.0,  # these two until version 5
        "rotary_emb_base": model.rotary_base,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": model.rotary_base,
            "partial_rotary_factor": 1.0,
        },
    }


def _magneto_config(model: ModelConfig) -> dict[str, Any]:
    moe = model.moe
    return {
        "architectures": ["MagnetoForCausalLM"],
        "model_type": "magneto",
        "auto_map": {
            "AutoConfig": "modeling_magneto.MagnetoConfig",
            "AutoModelForCausalLM": "modeling_magneto.MagnetoForCausalLM",
        },
        "num_key_value_heads": model.query_groups,
        "head_dim": model.head_width,
        "layer_norm_placement": model.layer_norm_placement.value,
        "residual_scale": residual_scale(model.layer_norm_placement, model.num_layers),
        "normalization": model.normalization.value,
        "layer_norm_eps": model.layernorm_epsilon,
        "position_embedding": model.position_embedding_type.value,
        "rotary_base": model.rotary_base,
        "xpos_scale_base": model.xpos_scale_base,
        "activation": model.activation.value,
        "use_bias": model.add_bias_linear,
        "moe": _moe_config(model) if moe.num_experts else None,
        # TorchScale's gates limit how many of the tokens at hand an expert takes
        "use_cache": not _is_torchscale(model),
    }


def _moe_config(model: ModelConfig) -> dict[str, Any]:
    moe = model.moe
    return {
        "num_experts": moe.num_experts,
        "intermediate_size": model.expert_ffn_hidden_size,
        "shared_intermediate_size": moe.shared_expert_intermediate_size,
        "sparse_layers": moe.sparse_layers(model.num_layers),
        # instead of the feed-forward, or behind it
        "placement": "behind" if moe.sparse_after_layer else "instead",
        "stacked_sublayers": moe.stacked_sublayers,
        "router": moe.router.value,
        "router_topk": moe.router_topk,
        "router_score_function": moe.router_score_function.value,
        "router_dim": moe.dim,
        "router_jitter_eps": moe.router_jitter_eps,
        "second_expert_policy": moe.second_expert_policy.value,
        "normalize_gate_prob_before_dropping": moe.normalize_gate_prob_before_dropping,
        "eval_capacity_token_fraction": moe.eval_capacity_token_fraction,
    }


def _is_torchscale(model: ModelConfig) -> bool:
    routers = (RouterType.torchscale, RouterType.torchscale_xmoe)
    return bool(model.moe.num_experts) and model.moe.router in routers


# ---------------------------------------------------------------- weights


def sources(model: ModelConfig, architecture: Architecture) -> list[Source]:
    """All weights of `model`, each with what it becomes, in the order they are written."""
    names = {
        Architecture.llama: _LLAMA,
        Architecture.gpt_neox: _GPT_NEOX,
        Architecture.magneto: _MAGNETO,
    }[architecture]
    found = list(_outer(model, names))
    for layer in range(model.num_layers):
        theirs = names.layer.format(layer)
        ours = f"decoder.layers.{layer}."
        for source in _layer(
            model, layer, names, half_split=architecture is not Architecture.magneto
        ):
            parts = tuple((theirs + name, take) for name, take in source.parts)
            found.append(Source(ours + source.name, parts))
    return found


@dataclass(frozen=True)
class _Names:
    embedding: str
    final_norm: str
    output: str
    layer: str  # with {} for its number
    attention_norm: str
    feed_forward_norm: str
    query_key_value: tuple[str, ...]  # one that keeps our order, or three
    projection: str
    up: str
    down: str
    gate: str = ""


_LLAMA = _Names(
    embedding="model.embed_tokens.weight",
    final_norm="model.norm",
    output="lm_head.weight",
    layer="model.layers.{}.",
    attention_norm="input_layernorm",
    feed_forward_norm="post_attention_layernorm",
    query_key_value=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    projection="self_attn.o_proj",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
)
_GPT_NEOX = _Names(
    embedding="gpt_neox.embed_in.weight",
    final_norm="gpt_neox.final_layer_norm",
    output="embed_out.weight",
    layer="gpt_neox.layers.{}.",
    attention_norm="input_layernorm",
    feed_forward_norm="post_attention_layernorm",
    query_key_value=("attention.query_key_value",),
    projection="attention.dense",
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
)
_MAGNETO = replace(_LLAMA, feed_forward_norm="pre_mlp_layernorm")


def _outer(model: ModelConfig, names: _Names) -> Iterator[Source]:
    def without_padding(weight: Tensor) -> Tensor:
        return weight[: model.vocab_size]

    yield Source(EMBEDDING, ((names.embedding, without_padding),))
    if not model.share_embeddings_and_output_weights:
        yield Source("output_layer.weight", ((names.output, without_padding),))
    post_ln = (LayerNormPlacement.post_ln, LayerNormPlacement.deepnorm)
    if model.layer_norm_placement not in post_ln:
        yield from _norm(model, "decoder.final_layernorm.", f"{names.final_norm}.")


def _layer(model: ModelConfig, layer: int, names: _Names, *, half_split: bool) -> Iterator[Source]:
    """Names without the layer's own prefix, on both sides."""
    sub_ln = model.layer_norm_placement is LayerNormPlacement.sub_ln
    yield from _norm(model, "input_layernorm.", f"{names.attention_norm}.")
    for kind in _kinds(model):
        yield Source(
            f"self_attention.linear_qkv.{kind}",
            tuple(_query_key_value(model, names.query_key_value, kind, half_split)),
        )
        yield _same(f"self_attention.linear_proj.{kind}", f"{names.projection}.{kind}")
    if sub_ln:
        inner = "self_attn.inner_layernorm."
        yield from _norm(model, "self_attention.linear_proj.norm_", inner)
    yield from _norm(model, "pre_mlp_layernorm.", f"{names.feed_forward_norm}.")
    if layer not in model.moe.sparse_layers(model.num_layers):
        yield from _feed_forward(model, "mlp.", names)
    elif model.moe.sparse_after_layer:
        yield from _feed_forward(model, "mlp.", names)
        yield from _sparse(model, "sparse.", names)
    else:
        yield from _sparse(model, "mlp.", names)


def _query_key_value(
    model: ModelConfig, names: tuple[str, ...], kind: str, half_split: bool
) -> Iterator[tuple[str, Take]]:
    groups, d = model.query_groups, model.head_width
    per_group = model.num_attention_heads // groups

    def by_head(weight: Tensor) -> Tensor:
        """[g, n/g + 2, d, ...], queries and keys with the channels in their new order."""
        weight = weight.unflatten(0, (groups, per_group + 2, d))
        if not half_split:
            return weight
        turned = torch.cat([weight[:, :-1, 0::2], weight[:, :-1, 1::2]], dim=2)
        return torch.cat([turned, weight[:, -1:]], dim=1)

    if len(names) == 1:
        yield f"{names[0]}.{kind}", lambda w: by_head(w).flatten(0, 2)
        return
    spans = (slice(0, per_group), slice(per_group, per_group + 1), slice(per_group + 1, None))

    def heads(span: slice) -> Take:
        return lambda weight: by_head(weight)[:, span].flatten(0, 2)

    for name, span in zip(names, spans, strict=True):
        yield f"{name}.{kind}", heads(span)


def _feed_forward(
    model: ModelConfig, ours: str, names: _Names, theirs: str | None = None
) -> Iterator[Source]:
    def named(name: str) -> str:
        return name if theirs is None else name.replace("mlp.", theirs)

    for kind in _kinds(model):
        if model.activation is Activation.swiglu:
            halves: tuple[tuple[str, Take], ...] = (
                (f"{named(names.gate)}.{kind}", lambda w: w.chunk(2)[0]),
                (f"{named(names.up)}.{kind}", lambda w: w.chunk(2)[1]),
            )
            yield Source(f"{ours}linear_fc1.{kind}", halves)
        else:
            yield _same(f"{ours}linear_fc1.{kind}", f"{named(names.up)}.{kind}")
        yield _same(f"{ours}linear_fc2.{kind}", f"{named(names.down)}.{kind}")
    if model.layer_norm_placement is LayerNormPlacement.sub_ln:
        inner = named("mlp.inner_layernorm.")
        yield from _norm(model, f"{ours}linear_fc2.norm_", inner)


def _sparse(model: ModelConfig, place: str, names: _Names) -> Iterator[Source]:
    moe = model.moe
    for parameter in _ROUTER_PARAMETERS[moe.router]:
        yield _same(f"{place}router.{parameter}", f"{place}router.{parameter}")
    stacked = bool(moe.sparse_after_layer)
    for sublayer in range(moe.stacked_sublayers if stacked else 1):
        ours = f"{place}experts.sublayers.{sublayer}." if stacked else f"{place}experts."
        for parameter in _expert_parameters(model, input_norm=stacked):
            yield _same(ours + parameter, f"{place}experts.{sublayer}.{parameter}")
    if moe.shared_expert_intermediate_size:
        shared = f"{place}shared_experts."
        yield from _feed_forward(model, shared, names, theirs=shared)


_ROUTER_PARAMETERS = {
    RouterType.xmoe: ("projection", "expert_embeddings", "temperature"),
    RouterType.linear: ("weight",),
    RouterType.aux_free: ("weight", "expert_bias"),
    RouterType.sparsemixer: ("weight",),
    RouterType.torchscale: ("wg",),
    RouterType.torchscale_xmoe: ("wg", "wg_reduction"),
}


def _expert_parameters(model: ModelConfig, *, input_norm: bool) -> Iterator[str]:
    for kind in _kinds(model):
        yield from (f"fc1_{kind}", f"fc2_{kind}")
    for norm, there in {
        "norm": model.layer_norm_placement is LayerNormPlacement.sub_ln,
        "input_norm": input_norm,
    }.items():
        if there:
            yield from (f"{norm}_{kind}" for kind in _norm_kinds(model))


def _norm(model: ModelConfig, ours: str, theirs: str) -> Iterator[Source]:
    yield from (_same(ours + kind, theirs + kind) for kind in _norm_kinds(model))


def _kinds(model: ModelConfig) -> tuple[str, ...]:
    return ("weight", "bias") if model.add_bias_linear else ("weight",)


def _norm_kinds(model: ModelConfig) -> tuple[str, ...]:
    rms = model.normalization is Normalization.rms_norm
    return ("weight",) if rms else ("weight", "bias")


def _same(ours: str, theirs: str) -> Source:
    return Source(ours, ((theirs, lambda weight: weight),))

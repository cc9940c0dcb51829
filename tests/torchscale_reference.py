"""TorchScale's decoder as a reference, and its weights in our layout."""

from __future__ import annotations

import sys
import types
from typing import Any

import torch
from torch import Tensor

from models.config import ModelConfig
from models.initialize import EMBEDDING, global_parameters


def decoder(
    model: ModelConfig,
    vocab_size: int,
    decoder_normalize_before: bool | None = None,
    **settings: Any,
) -> torch.nn.Module:
    """TorchScale's Decoder with the shape of `model` and its own initial weights.

    `decoder_normalize_before` is set after TorchScale's configuration has derived its own.
    """
    # TorchScale takes one function from timm, and timm wants a torchvision; no path is dropped
    # here, so an identity stands in for it.
    for name in ("timm", "timm.models", "timm.models.layers"):
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules["timm.models.layers"].drop_path = lambda x, *_: x  # type: ignore[attr-defined]
    from torchscale.architecture.config import DecoderConfig
    from torchscale.architecture.decoder import Decoder

    config = DecoderConfig(
        decoder_embed_dim=model.hidden_size,
        decoder_attention_heads=model.num_attention_heads,
        decoder_ffn_embed_dim=model.ffn_hidden_size,
        decoder_layers=model.num_layers,
        vocab_size=vocab_size,
        max_target_positions=model.max_position_embeddings,
        layernorm_eps=model.layernorm_epsilon,
        **settings,
    )
    if decoder_normalize_before is not None:
        config.decoder_normalize_before = decoder_normalize_before
    embedding = torch.nn.Embedding(vocab_size, model.hidden_size)
    return Decoder(config, embed_tokens=embedding).eval()


def weights_of(reference: torch.nn.Module, model: ModelConfig) -> dict[str, Tensor]:
    """The reference's weights under our global parameter names, unsharded."""
    state = {name: value.detach() for name, value in reference.state_dict().items()}
    out = {
        EMBEDDING: state["embed_tokens.weight"],
        "output_layer.weight": state["output_projection.weight"],
    }
    if "layer_norm.weight" in state:
        for kind in ("weight", "bias"):
            out[f"decoder.final_layernorm.{kind}"] = state[f"layer_norm.{kind}"]
    for layer in range(model.num_layers):
        theirs, ours = f"layers.{layer}", f"decoder.layers.{layer}"
        for kind in ("weight", "bias"):
            parts = [state[f"{theirs}.self_attn.{p}_proj.{kind}"] for p in "qkv"]
            # megatron-core keeps query, key and value of a head next to each other
            by_head = [part.unflatten(0, (model.num_attention_heads, -1)) for part in parts]
            out[f"{ours}.self_attention.linear_qkv.{kind}"] = torch.cat(by_head, 1).flatten(0, 1)
            for target, source in {
                "self_attention.linear_proj": "self_attn.out_proj",
                "mlp.linear_fc1": "ffn.fc1",
                "mlp.linear_fc2": "ffn.fc2",
                "input_layernorm": "self_attn_layer_norm",
                "pre_mlp_layernorm": "final_layer_norm",
            }.items():
                out[f"{ours}.{target}.{kind}"] = state[f"{theirs}.{source}.{kind}"]
            for target, source in {
                "self_attention.linear_proj": "self_attn.inner_attn_ln",
                "mlp.linear_fc2": "ffn.ffn_layernorm",
            }.items():
                if f"{theirs}.{source}.{kind}" in state:
                    out[f"{ours}.{target}.norm_{kind}"] = state[f"{theirs}.{source}.{kind}"]
    return out


@torch.no_grad()
def load(chunk: Any, weights: dict[str, Tensor]) -> None:
    """Copy this rank's shards of `weights` into the chunk; every parameter must be given."""
    group = chunk.tp_group
    for name, parameter in global_parameters(chunk):
        full = weights[name]
        if getattr(parameter, "tensor_model_parallel", False):
            pieces = full.chunk(group.size() * parameter.partition_stride, parameter.partition_dim)
            full = torch.cat(pieces[group.rank() :: group.size()], parameter.partition_dim)
        parameter.copy_(full)

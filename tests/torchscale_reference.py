"""TorchScale as a reference: its decoder, with its weights in our layout, and its experts."""

from __future__ import annotations

import contextlib
import sys
import types
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from models.config import ModelConfig
from models.initialize import EMBEDDING, global_parameters
from models.moe_config import MoEConfig, RouterType


def decoder(
    model: ModelConfig,
    vocab_size: int,
    decoder_normalize_before: bool | None = None,
    **settings: Any,
) -> torch.nn.Module:
    """TorchScale's Decoder with the shape of `model` and its own initial weights.

    With experts it needs a process group of one rank, and `integer_histograms` to run on a CPU.
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
        **_moe_settings(model.moe),
        **settings,
    )
    if decoder_normalize_before is not None:
        config.decoder_normalize_before = decoder_normalize_before
    embedding = torch.nn.Embedding(vocab_size, model.hidden_size)
    return Decoder(config, embed_tokens=embedding).eval()


def _moe_settings(moe: MoEConfig) -> dict[str, Any]:
    if moe.num_experts == 0:
        return {}
    _forget_groups()
    return {
        "moe_freq": moe.layer_freq,
        "moe_expert_count": moe.num_experts,
        "moe_top1_expert": moe.router_topk == 1,
        "moe_second_expert_policy": moe.second_expert_policy.value,
        "moe_normalize_gate_prob_before_dropping": moe.normalize_gate_prob_before_dropping,
        "moe_eval_capacity_token_fraction": moe.eval_capacity_token_fraction,
        "use_xmoe": moe.router is RouterType.torchscale_xmoe,
    }


def _forget_groups() -> None:
    """TorchScale keeps process groups as attributes of functions, beyond the life of the groups."""
    from torchscale.component.xmoe import global_groups

    for function in (global_groups.get_moe_group, global_groups.get_all2all_group):
        vars(function).clear()


def weights_of(reference: torch.nn.Module, model: ModelConfig) -> dict[str, Tensor]:
    """The reference's weights under our global parameter names, unsharded."""
    state = {name: value.detach() for name, value in reference.state_dict().items()}
    return in_our_layout(state, model)


def gradients_of(reference: torch.nn.Module, model: ModelConfig) -> dict[str, Tensor]:
    """The reference's gradients under our names; 0 where it has none."""
    grads = {
        name: torch.zeros_like(value) if value.grad is None else value.grad
        for name, value in reference.named_parameters()
    }
    return in_our_layout(grads, model)


def in_our_layout(state: dict[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """TorchScale's parameters, or something shaped like them, under our names."""
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
                if f"{theirs}.{source}.{kind}" in state:
                    out[f"{ours}.{target}.{kind}"] = state[f"{theirs}.{source}.{kind}"]
            for target, source in {
                "self_attention.linear_proj": "self_attn.inner_attn_ln",
                "mlp.linear_fc2": "ffn.ffn_layernorm",
            }.items():
                if f"{theirs}.{source}.{kind}" in state:
                    out[f"{ours}.{target}.norm_{kind}"] = state[f"{theirs}.{source}.{kind}"]
        out |= _experts_of(state, f"{theirs}.moe_layer", f"{ours}.mlp")
    return out


def _experts_of(state: dict[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    """The router and the stacked experts of a sparse layer; nothing of a dense one."""
    out = {}
    for name in ("wg", "wg_reduction"):
        for source in (f"{theirs}.gate.{name}", f"{theirs}.gate.{name}.weight"):
            if source in state:
                out[f"{ours}.router.{name}"] = state[source]
    experts = sum(name.startswith(f"{theirs}.experts.") for name in state if "fc1.weight" in name)
    for target, source in {"fc1": "fc1", "fc2": "fc2", "norm": "ffn_layernorm"}.items():
        for kind in ("weight", "bias"):
            names = [f"{theirs}.experts.{expert}.{source}.{kind}" for expert in range(experts)]
            if experts and names[0] in state:
                stacked = torch.stack([state[name] for name in names])
                # our first matrix is one of [1 or 2 with a gate, f, h]
                stacked = stacked.unsqueeze(1) if source == "fc1" else stacked
                out[f"{ours}.experts.{target}_{kind}"] = stacked
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


def gate(moe: MoEConfig, hidden_size: int) -> nn.Module:
    """Top1Gate or Top2Gate as TorchScale's decoder builds it, with its own initial weights."""
    from torchscale.component.xmoe import routing

    common = {
        "use_fp32": True,
        "moe_eval_capacity_token_fraction": moe.eval_capacity_token_fraction,
        "use_xmoe": moe.router is RouterType.torchscale_xmoe,
    }
    if moe.router_topk == 1:
        return routing.Top1Gate(hidden_size, moe.num_experts, **common)
    return routing.Top2Gate(
        hidden_size,
        moe.num_experts,
        second_expert_policy=moe.second_expert_policy.value,
        normalize_gate_prob_before_dropping=moe.normalize_gate_prob_before_dropping,
        **common,
    )


def moe_layer(moe: MoEConfig, hidden_size: int, experts: nn.ModuleList) -> nn.Module:
    """TorchScale's MOELayer over [b, s, h]; needs a process group, of one rank."""
    from torchscale.component.xmoe.moe_layer import MOELayer

    _forget_groups()
    arguments = Namespace(moe_expert_count=moe.num_experts)
    return MOELayer(gate(moe, hidden_size), experts, arguments)


@contextlib.contextmanager
def integer_histograms() -> Iterator[None]:
    """TorchScale's gates log histograms of int64 numbers, which torch has on CUDA only."""
    histc = torch.histc
    torch.histc = lambda x, *args, **settings: histc(x.float(), *args, **settings)
    try:
        yield
    finally:
        torch.histc = histc

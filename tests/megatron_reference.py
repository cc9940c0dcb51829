"""Megatron-LM's model on gloo ranks: megatron-core's GPTModel, and checkpoints as it saves them.

What Megatron-LM adds to them (its arguments, counters, the optimizer's state) is put together as
its --ckpt-format torch_dist does; the tensors are written by megatron-core.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from models.config import Activation, ModelConfig, PositionEmbedding
from models.moe_config import RouterType
from parallel.config import ParallelConfig
from parallel.runtime import initialize, shutdown


def save(
    folder: Path, model: ModelConfig, rows: int, parallel: ParallelConfig, args: dict[str, Any]
) -> None:
    """On each rank. Every weight is off its initial value, where biases are 0 and gains are 1.

    rows: of the embedding; args: what the checkpoint says of the model's settings.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    runtime = initialize(parallel, 1)
    gpt = _gpt(model, rows, parallel, args)
    torch.manual_seed(7 + dist.get_rank())  # or experts and halves could change places unseen
    for tensor in gpt.state_dict().values():
        if torch.is_tensor(tensor):
            tensor.add_(0.1 * torch.randn_like(tensor))
    weights = gpt.sharded_state_dict()
    state = {
        "args": argparse.Namespace(**args),
        "checkpoint_version": 3.0,
        "iteration": 7,
        "num_floating_point_operations_so_far": 1e12,
        "model": weights,
        "optimizer": _optimizer_state(gpt, weights),
        "opt_param_scheduler": {"num_steps": 7},
        "rng_state": ShardedObject("rng_state", [{"a": 1}], (1,), (0,), replica_id=dist.get_rank()),
    }
    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    dist_checkpointing.save(state, str(folder))
    # a process of its own, which would outlive a worker of ours
    filesystem_async._results_queue._manager.shutdown()
    filesystem_async._results_queue = None
    shutdown(runtime)


def logits(
    folder: Path, model: ModelConfig, rows: int, ids: list[list[int]], args: dict[str, Any]
) -> Tensor:
    """Of the checkpoint's model on one rank: fp32 [b, s, rows]."""
    from megatron.core import dist_checkpointing

    parallel = ParallelConfig()
    runtime = initialize(parallel, 1)
    gpt = _gpt(model, rows, parallel, args).eval()
    state = dist_checkpointing.load({"model": gpt.sharded_state_dict()}, str(folder))
    gpt.load_state_dict(state["model"])
    tokens = torch.tensor(ids)
    length = tokens.shape[1]
    later = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    with torch.no_grad():
        found = gpt(tokens, torch.arange(length).expand_as(tokens), later)
    shutdown(runtime)
    return found


def _gpt(
    model: ModelConfig, rows: int, parallel: ParallelConfig, args: dict[str, Any]
) -> torch.nn.Module:
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_layer_local_spec,
    )
    from megatron.core.transformer import TransformerConfig

    swiglu = model.activation is Activation.swiglu
    moe: dict[str, Any] = {}
    if model.moe.num_experts:
        aux_free = model.moe.router is RouterType.aux_free
        moe = {
            "num_moe_experts": model.moe.num_experts,
            "moe_layer_freq": [
                int(layer in model.moe.sparse_layers(model.num_layers))
                for layer in range(model.num_layers)
            ],
            "moe_router_topk": model.moe.router_topk,
            "moe_router_load_balancing_type": "none",
            "moe_router_score_function": "sigmoid" if aux_free else "softmax",
            "moe_router_enable_expert_bias": aux_free,
            "moe_shared_expert_intermediate_size": model.moe.shared_expert_intermediate_size
            or None,
            "moe_ffn_hidden_size": model.ffn_hidden_size,
        }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = TransformerConfig(
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            ffn_hidden_size=model.ffn_hidden_size,
            num_attention_heads=model.num_attention_heads,
            num_query_groups=model.query_groups,
            normalization=model.normalization.value,
            layernorm_epsilon=model.layernorm_epsilon,
            add_bias_linear=model.add_bias_linear,
            gated_linear_unit=swiglu,
            activation_func=torch.nn.functional.silu if swiglu else torch.nn.functional.gelu,
            rotary_interleaved=args.get("rotary_interleaved", False),
            hidden_dropout=0.0,
            attention_dropout=0.0,
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            expert_model_parallel_size=parallel.expert_model_parallel_size,
            pipeline_dtype=torch.float32,
            use_cpu_initialization=True,
            # kernels of GPUs
            masked_softmax_fusion=False,
            bias_activation_fusion=False,
            bias_dropout_fusion=False,
            apply_rope_fusion=False,
            gradient_accumulation_fusion=False,
            **moe,
        )
    layers = get_gpt_layer_local_spec(normalization=config.normalization)
    if moe:
        layers = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    positions = "rope" if model.position_embedding_type is PositionEmbedding.rope else "none"
    return GPTModel(
        config,
        layers,
        vocab_size=rows,
        max_sequence_length=model.max_position_embeddings,
        position_embedding_type=positions,
        rotary_base=int(model.rotary_base),
        share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )


def _optimizer_state(gpt: torch.nn.Module, weights: dict[str, Any]) -> dict[str, Any]:
    """Adam's, after a step: names and places as of the weights."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    chunk = DistributedDataParallel(gpt.config, DistributedDataParallelConfig(), gpt)
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=0.0), [chunk])
    for parameter in gpt.parameters():
        parameter.main_grad.fill_(0.1)
    optimizer.step()
    state: dict[str, Any] = optimizer.sharded_state_dict(weights)
    return state

"""From settings to the model chunks of this rank."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from models.attention import CausalAttention, RotaryTables
from models.config import (
    Activation,
    LayerNormPlacement,
    ModelConfig,
    PositionEmbedding,
)
from models.experts import expert_spec
from models.feed_forward import FeedForward
from models.initialize import initialize_weights
from models.language_model import LanguageModel
from models.magneto import residual_scale
from models.moe_config import RouterType
from models.moe_layer import MoELayer
from models.parameter_count import padded_vocab_size
from models.router import build_router
from models.router_health import RouterHealth
from models.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from parallel.compiled import compiles
from parallel.config import ParallelConfig, RecomputeGranularity
from parallel.layers import (
    Norm,
    SubLayerNormRowParallelLinear,
    enable_embedding_gradient_fusion,
    enable_torch_weight_gradient_fusion,
)
from parallel.megatron import (
    AttnMaskType,
    ColumnParallelLinear,
    MLPSubmodules,
    ModuleSpec,
    MoESubmodules,
    RowParallelLinear,
    SelfAttention,
    SelfAttentionSubmodules,
    TransformerBlockSubmodules,
    TransformerConfig,
    get_num_layers_to_build,
    get_transformer_layer_offset,
)
from parallel.precision import parameter_dtype
from parallel.runtime import Runtime


def build_model(
    model: ModelConfig, parallel: ParallelConfig, runtime: Runtime, *, vocab_size: int, seed: int
) -> list[LanguageModel]:
    """The model chunks this rank holds (one, or several under the interleaved schedule).

    Weights depend on `seed` and the model's settings only, not on the layout. Parameters live on
    `runtime.device`, in the type `parallel.precision` asks for. All ranks must call it.
    """
    enable_torch_weight_gradient_fusion()  # before the first layer: they look for it when built
    enable_embedding_gradient_fusion()
    dtype = parameter_dtype(parallel.precision, runtime.device)
    config = transformer_config(model, parallel, dtype)
    config.compile_elementwise, config.why_not_compiled = compiles(
        parallel.compile_elementwise, runtime
    )
    chunks = []
    interleaved = parallel.virtual_pipeline_model_parallel_size > 1
    for index in range(parallel.virtual_pipeline_model_parallel_size):
        vp_stage = index if interleaved else None
        last_chunk = index == parallel.virtual_pipeline_model_parallel_size - 1
        health = RouterHealth() if model.moe.num_experts else None
        chunk = LanguageModel(
            config,
            _layers(model, config, vp_stage, runtime, health),
            padded_vocab_size=padded_vocab_size(vocab_size, model.make_vocab_size_divisible_by),
            share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
            pre_process=runtime.is_first_pipeline_stage and index == 0,
            post_process=runtime.is_last_pipeline_stage and last_chunk,
            groups=runtime.groups,
            vp_stage=vp_stage,
            router_health=health,
        )
        chunks.append(_place(chunk, runtime.device, dtype))
    initialize_weights(chunks, model, seed)
    return chunks


def _place(chunk: LanguageModel, device: torch.device, dtype: torch.dtype) -> LanguageModel:
    """Move to the device; all parameters become `dtype` but those marked `keep_fp32` (routers)."""

    def move(tensor: torch.Tensor) -> torch.Tensor:
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        cast = is_parameter and not getattr(tensor, "keep_fp32", False)
        return tensor.to(device=device, dtype=dtype if cast else tensor.dtype)

    return chunk._apply(move)


def transformer_config(
    model: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype
) -> TransformerConfig:
    """Our settings in megatron-core's structure; what is not ours to set is switched off here."""
    interleaved = parallel.virtual_pipeline_model_parallel_size > 1
    selective = parallel.recompute_granularity is RecomputeGranularity.selective
    full = parallel.recompute_granularity is RecomputeGranularity.full
    # what it warns of with recompute_granularity=selective is about Transformer Engine's attention
    warnings.filterwarnings("ignore", message="If you are using transformer_engine")
    config = TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups or model.num_attention_heads,
        kv_channels=model.kv_channels or model.hidden_size // model.num_attention_heads,
        add_bias_linear=model.add_bias_linear,
        gated_linear_unit=model.activation is Activation.swiglu,
        activation_func=F.silu if model.activation is Activation.swiglu else F.gelu,
        normalization=model.normalization.value,
        layernorm_epsilon=model.layernorm_epsilon,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=(
            parallel.virtual_pipeline_model_parallel_size if interleaved else None
        ),
        context_parallel_size=parallel.context_parallel_size,
        cp_comm_type=parallel.cp_comm_type.value,
        sequence_parallel=parallel.sequence_parallel,
        recompute_granularity=parallel.recompute_granularity.value if selective or full else None,
        recompute_modules=["core_attn"] if selective else None,
        recompute_method="uniform" if full else None,
        recompute_num_layers=parallel.recompute_num_layers if full else None,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        # gradients are sums over tokens, divided once by the step's global count of valid tokens
        calculate_per_token_loss=True,
        # weight gradients go straight into the fp32 gradient buffer (parallel.layers)
        gradient_accumulation_fusion=True,
        # With two pipeline ranks the next and the previous rank are the same process, and batched
        # messages are told apart by order alone: interleaved runs would go wrong without a word.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        # Overlapped sends over gloo still read the tensor when megatron-core frees it (NaN at
        # once); with CUDA the caching allocator keeps it alive until the stream is done.
        deallocate_pipeline_outputs=not interleaved or torch.cuda.is_available(),
        # our weights are drawn afterwards, see models.initialize
        init_method=_leave_as_is,
        output_layer_init_method=_leave_as_is,
        embedding_init_method=_leave_as_is,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        cuda_graph_scope=[],
        **_expert_settings(model, parallel),
    )
    # after the fact: megatron-core refuses biases with it, because its experts would add them once
    # a rank; ours split them (models.experts)
    config.expert_tensor_parallel_size = parallel.expert_tensor_parallel_size
    config.sub_layernorm_reduction = parallel.sub_layernorm_reduction.value
    return config


def _expert_settings(model: ModelConfig, parallel: ParallelConfig) -> dict[str, Any]:
    moe = model.moe
    if moe.num_experts == 0:
        return {}
    aux_free, sparse = moe.router is RouterType.aux_free, moe.sparse_layers(model.num_layers)
    capacity = moe.expert_capacity_factor
    if moe.router in (RouterType.torchscale, RouterType.torchscale_xmoe):
        capacity = 1.0  # any number: it tells the dispatchers to count the tokens that are left
    return {
        "num_moe_experts": moe.num_experts,
        # a list, so that checkpoints store each layer by itself: dense and sparse ones differ
        "moe_layer_freq": [int(layer in sparse) for layer in range(model.num_layers)],
        "moe_ffn_hidden_size": model.expert_ffn_hidden_size,
        "moe_router_topk": moe.router_topk,
        "moe_router_score_function": "sigmoid" if aux_free else moe.router_score_function.value,
        "moe_router_pre_softmax": True,
        "moe_router_dtype": "fp32",
        "moe_router_enable_expert_bias": aux_free,
        "moe_router_bias_update_rate": moe.router_bias_update_rate,
        # balance and z-loss are our routers' own
        "moe_router_load_balancing_type": "none",
        "moe_expert_capacity_factor": capacity,
        "moe_token_dispatcher_type": parallel.moe_token_dispatcher_type.value,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": 1,
    }


def _leave_as_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _layers(
    model: ModelConfig,
    config: TransformerConfig,
    vp_stage: int | None,
    runtime: Runtime,
    health: RouterHealth | None,
) -> TransformerBlockSubmodules:
    """Specifications of the layers of one chunk: dense, or sparse, by their number in the model."""
    placement = model.layer_norm_placement
    sub_ln = placement is LayerNormPlacement.sub_ln
    row_parallel = SubLayerNormRowParallelLinear if sub_ln else RowParallelLinear
    positions = model.position_embedding_type is not PositionEmbedding.none
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=partial(
                CausalAttention, rotary=RotaryTables(model) if positions else None
            ),
            linear_proj=row_parallel,
        ),
    )
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=row_parallel)
    feed_forward = ModuleSpec(
        module=FeedForward, params={"ffn_hidden_size": model.ffn_hidden_size}, submodules=linears
    )
    parts = TransformerLayerSubmodules(
        norm=Norm,
        self_attention=attention,
        mlp=feed_forward,
        placement=placement,
        residual_scale=residual_scale(placement, model.num_layers),
    )
    dense = ModuleSpec(module=TransformerLayer, submodules=parts)
    sparse = dense
    if model.moe.num_experts:
        experts = ModuleSpec(
            module=MoELayer,
            submodules=MoESubmodules(
                router=partial(build_router(model.moe), health=health),
                experts=expert_spec(model),
                shared_experts=_shared_expert(model, linears),
            ),
        )
        slot = "sparse" if model.moe.sparse_after_layer else "mlp"
        sparse = ModuleSpec(module=TransformerLayer, submodules=replace(parts, **{slot: experts}))
    first = get_transformer_layer_offset(config, vp_stage, runtime.pipeline_parallel_rank)
    count = get_num_layers_to_build(config, vp_stage, runtime.pipeline_parallel_rank)
    sparse_layers = model.moe.sparse_layers(model.num_layers)
    # post-LN blocks end in a norm already
    post_ln = placement in (LayerNormPlacement.post_ln, LayerNormPlacement.deepnorm)
    return TransformerBlockSubmodules(
        layer_specs=[
            sparse if layer in sparse_layers else dense for layer in range(first, first + count)
        ],
        layer_norm=None if post_ln else Norm,
    )


def _shared_expert(model: ModelConfig, linears: MLPSubmodules) -> ModuleSpec | None:
    width = model.moe.shared_expert_intermediate_size
    if width == 0:
        return None
    return ModuleSpec(module=FeedForward, params={"ffn_hidden_size": width}, submodules=linears)

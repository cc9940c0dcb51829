"""The layouts and models whose predicted memory is held against the measured one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from models.config import Activation, LayerNormPlacement, ModelConfig, Normalization
from models.moe_config import MoEConfig, RouterType
from parallel.config import (
    CompileElementwise,
    ContextParallelComm,
    ParallelConfig,
    Precision,
    RecomputeGranularity,
    SubLayerNormReduction,
    TokenDispatcher,
)
from parallel.deepspeed_config import DeepSpeedConfig

VOCABULARY = 512
MODEL = ModelConfig(
    name="memory",
    num_layers=4,
    hidden_size=128,
    ffn_hidden_size=512,
    num_attention_heads=4,
    max_position_embeddings=512,
)
GROUPED = replace(
    MODEL,
    num_query_groups=2,
    activation=Activation.swiglu,
    normalization=Normalization.rms_norm,
    add_bias_linear=False,
    share_embeddings_and_output_weights=False,
    layer_norm_placement=LayerNormPlacement.pre_ln,
)
SPARSE = replace(MODEL, moe=MoEConfig(num_experts=4, router_topk=2, layer_freq=2))


@dataclass(frozen=True, kw_only=True)
class Case:
    model: ModelConfig = field(default_factory=lambda: MODEL)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    world_size: int = 1
    seq_length: int = 256
    micro_batch_size: int = 2
    micro_batches: int = 2
    resets: bool = False
    deepspeed: DeepSpeedConfig | None = None  # None: engine=megatron


def layout(**sizes: Any) -> ParallelConfig:
    long = {
        "tp": "tensor_model_parallel_size",
        "pp": "pipeline_model_parallel_size",
        "vpp": "virtual_pipeline_model_parallel_size",
        "cp": "context_parallel_size",
        "ep": "expert_model_parallel_size",
        "etp": "expert_tensor_parallel_size",
        "sp": "sequence_parallel",
        "zero": "use_distributed_optimizer",
        "recompute": "recompute_granularity",
    }
    return ParallelConfig(**{long.get(name, name): value for name, value in sizes.items()})


_FULL, _SELECTIVE = RecomputeGranularity.full, RecomputeGranularity.selective
_ALWAYS = CompileElementwise.always
CASES = {
    "dense": Case(),
    "pre-LN": Case(model=replace(MODEL, layer_norm_placement=LayerNormPlacement.pre_ln)),
    "post-LN": Case(model=replace(MODEL, layer_norm_placement=LayerNormPlacement.post_ln)),
    "grouped, SwiGLU, RMSNorm": Case(model=GROUPED),
    "attention dropout": Case(model=replace(MODEL, attention_dropout=0.1)),
    "attention dropout, TP 2, SP": Case(
        model=replace(MODEL, attention_dropout=0.1, hidden_dropout=0.1),
        parallel=layout(tp=2, sp=True),
        world_size=2,
    ),
    "attention dropout, selective": Case(
        model=replace(MODEL, attention_dropout=0.1), parallel=layout(recompute=_SELECTIVE)
    ),
    "attention dropout, CP 2": Case(
        model=replace(MODEL, attention_dropout=0.1), parallel=layout(cp=2), world_size=2
    ),
    "attention dropout, CP 2, a2a": Case(
        model=replace(MODEL, attention_dropout=0.1),
        parallel=layout(cp=2, cp_comm_type=ContextParallelComm.a2a),
        world_size=2,
    ),
    "attention dropout, bf16": Case(
        model=replace(MODEL, attention_dropout=0.1), parallel=layout(precision=Precision.bf16)
    ),
    "dropout": Case(model=replace(MODEL, hidden_dropout=0.1)),
    "large vocabulary": Case(model=replace(MODEL, vocab_size=20_000)),
    "one sequence": Case(micro_batch_size=1, seq_length=512),
    "documents": Case(resets=True),
    "bf16": Case(parallel=layout(precision=Precision.bf16)),
    "compiled": Case(parallel=layout(compile_elementwise=_ALWAYS)),
    "compiled, SwiGLU, RMSNorm": Case(model=GROUPED, parallel=layout(compile_elementwise=_ALWAYS)),
    "compiled, TP 2": Case(parallel=layout(tp=2, compile_elementwise=_ALWAYS), world_size=2),
    "SwiGLU with biases": Case(model=replace(MODEL, activation=Activation.swiglu)),
    "RMSNorm, TP 2": Case(
        model=replace(MODEL, normalization=Normalization.rms_norm),
        parallel=layout(tp=2),
        world_size=2,
    ),
    "bf16, full": Case(parallel=layout(precision=Precision.bf16, recompute=_FULL)),
    "bf16, full, long": Case(
        parallel=layout(precision=Precision.bf16, recompute=_FULL),
        seq_length=512,
        micro_batch_size=4,
    ),
    "bf16, PP 2": Case(
        parallel=layout(precision=Precision.bf16, pp=2), world_size=2, micro_batches=4
    ),
    "bf16, TP 2": Case(parallel=layout(precision=Precision.bf16, tp=2), world_size=2),
    "bf16, grouped, SwiGLU, RMSNorm": Case(
        model=GROUPED, parallel=layout(precision=Precision.bf16)
    ),
    "selective": Case(parallel=layout(recompute=_SELECTIVE)),
    "full": Case(parallel=layout(recompute=_FULL)),
    "full, groups of 2": Case(parallel=layout(recompute=_FULL, recompute_num_layers=2)),
    "TP 2": Case(parallel=layout(tp=2), world_size=2),
    "TP 2, SP": Case(parallel=layout(tp=2, sp=True), world_size=2),
    "TP 2, SP, pre-LN, GQA": Case(model=GROUPED, parallel=layout(tp=2, sp=True), world_size=2),
    "TP 2, statistics by all-reduce": Case(
        parallel=layout(tp=2, sub_layernorm_reduction=SubLayerNormReduction.all_reduce),
        world_size=2,
    ),
    "PP 2": Case(parallel=layout(pp=2), world_size=2, micro_batches=4),
    "PP 4": Case(parallel=layout(pp=4), world_size=4, micro_batches=6),
    "PP 2, VPP 2": Case(parallel=layout(pp=2, vpp=2), world_size=2, micro_batches=4),
    "DP 2": Case(world_size=2),
    "DP 2, no ZeRO": Case(parallel=layout(zero=False), world_size=2),
    "DP 2, bf16": Case(parallel=layout(precision=Precision.bf16), world_size=2),
    "CP 2": Case(parallel=layout(cp=2), world_size=2),
    "CP 2, a2a": Case(parallel=layout(cp=2, cp_comm_type=ContextParallelComm.a2a), world_size=2),
    "experts": Case(model=SPARSE),
    "experts, Switch": Case(
        model=replace(SPARSE, moe=replace(SPARSE.moe, router=RouterType.linear, router_topk=1))
    ),
    "experts, EP 2": Case(model=SPARSE, parallel=layout(ep=2), world_size=2),
    "experts, EP 2, all-gather": Case(
        model=SPARSE,
        parallel=layout(ep=2, moe_token_dispatcher_type=TokenDispatcher.allgather),
        world_size=2,
    ),
    "experts, shards of them": Case(model=SPARSE, parallel=layout(etp=2), world_size=2),
    "experts, TP 2, SP": Case(model=SPARSE, parallel=layout(tp=2, sp=True), world_size=2),
    "experts, stacked": Case(
        model=replace(
            MODEL, moe=MoEConfig(num_experts=4, sparse_after_layer=2, stacked_sublayers=2)
        )
    ),
    "experts, shared one": Case(
        model=replace(SPARSE, moe=replace(SPARSE.moe, shared_expert_intermediate_size=256))
    ),
    "TP 2, PP 2, SP, full": Case(
        model=replace(MODEL, num_layers=8),
        parallel=layout(tp=2, pp=2, sp=True, recompute=_FULL, recompute_num_layers=4),
        world_size=4,
        micro_batches=4,
    ),
}


def _zero(stage: int, **settings: Any) -> DeepSpeedConfig:
    return DeepSpeedConfig(zero_stage=stage, **settings)


_BF16 = layout(precision=Precision.bf16)
_GATHERED = _zero(3, param_persistence_threshold=1000)  # all matrices
# wide and short: weights count as much as activations
_WIDE: dict[str, Any] = {"world_size": 2, "seq_length": 128, "micro_batch_size": 1}
CASES |= {
    "ZeRO-0": Case(deepspeed=_zero(0), **_WIDE),
    "ZeRO-1": Case(deepspeed=_zero(1), **_WIDE),
    "ZeRO-2": Case(deepspeed=_zero(2), **_WIDE),
    "ZeRO-3": Case(deepspeed=_GATHERED, **_WIDE),
    "ZeRO-3, all parameters small": Case(deepspeed=_zero(3), **_WIDE),
    "ZeRO-1, bf16": Case(deepspeed=_zero(1), parallel=_BF16, **_WIDE),
    "ZeRO-2, bf16": Case(deepspeed=_zero(2), parallel=_BF16, **_WIDE),
    "ZeRO-3, bf16": Case(deepspeed=_GATHERED, parallel=_BF16, **_WIDE),
    "ZeRO-2, one rank": Case(deepspeed=_zero(2)),
    "ZeRO-0, one micro-batch": Case(deepspeed=_zero(0), world_size=2, micro_batches=1),
    "ZeRO-1, one micro-batch": Case(deepspeed=_zero(1), world_size=2, micro_batches=1),
    "ZeRO-2, small buckets": Case(deepspeed=_zero(2, reduce_bucket_size=100_000), **_WIDE),
    "ZeRO-3, small buckets": Case(deepspeed=_zero(3, reduce_bucket_size=100_000), **_WIDE),
    "ZeRO-2, overlap": Case(deepspeed=_zero(2, overlap_comm=True), **_WIDE),
    "ZeRO-2, large vocabulary": Case(
        deepspeed=_zero(2), model=replace(MODEL, vocab_size=20_000), world_size=2
    ),
    "ZeRO-1, offload": Case(deepspeed=_zero(1, offload_optimizer=True), **_WIDE),
    "ZeRO-2, offload": Case(deepspeed=_zero(2, offload_optimizer=True), **_WIDE),
    "ZeRO-3, offload": Case(deepspeed=_zero(3, offload_optimizer=True), **_WIDE),
    "ZeRO-1, offload, bf16": Case(
        deepspeed=_zero(1, offload_optimizer=True), parallel=_BF16, **_WIDE
    ),
    "ZeRO-2, offload, bf16": Case(
        deepspeed=_zero(2, offload_optimizer=True), parallel=_BF16, **_WIDE
    ),
    "ZeRO-3, offload of all, bf16": Case(
        deepspeed=_zero(3, offload_optimizer=True, offload_parameters=True),
        parallel=_BF16,
        **_WIDE,
    ),
    "ZeRO-0, TP 2": Case(deepspeed=_zero(0), parallel=layout(tp=2), world_size=2),
    "ZeRO-1, TP 2, SP": Case(deepspeed=_zero(1), parallel=layout(tp=2, sp=True), world_size=2),
    "ZeRO-2, TP 2, DP 2": Case(deepspeed=_zero(2), parallel=layout(tp=2), world_size=4),
    "ZeRO-3, TP 2, SP, DP 2": Case(
        deepspeed=_GATHERED, parallel=layout(tp=2, sp=True), world_size=4
    ),
    "ZeRO-3, TP 2, bf16": Case(
        deepspeed=_zero(3), parallel=layout(tp=2, precision=Precision.bf16), world_size=2
    ),
    "ZeRO-2, CP 2": Case(deepspeed=_zero(2), parallel=layout(cp=2), world_size=2),
    "ZeRO-1, EP 2": Case(model=SPARSE, deepspeed=_zero(1), parallel=layout(ep=2), world_size=2),
    "ZeRO-2, EP 2": Case(model=SPARSE, deepspeed=_zero(2), parallel=layout(ep=2), world_size=2),
    "ZeRO-2, EP 2, DP 4": Case(
        model=SPARSE, deepspeed=_zero(2), parallel=layout(ep=2), world_size=4
    ),
    "ZeRO-3, experts": Case(model=SPARSE, deepspeed=_zero(3), world_size=2),
    "ZeRO-2, frozen experts": Case(
        model=replace(SPARSE, moe=replace(SPARSE.moe, freeze_routing=True, aux_loss_coeff=0.0)),
        deepspeed=_zero(2),
        world_size=2,
    ),
    "ZeRO-3, full": Case(deepspeed=_GATHERED, parallel=layout(recompute=_FULL), world_size=2),
}

"""A configuration made small: the same structure and layout, in seconds on one machine.

`shrink` keeps whatever a layout can get wrong: which axes there are, the kind of every layer, who
shares heads and experts out, what is overlapped and recomputed. It makes small what only takes
time: widths, depth, numbers of experts and heads, the batch, and axes longer than two where there
are too few processes. Imports neither torch nor megatron-core.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from data.config import DataConfig
from models.config import ModelConfig
from models.moe_config import SETTINGS_OF_ROUTERS, MoEConfig, RouterType, TokenDropPolicy
from parallel.config import (
    ConfigError,
    ContextParallelComm,
    ParallelConfig,
    Precision,
    RecomputeGranularity,
)
from parallel.deepspeed_config import DeepSpeedConfig, EngineKind
from pretrain.config import PretrainConfig, TrainConfig
from pretrain.config_rules import validate

HEAD_WIDTH = 8
SHORTEST_SEQUENCE = 16
# Routers that draw random numbers: every layout draws others.
DRAWING = (RouterType.sparsemixer, RouterType.torchscale, RouterType.torchscale_xmoe)


@dataclass(frozen=True)
class Axis:
    name: str
    launch: int | None  # size in the launch; None: what the number of processes leaves
    tried: int

    @property
    def remark(self) -> str:
        if self.launch == 1 or self.launch == self.tried:
            return ""
        if self.tried == 1:
            return "not covered: too few processes"
        return "" if self.launch is None else f"covered at {self.tried}"


@dataclass(frozen=True)
class Shrunk:
    """config: the small one, valid on `world_size` processes; its vocabulary is `vocab_size`."""

    config: PretrainConfig
    world_size: int
    vocab_size: int
    axes: list[Axis]
    remarks: list[str]  # what is not as in the launch, and could hide a defect


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """Sizes along each axis; `data` is what they need at least, or more."""

    tensor: int
    pipeline: int
    virtual: int
    context: int
    expert: int
    expert_tensor: int
    data: int = 1

    @classmethod
    def of(cls, parallel: ParallelConfig) -> "_Sizes":
        return cls(
            tensor=parallel.tensor_model_parallel_size,
            pipeline=parallel.pipeline_model_parallel_size,
            virtual=parallel.virtual_pipeline_model_parallel_size,
            context=parallel.context_parallel_size,
            expert=parallel.expert_model_parallel_size,
            expert_tensor=parallel.expert_tensor_parallel_size,
        )

    def filled(self) -> "_Sizes":
        """With the fewest data-parallel replicas among which the experts can be shared out."""
        experts = self.expert * self.expert_tensor
        return replace(self, data=experts // math.gcd(experts, self.tensor * self.context))

    def with_replicas(self) -> "_Sizes":
        """With two data-parallel replicas at least."""
        return self if self.data > 1 else replace(self, data=2)

    @property
    def processes(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data


def processes_needed(parallel: ParallelConfig) -> int:
    """The fewest processes that the layout can be started on."""
    return _Sizes.of(parallel).filled().processes


def shrink(config: PretrainConfig, processes: int = 8) -> Shrunk:
    """`config` for at most `processes` processes.

    Axes longer than 2 are halved, the longest first, until two data-parallel replicas fit. Where
    not even one fits, axes are left out, first the one that saves most processes. Raises
    ConfigError if `processes` is below 1.
    """
    if processes < 1:
        raise ConfigError(f"verify.processes={processes} must be 1 or more")
    asked = _Sizes.of(config.parallel)
    sizes = _fit(replace(asked, virtual=min(asked.virtual, 2)), processes)
    if config.engine is EngineKind.deepspeed and config.deepspeed.zero_stage == 3:
        # experts that are not sharded as the rest would be refused
        sizes = replace(sizes, expert_tensor=sizes.tensor if config.model.moe.num_experts else 1)
    parallel = _parallel(config.parallel, sizes)
    model = _model(config.model, config.parallel, parallel, sizes)
    small = PretrainConfig(
        model=model,
        data=DataConfig(packing=config.data.packing, seq_length=model.max_position_embeddings),
        parallel=parallel,
        optimizer=config.optimizer,
        train=_train(config.train, sizes),
        engine=config.engine,
        deepspeed=_deepspeed(config),
    )
    validate(small, sizes.processes)
    axes = [
        Axis("tensor parallel", asked.tensor, sizes.tensor),
        Axis("pipeline stages", asked.pipeline, sizes.pipeline),
        Axis("chunks of a stage", asked.virtual, sizes.virtual),
        Axis("context parallel", asked.context, sizes.context),
        Axis("expert parallel", asked.expert, sizes.expert),
        Axis("expert-tensor parallel", asked.expert_tensor, sizes.expert_tensor),
        Axis("data parallel", None, sizes.data),
    ]
    vocab_size = 12 * model.make_vocab_size_divisible_by - 3  # the last rank has padding
    return Shrunk(small, sizes.processes, vocab_size, axes, _remarks(config))


def _fit(sizes: _Sizes, processes: int) -> _Sizes:
    axes = ("expert_tensor", "context", "expert", "pipeline", "tensor")
    longest = max(axes, key=lambda axis: getattr(sizes, axis))
    filled = sizes.filled()
    if getattr(sizes, longest) > 2 and filled.with_replicas().processes > processes:
        half, odd = divmod(getattr(sizes, longest), 2)
        return _fit(replace(sizes, **{longest: 2 if odd else half}), processes)
    if filled.processes > processes:
        shorter = [replace(sizes, **{axis: 1}) for axis in axes if getattr(sizes, axis) > 1]
        return _fit(min(shorter, key=lambda fewer: fewer.filled().processes), processes)
    if filled.with_replicas().processes <= processes:
        filled = filled.with_replicas()
    return replace(filled, virtual=filled.virtual if filled.pipeline > 1 else 1)


def _parallel(parallel: ParallelConfig, sizes: _Sizes) -> ParallelConfig:
    full = parallel.recompute_granularity is RecomputeGranularity.full
    return replace(
        parallel,
        tensor_model_parallel_size=sizes.tensor,
        pipeline_model_parallel_size=sizes.pipeline,
        virtual_pipeline_model_parallel_size=sizes.virtual,
        context_parallel_size=sizes.context,
        expert_model_parallel_size=sizes.expert,
        expert_tensor_parallel_size=sizes.expert_tensor,
        sequence_parallel=parallel.sequence_parallel and sizes.tensor > 1,
        recompute_num_layers=min(parallel.recompute_num_layers, 2) if full else 1,
        precision=Precision.fp32,
    )


def _deepspeed(config: PretrainConfig) -> DeepSpeedConfig:
    """Buckets that do not hold all gradients, and matrices that are gathered."""
    if config.engine is not EngineKind.deepspeed:
        return DeepSpeedConfig()
    return replace(
        config.deepspeed,
        native_adam=False,
        reduce_bucket_size=min(config.deepspeed.reduce_bucket_size, 5000),
        param_persistence_threshold=min(config.deepspeed.param_persistence_threshold, 200),
    )


def _train(train: TrainConfig, sizes: _Sizes) -> TrainConfig:
    """At least twice as many micro-batches as stages: 1F1B reaches its steady state."""
    micro_batch_size = min(train.micro_batch_size, 2)
    return TrainConfig(
        micro_batch_size=micro_batch_size,
        global_batch_size=2 * sizes.pipeline * micro_batch_size * sizes.data,
    )


def _model(
    model: ModelConfig, asked: ParallelConfig, parallel: ParallelConfig, sizes: _Sizes
) -> ModelConfig:
    sharing = sizes.tensor  # what heads are shared out over
    if parallel.cp_comm_type is ContextParallelComm.a2a:
        sharing *= sizes.context
    # as many query heads to a group as in the launch; two groups a rank where it has several
    heads_of_a_group = model.num_attention_heads // model.query_groups
    several = model.query_groups > asked.tensor_model_parallel_size
    groups = sharing * (2 if several else 1)
    heads = groups * heads_of_a_group
    unit = math.lcm(heads, sizes.expert_tensor)
    hidden = unit * -(-heads * HEAD_WIDTH // unit)
    wide = model.kv_channels is not None and model.kv_channels * model.num_attention_heads != (
        model.hidden_size
    )
    experts = math.lcm(sizes.tensor, sizes.expert_tensor)
    sequence = _sequence(parallel)
    return replace(
        model,
        num_layers=_layers(model, parallel),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=None if model.num_query_groups is None else groups,
        kv_channels=2 * HEAD_WIDTH if wide else HEAD_WIDTH,
        ffn_hidden_size=_scaled(model.ffn_hidden_size, hidden / model.hidden_size, experts),
        max_position_embeddings=sequence,
        vocab_size=None,
        make_vocab_size_divisible_by=math.lcm(8, sizes.tensor),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        moe=_moe(model, parallel, hidden / model.hidden_size),
    )


def _layers(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Equal stages, whole recomputed groups, and at least one sparse and one dense layer."""
    unit = (
        parallel.pipeline_model_parallel_size
        * parallel.virtual_pipeline_model_parallel_size
        * parallel.recompute_num_layers
    )
    period = _layer_freq(model.moe) if model.moe.num_experts else 1
    return unit * -(-max(2, period) // unit)


def _layer_freq(moe: MoEConfig) -> int:
    return 1 if moe.sparse_after_layer else min(moe.layer_freq, 4)


def _sequence(parallel: ParallelConfig) -> int:
    unit = 2 * parallel.context_parallel_size
    if parallel.sequence_parallel:
        unit *= parallel.tensor_model_parallel_size
    return unit * -(-SHORTEST_SEQUENCE // unit)


def _moe(model: ModelConfig, parallel: ParallelConfig, ratio: float) -> MoEConfig:
    moe = model.moe
    if not moe.num_experts:
        return moe
    ranks = parallel.expert_model_parallel_size
    local = 2  # experts of a rank; in all some to choose from, and more than a token is sent to
    while ranks * local < min(4, moe.num_experts) or (
        ranks * local <= moe.router_topk < moe.num_experts
    ):
        local += 1
    layers = _layers(model, parallel)
    router = RouterType.linear if moe.router in DRAWING else moe.router
    own: dict[str, Any] = {
        field.name: field.default
        for field in fields(MoEConfig)
        if router.value not in SETTINGS_OF_ROUTERS.get(field.name, router.value)
    }
    if router is RouterType.xmoe:  # half of few is narrow, and cosines amplify rounding there
        own["router_dim"] = 8
    return replace(
        moe,
        **own,
        num_experts=ranks * local,
        router_topk=min(moe.router_topk, ranks * local),
        layer_freq=moe.layer_freq if moe.sparse_after_layer else _layer_freq(moe),
        sparse_after_layer=-(-moe.sparse_after_layer * layers // model.num_layers),
        ffn_hidden_size=None
        if moe.ffn_hidden_size is None
        else _scaled(moe.ffn_hidden_size, ratio, parallel.expert_tensor_parallel_size),
        shared_expert_intermediate_size=0
        if not moe.shared_expert_intermediate_size
        else _scaled(
            moe.shared_expert_intermediate_size, ratio, parallel.tensor_model_parallel_size
        ),
        router=router,
        expert_capacity_factor=None,
        token_drop_policy=TokenDropPolicy.probs,
    )


def _scaled(width: int, ratio: float, unit: int) -> int:
    """About `width` x `ratio`, a multiple of `unit`."""
    return unit * max(1, round(width * ratio / unit))


def _remarks(config: PretrainConfig) -> list[str]:
    model, moe = config.model, config.model.moe
    remarks = []
    if config.engine is EngineKind.deepspeed and config.deepspeed.native_adam:
        remarks.append("torch's Adam instead of deepspeed.native_adam=true, which is compiled")
    if config.parallel.precision is Precision.bf16:
        remarks.append("fp32 instead of parallel.precision=bf16, where rounding hides defects")
    if model.hidden_dropout or model.attention_dropout:
        remarks.append("without dropout: every layout draws other masks")
    if moe.num_experts and moe.router in DRAWING:
        remarks.append(
            f"model.moe.router=linear instead of {moe.router.value}, which draws other random "
            "numbers in every layout"
        )
    if moe.num_experts and moe.expert_capacity_factor is not None:
        remarks.append(
            "without model.moe.expert_capacity_factor: which tokens are dropped is up to the layout"
        )
    return remarks

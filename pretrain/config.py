"""The root of the configuration, and the rules that cross rooms.

Imports neither torch nor megatron-core.
"""

import math
from dataclasses import dataclass, field
from enum import Enum
from importlib.util import find_spec

from data.config import DataConfig
from models.config import ModelConfig
from models.parameter_count import padded_vocab_size
from parallel.config import (
    FIRST_STEP_ALLOWANCE,
    ConfigError,
    ContextParallelComm,
    OptimizerConfig,
    ParallelConfig,
    RecomputeGranularity,
    below,
    not_positive,
)
from parallel.deepspeed_config import (
    DeepSpeedConfig,
    EngineKind,
    Launch,
    counting_for_nothing,
    not_installed,
    problems_of,
)
from parallel.rank_layout import RankLayout
from pretrain.walltime import walltime_seconds


class DecayStyle(Enum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class Resume(Enum):
    auto = "auto"  # from the newest complete checkpoint of the run folder, if there is one
    never = "never"  # refuse a run folder that holds checkpoints
    required = "required"  # refuse a run folder that holds none


class OnNonfinite(Enum):
    skip = "skip"  # no update; the step counts as taken
    rollback = "rollback"  # back to the newest checkpoint, and on without the last steps' data
    stop = "stop"  # no update, and the run ends with an error


class OnSpike(Enum):
    ignore = "ignore"
    report = "report"  # update as usual, and say which documents stand out
    skip = "skip"
    rollback = "rollback"
    stop = "stop"


class WandbMode(Enum):
    auto = "auto"  # online with a key, offline without
    online = "online"
    offline = "offline"
    disabled = "disabled"


@dataclass(kw_only=True)
class ScheduleConfig:
    """Learning rate as a function of the optimizer step."""

    lr_warmup_steps: int = 0
    lr_decay_style: DecayStyle = DecayStyle.cosine
    lr_decay_steps: int | None = None  # None: train_steps
    min_lr: float = 0.0

    def __post_init__(self) -> None:
        problems = below({"schedule.lr_warmup_steps": self.lr_warmup_steps}, 0)
        if self.lr_decay_steps is not None:
            problems += below({"schedule.lr_decay_steps": self.lr_decay_steps}, 1)
            if 1 <= self.lr_decay_steps < self.lr_warmup_steps:
                problems.append(
                    f"schedule.lr_decay_steps={self.lr_decay_steps} counts from step 0 and must "
                    f"not end before schedule.lr_warmup_steps={self.lr_warmup_steps}; use "
                    f"{self.lr_warmup_steps} or more"
                )
        if not (math.isfinite(self.min_lr) and self.min_lr >= 0):
            problems.append(f"schedule.min_lr={self.min_lr} must be 0 or a finite number above")
        if problems:
            raise ConfigError(*problems)


@dataclass(kw_only=True)
class TrainConfig:
    train_steps: int = 1000
    micro_batch_size: int = 1  # sequences in one forward pass of one data-parallel rank
    global_batch_size: int = 8  # sequences in one optimizer step
    seed: int = 1234  # of the initial weights and of dropout
    log_interval: int = 1  # steps
    eval_interval: int = 100  # steps; 0: only at the start and the end
    eval_sequences: int = 64  # validation sequences per language, at most
    # steps between two reports on the routers of a model with experts (docs/moe.md); 0: none
    router_health_interval: int = 10
    # steps between two reports on losses, ratios, tokens and epochs by family and language; 0: none
    mixture_interval: int = 10
    # steps between two reports on norms of gradients and weights by kind and layer; 0: none
    gradient_norm_interval: int = 20

    def __post_init__(self) -> None:
        problems = below(
            {
                "train.train_steps": self.train_steps,
                "train.micro_batch_size": self.micro_batch_size,
                "train.global_batch_size": self.global_batch_size,
                "train.log_interval": self.log_interval,
                "train.eval_sequences": self.eval_sequences,
            },
            1,
        )
        problems += below(
            {
                "train.seed": self.seed,
                "train.eval_interval": self.eval_interval,
                "train.router_health_interval": self.router_health_interval,
                "train.mixture_interval": self.mixture_interval,
                "train.gradient_norm_interval": self.gradient_norm_interval,
            },
            0,
        )
        if problems:
            raise ConfigError(*problems)


@dataclass(kw_only=True)
class CheckpointConfig:
    save_interval: int = 500  # steps; 0: only at the end and on a signal
    keep_last: int = 3  # checkpoints; older ones are removed but for the next two; 0 keeps all
    keep_every: int = 0  # steps; those at its multiples are kept for ever; 0: none
    keep_best: int = 0  # checkpoints; as many of the lowest eval/loss are kept
    # Files are written while the training goes on, which waits for a copy in host memory only
    # (on a CPU, as much memory again as weights and optimizer take).
    async_save: bool = True
    # checksums of all files, taken when saving, compared when resuming; false: sizes only
    verify_integrity: bool = True
    resume: Resume = Resume.auto
    # another run's checkpoint folder to start from: weights and optimizer, or the weights alone
    # where some are frozen here
    load: str = ""

    def __post_init__(self) -> None:
        problems = below(
            {
                "checkpoint.save_interval": self.save_interval,
                "checkpoint.keep_last": self.keep_last,
                "checkpoint.keep_every": self.keep_every,
                "checkpoint.keep_best": self.keep_best,
            },
            0,
        )
        if problems:
            raise ConfigError(*problems)


@dataclass(kw_only=True)
class FaultToleranceConfig:
    """What ends a run that cannot go on, and when (docs/reliability.md)."""

    heartbeat_interval_seconds: float = 2.0  # between two signs of life of a rank
    heartbeat_timeout_seconds: float = 8.0  # a rank silent for longer is dead to the others
    # seconds without any rank getting on, after which the run ends and says who is behind; 0: never
    hang_timeout_seconds: float = 600.0
    # When the allocation ends, "[D-]HH:MM:SS" or minutes from the start of the job or the run; the
    # run saves and stops before. None: when SLURM says, if it does.
    walltime: str | None = None
    # seconds kept free before that end besides what a step and a save were measured to take
    grace_seconds: float = 60.0

    def __post_init__(self) -> None:
        interval, timeout = self.heartbeat_interval_seconds, self.heartbeat_timeout_seconds
        problems = not_positive(
            {
                "fault_tolerance.heartbeat_interval_seconds": interval,
                "fault_tolerance.heartbeat_timeout_seconds": timeout,
            }
        )
        if not problems and timeout < 3 * interval:
            problems.append(
                f"fault_tolerance.heartbeat_timeout_seconds={timeout:g} must be at least 3 times "
                f"fault_tolerance.heartbeat_interval_seconds={interval:g}, or one late sign of "
                f"life counts as a death; use {3 * interval:g} or more, or an interval of "
                f"{timeout / 3:g} or less"
            )
        if not (math.isfinite(self.hang_timeout_seconds) and self.hang_timeout_seconds >= 0):
            problems.append(
                f"fault_tolerance.hang_timeout_seconds={self.hang_timeout_seconds} must be 0 "
                "(never) or a finite number above"
            )
        if self.walltime is not None:
            try:
                walltime_seconds(self.walltime)
            except ValueError as error:
                problems.append(f"fault_tolerance.walltime={self.walltime} {error}")
        if not (math.isfinite(self.grace_seconds) and self.grace_seconds >= 0):
            problems.append(
                f"fault_tolerance.grace_seconds={self.grace_seconds} must be 0 or a finite number "
                "above"
            )
        if problems:
            raise ConfigError(*problems)


@dataclass(kw_only=True)
class AnomalyConfig:
    """Steps whose loss or gradient is not finite, or far above those before (docs/anomalies.md)."""

    on_nonfinite: OnNonfinite = OnNonfinite.skip
    on_spike: OnSpike = OnSpike.report
    spike_window: int = 128  # updates before it that a step is compared with, at most
    spike_warmup: int = 64  # updates before the first comparison
    # Robust standard deviations above the median. Nine runs of 400 steps without a spike stay below
    # 9 in the gradient norm and 2 in the loss.
    spike_threshold: float = 10.0
    max_rollbacks: int = 3  # of a run; the next one ends it
    # steps whose data a rollback leaves out: the one it is for, and those before it as far as the
    # checkpoint
    rollback_steps: int = 10
    # steps whose token losses stay on the device (4 bytes a token), so that a report can look back
    keep_batches: int = 8
    max_documents: int = 10  # in a report
    rerun_sequences: int = 16  # run again one by one for a report, at most; 0: none

    def __post_init__(self) -> None:
        problems = below(
            {
                "anomaly.spike_warmup": self.spike_warmup,
                "anomaly.rollback_steps": self.rollback_steps,
                "anomaly.keep_batches": self.keep_batches,
                "anomaly.max_documents": self.max_documents,
            },
            1,
        )
        problems += below(
            {
                "anomaly.max_rollbacks": self.max_rollbacks,
                "anomaly.rerun_sequences": self.rerun_sequences,
            },
            0,
        )
        if self.spike_window < self.spike_warmup:
            problems.append(
                f"anomaly.spike_window={self.spike_window} must hold the anomaly.spike_warmup="
                f"{self.spike_warmup} updates before the first comparison; use "
                f"{self.spike_warmup} or more, or a shorter warm-up"
            )
        problems += not_positive({"anomaly.spike_threshold": self.spike_threshold})
        if problems:
            raise ConfigError(*problems)


@dataclass(kw_only=True)
class WandbConfig:
    mode: WandbMode = WandbMode.auto
    project: str = "magnetron"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class TensorboardConfig:
    """Scalars for TensorBoard in run_dir/tensorboard, written by rank 0."""

    enabled: bool = False  # needs the package tensorboard


@dataclass(kw_only=True)
class ProfileConfig:
    """Where the time of a step goes (docs/observability.md)."""

    start_step: int = 0  # the first step that is traced, counted from 1; 0: none
    steps: int = 3  # traced steps
    ranks: list[int] = field(default_factory=lambda: [0])  # whose traces are written
    straggler_interval: int = 50  # steps between two steps whose ranks are compared; 0: none
    # a rank that is busy so many times as long as the median rank, twice running, is pointed out
    straggler_ratio: float = 1.5

    def __post_init__(self) -> None:
        problems = below({"profile.steps": self.steps}, 1)
        problems += below(
            {
                "profile.start_step": self.start_step,
                "profile.straggler_interval": self.straggler_interval,
            },
            0,
        )
        if any(rank < 0 for rank in self.ranks):
            problems.append(f"profile.ranks={self.ranks} must be ranks, which count from 0")
        if not (math.isfinite(self.straggler_ratio) and self.straggler_ratio > 1):
            problems.append(
                f"profile.straggler_ratio={self.straggler_ratio} must be a finite number above 1"
            )
        if problems:
            raise ConfigError(*problems)


@dataclass(kw_only=True)
class PretrainConfig:
    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: EngineKind = EngineKind.megatron
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)  # with engine=deepspeed
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    fault_tolerance: FaultToleranceConfig = field(default_factory=FaultToleranceConfig)
    anomaly: AnomalyConfig = field(default_factory=AnomalyConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: TensorboardConfig = field(default_factory=TensorboardConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    run_dir: str = "runs/${model.name}"

    def __post_init__(self) -> None:
        # Hydra resolves the interpolation; a config made in Python has it resolved here
        self.run_dir = self.run_dir.replace("${model.name}", self.model.name)
        if not self.run_dir:
            raise ConfigError(
                f"run_dir= is empty; name the folder the run may write, as in "
                f"run_dir=runs/{self.model.name}"
            )

    @property
    def seq_length(self) -> int:
        """Tokens in one training sequence."""
        if self.data.seq_length is None:
            return self.model.max_position_embeddings
        return self.data.seq_length


def validate(config: PretrainConfig, world_size: int) -> RankLayout:
    """Checks what one room cannot check alone, and the layout against the number of processes.

    The answer depends on the arguments only, so all ranks come to the same one before the first
    collective. Returns the layout. Raises ConfigError with every broken rule.
    """
    layout = None
    problems: list[str] = []
    try:
        layout = RankLayout.of(config.parallel, world_size)
    except ConfigError as error:
        problems += error.problems
    problems += _tensor_parallel(config) + _pipeline_parallel(config)
    problems += _context_parallel(config) + _sequence(config)
    problems += _experts(config, layout.ranks_per_stage if layout else None)
    if layout is not None:
        problems += _batch(config, layout.data_parallel_size)
    problems += _learning_rate(config) + _profile(config, world_size) + _tensorboard(config)
    problems += _hang_timeout(config) + _best_checkpoints(config) + _law(config)
    problems += _engine(config)
    if layout is None or problems:
        raise ConfigError(*problems)
    return layout


def _engine(config: PretrainConfig) -> list[str]:
    if config.engine is EngineKind.megatron:
        return counting_for_nothing(config.deepspeed)
    launch = Launch(config.parallel, config.deepspeed, config.model.moe.num_experts)
    return not_installed() + problems_of(launch)


def _tensor_parallel(config: PretrainConfig) -> list[str]:
    model, size = config.model, config.parallel.tensor_model_parallel_size
    # with the tokenizer's vocabulary still unknown, whatever it is has to fit after padding
    multiple = model.make_vocab_size_divisible_by
    padded = padded_vocab_size(model.vocab_size or multiple, multiple)
    split = {
        f"model.num_attention_heads={model.num_attention_heads}": model.num_attention_heads,
        f"model.num_query_groups={model.query_groups}": model.query_groups,
        f"model.ffn_hidden_size={model.ffn_hidden_size}": model.ffn_hidden_size,
        f"model.make_vocab_size_divisible_by={multiple}"
        if model.vocab_size is None
        else f"the padded vocabulary of {padded}": padded,
    }
    if model.num_query_groups is None:  # as many as heads, and not typed by anyone
        del split[f"model.num_query_groups={model.query_groups}"]
    broken = [name for name, width in split.items() if width % size]
    if not broken:
        return []
    return [
        f"parallel.tensor_model_parallel_size={size} must divide {_and(broken)}; "
        f"{_which_do(_divisors(math.gcd(*split.values())))}"
    ]


def _experts(config: PretrainConfig, ranks_per_stage: int | None) -> list[str]:
    model, parallel, moe = config.model, config.parallel, config.model.moe
    ep, etp = parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size
    typed = {
        f"parallel.expert_model_parallel_size={ep}": ep,
        f"parallel.expert_tensor_parallel_size={etp}": etp,
    }
    if moe.num_experts == 0:
        split = [name for name, size in typed.items() if size > 1]
        if not split:
            return []
        return [
            f"{_and(split)} shares out experts, and {model.name} has none; use 1, or a model with "
            "experts such as +model=xmoe_tiny"
        ]
    problems = []
    if moe.num_experts % ep:
        shared_out = math.gcd(moe.num_experts, ranks_per_stage or 0)  # gcd with 0: the other
        problems.append(
            f"parallel.expert_model_parallel_size={ep} must divide model.moe.num_experts="
            f"{moe.num_experts}; {_which_do(_divisors(shared_out))}"
        )
    widths = {
        f"the width of an expert, {model.expert_ffn_hidden_size}": model.expert_ffn_hidden_size,
        f"model.hidden_size={model.hidden_size}": model.hidden_size,
    }
    broken = [name for name, width in widths.items() if width % etp]
    if broken:
        problems.append(
            f"parallel.expert_tensor_parallel_size={etp} must divide {_and(broken)}; "
            f"{_which_do(_divisors(math.gcd(*widths.values())))}"
        )
    if etp > 1 and moe.sparse_after_layer:
        problems.append(
            f"parallel.expert_tensor_parallel_size={etp} must be 1 with model.moe."
            f"sparse_after_layer={moe.sparse_after_layer}: the norms inside its experts are not "
            "split; use parallel.expert_model_parallel_size"
        )
    tp, shared = parallel.tensor_model_parallel_size, moe.shared_expert_intermediate_size
    if shared % tp:
        problems.append(
            f"parallel.tensor_model_parallel_size={tp} must divide "
            f"model.moe.shared_expert_intermediate_size={shared}; "
            f"{_which_do(_divisors(shared))}"
        )
    if tp > 1 and not parallel.sequence_parallel:
        problems.append(
            f"parallel.tensor_model_parallel_size={tp} needs parallel.sequence_parallel=true in a "
            "model with experts: every tensor-parallel rank would send the same tokens to them"
        )
    return problems


def _pipeline_parallel(config: PretrainConfig) -> list[str]:
    parallel, layers = config.parallel, config.model.num_layers
    pipeline = parallel.pipeline_model_parallel_size
    virtual = parallel.virtual_pipeline_model_parallel_size
    if layers % (pipeline * virtual):
        if virtual == 1:
            return [
                f"parallel.pipeline_model_parallel_size={pipeline} must divide "
                f"model.num_layers={layers}; {_which_do(_divisors(layers))}"
            ]
        pairs = [f"{p} x {layers // p}" for p in _divisors(layers)[1:]]
        return [
            f"parallel.pipeline_model_parallel_size={pipeline} x "
            f"parallel.virtual_pipeline_model_parallel_size={virtual} must divide "
            f"model.num_layers={layers}; at most {_and(pairs, 'or')}, or divisors of these"
        ]
    local = layers // (pipeline * virtual)
    group = parallel.recompute_num_layers
    if parallel.recompute_granularity is RecomputeGranularity.full and local % group:
        return [
            f"parallel.recompute_num_layers={group} must divide the {local} layers of one "
            f"pipeline stage; {_which_do(_divisors(local))}"
        ]
    return []


def _context_parallel(config: PretrainConfig) -> list[str]:
    model, parallel = config.model, config.parallel
    size, tensor = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    if size == 1:
        return []
    problems = []
    if config.data.packing.reset_attention:
        problems.append(
            f"data.packing.reset_attention=true needs parallel.context_parallel_size=1, not {size}:"
            " a document that lies on several ranks cannot be told from its neighbours yet; use "
            "that, or data.packing.reset_attention=false"
        )
    shared = math.gcd(model.num_attention_heads, model.query_groups)
    if parallel.cp_comm_type is not ContextParallelComm.a2a or shared % tensor:
        return problems  # if the tensor size does not fit, it has been told
    heads = {f"model.num_attention_heads={model.num_attention_heads}": model.num_attention_heads}
    if model.num_query_groups is not None:
        heads[f"model.num_query_groups={model.query_groups}"] = model.query_groups
    broken = [name for name, count in heads.items() if count // tensor % size]
    if broken:
        problems.append(
            f"parallel.context_parallel_size={size} must divide {_and(broken)}"
            + (f" over parallel.tensor_model_parallel_size={tensor}" if tensor > 1 else "")
            + " under parallel.cp_comm_type=a2a, which shares out the heads; "
            f"{_which_do(_divisors(shared // tensor))}, or use parallel.cp_comm_type=all_gather"
        )
    return problems


def _sequence(config: PretrainConfig) -> list[str]:
    length, longest = config.seq_length, config.model.max_position_embeddings
    typed = f"data.seq_length={length}"
    problems = []
    if length > longest:
        problems.append(
            f"{typed} must not exceed model.max_position_embeddings={longest}; use {longest} or "
            "less, or a model made for longer sequences"
        )
    unit, factors = 1, []
    if config.parallel.context_parallel_size > 1:
        unit *= 2 * config.parallel.context_parallel_size  # each rank holds two chunks
        factors.append(f"2 x parallel.context_parallel_size={unit // 2}")
    if config.parallel.sequence_parallel:
        unit *= config.parallel.tensor_model_parallel_size
        factors.append(
            f"parallel.tensor_model_parallel_size={config.parallel.tensor_model_parallel_size} "
            "under parallel.sequence_parallel=true"
        )
    if length % unit:
        fits = _neighbours(length, unit)
        if length >= unit and (length // unit + 1) * unit > longest:
            fits = f"{length // unit * unit}"
        problems.append(f"{typed} must be a multiple of {' x '.join(factors)}; use {fits}")
    return problems


def _batch(config: PretrainConfig, data_parallel_size: int) -> list[str]:
    train, parallel = config.train, config.parallel
    unit = train.micro_batch_size * data_parallel_size
    product = (
        f"train.micro_batch_size={train.micro_batch_size} x data-parallel size {data_parallel_size}"
    )
    if parallel.virtual_pipeline_model_parallel_size > 1:
        # megatron-core's interleaved schedule moves groups of as many micro-batches as stages
        unit *= parallel.pipeline_model_parallel_size
        product += (
            f" x parallel.pipeline_model_parallel_size={parallel.pipeline_model_parallel_size} "
            "(interleaved stages take micro-batches in groups of that many)"
        )
    if train.global_batch_size % unit == 0:
        return []
    return [
        f"train.global_batch_size={train.global_batch_size} must be a multiple of {product} = "
        f"{unit}; use {_neighbours(train.global_batch_size, unit)}"
    ]


def _learning_rate(config: PretrainConfig) -> list[str]:
    schedule, steps, lr = config.schedule, config.train.train_steps, config.optimizer.lr
    problems = []
    if schedule.lr_warmup_steps > steps:
        problems.append(
            f"schedule.lr_warmup_steps={schedule.lr_warmup_steps} must not exceed "
            f"train.train_steps={steps}; use {steps} or less, such as {steps // 10}"
        )
    if schedule.min_lr > lr:
        problems.append(
            f"schedule.min_lr={schedule.min_lr} must not exceed optimizer.lr={lr}; use {lr / 10:g}"
        )
    return problems


def _law(config: PretrainConfig) -> list[str]:
    law = config.data.mixture.law
    if not law:
        return []
    from data.mixture_law import open_law  # imports numpy, which runs without a law need later

    try:
        open_law(law)
    except ValueError as error:
        return [str(error)]
    return []


def _best_checkpoints(config: PretrainConfig) -> list[str]:
    best, save = config.checkpoint.keep_best, config.checkpoint.save_interval
    evaluate = config.train.eval_interval
    if best == 0 or save == 0 or (evaluate and save % evaluate == 0):
        return []
    use = f"train.eval_interval={save}, or a divisor of that"
    if evaluate:
        use = f"checkpoint.save_interval={_neighbours(save, evaluate)}"
    return [
        f"checkpoint.keep_best={best} compares what is evaluated in the step it is saved: "
        f"checkpoint.save_interval={save} must be a multiple of train.eval_interval={evaluate}; "
        f"use {use}"
    ]


def _hang_timeout(config: PretrainConfig) -> list[str]:
    hang = config.fault_tolerance.hang_timeout_seconds
    collective = config.parallel.collective_timeout_seconds
    if FIRST_STEP_ALLOWANCE * hang < collective:
        return []
    return [
        f"fault_tolerance.hang_timeout_seconds={hang:g}, times {FIRST_STEP_ALLOWANCE:g} in the "
        f"first step, must be below parallel.collective_timeout_seconds={collective:g}, or the "
        "collective gives up before anyone has said which rank is behind; use "
        f"{collective / (FIRST_STEP_ALLOWANCE + 1):g}, or a longer timeout there"
    ]


def _profile(config: PretrainConfig, world_size: int) -> list[str]:
    beyond = [rank for rank in config.profile.ranks if rank >= world_size]
    if not beyond:
        return []
    return [
        f"profile.ranks={config.profile.ranks} names rank {beyond[0]}, but the run has ranks 0 to "
        f"{world_size - 1}; use some of these"
    ]


def _tensorboard(config: PretrainConfig) -> list[str]:
    if not config.tensorboard.enabled or find_spec("tensorboard") is not None:
        return []
    return [
        "tensorboard.enabled=true needs the package tensorboard, which is not installed; install "
        "magnetron[tensorboard], or use tensorboard.enabled=false (metrics.jsonl has all numbers)"
    ]


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _neighbours(number: int, unit: int) -> str:
    """The multiples of `unit` on both sides of `number`."""
    below, above = number // unit * unit, (number // unit + 1) * unit
    return f"{below} or {above}" if below else f"{above}"


def _which_do(numbers: list[int]) -> str:
    return "only 1 does" if numbers == [1] else f"{_and([str(n) for n in numbers])} do"


def _and(words: list[str], conjunction: str = "and") -> str:
    return f" {conjunction} ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)

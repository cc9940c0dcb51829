"""The root of the configuration; the rules that cross rooms are in pretrain/config_rules.py.

Imports neither torch nor megatron-core.
"""

import math
import os
from dataclasses import dataclass, field
from enum import Enum

from data.config import DataConfig
from models.config import ModelConfig
from parallel.config import (
    ConfigError,
    OptimizerConfig,
    ParallelConfig,
    below,
    not_positive,
)
from parallel.deepspeed_config import DeepSpeedConfig, EngineKind
from pretrain.walltime import grace_problem


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

    lr_warmup_steps: int = 0  # steps over which the rate rises from 0 to optimizer.lr
    lr_decay_style: DecayStyle = DecayStyle.cosine  # how it falls from there to min_lr
    lr_decay_steps: int | None = None  # None: train_steps
    min_lr: float = 0.0  # where the decay ends

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
    train_steps: int = 1000  # optimizer steps of the run, from its first start on
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
        if self.seed >= 2**63:
            # torch takes numbers below 2^64; to this one ranks add what tells them apart
            problems.append(
                f"train.seed={self.seed} must be below 2^63 = {2**63}; use a number such as 1234"
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
    resume: Resume = Resume.auto  # what to do with checkpoints that the run folder holds
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

    def is_regular(self, step: int) -> bool:
        """Whether `step` is saved whatever happens to the run. A signal, the end of the time or of
        the run and a save that failed add saves of other steps."""
        return self.save_interval > 0 and step % self.save_interval == 0


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
    # seconds kept free before that end besides what a step and a save were measured to take; the
    # save that ends a run is tried again for as long, where the end leaves it
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
                setting = "fault_tolerance.walltime"
                too_long = grace_problem(self.grace_seconds, setting, self.walltime)
                problems += [too_long] if too_long and math.isfinite(self.grace_seconds) else []
            except ValueError as error:
                problems.append(f"fault_tolerance.walltime={self.walltime} {error}")
        if not (math.isfinite(self.grace_seconds) and self.grace_seconds >= 0):
            problems.append(
                f"fault_tolerance.grace_seconds={self.grace_seconds} must be 0 or a finite number "
                "above"
            )
        if problems:
            raise ConfigError(*problems)

    def ends_alone_after(self, world_size: int) -> float:
        """Seconds after which a rank that is cut off from the others has ended by itself; a rank
        that is alone does not notice."""
        if world_size == 1:
            return math.inf
        return self.heartbeat_timeout_seconds + self.heartbeat_interval_seconds + 5.0


@dataclass(kw_only=True)
class AnomalyConfig:
    """Steps whose loss or gradient is not finite, or far above those before (docs/anomalies.md)."""

    # what a step does whose loss or gradient is NaN or infinite
    on_nonfinite: OnNonfinite = OnNonfinite.skip
    # what a step does whose loss or gradient stands far above those before
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

    @property
    def rolls_back(self) -> bool:
        """Whether anything makes the run go back to a checkpoint."""
        return OnNonfinite.rollback is self.on_nonfinite or OnSpike.rollback is self.on_spike


@dataclass(kw_only=True)
class WandbConfig:
    mode: WandbMode = WandbMode.auto  # whether Weights & Biases records the run
    project: str = "magnetron"  # of Weights & Biases
    entity: str | None = None  # user or team; null: the account's own
    group: str | None = None  # runs that belong together
    tags: list[str] = field(default_factory=list)  # of the run


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
    engine: EngineKind = EngineKind.megatron  # megatron-core, or DeepSpeed (docs/engines.md)
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
    # everything a run writes goes there; on several nodes all must see it
    run_dir: str = "runs/${model.name}"

    def __post_init__(self) -> None:
        # Hydra resolves the interpolation; a config made in Python has it resolved here
        self.run_dir = self.run_dir.replace("${model.name}", self.model.name)
        # not every shell does this behind "="
        self.run_dir = os.path.expanduser(self.run_dir)
        self.checkpoint.load = os.path.expanduser(self.checkpoint.load)
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

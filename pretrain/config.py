"""The root of the configuration, and the rules that cross rooms.

Imports neither torch nor megatron-core.
"""

from dataclasses import dataclass, field
from enum import Enum

from data.config import DataConfig
from models.config import ModelConfig
from parallel.config import OptimizerConfig, ParallelConfig


class DecayStyle(Enum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class Resume(Enum):
    auto = "auto"  # from the newest complete checkpoint of the run folder, if there is one
    never = "never"  # refuse a run folder that holds checkpoints
    required = "required"  # refuse a run folder that holds none


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


@dataclass(kw_only=True)
class TrainConfig:
    train_steps: int = 1000
    micro_batch_size: int = 1  # sequences in one forward pass of one data-parallel rank
    global_batch_size: int = 8  # sequences in one optimizer step
    seed: int = 1234  # of the initial weights and of dropout
    log_interval: int = 1  # steps
    eval_interval: int = 100  # steps; 0: only at the start and the end
    eval_sequences: int = 64  # validation sequences per language, at most


@dataclass(kw_only=True)
class CheckpointConfig:
    save_interval: int = 500  # steps; 0: only at the end and on a signal
    keep_last: int = 3  # older checkpoints are removed; 0 keeps all
    resume: Resume = Resume.auto
    load: str = ""  # another run's checkpoint folder to start from (weights and optimizer)


@dataclass(kw_only=True)
class WandbConfig:
    mode: WandbMode = WandbMode.auto
    project: str = "magnetron"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class PretrainConfig:
    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    run_dir: str = "runs/${model.name}"

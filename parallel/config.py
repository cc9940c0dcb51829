"""Settings of the parallel room: how many ranks along which axis, which precision and optimizer.

Imports neither torch nor megatron-core, so that a launch can be checked in well under a second.
"""

import math
from dataclasses import dataclass
from enum import Enum

# How many times longer than others the first step of a start may take before it counts as a hang:
# kernels are compiled, communicators connect, memory is allocated, data comes from a cold disk.
FIRST_STEP_ALLOWANCE = 2.0


class ConfigError(ValueError):
    """Broken rules of a configuration, one a line; `problems` holds the lines.

    Every class of settings checks its own rules in `__post_init__`, collects what it finds and
    raises once. A line names the setting as it is typed on the command line, its value, the rule,
    and a value that works.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def below(settings: dict[str, float], minimum: int) -> list[str]:
    """One line for each whole number in `settings` (as typed -> value) that is below `minimum`."""
    return [
        f"{name}={value} must be {minimum} or more"
        for name, value in settings.items()
        if value < minimum
    ]


def not_positive(settings: dict[str, float]) -> list[str]:
    """One line for each number in `settings` (as typed -> value) that is not finite and above 0."""
    return [
        f"{name}={value} must be a finite number above 0"
        for name, value in settings.items()
        if not (math.isfinite(value) and value > 0)
    ]


class Precision(Enum):
    """Type of parameters and activations; gradients are always accumulated in fp32."""

    auto = "auto"  # bf16 where CUDA is present, fp32 elsewhere
    fp32 = "fp32"
    bf16 = "bf16"  # bf16 parameters, fp32 main gradients, fp32 master weights and moments


class RecomputeGranularity(Enum):
    """Which activations are recomputed in the backward pass instead of being stored."""

    none = "none"
    selective = "selective"  # the core attention only
    full = "full"  # whole transformer layers


class CompileElementwise(Enum):
    """Whether activations, RMSNorms on a CPU, residuals and sharded norms go through torch.compile
    (parallel/compiled.py)."""

    auto = "auto"  # on a GPU where Triton is installed and compiles, not on a CPU
    always = "always"  # or the run does not start
    never = "never"


class SubLayerNormReduction(Enum):
    """Where a sub-LayerNorm over a sharded width has its full-width statistics from."""

    folded = "folded"  # ride as extra columns on the row-parallel layer's own reduction
    all_reduce = "all_reduce"  # an all-reduce of their own


class TokenDispatcher(Enum):
    """How tokens reach the rank of their expert."""

    alltoall = "alltoall"  # each token travels to the ranks it is for
    allgather = "allgather"  # every token to every expert-parallel rank


class ContextParallelComm(Enum):
    """How attention sees the whole sequence when ranks hold parts of it."""

    all_gather = "all_gather"  # keys and values of all ranks on each; any number of heads
    a2a = "a2a"  # Ulysses (arXiv 2309.14509): sequence sharding becomes head sharding


@dataclass(kw_only=True)
class ParallelConfig:
    """Sizes along each parallel axis, in megatron-core's words.

    The data-parallel size is not a setting: it is the world size divided by the product of
    tensor-, context- and pipeline-parallel sizes; likewise the expert-data-parallel size.
    """

    tensor_model_parallel_size: int = 1  # ranks that share each matrix
    pipeline_model_parallel_size: int = 1  # groups of consecutive layers, one after the other
    # model chunks on each pipeline rank; above 1 selects the interleaved 1F1B schedule
    virtual_pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1  # ranks that share each sequence
    cp_comm_type: ContextParallelComm = ContextParallelComm.all_gather
    # Experts are laid out anew over the ranks of a pipeline stage, whatever the tensor, context and
    # data axes do with the dense layers there: expert-tensor x expert-model x expert-data.
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int = 1  # ranks that share each expert's matrices
    moe_token_dispatcher_type: TokenDispatcher = TokenDispatcher.alltoall
    # shard activations outside the tensor-parallel matmuls along the sequence
    sequence_parallel: bool = False
    # ZeRO-1: shard optimizer state over the data-parallel ranks
    use_distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False  # reduce gradients while others are computed
    overlap_param_gather: bool = False  # gather parameters while earlier layers compute
    sub_layernorm_reduction: SubLayerNormReduction = SubLayerNormReduction.folded
    recompute_granularity: RecomputeGranularity = RecomputeGranularity.none
    # layers per recomputed group; only with recompute_granularity=full
    recompute_num_layers: int = 1
    precision: Precision = Precision.auto
    # whether chains of elementwise operations are compiled into one kernel each
    compile_elementwise: CompileElementwise = CompileElementwise.auto
    # seconds every rank has to reach each start-up stage before the missing ones are named
    startup_timeout_seconds: float = 300.0
    # Seconds one collective may take during training; the last resort, behind the heartbeat and
    # the hang watchdog, which say who is missing (fault_tolerance.hang_timeout_seconds).
    collective_timeout_seconds: float = 1800.0

    def __post_init__(self) -> None:
        """Raises ConfigError for what is wrong whatever the model and the world size."""
        tensor = self.tensor_model_parallel_size
        pipeline = self.pipeline_model_parallel_size
        virtual = self.virtual_pipeline_model_parallel_size
        problems = below(
            {
                "parallel.tensor_model_parallel_size": tensor,
                "parallel.pipeline_model_parallel_size": pipeline,
                "parallel.virtual_pipeline_model_parallel_size": virtual,
                "parallel.context_parallel_size": self.context_parallel_size,
                "parallel.expert_model_parallel_size": self.expert_model_parallel_size,
                "parallel.expert_tensor_parallel_size": self.expert_tensor_parallel_size,
                "parallel.recompute_num_layers": self.recompute_num_layers,
            },
            1,
        )
        problems += not_positive(
            {
                "parallel.startup_timeout_seconds": self.startup_timeout_seconds,
                "parallel.collective_timeout_seconds": self.collective_timeout_seconds,
            }
        )
        if self.sequence_parallel and tensor == 1:
            problems.append(
                "parallel.sequence_parallel=true splits the sequence over the tensor-parallel "
                "ranks, and parallel.tensor_model_parallel_size=1 has only one; use 2 or more, "
                "or parallel.sequence_parallel=false"
            )
        if virtual > 1 and pipeline == 1:
            problems.append(
                f"parallel.virtual_pipeline_model_parallel_size={virtual} interleaves pipeline "
                "stages, and parallel.pipeline_model_parallel_size=1 has only one; use 2 or more, "
                "or parallel.virtual_pipeline_model_parallel_size=1"
            )
        if self.overlap_param_gather and not self.use_distributed_optimizer:
            problems.append(
                "parallel.overlap_param_gather=true gathers what the distributed optimizer has "
                "sharded; it needs parallel.use_distributed_optimizer=true, not false"
            )
        if self.overlap_param_gather and not self.overlap_grad_reduce:
            problems.append(
                "parallel.overlap_param_gather=true needs parallel.overlap_grad_reduce=true, not "
                "false: both hang on the same buckets"
            )
        if self.recompute_num_layers > 1 and self.recompute_granularity != (
            RecomputeGranularity.full
        ):
            problems.append(
                f"parallel.recompute_num_layers={self.recompute_num_layers} counts only with "
                "parallel.recompute_granularity=full, not "
                f"{self.recompute_granularity.value}; use 1, or recompute in full"
            )
        if problems:
            raise ConfigError(*problems)


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019); weight decay skips biases and norms."""

    lr: float = 1e-3  # peak learning rate
    weight_decay: float = 0.1  # decoupled, times the learning rate
    adam_beta1: float = 0.9  # of the mean of gradients
    adam_beta2: float = 0.98  # of the mean of their squares
    adam_eps: float = 1e-8  # added to the root of the second moment
    clip_grad: float = 1.0  # global gradient norm; 0 switches clipping off

    def __post_init__(self) -> None:
        """Raises ConfigError where AdamW's formula has no meaning."""
        problems = not_positive({"optimizer.lr": self.lr, "optimizer.adam_eps": self.adam_eps})
        for name, value in {
            "optimizer.weight_decay": self.weight_decay,
            "optimizer.clip_grad": self.clip_grad,
        }.items():
            if not (math.isfinite(value) and value >= 0):
                problems.append(f"{name}={value} must be 0 or a finite number above")
        for name, value in {
            "optimizer.adam_beta1": self.adam_beta1,
            "optimizer.adam_beta2": self.adam_beta2,
        }.items():
            if not 0 <= value < 1:
                problems.append(f"{name}={value} must be at least 0 and below 1, as in 0.9")
        if problems:
            raise ConfigError(*problems)

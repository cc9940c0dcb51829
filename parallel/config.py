"""Settings of the parallel room: how many ranks along which axis, in which precision, with which optimizer.

Imports neither torch nor megatron-core, so that a launch can be checked in well under a second.
"""

from dataclasses import dataclass
from enum import Enum


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


class SubLayerNormReduction(Enum):
    """How a sub-LayerNorm over a tensor-parallel-sharded width obtains its full-width statistics."""

    folded = "folded"  # ride as extra columns on the row-parallel layer's own reduction
    all_reduce = "all_reduce"  # an all-reduce of their own


@dataclass(kw_only=True)
class ParallelConfig:
    """Sizes along each parallel axis, in megatron-core's words.

    The data-parallel size is not a setting: it is the world size divided by the product of
    tensor-, context- and pipeline-parallel sizes.
    """

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    # model chunks on each pipeline rank; above 1 selects the interleaved 1F1B schedule
    virtual_pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    # shard activations outside the tensor-parallel matmuls along the sequence
    sequence_parallel: bool = False
    # ZeRO-1: shard optimizer state over the data-parallel ranks
    use_distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    sub_layernorm_reduction: SubLayerNormReduction = SubLayerNormReduction.folded
    recompute_granularity: RecomputeGranularity = RecomputeGranularity.none
    # layers per recomputed group; only with recompute_granularity=full
    recompute_num_layers: int = 1
    precision: Precision = Precision.auto
    # seconds every rank has to reach each start-up stage before the missing ones are named
    startup_timeout_seconds: float = 300.0
    # seconds one collective may take during training
    collective_timeout_seconds: float = 600.0


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019); weight decay skips biases and norms."""

    lr: float = 1e-3  # peak learning rate
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.98
    adam_eps: float = 1e-8
    clip_grad: float = 1.0  # global gradient norm; 0 switches clipping off

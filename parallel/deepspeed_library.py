"""DeepSpeed itself: imported here, when it is chosen and not before, and told of our groups.

It keeps process groups and its backend in module globals. Pinned to the version in constraints.txt;
tests/parallel/test_deepspeed_engine.py fails where a newer one has moved what is used here.
"""

from __future__ import annotations

import os
import warnings
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from parallel import cpu_bridge
from parallel.config import OptimizerConfig
from parallel.deepspeed_config import DeepSpeedConfig
from parallel.runtime import Runtime


def library() -> ModuleType:
    """The package deepspeed, imported (about 2.5 s) without a compilation and without a word.

    On a CPU it would otherwise compile a library of shared-memory collectives for over a minute at
    the first start; these are gloo's here.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with cpu_bridge.fast_import(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        deepspeed = import_module("deepspeed")
        # Muon is not used here; its module would be imported later, and torch's compiler with it
        for name in ("moe.layer", "runtime.zero.stage3", "runtime.zero.muon.muon_optimizer"):
            import_module(f"deepspeed.{name}")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def forget_earlier_engines(deepspeed: ModuleType) -> None:
    """What DeepSpeed keeps of engines before this one, in a process that makes several: groups that
    are gone, and numbers of modules and parameters that ranks with another past do not have."""
    zero = deepspeed.runtime.zero
    zero.partition_parameters.Init.param_id = 0
    zero.parameter_offload.FWD_MODULE_STACK.clear()
    register = zero.parameter_offload.DeepSpeedZeRoOffload._register_deepspeed_module
    register.__defaults__[0][0] = 0  # the number of the next module
    groups = deepspeed.utils.groups
    deepspeed.comm.comm.cdb = None
    groups.mpu = groups._WORLD_GROUP = groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    for name in ("_EXPERT_PARALLEL_GROUP", "_EXPERT_DATA_PARALLEL_GROUP"):
        getattr(groups, name).clear()
        getattr(groups, f"{name}_RANKS").clear()


class ModelParallelUnit:
    """The groups of this run in the words that DeepSpeed asks for them ("mpu")."""

    def __init__(self, runtime: Runtime) -> None:
        self._tensor, self._data = runtime.groups.tp, runtime.groups.dp_cp

    def get_model_parallel_group(self) -> Any:
        return self._tensor

    def get_model_parallel_rank(self) -> int:
        return self._tensor.rank()

    def get_model_parallel_world_size(self) -> int:
        return self._tensor.size()

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_tensor_model_parallel_src_rank(self) -> int:
        return dist.get_process_group_ranks(self._tensor)[0]

    def get_data_parallel_group(self) -> Any:
        return self._data

    def get_data_parallel_rank(self) -> int:
        return self._data.rank()

    def get_data_parallel_world_size(self) -> int:
        return self._data.size()

    def get_pipeline_model_parallel_rank(self) -> int:
        return 0

    def get_pipeline_model_parallel_world_size(self) -> int:
        return 1

    get_pipe_parallel_rank = get_pipeline_model_parallel_rank
    get_pipe_parallel_world_size = get_pipeline_model_parallel_world_size


def adam(
    deepspeed: ModuleType,
    groups: list[dict[str, Any]],
    optimizer: OptimizerConfig,
    settings: DeepSpeedConfig,
) -> torch.optim.Optimizer:
    """AdamW over parameter groups that say their weight decay themselves.

    Raises RuntimeError where DeepSpeed's own is asked for and cannot be compiled.
    """
    arguments: dict[str, Any] = {
        "lr": optimizer.lr,
        "betas": (optimizer.adam_beta1, optimizer.adam_beta2),
        "eps": optimizer.adam_eps,
    }
    if not settings.native_adam:
        # it counts updates by tensor; ZeRO-3 calls it once for each part of a group
        return torch.optim.AdamW(groups, fused=True, **arguments)
    try:
        if settings.offload_optimizer or not torch.cuda.is_available():
            return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **arguments)
        return deepspeed.ops.adam.FusedAdam(groups, adam_w_mode=True, **arguments)
    except Exception as error:
        raise RuntimeError(
            f"deepspeed.native_adam=true: DeepSpeed's Adam cannot be compiled here: {error}. It "
            "needs a C++ compiler and ninja, and nvcc on a GPU; use deepspeed.native_adam=false"
        ) from error


def configuration(settings: DeepSpeedConfig, *, bf16: bool, elements: int) -> dict[str, Any]:
    """Ours in DeepSpeed's words. elements: of all parameters of a rank.

    Division, clipping and the norm are not DeepSpeed's (parallel.deepspeed_engine), and what it is
    told about batches decides about nothing.
    """
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    zero: dict[str, Any] = {
        "stage": settings.zero_stage,
        "overlap_comm": settings.overlap_comm,
        # a buffer of that size is allocated
        "reduce_bucket_size": min(settings.reduce_bucket_size, elements),
    }
    if settings.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = settings.param_persistence_threshold
    if settings.offload_optimizer:
        zero["offload_optimizer"] = host
    if settings.offload_parameters:
        zero["offload_param"] = host
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "bf16": {"enabled": bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
    }

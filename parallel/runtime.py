"""Start-up in named stages, and its end.

Every rank passes the same stages in the same order:

    rendezvous              reach the store at MASTER_ADDR:MASTER_PORT, then pick the device
    process group           torch.distributed.init_process_group
    model-parallel groups   megatron-core's groups along every axis
    first collective        one all-reduce over all ranks

How they wait for each other at the door of each: parallel/startup.py.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import platform
import sys
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version

import torch
import torch.distributed as dist

from parallel.config import ParallelConfig
from parallel.megatron import ProcessGroupCollection, parallel_state, tensor_parallel
from parallel.rank_layout import RankLayout
from parallel.startup import FAREWELL_SECONDS, Place, Stages, StartupError, wait


@dataclass(frozen=True)
class Runtime:
    """This process among the others: who it is, where it computes, and its groups.

    Ranks along an axis count from 0; `groups` holds megatron-core's process groups (`groups.tp`,
    `groups.pp`, `groups.dp`, `groups.dp_cp`, ...). `store` is a key-value store all ranks share.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    backend: str  # "nccl" or "gloo"
    groups: ProcessGroupCollection
    tensor_parallel_rank: int
    tensor_parallel_size: int
    pipeline_parallel_rank: int
    pipeline_parallel_size: int
    context_parallel_rank: int
    context_parallel_size: int
    data_parallel_rank: int
    data_parallel_size: int
    store: dist.Store
    startup_seconds: dict[str, float]  # time spent in each stage, waiting included
    owns_process_group: bool  # False: the default process group was there before `initialize`
    hosts_store: bool

    @property
    def is_first_pipeline_stage(self) -> bool:
        return self.pipeline_parallel_rank == 0

    @property
    def is_last_pipeline_stage(self) -> bool:
        return self.pipeline_parallel_rank == self.pipeline_parallel_size - 1

    def describe(self) -> str:
        """One line for the log: world, layout, device, backend, versions, start-up time."""
        device = str(self.device)
        if self.device.type == "cuda":
            device += f" ({torch.cuda.get_device_name(self.device)})"
        return (
            f"rank {self.rank} of {self.world_size} on {platform.node()}:"
            f" tensor {self.tensor_parallel_size} x pipeline {self.pipeline_parallel_size}"
            f" x context {self.context_parallel_size} x data {self.data_parallel_size}"
            f"{self._experts()},"
            f" {device}, {self.backend}, torch {torch.__version__},"
            f" megatron-core {version('megatron-core')},"
            f" start-up {sum(self.startup_seconds.values()):.2f} s"
        )

    def _experts(self) -> str:
        sizes = self.groups.expt_tp.size(), self.groups.ep.size(), self.groups.expt_dp.size()
        if sizes[:2] == (1, 1):
            return ""
        return " (experts: tensor {} x expert {} x data {})".format(*sizes)


_current: Runtime | None = None


def initialize(config: ParallelConfig, seed: int) -> Runtime:
    """Connect this process with all others and build megatron-core's groups. All ranks call it.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as torchrun sets them;
    without RANK it runs alone, as a world of one. A default process group that already exists is
    used, and left alone by `shutdown`.

    Seeds as Megatron-LM does: torch with `seed + 100 * pipeline rank`, and megatron-core's
    tracker on top of it, so that dropout inside tensor-parallel regions differs between
    tensor-parallel ranks. Data-parallel replicas share their seed.

    In the healthy case the door of a stage costs each rank one write, one counter and one wait in
    the store: measured on 2 cores, 0.14 ms for 2 ranks, 3 ms for 8 and 6 ms for 64. Rank 0 looks
    ranks up one by one at the first door, until all have come; at the others a single rank does
    so, after a timeout. Slow starts have another
    cause: TCPStore looks the name of each peer up in reverse DNS, and a nameserver that does not
    answer costs 5 s each time.

    Raises:
        ConfigError: the world size is not a multiple of tensor x pipeline x context sizes.
        StartupTimeout: ranks are missing after `config.startup_timeout_seconds` at a stage, or
            the store cannot be reached. Every rank that arrived raises it at the same moment.
        StartupError: the environment is incomplete, a rank failed inside a stage (all ranks
            raise, with that rank's error), or the host of the store has gone.

    A stage that hangs inside torch or NCCL cannot be interrupted from Python: after the same
    timeout the process prints what StartupTimeout would say, its stack, and exits with code 1.
    After any failure the interpreter leaves by `os._exit(1)`, since the destructors of half-built
    process groups may wait for ranks that will never answer.
    """
    global _current
    if _current is not None:
        raise StartupError(
            "parallel.runtime.initialize was called twice; call shutdown(runtime) before"
            " starting again."
        )
    owns_process_group = not dist.is_initialized()
    if owns_process_group:
        place = Place.from_environment(dict(os.environ))
    else:
        place = Place.from_process_group()
    RankLayout.of(config, place.world_size)  # refuses a world that does not divide
    stages = Stages(config, place)
    try:
        with stages.rendezvous():
            device = _choose_device(place.local_rank, torch.cuda.device_count())
        with stages.stage("process group"):
            if owns_process_group:
                _connect_all(config, place, device, stages.store)
        with stages.stage("model-parallel groups"):
            _make_model_parallel_groups(config)
        with stages.stage("first collective"):
            _first_collective(place, device)
    except BaseException:
        leave_hard_at_exit()
        raise
    _seed(seed)
    _current = _runtime(place, device, stages, owns_process_group)
    return _current


def shutdown(runtime: Runtime) -> None:
    """Take the groups down at the end of a healthy run. All ranks call it; again does nothing.

    The rank that hosts the store waits up to 5 s for the others to let go of it. After an error
    do not call it: ranks that are stuck in a collective would keep this one waiting.
    """
    global _current
    if runtime is not _current:
        return
    _current = None
    _drop_model_parallel_groups()
    if not runtime.owns_process_group:
        return
    dist.destroy_process_group()
    # a store that has already gone is nothing to complain about at the end
    with contextlib.suppress(dist.DistError):
        if runtime.store.add("shutdown/count", 1) == runtime.world_size:
            runtime.store.set("shutdown/all", "")
        elif runtime.hosts_store:
            wait(runtime.store, "shutdown/all", FAREWELL_SECONDS)


def _drop_model_parallel_groups() -> None:
    parallel_state.destroy_model_parallel()
    # megatron-core 0.16.1 forgets these two, and with them their gloo threads, which abort a
    # process forked later
    parallel_state._INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP = None
    parallel_state._INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP_GLOO = None


def _connect_all(
    config: ParallelConfig, place: Place, device: torch.device, store: dist.Store
) -> None:
    dist.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("process_group", store),
        rank=place.rank,
        world_size=place.world_size,
        timeout=timedelta(seconds=config.collective_timeout_seconds),
    )


def _make_model_parallel_groups(config: ParallelConfig) -> None:
    virtual = config.virtual_pipeline_model_parallel_size
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        # 1 is not "off" to megatron-core: it refuses any number without a pipeline
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        context_parallel_size=config.context_parallel_size,
        expert_model_parallel_size=config.expert_model_parallel_size,
        expert_tensor_parallel_size=config.expert_tensor_parallel_size,
        distributed_timeout_minutes=config.collective_timeout_seconds / 60,
    )


def _seed(seed: int) -> None:
    of_stage = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(of_stage)
    tensor_parallel.model_parallel_cuda_manual_seed(of_stage)


def _runtime(
    place: Place, device: torch.device, stages: Stages, owns_process_group: bool
) -> Runtime:
    return Runtime(
        rank=place.rank,
        world_size=place.world_size,
        local_rank=place.local_rank,
        device=device,
        backend=dist.get_backend(),
        groups=ProcessGroupCollection.use_mpu_process_groups(),
        tensor_parallel_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_parallel_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        context_parallel_rank=parallel_state.get_context_parallel_rank(),
        context_parallel_size=parallel_state.get_context_parallel_world_size(),
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        store=stages.store,
        startup_seconds=stages.seconds,
        owns_process_group=owns_process_group,
        hosts_store=place.hosts_store,
    )


def _choose_device(local_rank: int, cuda_devices: int) -> torch.device:
    if cuda_devices == 0:
        return torch.device("cpu")
    if local_rank >= cuda_devices:
        raise StartupError(
            f"LOCAL_RANK={local_rank}, but this host shows {cuda_devices} CUDA device(s): start at"
            f" most {cuda_devices} process(es) a host (torchrun --nproc-per-node {cuda_devices}),"
            f" or widen CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', '(unset)')}."
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _first_collective(place: Place, device: torch.device) -> None:
    total = torch.ones((), dtype=torch.int64, device=device)
    dist.all_reduce(total)
    # .item() waits for the device; an answer other than the world size means a broken network
    if total.item() != place.world_size:
        raise StartupError(
            f"the sum of 1 over {place.world_size} ranks came out as {total.item()}: collectives"
            " on this network cannot be trusted."
        )


def leave_hard_at_exit() -> None:
    """Have the interpreter end by `os._exit(1)` once everything is written, without destructors."""

    def leave() -> None:
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(1)

    atexit.register(leave)

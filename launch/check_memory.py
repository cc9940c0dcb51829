"""Whether the run fits a device's memory, as models/memory.py predicts it."""

from collections.abc import Iterator
from dataclasses import replace

from launch.findings import Findings
from launch.nearest_layout import words_between
from parallel.config import ConfigError, RecomputeGranularity
from parallel.deepspeed_config import EngineKind
from parallel.rank_layout import RankLayout
from pretrain.config import PretrainConfig, validate
from pretrain.memory import device_memory_bytes, predict_memory_of_run, worst_memory_of_run

TOPIC = "memory"
# Of a device's memory, what CUDA, NCCL and fragmentation leave to a program.
USABLE = 0.92
_GIB = 2**30


def check_memory(
    config: PretrainConfig,
    processes: int,
    vocab_size: int | None,
    device: str | None,
    findings: Findings,
) -> None:
    """Notes what is predicted; warns where it is more than `device` has.

    config: legal on so many processes. device: a name, or a size as in 80GiB; None: not said.
    """
    if vocab_size is None and config.model.vocab_size is None:
        return
    if config.engine is not EngineKind.megatron:
        findings.notes(TOPIC, [f"engine={config.engine.value}: memory is not predicted"])
        return
    config = _shortened(config, processes)
    peak = predict_memory_of_run(config, processes, vocab_size=vocab_size).peak
    findings.notes(
        TOPIC,
        [
            f"a GPU of pipeline stage {peak.stage} needs {_gib(peak.total)} at its peak, in "
            f"{peak.moment}: {_gib(peak.parameters)} of parameters, {_gib(peak.gradients)} of "
            f"gradients, {_gib(peak.optimizer)} of optimizer, {_gib(peak.activations)} of "
            f"activations, {_gib(peak.total - _kept(peak))} of the rest"
        ],
    )
    if device is None:
        return
    try:
        room = int(USABLE * device_memory_bytes(device))
    except ValueError as error:
        findings.errors(TOPIC, [f"--device {device}: {error}"])
        return
    if peak.total > room:
        findings.warnings(
            TOPIC,
            [
                f"{_gib(peak.total)} are predicted for a GPU of pipeline stage {peak.stage}, in "
                f"{peak.moment}, and --device {device} leaves {_gib(room)}: "
                + _way_out(config, processes, vocab_size, room)
            ],
        )
        return
    worst = worst_memory_of_run(config, processes, vocab_size=vocab_size).peak.total
    if worst > room:
        findings.warnings(
            TOPIC,
            [
                f"{_gib(peak.total)} are predicted with balanced experts, and {_gib(worst)} should "
                f"all tokens go to those of one rank; --device {device} leaves {_gib(room)}: set "
                "model.moe.expert_capacity_factor=1.25, or use a smaller train.micro_batch_size"
            ],
        )


def _shortened(config: PretrainConfig, processes: int) -> PretrainConfig:
    """With as few micro-batches in a step as fill the pipeline: more change no peak, and a
    prediction goes through them one by one."""
    parallel, train = config.parallel, config.train
    unit = train.micro_batch_size * RankLayout.of(parallel, processes).data_parallel_size
    stages = parallel.pipeline_model_parallel_size * parallel.virtual_pipeline_model_parallel_size
    batch = min(train.global_batch_size, unit * 4 * stages)
    return replace(config, train=replace(train, global_batch_size=batch))


def _kept(peak: object) -> int:
    return sum(
        getattr(peak, part) for part in ("parameters", "gradients", "optimizer", "activations")
    )


def _way_out(config: PretrainConfig, processes: int, vocab_size: int | None, room: int) -> str:
    for candidate in _leaner(config):
        try:
            validate(candidate, processes)
        except ConfigError:
            continue
        peak = predict_memory_of_run(candidate, processes, vocab_size=vocab_size).peak.total
        if peak <= room:
            words = " ".join(words_between(config, candidate))
            return f"with {words} it would be {_gib(peak)}"
    return (
        "neither recomputing nor sharding over these processes is enough; use more of them, or a "
        "smaller model"
    )


def _leaner(config: PretrainConfig) -> Iterator[PretrainConfig]:
    """The same run with less memory, cheapest change first."""
    parallel, train = config.parallel, config.train
    for recompute in (RecomputeGranularity.selective, RecomputeGranularity.full):
        for batch in (train.micro_batch_size, 1):
            yield replace(
                config,
                parallel=replace(parallel, recompute_granularity=recompute),
                train=replace(train, micro_batch_size=batch),
            )
    full = replace(parallel, recompute_granularity=RecomputeGranularity.full)
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    for factor in (2, 4, 8, 16):
        for tp, pp in ((tensor * factor, pipeline), (tensor, pipeline * factor)):
            layout = replace(
                full,
                tensor_model_parallel_size=tp,
                pipeline_model_parallel_size=pp,
                sequence_parallel=tp > 1,
            )
            yield replace(config, parallel=layout, train=replace(train, micro_batch_size=1))


def _gib(size: float) -> str:
    return f"{size / _GIB:,.1f} GiB" if size >= _GIB else f"{size / 2**20:,.1f} MiB"

"""Whether the run fits a device's memory, as models/memory.py predicts it."""

import math
from collections.abc import Iterator
from dataclasses import replace

from launch.findings import Findings
from launch.nearest_layout import words_between
from models.parameter_count import parameter_count
from parallel.config import ConfigError, RecomputeGranularity
from parallel.deepspeed_config import DeepSpeedConfig, EngineKind
from parallel.rank_layout import RankLayout
from pretrain.config import PretrainConfig
from pretrain.config_rules import validate
from pretrain.memory import device_memory_bytes, predict_memory_of_run, worst_memory_of_run

TOPIC = "memory"
# Of a device's memory, what CUDA, NCCL and fragmentation leave to a program.
USABLE = 0.92
# What is proposed is found among so many predictions, of about 5 ms each; tensor ranks beyond those
# of a node would talk over the network.
_MOST_TRIED = 100
_MOST_TENSOR_RANKS = 8
_GIB = 2**30


def check_memory(
    config: PretrainConfig | None,
    processes: int,
    vocab_size: int | None,
    device: str | None,
    findings: Findings,
) -> None:
    """Notes what is predicted; warns where it is more than `device` has.

    config: legal on so many processes; None where there is no such. device: a name, or a size as in
    80GiB; None: not said. Where nothing can be predicted for a device, a note says why.
    """
    room = _room(device, findings)
    if obstacle := _obstacle(config, vocab_size):
        because = [f"memory is not predicted, because {obstacle}"]
        findings.notes(TOPIC, because if device is not None else [])
        return
    assert config is not None  # the first of the obstacles
    asked, config = config, _shortened(config, processes)
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
    if peak.host:
        findings.notes(
            TOPIC,
            [f"each process keeps {_gib(peak.host)} of what is offloaded in its host's memory"],
        )
    if room is None:
        return
    if peak.total > room:
        findings.warnings(
            TOPIC,
            [
                f"{_gib(peak.total)} are predicted for a GPU of pipeline stage {peak.stage}, in "
                f"{peak.moment}, and --device {device} leaves {_gib(room)}: "
                + _way_out(asked, processes, vocab_size, room)
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


def _room(device: str | None, findings: Findings) -> int | None:
    """Bytes of `device` that a program may use; None where it is not said, or unknown."""
    if device is None:
        return None
    try:
        return int(USABLE * device_memory_bytes(device))
    except ValueError as error:
        findings.errors(TOPIC, [f"--device {device}: {error}"])
        return None


def _obstacle(config: PretrainConfig | None, vocab_size: int | None) -> str | None:
    if config is None:
        return "there are errors in settings or layout; mend those first"
    if vocab_size is None and config.model.vocab_size is None:
        return "the vocabulary is not known: data.tokenizer cannot be read"
    return None


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
    """config: with the batch that was asked for."""
    tried = 0
    for candidate in _leaner(config, processes):
        if _at_least(candidate, processes, vocab_size) > room:
            continue
        try:
            validate(candidate, processes)
        except ConfigError:
            continue
        short, tried = _shortened(candidate, processes), tried + 1
        peak = predict_memory_of_run(short, processes, vocab_size=vocab_size).peak.total
        if peak <= room:
            words = " ".join(words_between(config, candidate))
            return f"with {words} it would be {_gib(peak)}"
        if tried == _MOST_TRIED:
            break
    return (
        f"none of the layouts tried is small enough on {processes} processes, sharded and with "
        "recomputation; use more processes, or a smaller model"
    )


def _leaner(config: PretrainConfig, processes: int) -> Iterator[PretrainConfig]:
    """The same run with less memory, cheapest change first; layouts may be illegal."""
    train, asked = config.train, config.parallel
    megatron = config.engine is EngineKind.megatron
    if megatron:
        asked = replace(asked, use_distributed_optimizer=True)
    kinds = list(RecomputeGranularity)
    least = kinds.index(asked.recompute_granularity)
    for recompute in kinds[least:]:
        for batch in {train.micro_batch_size: None, 1: None}:
            parallel = replace(asked, recompute_granularity=recompute)
            smaller = replace(train, micro_batch_size=batch)
            yield replace(config, parallel=parallel, train=smaller)
    if not megatron:
        leaner = list(_leaner_deepspeed(config.deepspeed))
        yield from (replace(config, deepspeed=deepspeed) for deepspeed in leaner)
        config = replace(config, deepspeed=leaner[-1])
    for tensor, pipeline, expert in _finer(config, processes):
        for recompute in {asked.recompute_granularity: None, RecomputeGranularity.full: None}:
            try:
                parallel = replace(
                    asked,
                    recompute_granularity=recompute,
                    tensor_model_parallel_size=tensor,
                    pipeline_model_parallel_size=pipeline,
                    expert_model_parallel_size=expert,
                    sequence_parallel=tensor > 1,
                )
            except ConfigError:
                continue
            yield replace(config, parallel=parallel, train=replace(train, micro_batch_size=1))


def _leaner_deepspeed(asked: DeepSpeedConfig) -> Iterator[DeepSpeedConfig]:
    """More of the state shared out, then the optimizer's on the host."""
    for zero in range(asked.zero_stage, 4):
        yield replace(asked, zero_stage=zero)
    for zero in range(max(asked.zero_stage, 1), 4):
        yield replace(asked, zero_stage=zero, offload_optimizer=True)


def _finer(config: PretrainConfig, processes: int) -> list[tuple[int, int, int]]:
    """Tensor, pipeline and expert sizes above those of `config`: first more expert ranks alone,
    then products of the others, smallest first."""
    parallel, experts = config.parallel, config.model.moe.num_experts
    tensor, pipeline, expert = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.expert_model_parallel_size,
    )
    most = max(tensor, _MOST_TENSOR_RANKS)
    sizes = [
        (t, p, e)
        for t in _multiples(tensor, math.gcd(config.model.num_attention_heads, processes))
        for p in _multiples(pipeline, math.gcd(config.model.num_layers, processes))
        for e in (_multiples(expert, math.gcd(experts, processes)) if experts else [1])
        if t <= most and processes % (t * p * parallel.context_parallel_size) == 0
    ]
    return sorted(sizes, key=lambda size: (size[0] * size[1], size[1], size[2]))


def _multiples(size: int, whole: int) -> list[int]:
    """Of `size`, those that divide `whole`."""
    return [number for number in range(size, whole + 1, size) if whole % number == 0]


def _at_least(config: PretrainConfig, processes: int, vocab_size: int | None) -> float:
    """Bytes that a GPU of the fullest stage cannot do without, at no more than a few divisions:
    weights in 16 bits, their gradients, and a share of what the optimizer keeps. With DeepSpeed,
    which may keep nothing of these there, 0."""
    model, parallel = config.model, config.parallel
    if config.engine is not EngineKind.megatron:
        return 0.0
    count = parameter_count(model, vocab_size)
    dense = (count.total - count.experts) / parallel.tensor_model_parallel_size
    ranks = parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size
    trained = 0 if model.moe.freeze_routing else 1  # of the experts
    weights = 6 * dense + (2 + 4 * trained) * count.experts / ranks
    moments = 8 * (count.total - count.experts * (1 - trained)) / processes
    return weights / parallel.pipeline_model_parallel_size + moments


def _gib(size: float) -> str:
    return f"{size / _GIB:,.1f} GiB" if size >= _GIB else f"{size / 2**20:,.1f} MiB"

"""The same run in less memory, for launch.check to propose. Imports neither torch nor
megatron-core."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from launch.check_engine import refused_on_gpu
from launch.findings import many
from launch.nearest_layout import words_between
from models.memory import readable
from models.parameter_count import parameter_count
from parallel.config import ConfigError, RecomputeGranularity
from parallel.deepspeed_config import EngineKind
from parallel.rank_layout import RankLayout
from pretrain.config import PretrainConfig
from pretrain.config_rules import validate
from pretrain.memory import predict_memory_of_run

# What is proposed is found among so many predictions with each engine, of 3 to 10 ms each; tensor
# ranks beyond those of a node would talk over the network.
_MOST_TRIED = 80
_MOST_TENSOR_RANKS = 8


def way_out(
    config: PretrainConfig,
    processes: int,
    vocab_size: int | None,
    room: float,
    host_room: float | None = None,
) -> str:
    """What to change for a GPU to need no more than `room`, as the end of a sentence.

    config: with the batch that was asked for. host_room: bytes that each process may offload to its
    host; None: not known.
    """
    tried: Counter[EngineKind] = Counter()
    for candidate in leaner(config, processes):
        if tried[candidate.engine] == _MOST_TRIED:
            continue
        if _at_least(candidate, processes, vocab_size) > room:
            continue
        if refused_on_gpu(candidate) or not allowed(candidate, processes):
            continue
        tried[candidate.engine] += 1
        peak = predict_memory_of_run(
            shortened(candidate, processes), processes, vocab_size=vocab_size
        ).peak
        if peak.total > room or (host_room is not None and peak.host > host_room):
            continue
        words = " ".join(words_between(config, candidate))
        host = f", and {readable(peak.host)} in its host's memory" if peak.host else ""
        return f"with {words} it would be {readable(peak.total)}{host}"
    return (
        f"none of the layouts tried is small enough on {many(processes, 'process')}, sharded and "
        "with recomputation; use more processes, or a smaller model"
    )


def shortened(config: PretrainConfig, processes: int) -> PretrainConfig:
    """With as few micro-batches in a step as fill the pipeline: more change no peak, and a
    prediction goes through them one by one."""
    parallel, train = config.parallel, config.train
    unit = train.micro_batch_size * RankLayout.of(parallel, processes).data_parallel_size
    stages = parallel.pipeline_model_parallel_size * parallel.virtual_pipeline_model_parallel_size
    batch = min(train.global_batch_size, unit * 4 * stages)
    return replace(config, train=replace(train, global_batch_size=batch))


def allowed(config: PretrainConfig, processes: int) -> bool:
    """Whether no rule across rooms is broken on so many processes."""
    try:
        validate(config, processes)
    except ConfigError:
        return False
    return True


def leaner(config: PretrainConfig, processes: int) -> Iterator[PretrainConfig]:
    """The same run with less memory, cheapest change first, the other engine where megatron-core's
    does not do; layouts may be illegal."""
    if config.engine is EngineKind.megatron:
        parallel = replace(config.parallel, use_distributed_optimizer=True)
        yield from _shapes(replace(config, parallel=parallel), processes)
        config = _under_deepspeed(config)
    yield from _leaner_deepspeed(config, processes)


def _under_deepspeed(config: PretrainConfig) -> PretrainConfig:
    """Without what belongs to megatron-core's engine, and sharing out more than that can."""
    parallel = replace(
        config.parallel,
        pipeline_model_parallel_size=1,
        virtual_pipeline_model_parallel_size=1,
        overlap_grad_reduce=False,
        overlap_param_gather=False,
    )
    deepspeed = replace(config.deepspeed, zero_stage=2)
    return replace(config, engine=EngineKind.deepspeed, parallel=parallel, deepspeed=deepspeed)


def _leaner_deepspeed(config: PretrainConfig, processes: int) -> Iterator[PretrainConfig]:
    """Every shape with ever more of the state shared out; all that again with the optimizer on the
    host, whose updates take longest, and at last with the parameters there too."""
    asked = config.deepspeed
    parameters = asked.offload_parameters
    offloads = [(asked.offload_optimizer, parameters), (True, parameters), (True, True)]
    for offload_optimizer, offload_parameters in dict.fromkeys(offloads):
        for shape in _shapes(config, processes):
            for zero in range(asked.zero_stage, 4):
                deepspeed = replace(
                    asked,
                    zero_stage=zero,
                    offload_optimizer=offload_optimizer,
                    offload_parameters=offload_parameters,
                )
                yield replace(shape, deepspeed=deepspeed)


def _shapes(config: PretrainConfig, processes: int) -> Iterator[PretrainConfig]:
    """More recomputation and smaller micro-batches, then layouts of more ranks as well."""
    train, asked = config.train, config.parallel
    kinds, done = list(RecomputeGranularity), []
    for recompute in kinds[kinds.index(asked.recompute_granularity) :]:
        for batch in {train.micro_batch_size: None, 1: None}:
            parallel = replace(asked, recompute_granularity=recompute)
            done.append((parallel, batch))
            yield replace(config, parallel=parallel, train=replace(train, micro_batch_size=batch))
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
            if (parallel, 1) not in done:
                yield replace(config, parallel=parallel, train=replace(train, micro_batch_size=1))


def _finer(config: PretrainConfig, processes: int) -> list[tuple[int, int, int]]:
    """Tensor, pipeline and expert sizes above those of `config`: first more expert ranks alone,
    then products of the others, smallest first. DeepSpeed has no pipelines."""
    parallel, experts = config.parallel, config.model.moe.num_experts
    tensor, pipeline, expert = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.expert_model_parallel_size,
    )
    most = max(tensor, _MOST_TENSOR_RANKS)
    stages = [pipeline]
    if config.engine is EngineKind.megatron:
        stages = _multiples(pipeline, math.gcd(config.model.num_layers, processes))
    sizes = [
        (t, p, e)
        for t in _multiples(tensor, math.gcd(config.model.num_attention_heads, processes))
        for p in stages
        for e in (_multiples(expert, math.gcd(experts, processes)) if experts else [1])
        if t <= most and processes % (t * p * parallel.context_parallel_size) == 0
    ]
    return sorted(sizes, key=lambda size: (size[0] * size[1], size[1], size[2]))


def _multiples(size: int, whole: int) -> list[int]:
    """Of `size`, those that divide `whole`."""
    return [number for number in range(size, whole + 1, size) if whole % number == 0]


def _at_least(config: PretrainConfig, processes: int, vocab_size: int | None) -> float:
    """Bytes that a GPU of the fullest stage cannot do without, at no more than a few divisions:
    weights in 16 bits, with megatron-core their gradients, and a share of what the optimizer
    keeps there."""
    model, parallel, deepspeed = config.model, config.parallel, config.deepspeed
    count = parameter_count(model, vocab_size)
    dense = (count.total - count.experts) / parallel.tensor_model_parallel_size
    ranks = parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size
    trained = 0 if model.moe.freeze_routing else 1  # of the experts
    moments = 8 * (count.total - count.experts * (1 - trained)) / processes
    if config.engine is EngineKind.deepspeed:
        weights = 0 if deepspeed.zero_stage == 3 else 2 * (dense + count.experts / ranks)
        return weights + (0 if deepspeed.offload_optimizer else moments)
    weights = 6 * dense + (2 + 4 * trained) * count.experts / ranks
    return weights / parallel.pipeline_model_parallel_size + moments

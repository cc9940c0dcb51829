"""A layout that works, near one that does not. Imports neither torch nor megatron-core."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

from parallel.config import ConfigError, ParallelConfig
from pretrain.config import PretrainConfig
from pretrain.config_rules import validate

# The largest size along an axis that is tried; nobody has more than so many heads or stages.
_LARGEST = 512
_OF_LAYOUT = ("parallel.", "train.global_batch_size=", "train.micro_batch_size=")


def nearest_layout(config: PretrainConfig, world_size: int) -> list[str]:
    """The words that turn `config` into one that is legal on `world_size` processes, as few and as
    near to what was asked for as possible; empty where none is found.

    Near is what takes few doublings along the axes and of the global batch, which is rounded to a
    multiple of what a step needs. Rules about something else that are broken stay so.
    """
    other = {line for line in _broken(config, world_size) if not line.startswith(_OF_LAYOUT)}
    candidates = []
    for layout in _sizes(config, world_size):
        as_asked = replace(config, parallel=layout)
        candidates += [as_asked, _with_fitting_batch(as_asked, world_size)]
    for candidate in sorted(candidates, key=lambda one: _distance(config, one)):
        if set(_broken(candidate, world_size)) <= other:
            return words_between(config, candidate)
    return []


def _broken(config: PretrainConfig, world_size: int) -> Sequence[str]:
    try:
        validate(config, world_size)
    except ConfigError as error:
        return error.problems
    return []


def _sizes(config: PretrainConfig, world_size: int) -> Iterator[ParallelConfig]:
    """Layouts whose sizes divide the model and the number of processes, legal or not."""
    model, asked = config.model, config.parallel
    heads = math.gcd(model.num_attention_heads, model.query_groups)
    experts = model.moe.num_experts
    virtual = {1, asked.virtual_pipeline_model_parallel_size}
    for tensor, pipeline, context, expert in product(
        _divisors(math.gcd(heads, world_size)),
        _divisors(math.gcd(model.num_layers, world_size)),
        {1, asked.context_parallel_size},
        _divisors(math.gcd(experts, world_size)) if experts else [1],
    ):
        for chunks in virtual if pipeline > 1 else {1}:
            sequence = tensor > 1 and (asked.sequence_parallel or experts > 0)
            try:
                yield replace(
                    asked,
                    tensor_model_parallel_size=tensor,
                    pipeline_model_parallel_size=pipeline,
                    virtual_pipeline_model_parallel_size=chunks,
                    context_parallel_size=context,
                    expert_model_parallel_size=expert,
                    expert_tensor_parallel_size=1,
                    sequence_parallel=sequence,
                )
            except ConfigError:
                continue  # broken by what is no size


def _distance(config: PretrainConfig, candidate: PretrainConfig) -> tuple[float, float]:
    """How far from what was asked for, in doublings; of equals the one with more tensor ranks."""
    asked, layout, total = config.parallel, candidate.parallel, 0.0
    for name in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "virtual_pipeline_model_parallel_size",
        "context_parallel_size",
        "expert_model_parallel_size",
    ):
        wish, size = max(1, getattr(asked, name)), getattr(layout, name)
        total += abs(math.log2(size / wish))
    batch, wanted = candidate.train.global_batch_size, max(1, config.train.global_batch_size)
    return total + abs(math.log2(batch / wanted)), -layout.tensor_model_parallel_size


def _with_fitting_batch(config: PretrainConfig, world_size: int) -> PretrainConfig:
    parallel, train = config.parallel, config.train
    replica = (
        parallel.tensor_model_parallel_size
        * parallel.context_parallel_size
        * parallel.pipeline_model_parallel_size
    )
    unit = train.micro_batch_size * max(1, world_size // replica)
    if parallel.virtual_pipeline_model_parallel_size > 1:
        unit *= parallel.pipeline_model_parallel_size
    batch = max(1, round(train.global_batch_size / unit)) * unit
    return replace(config, train=replace(train, global_batch_size=batch))


def words_between(asked: PretrainConfig, found: PretrainConfig) -> list[str]:
    """What to add to a command line that gives `asked` to have `found`; of engine, layout and
    batch."""
    words = [] if found.engine is asked.engine else [f"engine={found.engine.value}"]
    for section in ("parallel", "train", "deepspeed"):
        before = vars(getattr(asked, section))
        for name, value in vars(getattr(found, section)).items():
            if value != before[name]:
                text = str(value).lower() if isinstance(value, bool) else value
                words.append(f"{section}.{name}={getattr(text, 'value', text)}")
    return words


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, min(number, _LARGEST) + 1) if number % d == 0]

"""Settings of engine=deepspeed, and the combinations it refuses, each with the nearest legal one.

`python -m parallel.deepspeed_config` writes the two tables of docs/engines.md from what stands
here. Imports neither torch nor DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from parallel.config import ConfigError, ParallelConfig, Precision, below


class EngineKind(Enum):
    """Who reduces gradients, holds the optimizer and updates."""

    megatron = "megatron"  # megatron-core: every axis, ZeRO-1
    deepspeed = "deepspeed"  # DeepSpeed around the same layers: ZeRO-0 to 3, offload to the host


@dataclass(kw_only=True)
class DeepSpeedConfig:
    """What engine=deepspeed does with the optimizer; counts with no other engine.

    ZeRO (arXiv 1910.02054) shares out over the data-parallel ranks, context-parallel ones among
    them: from stage 1 on the optimizer's state, from 2 on gradients too, in 3 parameters too.
    """

    zero_stage: int = 1  # 0 to 3; 0: every rank holds everything
    # masters and moments in host memory and updated there; with zero_stage 1 or more
    offload_optimizer: bool = False
    # parameters wait in host memory until a layer needs them; with zero_stage=3
    offload_parameters: bool = False
    # Adam by DeepSpeed's own kernels (its CPU Adam where the optimizer is offloaded), compiled at
    # the first start; false: by torch's fused kernel; with zero_stage 1 or more
    native_adam: bool = False
    overlap_comm: bool = False  # reduce gradients while others are computed; zero_stage 1 or more
    reduce_bucket_size: int = 50_000_000  # elements reduced together
    # parameters of fewer elements stay whole on every rank; with zero_stage=3
    param_persistence_threshold: int = 100_000

    def __post_init__(self) -> None:
        """Raises ConfigError for what is wrong whatever the layout."""
        problems = []
        if self.zero_stage not in range(4):
            problems.append(f"deepspeed.zero_stage={self.zero_stage} must be 0, 1, 2 or 3")
        problems += below({"deepspeed.reduce_bucket_size": self.reduce_bucket_size}, 1)
        problems += below(
            {"deepspeed.param_persistence_threshold": self.param_persistence_threshold}, 0
        )
        if problems:
            raise ConfigError(*problems)


@dataclass(frozen=True)
class Launch:
    """What the rules below look at."""

    parallel: ParallelConfig
    deepspeed: DeepSpeedConfig
    num_experts: int = 0
    on_gpu: bool = False  # known where it runs; False: a CPU, or nobody has said

    @property
    def zero(self) -> int:
        return self.deepspeed.zero_stage

    @property
    def bf16(self) -> bool:
        return self.parallel.precision is Precision.bf16 or self._becomes_bf16

    @property
    def precision(self) -> str:
        """As typed, with what comes of it."""
        becomes = " (bf16 on a GPU)" if self._becomes_bf16 else ""
        return f"parallel.precision={self.parallel.precision.value}{becomes}"

    @property
    def _becomes_bf16(self) -> bool:
        return self.parallel.precision is Precision.auto and self.on_gpu


@dataclass(frozen=True)
class Refusal:
    """A combination that engine=deepspeed does not train, or would train wrongly."""

    example: tuple[str, ...]  # settings as typed which are refused for this reason
    applies: Callable[[Launch], bool]
    says: Callable[[Launch], str]  # what is wrong and what to change, in one line


REFUSALS = (
    Refusal(
        ("parallel.pipeline_model_parallel_size=2",),
        lambda it: it.parallel.pipeline_model_parallel_size > 1,
        lambda it: (
            "parallel.pipeline_model_parallel_size="
            f"{it.parallel.pipeline_model_parallel_size} must be 1 with engine=deepspeed, whose "
            "pipelines are made of other models; use parallel.tensor_model_parallel_size or "
            "deepspeed.zero_stage=3 for a model that does not fit, or engine=megatron"
        ),
    ),
    Refusal(
        (
            "deepspeed.zero_stage=3",
            "+model=xmoe_tiny",
            "parallel.expert_model_parallel_size=2",
        ),
        lambda it: it.zero == 3 and it.num_experts > 0 and _experts_have_own_ranks(it.parallel),
        lambda it: (
            f"deepspeed.zero_stage=3 shares every parameter out over all data-parallel ranks, and "
            f"{_expert_ranks(it.parallel)} gives experts other ranks than the rest: DeepSpeed "
            "would run and train wrong numbers; use deepspeed.zero_stage=2, or engine=megatron"
        ),
    ),
    Refusal(
        ("deepspeed.zero_stage=0", "parallel.precision=bf16"),
        lambda it: it.zero == 0 and it.bf16,
        lambda it: (
            f"deepspeed.zero_stage=0 adds gradients up in {it.precision} and keeps no fp32 "
            "masters; use deepspeed.zero_stage=1, or parallel.precision=fp32"
        ),
    ),
    Refusal(
        ("parallel.precision=bf16", "+model=xmoe_tiny"),
        lambda it: it.num_experts > 0 and it.bf16,
        lambda it: (
            f"{it.precision} keeps the routers of a model with experts in fp32, and "
            "engine=deepspeed holds all parameters in one type; use parallel.precision=fp32, or "
            "engine=megatron"
        ),
    ),
    Refusal(
        ("deepspeed.zero_stage=0", "deepspeed.offload_optimizer=true"),
        lambda it: it.zero == 0 and it.deepspeed.offload_optimizer,
        lambda it: (
            "deepspeed.offload_optimizer=true is a part of ZeRO, which deepspeed.zero_stage=0 "
            "switches off; use deepspeed.zero_stage=1 or more"
        ),
    ),
    Refusal(
        ("deepspeed.zero_stage=2", "deepspeed.offload_parameters=true"),
        lambda it: it.zero < 3 and it.deepspeed.offload_parameters,
        lambda it: (
            f"deepspeed.offload_parameters=true needs deepspeed.zero_stage=3, not {it.zero}: below "
            "that parameters are not shared out; use 3, or deepspeed.offload_optimizer=true"
        ),
    ),
    Refusal(
        ("deepspeed.zero_stage=0", "deepspeed.overlap_comm=true"),
        lambda it: it.zero == 0 and it.deepspeed.overlap_comm,
        lambda it: (
            "deepspeed.overlap_comm=true is a part of ZeRO, which deepspeed.zero_stage=0 switches "
            "off; use deepspeed.zero_stage=1 or more"
        ),
    ),
    Refusal(
        ("deepspeed.zero_stage=0", "deepspeed.native_adam=true"),
        lambda it: it.zero == 0 and it.deepspeed.native_adam,
        lambda it: (
            "deepspeed.native_adam=true counts the updates of flat buffers, which "
            "deepspeed.zero_stage=0 has none of; use deepspeed.zero_stage=1 or more, or false"
        ),
    ),
    Refusal(
        ("parallel.overlap_grad_reduce=true",),
        lambda it: it.parallel.overlap_grad_reduce or it.parallel.overlap_param_gather,
        lambda it: (
            f"{_overlaps(it.parallel)} belongs to engine=megatron; with engine=deepspeed use "
            "deepspeed.overlap_comm=true"
        ),
    ),
)


def problems_of(launch: Launch) -> list[str]:
    """One line for each rule that engine=deepspeed would break."""
    return [refusal.says(launch) for refusal in REFUSALS if refusal.applies(launch)]


def problems_on_gpu(launch: Launch) -> list[str]:
    """One line for each rule that it would break on a GPU, and nowhere else."""
    elsewhere = {refusal.example for refusal in REFUSALS if refusal.applies(launch)}
    there = replace(launch, on_gpu=True)
    return [
        refusal.says(there)
        for refusal in REFUSALS
        if refusal.applies(there) and refusal.example not in elsewhere
    ]


def not_installed() -> list[str]:
    if find_spec("deepspeed") is not None:
        return []
    return [
        "engine=deepspeed needs the package deepspeed, which is not installed; install "
        "magnetron[deepspeed] (pip install 'deepspeed>=0.17'), or use engine=megatron"
    ]


def counting_for_nothing(settings: DeepSpeedConfig) -> list[str]:
    """Lines for deepspeed.* settings that were typed although another engine trains."""
    plain = DeepSpeedConfig()
    typed = [
        f"deepspeed.{field.name}={_typed(getattr(settings, field.name))}"
        for field in fields(settings)
        if getattr(settings, field.name) != getattr(plain, field.name)
    ]
    return [f"{setting} counts only with engine=deepspeed; add that" for setting in typed]


def without_effect(parallel: ParallelConfig, deepspeed: DeepSpeedConfig) -> list[str]:
    """Lines for settings that are not at their defaults and mean nothing to engine=deepspeed."""
    found = []
    if not parallel.use_distributed_optimizer:
        stage = (
            "deepspeed.zero_stage=0, which shares out nothing, is set too; leave this one out"
            if deepspeed.zero_stage == 0
            else f"deepspeed.zero_stage={deepspeed.zero_stage} shares the optimizer out all the "
            "same; use deepspeed.zero_stage=0 to share out nothing, or leave this one out"
        )
        found.append(
            f"parallel.use_distributed_optimizer=false counts only with engine=megatron: {stage}"
        )
    threshold = deepspeed.param_persistence_threshold
    if deepspeed.zero_stage < 3 and threshold != DeepSpeedConfig.param_persistence_threshold:
        found.append(
            f"deepspeed.param_persistence_threshold={threshold} counts only with "
            f"deepspeed.zero_stage=3: with {deepspeed.zero_stage} every parameter is whole on "
            "every rank; use 3, or leave it out"
        )
    return found


def _typed(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _experts_have_own_ranks(parallel: ParallelConfig) -> bool:
    """Whether the gradient of an expert is summed over other ranks than that of the rest."""
    tensor, experts = parallel.tensor_model_parallel_size, parallel.expert_tensor_parallel_size
    return parallel.expert_model_parallel_size > 1 or tensor != experts


def _expert_ranks(parallel: ParallelConfig) -> str:
    if parallel.expert_model_parallel_size > 1:
        return f"parallel.expert_model_parallel_size={parallel.expert_model_parallel_size}"
    return (
        f"parallel.expert_tensor_parallel_size={parallel.expert_tensor_parallel_size} under "
        f"parallel.tensor_model_parallel_size={parallel.tensor_model_parallel_size}"
    )


def _overlaps(parallel: ParallelConfig) -> str:
    names = ("overlap_grad_reduce", "overlap_param_gather")
    return ", ".join(f"parallel.{name}=true" for name in names if getattr(parallel, name))


# ---- the tables of docs/engines.md ---------------------------------------------------------------

_DOC = Path(__file__).resolve().parent.parent / "docs" / "engines.md"
_BEGIN = "<!-- made by `python -m parallel.deepspeed_config`; edit parallel/deepspeed_config.py -->"
_END = "<!-- end -->"

_COLUMNS: dict[str, dict[str, Any]] = {
    "TP": {"tensor_model_parallel_size": 2},
    "TP and SP": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "CP": {"context_parallel_size": 2},
    "PP": {"pipeline_model_parallel_size": 2},
    "bf16": {"precision": Precision.bf16},
    "experts": {},
    "experts, bf16": {"precision": Precision.bf16},
    "experts, EP": {"expert_model_parallel_size": 2},
    "experts, TP and SP": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
}
_OFFLOADS = ("offload_optimizer", "offload_parameters")


def tables() -> str:
    """What is trained under which stage, and what is refused in which words, as Markdown."""
    return "\n".join([_BEGIN, "", *_scope_table(), "", *_refusal_table(), "", _END])


def _scope_table() -> Iterator[str]:
    names = [*_COLUMNS, *(f"`{name}`" for name in _OFFLOADS)]
    yield "| `deepspeed.zero_stage` | " + " | ".join(names) + " |"
    yield "|---" * (len(names) + 1) + "|"
    for stage in range(4):
        plain = Launch(ParallelConfig(), DeepSpeedConfig(zero_stage=stage))
        launches = [
            replace(
                plain,
                parallel=replace(plain.parallel, **settings),
                num_experts=8 if "experts" in name else 0,
            )
            for name, settings in _COLUMNS.items()
        ]
        launches += [
            replace(plain, deepspeed=replace(plain.deepspeed, **{name: True})) for name in _OFFLOADS
        ]
        cells = ["refused" if problems_of(launch) else "yes" for launch in launches]
        yield f"| {stage} | " + " | ".join(cells) + " |"


def _refusal_table() -> Iterator[str]:
    yield "| typed, with `engine=deepspeed` | answer |"
    yield "|---|---|"
    for refusal in REFUSALS:
        typed = " ".join(f"`{setting}`" for setting in refusal.example)
        yield f"| {typed} | {refusal.says(_launch_of(refusal.example))} |"


def _launch_of(typed: tuple[str, ...]) -> Launch:
    """The settings of an example, as the launcher would read them."""
    rooms: dict[str, dict[str, Any]] = {"parallel": {}, "deepspeed": {}, "+model": {}}
    for name, value in (setting.split("=") for setting in typed):
        room, _, field = name.partition(".")
        rooms[room][field] = _read(value) if field else value
    return Launch(
        ParallelConfig(**rooms["parallel"]),
        DeepSpeedConfig(**rooms["deepspeed"]),
        num_experts=8 if rooms["+model"] else 0,
    )


def _read(value: str) -> Any:
    if value in ("true", "false"):
        return value == "true"
    return int(value) if value.isdigit() else Precision(value)


def with_tables(document: str) -> str:
    """The document with its tables made anew."""
    before, _, rest = document.partition(_BEGIN)
    return before + tables() + rest.partition(_END)[2]


if __name__ == "__main__":
    _DOC.write_text(with_tables(_DOC.read_text(encoding="utf-8")), encoding="utf-8")

"""Every layout that a configuration allows on a few ranks, and a few of them that stand for all.

Imports neither torch nor megatron-core.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any

from parallel.config import (
    ConfigError,
    ContextParallelComm,
    ParallelConfig,
    TokenDispatcher,
)
from pretrain.config import PretrainConfig
from pretrain.config_rules import validate


def _zero(*, sharded: bool, overlapped: bool) -> dict[str, bool]:
    return {
        "use_distributed_optimizer": sharded,
        "overlap_grad_reduce": overlapped,
        "overlap_param_gather": overlapped,
    }


# optimizer state on every rank; shared out (ZeRO-1); shared out, and overlapped with computation
ZERO = {
    "off": _zero(sharded=False, overlapped=False),
    "on": _zero(sharded=True, overlapped=False),
    "overlap": _zero(sharded=True, overlapped=True),
}


KINDS = ("comm", "dispatcher", "zero")  # the axes that are no sizes


@dataclass(frozen=True)
class Layout:
    """A layout on `world_size` ranks, and its value on each axis: tp, sp, pp, ..., zero."""

    world_size: int
    parallel: ParallelConfig
    values: dict[str, str]

    @property
    def name(self) -> str:
        """Axes that are not at their simplest: "tp2 sp pp2 dp2 zero:on"; "single" without any."""
        words = [
            f"{axis}{value}" if value.isdigit() else axis if value == "on" else f"{axis}:{value}"
            for axis, value in self.values.items()
            if axis != "zero" and value not in ("1", "off", "-")
        ]
        return " ".join([*(words or ["single"]), f"zero:{self.values['zero']}"])


def legal_layouts(
    config: PretrainConfig, *, max_ranks: int = 8, sizes: Sequence[int] = (1, 2, 4, 8)
) -> Iterator[Layout]:
    """All that `pretrain.config_rules.validate` accepts, with these sizes along every axis.

    `config.parallel` gives what is not an axis. An axis that means nothing (the token dispatcher of
    a dense model, the kind of context parallelism without any) has one value.
    """
    experts = config.model.moe.num_experts > 0
    for tp, pp, cp, dp in product(sizes, repeat=4):
        if tp * pp * cp * dp > max_ranks:
            continue
        choices: dict[str, Iterable[object]] = {
            "tp": [tp],
            "sp": ["off", "on"] if tp > 1 else ["off"],
            "pp": [pp],
            "vpp": sizes if pp > 1 else [1],
            "cp": [cp],
            "comm": [comm.value for comm in ContextParallelComm] if cp > 1 else ["-"],
            "ep": sizes if experts else [1],
            "etp": sizes if experts else [1],
            "dispatcher": [kind.value for kind in TokenDispatcher] if experts else ["-"],
            "dp": [dp],
            "zero": ZERO,
        }
        for chosen in product(*choices.values()):
            values = dict(zip(choices, map(str, chosen), strict=True))
            try:
                parallel = replace(config.parallel, **_settings(values))
                validate(replace(config, parallel=parallel), tp * pp * cp * dp)
            except ConfigError:
                continue
            yield Layout(tp * pp * cp * dp, parallel, values)


def _settings(values: dict[str, str]) -> dict[str, Any]:
    """What the values of all axes are in `ParallelConfig`."""
    settings: dict[str, Any] = {
        "tensor_model_parallel_size": int(values["tp"]),
        "sequence_parallel": values["sp"] == "on",
        "pipeline_model_parallel_size": int(values["pp"]),
        "virtual_pipeline_model_parallel_size": int(values["vpp"]),
        "context_parallel_size": int(values["cp"]),
        "expert_model_parallel_size": int(values["ep"]),
        "expert_tensor_parallel_size": int(values["etp"]),
        **ZERO[values["zero"]],
    }
    if values["comm"] != "-":
        settings["cp_comm_type"] = ContextParallelComm(values["comm"])
    if values["dispatcher"] != "-":
        settings["moe_token_dispatcher_type"] = TokenDispatcher(values["dispatcher"])
    return settings


def pairwise_cover(layouts: Sequence[Layout]) -> list[Layout]:
    """Few of the layouts, in which every pair of values that any of them has occurs.

    Most defects of a layout need one or two axes to show. Greedy: at each turn the layout that
    brings most new pairs for its number of ranks; the first of equals, so the choice is stable.
    """
    pairs = [_pairs(layout) for layout in layouts]
    missing = set().union(*pairs)
    chosen = []
    while missing:
        best = max(
            range(len(layouts)),
            key=lambda i: len(pairs[i] & missing) / (2 + layouts[i].world_size),
        )
        chosen.append(layouts[best])
        missing -= pairs[best]
    return chosen


def each_value_once(layouts: Sequence[Layout]) -> list[Layout]:
    """For each value of each axis the first layout that has it, among those of fewest ranks."""
    first: dict[tuple[str, str], Layout] = {}
    for layout in sorted(layouts, key=lambda layout: layout.world_size):
        for place in layout.values.items():
            first.setdefault(place, layout)
    chosen = {id(layout): layout for layout in first.values()}
    return list(chosen.values())


def one_of_each_size(layouts: Sequence[Layout]) -> list[Layout]:
    """One layout for each combination of sizes, with the other axes' values in turn."""
    alike: dict[tuple[str, ...], list[Layout]] = {}
    for layout in layouts:
        sizes = tuple(value for axis, value in layout.values.items() if axis not in KINDS)
        alike.setdefault(sizes, []).append(layout)
    return [group[turn % len(group)] for turn, group in enumerate(alike.values())]


def _pairs(layout: Layout) -> set[tuple[tuple[str, str], ...]]:
    return set(combinations(layout.values.items(), 2))

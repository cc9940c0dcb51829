"""Where this rank is: which step, which stage of it, and which collective it entered last.

The training loop sets the beacon, a thread sends it round with every sign of life
(`parallel.heartbeat`), and when nobody gets on any more it says who holds the others up
(`parallel.failure_watch`).

    with beacon.stage("forward_backward", step):
        ...

Cost: 2 µs for a stage, 1 to 3 µs for a collective and the wait for its end.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

# What torch.distributed calls on a process group, and what it is called by itself. Wrapped there
# and not in torch.distributed: many modules import its functions by name.
_COLLECTIVES = {
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce",
    "allgather": "all_gather",
    "allgather_coalesced": "all_gather",
    "_allgather_base": "all_gather_into_tensor",
    "all_gather_single": "all_gather_single",
    "all_gather_single_coalesced": "all_gather_single",
    "allgather_into_tensor_coalesced": "all_gather_into_tensor",
    "reduce_scatter": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter_tensor",
    "reduce_scatter_single": "reduce_scatter_single",
    "reduce_scatter_single_coalesced": "reduce_scatter_single",
    "reduce_scatter_tensor_coalesced": "reduce_scatter_tensor",
    "alltoall": "all_to_all",
    "alltoall_base": "all_to_all_single",
    "all_to_all_single": "all_to_all_single",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "gather": "gather",
    "scatter": "scatter",
    "barrier": "barrier",
    "send": "send",
    "recv": "recv",
    "recv_anysource": "recv",
}


@dataclass(frozen=True)
class Position:
    """A rank's place at one moment."""

    step: int = 0  # the step being taken; of an evaluation or a save, the last one taken
    stage: str = ""  # data, forward_backward, optimizer, checkpoint or evaluation; "" between them
    moves: int = 0  # stages entered and left so far; all ranks pass the same ones
    collective: str = ""  # the one entered last, such as "all_reduce"; "" none yet
    group: str = ""  # of that collective: its name and size
    number: int = 0  # of that collective among those of its group
    waiting: bool = False  # the main thread waits for a collective's end
    quiet: float = 0.0  # seconds since it last got on
    first_step: bool = True  # no update has been made yet
    in_training: bool = False  # False before the first stage: preparing data may take hours

    @property
    def order(self) -> tuple[int, bool]:
        """Who is behind comes first: in an earlier stage; in the same one, not waiting itself."""
        return self.moves, self.waiting

    def describe(self) -> str:
        text = f"step {self.step}, {self.stage or 'between stages'}"
        if self.collective:
            how = "waiting in" if self.waiting else "last collective"
            text += f", {how} {self.collective} {self.number} of {self.group}"
        return text


class ProgressBeacon:
    """This process's position; any thread may read it.

    Entering and leaving a stage, `tick`, and entering and ending a collective count as getting on.
    """

    def __init__(self) -> None:
        self._originals: list[tuple[type, str, Any]] = []
        self.reset()

    def reset(self) -> None:
        self._step = 0
        self._stage = ""
        self._moves = 0
        self._moved = time.monotonic()
        self._first_step = True
        self._in_training = False
        self._waiting = False
        self._last: tuple[str, dist.ProcessGroup, int] | None = None
        self._entered: dict[dist.ProcessGroup, int] = {}

    @contextmanager
    def stage(self, name: str, step: int | None = None) -> Iterator[None]:
        """The body is stage `name` of `step` (None: of the same step as before)."""
        outer, self._stage = self._stage, name
        if step is not None:
            self._step = step
        self._in_training = True
        self._moves += 1
        self._moved = time.monotonic()
        try:
            yield
        finally:
            self._stage = outer
            self._moves += 1
            self._moved = time.monotonic()
        if name == "optimizer":
            self._first_step = False

    def tick(self) -> None:
        """The body of a long stage got on, by a micro-batch or a file."""
        self._moved = time.monotonic()

    @property
    def step(self) -> int:
        return self._step

    def position(self) -> Position:
        collective, group, number = "", "", 0
        if (last := self._last) is not None:
            collective, process_group, number = last
            group = f"{process_group.group_desc} ({process_group.size()} ranks)"
        return Position(
            step=self._step,
            stage=self._stage,
            moves=self._moves,
            collective=collective,
            group=group,
            number=number,
            waiting=self._waiting,
            quiet=time.monotonic() - self._moved,
            first_step=self._first_step,
            in_training=self._in_training,
        )

    def watch_collectives(self) -> None:
        """Follow all collectives of this process until `leave_collectives`."""
        for method, name in _COLLECTIVES.items():
            if method in vars(dist.ProcessGroup):  # names differ between versions of torch
                self._replace(dist.ProcessGroup, method, functools.partial(self._followed, name))
        self._replace(dist.Work, "wait", self._followed_wait)

    def leave_collectives(self) -> None:
        for owner, method, original in self._originals:
            setattr(owner, method, original)
        self._originals = []
        self._last = None  # or destroyed groups would live on
        self._entered = {}

    def _replace(self, owner: type, method: str, wrap: Callable[[Any], Any]) -> None:
        self._originals.append((owner, method, vars(owner)[method]))
        setattr(owner, method, wrap(getattr(owner, method)))

    def _followed(self, name: str, collective: Any) -> Any:
        @functools.wraps(collective)
        def enter(group: dist.ProcessGroup, *arguments: Any, **options: Any) -> Any:
            number = self._entered.get(group, 0) + 1
            self._entered[group] = number
            self._last = name, group, number
            self._moved = time.monotonic()
            return collective(group, *arguments, **options)

        return enter

    def _followed_wait(self, wait: Any) -> Any:
        # With NCCL only the device waits here; a host that is stuck shows in the stage and in the
        # collective it launched last.
        @functools.wraps(wait)
        def waiting(work: dist.Work, *arguments: Any, **options: Any) -> Any:
            self._waiting = True
            try:
                return wait(work, *arguments, **options)
            finally:
                self._waiting = False
                self._moved = time.monotonic()

        return waiting


def behind(positions: Mapping[int, Position]) -> list[int]:
    """The ranks which the others wait for, as far as their positions tell.

    Those in the earliest stage; of these, those not waiting themselves; of these, where all last
    entered a collective of one group, those who entered the fewest. All ranks, where all are in the
    same place: they wait for the network, or for each other.
    """
    first = min(position.order for position in positions.values())
    found = {rank: p for rank, p in positions.items() if p.order == first}
    if len({position.group for position in found.values()}) == 1:
        fewest = min(position.number for position in found.values())
        found = {rank: p for rank, p in found.items() if p.number == fewest}
    return sorted(found)


beacon = ProgressBeacon()  # a process is in one place at a time

"""A part of a store for the processes of one start alone, where the store outlives many starts.

torchrun's agent keeps its store when it starts processes again, and nothing in their environment
names the start alike on all ranks: TORCHELASTIC_RESTART_COUNT is each agent's own, and an agent
that sees a host vanish before its own processes fail does not count. So rank 0 calls out a new
name, the others answer, and rank 0 tells each that it was heard: who is heard knows that the name
is not one that processes before it have left there.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator

import torch.distributed as dist

# Looks at the store in a second, over all ranks; each is up to three requests of about 10 µs.
_LOOKS_PER_SECOND = 4000.0

Announce = Callable[[dist.Store], None]
GaveUp = Callable[[dist.Store], bool]


def call(
    store: dist.Store, world_size: int, deadline: float, announce: Announce, gave_up: GaveUp
) -> dist.Store:
    """On rank 0: the part that all ranks have answered from, or as many as did before `deadline`
    (time.monotonic()) or before one of them gave up in it."""
    name = uuid.uuid4().hex
    part = dist.PrefixStore(name, store)
    announce(part)
    store.set("call", name)
    missing = list(range(1, world_size))
    for _ in _pauses(world_size, deadline):
        missing = [rank for rank in missing if not _heard(part, rank)]
        if not missing or gave_up(part):
            break
    return part


def answer(
    store: dist.Store,
    rank: int,
    world_size: int,
    deadline: float,
    announce: Announce,
    gave_up: GaveUp,
) -> dist.Store:
    """On the others: the part that rank 0 has called out.

    Who is not heard until `deadline` has come when the others had given up, and gets the part in
    which they did; or rank 0 does not come, and all get a part to say so in. That one belongs to
    the name called last: of two starts in a row without rank 0, the second finds in it what the
    first has said. `announce` is told of each part that may be the one.
    """
    me, name, part = uuid.uuid4().hex, None, store
    for _ in _pauses(world_size, deadline):
        called = store.get("call").decode() if store.check(["call"]) else ""
        if called != name:
            name, part = called, dist.PrefixStore(called or "no call", store)
            announce(part)
            announce(_without_rank_zero(part))
            part.set(f"answer/{rank}", me)
        if part.check([f"heard/{me}"]):
            return part
    return part if gave_up(part) else _without_rank_zero(part)


def _without_rank_zero(part: dist.Store) -> dist.Store:
    return dist.PrefixStore("without rank 0", part)


def _heard(part: dist.Store, rank: int) -> bool:
    if not part.check([f"answer/{rank}"]):
        return False
    part.set(f"heard/{part.get(f'answer/{rank}').decode()}", "")
    return True


def _pauses(world_size: int, deadline: float) -> Iterator[None]:
    """At once, and again after pauses that grow, until `deadline`."""
    pause, longest = 0.001, max(0.05, world_size / _LOOKS_PER_SECOND)
    while True:
        yield
        left = deadline - time.monotonic()
        if left <= 0:
            return
        time.sleep(min(pause, left))
        pause = min(2 * pause, longest)

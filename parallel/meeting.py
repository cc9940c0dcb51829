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


def call(
    store: dist.Store, world_size: int, deadline: float, announce: Announce, verdict: str
) -> dist.Store:
    """On rank 0: the part that all ranks have answered from, or as many as did before `deadline`
    (time.monotonic()) or before one of them wrote the key `verdict`."""
    name = uuid.uuid4().hex
    part = dist.PrefixStore(name, store)
    announce(part)
    store.set("call", name)
    missing = list(range(1, world_size))
    for _ in _pauses(world_size, deadline):
        missing = [rank for rank in missing if not _heard(part, rank)]
        if not missing or part.check([verdict]):
            break
    return part


def answer(
    store: dist.Store,
    rank: int,
    world_size: int,
    deadline: float,
    announce: Announce,
    verdict: str,
) -> dist.Store | None:
    """On the others: the part that rank 0 has called out; None: it did not until `deadline`.

    `announce` is told of each part that may be the one. Who comes when the others have given up is
    not heard any more, and in the end takes what they have written under `verdict` for meant for
    it; it may be from a start before, if rank 0 does not come at all.
    """
    me, name = uuid.uuid4().hex, ""
    part = store
    for _ in _pauses(world_size, deadline):
        if not store.check(["call"]):
            continue
        called = store.get("call").decode()
        if called != name:
            name, part = called, dist.PrefixStore(called, store)
            announce(part)
            part.set(f"answer/{rank}", me)
        if part.check([f"heard/{me}"]):
            return part
    return part if name and part.check([verdict]) else None


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

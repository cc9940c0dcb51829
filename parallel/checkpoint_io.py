"""Writing and reading sharded state as one folder that is either complete or absent.

A checkpoint is written under a temporary name by all ranks, made durable, and then renamed by one
rank: the rename is the moment it exists. A process killed before leaves a folder whose name says
so, and which nothing will load.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from parallel import failure_watch
from parallel.megatron import dist_checkpointing

PARTIAL_SUFFIX = ".partial"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read, with what to do about it."""


def save(state: dict[str, Any], folder: Path, *, metadata: dict[str, Any]) -> None:
    """Write `state` to `folder`, which must not exist. All ranks must call it.

    `state` holds megatron-core sharded tensors and plain values; plain values are taken from
    rank 0. `metadata` is stored beside it (`load_metadata`).

    Raises:
        CheckpointError: on every rank alike, when any rank failed; `folder` is then absent.
    """
    partial = folder.with_name(folder.name + PARTIAL_SUFFIX)

    def prepare() -> None:
        if folder.exists():
            raise FileExistsError(f"{folder} exists already")
        shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
        partial.mkdir(parents=True)

    def publish() -> None:
        _sync_tree(partial)
        os.rename(partial, folder)
        _sync(folder.parent)

    stored = {key: value for key, value in metadata.items() if key != "dp_cp_group"}
    _on_rank_zero(prepare, f"prepare {partial}")
    _on_every_rank(
        lambda: dist_checkpointing.save(state, str(partial), content_metadata=stored),
        f"write {partial}",
    )
    _on_rank_zero(publish, f"publish {folder}")


def load(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Fill `state`'s sharded tensors from `folder`; returns it with the plain values added.

    All ranks must call it.

    Raises:
        CheckpointError: the folder is missing or incomplete, or its tensors are not those of
            `state` (names the first few that differ).
    """
    if not is_complete(folder):
        raise CheckpointError(f"{folder} is not a complete checkpoint")
    result: list[dict[str, Any]] = []
    _on_every_rank(
        lambda: result.append(dist_checkpointing.load(state, str(folder))), f"read {folder}"
    )
    return result[0]


def load_plain_values(folder: Path) -> dict[str, Any]:
    """The values that are not sharded (step counters, settings), without any tensor."""
    if not is_complete(folder):
        raise CheckpointError(f"{folder} is not a complete checkpoint")
    return dist_checkpointing.load_common_state_dict(str(folder))


def is_complete(folder: Path) -> bool:
    """True for a folder that `save` published."""
    return not folder.name.endswith(PARTIAL_SUFFIX) and (folder / "metadata.json").is_file()


def _on_rank_zero(action: Callable[[], None], what: str) -> None:
    """Run on rank 0 while the others wait; a failure is raised on all."""
    failure: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except Exception as error:
            failure[0] = f"{type(error).__name__}: {error}"
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise CheckpointError(f"could not {what}: {failure[0]}")


def _on_every_rank(action: Callable[[], Any], what: str) -> None:
    """Run everywhere; a failure of one rank is raised on all.

    Ranks that are stuck inside, waiting for the one that failed, are ended by the failure watch.
    """
    failure: str | None = None
    watch = failure_watch.current()
    try:
        action()
    except CheckpointException as error:  # a BaseException; holds the cause of each rank
        causes = [cause for cause, _ in error.failures.values()]
        failure = f"rank {dist.get_rank()}: {causes[0] if causes else error}"
    except Exception as error:
        failure = f"rank {dist.get_rank()}: {type(error).__name__}: {error}"
        if watch is not None:
            watch.announce(error)
    failures: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    if failure and watch is not None:
        watch.withdraw()
    seen = [text for text in failures if text]
    if seen:
        raise CheckpointError(f"could not {what}: {'; '.join(seen[:3])}")


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Writing and reading sharded state as one folder that is either complete or absent.

A checkpoint is written under a temporary name by all ranks, made durable, and then renamed by one
rank: the rename is the moment it exists. A process killed before leaves a folder whose name says
so, and which nothing will load.

`parallel/checkpoint_save.py` does the writing.
"""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from parallel import failure_watch, optimizer_state
from parallel.checkpoint_load import reading_directly
from parallel.checkpoint_manifest import NAME as MANIFEST_NAME
from parallel.checkpoint_manifest import Entry, read_manifest, verify
from parallel.checkpoint_plan import Plans
from parallel.checkpoint_reader import CheckpointReader
from parallel.checkpoint_save import (
    FORMAT_NAME,
    TENSORS_SUFFIX,
    Background,
    CheckpointError,
    HostMemory,
    PendingSave,
    SaveFailed,
    plan_save,
)
from parallel.megatron import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    dist_checkpointing,
)
from parallel.safe_pickle import without_advice

PARTIAL_SUFFIX = ".partial"
_AHEAD_BYTES = 128 << 20  # of a rank: more of it would keep what the ranks agree by from the disk
_AHEAD_STEP_BYTES = 8 << 20
_END_BYTES = 128 << 10  # where a file has its small entries (`checkpoint_save._split`)


def save(
    state: dict[str, Any], folder: Path, *, metadata: dict[str, Any], checksums: bool = True
) -> None:
    """Write `state` to `folder`, which must not exist, and return when it is there. All ranks must
    call it; see `start_save`.

    Raises:
        SaveFailed: on every rank alike; `folder` is then absent.
        CheckpointError: on every rank alike: `state` does not make a checkpoint.
    """
    start_save(state, folder, metadata=metadata, memory=None, checksums=checksums).wait()


def start_save(
    state: dict[str, Any],
    folder: Path,
    *,
    metadata: dict[str, Any],
    memory: HostMemory | None,
    checksums: bool = True,
    plans: Plans | None = None,
    validate: bool = True,
    when_published: Callable[[], None] | None = None,
    may_publish: Callable[[], bool] = lambda: True,
) -> PendingSave:
    """Begin to write `state` to `folder`, which must not exist, in the background.

    All ranks must call it, and none a second time before the first save is done.

    Args:
        state: megatron-core sharded tensors and plain values; plain values are taken from rank 0.
        metadata: stored beside it (`dist_checkpointing.load_content_metadata`).
        memory: the state is copied there and may change as soon as this returns. None: it is
            written from where it is, and must not change before the save is done.
        checksums: take checksums for the manifest.
        plans: knows the plan of the last save, which costs as much as many copies; None: the save
            is planned anew.
        validate: see that each part of each tensor is written by exactly one rank; once is enough
            for a state that changes in nothing but values.
        when_published: called on rank 0, in the thread that writes, as soon as the folder is there.
        may_publish: asked on rank 0, in that thread, right before the folder gets its name; where
            it says no the save has failed, and nothing of it is touched any more.

    Raises:
        SaveFailed: on every rank alike: the folder cannot be made.
        CheckpointError: on every rank alike: `state` does not make a checkpoint.
    """
    partial = folder.with_name(folder.name + PARTIAL_SUFFIX)

    def prepare() -> str:
        if folder.exists():
            raise FileExistsError(f"{folder} exists already")
        shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
        partial.mkdir(parents=True)
        return uuid.uuid4().hex

    token = on_rank_zero(prepare, f"prepare {partial}", SaveFailed)
    stored = {key: value for key, value in metadata.items() if key != "dp_cp_group"}
    shards = _on_every_rank(
        lambda: plan_save(
            state,
            partial,
            metadata=stored,
            memory=memory,
            checksums=checksums,
            plans=plans,
            validate=validate,
        ),
        f"plan {partial}",
    )
    return PendingSave(shards, folder, token, when_published, may_publish)


def load(
    state: dict[str, Any],
    folder: Path,
    *,
    weights_only: bool = False,
    search: DamageSearch | None = None,
) -> dict[str, Any]:
    """Fill `state`'s sharded tensors from `folder`, in place; returns it with the plain values.

    All ranks must call it; `state` may have another layout than what was saved. Each tensor stored
    must be wanted by some rank, and each one wanted be stored; with `weights_only` the optimizer's
    are left unread. Between parallel.precision=fp32 and bf16 masters stand in for weights and the
    other way round (`optimizer_state.resolve_masters`). `search` is begun, and need not read what
    is read here.

    Raises:
        CheckpointError: on every rank alike: the folder is missing or incomplete, or cannot be
            read, or its tensors are not those of `state` (named, up to a few), or loading it could
            run a program (nothing of it was executed).
    """
    if not is_complete(folder):
        raise CheckpointError(f"{folder} is not a complete checkpoint")
    reader = _on_every_rank(lambda: CheckpointReader(folder), f"read {folder}")
    on_rank_zero(reader.check_harmless, f"read {folder}")
    wanted, counts = _wanted_on_all_ranks(state)
    stored = _on_every_rank(lambda: _shapes_stored(reader), f"read {folder}")
    if weights_only:
        stored = {n: s for n, s in stored.items() if not n.startswith(optimizer_state.PREFIX)}
    sources = optimizer_state.resolve_masters(set(wanted), set(stored))
    differences = _differences(wanted, stored, sources)
    if differences:
        raise CheckpointError(
            f"{folder} does not hold the tensors of this run:\n"
            + "\n".join(differences)
            + "\nUse the settings it was saved with: the model, and what of it is trained."
        )
    once = _read_once(stored, counts, sources)
    # those read from a weight come second: one call wants one type for each stored tensor
    masters = {name: sources[name] for name in sources if optimizer_state.is_master(name)}
    what = f"read {folder}"
    loaded = _on_every_rank(lambda: _read(state, reader, sources, masters, search, once), what)
    if masters:  # by itself: a rank that has failed does not begin with it
        _on_every_rank(lambda: _read_masters(state, reader, masters), what)
    return loaded


def _read(
    state: dict[str, Any],
    reader: CheckpointReader,
    sources: dict[str, str],
    masters: Container[str],
    search: DamageSearch | None,
    once: set[str],
) -> dict[str, Any]:
    """Fill `state`, each tensor from the stored one that `sources` names, or its namesake;
    `masters` are left as they are."""

    def first(entry: Any) -> Any:
        return None if _name(entry) in masters else optimizer_state.renamed(entry, sources)

    with reading_directly(reader, search, once):
        return dist_checkpointing.load(optimizer_state.mapped(state, first), str(reader.folder))


def _read_masters(state: dict[str, Any], reader: CheckpointReader, masters: dict[str, str]) -> None:
    second = [entry for entry in optimizer_state.leaves(state) if _name(entry) in masters]
    tensors = {
        str(index): optimizer_state.renamed(entry, masters) for index, entry in enumerate(second)
    }
    with reading_directly(reader):
        dist_checkpointing.load(tensors, str(reader.folder))


def _name(entry: Any) -> str | None:
    """Under which a checkpoint stores a tensor or an object; None for plain values."""
    return getattr(entry, "unique_key", None) or getattr(entry, "key", None)


def _sharded(state: Any) -> Iterator[ShardedTensor | ShardedObject]:
    for entry in optimizer_state.leaves(state):
        if isinstance(entry, ShardedTensorFactory):
            yield from _sharded(entry.build())
        elif isinstance(entry, ShardedTensor | ShardedObject):
            yield entry


def _shapes(entries: Iterable[ShardedTensor | ShardedObject]) -> dict[str, tuple[int, ...]]:
    """The global shape of each, by name."""
    return {str(_name(entry)): tuple(entry.global_shape) for entry in entries}


def _wanted_on_all_ranks(state: Any) -> tuple[dict[str, tuple[int, ...]], Counter[str]]:
    """Global shapes by name, and how many numbers of each tensor the ranks want together."""
    entries = list(_sharded(state))
    count: Counter[str] = Counter()
    for entry in entries:
        if isinstance(entry, ShardedTensor):
            count[entry.key] += math.prod(entry.local_shape)
    mine = _shapes(entries), count
    ranks = [mine] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    shapes = {name: shape for shapes, _ in ranks for name, shape in shapes.items()}
    return shapes, sum((counter for _, counter in ranks), Counter())


def _shapes_stored(reader: CheckpointReader) -> dict[str, tuple[int, ...]]:
    objects = [ShardedObject.empty_from_unique_key(name) for name in reader.objects]
    return {name: tensor.shape for name, tensor in reader.tensors.items()} | _shapes(objects)


def _read_once(
    stored: dict[str, tuple[int, ...]], counts: Counter[str], sources: dict[str, str]
) -> set[str]:
    """Names of stored tensors of which no number is wanted twice: what the ranks want of each
    part, which all of them together need, is no more than there is."""
    wanted: Counter[str] = Counter()
    for name, count in counts.items():
        wanted[sources.get(name, name)] += count
    return {name for name, count in wanted.items() if count <= math.prod(stored[name])}


def _differences(
    wanted: dict[str, tuple[int, ...]],
    stored: dict[str, tuple[int, ...]],
    sources: dict[str, str],
) -> list[str]:
    """What keeps `wanted` from being read, a line for each kind: nothing where all fits."""
    read = {sources.get(name, name): shape for name, shape in wanted.items()}
    missing = [name for name in read if name not in stored]
    unread = [name for name in stored if name not in read and name not in sources]
    reshaped = [
        f"{name} {list(stored[name])} stored, {list(shape)} wanted"
        for name, shape in read.items()
        if name in stored and stored[name] != shape
    ]
    kinds = {
        "wanted and not stored": missing,
        "stored and not wanted": unread,
        "of another shape": reshaped,
    }
    return [f"  {kind} ({len(names)}): {_few(names)}" for kind, names in kinds.items() if names]


def _few(names: list[str], at_most: int = 5) -> str:
    return ", ".join(sorted(names)[:at_most]) + (", ..." if len(names) > at_most else "")


def load_plain_values(folder: Path) -> dict[str, Any]:
    """The values that are not sharded (step counters, settings), without any tensor.

    Raises CheckpointError where they cannot be read, or loading them could run a program (nothing
    of it was executed).
    """
    if not is_complete(folder):
        raise CheckpointError(f"{folder} is not a complete checkpoint")
    try:
        return CheckpointReader(folder).plain
    except (OSError, ValueError) as error:
        raise CheckpointError(f"could not read {folder}: {error}") from error


def plain_values_on_all_ranks(folder: Path) -> dict[str, Any]:
    """`load_plain_values`, which all ranks must call. Raises on all alike."""
    return _on_every_rank(lambda: load_plain_values(folder), f"load {folder.name}")


def is_complete(folder: Path) -> bool:
    """True for a folder that `save` published."""
    return not folder.name.endswith(PARTIAL_SUFFIX) and (folder / FORMAT_NAME).is_file()


def damage(folder: Path) -> list[str]:
    """What can be seen to be wrong with a checkpoint at once: sizes, and the content of small
    files. The same lines on every rank; empty: nothing. All ranks must call it.

    What rank 0 does not find as well is no damage: a rank whose host has lost the mount, or
    cannot read for another reason, must not condemn what is sound.

    Raises:
        CheckpointError: on every rank alike: the manifest is of a newer version, a rank cannot
            read what is there, or finds damaged what rank 0 finds sound.
    """
    return _confirmed(
        folder, _on_every_rank(lambda: _seen_at_once(folder), f"verify {folder}", watched=False)
    )


def read_ahead(folder: Path) -> None:
    """Have the kernel fetch the beginnings of the files that this rank will probably load.

    Returns at once: the disk works while the ranks agree on who reads what, which takes some tenths
    of a second. What cannot be read is left to those who need it.
    """
    size, rank = dist.get_world_size(), dist.get_rank()

    def fetch() -> None:
        with suppress(OSError):
            for path in folder.iterdir():  # first what the ranks agree by: it must not queue up
                if not path.name.endswith(TENSORS_SUFFIX):
                    _will_need(path, 0, 0)
            if rank == 0:  # which looks at all that could run a program: that lies at the ends
                for path in folder.glob(f"*{TENSORS_SUFFIX}"):
                    _will_need(path, max(0, path.stat().st_size - _END_BYTES), _END_BYTES)
            names = sorted(_share_of(rank, size, folder))
            for begin in range(0, _AHEAD_BYTES // max(1, len(names)), _AHEAD_STEP_BYTES):
                for name in names:  # side by side, as the loader's threads read them
                    _will_need(folder / name, begin, _AHEAD_STEP_BYTES)

    threading.Thread(target=fetch, name="read ahead", daemon=True).start()


def _will_need(path: Path, begin: int, count: int) -> None:
    """count: bytes; 0: up to the end."""
    with suppress(OSError), open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), begin, count, os.POSIX_FADV_WILLNEED)


class DamageSearch:
    """Compares the content of a checkpoint's tensors with its manifest while they are loaded.

    A rank's share is what it will probably load, the files written by the rank of its number. Of
    those that it loads as a whole `load` takes the checksum; a thread reads the others meanwhile.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._loaders: set[str] = set()
        self._found: dict[str, Entry] = {}  # by `load`
        self._others: Background[list[str]] | None = None

    def leave_to_loader(self, names: set[str]) -> set[str]:
        """Begin with all but those of `names` that are of this rank's share, and return these."""
        if self._others is None:
            self._loaders = names & _share(self._folder)
            self._begin()
        return self._loaders

    def found(self, name: str, entry: Entry) -> None:
        """What the loader has read."""
        self._found[name] = entry

    def result(self) -> list[str]:
        """As `damage`, when all is compared. All ranks must call it."""
        return _confirmed(
            self._folder, _on_every_rank(self._damaged, f"verify {self._folder}", watched=False)
        )

    def _begin(self) -> Background[list[str]]:
        names = _share(self._folder) - self._loaders
        self._others = Background(lambda: _damaged(self._folder, names))
        return self._others

    def _damaged(self) -> list[str]:
        others = self._others or self._begin()
        # what the loader left out, because it failed, is read now
        loaders = Background(lambda: _damaged(self._folder, self._loaders, self._found))
        return [*others.result(), *loaders.result()]


def _confirmed(folder: Path, mine: list[str]) -> list[str]:
    """What rank 0 finds wrong with the files that any rank complains of; the same on all."""
    everyone: list[tuple[str, list[str]]] = [("", [])] * dist.get_world_size()
    dist.all_gather_object(everyone, (platform.node(), mine))
    lines = list(dict.fromkeys(line for _, found in everyone for line in found))
    if not lines:
        return []
    confirmed = on_rank_zero(
        lambda: Background(lambda: _found_again(folder, lines)).result(), f"verify {folder}"
    )
    if confirmed:
        return confirmed
    who = [
        f"rank {rank} on {host} cannot see or read {folder} as rank 0 does: {found[0]}"
        for rank, (host, found) in enumerate(everyone)
        if found
    ]
    raise CheckpointError(
        f"{'; '.join(who[:3])}. Rank 0 on {everyone[0][0]} finds nothing wrong with it, so it is "
        "left as it is: see that all hosts have the folder mounted, and start again"
    )


def _found_again(folder: Path, lines: list[str]) -> list[str]:
    """On rank 0."""
    at_once = _seen_at_once(folder)
    if at_once:
        return at_once
    names = [
        name
        for name in read_manifest(folder)["files"]
        if any(line.startswith(f"{name} ") for line in lines)
    ]
    return verify(folder, names=names, unreadable_is_damage=False)


def _seen_at_once(folder: Path) -> list[str]:
    if not (folder / FORMAT_NAME).is_file():
        return [f"{FORMAT_NAME} is missing"]
    if dist.get_rank() != 0:
        return []
    sizes = verify(folder, checksums=False, unreadable_is_damage=False)
    if sizes:
        return sizes
    names = read_manifest(folder)["files"]
    unlisted = {path.name for path in folder.glob(f"*{TENSORS_SUFFIX}")} - set(names)
    if unlisted:  # nothing could say whether they are whole
        return [f"{name} is not in {MANIFEST_NAME}" for name in sorted(unlisted)]
    small = [name for name in names if not name.endswith(TENSORS_SUFFIX)]
    return verify(folder, names=small, unreadable_is_damage=False)


def _share(folder: Path) -> set[str]:
    """Names of the files with tensors that this rank compares."""
    return _share_of(dist.get_rank(), dist.get_world_size(), folder)


def _share_of(rank: int, world_size: int, folder: Path) -> set[str]:
    names = {path.name for path in folder.glob(f"*{TENSORS_SUFFIX}")}
    return {name for name in names if _writer_of(name) % world_size == rank}


def _damaged(folder: Path, names: set[str], known: dict[str, Entry] | None = None) -> list[str]:
    return verify(folder, names=names, known=known, unreadable_is_damage=False)


def _writer_of(name: str) -> int:
    match = re.match(r"__(\d+)_", name)
    return int(match.group(1)) if match else 0


def on_rank_zero(
    action: Callable[[], Any], what: str, error_type: type[CheckpointError] = CheckpointError
) -> Any:
    """Run on rank 0 while the others wait; what it returns, or its failure, reaches all."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except Exception as error:
            outcome[1] = f"{type(error).__name__}: {error}"
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise error_type(f"could not {what}: {outcome[1]}")
    return outcome[0]


def _on_every_rank(action: Callable[[], Any], what: str, *, watched: bool = True) -> Any:
    """Run everywhere, returns what it returned here; a failure of one rank is raised on all.

    Ranks that are stuck inside, waiting for the one that failed, are ended by the failure watch;
    not with `watched=False`, for what no rank waits in for another.
    """
    failure: str | None = None
    result = None
    watch = failure_watch.current() if watched else None
    try:
        result = action()
    except CheckpointException as error:  # a BaseException; holds the cause of each rank
        causes = [cause for cause, _ in error.failures.values()]
        failure = f"rank {dist.get_rank()}: {without_advice(causes[0] if causes else error)}"
    except Exception as error:
        host = platform.node()
        told = f"{type(error).__name__}: {without_advice(error)}"
        failure = f"rank {dist.get_rank()} on {host}: {told}"
        if watch is not None:
            watch.announce(error)
    failures: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    if failure and watch is not None:
        watch.withdraw()
    seen = [text for text in failures if text]
    if seen:
        raise CheckpointError(f"could not {what}: {'; '.join(seen[:3])}")
    return result

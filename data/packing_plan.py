"""Which pieces of which documents make up each sequence, where arithmetic alone cannot say.

    document lengths (.idx) -> pieces of at most seq_length + 1 ids -> sequences -> three files

Computed once for a store and a setting, then memory-mapped: opening costs the same whatever the
size, a sequence is found in O(1), and processes share the pages. 12 bytes a piece and 8 a sequence,
which is about 1 % of the ids of a uint16 store with documents of 600 tokens.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.packing_config import PackingConfig, PackingMode
from data.token_store import TokenStore

# Documents packed together. More leaves less padding (the last sequences of a group stay open) and
# costs memory while packing: about 60 bytes a document. Changing it changes every plan.
DOCUMENTS_AT_ONCE = 1 << 20
_VERSION = 1  # of the algorithm and the files; part of a plan's name
_FILES = {"first_piece": "<i8", "starts": "<i8", "lengths": "<i4"}


class PackingPlan:
    """Sequence i is made of pieces first_piece[i] to first_piece[i + 1] - 1.

    A piece is `lengths` ids of the store from token `starts` on, inside one document.
    """

    def __init__(self, folder: Path):
        about = json.loads((folder / "plan.json").read_text())
        arrays = {}
        for name, dtype in _FILES.items():
            array = np.asarray(np.memmap(folder / name, dtype=dtype, mode="r"))
            if len(array) != about[name]:
                raise ValueError(
                    f"{folder / name}: {len(array)} entries where {about[name]} are expected; "
                    f"delete {folder} and it is computed again"
                )
            arrays[name] = array
        self.first_piece = arrays["first_piece"]
        self.starts, self.lengths = arrays["starts"], arrays["lengths"]
        self.sequences = len(self.first_piece) - 1

    def pieces(self, number: int) -> list[tuple[int, int]]:
        """(start, length) of the pieces of one sequence, in order."""
        first, stop = self.first_piece[number : number + 2].tolist()
        return list(
            zip(self.starts[first:stop].tolist(), self.lengths[first:stop].tolist(), strict=True)
        )


def plan_folder(
    store: TokenStore, seq_length: int, packing: PackingConfig, drop_tail: bool, folder: Path
) -> Path:
    """Where the plan of a store lies: the name holds everything it depends on."""
    depends_on = (
        _VERSION,
        DOCUMENTS_AT_ONCE,
        store.info.idx_sha256,
        seq_length,
        packing.mode.value,
        packing.max_document_tokens,
        drop_tail and packing.mode is PackingMode.concatenate,
    )
    digest = hashlib.blake2b(repr(depends_on).encode(), digest_size=8).hexdigest()
    return folder / f"{store.prefix.name}-{packing.mode.value}-{seq_length}-{digest}"


def open_plan(
    store: TokenStore,
    seq_length: int,
    packing: PackingConfig,
    *,
    drop_tail: bool,
    folder: Path | None = None,
) -> PackingPlan:
    """The plan of a store, computed and written first if there is none.

    folder: for the plans of many stores; default: `.packing` beside the store. Writing is a rename
    of a finished folder, so any number of processes may do it at once, and one on each file system
    may do it before the others come (about 0.3 s a million documents).

    Raises OSError where the folder cannot be written, ValueError for a plan whose files were cut.
    """
    folder = folder or store.prefix.parent / ".packing"
    target = plan_folder(store, seq_length, packing, drop_tail, folder)
    if not (target / "plan.json").is_file():
        _write(store, seq_length, packing, drop_tail, target)
    return PackingPlan(target)


def _write(
    store: TokenStore, seq_length: int, packing: PackingConfig, drop_tail: bool, target: Path
) -> None:
    building = target.with_name(f".building-{target.name}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        building.mkdir(parents=True)
    except OSError as error:
        raise OSError(
            f"cannot write the packing of {store.prefix} to {target.parent} ({error}); set "
            "data.cache_dir to a folder you may write to, or data.packing.mode=concatenate without "
            "data.packing.max_document_tokens, which needs none"
        ) from error
    try:
        if packing.mode is PackingMode.best_fit:
            parts = _best_fit(store, seq_length, packing.max_document_tokens)
        else:
            assert packing.max_document_tokens is not None
            parts = _truncated(store, seq_length, packing.max_document_tokens, drop_tail)
        counts = dict.fromkeys(_FILES, 0)
        files = {name: open(building / name, "wb") for name in _FILES}  # noqa: SIM115
        try:
            np.zeros(1, _FILES["first_piece"]).tofile(files["first_piece"])
            for pieces_per_sequence, starts, lengths in parts:
                ends = counts["starts"] + np.cumsum(pieces_per_sequence)
                for name, values in {
                    "first_piece": ends,
                    "starts": starts,
                    "lengths": lengths,
                }.items():
                    values.astype(_FILES[name]).tofile(files[name])
                    counts[name] += len(values)
        finally:
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
                file.close()
        counts["first_piece"] += 1
        with open(building / "plan.json", "w") as about:
            json.dump(counts, about)
            about.flush()
            os.fsync(about.fileno())
        try:
            building.rename(target)
        except OSError:
            # renaming onto a folder that is not empty fails: another process was first
            if not (target / "plan.json").is_file():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


# pieces of each sequence, and the start and length of each piece
_Part = tuple[np.ndarray, np.ndarray, np.ndarray]


def _documents(store: TokenStore, longest: int | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Starts and lengths (cut at `longest`) of the documents, a group at a time."""
    for first in range(0, store.documents, DOCUMENTS_AT_ONCE):
        stop = min(first + DOCUMENTS_AT_ONCE, store.documents)
        borders = document_starts(store, first, stop + 1)
        lengths = np.diff(borders)
        yield borders[:-1], lengths if longest is None else np.minimum(lengths, longest)


def document_starts(store: TokenStore, first: int, stop: int) -> np.ndarray:
    """Token offsets at which documents [first, stop) begin; document `store.documents` is the end
    of the stream: int64 [stop - first]."""
    boundaries, offsets = store.index.boundaries[first:stop], store.index.offsets
    begins = offsets[np.minimum(boundaries, len(offsets) - 1)]
    tokens = begins // np.dtype(store.info.dtype).itemsize
    return np.where(boundaries < len(offsets), tokens, store.tokens).astype(np.int64)


def _best_fit(store: TokenStore, seq_length: int, longest: int | None) -> Iterator[_Part]:
    for starts, lengths in _documents(store, longest):
        starts, lengths = cut(starts, lengths, seq_length)
        sequence = best_fit_decreasing(lengths, seq_length + 1)
        # sequences in the order of their first piece, pieces in the order of the store: what
        # packing made of lengths (the longest first) must not show in what is read when
        first = np.full(int(sequence.max()) + 1, np.iinfo(np.int64).max)
        np.minimum.at(first, sequence, starts)
        rank = np.empty_like(first)
        rank[np.argsort(first)] = np.arange(len(first))
        sequence = rank[sequence]
        order = np.lexsort((starts, sequence))
        yield np.bincount(sequence, minlength=len(first)), starts[order], lengths[order]


def cut(starts: np.ndarray, lengths: np.ndarray, seq_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Pieces of at most seq_length + 1 ids. Neighbours share one id, so that every id of a document
    but its first is the label of exactly one piece."""
    pieces = np.maximum(1, -(-(lengths - 1) // seq_length))
    if int(pieces.max()) == 1:
        return starts, lengths
    number = np.arange(int(pieces.sum())) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    offset = number * seq_length
    left = np.repeat(lengths, pieces) - offset
    return np.repeat(starts, pieces) + offset, np.minimum(left, seq_length + 1)


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The bin of each item: longest items first, each into the fullest bin that still takes it.

    Best-fit decreasing (arXiv 2404.10830 section 3.2, Algorithm 1) on counts instead of items:
    items of one length and bins with one free space are interchangeable, so whole groups are placed
    at once, about 0.2 µs an item. Bins with equal space are taken newest first, where the paper
    leaves the choice open. lengths: in [1, capacity].
    """
    order = np.argsort(-lengths, kind="stable")
    in_order = lengths[order]
    group_starts = np.flatnonzero(np.r_[True, in_order[1:] != in_order[:-1]]).tolist()
    bin_of_item = np.empty(len(lengths), np.int64)
    open_bins: dict[int, list[int]] = {}  # by free space
    spaces = 0  # bit r is set where open_bins[r] is not empty
    bins = 0
    for start, stop in zip(group_starts, [*group_starts[1:], len(lengths)], strict=True):
        length, at = int(in_order[start]), start
        while at < stop:
            fitting = spaces >> length
            if fitting:
                space = length + (fitting & -fitting).bit_length() - 1
                here = open_bins[space]
            else:
                space, here = capacity, []
            each = space // length  # the fullest bin that takes one takes the next one too
            wanted = -(-(stop - at) // each)
            if fitting:
                taken = here[-wanted:]
                del here[-wanted:]
                if not here:
                    spaces ^= 1 << space
            else:
                taken = list(range(bins, bins + wanted))
                bins += wanted
            placed = min(stop - at, len(taken) * each)
            bin_of_item[order[at : at + placed]] = np.repeat(taken, each)[:placed]
            at += placed
            last = placed - (len(taken) - 1) * each  # items in the last of these bins
            for left, which in (
                (space - each * length, taken[:-1]),
                (
                    space - last * length,
                    taken[-1:],
                ),
            ):
                if left and which:
                    open_bins.setdefault(left, []).extend(which)
                    spaces |= 1 << left
    return bin_of_item


def _truncated(
    store: TokenStore, seq_length: int, longest: int, drop_tail: bool
) -> Iterator[_Part]:
    """Documents cut at `longest`, concatenated, cut every seq_length; neighbours share an id."""
    carry_starts, carry_lengths = np.zeros(0, np.int64), np.zeros(0, np.int64)
    written = False
    for starts, lengths in _documents(store, longest):
        starts, lengths = np.r_[carry_starts, starts], np.r_[carry_lengths, lengths]
        ends = np.cumsum(lengths)
        sequences = (int(ends[-1]) - 1) // seq_length
        if sequences:
            yield _sequences_of(starts, lengths, np.arange(sequences) * seq_length, seq_length + 1)
            written = True
        # what the next group goes on from: the id that the last sequence ended in
        begin = sequences * seq_length
        first = int(np.searchsorted(ends, begin, side="right"))
        skipped = begin - int(ends[first] - lengths[first])
        carry_starts, carry_lengths = starts[first:].copy(), lengths[first:].copy()
        carry_starts[0] += skipped
        carry_lengths[0] -= skipped
    left = int(carry_lengths.sum())
    if drop_tail and not written:  # too short for one sequence: repeat it, like PackedSequences
        times = -(-(seq_length + 1) // left)
        starts, lengths = np.tile(carry_starts, times), np.tile(carry_lengths, times)
        yield _sequences_of(starts, lengths, np.zeros(1, np.int64), seq_length + 1)
    elif not drop_tail and (left > 1 or not written):
        yield np.array([len(carry_starts)]), carry_starts, carry_lengths


def _sequences_of(starts: np.ndarray, lengths: np.ndarray, begins: np.ndarray, size: int) -> _Part:
    """The pieces of [begin, begin + size) of the concatenated documents, for each begin."""
    ends = np.cumsum(lengths)
    offsets = ends - lengths
    first = np.searchsorted(ends, begins, side="right")
    last = np.searchsorted(offsets, begins + size, side="left")
    pieces = last - first
    which = np.arange(int(pieces.sum())) + np.repeat(first - np.cumsum(pieces) + pieces, pieces)
    begin = np.maximum(np.repeat(begins, pieces), offsets[which])
    end = np.minimum(np.repeat(begins + size, pieces), ends[which])
    return pieces, starts[which] + begin - offsets[which], end - begin

"""Cuts one store into training sequences, and orders them without an index.

Documents are concatenated, each with its end-of-document id, and cut every seq_length tokens:
sequence i predicts ids [i L + 1, i L + L] of the stream from ids [i L, i L + L - 1]. A sequence may
begin inside a document and hold several; attention and loss cross their borders, as in GPT-2 and
Megatron-LM. Other ways are settings: data.packing_config.
"""

from collections.abc import Sequence
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.packing_config import PackingConfig
from data.packing_plan import PackingPlan, document_starts, open_plan
from data.token_store import TokenStore

_ROUNDS = 6
# of splitmix64; as numbers of numpy's, which they would be made into at every use
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_30, _27, _31 = np.uint64(30), np.uint64(27), np.uint64(31)


class Tail(Enum):
    """What becomes of the last part of the stream, which is shorter than a sequence."""

    drop = "drop"  # training: every sequence is full; a store shorter than one sequence repeats
    pad = "pad"  # validation: every id is predicted exactly once; the rest of the last is padding


class Rows(NamedTuple):
    """b packed rows of one id more than a sequence has tokens.

    valid counts the labels of each row that come before its padding. label_mask, where given, says
    of each label whether it counts, padding included; it is there when labels that cross a border
    between documents may be left out. documents numbers the documents of each row, padding last.
    """

    ids: np.ndarray  # [b, s + 1] int64
    valid: np.ndarray  # [b] int64
    documents: np.ndarray | None = None  # [b, s + 1] int32
    label_mask: np.ndarray | None = None  # [b, s] bool


class PackedSequences:
    """The sequences of one store, numbered from 0; see `fill` and `pieces`.

    Concatenated: sequence i is ids [i * seq_length, i * seq_length + seq_length + 1). With
    Tail.drop there are (tokens - 1) // seq_length of them, the remainder is never seen; a store too
    short for even one gives one sequence that repeats the stream as often as needed, so that a tiny
    language still takes part (it is then seen several times an epoch). With Tail.pad there are
    ceil((tokens - 1) / seq_length) and the last is filled up with the end-of-document id.

    With packing.max_document_tokens the same holds of the stream of shortened documents. With best
    fit every document is in exactly one sequence (one longer than a sequence in several), any
    sequence may end in padding, and `tail` has no part in it. Both look sequences up in a plan,
    which is computed when it is missing (`data.packing_plan.open_plan`; plan_folder: where).
    """

    def __init__(
        self,
        store: TokenStore,
        seq_length: int,
        tail: Tail = Tail.drop,
        packing: PackingConfig | None = None,
        plan_folder: Path | None = None,
    ):
        if seq_length < 1:
            raise ValueError(f"data.seq_length={seq_length}: must be at least 1 token")
        self.store, self.seq_length, self.tail = store, seq_length, tail
        self.packing = packing or PackingConfig()
        self._eod_id = store.info.eod_id
        # passes over the store within one sequence: above 1 for a store shorter than a sequence
        self.repeats = 1.0
        # the sequences that lie in the store in one piece: a view of its map, which see
        self.whole = np.empty((0, seq_length + 1), store.dtype)
        self._plan: PackingPlan | None = None
        if self.packing.needs_plan:
            self._plan = open_plan(
                store,
                seq_length,
                self.packing,
                drop_tail=tail is Tail.drop,
                folder=plan_folder,
            )
            self._length = self._plan.sequences
            return
        self.whole = store.windows(seq_length + 1, step=seq_length)
        in_all = -(-(store.tokens - 1) // seq_length)
        self._length = max(1, len(self.whole) if tail is Tail.drop else in_all)
        if tail is Tail.drop:
            self.repeats = max(1.0, (seq_length + 1) / store.tokens)

    def __len__(self) -> int:
        return self._length

    def fill(self, number: int, out: np.ndarray) -> int:
        """Writes sequence `number` to out `[seq_length + 1]`; returns how many labels come before
        the padding, which is made of end-of-document ids."""
        if 0 <= number < len(self.whole):
            self.store.guard()
            out[:] = self.whole[number]
            return self.seq_length
        if not 0 <= number < self._length:
            raise IndexError(f"{self.store.prefix}: sequence {number} of {self._length}")
        if self._plan is not None:
            return self._fill_pieces(self._plan.pieces(number), out)
        ids = self.store.read(number * self.seq_length, self.store.tokens)
        if self.tail is Tail.drop:
            out[:] = np.resize(ids, len(out))
            return self.seq_length
        out[: len(ids)] = ids
        out[len(ids) :] = self._eod_id
        return len(ids) - 1

    def pieces(self, number: int) -> list[tuple[int, int]]:
        """(start, length) of what sequence `number` holds, in order: each lies in one document and
        is ids [start, start + length) of the store. Padding is what is missing to seq_length + 1.
        """
        if not 0 <= number < self._length:
            raise IndexError(f"{self.store.prefix}: sequence {number} of {self._length}")
        if self._plan is not None:
            return self._plan.pieces(number)
        start = number * self.seq_length
        stop = min(start + self.seq_length + 1, self.store.tokens)
        first, last = self.store.document_of(start), self.store.document_of(stop - 1)
        borders = [start, *document_starts(self.store, first + 1, last + 1).tolist(), stop]
        pieces = [(a, b - a) for a, b in pairwise(borders)]
        if stop - start == self.seq_length + 1 or self.tail is Tail.pad:
            return pieces
        # the repeated stream of a store shorter than one sequence
        repeated, left = [], self.seq_length + 1
        while left:
            for begin, length in pieces:
                repeated.append((begin, min(length, left)))
                left -= repeated[-1][1]
                if not left:
                    break
        return repeated

    def fill_borders(
        self, number: int, ids: np.ndarray, documents: np.ndarray, label_mask: np.ndarray
    ) -> None:
        """What depends on where documents end, for a sequence whose ids are filled in already.

        ids, documents [seq_length + 1], label_mask [seq_length]. A label that crosses a border
        counts if an end-of-document id precedes it and a document begins with it, unless
        packing.mask_boundary_loss leaves all of them out: the rest of a document that was cut, or
        what follows one, is nothing that could be predicted from the other side.
        """
        label_mask[:] = True
        at = 0
        for document, (start, length) in enumerate(self.pieces(number)):
            if document and (
                self.packing.mask_boundary_loss
                or ids[at - 1] != self._eod_id
                # the rest of a long document; only in plans does another one come before it
                or (self._plan and start and self.store.read(start - 1, start)[0] != self._eod_id)
            ):
                label_mask[at - 1] = False
            documents[at : at + length] = document
            at += length
        documents[at:] = document + 1
        label_mask[at - 1 :] = False

    def _fill_pieces(self, pieces: list[tuple[int, int]], out: np.ndarray) -> int:
        at = 0
        for start, length in pieces:
            out[at : at + length] = self.store.read(start, start + length)
            at += length
        out[at:] = self._eod_id
        return at - 1


class RowReader:
    """Reads sequences of several stores, all cut in the same way, as the rows of one array.

    Rows that lie in their store in one piece are copied by one call of numpy, which lets go of the
    interpreter meanwhile: 1 to 2 us a row of 2048 tokens. numpy takes many rows of one array at a
    time, but not of many arrays, and a call for each store costs more than the copying. So this
    looks at all the memory maps as at one array, from the lowest address to the highest, in which
    any id may begin a row; what lies between the maps is never touched.
    """

    def __init__(self, sequences: Sequence[PackedSequences]):
        self._sequences = sequences
        self._packing, self._seq_length = sequences[0].packing, sequences[0].seq_length
        self._guards = [s.store.guard for s in sequences]
        first = sequences[0].whole
        itemsize = first.itemsize
        # rows in one piece; stores of another type are read one row after another
        self._whole = np.array(
            [len(s.whole) if s.whole.dtype == first.dtype else 0 for s in sequences]
        )
        addresses = np.array([s.whole.ctypes.data for s in sequences])
        lowest = int(np.where(self._whole > 0, addresses, np.iinfo(np.int64).max).argmin())
        self._begin = (addresses - addresses[lowest]) // itemsize
        last = (self._begin + (self._whole - 1) * self._seq_length)[self._whole > 0]
        self._rows = np.lib.stride_tricks.as_strided(
            sequences[lowest].whole,
            (int(last.max(initial=-1)) + 1, self._seq_length + 1),
            (itemsize, itemsize),
            writeable=False,
        )

    def read(self, which: np.ndarray, numbers: np.ndarray) -> Rows:
        """Sequence numbers[i] of sequences[which[i]] for each i, both [b].

        Each store is asked once whether its file is still whole (TokenStore.guard).
        """
        whole = (numbers >= 0) & (numbers < self._whole[which])
        for i in set(which.tolist()):
            self._guards[i]()
        valid = np.full(len(which), self._seq_length)
        begin = self._begin[which] + numbers * self._seq_length
        if whole.all():
            ids = self._rows[begin].astype(np.int64)
        else:
            ids = np.empty((len(which), self._seq_length + 1), np.int64)
            ids[whole] = self._rows[begin[whole]]
            for row in np.flatnonzero(~whole).tolist():
                valid[row] = self._sequences[which[row]].fill(int(numbers[row]), ids[row])
        packing = self._packing
        if not (packing.needs_plan or packing.reset_attention or packing.mask_boundary_loss):
            return Rows(ids, valid)  # nothing depends on where documents end
        documents = np.empty(ids.shape, np.int32)
        label_mask = np.empty((len(which), self._seq_length), bool)
        for row, (i, number) in enumerate(zip(which.tolist(), numbers.tolist(), strict=True)):
            self._sequences[i].fill_borders(number, ids[row], documents[row], label_mask[row])
        return Rows(ids, valid, documents if packing.reset_attention else None, label_mask)


def permute(position: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """The element at `position` of a keyed permutation of range(size), all broadcast together.

    A Feistel network on pairs (left, right) of an a x b rectangle just large enough to hold `size`
    values, a = ceil(sqrt(size)), b = ceil(size / a): each round adds a hash of one half to the
    other, modulo its side, which can be undone, so the whole is a bijection of the rectangle.
    Values that land outside range(size) walk on along their cycle (Black and Rogaway 2002, "Ciphers
    with Arbitrary Finite Domains") until they are back inside; the rectangle is at most a larger
    than size, so few have to. O(1) time per element, no memory, the same on every machine.

    position: integers in [0, size). size: at least 1, below 2**62. key: uint64.
    """
    arrays = np.broadcast_arrays(*(np.asarray(a, np.uint64) for a in (position, size, key)))
    shape = arrays[0].shape
    position, size, key = (array.ravel() for array in arrays)
    columns = np.ceil(np.sqrt(size)).astype(np.uint64)
    rows = (size + columns - np.uint64(1)) // columns
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is what is meant
        salts = _splitmix64(key + np.arange(_ROUNDS, dtype=np.uint64)[:, None])
        result = _feistel(position, columns, rows, salts)
        while len(outside := np.flatnonzero(result >= size)):
            result[outside] = _feistel(
                result[outside], columns[outside], rows[outside], salts[:, outside]
            )
    return result.astype(np.int64).reshape(shape)


def _feistel(
    position: np.ndarray, columns: np.ndarray, rows: np.ndarray, salts: np.ndarray
) -> np.ndarray:
    """position, columns, rows [n], salts [rounds, n], an even number of them: [n]."""
    left, right = np.divmod(position, columns)
    for first, second in zip(salts[::2], salts[1::2], strict=True):
        left = left + _splitmix64(first ^ right) % rows
        left = np.minimum(left, left - rows)  # modulo rows: without a sign, less than 0 is huge
        right = right + _splitmix64(second ^ left) % columns
        right = np.minimum(right, right - columns)
    return left * columns + right


def mix(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """A 64-bit hash of two uint64 arrays: splitmix64 (Steele, Lea, Flood 2014), once for each."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is what is meant
        x = _splitmix64(np.asarray(a, np.uint64))
        return _splitmix64(x ^ np.asarray(b, np.uint64))


def _splitmix64(x: np.ndarray) -> np.ndarray:
    x = x + _GAMMA
    x ^= x >> _30
    x *= _MIX_1
    x ^= x >> _27
    x *= _MIX_2
    x ^= x >> _31
    return x

"""Cuts one store into training sequences, and orders them without an index.

Documents are concatenated, each with its end-of-document id, and cut every seq_length tokens:
sequence i predicts ids [i L + 1, i L + L] of the stream from ids [i L, i L + L - 1]. A sequence may
begin inside a document and hold several; attention and loss cross their borders, as in GPT-2 and
Megatron-LM.
"""

from enum import Enum

import numpy as np

from data.token_store import TokenStore

_ROUNDS = 6


class Tail(Enum):
    """What becomes of the last part of the stream, which is shorter than a sequence."""

    drop = "drop"  # training: every sequence is full; a store shorter than one sequence repeats
    pad = "pad"  # validation: every id is predicted exactly once; the rest of the last is padding


class PackedSequences:
    """Sequence i of a store: ids [i * seq_length, i * seq_length + seq_length + 1).

    With Tail.drop there are (tokens - 1) // seq_length sequences, the remainder is never seen; a
    store too short for even one gives one sequence that repeats the stream as often as needed, so
    that a tiny language still takes part (it is then seen several times an epoch). With Tail.pad
    there are ceil((tokens - 1) / seq_length) and the last is filled up with the end-of-document id.
    """

    def __init__(self, store: TokenStore, seq_length: int, tail: Tail = Tail.drop):
        if seq_length < 1:
            raise ValueError(f"data.seq_length={seq_length}: must be at least 1 token")
        self.store, self.seq_length, self.tail = store, seq_length, tail
        predicted = store.tokens - 1
        whole = predicted // seq_length
        self._length = max(1, whole if tail is Tail.drop else -(-predicted // seq_length))

    def __len__(self) -> int:
        return self._length

    def fill(self, number: int, out: np.ndarray) -> int:
        """Writes sequence `number` to out `[seq_length + 1]`; returns how many labels are valid."""
        if not 0 <= number < self._length:
            raise IndexError(f"{self.store.prefix}: sequence {number} of {self._length}")
        start = number * self.seq_length
        ids = self.store.read(start, start + self.seq_length + 1)
        out[: len(ids)] = ids
        if len(ids) == len(out):
            return self.seq_length
        if self.tail is Tail.drop:
            out[:] = np.resize(ids, len(out))
            return self.seq_length
        out[len(ids) :] = self.store.info.eod_id
        return len(ids) - 1


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
    position, size, key = np.broadcast_arrays(
        np.asarray(position, np.int64), np.asarray(size, np.int64), np.asarray(key, np.uint64)
    )
    result = position.copy()
    columns = np.ceil(np.sqrt(size.astype(np.float64))).astype(np.uint64)
    rows = (size.astype(np.uint64) + columns - np.uint64(1)) // columns
    walking = np.ones(result.shape, bool)
    while walking.any():
        left, right = np.divmod(result[walking].astype(np.uint64), columns[walking])
        for round_number in range(_ROUNDS):
            salt = key[walking] + np.uint64(round_number)
            if round_number % 2:
                right = (right + mix(salt, left) % columns[walking]) % columns[walking]
            else:
                left = (left + mix(salt, right) % rows[walking]) % rows[walking]
        result[walking] = (left * columns[walking] + right).astype(np.int64)
        walking &= result >= size
    return result


def mix(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """A 64-bit hash of two uint64 arrays: splitmix64 (Steele, Lea, Flood 2014), once for each."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is what is meant
        x = _splitmix64(np.asarray(a, np.uint64))
        return _splitmix64(x ^ np.asarray(b, np.uint64))


def _splitmix64(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

from collections.abc import Callable

import numpy as np
import pytest

from data.packed_sequences import PackedSequences, Tail, mix, permute
from data.token_store import TokenStore


def read(sequences: PackedSequences, number: int) -> tuple[list[int], int]:
    out = np.full(sequences.seq_length + 1, -1, np.int64)
    valid = sequences.fill(number, out)
    return out.tolist(), valid


def test_sequences_are_slices_of_the_stream(make_store: Callable[..., TokenStore]) -> None:
    store = make_store("de", "germanic", tokens=103)
    sequences = PackedSequences(store, 25)
    assert len(sequences) == 4
    stream = store.read(0, 103).tolist()
    for number in range(4):
        assert read(sequences, number) == (stream[number * 25 : number * 25 + 26], 25)
    with pytest.raises(IndexError, match="sequence 4 of 4"):
        read(sequences, 4)
    with pytest.raises(ValueError, match=r"data.seq_length=0"):
        PackedSequences(store, 0)


@pytest.mark.parametrize(("tokens", "expected"), [(100, 3), (101, 4), (102, 4)])
def test_a_sequence_needs_the_token_after_it(make_store, tokens: int, expected: int) -> None:
    assert len(PackedSequences(make_store("de", "germanic", tokens=tokens), 25)) == expected


def test_a_short_store_repeats_for_training(make_store: Callable[..., TokenStore]) -> None:
    store = make_store("de", "germanic", tokens=7)
    stream = store.read(0, 7).tolist()
    sequences = PackedSequences(store, 15)
    assert len(sequences) == 1
    assert read(sequences, 0) == ((stream * 3)[:16], 15)


@pytest.mark.parametrize(
    ("tokens", "lengths"), [(103, [25, 25, 25, 25, 2]), (7, [6]), (101, [25] * 4)]
)
def test_padding_predicts_every_token_once(make_store, tokens: int, lengths: list[int]) -> None:
    store = make_store("de", "germanic", tokens=tokens)
    sequences = PackedSequences(store, 25, Tail.pad)
    assert [read(sequences, i)[1] for i in range(len(sequences))] == lengths
    labels = [t for i, n in enumerate(lengths) for t in read(sequences, i)[0][1 : n + 1]]
    assert labels == store.read(1, tokens).tolist()
    ids, valid = read(sequences, len(lengths) - 1)
    assert ids[valid + 1 :] == [store.info.eod_id] * (25 - valid)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 17, 1000, 65537])
def test_permutation_is_one(size: int) -> None:
    for key in (0, 1, 2**64 - 1):
        result = permute(np.arange(size), size, np.uint64(key))
        assert sorted(result.tolist()) == list(range(size))


def test_permutation_by_element_equals_permutation_at_once() -> None:
    position, size = np.arange(50), np.arange(50) + 50
    key = mix(np.arange(50, dtype=np.uint64), np.uint64(3))
    together = permute(position, size, key)
    assert together.tolist() == [
        int(permute(p, s, k)) for p, s, k in zip(position, size, key, strict=True)
    ]


def test_permutations_look_random() -> None:
    """Over 4000 keys every element lands everywhere equally often, and neighbours part."""
    size, keys = 20, 4000
    key = mix(np.uint64(7), np.arange(keys, dtype=np.uint64))[:, None]
    result = permute(np.arange(size)[None], size, key)
    counts = np.stack([np.bincount(result[:, p], minlength=size) for p in range(size)])
    chi_square = ((counts - keys / size) ** 2 / (keys / size)).sum()
    # (size - 1)^2 = 361 degrees of freedom: mean 361, standard deviation 27
    assert chi_square < 361 + 5 * 27
    successive = ((result[:, 1:] - result[:, :-1]) % size == 1).mean()
    assert abs(successive - 1 / (size - 1)) < 0.01

    large = permute(np.arange(10_000), 10_000, np.uint64(5))
    assert abs(np.corrcoef(np.arange(10_000), large)[0, 1]) < 0.05


def test_permutation_is_the_same_on_every_machine() -> None:
    assert permute(np.arange(10), 10, np.uint64(42)).tolist() == [0, 6, 2, 4, 5, 9, 3, 8, 7, 1]


def test_permutation_of_a_huge_range() -> None:
    size = 10**15
    positions = np.arange(5000) * (size // 5000)
    result = permute(positions, size, np.uint64(1))
    assert len(set(result.tolist())) == 5000 and min(result) >= 0 and max(result) < size

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from data.packed_sequences import (
    PackedSequences,
    RowReader,
    Rows,
    Tail,
    mix,
    permute,
)
from data.packing_config import PackingConfig, PackingMode
from data.store_writer import TokenStoreWriter
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


def test_rows_of_many_stores(make_store: Callable[..., TokenStore]) -> None:
    """Whole rows, rows that repeat or end in padding, and a store of another type, in any order."""
    stores = [
        make_store("de", "germanic", 1000),
        make_store("th", "kra-dai", 7),
        make_store("ru", "slavic", 500),
        make_store("zh", "sinitic", 300, vocab_size=100_000),
        make_store("la", "italic", 11),
    ]
    assert {store.dtype.name for store in stores} == {"uint16", "int32"}
    random = np.random.default_rng(0)
    for tail in Tail:
        for some in (stores, stores[::-1], stores[1:2], stores[:1] + stores[2:3]):
            sequences = [PackedSequences(store, 20, tail) for store in some]
            reader = RowReader(sequences)
            for b in (0, 1, 200):
                which = random.integers(0, len(some), b)
                numbers = random.integers(0, np.array([len(s) for s in sequences])[which])
                rows = reader.read(which, numbers)
                assert rows.ids.dtype == np.int64 and rows.ids.shape == (b, 21)
                expected = [read(sequences[w], n) for w, n in zip(which, numbers, strict=True)]
                assert rows.ids.tolist() == [ids for ids, _ in expected]
                assert rows.valid.tolist() == [valid for _, valid in expected]
            for wrong in (-1, len(sequences[0])):
                with pytest.raises(IndexError, match=f"sequence {wrong} of {len(sequences[0])}"):
                    reader.read(np.array([0, 0]), np.array([0, wrong]))


def test_a_batch_of_a_store_that_was_cut_off(make_store: Callable[..., TokenStore]) -> None:
    """Rows that are still there are refused as well: the file is not what it was."""
    stores = [make_store(code, "germanic", 1000) for code in ("de", "nl")]
    reader = RowReader([PackedSequences(store, 20) for store in stores])
    which, numbers = np.array([0, 1, 0]), np.array([0, 3, 1])
    before = reader.read(which, numbers).ids.tolist()
    os.truncate(stores[1].prefix.with_suffix(".bin"), 900)
    with pytest.raises(OSError, match=r"nl.bin: 900 bytes where there were 2,000 on opening"):
        reader.read(which, numbers)
    assert reader.read(which[::2], numbers[::2]).ids.tolist() == before[::2]


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


@pytest.fixture
def documents(tmp_path: Path) -> Callable[..., TokenStore]:
    """documents([3, 5]): a store of documents of so many ids, the end-of-document id 0 included;
    id k of document d is 100 d + k + 1."""

    def make(lengths: Sequence[int], language: str = "de") -> TokenStore:
        with TokenStoreWriter(
            tmp_path / language,
            language=language,
            family="germanic",
            tokenizer_fingerprint="f" * 64,
            vocab_size=60000,
            eod_id=0,
        ) as writer:
            for number, length in enumerate(lengths):
                writer.add_document(100 * number + 1 + np.arange(length - 1))
        return TokenStore(tmp_path / language)

    return make


RESET = PackingConfig(reset_attention=True)


def rows_of(sequences: PackedSequences) -> Rows:
    numbers = np.arange(len(sequences))
    return RowReader([sequences]).read(np.zeros_like(numbers), numbers)


def test_without_borders_only_ids_are_read(documents: Callable[..., TokenStore]) -> None:
    rows = rows_of(PackedSequences(documents([7, 4, 9]), 6, Tail.pad))
    assert rows.documents is None and rows.label_mask is None
    assert rows.valid.tolist() == [6, 6, 6, 1]


def test_documents_of_concatenated_sequences(documents: Callable[..., TokenStore]) -> None:
    store = documents([7, 4, 1, 3, 1])  # borders at 7, 11, 12, 15 of 16
    rows = rows_of(PackedSequences(store, 6, Tail.pad, RESET))
    assert rows.ids.tolist() == [
        [1, 2, 3, 4, 5, 6, 0],
        [0, 101, 102, 103, 0, 0, 301],
        [301, 302, 0, 0, 0, 0, 0],
    ]
    assert rows.documents is not None and rows.documents.tolist() == [
        [0] * 7,
        [0, 1, 1, 1, 1, 2, 3],
        [0, 0, 0, 1, 2, 2, 2],  # padding is a document of its own
    ]
    assert rows.documents.dtype == np.int32
    assert rows.label_mask is not None and rows.label_mask.astype(int).tolist() == [
        [1] * 6,
        [1] * 6,
        [1, 1, 1, 0, 0, 0],
    ]
    masked = PackingConfig(mask_boundary_loss=True)
    rows = rows_of(PackedSequences(store, 6, Tail.pad, masked))
    assert rows.documents is None
    assert rows.label_mask is not None and rows.label_mask.astype(int).tolist() == [
        [1] * 6,
        [0, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 0, 0],
    ]


def test_borders_of_a_repeated_short_store(documents: Callable[..., TokenStore]) -> None:
    sequences = PackedSequences(documents([3, 2]), 11, Tail.drop, RESET)
    rows = rows_of(sequences)
    assert rows.ids.tolist() == [[1, 2, 0, 101, 0, 1, 2, 0, 101, 0, 1, 2]]
    assert rows.documents is not None
    assert rows.documents.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4]]
    assert sequences.pieces(0) == [(0, 3), (3, 2), (0, 3), (3, 2), (0, 2)]


@pytest.mark.parametrize("tail", Tail)
@pytest.mark.parametrize("longest", [None, 5])
def test_pieces_are_what_is_read(make_store, tail: Tail, longest: int | None) -> None:
    store = make_store("de", "germanic", tokens=500)
    for mode in PackingMode:
        packing = PackingConfig(mode=mode, max_document_tokens=longest)
        sequences = PackedSequences(store, 12, tail, packing)
        for number in range(len(sequences)):
            ids, valid = read(sequences, number)
            pieces = sequences.pieces(number)
            joined = np.concatenate([store.read(a, a + n) for a, n in pieces]).tolist()
            assert ids == joined + [0] * (13 - len(joined)) and valid == len(joined) - 1
            for start, length in pieces:
                assert store.document_of(start) == store.document_of(start + length - 1)
        for wrong in (-1, len(sequences)):
            with pytest.raises(IndexError, match=f"sequence {wrong} of {len(sequences)}"):
                sequences.pieces(wrong)
            with pytest.raises(IndexError, match=f"sequence {wrong} of {len(sequences)}"):
                read(sequences, wrong)


BEST_FIT = PackingConfig(mode=PackingMode.best_fit)


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_cuts_no_document_that_fits(documents, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 90, 60).tolist()
    store, size = documents(lengths), 41
    sequences = PackedSequences(store, size - 1, packing=BEST_FIT)
    found: dict[int, list[tuple[int, int]]] = {}
    for number in range(len(sequences)):
        pieces = sequences.pieces(number)
        assert pieces == sorted(pieces) and sum(length for _, length in pieces) <= size
        for start, length in pieces:
            found.setdefault(store.document_of(start), []).append((start, length))
    assert sorted(found) == list(range(60))
    for document, pieces in found.items():
        start, stop = store.document_span(document)
        if lengths[document] <= size:
            assert pieces == [(start, stop - start)]
        # every id but the first is the label of one piece
        labels = sorted(t for a, n in pieces for t in range(a + 1, a + n))
        assert labels == list(range(start + 1, stop))
    firsts = [sequences.pieces(number)[0][0] for number in range(len(sequences))]
    assert firsts == sorted(firsts)  # packing sorts by length; what is read does not


def test_no_loss_across_the_cut_of_a_long_document(documents) -> None:
    store = documents([3, 9, 2])
    rows = rows_of(PackedSequences(store, 5, packing=PackingConfig(mode=PackingMode.best_fit)))
    assert rows.ids.tolist() == [
        [1, 2, 0, 0, 0, 0],
        [101, 102, 103, 104, 105, 106],
        [106, 107, 108, 0, 201, 0],
    ]
    assert rows.label_mask is not None and rows.label_mask.astype(int).tolist() == [
        [1, 1, 0, 0, 0],
        [1] * 5,
        [1] * 5,
    ]
    # the rest of a document behind another one: 0 -> 106 is nothing that could be predicted
    store = documents([2, 9], "nl")
    rows = rows_of(PackedSequences(store, 5, packing=PackingConfig(mode=PackingMode.best_fit)))
    assert rows.ids.tolist() == [[1, 0, 106, 107, 108, 0], [101, 102, 103, 104, 105, 106]]
    assert rows.label_mask is not None
    assert rows.label_mask.astype(int).tolist() == [[1, 0, 1, 1, 1], [1] * 5]


@pytest.mark.parametrize("tail", Tail)
@pytest.mark.parametrize("group", [4, 1 << 20])
@pytest.mark.parametrize("longest", [2, 4, 7])
def test_shortened_documents_are_concatenated(
    documents, monkeypatch: pytest.MonkeyPatch, tail: Tail, longest: int, group: int
) -> None:
    monkeypatch.setattr("data.packing_plan.DOCUMENTS_AT_ONCE", group)
    lengths = [3, 9, 1, 7, 7, 20, 2, 4, 4, 4, 1, 30, 5]
    store = documents(lengths)
    stream = np.concatenate([store.document(d)[:longest] for d in range(len(lengths))]).tolist()
    sequences = PackedSequences(store, 6, tail, PackingConfig(max_document_tokens=longest))
    assert len(sequences) == (
        (len(stream) - 1) // 6 if tail is Tail.drop else -(-(len(stream) - 1) // 6)
    )
    for number in range(len(sequences)):
        ids, valid = read(sequences, number)
        expected = stream[number * 6 : number * 6 + 7]
        assert ids[: len(expected)] == expected and valid == len(expected) - 1
    rows = rows_of(sequences)
    assert rows.label_mask is not None
    for ids, mask in zip(rows.ids.tolist(), rows.label_mask.tolist(), strict=True):
        for token, label, counts in zip(ids, ids[1:], mask, strict=False):
            # within a document, or from an end of document to a document's first id
            if counts:
                assert label == token + 1 or label == 0 or (token == 0 and label % 100 == 1)


def test_a_short_store_of_shortened_documents_repeats(documents) -> None:
    packing = PackingConfig(max_document_tokens=2)
    sequences = PackedSequences(documents([3, 4]), 6, Tail.drop, packing)
    assert len(sequences) == 1 and read(sequences, 0)[0] == [1, 2, 101, 102, 1, 2, 101]
    assert read(PackedSequences(documents([3], "nl"), 6, Tail.pad, packing), 0)[0][:3] == [1, 2, 0]

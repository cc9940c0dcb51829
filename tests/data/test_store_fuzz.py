"""Damages token stores in every way a disk or a person can, and demands that each is found."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data.store_format import DATA_SUFFIXES
from data.store_writer import TokenStoreWriter
from data.verify import verify_stores

SUFFIXES = (*DATA_SUFFIXES, ".sums", ".json")


def write(prefix: Path, draw: random.Random, documents: int, longest: int) -> None:
    ids = np.random.default_rng(draw.randrange(2**32))
    with TokenStoreWriter(
        prefix,
        language=prefix.name,
        family="slavic",
        tokenizer_fingerprint="f" * 64,
        vocab_size=70000 if draw.random() < 0.3 else 8192,
        eod_id=0,
        license="CC0",
    ) as writer:
        for number in range(documents):
            writer.add_document(
                ids.integers(1, 8192, draw.randrange(longest)),
                doc_id=f"{prefix.name}-{number}",
                source=draw.choice(["web", "books"]),
            )


def test_every_single_byte_counts(tmp_path: Path) -> None:
    """Each byte of each file of a store, one at a time."""
    draw = random.Random(0)
    write(tmp_path / "pl", draw, documents=4, longest=20)
    assert verify_stores(tmp_path, full=True) == []
    flips = 0
    for suffix in SUFFIXES:
        path = tmp_path / f"pl{suffix}"
        content = path.read_bytes()
        with open(path, "r+b", buffering=0) as file:
            for place, byte in enumerate(content):
                os.pwrite(file.fileno(), bytes([byte ^ (1 << draw.randrange(8))]), place)
                assert verify_stores(tmp_path, full=True, threads=1), (suffix, place)
                os.pwrite(file.fileno(), bytes([byte]), place)
                flips += 1
    assert verify_stores(tmp_path, full=True) == []
    assert flips > 1500


def flip(content: bytes, draw: random.Random, other: bytes) -> bytes:
    damaged = bytearray(content)
    damaged[draw.randrange(len(content))] ^= draw.randrange(1, 256)
    return bytes(damaged)


def cut(content: bytes, draw: random.Random, other: bytes) -> bytes:
    return content[: draw.randrange(len(content))]


def lengthen(content: bytes, draw: random.Random, other: bytes) -> bytes:
    return content + draw.randbytes(draw.randrange(1, 50))


def blank(content: bytes, draw: random.Random, other: bytes) -> bytes:
    """A page that a crash left as zeros."""
    start = draw.randrange(len(content))
    stop = start + draw.randrange(1, 4097)
    return content[:start] + bytes(len(content[start:stop])) + content[stop:]


def repeat(content: bytes, draw: random.Random, other: bytes) -> bytes:
    """A piece of the file in another place of it."""
    size = draw.randrange(1, len(content))
    source, target = draw.randrange(len(content) - size + 1), draw.randrange(len(content))
    return (content[:target] + content[source : source + size] + content[target + size :])[
        : len(content)
    ]


def take_from_another_store(content: bytes, draw: random.Random, other: bytes) -> bytes:
    return other


def take_the_end_from_another_store(content: bytes, draw: random.Random, other: bytes) -> bytes:
    start = draw.randrange(len(content))
    return content[:start] + other[start : len(content)]


DAMAGES: list[Callable[[bytes, random.Random, bytes], bytes]] = [
    *(flip, flip, flip, cut, cut, lengthen, blank, repeat),
    *(take_from_another_store, take_the_end_from_another_store),
]


@pytest.mark.parametrize("seed", range(4))
def test_random_damage_is_found(tmp_path: Path, seed: int) -> None:
    """Stores of one to a few hundred KB, so that checksums have one chunk and several."""
    draw = random.Random(seed)
    documents, longest = [(1, 2), (5, 50), (200, 900), (3000, 60)][seed]
    names = ["pl", "cs", "uk"]
    for name in names:
        write(tmp_path / "train" / name, draw, draw.randrange(1, documents + 1), longest)
    files = {path: path.read_bytes() for path in (tmp_path / "train").iterdir()}
    tokenizers_differ = {f.what.split()[0] for f in verify_stores(tmp_path, full=True)}
    if tokenizers_differ:  # stores of two sizes of vocabulary: that is one finding of its own
        assert tokenizers_differ == {"tokenizer"}
    found, cases = 0, 0
    while cases < 150:
        name, other, suffix = draw.choice(names), draw.choice(names), draw.choice(SUFFIXES)
        path = tmp_path / "train" / f"{name}{suffix}"
        damage = draw.choice(DAMAGES)
        damaged = damage(files[path], draw, files[tmp_path / "train" / f"{other}{suffix}"])
        if damaged == files[path]:
            continue
        cases += 1
        path.unlink()  # a new file: ext4 takes its time over one that is written again
        path.write_bytes(damaged)
        told = [
            problem
            for problem in verify_stores(tmp_path, full=True, threads=1)
            if problem.store.name == name and not problem.what.startswith("tokenizer")
        ]
        assert told, (seed, cases, name, suffix, damage.__name__)
        found += 1
        path.unlink()
        path.write_bytes(files[path])
    assert found == cases == 150

"""The data every loader of benchmarks/data.py gets: 23 languages, 2048-token samples, fixed ratios.

Token i of language l lies in [2000 l, 2000 l + 2000), so that a sample shows where it came from.
Imports numpy and the standard library only; runs under each peer's own interpreter.
"""

import os
import time
from pathlib import Path

import numpy as np

LANGUAGES = [f"l{i:02d}" for i in range(23)]
TOKENS = [int(4e6 * 0.78**i) for i in range(len(LANGUAGES))]  # 18 million in all, 236 to 1
SEQ_LENGTH = 2048
BATCH_SIZE = 64
VOCAB_SIZE = 46001
EOD_ID = 46000  # written by the stores that end documents with an id
SEED = 1
_IDS_PER_LANGUAGE = 2000
_TOKENS_PER_DOCUMENT = 600  # mean; lengths are geometric
RATIOS = np.array(TOKENS, np.float64) ** 0.3
RATIOS /= RATIOS.sum()


def make_raw(folder: Path) -> None:
    """LANG.u16 with the ids and LANG.documents.npy with their lengths, where they are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for language, (name, tokens) in enumerate(zip(LANGUAGES, TOKENS, strict=True)):
        target = folder / f"{name}.u16"
        if target.exists():
            continue
        random = np.random.default_rng(language)
        ids = random.integers(0, _IDS_PER_LANGUAGE, tokens) + _IDS_PER_LANGUAGE * language
        lengths = random.geometric(1 / _TOKENS_PER_DOCUMENT, tokens // 300)
        lengths = lengths[np.cumsum(lengths) < tokens]
        lengths = np.append(lengths, tokens - lengths.sum())
        np.save(folder / f"{name}.documents.npy", lengths)
        temporary = folder / f"{name}.u16.{os.getpid()}.tmp"
        ids.astype("<u2").tofile(temporary)
        temporary.rename(target)


def raw(folder: Path, language: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the language, memory-mapped, and the lengths of its documents."""
    name = LANGUAGES[language]
    ids = np.asarray(np.memmap(folder / f"{name}.u16", "<u2", "r"))
    return ids, np.load(folder / f"{name}.documents.npy")


def language_of(ids: np.ndarray) -> int:
    """Of a sample [s], from its ids."""
    first = int(ids[0])
    return (first if first != EOD_ID else int(ids[1])) // _IDS_PER_LANGUAGE


def worst_error(drawn: np.ndarray) -> float:
    """The largest |count - ratio x n| of any language at any prefix n of the languages drawn."""
    counts = np.cumsum(drawn[:, None] == np.arange(len(LANGUAGES)), axis=0)
    prefixes = np.arange(1, len(drawn) + 1)[:, None]
    return float(abs(counts - RATIOS * prefixes).max())


class Copying:
    """Samples at places known beforehand, copied out of the raw maps as int64: the ceiling.

    What is left of loading when choosing, mixing and shuffling cost nothing.
    """

    def __init__(self, folder: Path):
        random = np.random.default_rng(SEED)
        maps = [raw(folder, language)[0] for language in range(len(LANGUAGES))]
        self._ids = maps
        drawn = random.choice(len(LANGUAGES), 1 << 14, p=RATIOS)
        self._places = [
            (maps[i], int(random.integers(0, len(maps[i]) - SEQ_LENGTH))) for i in drawn.tolist()
        ]
        self._next = 0

    def sample(self) -> np.ndarray:
        """Ids [s + 1]."""
        ids, place = self._places[self._next % len(self._places)]
        self._next += 1
        return ids[place : place + SEQ_LENGTH + 1].astype(np.int64)

    def batch(self) -> np.ndarray:
        """Ids [b, s + 1], row by row from as many places."""
        out = np.empty((BATCH_SIZE, SEQ_LENGTH + 1), np.int64)
        for row in out:
            ids, place = self._places[self._next % len(self._places)]
            self._next += 1
            row[:] = ids[place : place + SEQ_LENGTH + 1]
        return out

    def block(self) -> np.ndarray:
        """Ids [b, s + 1] from one place: the same bytes in one copy."""
        size = BATCH_SIZE * (SEQ_LENGTH + 1)
        ids = self._ids[self._next % 4]  # the languages that are long enough many times over
        start = self._next * size % (len(ids) - size)
        self._next += 1
        return ids[start : start + size].astype(np.int64).reshape(BATCH_SIZE, SEQ_LENGTH + 1)

    def samples_per_second(self, seconds: float) -> float:
        """Rate of `batch`, right now."""
        batches, start = 0, time.perf_counter()
        while (passed := time.perf_counter() - start) < seconds:
            self.batch()
            batches += 1
        return batches * BATCH_SIZE / passed

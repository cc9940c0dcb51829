"""Trains a tokenizer on a corpus: `python -m data.train_tokenizer CORPUS --out tokenizer.json`.

    corpus ─ read once: sizes by language ─► rates ─ read again: a sample of each ─► BPE ─► file

The languages share the training text in ratios size^alpha, so that small ones get merges too; the
same corpus gives the same file, byte by byte.
"""

import argparse
import resource
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.corpora.files import check_writable, write_text
from data.corpus import read_documents
from data.documents import Document
from data.interrupted import say_interrupted
from data.sampling_weights import temperature
from data.tokenizer import SPECIAL_TOKENS, Tokenizer, load_tokenizer, train_tokenizer

VOCAB_SIZE = 32768
ALPHA = 0.5
SAMPLE_MEGABYTES = 100.0
MAX_REPEATS = 4.0
# Documents are sampled in passages, so that one long document neither fills a language's share nor
# is left out because it would.
PASSAGE_CHARACTERS = 4096


@dataclass
class LanguageSize:
    """How much text a corpus has in a language."""

    documents: int = 0
    characters: int = 0
    utf8_bytes: int = 0


def language_sizes(documents: Iterable[Document]) -> dict[str, LanguageSize]:
    """Sizes by language, in order of the language codes; empty documents count for nothing."""
    sizes: dict[str, LanguageSize] = {}
    for document in documents:
        if document.text:
            size = sizes.setdefault(document.language, LanguageSize())
            size.documents += 1
            size.characters += len(document.text)
            size.utf8_bytes += len(document.text.encode())
    return dict(sorted(sizes.items()))


def sampling_rates(
    sizes: Mapping[str, LanguageSize], alpha: float, budget: float, max_repeats: float
) -> dict[str, float]:
    """How many times each language's text is read: below 1 a part of it, above 1 more than once.

    Characters per language are in the ratio n^alpha of the characters n there are (exponential
    smoothing as in arXiv 1907.05019; 1 is proportional, 0 the same for all), but none is read more
    than max_repeats times; what that leaves over goes to the others. All in all they are `budget`
    UTF-8 bytes, or max_repeats times everything if that is less.
    """
    ratios = temperature({code: size.characters for code, size in sizes.items()}, alpha)
    rates: dict[str, float] = {}
    open_languages, left = list(sizes), budget
    while open_languages:
        # bytes that one unit of the ratios costs, hence the characters a unit may have
        unit = sum(ratios[c] * sizes[c].utf8_bytes / sizes[c].characters for c in open_languages)
        wish = {c: left / unit * ratios[c] / sizes[c].characters for c in open_languages}
        full = [c for c in open_languages if wish[c] >= max_repeats]
        if not full:
            return rates | wish
        rates |= dict.fromkeys(full, max_repeats)
        left -= sum(max_repeats * sizes[c].utf8_bytes for c in full)
        open_languages = [c for c in open_languages if c not in full]
    return rates


def sample_passages(
    documents: Iterable[Document], rates: Mapping[str, float]
) -> Iterator[tuple[str, str]]:
    """(language, passage), spread evenly over each language's text.

    A passage is repeated or skipped so that after each one the characters given are within half a
    passage, the longest so far, of rate times the characters seen.
    """
    seen = dict.fromkeys(rates, 0)
    given = dict.fromkeys(rates, 0)
    for document in documents:
        language = document.language
        for passage in passages(document.text):
            seen[language] += len(passage)
            due = rates[language] * seen[language] - given[language]
            copies = max(0, int(due / len(passage) + 0.5))
            given[language] += copies * len(passage)
            for _ in range(copies):
                yield language, passage


def passages(text: str) -> Iterator[str]:
    """The text in parts of at most PASSAGE_CHARACTERS, cut at a line's end or a space if any."""
    start = 0
    while len(text) - start > PASSAGE_CHARACTERS:
        end = start + PASSAGE_CHARACTERS
        # The space begins the next part: a word and the space before it are one piece.
        cut = max(text.rfind("\n", start + 1, end), text.rfind(" ", start + 1, end))
        end = cut if cut > start else end
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def train_on_corpus(
    corpus: Path,
    out: Path,
    *,
    vocab_size: int = VOCAB_SIZE,
    alpha: float = ALPHA,
    sample_megabytes: float = SAMPLE_MEGABYTES,
    max_repeats: float = MAX_REPEATS,
    reserved_tokens: int = 0,
) -> Tokenizer:
    """Trains a tokenizer on a sample of the corpus, writes it to `out` and returns it, loaded.

    The file gets its name when it is complete. Progress goes to stderr. The corpus is read twice.
    Raises ValueError for settings out of range, a corpus without text, one too small for the
    vocabulary, or records that cannot be read, and FileNotFoundError where there is no corpus.
    """
    for name, value in (("sample_megabytes", sample_megabytes), ("max_repeats", max_repeats)):
        if not value > 0:
            raise ValueError(f"{name}={value}: must be above 0")
    if reserved_tokens < 0:
        raise ValueError(f"reserved_tokens={reserved_tokens}: must be 0 or more")
    if vocab_size <= 256 + len(SPECIAL_TOKENS) + reserved_tokens:  # before reading gigabytes
        raise ValueError(
            f"vocab_size={vocab_size} leaves no room for a single merge: the 256 bytes and "
            f"{len(SPECIAL_TOKENS) + reserved_tokens} special tokens come first; "
            f"{VOCAB_SIZE} is usual"
        )
    progress = _Progress()
    sizes = language_sizes(progress.of_documents(read_documents(corpus, setting="")))
    if not sizes:
        raise ValueError(f"{corpus}: no text in it to train a tokenizer on")
    total = sum(size.utf8_bytes for size in sizes.values())
    rates = sampling_rates(sizes, alpha, min(sample_megabytes * 1e6, total), max_repeats)
    wanted = sum(rates[code] * size.characters for code, size in sizes.items())
    progress.say(f"{len(sizes)} languages, {total / 1e6:,.1f} MB of text")
    texts = (text for _, text in sample_passages(read_documents(corpus, setting=""), rates))
    tokenizer = train_tokenizer(
        progress.of_texts(texts, wanted),
        vocab_size,
        reserved_tokens=reserved_tokens,
        show_progress=sys.stderr.isatty(),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, tokenizer.to_str(pretty=True))
    return load_tokenizer(out)


class _Progress:
    """Lines on stderr, one a few seconds, each with the time since the start."""

    EVERY = 5.0  # seconds

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()

    def say(self, text: str) -> None:
        self._last = time.monotonic()
        print(f"[{self._last - self._start:6.1f} s] {text}", file=sys.stderr, flush=True)

    def _due(self) -> bool:
        return time.monotonic() - self._last >= self.EVERY

    def of_documents(self, documents: Iterable[Document]) -> Iterator[Document]:
        characters = 0
        for number, document in enumerate(documents, start=1):
            characters += len(document.text)
            yield document
            if self._due():
                self.say(f"measuring: {number:,} documents, {characters / 1e6:,.1f} M characters")

    def of_texts(self, texts: Iterable[str], wanted: float) -> Iterator[str]:
        characters = 0
        for text in texts:
            characters += len(text)
            yield text
            if self._due():
                self.say(
                    f"counting words: {characters / 1e6:,.1f} of {wanted / 1e6:,.1f} M characters"
                )
        self.say(f"merging: the words of {characters / 1e6:,.1f} M characters are counted")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data.train_tokenizer", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("corpus", type=Path, help="a file or folder of documents")
    parser.add_argument("--out", type=Path, required=True, help="the tokenizer.json to write")
    parser.add_argument(
        "--vocab-size",
        type=int,
        default=VOCAB_SIZE,
        help="entries in all, special tokens and the 256 bytes included (default: %(default)s)",
    )
    parser.add_argument(
        "--alpha",
        type=float,
        default=ALPHA,
        help="languages share the sample as characters^alpha: 1 as they are, 0 all alike "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--sample-megabytes",
        type=float,
        default=SAMPLE_MEGABYTES,
        help="UTF-8 text to train on; bounds memory (default: %(default)s)",
    )
    parser.add_argument(
        "--max-repeats",
        type=float,
        default=MAX_REPEATS,
        help="how often a small language's text may count (default: %(default)s)",
    )
    parser.add_argument(
        "--reserved-tokens",
        type=int,
        default=0,
        help="special tokens <|reserved_0|>, ... kept for later (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    given = parser.parse_args(arguments)
    start = time.monotonic()
    try:
        check_writable(f"--out {given.out}", given.out)  # training may take hours
        if given.out.exists() and not given.overwrite:
            parser.error(
                f"--out {given.out} exists already; choose another name or give --overwrite"
            )
        tokenizer = train_on_corpus(
            given.corpus,
            given.out,
            vocab_size=given.vocab_size,
            alpha=given.alpha,
            sample_megabytes=given.sample_megabytes,
            max_repeats=given.max_repeats,
            reserved_tokens=given.reserved_tokens,
        )
    except (OSError, ValueError, ModuleNotFoundError) as error:
        parser.exit(2, f"error: {error}\n")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux
    print(
        f"{given.out}: {tokenizer.vocab_size:,} entries, fingerprint "
        f"{tokenizer.fingerprint[:16]}, {time.monotonic() - start:.0f} s, "
        f"{peak / 1024:,.0f} MiB at most"
    )
    return 0


if __name__ == "__main__":
    say_interrupted()
    sys.exit(main())

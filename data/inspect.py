"""Shows what is in token stores or a corpus: documents or training samples, as decoded text.

    python -m data.inspect STORES                              # a document of every language
    python -m data.inspect STORES --language de --documents 3 [--first 100]
    python -m data.inspect STORES --language de --sequence 7 --seq-length 2048
    python -m data.inspect STORES --sample 123456 --seq-length 2048 [data.mixture.alpha=0.5 ...]
    python -m data.inspect --run runs/demo/DATE --sample 123456
    python -m data.inspect --corpus CORPUS [--language de] [--documents 3]

A document is one of a store or of a corpus; a sequence is what the loader packs, of one language;
a sample is a place in the training stream, hence a sequence of whatever language the mixture has
there. On a terminal tokens have alternating colours, and so do the documents' borders; in a pipe
there is text alone. --ids prints each token's id with its text.

Exit status: 0; 2 for settings that do not fit. Imports neither torch nor megatron-core.
"""

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from data.command_line import run_command, settings_of, stream_parser
from data.corpus import corpus_files, read_documents
from data.documents import Document
from data.family_grouping import load_grouping
from data.interrupted import say_interrupted
from data.language_families import did_you_mean, find_language
from data.open_mixture import OpenedMixture, open_mixture, open_tokenizer, prepare
from data.packed_sequences import PackedSequences
from data.store_folder import open_stores
from data.stream_settings import StreamSettings
from data.token_store import TokenStore
from data.tokenizer import Tokenizer

# 256-colour backgrounds that leave white and black text readable on either kind of terminal
_SHADES = ("\x1b[48;5;24m\x1b[38;5;255m", "\x1b[48;5;238m\x1b[38;5;255m")
_BORDER, _TITLE, _DIM, _RESET = "\x1b[1;91m", "\x1b[1m", "\x1b[2m", "\x1b[0m"
_END = "<end of document>"
_LOOKAHEAD = 64  # tokens decoded beyond what is shown


class Screen:
    """Writes samples to a stream, with colours or without."""

    def __init__(self, *, colour: bool, ids: bool, characters: int):
        self.colour, self.ids, self.characters = colour, ids, characters

    def title(self, *facts: str) -> None:
        print(self._in(_TITLE, " · ".join(fact for fact in facts if fact)))

    def note(self, text: str) -> None:
        print(self._in(_DIM, text))

    def tokens(self, tokenizer: Tokenizer, ids: np.ndarray) -> None:
        """Prints decoded ids, at most `characters` of them, with every token's border."""
        shown, pieces, cut = 0, [], False
        for number, (part, text) in enumerate(token_texts(tokenizer, ids.tolist())):
            if part == [tokenizer.eod_id]:
                pieces.append(self._in(_BORDER, _END) + "\n")
                continue
            if self.characters and shown >= self.characters:
                cut = True
                break
            shown += len(text)
            text = printable(text)
            if self.ids:
                text = f"{text}⟨{' '.join(map(str, part))}⟩"
            pieces.append(self._in(_SHADES[number % 2], text))
        print("".join(pieces).rstrip("\n") + (self._in(_DIM, " …") if cut else ""))

    def text(self, text: str) -> None:
        cut = bool(self.characters) and len(text) > self.characters
        print(printable(text[: self.characters] if cut else text) + (" …" if cut else ""))

    def _in(self, code: str, text: str) -> str:
        # a background that runs over a line's end would fill the rest of the line
        return code + text.replace("\n", f"{_RESET}\n{code}") + _RESET if self.colour else text


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> Iterator[tuple[list[int], str]]:
    """(ids, text) of each token in order; tokens that share a character come together.

    The texts add up to the decoded whole. Each is what its ids add to those before them, because a
    token's text may depend on where it stands (SentencePiece drops a space at the beginning). A
    run of ids that is no character at all comes as the replacement characters it decodes to.
    """
    before: list[int] = []
    part: list[int] = []
    for place, token in enumerate(ids):
        if token == tokenizer.eod_id:
            if part:
                yield part, _added(tokenizer, before, part)
            yield [token], ""
            before, part = [], []
            continue
        part.append(token)
        text = _added(tokenizer, before, part)
        last = place + 1 == len(ids)
        # bytes of a character that is not complete yet decode to U+FFFD; no character has over 4
        if text.endswith("\ufffd") and len(part) < 4 and not last:
            continue
        yield part, text
        before, part = part, []


def _added(tokenizer: Tokenizer, before: list[int], part: list[int]) -> str:
    if not before:
        return tokenizer.decode(part)
    return tokenizer.decode(before + part)[len(tokenizer.decode(before)) :]


def printable(text: str) -> str:
    """Text that cannot steer a terminal: control characters as their pictures, but line ends."""
    return "".join(
        chr(0x2400 + ord(c))
        if c < " " and c not in "\n\t"
        else "␡"
        if c == "\x7f"
        else "\ufffd"
        if "\x80" <= c < "\xa0"
        else c
        for c in text
    )


def show_store_documents(
    screen: Screen, store: TokenStore, tokenizer: Tokenizer, first: int, number: int
) -> None:
    """Prints `number` documents of a store from document `first` on.

    Raises ValueError if there is no document of that number.
    """
    if not 0 <= first < store.documents:
        raise ValueError(
            f"--first {first}: {store.prefix} has the documents 0 to {store.documents - 1}"
        )
    for document in range(first, min(first + number, store.documents)):
        start, stop = store.document_span(document)
        doc_id, source = store.document_source(document)
        screen.title(
            _language_and_family(store.language, store.family),
            f"document {document:,} of {store.documents:,}",
            doc_id,
            source,
            f"{stop - start:,} tokens from {start:,} on",
        )
        screen.tokens(tokenizer, _read(screen, store, start, stop))
        print()


def show_sequence(
    screen: Screen, sequences: PackedSequences, family: str, number: int, tokenizer: Tokenizer
) -> None:
    """Prints a packed sequence: what documents lie in it, and its text."""
    store = sequences.store
    if not 0 <= number < len(sequences):
        raise ValueError(
            f"--sequence {number}: {store.language} has the sequences 0 to {len(sequences) - 1} of "
            f"{sequences.seq_length} tokens"
        )
    ids = np.empty(sequences.seq_length + 1, np.int64)
    valid = sequences.fill(number, ids)
    pieces = sequences.pieces(number)
    screen.title(
        _language_and_family(store.language, family),
        f"sequence {number:,} of {len(sequences):,}",
        f"{valid:,} tokens of {len(pieces)} document{'s' * (len(pieces) != 1)}",
        f"{sequences.seq_length - valid:,} of padding" if valid < sequences.seq_length else "",
    )
    for start, length in pieces:
        document = store.document_of(start)
        begin, end = store.document_span(document)
        doc_id, source = store.document_source(document)
        facts = [f"  document {document:,}", doc_id, source]
        facts.append(f"tokens {start - begin:,} to {start + length - begin:,} of {end - begin:,}")
        screen.note(" · ".join(fact for fact in facts if fact))
    screen.tokens(tokenizer, ids[: valid + 1])
    print()


def show_corpus_documents(
    screen: Screen, documents: Iterable[Document], tokenizer: Tokenizer
) -> int:
    """Prints documents of a corpus with what they are in tokens; returns how many."""
    shown = 0
    for document in documents:
        shown += 1
        ids = tokenizer.encode(document.text)
        row = find_language(document.language)
        family = document.family or (row.family if row else "")
        screen.title(
            _language_and_family(document.language, family),
            document.doc_id,
            document.source,
            document.license,
            f"{len(document.text):,} characters, {len(document.text.encode()):,} bytes, "
            f"{len(ids):,} tokens"
            + (f", {len(document.text) / len(ids):.2f} characters a token" if ids else ""),
        )
        if screen.colour or screen.ids:  # the text as the tokenizer sees it, normalised
            screen.tokens(tokenizer, np.array(ids, np.int64))
        else:
            screen.text(document.text)
        print()
    return shown


def _language_and_family(code: str, family: str) -> str:
    row = find_language(code)
    name = f" {row.name}" if row else ""
    return f"{code}{name} ({family})"


def _read(screen: Screen, store: TokenStore, start: int, stop: int) -> np.ndarray:
    # a token may be a byte of a character, never more than one document is decoded in vain
    most = stop - start if not screen.characters else 4 * screen.characters + _LOOKAHEAD
    return store.read(start, min(stop, start + most)).astype(np.int64)


def _stores(settings: StreamSettings, split: str, language: str) -> list[TokenStore]:
    folder = prepare(settings.data)
    stores = open_stores(folder, split)
    if not stores:
        raise FileNotFoundError(f"{folder}: there are no stores in {split}/")
    wanted = [language] if language else settings.data.languages
    if not wanted:
        return stores
    setting = "--language" if language else "data.languages:"
    return [_store_of(code, stores, setting) for code in wanted]


def _store_of(code: str, stores: list[TokenStore], setting: str) -> TokenStore:
    by_code = {store.language: store for store in stores}
    row = find_language(code)
    found = by_code.get(code) or by_code.get(row.code if row else "")
    if found is None:
        raise ValueError(_no_language(f"{setting} {code}", code, sorted(by_code)))
    return found


def _no_language(typed: str, code: str, there: list[str]) -> str:
    hint = did_you_mean([code], there) or "."
    return f"{typed}: there is none{hint} There are {', '.join(there)}"


def _of_corpus(corpus: Path, language: str, first: int, number: int) -> Iterator[Document]:
    """`number` documents of a language, or of every file."""
    if not language:
        for path in corpus_files(corpus, "--corpus "):
            yield from islice(read_documents(path), first, first + number)
        return
    seen: set[str] = set()
    row = find_language(language)
    found = 0
    for document in read_documents(corpus, setting="--corpus "):
        seen.add(document.language)
        if document.language in (language, row.code if row else language):
            found += 1
            if found > first:
                yield document
            if found == first + number:
                return
    if not found:
        raise ValueError(_no_language(f"--language {language}", language, sorted(seen)))


def _show_sample(screen: Screen, opened: OpenedMixture, sample: int) -> None:
    mixture = opened.mixture
    if sample < 0 or (mixture.end is not None and sample >= mixture.end):
        raise ValueError(
            f"--sample {sample}: the data has the samples from 0 on"
            + (f" to {mixture.end - 1}, where it ends" if mixture.end is not None else "")
        )
    language, number = mixture.locate_one(sample)
    code = mixture.languages[language]
    screen.title(f"sample {sample:,} of the training stream")
    show_sequence(
        screen, mixture.sequences[language], mixture.family_of[code], number, opened.tokenizer
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = stream_parser("python -m data.inspect", __doc__)
    parser.add_argument("--corpus", type=Path, metavar="PATH", help="a corpus instead of stores")
    parser.add_argument("--tokenizer", metavar="FILE", help="data.tokenizer; default: the stores'")
    parser.add_argument("--language", default="", metavar="CODE", help="default: all there are")
    parser.add_argument("--split", choices=("train", "validation"), default="train")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--documents", type=int, metavar="N", help="how many of each language")
    what.add_argument("--sequence", type=int, metavar="N", help="a packed one of --language")
    what.add_argument("--sample", type=int, metavar="N", help="this one of the training stream")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="document to begin with")
    parser.add_argument(
        "--characters", type=int, default=600, metavar="N", help="show at most so many; 0: all"
    )
    parser.add_argument("--ids", action="store_true", help="print every token's id behind it")
    parser.add_argument("--colour", "--color", choices=("auto", "always", "never"), default="auto")
    parser.set_defaults(mixture=None, global_batch_size=None)
    given = parser.parse_intermixed_args(arguments)
    colour = given.colour == "always" or (
        given.colour == "auto" and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    )
    screen = Screen(colour=colour, ids=given.ids, characters=given.characters)
    return run_command("python -m data.inspect", lambda: _inspect(screen, given))


def _inspect(screen: Screen, given: argparse.Namespace) -> int:
    number = given.documents if given.documents is not None else (3 if given.language else 1)
    for flag, value, least in (
        ("documents", number, 1),
        ("first", given.first, 0),
        ("characters", given.characters, 0),
    ):
        if value < least:
            raise ValueError(f"--{flag} {value} must be at least {least}")
    if given.sequence is not None and not given.language:
        raise ValueError("--sequence needs --language: every language has sequences of its own")
    if given.sample is not None and (given.language or given.split != "train"):
        raise ValueError("--sample is a place in the training stream, whatever language is there")
    packed = given.sample is not None or given.sequence is not None
    settings = settings_of(given, {"data.tokenizer": given.tokenizer})
    if given.corpus is not None:
        if packed:
            raise ValueError("a corpus has documents; samples and sequences are made of stores")
        documents = _of_corpus(given.corpus.expanduser(), given.language, given.first, number)
        shown = show_corpus_documents(screen, documents, open_tokenizer(settings.data))
        if not shown:
            raise ValueError(f"--first {given.first}: there are fewer documents")
        return 0
    if given.sample is not None:
        prepare(settings.data)
        _show_sample(screen, open_mixture(settings.data, settings.seq_length), given.sample)
        return 0
    tokenizer = open_tokenizer(settings.data)
    stores = _stores(settings, given.split, given.language)
    recorded = {store.language: store.family for store in stores}
    grouping = load_grouping(settings.data.families, recorded)
    for store in stores:
        store.check_tokenizer(tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.path)
        if given.sequence is None:
            show_store_documents(screen, store, tokenizer, given.first, number)
        else:
            family = grouping.family_of(store.language) or store.family
            sequences = PackedSequences(store, settings.seq_length, packing=settings.data.packing)
            show_sequence(screen, sequences, family, given.sequence, tokenizer)
    return 0


if __name__ == "__main__":
    say_interrupted()
    sys.exit(main())

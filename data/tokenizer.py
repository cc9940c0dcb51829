"""Tokenizers behind one interface, whatever made them, and training of our own byte-level BPE.

    load_tokenizer(path) ─┬─ Hugging Face tokenizer.json ─► HuggingFaceTokenizer
                          ├─ SentencePiece .model ────────► SentencePieceTokenizer
                          └─ tekken .json (Mistral) ──────► TekkenTokenizer

A file is recognised by what is in it; its name says nothing.
"""

import base64
import functools
import hashlib
import importlib
import json
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from data.tokenizer_file import TOKENIZER_KINDS, tokenizer_file

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
SPECIAL_TOKENS = (END_OF_TEXT, PAD)

# GPT-2's pattern is ` ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+` (plus English clitics). It
# cuts a word at every combining mark, which in Indic scripts, Thai and Khmer is every syllable, so
# no merge can ever span a word there. Marks (\p{M}) and the two joiners (U+200C, U+200D: inside
# words in Persian, Malayalam, Marathi) belong to the word here.
SPLIT_PATTERN = (
    " ?[\\p{L}\\p{M}\u200c\u200d]+"
    "| ?\\p{N}+"
    "| ?[^\\s\\p{L}\\p{M}\\p{N}\u200c\u200d]+"
    "|\\s+(?!\\S)|\\s+"
)

# What published tokenizers call the end of a document, in the order we look.
_END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>")

# The special tokens of tekken files before version 7, which do not name them (mistral-common,
# Tekkenizer.DEPRECATED_SPECIAL_TOKENS).
_TEKKEN_SPECIALS = [
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]"),
    *("[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    "[TOOL_CONTENT]",
]


class Tokenizer:
    """Ids of a text without any special token; the loader's stores append `eod_id` themselves.

    kind: "hf", "sentencepiece" or "tekken". path: the file, as given.
    vocab_size: the largest id + 1, hence what an embedding table needs, also where the vocabulary
        has holes.
    eod_id: the token that ends a document.
    fingerprint: sha256 over what decides the ids, 64 hex digits; each kind says what that is.
    unknown_ids: ids that stand for text the vocabulary cannot hold; empty for byte-level BPE.
    fragment_ids: ids of tokens that hold only a part of a character, some of its UTF-8 bytes.

    A tokenizer may be pickled: it is read again from its file, which must not have changed.
    """

    kind: ClassVar[str]
    path: str
    vocab_size: int
    eod_id: int
    fingerprint: str
    unknown_ids: frozenset[int]

    def __init__(self, path: str, eod_token: str) -> None:
        self.path, self._eod_token = path, eod_token

    @functools.cached_property
    def fragment_ids(self) -> frozenset[int]:
        raise NotImplementedError

    def encode(self, text: str) -> list[int]:
        """The ids of the text. Raises ValueError for half a surrogate pair, which is no text."""
        try:
            return self._encode(text)
        except Exception:  # each library has its own words for this
            _refuse_surrogates([text])
            raise

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Like encode for each text, on all cores."""
        try:
            return self._encode_batch(texts)
        except Exception:
            _refuse_surrogates(texts)
            raise

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids, special tokens spelled out; ids of no token are left out."""
        raise NotImplementedError

    def _encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        raise NotImplementedError

    def _find_eod(self, id_of: Callable[[str], int | None], default: int | None = None) -> int:
        if not self._eod_token and default is not None:
            return default
        names = (self._eod_token,) if self._eod_token else _END_OF_TEXT_NAMES
        for found in map(id_of, names):
            if found is not None:
                return found
        if self._eod_token:
            there = [name for name in _END_OF_TEXT_NAMES if id_of(name) is not None]
            raise ValueError(
                f"data.eod_token={self._eod_token} is not in the vocabulary of "
                f"data.tokenizer={self.path}; "
                + (f"leave it out for {there[0]}, or " if there else "")
                + "set data.eod_token to the token that ends a document"
            )
        raise ValueError(
            f"data.tokenizer={self.path}: its vocabulary has none of {', '.join(names)}; set "
            "data.eod_token to the token that ends a document"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # The libraries' own pickles lose settings: tokenizers forgets that special tokens spelled
        # out in a text are text.
        return _reload, (self.path, self._eod_token, self.fingerprint)


class HuggingFaceTokenizer(Tokenizer):
    """Any tokenizer.json. Its fingerprint is that of the JSON in canonical form (sorted keys, no
    spaces), so reformatting the file does not change it and any change of content does."""

    kind = "hf"

    def __init__(
        self, text: bytes, content: dict[str, Any], path: str, eod_token: str = ""
    ) -> None:
        """text: the file; content: what it says as JSON."""
        super().__init__(path, eod_token)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(text)
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(
                f"data.tokenizer={path}: not a Hugging Face tokenizer.json that tokenizers "
                f"{tokenizers.__version__} can read ({error})"
            ) from error
        # A document that spells out "<|endoftext|>" must not end there: its characters are text.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.fingerprint = hashlib.sha256(_canonical(content).encode()).hexdigest()
        self._vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._vocabulary.values(), default=-1) + 1
        self.eod_id = self._find_eod(self._tokenizer.token_to_id)
        model = content["model"]
        unknown = model.get("unk_id")  # Unigram's name for it
        if unknown is None:
            unknown = self._vocabulary.get(model.get("unk_token"))
        self.unknown_ids = frozenset() if unknown is None else frozenset({unknown})
        steps = _canonical([content.get("pre_tokenizer"), content.get("normalizer")])
        self._byte_level = '"type":"ByteLevel"' in steps
        self._byte_fallback = bool(model.get("byte_fallback"))

    @functools.cached_property
    def fragment_ids(self) -> frozenset[int]:
        fragments = set()
        if self._byte_level:
            byte_of = {letter: byte for byte, letter in enumerate(_byte_letters())}
            for token, i in self._vocabulary.items():
                if all(letter in byte_of for letter in token) and _is_fragment(
                    bytes(byte_of[letter] for letter in token)
                ):
                    fragments.add(i)
        if self._byte_fallback:
            names = (f"<0x{byte:02X}>" for byte in range(0x80, 0x100))
            fragments |= {self._vocabulary[name] for name in names if name in self._vocabulary}
        return frozenset(fragments)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # "fast" leaves out the offsets, which nobody asks for
        return [e.ids for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


class TekkenTokenizer(Tokenizer):
    """Mistral's tekken: byte-level BPE as in tiktoken, run by `tokenizers`.

    The ids are those of mistral-common's Tekkenizer: special tokens first, then the first
    default_vocab_size - default_num_special_tokens entries of "vocab" (the file holds more). The
    fingerprint covers the split pattern, these entries and the special tokens' names.

    tiktoken joins the neighbours whose union has the lowest rank, `tokenizers` those whose merge
    comes first in a list; the list here has every way to cut a token in two, ordered by the
    token's rank, so both agree. They could only differ where two overlapping pairs make the same
    token by different cuts, which no text we tried does.
    """

    kind = "tekken"

    def __init__(self, content: dict[str, Any], path: str, eod_token: str = "") -> None:
        super().__init__(path, eod_token)
        try:
            config = content["config"]
            pattern, self.vocab_size = config["pattern"], int(config["default_vocab_size"])
            specials = _tekken_specials(content, int(config["default_num_special_tokens"]))
            entries = content["vocab"][: self.vocab_size - len(specials)]
            self._bytes = [base64.b64decode(e["token_bytes"], validate=True) for e in entries]
            ranks = [e["rank"] for e in entries]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"data.tokenizer={path}: a damaged tekken file ({type(error).__name__}: {error})"
            ) from error
        wanted = self.vocab_size - len(specials)
        if (
            len(self._bytes) != wanted
            or ranks != list(range(wanted))
            or len(set(self._bytes)) != wanted
            or self._bytes[:256] != [bytes([byte]) for byte in range(256)]
        ):
            raise ValueError(
                f"data.tokenizer={path}: a damaged tekken file: expected {wanted} different "
                "entries in the order of their ranks, the 256 bytes first"
            )
        self._specials = specials
        self._tokenizer = _tiktoken_bpe(self._bytes, len(specials), pattern, path)
        entries_text = [base64.b64encode(token).decode() for token in self._bytes]
        deciding = {"pattern": pattern, "special_tokens": specials, "vocab": entries_text}
        self.fingerprint = hashlib.sha256(_canonical(deciding).encode()).hexdigest()
        self.eod_id = self._find_eod({name: i for i, name in enumerate(specials)}.get)
        self.unknown_ids = frozenset()

    @functools.cached_property
    def fragment_ids(self) -> frozenset[int]:
        first = len(self._specials)
        return frozenset(first + i for i, token in enumerate(self._bytes) if _is_fragment(token))

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        parts: list[str] = []
        for special, run in groupby(map(int, ids), lambda i: i < len(self._specials)):
            members = list(run)
            if special:
                parts += [self._specials[i] for i in members]
            else:
                parts.append(self._tokenizer.decode(members))
        return "".join(parts)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece .model (unigram or BPE). Its fingerprint is that of the file's bytes.

    The end of a document is the model's own "eos" unless eod_token names another piece. Beware
    that most models normalise (NFKC, one space for several, none for a line break): the texts that
    do not come back are counted by `python -m data.tokenizer_report`.
    """

    kind = "sentencepiece"

    def __init__(self, content: bytes, path: str, eod_token: str = "") -> None:
        super().__init__(path, eod_token)
        try:
            library = importlib.import_module("sentencepiece")
        except ImportError as error:
            raise ModuleNotFoundError(
                f"data.tokenizer={path} is a SentencePiece model, and the package that reads it is "
                "not installed; pip install sentencepiece",
                name="sentencepiece",
            ) from error
        try:
            self._processor = library.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise ValueError(
                f"data.tokenizer={path}: a damaged SentencePiece model ({str(error).strip()})"
            ) from error
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self.vocab_size = self._processor.get_piece_size()
        eos = self._processor.eos_id()
        self.eod_id = self._find_eod(self._id_of, default=eos if eos >= 0 else None)
        self.unknown_ids = frozenset({self._processor.unk_id()})

    def _id_of(self, piece: str) -> int | None:
        i = self._processor.piece_to_id(piece)
        return i if self._processor.id_to_piece(i) == piece else None  # else it is the unknown's id

    @functools.cached_property
    def fragment_ids(self) -> frozenset[int]:
        is_byte, piece = self._processor.is_byte, self._processor.id_to_piece
        return frozenset(
            i for i in range(self.vocab_size) if is_byte(i) and int(piece(i)[1:-1], 16) >= 0x80
        )

    def _encode(self, text: str) -> list[int]:
        return self._processor.encode(text, out_type=int)

    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode(list(texts), out_type=int)

    def decode(self, ids: Iterable[int]) -> str:
        known = (i for i in map(int, ids) if 0 <= i < self.vocab_size)
        parts: list[str] = []
        for special, run in groupby(known, self._processor.is_control):
            members = list(run)
            if special:
                parts += [self._processor.id_to_piece(i) for i in members]
            else:
                parts.append(self._processor.decode(members))
        return "".join(parts)


def load_tokenizer(path: Path | str, eod_token: str = "") -> Tokenizer:
    """Reads a tokenizer.json, a SentencePiece model or a tekken file, told apart by their content.

    eod_token: which token ends a document; empty: the first known name. Raises FileNotFoundError,
    ValueError where the file is none of these or has no such token, and ModuleNotFoundError for a
    SentencePiece model without the package `sentencepiece`.
    """
    path = tokenizer_file(Path(path))
    content = path.read_bytes()
    if _is_sentencepiece(content):
        return SentencePieceTokenizer(content, str(path), eod_token)
    try:
        parsed = json.loads(content)
    except ValueError as error:  # not JSON, or not UTF-8
        hint = (
            "it is a Git LFS pointer: fetch the file itself with git lfs pull"
            if content.startswith(b"version https://git-lfs")
            else str(error)
        )
        raise ValueError(f"data.tokenizer={path}: not {TOKENIZER_KINDS} ({hint})") from error
    if isinstance(parsed, dict):
        if isinstance(parsed.get("model"), dict):
            return HuggingFaceTokenizer(content, parsed, str(path), eod_token)
        if isinstance(parsed.get("config"), dict) and isinstance(parsed.get("vocab"), list):
            return TekkenTokenizer(parsed, str(path), eod_token)
    raise ValueError(
        f"data.tokenizer={path}: not {TOKENIZER_KINDS} "
        '(JSON, but with neither a "model" nor a "config" and a "vocab")'
    )


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    split_pattern: str = SPLIT_PATTERN,
    reserved_tokens: int = 0,
    show_progress: bool = False,
) -> tokenizers.Tokenizer:
    """Trains byte-level BPE on the texts and returns it, to be written with `.save(path)`.

    vocab_size counts everything: the special tokens (<|endoftext|> is 0, <|pad|> 1, then
    reserved_tokens of <|reserved_0|>, ... for uses yet to come), the 256 bytes and the merges. Text
    is normalised to NFC, because decomposed text costs two to three times the tokens. Every byte is
    in the vocabulary, so any text can be encoded. The same texts give the same file, in any order.
    Memory grows with the number of different words. Raises ValueError if vocab_size is too small to
    hold the bytes, or if the texts are too little to fill it.
    """
    special = [*SPECIAL_TOKENS, *(f"<|reserved_{i}|>" for i in range(reserved_tokens))]
    smallest = 256 + len(special)
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size={vocab_size} is below {smallest}, the 256 bytes and "
            f"{len(special)} special tokens"
        )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _byte_level_split(split_pattern)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size} asked, but the texts only give {tokenizer.get_vocab_size()} "
            "entries; give more text or ask for less"
        )
    return tokenizer


def _reload(path: str, eod_token: str, fingerprint: str) -> Tokenizer:
    tokenizer = load_tokenizer(path, eod_token)
    if tokenizer.fingerprint != fingerprint:
        raise ValueError(f"data.tokenizer={path}: the file has changed since this run read it")
    return tokenizer


def _refuse_surrogates(texts: Sequence[str]) -> None:
    for i, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text {i + 1} of {len(texts)} is not Unicode: character {error.start} is "
                f"{text[error.start]!r}, half a surrogate pair; repair the text or drop it"
            ) from error


def _canonical(content: Any) -> str:
    return json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def _byte_level_split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


@functools.cache
def _byte_letters() -> str:
    """The letter that stands for each byte in byte-level vocabularies (GPT-2's bytes_to_unicode):
    printable Latin-1 bytes for themselves, the others for U+0100 and on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return "".join(chr(byte if byte in printable else next(others)) for byte in range(256))


def _is_fragment(token: bytes) -> bool:
    try:
        token.decode()
    except UnicodeDecodeError:
        return True
    return False


def _tekken_specials(content: dict[str, Any], count: int) -> list[str]:
    """Names of the special tokens 0 ... count - 1; those the file does not name get fillers."""
    given = content.get("special_tokens")
    names = _TEKKEN_SPECIALS if given is None else [str(entry["token_str"]) for entry in given]
    if given is not None and [entry["rank"] for entry in given] != list(range(len(given))):
        raise ValueError("its special tokens are not in the order of their ranks")
    if len(names) > count:
        raise ValueError(f"{len(names)} special tokens, default_num_special_tokens={count}")
    return [*names, *(f"<SPECIAL_{i}>" for i in range(len(names), count))]


def _tiktoken_bpe(
    tokens: list[bytes], first_id: int, pattern: str, path: str
) -> tokenizers.Tokenizer:
    """BPE with tiktoken's rule: the rank of a token is also the rank of every merge that makes it.

    tokens[i] gets id first_id + i. A piece of the split that is a token is that token, whether or
    not merges would lead there, as in tiktoken.
    """
    letters = str.maketrans({chr(byte): letter for byte, letter in enumerate(_byte_letters())})
    names = [token.decode("latin-1").translate(letters) for token in tokens]
    vocabulary = {name: first_id + i for i, name in enumerate(names)}
    merges: list[tuple[str, str]] = []
    for name in names:
        cuts = ((name[:k], name[k:]) for k in range(1, len(name)))
        known = [(a, b) for a, b in cuts if a in vocabulary and b in vocabulary]
        merges += sorted(known, key=lambda cut: (vocabulary[cut[0]], vocabulary[cut[1]]))
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    try:
        tokenizer.pre_tokenizer = _byte_level_split(pattern)
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(
            f"data.tokenizer={path}: its split pattern is no regular expression ({error})"
        ) from error
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _is_sentencepiece(content: bytes) -> bool:
    """Whether the content starts as a serialised ModelProto with two or more pieces does.

    Field 1, repeated: a message (tag 0x0A, length) whose own field 1 is the piece (0x0A, length).
    """
    at = 0
    for _ in range(2):
        if len(content) < at + 4 or content[at] != 0x0A or content[at + 2] != 0x0A:
            return False
        length, piece = content[at + 1], content[at + 3]
        if not 0 < piece <= length - 2 or length >= 0x80:  # specials come first, and are short
            return False
        at += 2 + length
    return True

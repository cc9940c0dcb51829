"""Byte-level BPE: training one, and loading any Hugging Face tokenizer.json behind four methods."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

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


class Tokenizer:
    """Ids of a text without any special token; the loader's stores append `eod_id` themselves.

    vocab_size is the largest id + 1, hence what an embedding table needs, also where the vocabulary
    has holes. fingerprint is the sha256 of the file's JSON in canonical form (sorted keys, no
    spaces), so reformatting the file does not change it and any change of content does.
    """

    def __init__(self, text: str, path: str, eod_token: str = ""):
        self.path = path
        try:
            content = json.loads(text)
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(
                f"data.tokenizer={path}: not a Hugging Face tokenizer.json ({error})"
            ) from error
        # A document that spells out "<|endoftext|>" must not end there: its characters are text.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        canonical = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        self.fingerprint = hashlib.sha256(canonical.encode()).hexdigest()
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        names = (eod_token,) if eod_token else _END_OF_TEXT_NAMES
        ids = [i for i in map(self._tokenizer.token_to_id, names) if i is not None]
        if not ids:
            raise ValueError(
                f"data.tokenizer={path}: its vocabulary has none of {', '.join(names)}; set "
                "data.eod_token to the token that ends a document"
            )
        self.eod_id = ids[0]

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Like encode for each text, on all cores."""
        return [e.ids for e in self._tokenizer.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids, special tokens spelled out."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


def load_tokenizer(path: Path | str, eod_token: str = "") -> Tokenizer:
    """Reads a tokenizer.json. eod_token: which token ends a document; empty: the first known name.

    Raises FileNotFoundError, or ValueError where the file is no tokenizer or has no such token.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"data.tokenizer={path}: no such file; leave data.tokenizer empty for the one that "
            "ships with the package"
        )
    return Tokenizer(path.read_text(encoding="utf-8"), str(path), eod_token)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, split_pattern: str = SPLIT_PATTERN
) -> tokenizers.Tokenizer:
    """Trains byte-level BPE on the texts and returns it, to be written with `.save(path)`.

    vocab_size counts everything: the special tokens (ids 0 and 1), the 256 bytes and the merges.
    Text is normalised to NFC, because decomposed text costs two to three times the tokens. Every
    byte is in the vocabulary, so any text can be encoded. Raises ValueError if vocab_size is too
    small to hold the bytes, or if the texts are too little to fill it.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size={vocab_size} is below {smallest}, the 256 bytes and "
            f"{len(SPECIAL_TOKENS)} special tokens"
        )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(split_pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size} asked, but the texts only give {tokenizer.get_vocab_size()} "
            "entries; give more text or ask for less"
        )
    return tokenizer

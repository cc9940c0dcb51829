import base64
import io
import json
import pickle
import sys
import unicodedata
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import pytest
import tokenizers

from data.corpus import read_documents
from data.tokenize_corpus import DEMO_CORPUS, DEMO_TOKENIZER
from data.tokenizer import (
    END_OF_TEXT,
    SPLIT_PATTERN,
    Tokenizer,
    load_tokenizer,
    train_tokenizer,
)

GPT2_PATTERN = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # openai/gpt-2
)


@pytest.fixture(scope="module")
def texts() -> dict[str, list[str]]:
    by_language = defaultdict(list)
    for document in read_documents(DEMO_CORPUS):
        by_language[document.language].append(document.text)
    return by_language


def test_demo_tokenizer(tokenizer: Tokenizer) -> None:
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (8192, 0)
    assert tokenizer.decode([0, 1]) == "<|endoftext|><|pad|>"


def test_round_trip_in_every_language(tokenizer: Tokenizer, texts: dict[str, list[str]]) -> None:
    for documents in texts.values():
        for text, ids in zip(documents, tokenizer.encode_batch(documents), strict=True):
            assert tokenizer.decode(ids) == text
            assert max(ids) < tokenizer.vocab_size
        assert tokenizer.encode(documents[0]) == tokenizer.encode_batch(documents[:1])[0]
    unseen = "ქართული 𝄞 \x00 བོད"  # every byte is in the vocabulary
    assert tokenizer.decode(tokenizer.encode(unseen)) == unseen


def test_normalises_to_nfc(tokenizer: Tokenizer, texts: dict[str, list[str]]) -> None:
    text = texts["vi"][0]
    assert tokenizer.encode(unicodedata.normalize("NFD", text)) == tokenizer.encode(text)


def test_special_tokens_spelled_out_in_a_text_stay_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(f"The token {END_OF_TEXT} ends a document.")
    assert tokenizer.eod_id not in ids
    assert tokenizer.decode(ids) == f"The token {END_OF_TEXT} ends a document."


def test_marks_inside_words_shorten_indic_and_thai(texts: dict[str, list[str]]) -> None:
    """The trap of the GPT-2 pattern: it cuts words at every combining mark."""
    languages = ["en", "ru", "hi", "bn", "ta", "te", "th"]
    training = [text for language in languages for text in texts[language]]
    ours = train_tokenizer(training, 3000)
    gpt2 = train_tokenizer(training, 3000, GPT2_PATTERN)

    def tokens(tokenizer: tokenizers.Tokenizer, language: str) -> int:
        return sum(len(e.ids) for e in tokenizer.encode_batch(texts[language]))

    ratio = {language: tokens(gpt2, language) / tokens(ours, language) for language in languages}
    for language in ("hi", "bn", "ta", "te"):
        assert ratio[language] > 1.35, ratio
    assert ratio["th"] > 1.1, ratio
    # the others share the vocabulary with words that now compete; all in all it is a clear gain
    assert sum(tokens(gpt2, c) for c in languages) > 1.2 * sum(tokens(ours, c) for c in languages)


@pytest.mark.parametrize(
    "word",
    ["विकासशील", "উন্নয়নশীল", "வளர்ச்சி", "អភិវឌ្ឍន៍", "ការអភិវឌ្ឍ", "ဖွံ့ဖြိုးမှု", "ที่ยั่งยืน", "می\u200cخواهم"],
)
def test_a_word_with_marks_is_one_piece(word: str) -> None:
    def pieces(pattern: str) -> int:
        split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
        return len(split.pre_tokenize_str(f" {word}"))

    assert pieces(SPLIT_PATTERN) == 1
    assert pieces(GPT2_PATTERN) >= 3


def test_training_is_deterministic(texts: dict[str, list[str]]) -> None:
    first, second = (train_tokenizer(texts["hi"] + texts["de"], 1000).to_str() for _ in range(2))
    assert first == second


def test_training_refuses_sizes_it_cannot_give() -> None:
    with pytest.raises(ValueError, match="vocab_size=100 is below 258"):
        train_tokenizer(["text"], 100)
    with pytest.raises(ValueError, match="vocab_size=5000 asked, but the texts only give"):
        train_tokenizer(["just one short text"], 5000)


def test_fingerprint_is_of_the_content(tokenizer: Tokenizer, tmp_path: Path) -> None:
    content = json.loads(DEMO_TOKENIZER.read_text())
    same, other = tmp_path / "same.json", tmp_path / "other.json"
    same.write_text(json.dumps(dict(reversed(content.items()))))  # no indentation, other key order
    content["model"]["merges"][-2:] = reversed(content["model"]["merges"][-2:])
    other.write_text(json.dumps(content))
    assert load_tokenizer(same).fingerprint == tokenizer.fingerprint
    assert load_tokenizer(other).fingerprint != tokenizer.fingerprint


def test_vocab_size_covers_holes_and_eod_token_can_be_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    model = tokenizers.models.WordLevel({"a": 0, "stop": 7, "<unk>": 3}, unk_token="<unk>")
    tokenizers.Tokenizer(model).save(str(path))
    with pytest.raises(ValueError, match=r"none of <\|endoftext\|>.*set data.eod_token"):
        load_tokenizer(path)
    with pytest.raises(ValueError, match=r"^data.eod_token=end is not in the .*; set data.eod"):
        load_tokenizer(path, eod_token="end")
    loaded = load_tokenizer(path, eod_token="stop")
    assert (loaded.vocab_size, loaded.eod_id) == (8, 7)


def test_unreadable_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"leave data.tokenizer empty"):
        load_tokenizer(tmp_path / "none.json")
    with pytest.raises(ValueError, match=r"a folder; name the file in it"):
        load_tokenizer(tmp_path)
    for content, message in {
        '{"model": 1}': r"data.tokenizer=.*bad.json: not a Hugging Face .*neither a \"model\"",
        '{"model": {}}': r"not a Hugging Face tokenizer.json that tokenizers .* can read",
        "[1, 2]": r"not a Hugging Face tokenizer.json, a SentencePiece model or a tekken file",
        "tok en\n": r"not a Hugging Face .*Expecting value",
        "": r"not a Hugging Face .*Expecting value",
        "version https://git-lfs.github.com/spec/v1\n": r"git lfs pull",
    }.items():
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            load_tokenizer(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_bytes(b"\x0a\xff\xfe not text")
    with pytest.raises(ValueError, match=r"not a Hugging Face .*utf-8"):
        load_tokenizer(tmp_path / "bad.json")


def test_shipped_fingerprint(tokenizer: Tokenizer) -> None:
    """Stores made before are of this very tokenizer."""
    assert tokenizer.fingerprint.startswith("9b181d0d25e68900")
    assert tokenizer.kind == "hf"


def test_half_a_surrogate_pair_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"text 1 of 1 is not Unicode: character 2 is '\\ud83d'"):
        tokenizer.encode("ab\ud83d")
    with pytest.raises(ValueError, match=r"text 2 of 2 is not Unicode"):
        tokenizer.encode_batch(["good", "\ud83d"])


def test_a_pickle_keeps_special_tokens_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_bytes(DEMO_TOKENIZER.read_bytes())
    frozen = pickle.dumps(load_tokenizer(path))
    again = pickle.loads(frozen)
    assert again.encode(END_OF_TEXT) == tokenizer.encode(END_OF_TEXT) != [0]
    train_tokenizer(["some text"], 258).save(str(path))
    with pytest.raises(ValueError, match=r"mine.json: the file has changed"):
        pickle.loads(frozen)


def test_fragments_are_parts_of_characters(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.fragment_ids) > 128
    assert all("\ufffd" in tokenizer.decode([i]) for i in tokenizer.fragment_ids)
    whole = set(range(tokenizer.vocab_size)) - tokenizer.fragment_ids
    assert not [i for i in whole if "\ufffd" in tokenizer.decode([i])]
    assert tokenizer.unknown_ids == frozenset()


def test_reserved_tokens(texts: dict[str, list[str]], tmp_path: Path) -> None:
    trained = train_tokenizer(texts["de"], 400, reserved_tokens=3)
    assert [trained.id_to_token(i) for i in range(5)] == [
        *("<|endoftext|>", "<|pad|>", "<|reserved_0|>", "<|reserved_1|>", "<|reserved_2|>")
    ]
    trained.save(str(tmp_path / "t.json"))
    ids = load_tokenizer(tmp_path / "t.json").encode("<|reserved_1|>")
    assert min(ids) > 4  # text, when spelled out


# tekken --------------------------------------------------------------------------------------


def tekken(texts: list[str], merges: int = 300, extra: int = 5) -> dict:
    """A tekken file made of a BPE trained here: the 256 bytes, then tokens in order of merging."""
    trained = json.loads(train_tokenizer(texts, 258 + merges).to_str())["model"]["vocab"]
    letters = train_tokenizer(["x"], 258).get_vocab()
    byte_of = {letter: None for letter in letters if len(letter) == 1}
    # GPT-2's table, written another way than in data/tokenizer.py
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(b): b for b in shown}
    hidden = [b for b in range(256) if b not in shown]
    table |= {chr(256 + i): b for i, b in enumerate(hidden)}
    assert set(byte_of) == set(table)
    tokens = [bytes([b]) for b in range(256)]
    for token, _ in sorted(trained.items(), key=lambda item: item[1]):
        if len(token) > 1 and not token.startswith("<|"):
            tokens.append(bytes(table[letter] for letter in token))
    return {
        "config": {
            "pattern": SPLIT_PATTERN,
            "num_vocab_tokens": len(tokens),
            "default_vocab_size": len(tokens) - extra + 30,  # the file holds more than are used
            "default_num_special_tokens": 30,
            "version": "v3",
        },
        "vocab": [
            {"rank": i, "token_bytes": base64.b64encode(t).decode(), "token_str": None}
            for i, t in enumerate(tokens)
        ],
    }


def rank_merge(text: str, content: dict) -> list[int]:
    """tiktoken's algorithm: in each word join the neighbours whose union ranks lowest, leftmost."""
    config = content["config"]
    used = config["default_vocab_size"] - config["default_num_special_tokens"]
    rank = {base64.b64decode(e["token_bytes"]): e["rank"] for e in content["vocab"][:used]}
    ids = []
    split = tokenizers.pre_tokenizers.Split(
        tokenizers.Regex(config["pattern"]), behavior="isolated"
    )
    for word, _ in split.pre_tokenize_str(text):
        parts = [bytes([b]) for b in word.encode()]
        while len(parts) > 1:
            ranks = [rank.get(a + b, 1 << 60) for a, b in pairwise(parts)]
            lowest = min(ranks)
            if lowest == 1 << 60:
                break
            i = ranks.index(lowest)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [rank[part] + config["default_num_special_tokens"] for part in parts]
    return ids


def save(path: Path, content: dict) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_tekken(texts: dict[str, list[str]], tmp_path: Path) -> None:
    content = tekken(texts["hi"] + texts["de"] + texts["th"])
    loaded = load_tokenizer(save(tmp_path / "any_name.bin", content))
    assert (loaded.kind, loaded.vocab_size, loaded.eod_id) == ("tekken", 256 + 300 - 5 + 30, 2)
    for text in [*texts["hi"][:3], *texts["de"][:3], *texts["zh"][:2], "aaaaaaa  </s>\n\n 12\x00"]:
        ids = loaded.encode(text)
        assert ids == rank_merge(text, content)
        assert loaded.decode(ids) == text
        assert min(ids) >= 30
        assert loaded.encode_batch([text]) == [ids]
    assert loaded.decode([1, *loaded.encode("ok"), 2, 29]) == "<s>ok</s><SPECIAL_29>"
    assert pickle.loads(pickle.dumps(loaded)).encode("Wort") == loaded.encode("Wort")
    assert {30 + b for b in range(128, 256)} <= loaded.fragment_ids
    assert 30 + ord("a") not in loaded.fragment_ids

    # a word that no merges lead to is still the token it is, as in tiktoken
    word = {"rank": 300, "token_bytes": base64.b64encode(b" qzxjq").decode(), "token_str": None}
    listed = content | {"vocab": [*content["vocab"][:300], word, *content["vocab"][301:]]}
    assert load_tokenizer(save(tmp_path / "word", listed)).encode("qzxjq qzxjq")[-1:] == [330]

    unused = content | {"image": {"image_patch_size": 16}}
    unused["vocab"] = content["vocab"][:-1]  # an entry beyond default_vocab_size
    assert load_tokenizer(save(tmp_path / "same", unused)).fingerprint == loaded.fingerprint
    named = content | {"special_tokens": [{"rank": 0, "token_str": "<stop>", "is_control": True}]}
    other = load_tokenizer(save(tmp_path / "other", named), eod_token="<stop>")
    assert (other.eod_id, other.fingerprint == loaded.fingerprint) == (0, False)
    with pytest.raises(ValueError, match=r"none of <\|endoftext\|>, .*set data.eod_token"):
        load_tokenizer(tmp_path / "other")


def test_damaged_tekken(tmp_path: Path) -> None:
    def refused(message: str, **changes: object) -> None:
        content = tekken(["a few words, a few words more"], 10)
        content["config"] |= changes.pop("config", {})  # type: ignore[operator]
        for key, value in changes.items():
            content[key] = value
        with pytest.raises(ValueError, match=message):
            load_tokenizer(save(tmp_path / "t.json", content))

    vocab = tekken(["a few words, a few words more"], 10)["vocab"]
    refused("damaged tekken file .KeyError", vocab=[{}] * 300)
    refused("damaged tekken file: expected 261 different entries", vocab=vocab[:259])
    refused("damaged tekken file: expected 261", vocab=[vocab[1], vocab[0], *vocab[2:]])
    refused("damaged tekken file .*Error", vocab=[vocab[0] | {"token_bytes": "?"}, *vocab[1:]])
    refused(
        "20 special tokens, default_num_special_tokens=3", config=dict(default_num_special_tokens=3)
    )
    refused("not in the order", special_tokens=[{"rank": 1, "token_str": "</s>"}])
    refused("split pattern is no regular expression", config={"pattern": "("})


# SentencePiece -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sentencepiece_model(texts: dict[str, list[str]]) -> bytes:
    library = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(texts["de"] + texts["en"]),
        model_writer=model,
        vocab_size=700,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return model.getvalue()


def test_sentencepiece(
    sentencepiece_model: bytes, texts: dict[str, list[str]], tmp_path: Path
) -> None:
    library = pytest.importorskip("sentencepiece")
    path = tmp_path / "looks_like.json"  # the name says nothing
    path.write_bytes(sentencepiece_model)
    loaded = load_tokenizer(path)
    assert (loaded.kind, loaded.vocab_size, loaded.eod_id) == ("sentencepiece", 700, 2)
    assert loaded.unknown_ids == {0} and len(loaded.fragment_ids) == 128
    own = library.SentencePieceProcessor(model_proto=sentencepiece_model)
    documents = [*texts["de"][:3], *texts["hi"][:2], "two  spaces\n</s>\x00"]
    for text, ids in zip(documents, loaded.encode_batch(documents), strict=True):
        assert ids == loaded.encode(text) == own.encode(text)
        assert loaded.decode(ids) == text and 2 not in ids
    assert loaded.decode([*loaded.encode("ok"), 2, 10**6]) == "ok</s>"
    assert load_tokenizer(path, eod_token="<s>").eod_id == 1
    with pytest.raises(ValueError, match=r"^data.eod_token=<stop> is .*; leave it out for </s>"):
        load_tokenizer(path, eod_token="<stop>")
    with pytest.raises(ValueError, match=r"text 1 of 1 is not Unicode"):
        loaded.encode("\ud83d")
    assert pickle.loads(pickle.dumps(loaded)).fingerprint == loaded.fingerprint
    path.write_bytes(sentencepiece_model[:-100])
    with pytest.raises(ValueError, match=r"looks_like.json: a damaged SentencePiece model"):
        load_tokenizer(path)


def test_sentencepiece_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)  # as if not installed
    pieces = b"".join(b"\x0a\x05\x0a\x03" + name for name in (b"<a>", b"<b>"))
    (tmp_path / "m.model").write_bytes(pieces)
    with pytest.raises(ModuleNotFoundError, match=r"m.model is a .*pip install sentencepiece"):
        load_tokenizer(tmp_path / "m.model")

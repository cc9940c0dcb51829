import json
import unicodedata
from collections import defaultdict
from pathlib import Path

import pytest
import tokenizers

from data.corpus import read_documents
from data.tokenize_corpus import DEMO_CORPUS, DEMO_TOKENIZER
from data.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer, train_tokenizer

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
    with pytest.raises(ValueError, match=r"none of end; set data.eod_token"):
        load_tokenizer(path, eod_token="end")
    loaded = load_tokenizer(path, eod_token="stop")
    assert (loaded.vocab_size, loaded.eod_id) == (8, 7)


def test_unreadable_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"leave data.tokenizer empty"):
        load_tokenizer(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"model": 1}')
    with pytest.raises(ValueError, match=r"data.tokenizer=.*bad.json: not a Hugging Face"):
        load_tokenizer(tmp_path / "bad.json")

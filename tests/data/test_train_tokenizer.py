import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data import tokenizer_report
from data.corpora.files import check_writable
from data.corpus import read_documents
from data.documents import Document
from data.tokenize_corpus import DEMO_CORPUS, DEMO_TOKENIZER
from data.tokenizer import load_tokenizer
from data.train_tokenizer import (
    PASSAGE_CHARACTERS,
    LanguageSize,
    language_sizes,
    main,
    passages,
    sample_passages,
    sampling_rates,
    train_on_corpus,
)


def document(language: str, text: str, number: int = 0) -> Document:
    return Document(text, language, f"{language}/{number}")


@pytest.mark.timeout(120)
def test_the_same_corpus_gives_the_same_bytes(tmp_path: Path) -> None:
    """In two processes, as hash seeds differ between them."""
    for name in ("one.json", "two.json"):
        command = [sys.executable, "-m", "data.train_tokenizer", str(DEMO_CORPUS)]
        options = ["--vocab-size", "2000", "--out", str(tmp_path / "new" / name)]
        ended = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
        assert "2,000 entries, fingerprint " in ended.stdout
        assert "38 languages, 1.4 MB of text" in ended.stderr
    one, two = ((tmp_path / "new" / name).read_bytes() for name in ("one.json", "two.json"))
    assert one == two
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["one.json", "two.json"]
    tokenizer = load_tokenizer(tmp_path / "new" / "one.json")
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (2000, 0)


def test_alpha_moves_merges_to_small_languages(tmp_path: Path) -> None:
    """Telugu has a twentieth of the others' text here: with alpha 0 its tokens are longer."""
    documents = [d for d in read_documents(DEMO_CORPUS) if d.language in ("en", "ru", "te")]
    few = {d.doc_id for d in documents[:2]}
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(
        "".join(
            json.dumps({"text": d.text, "language": d.language, "doc_id": d.doc_id}) + "\n"
            for d in documents
            if d.language != "te" or d.doc_id in few
        )
    )
    held_out = [d.text for d in documents if d.language == "te" and d.doc_id not in few]
    tokens = {}
    for alpha in (0.0, 1.0):
        tokenizer = train_on_corpus(corpus, tmp_path / f"{alpha}.json", vocab_size=900, alpha=alpha)
        tokens[alpha] = sum(map(len, tokenizer.encode_batch(held_out)))
    assert tokens[0.0] < 0.8 * tokens[1.0]


def test_rates() -> None:
    sizes = {
        "big": LanguageSize(1, 1_000_000, 1_000_000),
        "wide": LanguageSize(1, 250_000, 750_000),  # three bytes a character
        "tiny": LanguageSize(1, 100, 100),
    }
    rates = sampling_rates(sizes, 0.5, 600_000, 4)
    assert rates["tiny"] == 4
    characters = {code: rates[code] * size.characters for code, size in sizes.items()}
    assert characters["big"] / characters["wide"] == pytest.approx(2)  # (1 / 0.25) ** 0.5
    spent = sum(rates[code] * size.utf8_bytes for code, size in sizes.items())
    assert spent == pytest.approx(600_000)
    # alpha 1: everything alike; and no more than max_repeats of everything
    assert list(sampling_rates(sizes, 1.0, 875_050, 4).values()) == pytest.approx([0.5] * 3)
    assert set(sampling_rates(sizes, 0.5, 1e12, 3).values()) == {3}
    with pytest.raises(ValueError, match="alpha=-1"):
        sampling_rates(sizes, -1, 1000, 4)


@pytest.mark.parametrize("rate", [0.13, 1.0, 2.5])
def test_samples_are_spread_evenly(rate: float) -> None:
    documents = [document("de", "wort " * (1 + i * i % 37), i) for i in range(500)]
    seen = given = 0
    longest = max(len(d.text) for d in documents)
    for each in documents:
        one = list(sample_passages([each], {"de": 1.0}))
        assert one == [("de", each.text)]
    sampled = sample_passages(documents, {"de": rate})
    total = sum(len(text) for _, text in sampled)
    seen = sum(len(d.text) for d in documents)
    assert abs(total - rate * seen) <= longest / 2
    half = documents[:250]
    given = sum(len(text) for _, text in sample_passages(half, {"de": rate}))
    assert abs(given - rate * sum(len(d.text) for d in half)) <= longest / 2


def test_one_long_document_is_sampled_too() -> None:
    rates = {"de": 0.1}
    text = "".join(f"Satz {i}.\n" for i in range(100_000))
    sampled = [part for _, part in sample_passages([document("de", text)], rates)]
    assert len(sampled) > 20
    assert sum(map(len, sampled)) == pytest.approx(0.1 * len(text), rel=0.05)


@pytest.mark.parametrize("text", ["word " * 5000, "字" * 9000, "line\n" * 5000, "short", ""])
def test_passages_make_up_the_text(text: str) -> None:
    parts = list(passages(text))
    assert "".join(parts) == text
    assert all(0 < len(part) <= PASSAGE_CHARACTERS for part in parts)
    assert all(part[0] in " \n" for part in parts[1:] if " " in text or "\n" in text)


def test_sizes() -> None:
    documents = [
        document("te", "అఆ"),
        document("de", "äb"),
        document("de", ""),
        document("de", "c"),
    ]
    sizes = language_sizes(documents)
    assert list(sizes) == ["de", "te"]
    assert sizes["de"] == LanguageSize(documents=2, characters=3, utf8_bytes=4)


def test_bad_settings_and_corpora(
    write_corpus: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    record = {"text": "ein kurzer Text", "language": "de", "doc_id": "1"}
    corpus, out = write_corpus([record]), tmp_path / "out.json"
    empty = write_corpus([], "empty.jsonl")
    textless = write_corpus([record, record | {"text": ""}], "textless.jsonl")
    invalid = tmp_path / "invalid.jsonl"
    invalid.write_bytes(b'{"text": "\xff", "language": "de", "doc_id": "1"}\n')
    for given, message in {
        (str(empty),): "no text in it to train a tokenizer on",
        (str(textless),): "textless.jsonl, line 2: a document without any text",
        (str(invalid),): "invalid.jsonl, line 1",
        (str(tmp_path / "none.jsonl"),): "no such file or folder",
        (str(corpus), "--vocab-size", "256"): "vocab_size=256 leaves no room for a single merge",
        (str(corpus), "--vocab-size", "258"): "the 256 bytes and 2 special tokens come first",
        (str(corpus), "--vocab-size", "300", "--reserved-tokens", "50"): "52 special tokens",
        (str(corpus), "--reserved-tokens", "-1"): "reserved_tokens=-1: must be 0 or more",
        (str(corpus), "--vocab-size", "32768"): "the texts only give 2",
        (str(corpus), "--alpha", "-0.5"): "alpha=-0.5",
        (str(corpus), "--sample-megabytes", "0"): "sample_megabytes=0.0: must be above 0",
        (str(corpus), "--max-repeats", "nan"): "max_repeats=nan: must be above 0",
    }.items():
        with pytest.raises(SystemExit) as ended:
            main([*given, "--out", str(out)])
        assert ended.value.code == 2
        assert message in capfd.readouterr().err
        assert not out.exists()
    assert main([str(corpus), "--vocab-size", "262", "--out", str(out)]) == 0
    with pytest.raises(SystemExit):
        main([str(corpus), "--vocab-size", "261", "--out", str(out)])
    assert "exists already; choose another name or give --overwrite" in capfd.readouterr().err
    assert load_tokenizer(out).vocab_size == 262
    assert main([str(corpus), "--vocab-size", "261", "--out", str(out), "--overwrite"]) == 0
    assert load_tokenizer(out).vocab_size == 261


@pytest.mark.parametrize("command", [main, tokenizer_report.main])
@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("/proc/new", "No such file or directory"),
        ("file/new", "file is a file"),
        ("a" * 300, "File name too long"),
    ],
)
def test_where_nothing_can_be_written_nothing_is_read(
    command: Callable[[list[str]], int],
    out: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    more = [] if command is main else ["--tokenizer", str(DEMO_TOKENIZER)]
    with pytest.raises(SystemExit) as ended:
        command(["no corpus", "--out", out, *more])  # which is the next thing that would be told
    assert ended.value.code == 2
    told = f"error: --out {out}: cannot be written ({said}); choose another place\n"
    assert capsys.readouterr().err == told
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_look_at_the_place_leaves_nothing(tmp_path: Path) -> None:
    check_writable("--out", tmp_path / "new" / "deep" / "t.json")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"^--out: .* is a folder; name a file$"):
        check_writable("--out", tmp_path)


def test_reading_takes_neither_torch_nor_megatron() -> None:
    modules = "data.train_tokenizer, data.tokenizer_report"
    heavy = "('torch', 'megatron', 'matplotlib', 'rich')"
    code = f"import sys, {modules}; print(*(m for m in {heavy} if m in sys.modules))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == []

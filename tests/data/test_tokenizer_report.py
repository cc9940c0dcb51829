import io
import json
import math
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers

from data.tokenize_corpus import DEMO_CORPUS, DEMO_TOKENIZER
from data.tokenizer import Tokenizer, load_tokenizer
from data.tokenizer_report import main, measure, plot, print_report


def record(language: str, doc_id: str, text: str) -> dict:
    return {"text": text, "language": language, "doc_id": doc_id}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Knows six words; all else is unknown, and what it knows comes back without spaces."""
    path = tmp_path_factory.mktemp("words") / "words.json"
    names = ["</s>", "<unk>", "one", "two", "three", "eins", "zwei", "drei"]
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>")
    built = tokenizers.Tokenizer(model)
    built.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    built.save(str(path))
    return load_tokenizer(path)


def test_counts_by_hand(words: Tokenizer, write_corpus: Callable[..., Path]) -> None:
    corpus = write_corpus(
        [
            record("en", "a", "one two"),
            record("en", "b", "one\ntwo three"),
            record("de", "a", "eins zwei zwei"),
            record("de", "b", "eins"),  # one line of two: not a translation of the whole
            record("nl", "c", "één eins"),
            record("fi", "a", "zwei"),
        ]
    )
    report = measure(corpus, [words], megabytes_per_language=0)
    assert list(report.family_of) == ["de", "en", "nl", "fi"]  # germanic, then uralic
    [of_words] = report.tokenizers
    german, dutch = of_words.languages["de"], of_words.languages["nl"]
    assert (german.documents, german.tokens, german.characters) == (2, 4, 18)
    assert german.characters_per_token == 18 / 4
    assert german.against_reference == 3 / 2
    assert (dutch.utf8_bytes, dutch.tokens, dutch.unknown_share) == (10, 2, 0.5)
    assert math.isnan(dutch.against_reference)
    assert (dutch.lossy, german.lossy, of_words.languages["en"].lossy) == (1, 0, 1)
    germanic = of_words.families["germanic"]
    assert germanic.tokens == 4 + 5 + 2
    assert germanic.against_reference == 3 / 2  # English against itself says nothing
    assert of_words.all.against_reference == (3 + 1) / (2 + 2)
    assert of_words.all.tokens == 12


def test_normalization_is_no_loss(tokenizer: Tokenizer, write_corpus: Callable[..., Path]) -> None:
    composed = "Tiếng Việt"
    corpus = write_corpus(
        [
            record("vi", "a", composed),
            record("vi", "b", unicodedata.normalize("NFD", composed)),
        ]
    )
    counts = measure(corpus, [tokenizer]).tokenizers[0].all
    assert (counts.documents, counts.normalized, counts.lossy) == (2, 1, 0)


def test_fragments_are_counted(tokenizer: Tokenizer, write_corpus: Callable[..., Path]) -> None:
    corpus = write_corpus([record("ka", "a", "საქართველო"), record("en", "a", "settings")])
    of = measure(corpus, [tokenizer]).tokenizers[0].languages
    assert of["ka"].fragment_share > 0.8  # no Georgian in the demo
    assert of["en"].fragment_share == 0


def test_demo(tokenizer: Tokenizer, tmp_path: Path) -> None:
    report = measure(DEMO_CORPUS, [tokenizer])
    [of_demo] = report.tokenizers
    assert len(of_demo.languages) == 38 and of_demo.all.documents == 1254
    assert (of_demo.all.lossy, of_demo.all.normalized, of_demo.all.unknown_tokens) == (0, 0, 0)
    # the marks belong to the word (GPT-2's pattern: 3.85 for Hindi)
    assert of_demo.languages["hi"].bytes_per_token > 6
    assert of_demo.families["indic"].bytes_per_token > 5.5
    assert of_demo.languages["en"].against_reference == 1
    assert 1 < of_demo.all.against_reference < 1.5
    shown = io.StringIO()
    print_report(report, shown)
    assert "hi Hindi" in shown.getvalue() and "indic" in shown.getvalue()
    assert "exactly 1,254 of 1,254" in shown.getvalue()


def test_a_limit_chooses_translations_together(tokenizer: Tokenizer) -> None:
    """Ten of the 33 documents: without a shared choice few would be parallel."""
    whole = measure(DEMO_CORPUS, [tokenizer]).tokenizers[0]
    part = measure(DEMO_CORPUS, [tokenizer], megabytes_per_language=0.01).tokenizers[0]
    assert 0.1 < part.all.documents / whole.all.documents < 0.6
    assert set(part.languages) == set(whole.languages)
    for code in ("de", "hi", "zh"):
        assert part.languages[code].parallel_tokens == part.languages[code].tokens
        expected = whole.languages[code].against_reference
        assert part.languages[code].against_reference == pytest.approx(expected, rel=0.15)
    least = measure(DEMO_CORPUS, [tokenizer], megabytes_per_language=1e-9).tokenizers[0]
    assert {counts.documents for counts in least.languages.values()} == {1}


def test_command_compares_tokenizers(
    words: Tokenizer,
    write_corpus: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    corpus = write_corpus([record("en", "a", "one two"), record("xx-unlisted", "a", "eins")])
    lines = corpus.read_text().replace('"language": "xx', '"family": "mine", "language": "xx')
    corpus.write_text(lines)
    out = tmp_path / "new" / "report"
    options = ["--tokenizer", str(DEMO_TOKENIZER), "--tokenizer", words.path, "--out", str(out)]
    assert main([str(corpus), *options]) == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "tokenizer_report.json",
        "tokenizer_report.png",
    ]
    content = json.loads((out / "tokenizer_report.json").read_text())
    assert content["family_of"] == {"en": "germanic", "xx-unlisted": "mine"}
    assert [t["kind"] for t in content["tokenizers"]] == ["hf", "hf"]
    assert content["tokenizers"][1]["languages"]["xx-unlisted"]["against_reference"] == 0.5
    assert (out / "tokenizer_report.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "mine: xx-unlisted" in printed and f"B  {words.path}" in printed
    assert "tokens that are unknown 0.000%" in printed


def test_plot_without_parallel_text(
    words: Tokenizer, write_corpus: Callable[..., Path], tmp_path: Path
) -> None:
    report = measure(write_corpus([record("de", "a", "eins")]), [words])
    assert report.as_json()["tokenizers"][0]["all"]["against_reference"] is None
    plot(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_bad_input(
    write_corpus: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write_corpus([record("de", "a", "eins")])
    empty = write_corpus([], "empty.jsonl")
    textless = write_corpus([record("de", "a", "")], "textless.jsonl")
    unlisted = write_corpus([record("xx-unlisted", "a", "eins")], "unlisted.jsonl")
    none = tmp_path / "none.jsonl"
    no_tokenizer = tmp_path / "bad.json"
    no_tokenizer.write_text("{}")
    demo = str(DEMO_TOKENIZER)
    out = tmp_path / "out"
    for given, message in {
        (str(empty), "--tokenizer", demo): "no text in it",
        (str(textless), "--tokenizer", demo): "line 1: a document without any text",
        (str(none), "--tokenizer", demo): "no such file or folder",
        (str(unlisted), "--tokenizer", demo): "xx-unlisted",
        (str(good), "--tokenizer", str(no_tokenizer)): "error: --tokenizer ",
        (
            str(good),
            "--tokenizer",
            demo,
            "--eod-token",
            "<stop>",
        ): "error: --eod-token <stop> is not in the vocabulary of --tokenizer ",
        (str(good), "--tokenizer", demo, "--megabytes-per-language", "-1"): "must be 0 or more",
    }.items():
        with pytest.raises(SystemExit) as ended:
            main([*given, "--out", str(out)])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
        assert not out.exists()

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from data.config import DataConfig
from data.inspect import main, printable, token_texts
from data.open_mixture import open_mixture
from data.store_folder import open_stores
from data.tokenizer import Tokenizer, load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TEXT = "Grüße 你好 नमस्ते 🎉🇩🇪\n\u0915\u093f \ufffd ok"
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def out_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(words) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def error_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("python -m data.inspect: error: ")
    return captured.err


def test_token_texts_add_up(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    pairs = list(token_texts(tokenizer, ids))
    assert "".join(text for _, text in pairs) == tokenizer.decode(ids) == TEXT
    assert [i for part, _ in pairs for i in part] == ids
    assert len(pairs) > 15
    # no piece of a character by itself
    assert sum("\ufffd" in text for _, text in pairs) == 1


def test_token_texts_of_a_tokenizer_that_drops_the_first_space(tmp_path: Path) -> None:
    """As SentencePiece does: a token decoded by itself has lost the space before it."""
    model = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    model.pre_tokenizer, model.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(special_tokens=["<unk>", "</s>"], show_progress=False)
    text = "a house and a garden and a house"
    model.train_from_iterator([text], trainer)
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    pairs = list(token_texts(tokenizer, [*tokenizer.encode(text), tokenizer.eod_id]))
    assert "".join(piece for _, piece in pairs) == text
    assert {" house", " garden", ""} <= {piece for _, piece in pairs}


def test_token_texts_of_a_cut_and_of_borders(tokenizer: Tokenizer) -> None:
    party = tokenizer.encode("🎉")
    assert len(party) > 1
    eod = tokenizer.eod_id
    pairs = list(token_texts(tokenizer, [*party[:1], eod, *party[1:], eod, *party[:1]]))
    assert [i for part, _ in pairs for i in part] == [*party[:1], eod, *party[1:], eod, party[0]]
    assert [text for part, text in pairs if part == [eod]] == ["", ""]
    assert all("\ufffd" in text for part, text in pairs if part != [eod])


def test_text_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[31mb\r\n\tc\x7f\x9b") == "a␛[31mb␍\n\tc␡\ufffd"


def test_documents_of_a_store(
    demo_folder: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_stores(demo_folder, "train", ["de"])[0]
    words = [str(demo_folder), "--language", "de", "--documents", "2", "--first", "5"]
    out = out_of([*words, "--characters", "0"], capsys)
    assert "\x1b" not in out  # no terminal, no colours
    for number in (5, 6):
        start, stop = store.document_span(number)
        assert f"document {number} of {store.documents} · {store.document_source(number)[0]}" in out
        assert f"{stop - start:,} tokens from {start:,} on" in out
        assert tokenizer.decode(store.document(number)[:-1]) + "<end of document>" in out
    assert out.count("de German (germanic)") == 2

    short = out_of([*words, "--characters", "10"], capsys)
    assert " …" in short and "<end of document>" not in short
    with_ids = out_of([*words, "--ids"], capsys)
    assert f"⟨{store.document(5)[0]}⟩" in with_ids


def test_every_language_and_split(demo_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = out_of([str(demo_folder), "--split", "validation", "--characters", "20"], capsys)
    stores = open_stores(demo_folder, "validation")
    assert out.count("document 0 of ") == len(stores) > 30


def test_colours(demo_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(demo_folder), "--language", "hi", "--characters", "100"]
    plain = out_of(words, capsys)
    coloured = out_of([*words, "--colour", "always"], capsys)
    assert COLOURS.sub("", coloured) == plain
    assert len(set(COLOURS.findall(coloured))) > 4
    for line in coloured.splitlines():
        assert not line.startswith("\x1b") or line.endswith("\x1b[0m")  # no colour runs on


def test_a_sample_is_the_one_the_loader_reads(
    demo_folder: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    config = DataConfig(store_dir=str(demo_folder))
    mixture = open_mixture(config, 64).mixture
    for sample in (0, 12_345_678_901):
        language, number = mixture.locate(np.array([sample]))
        rows = mixture.read(language, number)
        words = [str(demo_folder), "--sample", str(sample), "--seq-length", "64"]
        out = out_of([*words, "--characters", "0", "--ids"], capsys)
        code = mixture.languages[int(language[0])]
        assert f"sample {sample:,} of the training stream" in out
        assert f"({mixture.family_of[code]}) · sequence {int(number[0]):,} of " in out
        shown = [int(i) for group in re.findall(r"⟨([\d ]+)⟩", out) for i in group.split()]
        assert shown == [i for i in rows.ids[0].tolist() if i != tokenizer.eod_id]


def test_a_sequence_names_its_documents(
    demo_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_stores(demo_folder, "train", ["de"])[0]
    border = store.document_span(1)[0]
    words = [str(demo_folder), "--language", "deu", "--seq-length", "64"]
    words += ["--sequence", str(border // 64)]
    out = out_of([*words, "--characters", "0"], capsys)
    first, last = store.document_of(border // 64 * 64), store.document_of(border // 64 * 64 + 64)
    assert first == 0 and last >= 1
    for number in range(first, last + 1):
        assert f"  document {number} · {store.document_source(number)[0]}" in out
    assert f"of {last - first + 1} documents" in out
    assert out.count("<end of document>") == last - first
    best_fit = out_of([*words, "data.packing.mode=best_fit"], capsys)
    assert " of padding" in best_fit


def test_a_grouping_names_the_family(demo_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(demo_folder), "--language", "kn", "--sequence", "0", "--seq-length", "64"]
    assert "kn Kannada (dravidian)" in out_of(words, capsys)
    assert "kn Kannada (indic)" in out_of([*words, "data.families=five_families"], capsys)


def test_a_corpus(
    write_corpus: Callable[..., Path],
    tokenizer: Tokenizer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_corpus(
        [
            {"text": "Guten Tag", "language": "de", "doc_id": "a", "source": "s", "license": "MIT"},
            {"text": "\x1b[2Jhello", "language": "en", "doc_id": "b", "family": "west"},
            {"text": "Gute Nacht", "language": "de", "doc_id": "c"},
        ]
    )
    out = out_of(["--corpus", str(path), "--documents", "9"], capsys)
    tokens = len(tokenizer.encode("Guten Tag"))
    assert f"de German (germanic) · a · s · MIT · 9 characters, 9 bytes, {tokens} tokens, " in out
    assert "en English (west) · b" in out and "␛[2Jhello" in out
    german = out_of(["--corpus", str(path), "--language", "ger", "--documents", "1"], capsys)
    assert "Guten Tag" in german and german.count("German") == 1
    second = out_of(["--corpus", str(path), "--language", "de", "--first", "1"], capsys)
    assert "Gute Nacht" in second and "Guten Tag" not in second
    assert "⟨" in out_of(["--corpus", str(path), "--ids"], capsys)
    error = error_of(["--corpus", str(path), "--language", "grman"], capsys)
    assert "--language grman: there is none; did you mean de? There are de, en" in error
    assert "fewer documents" in error_of(["--corpus", str(path), "--first", "9"], capsys)
    error = error_of(["--corpus", str(path), "--language", "en", "--first", "9"], capsys)
    assert "fewer documents" in error


def test_a_run(demo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {
        "model": {"max_position_embeddings": 32},
        "data": {"store_dir": str(demo_folder), "seed": 7},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(settings))
    from_run = out_of(["--run", str(tmp_path), "--sample", "9"], capsys)
    typed = [str(demo_folder), "data.seed=7", "--seq-length", "32", "--sample", "9"]
    assert from_run == out_of(typed, capsys)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--language", "grman"], "--language grman: there is none; did you mean de? There are"),
        (["--language", "qqq"], "--language qqq: there is none. There are am, ar, "),
        (["data.languages=[de,qqq]"], "data.languages: qqq: there is none"),
        (["--language", "de", "--first", "99999"], "--first 99999: "),
        (["--language", "de", "--documents", "0"], "--documents 0 must be at least 1"),
        (["--characters", "-1"], "--characters -1 must be at least 0"),
        (["--sequence", "1"], "--sequence needs --language"),
        (["--sequence", "999999", "--language", "de", "--seq-length", "8"], "de has the sequences"),
        (["--sample", "1"], "the length of a training sequence is not said"),
        (
            ["--sample", "-1", "--seq-length", "8"],
            "--sample -1: the data has the samples from 0 on",
        ),
        (["--sample", "1", "--language", "de"], "--sample is a place in the training stream"),
        (["--corpus", "x.jsonl", "--sample", "1"], "a corpus has documents"),
        (["--corpus", "x.jsonl"], "x.jsonl: no such file or folder"),
        (["--tokenizer", "nowhere.json"], "nowhere.json: no such file"),
    ],
)
def test_bad_input(
    demo_folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    assert says in error_of([str(demo_folder), *words], capsys)


def test_no_such_stores(
    demo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no folder with a train/ folder" in error_of([str(tmp_path)], capsys)
    (tmp_path / "train").symlink_to(demo_folder / "train")
    words = [str(tmp_path), "--split", "validation", "data.verify=none"]
    assert "there are no stores in validation/" in error_of(words, capsys)


def test_a_sample_behind_the_end(demo_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(demo_folder), "--seq-length", "64", "--sample", "10000000"]
    words += ["data.mixture.max_epochs=2", "data.mixture.when_exhausted=stop"]
    assert re.search(r"samples from 0 on to \d+, where it ends", error_of(words, capsys))


def test_the_command_imports_no_torch(demo_folder: Path) -> None:
    code = (
        "import sys; from data.inspect import main; status = main(sys.argv[1:]); "
        "print('imported:', [m for m in ('torch', 'megatron') if m in sys.modules])"
    )
    words = [str(demo_folder), "--sample", "5", "--seq-length", "64"]
    ended = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert "imported: []" in ended.stdout, ended.stderr

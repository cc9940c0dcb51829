"""launch.fit_mixture on tables of runs that a known law made up."""

import json
import math
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml  # type: ignore[import-untyped]

from data.config import Weighting
from data.mixture_file import read_mixture_file
from data.quantity import quantity
from data.scaling_law.law import FamilyLaw, ScalingLaw
from data.scaling_law.runs_table import RunsTable, make_table
from data.store_cache import prepare_stores
from data.store_folder import open_stores
from data.tokenize_corpus import DEMO_TOKENIZER
from data.tokenizer import load_tokenizer
from launch.fit_mixture import main
from launch.schema import load

LAW = {
    "germanic": FamilyLaw(E=1.6, A=80.0, alpha=0.33, B=300.0, beta=0.30, gamma=0.08),
    "indic": FamilyLaw(E=1.2, A=60.0, alpha=0.31, B=250.0, beta=0.29, gamma=0.16),
    "slavic": FamilyLaw(E=1.8, A=90.0, alpha=0.35, B=350.0, beta=0.31, gamma=0.11),
}
TEXT = {"germanic": 4e8, "indic": 5e7, "slavic": 2e8}
MIXTURES = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0.6, 0.2, 0.2), (0.2, 0.6, 0.2), (0.2, 0.2, 0.6)]
BEST = {"germanic": 0.22728, "indic": 0.45755, "slavic": 0.31517}  # p^(1 + γ) ∝ γ, by bisection


def runs_of_the_law(noise: float = 1e-3, seed: int = 0) -> RunsTable:
    draw, rows = np.random.default_rng(seed), []
    for n in (1e6, 4e6, 16e6):
        for d in (1e8, 4e8, 16e8):
            for number, mixture in enumerate(MIXTURES):
                for family, p in zip(LAW, mixture, strict=True):
                    loss = math.nan
                    if p:
                        loss = LAW[family].loss(n, d, p) * math.exp(noise * draw.standard_normal())
                    rows.append(
                        {
                            "run": f"n{n:.0f}-d{d:.0f}-{number}",
                            "model": f"n{n:.0f}",
                            "num_parameters": n,
                            "tokens": d,
                            "seed": 1,
                            "purpose": "grid" if max(mixture) < 1 else "single_family",
                            "family": family,
                            "ratio": p,
                            "loss": loss,
                            "eval_tokens": 10**5,
                            "epochs": p * d / TEXT[family],
                        }
                    )
    return make_table(rows)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    runs_of_the_law().save(folder / "runs.parquet")
    return folder


QUICK = ["--bootstrap", "20", "--held-out", "3"]
WORDS = ["--target", "magneto_tiny", "--tokens", "2B", *QUICK]

SIZE = ["--target", "85M", "--tokens", "2B", *QUICK]


def test_from_a_table_to_a_mixture_that_trains(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(sweep), *WORDS, "train.global_batch_size=16"]) == 0
    out = capsys.readouterr().out
    folder = sweep / "fit" / "magneto_tiny-2B-normalized"
    assert sorted(path.name for path in folder.iterdir()) == [
        "comparison.json",
        "comparison.png",
        "law.yaml",
        "mixture.yaml",
    ]
    # the command that is printed, read by the launcher
    command = shlex.split(out.strip().splitlines()[-1])
    config = load(command[command.index("launch/pretrain.py") + 1 :])
    mixture = config.data.mixture
    assert mixture.weighting is Weighting.ratios and mixture.law == str(folder / "law.yaml")
    assert mixture.ratios == pytest.approx(BEST, abs=0.01)
    assert math.fsum(mixture.ratios.values()) == pytest.approx(1, abs=1e-12)
    # 2e9 tokens in steps of 16 x 256
    assert config.train.train_steps == round(2e9 / (16 * 256))
    law = ScalingLaw.load(mixture.law)
    assert law.gamma == pytest.approx({f: one.gamma for f, one in LAW.items()}, abs=5e-3)
    content = json.loads((folder / "comparison.json").read_text())
    assert content["optimum"]["ratios"] == mixture.ratios
    # what the table says of the fit, of the target, and of what was left out
    assert "54 runs, 54 fitted" in out and "held-out R2" in out
    assert "N = 798,464 parameters without the embedding, D = 2G tokens" in out
    assert "Left out\n  n1000000-d100000000-0, indic: " in out
    assert "times below the smallest fitted (1e+06)" in out
    assert "sizes of the families: the sweep's text" in out
    # and it does not write over what is there
    assert main([str(sweep), *WORDS]) == 2
    assert "magneto_tiny-2B-normalized exists already; name another" in capsys.readouterr().err


def test_caps_and_floors_reach_the_ratios(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "mine"
    words = [*SIZE, "--max-epochs", "4", "--at-least", "germanic=0.7", "--output", str(output)]
    assert main([str(sweep / "runs.parquet"), *words, "--objective", "sum"]) == 0
    out = capsys.readouterr().out
    assert "+model=MODEL" in out and "train.train_steps=STEPS" in out  # only a size is known
    mixture = (output / "mixture.yaml").read_text()
    assert "# The optimum by law.yaml for N = 85,000,000 parameters" in mixture
    assert "fit_mixture" in mixture and "--target 85M" in mixture
    ratios = json.loads((output / "comparison.json").read_text())["optimum"]["ratios"]
    assert ratios["germanic"] == 0.7
    assert ratios["indic"] == pytest.approx(4 * TEXT["indic"] / 2e9)  # by the sweep's epochs
    assert "^ all the text there is in 4 epochs: indic" in out
    assert "_ at the lower bound: germanic" in out


def stores_of(languages: list[str], folder: Path) -> Path:
    corpus = folder / "corpus.jsonl"
    records = [
        {"text": f"{code} " * 200, "language": code, "doc_id": f"{code}{i}"}
        for code in languages
        for i in range(40)
    ]
    corpus.write_text("".join(json.dumps(record) + "\n" for record in records))
    return prepare_stores(corpus, load_tokenizer(DEMO_TOKENIZER), folder / "cache", 0.05)


def test_sizes_of_the_data_named_by_settings(tmp_path: Path) -> None:
    """Tokens of one epoch, as a run draws them."""
    stores = stores_of(["de", "nl", "hi"], tmp_path)
    table = runs_of_the_law()
    two = table.where(row["family"] != "slavic" for row in table.rows)
    two.save(tmp_path / "runs.csv")
    words = [*SIZE, f"data.store_dir={stores}", "data.seq_length=64"]
    assert main([str(tmp_path / "runs.csv"), *words, "--output", str(tmp_path / "out")]) == 0
    goal = json.loads((tmp_path / "out" / "comparison.json").read_text())["goal"]
    tokens = {store.language: store.tokens for store in open_stores(stores, "train")}
    assert set(goal["supply"]) == {"germanic", "indic"}
    assert goal["supply"]["germanic"] == pytest.approx(tokens["de"] + tokens["nl"], abs=2 * 64)
    assert goal["supply"]["indic"] == pytest.approx(tokens["hi"], abs=64)
    assert all(n % 64 == 0 for n in goal["supply"].values())


def test_data_of_other_families(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stores = stores_of(["de", "hi", "ru", "fi"], tmp_path)
    words = [*WORDS, f"data.store_dir={stores}", "--output", str(tmp_path / "out")]
    assert main([str(sweep), *words]) == 2
    assert "the data has uralic, of which the sweep knows nothing" in capsys.readouterr().err
    assert main([str(sweep), *words, "data.languages=[de,hi]"]) == 2
    assert "the sweep has slavic, of which there is no text" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_the_runs_of_a_sweep_had(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its rule within families goes into the mixture, what it trained on into the law."""
    table = runs_of_the_law()
    table.save(tmp_path / "runs.parquet")
    rule = {"within_family": "uniform", "drop_languages": ["nl"]}
    config = {
        "name": "test",
        "families": list(LAW),
        "models": {
            "n1": {"base": "magneto_tiny"},
            "n2": {
                "base": "magneto_tiny",
                "settings": {"data": {"mixture": {"within_family": "proportional"}}},
            },
        },
        "settings": {"data": {"mixture": rule}},
        "must_determine_law": False,
        "single_family": {"cells": {"n1": [1e6]}},
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"config": config, "runs": []}))
    languages = {"de": "germanic", "nl": "germanic", "hi": "indic", "ru": "slavic"}
    for number, run in enumerate(sorted(table.wide)):
        drawn = {"de": 0.5, "hi": 0.0} if number else {"hi": 0.25, "ru": 0.75, "nl": 0.0}
        fingerprint = {
            "seq_length": 128 if number == 5 else 64,
            "tokenizer": "f" * 64,
            "families": languages,
            "ratios": [{"shares": drawn}],
        }
        (tmp_path / "runs" / run).mkdir(parents=True)
        (tmp_path / "runs" / run / "run.json").write_text(
            json.dumps({"data_fingerprint": fingerprint})
        )
    (tmp_path / "runs" / sorted(table.wide)[7] / "run.json").write_text('{"cut')
    typed = ["data.mixture.drop_languages=[]"]
    assert main([str(tmp_path), *SIZE, *typed, "--output", str(tmp_path / "out")]) == 0
    settings = read_mixture_file(tmp_path / "out" / "mixture.yaml")
    assert {name: settings[name] for name in rule} == rule
    out = capsys.readouterr().out
    assert "data.mixture.drop_languages=[]: the sweep's runs had ['nl']" in out
    assert "data.mixture.within_family=" not in out
    assert "the sweep's n2 shares out the samples within a family otherwise than n1" in out
    assert "the runs have several of seq_length: 64, 128" in out
    assert ScalingLaw.load(tmp_path / "out" / "law.yaml").provenance["data"] == {
        "seq_length": [64, 128],
        "tokenizer": ["f" * 64],
        "languages": {"germanic": ["de"], "indic": ["hi"], "slavic": ["ru"]},
    }


def test_text_of_dropped_languages_does_not_count(tmp_path: Path) -> None:
    stores = stores_of(["de", "nl", "hi"], tmp_path)
    table = runs_of_the_law()
    table.where(row["family"] != "slavic" for row in table.rows).save(tmp_path / "runs.csv")
    words = [f"data.store_dir={stores}", "data.seq_length=64", "data.mixture.drop_languages=[nl]"]
    assert main([str(tmp_path / "runs.csv"), *SIZE, *words, "--output", str(tmp_path / "out")]) == 0
    goal = json.loads((tmp_path / "out" / "comparison.json").read_text())["goal"]
    tokens = {store.language: store.tokens for store in open_stores(stores, "train")}
    assert goal["supply"]["germanic"] == pytest.approx(tokens["de"], abs=64)


def test_a_sparse_target(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--target", "xmoe_tiny", "--tokens", "50e9", *QUICK, "--output", str(tmp_path / "out")]
    assert main([str(sweep), *words, "--checks"]) == 0
    out = capsys.readouterr().out
    assert "xmoe_tiny is sparse; its N counts all experts" in out
    assert "One gamma at all sizes and lengths?" in out


def test_what_the_runs_do_not_determine(
    tmp_path: Path, sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = runs_of_the_law()
    table.where(row["num_parameters"] == 1e6 for row in table.rows).save(tmp_path / "runs.csv")
    assert main([str(tmp_path), *SIZE]) == 2
    err = capsys.readouterr().err
    assert "the runs do not determine the law" in err and "(here: --fix " in err
    fixed = err.split("(here: ")[1].split(")")[0].split()
    assert main([str(tmp_path), *SIZE, *fixed]) == 0
    assert "set, not fitted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--target", "magneto_1g"], "--target magneto_1g: there is no such model; did you mean"),
        (["--target", "magneto_1g"], "xmoe_tiny"),
        (["--target", "1.2X"], "--target 1.2X: must be a number above 0, such as 300B"),
        (["--tokens", "many"], "--tokens many: must be a number above 0, such as 300B, 50e9"),
        (["--tokens", "-3B"], "--tokens -3B: must be a number above 0"),
        (["--weights", "germanic"], "--weights germanic: must be numbers of families, each once"),
        (["--weights", "germanic=0"], "--weights 0: must be a number above 0"),
        (["--weights", "klingon=2"], "weights names klingon; the families are germanic, indic,"),
        (["--objective", "weights"], "the objective `weights` needs weights"),
        (["--weights", "indic=2", "--objective", "sum"], "objective=sum and weights="),
        (["--at-least", "much"], "--at-least much: must be a number, such as 0.02"),
        (["--at-least", "0.4"], "at_least of 3 families sums to 1.2, more than 1"),
        (["--at-least", "finnic=0.1"], "at_least names finnic"),
        (["--max-epochs", "1"], "6.5e+08 tokens, 1.35e+09 short of the 2e+09 planned"),
        (["--max-epochs", "0"], "--max-epochs 0: must be a number above 0"),
        (["--supply", "indic=1B"], "the supply of germanic, slavic is not given"),
        (["--level", "90"], "--level 90: must lie between 0 and 1"),
        (["--held-out", "1"], "folds=1: leaving all runs out at once"),
        (["--bootstrap", "-1"], "--bootstrap -1: must be a whole number of at least 0"),
        (["--fix", "delta=1"], "fixed: delta is none of E, A, alpha"),
        (["--families", "klingon"], "the table has none of klingon"),
        (["train.train_steps=5"], "train.train_steps=5: the steps follow from --tokens"),
        (["data.mixture.weighting=uniform"], "this is what the fit decides; leave it out"),
        (["data/mixture=a.yaml"], "this is what the fit decides; leave it out"),
        (["optimizer.lr=1"], "the stream of samples does not depend on optimizer.lr"),
        (["another"], "name one folder of a sweep, or one table of runs"),
    ],
)
def test_what_it_refuses(
    sweep: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    says: str,
) -> None:
    output = tmp_path / "out"
    # = binds values that begin with a minus
    words = [f"{words[0]}={words[1]}", *words[2:]] if words[0].startswith("--") else words
    assert main([str(sweep), *SIZE, "--output", str(output), *words]) == 2
    assert says in capsys.readouterr().err
    assert not output.exists()


def test_all_problems_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--target", "nobody", "--tokens", "x", "--supply", "a", "--level", "2"]
    assert main([str(tmp_path), *words]) == 2
    err = capsys.readouterr().err
    for says in ("--target nobody", "--tokens x", "--supply a", "--level 2", "has no runs.parquet"):
        assert says in err
    assert main([str(tmp_path / "none"), *SIZE]) == 2
    assert "none: there is no such sweep" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("300B", 3e11),
        ("50e9", 5e10),
        ("1.5T", 1.5e12),
        ("1_000", 1000),
        ("85m", 8.5e7),
        (".5G", 5e8),
        ("2k", 2000),
    ],
)
def test_quantities(text: str, number: float) -> None:
    assert quantity("--tokens", text) == pytest.approx(number)

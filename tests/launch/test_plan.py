import json
from pathlib import Path

import pytest

from data.plan import main as plan_of_stores
from data.store_cache import prepare_stores
from data.tokenize_corpus import DEMO_CORPUS, DEMO_TOKENIZER
from data.tokenizer import load_tokenizer
from launch.plan import main
from tests.pretrain.laws import a_law


def test_the_words_of_a_launch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = prepare_stores(DEMO_CORPUS, load_tokenizer(DEMO_TOKENIZER), tmp_path, 0.05)
    cache, stores = f"data.cache_dir={tmp_path}", f"data.store_dir={folder}"
    here, there = tmp_path / "here.json", tmp_path / "there.json"
    words = ["train.train_steps=1000", "data.mixture.alpha=0.5"]
    assert main(["+experiment=demo", *words, cache, "--json", str(here)]) == 0
    assert "8,000 samples of 128 tokens" in capsys.readouterr().out
    assert plan_of_stores([stores, *words, "data.seq_length=128", "--json", str(there)]) == 0
    assert json.loads(here.read_text()) == json.loads(there.read_text())
    # the model's length where data.seq_length is not set
    assert main(["+model=magneto_tiny", stores, "--max-epochs", "2"]) == 1
    assert "8,000 samples of 256 tokens" in capsys.readouterr().out


def test_a_run_unlike_those_of_its_law(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = prepare_stores(DEMO_CORPUS, load_tokenizer(DEMO_TOKENIZER), tmp_path, 0.05)
    law = a_law(["germanic"])
    law.provenance["data"] = {"seq_length": [64], "languages": {"germanic": ["de", "en"]}}
    law.save(tmp_path / "law.yaml")
    words = [f"data.store_dir={folder}", f"data.mixture.law={tmp_path}/law.yaml"]
    words += ["data.languages=[de]", "data.seq_length=64"]
    beyond = f"data.mixture.law={tmp_path}/law.yaml is used outside of its fit: "
    without = f"{beyond}germanic is without en, unlike in the runs of its sweep"
    assert main(["+model=xmoe_tiny", *words]) == 0
    told = capsys.readouterr().out.splitlines()
    assert without in told and any(line.startswith(f"{beyond}the model is sparse") for line in told)
    assert plan_of_stores([*words, "--steps", "10"]) == 0  # knows of no model
    told = capsys.readouterr().out.splitlines()
    assert [line for line in told if line.startswith(beyond)] == [without]
    assert main(["+model=magneto_tiny", *words, "data.languages=[de,en]"]) == 0
    assert beyond not in capsys.readouterr().out


def test_what_the_launcher_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["+experiment=demmo"]) == 2
    assert "did you mean +experiment=demo?" in capsys.readouterr().err
    assert main(["+model=magneto_tiny", "train.train_step=3"]) == 2
    assert "did you mean train.train_steps" in capsys.readouterr().err
    assert main(["+model=magneto_tiny", "--train-iters", "5"]) == 2
    assert "--train-iters 5: settings are words here; write train.tr" in capsys.readouterr().err

import json
from pathlib import Path

import pytest

from data.plan import main as plan_of_stores
from data.tokenize_corpus import DEMO_CORPUS, DEMO_TOKENIZER, prepare_stores
from data.tokenizer import load_tokenizer
from launch.plan import main


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


def test_what_the_launcher_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["+experiment=demmo"]) == 2
    assert "did you mean +experiment=demo?" in capsys.readouterr().err
    assert main(["+model=magneto_tiny", "train.train_step=3"]) == 2
    assert "did you mean train.train_steps" in capsys.readouterr().err

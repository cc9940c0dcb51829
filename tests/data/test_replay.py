"""data.replay against the batches a loader really gives."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data import replay
from data.config import DataConfig
from data.ledger import Ledger
from data.open_data import open_data


@pytest.fixture
def run_dir(tmp_path: Path, demo_cache: Path) -> Path:
    """What a run of 8 sequences a step and 64 tokens a sequence leaves behind."""
    settings = {
        "data": {"cache_dir": str(demo_cache), "seq_length": 64},
        "train": {"train_steps": 10, "global_batch_size": 8},
        "model": {"max_position_embeddings": 256},
    }
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    Ledger(folder).write("start", step=0, consumed_sequences=0, global_batch_size=8)
    return folder


def test_a_step_is_what_the_loader_gave(
    run_dir: Path, demo_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = open_data(DataConfig(cache_dir=str(demo_cache)), 64)
    loader = data.train_loader(
        micro_batch_size=8, global_batch_size=8, data_parallel_rank=0, data_parallel_size=1
    )
    (batch,) = loader.micro_batches(16)  # step 3
    assert replay.main([str(run_dir), "--step", "3", "--json"]) == 0
    samples = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [sample["sample"] for sample in samples] == list(range(16, 24))
    for row, sample in enumerate(samples):
        assert sample["language"] == data.languages[int(batch.language_ids[row])]
        assert sample["family"] == data.family_of[sample["language"]]
        text = "".join(piece["text"] for piece in sample["pieces"])
        ids = [*batch.tokens[row].tolist(), int(batch.labels[row, -1])]
        assert sum(piece["tokens"] for piece in sample["pieces"]) == len(ids) == 65
        assert text == data.tokenizer.decode(ids) or len(sample["pieces"]) > 1
        for piece in sample["pieces"]:
            assert piece["doc_id"].startswith("chromium/") and piece["source"] == "chromium"


def test_one_sample_as_text(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert replay.main([str(run_dir), "--step", "2", "--sample", "1", "--text", "20"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"step 2 of {run_dir}: samples 8 to 15 of the stream"
    assert lines[1].startswith("sample 9: ") and "pass 1" in lines[1]
    assert "chromium/" in lines[2] and "[chromium], tokens" in lines[2]
    assert replay.main([str(run_dir), "--step", "2", "--text", "0"]) == 0
    assert "    " not in capsys.readouterr().out


def test_a_far_step_costs_nothing_more(run_dir: Path) -> None:
    """Ten billion samples in; without torch."""
    code = (
        "import sys, data.replay as r; "
        f"status = r.main([{str(run_dir)!r}, '--step', '1250000000', '--sample', '0']); "
        "sys.exit(status or any(m in sys.modules for m in ('torch', 'megatron')))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert "sample 9999999992: " in ended.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--step", "0"], "steps count from 1"),
        (["--step", "1", "--sample", "8"], "the step has samples 0 to 7"),
    ],
)
def test_refusals(
    run_dir: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert replay.main([str(run_dir), *arguments]) == 2
    assert words in capsys.readouterr().err


def test_no_run_and_data_that_has_ended(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert replay.main([str(tmp_path / "none"), "--step", "1"]) == 2
    assert "no run folder" in capsys.readouterr().err
    assert replay.main([str(run_dir.parent), "--step", "1"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("python -m data.replay: error: ")
    assert f"it holds runs: {run_dir}; name one of them" in said
    settings = yaml.safe_load((run_dir / "config.yaml").read_text())
    settings["data"]["mixture"] = {"max_epochs": 1.0, "when_exhausted": "stop"}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(settings))
    assert replay.main([str(run_dir), "--step", "100000"]) == 2
    assert "the data ends at sample" in capsys.readouterr().err

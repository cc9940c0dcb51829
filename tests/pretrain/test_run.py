"""Whole runs, as a user starts them: torchrun, the shipped text, checkpoints, signals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.tracker import read_metrics

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "+experiment=tiny_cpu",
    "model.num_layers=4",
    "model.hidden_size=32",
    "model.ffn_hidden_size=64",
    "data.seq_length=32",
    "data.languages=[de,hi,zh]",
    "train.global_batch_size=4",
    "train.eval_sequences=2",
    "train.eval_interval=0",
    "checkpoint.save_interval=0",
    "schedule.lr_decay_style=constant",  # so that a longer run has the same first steps
    "wandb.mode=disabled",
]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    cache = tmp_path_factory.mktemp("cache")
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**clean, "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}


def command(processes: int, *settings: str) -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    start = [*torchrun, f"--nproc-per-node={processes}"] if processes > 1 else [sys.executable]
    return [*start, "launch/pretrain.py", *TINY, *settings]


def run(environment: dict[str, str], processes: int, *settings: str) -> str:
    done = subprocess.run(
        command(processes, *settings),
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout


def losses(run_dir: Path) -> dict[int, float]:
    """step -> training loss; every step once."""
    records = read_metrics(run_dir / "metrics.jsonl")
    steps = [record["step"] for record in records if "train/loss" in record]
    assert len(steps) == len(set(steps)), steps
    return {record["step"]: record["train/loss"] for record in records if "train/loss" in record}


FOUR = ("parallel=tp2_pp2",)


@pytest.fixture(scope="module")
def whole(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps on 2 x 2 ranks without interruption."""
    run_dir = tmp_path_factory.mktemp("whole")
    run(
        environment,
        4,
        *FOUR,
        f"run_dir={run_dir}",
        "train.train_steps=8",
        "model.hidden_dropout=0.1",
    )
    return run_dir


def test_run_writes_what_it_promises(whole: Path) -> None:
    record = json.loads((whole / "run.json").read_text())
    assert record["layout"]["tensor_parallel_size"] == 2 and record["layout"]["world_size"] == 4
    assert {"torch", "megatron-core"} <= set(record["packages"])
    assert record["data_fingerprint"]
    assert "hidden_size: 32" in (whole / "config.yaml").read_text()
    assert (whole / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (whole / "checkpoints").iterdir()] == ["step_00000008"]
    assert list(losses(whole)) == list(range(1, 9))
    records = read_metrics(whole / "metrics.jsonl")
    assert {"eval/loss", "eval/family/indic/loss", "eval/language/hi/loss"} <= records[0].keys()
    assert records[0]["step"] == 0 and records[-1]["step"] == 8
    last = next(r for r in reversed(records) if "train/loss" in r)
    assert last["train/consumed_tokens"] == 8 * 4 * 32
    assert 0 < last["throughput/model_flops_utilisation"] < 1
    assert last["memory/peak_bytes"] > 1e8


def test_resumed_run_is_bit_equal(environment: dict[str, str], whole: Path, tmp_path: Path) -> None:
    """With dropout: its masks are functions of the step."""
    settings = (*FOUR, f"run_dir={tmp_path}", "model.hidden_dropout=0.1")
    run(environment, 4, *settings, "train.train_steps=3")
    run(environment, 4, *settings, "train.train_steps=8", "checkpoint.resume=required")
    assert losses(tmp_path) == losses(whole)
    assert len(list(tmp_path.glob("run*.json"))) == 2


def test_kill_during_a_save_never_looks_complete(
    environment: dict[str, str], whole: Path, tmp_path: Path
) -> None:
    """SIGKILL while checkpoints are being written; the next start goes on, same losses."""
    settings = (*FOUR, f"run_dir={tmp_path}", "model.hidden_dropout=0.1", "train.train_steps=8")
    process = subprocess.Popen(
        command(4, *settings, "checkpoint.save_interval=1"),
        cwd=ROOT,
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    checkpoints = tmp_path / "checkpoints"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("step_00000003.partial")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.002)
    kill_tree(process)
    assert not left_behind(tmp_path), "a helper process outlived its killed rank"
    left = sorted(path.name for path in checkpoints.iterdir())
    assert "step_00000003.partial" in left or "step_00000003" in left
    run(environment, 4, *settings)
    assert losses(tmp_path) == losses(whole)


def kill_tree(process: subprocess.Popen) -> None:
    """torchrun's workers have sessions of their own: kill parent and children, at once."""
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    for pid in [process.pid, *map(int, children)]:
        os.kill(pid, signal.SIGKILL)
    process.wait()


def left_behind(run_dir: Path) -> list[str]:
    """Processes of the run that are still there a moment after the kill."""
    deadline = time.monotonic() + 5
    while found := subprocess.run(
        ["pgrep", "-f", f"run_dir={run_dir}"], capture_output=True, text=True
    ).stdout.split():
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_the_next_start_goes_on(
    environment: dict[str, str], whole: Path, tmp_path: Path, number: signal.Signals
) -> None:
    settings = (*FOUR, f"run_dir={tmp_path}", "model.hidden_dropout=0.1")
    process = subprocess.Popen(
        command(4, *settings, "train.train_steps=100000", "checkpoint.save_interval=1"),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 120
    metrics = tmp_path / "metrics.jsonl"
    while not (metrics.is_file() and '"step": 2,' in metrics.read_text()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert f"stopped by {number.name}" in output
    saved = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert all(re.fullmatch(r"step_\d{8}", name) for name in saved)
    assert saved[-1] == f"step_{max(losses(tmp_path)):08d}"
    ours, reference = losses(tmp_path), losses(whole)
    assert all(ours[step] == reference[step] for step in ours if step in reference)


def test_sampling_does_not_know_the_layout(environment: dict[str, str], whole: Path) -> None:
    ask = [str(whole), "Die Seite", "--max-new-tokens", "6", "--seed", "5"]
    alone = subprocess.run(
        [sys.executable, "-m", "launch.generate", *ask],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    sharded = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4",
            "launch/generate.py", *ask,
            "--tensor-model-parallel-size=2", "--pipeline-model-parallel-size=2",
        ],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr
    assert alone.stdout.startswith("Die Seite") and len(alone.stdout) > len("Die Seite\n")
    assert sharded.stdout == alone.stdout, sharded.stderr[-3000:]


REFUSED = {
    "another model": (["model.hidden_size=64"], "model.hidden_size: 32 saved, 64 now"),
    "resume=never": (["checkpoint.resume=never"], "checkpoint.resume=never, but"),
    "sequence too long": (["data.seq_length=1024"], "data.seq_length=1024"),
    "vocabulary too small": (["model.vocab_size=100"], "model.vocab_size=100 is smaller than"),
    "missing corpus": (["data.corpus=/no/such/file.jsonl"], "/no/such/file.jsonl"),
    "missing tokenizer": (["data.tokenizer=/no/such.json"], "/no/such.json"),
    "unknown language": (["data.languages=[de,xx]"], "xx"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_clear_error(environment: dict[str, str], whole: Path, case: str) -> None:
    """On two ranks: no hang, no traceback, exit code not 0, and the run folder untouched."""
    settings, expected = REFUSED[case]
    before = sorted((p, p.stat().st_mtime_ns) for p in whole.rglob("*"))
    done = subprocess.run(
        command(2, "parallel=tp2", f"run_dir={whole}", *settings),
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert expected in done.stderr, done.stderr[-3000:]
    ours = done.stderr.split("torch/distributed/elastic")[0]
    assert "Traceback" not in ours, done.stderr[-5000:]
    assert before == sorted((p, p.stat().st_mtime_ns) for p in whole.rglob("*"))


def test_ratios_change_on_the_way_and_the_data_may_end(
    environment: dict[str, str], tmp_path: Path
) -> None:
    """A stage from sample 8 on; then a language is used up, which ends the run before its steps."""
    said = run(
        environment,
        1,
        f"run_dir={tmp_path}",
        "train.train_steps=50",
        "data.mixture.stages=[{from_tokens: 256, weighting: uniform}]",
        "data.mixture.max_epochs=0.05",
        "data.mixture.when_exhausted=stop",
    )
    (last,) = re.findall(r"the data ends after step (\d+) of 50: \w+ reaches its epoch cap", said)
    assert list(losses(tmp_path)) == list(range(1, int(last) + 1)) and 4 < int(last) < 20
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"step_{last:>08}"]
    written = (tmp_path / "data_ledger.jsonl").read_text().splitlines()
    start, change = [json.loads(line) for line in written]
    assert (start["event"], start["global_batch_size"]) == ("start", 4)
    assert (change["event"], change["step"], change["from_sample"]) == ("ratios", 3, 8)
    assert change["shares"] == pytest.approx(dict.fromkeys(["de", "hi", "zh"], 1 / 3))
    replay = [sys.executable, "-m", "data.replay", str(tmp_path), "--step", last]
    shown = subprocess.run(replay, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert shown.stdout.startswith(f"step {last} of ") and "chromium/" in shown.stdout

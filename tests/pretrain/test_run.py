"""Whole runs, as a user starts them: the launcher, the shipped text, checkpoints, signals.

All but one on forked processes (`forked_run`), which have torch imported: four of torchrun's take
20 CPU seconds only for that.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from pretrain.events import read_events
from pretrain.metrics_file import read_metrics
from pretrain.run_status import read_status
from tests.disks import fill, small_disk
from tests.pretrain.forked_run import ForkedRun, launcher

ROOT = Path(__file__).resolve().parents[2]
Start = Callable[..., ForkedRun]
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
    return {"XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache")), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def start(environment: dict[str, str], tmp_path: Path) -> Iterator[Start]:
    """Starts runs whose processes do not outlive the test."""
    with ExitStack() as runs:

        def start(processes: int, *settings: str, run_dir: Path = tmp_path / "run") -> ForkedRun:
            words = [*TINY, *settings, f"run_dir={run_dir}"]
            folder = Path(tempfile.mkdtemp(dir=tmp_path, prefix="log"))
            return runs.enter_context(ForkedRun(processes, launcher(*words), environment, folder))

        yield start


def finish(run: ForkedRun) -> str:
    assert set(run.wait()) == {0}, run.output()
    return run.output()


def losses(run_dir: Path) -> dict[int, float]:
    """step -> training loss; every step once."""
    records = read_metrics(run_dir / "metrics.jsonl")
    steps = [record["step"] for record in records if "train/loss" in record]
    assert len(steps) == len(set(steps)), steps
    return {record["step"]: record["train/loss"] for record in records if "train/loss" in record}


def wait_until_closed(folder: Path) -> None:
    """Until no process has a file below `folder` open."""
    deadline = time.monotonic() + 30
    while any(opened.startswith(f"{folder}/") for opened in open_files()):
        assert time.monotonic() < deadline, f"a process still writes below {folder}"
        time.sleep(0.01)


def open_files() -> Iterator[str]:
    """Of all processes that may be looked at."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):  # closed since, or another user's
            yield os.readlink(link)


FOUR = ("parallel=tp2_pp2", "model.hidden_dropout=0.1")


@pytest.fixture(scope="module")
def whole(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps on 2 x 2 ranks without interruption."""
    run_dir = tmp_path_factory.mktemp("whole")
    words = [*TINY, *FOUR, f"run_dir={run_dir}", "train.train_steps=8", "wandb.mode=offline"]
    with ForkedRun(4, launcher(*words), environment, tmp_path_factory.mktemp("log")) as run:
        # what megatron-core says when ranks hold different plain values
        assert "state dict differs" not in finish(run)
    wait_until_closed(run_dir)  # W&B's process ends its log a moment after the ranks have left
    return run_dir


def test_run_writes_what_it_promises(whole: Path) -> None:
    record = json.loads((whole / "run.json").read_text())
    assert record["layout"]["tensor_parallel_size"] == 2 and record["layout"]["world_size"] == 4
    assert {"torch", "megatron-core"} <= set(record["packages"])
    assert record["data_fingerprint"]
    assert "hidden_size: 32" in (whole / "config.yaml").read_text()
    assert (whole / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (whole / "report.html").read_text().endswith("</html>")
    assert [path.name for path in (whole / "checkpoints").iterdir()] == ["step_00000008"]
    assert list(losses(whole)) == list(range(1, 9))
    records = read_metrics(whole / "metrics.jsonl")
    assert {"eval/loss", "eval/family/indic/loss", "eval/language/hi/loss"} <= records[0].keys()
    assert records[0]["step"] == 0 and records[-1]["step"] == 8
    last = next(r for r in reversed(records) if "train/loss" in r)
    assert last["train/consumed_tokens"] == 8 * 4 * 32
    assert 0 < last["throughput/model_flops_utilisation"] < 1
    assert last["memory/peak_bytes"] > 1e8


def test_kill_during_a_save_never_looks_complete(start: Start, whole: Path, tmp_path: Path) -> None:
    """SIGKILL while checkpoints are being written; the next start goes on, same losses, also with
    dropout: its masks are functions of the step."""
    settings = (*FOUR, "train.train_steps=8")
    run = start(4, *settings, "checkpoint.save_interval=1")
    checkpoints = tmp_path / "run" / "checkpoints"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("step_00000003.partial")):
        assert time.monotonic() < deadline and not run.poll(), run.output()
        time.sleep(0.002)
    sessions = list(run.pids)
    run.kill()
    assert not left_behind(sessions), "a helper process outlived its killed rank"
    left = sorted(path.name for path in checkpoints.iterdir())
    assert "step_00000003.partial" in left or "step_00000003" in left
    finish(start(4, *settings, "checkpoint.resume=required"))
    assert losses(tmp_path / "run") == losses(whole)
    assert len(list((tmp_path / "run").glob("run*.json"))) == 2
    (resumed,) = [e["step"] for e in read_events(tmp_path / "run") if e["kind"] == "resume"]
    assert 2 <= resumed <= 4


def test_a_resume_with_another_seed_and_tokenizer_is_refused_by_name(
    start: Start, whole: Path, tmp_path: Path
) -> None:
    tokenizer = json.loads((ROOT / "data" / "demo" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, two = list(vocabulary)[-2:]  # of as many ids, two of which mean something else
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    other = tmp_path / "other.json"
    other.write_text(json.dumps(tokenizer))
    before = {path: path.stat().st_mtime for path in whole.rglob("*")}
    settings = ("train.train_steps=9", "train.seed=7", f"data.tokenizer={other}")
    run = start(1, *settings, run_dir=whole)
    (code,) = run.wait()
    said = run.output()
    assert code not in (0, os.EX_TEMPFAIL) and "Traceback" not in said, said
    assert "step_00000008 was saved by another run; it differs in\n" in said
    assert "  train.seed: 1234 saved, 7 now\n" in said
    assert re.search(r"\n  data: tokenizer: was \w{64}, is \w{64}\n", said), said
    assert "Use the saved settings, or another run_dir to start a new run" in said
    assert {path: path.stat().st_mtime for path in whole.rglob("*")} == before


@pytest.mark.slow
def test_a_full_disk_is_outlasted(start: Start, tmp_path: Path) -> None:
    """The disk is full from step 2 to beyond the last one: the run waits with its last save, longer
    than the pauses everybody gets, and then lacks nothing."""
    with small_disk(tmp_path / "disk", "4m") as disk:
        run_dir = disk / "run"
        words = ("fault_tolerance.grace_seconds=60", "tensorboard.enabled=true")
        run = start(1, "train.train_steps=40", *words, run_dir=run_dir)
        wait_for_step(run_dir, 2, lambda: not run.poll())
        filler = fill(disk)
        deadline = time.monotonic() + 120
        while run.output().count("trying again in") < 5:  # for the third time: events say it, too
            assert time.monotonic() < deadline and not run.poll(), run.output()
            time.sleep(0.1)
        filler.unlink()
        said = finish(run)
        assert "Traceback" not in said
        assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_00000040"]
        assert list(losses(run_dir)) == list(range(1, 41))
        kinds = [event["kind"] for event in read_events(run_dir)]
        assert kinds == ["save_failed"] * 6 + ["save_recovered"]
        assert (read_status(run_dir) or {})["state"] == "finished"


@pytest.mark.slow
def test_a_second_ctrl_c_ends_the_waiting_for_a_full_disk(start: Start, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "4m") as disk:
        run = start(1, "train.train_steps=100000", run_dir=disk / "run")
        wait_for_step(disk / "run", 2, lambda: not run.poll())
        fill(disk)
        run.signal(signal.SIGINT)
        deadline = time.monotonic() + 60
        while "trying again in 10 s" not in run.output():
            assert time.monotonic() < deadline and not run.poll(), run.output()
            time.sleep(0.1)
        begin = time.monotonic()
        run.signal(signal.SIGINT)
        assert run.wait() == [128 + signal.SIGINT]
        assert time.monotonic() - begin < 8


def left_behind(sessions: list[int]) -> list[str]:
    """Processes of the ranks' sessions that are still there a moment after the kill."""
    deadline = time.monotonic() + 5
    names = ",".join(map(str, sessions))
    while found := subprocess.run(
        ["pgrep", "--session", names], capture_output=True, text=True
    ).stdout.split():
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return found


def wait_for_step(run_dir: Path, step: int, running: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    metrics = run_dir / "metrics.jsonl"
    while not (metrics.is_file() and f'"step": {step},' in metrics.read_text()):
        assert time.monotonic() < deadline and running()
        time.sleep(0.01)


def assert_stopped_cleanly(run_dir: Path, whole: Path, reason: str) -> None:
    """The step is finished and saved, its number is known, and the numbers are the usual ones."""
    saved = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert all(re.fullmatch(r"step_\d{8}", name) for name in saved)
    last_step = max(losses(run_dir))
    assert saved[-1] == f"step_{last_step:08d}"
    ours, reference = losses(run_dir), losses(whole)
    assert all(ours[step] == reference[step] for step in ours if step in reference)
    status = read_status(run_dir)
    assert status is not None
    assert (status["state"], status["step"], status["reason"]) == ("stopped", last_step, reason)
    assert [(e["kind"], e["step"]) for e in read_events(run_dir)] == [("stop", last_step)]
    assert not (run_dir / "lock").exists()


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGINT]
)
def test_signal_saves_and_says_that_it_is_to_be_started_again(
    start: Start, whole: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run = start(4, *FOUR, "train.train_steps=100000")
    wait_for_step(tmp_path / "run", 2, lambda: not run.poll())
    run.signal(number, ranks=[3])  # one is enough
    assert run.wait() == [os.EX_TEMPFAIL] * 4, run.output()
    assert f"stopped by {number.name}" in run.output()
    assert_stopped_cleanly(tmp_path / "run", whole, number.name)


@pytest.mark.slow
def test_torchrun_that_ignores_usr1_is_stopped_by_slurm_s_way(
    environment: dict[str, str], whole: Path, tmp_path: Path
) -> None:
    """A batch script signals the job step; the ranks save, and torchrun takes it for success."""
    torchrun = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node=2"
    words = [*TINY, "parallel=tp2", f"run_dir={tmp_path / 'run'}", "train.train_steps=100000"]
    run = subprocess.Popen(
        ["bash", "-c", f"trap '' USR1 && exec {torchrun} launch/pretrain.py {shlex.join(words)}"],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_for_step(tmp_path / "run", 2, lambda: run.poll() is None)
        ranks = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True)
        for pid in [run.pid, *map(int, ranks.stdout.split())]:
            os.kill(pid, signal.SIGUSR1)
        output, _ = run.communicate(timeout=100)
    finally:
        run.kill()
    assert run.returncode == 0, output
    assert "stopped by SIGUSR1" in output
    assert_stopped_cleanly(tmp_path / "run", tmp_path / "run", "SIGUSR1")


def test_the_time_is_up(start: Start, tmp_path: Path) -> None:
    """A walltime of a minute from the process's start, which is nearly all grace time."""
    run = start(
        1,
        "train.train_steps=100000",
        "fault_tolerance.walltime=00:01:00",
        "fault_tolerance.grace_seconds=59",
        "train.eval_sequences=1",
    )
    assert run.wait() == [os.EX_TEMPFAIL], run.output()
    assert "stopped by walltime" in run.output()
    assert_stopped_cleanly(tmp_path / "run", tmp_path / "run", "walltime")


def test_a_second_run_in_the_folder_is_refused_before_it_trains(
    start: Start, tmp_path: Path
) -> None:
    first = start(1, "train.train_steps=100000")
    wait_for_step(tmp_path / "run", 1, lambda: not first.poll())
    second = start(2, "parallel=tp2", "train.train_steps=100000")
    assert second.wait() == [2, 2], second.output()
    said = f"error on rank 0: run_dir={tmp_path}/run is being written by process {first.pids[0]} on"
    assert said in second.output() and "Traceback" not in second.output()
    assert not first.poll()
    first.kill()  # as a node's end would: the lock stays, and its holder is dead
    assert (tmp_path / "run" / "lock").exists()
    third = finish(start(1, "train.train_steps=3"))
    assert "step 3/3" in third


def test_sampling_does_not_know_the_layout(
    environment: dict[str, str], whole: Path, tmp_path: Path
) -> None:
    ask = [str(whole), "Die Seite", "--max-new-tokens", "6", "--seed", "5"]
    four = ["--tensor-model-parallel-size=2", "--pipeline-model-parallel-size=2"]

    def generate(*words: str) -> Callable[[], None]:
        def body() -> None:
            from launch.generate import main

            sys.argv = ["launch/generate.py", *ask, *words]
            main()

        return body

    with ForkedRun(1, generate(), environment, tmp_path / "alone") as alone:
        finish(alone)
    with ForkedRun(4, generate(*four), environment, tmp_path / "sharded") as sharded:
        finish(sharded)
    text = alone.log(0).read_text()
    assert text.startswith("Die Seite") and len(text) > len("Die Seite\n")
    assert sharded.log(0).read_text() == text


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
def test_bad_input_is_one_clear_error(start: Start, whole: Path, case: str) -> None:
    """On two ranks: no hang, no traceback, exit code 2, and the run folder untouched."""
    settings, expected = REFUSED[case]
    before = sorted((p, p.stat().st_mtime_ns) for p in whole.rglob("*"))
    run = start(2, "parallel=tp2", *settings, run_dir=whole)
    assert run.wait() == [2, 2], run.output()
    assert expected in run.log(0).read_text()
    assert "Traceback" not in run.output()
    assert before == sorted((p, p.stat().st_mtime_ns) for p in whole.rglob("*"))


def test_a_start_that_is_refused_leaves_no_folder(start: Start, tmp_path: Path) -> None:
    """And a run folder that cannot be made is refused in the same words on every rank."""
    run = start(2, "parallel=tp2", "data.corpus=/no/such/file.jsonl")
    assert run.wait() == [2, 2], run.output()
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").touch()
    run = start(2, "parallel=tp2", run_dir=tmp_path / "file")
    assert run.wait() == [2, 2], run.output()
    assert "Traceback" not in run.output()
    said = f"run_dir={tmp_path}/file: {tmp_path}/file is a file; name a folder"
    assert run.log(0).read_text().strip() == f"error on rank 0: {said}"


def test_a_start_over_a_record_without_checkpoints_keeps_it_and_says_so(
    start: Start, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    finish(start(1, "train.train_steps=3"))
    shutil.rmtree(run_dir / "checkpoints")
    old = (run_dir / "metrics.jsonl").read_bytes()
    out = finish(start(1, "train.train_steps=2", "optimizer.lr=0.5", "profile.start_step=3"))
    assert "recorded steps up to 3 and holds no checkpoint" in out
    assert "profile.start_step=3 profile.steps=3: nothing is traced" in out
    assert (run_dir / "metrics.1.jsonl").read_bytes() == old
    assert list(losses(run_dir)) == [1, 2]
    (event,) = read_events(run_dir)
    assert event["kind"] == "started_anew" and "metrics.1.jsonl" in event["text"]


def test_ratios_change_on_the_way_and_the_data_may_end(
    start: Start, environment: dict[str, str], tmp_path: Path
) -> None:
    """A stage from sample 8 on; then a language is used up, which ends the run before its steps."""
    said = finish(
        start(
            1,
            "train.train_steps=50",
            "data.mixture.stages=[{from_tokens: 256, weighting: uniform}]",
            "data.mixture.max_epochs=0.05",
            "data.mixture.when_exhausted=stop",
        )
    )
    run_dir = tmp_path / "run"
    (last,) = re.findall(r"the data ends after step (\d+) of 50: \w+ reaches its epoch cap", said)
    assert list(losses(run_dir)) == list(range(1, int(last) + 1)) and 4 < int(last) < 20
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [f"step_{last:>08}"]
    written = (run_dir / "data_ledger.jsonl").read_text().splitlines()
    start, change = [json.loads(line) for line in written]
    assert (start["event"], start["global_batch_size"]) == ("start", 4)
    assert (change["event"], change["step"], change["from_sample"]) == ("ratios", 3, 8)
    assert change["shares"] == pytest.approx(dict.fromkeys(["de", "hi", "zh"], 1 / 3))
    replay = [sys.executable, "-m", "data.replay", str(run_dir), "--step", last]
    env = os.environ | environment  # the run's token stores
    shown = subprocess.run(replay, cwd=ROOT, env=env, capture_output=True, text=True)
    assert shown.stdout.startswith(f"step {last} of ") and "chromium/" in shown.stdout

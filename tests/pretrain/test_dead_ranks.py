"""Whole runs of which a rank dies, stops or hangs: who is named, and what stays on record."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.events import read_events
from pretrain.metrics_file import read_metrics
from pretrain.run_status import read_status
from tests.pretrain.forked_run import ForkedRun, launcher

SETTINGS = [
    "+experiment=tiny_cpu",
    "model.hidden_size=32",
    "model.ffn_hidden_size=64",
    "data.seq_length=32",
    "data.languages=[de]",
    "train.train_steps=100000",
    "train.micro_batch_size=2",
    "train.eval_sequences=1",
    "checkpoint.save_interval=0",
    "wandb.mode=disabled",
    "fault_tolerance.heartbeat_interval_seconds=0.5",
    "fault_tolerance.heartbeat_timeout_seconds=2.5",
]


def start(tmp_path: Path, body: Callable[[], object]) -> ForkedRun:
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    return ForkedRun(2, body, environment, tmp_path / "log")


def run_of(tmp_path: Path, *more: str) -> Callable[[], None]:
    return launcher(*SETTINGS, *more, f"run_dir={tmp_path / 'run'}")


def wait_for_step(run: ForkedRun, tmp_path: Path, step: int) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not path.is_file() or max((r["step"] for r in read_metrics(path)), default=0) < step:
        assert not run.poll() and time.monotonic() < deadline, run.output()
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("how", "why"),
    [
        (signal.SIGKILL, "its process has ended without a word"),
        pytest.param(signal.SIGSTOP, "no sign of life for", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_dies_is_on_record(how: signal.Signals, why: str, tmp_path: Path) -> None:
    with start(tmp_path, run_of(tmp_path)) as run:
        wait_for_step(run, tmp_path, 3)
        run.signal(how, [1])
        while 0 not in run.codes:
            run.poll()
            time.sleep(0.01)
        assert run.codes[0] not in (0, 75)  # an error, and not a stop to go on from
        said = run.log(0).read_text()
    assert "rank 1 on " in said and f" died: {why}" in said
    (death,) = [event for event in read_events(tmp_path / "run") if event["kind"] == "rank_dead"]
    assert death["text"].startswith("rank 1 on ") and death["step"] >= 3
    status = read_status(tmp_path / "run")
    assert status is not None
    assert status["state"] == "failed"
    assert status["reason"].startswith("PeerFailed: rank 1 on ")


@pytest.mark.slow
def test_losing_the_rank_with_the_store_is_said_by_the_others(tmp_path: Path) -> None:
    with start(tmp_path, run_of(tmp_path)) as run:
        wait_for_step(run, tmp_path, 3)
        run.signal(signal.SIGKILL, [0])
        assert run.wait()[1] not in (0, 75)
        said = run.log(1).read_text()
    assert "the store on 127.0.0.1:" in said
    assert "Rank 0 hosts it: its process or its host has died" in said


def loader_that_falls_asleep(run: Callable[[], None]) -> Callable[[], None]:
    """A run on whose rank 1 the data of step 4 never comes."""

    def body() -> None:
        from pretrain import train_loop

        step = train_loop.TrainLoop._step

        def _step(loop: train_loop.TrainLoop, state: object, stop: object) -> object:
            if state.step == 3 and os.environ["RANK"] == "1":  # type: ignore[attr-defined]
                loop.loader.micro_batches = never  # type: ignore[method-assign,assignment]
            return step(loop, state, stop)  # type: ignore[arg-type]

        train_loop.TrainLoop._step = _step  # type: ignore[method-assign,assignment]
        run()

    return body


class Unfinished:
    """A save in flight."""

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)


def failing_while_it_saves(run: Callable[[], None]) -> Callable[[], None]:
    """A run whose rank 1 fails in step 4, while a save is being written."""

    def body() -> None:
        from pretrain import train_loop

        step = train_loop.TrainLoop._step

        def _step(loop: train_loop.TrainLoop, state: object, stop: object) -> object:
            if state.step == 3 and os.environ["RANK"] == "1":  # type: ignore[attr-defined]
                loop.checkpoints._pending = Unfinished()  # type: ignore[assignment]
                raise ValueError(f"failed at <{time.time()}>")
            return step(loop, state, stop)  # type: ignore[arg-type]

        train_loop.TrainLoop._step = _step  # type: ignore[method-assign,assignment]
        run()

    return body


def test_a_save_in_flight_does_not_delay_the_word_of_a_failure(tmp_path: Path) -> None:
    with start(tmp_path, failing_while_it_saves(run_of(tmp_path))) as run:
        assert not {0, 75} & set(run.wait())
    (failure,) = [e for e in read_events(tmp_path / "run") if e["kind"] == "rank_error"]
    assert "rank 1 on " in failure["text"] and "ValueError: failed at <" in failure["text"]
    failed = float(failure["text"].partition("<")[2].partition(">")[0])
    assert failure["time"] - failed < 4.0  # the save was given 5


def never(first_sample: int) -> list[object]:
    time.sleep(1000)
    return []


def test_a_hang_names_the_rank_and_the_stage(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    body = loader_that_falls_asleep(
        run_of(tmp_path, "fault_tolerance.hang_timeout_seconds=5", "data.prefetch=0")
    )
    with start(tmp_path, body) as run:
        codes = run.wait()
        assert not {0, 75} & set(codes)
    (hang,) = [event for event in read_events(run_dir) if event["kind"] == "rank_hang"]
    assert hang["text"].startswith("rank 1 on ")
    assert "at step 4, data, " in hang["text"]
    assert "rank 0: step 4, forward_backward, waiting in " in hang["text"]
    assert "in never" in (run_dir / "stacks" / "rank00001.txt").read_text()
    assert "in forward_backward" in (run_dir / "stacks" / "rank00000.txt").read_text()
    status = read_status(run_dir)
    assert status is not None and status["state"] == "failed"
    assert "hangs: no rank has got on for" in status["reason"]

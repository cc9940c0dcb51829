"""Time by stage, the slow rank named under every layout, traces and their table."""

from __future__ import annotations

import ctypes
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from models.build import build_model
from parallel.config import ConfigError, OptimizerConfig, ParallelConfig
from parallel.engine import MegatronEngine
from parallel.failure_watch import FailureWatch
from parallel.runtime import initialize
from parallel.stage_clock import STAGES, StageClock
from pretrain.config import PretrainConfig, ProfileConfig
from pretrain.config_rules import validate
from pretrain.parity import LANGUAGES
from pretrain.profiler import RankTimes, StepProfiler, format_table
from pretrain.stragglers import STRAGGLERS_FILE, StragglerReport
from pretrain.train_step import train_step
from tests.distributed import run_on_gloo
from tests.parity import MODEL, VOCAB, layout, micro_batches

SLOW_SECONDS = 1.0  # asleep: much longer than a step may take on a machine that is busy otherwise


class Small:
    """A small model that trains on this rank, step by step."""

    def __init__(self, parallel: ParallelConfig) -> None:
        self.runtime = initialize(parallel, seed=1)
        chunks = build_model(MODEL, parallel, self.runtime, vocab_size=VOCAB, seed=1)
        self.engine = MegatronEngine(chunks, parallel, OptimizerConfig(), self.runtime)
        self.clock = StageClock(self.engine, self.runtime.device)

    def step(self, number: int, *, wait_for_data: float = 0.0) -> float:
        """One step; its loss."""
        rank, ranks = self.runtime.data_parallel_rank, self.runtime.data_parallel_size
        with self.clock.stage("data"):
            time.sleep(wait_for_data)
            batches = micro_batches(number, 1, rank, ranks)
        metrics = train_step(
            self.engine,
            batches,
            self.runtime,
            learning_rate=1e-3,
            languages=LANGUAGES,
            stop_requested=False,
        )
        return metrics.losses.mean()


def slow_step(small: Small, number: int) -> None:
    """A step in which this rank's forward passes take longer, by SLOW_SECONDS together."""
    calls = 8 // small.runtime.data_parallel_size * len(small.engine.chunks)
    handles = [
        chunk.register_forward_pre_hook(lambda *_: time.sleep(SLOW_SECONDS / calls))
        for chunk in small.engine.chunks
    ]
    small.step(number)
    for handle in handles:
        handle.remove()


def with_a_slow_rank(parallel: ParallelConfig, slow: int, run_dir: str) -> Any:
    small = Small(parallel)
    said: list[tuple[int, str, int, str]] = []
    config = ProfileConfig(straggler_interval=2, straggler_ratio=1.2)
    report = StragglerReport(
        config, small.runtime, Path(run_dir), None, lambda *what: said.append(what)
    )
    metrics = []
    for number in range(1, 5):
        if not report.due(number):
            small.step(number)
            continue
        with small.clock.measure():
            if small.runtime.rank == slow:
                slow_step(small, number)
            else:
                small.step(number)
        metrics.append(report.report(number, small.clock.table()))
    report.close()
    return metrics, said


@pytest.mark.parametrize(
    ("parallel", "world_size", "slow"),
    [(layout(), 2, 1), (layout(tp=2, sp=True), 2, 0), (layout(pp=2), 4, 2)],
    ids=["dp2", "tp2", "pp2 dp2"],
)
def test_the_slow_rank_is_named(
    tmp_path: Path, parallel: ParallelConfig, world_size: int, slow: int
) -> None:
    ranks = run_on_gloo(world_size, with_a_slow_rank, parallel, slow, str(tmp_path))
    metrics, said = ranks[0]
    assert [m["stragglers/slowest_rank"] for m in metrics] == [slow] * 2
    for found in metrics:
        longer = found["stragglers/busy_max_seconds"] - found["stragglers/busy_median_seconds"]
        assert longer > 0.5 * SLOW_SECONDS
        assert found["time/communication_seconds"] > 0.1 * SLOW_SECONDS  # the others wait
        assert found["memory/peak_bytes_max"] > 1e7
    lines = [json.loads(line) for line in (tmp_path / STRAGGLERS_FILE).read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert all(line["slowest_rank"] == slow for line in lines)
    assert lines[0]["slowest_host"] == lines[0]["hosts"][slow] and len(lines[0]["hosts"]) > slow
    waiting = lines[0]["communication_seconds"]
    assert waiting[slow] == min(waiting)
    ((step, text, rank, host),) = said  # once, at the second time running
    assert (step, rank, host) == (4, slow, lines[0]["hosts"][slow])
    assert text.startswith(f"rank {slow} on {host} (pipeline stage")


def odd_steps(run_dir: str) -> list[int]:
    """A rank that is slow once is not pointed out, nor is another one next time."""
    small = Small(layout())
    said: list[int] = []
    report = StragglerReport(
        ProfileConfig(), small.runtime, Path(run_dir), None, lambda step, *_: said.append(step)
    )
    for step, slow in enumerate((None, 0, None, 1, 0), start=1):
        own = 3.0 if small.runtime.rank == slow else 1.0
        report.report(step, {stage: (own, 0.0) for stage in STAGES})
    report.go_back(2)  # the run goes back
    report.close()
    return said


def test_one_odd_step_is_no_straggler(tmp_path: Path) -> None:
    assert run_on_gloo(2, odd_steps, str(tmp_path)) == [[], []]
    lines = [json.loads(line) for line in (tmp_path / STRAGGLERS_FILE).read_text().splitlines()]
    assert [(line["step"], line["slowest_rank"], line["slowdown"]) for line in lines] == [
        (1, 0, 1.0),
        (2, 0, 3.0),
    ]


def clocked(parallel: ParallelConfig) -> Any:
    """(table, seconds inside and outside what is measured) of a step."""
    small = Small(parallel)
    small.step(0)
    before = (dist.all_reduce, dist.Work.wait, small.engine.step)
    begin = time.perf_counter()
    with small.clock.measure():
        start = time.perf_counter()
        small.step(3, wait_for_data=0.02)
        inner = time.perf_counter() - start
    outer = time.perf_counter() - begin
    table = small.clock.table()
    assert (dist.all_reduce, dist.Work.wait, small.engine.step) == before
    small.step(4)
    assert small.clock.table() == table, "a step that nobody measures leaves no mark"
    return table, inner, outer


@pytest.mark.parametrize(
    ("parallel", "world_size", "communicates"),
    [
        (layout(), 1, set()),
        (layout(zero=False), 2, {"gradients", "optimizer"}),
        (layout(tp=2, sp=True), 2, {"forward", "backward", "optimizer"}),
        (layout(pp=2, vpp=2), 2, {"schedule", "optimizer"}),
    ],
    ids=["alone", "dp2", "tp2", "interleaved"],
)
def test_stages_cover_the_step(
    parallel: ParallelConfig, world_size: int, communicates: set[str]
) -> None:
    for table, inner, outer in run_on_gloo(world_size, clocked, parallel):
        assert tuple(table) == STAGES
        assert inner <= sum(own + inside for own, inside in table.values()) <= outer
        assert table["data"][0] >= 0.02
        for stage in ("forward", "backward", "optimizer"):
            assert table[stage][0] > 0
        waited = {stage for stage, (_, inside) in table.items() if inside > 20e-6}
        assert waited >= communicates, table
        assert table["data"][1] == 0.0


def profiled(run_dir: str) -> Any:
    small = Small(layout())
    profiler = StepProfiler(
        ProfileConfig(start_step=2, steps=2, ranks=[1]), small.runtime, Path(run_dir)
    )
    printed = []
    for number in range(1, 6):
        printed.append(profiler.before(number))
        if profiler.covers(number):
            with small.clock.measure(annotate=profiler.tracing):
                small.step(number)
            profiler.add(small.clock.table())
        else:
            small.step(number)
        if number == 3:
            with profiler.pause("checkpoint"):
                time.sleep(0.01)
    return printed, profiler.finish()


def test_trace_and_table(tmp_path: Path) -> None:
    (printed, rest), (others, _) = run_on_gloo(2, profiled, str(tmp_path))
    assert [text is not None for text in printed] == [False, False, False, True, False]
    assert rest is None and others == [None] * 5
    folder = tmp_path / "profile"
    assert sorted(p.name for p in folder.iterdir()) == [
        "rank_0001.json",
        "step_times.json",
        "step_times.txt",
    ]
    text = (folder / "step_times.txt").read_text()
    assert text == printed[3] + "\n"
    assert text.startswith("Where the time went, steps 2 to 3: ")
    assert [line.split()[0] for line in text.splitlines()[2:-1]] == [*STAGES, "the", "checkpoint"]
    record = json.loads((folder / "step_times.json").read_text())
    assert (record["first_step"], record["steps"], len(record["ranks"])) == (2, 2, 2)
    assert record["ranks"][0]["pauses"]["checkpoint"] >= 0.01
    events = json.loads((folder / "rank_0001.json").read_text())["traceEvents"]
    names = {event.get("name", "") for event in events}
    assert {"data", "forward", "backward", "gradients", "optimizer", "checkpoint"} <= names
    assert "communication: all_reduce" in names
    assert any(name.startswith("aten::") for name in names)
    forward = [e for e in events if e.get("name") == "forward" and e.get("ph") == "X"]
    assert len(forward) == 2 * 4  # two steps of four micro-batches on each of two ranks


def trace_that_takes_its_time(run_dir: str) -> str:
    runtime = initialize(ParallelConfig(), seed=1)
    with FailureWatch(runtime, heartbeat_interval_seconds=0.4, heartbeat_timeout_seconds=2.0):
        time.sleep(1)  # until its thread has given a sign of life
        profiler = StepProfiler(ProfileConfig(start_step=1, ranks=[1]), runtime, Path(run_dir))
        profiler.before(1)
        profiler.add({stage: (0.1, 0.0) for stage in STAGES})
        if profiler.tracing:
            export = profiler._trace.export_chrome_trace

            def long_export(path: str) -> None:
                ctypes.PyDLL(None).sleep(4)  # keeps Python's lock, as that of a large trace does
                export(path)

            profiler._trace.export_chrome_trace = long_export
        profiler.finish()
    return "alive"


def test_a_rank_that_writes_a_large_trace_is_not_dead(tmp_path: Path) -> None:
    assert run_on_gloo(2, trace_that_takes_its_time, str(tmp_path)) == ["alive", "alive"]
    assert (tmp_path / "profile" / "rank_0001.json").is_file()


def test_table_text() -> None:
    quick: RankTimes = {
        "seconds": dict.fromkeys(STAGES, 0.001),
        "communication": dict.fromkeys(STAGES, 0.0) | {"forward": 0.0005},
        "pauses": {"evaluation": 0.5},
    }
    slow: RankTimes = {**quick, "seconds": {**quick["seconds"], "forward": 0.007}}
    lines = [line.split() for line in format_table([quick, slow], "step 7").splitlines()]
    assert lines[0] == ["Where", "the", "time", "went,", "step", "7:", "10.0", "ms", "a", "step"]
    rows = {line[0]: line[1:] for line in lines[2:]}
    assert rows["forward"] == ["4.00", "1.00", "7.00", "1", "40.0%", "0.50"]
    assert rows["the"] == ["step", "10.00", "7.00", "13.00", "1", "100.0%", "0.50"]
    assert rows["evaluation"] == ["500.00", "500.00", "500.00", "0"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "profile.steps=0 must be 1 or more"),
        ({"start_step": -1}, "profile.start_step=-1 must be 0 or more"),
        ({"ranks": [0, -1]}, "profile.ranks=[0, -1] must be ranks, which count from 0"),
        ({"straggler_ratio": 1.0}, "profile.straggler_ratio=1.0 must be a finite number above 1"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        ProfileConfig(**settings)
    assert list(raised.value.problems) == [message]


def test_ranks_must_exist() -> None:
    config = PretrainConfig(model=MODEL, profile=ProfileConfig(ranks=[0, 4]))
    with pytest.raises(ConfigError, match=r"profile\.ranks=\[0, 4\] names rank 4, but the run has"):
        validate(config, world_size=4)
    validate(config, world_size=8)


def test_a_stage_outside_a_measured_step_costs_nothing_and_marks_nothing() -> None:
    unused: Any = None
    clock = StageClock(unused, torch.device("cpu"))
    with clock.stage("data"):
        pass
    assert all(times == (0.0, 0.0) for times in clock.table().values())

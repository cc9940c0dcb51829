"""Interrupted anywhere, a run ends with the numbers of one that was left alone.

Under the same layout bit by bit: training and validation losses, gradient norms, weights, and what
was drawn from the data. Under another layout the same samples, step by step.
"""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from data.ledger import read_ledger
from launch.schema import load
from parallel.checkpoint_reader import CheckpointReader
from pretrain.config import PretrainConfig
from pretrain.events import read_events
from pretrain.metrics_file import read_metrics
from pretrain.run_status import read_status
from tests.distributed import run_on_gloo
from tests.pretrain.forked_run import ForkedRun

SMALL = [
    "+experiment=tiny_cpu",
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.ffn_hidden_size=64",
    "data.seq_length=32",
    "data.languages=[de,hi,zh]",
    "data.mixture.stages=[{from_tokens: 256, weighting: uniform}]",  # so that the ledger has lines
    "train.micro_batch_size=1",
    "train.global_batch_size=4",
    "train.eval_sequences=2",
    "train.mixture_interval=3",
    "schedule.lr_decay_style=constant",
]
# dropout, and routers that draw the second expert: random numbers that a resume has to repeat
DENSE = [*SMALL, "model.hidden_dropout=0.1", "model.attention_dropout=0.1"]
SPARSE = [
    *SMALL,
    "model=xmoe_tiny",
    "model.moe.num_experts=4",
    "model.moe.router=torchscale_xmoe",
    "model.moe.router_topk=2",
    "model.moe.second_expert_policy=sampling",
]


def curves(run_dir: Path) -> dict[tuple[int, str], float]:
    """(step, name) -> number, of what does not depend on the clock. No step may be there twice."""
    records = read_metrics(run_dir / "metrics.jsonl")
    training = [record["step"] for record in records if "train/loss" in record]
    evaluations = [record["step"] for record in records if "eval/loss" in record]
    for steps in (training, evaluations):
        assert steps == sorted(set(steps)), steps
    return {
        (record["step"], name): value
        for record in records
        for name, value in record.items()
        if name.startswith(("train/", "eval/", "data/family/", "data/language/"))
        and name != "eval/seconds"
    }


def drawn(run_dir: Path) -> list[dict[str, Any]]:
    """What the ledger says of the data, but for when the run started and what time it was."""
    entries = [entry for entry in read_ledger(run_dir) if entry["event"] != "start"]
    return [{k: v for k, v in entry.items() if k != "time"} for entry in entries]


def weights(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint: weights, master weights, moments."""
    reader = CheckpointReader(run_dir / "checkpoints" / f"step_{step:08d}")
    return {name: reader.read(name) for name in reader.tensors}


def assert_same_run(interrupted: Path, whole: Path, last_step: int) -> None:
    assert curves(interrupted) == curves(whole)
    assert drawn(interrupted) == drawn(whole) != []
    ours, expected = weights(interrupted, last_step), weights(whole, last_step)
    assert ours.keys() == expected.keys() and len(ours) > 20
    assert [name for name in ours if not torch.equal(ours[name], expected[name])] == []


# ---- stopped after a step -----------------------------------------------------------------------


def live(config: PretrainConfig, stops: list[int], samples: dict[int, set[bytes]]) -> None:
    """One start of the run after the other, stopped after each of `stops`, then to its end.

    Notes the rows of each step in `samples`.
    """
    from parallel.runtime import initialize, shutdown
    from pretrain import run, train_loop
    from pretrain.run_status import RunStatus
    from pretrain.stop_signal import StopSignal

    real = train_loop.train_step, train_loop.TrainLoop._must_stop, run.report
    real_step = real[0]
    step = 0

    def train_step(engine: Any, micro_batches: Any, *args: Any, **kwargs: Any) -> Any:
        rows = {row.numpy().tobytes() for batch in micro_batches for row in batch.tokens}
        samples.setdefault(step, set()).update(rows)
        return real_step(engine, micro_batches, *args, **kwargs)

    try:
        for stop in [*stops, 0]:

            def must_stop(loop: Any, state: Any, signal: Any, stop: int = stop) -> bool:
                nonlocal step
                step = state.step + 1
                return step == stop and loop.runtime.rank == loop.runtime.world_size - 1

            train_loop.train_step, train_loop.TrainLoop._must_stop = train_step, must_stop
            run.report = lambda *_: None  # pictures: most of the time, and nothing to compare
            runtime = initialize(config.parallel, config.train.seed)
            outcome = run.train(config, runtime, StopSignal(announce=None), RunStatus())
            assert (outcome.stopped_by is not None) == bool(stop)
            shutdown(runtime)
    finally:
        train_loop.train_step, train_loop.TrainLoop._must_stop, run.report = real


# run by run: with which settings it starts, and after which steps it is stopped in between
Runs = dict[str, list[tuple[PretrainConfig, list[int]]]]


def stopped_runs(folder: Path, runs: Runs) -> dict[str, dict[int, set[bytes]]]:
    """The samples on this rank: of each run, step by step."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    seen: dict[str, dict[int, set[bytes]]] = {}
    for name, lives in runs.items():
        seen[name] = {}
        for config, stops in lives:
            live(replace(config, run_dir=str(folder / name)), stops, seen[name])
    return seen


@pytest.mark.parametrize("model", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_stopped_after_every_step_a_run_is_bit_equal(tmp_path: Path, model: list[str]) -> None:
    steps = 3
    config = load([*model, f"train.train_steps={steps}", "train.eval_interval=2"])
    # a stop that meets the last step leaves the final evaluation to the next start
    runs: Runs = {"whole": [(config, [])], "stopped": [(config, list(range(1, steps + 1)))]}
    run_on_gloo(2, stopped_runs, tmp_path, runs, timeout=250)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole", steps)


@pytest.mark.slow
@pytest.mark.parametrize("model", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_stopped_after_any_step_the_rest_is_bit_equal(tmp_path: Path, model: list[str]) -> None:
    steps = 8
    config = load([*model, f"train.train_steps={steps}", "train.eval_interval=3"])
    runs: Runs = {f"stopped_{k}": [(config, [k])] for k in range(1, steps)}
    runs |= {"whole": [(config, [])], "stopped_twice": [(config, [3, 5])]}
    run_on_gloo(2, stopped_runs, tmp_path, runs, timeout=250)
    for name in runs:
        assert_same_run(tmp_path / name, tmp_path / "whole", steps)


def test_another_layout_goes_on_with_the_same_samples(tmp_path: Path) -> None:
    def until(step: int, layout: str) -> PretrainConfig:
        words = [f"train.train_steps={step}", f"parallel={layout}"]
        return load([*SMALL, *words, "train.eval_interval=3"])

    runs: Runs = {
        "whole": [(until(6, "single"), [])],
        "changing": [(until(2, "tp2"), []), (until(4, "pp2"), [3]), (until(6, "single"), [])],
    }
    by_rank = run_on_gloo(2, stopped_runs, tmp_path, runs, timeout=250)
    whole, changing = (
        {step: set.union(*(seen[name][step] for seen in by_rank)) for step in range(1, 7)}
        for name in runs
    )
    assert whole == changing
    assert len(set.union(*whole.values())) == 6 * 4
    assert drawn(tmp_path / "changing") == drawn(tmp_path / "whole")
    ours, expected = curves(tmp_path / "changing"), curves(tmp_path / "whole")
    assert {key: ours[key] for key in expected} == pytest.approx(expected, rel=2e-4)


# ---- killed at any moment -----------------------------------------------------------------------


@dataclass(frozen=True)
class Death:
    """SIGKILL to `rank` some time after the `call`th call of what `place` names, in one life."""

    rank: int
    place: str
    call: int
    delay: float  # seconds

    def arrange(self) -> None:
        """In the process that shall die."""
        from models.language_model import LanguageModel
        from parallel.engine import MegatronEngine
        from pretrain.checkpoint import Checkpoints
        from pretrain.metrics_file import StepLines

        owner, name = {
            "forward": (LanguageModel, "forward"),
            "optimizer": (MegatronEngine, "step"),
            "save": (Checkpoints, "save"),
            "publish": (os, "rename"),
            "metrics": (StepLines, "write"),
        }[self.place]
        real = getattr(owner, name)
        calls = 0

        def hooked(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            if self.place == "publish" and not Path(args[1]).name.startswith("step_"):
                return real(*args, **kwargs)
            calls += 1
            if calls == self.call:
                if self.delay:
                    threading.Timer(self.delay, die).start()
                else:
                    die()
            return real(*args, **kwargs)

        setattr(owner, name, hooked)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def random_deaths(number: int, seed: int) -> list[Death]:
    """Random ones, each place as often as the others; a life gets some steps far."""
    dice = random.Random(seed)
    calls = {"forward": 16, "optimizer": 6, "save": 2, "publish": 2, "metrics": 8}
    places = [list(calls)[i % len(calls)] for i in range(number)]
    dice.shuffle(places)
    return [
        Death(
            # only rank 0 publishes and writes metrics
            rank=0 if place in ("publish", "metrics") else dice.randrange(2),
            place=place,
            call=dice.randint(max(1, calls[place] // 3), calls[place]),
            delay=dice.choice([0.0, dice.uniform(0, 0.05)]),
        )
        for place in places
    ]


def life(config: PretrainConfig, death: Death | None) -> Callable[[], None]:
    def body() -> None:
        from pretrain.run import run

        if death is not None and death.rank == int(os.environ["RANK"]):
            death.arrange()
        run(config)

    return body


def die_again_and_again(tmp_path: Path, settings: list[str], deaths: list[Death]) -> None:
    """Two runs, one left alone and one that dies `deaths`; they must be the same."""
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "WANDB_SILENT": "true"}
    start = partial(ForkedRun, 2, environment=environment)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with start(
        life(load([*settings, f"run_dir={whole}"]), None), folder=tmp_path / "whole_logs"
    ) as run:
        assert run.wait() == [0, 0], run.output()
    last_step = max(step for step, _ in curves(whole))
    config = load([*settings, f"run_dir={killed}", "wandb.mode=offline"])
    for number, death in enumerate(deaths):
        with start(life(config, death), folder=tmp_path / f"life{number}") as run:
            run.wait(rank=death.rank)
            assert run.codes.get(death.rank) == -signal.SIGKILL, f"{death}\n{run.output()}"
            run.kill()
    wandb_run_id = (killed / "wandb_run_id").read_text()
    (killed / "wandb_run_id").unlink()  # the checkpoint knows it, too
    with start(life(config, None), folder=tmp_path / "last") as run:
        assert run.wait() == [0, 0], run.output()

    assert_same_run(killed, whole, last_step)
    status = read_status(killed)
    assert status is not None and (status["state"], status["step"]) == ("finished", last_step)
    ids = {path.name.rsplit("-", 1)[1] for path in (killed / "wandb").glob("offline-run-*")}
    assert ids == {wandb_run_id.strip()}
    resumed = [event["step"] for event in read_events(killed) if event["kind"] == "resume"]
    assert resumed == sorted(resumed) and len(set(resumed)) > len(deaths) // 3, resumed
    assert not list((killed / "checkpoints").glob("*.partial"))


SAVING = {"async": "checkpoint.async_save=true", "sync": "checkpoint.async_save=false"}


def test_three_kills_leave_no_trace_in_the_numbers(tmp_path: Path) -> None:
    settings = [*DENSE, "train.train_steps=10", "train.eval_interval=3"]
    settings += ["checkpoint.save_interval=1"]
    deaths = [Death(1, "optimizer", 4, 0.0), Death(0, "publish", 2, 0.0), Death(1, "save", 2, 0.01)]
    die_again_and_again(tmp_path, settings, deaths)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("model", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_twenty_kills_leave_no_trace_in_the_numbers(
    tmp_path: Path, model: list[str], saving: str
) -> None:
    settings = [*model, SAVING[saving], "train.train_steps=70", "train.eval_interval=7"]
    settings += ["checkpoint.save_interval=2"]
    die_again_and_again(tmp_path, settings, random_deaths(20, seed=len(saving)))

"""Sweeps: folders, the runner with a stand-in for the training, and one with real trainings."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from data.scaling_law.design import ModelShape, design
from data.scaling_law.runs_table import read_runs
from data.scaling_law.sweep_config import make_sweep
from launch import sweep
from launch.schema import CONF, shipped_models
from launch.sweep_collect import collect
from launch.sweep_folder import (
    BEGUN,
    DONE,
    FAILED,
    NEW,
    SweepFolder,
    compose_run,
    describe_cost,
    read_sweep_folder,
    save_interval,
    write_sweep_folder,
)
from launch.sweep_runner import Runner
from models.parameter_count import parameter_count
from pretrain.config import validate

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = Path(__file__).with_name("stand_in_training.py")
FAMILIES = ["germanic", "romance"]
MODEL = {"num_layers": 1, "hidden_size": 16, "ffn_hidden_size": 32, "num_attention_heads": 2}
DESIGN: dict[str, Any] = {
    "name": "test",
    "families": FAMILIES,
    "models": {"n1": {"base": "magneto_tiny", "settings": {"model": MODEL}}},
    "settings": {
        "data": {"seq_length": 16, "languages": ["de", "en", "fr", "it"]},
        "train": {"micro_batch_size": 4, "global_batch_size": 4, "eval_sequences": 4},
        "wandb": {"mode": "disabled"},
    },
    "must_determine_law": False,
    "confirm": {
        "cells": {"n1": [128]},
        "mixtures": {
            "mostly-germanic": {"germanic": 0.75, "romance": 0.25},
            "even": {"germanic": 0.5, "romance": 0.5},
            "mostly-romance": {"germanic": 0.25, "romance": 0.75},
        },
        "seeds": 1,
    },
}
FIRST = "confirm_n1_128_mostly-germanic_s1"


SHAPES = {"n1": ModelShape(num_parameters=2976, flops_per_token=3e4, tokens_per_step=64)}


def make(folder: Path, **changes: Any) -> SweepFolder:
    """The sweep above, in folder/sweep, without asking models and data about it."""
    config = make_sweep(DESIGN, "test", changes)
    return write_sweep_folder(folder / "sweep", config, design(config, SHAPES))


def make_by_command(folder: Path, **changes: Any) -> SweepFolder:
    folder.mkdir(exist_ok=True)
    file = folder / "design.yaml"
    file.write_text(yaml.safe_dump(DESIGN | changes))
    assert sweep.main(["design", str(file), "--out", str(folder / "sweep")]) == 0
    return read_sweep_folder(folder / "sweep")


def run(folder: SweepFolder, **settings: Any) -> tuple[bool, list[str]]:
    """All that is left, with the stand-in; whether it is finished, and what was said."""
    said: list[str] = []
    runner = Runner(folder, jobs=2, threads=1, say=said.append, script=STAND_IN, **settings)
    return runner.run(), said


def wait_until(there: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end
        time.sleep(0.02)


# ---------------------------------------------------------------- folders


def test_a_folder_says_what_the_launcher_runs(tmp_path: Path) -> None:
    folder = make_by_command(tmp_path)
    assert list(folder.states().values()) == [NEW] * 3
    config = compose_run(folder, FIRST)
    validate(config, world_size=1)
    assert config.model.name == "n1" and config.model.hidden_size == 16
    assert config.run_dir == str(folder.run_dir(FIRST))
    assert config.data.mixture.ratios == {"germanic": 0.75, "romance": 0.25}
    assert config.train.train_steps == 2 and config.train.seed == config.data.seed == 1
    planned = folder.by_name[FIRST]
    assert planned.tokens == 128
    assert planned.num_parameters == parameter_count(config.model, 1).non_embedding
    # what the runner starts, and what Hydra makes of each job of the multirun, is the same
    printed = subprocess.run(
        [sys.executable, "launch/pretrain.py", *folder.words([FIRST]), "--cfg", "job", "--resolve"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert f"run_dir: {folder.run_dir(FIRST)}\n" in printed
    assert yaml.safe_load(printed)["data"]["mixture"]["ratios"] == config.data.mixture.ratios


def test_the_same_design_again_and_another_one(tmp_path: Path) -> None:
    folder = make(tmp_path)
    assert make(tmp_path).runs == folder.runs == read_sweep_folder(folder.path).runs
    assert read_sweep_folder(folder.path).config == folder.config
    with pytest.raises(ValueError, match="holds another sweep"):
        make(tmp_path, first_seed=5)


def test_what_it_costs(tmp_path: Path) -> None:
    folder = make(tmp_path)
    flops = sum(planned.flops for planned in folder.runs)
    told = describe_cost(folder, {"germanic": 5.0, "romance": 0.1})
    assert f"  3 runs  {3 * 128:>18,} tokens  {flops:>9.3g} FLOPs" in told[-4]
    assert "repeated text" in told[-2] and "repeated text" not in told[-1]


def test_checkpoints_about_a_minute_apart(tmp_path: Path) -> None:
    folder = make(tmp_path)
    planned = folder.runs[0]
    folder.config.flops_per_second = planned.flops / 2 / 60  # a minute a step
    assert save_interval(folder.config, planned) == 1
    folder.config.flops_per_second *= 2  # both steps in a minute: nothing to save in between
    assert save_interval(folder.config, planned) == 0


REFUSED = {
    "did you mean laptop?": ["design", "laptob"],
    "changes are SETTING=VALUE": ["design", "laptop", "points"],
    "grid.points: Value 'x'": ["design", "laptop", "grid.points=x"],
    "the data has germanic, indic, romance, slavic; name": [
        "design", "laptop", "families=[germanic,romance,slavic]"
    ],
    "models.n30k: model.hiden_size: there is no setting model.hiden_size": [
        "design", "laptop", "models.n30k.settings.model.hiden_size=3"
    ],
    "there is no conf/model/scaling_2m.yaml": ["design", "laptop", "models.n30k.base=scaling_2m"],
    "holds no sweep.yaml": ["run", "nowhere"],
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_refused(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main(REFUSED[words]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert all(line.startswith("error: ") for line in told.splitlines())


def test_words_that_a_run_does_not_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make(tmp_path)
    assert sweep.main(["run", str(folder.path), "optimizer.lr=1"]) == 2
    assert sweep.main(["run", str(folder.path), "--jobs", "0"]) == 2
    told = capsys.readouterr().err
    assert "a run is what its design says" in told and "--jobs 0: must be at least 1" in told


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "sweep").glob("*.yaml")))
def test_shipped_sweeps_can_be_designed(name: str) -> None:
    assert sweep.main(["design", name]) == 0


SIZES = {"1m": 1e6, "3m": 3e6, "10m": 1e7, "30m": 3e7, "85m": 85e6, "397m": 397e6}
SIZES |= {"810m": 810e6, "1_2b": 1.2e9}


def test_models_of_the_law_have_the_size_of_their_name() -> None:
    models = {name: model for name, model in shipped_models().items() if "scaling" in name}
    assert sorted(models) == sorted(f"scaling_{size}" for size in SIZES)
    for size, number in SIZES.items():
        count = parameter_count(models[f"scaling_{size}"], vocab_size=1).non_embedding
        assert count == pytest.approx(number, rel=0.015)


# ---------------------------------------------------------------- the runner


def test_all_runs_of_a_sweep(tmp_path: Path) -> None:
    folder = make(tmp_path)
    finished, said = run(folder)
    assert finished
    assert set(folder.states().values()) == {DONE}
    assert not list(folder.path.glob("runs/*/checkpoints"))
    started = (folder.path / "started").read_text().split()
    assert sorted(started[::2]) == sorted(folder.by_name) and set(started[1::2]) == {"1"}
    assert "3 of 3 runs finished" in said[-1] and "of 2 cores" in said[-1]
    run(folder)
    assert len(folder.attempts()) == 3  # nothing again


def test_the_longest_come_first(tmp_path: Path) -> None:
    folder = make(tmp_path, confirm={"cells": {"n1": [128, 640]}})
    run(folder)
    started = (folder.path / "started").read_text().split()[::2]
    assert all("640" in name for name in started[:3])


def test_a_failed_run_is_said_and_not_tried_again_unasked(tmp_path: Path) -> None:
    folder = make(tmp_path)
    (folder.path / "fail").write_text(FIRST)
    finished, said = run(folder)
    assert not finished
    assert folder.states()[FIRST] == FAILED
    assert f"  failed: {FIRST}: error: as asked" in said
    assert len(folder.attempts()) == 3
    run(folder)
    assert len(folder.attempts()) == 3
    table, left_out = collect(folder)
    assert left_out == [f"{FIRST}: error: as asked"]
    assert sorted(table.runs) == sorted(folder.by_name)
    assert [r["loss"] for r in table.rows if r["run"] != FIRST] == [2.5, 2.5, 2.25, 2.75]
    (folder.path / "fail").unlink()
    assert run(folder, retry=True)[0]
    assert set(folder.states().values()) == {DONE}


def held_sweep(folder: Path) -> SweepFolder:
    """Runs that do not come to their end, until `hold` is removed."""
    sweep = make(folder, confirm={"cells": {"n1": [3 * 64]}})
    (sweep.path / "hold").touch()
    return sweep


def start(folder: SweepFolder) -> "subprocess.Popen[str]":
    code = (
        "import sys; from pathlib import Path; from launch.sweep_folder import read_sweep_folder; "
        "from launch.sweep_runner import Runner; "
        f"folder = read_sweep_folder(Path({str(folder.path)!r})); "
        f"sys.exit(not Runner(folder, 2, 1, script=Path({str(STAND_IN)!r})).run())"
    )
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    wait_until(lambda: steps_of(folder) == [2, 2])
    return process


def steps_of(folder: SweepFolder) -> list[int]:
    """Of the checkpoints there are; one that is being written counts as none."""
    texts = [path.read_text() for path in folder.path.glob("runs/*/checkpoints/step")]
    return [int(text) for text in texts if text]


def trainings(folder: SweepFolder) -> list[str]:
    """Those at work on the sweep, by their command lines."""
    found = subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True).stdout
    return [line for line in found.splitlines() if str(folder.conf) in line]


def test_ctrl_c_stops_saves_and_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = held_sweep(tmp_path)
    runner = start(folder)
    assert sweep.main(["run", str(folder.path)]) == 2
    assert "at work here already" in capsys.readouterr().err
    runner.send_signal(signal.SIGINT)
    said = runner.communicate(timeout=120)[0]
    assert runner.returncode == 1
    assert "SIGINT: 2 runs finish their step and save" in said
    assert f"to go on: python -m launch.sweep run {folder.path}" in said
    assert sorted(folder.states().values()) == [BEGUN, BEGUN, NEW]
    assert [attempt["exit_code"] for attempt in folder.attempts()] == [os.EX_TEMPFAIL] * 2
    assert not trainings(folder)


def test_a_killed_runner_takes_its_trainings_with_it(tmp_path: Path) -> None:
    folder = held_sweep(tmp_path)
    runner = start(folder)
    assert len(trainings(folder)) == 2
    runner.kill()
    runner.communicate(timeout=120)
    wait_until(lambda: not trainings(folder))
    assert steps_of(folder) == [2, 2]
    (folder.path / "hold").unlink()
    (folder.path / "started").unlink()
    finished, _ = run(folder, keep_checkpoints=True)
    assert finished
    assert len((folder.path / "started").read_text().splitlines()) == 3
    assert set(folder.states().values()) == {DONE} and steps_of(folder) == [3, 3, 3]


# ---------------------------------------------------------------- real trainings


@pytest.mark.slow
@pytest.mark.timeout(1800)  # eight trainings, half a minute of CPU on a machine with nothing else
def test_a_sweep_killed_and_resumed_ends_as_one_that_was_left_alone(tmp_path: Path) -> None:
    longer = {"confirm": DESIGN["confirm"] | {"cells": {"n1": [64 * 40]}}, "save_minutes": 5e-4}
    folder = make_by_command(tmp_path, **longer)
    command = [sys.executable, "-m", "launch.sweep", "run", str(folder.path), "--jobs", "2"]
    runner = subprocess.Popen(command, cwd=ROOT)
    wait_until(lambda: list(folder.path.glob("runs/*/checkpoints/step_????????")), seconds=600)
    os.kill(runner.pid, signal.SIGKILL)
    runner.wait()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "3 of 3 runs finished" in again.stdout
    assert sweep.main(["collect", str(folder.path)]) == 0
    table = read_runs(folder.table)
    for name, ratios in table.wide.items():
        planned = folder.by_name[name].ratios
        assert ratios == pytest.approx(planned, abs=0.01)
        assert sum(ratios.values()) == pytest.approx(1)
    assert all(0 < row["loss"] < 20 and row["eval_tokens"] == 2 * 64 for row in table.rows)

    # the same runs as one command of Hydra's, in folders of their own
    other = make_by_command(tmp_path / "other", **longer)
    hydra = sweep.multirun_command(other, list(other.by_name))
    subprocess.run(hydra, cwd=tmp_path, capture_output=True, check=True, timeout=900)
    assert set(other.states().values()) == {DONE}
    assert collect(other)[0].rows == table.rows

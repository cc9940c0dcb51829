"""Sweeps: folders, the runner with a stand-in for the training, and one with real trainings."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from data.folder_lock import FolderLock
from data.scaling_law.design import ModelShape, design
from data.scaling_law.runs_table import read_runs
from data.scaling_law.sweep_config import make_sweep
from launch import sweep
from launch.setting_names import CONF, shipped_models
from launch.sweep_collect import check_evaluation, collect
from launch.sweep_devices import environment, most_jobs, usable_gpus
from launch.sweep_folder import (
    BEGUN,
    DONE,
    FAILED,
    NEW,
    RUNNING,
    SweepFolder,
    compose_run,
    describe_cost,
    read_sweep_folder,
    save_interval,
    write_sweep_folder,
)
from launch.sweep_runner import Runner, Started
from launch.sweep_slurm import JOBS_FILE, SlurmJobs, multirun_command, slurm_words, too_short
from models.parameter_count import parameter_count
from pretrain.config_rules import validate

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
FIRST_HELD = "confirm_n1_192_mostly-germanic_s1"


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


def test_a_word_that_changes_a_mixture() -> None:
    even = {"germanic": 0.4, "romance": 0.6}
    mixtures = make_sweep(
        DESIGN, "test", {"confirm": {"mixtures": {"even": even}}}
    ).confirm.mixtures
    assert mixtures == DESIGN["confirm"]["mixtures"] | {"even": even}


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
    "budget=1: there is no setting budget; did you mean budget_flops": [
        "design", "laptop", "budget=1"
    ],
    "family=[x]: there is no setting family; did you mean families": [
        "design", "laptop", "family=[x]"
    ],
    "grid.point=3: there is no setting grid.point; did you mean grid.points": [
        "design", "laptop", "grid.point=3"
    ],
    "changes are SETTING=VALUE": ["design", "laptop", "points"],
    "error: grid.points=x: Value 'x'": ["design", "laptop", "grid.points=x"],
    "models.n30k: model.hiden_size: there is no setting model.hiden_size": [
        "design", "laptop", "models.n30k.settings.model.hiden_size=3"
    ],
    "1 process was asked for (processes_per_run=1); start 2,": [
        "design", "laptop", "settings.parallel.tensor_model_parallel_size=2"
    ],
    "there is no conf/model/scaling_2m.yaml": ["design", "laptop", "models.n30k.base=scaling_2m"],
    "holds no sweep.yaml": ["run", "nowhere"],
}  # fmt: skip


def test_families_that_are_not_those_of_the_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--out: without it nothing is refused before somebody has tokenized the text."""
    words = ["laptop", "families=[germanic,romance,slavic]", "--out", str(tmp_path / "sweep")]
    assert sweep.main(["design", *words]) == 2
    assert "the data has germanic, indic, romance, slavic; name" in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


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
        assert models[f"scaling_{size}"].num_attention_heads % 2 == 0  # parallel=tp2


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
    started = sorted(folder.attempts(), key=lambda attempt: attempt["began"])
    assert all("640" in attempt["run"] for attempt in started[:3])


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


def start(
    folder: SweepFolder, steps: Sequence[int] = (2, 2), gpus: Sequence[str] = ()
) -> "subprocess.Popen[str]":
    """A runner in a process of its own, once its trainings have come to these steps."""
    code = (
        "import sys; from pathlib import Path; from launch.sweep_folder import read_sweep_folder; "
        "from launch.sweep_runner import Runner; "
        f"folder = read_sweep_folder(Path({str(folder.path)!r})); "
        f"sys.exit(not Runner(folder, 2, 1, gpus={list(gpus)!r}, "
        f"script=Path({str(STAND_IN)!r})).run())"
    )
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    wait_until(lambda: steps_of(folder) == list(steps))
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


def test_what_another_is_at_work_on_is_left_to_it(tmp_path: Path) -> None:
    folder = make(tmp_path)
    with FolderLock(folder.run_dir(FIRST)):
        assert folder.states()[FIRST] == RUNNING
        began = time.monotonic()
        finished, said = run(folder, wait_for_others=0.5)
    assert not finished and time.monotonic() - began < 30
    assert any(line.startswith(f"  at work elsewhere: {FIRST}: ") for line in said)
    assert not any("failed" in line for line in said)
    assert FIRST not in {attempt["run"] for attempt in folder.attempts()}
    assert sorted(folder.states().values()) == sorted([NEW, DONE, DONE])


def test_a_run_that_is_given_free_meanwhile_is_started(tmp_path: Path) -> None:
    folder = make(tmp_path)
    lock = FolderLock(folder.run_dir(FIRST))
    lock.__enter__()
    timer = threading.Timer(2.0, lock.__exit__, (None, None, None))
    timer.start()
    assert run(folder)[0]
    timer.join()
    assert folder.attempts()[-1]["run"] == FIRST


def test_one_that_finds_its_folder_taken_has_not_failed(tmp_path: Path) -> None:
    """Another runner was faster between the look at the lock and the training's own lock."""
    folder = make(tmp_path)
    runner = Runner(folder, 1, 1, say=lambda text: None, script=STAND_IN)
    with FolderLock(folder.run_dir(FIRST)):
        process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(2)"])
        runner._note(Started(FIRST, process, time.time(), 0), process.wait(), 0.1)
    assert folder.attempts() == [] and [run.name for run in runner._queue] == [FIRST]


def test_a_signal_starts_nothing_more_and_reaches_what_was_starting(tmp_path: Path) -> None:
    folder = held_sweep(tmp_path)
    runner = Runner(folder, 1, 1, say=lambda text: None, script=STAND_IN)
    runner._start(FIRST_HELD)
    runner._working, late = [], runner._working  # as between Popen and append
    runner._stop(signal.SIGTERM, None)
    runner._working = late
    wait_until(lambda: steps_of(folder) == [2])
    runner._tell()
    while runner._working:
        runner._reap()
        time.sleep(0.02)
    assert [attempt["exit_code"] for attempt in folder.attempts()] == [os.EX_TEMPFAIL]
    runner._start(FIRST_HELD)
    assert not runner._working and runner._next() is None


def test_a_line_of_attempts_that_a_kill_cut_off(tmp_path: Path) -> None:
    folder = make(tmp_path)
    folder.record({"run": "a"})
    path = folder.path / "attempts.jsonl"
    path.write_text(path.read_text() + '{"run": "b", "fai')
    folder.record({"run": "c"})
    folder.record({"run": "d"})
    assert [attempt["run"] for attempt in folder.attempts()] == ["a", "c", "d"]


def test_a_family_without_validation_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path)
    run(folder)
    path = folder.run_dir(FIRST) / "metrics.jsonl"
    metrics = json.loads(path.read_text())
    del metrics["eval/family/romance/loss"]
    path.write_text(json.dumps(metrics) + "\n")
    told = collect(folder)[1]
    assert len(told) == 1 and "has no loss of romance at step 2" in told[0]
    # none of the data's validation stores is of the family
    monkeypatch.setattr("launch.sweep_collect.evaluation_tokens", lambda c: {"germanic": 64})
    assert sweep.main(["collect", str(folder.path)]) == 2
    assert "error: romance: there is no validation text" in capsys.readouterr().err
    check_evaluation(FAMILIES, dict.fromkeys(FAMILIES, 1))
    with pytest.raises(ValueError, match=r"^germanic: there is no validation text"):
        check_evaluation(FAMILIES, {"germanic": 0, "romance": 3})


# ---------------------------------------------------------------- devices


def processes_of(folder: SweepFolder) -> list[str]:
    return sorted((folder.path / "processes").read_text().splitlines())


def test_runs_of_two_processes(tmp_path: Path) -> None:
    folder = make(tmp_path, confirm={"cells": {"n1": [3 * 64]}}, processes_per_run=2)
    only = FIRST_HELD
    for other in set(folder.by_name) - {only}:  # one is enough: torchrun imports torch
        folder.run_dir(other).mkdir(parents=True)
        (folder.run_dir(other) / "status.json").write_text('{"state": "finished", "step": 3}')
    (folder.path / "hold").touch()
    runner = start(folder, [2])
    wait_until(lambda: len(processes_of(folder)) == 2)
    runner.send_signal(signal.SIGTERM)
    runner.communicate(timeout=120)
    assert folder.states()[only] == BEGUN and not folder.attempts()[0]["failed"]
    assert not trainings(folder)
    assert processes_of(folder) == ["0/2 -", "1/2 -"]
    (folder.path / "hold").unlink()
    assert run(folder)[0]
    assert processes_of(folder) == ["0/2 -"] * 2 + ["1/2 -"] * 2


def test_each_job_has_gpus_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    folder = make(tmp_path, device="gpu")
    (folder.path / "hold").touch()
    runner = start(folder, [1, 1], gpus=["4", "7"])
    assert processes_of(folder) == ["0/1 4", "0/1 7"]
    runner.kill()
    runner.communicate(timeout=120)
    wait_until(lambda: not trainings(folder))

    config = make(tmp_path / "large", device="gpu", processes_per_run=2).config
    assert usable_gpus(config, 5) == ["0", "1", "2", "3", "4"]
    assert most_jobs(config, usable_gpus(config, 5), cores=64, threads=1) == 2
    assert environment(config, ["4", "5", "6", "7"], 1, 1)["CUDA_VISIBLE_DEVICES"] == "6,7"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,GPU-c")
    assert usable_gpus(config, None) == ["GPU-a", "GPU-b", "GPU-c"]
    assert usable_gpus(config, 2) == ["GPU-a", "GPU-b"]
    path = str(tmp_path / "large" / "sweep")
    assert sweep.main(["run", path, "--jobs", "2"]) == 2
    assert "--jobs 2: 3 GPUs are enough for 1 trainings" in capsys.readouterr().err
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert sweep.main(["run", path]) == 2
    assert "device=gpu and processes_per_run=2: this machine has 0 GPUs" in capsys.readouterr().err
    cpu = make(tmp_path / "cpu")
    assert sweep.main(["run", str(cpu.path), "--gpus", "1"]) == 2
    assert "this sweep has device=cpu_core" in capsys.readouterr().err
    assert most_jobs(cpu.config, [], cores=8, threads=3) == 2


def test_gpus_that_nvidia_smi_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make(tmp_path, device="gpu").config
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: one (UUID: a)'\necho 'GPU 1: two (UUID: b)'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert usable_gpus(config, None) == ["0", "1"]


def test_slurm_jobs_have_as_many_tasks_as_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = make(tmp_path, device="gpu", processes_per_run=8)
    path = str(gpu.path)
    assert sweep.main(["run", path, "--slurm", "--multirun"]) == 0
    words = capsys.readouterr().out.split()
    assert "hydra.launcher.tasks_per_node=8" in words and "hydra.launcher.gpus_per_node=8" in words
    nodes = "hydra.launcher.nodes=2"
    tasks, gpus = "hydra.launcher.tasks_per_node", "hydra.launcher.gpus_per_node"
    assert slurm_words(gpu.config, [nodes]) == [f"{tasks}=4", f"{gpus}=4"]
    assert slurm_words(gpu.config, [f"{tasks}=2"]) == [f"{gpus}=2"]
    assert slurm_words(make(tmp_path / "cpu").config, []) == [f"{tasks}=1"]
    with pytest.raises(ValueError, match=r"hydra\.launcher\.nodes=3: processes_per_run=8"):
        slurm_words(gpu.config, ["hydra.launcher.nodes=3"])
    most, cores = "hydra.launcher.array_parallelism", "hydra.launcher.cpus_per_task"
    cpu = make(tmp_path / "cpu")
    assert slurm_words(cpu.config, [], jobs=3, threads=2) == [
        f"{tasks}=1",
        f"{most}=3",
        f"{cores}=2",
    ]
    assert sweep.main(["run", path, "--multirun"]) == 2
    assert "--multirun: Hydra starts one process a run" in capsys.readouterr().err
    assert sweep.main(["run", path, "--slurm", "--gpus", "8"]) == 2
    assert "--gpus 8: GPUs of this machine; a job's are processes_per_run=8" in (
        capsys.readouterr().err
    )


def test_a_run_that_takes_longer_than_a_job_may(tmp_path: Path) -> None:
    folder = make(tmp_path, startup_seconds=7200)
    assert too_short(folder, [FIRST], []) == (
        "hydra.launcher.timeout_min=60: the longest run takes 120 minutes by the estimate; it is "
        "stopped before its end, saves, and the same command again goes on"
    )
    assert too_short(folder, [FIRST], ["hydra.launcher.timeout_min=121"]) is None


def test_runs_in_the_queue_of_slurm_are_not_started_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path)
    (folder.path / JOBS_FILE).write_text(f'{{"run": "{FIRST}", "number": "12_0", "since": 0}}\n')
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\necho 12_0; echo 13\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert sweep.main(["run", str(folder.path)]) == 2
    told = capsys.readouterr().err
    assert "in SLURM's queue, and would run twice: 1 run; wait with --slurm" in told
    assert sweep.main(["status", str(folder.path)]) == 0
    assert f"  in SLURM's queue: {FIRST}: job 12_0" in capsys.readouterr().out
    assert sweep.main(["run", str(folder.path), "--slurm", "--multirun"]) == 0
    assert FIRST not in capsys.readouterr().out
    squeue.write_text("#!/bin/sh\nexit 1\n")  # SLURM does not answer
    assert sweep.main(["status", str(folder.path)]) == 0
    assert "in SLURM's queue" not in capsys.readouterr().out
    jobs = SlurmJobs(folder, say=print)
    assert not jobs.look() and list(jobs.waiting) == [FIRST]
    # the job has failed while nobody waited for it
    squeue.write_text("#!/bin/sh\ntrue\n")
    log = folder.path / "multirun" / ".submitit" / "12_0" / "12_0_0_log.err"
    log.parent.mkdir(parents=True)
    log.write_text("error: out of luck\n")
    assert jobs.look() and not jobs.waiting and not SlurmJobs(folder).waiting
    assert f"{FIRST}: FAILED: error: out of luck" in capsys.readouterr().out
    assert folder.states()[FIRST] == FAILED
    assert sweep.main(["status", str(folder.path)]) == 1


def test_what_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sweep.main([])
    assert "are required: command, what\n" in capsys.readouterr().err


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
    hydra = multirun_command(other, list(other.by_name))
    subprocess.run(hydra, cwd=tmp_path, capture_output=True, check=True, timeout=900)
    assert set(other.states().values()) == {DONE}
    assert collect(other)[0].rows == table.rows

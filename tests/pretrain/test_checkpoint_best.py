"""checkpoint.keep_best: which losses count, also in a run that goes back."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from parallel.runtime import shutdown
from pretrain.config import CheckpointConfig
from pretrain.train_state import TrainState
from tests.disks import read_only, small_disk
from tests.distributed import run_on_gloo
from tests.pretrain.test_checkpoint import engine
from tests.pretrain.test_checkpoint_faults import Notices, opened, resume


def keep_the_best(folder: Path) -> list[str]:
    runtime, machine = engine(seed=7)
    config = CheckpointConfig(keep_last=1, keep_best=1, async_save=False)
    checkpoints = opened(folder, config, [])
    for step, loss in ((1, 2.0), (2, 1.0), (3, 1.5), (4, 0.5)):
        checkpoints.save(machine, TrainState(step=step))
        checkpoints.record_evaluation(step, loss)
    shutdown(runtime)
    return [path.name for path in checkpoints.steps()]


def test_the_best_by_evaluation_is_kept(tmp_path: Path) -> None:
    assert run_on_gloo(1, keep_the_best, tmp_path)[0] == ["step_00000004"]
    losses = json.loads((tmp_path / "evaluations.json").read_text())
    assert losses == {"1": 2.0, "2": 1.0, "3": 1.5, "4": 0.5}


def trouble_noting(folder: Path) -> Notices:
    runtime, machine = engine(seed=7)
    notices: Notices = []
    checkpoints = opened(folder, CheckpointConfig(keep_best=1, async_save=False), notices)
    checkpoints.save(machine, TrainState(step=1))
    (folder / "evaluations.json").mkdir()
    checkpoints.record_evaluation(1, 2.0)
    shutdown(runtime)
    return notices


def test_an_evaluation_that_cannot_be_noted_is_told(tmp_path: Path) -> None:
    notices = run_on_gloo(1, trouble_noting, tmp_path)[0]
    assert [kind for kind, _, _ in notices] == ["saved", "retention_failed"]
    assert "could not note eval/loss" in notices[1][2]


def save_beside_cut_evaluations(folder: Path) -> Notices:
    runtime, machine = engine(seed=7)
    notices: Notices = []
    checkpoints = opened(folder, CheckpointConfig(keep_best=1, async_save=False), notices)
    for step in (1, 2):
        checkpoints.save(machine, TrainState(step=step))
    shutdown(runtime)
    return notices


def test_evaluations_that_are_lost_are_told_of_once(tmp_path: Path) -> None:
    (tmp_path / "evaluations.json").write_text('{"1": 2.0')
    notices = run_on_gloo(1, save_beside_cut_evaluations, tmp_path)[0]
    assert [kind for kind, _, _ in notices] == ["retention_failed", "saved", "saved"]
    assert "evaluations.json cannot be read (JSONDecodeError: " in notices[0][2]


def take_anew(folder: Path, how: str) -> list[str]:
    """Of a run that had taken steps up to 15, and goes back to 5, or starts anew: the checkpoints
    after its next save."""
    runtime, machine = engine(seed=7)
    config = CheckpointConfig(save_interval=5, keep_last=1, keep_best=1, async_save=False)
    before = opened(folder, config, [])
    if how != "a start":
        before.save(machine, TrainState(step=5))
        before.record_evaluation(5, 2.0)
    else:
        folder.mkdir()
    for step, loss in ((10, 1.0), (15, 0.5)):  # whose checkpoints were lost, or taken back
        before.record_evaluation(step, loss)
    now = before if how == "a rollback" else opened(folder, config, [])
    (now.roll_back if how == "a rollback" else now.resume)(machine)
    for step, loss in ((5, 2.0), (10, 3.0), (15, 4.0)):
        now.save(machine, TrainState(step=step))  # what is removed is decided here
        now.record_evaluation(step, loss)
    shutdown(runtime)
    return [path.name for path in now.steps()]


@pytest.mark.parametrize("how", ["a resume", "a rollback", "a start"])
def test_losses_of_steps_that_are_taken_anew_do_not_count(tmp_path: Path, how: str) -> None:
    folder = tmp_path / "checkpoints"
    left = run_on_gloo(1, take_anew, folder, how)[0]
    assert left == ["step_00000005", "step_00000015"]
    losses = json.loads((folder / "evaluations.json").read_text())
    assert losses == {"5": 2.0, "10": 3.0, "15": 4.0}


def resume_and_look(folder: Path) -> tuple[Notices, dict[int, float]]:
    runtime, machine = engine(seed=8)
    notices: Notices = []
    checkpoints = opened(folder, CheckpointConfig(keep_best=1), notices)
    assert checkpoints.resume(machine).step == 0
    shutdown(runtime)
    return notices, checkpoints.retention.losses


def test_losses_that_cannot_be_forgotten_on_disk_are_so_in_memory(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        (disk / "evaluations.json").write_text('{"0": 9.0, "5": 1.0}')
        read_only(disk)
        ((notices, losses),) = run_on_gloo(1, resume_and_look, disk)
        assert losses == {0: 9.0}
        ((kind, step, text),) = notices
        assert (kind, step) == ("retention_failed", 0) and "Read-only file system" in text


def test_nothing_is_written_where_nothing_is_forgotten(tmp_path: Path) -> None:
    run_on_gloo(1, keep_the_best, tmp_path)
    before = os.stat(tmp_path / "evaluations.json")
    assert run_on_gloo(1, resume, tmp_path, CheckpointConfig(keep_best=1))[0] == (4, [])
    assert os.path.samestat(before, os.stat(tmp_path / "evaluations.json"))

"""Which checkpoints stay."""

import json
import math
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from parallel.checkpoint_manifest import verify, write_manifest
from pretrain.checkpoint_list import find_checkpoints
from pretrain.checkpoint_retention import EVALUATIONS, Retention, kept, take_back_after
from pretrain.config import CheckpointConfig

LOSSES = {10: 3.0, 20: 2.0, 30: 2.0, 40: 2.5, 60: 9.0}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"keep_last": 2}, {50, 60}),
        ({"keep_last": 0, "keep_every": 40}, {10, 20, 30, 40, 50, 60}),
        ({"keep_last": 1, "keep_every": 20}, {20, 40, 60}),
        ({"keep_last": 1, "keep_best": 1}, {30, 60}),  # the later one of equals
        ({"keep_last": 1, "keep_best": 3}, {20, 30, 40, 60}),
        ({"keep_last": 1, "keep_best": 9}, {10, 20, 30, 40, 60}),  # 50 was never evaluated
        ({"keep_last": 2, "keep_every": 30, "keep_best": 1}, {30, 50, 60}),
    ],
)
def test_rules_add_up(settings: dict[str, Any], expected: set[int]) -> None:
    assert kept([60, 10, 20, 30, 40, 50], LOSSES, CheckpointConfig(**settings)) == expected


@pytest.mark.parametrize(
    ("keep_last", "save_interval", "expected"),
    [(1, 5, {10, 13}), (2, 5, {10, 11, 13}), (1, 0, {13}), (1, 4, {13}), (3, 5, {10, 11, 13})],
)
def test_what_a_rollback_needs_is_kept(
    keep_last: int, save_interval: int, expected: set[int]
) -> None:
    """However often a run is stopped between its regular saves."""
    config = CheckpointConfig(keep_last=keep_last, save_interval=save_interval)
    assert kept([5, 10, 11, 13], {}, config, rolls_back=True) == expected
    assert kept([5, 10, 11, 13], {}, config) == {13, *[11, 10][: keep_last - 1]}


def made(folder: Path, step: int) -> Path:
    path = folder / f"step_{step:08d}"
    path.mkdir(parents=True)
    (path / "metadata.json").write_text("{}")
    (path / "__0_0.distcp").write_bytes(b"x" * 100)
    write_manifest(path)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_not_kept_is_removed(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        made(tmp_path, step)
    (tmp_path / "step_00000012.damaged").mkdir()
    retention = Retention(tmp_path, CheckpointConfig(keep_last=1, keep_every=10))
    assert retention.apply() == ["step_00000005"]
    assert names(tmp_path) == ["step_00000010", "step_00000012.damaged", "step_00000015"]
    assert Retention(tmp_path / "none", CheckpointConfig(keep_last=1)).apply() == []


def test_nothing_is_removed_while_the_newest_is_damaged(tmp_path: Path) -> None:
    for step in (5, 10):
        made(tmp_path, step)
    (tmp_path / "step_00000010" / "__0_0.distcp").write_bytes(b"x" * 99)
    assert Retention(tmp_path, CheckpointConfig(keep_last=1)).apply() == []


def test_evaluations_outlive_the_process(tmp_path: Path) -> None:
    config = CheckpointConfig(keep_last=1, keep_best=1)
    first = Retention(tmp_path, config)
    for step, loss in ((5, 2.0), (10, 3.0), (15, 4.0)):
        made(tmp_path, step)
        first.record(step, loss)
    assert json.loads((tmp_path / "evaluations.json").read_text())["10"] == 3.0
    assert Retention(tmp_path, config).apply() == ["step_00000010"]


DAMAGED = ["", "[1]", '{"a": 1}', '{"1": null}', '{"5": 2.0, "10']


@pytest.mark.parametrize("content", DAMAGED)
def test_evaluations_that_cannot_be_read_are_told_and_written_anew(
    tmp_path: Path, content: str
) -> None:
    (tmp_path / "evaluations.json").write_text(content)
    retention = Retention(tmp_path, CheckpointConfig())
    assert retention.losses == {}
    assert "evaluations.json cannot be read (" in retention.news() and retention.news() == ""
    retention.record(1, 0.5)
    assert Retention(tmp_path, CheckpointConfig()).losses == {1: 0.5}


def run_of_four(run_dir: Path, metrics: bool) -> Path:
    """Its checkpoints' folder; step 5 is the best, and step 12, after a signal, was not evaluated.

    metrics: whether the run's metrics have the losses.
    """
    folder = run_dir / "checkpoints"
    for step in (5, 10, 12, 15):
        made(folder, step)
    lines = ['{"step": 5, "eval/loss": 2.0, "train/loss": 9.0}', '{"step": 12, "train/loss": 0.1}']
    lines += ['{"step": 10, "eval/loss": "none"}', '{"step": 10, "eval/loss": 3.0}']
    if metrics:
        (run_dir / "metrics.jsonl").write_bytes("\n".join(lines).encode() + b"\n\xff\xfe")
    return folder


@pytest.mark.parametrize("content", [*DAMAGED, '{"10": 3.0}', None])
def test_the_best_outlives_what_evaluations_said(tmp_path: Path, content: str | None) -> None:
    folder = run_of_four(tmp_path, metrics=True)
    if content is not None:
        (folder / "evaluations.json").write_text(content)
    config = CheckpointConfig(save_interval=5, keep_last=1, keep_best=1)
    retention = Retention(folder, config)
    assert retention.apply() == ["step_00000010", "step_00000012"]
    retention.record(15, 4.0)
    (tmp_path / "metrics.jsonl").unlink()
    assert Retention(folder, config).losses[5] == 2.0  # written with the others
    assert Retention(folder, config).apply() == []


@pytest.mark.parametrize("content", [*DAMAGED, '{"10": 3.0}', None])
def test_what_may_be_the_best_is_not_removed(tmp_path: Path, content: str | None) -> None:
    """Nothing has the losses any more: what was evaluated stays, and a person is told once."""
    folder = run_of_four(tmp_path, metrics=False)
    if content is not None:
        (folder / "evaluations.json").write_text(content)
    retention = Retention(folder, CheckpointConfig(save_interval=5, keep_last=1, keep_best=1))
    assert retention.apply() == ["step_00000012"]
    assert "eval/loss of step 5 is neither in evaluations.json nor in metrics" in retention.news()
    assert retention.apply() == [] and retention.news() == ""
    assert (folder / "step_00000005").is_dir() and (folder / "step_00000010").is_dir()


def test_what_was_looked_for_is_looked_for_again_where_the_step_is_taken_anew(
    tmp_path: Path,
) -> None:
    folder = run_of_four(tmp_path, metrics=False)
    retention = Retention(folder, CheckpointConfig(save_interval=5, keep_last=1, keep_best=1))
    retention.record(5, 2.0)
    assert retention.apply() == ["step_00000012"] and "of step 10 is neither" in retention.news()
    retention.forget_after(5)
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "eval/loss": 3.0}\n')
    assert retention.apply() == ["step_00000010"]
    assert retention.losses == {5: 2.0, 10: 3.0}


def test_evaluations_outlive_a_power_cut(tmp_path: Path) -> None:
    """The new file is on the disk before it takes the old one's name, and the name after."""
    seen: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "replace"):
            real = getattr(os, name)

            def noted(*given: Any, name: str = name, real: Any = real) -> None:
                seen.append(name)
                real(*given)

            patch.setattr(os, name, noted)
        Retention(tmp_path, CheckpointConfig()).record(1, 0.5)
    assert seen == ["fsync", "replace", "fsync"]
    assert names(tmp_path) == ["evaluations.json"]


def test_no_folder_is_made_for_an_evaluation(tmp_path: Path) -> None:
    Retention(tmp_path / "none", CheckpointConfig()).record(0, 9.0)
    assert not (tmp_path / "none").exists()


def remove_until_killed(folder: Path, kill_at: int) -> None:
    """A process of its own, ended by SIGKILL before the `kill_at`th thing it renames or deletes."""
    seen = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in ("os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    Retention(folder, CheckpointConfig(keep_last=1)).apply()
    os._exit(0)


def test_a_kill_while_removing_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    for kill_at in range(1, 20):
        folder = tmp_path / str(kill_at)
        old, new = made(folder, 5), made(folder, 10)
        process = fork.Process(target=remove_until_killed, args=(folder, kill_at))
        process.start()
        process.join()
        assert verify(new) == []
        assert old not in find_checkpoints(folder) or verify(old) == []
        if process.exitcode == 0:
            break
    assert kill_at == 8  # rmtree of leftovers, rename, rmtree, three files, the folder
    assert names(folder) == ["step_00000010"]


def test_an_evaluation_that_is_not_a_number_is_not_the_best() -> None:
    config = CheckpointConfig(keep_last=1, keep_best=1)
    losses = {100: 3.0, 200: math.nan, 300: 1.0, 400: math.nan, 500: 2.0}
    assert kept(losses, losses, config) == {300, 500}


def test_what_nobody_asks_for_is_not_told(tmp_path: Path) -> None:
    (tmp_path / EVALUATIONS).write_text("{")
    retention = Retention(tmp_path, CheckpointConfig(keep_best=0))
    retention.forget_after(5)
    assert retention.news() == "" and (tmp_path / EVALUATIONS).read_text() == "{"


def test_a_run_without_its_folder_takes_nothing_back(tmp_path: Path) -> None:
    """Not even nothing: what follows is written into the folder of another run."""

    def refuse() -> None:
        raise RuntimeError("not ours")

    with pytest.raises(RuntimeError, match="not ours"):
        take_back_after(tmp_path, 5, refuse)


def test_what_was_taken_back_before_need_not_be_deletable(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "step_00000010.taken_back").symlink_to(tmp_path / "elsewhere")  # rmtree refuses
    (tmp_path / "step_00000010").mkdir()
    assert "step_00000010.taken_back" in take_back_after(tmp_path, 5, lambda: None)
    assert (tmp_path / "step_00000010.taken_back").is_dir()
    assert not (tmp_path / "step_00000010.taken_back").is_symlink()
    assert (tmp_path / "elsewhere").is_dir()

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
from pretrain.checkpoint_retention import Retention, kept
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


@pytest.mark.parametrize("content", ["", "[1]", '{"a": 1}', '{"1": null}'])
def test_evaluations_that_cannot_be_read_are_forgotten(tmp_path: Path, content: str) -> None:
    (tmp_path / "evaluations.json").write_text(content)
    retention = Retention(tmp_path, CheckpointConfig())
    assert retention.losses == {}
    retention.record(1, 0.5)
    assert Retention(tmp_path, CheckpointConfig()).losses == {1: 0.5}


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

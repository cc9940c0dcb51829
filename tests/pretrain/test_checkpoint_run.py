"""A whole run whose disk is full for a while."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain.checkpoint import FINAL_SAVE_PAUSES
from pretrain.events import read_events
from tests.disks import mount, small_disk
from tests.pretrain.test_run import Start, environment, finish, losses, start  # noqa: F401


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """The checkpoints' folder, too small for any."""
    with small_disk(tmp_path / "run" / "checkpoints", "100k") as folder:
        yield folder


@pytest.mark.slow
def test_a_run_trains_on_over_a_full_disk_and_says_at_the_end_that_it_is_not_saved(
    start: Start,  # noqa: F811
    disk: Path,
) -> None:
    run_dir = disk.parent
    settings = ("train.train_steps=6", "checkpoint.save_interval=2")
    run = start(2, *settings, "parallel=tp2")
    assert 0 not in run.wait()
    text = run.output()
    assert "SAVE FAILED: could not write" in text and "No space left on device" in text
    tried = re.search(r"step 6, at which this run ends, is not saved, after (\d+) attempts", text)
    assert tried and int(tried[1]) > len(FINAL_SAVE_PAUSES)  # for as long as the grace time lasts
    assert text.count("The training goes on") == text.count("SAVE FAILED") - int(tried[1])
    assert list(losses(run_dir)) == [1, 2, 3, 4, 5, 6]
    kinds = [event["kind"] for event in read_events(run_dir)]
    assert kinds.count("save_failed") >= 4 and not list(disk.iterdir())

    mount("-o", "remount,size=100m", str(disk))
    text = finish(start(2, *settings, "parallel=tp2"))
    assert "saved " in text and "SAVE FAILED" not in text
    assert sorted(path.name for path in disk.iterdir())[-1] == "step_00000006"

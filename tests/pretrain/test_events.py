import json
from pathlib import Path

import pytest

from pretrain.events import Events, read_events
from tests.disks import fill, small_disk


def test_events_are_appended_and_read_back(tmp_path: Path) -> None:
    run_dir = tmp_path / "made" / "by the first event"
    events = Events(run_dir, enabled=True)
    assert read_events(run_dir) == [] and not run_dir.exists()
    events.write("save_failed", 7, "no space left on device", path="checkpoints/step_00000007")
    Events(run_dir, enabled=True).write("resume", 5, "von Schritt 5\u2028an")  # a later start
    first, second = read_events(run_dir)
    assert (first["kind"], first["step"], first["path"]) == (
        "save_failed",
        7,
        "checkpoints/step_00000007",
    )
    assert (second["kind"], second["text"]) == ("resume", "von Schritt 5\u2028an")
    assert 0 <= second["time"] - first["time"] < 60


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    Events(tmp_path / "run", enabled=False).write("spike", 1, "text")
    assert list(tmp_path.iterdir()) == []


def test_a_line_cut_off_spoils_no_other(tmp_path: Path) -> None:
    events = Events(tmp_path, enabled=True)
    events.write("a", 1, "whole")
    with open(events.path, "a") as file:
        file.write('{"time": 1, "kind": "b')
    events.write("c", 2, "whole")
    events.path.write_text(events.path.read_text() + '["no event"]\n{"kind": "d"}\n')
    assert [event["kind"] for event in read_events(tmp_path)] == ["a", "c"]
    assert json.loads(events.path.read_text().split("\n")[2])["kind"] == "c"


def test_a_full_disk_costs_no_event(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        events = Events(disk, enabled=True)
        events.write("resume", 2, "from 2")
        filler = fill(disk)
        for step in range(3, 20):
            events.write("save_failed", step, f"no room at step {step} " + "x" * 500)
        said = capsys.readouterr().err
        assert (
            "could not write" in said and "No space left" in said and "no room at step 19" in said
        )
        filler.unlink()
        events.write("save_recovered", 20, "saving works again")
        assert [event["step"] for event in read_events(disk)] == list(range(2, 21))


def test_events_that_wait_are_written_at_the_end_or_said_to_be_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").write_text("")  # no folder can be made there
    events = Events(tmp_path / "run", enabled=True)
    events.write("save_failed", 3, "the disk is full")
    assert "the disk is full" in capsys.readouterr().err
    (tmp_path / "run").unlink()
    (tmp_path / "run").mkdir()
    events.close()
    assert [event["step"] for event in read_events(tmp_path / "run")] == [3]
    (tmp_path / "run" / "events.jsonl").unlink()
    (tmp_path / "run").rmdir()
    (tmp_path / "run").write_text("")
    events.write("stop", 4, "stopped by SIGINT")
    events.close()
    assert "WARNING" in (told := capsys.readouterr().err) and "lines missing: 1 (" in told
    events.close()
    assert capsys.readouterr().err == ""

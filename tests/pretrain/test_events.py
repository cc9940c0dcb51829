import json
from pathlib import Path

import pytest

from pretrain.events import Events, read_events


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


def test_what_cannot_be_written_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    Events(tmp_path / "file", enabled=True).write("save_failed", 3, "the disk is full")
    assert "the disk is full" in capsys.readouterr().err

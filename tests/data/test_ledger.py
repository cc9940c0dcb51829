from pathlib import Path

import pytest

from data.ledger import LEDGER_NAME, Ledger, read_ledger, samples_of_step


def start(ledger: Ledger, step: int, consumed: int, size: int) -> None:
    ledger.write("start", step=step, consumed_sequences=consumed, global_batch_size=size)


def test_steps_are_found_across_resumes_with_other_batch_sizes(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    start(ledger, 0, 0, 8)
    start(ledger, 10, 80, 16)
    entries = read_ledger(tmp_path)
    assert samples_of_step(entries, 1) == (0, 8)
    assert samples_of_step(entries, 10) == (72, 80)
    assert samples_of_step(entries, 11) == (80, 96)
    assert samples_of_step(entries, 13) == (112, 128)


def test_a_resume_from_before_replaces_what_came_after(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    start(ledger, 0, 0, 8)
    ledger.write("skip", step=12, consumed_sequences=96, samples=[88, 96], why="test")
    start(ledger, 10, 80, 4)  # the checkpoint of step 10
    entries = read_ledger(tmp_path)
    assert [entry["event"] for entry in entries] == ["start", "start"]
    assert samples_of_step(entries, 12) == (84, 88)
    start(ledger, 0, 0, 2)  # from the very beginning
    assert samples_of_step(read_ledger(tmp_path), 12) == (22, 24)


def test_a_line_cut_off_by_a_crash_is_ignored(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    start(ledger, 0, 0, 8)
    with open(tmp_path / LEDGER_NAME, "a") as file:
        file.write('{"event": "ski\n')
        file.write("[1]\n")
    start(ledger, 5, 40, 8)
    assert len(read_ledger(tmp_path)) == 2


def test_what_follows_a_line_cut_off_is_a_line_of_its_own(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    start(ledger, 0, 0, 8)
    with open(tmp_path / LEDGER_NAME, "a") as file:
        file.write('{"event": "ski')
    start(ledger, 10, 80, 4)
    assert [entry["step"] for entry in read_ledger(tmp_path)] == [0, 10]


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="written by a run"):
        read_ledger(tmp_path)
    with pytest.raises(ValueError, match="--step=0: steps count from 1"):
        samples_of_step([], 0)
    with pytest.raises(ValueError, match="no start before this step"):
        samples_of_step([], 3)


def test_a_full_disk_costs_no_entry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = Ledger(tmp_path / "gone")
    ledger.write("start", step=0, consumed_sequences=0)  # no such folder
    assert "could not write" in capsys.readouterr().err
    (tmp_path / "gone").mkdir()
    ledger.write("skip", step=1, consumed_sequences=8)
    assert [entry["event"] for entry in read_ledger(tmp_path / "gone")] == ["start", "skip"]

"""metrics.jsonl under crashes, resumes, full disks, and files that go from under the run."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest

from pretrain.metrics_file import MetricsFile, StepLines, read_metrics
from tests.disks import fill, small_disk


def steps(run_dir: Path) -> list[int]:
    return [record["step"] for record in read_metrics(run_dir / "metrics.jsonl")]


def test_lines_are_on_disk_at_once_and_are_json(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "run")
    file.log(1, {"train/loss": 2.5, "train/grad_norm": math.inf, "eval/loss": math.nan})
    line = (tmp_path / "run" / "metrics.jsonl").read_text()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    record = json.loads(line, parse_constant=refuse)
    assert record.pop("time") > 1.6e9
    assert record == {"step": 1, "train/loss": 2.5, "train/grad_norm": None, "eval/loss": None}
    assert math.isnan(read_metrics(file.path)[0]["eval/loss"])
    file.close()
    file.close()


def test_no_step_counts_twice_after_a_resume(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path)
    for step in range(6):
        file.log(step, {"train/loss": step})
    file.close()
    with open(file.path, "a") as torn:
        torn.write('{"step": 3, "train/lo')  # killed within a write
    resumed = MetricsFile(tmp_path, resumed_step=3)
    assert steps(tmp_path) == [0, 1, 2, 3]
    resumed.log(4, {"train/loss": 40})
    resumed.close()
    assert steps(tmp_path) == [0, 1, 2, 3, 4]
    assert read_metrics(file.path)[-1]["train/loss"] == 40
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_bytes_that_are_not_utf_8_cost_their_line_only(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path)
    file.log(1, {"train/loss": 9.0})
    file.close()
    with open(file.path, "ab") as torn:
        torn.write(b'{"step": 2, "x": "\xff\xfe\n{"step": "two"}\n')
    assert steps(tmp_path) == [1]
    resumed = MetricsFile(tmp_path, resumed_step=1)
    resumed.log(2, {"train/loss": 8.0})
    resumed.close()
    assert steps(tmp_path) == [1, 2] and b"\xff" not in file.path.read_bytes()


@pytest.mark.parametrize("how", ["removed", "moved", "replaced"])
def test_a_file_that_goes_from_under_the_run_is_written_whole_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    folder = tmp_path / "run"
    file = MetricsFile(folder)
    file.log(1, {"train/loss": 9.0})
    if how == "removed":
        shutil.rmtree(folder)
    elif how == "moved":
        folder.rename(tmp_path / "elsewhere")
    else:  # as by an editor
        shutil.copy(file.path, folder / "copy")
        (folder / "copy").replace(file.path)
    file.log(2, {"train/loss": 8.0})  # nobody has made the folder anew yet
    folder.mkdir(exist_ok=True)
    file.log(3, {"train/loss": 7.0})
    file.close()
    assert steps(folder) == [1, 2, 3]
    told = capsys.readouterr().err
    assert told.count("WARNING") == 1
    assert ("was replaced" if how == "replaced" else "was removed or moved") in told


def test_a_run_from_its_start_keeps_nothing_of_an_earlier_one(tmp_path: Path) -> None:
    for _ in range(2):
        file = MetricsFile(tmp_path)
        file.log(0, {"eval/loss": 9.0})
        file.close()
    assert steps(tmp_path) == [0]


def test_lines_wait_for_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        lines = StepLines(disk / "lines.jsonl")
        lines.write({"step": 1})
        filler = fill(disk)
        for step in range(2, 9):
            lines.write({"step": step, "text": "long" * 500})
        assert capsys.readouterr().err.count("its lines wait in memory") == 1
        filler.unlink()
        lines.write({"step": 9})
        lines.close()
        written = [json.loads(line) for line in (disk / "lines.jsonl").read_text().splitlines()]
        assert [record["step"] for record in written] == list(range(1, 10))


def test_a_disk_that_stays_full_is_no_error_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        lines = StepLines(disk / "lines.jsonl")
        fill(disk)
        lines.write({"step": 1})
        lines.write({"step": 2})
        lines.close()
        assert "lines.jsonl: lines missing at its end: 2 ([Errno 28]" in capsys.readouterr().err


def test_a_run_goes_back_on_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        lines = StepLines(disk / "lines.jsonl")
        for step in range(1, 5):
            lines.write({"step": step, "text": "long" * 100})
        filler = fill(disk)
        lines.write({"step": 5, "text": "long" * 2000})  # of which a part is written
        lines.write({"step": 6})
        lines.go_back(5)
        lines.write({"step": 6, "again": True})
        lines.go_back(3)
        assert [record["step"] for record in read_metrics(lines.path)] == [1, 2, 3]
        lines.write({"step": 4, "again": True})
        filler.unlink()
        lines.write({"step": 5, "again": True})
        lines.close()
        records = read_metrics(lines.path)
        assert [record["step"] for record in records] == [1, 2, 3, 4, 5]
        assert [record["step"] for record in records if "again" in record] == [4, 5]
        assert "cannot be removed" not in capsys.readouterr().err


def test_lines_that_wait_while_a_run_goes_back_are_those_before_it(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        lines = StepLines(disk / "lines.jsonl")
        filler = fill(disk)
        for step in (1, 2, 3):
            lines.write({"step": step, "text": "long" * 2000})
        lines.go_back(2)
        filler.unlink()
        lines.write({"step": 3})
        lines.close()
        assert [record["step"] for record in read_metrics(lines.path)] == [1, 2, 3]
        assert lines.path.read_bytes().count(b"\n") == 3  # and no torn one


def test_lines_that_cannot_be_removed_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        lines = StepLines(disk / "lines.jsonl")
        lines.write({"step": 1})
        with open(lines.path, "ab") as file:
            file.write(b"no JSON\n")  # for which the file must be written anew
        for step in (2, 3):
            lines.write({"step": step, "loss": 9})
        filler = fill(disk)
        lines.go_back(2)
        told = capsys.readouterr().err
        assert "the lines after step 2, to which the run goes back, cannot be removed" in told
        filler.unlink()
        lines.write({"step": 3, "loss": 8})
        lines.close()
        records = read_metrics(lines.path)
        assert [record["step"] for record in records] == [1, 2, 3, 3]
        assert records[-1]["loss"] == 8
        assert [path.name for path in disk.iterdir()] == ["lines.jsonl"]


# An NFS handle goes stale when another host removes or replaces the file. There is no NFS here: a
# closed descriptor stands in for it, which refuses fstat, read, write and close with a real error
# (EBADF for ESTALE); one opened for writing or reading alone refuses less.
HANDLES = {"none": None, "write alone": os.O_WRONLY | os.O_APPEND, "read alone": os.O_RDONLY}


def spoil(file: MetricsFile, handle: str) -> None:
    descriptor, flags = file._lines._file.fileno(), HANDLES[handle]
    if flags is None:
        os.close(descriptor)
        return
    other = os.open(file.path, flags)
    os.dup2(other, descriptor)
    os.close(other)


@pytest.mark.parametrize("handle", ["none", "read alone"])
def test_a_stale_handle_is_opened_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], handle: str
) -> None:
    file = MetricsFile(tmp_path)
    file.log(1, {"train/loss": 9.0})
    spoil(file, handle)
    file.log(2, {"train/loss": 8.0})
    file.log(3, {"train/loss": 7.0})
    assert steps(tmp_path) == [1, 2, 3]
    file.close()
    told = capsys.readouterr().err
    assert told.count("WARNING") == told.count("its handle went stale") == 1


@pytest.mark.parametrize("handle", ["none", "write alone"])
def test_what_a_stale_handle_has_lost_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], handle: str
) -> None:
    folder = tmp_path / "run"
    file = MetricsFile(folder)
    file.log(1, {"train/loss": 9.0})
    spoil(file, handle)
    shutil.rmtree(folder)
    folder.mkdir()
    file.log(2, {"train/loss": 8.0})
    file.log(3, {"train/loss": 7.0})
    file.close()
    assert steps(folder) == [2, 3]
    told = capsys.readouterr().err
    assert told.count("WARNING") == 1 and "all earlier lines are lost ([Errno 9]" in told


def test_lines_wait_for_the_folder_of_a_stale_handle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    file = MetricsFile(folder)
    file.log(1, {"train/loss": 9.0})
    spoil(file, "none")
    folder.rename(tmp_path / "moved")
    file.log(2, {"train/loss": 8.0})
    file.log(3, {"train/loss": 7.0})
    (tmp_path / "moved").rename(folder)
    file.close()
    assert steps(folder) == [1, 2, 3]
    told = capsys.readouterr().err
    assert told.count("its lines wait in memory") == told.count("went stale") == 1


def test_a_stale_handle_ends_neither_a_run_nor_its_going_back(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path)
    for step in (1, 2, 3):
        file.log(step, {"train/loss": 9.0})
    spoil(file, "none")
    file.go_back(2)
    spoil(file, "none")
    file.close()
    assert steps(tmp_path) == [1, 2]

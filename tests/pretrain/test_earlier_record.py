"""A start from step 0 over an earlier record: nothing is lost, and nothing is mixed."""

import json
from pathlib import Path

import pytest

from pretrain.earlier_record import set_aside
from pretrain.metrics_file import MetricsFile
from tests.pretrain.test_tracker import of_type, records, run_wandb


def record_of(run_dir: Path, steps: int = 3) -> None:
    file = MetricsFile(run_dir)
    for step in range(1, steps + 1):
        file.log(step, {"train/loss": 9.0})
    file.close()
    (run_dir / "router.jsonl").write_text(json.dumps({"step": 1}) + "\n")
    (run_dir / "wandb_run_id").write_text("abc\n")


def test_a_new_folder_is_left_as_it_is(tmp_path: Path) -> None:
    assert set_aside(tmp_path, None) == ""
    assert list(tmp_path.iterdir()) == []


def test_each_start_with_the_same_settings_keeps_the_record_before_it(tmp_path: Path) -> None:
    for number in (1, 2):
        record_of(tmp_path, steps=number)
        said = set_aside(tmp_path, ["checkpoint.keep_last 3 -> 1", "wandb.mode auto -> offline"])
        assert f"steps up to {number}" in said and f"metrics.{number}.jsonl" in said
        assert "W&B" not in said
    kept = {"metrics.1.jsonl", "metrics.2.jsonl", "router.1.jsonl", "router.2.jsonl"}
    assert {path.name for path in tmp_path.iterdir()} == kept | {"wandb_run_id"}
    assert len((tmp_path / "metrics.2.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("changed", [["optimizer.lr 0.001 -> 0.01"], None])
def test_other_settings_are_another_run_at_wandb(tmp_path: Path, changed: list[str] | None) -> None:
    record_of(tmp_path)
    said = set_aside(tmp_path, changed)
    assert (changed[0] if changed else "are not known") in said
    assert (tmp_path / "wandb_run_id.1").read_text() == "abc\n"
    assert not (tmp_path / "wandb_run_id").exists()


def test_other_settings_are_told_at_wandb_from_their_first_step(tmp_path: Path) -> None:
    """And the same settings go on behind what W&B has."""
    run_dir = tmp_path / "run"
    run_wandb(run_dir, 1, 4)
    set_aside(run_dir, [])
    run_wandb(run_dir, 1, 5)
    set_aside(run_dir, ["optimizer.lr 0.001 -> 0.01"])
    run_wandb(run_dir, 1, 3)
    found: dict[str, list[list[int]]] = {}
    for folder in sorted((run_dir / "wandb").glob("offline-run-*")):
        everything = records(folder)
        (run,) = of_type("run", everything)
        rows = [row["item"]["step"] for row in of_type("history", everything)]
        found.setdefault(run["run_id"], []).append(rows)
    old = (run_dir / "wandb_run_id.2").read_text().strip()
    new = (run_dir / "wandb_run_id").read_text().strip()
    assert found == {old: [[1, 2, 3, 4], [5]], new: [[1, 2, 3]]}

"""An error about a folder of runs names them."""

from pathlib import Path

import pytest

from data.run_folders import runs_below
from pretrain.html_report import write_html_report


def test_runs_are_named_one_level_below_or_two(tmp_path: Path) -> None:
    assert runs_below(tmp_path) == runs_below(tmp_path / "nothing") == ""
    demo = tmp_path / "runs" / "demo"
    for date in range(6):
        (demo / f"2026{date}").mkdir(parents=True)
        (demo / f"2026{date}" / "config.yaml").touch()
    shown = ", ".join(str(demo / f"2026{date}") for date in range(2, 6))
    said = f"; it holds runs: 2 more and {shown}; name one of them"
    assert runs_below(demo) == runs_below(demo.parent) == said
    with pytest.raises(FileNotFoundError, match="jsonl; it holds runs: 2 more and"):
        write_html_report(demo.parent)
    run = tmp_path / "runs" / "mine"
    run.mkdir()
    (run / "config.1.yaml").touch()
    assert runs_below(str(demo.parent)) == f"; it holds runs: {run}; name one of them"


def test_a_copy_of_a_checkpoint_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    for name in ("config.yaml", "manifest.json"):
        (tmp_path / "weights" / name).touch()
    assert runs_below(tmp_path) == ""

"""The table's numbers, and a picture that holds what was logged."""

import io
import json
import math
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from pretrain.report import family_of, plot_curves, print_report, read_curves

START = {"eval/loss": 9.0, "eval/family/Slavic/loss": 9.5, "eval/family/Germanic/loss": 8.5}
END = {
    "eval/loss": math.log(20),
    "eval/family/Slavic/loss": 4.0,
    "eval/family/Germanic/loss": 2.5,
    "eval/family/Uralic/loss": math.nan,
    "eval/language/de/loss": 2.5,
}


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_table_and_next_steps():
    out = io.StringIO()
    print_report(
        START,
        END,
        artefacts={"curves": "runs/x/" + "long/" * 20 + "curves.png"},
        next_steps=["python -m launch.generate [run]"],
        file=out,
    )
    text = out.getvalue()
    rows = [line.split() for line in text.splitlines()]
    assert ["Germanic", "8.500", "2.500", "-6.000", "12.2"] in rows
    assert ["Slavic", "9.500", "4.000", "-5.500", "54.6"] in rows
    assert ["Uralic", "-", "-", "-", "-"] in rows
    assert ["all", "tokens", "9.000", "2.996", "-6.004", "20.0"] in rows
    assert text.index("Germanic") < text.index("Slavic") < text.index("all tokens")
    assert "de " not in text  # families, not languages
    assert "runs/x/" + "long/" * 20 + "curves.png\n" in text  # one line, to be copied
    assert "  - python -m launch.generate [run]\n" in text
    assert "\x1b" not in text


def test_names():
    assert family_of("eval/family/Sino-Tibetan/loss") == "Sino-Tibetan"
    assert family_of("eval/language/de/loss") is None
    assert family_of("eval/loss") is None


def test_curves_are_in_order_of_steps_and_the_last_line_of_a_step_wins(tmp_path: Path):
    path = write(
        tmp_path / "metrics.jsonl",
        [
            {"step": 1, "time": 0.0, "train/loss": 3.0},
            {"step": 2, "time": 0.0, "train/loss": 2.0},
            {"step": 0, "time": 0.0, "eval/loss": 4.0},
            {"step": 2, "time": 0.0, "train/loss": None},
            {"step": 1, "time": 0.0, "train/loss": 3.5},
            {"step": 0, "time": 0.0, "train/loss": 9.0},
        ],
    )
    curves = read_curves(path)
    assert set(curves) == {"train/loss", "eval/loss"}
    steps, values = curves["train/loss"]
    assert steps == [0, 1, 2] and values[:2] == [9.0, 3.5] and math.isnan(values[2])


@pytest.mark.parametrize(("families", "steps"), [(0, 0), (1, 3), (18, 120)])
def test_png_shows_a_curve_for_each_family(tmp_path: Path, families: int, steps: int):
    records: list[dict[str, Any]] = []
    for step in range(steps + 1):
        if step % 40 == 0 and families:
            losses = {f"eval/family/F{i}/loss": 9 - i / 9 - step / 50 for i in range(families)}
            records.append({"step": step, "eval/loss": 8.0, **losses})
        if step:
            records.append({"step": step, "train/loss": 9.0 - step / 50})
    path = write(tmp_path / "metrics.jsonl", records)
    png = plot_curves(path, tmp_path / "plots" / "curves.png")
    image = matplotlib.image.imread(png)  # [height, width, RGBA]
    assert image.shape[0] >= 500 and image.shape[1] >= 1300
    right = image[::2, image.shape[1] // 2 :: 2, :3]  # the panel of the families
    coloured = {tuple(p) for p in (right * 255).astype(int).reshape(-1, 3).tolist()}
    saturated = [c for c in coloured if max(c) - min(c) > 90]
    if families == 0:
        assert not saturated
    else:
        assert len(saturated) > families


def test_a_run_that_wrote_nothing_can_be_drawn(tmp_path: Path):
    assert plot_curves(write(tmp_path / "m.jsonl", []), tmp_path / "m.png").stat().st_size > 1000

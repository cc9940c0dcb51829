"""The report page: what it shows, that it needs no network, and that a browser draws it."""

import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from data.ledger import Ledger
from launch.report import main
from pretrain.html_report import matching, render, short_names, thin, write_html_report
from pretrain.metrics import Section, charts
from pretrain.report import Curve

FAMILIES = ["germanic", "indic", "sino-tibetan", "<b>odd & named</b>"]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "a run"
    folder.mkdir()
    lines = []
    for step in range(1, 41):
        record: dict[str, float | None] = {"step": step, "time": 1e9 + step}
        record |= {"train/loss": None if step == 7 else 9 - 0.1 * step, "train/grad_norm": 1.5}
        record |= {"train/learning_rate": 1e-3, "router/layer_02/entropy": 1.0}
        record |= {"router/layer_04/entropy": 1.1, "train/consumed_tokens": 1024.0 * step}
        if step % 10 == 0:
            record |= {f"eval/family/{f}/loss": 9 - 0.1 * step for f in FAMILIES}
        lines.append(json.dumps(record))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    load = [[[1, 2, 3, 0], [0, 0, 0, 0], [4, 4, 4, 4], [9, 0, 0, 0]]] * 2
    table = {"step": 40, "first_step": 1, "layers": [2, 4], "families": FAMILIES, "load": load}
    (folder / "router.jsonl").write_text(json.dumps(table) + "\n")
    event = {"time": 1e9, "kind": "save_failed", "step": 12, "text": "</script> disk full"}
    (folder / "events.jsonl").write_text(json.dumps(event) + '\n{"kind": "cut o')
    Ledger(folder).write("skip", step=30, consumed_sequences=240, why="spike")
    (folder / "status.json").write_text(json.dumps({"state": "stopped", "step": 40}))
    return folder


def test_every_part_of_a_run_is_on_the_page(run_dir: Path) -> None:
    page = render(run_dir)
    for words in (
        "Validation loss by family",
        "sino-tibetan",
        "Layer 4: experts that each family is sent to",
        "disk full",
        "save_failed",
        "spike",
        "stopped, step 40",
        "40,960",  # tokens seen
    ):
        assert words in page, words


def test_texts_cannot_break_out_of_the_page(run_dir: Path) -> None:
    page = render(run_dir)
    assert "<b>odd" not in page
    assert "</script> disk" not in page


def test_nothing_is_fetched(run_dir: Path) -> None:
    page = re.sub(r"<script>.*?</script>", "", render(run_dir), flags=re.DOTALL)
    assert not re.findall(r"""(?:src|href)=["'](?!\#|data:)""", page)
    assert "@import" not in page
    assert "url(" not in page


def test_a_page_is_whole_or_absent(run_dir: Path, tmp_path: Path) -> None:
    page = write_html_report(run_dir, tmp_path / "new" / "page.html")
    assert page.read_text().endswith("</html>")
    assert [path.name for path in page.parent.iterdir()] == ["page.html"]


def test_a_folder_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"holds no metrics\.jsonl; name the folder of a run"
    ):
        write_html_report(tmp_path)
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_page_may_be_named_by_its_folder(run_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pages"
    folder.mkdir()
    assert main([str(run_dir), "--out", str(folder)]) == 0
    assert [path.name for path in folder.iterdir()] == ["report.html"]


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    assert main([str(tmp_path)]) == 0
    assert "None recorded." in (tmp_path / "report.html").read_text()


def test_thinning_keeps_ends_spikes_and_holes() -> None:
    steps = list(range(20_000))
    values = [1.0] * 20_000
    values[777], values[5000], values[12_345] = 50.0, math.nan, -3.0
    kept = dict(zip(*thin((steps, values), most=1000), strict=True))
    assert len(kept) <= 1010
    assert kept[0] == kept[19_999] == 1.0
    assert kept[777] == 50.0
    assert kept[12_345] == -3.0
    assert math.isnan(kept[5000])
    assert thin((steps[:10], values[:10]), most=1000) == (steps[:10], values[:10])


def test_names_of_curves() -> None:
    assert short_names(["train/loss"]) == ["loss"]
    assert short_names(["eval/family/a/loss", "eval/family/b/loss"]) == ["a", "b"]
    assert short_names(["router/entropy", "router/layer_02/entropy"]) == ["entropy", "layer_02"]


def test_curves_of_a_chart_come_in_the_order_they_end() -> None:
    curves: dict[str, Curve] = {
        "eval/family/low/loss": ([1, 2], [5.0, 1.0]),
        "eval/family/high/loss": ([1, 2], [4.0, math.nan]),
        "eval/loss": ([1], [9.0]),
    }
    drawn = [list(matching(chart, curves)) for chart in charts(Section.languages)]
    assert [names for names in drawn if names] == [["high", "low"]]


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium (Debian: chromium)")
def test_a_browser_draws_it(run_dir: Path, tmp_path: Path) -> None:
    """Real Chromium: every figure becomes a drawing, and the picture is not empty."""
    page = write_html_report(run_dir)
    figures = len(re.findall(r"class='figure", page.read_text()))
    options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run"
    options += " --disable-background-networking --disable-component-update --disable-sync"
    command = ["chromium", *options.split(), "--virtual-time-budget=10000"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,2400"]
    picture = tmp_path / "page.png"

    def browse(*more: str) -> str:
        done = subprocess.run(
            [*command, *more, page.as_uri()], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    drawn = browse("--dump-dom")
    assert figures >= 6
    assert len(re.findall(r"class=\"figure[^\"]* js-plotly-plot", drawn)) == figures
    assert drawn.count('class="heatmaplayer') >= 2
    browse(f"--screenshot={picture}")
    from matplotlib.image import imread

    pixels = imread(picture)
    colours = {tuple(pixel) for row in pixels[::7, ::7, :3] for pixel in row.round(2).tolist()}
    assert len(colours) > 50  # curves and heat maps, not a blank page

"""The dashboard as code: its specification, what wandb-workspaces refuses, and errors."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch import dashboard
from pretrain.metrics import METRICS, Section, charts, find
from tests.pretrain.laws import a_law

ROOT = Path(__file__).resolve().parents[2]
SNAPSHOT = Path(__file__).with_name("dashboard.json")


@pytest.fixture(scope="module")
def reports() -> Any:
    return pytest.importorskip("wandb_workspaces.reports.v2")


@pytest.fixture(scope="module")
def built(reports: Any) -> Any:
    return dashboard.workspace("entity", "magnetron", "Pretraining")


def sections(spec: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = spec["spec"]["section"]["panelBankConfig"]["sections"]
    return found


def test_specification_is_the_one_we_know(built: Any) -> None:
    """After a change of the table: python -m launch.dashboard --print > tests/launch/dashboard.json
    and look at the difference."""
    assert dashboard.specification(built) == json.loads(SNAPSHOT.read_text())


def test_every_metric_is_on_the_dashboard_once() -> None:
    spec = json.loads(SNAPSHOT.read_text())
    drawn: list[str] = []
    for section in sections(spec):
        for panel in section["panels"]:
            config = panel["config"]
            pattern = config.get("metricRegex")
            assert bool(pattern) != bool(config["metrics"])
            assert config["xAxis"] in ("step", "train/consumed_tokens")
            names = [
                metric.name for metric in METRICS if pattern and re.search(pattern, metric.name)
            ]
            drawn += names or config["metrics"]
    assert sorted(drawn) == sorted(metric.name for metric in METRICS)
    titles = [section["name"] for section in sections(spec)]
    wanted = "Loss, Languages and families, Mixture, Optimizer, Throughput, Routing, Health"
    assert ", ".join(titles) == wanted


def test_what_is_no_chart_is_refused_before_anything_is_sent(reports: Any) -> None:
    chart = charts(Section.loss)[0]
    assert dashboard.panel(chart, reports).y == ["train/loss"]
    for wrong in ({"smoothing_type": "sideways"}, {"log_y": "maybe"}, {"colour": "red"}):
        with pytest.raises(Exception, match=r"validation error|unexpected keyword"):
            reports.LinePlot(y=["train/loss"], **wrong)


def start(*arguments: str, code: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    script = (
        f"{code}\nimport sys\nfrom launch.dashboard import main\nsys.exit(main({[*arguments]!r}))"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**clean, "NETRC": "/nowhere", "HOME": "/nowhere", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_machine_without_the_package_says_what_to_install() -> None:
    done = start("--print", code="import sys; sys.modules['wandb_workspaces'] = None")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: the dashboard is built with the package wandb-workspaces")
    assert "magnetron[dashboard]" in done.stderr


def test_saving_without_a_key_is_one_clear_error(reports: Any) -> None:
    done = start("--entity", "team", WANDB_BASE_URL="http://127.0.0.1:9")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: the dashboard was not saved (") and "WANDB_API_KEY" in last
    assert "Traceback" not in done.stderr


def test_saving_needs_an_entity(reports: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert dashboard.main(["--project", "p"]) == 1
    assert "--entity is missing" in capsys.readouterr().err


def test_families_of_a_law_get_charts_of_their_own(
    reports: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a_law(["slavic", "sino-tibetan"]).save(tmp_path / "law.yaml")
    assert dashboard.main(["--print", "--law", str(tmp_path / "law.yaml")]) == 0
    spec = json.loads(capsys.readouterr().out)
    assert [section["name"] for section in sections(spec)][:3] == [
        "Loss",
        "Measured and predicted",
        "Languages and families",
    ]
    panels = [panel["config"] for panel in sections(spec)[1]["panels"]]
    assert [panel["chartTitle"] for panel in panels] == [
        "slavic: measured and predicted loss",
        "sino-tibetan: measured and predicted loss",
    ]
    names = ("loss", "predicted_loss", "predicted_low", "predicted_high")
    assert panels[1]["metrics"] == [f"eval/family/sino-tibetan/{name}" for name in names]
    assert all(find(name) for name in panels[1]["metrics"])
    assert dashboard.main(["--print", "--law", str(tmp_path / "none.yaml")]) == 1
    assert capsys.readouterr().err.startswith(
        f"error: --law {tmp_path}/none.yaml: there is no such"
    )

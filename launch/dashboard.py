"""The W&B dashboard of a project: one workspace with a section and charts for every metric group.

    python -m launch.dashboard --entity my-team --project magnetron  # saves it
    python -m launch.dashboard --print                                # its specification, offline
    python -m launch.dashboard ... --law sweep/law.yaml    # and a chart for each family of a law

Built from the table in pretrain/metrics.py by wandb-workspaces (an optional package:
magnetron[dashboard]), which checks every chart before anything is sent. Saving needs a W&B key.
Imports neither torch nor megatron-core.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from data.interrupted import say_interrupted
from pretrain.config import WandbConfig
from pretrain.metrics import Axis, Chart, Section, charts

# sections a team looks at first are open, the others a click away
_OPEN = (Section.loss, Section.languages, Section.throughput, Section.health)
_COLUMNS, _ROWS = 3, 2  # charts of a section that are seen without scrolling


class DashboardError(Exception):
    """The dashboard cannot be built or saved; the message says what to do."""


def workspace(entity: str, project: str, name: str, families: Sequence[str] = ()) -> Any:
    """The dashboard as wandb-workspaces' Workspace; nothing is sent.

    families: those of a scaling law; each gets a chart of measured and predicted loss.

    Raises DashboardError without that package.
    """
    workspaces, reports = _packages()

    def section(title: str, panels: list[Any], is_open: bool) -> Any:
        layout = workspaces.SectionLayoutSettings(columns=_COLUMNS, rows=_ROWS)
        return workspaces.Section(
            name=title, panels=panels, is_open=is_open, layout_settings=layout
        )

    sections = [
        section(part.value, [panel(chart, reports) for chart in charts(part)], part in _OPEN)
        for part in Section
    ]
    if families:
        panels = [prediction_panel(family, reports) for family in families]
        sections.insert(1, section("Measured and predicted", panels, is_open=True))
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=sections,
        settings=workspaces.WorkspaceSettings(x_axis="step"),
    )


def panel(chart: Chart, reports: Any) -> Any:
    """One line plot; a chart of a name with <...> finds its curves by a regular expression."""
    units = list(dict.fromkeys(metric.unit for metric in chart.metrics))
    settings = {
        "title": chart.title,
        "x": chart.axis.value,
        "title_y": ", ".join(filter(None, units)),
    }
    if any(metric.is_pattern for metric in chart.metrics):
        pattern = "|".join(metric.pattern for metric in chart.metrics)
        return reports.LinePlot(metric_regex=pattern, **settings)
    return reports.LinePlot(y=[metric.name for metric in chart.metrics], **settings)


def prediction_panel(family: str, reports: Any) -> Any:
    """Measured and predicted validation loss of one family, and the interval's two ends."""
    names = ("loss", "predicted_loss", "predicted_low", "predicted_high")
    return reports.LinePlot(
        title=f"{family}: measured and predicted loss",
        x=Axis.tokens.value,
        y=[f"eval/family/{family}/{name}" for name in names],
        title_y="nats per token",
    )


def specification(built: Any) -> dict[str, Any]:
    """What W&B would be sent, as plain values, without the random ids of panels.

    By a private call: wandb-workspaces has no public one that needs no server.
    """
    sent: dict[str, Any] = _without_ids(
        built._to_model().model_dump(by_alias=True, mode="json", exclude_none=True)
    )
    return sent


def _without_ids(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_ids(v) for k, v in value.items() if k not in ("id", "__id__")}
    return [_without_ids(item) for item in value] if isinstance(value, list) else value


def save(built: Any) -> str:
    """Create the view at W&B; returns its address. Raises DashboardError where that fails."""
    try:
        return str(built.save().url)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise DashboardError(
            f"the dashboard was not saved ({type(error).__name__}: {reason}). Saving needs the "
            "network and a key: set WANDB_API_KEY or run `wandb login`, and WANDB_BASE_URL for a "
            "server of your own; --print shows the dashboard without either"
        ) from error


def _families_of(law: str) -> list[str]:
    from data.scaling_law.law import ScalingLaw

    try:
        return list(ScalingLaw.load(law).families)
    except (OSError, ValueError) as error:
        raise DashboardError(f"--law {error}") from None


def _packages() -> tuple[Any, Any]:
    try:
        reports = import_module("wandb_workspaces.reports.v2")
        workspaces = import_module("wandb_workspaces.workspaces")
    except ImportError as error:
        raise DashboardError(
            f"the dashboard is built with the package wandb-workspaces ({error}); install "
            "magnetron[dashboard]"
        ) from error
    return workspaces, reports


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launch.dashboard",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    defaults = WandbConfig()
    parser.add_argument("--entity", default=os.environ.get("WANDB_ENTITY", ""), help="W&B team")
    parser.add_argument("--project", default=defaults.project)
    parser.add_argument("--name", default="Pretraining", help="of the dashboard")
    parser.add_argument("--law", metavar="FILE", help="chart the families of this scaling law")
    parser.add_argument("--print", action="store_true", help="write the JSON specification only")
    given = parser.parse_args(arguments)
    try:
        families = _families_of(given.law) if given.law else []
        built = workspace(given.entity or "entity", given.project, given.name, families)
        if given.print:
            print(json.dumps(specification(built), indent=2))
            return 0
        if not given.entity:
            raise DashboardError("--entity is missing: the W&B team or user that has the project")
        print(save(built))
    except DashboardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    say_interrupted()
    sys.exit(main())

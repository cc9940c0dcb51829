"""Figures of measured losses beside what a scaling law predicts, one a family.

Plain values, as plotly takes them; `pretrain.html_report` draws them. Imports neither torch nor
megatron-core.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pretrain.predicted_losses import LEVEL, EndPoint, predicted_families
from pretrain.report import Curve

Figure = tuple[list[dict[str, Any]], dict[str, Any]]  # traces, layout

_MEASURED, _LAW, _BAND = "#1f5fa8", "#c05a12", "rgba(224,138,60,0.25)"


def prediction_figures(curves: Mapping[str, Curve], end: EndPoint | None) -> list[Figure]:
    """A figure for each family with a prediction: measured loss, predicted one and its interval
    against the step; and where the run should end."""
    return [_figure(family, curves, end) for family in predicted_families(curves)]


def _figure(family: str, curves: Mapping[str, Curve], end: EndPoint | None) -> Figure:
    def line(metric: str, name: str, **look: Any) -> dict[str, Any]:
        steps, values = curves.get(f"eval/family/{family}/{metric}", ([], []))
        shown = [value if math.isfinite(value) else None for value in values]
        return {"type": "scatter", "mode": "lines", "name": name, "x": steps, "y": shown, **look}

    interval = f"{100 * LEVEL:.0f} % interval of the law"
    hidden = {"line": {"width": 0}, "hoverinfo": "skip"}
    traces = [
        line("predicted_low", "", showlegend=False, **hidden),
        # fills the space down to the line before it
        line("predicted_high", interval, fill="tonexty", fillcolor=_BAND, **hidden),
        line("predicted_loss", "predicted", line={"color": _LAW, "dash": "dash"}),
        line("loss", "measured", line={"color": _MEASURED}) | {"mode": "lines+markers"},
    ]
    aim = end.families.get(family) if end else None
    if end and aim:
        error = {"array": [aim.high - aim.loss], "arrayminus": [aim.loss - aim.low]}
        point = {"x": [end.step], "y": [aim.loss], "error_y": {"type": "data", **error}}
        look = {"mode": "markers", "marker": {"color": _LAW, "symbol": "diamond", "size": 9}}
        traces.append({"type": "scatter", "name": "predicted end", **point, **look})
    bounds = _bounds(traces[3]["y"], [aim.low, aim.high] if aim else [])
    layout = {
        "title": {"text": f"{family}: measured and predicted loss"},
        "xaxis": {"title": {"text": "optimizer step"}},
        "yaxis": {"title": {"text": "nats per token"}, **bounds},
        "showlegend": True,
    }
    return traces, layout


def _bounds(measured: Sequence[float | None], aim: Sequence[float]) -> dict[str, Any]:
    """What is seen at first: the law is far above at the first tokens, and would hide the rest."""
    values = [*(value for value in measured if value is not None), *aim]
    if not values:
        return {}
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.1
    return {"range": [low - margin, high + margin]}

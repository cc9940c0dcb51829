"""A run as one HTML page that needs no network: the offline twin of a W&B dashboard.

Reads what the run itself wrote (metrics.jsonl, router.jsonl, events.jsonl, data_ledger.jsonl,
run.json, status.json), so it works during a run, after a crash, and on a copied folder. Charts are
drawn by plotly's library, which is part of the page (4.5 MB): zoom, hover, click a name to hide it.

Imports neither torch nor megatron-core; plotly only when called.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from data.ledger import LEDGER_NAME, read_ledger
from data.run_folders import runs_below
from pretrain.metrics import PREDICTED, Chart, Section, charts, find
from pretrain.metrics_file import METRICS_FILE
from pretrain.predicted_losses import read_prediction
from pretrain.prediction_figures import prediction_figures
from pretrain.report import Curve, read_curves
from pretrain.router_plot import evenly_spaced, last_table, relative_shares

# A curve is thinned to about so many points: a browser draws thirty of them at once in a second.
MOST_POINTS = 1500
# Newest events shown; all of them stay in the run folder.
MOST_EVENTS = 200
# Layers whose experts are drawn against families: evenly spaced ones, the first and the last.
MOST_LAYERS = 4
# Axes are logarithmic where values differ by more than this factor.
WIDE_SPREAD = 300.0


def write_html_report(run_dir: str | Path, page: str | Path | None = None) -> Path:
    """Write the page (default: run_dir/report.html) and return its path.

    Raises FileNotFoundError where the folder holds no metrics.jsonl.
    """
    run_dir = Path(run_dir)
    if not (run_dir / METRICS_FILE).is_file():
        raise FileNotFoundError(
            f"{run_dir} holds no {METRICS_FILE}"
            + (runs_below(run_dir) or "; name the folder of a run (its run_dir)")
        )
    page = run_dir / "report.html" if page is None else Path(page)
    page.parent.mkdir(parents=True, exist_ok=True)
    partial = page.with_name(page.name + ".partial")
    partial.write_text(render(run_dir), encoding="utf-8")
    os.replace(partial, page)
    return page


def render(run_dir: Path) -> str:
    """The page as text."""
    from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

    curves = read_curves(run_dir / METRICS_FILE)
    parts = {"Overview": _overview(run_dir, curves)}
    for section in Section:
        drawn = []
        for chart in charts(section):
            if chart.title == PREDICTED:
                figures = prediction_figures(curves, read_prediction(run_dir))
                drawn += [_figure(traces, layout) for traces, layout in figures]
            elif found := matching(chart, curves):
                drawn.append(_chart(chart, found))
        if section is Section.routing:
            drawn = [*_expert_heat_maps(run_dir), *drawn]
        if drawn:
            parts[section.value] = "".join(drawn)
    parts["Events"] = _events(run_dir)
    anchors = {title: title.lower().replace(" ", "-") for title in parts}
    contents = "".join(f'<a href="#{anchor}">{title}</a>' for title, anchor in anchors.items())
    sections = "".join(
        f'<section id="{anchors[title]}"><h2>{title}</h2><div class="grid">{inside}</div></section>'
        for title, inside in parts.items()
    )
    name = escape(run_dir.resolve().name)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f'<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
        f"<style>{_STYLE}</style><script>{get_plotlyjs()}</script><script>{_SCRIPT}</script></head>"
        f"<body><header><h1>{name}</h1><nav>{contents}</nav></header>"
        f"<main>{sections}</main></body></html>"
    )


def thin(curve: Curve, most: int = MOST_POINTS) -> Curve:
    """At most about `most` points: of each stretch its lowest and its highest, so that no spike is
    lost, and the first and the last."""
    steps, values = curve
    if len(steps) <= most:
        return curve
    size = math.ceil(2 * len(steps) / most)
    kept = {0, len(steps) - 1}
    for start in range(0, len(steps), size):
        stretch = range(start, min(start + size, len(steps)))
        finite = [i for i in stretch if math.isfinite(values[i])]
        if finite:
            kept |= {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}
        if len(finite) < len(stretch):  # a hole in the curve stays one
            kept.add(next(i for i in stretch if not math.isfinite(values[i])))
    order = sorted(kept)
    return [steps[i] for i in order], [values[i] for i in order]


def matching(chart: Chart, curves: dict[str, Curve]) -> dict[str, Curve]:
    """The chart's curves by the part of their names that tells them apart, the highest end first.

    A name belongs to the most specific metric that it fits.
    """
    found = {name: curve for name, curve in curves.items() if find(name) in chart.metrics}

    def last(name: str) -> float:
        return next((v for v in reversed(found[name][1]) if math.isfinite(v)), -math.inf)

    ordered = sorted(found, key=last, reverse=True)
    return dict(zip(short_names(ordered), (found[name] for name in ordered), strict=True))


def short_names(names: Sequence[str]) -> list[str]:
    """Names without the leading and trailing parts that all of them share."""
    if len(names) < 2:
        return [name.rsplit("/", 1)[-1] for name in names]
    parts = [name.split("/") for name in names]
    shortest = min(map(len, parts))
    start = 0
    while start < shortest and len({part[start] for part in parts}) == 1:
        start += 1
    end = 0
    while end < shortest - start and len({part[-1 - end] for part in parts}) == 1:
        end += 1
    return ["/".join(part[start : len(part) - end]) or part[-1] for part in parts]


def _chart(chart: Chart, curves: dict[str, Curve]) -> str:
    unit = next((metric.unit for metric in chart.metrics if metric.unit), "")
    traces = []
    for place, (name, curve) in enumerate(curves.items()):
        steps, values = thin(curve)
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if len(steps) < 60 else "lines",
                "name": name,
                "line": {"dash": _DASHES[place // _COLOURS % len(_DASHES)]},
                "x": steps,
                "y": [value if math.isfinite(value) else None for value in values],
            }
        )
    layout = {
        "title": {"text": chart.title},
        "xaxis": {"title": {"text": "optimizer step"}},
        "yaxis": {
            "title": {"text": unit},
            "type": "log" if _spread(curves) > WIDE_SPREAD else "linear",
        },
        "showlegend": len(traces) > 1,
    }
    return _figure(traces, layout, wide=len(traces) > 12)


def _expert_heat_maps(run_dir: Path) -> list[str]:
    """Experts x language families, one map a layer: which expert serves whom."""
    table = last_table(run_dir / "router.jsonl")
    if table is None:
        return []
    figures = []
    for place in evenly_spaced(len(table["layers"]), MOST_LAYERS):
        shares = relative_shares(table["load"][place])
        traces = [
            {
                "type": "heatmap",
                "z": [[v if math.isfinite(v) else None for v in row] for row in shares],
                "x": [f"expert {expert}" for expert in range(len(shares[0]))],
                "y": table["families"],
                "colorscale": "RdBu",
                "reversescale": True,
                "zmin": -2,
                "zmax": 2,
                "colorbar": {"tickvals": [-2, -1, 0, 1, 2], "ticktext": _OCTAVES},
            }
        ]
        text = f"Layer {table['layers'][place]}: experts that each family is sent to"
        about = f"choices in steps {table['first_step']} to {table['step']}"
        layout = {
            "title": {"text": text, "subtitle": {"text": about}},
            "yaxis": {"automargin": True},
        }
        figures.append(_figure(traces, layout, tall=len(table["families"]) > 14))
    return figures


def _figure(
    traces: list[dict[str, Any]], layout: dict[str, Any], wide: bool = False, tall: bool = False
) -> str:
    kind = "figure" + (" wide" if wide else "") + (" tall" if tall else "")
    return f"<div class='{kind}'><script>draw({_json(traces)},{_json(layout)})</script></div>"


def _json(value: Any) -> str:
    """JSON that may stand inside a <script>: nothing in it can end the element."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")


def _spread(curves: dict[str, Curve]) -> float:
    """Largest over smallest value; 0 where a logarithm would not do."""
    values = [v for _, curve in curves.values() for v in curve if math.isfinite(v)]
    return max(values) / min(values) if values and min(values) > 0 else 0.0


def _overview(run_dir: Path, curves: dict[str, Curve]) -> str:
    status = _read_json(run_dir / "status.json")
    record = _read_json(run_dir / "run.json")
    rows: list[tuple[str, str]] = []
    state, step, steps = (status.get(key) for key in ("state", "step", "train_steps"))
    if state:
        rows.append(("state", f"{state}, step {step} of {steps}"))
        if status.get("reason"):
            rows.append(("reason", str(status["reason"])))
    for label, name, form in _LAST_VALUES:
        if name in curves and math.isfinite(value := curves[name][1][-1]):
            rows.append((label, form.format(value)))
    layout = record.get("layout") or {}
    rows += [(key.replace("_", " "), str(value)) for key, value in layout.items()]
    for key in ("command", "git", "started", "created"):
        if record.get(key):
            rows.append((key, _plain(record[key])))
    rows.append(("page written", datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")))
    cells = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in rows)
    return f"<table class='facts'>{cells}</table>"


_OCTAVES = ["1/4 and less", "1/2", "even share", "x 2", "x 4 and more"]
_DASHES = ("solid", "dash", "dot", "dashdot")
_COLOURS = 10  # of plotly's cycle
_LAST_VALUES = (
    ("training loss", "train/loss", "{:.4f}"),
    ("validation loss", "eval/loss", "{:.4f}"),
    ("tokens seen", "train/consumed_tokens", "{:,.0f}"),
    ("tokens per second", "throughput/tokens_per_second", "{:,.0f}"),
)


def _events(run_dir: Path) -> str:
    """What happened besides steps: events.jsonl and the ledger, the newest first."""
    rows = sorted(_event_rows(run_dir), key=lambda row: (row[1], row[0]), reverse=True)
    if not rows:
        return "<p>None recorded.</p>"
    more = f"<p>The newest {MOST_EVENTS} of {len(rows)}.</p>" if len(rows) > MOST_EVENTS else ""
    body = "".join(
        f"<tr><td>{escape(time)}</td><td>{step}</td><td>{escape(kind)}</td>"
        f"<td>{escape(text)}</td></tr>"
        for time, step, kind, text in rows[:MOST_EVENTS]
    )
    head = "<tr><th>time</th><th>step</th><th>event</th><th></th></tr>"
    return f"{more}<table class='events'>{head}{body}</table>"


def _event_rows(run_dir: Path) -> Iterator[tuple[str, int, str, str]]:
    for event in _read_lines(run_dir / "events.jsonl"):
        yield _time(event.get("time")), int(event.get("step") or 0), event["kind"], event["text"]
    if not (run_dir / LEDGER_NAME).is_file():
        return
    for entry in read_ledger(run_dir):
        known = {"event", "step", "consumed_sequences", "time"}
        more = ", ".join(f"{k}: {_plain(v)}" for k, v in entry.items() if k not in known)
        yield _time(entry.get("time")), entry["step"], f"data: {entry['event']}", more


def _time(value: Any) -> str:
    if isinstance(value, int | float):
        return datetime.fromtimestamp(value, UTC).isoformat(timespec="seconds")
    return str(value or "")


def _plain(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 300 else text[:297] + "..."


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}  # an older run, or one that is just beginning
    return value if isinstance(value, dict) else {}


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            continue  # cut off by a crash
        if isinstance(value, dict) and {"kind", "text"} <= value.keys():
            yield value


_STYLE = """
body{margin:0;font:15px/1.45 system-ui,sans-serif;color:#1c2430;background:#f6f7f9}
header{position:sticky;top:0;z-index:9;display:flex;gap:2em;align-items:baseline;flex-wrap:wrap;
padding:.5em 1.5em;background:#fff;border-bottom:1px solid #dde2e8}
h1{font-size:1.15em;margin:0}h2{font-size:1.05em;margin:1.6em 0 .5em}nav a{margin-right:1.2em;
color:#1f5fa8;text-decoration:none}main{padding:0 1.5em 3em;max-width:1900px;margin:auto}
section{scroll-margin-top:3em}.grid{display:grid;gap:12px;
grid-template-columns:repeat(auto-fill,minmax(min(100%,520px),1fr))}
.figure{background:#fff;border:1px solid #dde2e8;border-radius:6px;height:360px;min-width:0}
.wide{grid-column:1/-1;height:460px}.tall{height:560px}
table{background:#fff;border:1px solid #dde2e8;border-collapse:collapse;font-size:.92em}
td,th{padding:.25em .8em;text-align:left;vertical-align:top;border-bottom:1px solid #eef1f4}
th{font-weight:600;white-space:nowrap}.events{grid-column:1/-1}.events td:last-child{width:70%}
td{font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
"""

_SCRIPT = """
function draw(traces, layout) {
  const div = document.currentScript.parentElement;
  const look = {margin: {l: 70, r: 20, t: 60, b: 50}, hovermode: 'closest',
    font: {family: 'system-ui,sans-serif', size: 12}, paper_bgcolor: '#fff', plot_bgcolor: '#fff'};
  Plotly.newPlot(div, traces, Object.assign(look, layout), {responsive: true, displaylogo: false});
}
"""

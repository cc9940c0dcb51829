"""The figure of benchmarks/mixture_study.py."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.mixture_numbers import MixtureResult, Prediction, partner_effects
from data.scaling_law.law import ScalingLaw
from data.scaling_law.runs_table import RunsTable

COLOURS = ("#1f5fa8", "#c8552b", "#2a8a57", "#8a4fa3", "#a8871f", "#555555")
PAIR_RATIO = 0.4


def plot(
    tables: Mapping[str, RunsTable],
    law: ScalingLaw | None,
    compared: Sequence[MixtureResult],
    predicted: Sequence[Prediction],
    path: Path,
) -> None:
    """Six panels; those whose numbers are not there yet say so."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # a Figure with its own canvas: pyplot would keep global state and choose a display
    figure: Any = Figure(figsize=(17, 10), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(2, 3).flat)
    main = tables["main"]
    colour_of = dict(zip(main.families, COLOURS, strict=False))
    _ratios(panels[0], main, law, colour_of)
    _alone(panels[1], main, law, colour_of)
    _predicted(panels[2], predicted, colour_of)
    for axes, name in ((panels[3], "main"), (panels[4], "disjoint")):
        _partners(axes, name, tables.get(name))
    _mixtures(panels[5], compared)
    for axes in panels:
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _title(axes: Any, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10)
    axes.grid(alpha=0.25, linewidth=0.6)


def _absent(axes: Any) -> None:
    axes.text(0.5, 0.5, "not there yet", ha="center", va="center", transform=axes.transAxes)


def _ratios(
    axes: Any, table: RunsTable, law: ScalingLaw | None, colour_of: Mapping[str, str]
) -> None:
    sizes = Counter((row["num_parameters"], row["tokens"]) for row in table.rows)
    size = sizes.most_common(1)[0][0]
    _title(axes, f"Loss over own ratio, N = {size[0]:,}, D = {size[1]:,}")
    for family in table.families:
        rows = [
            row
            for row in table.of_family(family).rows
            if (row["num_parameters"], row["tokens"]) == size
            and row["ratio"] > 0
            and math.isfinite(row["loss"])
        ]
        x = np.array([row["ratio"] for row in rows])
        axes.scatter(
            x, [row["loss"] for row in rows], s=12, alpha=0.6, color=colour_of[family], label=family
        )
        if law is not None:
            line = np.geomspace(x.min(), 1, 50)
            axes.plot(line, law.families[family].loss(*size, line), color=colour_of[family], lw=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("ratio p", fontsize=9)
    axes.set_ylabel("validation loss, nats a token", fontsize=9)


def _alone(
    axes: Any, table: RunsTable, law: ScalingLaw | None, colour_of: Mapping[str, str]
) -> None:
    _title(axes, "One family alone: loss over tokens, a line for each N")
    alone = [r for r in table.rows if r["purpose"] == "single_family" and r["ratio"] > 0.99]
    markers = dict(zip(sorted({row["num_parameters"] for row in alone}), "os^Dv", strict=False))
    for row in alone:
        colour = colour_of[row["family"]]
        marker = markers[row["num_parameters"]]
        axes.plot(row["tokens"], row["loss"], marker, color=colour, markersize=5, alpha=0.8)
    if law is not None and alone:
        budgets = [row["tokens"] for row in alone]
        line = np.geomspace(min(budgets), max(budgets), 50)
        for family, one in law.families.items():
            for size in markers:
                axes.plot(line, one.single_family_loss(size, line), color=colour_of[family], lw=0.8)
    for size, marker in markers.items():
        axes.plot([], [], marker, color="0.4", label=f"N = {size:,}")
    axes.legend(fontsize=8, frameon=False)
    axes.set_xscale("log")
    axes.set_xlabel("tokens D", fontsize=9)


def _predicted(axes: Any, predicted: Sequence[Prediction], colour_of: Mapping[str, str]) -> None:
    _title(axes, "Losses the law was not fitted to")
    if not predicted:
        return _absent(axes)
    smallest = min(one.num_parameters for one in predicted)
    for one in predicted:
        axes.plot(
            one.predicted,
            one.measured,
            "o" if one.num_parameters == smallest else "s",
            color=colour_of[one.family],
            markersize=4,
            alpha=0.7,
        )
    ends = [f(getattr(o, k) for o in predicted for k in ("measured", "predicted"))
            for f in (min, max)]  # fmt: skip
    axes.plot(ends, ends, color="0.4", lw=0.8)
    axes.set_xlabel(f"predicted, nats a token (circle: N = {smallest:,}, square: larger)")
    axes.set_ylabel("measured", fontsize=9)


def _partners(axes: Any, name: str, table: RunsTable | None) -> None:
    axes.set_title(f"Corpus {name}: 100 ln L at {PAIR_RATIO}, by partner", loc="left", fontsize=10)
    if table is None:
        return _absent(axes)
    effects = partner_effects(table, PAIR_RATIO)
    names = list(effects)
    values = np.array([[100 * effects[f].get(g, math.nan) for g in names] for f in names])
    if not np.isfinite(values).any():
        return _absent(axes)
    reach = max(float(np.nanmax(np.abs(values))), 0.1)
    axes.imshow(values, cmap="RdBu_r", vmin=-reach, vmax=reach)
    for i, j in np.argwhere(np.isfinite(values)):
        axes.text(j, i, f"{values[i, j]:+.2f}", ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(names)), names, rotation=25, fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel("with as much of", fontsize=9)
    axes.set_ylabel("loss of", fontsize=9)


def _mixtures(axes: Any, compared: Sequence[MixtureResult]) -> None:
    _title(axes, "Normalised loss Σ L / L*, minus the uniform mixture's")
    if not compared:
        return _absent(axes)
    names = list(dict.fromkeys(result.mixture for result in compared))
    for place, size in enumerate(sorted({result.num_parameters for result in compared})):
        own = {r.mixture: r for r in compared if r.num_parameters == size}
        axes.errorbar(
            [names.index(name) + 0.15 * place for name in own],
            [result.against_uniform for result in own.values()],
            yerr=[result.against_uniform_std for result in own.values()],
            fmt="os^"[place],
            color="0.2",
            capsize=3,
            label=f"N = {size:,}",
        )
    axes.axhline(0, color="0.4", lw=0.8)
    axes.set_xticks(range(len(names)), names, rotation=15, fontsize=8)
    axes.legend(fontsize=8, frameon=False)

"""A comparison of mixtures (data/scaling_law/mixture_table.py) as a picture.

Imports neither torch nor megatron-core.
"""

from pathlib import Path
from typing import Any

import numpy as np

from data.plan import short
from data.scaling_law.mixture_table import MixtureTable

_OPTIMUM = "#1f77b4"
_OTHERS = ("#5f6368", "#d62728", "#ff7f0e", "#bc80bd", "#2ca02c", "#17becf", "#8c564b")
_MARKERS = "osD^vPX"
_CAP = "#d62728"


def plot_mixtures(table: MixtureTable, path: Path | str) -> Path:
    """Draws the table into a PNG; a row for each family, in the order of the table.

    From left to right: ratios, the optimum as bars with its interval over the bootstrap and the
    other mixtures as markers; losses above the optimum's, so that left of the line a family is
    better off; epochs on a logarithmic axis with the cap as a line, where sizes are known; and what
    the optimum gains over each mixture, with its interval.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    families = table.families
    y = np.arange(len(families), dtype=float)
    panels = 4 if table.mixtures[0].epochs is not None else 3
    height = max(3.4, 1.8 + 0.3 * len(families))
    # a Figure with its own canvas: pyplot would keep global state and choose a display
    figure = Figure(figsize=(3.6 * panels, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, *middle, right = figure.subplots(1, panels)
    _draw_ratios(left, table, y)
    _draw_losses(middle[0], table, y)
    if len(middle) > 1:
        _draw_epochs(middle[1], table, y)
    _draw_gains(right, table)
    left.set_yticks(y, families)
    for axes in middle:
        axes.set_yticks(y, [])
    for axes in (left, *middle):
        axes.set_ylim(len(families) - 0.4, -0.6)
    for axes in (left, *middle, right):
        axes.grid(axis="x", alpha=0.25, linewidth=0.6)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.set_axisbelow(True)
    figure.legend(
        *left.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(table.mixtures),
        frameon=False,
        fontsize=8,
    )
    figure.suptitle(
        f"{short(table.goal.num_parameters)} parameters, {short(table.goal.tokens)} tokens, "
        f"objective: {table.goal.objective.value}",
        fontsize=11,
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight")
    return path


def _draw_ratios(axes: Any, table: MixtureTable, y: np.ndarray) -> None:
    optimum, *others = table.mixtures
    ratios = np.array([100 * optimum.ratios[f] for f in table.families])
    axes.barh(y, ratios, height=0.7, color=_OPTIMUM, alpha=0.6, label=optimum.name)
    if table.ratio_intervals is not None:
        low, high = 100 * np.array([table.ratio_intervals[f] for f in table.families]).T
        axes.hlines(y, low, high, color="black", linewidth=1)
    for number, mixture in enumerate(others):
        values = [100 * mixture.ratios[f] for f in table.families]
        axes.scatter(values, y, label=mixture.name, **_marker(number))
    axes.set_xlim(left=0)
    axes.set_xlabel(f"ratio, % (line: {100 * table.level:g} % interval)")


def _draw_losses(axes: Any, table: MixtureTable, y: np.ndarray) -> None:
    optimum, *others = table.mixtures
    axes.axvline(0, color=_OPTIMUM, linewidth=1.5)
    for number, mixture in enumerate(others):
        above = [mixture.losses[f] - optimum.losses[f] for f in table.families]
        axes.scatter(above, y, **_marker(number))
    axes.set_xlabel("loss above the optimum's, nats")


def _draw_epochs(axes: Any, table: MixtureTable, y: np.ndarray) -> None:
    for number, mixture in enumerate(table.mixtures):
        assert mixture.epochs is not None
        values = [mixture.epochs[f] for f in table.families]
        marker = _marker(number - 1) if number else {"color": _OPTIMUM, "marker": "|", "s": 160}
        axes.scatter(values, y, **marker)
    if table.goal.max_epochs is not None:
        axes.axvline(table.goal.max_epochs, color=_CAP, linewidth=1, linestyle="--")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: short(value))
    axes.set_xlabel("epochs" + (" (dashed: cap)" if table.goal.max_epochs is not None else ""))


def _draw_gains(axes: Any, table: MixtureTable) -> None:
    others = table.mixtures[1:]
    places = np.arange(len(others), dtype=float)
    for number, (place, mixture) in enumerate(zip(places, others, strict=True)):
        axes.barh(place, mixture.gain, height=0.6, color=_marker(number)["color"], alpha=0.6)
        if mixture.gain_interval is not None:
            axes.hlines(place, *mixture.gain_interval, color="black", linewidth=1)
    axes.set_yticks(places, [mixture.name for mixture in others], fontsize=8)
    axes.set_ylim(len(others) - 0.4, -0.6)
    axes.set_xlabel("gain of the optimum in the objective")


def _marker(number: int) -> dict[str, Any]:
    return {
        "color": _OTHERS[number % len(_OTHERS)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "s": 26,
        "zorder": 3,
    }

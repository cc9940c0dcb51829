"""A plan (data/plan.py) as a picture: text there is and text drawn, epochs, shares.

Imports neither torch nor megatron-core.
"""

from pathlib import Path
from typing import Any

import numpy as np

from data.plan import Plan, PlanRow, short

_AVAILABLE, _PLANNED, _CAP, _BROKEN = "#9aa0a6", "#1f77b4", "#d62728", "#d62728"


def plot_plan(plan: Plan, path: Path | str) -> Path:
    """Draws the plan into a PNG; a row for each language, in the order of the table.

    Left, tokens on a logarithmic axis: available (grey) and planned (blue), with a line between.
    Middle, epochs on a logarithmic axis, with the cap as a red tick; a bar beyond its cap is red.
    Right, shares of the samples: realised as bars, asked for as black ticks; a third hollow marker
    shows the share of the available tokens, i.e. what sampling in proportion would give.
    Below, only where the ratios change on the way: the shares of the families along the run.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = _Rows(plan)
    height = max(3.2, 1.7 + 0.17 * rows.end)
    below = 3.2 if plan.course else 0.0
    # a Figure with its own canvas: pyplot would keep global state and choose a display
    figure = Figure(figsize=(13, height + below), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        2 if below else 1,
        3,
        width_ratios=(1.1, 1, 1),
        height_ratios=(height, below) if below else None,
    )
    left = figure.add_subplot(grid[0, 0])
    middle = figure.add_subplot(grid[0, 1], sharey=left)
    right = figure.add_subplot(grid[0, 2], sharey=left)
    for axes in (middle, right):
        axes.tick_params(labelleft=False)
    if below:
        _draw_course(figure.add_subplot(grid[1, :]), plan)
    _draw_tokens(left, rows)
    _draw_epochs(middle, rows)
    _draw_shares(right, rows)
    for axes in (left, middle):
        _mark_powers_of_ten(axes)
    left.set_ylim(rows.end - 0.2, -1)
    left.set_yticks(rows.y, rows.labels, fontsize=7.5)
    for axes in (left, middle, right):
        _draw_families(axes, rows, named=axes is left)
    tokens = short(plan.samples * plan.seq_length)
    figure.suptitle(
        f"{tokens} tokens in {plan.samples:,} samples of {plan.seq_length:,}"
        + ("" if plan.ok else " — a cap is broken or the data ends early"),
        fontsize=11,
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight")
    return path


class _Rows:
    """The languages and their places from top to bottom, with a gap between families."""

    def __init__(self, plan: Plan) -> None:
        self.languages: list[PlanRow] = []
        self.families: list[tuple[str, float, float]] = []  # name, first and last place
        places: list[float] = []
        self.end = 0.0
        for family in plan.families:
            members = plan.languages_of(family.family)
            self.families.append((family.family, self.end, self.end + len(members) - 1))
            places += [self.end + i for i in range(len(members))]
            self.languages += members
            self.end += len(members) + 0.6
        self.y = np.array(places)
        self.labels = [row.language for row in self.languages]
        self.available = np.array([row.tokens for row in self.languages], float)


def _draw_tokens(axes: Any, rows: _Rows) -> None:
    available, y = rows.available, rows.y
    planned = np.array([row.planned_tokens for row in rows.languages], float)
    drawn = planned > 0
    for row in np.flatnonzero(drawn):
        axes.plot([available[row], planned[row]], [y[row]] * 2, color="#d0d3d6", lw=1.2, zorder=1)
    axes.scatter(available, y, s=22, color=_AVAILABLE, label="available", zorder=2)
    axes.scatter(planned[drawn], y[drawn], s=22, color=_PLANNED, label="planned", zorder=3)
    axes.set_xscale("log")
    axes.set_xlabel("tokens")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)


def _draw_epochs(axes: Any, rows: _Rows) -> None:
    y = rows.y
    epochs = np.array([row.epochs for row in rows.languages])
    colours = [_BROKEN if row.broken else _PLANNED for row in rows.languages]
    capped = [(row.max_epochs, y[i]) for i, row in enumerate(rows.languages) if row.max_epochs]
    smallest = min([*epochs[epochs > 0], *(cap for cap, _ in capped)], default=1.0)
    lowest = 10 ** np.floor(np.log10(smallest / 1.5))
    axes.barh(y, np.maximum(epochs - lowest, 0), left=lowest, height=0.7, color=colours)
    if capped:
        caps, at = zip(*capped, strict=True)
        axes.scatter(caps, at, marker="|", s=60, color=_CAP, label="cap", zorder=3)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    axes.set_xscale("log")
    axes.set_xlim(left=lowest)
    axes.set_xlabel("epochs (red: more than the cap)" if capped else "epochs")


def _draw_shares(axes: Any, rows: _Rows) -> None:
    y = rows.y
    realised = np.array([100 * row.realised for row in rows.languages])
    asked = np.array([100 * row.asked for row in rows.languages])
    of_tokens = 100 * rows.available / rows.available.sum()
    axes.barh(y, realised, height=0.7, color=_PLANNED, alpha=0.75, label="realised")
    axes.scatter(asked, y, marker="|", s=60, color="black", label="asked for", zorder=3)
    axes.scatter(
        of_tokens, y, s=16, facecolors="none", edgecolors="#5f6368", label="of the tokens", zorder=3
    )
    axes.set_xlim(left=0)
    axes.set_xlabel("share of the samples, %")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)


def _mark_powers_of_ten(axes: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=9))
    axes.xaxis.set_major_formatter(lambda value, _: short(value))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _draw_families(axes: Any, rows: _Rows, *, named: bool) -> None:
    """A grey ground under each family's languages, and its name beside the leftmost one."""
    axes.grid(axis="x", alpha=0.25, linewidth=0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_axisbelow(True)
    for name, top, bottom in rows.families:
        axes.axhspan(top - 0.5, bottom + 0.5, color="#f4f5f6", zorder=0)
        if named:
            axes.annotate(
                name,
                xy=(-0.13, (top + bottom) / 2),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="center",
                fontsize=8.5,
                fontweight="bold",
                annotation_clip=False,
            )


def _draw_course(axes: Any, plan: Plan) -> None:
    from matplotlib import colormaps

    tokens = [sample * plan.seq_length for sample, _ in plan.course]
    families = [row.family for row in plan.families if row.planned_samples]
    shares = [[100 * shares[family] for _, shares in plan.course] for family in families]
    # the ten strong colours first, then their light ones
    colours = [colormaps["tab20"]((2 * i + i // 10) % 20) for i in range(len(families))]
    axes.stackplot(tokens, shares, labels=families, colors=colours, linewidth=0)
    axes.set_xlim(0, tokens[-1])
    axes.set_ylim(0, 100)
    axes.xaxis.set_major_formatter(lambda value, _: short(value))
    axes.set_xlabel("tokens into the run")
    axes.set_ylabel("share of the samples, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=7.5, reverse=True
    )

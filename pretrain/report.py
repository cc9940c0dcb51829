"""What a run shows at its end: a table of losses, a picture of the curves, and what to try next.

Imports neither torch nor megatron-core; rich and matplotlib only when called.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from pretrain.metrics_file import read_metrics
from pretrain.predicted_losses import LEVEL, predicted_families

if TYPE_CHECKING:
    from rich.table import Table

_FAMILY_PREFIX, _FAMILY_SUFFIX = "eval/family/", "/loss"

Curve = tuple[list[int], list[float]]  # steps, values


def family_of(name: str) -> str | None:
    """Family in a metric name eval/family/<family>/loss; None for other names."""
    if name.startswith(_FAMILY_PREFIX) and name.endswith(_FAMILY_SUFFIX):
        return name[len(_FAMILY_PREFIX) : -len(_FAMILY_SUFFIX)]
    return None


def final_table(start: Mapping[str, float], end: Mapping[str, float]) -> "Table":
    """Validation loss by family, first and last evaluation: nats per token, change, perplexity.

    Args:
        start, end: evaluation metrics (eval/loss, eval/family/<family>/loss); a value missing on
            one side is shown as "-". Families are sorted by name, all tokens come last.
    """
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title="Validation loss, nats per token")
    table.add_column("family", no_wrap=True)
    for heading in ("start", "end", "change", "perplexity"):
        table.add_column(heading, justify="right", no_wrap=True)

    names = sorted(name for name in {**start, **end} if family_of(name) is not None)
    rows = [(family_of(name) or "", name) for name in names]
    if "eval/loss" in start or "eval/loss" in end:
        rows.append(("all tokens", "eval/loss"))
    for position, (label, name) in enumerate(rows):
        before, after = start.get(name, math.nan), end.get(name, math.nan)
        is_total = name == "eval/loss"
        table.add_row(
            label,
            _number(before, ".3f"),
            _number(after, ".3f"),
            _number(after - before, "+.3f"),
            _number(_perplexity(after), ",.1f"),
            style="bold" if is_total else None,
            end_section=position + 1 < len(rows) and rows[position + 1][1] == "eval/loss",
        )
    return table


def prediction_table(end: Mapping[str, float]) -> "Table | None":
    """Measured against predicted validation loss by family, nats per token; None without a law.

    Args:
        end: evaluation metrics (eval/family/<family>/loss, .../predicted_loss, ...).
    """
    from rich import box
    from rich.table import Table

    families = predicted_families(end)
    if not families:
        return None
    rows, inside = [], 0
    for family in families:
        loss, predicted, low, high = (
            end.get(f"{_FAMILY_PREFIX}{family}/{name}", math.nan)
            for name in ("loss", "predicted_loss", "predicted_low", "predicted_high")
        )
        inside += low <= loss <= high
        ratio, interval = _number(loss / predicted, ".3f"), f"{low:.3f} to {high:.3f}"
        numbers = _number(loss, ".3f"), _number(predicted, ".3f"), interval, ratio
        rows.append((family, *numbers, _place(loss, low, high)))
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"Against the scaling law: {inside} of {len(families)} families inside its "
        f"{100 * LEVEL:.0f} % interval",
    )
    table.add_column("family", no_wrap=True)
    for heading in ("measured", "predicted", "interval", "ratio", "inside"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _place(value: float, low: float, high: float) -> str:
    if not math.isfinite(value):
        return "-"
    return "above" if value > high else "below" if value < low else "yes"


def print_report(
    start: Mapping[str, float],
    end: Mapping[str, float],
    *,
    artefacts: Mapping[str, str | Path] | None = None,
    next_steps: Sequence[str] = (),
    file: TextIO | None = None,
) -> None:
    """Print the table, where things are (label -> path), and what to try next.

    Plain text, 80 columns, where `file` (None: stdout) is not a terminal.
    """
    from rich.console import Console

    file = sys.stdout if file is None else file
    console = Console(file=file, width=None if file.isatty() else 80, highlight=False)
    console.print(final_table(start, end))
    if (against_law := prediction_table(end)) is not None:
        console.print(against_law)
    if artefacts:
        width = max(len(label) for label in artefacts)
        for label, path in artefacts.items():  # soft wrap: a path must stay copyable
            console.print(f"  {label:<{width}}  {path}", markup=False, soft_wrap=True)
    if next_steps:
        console.print("\nWhat to try next", style="bold")
        for text in next_steps:
            console.print(f"  - {text}", markup=False, soft_wrap=True)


def read_curves(metrics_path: str | Path) -> dict[str, Curve]:
    """Metric name -> (steps, values), steps ascending, the last line of the file winning a step."""
    points: dict[str, dict[int, float]] = {}
    for record in read_metrics(metrics_path):
        for name, value in record.items():
            if name not in ("step", "time"):
                points.setdefault(name, {})[record["step"]] = float(value)
    return {
        name: (
            [step for step, _ in sorted(by_step.items())],
            [v for _, v in sorted(by_step.items())],
        )
        for name, by_step in points.items()
    }


def plot_curves(metrics_path: str | Path, png_path: str | Path) -> Path:
    """Draw metrics.jsonl into a PNG: training loss, and validation loss by family, against step.

    The legend stands outside and lists families from the highest last loss to the lowest, the
    order in which the curves end, each with that loss. Families differ in colour, and beyond ten
    in dash and marker as well. Works before the first step and without evaluations.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = read_curves(metrics_path)
    families = [(family, curves[name]) for name in curves if (family := family_of(name))]
    families.sort(key=lambda item: -_last_finite(item[1]))

    # a Figure with its own canvas: pyplot would keep global state and choose a display
    figure = Figure(figsize=(13, 4.8 + 0.13 * max(0, len(families) - 14)), dpi=130)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _draw_training(left, curves.get("train/loss"))
    _draw_families(right, families, curves.get("eval/loss"))
    last_step = max([1, *(steps[-1] for steps, _ in curves.values())])
    for axes in (left, right):
        axes.set_xlim(-0.03 * last_step, 1.03 * last_step)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("nats per token")
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.tight_layout()
    png_path = Path(png_path)
    png_path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png_path, bbox_inches="tight")
    return png_path


def _draw_training(axes: Any, curve: Curve | None) -> None:
    axes.set_title("Training loss", loc="left", fontsize=11)
    if curve is None:
        axes.text(0.5, 0.5, "no training steps recorded", ha="center", transform=axes.transAxes)
        return
    steps, values = curve
    if len(steps) < 50:
        axes.plot(steps, values, color="#1f5fa8", linewidth=1.6, marker="o", markersize=2.5)
        return
    window = max(5, len(steps) // 50)
    axes.plot(steps, values, color="#1f5fa8", alpha=0.28, linewidth=0.8, label="each logged step")
    axes.plot(
        steps,
        _trailing_mean(values, window),
        color="#1f5fa8",
        linewidth=1.8,
        label=f"mean of the last {window}",
    )
    axes.legend(frameon=False, fontsize=9)


def _draw_families(axes: Any, families: Sequence[tuple[str, Curve]], total: Curve | None) -> None:
    from matplotlib import colormaps

    axes.set_title("Validation loss by language family", loc="left", fontsize=11)
    if not families and total is None:
        axes.text(0.5, 0.5, "no evaluations recorded", ha="center", transform=axes.transAxes)
        return
    colours = [colormaps["tab10"](index) for index in range(10)]
    dashes = ("-", "--", ":", "-.")
    markers = ("o", "s", "^", "D")
    for index, (family, (steps, values)) in enumerate(families):
        style = index // len(colours) % len(dashes)
        axes.plot(
            steps,
            values,
            color=colours[index % len(colours)],
            linestyle=dashes[style],
            marker=markers[style],
            markersize=3.5,
            linewidth=1.4,
            label=f"{_number(_last_finite((steps, values)), '.3f')}  {family}",
        )
    if total is not None:
        label = f"{_number(_last_finite(total), '.3f')}  all tokens"
        # wide, and beneath the families, so that it hides none of them
        axes.plot(*total, color="0.3", linewidth=3.4, zorder=1.5, label=label)
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(1.02, 1.0),
        borderaxespad=0.0,
        frameon=False,
        fontsize=9,
        title="last loss",
        alignment="left",
    )


def _trailing_mean(values: Sequence[float], window: int) -> list[float]:
    means = []
    for end in range(1, len(values) + 1):
        finite = [v for v in values[max(0, end - window) : end] if math.isfinite(v)]
        means.append(sum(finite) / len(finite) if finite else math.nan)
    return means


def _last_finite(curve: Curve) -> float:
    return next((v for v in reversed(curve[1]) if math.isfinite(v)), -math.inf)


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _number(value: float, spec: str) -> str:
    return format(value, spec) if math.isfinite(value) else "-"

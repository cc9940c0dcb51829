"""A picture of a run's routing: who is busy, who serves which family, and how that came about.

Imports neither torch nor megatron-core; matplotlib only when called.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain.report import Curve, read_curves

# At most so many layers have their families drawn: evenly spaced ones, the first and the last.
_MOST_LAYERS = 4
# Shares are drawn on a logarithmic scale; a quarter of the even share and less has one colour.
_MOST_OCTAVES = 2.0
_CURVES = (
    ("entropy", "Routing entropy, nats"),
    ("balance_loss", "Balance loss (even: 1)"),
    ("load_max", "Busiest expert, x even share"),
    ("dropped_share", "Share of choices dropped"),
    ("collapse", "Tr(Σ_W pinv(Σ_B)), small: collapse"),
    ("fluctuation", "Share of tokens that moved"),
)

Matrix = list[list[float]]


def plot_router(run_dir: str | Path, png_path: str | Path) -> Path | None:
    """Draw router.jsonl and metrics.jsonl of a run into a PNG; None where no routing is recorded.

    Above, from the last table: each layer's load by expert, and the experts that each language
    family is sent to, for up to four layers; both in multiples of the even share, on a logarithmic
    scale. Below: curves over optimizer steps, one colour a layer.
    """
    run_dir = Path(run_dir)
    table = last_table(run_dir / "router.jsonl")
    if table is None:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers: list[int] = table["layers"]
    shown = evenly_spaced(len(layers), _MOST_LAYERS)
    # a Figure with its own canvas: pyplot would keep global state and choose a display
    figure: Any = Figure(figsize=(17, 8.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subfigures(2, 1)
    axes = above.subplots(1, 1 + len(shown), squeeze=False)[0]
    by_layer = [
        [sum(expert) for expert in zip(*families, strict=True)] for families in table["load"]
    ]
    _draw_shares(axes[0], relative_shares(by_layer), [str(layer) for layer in layers])
    axes[0].set_title("Load by layer (x: unused)", loc="left", fontsize=10)
    for row, counts in enumerate(by_layer):
        unused = [expert for expert, count in enumerate(counts) if count == 0]
        axes[0].plot(unused, [row] * len(unused), "x", color="white", markersize=5)
    axes[0].set_ylabel("layer")
    image = None
    for place, row in zip(axes[1:], shown, strict=True):
        names = table["families"] if place is axes[1] else [""] * len(table["families"])
        image = _draw_shares(place, relative_shares(table["load"][row]), names)
        place.set_title(f"Layer {layers[row]}: families", loc="left", fontsize=10)
    ticks = [-2, -1, 0, 1, 2]
    bar = above.colorbar(image, ax=axes, ticks=ticks, shrink=0.8, pad=0.01)
    bar.set_ticklabels(["1/4 and less", "1/2", "even share", "x 2", "x 4 and more"])
    first, last = table["first_step"], table["step"]
    above.suptitle(f"Choices of experts, steps {first} to {last}", x=0.01, ha="left", fontsize=11)
    _draw_curves(below, read_curves(run_dir / "metrics.jsonl"), layers)
    png_path = Path(png_path)
    figure.savefig(png_path)
    return png_path


def last_table(path: Path) -> dict[str, Any] | None:
    """The last line of a router.jsonl; None where there is none."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return json.loads(lines[-1]) if lines else None


def relative_shares(counts: Sequence[Sequence[float]]) -> Matrix:
    """Each row in multiples of its even share, as log2; NaN for a row without any."""
    rows = []
    for row in counts:
        total = sum(row)
        even = total / len(row)
        rows.append([_log2(count / even) if total else math.nan for count in row])
    return rows


def evenly_spaced(count: int, most: int) -> list[int]:
    """Up to `most` of range(count), with its first and last."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def _draw_shares(axes: Any, shares: Matrix, names: Sequence[str]) -> Any:
    image = axes.imshow(
        shares,
        aspect="auto",
        cmap="RdBu_r",
        vmin=-_MOST_OCTAVES,
        vmax=_MOST_OCTAVES,
        interpolation="nearest",
    )
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel("expert", fontsize=9)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.tick_params(labelsize=8)
    return image


def _draw_curves(figure: Any, curves: dict[str, Curve], layers: Sequence[int]) -> None:
    from matplotlib import colormaps

    colours = [colormaps["viridis"](0.9 * i / max(1, len(layers) - 1)) for i in range(len(layers))]
    panels = figure.subplots(2, 3, sharex=True).flat
    labelled = set(evenly_spaced(len(layers), 8))
    for axes, (name, title) in zip(panels, _CURVES, strict=True):
        axes.set_title(title, loc="left", fontsize=10)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.xaxis.get_major_locator().set_params(integer=True)
        drawn = False
        for row, layer in enumerate(layers):
            curve = curves.get(f"router/layer_{layer:02d}/{name}")
            if curve is None:
                continue
            label = f"layer {layer}" if row in labelled else None
            marker = "o" if len(curve[0]) < 30 else None
            axes.plot(
                *curve, color=colours[row], linewidth=1.4, marker=marker, markersize=3, label=label
            )
            drawn = True
        if not drawn:
            axes.text(0.5, 0.5, "not recorded", ha="center", transform=axes.transAxes, fontsize=9)
    handles, labels = next(iter(figure.axes)).get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    figure.supxlabel("optimizer step", fontsize=9)


def _log2(ratio: float) -> float:
    """Zero has the colour of little: it lies below the scale."""
    return math.log2(ratio) if ratio else -2 * _MOST_OCTAVES

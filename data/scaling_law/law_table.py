"""A fitted law as text: how well it fits, its parameters with intervals, what was left out."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np

from data.scaling_law.law import ScalingLaw

_QUALITY = {  # of ScalingLaw.quality -> heading
    "rows": "losses",
    "r2": "R2",
    "rms": "rms",
    "held_out_r2": "held-out R2",
    "held_out_rms": "held-out rms",
    "largest_size_rms": "largest N rms",
}
_PARAMETERS = ("E", "A", "alpha", "B", "beta", "gamma")
_NAMED = 4  # of those of which the same is said


def describe_law(law: ScalingLaw, level: float = 0.9) -> str:
    """What was left out, then the fit's quality, its parameters, and its warnings."""
    provenance = law.provenance
    return "\n".join(
        [
            *_lines("Left out", provenance.get("left_out", [])),
            *_quality(law.quality),
            *_parameters(law, level),
            *_gamma_alone(law),
            *_lines("Doubts", provenance.get("warnings", [])),
        ]
    )


def _quality(quality: Mapping[str, Mapping[str, float]]) -> list[str]:
    names = [name for name in _QUALITY if any(name in one for one in quality.values())]
    if not names:
        return []
    lines = [
        "Fit (errors of ln L: 0.01 is 1 % of the loss)",
        f"  {'family':<16}" + "".join(f"{_QUALITY[name]:>15}" for name in names),
    ]
    for family, one in quality.items():
        cells = (_number(name, one.get(name)) for name in names)
        lines.append(f"  {family:<16.16}" + "".join(f"{cell:>15}" for cell in cells))
    lines += [
        f"  {family}: held-out errors are over {one['held_out_rows']:.0f} of {one['rows']:.0f} "
        "losses, where the others determine the law"
        for family, one in quality.items()
        if one.get("held_out_rows", math.inf) < one.get("rows", 0)
    ]
    return [*lines, ""]


def _number(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if name == "rows" else f"{value:.4f}"


def _parameters(law: ScalingLaw, level: float) -> list[str]:
    fixed = ", ".join(f"{name}={value:g}" for name, value in law.fixed.items())
    lines = [
        "Parameters"
        + (f", below them {100 * level:g} % intervals" if law.bootstrap else "")
        + (f"; set, not fitted: {fixed}" if fixed else ""),
        f"  {'family':<12}" + "".join(f" {name:>13}" for name in _PARAMETERS),
    ]
    for family, one in law.families.items():
        lines.append(
            f"  {family:<12.12}" + "".join(f" {asdict(one)[n]:>13.4g}" for n in _PARAMETERS)
        )
        refits = law.bootstrap.get(family)
        if refits:
            table = np.array([[getattr(refit, name) for name in _PARAMETERS] for refit in refits])
            ends = np.quantile(table, [(1 - level) / 2, (1 + level) / 2], axis=0).T
            spans = (f"{low:.3g}..{high:.3g}" for low, high in ends)
            lines.append(f"  {'':<12}" + "".join(f" {span:>13}" for span in spans))
    return [*lines, ""]


def _gamma_alone(law: ScalingLaw) -> list[str]:
    """gamma by a slope, which holds whatever form the law has in N and D."""
    lines = [
        f"  {family:<16.16}{one['gamma_alone']:>15.4g}{one['gamma_alone_error']:>15.2g}"
        for family, one in law.quality.items()
        if "gamma_alone" in one
    ]
    title = (
        "gamma alone: the slope of ln L over ln p at fixed sizes and lengths, no other parameter"
    )
    head = f"  {'family':<16}{'gamma':>15}{'std. error':>15}"
    return [title, head, *lines, ""] if lines else []


def _lines(title: str, lines: Sequence[str]) -> list[str]:
    """The lines, each once where several differ only in their numbers and in what they are of."""
    alike: dict[str, list[str]] = {}
    for line in lines:
        said = line.partition(": ")[2]
        alike.setdefault(re.sub(r"\d[\d.e+-]*", "#", said), []).append(line)
    shown = []
    for first, *others in alike.values():
        shown.append(f"  {first}")
        names = [other.partition(": ")[0] for other in others]
        if names:
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            shown.append(f"    the same: {'; '.join(names[:_NAMED])}{more}")
    return [title, *shown, ""] if lines else []

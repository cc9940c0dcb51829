"""The optimum beside other mixtures: ratios, predicted losses, epochs, and what it gains.

    table = compare_mixtures(law, goal, baselines(law.families, supply, tokens, max_epochs))
    print(describe(table))

Every number is a prediction of the fitted law; intervals come from its bootstrap. Imports neither
torch nor matplotlib.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from data.plan import short
from data.sampling_weights import proportional, scaling_law_objective, temperature, uniform, unimax
from data.scaling_law.law import ScalingLaw
from data.scaling_law.optimum import Goal, Optimum, optimal_ratios

Interval = tuple[float, float]
OPTIMUM = "optimum"
_TITLE, _COLUMN = 16, 14  # characters; six mixtures make 100


@dataclass(frozen=True)
class Mixture:
    """One mixture as the law sees it. Losses are in nats per token."""

    name: str
    ratios: dict[str, float]  # of tokens, by family
    epochs: dict[str, float] | None  # passes over the family's text; None: its size is not known
    losses: dict[str, float]
    loss_intervals: dict[str, Interval]  # of a measured loss: the fit's spread and runs' scatter
    total: float  # Σ L
    total_interval: Interval | None  # None here and below: the law was fitted without bootstrap
    normalized_total: (
        float  # Σ L / L*, the sum of normalised losses; the number of families at best
    )
    normalized_total_interval: Interval | None
    objective: float  # what the optimum minimises
    gain: float  # objective - objective of the optimum
    gain_interval: Interval | None


@dataclass(frozen=True)
class MixtureTable:
    goal: Goal
    level: float  # of the intervals
    optimum: Optimum
    ratio_intervals: dict[str, Interval] | None  # of the optimum, over the bootstrap
    mixtures: list[Mixture]  # the optimum first

    @property
    def families(self) -> list[str]:
        return list(self.mixtures[0].ratios)


def baselines(
    families: Sequence[str],
    supply: Mapping[str, float] | None,
    tokens: float,
    max_epochs: float | None,
) -> dict[str, dict[str, float]]:
    """The mixtures to compare with, by name; without sizes of the families only `uniform`.

    supply: tokens of text by family. UniMax (arXiv 2304.09151) weighs families here, where
    data.mixture.weighting=unimax weighs languages; it allows max_epochs passes, or 4.
    """
    if supply is None:
        return {"uniform": uniform(dict.fromkeys(families, 1.0))}
    sizes = {family: supply[family] for family in families}
    return {
        "uniform": uniform(sizes),
        "proportional": proportional(sizes),
        "temp. 0.7": temperature(sizes, 0.7),
        "temp. 0.3": temperature(sizes, 0.3),
        "unimax": unimax(sizes, tokens, max_epochs or 4.0),
    }


def compare_mixtures(
    law: ScalingLaw, goal: Goal, others: Mapping[str, Mapping[str, float]], level: float = 0.9
) -> MixtureTable:
    """The law's predictions for the optimum of `goal` and for `others`, mixtures by name.

    A resample of the bootstrap is a law of its own. The interval of a total or of a gain is that of
    its values over the resamples with the ratios held fixed; the interval of the optimum's ratios
    is that of the resamples' own optima, where a family whose γ came out below 0 gets as little as
    the bounds allow. Raises ValueError as `optimal_ratios`.
    """
    optimum, resamples = optimal_ratios(law, goal), resampled_laws(law)

    def of(name: str, ratios: Mapping[str, float]) -> Mixture:
        return _mixture(name, ratios, law, resamples, goal, optimum, level)

    optima = [optimal_ratios(_rising(one), goal).ratios for one in resamples]
    return MixtureTable(
        goal=goal,
        level=level,
        optimum=optimum,
        ratio_intervals={
            family: _quantiles([ratios[family] for ratios in optima], level)
            for family in law.families
        }
        if optima
        else None,
        mixtures=[of(OPTIMUM, optimum.ratios), *(of(n, ratios) for n, ratios in others.items())],
    )


def _mixture(
    name: str,
    ratios: Mapping[str, float],
    law: ScalingLaw,
    resamples: list[ScalingLaw],
    goal: Goal,
    optimum: Optimum,
    level: float,
) -> Mixture:
    size, tokens, supply = goal.num_parameters, goal.tokens, goal.supply

    def total(one: ScalingLaw) -> float:
        return math.fsum(one.loss(size, tokens, ratios).values())

    def normalized_total(one: ScalingLaw) -> float:
        return scaling_law_objective(ratios, one.gamma)

    def gain(one: ScalingLaw) -> float:
        return goal.value(one, ratios) - goal.value(one, optimum.ratios)

    def interval(value: Callable[[ScalingLaw], float]) -> Interval | None:
        return _quantiles([value(one) for one in resamples], level) if resamples else None

    return Mixture(
        name=name,
        ratios=dict(ratios),
        epochs={f: p * tokens / supply[f] for f, p in ratios.items()} if supply else None,
        losses=law.loss(size, tokens, ratios),
        loss_intervals=law.interval(size, tokens, ratios, level),
        total=total(law),
        total_interval=interval(total),
        normalized_total=normalized_total(law),
        normalized_total_interval=interval(normalized_total),
        objective=goal.value(law, ratios),
        gain=gain(law),
        gain_interval=interval(gain),
    )


def resampled_laws(law: ScalingLaw) -> list[ScalingLaw]:
    """One law for each resample of the bootstrap."""
    number = min((len(refits) for refits in law.bootstrap.values()), default=0)
    return [
        replace(law, families={f: refits[i] for f, refits in law.bootstrap.items()}, bootstrap={})
        for i in range(number)
    ]


def _rising(law: ScalingLaw) -> ScalingLaw:
    """γ at least 1e-9, which has an optimum: next to nothing of that family."""
    families = {f: replace(one, gamma=max(one.gamma, 1e-9)) for f, one in law.families.items()}
    return replace(law, families=families)


def _quantiles(values: list[float], level: float) -> Interval:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def describe(table: MixtureTable) -> str:
    """The table as text: a row for each family, a column for each mixture."""
    mixtures, families = table.mixtures, table.families
    percent = f"{100 * table.level:g} %"

    def block(title: str, cell: Callable[[Mixture, str], str]) -> list[str]:
        return [title, *(_row(f"  {f}", [cell(m, f) for m in mixtures]) for f in families)]

    lines = [_row("", [m.name for m in mixtures])]
    lines += block(
        "ratio, % of the tokens", lambda m, f: f"{100 * m.ratios[f]:.3f}{_mark(table, m, f)}"
    )
    if table.ratio_intervals is not None:
        lines.append(f"  the optimum's {percent} within")
        lines += [
            _row(f"  {family}", [_span(100 * low, 100 * high)])
            for family, (low, high) in table.ratio_intervals.items()
        ]
    if mixtures[0].epochs is not None:
        lines += block("epochs", lambda m, f: _epochs(table, m, f))
    lines += block("loss, nats per token", lambda m, f: f"{m.losses[f]:.4f} ")
    lines += block(f"  {percent} within", lambda m, f: _span(*m.loss_intervals[f]))
    lines += _totals(table)
    return "\n".join([*lines, "", *_notes(table)])


def _totals(table: MixtureTable) -> list[str]:
    lines = []
    for title, value in (
        ("sum of losses", "total"),
        ("sum of loss / L*", "normalized_total"),
        ("gain of optimum", "gain"),
    ):
        lines.append(_row(title, [f"{getattr(m, value):.4f} " for m in table.mixtures]))
        spans = [getattr(m, f"{value}_interval") for m in table.mixtures]
        if spans[0] is not None:
            lines.append(_row(f"  {100 * table.level:g} % within", [_span(*s) for s in spans]))
    return lines


def _notes(table: MixtureTable) -> list[str]:
    notes = []
    floors = [family for family, bound in table.optimum.at_bounds.items() if bound == "at_least"]
    caps = [family for family, bound in table.optimum.at_bounds.items() if bound == "supply"]
    if floors:
        notes.append(f"_ at the lower bound: {', '.join(floors)}")
    if caps:
        notes.append(
            f"^ all the text there is in {table.goal.max_epochs:g} epochs: {', '.join(caps)}"
        )
    if table.goal.max_epochs is not None and any(
        _over(table, m, f) for m in table.mixtures for f in table.families
    ):
        notes.append(f"! more than {table.goal.max_epochs:g} epochs")
    unit = {"sum": "nats per token", "normalized": "units of L / L*"}.get(
        table.goal.objective.value
    )
    notes.append(
        f"The gain counts {unit or 'Σ w L'}, summed over {len(table.families)} families: "
        "what the mixture is above the optimum."
    )
    if table.ratio_intervals is None:
        notes.append("No intervals of totals and gains: the law was fitted without bootstrap.")
    return notes


def _row(title: str, cells: list[str]) -> str:
    return f"{title:<{_TITLE}.{_TITLE}}" + "".join(f"{cell:>{_COLUMN}}" for cell in cells).rstrip()


def _mark(table: MixtureTable, mixture: Mixture, family: str) -> str:
    bound = table.optimum.at_bounds.get(family) if mixture.name == OPTIMUM else None
    return {"at_least": "_", "supply": "^"}.get(bound or "", " ")


def _epochs(table: MixtureTable, mixture: Mixture, family: str) -> str:
    assert mixture.epochs is not None
    return short(mixture.epochs[family]) + ("!" if _over(table, mixture, family) else " ")


def _over(table: MixtureTable, mixture: Mixture, family: str) -> bool:
    if table.goal.max_epochs is None or mixture.epochs is None:
        return False
    return mixture.epochs[family] > table.goal.max_epochs * (1 + 1e-9)


def _span(low: float, high: float) -> str:
    """Five characters for each end, six below 0."""
    digits = max(0, 4 - len(str(int(max(abs(low), abs(high))))))
    ends = (round(low, digits) + 0.0, round(high, digits) + 0.0)  # -0.0 becomes 0.0
    return "..".join(f"{end:.{digits}f}" for end in ends)


def as_json(table: MixtureTable) -> dict[str, Any]:
    """The table as JSON types."""
    content = asdict(table)
    content["goal"]["objective"] = table.goal.objective.value
    return content

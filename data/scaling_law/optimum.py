"""Which ratios of the families give the lowest loss, by a fitted law.

    goal = Goal(num_parameters=1e9, tokens=2e10, at_least=0.02)
    optimal_ratios(law, goal).ratios["germanic"]

The law is that of arXiv 2410.12883, L_f(N, D, p_f) = L_f*(N, D) p_f^-γ_f with L_f* the loss of a
model trained on family f alone. Minimised is Σ_f w_f L_f over ratios that sum to 1; the problem is
convex, and data/sampling_weights.py solves it. What to weigh how is the reader's choice:

    sum          w_f = 1: nats per token of all families count alike; the ratios depend on N and D
    normalized   w_f = 1 / L_f*(N, D): Σ p_f^-γ_f, whose optimum depends on the γ alone
    weights      w_f as given

The paper compares weightings and prefers the normalised one; how it solves the problem is not
known to us. Lower bounds and the supply of text are ours.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from data.sampling_weights import scaling_law_objective, scaling_law_optimum
from data.scaling_law.law import ScalingLaw


class Objective(Enum):
    """What is minimised: Σ_f w_f L_f."""

    sum = "sum"  # w = 1
    normalized = "normalized"  # w = 1 / L*(N, D)
    weights = "weights"  # w as given


@dataclass(frozen=True)
class Optimum:
    """The best ratios and what holds them there.

    Every family that is at no bound has p = (w L* γ / multiplier)^(1 / (1 + γ)).
    """

    ratios: dict[str, float]  # by family, of tokens; sum to 1
    multiplier: float | None  # -d(objective)/dp, equal for all free families; None: none is free
    at_bounds: dict[str, str]  # family -> "at_least" or "supply"; families not named are free
    objective: float  # Σ w_f L_f at the optimum


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What a mixture is wanted for."""

    num_parameters: float  # N, without the embedding
    tokens: float  # D, of the whole mixture
    objective: Objective = Objective.normalized
    # w_f, with Objective.weights and only there; families not named count 1
    weights: Mapping[str, float] | None = None
    at_least: float | Mapping[str, float] = 0.0  # smallest ratio, of every family or by family
    # tokens of text by family, and how often they may be seen: p_f <= max_epochs supply_f / D.
    # What a family may not take goes to the others, to each until it is worth as much as to the
    # next.
    supply: Mapping[str, float] | None = None
    max_epochs: float | None = None

    def check(self, families: Sequence[str]) -> None:
        """Raises ValueError, as `optimal_ratios` would, before there is a law."""
        bounds(families, self)

    def value(self, law: ScalingLaw, ratios: Mapping[str, float]) -> float:
        """Σ w_f L_f of any ratios; infinite where one is 0."""
        return scaling_law_objective(ratios, law.gamma, weighted_losses(law, self))


def optimal_ratios(law: ScalingLaw, goal: Goal) -> Optimum:
    """The ratios that minimise Σ_f w_f L_f(N, D, p_f), under bounds.

    Raises ValueError, with all problems, for a γ that is not above 0, for weights or supply of
    unknown families or not above 0, for bounds that leave no ratios, and for a supply that is too
    small (and by how many tokens).
    """
    gamma = law.gamma
    flat = [f"{family}: {value:.4g}" for family, value in gamma.items() if value <= 0]
    if flat:
        raise ValueError(
            f"gamma of {', '.join(flat)}: by this fit more of a family's text does not lower its "
            "loss, so that no ratio is best. Add runs at other ratios of it, or more seeds"
        )
    low, high = bounds(list(gamma), goal)
    losses = weighted_losses(law, goal)
    ratios = scaling_law_optimum(gamma, losses, low, high)
    at_bounds = {f: "supply" for f, cap in high.items() if ratios[f] == cap}
    at_bounds |= {f: "at_least" for f, least in low.items() if ratios[f] == least > 0}
    free = [family for family in ratios if family not in at_bounds]
    return Optimum(
        ratios=ratios,
        multiplier=_marginal(max(free, key=ratios.__getitem__), gamma, losses, ratios)
        if free
        else None,
        at_bounds=at_bounds,
        objective=scaling_law_objective(ratios, gamma, losses),
    )


def weighted_losses(law: ScalingLaw, goal: Goal) -> dict[str, float]:
    """w_f L_f*(N, D) by family."""
    if goal.objective is Objective.normalized:
        return dict.fromkeys(law.families, 1.0)
    losses = law.single_family_losses(goal.num_parameters, goal.tokens)
    weights = goal.weights or {}
    return {family: weights.get(family, 1.0) * loss for family, loss in losses.items()}


def bounds(families: Sequence[str], goal: Goal) -> tuple[dict[str, float], dict[str, float]]:
    """Lowest ratio of every family, and highest of those whose text does not last for more.

    The rest of what `optimal_ratios` is asked for is checked too, so that it can be refused before
    there is a law. Raises ValueError with all problems.
    """
    problems = _weight_problems(families, goal)
    at_least, supply, max_epochs = goal.at_least, goal.supply, goal.max_epochs
    floors = at_least if isinstance(at_least, Mapping) else dict.fromkeys(families, at_least)
    problems += _floor_problems(families, floors)
    problems += _supply_problems(families, goal)
    if problems:
        raise ValueError("\n".join(problems))
    low = dict.fromkeys(families, 0.0) | dict(floors)
    if supply is None or max_epochs is None:
        return low, {}
    high = {family: max_epochs * n / goal.tokens for family, n in supply.items()}
    crossed = [
        f"at_least of {family}={low[family]:g}: {max_epochs:g} epochs of its {supply[family]:.6g} "
        f"tokens are {cap:.4g} of the mixture; lower the one or raise the other"
        for family, cap in high.items()
        if low[family] > cap
    ]
    if crossed:
        raise ValueError("\n".join(crossed))
    return low, {family: cap for family, cap in high.items() if cap < 1}


def _marginal(
    family: str,
    gamma: Mapping[str, float],
    losses: Mapping[str, float],
    ratios: Mapping[str, float],
) -> float:
    """-d(objective)/dp of a family: what a little more of it is worth."""
    return losses[family] * gamma[family] * ratios[family] ** (-gamma[family] - 1)


def _weight_problems(families: Sequence[str], goal: Goal) -> list[str]:
    objective, weights = goal.objective, goal.weights
    if (weights is not None) != (objective is Objective.weights):
        return [
            f"objective={objective.value} and weights={weights}: the objective `weights` needs "
            "weights, the others have their own"
        ]
    given = weights or {}
    return _wrong_names("weights", given, families) + _not_positive("weights", given)


def _floor_problems(families: Sequence[str], floors: Mapping[str, float]) -> list[str]:
    problems = _wrong_names("at_least", floors, families)
    problems += [
        f"at_least of {family}={least}: must be at least 0 and below 1"
        for family, least in floors.items()
        if not 0 <= least < 1
    ]
    total = math.fsum(floors.values())
    if not problems and total > 1 + 1e-12:
        problems.append(
            f"at_least of {len(floors)} families sums to {total:.6g}, more than 1; at most "
            f"{1 / len(floors):.4g} is possible for all of them"
        )
    return problems


def _supply_problems(families: Sequence[str], goal: Goal) -> list[str]:
    tokens, supply, max_epochs = goal.tokens, goal.supply, goal.max_epochs
    problems = []
    if supply is not None:
        problems += _wrong_names("supply", supply, families) + _not_positive("supply", supply)
        lacking = [family for family in families if family not in supply]
        if lacking:
            problems.append(f"the supply of {', '.join(lacking)} is not given")
    if max_epochs is None:
        return problems
    if not (math.isfinite(max_epochs) and max_epochs > 0):
        return [*problems, f"max_epochs={max_epochs}: must be a number above 0"]
    if supply is None:
        return [f"max_epochs={max_epochs:g} needs the supply: the tokens of every family"]
    there = max_epochs * math.fsum(supply.values())
    if not problems and there < tokens * (1 - 1e-13):
        problems.append(
            f"max_epochs={max_epochs:g}: so often, all the text is {there:.6g} tokens, "
            f"{tokens - there:.6g} short of the {tokens:.6g} planned; allow "
            f"{tokens / there * max_epochs:.4g} epochs, plan fewer tokens, or add text"
        )
    return problems


def _wrong_names(what: str, values: Mapping[str, float], families: Sequence[str]) -> list[str]:
    unknown = sorted(set(values) - set(families))
    if not unknown:
        return []
    return [f"{what} names {', '.join(unknown)}; the families are {', '.join(families)}"]


def _not_positive(what: str, values: Mapping[str, float]) -> list[str]:
    return [
        f"{what} of {family}={value}: must be a finite number above 0"
        for family, value in values.items()
        if not (math.isfinite(value) and value > 0)
    ]

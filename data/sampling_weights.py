"""How much of each language or family to draw: sampling ratios from sizes, losses or by hand.

Pure functions of mappings name -> number; every result maps the same names, in the same order, to
ratios that sum to 1. Sizes may be in any unit (tokens, characters, bytes), the same for all. Names
of size 0 have nothing to draw and get ratio 0.

    proportional, temperature, uniform, unimax    from sizes
    scaling_law_optimum                           from fitted exponents and losses
    explicit                                      from the user
    in_tokens                                     from ratios that count characters or bytes
"""

import math
from collections.abc import Callable, Mapping

RATIO_TOLERANCE = 1e-6  # how far from 1 explicit ratios may sum: six printed digits


def proportional(sizes: Mapping[str, float]) -> dict[str, float]:
    """p = n / Σn."""
    return temperature(sizes, 1.0)


def uniform(sizes: Mapping[str, float]) -> dict[str, float]:
    """Equal ratios for all that have anything to draw."""
    return temperature(sizes, 0.0)


def temperature(sizes: Mapping[str, float], alpha: float) -> dict[str, float]:
    """p ∝ (n / Σn)^α, α = 1/T: exponential smoothing, as in arXiv 1907.05019.

    α = 1 is proportional, 0 uniform; XLM-E's T = 10/7 (arXiv 2106.16138) is 0.7. Raises ValueError
    for an α that is negative or not finite, and for sizes that are, or that are all 0.
    """
    if not (math.isfinite(alpha) and alpha >= 0):
        raise ValueError(
            f"alpha={alpha}: must be a number of at least 0 (0: uniform, 1: proportional)"
        )
    total = _total(sizes)
    return _normalized({name: (n / total) ** alpha if n else 0.0 for name, n in sizes.items()})


def unimax(sizes: Mapping[str, float], budget: float, max_epochs: float) -> dict[str, float]:
    """Ratios of UniMax (arXiv 2304.09151): as uniform as max_epochs passes over each allow.

    The paper's budget counts characters; any unit will do, if it is the unit of the sizes. Where
    even max_epochs passes over everything fall short of the budget, the result is proportional.
    Raises ValueError as `unimax_allocation`.
    """
    return _normalized(unimax_allocation(sizes, budget, max_epochs))


def unimax_allocation(
    sizes: Mapping[str, float], budget: float, max_epochs: float
) -> dict[str, float]:
    """How much of the budget each gets, in the unit of the sizes; sums to the budget or to less.

    From the smallest size on, each gets an equal share of the budget that is left, or max_epochs
    times its size if that is less. Raises ValueError for a budget or max_epochs not above 0.
    """
    for name, value in (("budget", budget), ("max_epochs", max_epochs)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value}: must be a number above 0")
    _total(sizes)
    allocation = dict.fromkeys(sizes, 0.0)
    waiting = sorted((name for name in sizes if sizes[name]), key=lambda name: sizes[name])
    left = float(budget)
    for place, name in enumerate(waiting):
        allocation[name] = min(left / (len(waiting) - place), max_epochs * sizes[name])
        left -= allocation[name]
    return allocation


def scaling_law_optimum(
    gamma: Mapping[str, float],
    weighted_losses: Mapping[str, float] | None = None,
    at_least: Mapping[str, float] | None = None,
    at_most: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """The ratios that minimise Σ w_i L_i* p_i^-γ_i, the law of arXiv 2410.12883 at fixed N and D.

    gamma: γ_i > 0 by family. weighted_losses: w_i L_i*, where L_i* is the loss of a model trained
    on family i alone; None means 1 for all, which is the paper's normalised objective (w_i =
    1/L_i*) and makes the ratios independent of N and D. at_least, at_most: bounds by family, e.g.
    what max_epochs passes over its tokens allow; families not named have none.

    The problem is convex and separable. Without bounds its stationary point is p_i = (w_i L_i* γ_i
    / λ)^(1 / (1 + γ_i)); with bounds it is that, clipped to them, for the λ at which the ratios sum
    to 1. Bisection finds ln λ until the sum is 1 within 1e-12. Whether the paper solves it so is
    not known to us.

    Raises ValueError for γ or losses not above 0, bounds of families that have no γ, lower bounds
    that sum to more than 1 or exceed the upper ones, upper bounds that sum to less than 1.
    """
    names = list(gamma)
    losses = dict.fromkeys(names, 1.0) if weighted_losses is None else dict(weighted_losses)
    if set(losses) != set(names):
        raise ValueError(
            f"losses are given for {', '.join(sorted(losses))}, exponents for "
            f"{', '.join(sorted(names))}; give both for the same families"
        )
    for what, values in (("gamma", gamma), ("loss", losses)):
        bad = {name: v for name, v in values.items() if not (math.isfinite(v) and v > 0)}
        if bad:
            raise ValueError(f"{what} of {bad}: must be finite numbers above 0")
    low = _bounds(names, at_least, 0.0, "at_least")
    high = _bounds(names, at_most, 1.0, "at_most")
    crossed = [name for name in names if not 0 <= low[name] <= high[name]]
    if crossed:
        raise ValueError(
            "; ".join(f"{n}: at_least={low[n]} and at_most={high[n]}" for n in crossed)
            + ": must be 0 <= at_least <= at_most"
        )
    if sum(low.values()) > 1 + 1e-12:
        raise ValueError(f"at_least sums to {sum(low.values()):.6g}, more than 1; lower some")
    if sum(high.values()) < 1 - 1e-12:
        raise ValueError(
            f"at_most sums to {sum(high.values()):.6g}, less than 1: there is not enough to draw; "
            "allow more passes or plan fewer tokens"
        )

    def ratios(log_price: float) -> dict[str, float]:
        free = {
            # the exponent stays below 0.01: ratios are at most 1, bounds cut the rest off
            name: math.exp(
                min((math.log(losses[name] * gamma[name]) - log_price) / (1 + gamma[name]), 0.01)
            )
            for name in names
        }
        return {name: min(max(p, low[name]), high[name]) for name, p in free.items()}

    return _bisect(ratios, [math.log(losses[name] * gamma[name]) for name in names])


def scaling_law_objective(
    ratios: Mapping[str, float],
    gamma: Mapping[str, float],
    weighted_losses: Mapping[str, float] | None = None,
) -> float:
    """Σ w_i L_i* p_i^-γ_i; infinite where a ratio is 0."""
    if any(p == 0 for p in ratios.values()):
        return math.inf
    return sum(
        (1.0 if weighted_losses is None else weighted_losses[name]) * p ** -gamma[name]
        for name, p in ratios.items()
    )


def explicit(
    ratios: Mapping[str, float], *, normalize: bool = False, setting: str = "data.mixture.ratios"
) -> dict[str, float]:
    """The ratios as given, which must sum to 1 within 1e-6 unless `normalize`.

    What is left of the difference is divided out, so that the result sums to 1 to the last bits.
    setting: how the user wrote the table, for the error. Raises ValueError for ratios that are
    negative or not finite, for none above 0, and for another sum, saying by how much it is off.
    """
    bad = {name: p for name, p in ratios.items() if not (math.isfinite(p) and p >= 0)}
    if bad:
        raise ValueError(f"{setting}: {bad} must be finite numbers of at least 0 (0 leaves it out)")
    total = math.fsum(ratios.values())
    if total == 0:
        raise ValueError(f"{setting}={dict(ratios)}: at least one ratio must be above 0")
    if not normalize and abs(total - 1) > RATIO_TOLERANCE:
        largest = max(ratios, key=lambda name: ratios[name])
        fitted = ratios[largest] + 1 - total
        way_out = f", or change one, e.g. {largest}: {fitted:.6g}" if fitted > 0 else ""
        normalize_setting = setting.rpartition(".")[0] + ".normalize"
        raise ValueError(
            f"{setting} sum to {total:.8g}, {abs(total - 1):.3g} too "
            f"{'much' if total > 1 else 'little'}; they must sum to 1 within {RATIO_TOLERANCE:g}. "
            f"Set {normalize_setting.lstrip('.')}=true to have them divided by their sum{way_out}"
        )
    return {name: p / total for name, p in ratios.items()}


def in_tokens(
    ratios: Mapping[str, float], units_per_token: Mapping[str, float]
) -> dict[str, float]:
    """Ratios of tokens that yield these ratios of another unit.

    units_per_token: by name, e.g. characters or UTF-8 bytes over tokens of its store. Raises
    ValueError where it is missing or not above 0 for a name that is drawn.
    """
    bad = [name for name, p in ratios.items() if p and not units_per_token.get(name, 0) > 0]
    if bad:
        raise ValueError(
            f"characters or bytes per token are not known for {', '.join(bad)}: their token "
            "stores do not record them; tokenize again, or let the ratios count tokens"
        )
    return _normalized({name: p / units_per_token[name] if p else 0 for name, p in ratios.items()})


def _bisect(
    ratios: Callable[[float], dict[str, float]], log_values: list[float]
) -> dict[str, float]:
    """ratios(x) for the x at which they sum to 1; their sum falls with x."""
    # at the lower end every free ratio is at least 1; the upper one is pushed out until it is one
    below, above = min(log_values), max(log_values) + 1.0
    while sum(ratios(above).values()) > 1 and above - below < 1e4:
        above += above - below
    while below < (middle := (below + above) / 2) < above:  # until no number lies in between
        if math.fsum(ratios(middle).values()) > 1:
            below = middle
        else:
            above = middle
    return ratios(above)


def _bounds(
    names: list[str], given: Mapping[str, float] | None, default: float, what: str
) -> dict[str, float]:
    given = given or {}
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise ValueError(f"{what} names {', '.join(unknown)}, which have no gamma")
    return {name: min(float(given.get(name, default)), 1.0) for name in names}


def _total(sizes: Mapping[str, float]) -> float:
    bad = {name: n for name, n in sizes.items() if not (math.isfinite(n) and n >= 0)}
    if bad:
        raise ValueError(f"sizes of {bad}: must be finite numbers of at least 0")
    total = math.fsum(sizes.values())
    if total == 0:
        raise ValueError(f"sizes of {', '.join(sizes) or 'nothing'}: there is nothing to draw from")
    return total


def _normalized(values: Mapping[str, float]) -> dict[str, float]:
    total = math.fsum(values.values())
    return {name: value / total for name, value in values.items()}

"""data.sampling_weights against published procedures and values worked out by other routes."""

import math
import random
from collections.abc import Callable

import pytest

from data.sampling_weights import (
    explicit,
    in_tokens,
    proportional,
    scaling_law_objective,
    scaling_law_optimum,
    temperature,
    uniform,
    unimax,
    unimax_allocation,
)

SIZES = {"en": 0.9, "de": 0.09, "is": 0.01}
FAMILIES = {"en": "g", "de": "g", "nl": "g", "ru": "s", "pl": "s"}
RATIOS = {"en": 0.4, "de": 0.15, "nl": 0.05, "ru": 0.3, "pl": 0.1}


def values(ratios: dict[str, float]) -> list[float]:
    assert math.fsum(ratios.values()) == pytest.approx(1, abs=1e-12)
    return list(ratios.values())


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (0.7, [0.804904, 0.160599, 0.034496]),
        (0.5, [0.703414, 0.222439, 0.074146]),
        (0.3, [0.568039, 0.284694, 0.147267]),
    ],
)
def test_temperature_by_known_values(alpha: float, expected: list[float]) -> None:
    assert values(temperature(SIZES, alpha)) == pytest.approx(expected, abs=5e-7)


def test_proportional_and_uniform_are_the_ends_of_temperature() -> None:
    assert values(proportional(SIZES)) == pytest.approx([0.9, 0.09, 0.01])
    assert values(uniform(SIZES)) == pytest.approx([1 / 3] * 3)


def test_nothing_is_drawn_of_what_is_empty() -> None:
    sizes = {"en": 5.0, "xx": 0.0, "de": 5.0}
    assert values(uniform(sizes)) == [0.5, 0.0, 0.5]
    assert unimax_allocation(sizes, 4, 1) == {"en": 2, "xx": 0, "de": 2}


@pytest.mark.parametrize(
    ("epochs", "expected"), [(1, [289, 100, 10, 1]), (4, [178, 178, 40, 4])]
)  # fmt: skip
def test_unimax_by_known_values(epochs: int, expected: list[float]) -> None:
    """The procedure of arXiv 2304.09151, worked by hand."""
    sizes = dict(zip("abcd", [1000, 100, 10, 1], strict=True))
    assert list(unimax_allocation(sizes, 400, epochs).values()) == pytest.approx(expected)
    assert values(unimax(sizes, 400, epochs)) == pytest.approx([n / 400 for n in expected])


def test_unimax_does_not_depend_on_the_order_of_languages() -> None:
    sizes = dict(zip("abcd", [10, 1000, 1, 100], strict=True))
    assert unimax_allocation(sizes, 400, 4) == {"a": 40, "b": 178, "c": 4, "d": 178}


def test_unimax_with_more_budget_than_supply_is_proportional() -> None:
    sizes = {"a": 30.0, "b": 10.0}
    assert values(unimax(sizes, 1e6, 2)) == pytest.approx([0.75, 0.25])


def test_scaling_law_optimum_by_known_values() -> None:
    """The law of arXiv 2410.12883; the values from its stationarity condition."""
    gamma = dict(zip("abc", [0.05, 0.1, 0.2], strict=True))
    best = scaling_law_optimum(gamma)
    assert values(best) == pytest.approx([0.140648, 0.288748, 0.570603], abs=1e-6)
    assert scaling_law_objective(best, gamma) == pytest.approx(3.354060, abs=1e-6)


def test_scaling_law_optimum_with_equal_exponents_is_a_power_of_the_losses() -> None:
    losses = dict(zip("abcde", [1, 1.2, 1.5, 1.1, 0.9], strict=True))
    best = scaling_law_optimum(dict.fromkeys(losses, 0.1), losses)
    assert values(best) == pytest.approx(
        [0.177773, 0.209820, 0.257009, 0.193863, 0.161535], abs=1e-6
    )
    powers = {name: loss ** (1 / 1.1) for name, loss in losses.items()}
    assert values(best) == pytest.approx(
        [p / sum(powers.values()) for p in powers.values()], abs=1e-12
    )


def test_scaling_law_optimum_for_exponents_read_off_the_uniform_run() -> None:
    """γ = ln(normalised loss at 1/5) / ln 5, from the 1.2B losses quoted for arXiv 2410.12883."""
    gamma = {
        name: math.log(loss) / math.log(5)
        for name, loss in zip("abcde", [1.142, 1.180, 1.273, 1.142, 1.134], strict=True)
    }
    best = scaling_law_optimum(gamma)
    assert values(best) == pytest.approx([0.1646, 0.2078, 0.3077, 0.1646, 0.1554], abs=5e-5)
    assert scaling_law_objective(best, gamma) == pytest.approx(5.84636, abs=5e-6)
    assert scaling_law_objective(uniform(best), gamma) == pytest.approx(5.87100, abs=5e-6)


@pytest.mark.parametrize("case", range(30))
def test_scaling_law_optimum_under_bounds_meets_the_kkt_conditions(case: int) -> None:
    """Free families share one marginal loss; at a lower bound more would be worth less, and at an
    upper bound more."""
    draw = random.Random(case)
    names = [f"f{i}" for i in range(draw.randint(1, 8))]
    gamma = {name: draw.uniform(0.01, 2) for name in names}
    losses = {name: 10 ** draw.uniform(-2, 2) for name in names}
    low = {name: draw.uniform(0, 1 / len(names)) for name in names if draw.random() < 0.5}
    high = {name: draw.uniform(1 / len(names), 1) for name in names if draw.random() < 0.5}
    if len(high) == len(names):
        high[names[0]] = 1.0
    best = scaling_law_optimum(gamma, losses, low, high)
    values(best)
    gain = {n: losses[n] * gamma[n] * best[n] ** (-gamma[n] - 1) for n in names}  # -dL/dp
    assert all(low.get(n, 0) <= best[n] <= high.get(n, 1) for n in names)
    at_low = [n for n in names if best[n] < low.get(n, 0) + 1e-12]
    at_high = [n for n in names if best[n] > high.get(n, 1) - 1e-12]
    free = [n for n in names if n not in at_low and n not in at_high]
    price = [gain[n] for n in free]
    if price:
        assert max(price) == pytest.approx(min(price), rel=1e-9)
    floor = max([gain[n] for n in free + at_low], default=0)
    assert all(gain[n] >= floor * (1 - 1e-9) for n in at_high)
    ceiling = min([gain[n] for n in free + at_high], default=math.inf)
    assert all(gain[n] <= ceiling * (1 + 1e-9) for n in at_low)


def test_scaling_law_bounds_that_leave_no_choice() -> None:
    gamma = {"a": 0.1, "b": 0.2}
    found = scaling_law_optimum(gamma, at_least={"a": 0.4, "b": 0.6})
    assert values(found) == pytest.approx([0.4, 0.6], abs=1e-12)
    found = scaling_law_optimum(gamma, at_most={"a": 0.4, "b": 0.6})
    assert values(found) == pytest.approx([0.4, 0.6], abs=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma": {"a": 0.0}}, "gamma of .*'a': 0.0.*above 0"),
        ({"gamma": {"a": 0.1}, "weighted_losses": {"a": -1}}, "loss of .*'a': -1"),
        ({"gamma": {"a": 0.1}, "weighted_losses": {"b": 1}}, "given for b, exponents for a"),
        ({"gamma": {"a": 0.1}, "at_most": {"b": 1}}, "at_most names b, which have no gamma"),
        ({"gamma": {"a": 0.1, "b": 0.1}, "at_most": {"a": 0.1, "b": 0.2}}, r"sums to 0\.3, less"),
        ({"gamma": {"a": 0.1, "b": 0.1}, "at_least": {"a": 0.8, "b": 0.4}}, r"sums to 1\.2, more"),
        ({"gamma": {"a": 0.1}, "at_least": {"a": 0.8}, "at_most": {"a": 0.4}}, "a: at_least=0.8"),
    ],
)
def test_scaling_law_bad_input(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scaling_law_optimum(**arguments)


def test_a_ratio_of_nothing_costs_infinitely_much() -> None:
    assert scaling_law_objective({"a": 1.0, "b": 0.0}, {"a": 0.1, "b": 0.1}) == math.inf


def test_explicit_ratios_that_sum_to_one() -> None:
    assert explicit({"a": 0.25, "b": 0.75}) == {"a": 0.25, "b": 0.75}
    assert values(explicit({"a": 0.333333, "b": 0.666667, "c": 0.0}))
    assert explicit({"a": 1, "b": 3}, normalize=True) == {"a": 0.25, "b": 0.75}


@pytest.mark.parametrize(
    ("ratios", "message"),
    [
        ({"a": 0.5, "b": 0.47}, r"mix\.ratios sum to 0\.97, 0\.03 too little; .*a: 0\.53"),
        ({"a": 0.5, "b": 0.52}, r"mix\.ratios sum to 1\.02, 0\.02 too much.*mix\.normalize=true"),
        ({"a": 1.5, "b": -0.5}, r"'b': -0\.5.*at least 0"),
        ({"a": 0.0}, "at least one ratio must be above 0"),
        ({"a": 0.9999989, "b": 0.0}, r"1\.1e-06 too little"),
    ],
)
def test_explicit_ratios_that_do_not(ratios: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        explicit(ratios, setting="mix.ratios")


def test_ratios_of_characters_become_ratios_of_tokens() -> None:
    tokens = in_tokens({"en": 0.5, "hi": 0.5, "xx": 0.0}, {"en": 4.0, "hi": 2.0})
    assert values(tokens) == pytest.approx([1 / 3, 2 / 3, 0])
    characters = {"en": tokens["en"] * 4, "hi": tokens["hi"] * 2}
    assert characters["en"] == pytest.approx(characters["hi"])
    with pytest.raises(ValueError, match="not known for hi"):
        in_tokens({"en": 0.5, "hi": 0.5}, {"en": 4.0})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: temperature(SIZES, -1), "alpha=-1"),
        (lambda: unimax(SIZES, 0, 1), "budget=0: must be"),
        (lambda: unimax(SIZES, 1, -2), "max_epochs=-2: must be"),
        (lambda: proportional({"a": math.nan}), "sizes of .*nan"),
        (lambda: uniform({"a": 0.0}), "nothing to draw from"),
    ],
)
def test_bad_input(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()

"""data.pair_sampling against values worked out by hand and by other routes."""

import itertools

import numpy as np
import pytest

from data import pair_sampling
from data.pair_sampling import fit_to_marginals, max_entropy, min_kl, sinkhorn_temperature

COUNTS = {("0", "1"): 100.0, ("0", "2"): 10.0, ("0", "3"): 1.0, ("1", "2"): 5.0, ("2", "3"): 2.0}
MARGINALS = {"0": 0.4, "1": 0.3, "2": 0.2, "3": 0.1}


def marginals_of(weights: dict[tuple[str, str], float]) -> tuple[dict, dict]:
    rows: dict[str, float] = {}
    columns: dict[str, float] = {}
    for (source, target), weight in weights.items():
        rows[source] = rows.get(source, 0) + weight
        columns[target] = columns.get(target, 0) + weight
    return rows, columns


def test_min_kl_by_known_values() -> None:
    weights = min_kl(COUNTS, MARGINALS)
    expected = {"01": 0.276923, "02": 0.1, "03": 0.023077, "12": 0.023077, "23": 0.076923}
    for (a, b), value in expected.items():
        assert weights[a, b] == pytest.approx(value, abs=5e-7)
        assert weights[b, a] == weights[a, b]
    assert ("1", "3") not in weights


def test_max_entropy_by_known_values() -> None:
    weights = max_entropy(COUNTS, MARGINALS)
    expected = {"01": 0.225, "02": 0.1, "03": 0.075, "12": 0.075, "23": 0.025}
    for (a, b), value in expected.items():
        assert weights[a, b] == pytest.approx(value, abs=1e-11)


@pytest.mark.parametrize("weights", [min_kl(COUNTS, MARGINALS), max_entropy(COUNTS, MARGINALS)])
def test_marginals_are_right_to_the_tolerance(weights: dict) -> None:
    for found in marginals_of(weights):
        assert found == pytest.approx(MARGINALS, abs=2 * pair_sampling.TOLERANCE)


def test_the_result_is_the_optimum_it_is_named_for() -> None:
    """At the optimum log(weight / start) is a sum of a term of each language (Lagrange)."""
    weights = min_kl(COUNTS, MARGINALS)
    names = sorted(MARGINALS)
    design = np.array([[float(name in pair) for name in names] for pair in COUNTS])
    log_ratio = np.array([np.log(weights[pair] / count) for pair, count in COUNTS.items()])
    terms, *_ = np.linalg.lstsq(design, log_ratio, rcond=None)
    assert design @ terms == pytest.approx(log_ratio, abs=1e-9)


def test_many_languages_with_counts_over_nine_orders() -> None:
    random = np.random.default_rng(0)
    names = [f"l{i:02d}" for i in range(60)]
    pairs = [p for p in itertools.combinations(names, 2) if random.random() < 0.3]
    pairs += [(names[0], name) for name in names[1:] if (names[0], name) not in pairs]
    ratios = random.random(60) ** 2 + 0.1
    marginals = dict(zip(names, ratios / ratios.sum(), strict=True))
    weights = min_kl({pair: 10 ** random.uniform(0, 9) for pair in pairs}, marginals)
    assert min(weights.values()) > 0
    assert marginals_of(weights)[0] == pytest.approx(marginals, abs=2e-12)


def test_a_language_of_one_half_takes_part_in_every_pair() -> None:
    weights = max_entropy(
        itertools.combinations("abc", 2), {"a": 0.5, "b": 0.3, "c": 0.2}
    )  # fmt: skip
    assert weights == pytest.approx(
        {
            ("a", "b"): 0.3,
            ("b", "a"): 0.3,
            ("a", "c"): 0.2,
            ("c", "a"): 0.2,
            ("b", "c"): 0,
            ("c", "b"): 0,
        },
        abs=1e-12,
    )


def test_a_language_of_ratio_nothing_is_left_out() -> None:
    weights = max_entropy([("a", "b"), ("b", "c")], {"a": 0.5, "b": 0.5, "c": 0.0})
    assert weights["a", "b"] == pytest.approx(0.5)
    assert weights["b", "c"] == 0


def test_above_one_half_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the ratio of en is 0\.6, above 1/2"):
        max_entropy([("en", "de"), ("en", "fr")], {"en": 0.6, "de": 0.2, "fr": 0.2})


def test_a_group_without_enough_partners_is_named() -> None:
    # b and c can only be paired with a
    with pytest.raises(ValueError, match=r"(?s)b, c together have 0\.6, but only pairs with a, to"):
        max_entropy([("a", "b"), ("a", "c"), ("a", "d"), ("d", "e")],
                    {"a": 0.2, "b": 0.3, "c": 0.3, "d": 0.1, "e": 0.1})  # fmt: skip


def test_parts_that_cannot_exchange_are_refused() -> None:
    """Two pairs without a language in common: within each the ratios must agree."""
    pairs = [("a", "b"), ("c", "d")]
    fine = max_entropy(pairs, {"a": 0.3, "b": 0.3, "c": 0.2, "d": 0.2})
    assert fine["a", "b"] == pytest.approx(0.3)
    with pytest.raises(ValueError, match=r"a together have 0\.4, but only pairs with b"):
        max_entropy(pairs, {"a": 0.4, "b": 0.2, "c": 0.2, "d": 0.2})


def test_a_language_without_pairs_is_refused() -> None:
    with pytest.raises(ValueError, match=r"c together have 0\.2, but only pairs with nobody"):
        max_entropy([("a", "b")], {"a": 0.4, "b": 0.4, "c": 0.2})


@pytest.mark.parametrize("case", range(60))
def test_feasible_exactly_where_hall_says_so(case: int) -> None:
    """Weights exist exactly if no group of languages asks for more than its partners have."""
    random = np.random.default_rng(case)
    names = "abcdefg"
    pairs = [pair for pair in itertools.combinations(names, 2) if random.random() < 0.4]
    if not pairs:
        pairs = [("a", "b")]
    if case % 2:  # sums over the pairs of some weights, so that there is a solution
        given = {pair: int(random.integers(1, 9)) for pair in pairs if random.random() < 0.8}
        given |= {pairs[0]: 1}
        places = [name for pair, weight in given.items() for name in pair for _ in range(weight)]
    else:
        places = [*names, *random.choice(list(names), 40).tolist()]
    asked = {name: places.count(name) for name in names}
    total = sum(asked.values())
    marginals = {name: count / total for name, count in asked.items()}
    groups = [g for size in range(1, 8) for g in itertools.combinations(names, size)]
    feasible = all(
        sum(asked[name] for name in group)
        <= sum(asked[n] for n in names if any({n, m} in map(set, pairs) for m in group))
        for group in groups
    )
    if feasible:
        weights = max_entropy(pairs, marginals)
        wanted = {name: p for name, p in marginals.items() if p}
        found = {name: p for name, p in marginals_of(weights)[0].items() if p}
        assert found == pytest.approx(wanted, abs=1e-11)
    else:
        with pytest.raises(ValueError, match=r"above 1/2|together have"):
            max_entropy(pairs, marginals)
    if case % 2:
        assert feasible


@pytest.mark.parametrize(
    ("counts", "marginals", "message"),
    [
        ({("a", "a"): 1.0}, {"a": 1.0}, "a language with itself: a"),
        ({("a", "b"): 1.0}, {"a": 1.0}, "no ratio is given for b"),
        ({("a", "b"): 1.0}, {"a": 0.5, "b": 0.4}, r"sum to 0\.9"),
        ({("a", "b"): 1.0}, {"a": 1.5, "b": -0.5}, "at least 0"),
        ({("a", "b"): 0.0}, {"a": 0.5, "b": 0.5}, "above 0; leave empty pairs out"),
        ({}, {}, "there are no pairs"),
        ({("a", "b"): 1.0, ("b", "a"): 1.0}, {"a": 0.5, "b": 0.5}, "b-a is given twice"),
    ],
)
def test_bad_input(counts: dict, marginals: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        min_kl(counts, marginals)


def test_sinkhorn_temperature() -> None:
    one_way = COUNTS | {("1", "3"): 3.0}
    both = one_way | {(target, source): count for (source, target), count in one_way.items()}
    scaled = sinkhorn_temperature(both, 1.0)
    for found in marginals_of(scaled):
        assert found == pytest.approx(dict.fromkeys("0123", 0.25), abs=1e-11)
    warm = sinkhorn_temperature(both, 5.0)
    powers = {pair: weight**0.2 for pair, weight in scaled.items()}
    total = sum(powers.values())
    assert warm == pytest.approx({pair: power / total for pair, power in powers.items()}, rel=1e-9)
    assert max(warm.values()) / min(warm.values()) < max(scaled.values()) / min(scaled.values())


def test_sinkhorn_gives_nothing_to_a_pair_that_equal_marginals_exclude() -> None:
    """Without 1-3, rows 1 and 3 take all of 0 and 2, so nothing is left for 0-2."""
    both = COUNTS | {(target, source): count for (source, target), count in COUNTS.items()}
    weights = sinkhorn_temperature(both, 5.0)
    assert weights["0", "2"] == 0
    assert min(weight for pair, weight in weights.items() if set(pair) != {"0", "2"}) > 0.1


def test_sinkhorn_with_languages_on_one_side_only() -> None:
    weights = sinkhorn_temperature({("en", "de"): 5.0, ("en", "fr"): 1.0}, 1.0)
    assert weights == pytest.approx({("en", "de"): 0.5, ("en", "fr"): 0.5})


def test_sinkhorn_refuses() -> None:
    with pytest.raises(ValueError, match="temperature=0: must be above 0"):
        sinkhorn_temperature({("a", "b"): 1.0}, 0)
    # equal marginals would need 1/2 for a alone on one side of both
    star = {("a", "b"): 1.0, ("b", "a"): 1.0, ("a", "c"): 1.0, ("c", "a"): 1.0}
    with pytest.raises(ValueError, match="b, c together have"):
        sinkhorn_temperature(star, 1.0)


def test_no_convergence_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_sampling, "MAX_ITERATIONS", 2)
    half = np.array([0.5, 0.5])
    with pytest.raises(ValueError, match="not converged in 2 iterations: the ratio of"):
        fit_to_marginals(np.array([[1.0, 1e9], [1.0, 1.0]]), half, half, ["a", "b"], ["a", "b"])

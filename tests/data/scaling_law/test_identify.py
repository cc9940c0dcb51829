"""data.scaling_law.identify: what is missing is named, and what it says would do, does."""

import pytest

from data.scaling_law.fit import FitSettings, UnderdeterminedError, fit_law
from data.scaling_law.runs_table import RunsTable
from tests.data.scaling_law.synthetic import LENGTHS, MIXTURES, SIZES, TRUE, runs_at, sweep

QUICK = {"bootstrap": 0, "folds": 0}
MIXED = MIXTURES[3:]


def refused(table: RunsTable, **settings: object) -> UnderdeterminedError:
    with pytest.raises(UnderdeterminedError) as caught:
        fit_law(table, FitSettings(**(QUICK | settings)))  # type: ignore[arg-type]
    return caught.value


@pytest.mark.parametrize(
    ("table", "words", "enough"),
    [
        (sweep(SIZES[:2]), ["A and alpha need runs of 3 sizes, there are 2"], {"alpha": 0.34}),
        (
            sweep(SIZES, LENGTHS[:2]),
            ["B and beta need runs of 3 training lengths, there are 2 (tokens=3e+07, 1.2e+08)"],
            {"beta": 0.28},
        ),
        (
            sweep(SIZES[:2], LENGTHS[:2]),
            ["A and alpha need", "B and beta need"],
            {"alpha": 0.34, "beta": 0.28},
        ),
        (sweep(SIZES[:1]), ["A and alpha need runs of 3 sizes, there are 1"], {"A": 0.0}),
        (
            sweep(SIZES[:1], LENGTHS[:1]),
            ["A and alpha need", "B and beta need"],
            {"A": 0.0, "B": 0.0},
        ),
        (sweep(mixtures=MIXTURES[:3]), ["gamma needs runs of at least 2", "ratio 1. Add"], None),
        (
            runs_at([(n, d, [(0.6, 0.3, 0.1), (0.2, 0.5, 0.3)][k], 0) for n, d, k in
                     zip(SIZES[:3] * 2, [*LENGTHS, *LENGTHS[::-1]], [0, 1] * 3, strict=True)]),
            ["6 runs for 6 free parameters (E, A, alpha, B, beta, gamma); at least 7"],
            {"alpha": 0.34},
        ),
        # tokens always 20 times the parameters
        (
            runs_at([(n, 20 * n, p, 0) for n in SIZES for p in MIXTURES]),
            ["A, alpha, B, beta cannot be told apart", "add a size at a training length"],
            None,
        ),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(
    table: RunsTable, words: list[str], enough: dict[str, float] | None
) -> None:
    error = refused(table)
    for word in words:
        assert any(word in line for line in error.missing), error.missing
    if enough is not None:
        assert error.enough == enough
    if error.enough is None:
        assert "reduced law" not in str(error)
    else:
        assert "or fit a reduced law with fixed={" in str(error)
        fit_law(table, FitSettings(**QUICK, fixed=error.enough))


def test_families_that_lack_the_same_share_a_line() -> None:
    assert len(refused(sweep(SIZES[:2])).missing) == 1
    assert refused(sweep(SIZES[:2])).missing[0].startswith("germanic, slavic, indic: A and alpha")


def test_only_the_family_that_lacks_is_named() -> None:
    """indic has one ratio, the others have three."""
    mixtures = [(0.6, 0.2, 0.2), (0.2, 0.6, 0.2), (0.4, 0.4, 0.2), (1, 0, 0), (0, 1, 0)]
    error = refused(sweep(mixtures=mixtures))
    assert [line.partition(":")[0] for line in error.missing] == ["indic"]
    assert error.enough is None
    others = fit_law(
        sweep(mixtures=mixtures), FitSettings(**QUICK, families=["germanic", "slavic"])
    )
    assert others.gamma == pytest.approx({"germanic": 0.08, "slavic": 0.1}, abs=1e-6)


def test_the_runs_asked_for_are_enough() -> None:
    """One more size at one length, where there were two sizes."""
    points = [(n, d, p, 0) for n in SIZES[:2] for d in LENGTHS for p in MIXED]
    refused(runs_at(points))
    law = fit_law(runs_at([*points, (SIZES[2], LENGTHS[0], MIXED[0], 0)]), FitSettings(**QUICK))
    assert law.families["indic"].alpha == pytest.approx(TRUE["indic"].alpha, abs=1e-4)


def test_ratios_that_move_with_sizes() -> None:
    """Each size has one ratio, which is a power of it: no fit can tell gamma from the sizes."""
    points = [(n, d, (0.8 * (n / SIZES[-1]) ** 0.5, 0.1, 0.1), 0) for n in SIZES for d in LENGTHS]
    error = refused(runs_at(points), families=["germanic"], fixed={"E": 0.0, "B": 0.0})
    assert any("gamma" in line and "cannot be told apart" in line for line in error.missing)
    assert any("different ratios at one size and length" in line for line in error.missing)

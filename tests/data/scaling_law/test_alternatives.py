"""Checks of the law's assumptions: silent where they hold, loud where they do not."""

from itertools import product

import numpy as np
import pytest

from data.scaling_law.alternatives import _compare, _rank, exponent_check, transfer_check
from data.scaling_law.fit import FitSettings, fit_law
from data.scaling_law.law_checks import check_lines
from data.scaling_law.mixing_law import compare_mixing_law, fit_mixing, largest_group
from data.scaling_law.runs_table import RunsTable, make_table
from data.scaling_law.split_effect import split_effects
from tests.data.scaling_law.synthetic import LENGTHS, MIXTURES, SIZES, TRUE, row, sweep

QUICK = FitSettings(bootstrap=0, folds=0)
GRID = [
    (a, b, round(1 - a - b, 2)) for a, b in product((0.1, 0.2, 0.4, 0.6), repeat=2) if a + b < 0.95
]


def changed(table: RunsTable, factor: object) -> RunsTable:
    """Losses times factor(row, ratios of its run)."""
    wide = table.wide
    return make_table(
        [{**r, "loss": r["loss"] * factor(r, wide[r["run"]])} for r in table.rows]  # type: ignore[operator]
    )


def test_one_gamma_for_all_sizes() -> None:
    table = sweep(SIZES[:3], noise=0.005, mixtures=GRID)
    checks = exponent_check(table, QUICK)
    assert all(check.p_value > 0.01 for check in checks.values())
    assert len(checks["indic"].groups) == 9
    assert checks["indic"].spread < 0.005
    growing = changed(table, lambda r, _: r["ratio"] ** (-0.03 * np.log10(r["num_parameters"])))
    assert all(check.p_value < 1e-6 for check in exponent_check(growing, QUICK).values())


def test_exponents_without_anything_to_compare() -> None:
    single = exponent_check(sweep(SIZES[:1], LENGTHS[:1]), QUICK)["indic"]
    assert np.isnan(single.spread) and np.isnan(single.p_value)
    assert exponent_check(sweep(mixtures=MIXTURES[:3]), QUICK) == {}


def test_transfer_between_families() -> None:
    """indic's loss falls by 5 % a unit of ratio that goes to germanic and not to slavic."""
    table = sweep(SIZES[:3], noise=0.003, mixtures=[*GRID, *MIXTURES[:3]])

    def helped(r: dict, ratios: dict) -> float:
        if r["family"] != "indic":
            return 1.0
        return float(np.exp(-0.025 * (ratios["germanic"] - ratios["slavic"])))

    with_transfer = changed(table, helped)
    checks = transfer_check(with_transfer, fit_law(with_transfer, QUICK).families, QUICK)
    found = checks["indic"]
    assert found.effect["germanic"] == pytest.approx(-0.025, abs=3 * found.std_error["germanic"])
    assert sum(found.effect.values()) == pytest.approx(0, abs=1e-9)
    assert found.std_error["germanic"] < 0.003
    assert found.p_value < 1e-6
    assert found.held_out_rms_with < found.held_out_rms
    assert checks["slavic"].p_value > 0.01
    with pytest.raises(ValueError, match="3 families or more, the table has germanic, slavic"):
        two = make_table([r for r in table.rows if r["family"] != "indic"])
        transfer_check(two, {"germanic": TRUE["germanic"]})


def test_transfer_cannot_be_seen_where_the_rest_is_always_shared_evenly() -> None:
    table = sweep(
        SIZES[:3], noise=0.003, mixtures=[(p, (1 - p) / 2, (1 - p) / 2) for p in (0.2, 0.6)]
    )
    only = FitSettings(bootstrap=0, folds=0, families=["germanic"])
    check = transfer_check(table, fit_law(table, only).families, only)["germanic"]
    assert np.isnan(check.p_value)
    assert check.effect == pytest.approx({"slavic": 0, "indic": 0}, abs=1e-9)


def test_mixing_law_is_found_again() -> None:
    random = np.random.default_rng(0)
    ratios = random.dirichlet([1, 1, 1], 30)
    t = np.array([-1.5, 0.3, 0.1])
    fit = fit_mixing(ratios, 2.0 + np.exp(ratios @ t), ["a", "b", "c"])
    assert fit.c == pytest.approx(2.0, abs=1e-3)
    assert list(fit.t.values()) == pytest.approx(t, abs=1e-3)
    assert fit.loss(ratios[0]) == pytest.approx(2.0 + np.exp(ratios[0] @ t), rel=1e-6)


def test_mixing_law_beside_ours() -> None:
    """Each law predicts left-out runs best where it is the true one."""
    ours = sweep(SIZES[:1], LENGTHS[:1], noise=0.003, mixtures=[*GRID, *MIXTURES[:3]])
    found = compare_mixing_law(ours)
    assert all(one.power_held_out_rms < one.held_out_rms for one in found.values())
    theirs = changed(
        sweep(SIZES[:1], LENGTHS[:1], noise=0.003, mixtures=GRID),
        lambda r, p: (2 + np.exp(1 - 2 * r["ratio"] - p["slavic"])) / TRUE[r["family"]].loss(
            SIZES[0], LENGTHS[0], r["ratio"]),
    )  # fmt: skip
    found = compare_mixing_law(theirs)
    assert found["indic"].held_out_rms < found["indic"].power_held_out_rms
    assert found["indic"].rows == len(GRID)


def test_mixing_law_needs_one_size_and_enough_runs() -> None:
    table = sweep(SIZES[:2], LENGTHS[:1], mixtures=GRID)
    with pytest.raises(ValueError, match="num_parameters: 2 different ones"):
        compare_mixing_law(table)
    assert len(largest_group(table).runs) == len(GRID)
    with pytest.raises(ValueError, match=r"germanic: 4 runs .* for the 4 parameters .* takes 6"):
        compare_mixing_law(sweep(SIZES[:1], LENGTHS[:1]))


def hypothesis_runs(effect: float) -> RunsTable:
    """germanic at 0.4, the rest split in two ways, four seeds each; ln L of one way is larger."""
    table = sweep(SIZES[:1], LENGTHS[:1], [(0.4, 0.5, 0.1), (0.4, 0.1, 0.5)], seeds=4, noise=0.005)
    return changed(table, lambda r, p: np.exp(effect) if p["slavic"] > 0.3 else 1.0)


def test_splits_of_the_rest() -> None:
    (same,) = split_effects(hypothesis_runs(0.0))
    assert (same.family, same.ratio, same.runs) == ("germanic", 0.4, (4, 4))
    assert same.low < 0 < same.high
    (other,) = split_effects(hypothesis_runs(0.05))
    assert other.splits == ({"slavic": 0.5, "indic": 0.1}, {"slavic": 0.1, "indic": 0.5})
    assert other.low < 0.05 < other.high and other.low > 0
    assert other.effect_size == pytest.approx(other.difference / other.seed_std)
    assert 0.002 < other.seed_std < 0.012
    assert "germanic at 0.40: ln L with slavic 0.50/indic 0.10 minus" in other.line
    assert split_effects(hypothesis_runs(0.0), purpose="hypothesis") == []


def test_splits_of_one_run_each_have_no_interval() -> None:
    table = sweep(SIZES[:1], LENGTHS[:1], [(0.4, 0.5, 0.1), (0.4, 0.1, 0.5)])
    (effect,) = split_effects(table)
    assert effect.difference == pytest.approx(0, abs=1e-9)
    assert np.isnan(effect.low) and np.isnan(effect.effect_size)
    assert effect.line.endswith(f"{effect.difference:+.4f}")
    with pytest.raises(ValueError, match="level=95"):
        split_effects(table, level=95)
    assert split_effects(make_table([row()])) == []


def test_all_checks_as_lines() -> None:
    table = sweep(SIZES[:1], LENGTHS[:1], mixtures=[*GRID, *MIXTURES[:3]], seeds=2, noise=0.003)
    reduced = FitSettings(bootstrap=0, folds=0, fixed={"A": 0.0, "B": 0.0})
    text = "\n".join(check_lines(table, fit_law(table, reduced), reduced))
    assert "indic: gamma 0.1" in text and "from one size and length only" in text
    assert "indic: germanic " in text and "error of a run left out" in text
    assert "germanic at 0.40: ln L with slavic 0.10/indic 0.50 minus" in text
    assert "by the data-mixing law (28 runs)" in text


def test_checks_that_the_runs_do_not_allow_say_so() -> None:
    pair = {name: TRUE[name] for name in ("germanic", "slavic")}
    table = sweep(SIZES[:3], laws=pair, mixtures=[(0.2, 0.8), (0.8, 0.2)])
    quick = FitSettings(bootstrap=0, folds=0)
    lines = check_lines(table, fit_law(table, quick), quick)
    assert any("transfer_check needs 3 families" in line for line in lines)
    assert "  no such runs" in lines
    assert any("germanic: 2 runs" in line and "it takes 5" in line for line in lines)
    single = sweep(mixtures=MIXTURES[:3])
    fixed = FitSettings(bootstrap=0, folds=0, fixed={"gamma": 0.1})
    lines = check_lines(single, fit_law(single, fixed), fixed)
    assert "  no two ratios at one size and length" in lines
    assert any("germanic: these runs cannot tell" in line for line in lines)


def test_checks_of_some_families_know_the_ratios_of_all() -> None:
    table = sweep(SIZES[:3], mixtures=[*GRID, *MIXTURES[:3]], noise=0.003)
    some = FitSettings(bootstrap=0, folds=0, families=["germanic"])
    lines = check_lines(table, fit_law(table, some), some)
    assert any("germanic: slavic" in line and "indic" in line for line in lines)
    assert not any(line.startswith("  indic: ") and "mixing" in line for line in lines)


def test_runs_with_a_parameter_of_their_own_are_not_predicted() -> None:
    """The last row alone has the second column: nothing says what it would have been."""
    plain = np.array([[1.0, 0], [1, 0], [1, 0], [1, 0], [1, 1]])
    residual = np.array([0.01, -0.01, 0.02, -0.02, 0.5])
    contrasts = np.array([[0.1, -0.1], [0.1, -0.1], [-0.1, 0.1], [-0.1, 0.1], [0.0, 0.0]])
    check = _compare(residual, plain, contrasts, ["a", "b"])
    # the mean of the other three of four is off by 4/3 of the residual
    assert check.held_out_rms == pytest.approx(4 / 3 * np.sqrt(np.mean(residual[:4] ** 2)))
    # and a row of its pair by twice the residual around the pair's mean, 0
    assert check.held_out_rms_with == pytest.approx(2 * np.sqrt(np.mean(residual[:4] ** 2)))
    few = _compare(residual[2:], plain[2:], contrasts[2:], ["a", "b"])
    assert np.isnan(few.held_out_rms) and np.isnan(few.held_out_rms_with)


def test_ranks_are_counted_by_numpy_1_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its matrix_rank has no rtol, only the absolute tol."""
    rank = np.linalg.matrix_rank

    def of_numpy_1(A: np.ndarray, tol: float | None = None, hermitian: bool = False) -> int:
        return int(rank(A, tol=tol, hermitian=hermitian))

    monkeypatch.setattr(np.linalg, "matrix_rank", of_numpy_1)
    table = sweep(SIZES[:3], mixtures=[*GRID, *MIXTURES[:3]], noise=0.003)
    quick = FitSettings(bootstrap=0, folds=0)
    check = transfer_check(table, fit_law(table, quick).families, quick)["indic"]
    assert 0 <= check.p_value <= 1


def test_tolerance_of_ranks_is_relative() -> None:
    columns = np.array([[1.0, 0], [0, 1e-6], [0, 0]])
    assert [_rank(columns * scale) for scale in (1e-8, 1.0, 1e8)] == [2, 2, 2]
    assert _rank(columns * [1, 1e-6]) == 1

"""data.scaling_law.fit: known laws are found again, from whole and from small sweeps."""

import math
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.scaling_law.fit import FitSettings, fit_chinchilla, fit_gamma, fit_law
from data.scaling_law.identify import UnderdeterminedError
from data.scaling_law.law import FamilyLaw, ScalingLaw
from data.scaling_law.runs_table import RunsTable, make_table
from tests.data.scaling_law.synthetic import LENGTHS, MIXTURES, SIZES, TRUE, row, runs_at, sweep

QUICK = {"bootstrap": 0, "folds": 0}


@pytest.fixture(scope="module")
def noisy() -> ScalingLaw:
    return fit_law(sweep(noise=0.005, seed=3), source="/somewhere/sweep")


def test_known_laws_are_found_again_from_exact_losses() -> None:
    law = fit_law(sweep(), FitSettings(**QUICK))
    for family, true in TRUE.items():
        assert asdict(law.families[family]) == pytest.approx(asdict(true), rel=1e-6)
        assert law.residual_std[family] < 1e-9
    assert law.provenance["warnings"] == []


@settings(max_examples=10, deadline=None)
@given(
    E=st.floats(0.5, 2.5),
    A_share=st.floats(0.1, 2.0),  # of E, at the middle of the sweep
    alpha=st.floats(0.15, 0.7),
    B_share=st.floats(0.1, 2.0),
    beta=st.floats(0.15, 0.7),
    gamma=st.floats(0.0, 0.4),
)
def test_any_law_is_found_again(
    E: float, A_share: float, alpha: float, B_share: float, beta: float, gamma: float
) -> None:
    true = FamilyLaw(
        E=E,
        A=E * A_share * 8e6**alpha,
        alpha=alpha,
        B=E * B_share * 1.2e8**beta,
        beta=beta,
        gamma=gamma,
    )
    only = FitSettings(**QUICK, families=["germanic"])
    found = fit_law(sweep(laws={**TRUE, "germanic": true}), only).families["germanic"]
    assert found.gamma == pytest.approx(gamma, abs=1e-6)
    # far away too; E, A and alpha on their own may trade off within the rounding of the losses
    assert found.loss(1e9, 2e10, 0.1) == pytest.approx(true.loss(1e9, 2e10, 0.1), rel=1e-4)


def test_known_laws_are_found_again_from_noisy_losses(noisy: ScalingLaw) -> None:
    for family, true in TRUE.items():
        found, bootstrap = noisy.families[family], noisy.bootstrap[family]
        error = np.std([one.gamma for one in bootstrap])
        assert 1e-4 < error < 4e-3
        assert abs(found.gamma - true.gamma) < 3 * error
        assert 0.0035 < noisy.residual_std[family] < 0.0065
        quality = noisy.quality[family]
        assert quality["r2"] > 0.995
        assert 0.004 < quality["held_out_rms"] < 0.01
        assert quality["held_out_r2"] < quality["r2"]
        assert quality["largest_size_rms"] < 0.03
        assert abs(quality["gamma_alone"] - true.gamma) < 4 * quality["gamma_alone_error"]


@pytest.mark.parametrize(
    ("sweeps", "low", "high"),
    [(3, 6 / 9, 1.0), pytest.param(40, 0.83, 0.96, marks=pytest.mark.slow)],
)
def test_intervals_hold_new_runs_about_as_often_as_they_say(
    sweeps: int, low: float, high: float
) -> None:
    """Sweeps of 27 runs, three families, 90 % intervals at a point inside of the range."""
    inside = []
    for number in range(sweeps):
        table = sweep(SIZES[:3], mixtures=MIXTURES[3:], noise=0.005, seed=number)
        law = fit_law(table, FitSettings(bootstrap=40, folds=0))
        random = np.random.default_rng(100 + number)
        for family, (below, above) in law.interval(8e6, 1e8, dict.fromkeys(TRUE, 0.3)).items():
            new = TRUE[family].loss(8e6, 1e8, 0.3) * math.exp(0.005 * random.normal())
            inside.append(below <= new <= above)
    assert low <= np.mean(inside) <= high


def test_refits_of_all_families_belong_to_the_same_resample() -> None:
    """Two families with the very same losses have the very same refits."""
    twins = {name: TRUE["indic"] for name in ("a", "b")}
    table = sweep(laws=twins, mixtures=[(0.5, 0.5), (0.2, 0.2)], noise=0.005)
    first = {r["run"]: r["loss"] for r in table.rows if r["family"] == "a"}
    same = make_table([{**r, "loss": first[r["run"]]} for r in table.rows])
    law = fit_law(same, FitSettings(bootstrap=5, folds=0))
    assert law.bootstrap["a"] == law.bootstrap["b"]
    assert len({one.gamma for one in law.bootstrap["a"]}) == 5


def test_a_fit_repeats_to_the_bit_and_another_seed_resamples_otherwise() -> None:
    table = sweep(SIZES[:3], noise=0.005)
    laws = [fit_law(table, FitSettings(bootstrap=4, folds=0, seed=seed)) for seed in (1, 1, 2)]
    assert laws[0].bootstrap == laws[1].bootstrap != laws[2].bootstrap
    assert laws[0].families == laws[2].families


def test_provenance(noisy: ScalingLaw) -> None:
    table = sweep(noise=0.005, seed=3)
    told = noisy.provenance
    assert told["source"] == "/somewhere/sweep"
    assert told["table_sha256"] == table.checksum()
    assert told["settings"]["huber_delta"] == 0.01
    assert told["runs"] == table.runs
    assert set(told["versions"]) == {"numpy", "scipy", "python"}
    # single-family runs have two families at ratio 0
    assert len(told["left_out"]) == 2 * 3 * len(SIZES) * len(LENGTHS)
    assert noisy.fitted_range.num_parameters == (1e6, 64e6)
    assert noisy.fitted_range.ratios["indic"] == (0.2, 1.0)


def test_runs_that_check_predictions_are_not_fitted_to() -> None:
    table = sweep(SIZES[:3])
    wrong = [
        {**r, "run": f"confirm {r['run']}", "purpose": "confirm", "loss": 2 * r["loss"]}
        for r in table.rows[:9]
    ]
    law = fit_law(make_table([*table.rows, *wrong]), FitSettings(**QUICK))
    assert law.families["indic"].gamma == pytest.approx(0.15, abs=1e-6)
    assert "confirm run0: its purpose is one of confirm" in law.provenance["left_out"]
    with pytest.raises(ValueError, match="all runs are for confirm"):
        fit_law(make_table(wrong))


def test_a_failed_run_is_left_out_and_named() -> None:
    rows = [dict(r) for r in sweep(SIZES[:3]).rows]
    rows[9]["loss"] = math.nan
    law = fit_law(make_table(rows), FitSettings(**QUICK))
    assert asdict(law.families["germanic"]) == pytest.approx(asdict(TRUE["germanic"]), rel=1e-5)
    line = f"{rows[9]['run']}, {rows[9]['family']}: loss=nan: the run failed or diverged"
    assert line in law.provenance["left_out"]


def test_chinchilla_part_from_runs_of_one_family() -> None:
    for family, found in fit_chinchilla(sweep()).items():
        assert asdict(found) == pytest.approx(asdict(TRUE[family]) | {"gamma": 0.0}, rel=1e-5)
    with pytest.raises(UnderdeterminedError, match="indic: there is no run of it alone"):
        fit_chinchilla(sweep(mixtures=MIXTURES[3:]))


def test_gamma_alone_needs_one_size_and_no_other_parameter() -> None:
    found = fit_gamma(sweep(SIZES[:1], LENGTHS[:1]))
    for family, one in found.items():
        assert one.gamma == pytest.approx(TRUE[family].gamma, rel=1e-9)
        assert (one.groups, one.rows) == (1, 4)
    noisy = fit_gamma(sweep(noise=0.01, seed=5))["slavic"]
    assert abs(noisy.gamma - TRUE["slavic"].gamma) < 3 * noisy.std_error < 0.015
    with pytest.raises(
        UnderdeterminedError, match=r"(?s)germanic: gamma needs.*indic: gamma needs"
    ):
        fit_gamma(sweep(mixtures=MIXTURES[:3]))


@pytest.mark.parametrize(
    ("table", "fixed", "terms"),
    [
        (sweep(SIZES[:1]), {"A": 0.0}, ("E", "B")),
        (sweep(SIZES[:1], LENGTHS[:1]), {"A": 0.0, "B": 0.0}, ("E",)),
        (sweep(SIZES[:2]), {"alpha": 0.28}, ("E", "A", "B")),
        (sweep(SIZES[:2]), {"E": 1.2}, ("E", "A", "B")),
        (sweep(), {"E": 0.0}, ("A", "B")),
    ],
)
def test_reduced_laws_for_small_sweeps(
    table: RunsTable, fixed: dict[str, float], terms: tuple[str, ...]
) -> None:
    law = fit_law(table, FitSettings(**QUICK, fixed=fixed, families=["indic"]))
    found = law.families["indic"]
    assert law.terms == terms and law.fixed == fixed
    assert found.gamma == pytest.approx(0.15, abs=2e-3)
    assert found.loss(1e6, 3e7, 0.6) == pytest.approx(TRUE["indic"].loss(1e6, 3e7, 0.6), rel=0.01)
    for name, value in fixed.items():
        assert getattr(found, name) == pytest.approx(value)


def test_doubts_stand_in_the_provenance() -> None:
    rising = FamilyLaw(E=2.0, A=0.0, alpha=0.3, B=200.0, beta=0.3, gamma=-0.05)
    laws = {**TRUE, "germanic": rising}
    only = FitSettings(**QUICK, families=["germanic"])
    doubts = fit_law(sweep(laws=laws), only).provenance["warnings"]
    assert any("germanic: gamma=-0.05: losses do not fall" in line for line in doubts)
    assert any("germanic: the term of A has vanished" in line for line in doubts)
    step = FamilyLaw(E=2.0, A=1e30, alpha=4.8, B=200.0, beta=0.3, gamma=0.1)
    doubts = fit_law(sweep(laws={**TRUE, "germanic": step}), only).provenance["warnings"]
    assert any("germanic: alpha=3 stopped at the end of its range" in line for line in doubts)
    spread = runs_at(
        [(n, d, (p, 1 - p, 0), 0) for n, p in zip(SIZES, (0.1, 0.2, 0.4, 0.8), strict=True)
         for d in LENGTHS]
    )  # fmt: skip
    doubts = fit_law(spread, FitSettings(**QUICK, families=["germanic"])).provenance["warnings"]
    assert any("no two ratios at one size" in line for line in doubts)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"huber_delta": 0.0}, "huber_delta=0.0: must be above 0"),
        ({"fixed": {"delta": 1.0}}, "fixed: delta is none of E, A, alpha"),
        ({"fixed": {"alpha": -1.0}}, "fixed: alpha=-1.0: must be a number of at least 0"),
        ({"fixed": {"A": 3.0}}, "fixed: A=3.0: can only be 0"),
        ({"fixed": {"E": 0.0, "A": 0.0, "B": 0.0}}, "leave no loss"),
        ({"bootstrap": -1}, "bootstrap=-1: must be at least 0"),
        ({"folds": 1}, "folds=1: leaving all runs out"),
        ({"folds": -1, "seed": -1}, "(?s)folds=-1.*seed=-1"),
    ],
)
def test_settings_without_meaning(changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FitSettings(**changed)


def test_families_that_are_not_there() -> None:
    with pytest.raises(ValueError, match="none of romance; it has germanic, slavic, indic"):
        fit_law(sweep(SIZES[:1]), FitSettings(families=["romance"]))
    rows = [*sweep(SIZES[:1]).rows, row(run="run0", family="uralic", ratio=0.0, num_parameters=1e6)]
    rows[-1] |= {name: rows[0][name] for name in ("purpose", "tokens", "seed")}
    with pytest.raises(UnderdeterminedError, match="uralic: no run has a loss of it"):
        fit_law(make_table(rows))

"""data.scaling_law.mixture_table and mixture_plot."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.scaling_law.law import FamilyLaw, ScalingLaw
from data.scaling_law.mixture_plot import plot_mixtures
from data.scaling_law.mixture_table import as_json, baselines, compare_mixtures, describe
from data.scaling_law.optimum import Goal, Objective, optimal_ratios
from tests.data.scaling_law.test_optimum import law_of

N, D = 1_300_000_000, 1e11
GAMMA = {"germanic": 0.08, "indic": 0.15, "slavic": 0.10}
SUPPLY = {"germanic": 9e10, "indic": 5e9, "slavic": 3e10}


def with_bootstrap(law: ScalingLaw, resamples: int = 40, spread: float = 0.01) -> ScalingLaw:
    draw = np.random.default_rng(0)
    return replace(
        law,
        bootstrap={
            name: [
                replace(one, gamma=one.gamma + spread * draw.standard_normal(), E=one.E * scale)
                for scale in np.exp(0.01 * draw.standard_normal(resamples))
            ]
            for name, one in law.families.items()
        },
    )


LAW = with_bootstrap(law_of(GAMMA))


def test_what_it_compares_with() -> None:
    others = baselines(list(SUPPLY), SUPPLY, tokens=1.2e11, max_epochs=4)
    assert list(others) == ["uniform", "proportional", "temp. 0.7", "temp. 0.3", "unimax"]
    assert others["proportional"]["germanic"] == pytest.approx(0.72)
    powers = [n**0.3 for n in SUPPLY.values()]
    assert list(others["temp. 0.3"].values()) == pytest.approx([x / sum(powers) for x in powers])
    # UniMax: indic is worth four passes, 20 of 120 G tokens, and the others share what is left
    assert list(others["unimax"].values()) == pytest.approx([50 / 120, 20 / 120, 50 / 120])
    assert list(baselines(list(SUPPLY), None, 1.2e11, None)) == ["uniform"]


def test_numbers_are_the_laws() -> None:
    goal = Goal(num_parameters=N, tokens=D, objective=Objective.sum, supply=SUPPLY)
    table = compare_mixtures(LAW, goal, baselines(list(SUPPLY), SUPPLY, D, None))
    best, uniform = table.mixtures[:2]
    assert best.name == "optimum" and best.ratios == optimal_ratios(LAW, goal).ratios
    assert best.gain == 0 and best.gain_interval == (0, 0)
    assert min(mixture.gain for mixture in table.mixtures[1:]) > 0
    assert uniform.losses == LAW.loss(N, D, dict.fromkeys(GAMMA, 1 / 3))
    assert uniform.loss_intervals == LAW.interval(N, D, uniform.ratios, 0.9)
    assert uniform.total == pytest.approx(sum(uniform.losses.values()))
    assert uniform.objective == pytest.approx(uniform.total)
    assert uniform.gain == pytest.approx(uniform.total - best.total)
    assert uniform.normalized_total == pytest.approx(sum(3**g for g in GAMMA.values()))
    assert uniform.epochs is not None
    assert uniform.epochs["indic"] == pytest.approx(D / 3 / 5e9)


def test_intervals_are_those_of_the_resamples() -> None:
    goal = Goal(num_parameters=N, tokens=D)
    table = compare_mixtures(LAW, goal, baselines(list(GAMMA), None, D, None), level=0.8)
    best, uniform = table.mixtures
    refits = [{f: LAW.bootstrap[f][i] for f in GAMMA} for i in range(40)]
    totals = [sum(one.loss(N, D, 1 / 3) for one in refit.values()) for refit in refits]
    assert uniform.total_interval == pytest.approx(np.quantile(totals, [0.1, 0.9]))
    gains = [
        sum((1 / 3) ** -one.gamma - best.ratios[f] ** -one.gamma for f, one in refit.items())
        for refit in refits
    ]
    assert uniform.gain_interval == pytest.approx(np.quantile(gains, [0.1, 0.9]))
    assert table.ratio_intervals is not None
    for family, (low, high) in table.ratio_intervals.items():
        assert low < best.ratios[family] < high


def test_resamples_in_which_a_family_gains_nothing() -> None:
    law = with_bootstrap(law_of(GAMMA), spread=0.2)
    assert min(one.gamma for one in law.bootstrap["germanic"]) < 0
    goal = Goal(num_parameters=N, tokens=D, at_least=0.01)
    table = compare_mixtures(law, goal, {})
    assert table.ratio_intervals is not None
    assert table.ratio_intervals["germanic"][0] == pytest.approx(0.01)


def test_the_table_says_what_holds_the_ratios() -> None:
    goal = Goal(num_parameters=N, tokens=D, at_least=0.3, supply=SUPPLY, max_epochs=7)
    text = describe(compare_mixtures(LAW, goal, baselines(list(SUPPLY), SUPPLY, D, 7)))
    lines = {line.split()[0]: line for line in text.splitlines() if line}
    assert "_ at the lower bound: germanic, slavic" not in text  # only one of them can be
    assert "_ at the lower bound: germanic" in text
    assert "^ all the text there is in 7 epochs: indic" in text
    assert "! more than 7 epochs" not in text or "!" in lines["indic"]
    assert max(map(len, text.splitlines())) <= 100
    ratios = text.splitlines()[2:5]
    assert ratios[0].split()[:3] == ["germanic", "30.000_", "33.333"]
    assert ratios[1].split()[:2] == ["indic", "35.000^"]


def test_other_mixtures_that_break_the_cap_are_marked() -> None:
    goal = Goal(num_parameters=N, tokens=D, supply=SUPPLY, max_epochs=4)
    text = describe(compare_mixtures(LAW, goal, baselines(list(SUPPLY), SUPPLY, D, 4)))
    assert "! more than 4 epochs" in text
    epochs = text.splitlines()[text.splitlines().index("epochs") + 2].split()
    assert epochs[:3] == ["indic", "4", "6.667!"]


def test_without_bootstrap_and_without_sizes() -> None:
    table = compare_mixtures(law_of(GAMMA), Goal(num_parameters=N, tokens=D), {})
    text = describe(table)
    assert "fitted without bootstrap" in text and "epochs" not in text
    assert table.ratio_intervals is None and table.mixtures[0].gain_interval is None


def test_json() -> None:
    goal = Goal(num_parameters=N, tokens=D, supply=SUPPLY, max_epochs=4)
    table = compare_mixtures(LAW, goal, baselines(list(SUPPLY), SUPPLY, D, 4))
    content = json.loads(json.dumps(as_json(table), allow_nan=False))
    assert content["goal"]["objective"] == "normalized" and content["goal"]["tokens"] == D
    assert content["optimum"]["at_bounds"] == {"indic": "supply"}
    assert content["mixtures"][0]["ratios"] == table.mixtures[0].ratios


@pytest.mark.parametrize("families", [3, 40])
def test_a_plot(tmp_path: Path, families: int) -> None:
    names = [f"family {i}" for i in range(families)]
    law = with_bootstrap(law_of({name: 0.05 + 0.01 * i for i, name in enumerate(names)}), 5)
    supply = {name: 1e9 * math.exp(i / 5) for i, name in enumerate(names)} if families > 3 else None
    goal = Goal(num_parameters=N, tokens=1e10, supply=supply, max_epochs=4 if supply else None)
    table = compare_mixtures(law, goal, baselines(names, supply, 1e10, 4))
    path = plot_mixtures(table, tmp_path / "new" / "mixtures.png")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert max(map(len, describe(table).splitlines())) <= 100


def test_a_family_law_is_what_the_tests_take_it_for() -> None:
    assert FamilyLaw(E=2, A=0, alpha=1, B=0, beta=1, gamma=0.5).loss(N, D, 0.25) == 4

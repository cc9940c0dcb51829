"""data.scaling_law.law: predictions by hand, intervals, warnings, and the file."""

import math
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import yaml

from data.scaling_law.law import FamilyLaw, FittedRange, ScalingLaw
from data.scaling_law.yaml_file import write_yaml
from tests.data.scaling_law.synthetic import TRUE

ONE = FamilyLaw(E=1.5, A=400.0, alpha=0.5, B=300.0, beta=0.25, gamma=0.1)
PLAIN = {"E": 1.5, "A": 400.0, "alpha": 0.5, "B": 300.0, "beta": 0.25, "gamma": 0.1}


def law(**changed: object) -> ScalingLaw:
    values = {
        "families": {"a": ONE, "b": TRUE["indic"]},
        "fitted_range": FittedRange((1e6, 1e8), (1e8, 1e10), {"a": (0.1, 1.0), "b": (0.2, 1.0)}),
        "residual_std": {"a": 0.01, "b": 0.0},
    }
    return ScalingLaw(**(values | changed))  # type: ignore[arg-type]


def refits(count: int, spread: float) -> list[FamilyLaw]:
    random = np.random.default_rng(0)
    return [
        FamilyLaw(**(PLAIN | {"E": 1.5 * math.exp(spread * random.normal())})) for _ in range(count)
    ]


def test_loss_by_hand() -> None:
    # 400 / 1e6^0.5 = 0.4, 300 / 1e8^0.25 = 3
    assert ONE.single_family_loss(1e6, 1e8) == pytest.approx(4.9, rel=1e-12)
    assert ONE.loss(1e6, 1e8, 0.5) == pytest.approx(4.9 * 2**0.1, rel=1e-12)
    many = ONE.loss(np.array([1e6, 1e8])[:, None], 1e8, np.array([0.25, 0.5, 1.0]))
    assert many.shape == (2, 3)
    assert many[0, 2] == pytest.approx(4.9)


def test_losses_of_a_mixture() -> None:
    two = law()
    assert two.loss(1e6, 1e8, {"a": 0.5, "b": 0.5})["a"] == pytest.approx(4.9 * 2**0.1)
    assert list(two.loss(1e6, 1e8, {"b": 0.3})) == ["b"]
    assert two.single_family_losses(1e6, 1e8)["a"] == pytest.approx(4.9)
    assert two.gamma == {"a": 0.1, "b": 0.15}


def test_without_refits_the_interval_is_the_residual_scatter() -> None:
    z = NormalDist().inv_cdf(0.95)
    low, high = law().interval(1e6, 1e8, {"a": 1.0}, level=0.9)["a"]
    assert math.log(high / 4.9) == pytest.approx(0.01 * z, rel=1e-6)
    assert math.log(low / 4.9) == pytest.approx(-0.01 * z, rel=1e-6)


def test_the_interval_adds_the_spread_of_refits_to_the_scatter() -> None:
    with_spread = law(bootstrap={"a": refits(400, 0.05), "b": refits(400, 0.05)})
    # ln L of the refits scatters by 0.05 x E / L = 0.0153; the residuals by another 0.01
    low, high = with_spread.interval(1e6, 1e8, {"a": 1.0, "b": 1.0}, level=0.9)["a"]
    assert math.log(high / low) == pytest.approx(2 * 1.645 * math.hypot(0.0153, 0.01), rel=0.1)
    only_refits = with_spread.interval(1e6, 1e8, {"b": 1.0}, level=0.5)["b"]
    losses = [one.loss(1e6, 1e8, 1.0) for one in refits(400, 0.05)]
    inside = np.mean([only_refits[0] <= loss <= only_refits[1] for loss in losses])
    assert inside == pytest.approx(0.5, abs=0.01)


def test_extrapolation_says_by_which_factor() -> None:
    two = law()
    assert two.extrapolation(1e6, 1e10, {"a": 0.1, "b": 1.0}) == []
    lines = two.extrapolation(1e9, 1e7, {"a": 0.05, "b": 0.2})
    assert lines == [
        "num_parameters=1e+09: 10 times the largest fitted (1e+08)",
        "tokens=1e+07: 10 times below the smallest fitted (1e+08)",
        "ratio of a=0.05: 2 times below the smallest fitted (0.1)",
    ]


def test_extrapolation_without_a_term_says_so() -> None:
    reduced = law(terms=("E", "B"), fixed={"A": 0.0})
    assert reduced.extrapolation(2e8, 1e9, {"a": 0.5}) == [
        "num_parameters=2e+08: 2 times the largest fitted (1e+08); the law has no term in "
        "num_parameters, so its prediction does not change"
    ]


def test_a_saved_law_is_the_same_when_loaded(tmp_path: Path) -> None:
    whole = law(
        bootstrap={"a": refits(3, 0.1), "b": refits(3, 0.1)},
        fixed={"alpha": 0.34},
        quality={"a": {"r2": 0.99}, "b": {"r2": 0.98}},
        provenance={"source": "sweep", "runs": ["r1", "r2"], "left_out": ["r3, b: loss=nan"]},
    )
    path = tmp_path / "new" / "law.yaml"
    whole.save(path)
    assert ScalingLaw.load(path) == whole
    assert [item.name for item in path.parent.iterdir()] == ["law.yaml"]
    text = path.read_text()
    assert "  a: {E: 1.5, A: 400.0, alpha: 0.5, B: 300.0, beta: 0.25, gamma: 0.1}\n" in text


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "law.yaml"
    law().save(path)
    before = path.read_text()
    with pytest.raises(yaml.YAMLError):
        law(provenance={"what": object()}).save(path)
    with pytest.raises(UnicodeEncodeError):
        write_yaml(path, {"what": 1}, "\ud800")
    assert path.read_text() == before
    assert [item.name for item in tmp_path.iterdir()] == ["law.yaml"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"E": math.nan}, "E=nan: must be finite"),
        ({"A": -1.0, "beta": -0.1}, "A=-1.0, beta=-0.1: must be at least 0"),
        ({"E": 0.0, "A": 0.0, "B": 0.0}, "one of them must be above 0"),
    ],
)
def test_family_laws_without_meaning(changed: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FamilyLaw(**(PLAIN | changed))


def test_what_cannot_be_predicted() -> None:
    with pytest.raises(ValueError, match=r"ratio=0.0: must lie above 0 .* such as 0.01"):
        law().loss(1e6, 1e8, {"a": 0.0})
    with pytest.raises(ValueError, match=r"num_parameters=0.0: must be finite and above 0"):
        ONE.loss(0, 1e8, 0.5)
    with pytest.raises(ValueError, match="knows nothing of indic; it was fitted to a, b"):
        law().loss(1e6, 1e8, {"indic": 0.5})
    with pytest.raises(ValueError, match="level=90: must lie between 0 and 1"):
        law().interval(1e6, 1e8, {"a": 0.5}, level=90)


def test_laws_whose_parts_do_not_fit_together() -> None:
    with pytest.raises(ValueError, match="residual_std is given for a; the law has a, b"):
        law(residual_std={"a": 0.1})
    with pytest.raises(ValueError, match="different numbers of refits"):
        law(bootstrap={"a": [ONE], "b": [ONE, ONE]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("format: 2\n", "of format 1: format is 2"),
        ("- 1\n", "format is list"),
        ("format: 1\n", "'bootstrap_columns' is missing"),
        (
            "format: 1\nbootstrap_columns: []\nfitted_range: {}\nfamilies: []\n",
            "is not a scaling law",
        ),
        ("{", "law.yaml is not a scaling law"),
    ],
)
def test_files_that_are_no_laws(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "law.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        ScalingLaw.load(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such scaling law"):
        ScalingLaw.load(tmp_path / "law.yaml")

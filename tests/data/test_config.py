import pytest

from data.config import DataConfig, MixtureConfig, Weighting


def test_defaults_are_valid() -> None:
    assert DataConfig().mixture.weighting is Weighting.temperature


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"seq_length": 0}, "data.seq_length=0"),
        ({"validation_fraction": 0.0}, "data.validation_fraction=0.0"),
        ({"validation_fraction": 1.0}, "data.validation_fraction=1.0"),
        ({"languages": ["de", "fr", "de"]}, "data.languages names de more than once"),
        ({"seed": -1}, "data.seed=-1"),
    ],
)
def test_data_settings_are_checked(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DataConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"alpha": -0.1}, "data.mixture.alpha=-0.1"),
        ({"alpha": float("nan")}, "data.mixture.alpha=nan"),
        ({"ratios": {"slavic": 1.0}}, "set data.mixture.weighting=ratios or remove"),
        ({"weighting": Weighting.ratios}, "at least one family with a positive ratio"),
        ({"weighting": Weighting.ratios, "ratios": {"slavic": 0.0}}, "with a positive ratio"),
        ({"weighting": Weighting.ratios, "ratios": {"a": -1.0, "b": 2.0}}, "'a': -1.0"),
    ],
)
def test_mixture_settings_are_checked(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MixtureConfig(**settings)

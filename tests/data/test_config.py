import pytest

from data.config import (
    DataConfig,
    MixtureConfig,
    MixtureStage,
    Weighting,
    WithinFamily,
)


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
        ({"prefetch": -1}, "data.prefetch=-1"),
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
        ({"within_family_alpha": -1.0}, "data.mixture.within_family_alpha=-1.0"),
        ({"weighting": Weighting.ratios}, "at least one ratio must be above 0"),
        ({"weighting": Weighting.ratios, "ratios": {"slavic": 0.0}}, "at least one ratio must"),
        ({"weighting": Weighting.ratios, "ratios": {"a": -1.0, "b": 2.0}}, "'a': -1.0"),
        (
            {"weighting": Weighting.ratios, "ratios": {"a": 0.5, "b": 0.4}},
            r"data.mixture.ratios sum to 0.9, 0.1 too little.*data.mixture.normalize=true",
        ),
        ({"weighting": Weighting.scaling_law}, "needs data.mixture.gamma"),
        ({"weighting": Weighting.scaling_law, "gamma": {"a": 0.0}}, "gamma.a=0.0 must be"),
        ({"gamma": {"a": 0.1}}, "set data.mixture.weighting=scaling_law or remove"),
        ({"losses": {"a": 0.1}}, "set data.mixture.weighting=scaling_law or remove"),
        ({"budget": 10.0}, "set data.mixture.weighting=unimax or remove"),
        ({"weighting": Weighting.unimax, "max_epochs": 2.0}, "data.mixture.budget=None"),
        ({"weighting": Weighting.unimax, "budget": 1e9}, "data.mixture.max_epochs=null"),
        (
            {
                "weighting": Weighting.unimax,
                "budget": 1e9,
                "max_epochs": 1.0,
                "within_family": WithinFamily.uniform,
            },
            "within_family=uniform: weighting=unimax weighs",
        ),
        ({"within_family": WithinFamily.shares}, "shares need both"),
        ({"language_shares": {"de": 1.0}}, "shares need both"),
        ({"max_epochs": 0.0}, "data.mixture.max_epochs=0.0 must be"),
        ({"language_max_epochs": {"de": -1.0}}, "language_max_epochs.de=-1.0 must be"),
        ({"stages": [MixtureStage()]}, r"stages\[0\].from_tokens=0: must come after"),
        (
            {
                "stages": [
                    MixtureStage(from_tokens=100, ramp_tokens=50),
                    MixtureStage(from_tokens=120),
                ]
            },
            r"stages\[1\].from_tokens=120: .* at least 151",
        ),
        (
            {"stages": [MixtureStage(from_tokens=5, ramp_tokens=-1)]},
            r"stages\[0\].ramp_tokens=-1",
        ),
        (
            {"stages": [MixtureStage(from_tokens=5, alpha=-1.0)]},
            r"data.mixture.stages\[0\].alpha=-1",
        ),
    ],
)
def test_mixture_settings_are_checked(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MixtureConfig(**settings)

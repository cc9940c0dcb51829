"""The published scales, to the digits their formulas give."""

import pytest

from models.config import LayerNormPlacement
from models.magneto import (
    deepnorm_alpha,
    deepnorm_beta,
    initial_gain,
    magneto_gain,
    residual_scale,
)


@pytest.mark.parametrize(
    ("layers", "gain"),
    [
        (6, 1.576359),
        (12, 1.782710),
        (24, 1.967537),
        (32, 2.039334),
        (40, 2.093329),
        (48, 2.136434),
        (72, 2.229308),
        (96, 2.292923),
    ],
)
def test_magneto_gain(layers: int, gain: float) -> None:
    assert magneto_gain(layers) == pytest.approx(gain, abs=5e-7)


@pytest.mark.parametrize(
    ("layers", "alpha", "beta"),
    [
        (12, 2.213364, 0.319472),
        (24, 2.632148, 0.268642),
        (32, 2.828427, 0.250000),
        (48, 3.130169, 0.225901),
        (96, 3.722419, 0.189959),
    ],
)
def test_deepnorm_scales(layers: int, alpha: float, beta: float) -> None:
    assert deepnorm_alpha(layers) == pytest.approx(alpha, abs=5e-7)
    assert deepnorm_beta(layers) == pytest.approx(beta, abs=5e-7)


def test_which_placement_scales_what() -> None:
    scales = {p: (residual_scale(p, 24), initial_gain(p, 24)) for p in LayerNormPlacement}
    deepnorm = (deepnorm_alpha(24), deepnorm_beta(24))
    assert scales == {
        LayerNormPlacement.sub_ln: (1.0, magneto_gain(24)),
        LayerNormPlacement.pre_ln: (1.0, 1.0),
        LayerNormPlacement.post_ln: (1.0, 1.0),
        LayerNormPlacement.deepnorm: deepnorm,
        LayerNormPlacement.deepnorm_pre_ln: deepnorm,
    }

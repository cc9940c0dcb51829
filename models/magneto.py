"""The scales of Magneto (arXiv 2210.06423) and DeepNorm (arXiv 2203.00555) for decoder-only models.

Both multiply the same weights after a standard initialisation: the attention's value and output
projections and both feed-forward matrices; queries and keys keep gain 1 (arXiv 2210.06423
section 3.2, arXiv 2203.00555 section 4). Embeddings are not in either paper's list and stay
unscaled. A gated feed-forward is not covered by the papers; gate and up are both treated as fc1.
"""

import math

from models.config import LayerNormPlacement


def magneto_gain(num_layers: int) -> float:
    """γ = sqrt(ln 2M) for M decoder layers; 24 layers: 1.967537."""
    return math.sqrt(math.log(2 * num_layers))


def deepnorm_alpha(num_layers: int) -> float:
    """Scale of the residual branch, (2M)^(1/4) for M decoder layers; 24 layers: 2.632148."""
    return (2 * num_layers) ** 0.25


def deepnorm_beta(num_layers: int) -> float:
    """Gain of the scaled weights, (8M)^(-1/4) for M decoder layers; 24 layers: 0.268642."""
    return (8 * num_layers) ** -0.25


def residual_scale(placement: LayerNormPlacement, num_layers: int) -> float:
    """α in x ← α·x + sublayer(x)."""
    if placement in (LayerNormPlacement.deepnorm, LayerNormPlacement.deepnorm_pre_ln):
        return deepnorm_alpha(num_layers)
    return 1.0


def initial_gain(placement: LayerNormPlacement, num_layers: int) -> float:
    """Gain of value, output, fc1 and fc2 weights at initialisation."""
    if placement is LayerNormPlacement.sub_ln:
        return magneto_gain(num_layers)
    if placement in (LayerNormPlacement.deepnorm, LayerNormPlacement.deepnorm_pre_ln):
        return deepnorm_beta(num_layers)
    return 1.0

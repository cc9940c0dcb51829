"""Rotary positions on local tensors: RoPE (arXiv 2104.09864) and xPos (arXiv 2212.10554 section 3).

Shapes: s sequence, b batch, n heads, d width of one head. No groups, ranks or settings here.

A pair of neighbouring channels (2i, 2i+1) is one complex number; a rotation by the angle m·θ_i at
position m is a multiplication by exp(i·m·θ_i), and xPos also multiplies queries by ζ_i^m and keys
by ζ_i^(-m). Both fit in one complex table, so the whole position scheme is one multiplication.
"""

import torch
from torch import Tensor

# arXiv 2212.10554 equation 9 leaves γ open; 0.4 is the value in the authors' code (torchscale,
# component/xpos_relative_position.py).
XPOS_GAMMA = 0.4


def rotary_table(positions: Tensor, head_dim: int, base: float = 10000.0) -> Tensor:
    """exp(i·m·θ_j) with θ_j = base^(-2j/d), for each position m: complex128 [s, d/2]."""
    theta = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.outer(positions.double().cpu(), theta)
    return torch.polar(torch.ones_like(angle), angle)


def xpos_decay(head_dim: int) -> Tensor:
    """ζ_j = (j/(d/2) + γ) / (1 + γ), equation 9: float64 [d/2], growing from 2/7 towards 1."""
    fraction = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    return (fraction + XPOS_GAMMA) / (1 + XPOS_GAMMA)


def xpos_tables(
    positions: Tensor,
    head_dim: int,
    base: float = 10000.0,
    scale_base: float = 512.0,
    centre: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Complex tables for queries and for keys, complex128 [s, d/2] each.

    The paper's exponent is m; the authors' code uses m / scale_base (512), and so do we. `centre`
    is subtracted from the positions of the scale: scores depend on differences only, centring just
    halves the range of exponents.
    """
    rotation = rotary_table(positions, head_dim, base)
    exponent = (positions.double().cpu() - centre)[:, None] / scale_base
    scale = xpos_decay(head_dim) ** exponent
    return rotation * scale, rotation / scale


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Multiply each channel pair of x [s, b, n, d] by the table's entry (complex64).

    table: [s, d/2], or [s, b, d/2] where each sequence has positions of its own. Computed in fp32,
    returned in x's type.
    """
    if table.dim() == 2:
        table = table.unsqueeze(1)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table.unsqueeze(2)).flatten(-2).to(x.dtype)

"""The RMSNorm of a CPU against torch's chain of operations."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.norm import normalize

EPS = 1e-5


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_rms_norm_is_torchs(dtype: torch.dtype, bound: float) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = ((6, 2, 48), (48,), (6, 2, 48))
    x, g, dy = (torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)
    x = 3 * x + 1
    found: list[Tensor] = []
    expected: list[Tensor] = []
    for results, norm in (
        (found, lambda x, g: normalize(x, g, None, EPS, True)),
        (expected, lambda x, g: F.rms_norm(x, g.shape, g, EPS)),
    ):
        leaves = [x.clone().requires_grad_(), g.clone().requires_grad_()]
        y = norm(*leaves)
        results += [y.detach(), *torch.autograd.grad(y, leaves, dy)]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs, rtol=bound, atol=10 * bound)


def test_rms_norm_of_rows_of_zeros_is_zero() -> None:
    x, g = torch.zeros(2, 8, requires_grad=True), torch.ones(8)
    y = normalize(x, g, None, EPS, True)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert y.count_nonzero() == 0
    torch.testing.assert_close(dx, torch.full_like(x, EPS**-0.5))

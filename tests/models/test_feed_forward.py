"""The activations against torch's own operations, and what they keep for the backward pass."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.feed_forward import gelu, swiglu

BOUND = {torch.float32: 1e-6, torch.bfloat16: 2e-2}


def kept_bytes(make: Callable[[], Tensor]) -> int:
    """Of the tensors that autograd keeps for the backward pass."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        make()
    return sum(kept.values())


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_activation_is_torchs(gated: bool, biased: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    u, bias, dy = (torch.randn(*shape, generator=generator) for shape in ((6, 2, 32), (32,), (1,)))
    u, bias = (t.to(dtype).requires_grad_() for t in (u, bias))
    inputs = [u, bias] if biased else [u]

    x = u + bias if biased else u
    expected = F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1] if gated else F.gelu(x)
    found = (swiglu if gated else gelu)(u, bias if biased else None)
    dy = torch.randn(found.shape, generator=generator).to(dtype)
    gradients = [torch.autograd.grad(y, inputs, dy) for y in (found, expected)]
    bound = BOUND[dtype]
    torch.testing.assert_close(found, expected, rtol=bound, atol=bound)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=bound, atol=10 * bound)


def test_swiglu_keeps_its_input_only() -> None:
    u = torch.randn(8, 64, requires_grad=True)
    assert kept_bytes(lambda: swiglu(u)) == u.untyped_storage().nbytes()

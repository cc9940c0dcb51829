"""On one CUDA device (`pytest -m gpu`): attention of the later part of a sequence only."""

import pytest
import torch

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("groups", [8, 2])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-3), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)]
)
def test_later_queries_equal_the_cpu(dtype: torch.dtype, bound: float, groups: int) -> None:
    from models.attention import CausalAttention
    from tests.models.test_attention_reset import attention

    module: CausalAttention = attention()
    torch.manual_seed(0)
    shapes = (96, 3, 8, 64), (512, 3, groups, 64), (512, 3, groups, 64)
    there = [torch.randn(s, device="cuda", dtype=dtype, requires_grad=True) for s in shapes]
    here = [x.detach().float().cpu().requires_grad_() for x in there]
    expected = module._causal(*here, 0.0)
    weight = torch.randn(expected.shape)
    expected_gradients = torch.autograd.grad((expected * weight).sum(), here)
    out = module._causal(*there, 0.0)
    gradients = torch.autograd.grad((out * weight.cuda().to(dtype)).sum(), there)
    for found, wanted in zip((out, *gradients), (expected, *expected_gradients), strict=True):
        assert (found.detach().float().cpu() - wanted).norm() < bound * wanted.norm()

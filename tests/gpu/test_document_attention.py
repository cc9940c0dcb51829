"""On one CUDA device (`pytest -m gpu`): attention inside documents, each kernel against the CPU."""

import pytest
import torch

pytestmark = pytest.mark.gpu

LENGTHS = [[100, 1, 300, 111], [512], [256, 256]]


@pytest.mark.parametrize("groups", [8, 2])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-3), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)]
)
def test_gpu_kernels_equal_the_cpu(dtype: torch.dtype, bound: float, groups: int) -> None:
    from models.attention import CausalAttention, _has_varlen_kernel
    from models.document_segments import DocumentSegments
    from tests.models.test_attention_reset import attention, documents_of

    module: CausalAttention = attention()
    segments = DocumentSegments(documents_of(LENGTHS))
    torch.manual_seed(0)
    shapes = (512, 3, 8, 64), (512, 3, groups, 64), (512, 3, groups, 64)
    there = [torch.randn(s, device="cuda", dtype=dtype, requires_grad=True) for s in shapes]
    here = [x.detach().float().cpu().requires_grad_() for x in there]
    expected = module._segment_by_segment(*here, 0.0, segments)
    weight = torch.randn(expected.shape)
    expected_gradients = torch.autograd.grad((expected * weight).sum(), here)

    ways = [lambda *x: module._masked(*x, 0.0, segments)]
    if _has_varlen_kernel(there[0]):
        ways.append(lambda *x: module._variable_lengths(*x, segments))
    assert len(ways) == 1 + (dtype is not torch.float32)
    for way in ways:
        out = way(*there)
        gradients = torch.autograd.grad((out * weight.cuda().to(dtype)).sum(), there)
        for found, wanted in zip((out, *gradients), (expected, *expected_gradients), strict=True):
            assert (found.detach().float().cpu() - wanted).norm() < bound * wanted.norm()


def test_prefetched_batches_are_page_locked_and_the_same() -> None:
    from data.prefetch import PrefetchLoader
    from pretrain.train_step import to_device
    from tests.data.test_prefetch import Steps

    device = torch.device("cuda", 0)
    with PrefetchLoader(Steps(), depth=1, device=device) as loader:
        for ours, plain in zip(loader.micro_batches(12), Steps().micro_batches(12), strict=True):
            assert ours.tokens.is_pinned() and ours.loss_mask.is_pinned()
            assert to_device(ours, device).tokens.cpu().tolist() == plain.tokens.tolist()

"""Weight gradients added straight into megatron-core's main gradient, on torch's own kernels.

With `gradient_accumulation_fusion` megatron-core adds the weight gradient of a linear layer into
`weight.main_grad` inside the matrix product, through apex's CUDA extension
`fused_weight_gradient_mlp_cuda`. Without that extension it forms the gradient as a new matrix,
which autograd keeps until DistributedDataParallel adds it. `addmm` does the same in one call on
any device, so the fusion does not need the extension.
"""

import functools
import sys
from typing import Any

import torch
from torch import Tensor

from parallel.megatron import RowParallelLinear


def accumulate_weight_gradient(inputs: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """main_grad += grad_outputᵀ · inputs, in place.

    `inputs` is [tokens, in], `grad_output` [tokens, out], `main_grad` [out, in]. The order of the
    arguments is that of apex's wgrad_gemm_accum_fp32. The product of bf16 matrices is added to an
    fp32 `main_grad` without being rounded to bf16 first.
    """
    if inputs.dtype == main_grad.dtype:
        main_grad.addmm_(grad_output.t(), inputs)
    elif inputs.is_cuda and _addmm_accumulates_in_fp32(inputs.device, inputs.dtype):
        torch.ops.aten.addmm.dtype_out(
            main_grad, grad_output.t(), inputs, main_grad.dtype, out=main_grad
        )
    else:
        # no mixed-precision kernel: two widened copies of the activations, which are smaller
        # than a widened copy of the weight gradient whenever there are fewer tokens than columns
        main_grad.addmm_(grad_output.t().to(main_grad.dtype), inputs.to(main_grad.dtype))


@functools.lru_cache(maxsize=8)
def _addmm_accumulates_in_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether addmm with an fp32 result of `dtype` factors runs, and runs right, on `device`.

    The overload is younger than the oldest torch we run on and exists for few devices, so it is
    tried on a sum that bf16 cannot hold: 1 + 16 * 256 is 4097, which bf16 rounds to 4096.
    """
    result = torch.ones(16, 16, device=device)
    left = torch.ones(16, 16, device=device, dtype=dtype)
    try:
        torch.ops.aten.addmm.dtype_out(result, left, 256 * left, torch.float32, out=result)
    except (AttributeError, RuntimeError):  # no such overload, no kernel for this device
        return False
    return bool((result == 4097).all())


def matmul_in_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a [i, k] · b [k, j] in fp32, also for bf16 factors, whose product is then not rounded."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda and _addmm_accumulates_in_fp32(a.device, a.dtype):
        return torch.ops.aten.mm.dtype(a, b, torch.float32)
    return a.float() @ b.float()


def weight_gradient(
    weight: Tensor, main_grad: Tensor | None, inputs: Tensor, grad_output: Tensor
) -> Tensor | None:
    """What a backward pass returns as the gradient of `weight` [out, in].

    Without `main_grad`: grad_outputᵀ · inputs. With it: the product is added to `main_grad` and
    what is returned is `gradient_placeholder(weight)`.
    """
    if main_grad is None:
        return grad_output.t() @ inputs
    accumulate_weight_gradient(inputs, grad_output, main_grad)
    return gradient_placeholder(weight)


def gradient_placeholder(weight: Tensor) -> Tensor | None:
    """The gradient to return for a weight whose `main_grad` already holds it.

    DistributedDataParallel's hook skips a gradient when `grad_added_to_main_grad` is set, but with
    overlapped reduction it insists on there being one, so this is memory that nobody reads or
    writes. A tied weight on a single stage (`zero_out_wgrad`) gets its other, real gradient from
    the embedding, which the hook adds; None keeps ours out of that sum. megatron-core returns a
    matrix of zeros there, at the price of writing it and adding it.
    """
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    if getattr(weight, "zero_out_wgrad", False):
        return None
    return torch.empty_like(weight)


def fused_main_grad(weight: Tensor, gradient_accumulation_fusion: bool) -> Tensor | None:
    """`weight.main_grad` if the gradient is to be added to it, else None."""
    return getattr(weight, "main_grad", None) if gradient_accumulation_fusion else None


class TorchWeightGradient:
    """What megatron-core calls of apex's `fused_weight_gradient_mlp_cuda`, in torch."""

    wgrad_gemm_accum_fp32 = staticmethod(accumulate_weight_gradient)
    wgrad_gemm_accum_fp16 = staticmethod(accumulate_weight_gradient)


def enable_torch_weight_gradient_fusion() -> bool:
    """Lets `gradient_accumulation_fusion=True` work without apex's CUDA extension.

    Installs `TorchWeightGradient` in the module of megatron-core's parallel linears if it found no
    extension there, and returns whether it did. Call it before the layers are built: they check
    for the extension in their constructor. Calling it again changes nothing.
    """
    megatron_layers: Any = sys.modules[RowParallelLinear.__module__]
    if megatron_layers._grad_accum_fusion_available:
        return False
    megatron_layers.fused_weight_gradient_mlp_cuda = TorchWeightGradient
    megatron_layers._grad_accum_fusion_available = True
    return True

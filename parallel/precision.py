"""Which type parameters and activations have."""

import torch

from parallel.config import Precision


def parameter_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """`auto` is bf16 on CUDA and fp32 elsewhere (CPUs without bf16 units are 30 to 100 times slower
    in it). Gradients, master weights and moments are fp32 either way."""
    if precision is Precision.auto:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}[precision]

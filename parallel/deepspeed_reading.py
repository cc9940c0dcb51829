"""Whole gradients and weights out of DeepSpeed, by its own functions: for comparisons, in which
nothing of parallel/deepspeed_shards.py should take part. All data-parallel ranks must call both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parallel.deepspeed_library import library


def whole_gradient(parameter: Any) -> Tensor | None:
    """Of this tensor-parallel rank's part of the parameter, reduced: before the step is taken. None
    for a frozen one."""
    if not parameter.requires_grad:
        return None
    found: Tensor | None = library().utils.safe_get_full_grad(parameter)
    return found


def whole_weight(parameter: Any) -> Tensor:
    """In fp32, of this tensor-parallel rank's part of the parameter.

    Raises RuntimeError where what Adam updates is another number than what the model computes with,
    both being fp32.
    """
    deepspeed = library()
    with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
        weight: Tensor = parameter.detach().float().clone()
    if parameter.requires_grad and parameter.dtype is torch.float32:
        updated = deepspeed.utils.safe_get_full_fp32_param(parameter)
        if updated is not None and not torch.equal(updated.view_as(weight), weight):
            raise RuntimeError("a weight is not the number that the optimizer has for it")
    return weight

"""AdamW on torch's fused kernel, behind the interface megatron-core expects of apex's FusedAdam.

megatron-core takes FusedAdam from Transformer Engine or apex, and else falls back to
``torch.optim.AdamW``, whose per-parameter step counters its distributed checkpoints cannot load.
Here, as in apex, the step lives in the parameter group and the per-parameter state is exactly
{exp_avg, exp_avg_sq}.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

_ROW = 4096  # elements of which a plain sum of squares in fp32 is good to 1e-7


class FusedAdam(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) with bias correction, decoupled weight decay by default."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
        **unused: Any,
    ) -> None:
        if not bias_correction:
            raise ValueError("FusedAdam always corrects its bias; bias_correction=False is unknown")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": True,
        }
        super().__init__(params, defaults)
        self.adam_w_mode = adam_w_mode

    def initialize_state(self, parameter: torch.Tensor, *unused: Any) -> None:
        state = self.state[parameter]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter.detach())
            state["exp_avg_sq"] = torch.zeros_like(parameter.detach())

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:  # type: ignore[override]
        fused = torch._fused_adamw_ if self.adam_w_mode else torch._fused_adam_
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            group["step"] = group.get("step", 0) + 1
            for parameter in parameters:
                self.initialize_state(parameter)
            step = torch.full((), float(group["step"]), device=parameters[0].device)
            fused(
                parameters,
                [p.grad for p in parameters],
                [self.state[p]["exp_avg"] for p in parameters],
                [self.state[p]["exp_avg_sq"] for p in parameters],
                [],
                [step] * len(parameters),
                lr=float(group["lr"]),
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )


def register() -> bool:
    """Make megatron-core use `FusedAdam` where it would use apex's. False when a real one is there.

    Its DistributedOptimizer asserts the class by a module global, so the globals are replaced.
    """
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distributed_optimizer

    if not optimizer.USING_PYTORCH_OPTIMIZER:
        return optimizer.Adam is FusedAdam
    optimizer.Adam = distributed_optimizer.Adam = FusedAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distributed_optimizer.HAVE_APEX_OR_TE = True
    distributed_optimizer.USING_APEX_OPTIMIZER = True
    return True


def initialize_state(optimizer: Any) -> None:
    """Allocate the moments now: a checkpoint taken before the first update must hold them too."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.optimizer is not None:  # None: nothing to train on this rank
            part.init_state_fn(part.optimizer, part.config)


def register_multi_tensor_kernels() -> None:
    """Gradient norm and scaling by torch's foreach kernels, where apex's are missing.

    megatron-core's own fallback takes the norm tensor by tensor and waits for the device after
    each, which on a GPU costs a synchronisation per parameter and step.
    """
    import megatron.core.optimizer.clip_grads as clip_grads
    from megatron.core.utils import local_multi_tensor_l2_norm, local_multi_tensor_scale

    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = _l2_norm
    if clip_grads.multi_tensor_scale_impl is local_multi_tensor_scale:
        clip_grads.multi_tensor_scale_impl = _foreach_scale


def _l2_norm(
    chunk_size: int, noop_flag: Any, tensor_lists: Any, per_tensor: bool, *unused: Any
) -> tuple[torch.Tensor, None]:
    return torch.linalg.vector_norm(norms(tensor_lists[0])).view(1), None


def norms(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The norm of each of n > 0 tensors, [n] fp32, without waiting for the device."""
    if tensors[0].device.type == "cpu":
        # torch's CPU norm adds up in plain fp32: it is off by 1e-5 for a million elements and 1e-2
        # for a hundred million, so that shards and whole tensors disagree. How far a dot product is
        # depends on the processor (1e-7 to 5e-5). Row by row, 1e-8 in the same time.
        return torch.stack([_norm_by_rows(tensor.float().reshape(-1)) for tensor in tensors])
    return torch.stack(list(torch._foreach_norm(list(tensors)))).float()


def _norm_by_rows(vector: torch.Tensor) -> torch.Tensor:
    if vector.numel() <= _ROW:
        return torch.dot(vector, vector).sqrt()
    whole = vector.numel() // _ROW * _ROW
    rows = torch.linalg.vector_norm(vector[:whole].view(-1, _ROW), dim=1)
    rest = torch.linalg.vector_norm(vector[whole:]).view(1)
    return torch.linalg.vector_norm(torch.cat([rows, rest]), dtype=torch.float64).float()


def _foreach_scale(chunk_size: int, noop_flag: Any, tensor_lists: Any, scale: float) -> None:
    sources, targets = tensor_lists
    if any(a is not b for a, b in zip(sources, targets, strict=True)):
        torch._foreach_copy_(list(targets), list(sources))
    torch._foreach_mul_(list(targets), scale)

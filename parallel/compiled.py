"""Chains of elementwise operations as one kernel, by torch.compile, where a run asks for it.

Each operation by itself reads its tensors from memory and writes them back; compiled, a chain does
so once. Matrix products, attention and LayerNorm have kernels that leave nothing to gain.

It costs the first start on a machine 20 to 40 s: 5 s for torch's compiler to load, the rest for a
C++ compiler (on a GPU Triton). Later starts find most of it in torch's cache on disk
(TORCHINDUCTOR_CACHE_DIR). Sums are taken in another order: results differ by rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Generic, ParamSpec, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F

from parallel.config import CompileElementwise, ConfigError
from parallel.runtime import Runtime

P = ParamSpec("P")
R = TypeVar("R")


class Compilable(Generic[P, R]):
    """A function of tensors that runs as written, or compiled.

    It must not change its arguments. Shapes it has not met are compiled at their first call; after
    the second one torch makes a kernel for any shape.
    """

    def __init__(self, function: Callable[P, R]) -> None:
        self.plain = function
        self._compiled: Callable[P, R] | None = None

    def __call__(self, compiled: bool, *args: P.args, **kwargs: P.kwargs) -> R:
        if not compiled:
            return self.plain(*args, **kwargs)
        if self._compiled is None:
            self._compiled = torch.compile(self.plain)
        return self._compiled(*args, **kwargs)


def compiles(wanted: CompileElementwise, runtime: Runtime) -> tuple[bool, str]:
    """Whether this run compiles, on all ranks alike, and why.

    Where it is to, every rank compiles a small function and compares what it gives; one rank that
    cannot, and none does. All ranks must call it.

    Raises ConfigError, on every rank, with parallel.compile_elementwise=always where one cannot.
    """
    if wanted is CompileElementwise.never:
        return False, "parallel.compile_elementwise=never"
    if wanted is CompileElementwise.auto:
        if runtime.device.type == "cpu":
            return False, "on a CPU only with parallel.compile_elementwise=always"
        if find_spec("triton") is None:
            return False, "triton is not here"
    found: list[str | None] = [None] * runtime.world_size
    dist.all_gather_object(found, _why_not(runtime.device))
    reasons = [f"rank {rank}: {reason}" for rank, reason in enumerate(found) if reason]
    if reasons and wanted is CompileElementwise.always:
        raise ConfigError(
            f"parallel.compile_elementwise=always: torch.compile does not work here ({reasons[0]});"
            " it needs a C++ compiler, and on a GPU Triton; or set"
            " parallel.compile_elementwise=never"
        )
    return not reasons, f"torch.compile does not work here ({reasons[0]})" if reasons else ""


def _why_not(device: torch.device) -> str | None:
    """What keeps torch.compile from working on `device`; None where it works."""
    x = torch.linspace(-4, 4, 1000, device=device).view(10, 100)
    try:
        difference = (_trial(True, x) - _trial(False, x)).abs().max().item()
    except Exception as error:  # whatever a compiler may raise: without it the run is the same
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    return None if difference < 1e-5 else f"a small function is wrong by {difference:.2g}"


@Compilable
def _trial(x: torch.Tensor) -> Any:
    return F.gelu(x) * x.mean(-1, keepdim=True)

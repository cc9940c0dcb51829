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

    Where it is to, every rank compiles two small functions, one in bf16 with its gradients, and
    compares what they give; one rank that cannot, and none does. All ranks must call it.

    Measured on 2 cores of a CPU, of what the module says a first start costs: 18 s for the first
    function, most of them for the compiler to load and prepare itself, and 3 s for the one in bf16;
    with a warm cache on disk 2.5 s and 0.1 s.

    Raises ConfigError, on every rank, with parallel.compile_elementwise=always where one cannot.
    """
    if wanted is CompileElementwise.never:
        return False, "parallel.compile_elementwise=never"
    if wanted is CompileElementwise.auto and runtime.device.type == "cpu":
        return False, "on a CPU only with parallel.compile_elementwise=always"
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
    if device.type == "cuda" and find_spec("triton") is None:
        return "triton is not here"
    try:
        x = torch.linspace(-4, 4, 1000, device=device).view(10, 100)
        difference = (_trial(True, x) - _trial(False, x)).abs().max().item()
        if not difference < 1e-5:  # nor is NaN
            return f"a small function is wrong by {difference:.2g}"
        difference = _bf16_difference(x)
    except Exception as error:  # whatever a compiler may raise: without it the run is the same
        return f"{type(error).__name__}: {_first_line(error)}"
    if not difference < 2**-6:  # results are rounded by 2^-9 of their value
        return f"a small function and its gradients are wrong by {difference:.2g} in bf16"
    return None


def _first_line(error: Exception) -> str:
    """With the second where the first only announces it: "backend='inductor' raised:"."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else "no message"
    return (f"{first} {lines[1]}" if first.endswith(":") and lines[1:] else first)[:200]


@Compilable
def _trial(x: torch.Tensor) -> Any:
    return F.gelu(x) * x.mean(-1, keepdim=True)


@Compilable
def _gated_trial(u: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """As a SwiGLU: its gradients take a concatenation, and a sum over rows."""
    gate, linear = (u + bias).chunk(2, -1)
    return F.silu(gate) * linear


def _bf16_difference(x: torch.Tensor) -> float:
    """The largest that compiling makes in bf16, over the largest value: of result and gradients."""

    def results(compiled: bool, dtype: torch.dtype) -> list[torch.Tensor]:
        u, bias = (t.bfloat16().to(dtype).requires_grad_() for t in (x, x[0]))
        y = _gated_trial(compiled, u, bias)
        dy = torch.ones_like(y)
        return [y.detach(), *torch.autograd.grad(y, (u, bias), dy)]

    pairs = zip(results(True, torch.bfloat16), results(False, torch.float32), strict=True)
    # torch's maximum of NaN and a number is NaN
    return torch.stack([(a - b).abs().max() / b.abs().max() for a, b in pairs]).max().item()

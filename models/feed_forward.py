"""The dense feed-forward: W2 · Norm(σ(W1 x + a)) + c, with GELU or SwiGLU for σ.

SwiGLU (arXiv 2002.05202) splits what W1 gives into a gate u and a linear half v: σ = silu(u) ⊙ v.
The norm, where there is one (Magneto's sub-LayerNorm), belongs to the second linear layer.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.compiled import Compilable
from parallel.megatron import MLP
from parallel.norm import is_compiled


class FeedForward(MLP):
    """megatron-core's MLP, but for its activation.

    With a SwiGLU megatron-core's keeps twice as much for the backward pass: it adds an offset of 0
    to the linear half and keeps the sum, and silu's output. Of its fused kernels the GELU is an
    approximation by tanh.
    """

    def forward(self, hidden_states: Tensor, **unused: Any) -> tuple[Tensor, Tensor | None]:
        """[s, b, h] -> [s, b, h] without the second bias, and that bias."""
        u, bias = self.linear_fc1(hidden_states)
        activation = swiglu if self.config.gated_linear_unit else gelu
        return self.linear_fc2(activation(u, bias, compiled=is_compiled(self.config)))


def gelu(u: Tensor, bias: Tensor | None = None, *, compiled: bool = False) -> Tensor:
    """GELU(u + bias), exact; u [..., n], bias [n]."""
    return F.gelu(u) if bias is None else _biased_gelu(compiled, u, bias)


def swiglu(u: Tensor, bias: Tensor | None = None, *, compiled: bool = False) -> Tensor:
    """silu(x_1) ⊙ x_2, where x = u + bias [..., 2 n] is x_1 and x_2 [..., n]; keeps u."""
    return _SwiGLU.apply(u, bias, compiled)


@Compilable
def _biased_gelu(u: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(u + bias)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, bias: Tensor | None, compiled: bool) -> Tensor:
        ctx.save_for_backward(u, bias)
        ctx.compiled = compiled
        return _swiglu(compiled, u, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        return *_swiglu_gradients(ctx.compiled, dy, *ctx.saved_tensors), None


@Compilable
def _swiglu(u: Tensor, bias: Tensor | None) -> Tensor:
    gate, linear = (u if bias is None else u + bias).chunk(2, -1)
    return F.silu(gate) * linear


@Compilable
def _swiglu_gradients(dy: Tensor, u: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """du [..., 2 n], and the bias's [2 n]."""
    gate, linear = (u if bias is None else u + bias).chunk(2, -1)
    d_gate = torch.ops.aten.silu_backward(dy * linear, gate)
    du = torch.cat([d_gate, dy * F.silu(gate)], -1)
    return du, None if bias is None else du.flatten(0, -2).sum(0)

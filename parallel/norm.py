"""LayerNorm and RMSNorm over a width that is not sharded."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from parallel.compiled import Compilable
from parallel.megatron import TransformerConfig


def parameter_device(config: TransformerConfig) -> torch.device:
    """Where megatron-core's layers put their parameters under the same settings."""
    if config.use_cpu_initialization or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def is_rms_norm(config: TransformerConfig) -> bool:
    """Whether `config.normalization` is RMSNorm; ValueError unless it is that or LayerNorm.

    Zero-centred gains (weight + 1) are refused too: the norms here would silently ignore them.
    """
    if config.normalization not in ("LayerNorm", "RMSNorm"):
        raise ValueError(
            f"normalization={config.normalization}: must be LayerNorm or RMSNorm; change one of "
            "normalization and the layer's class."
        )
    if config.layernorm_zero_centered_gamma:
        raise ValueError(
            "layernorm_zero_centered_gamma=True: these norms store the gain itself; set it to "
            "False."
        )
    return config.normalization == "RMSNorm"


def is_compiled(config: TransformerConfig) -> bool:
    """What `parallel.compiled.compiles` has found, which models.build notes in `config`."""
    return getattr(config, "compile_elementwise", False)


def normalize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    *,
    compiled: bool = False,
) -> Tensor:
    """LayerNorm(x) or, with `rms`, RMSNorm(x) (arXiv 1910.07467) over the last axis.

    torch has a kernel for each, but for an RMSNorm on a CPU: the only one that is `compiled`.
    """
    if not rms:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    if x.is_cuda:
        return F.rms_norm(x, weight.shape, weight, eps)
    return _RMSNorm.apply(x, weight, eps, compiled)


class _RMSNorm(torch.autograd.Function):
    """y = g ⊙ x / sqrt(mean(x²) + eps) on a CPU; keeps x and 1 / sqrt(...).

    torch has a chain of operations there, each with a tensor of its own for the backward pass:
    2 to 3 times the time of this, 4 times that of this compiled.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor, eps: float, compiled: bool) -> Tensor:
        y, rstd = _rms_norm(compiled, x, g, eps)
        ctx.save_for_backward(x, g, rstd)
        ctx.compiled = compiled
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        return *_rms_norm_gradients(ctx.compiled, dy, *ctx.saved_tensors), None, None


@Compilable
def _rms_norm(x: Tensor, g: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y [..., n] in x's type, and 1 / sqrt(mean(x²) + eps) [..., 1] in fp32."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    rstd = torch.rsqrt(norm.square() / x.shape[-1] + eps)
    return ((x * rstd) * g).to(x.dtype), rstd


@Compilable
def _rms_norm_gradients(dy: Tensor, x: Tensor, g: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """dx [..., n] and dg [n]."""
    x_hat = x * rstd  # fp32
    product = dy * x_hat
    dg = product.flatten(0, -2).sum(0)
    mean = (product @ g.float()).unsqueeze(-1) / x.shape[-1]  # of g ⊙ dy ⊙ x̂
    del product  # as large as x, in fp32
    dx = (dy.float() * g).sub_(x_hat.mul_(mean)).mul_(rstd)
    return dx.to(x.dtype), dg.to(g.dtype)


class Norm(nn.Module):
    """LayerNorm (weight, bias) or RMSNorm (weight), by `config.normalization`.

    A drop-in for megatron-core's norm slots: [s, b, hidden_size] to the same shape. Unlike
    megatron-core's WrappedTorchNorm it works under sequence parallelism: its parameters are marked
    `sequence_parallel`, so that finalize_model_grads sums their gradients, each from a rank's own
    part of the sequence, over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.rms = is_rms_norm(config)
        self.compiled = is_compiled(config)
        place = {"dtype": config.params_dtype, "device": parameter_device(config)}
        self.weight = nn.Parameter(torch.ones(hidden_size, **place))
        self.bias = None if self.rms else nn.Parameter(torch.zeros(hidden_size, **place))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return normalize(x, self.weight, self.bias, self.eps, self.rms, compiled=self.compiled)

    def extra_repr(self) -> str:
        kind = "RMSNorm" if self.rms else "LayerNorm"
        return f"{kind}, {self.weight.numel()}, eps={self.eps}"

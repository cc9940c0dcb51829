"""LayerNorm and RMSNorm over a width that is not sharded."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


def normalize(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool) -> Tensor:
    """LayerNorm(x) or, with `rms`, RMSNorm(x) (arXiv 1910.07467) over the last axis."""
    if rms:
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


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
        place = {"dtype": config.params_dtype, "device": parameter_device(config)}
        self.weight = nn.Parameter(torch.ones(hidden_size, **place))
        self.bias = None if self.rms else nn.Parameter(torch.zeros(hidden_size, **place))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return normalize(x, self.weight, self.bias, self.eps, self.rms)

    def extra_repr(self) -> str:
        kind = "RMSNorm" if self.rms else "LayerNorm"
        return f"{kind}, {self.weight.numel()}, eps={self.eps}"

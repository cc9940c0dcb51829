"""Work that several implementations can do: who may do it, and who does in this process.

`FAST_PATHS` and `WITH_DEEPSPEED` are tables and import nothing; `in_use` looks at what
megatron-core and this project have settled on, and imports both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class FastPath:
    """Work that more than one implementation can do; results differ by rounding at most."""

    work: str
    on_gpu: dict[str, str]  # who does it -> how; the first that is there is used
    on_cpu: dict[str, str]


ADAM = "AdamW"
NORM = "gradient norm and clipping"
WEIGHT_GRADIENTS = "weight gradients of megatron-core's linear layers"
SPLIT = "splitting queries, keys and values"
EXPERTS = "products of experts"
ELEMENTWISE = "activations, biases, residuals and norms of sharded widths"

_TORCH = "torch"
_COMPILED = "torch.compile"
_OPTIMIZERS = {"transformer_engine": "its FusedAdam", "apex": "its FusedAdam"}
_NORMS = {"transformer_engine": "its multi_tensor_l2norm", "apex": "amp_C's multi_tensor_l2norm"}
FAST_PATHS: dict[str, FastPath] = {
    path.work: path
    for path in (
        FastPath(
            ADAM,
            {**_OPTIMIZERS, _TORCH: "its fused kernel (`parallel/adam.py`)"},
            {_TORCH: "its fused kernel (`parallel/adam.py`)"},
        ),
        FastPath(
            NORM,
            {**_NORMS, _TORCH: "its foreach kernels (`parallel/adam.py`)"},
            {_TORCH: "norms of rows, and its foreach kernels (`parallel/adam.py`)"},
        ),
        FastPath(
            WEIGHT_GRADIENTS,
            {
                "apex": "fused_weight_gradient_mlp_cuda",
                _TORCH: "addmm into the fp32 buffer (`parallel/weight_gradient.py`)",
            },
            {_TORCH: "addmm into the fp32 buffer (`parallel/weight_gradient.py`)"},
        ),
        FastPath(
            SPLIT,
            {"transformer_engine": "its SplitAlongDim", _TORCH: "split, and cat on the way back"},
            {_TORCH: "split, and cat on the way back"},
        ),
        FastPath(
            "attention",
            {_TORCH: "scaled_dot_product_attention; varlen_attn where it stops at documents"},
            {_TORCH: "scaled_dot_product_attention, document by document where it stops there"},
        ),
        FastPath(
            "norms",
            {_TORCH: "its layer_norm and rms_norm kernels, one launch each"},
            {
                _TORCH: "its layer_norm kernel; for an RMSNorm, which has none, `parallel/norm.py`,"
                " compiled where the next row is"
            },
        ),
        FastPath(
            ELEMENTWISE,
            {
                _COMPILED: "one kernel for a chain of operations (`parallel/compiled.py`), where"
                " Triton is here and `parallel.compile_elementwise` is not `never`",
                _TORCH: "one kernel for each operation",
            },
            {
                _COMPILED: "one loop for a chain of operations, with"
                " `parallel.compile_elementwise=always` and a C++ compiler",
                _TORCH: "one loop for each operation",
            },
        ),
        FastPath(
            EXPERTS,
            {
                "grouped_mm": "one launch; bf16 on Hopper and data-centre Blackwell"
                " (`parallel/grouped_linear.py`)",
                "padded": "one batched product, experts padded to the largest",
            },
            {"loop": "one product for each expert"},
        ),
    )
}

# What engine=deepspeed does in another way: who -> how. The rest is as above.
WITH_DEEPSPEED: dict[str, dict[str, str]] = {
    ADAM: {
        _TORCH: "the fused kernel of its AdamW",
        "DeepSpeed's CPU Adam": "`deepspeed.native_adam=true` on a CPU, or with"
        " `deepspeed.offload_optimizer=true`",
        "DeepSpeed's FusedAdam": "`deepspeed.native_adam=true` on a GPU otherwise",
    },
    NORM: {_TORCH: "as in `parallel/adam.py`, on this rank's shares"},
    WEIGHT_GRADIENTS: {_TORCH: "autograd's products, which DeepSpeed adds up"},
}
_ADAMS_OF_DEEPSPEED = {
    "DeepSpeedCPUAdam": "DeepSpeed's CPU Adam",
    "FusedAdam": "DeepSpeed's FusedAdam",
}


def in_use(
    device: torch.device,
    *,
    compiled: bool = False,
    deepspeed_adam: torch.optim.Optimizer | None = None,
) -> dict[str, str]:
    """Who does the work of each row of `FAST_PATHS` on `device` in this process.

    To be asked once an engine is there, which replaces what megatron-core fell back on.
    compiled: what `parallel.compiled.compiles` has found for its model.
    deepspeed_adam: the optimizer of engine=deepspeed, where that is the engine.
    """
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.clip_grads as clip_grads
    import megatron.core.tensor_parallel.layers as layers
    import megatron.core.transformer.attention as attention

    from parallel.weight_gradient import TorchWeightGradient

    extension = getattr(layers, "fused_weight_gradient_mlp_cuda", TorchWeightGradient)
    found = dict.fromkeys(FAST_PATHS, _TORCH)
    found[ADAM] = _package(optimizer.Adam)
    found[NORM] = _package(clip_grads.l2_norm_impl)
    found[WEIGHT_GRADIENTS] = _TORCH if extension is TorchWeightGradient else "apex"
    found[SPLIT] = _TORCH if attention.SplitAlongDim is None else "transformer_engine"
    found[ELEMENTWISE] = _COMPILED if compiled else _TORCH
    found[EXPERTS] = _products_of_experts(device)
    if deepspeed_adam is not None:
        found |= dict.fromkeys(WITH_DEEPSPEED, _TORCH)
        found[ADAM] = _ADAMS_OF_DEEPSPEED.get(type(deepspeed_adam).__name__, _TORCH)
    return found


def _package(implementation: Any) -> str:
    """The package a function or class is of; ours do their work through torch."""
    top = str(implementation.__module__).split(".")[0]
    same = {"parallel": _TORCH, "amp_C": "apex", "transformer_engine_torch": "transformer_engine"}
    return same.get(top, top)


def _products_of_experts(device: torch.device) -> str:
    from parallel.grouped_linear import has_grouped_kernel

    if device.type == "cpu":
        return "loop"
    return "grouped_mm" if has_grouped_kernel(device) else "padded"

"""Bytes that a sparse layer keeps and needs: `models.activation_memory` for routers and experts.

Letters and units are those of that module. Imports neither torch nor megatron-core.
"""

from dataclasses import replace

from models.activation_memory import Operation, Sizes, feed_forward_operations
from models.config import Activation, LayerNormPlacement, ModelConfig
from models.moe_config import RouterType
from parallel.config import ParallelConfig

# of models.experts, which imports torch: rows are worked off in blocks of so many elements there
BLOCK_ELEMENTS_CPU = 1 << 20


def sparse_operations(
    model: ModelConfig, parallel: ParallelConfig, sizes: Sizes
) -> list[Operation]:
    """Router, the way to the experts, the experts, and the shared expert beside them."""
    found = [_router(model, sizes), *_experts(model, parallel, sizes)]
    if width := model.moe.shared_expert_intermediate_size:
        # linear_fc1 keeps the same input as the router
        fc1, *rest = feed_forward_operations(model, parallel, sizes, width)
        found += [replace(fc1, kept=0), *rest]
    return [replace(op, name=f"sparse {op.name}") for op in found]


def _router(model: ModelConfig, sizes: Sizes) -> Operation:
    """Keeps the hidden states, and tables of [t, E] in fp32: logits, scores for the choice and for
    the balance loss, gates. Only small models notice, so that the number of tables is a round one.
    """
    moe, tokens = model.moe, sizes.own_tokens
    tables = 5 * moe.num_experts
    if moe.router in (RouterType.xmoe, RouterType.torchscale_xmoe):
        tables += moe.num_experts + 3 * moe.dim
    flags = 2 * moe.num_experts + 16 * moe.router_topk
    kept = sizes.stream + tokens * (4 * tables + flags)
    return Operation("router", kept, backward=3 * sizes.stream + 8 * tokens * moe.num_experts)


def _experts(model: ModelConfig, parallel: ParallelConfig, sizes: Sizes) -> list[Operation]:
    """The way there and back, and the experts. Left out: copies padded to the largest expert, which
    GPUs without a grouped product make (parallel/grouped_linear.py), as large as loads are uneven.
    """
    moe, h, rows, e = model.moe, sizes.hidden, sizes.rows, sizes.element
    n = model.expert_ffn_hidden_size // parallel.expert_tensor_parallel_size
    g = 2 if model.activation is Activation.swiglu else 1
    stacked = moe.sparse_after_layer > 0
    wide, whole = e * rows * n, e * rows * h
    here = moe.num_experts // parallel.expert_model_parallel_size
    matrices = (here * g * n * h, here * n * h)
    block = rows  # worked off together; of an expert with the even share, on a CPU
    if sizes.on_cpu and parallel.expert_tensor_parallel_size == 1:
        block = min(-(-rows // here), max(64, BLOCK_ELEMENTS_CPU // n))
    # the gradient of a block's output, with the gate; its rows in front of the second layer again,
    # with their gradients
    normed = model.layer_norm_placement is LayerNormPlacement.sub_ln
    of_block = e * block * (h + (2 + g) * n)
    inside = of_block + e * block * n * (2 if normed else 1)
    if normed and parallel.expert_tensor_parallel_size > 1:
        inside += 8 * block * n  # statistics over all shards are taken in fp32
    order = Operation("permutation", 24 * rows + 8 * sizes.own_tokens, 2 * whole + 2 * sizes.stream)
    if sizes.dispatched:
        order = Operation("dispatch", 8 * rows, 3 * whole + 2 * sizes.stream)
    kept = whole + g * wide + (2 * whole if stacked else whole + 4 * rows)
    # with the gradients of all rows' outputs and inputs; at the end those of both weights, or all
    # the way where they have no buffer to go to
    backward = sizes.stream + 2 * whole + max(inside, of_block + e * sum(matrices))
    if not sizes.fused:
        backward = sizes.stream + 2 * whole + inside + 4 * sum(matrices)
    if moe.shared_expert_intermediate_size:
        backward += sizes.stream  # its gradient of the hidden states waits to be added
    experts = Operation("experts", kept, backward, 2 * whole + e * block * n, matrices)
    return [order, *[experts] * (moe.stacked_sublayers if stacked else 1)]

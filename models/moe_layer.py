"""The sparse layer: a router sends each token to a few experts, whose outputs are summed.

Where every rank has all experts whole (expert_model_parallel_size=1, expert_tensor_parallel_size=1)
tokens are sorted by expert here, once, without any tensor of tokens x experts x hidden.
Elsewhere megatron-core's dispatchers carry them to their experts and back.

Shapes: t tokens of this rank (s b, under sequence and context parallelism its share), E experts, T
rows: a token has one for each expert it goes to.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.megatron import (
    MegatronModule,
    MoEAllGatherTokenDispatcher,
    MoEAlltoAllTokenDispatcher,
    MoESubmodules,
    ProcessGroupCollection,
    TransformerConfig,
    build_module,
)

DISPATCHERS = {"alltoall": MoEAlltoAllTokenDispatcher, "allgather": MoEAllGatherTokenDispatcher}


class MoELayer(MegatronModule):
    """Router, experts and the way between them; in the place of a feed-forward sublayer.

    `submodules`: megatron-core's MoESubmodules. `router(config=, pg_collection=)` gives a module
    that maps [s, b, h] to the gates [t, E] in fp32, 0 where not chosen, and the choice [t, E];
    `experts` see models.experts; `shared_experts`, or None, a feed-forward for every token, whose
    output is added; a ModuleSpec of a FeedForward with its `ffn_hidden_size` in `params`.

    All ranks of the expert-model- and expert-tensor-parallel groups must call forward together.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config)
        assert pg_collection is not None and config.num_moe_experts is not None
        self.layer_number = layer_number
        self.tp_group = pg_collection.tp
        expert_ranks, rank = pg_collection.ep.size(), pg_collection.ep.rank()
        self.num_local_experts = config.num_moe_experts // expert_ranks
        first = rank * self.num_local_experts
        self.local_expert_indices = list(range(first, first + self.num_local_experts))
        self.router = submodules.router(config=config, pg_collection=pg_collection)
        self.experts = build_module(
            submodules.experts, self.num_local_experts, config, pg_collection=pg_collection
        )
        self.shared_experts = None
        if submodules.shared_experts is not None:
            # megatron-core's MLP takes the input width of its second linear from here
            shared_config = copy.copy(config)
            shared_config.ffn_hidden_size = submodules.shared_experts.params["ffn_hidden_size"]
            self.shared_experts = build_module(submodules.shared_experts, config=shared_config)
        self.token_dispatcher: Any = None
        if expert_ranks > 1 or pg_collection.expt_tp.size() > 1:
            self.token_dispatcher = DISPATCHERS[config.moe_token_dispatcher_type](
                self.num_local_experts,
                self.local_expert_indices,
                config=config,
                pg_collection=pg_collection,
            )

    def set_layer_number(self, layer_number: int) -> None:
        """The layer's number in the whole model, counted from 1; the router reports it."""
        self.layer_number = layer_number
        self.router.set_layer_number(layer_number)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        """hidden_states [s, b, h] (s/tp under sequence parallelism) -> (the same shape, no bias).

        Raises ValueError when training under tensor parallelism without sequence parallelism: the
        ranks would have the same tokens, and count the experts' gradients once each.
        """
        if self.training and self.tp_group.size() > 1 and not self.config.sequence_parallel:
            raise ValueError(
                f"tensor_model_parallel_size={self.tp_group.size()} with "
                "sequence_parallel=False: a sparse layer is trained under tensor parallelism only "
                "with sequence_parallel=True."
            )
        gates, chosen = self.router(hidden_states)
        if self.token_dispatcher is None:
            out = self._local(hidden_states, gates, chosen)
        else:
            out = self._dispatched(hidden_states, gates, chosen)
        if self.shared_experts is not None:
            shared, bias = self.shared_experts(hidden_states)
            out = out + (shared if bias is None else shared + bias)
        return out, None

    def _local(self, hidden_states: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
        order = sort_by_expert(chosen)
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        rows, row_gates = _Permute.apply(tokens, gates, order)
        out, _ = self.experts(rows, order.rows_per_expert, row_gates)
        return _Combine.apply(out, order).view(hidden_states.shape)

    def _dispatched(self, hidden_states: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
        dispatcher = self.token_dispatcher
        rows, row_gates = dispatcher.dispatch_preprocess(hidden_states, chosen, gates)
        rows, row_gates = dispatcher.token_dispatch(rows, row_gates)
        rows, rows_per_expert, row_gates = dispatcher.dispatch_postprocess(rows, row_gates)
        out, _ = self.experts(rows, rows_per_expert, row_gates)
        out = dispatcher.token_combine(dispatcher.combine_preprocess(out))
        out = dispatcher.combine_postprocess(out)
        _forget_graph(dispatcher)
        return out


def _forget_graph(dispatcher: Any) -> None:
    """Drop what megatron-core's dispatcher keeps of a pass that is over.

    Its gates hold on to the graph behind them: activations would live on until the next pass, and,
    because the graph leads back to the model, the model and its process groups for ever.
    """
    for name, value in vars(dispatcher).items():
        if torch.is_tensor(value) and value.requires_grad:
            setattr(dispatcher, name, None)


class Order(NamedTuple):
    """The rows of all experts, sorted by expert and within an expert by token."""

    tokens: Tensor  # [T] int64: which token a row is of
    choices: Tensor  # [T] int64: which element of the [t, E] gates, flattened
    positions: Tensor  # [T] int64: rows in the order of tokens, so that those of one are together
    starts: Tensor  # [t] int64: where a token's rows begin in `positions`
    rows_per_expert: list[int]


def sort_by_expert(chosen: Tensor) -> Order:
    """The order of a choice [t, E]; with CUDA the host waits here for the number of rows."""
    experts, tokens = chosen.t().nonzero().unbind(1)
    per_token = chosen.sum(1)
    return Order(
        tokens=tokens,
        choices=tokens * chosen.shape[1] + experts,
        positions=tokens.argsort(stable=True),
        starts=per_token.cumsum(0) - per_token,
        rows_per_expert=chosen.sum(0).tolist(),
    )


def sum_rows(rows: Tensor, order: Order) -> Tensor:
    """Each token's sum of its rows [T, h]: [t, h], 0 for a token without any.

    A gather, where index_add would be a scatter: no atomics, twice as fast on a CPU, the same
    order of summands every time.
    """
    # detached: for a weight that takes a gradient it also makes what its backward would need
    return F.embedding_bag(order.positions, rows.detach(), order.starts, mode="sum")


class _Permute(torch.autograd.Function):
    """(tokens [t, h], gates [t, E]) -> (rows [T, h], their gates [T])."""

    @staticmethod
    def forward(ctx, tokens, gates, order):  # type: ignore[no-untyped-def]
        ctx.order, ctx.gates_shape = order, gates.shape
        return tokens[order.tokens], gates.flatten()[order.choices]

    @staticmethod
    @once_differentiable
    def backward(ctx, d_rows, d_row_gates):  # type: ignore[no-untyped-def]
        d_gates = d_row_gates.new_zeros(ctx.gates_shape)
        d_gates.view(-1)[ctx.order.choices] = d_row_gates
        return sum_rows(d_rows, ctx.order), d_gates, None


class _Combine(torch.autograd.Function):
    """The adjoint of taking rows: [T, h] -> [t, h]."""

    @staticmethod
    def forward(ctx, rows, order):  # type: ignore[no-untyped-def]
        ctx.order = order
        return sum_rows(rows, order)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):  # type: ignore[no-untyped-def]
        return d_out[ctx.order.tokens], None

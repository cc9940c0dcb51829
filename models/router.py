"""Routers: which experts a token goes to, and with which factors their outputs come back.

    linear       softmax or sigmoid of W h        2101.03961 (Switch), 2006.16668 (GShard)
    aux_free     sigmoid, chosen with a bias      2408.15664, in models/aux_free_router.py
    xmoe         cosines in few dimensions        2204.09179, in models/xmoe_router.py
    sparsemixer  sampled experts                  2409.12136, in models/sparsemixer.py
    torchscale   TorchScale's gates               in models/torchscale_router.py

A router holds its parameters and scores the tokens (`route`); what all of them share is in
`ExpertRouter`: losses, capacity, counting.

Shapes: t tokens this rank routes, E experts in all, k of them for each token, h hidden size, s and
b length and number of the sequences as this rank sees them. Tokens are sequence-first: token index
= position * b + sequence.

Routing is computed in fp32 (or in fp64 where the parameters are), whatever the model's type. Every
parameter is replicated over the tensor-parallel ranks; under sequence parallelism their gradients
are summed over these ranks, each of which routes its own tokens.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup, all_reduce

from models.moe_config import BalanceScope, MoEConfig, RouterType, ScoreFunction, TokenDropPolicy
from models.router_health import RouterHealth
from parallel.megatron import (
    MegatronModule,
    MoEAuxLossAutoScaler,
    ProcessGroupCollection,
    TransformerConfig,
    tensor_parallel,
)
from parallel.norm import parameter_device


class Routing(NamedTuple):
    """Where t tokens go. `logits`, `scores` and `gates` carry gradients."""

    logits: Tensor  # [t, E] what the z-loss keeps small
    scores: Tensor  # [t, E] each token's distribution over all experts, for the balance loss
    first: Tensor  # [t] the expert chosen first
    chosen: Tensor  # [t, E] bool, before dropping
    gates: Tensor  # [t, E] factor of each expert's output, 0 where it does not take the token
    routing_map: Tensor  # [t, E] bool: which experts take the token; `chosen` itself if all do


class ExpertRouter(MegatronModule):
    """What megatron-core's mixture-of-experts layer calls; subclasses say how tokens are scored.

    Losses are attached to the gates (megatron-core's MoEAuxLossAutoScaler) and reach training in
    the backward pass: for each micro-batch the number of its tokens times

        aux_loss_coeff · balance loss + z_loss_coeff · mean over tokens of logsumexp(logits)²

    so that after the division by the step's valid tokens the step has the mean over tokens; where
    labels are masked, it is larger by tokens / valid tokens. Each rank attaches its own tokens'
    part: summed over tensor-parallel (under sequence parallelism) and context-parallel ranks it is
    what one process attaches. megatron-core's own form comes out smaller by the number of these
    ranks when gradients are sums over tokens.

    Args:
        config: megatron-core's settings of the model.
        pg_collection: process groups; `tp`, `cp` and `tp_cp` are used.
        moe: settings of the experts.
        health: counts what this router does, or None.
    """

    # whether a loss balances the experts' load
    balances = True

    @property
    def draws(self) -> bool:
        """Whether routing in training is random: then the engine seeds every step."""
        return False

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        *,
        moe: MoEConfig,
        health: RouterHealth | None = None,
    ) -> None:
        super().__init__(config)
        self.moe = moe
        self.health = health
        self.num_experts = moe.num_experts
        self.topk = moe.router_topk
        self.layer_number: int | None = None
        self.tp_group = pg_collection.tp
        # ranks that hold different tokens of the same sequences
        self.token_group = pg_collection.tp_cp if config.sequence_parallel else pg_collection.cp
        # Smallest difference seen between neighbours among a token's k + 1 best scores, while
        # `track_gap` is set: below rounding errors, layouts may choose differently.
        self.track_gap = False
        self.smallest_gap: Tensor | None = None
        self._stale = False
        self.make_parameters()

    def make_parameters(self) -> None:
        """What a router learns, each made by `new_parameter`; nothing, by default."""

    def route(self, hidden: Tensor) -> Routing:
        """Score and choose; [t, h] in the model's type. To be defined by each router."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it routes tokens.")

    def restore(self) -> None:
        """Bring parameters back to where they must stay after an update; nothing, by default.

        In place, and a pure function of the parameters: replicas must stay equal to the bit.
        """

    def set_layer_number(self, layer_number: int) -> None:
        """The layer's number in the whole model, counted from 1."""
        self.layer_number = layer_number

    def after_optimizer_step(self) -> None:
        """Tells the router that an update was applied."""
        self._stale = not self.moe.freeze_routing

    def settle(self) -> None:
        """`restore` once after each update; to be called before weights are saved.

        Runs by itself before the first forward pass after an update. A settled router is left
        alone, so that a resumed run is bit-equal to one that was not interrupted.
        """
        if self._stale:
            self._stale = False
            with torch.no_grad():
                self.restore()

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Gates [t, E] fp32, 0 where not chosen, and which experts take each token [t, E] bool.

        Args:
            input: [s, b, h], what the experts will see.
            padding_mask: megatron-core's; must be None, our sequences are full.
        """
        if padding_mask is not None:
            raise ValueError(
                "padding_mask is given, and routers here take every token for a real one; pass "
                "None, and leave padding out of the batch or of the loss."
            )
        self.settle()
        hidden = input.reshape(-1, input.shape[-1])
        routing = self.route(hidden)
        gates = self._attach_losses(routing, hidden, batch_size=input.shape[1])
        return gates, routing.routing_map

    def _attach_losses(self, routing: Routing, hidden: Tensor, batch_size: int) -> Tensor:
        moe, learns = self.moe, self.training and torch.is_grad_enabled()
        watched = self._is_watched()
        balance = None
        if self.balances and self.training and (watched or (learns and moe.aux_loss_coeff)):
            per_sequence = moe.balance_scope is BalanceScope.sequence
            sequences = batch_size if per_sequence else 1
            balance = balance_loss(routing.scores, routing.first, sequences, self.token_group)
        if watched:
            self._report(routing, hidden, balance, batch_size)
        if not learns:
            return routing.gates
        gates = routing.gates
        if balance is not None and moe.aux_loss_coeff:
            weight = moe.aux_loss_coeff * hidden.shape[0]
            gates = MoEAuxLossAutoScaler.apply(gates, balance * weight)
        if moe.z_loss_coeff:
            squares = routing.logits.logsumexp(dim=1).square()
            gates = MoEAuxLossAutoScaler.apply(gates, squares.sum() * moe.z_loss_coeff)
        return gates

    def _is_watched(self) -> bool:
        """Whether this pass is to be reported: once a micro-batch, and in the pass that comes
        first, when `health` still knows of this micro-batch and not of a later one."""
        if self.health is None or not self.health.wants(training=self.training):
            return False
        # without recomputation the only pass has gradients, with it the first one has none
        recomputed = tensor_parallel.random.is_checkpointing()
        return not self.training or torch.is_grad_enabled() != recomputed

    def _report(
        self, routing: Routing, hidden: Tensor, balance: Tensor | None, batch_size: int
    ) -> None:
        assert self.health is not None
        assert self.layer_number is not None
        self.health.record(
            self.layer_number,
            first=routing.first,
            chosen=routing.chosen,
            kept=routing.routing_map,
            probs=routing.scores.detach(),
            balance_loss=balance,
            batch_size=batch_size,
            hidden=hidden.detach(),
            training=self.training,
        )

    # ---------------------------------------------------------------- for subclasses

    def new_parameter(self, *shape: int, decays: bool = True) -> torch.nn.Parameter:
        """An fp32 parameter with what the engine, the optimizer and the initialiser look for."""
        parameter = torch.nn.Parameter(
            torch.empty(shape, dtype=torch.float32, device=parameter_device(self.config)),
            requires_grad=not self.moe.freeze_routing,
        )
        parameter.keep_fp32 = True  # type: ignore[attr-defined]
        parameter.sequence_parallel = self.config.sequence_parallel  # type: ignore[attr-defined]
        if not decays:
            parameter.no_weight_decay = True  # type: ignore[attr-defined]
        return parameter

    def random_numbers(self) -> contextlib.AbstractContextManager[None]:
        """Where to draw random numbers for tokens, from torch's generator.

        Without sequence parallelism tensor-parallel ranks route the same tokens and must draw the
        same: they share the default seed. With it each has its own tokens, and draws from
        megatron-core's tracker, whose seeds differ between these ranks.
        """
        if self.config.sequence_parallel:
            return tensor_parallel.get_cuda_rng_tracker().fork()
        return contextlib.nullcontext()

    def best(self, scores: Tensor) -> Tensor:
        """The k experts with the largest scores [t, E], best first: [t, k]."""
        scores = scores.detach()
        self.note_gap(scores)
        if self.topk == 1:  # on CPUs a fifth of what topk takes, and two thirds of argmax
            return scores.max(dim=1, keepdim=True).indices
        return scores.topk(self.topk, dim=1).indices

    def note_gap(self, scores: Tensor) -> None:
        """Keep `smallest_gap` of what decides, [t, E], if anybody asked for it."""
        if not self.track_gap or self.num_experts == 1:
            return
        ordered = scores.detach().topk(min(self.topk + 1, self.num_experts), dim=1).values
        gap = (ordered[:, :-1] - ordered[:, 1:]).min()
        self.smallest_gap = gap if self.smallest_gap is None else gap.minimum(self.smallest_gap)

    def spread(self, logits: Tensor, scores: Tensor, experts: Tensor, gates: Tensor) -> Routing:
        """`experts` and their `gates`, both [t, k], spread over [t, E] and within the capacity."""
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, experts, True)
        all_gates = torch.zeros_like(scores).scatter(1, experts, gates)
        return self.limit(Routing(logits, scores, experts[:, 0], chosen, all_gates, chosen))

    def limit(self, routing: Routing) -> Routing:
        """Drop what exceeds the experts' capacity, if they have one.

        In training an expert takes ceil(t·k/E · expert_capacity_factor) of this rank's tokens; so
        which tokens are dropped depends on the layout and on micro_batch_size, and with the policy
        `probs` a token may be dropped for one that follows it. In evaluation and sampling none is
        dropped: what a token gets must not depend on what comes after it. Gates of what is left
        stay as they are.
        """
        factor = self.moe.expert_capacity_factor
        if factor is None or not self.training:
            return routing
        tokens = routing.chosen.shape[0]
        capacity = math.ceil(tokens * self.topk / self.num_experts * factor)
        kept = within_capacity(routing.gates, routing.chosen, capacity, self.moe.token_drop_policy)
        return routing._replace(gates=routing.gates * kept, routing_map=kept)


class LinearRouter(ExpertRouter):
    """logits = W h; softmax or sigmoid, with one expert as in Switch, with more as in GShard.

    One expert: its gate is softmax(logits)_i over all experts, or sigmoid(logits_i). More: gates
    are divided by their sum. GShard (arXiv 2006.16668) does so with two, and then drops second
    experts at random; that is left out.
    """

    def make_parameters(self) -> None:
        self.weight = self.new_parameter(self.moe.num_experts, self.config.hidden_size)

    def route(self, hidden: Tensor) -> Routing:
        logits = project(hidden, self.weight)
        scores = logits.softmax(dim=1)
        experts = self.best(logits)
        if self.moe.router_score_function is ScoreFunction.softmax:
            gates = scores.gather(1, experts)
        else:
            gates = logits.gather(1, experts).sigmoid()
        if self.topk > 1:
            gates = gates / (gates.sum(dim=1, keepdim=True) + 1e-20)
        return self.spread(logits, scores, experts, gates)


def project(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden [t, h] in the model's type, weight [n, h] → [t, n], computed in the weight's type."""
    return _Project.apply(hidden, weight)


class _Project(torch.autograd.Function):
    """Keeps `hidden` for the backward pass as it is, where autograd would keep an fp32 copy.

    megatron-core's router_gating_linear does so too, but hands the fp32 weight and bf16 tokens to
    Transformer Engine where that is installed.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return F.linear(hidden.to(weight.dtype), weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden, weight = ctx.saved_tensors
        of_hidden, of_weight = ctx.needs_input_grad
        return (
            (gradient @ weight).to(hidden.dtype) if of_hidden else None,
            gradient.t() @ hidden.to(weight.dtype) if of_weight else None,
        )


def balance_loss(scores: Tensor, first: Tensor, sequences: int, group: ProcessGroup) -> Tensor:
    """Load balance of first choices, 1 when perfect: E Σ_i f_i P_i.

    f_i is the share of tokens whose first choice is expert i, over all ranks of `group`, and P_i
    this rank's mean of its scores. The mean of the result over the ranks is the loss of their
    tokens together. Switch (arXiv 2101.03961) equation 4; X-MoE (arXiv 2204.09179 section 3.1) with
    t_i read as a share. All ranks of `group` must call it.

    Args:
        scores: [t, E] distributions over experts; carries the gradient.
        first: [t] first choices.
        sequences: into how many the tokens are interleaved for a loss each, whose mean is taken: b
            for one of each sequence, 1 for one of all tokens.
        group: ranks that hold other tokens of the same sequences.
    """
    tokens, experts = scores.shape
    asked = first[:, None] == torch.arange(experts, device=first.device)
    positions = tokens // sequences
    counts = asked.view(positions, sequences, experts).sum(0, dtype=torch.int32)
    if group.size() > 1:
        all_reduce(counts, group=group)
    shares = counts.to(scores.dtype) / (positions * group.size())
    means = scores.view(positions, sequences, experts).mean(dim=0)
    return (shares * means).sum() * (experts / sequences)


def within_capacity(
    gates: Tensor, chosen: Tensor, capacity: int, policy: TokenDropPolicy
) -> Tensor:
    """Which of the `chosen` [t, E] an expert takes when it takes no more than `capacity` tokens:
    those with the largest `gates` [t, E], or the first ones."""
    if capacity >= chosen.shape[0]:
        return chosen
    if policy is TokenDropPolicy.position:
        return chosen & (chosen.cumsum(dim=0) <= capacity)
    largest = gates.detach().topk(capacity, dim=0, sorted=False).indices
    return chosen & torch.zeros_like(chosen).scatter_(0, largest, True)


def build_router(moe: MoEConfig) -> Callable[..., ExpertRouter]:
    """The router that `moe` asks for, still to be called with config, pg_collection and health."""
    # here, because they subclass ExpertRouter
    from models.aux_free_router import AuxFreeRouter
    from models.sparsemixer import SparseMixerRouter
    from models.torchscale_router import TorchScaleRouter
    from models.xmoe_router import XMoERouter

    routers: dict[RouterType, type[ExpertRouter]] = {
        RouterType.xmoe: XMoERouter,
        RouterType.linear: LinearRouter,
        RouterType.aux_free: AuxFreeRouter,
        RouterType.sparsemixer: SparseMixerRouter,
        RouterType.torchscale: TorchScaleRouter,
        RouterType.torchscale_xmoe: TorchScaleRouter,
    }
    return partial(routers[moe.router], moe=moe)

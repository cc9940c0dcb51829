"""The routers of TorchScale 0.3.0: its Top1Gate and Top2Gate, with and without `use_xmoe`.

    torchscale        logits = wg x                    wg [E, h]
    torchscale_xmoe   logits_e = (wg_reduction x)·ŵ_e  wg_reduction [16, h], ŵ_e a row of wg [E, 16]
                                                       divided by its length
    gates = softmax(logits) over all experts

TorchScale (component/xmoe/routing.py) is the published code of X-MoE (arXiv 2204.09179) and differs
from the paper, which `model.moe.router=xmoe` follows. These routers do what the code does, to
continue its models and to compare with them.

Each expert takes a limited number of this rank's tokens, its capacity; what comes beyond is
dropped: the expert adds nothing to the token, and the residual carries it on. **Routing therefore
depends on how tokens are spread over ranks**: on micro_batch_size and on tensor (with sequence
parallelism), context and data parallelism. Two layouts agree where neither drops a token and
nothing is drawn at random (second_expert_policy=all, or one expert a token).

Reproduced, surprising as some of it is:

- In torchscale_xmoe only the experts' side is normalised and there is no temperature, so that
  scores are no cosines and have no bound (arXiv 2204.09179 section 3.1 normalises both sides and
  divides by a learnable τ). The width 16 does not follow the number of experts.
- There, rows of wg are kept at length 1.5 (0.1 in the paper). Logits do not depend on it;
  gradients are divided by it.
- There, logits that are not finite become the smallest finite one of the whole micro-batch.
- The capacity is k·ceil(t/E) in training, and ceil(eval_capacity_token_fraction · t) in evaluation,
  whatever E and k; with a fraction of 0 or less evaluation has training's.
- Places are given sequence after sequence, to all first choices before any second one. First
  choices beyond the capacity count, so that an overfull expert takes no second choice.
- The first expert has the largest gate, the second the largest logit of the others. Logits whose
  gates round to the same number are a tie, which the lower expert wins.
- second_expert_policy: "sampling" draws the second expert (Gumbel-max), "random" asks it with
  probability min(1, 2 g₂), "all" always asks it. Evaluation draws, too.
- Two gates are divided by their sum: before dropping, and then a token that loses an expert keeps
  the other's share only; or after it, and then a token left with one expert has gate 1, which
  gives the router no gradient. A single expert's gate is its softmax over all experts.

Not reproduced:

- Tensors [t, E, capacity]. Indices say the same in memory linear in t; TorchScale's is quadratic.
- wg rescaled in each forward pass. Here it is after each update, and rows within `LENGTH_SLACK` of
  their length stay as they are. TorchScale's moves weights by a rounding error in evaluation too,
  and its change in place breaks a backward pass which the forward of another micro-batch has
  overtaken, as in a pipeline.
- Half precision in front of the softmax: everything is fp32 here. TorchScale computes logits in the
  model's type, and the softmax in fp32. In fp32 models the two are equal.
- The balance loss of one rank's tokens: `models.router.balance_loss` spans tensor- and context-
  parallel ranks (or one sequence, model.moe.balance_scope). On one rank the two are equal.
- The error when not one logit is finite: the loss is not finite then, and the update is skipped.
- Padding masks: our sequences are full.
- TorchScale's configuration forces policy "random" and dividing before dropping with use_xmoe. For
  both routers these are defaults here; its own without use_xmoe divides after.

Random numbers come from torch's generators (`ExpertRouter.random_numbers`), as many and in the
order TorchScale draws them; a recomputed forward pass repeats its draws.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from models.moe_config import RouterType, SecondExpertPolicy
from models.parameter_count import TORCHSCALE_ROUTER_DIM
from models.router import ExpertRouter, Routing, project

# a number in TorchScale's code
ROW_LENGTH = 1.5
# Relative. Rounding leaves a rescaled row within 3e-7, so that rescaling twice is rescaling once:
# saving and loading weights between two updates changes nothing.
LENGTH_SLACK = 1e-6


class TorchScaleRouter(ExpertRouter):
    """Top1Gate or Top2Gate, by `moe.router_topk`; see the head of this file.

    Parameters: `wg` [E, h], or with router=torchscale_xmoe `wg` [E, 16] and `wg_reduction` [16, h].
    """

    def make_parameters(self) -> None:
        self.wg_reduction: torch.nn.Parameter | None = None
        if self.moe.router is RouterType.torchscale_xmoe:
            self.wg_reduction = self.new_parameter(TORCHSCALE_ROUTER_DIM, self.config.hidden_size)
            self.wg = self.new_parameter(self.moe.num_experts, TORCHSCALE_ROUTER_DIM)
        else:
            self.wg = self.new_parameter(self.moe.num_experts, self.config.hidden_size)
        self._sequences = 1
        self._stale = not self.moe.freeze_routing  # initial rows have another length

    def restore(self) -> None:
        if self.wg_reduction is not None:
            self.wg.copy_(rescaled_rows(self.wg))

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._sequences = input.shape[1]  # `route` gives places sequence after sequence
        return super().forward(input, padding_mask)

    def route(self, hidden: Tensor) -> Routing:
        if self.wg_reduction is None:
            logits = project(hidden, self.wg)
        else:
            logits = xmoe_logits(project(hidden, self.wg_reduction), self.wg)
        self.note_gap(logits)
        moe, tokens = self.moe, hidden.shape[0]
        fraction = 0.0 if self.training else moe.eval_capacity_token_fraction
        capacity = expert_capacity(tokens, self.num_experts, self.topk, fraction)
        if self.topk == 1:
            return route_top1(logits, capacity, self._sequences)
        return route_top2(
            logits,
            capacity,
            self._sequences,
            policy=moe.second_expert_policy,
            normalize_before_dropping=moe.normalize_gate_prob_before_dropping,
            uniform=self._draw(logits) if self.draws else None,
        )

    @property
    def draws(self) -> bool:
        return self.topk == 2 and self.moe.second_expert_policy is not SecondExpertPolicy.all

    def _draw(self, logits: Tensor) -> Tensor:
        """Numbers in [0, 1): [t, E] for policy "sampling", [t] for "random"."""
        shape = [self._sequences, len(logits) // self._sequences]
        if self.moe.second_expert_policy is SecondExpertPolicy.sampling:
            shape.append(self.num_experts)
        with self.random_numbers():
            drawn = torch.rand(shape, dtype=logits.dtype, device=logits.device)
        return drawn.transpose(0, 1).flatten(0, 1)  # tokens are sequence-first


def expert_capacity(tokens: int, experts: int, topk: int, eval_fraction: float) -> int:
    """How many of a rank's `tokens` an expert takes; `eval_fraction` above 0 in evaluation only."""
    if eval_fraction > 0:
        return math.ceil(eval_fraction * tokens)
    return topk * math.ceil(tokens / experts)


def xmoe_logits(reduced: Tensor, wg: Tensor) -> Tensor:
    """reduced [t, 16] and wg [E, 16] → finite logits [t, E]."""
    return make_finite(F.linear(reduced, F.normalize(wg, dim=1)))


def make_finite(logits: Tensor) -> Tensor:
    """Those that are not finite become the smallest finite one; the host waits for nothing."""
    finite = logits.isfinite()
    smallest = logits.masked_fill(~finite, math.inf).amin()
    return torch.where(finite, logits, smallest)


def rescaled_rows(wg: Tensor) -> Tensor:
    """Rows of wg [E, 16] at length 1.5; idempotent to the bit."""
    factor = ROW_LENGTH / torch.linalg.vector_norm(wg, dim=1, keepdim=True)
    return torch.where((factor - 1).abs() > LENGTH_SLACK, wg * factor, wg)


def route_top1(logits: Tensor, capacity: int, sequences: int) -> Routing:
    """Top1Gate on logits [t, E] of `sequences` interleaved sequences."""
    scores = logits.softmax(dim=1)
    first = scores.argmax(dim=1, keepdim=True)
    asked = torch.ones_like(first, dtype=torch.bool)
    kept = queue_places(first, asked, sequences) < capacity
    return _spread(logits, scores, first, asked, scores.gather(1, first) * kept)


def route_top2(
    logits: Tensor,
    capacity: int,
    sequences: int,
    *,
    policy: SecondExpertPolicy,
    normalize_before_dropping: bool,
    uniform: Tensor | None,
) -> Routing:
    """Top2Gate on logits [t, E], E > 1, of `sequences` interleaved sequences.

    `uniform`: numbers in [0, 1) which decide about second experts; [t, E] with policy "sampling",
    [t] with "random", None with "all".
    """
    scores = logits.softmax(dim=1)
    first = scores.argmax(dim=1, keepdim=True)
    ranked = logits.detach()
    if policy is SecondExpertPolicy.sampling:
        assert uniform is not None
        ranked = ranked + gumbel(uniform)
    second = ranked.scatter(1, first, -math.inf).argmax(dim=1, keepdim=True)
    experts = torch.cat([first, second], dim=1)  # [t, 2]
    asked = torch.ones_like(experts, dtype=torch.bool)
    gates = scores.gather(1, experts)
    if normalize_before_dropping:
        gates = _sum_to_one(gates)
    if policy is SecondExpertPolicy.random:
        assert uniform is not None
        asked[:, 1] = 2 * gates[:, 1] > uniform
    gates = gates * (asked & (queue_places(experts, asked, sequences) < capacity))
    if not normalize_before_dropping:
        gates = _sum_to_one(gates)
    return _spread(logits, scores, experts, asked, gates)


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel numbers; for the same draws those of torch.distributions to the bit."""
    limits = torch.finfo(uniform.dtype)
    return -(-(uniform * (1 - limits.eps) + limits.tiny).log()).log()


def queue_places(experts: Tensor, asked: Tensor, sequences: int) -> Tensor:
    """Each token's place, from 0, in the queues of its experts: [t, k] int64.

    All first choices stand before all second ones, each of them sequence after sequence.

    Args:
        experts: [t, k].
        asked: [t, k] bool; False: stands in no queue, and the place returned means nothing.
        sequences: into how many the t tokens are interleaved.
    """
    # -1 is a queue for those who stand in none. [k, sequences, positions], flat:
    queue = experts.masked_fill(~asked, -1).unflatten(0, (-1, sequences)).permute(2, 1, 0)
    ordered, order = queue.flatten().sort(stable=True)
    # a sort is a tenth of the time of a cumulative sum over [k t, E] on a CPU
    place = torch.arange(len(order), device=order.device) - torch.searchsorted(ordered, ordered)
    places = torch.empty_like(place).scatter_(0, order, place)
    return places.view(queue.shape).permute(2, 1, 0).flatten(0, 1)


def _sum_to_one(gates: Tensor) -> Tensor:
    """Rows divided by their sum; two gates of 0 stay 0."""
    return gates / gates.sum(dim=1, keepdim=True).clamp(min=torch.finfo(gates.dtype).eps)


def _spread(
    logits: Tensor, scores: Tensor, experts: Tensor, asked: Tensor, gates: Tensor
) -> Routing:
    """`experts`, `asked` and `gates`, all [t, k], spread over [t, E]."""
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, experts, asked)
    all_gates = torch.zeros_like(scores).scatter(1, experts, gates)
    # TorchScale, too, takes what is not 0: a second gate may underflow
    return Routing(logits, scores, experts[:, 0], chosen, all_gates, all_gates != 0)

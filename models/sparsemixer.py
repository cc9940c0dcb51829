"""SparseMixer-v2 (GRIN, arXiv 2409.12136): experts are sampled in training, with a gradient for it.

With the logits s = W h of one token, m their maximum and ε `model.moe.router_jitter_eps`:

1. Experts with (m - s_i) / max(|s_i|, m) > 2 ε are out; π is the softmax over the others.
2. In training the expert is drawn from π, in evaluation it is the best one. ω is its π.
3. Its gate is ω, in training times 1 if it is the best one, else times 1 with probability 1/4 and
   1/3 otherwise (Heun's third-order method). The gradient of a gate is that of ω all the same:
   ω (δ - π) with respect to the logits, δ being 1 at the expert and 0 elsewhere.
4. A second expert: the first one is taken out, and 1 to 3 are done over again. |s| in the
   denominator stays. The two gates are not renormalised; their sum may exceed 1.

As in the published code of the models trained with it (Phi-3.5-MoE in transformers), except for the
factor: exactly 1/3 here, 0.3333 there. No token is dropped.

Random numbers come from torch's generators (`ExpertRouter.random_numbers`); a recomputed forward
pass repeats its draws. Another layout, or another micro_batch_size, draws others: training with
this router is the same distribution under every layout, not the same numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from models.router import LinearRouter, Routing, project

HEUN_FACTOR = 1 / 3  # of an expert that is not the best one,
HEUN_SPARED = 0.25  # but for this share of the draws


class SparseMixerRouter(LinearRouter):
    """One or two experts a token by `sparsemixer_choice`; see the head of this file.

    The balance loss counts first choices, as drawn, against softmax(s) over all experts.
    """

    @property
    def draws(self) -> bool:
        return True

    def route(self, hidden: Tensor) -> Routing:
        logits = project(hidden, self.weight)
        self.note_gap(logits)
        experts, gates = [], []
        excluded = torch.zeros_like(logits, dtype=torch.bool)
        with self.random_numbers():
            for _ in range(self.topk):
                expert, gate = sparsemixer_choice(
                    logits, excluded, self.moe.router_jitter_eps, sample=self.training
                )
                experts.append(expert)
                gates.append(gate)
                excluded = excluded.scatter(1, expert, True)
        return self.spread(
            logits, logits.softmax(dim=1), torch.cat(experts, dim=1), torch.cat(gates, dim=1)
        )


def sparsemixer_choice(
    logits: Tensor, excluded: Tensor, jitter_eps: float, *, sample: bool
) -> tuple[Tensor, Tensor]:
    """One expert for each token and its gate, both [t, 1].

    Args:
        logits: [t, E].
        excluded: [t, E] bool, experts that were chosen before.
        jitter_eps: ε.
        sample: draw the expert and the factor of its gate, as in training.
    """
    with torch.no_grad():
        best, best_expert = logits.masked_fill(excluded, -math.inf).max(dim=1, keepdim=True)
        # multiplied out, so that nothing is divided by 0
        far = (best - logits) > 2 * jitter_eps * logits.abs().maximum(best)
    candidates = logits.masked_fill(far | excluded, -math.inf)
    probabilities = candidates.softmax(dim=1)
    if not sample:
        return best_expert, probabilities.gather(1, best_expert)
    with torch.no_grad():
        # Gumbel-max: argmax of s - ln Exp(1) is distributed as π
        noise = torch.empty_like(logits).exponential_().log_()
        expert = (candidates - noise).argmax(dim=1, keepdim=True)
        spared = torch.rand_like(best) < HEUN_SPARED
        whole = (expert == best_expert) | spared
    omega = probabilities.gather(1, expert)
    # the value of ω · factor with the gradient of ω
    taken_away = omega.detach() * (1 - HEUN_FACTOR)
    return expert, omega - taken_away.masked_fill(whole, 0.0)

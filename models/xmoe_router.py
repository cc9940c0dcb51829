"""X-MoE's router (arXiv 2204.09179 section 3.1): cosines in a space of few dimensions.

Shapes as in models/router.py; d_e is `model.moe.router_dim`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from models.initialize import EMBEDDING_NORM
from models.moe_config import SMALLEST_TEMPERATURE, ScoreFunction
from models.router import ExpertRouter, Routing, project

# Projected tokens shorter than this point nowhere: score 0 with every expert, and no gradient,
# which would otherwise grow with the inverse of the length.
SHORTEST = 1e-6


class XMoERouter(ExpertRouter):
    """X-MoE (arXiv 2204.09179 section 3.1): cosines in a space of few dimensions.

        s_i = (W h)·e_i / (‖W h‖ ‖e_i‖)    W [d_e, h] without bias, e_i [d_e]
        gate of expert i = softmax_i(s / τ) over all experts, or sigmoid(s_i / τ)

    τ is learnable and starts where the balance loss, on softmax(s / τ0), keeps it. ‖e_i‖ stays 0.1:
    it is put back there after each update. The paper has one expert a token (and tries two, without
    saying whether gates are renormalised): here each of several has the gate given above.

    Differs from the paper: τ is kept at `SMALLEST_TEMPERATURE` or above, and projected tokens
    shorter than `SHORTEST` have score 0.
    """

    def make_parameters(self) -> None:
        self.projection = self.new_parameter(self.moe.dim, self.config.hidden_size)
        self.expert_embeddings = self.new_parameter(
            self.moe.num_experts, self.moe.dim, decays=False
        )
        self.temperature = self.new_parameter(1, decays=False)

    def restore(self) -> None:
        embeddings, temperature = self.expert_embeddings.data, self.temperature.data
        embeddings.copy_(EMBEDDING_NORM * F.normalize(embeddings.double(), dim=1))
        temperature.clamp_(min=SMALLEST_TEMPERATURE)

    def route(self, hidden: Tensor) -> Routing:
        cosines = cosine_scores(project(hidden, self.projection), self.expert_embeddings)
        logits = cosines / self.temperature
        experts = self.best(cosines)
        if self.moe.router_score_function is ScoreFunction.softmax:
            gates = logits.softmax(dim=1).gather(1, experts)
        else:
            gates = logits.gather(1, experts).sigmoid()
        scores = (cosines / self.moe.temperature).softmax(dim=1)
        return self.spread(logits, scores, experts, gates)


def cosine_scores(tokens: Tensor, experts: Tensor) -> Tensor:
    """tokens [t, d_e], experts [E, d_e] → the cosines of their angles [t, E]."""
    return F.linear(directions(tokens), directions(experts))


def directions(vectors: Tensor) -> Tensor:
    """Rows divided by their length; rows shorter than `SHORTEST` become 0 and get no gradient."""
    lengths = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return vectors / lengths.masked_fill(lengths < SHORTEST, math.inf)

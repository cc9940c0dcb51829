"""Routing that a bias balances, and no loss (arXiv 2408.15664). Shapes as in models/router.py."""

from __future__ import annotations

import torch
from torch import Tensor

from models.router import LinearRouter, Routing, project
from parallel.megatron import (
    topk_routing_with_score_function,
)
from parallel.norm import parameter_device


class AuxFreeRouter(LinearRouter):
    """Sigmoid scores; a bias on them, in choosing only, balances the load (arXiv 2408.15664).

    megatron-core's: `expert_bias` moves by `router_bias_update_rate` after each step, up where an
    expert had fewer tokens than the mean over tensor-, context- and data-parallel ranks, down where
    it had more (finalize_model_grads, by the names of the two buffers). `expert_bias` is part of a
    checkpoint. Several gates are divided by their sum. No balance loss.
    """

    balances = False
    expert_bias: Tensor
    local_tokens_per_expert: Tensor

    def make_parameters(self) -> None:
        super().make_parameters()
        for name, persistent in {"expert_bias": True, "local_tokens_per_expert": False}.items():
            zeros = torch.zeros(
                self.moe.num_experts, dtype=torch.float32, device=parameter_device(self.config)
            )
            self.register_buffer(name, zeros, persistent=persistent)

    def route(self, hidden: Tensor) -> Routing:
        logits = project(hidden, self.weight)
        gates, chosen = topk_routing_with_score_function(
            logits, self.topk, score_function="sigmoid", expert_bias=self.expert_bias
        )
        if self.track_gap:
            self.note_gap(logits.sigmoid() + self.expert_bias)
        # the pass with gradients: once a micro-batch, with and without recomputation
        if self.training and torch.is_grad_enabled() and not self.moe.freeze_routing:
            self.local_tokens_per_expert += chosen.sum(dim=0)
        scores = logits.detach().softmax(dim=1)
        first = gates.detach().argmax(dim=1)
        return self.limit(Routing(logits, scores, first, chosen, gates, chosen))

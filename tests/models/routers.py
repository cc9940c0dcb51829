"""Small routers for tests: `make_router` without any process, `route_on_rank` on gloo ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from models.moe_config import SETTINGS_OF_ROUTERS, MoEConfig, RouterType
from models.router import ExpertRouter, build_router
from models.router_health import RouterHealth
from parallel.config import ParallelConfig
from parallel.megatron import MoEAuxLossAutoScaler, TransformerConfig
from parallel.runtime import initialize

EXPERTS, HIDDEN, SEQUENCE, BATCH = 6, 12, 8, 4


class OneRank:
    """A process group of one, for routers outside any process group."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


class Alone:
    tp = cp = tp_cp = tp_dp_cp = OneRank()


def moe_settings(router: RouterType = RouterType.xmoe, **changes: Any) -> MoEConfig:
    """`changes` that belong to other routers are left out: tests try several with the same ones."""
    owners = SETTINGS_OF_ROUTERS
    own = {name: v for name, v in changes.items() if router.value in owners.get(name, router.value)}
    return MoEConfig(num_experts=EXPERTS, router=router, **own)


def transformer_settings(
    moe: MoEConfig, parallel: ParallelConfig | None = None
) -> TransformerConfig:
    parallel = parallel or ParallelConfig()
    return TransformerConfig(
        num_layers=2,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        ffn_hidden_size=HIDDEN,
        num_moe_experts=moe.num_experts,
        moe_ffn_hidden_size=HIDDEN,
        moe_router_enable_expert_bias=moe.router is RouterType.aux_free,
        moe_router_score_function="sigmoid",
        moe_router_bias_update_rate=moe.router_bias_update_rate,
        moe_router_load_balancing_type="none",
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        calculate_per_token_loss=True,
        add_bias_linear=False,
        cuda_graph_scope=[],
    )


def make_router(
    moe: MoEConfig,
    *,
    parallel: ParallelConfig | None = None,
    groups: Any = Alone,
    health: RouterHealth | None = None,
) -> ExpertRouter:
    """With the same parameters each time, far enough from 0 to make the experts differ."""
    config = transformer_settings(moe, parallel)
    router = build_router(moe)(config=config, pg_collection=groups, health=health)
    router.set_layer_number(1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in sorted(router.named_parameters()):
            if name == "temperature":
                parameter.fill_(moe.temperature)
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            if name == "expert_embeddings":
                parameter.mul_(0.1 / parameter.norm(dim=1, keepdim=True))
    return router


def tokens(*, sequences: int = BATCH, seed: int = 7) -> Tensor:
    """[s, b, h]"""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SEQUENCE, sequences, HIDDEN, generator=generator)


def pull(*, sequences: int = BATCH) -> Tensor:
    """What the layers above might answer: the gradient of the gates, [s, b, E]."""
    generator = torch.Generator().manual_seed(11)
    return torch.randn(SEQUENCE, sequences, EXPERTS, generator=generator)


@dataclass
class Gradients:
    parameters: dict[str, Tensor]
    hidden: Tensor  # [s, b, h], 0 where another rank has the token


def gradients(router: ExpertRouter, hidden: Tensor, upstream: Tensor) -> Gradients:
    """Of one micro-batch: what `upstream` and the router's losses give."""
    router.zero_grad()
    hidden = hidden.clone().requires_grad_()
    gates, _ = router(hidden)
    backward(gates, upstream)
    assert hidden.grad is not None
    found = {n: p.grad.clone() for n, p in router.named_parameters() if p.grad is not None}
    return Gradients(found, hidden.grad)


def backward(gates: Tensor, upstream: Tensor) -> None:
    """Without megatron-core's schedules, which set the scale of the attached losses: what it makes
    of a missing one would stay in this process, and the next schedule would stumble over it."""
    before = MoEAuxLossAutoScaler.main_loss_backward_scale
    gates.backward(upstream.reshape(gates.shape))
    MoEAuxLossAutoScaler.main_loss_backward_scale = before


def assert_near(found: Tensor, expected: Tensor) -> None:
    """Within 1e-5 of the largest entry: fp32 sums over the same tokens in another order."""
    bound = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)


def route_on_rank(parallel: ParallelConfig, moe: MoEConfig) -> Gradients:
    """Gradients of this rank's part of `tokens()`, reduced as the engine reduces them."""
    runtime = initialize(parallel, seed=1)
    router = make_router(moe, parallel=parallel, groups=runtime.groups)
    hidden, upstream = tokens(), pull()
    places = torch.arange(SEQUENCE * BATCH).view(SEQUENCE, BATCH)
    places = places.chunk(runtime.data_parallel_size, dim=1)[runtime.data_parallel_rank]
    size, rank = runtime.context_parallel_size, runtime.context_parallel_rank
    if size > 1:  # chunks r and 2 cp - 1 - r
        chunks = places.chunk(2 * size)
        places = torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])
    if parallel.sequence_parallel:
        places = places.chunk(runtime.tensor_parallel_size)[runtime.tensor_parallel_rank]
    mine = gradients(router, hidden.view(-1, HIDDEN)[places], upstream.view(-1, EXPERTS)[places])
    for name, parameter in router.named_parameters():
        if parameter.sequence_parallel:
            dist.all_reduce(mine.parameters[name], group=runtime.groups.tp)
        dist.all_reduce(mine.parameters[name], group=runtime.groups.dp_cp)
    spread = torch.zeros(SEQUENCE * BATCH, HIDDEN)
    spread[places.flatten()] = mine.hidden.reshape(-1, HIDDEN)
    return Gradients(mine.parameters, spread.view(SEQUENCE, BATCH, HIDDEN))

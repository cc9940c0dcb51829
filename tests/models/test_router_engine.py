"""X-MoE's router in the engine, on two data-parallel ranks: its invariants, and resuming."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.router import ExpertRouter
from parallel import checkpoint_io
from parallel.config import OptimizerConfig, ParallelConfig
from parallel.engine import MegatronEngine, checkpoint_metadata
from parallel.megatron import MegatronModule, ModelType
from parallel.runtime import Runtime, initialize
from tests.distributed import run_on_gloo
from tests.models.routers import HIDDEN, SEQUENCE, make_router, moe_settings, pull, tokens

FP32, BF16 = torch.float32, torch.bfloat16


class OneLayer(MegatronModule):
    """A linear in the model's type, and a router on top of it, in fp32."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, router: ExpertRouter, dtype: torch.dtype) -> None:
        super().__init__(router.config)
        generator = torch.Generator().manual_seed(1)
        weight = torch.randn(HIDDEN, HIDDEN, generator=generator) / math.sqrt(HIDDEN)
        self.weight = torch.nn.Parameter(weight.to(dtype))
        self.router = router

    def forward(self, hidden: Tensor) -> Tensor:
        gates, _ = self.router(hidden.to(self.weight.dtype) @ self.weight)
        return gates

    def set_input_tensor(self, input_tensor: Tensor) -> None:
        """What megatron-core's schedules call."""


def make_engine(runtime: Runtime, dtype: torch.dtype, distributed: bool) -> MegatronEngine:
    router = make_router(moe_settings(aux_loss_coeff=0.1), groups=runtime.groups)
    router.config.params_dtype, router.config.bf16 = dtype, dtype is BF16
    parallel = ParallelConfig(use_distributed_optimizer=distributed)
    return MegatronEngine([OneLayer(router, dtype)], parallel, OptimizerConfig(), runtime)


def forward_step(iterator: Iterator[Tensor], model: torch.nn.Module) -> tuple[Tensor, Any]:
    gates = model(next(iterator))

    def loss(gates: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        upstream = pull(sequences=len(gates) // SEQUENCE).reshape(gates.shape)
        return (gates * upstream).sum(), torch.tensor(len(gates), dtype=torch.int), {}

    return gates, loss


def train(engine: MegatronEngine, steps: range) -> None:
    for step in steps:
        mine = tokens(seed=step).chunk(2, dim=1)[engine.runtime.rank]
        engine.forward_backward(
            mine.split(1, dim=1), forward_step, seq_length=SEQUENCE, micro_batch_size=1
        )
        engine.step(0.03)


def weights(engine: MegatronEngine) -> dict[str, Tensor]:
    named = engine.chunks[0].module.named_parameters()
    return {name: parameter.detach().clone() for name, parameter in named}


def train_on_rank(dtype: torch.dtype, distributed: bool) -> tuple[Any, Any, list[list[float]]]:
    engine = make_engine(initialize(ParallelConfig(), seed=1), dtype, distributed)
    train(engine, range(3))
    unsettled = weights(engine)
    engine.chunks[0].module.router.settle()
    groups = engine.optimizer.param_groups
    masters = [p.detach().flatten().tolist() for group in groups for p in group["params"]]
    return unsettled, weights(engine), masters


@pytest.mark.parametrize(("dtype", "distributed"), [(FP32, False), (FP32, True), (BF16, True)])
def test_lengths_stay_on_all_ranks_alike(dtype: torch.dtype, distributed: bool) -> None:
    (unsettled, settled, masters), (_, other, other_masters) = run_on_gloo(
        2, train_on_rank, dtype, distributed
    )
    start = dict(make_router(moe_settings()).named_parameters())
    for name, value in settled.items():
        assert torch.equal(value, other[name])
        if name != "weight":
            assert value.dtype is FP32
            assert not torch.equal(value, start[name.removeprefix("router.")])
    embeddings = settled["router.expert_embeddings"]
    lengths = embeddings.double().norm(dim=1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, 0.1), rtol=1e-7, atol=0)
    before = unsettled["router.expert_embeddings"].double().norm(dim=1)
    assert not torch.allclose(before, lengths, rtol=1e-4)
    # the optimizer goes on from the settled values, not from a copy of what it made itself
    held = {value for master in [*masters, *other_masters] for value in master}
    assert set(embeddings.flatten().tolist()) <= held


def resume_on_rank(dtype: torch.dtype, distributed: bool, folder: Path) -> tuple[Any, Any]:
    runtime = initialize(ParallelConfig(), seed=1)
    engine = make_engine(runtime, dtype, distributed)
    train(engine, range(2))
    checkpoint_io.save(engine.sharded_state_dict(), folder, metadata=checkpoint_metadata())
    train(engine, range(2, 4))
    resumed = make_engine(runtime, dtype, distributed)
    for parameter in resumed.chunks[0].module.parameters():
        parameter.data.mul_(1.5)
    state = resumed.sharded_state_dict(is_loading=True)
    resumed.load_state_dict(checkpoint_io.load(state, folder))
    train(resumed, range(2, 4))
    return weights(engine), weights(resumed)


@pytest.mark.parametrize(("dtype", "distributed"), list(product((FP32, BF16), (False, True))))
def test_a_resumed_run_is_bit_equal(dtype: torch.dtype, distributed: bool, tmp_path: Path) -> None:
    for whole, resumed in run_on_gloo(2, resume_on_rank, dtype, distributed, tmp_path / "saved"):
        for name, value in whole.items():
            assert torch.equal(resumed[name], value), name

"""Norms by block and layer are those of one process, whatever the layout."""

from __future__ import annotations

import math
from typing import Any

import pytest

from models.build import build_model
from models.config import ModelConfig
from models.moe_config import MoEConfig
from parallel.config import OptimizerConfig, ParallelConfig
from parallel.engine import MegatronEngine
from parallel.gradient_norms import KINDS, NormsByBlock, kind_of
from parallel.runtime import initialize
from pretrain.parity import LANGUAGES
from pretrain.train_step import train_step
from tests.distributed import run_on_gloo
from tests.parity import MODEL, ONE_PROCESS, VOCAB, layout, micro_batches, variant

# clips every step: what is measured must be the gradients before that
CLIPPED = OptimizerConfig(lr=1e-3, clip_grad=0.01)
SPARSE = variant(
    moe=MoEConfig(num_experts=4, router_topk=2, router_dim=8, shared_expert_intermediate_size=32)
)


def norms_on_rank(
    model: ModelConfig, parallel: ParallelConfig
) -> list[tuple[float, dict[str, float]]]:
    """(train/grad_norm, norms) of two steps."""
    runtime = initialize(parallel, seed=1)
    chunks = build_model(model, parallel, runtime, vocab_size=VOCAB, seed=1)
    engine = MegatronEngine(chunks, parallel, CLIPPED, runtime)
    norms = NormsByBlock(engine, model.num_layers)
    found = []
    for step in range(2):
        batches = micro_batches(step, 1, runtime.data_parallel_rank, runtime.data_parallel_size)
        with norms.measuring():
            metrics = train_step(
                engine,
                batches,
                runtime,
                learning_rate=1e-3,
                languages=LANGUAGES,
                stop_requested=False,
            )
        assert metrics.applied
        found.append((metrics.grad_norm, norms.metrics()))
    assert engine.before_clipping is None
    return found


def norms(
    model: ModelConfig, parallel: ParallelConfig, world_size: int
) -> list[tuple[float, dict[str, float]]]:
    ranks = run_on_gloo(world_size, norms_on_rank, model, parallel)
    assert all(rank == ranks[0] for rank in ranks), "ranks disagree"
    return ranks[0]


_references: dict[str, Any] = {}


def reference(model: ModelConfig) -> list[tuple[float, dict[str, float]]]:
    key = repr(model)
    if key not in _references:
        _references[key] = norms(model, ONE_PROCESS, 1)
    return _references[key]


LAYOUTS = {
    "zero dp2": (MODEL, layout(), 2),
    "plain dp2": (MODEL, layout(zero=False), 2),
    "tp2 sp pp2 tied": (MODEL, layout(tp=2, pp=2, sp=True), 4),
    "interleaved": (MODEL, layout(pp=2, vpp=2), 2),
    "experts ep2 tp2": (SPARSE, layout(tp=2, sp=True, expert_model_parallel_size=2), 4),
    "experts plain ep2": (SPARSE, layout(zero=False, expert_model_parallel_size=2), 2),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_blocks_add_up_and_do_not_know_the_layout(name: str) -> None:
    model, parallel, world_size = LAYOUTS[name]
    found = norms(model, parallel, world_size)
    for (total, blocks), (_, expected) in zip(found, reference(model), strict=True):
        of_blocks = [v for k, v in blocks.items() if k.startswith("gradients/block/")]
        assert math.hypot(*of_blocks) == pytest.approx(total, rel=1e-5)
        assert total > CLIPPED.clip_grad
        assert blocks.keys() == expected.keys()
        assert blocks == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_every_parameter_has_a_kind_and_layers_add_up() -> None:
    for model, kinds in (
        (MODEL, {"embedding", "attention", "feed_forward", "norms"}),
        (SPARSE, {"embedding", "attention", "feed_forward", "norms", "experts", "router"}),
    ):
        total, blocks = reference(model)[0]
        named = {k.split("/")[2] for k in blocks if k.startswith("gradients/block/")}
        assert named - {"output"} == kinds and "other" not in named
        layers = [v for k, v in blocks.items() if k.startswith("gradients/layer_")]
        assert len(layers) == model.num_layers and 0 < math.hypot(*layers) < total
        weights = [v for k, v in blocks.items() if k.startswith("weights/block/")]
        assert math.hypot(*weights) == pytest.approx(blocks["weights/norm"])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("module.decoder.layers.0.self_attention.linear_qkv.weight", "attention"),
        ("module.decoder.layers.0.self_attention.linear_proj.norm_weight", "norms"),
        ("module.decoder.layers.0.mlp.experts.fc1_weight", "experts"),
        ("module.decoder.layers.0.mlp.shared_experts.linear_fc1.weight", "experts"),
        ("module.decoder.layers.0.mlp.router.weight", "router"),
        ("module.decoder.final_layernorm.weight", "norms"),
        ("module.output_layer.weight", "output"),
        ("module.something.weight", "other"),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert kind_of(name) == kind and kind in KINDS

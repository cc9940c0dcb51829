"""What checkpoints of a sparse model hold beside what tests/parallel/test_checkpoint_layouts.py
compares: the balancing bias, weights still to be gathered, embeddings with their norm."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.config import ModelConfig
from models.moe_config import MoEConfig, RouterType
from parallel import checkpoint_io
from parallel.config import ParallelConfig
from parallel.engine import checkpoint_metadata
from parallel.megatron import dist_checkpointing
from parallel.runtime import shutdown
from tests.distributed import run_on_gloo
from tests.parallel.test_checkpoint_layouts import build, train
from tests.parity import MODEL

SPARSE = replace(MODEL, moe=MoEConfig(num_experts=4, shared_expert_intermediate_size=32))


def train_and_save(model: ModelConfig, parallel: ParallelConfig, folder: Path) -> None:
    runtime, engine = build(model, parallel)
    for step in range(2):
        train(runtime, engine, step)
    checkpoint_io.save(engine.sharded_state_dict(), folder, metadata=checkpoint_metadata())
    shutdown(runtime)


def load_and_save(model: ModelConfig, parallel: ParallelConfig, old: Path, new: Path) -> None:
    runtime, engine = build(model, parallel, seed=8)
    engine.load_state_dict(checkpoint_io.load(engine.sharded_state_dict(is_loading=True), old))
    checkpoint_io.save(engine.sharded_state_dict(), new, metadata=checkpoint_metadata())
    shutdown(runtime)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every sharded tensor of a checkpoint as a whole."""
    contents = run_on_gloo(1, dist_checkpointing.load_plain_tensors, str(folder))[0]
    return {key: value for key, value in contents.items() if torch.is_tensor(value)}


def assert_same_contents(one: Path, other: Path) -> None:
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    different = [key for key in first if not torch.equal(first[key], second[key])]
    assert different == []


def test_the_balancing_bias_is_saved(tmp_path: Path) -> None:
    model = replace(SPARSE, moe=replace(SPARSE.moe, router=RouterType.aux_free, router_topk=2))
    old, new = tmp_path / "old", tmp_path / "new"
    run_on_gloo(2, train_and_save, model, ParallelConfig(expert_model_parallel_size=2), old)
    run_on_gloo(1, load_and_save, model, ParallelConfig(), old, new)
    assert_same_contents(old, new)
    bias = [value for name, value in tensors(old).items() if name.endswith("expert_bias")]
    assert bias and all(value.abs().max() > 0 for value in bias)


def test_a_gather_that_waits_for_the_next_forward_pass_is_not_missed(tmp_path: Path) -> None:
    """With overlap_param_gather weights are stale after a step; a save must not take them."""
    plain = ParallelConfig(expert_model_parallel_size=2)
    overlapped = replace(plain, overlap_grad_reduce=True, overlap_param_gather=True)
    run_on_gloo(2, train_and_save, SPARSE, plain, tmp_path / "plain")
    run_on_gloo(2, train_and_save, SPARSE, overlapped, tmp_path / "overlapped")
    assert_same_contents(tmp_path / "plain", tmp_path / "overlapped")


def test_expert_embeddings_are_saved_with_their_norm(tmp_path: Path) -> None:
    parallel = ParallelConfig(expert_model_parallel_size=2)
    run_on_gloo(2, train_and_save, SPARSE, parallel, tmp_path / "run")
    saved = {n: w for n, w in tensors(tmp_path / "run").items() if n.endswith("expert_embeddings")}
    weights = [w for n, w in saved.items() if not n.startswith("optimizer")]
    assert weights
    for weight in weights:
        assert weight.norm(dim=1).tolist() == pytest.approx([0.1] * 4, rel=1e-6)

"""The optimizer's state by itself: boxes, views, names, and what `load` refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from models.build import build_model
from models.config import ModelConfig
from models.moe_config import MoEConfig
from parallel import checkpoint_io, optimizer_state
from parallel.checkpoint_io import CheckpointError
from parallel.config import OptimizerConfig, ParallelConfig, Precision
from parallel.engine import MegatronEngine, checkpoint_metadata
from parallel.megatron import ShardedTensor
from parallel.runtime import initialize, shutdown
from tests.distributed import run_on_gloo
from tests.parity import MODEL, VOCAB, layout


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (1, 6), (6, 1), (2, 3, 4), (2, 1, 3, 2)])
def test_boxes_are_a_flat_range(shape: tuple[int, ...]) -> None:
    places = torch.arange(torch.Size(shape).numel()).view(shape)
    for low in range(places.numel() + 1):
        for high in range(low, places.numel() + 1):
            seen: list[int] = []
            found = list(optimizer_state.boxes(shape, low, high))
            for first, offset, size in found:
                part = places[tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))]
                assert part.shape == size and part.numel() > 0
                assert part.flatten()[0] == first
                seen += part.flatten().tolist()
            assert seen == list(range(low, high))
            assert len(found) <= max(1, 2 * len(shape) - 1)


def test_masters_and_fp32_weights_stand_in_for_each_other() -> None:
    master = "optimizer.state.fp32_param."
    bf16 = {"w", f"{master}w", "optimizer.state.exp_avg.w", "router"}
    fp32 = {"w", "optimizer.state.exp_avg.w", "router"}
    resolve = optimizer_state.resolve_masters
    assert resolve(fp32, bf16) == {"w": f"{master}w"}
    assert resolve(bf16, fp32) == {f"{master}w": "w"}
    assert resolve(bf16, bf16) == resolve(fp32, fp32) == {}
    assert resolve({*fp32, f"{master}other"}, fp32) == {}  # nothing to stand in: missing


SPARSE = replace(MODEL, moe=MoEConfig(num_experts=4))


def build(model: ModelConfig, parallel: ParallelConfig) -> MegatronEngine:
    runtime = initialize(parallel, 1)
    chunks = build_model(model, parallel, runtime, vocab_size=VOCAB, seed=7)
    return MegatronEngine(chunks, parallel, OptimizerConfig(weight_decay=0.3), runtime)


def described(parallel: ParallelConfig) -> dict[str, Any]:
    """A state by numbers, its plain values, and whether its tensors are the optimizer's."""
    engine = build(SPARSE, parallel)
    state = engine.sharded_state_dict()["optimizer"]
    memory = set()
    for one in engine.optimizer.chained_optimizers:
        held = [t for moments in one.optimizer.state.values() for t in moments.values()]
        held += [t for group in one.param_groups for t in group["params"]]
        memory |= {tensor.untyped_storage().data_ptr() for tensor in held}
    tensors = list(state.pop("tensors").values())
    trained = sum(p.numel() for chunk in engine.chunks for p in chunk.parameters())
    shutdown(engine.runtime)
    return {
        "views": all(t.data.untyped_storage().data_ptr() in memory for t in tensors),
        "elements": sum(t.data.numel() for t in tensors),
        "kinds": {".".join(t.key.split(".")[:3]) for t in tensors},
        "trained": trained,
        "plain": state,
    }


@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16])
def test_nothing_is_gathered_or_copied(precision: Precision) -> None:
    """Two ranks of ZeRO-1 describe their own memory, and together the state of the model once."""
    ranks = run_on_gloo(2, described, layout(precision=precision))
    assert all(rank["views"] for rank in ranks)
    kinds = {"optimizer.state.exp_avg", "optimizer.state.exp_avg_sq"}
    if precision is Precision.bf16:
        kinds.add("optimizer.state.fp32_param")
    assert ranks[0]["kinds"] == ranks[1]["kinds"] == kinds
    elements = sum(rank["elements"] for rank in ranks)
    per_weight = elements / ranks[0]["trained"]
    assert per_weight == 2 if precision is Precision.fp32 else 2.9 < per_weight < 3  # routers: 2
    settings = {"betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.3}
    assert ranks[0]["plain"] == ranks[1]["plain"] == {"step": 0, "settings": settings}


def step_on_rank(groups: list[list[dict[str, Any]]]) -> int:
    return optimizer_state._step(SimpleNamespace(param_groups=groups[dist.get_rank()]))


def test_the_step_is_known_where_there_is_nothing_to_update() -> None:
    """A group without parameters on a rank is not stepped: never, or not since a resume."""
    weight, nothing = torch.zeros(1), {"params": [], "step": 2}
    ranks = [[nothing, {"params": []}], [{"params": [weight], "step": 3}, nothing]]
    assert run_on_gloo(2, step_on_rank, ranks) == [3, 3]
    ranks = [[{"params": [weight]}], [{"params": [weight], "step": 0}]]
    assert run_on_gloo(2, step_on_rank, ranks) == [0, 0]


def test_state_of_another_format_is_refused() -> None:
    with pytest.raises(ValueError, match="holds no step of Adam"):
        optimizer_state.take_over(SimpleNamespace(param_groups=[]), {"optimizer": {}})


# ---- what load refuses ---------------------------------------------------------------------------


def tensors(names: dict[str, int]) -> dict[str, Any]:
    """Named tensors of some length a rank; the second rank has the last of them to itself."""
    rank = dist.get_rank()
    last = list(names)[-1]
    state: dict[str, Any] = {
        name: ShardedTensor.from_rank_offsets(name, torch.full((size,), rank + 1.0), (0, rank, 2))
        for name, size in names.items()
        if name != last
    }
    if rank == 1:
        whole = torch.full((names[last],), 5.0)
        state[last] = ShardedTensor.from_rank_offsets(last, whole)
    return state


def save_and_load(
    saved: dict[str, int], wanted: dict[str, int], folder: Path, weights_only: bool
) -> Any:
    checkpoint_io.save(tensors(saved), folder, metadata={})
    try:
        loaded = checkpoint_io.load(tensors(wanted), folder, weights_only=weights_only)
    except CheckpointError as error:
        return str(error)
    return {name: loaded[name].tolist() for name in wanted if name in loaded}


ADAM = "optimizer.state.exp_avg.a"
REFUSED = {
    "missing": ({"a": 2, "z": 2}, {"a": 2, "b": 2, "z": 2}, "wanted and not stored (1): b"),
    "on the second rank alone": (
        {"a": 2, "z": 2},
        {"a": 2, "y": 2},
        "wanted and not stored (1): y",
    ),
    "unread": ({"a": 2, "b": 2, "z": 2}, {"a": 2, "z": 2}, "stored and not wanted (1): b"),
    "of the optimizer": ({"a": 2, ADAM: 2, "z": 2}, {"a": 2, "z": 2}, f"not wanted (1): {ADAM}"),
    "shape": ({"a": 2, "z": 2}, {"a": 3, "z": 2}, "of another shape (1): a [4] stored, [6] wanted"),
    "many": (
        {"a": 2, "z": 2},
        {**{name: 2 for name in "abcdefgh"}, "z": 2},
        "wanted and not stored (7): b, c, d, e, f, ...",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_tensors_that_do_not_match_are_named_on_every_rank(case: str, tmp_path: Path) -> None:
    saved, wanted, expected = REFUSED[case]
    first, second = run_on_gloo(2, save_and_load, saved, wanted, tmp_path / "c", False)
    assert expected in first and first == second


def test_weights_alone_leave_the_optimizer_unread(tmp_path: Path) -> None:
    saved = {"a": 2, ADAM: 2, "z": 2}
    ranks = run_on_gloo(2, save_and_load, saved, {"a": 2, "z": 2}, tmp_path / "c", True)
    assert ranks == [{"a": [1.0, 1.0]}, {"a": [2.0, 2.0], "z": [5.0, 5.0]}]
    saved = {"a": 2, "extra": 2, "z": 2}
    for text in run_on_gloo(2, save_and_load, saved, {"a": 2, "z": 2}, tmp_path / "d", True):
        assert "stored and not wanted (1): extra" in text


def load_frozen_into_trained(folder: Path) -> tuple[list[str], str]:
    """Names of the frozen parameter in a state; and what loading it into a whole one says."""
    parallel = layout()
    engine = build(MODEL, parallel)
    runtime = engine.runtime
    chunks = build_model(MODEL, parallel, runtime, vocab_size=VOCAB, seed=7)
    chunks[0].decoder.final_layernorm.weight.requires_grad = False
    partly = MegatronEngine(chunks, parallel, OptimizerConfig(), runtime)
    assert partly.has_frozen_parameters
    checkpoint_io.save(partly.sharded_state_dict(), folder, metadata=checkpoint_metadata())
    partly.load_state_dict(checkpoint_io.load(partly.sharded_state_dict(is_loading=True), folder))
    state = partly.sharded_state_dict()["optimizer"]["tensors"].values()
    named = [t.key for t in state if "final_layernorm.weight" in t.key]
    try:
        checkpoint_io.load(engine.sharded_state_dict(is_loading=True), folder)
    except CheckpointError as error:
        return named, str(error)
    finally:
        shutdown(runtime)
    return named, ""


def test_frozen_parameters_have_no_state(tmp_path: Path) -> None:
    for named, refused in run_on_gloo(2, load_frozen_into_trained, tmp_path / "c"):
        assert named == []
        assert (
            "wanted and not stored (2): optimizer.state.exp_avg.decoder.final_layernorm" in refused
        )

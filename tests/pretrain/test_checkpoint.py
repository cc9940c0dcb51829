"""Resume rules, identity, retention."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from models.build import build_model
from models.config import ModelConfig
from models.moe_config import MoEConfig
from parallel import optimizer_state
from parallel.checkpoint_io import CheckpointError
from parallel.config import OptimizerConfig, ParallelConfig
from parallel.engine import MegatronEngine
from parallel.runtime import initialize, shutdown
from pretrain.checkpoint import Checkpoints, check_identity
from pretrain.config import CheckpointConfig, Resume
from pretrain.train_state import TrainState
from pretrain.train_step import train_step
from tests.distributed import run_on_gloo
from tests.parity import LANGUAGES, MODEL, OPTIMIZER, VOCAB, micro_batches

IDENTITY = {"model": {"hidden_size": 32}, "data": {"seed": 1}}


def engine(seed: int) -> tuple[Any, MegatronEngine]:
    parallel = ParallelConfig()
    runtime = initialize(parallel, 1)
    chunks = build_model(MODEL, parallel, runtime, vocab_size=VOCAB, seed=seed)
    return runtime, MegatronEngine(chunks, parallel, OptimizerConfig(), runtime)


def save_steps(folder: Path, steps: list[int], keep_last: int) -> list[str]:
    runtime, machine = engine(seed=7)
    checkpoints = Checkpoints(folder, CheckpointConfig(keep_last=keep_last), IDENTITY)
    for step in steps:
        checkpoints.save(machine, TrainState(step=step, consumed_sequences=8 * step))
        checkpoints.save(machine, TrainState(step=step))  # again: nothing happens
    shutdown(runtime)
    return [path.name for path in checkpoints.steps()]


def resume(folder: Path, config: CheckpointConfig, identity: dict[str, Any]) -> Any:
    """The resumed state and whether the weights are those of seed 7, or the error's text."""
    runtime, machine = engine(seed=8)
    expected = build_model(MODEL, ParallelConfig(), runtime, vocab_size=VOCAB, seed=7)[0]
    try:
        state = Checkpoints(folder, config, identity).resume(machine)
    except CheckpointError as error:
        return str(error)
    finally:
        shutdown(runtime)
    ours = dict(machine.chunks[0].module.named_parameters())
    same = all(torch.equal(ours[name], p) for name, p in expected.named_parameters())
    return state, same


def test_retention_keeps_the_last_ones(tmp_path: Path) -> None:
    names = run_on_gloo(1, save_steps, tmp_path, [1, 2, 9, 10], 2)[0]
    assert names == ["step_00000009", "step_00000010"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert run_on_gloo(1, save_steps, tmp_path / "all", [1, 2], 0)[0] == [
        "step_00000001",
        "step_00000002",
    ]


def test_resume_takes_the_newest_complete_one(tmp_path: Path) -> None:
    run_on_gloo(1, save_steps, tmp_path, [3, 5], 3)
    (tmp_path / "step_00000006.partial").mkdir()
    (tmp_path / "step_00000007").mkdir()  # no metadata.json: copied halfway by somebody
    state, same = run_on_gloo(1, resume, tmp_path, CheckpointConfig(), IDENTITY)[0]
    assert state == TrainState(step=5, consumed_sequences=40) and same


def test_without_a_checkpoint_a_run_starts_anew(tmp_path: Path) -> None:
    state, same = run_on_gloo(1, resume, tmp_path / "none", CheckpointConfig(), IDENTITY)[0]
    assert state == TrainState() and not same


def test_resume_settings_are_obeyed(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    required = CheckpointConfig(resume=Resume.required)
    text = run_on_gloo(1, resume, folder, required, IDENTITY)[0]
    assert "checkpoint.resume=required" in text and "holds no complete checkpoint" in text
    run_on_gloo(1, save_steps, folder, [5], 3)
    never = CheckpointConfig(resume=Resume.never)
    text = run_on_gloo(1, resume, folder, never, IDENTITY)[0]
    assert "checkpoint.resume=never" in text and "step_00000005" in text


def test_loading_from_another_run_takes_weights_and_starts_counting_anew(tmp_path: Path) -> None:
    run_on_gloo(1, save_steps, tmp_path / "old" / "checkpoints", [5], 3)
    for given in ("old", "old/checkpoints", "old/checkpoints/step_00000005"):
        config = CheckpointConfig(load=str(tmp_path / given))
        other_data = {**IDENTITY, "data": {"seed": 2}}
        state, same = run_on_gloo(1, resume, tmp_path / "new", config, other_data)[0]
        assert state == TrainState() and same
    config = CheckpointConfig(load=str(tmp_path / "nothing"))
    text = run_on_gloo(1, resume, tmp_path / "new", config, IDENTITY)[0]
    assert "checkpoint.load=" in text and "no complete checkpoint is there" in text
    (tmp_path / "old" / "config.yaml").touch()
    config = CheckpointConfig(load=str(tmp_path))
    text = run_on_gloo(1, resume, tmp_path / "new", config, IDENTITY)[0]
    assert f"is there; it holds runs: {tmp_path / 'old'}; name one of them" in text


def test_another_models_checkpoint_is_refused_setting_by_setting() -> None:
    saved = {"model": {"hidden_size": 32, "num_layers": 4}, "data": {"seed": 1}}
    now = {"model": {"hidden_size": 64, "num_layers": 4}, "data": {"seed": 2}}
    with pytest.raises(CheckpointError) as caught:
        check_identity(saved, now, Path("c"), ("model", "data"), 10)
    assert "model.hidden_size: 32 saved, 64 now" in str(caught.value)
    assert "data: seed: was 1, is 2" in str(caught.value)
    assert "num_layers" not in str(caught.value)
    check_identity(saved, {**saved, "data": {}}, Path("c"), ("model",), 10)


def train_on(folder: Path, parallel: ParallelConfig, last_step: int, save: bool) -> list[float]:
    """Resume from `folder` if it has anything, train up to `last_step`; losses and norms."""
    runtime = initialize(parallel, 1)
    chunks = build_model(MODEL, parallel, runtime, vocab_size=VOCAB, seed=7)
    machine = MegatronEngine(chunks, parallel, OPTIMIZER, runtime)
    checkpoints = Checkpoints(folder, CheckpointConfig(), IDENTITY)
    state = checkpoints.resume(machine)
    out = []
    while state.step < last_step:
        metrics = train_step(
            machine,
            micro_batches(state.step, 1, runtime.data_parallel_rank, runtime.data_parallel_size),
            runtime,
            learning_rate=1e-2,
            languages=LANGUAGES,
            stop_requested=False,
        )
        state.advance(8, metrics.losses.valid_tokens())
        out += [metrics.losses.mean(), metrics.grad_norm]
    if save:
        checkpoints.save_last(machine, state)
    shutdown(runtime)
    return out


def layout(tp: int = 1, pp: int = 1, vpp: int = 1, sp: bool = False) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        sequence_parallel=sp,
    )


@pytest.mark.parametrize(
    ("before", "ranks_before", "after", "ranks_after"),
    [
        (layout(), 1, layout(tp=2, pp=2, sp=True), 4),
        (layout(tp=2, pp=2, sp=True), 4, layout(), 2),
        (layout(), 2, layout(pp=2, vpp=2), 2),
        # a tied embedding under PP has a gradient bucket of its own, padded in the middle
        (layout(pp=2, vpp=2), 2, layout(pp=2, vpp=2), 2),
        (layout(pp=2, vpp=2), 2, layout(tp=2, sp=True), 4),
    ],
)
def test_a_checkpoint_goes_on_under_another_layout(
    tmp_path: Path,
    before: ParallelConfig,
    ranks_before: int,
    after: ParallelConfig,
    ranks_after: int,
) -> None:
    """Weights, moments, and the step count in Adam's bias correction come along."""
    uninterrupted = run_on_gloo(1, train_on, tmp_path / "none", layout(), 4, False)[0]
    first = run_on_gloo(ranks_before, train_on, tmp_path / "run", before, 2, True)[0]
    second = run_on_gloo(ranks_after, train_on, tmp_path / "run", after, 4, False)[0]
    assert first + second == pytest.approx(uninterrupted, abs=1e-5)


SPARSE = replace(MODEL, moe=MoEConfig(num_experts=4))


def save_and_train(folder: Path, model: ModelConfig, parallel: ParallelConfig) -> tuple[int, bool]:
    """How often a plan was taken again in three saves, a step between; whether the last holds what
    the engine does."""

    def new_engine(seed: int) -> MegatronEngine:
        chunks = build_model(model, parallel, runtime, vocab_size=VOCAB, seed=seed)
        return MegatronEngine(chunks, parallel, OPTIMIZER, runtime)

    runtime = initialize(parallel, 1)
    machine, checkpoints = new_engine(7), Checkpoints(folder, CheckpointConfig(), IDENTITY)
    for step in (1, 2, 3):
        train_step(
            machine,
            micro_batches(step, 1, runtime.data_parallel_rank, runtime.data_parallel_size),
            runtime,
            learning_rate=1e-2,
            languages=LANGUAGES,
            stop_requested=False,
        )
        checkpoints.save(machine, TrainState(step=step))
    checkpoints.wait(3)
    other = new_engine(8)
    checkpoints.resume(other)
    tensors = [optimizer_state.leaves(one.sharded_state_dict()) for one in (machine, other)]
    pairs = [(a.data, b.data) for a, b in zip(*tensors, strict=True) if hasattr(a, "global_shape")]
    shutdown(runtime)
    same = all(torch.equal(a, b) for a, b in pairs if torch.is_tensor(a))
    return checkpoints._plans.reused, same and len(pairs) > 20


@pytest.mark.parametrize(
    ("model", "parallel"),
    [
        (MODEL, layout(tp=2, sp=True)),
        (SPARSE, ParallelConfig(expert_model_parallel_size=2)),
        (MODEL, ParallelConfig(overlap_grad_reduce=True, overlap_param_gather=True)),
    ],
    ids=["tensor", "experts", "overlap"],
)
def test_saves_after_the_first_are_not_planned(
    tmp_path: Path, model: ModelConfig, parallel: ParallelConfig
) -> None:
    assert run_on_gloo(2, save_and_train, tmp_path, model, parallel) == [(2, True)] * 2


FROZEN = replace(SPARSE, moe=replace(SPARSE.moe, freeze_routing=True))


def weights_after(folder: Path, model: ModelConfig, parallel: ParallelConfig, load: str) -> Any:
    """Start from `load` if it is given, train a step, save; weights before and after."""
    runtime = initialize(parallel, 1)
    chunks = build_model(model, parallel, runtime, vocab_size=VOCAB, seed=8 if load else 7)
    machine = MegatronEngine(chunks, parallel, OPTIMIZER, runtime)
    checkpoints = Checkpoints(folder, CheckpointConfig(load=load), IDENTITY)
    state = checkpoints.resume(machine)
    named = [named for chunk in chunks for named in chunk.named_parameters()]
    before = {name: parameter.detach().clone() for name, parameter in named}
    batches = micro_batches(0, 1, runtime.data_parallel_rank, runtime.data_parallel_size)
    train_step(
        machine,
        batches,
        runtime,
        learning_rate=1e-2,
        languages=LANGUAGES,
        stop_requested=False,
    )
    state.advance(8, 1)
    checkpoints.save_last(machine, state)
    after = {name: parameter.detach().clone() for name, parameter in named}
    shutdown(runtime)
    return before, after


def test_frozen_routing_starts_from_a_run_that_trained_it(tmp_path: Path) -> None:
    """X-MoE's fine-tuning: the weights of another run, with experts and routers as they are."""
    parallel = ParallelConfig(expert_model_parallel_size=2)
    run_on_gloo(2, weights_after, tmp_path / "old", SPARSE, parallel, "")
    trained = run_on_gloo(2, weights_after, tmp_path / "old", SPARSE, parallel, "")
    old = str(tmp_path / "old")
    for (start, end), (_, expected) in zip(
        run_on_gloo(2, weights_after, tmp_path / "new", FROZEN, parallel, old), trained, strict=True
    ):
        for name, weight in start.items():
            assert torch.equal(weight, expected[name]), name
            stays = "experts" in name or "router" in name
            assert torch.equal(weight, end[name]) == stays, name
    # the master weights have followed: a step from there moves weights by a step, not back
    moved = (end["decoder.final_layernorm.weight"] - start["decoder.final_layernorm.weight"]).abs()
    assert moved.max() < 2e-2

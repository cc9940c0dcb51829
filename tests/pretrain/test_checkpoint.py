"""Resume rules, identity, retention."""

from pathlib import Path
from typing import Any

import pytest
import torch

from models.build import build_model
from parallel.checkpoint_io import CheckpointError
from parallel.config import OptimizerConfig, ParallelConfig
from parallel.engine import MegatronEngine
from parallel.runtime import initialize, shutdown
from pretrain.checkpoint import Checkpoints, check_identity
from pretrain.config import CheckpointConfig, Resume
from pretrain.train_state import TrainState
from tests.distributed import run_on_gloo
from tests.parity import MODEL, VOCAB

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


def test_another_models_checkpoint_is_refused_setting_by_setting() -> None:
    saved = {"model": {"hidden_size": 32, "num_layers": 4}, "data": {"seed": 1}}
    now = {"model": {"hidden_size": 64, "num_layers": 4}, "data": {"seed": 2}}
    with pytest.raises(CheckpointError) as caught:
        check_identity(saved, now, Path("c"), ("model", "data"))
    assert "model.hidden_size: 32 saved, 64 now" in str(caught.value)
    assert "data.seed: 1 saved, 2 now" in str(caught.value)
    assert "num_layers" not in str(caught.value)
    check_identity(saved, {**saved, "data": {}}, Path("c"), ("model",))

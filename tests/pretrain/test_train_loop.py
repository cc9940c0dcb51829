"""The loop's own decisions, with the rest of the run real: see test_run.py for whole runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.anomaly import Action, AnomalyError, Verdict
from pretrain.checkpoint import Checkpoints
from pretrain.config import CheckpointConfig, PretrainConfig
from pretrain.loss import LanguageLosses
from pretrain.progress import Progress
from pretrain.train_loop import MOST_SKIPPED_UPDATES, TrainLoop
from pretrain.train_state import TrainState
from pretrain.train_step import StepMetrics
from tests.distributed import run_on_gloo
from tests.parity import MODEL


def loop(folder: Path) -> TrainLoop:
    unused: dict[str, Any] = dict.fromkeys(
        (
            *("engine", "runtime", "data", "loader", "validation", "anomalies"),
            *("tracker", "meter", "instruments"),
        )
    )
    return TrainLoop(
        config=PretrainConfig(model=MODEL),
        progress=Progress(10, enabled=False),
        checkpoints=Checkpoints(folder, CheckpointConfig(), {}),
        **unused,
    )


def metrics(action: Action) -> StepMetrics:
    losses = LanguageLosses(["de"])
    losses.add(torch.tensor([[float("nan")]]), torch.ones(1, 1), torch.tensor([0]))
    verdict = Verdict(action, why="loss is not finite" if action is not Action.apply else "")
    return StepMetrics(losses, 1.0, action is Action.apply, stop_requested=False, verdict=verdict)


def take(training: TrainLoop, state: TrainState, action: Action) -> None:
    step = metrics(action)
    state.advance(8, 1)
    state.anomaly.note(step.verdict, step.losses.mean(), step.grad_norm, [0, 8], 128)
    training._watch_updates(state, step)


def cannot_update(folder: Path) -> str:
    """Step 10 is the last update of 20 steps; the error."""
    training, state = loop(folder), TrainState()
    for _ in range(MOST_SKIPPED_UPDATES - 1):
        take(training, state, Action.skip)
    take(training, state, Action.apply)  # one good update: counted from 0 again
    for _ in range(MOST_SKIPPED_UPDATES - 1):
        take(training, state, Action.skip)
    state = TrainState(**state.to_dict())  # a resume in between changes nothing
    with pytest.raises(RuntimeError) as caught:
        take(training, state, Action.skip)
    return str(caught.value)


def stops(folder: Path) -> str:
    """Step 10 is the last update, at 11 the run stops; the error."""
    training, state = loop(folder), TrainState(step=10)
    with pytest.raises(AnomalyError) as caught:
        take(training, state, Action.stop)
    return str(caught.value)


def published(folder: Path, *steps: int) -> None:
    for step in steps:
        path = folder / f"step_{step:08d}"
        path.mkdir(parents=True)
        (path / "metadata.json").write_text("{}")


@pytest.mark.parametrize("ending", [cannot_update, stops])
def test_a_run_that_cannot_update_any_more_says_so_and_what_to_start_from(
    tmp_path: Path, ending: Callable[[Path], str]
) -> None:
    """Not from saves that hold what the last update made of the weights."""
    last = "from before the last update that was made, that of step 10"
    published(tmp_path, 10, 15, 20)
    (error,) = run_on_gloo(1, ending, tmp_path)
    assert error.endswith(f"start anew in another run_dir: there is no checkpoint {last}")
    published(tmp_path, 5, 9)
    (error,) = run_on_gloo(1, ending, tmp_path)
    assert f"start from {tmp_path}/step_00000009, the newest {last}: move" in error
    assert "loss is not finite (loss nan, gradient norm 1)" in error
    assert "optimizer.lr=0.001" in error
    if ending is cannot_update:
        assert error.startswith("10 updates in a row were skipped, up to step 20: ")

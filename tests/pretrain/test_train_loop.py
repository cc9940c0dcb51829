"""The loop's own decisions, with the rest of the run real: see test_run.py for whole runs."""

from typing import Any

import pytest
import torch

from pretrain.anomaly import Action, Verdict
from pretrain.config import PretrainConfig
from pretrain.loss import LanguageLosses
from pretrain.progress import Progress
from pretrain.train_loop import MOST_SKIPPED_UPDATES, TrainLoop
from pretrain.train_state import TrainState
from pretrain.train_step import StepMetrics
from tests.parity import MODEL


def loop() -> TrainLoop:
    unused: dict[str, Any] = dict.fromkeys(
        (
            *("engine", "runtime", "data", "loader", "validation", "checkpoints", "anomalies"),
            *("tracker", "meter", "instruments"),
        )
    )
    config = PretrainConfig(model=MODEL)
    return TrainLoop(config=config, progress=Progress(10, enabled=False), **unused)


def metrics(action: Action) -> StepMetrics:
    losses = LanguageLosses(["de"])
    losses.add(torch.tensor([[float("nan")]]), torch.ones(1, 1), torch.tensor([0]))
    verdict = Verdict(action, why="loss is not finite" if action is Action.skip else "")
    return StepMetrics(losses, 1.0, action is Action.apply, stop_requested=False, verdict=verdict)


def take(training: TrainLoop, state: TrainState, action: Action) -> None:
    step = metrics(action)
    state.advance(8, 1)
    state.anomaly.note(step.verdict, step.losses.mean(), step.grad_norm, [0, 8], 128)
    training._watch_updates(state, step)


def test_a_run_that_cannot_update_any_more_says_so() -> None:
    training, state = loop(), TrainState()
    for _ in range(MOST_SKIPPED_UPDATES - 1):
        take(training, state, Action.skip)
    take(training, state, Action.apply)  # one good update: counted from 0 again
    for _ in range(MOST_SKIPPED_UPDATES - 1):
        take(training, state, Action.skip)
    state = TrainState(**state.to_dict())  # a resume in between changes nothing
    with pytest.raises(
        RuntimeError, match=r"10 updates in a row .* optimizer\.lr=0\.001"
    ) as caught:
        take(training, state, Action.skip)
    assert "up to step 20: loss is not finite (loss nan, gradient norm 1)" in str(caught.value)

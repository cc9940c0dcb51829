"""The loop's own decisions, with the rest of the run real: see test_run.py for whole runs."""

from typing import Any

import pytest
import torch

from pretrain.config import PretrainConfig
from pretrain.loss import LanguageLosses
from pretrain.progress import Progress
from pretrain.train_loop import MOST_SKIPPED_UPDATES, TrainLoop
from pretrain.train_step import StepMetrics
from tests.parity import MODEL


def loop() -> TrainLoop:
    unused: dict[str, Any] = dict.fromkeys(
        ("engine", "runtime", "data", "loader", "validation", "checkpoints", "tracker", "meter")
    )
    config = PretrainConfig(model=MODEL)
    return TrainLoop(config=config, progress=Progress(10, enabled=False), **unused)


def metrics(applied: bool) -> StepMetrics:
    losses = LanguageLosses(["de"])
    losses.add(torch.tensor([[float("nan")]]), torch.ones(1, 1), torch.tensor([0]))
    return StepMetrics(losses, grad_norm=1.0, applied=applied, stop_requested=False)


def test_a_run_that_cannot_update_any_more_says_so() -> None:
    training = loop()
    for step in range(MOST_SKIPPED_UPDATES - 1):
        training._watch_updates(step, metrics(applied=False))
    training._watch_updates(50, metrics(applied=True))  # one good update: counted from 0 again
    for step in range(MOST_SKIPPED_UPDATES - 1):
        training._watch_updates(step, metrics(applied=False))
    with pytest.raises(RuntimeError, match=r"10 updates in a row .* optimizer\.lr=0\.001"):
        training._watch_updates(99, metrics(applied=False))

"""Validation loss, by language and by family."""

from __future__ import annotations

from data.loader import ValidationSet
from data.open_data import Data
from parallel.engine import Engine
from parallel.runtime import Runtime
from pretrain.train_step import forward_losses


def evaluate(
    engine: Engine, validation: ValidationSet, data: Data, runtime: Runtime
) -> dict[str, float]:
    """``eval/loss``, ``eval/family/<family>/loss`` and ``eval/language/<code>/loss``: mean nats per
    token over the whole validation set, the same on every rank. All ranks must call it.
    """
    losses = forward_losses(
        engine, list(validation.micro_batches()), runtime, languages=data.languages
    )
    return losses.metrics(data.family_of)

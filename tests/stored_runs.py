"""Small run folders with a checkpoint in them, and what their models compute."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from data.config import DataConfig
from data.open_mixture import DEMO_TOKENIZER
from data.tokenizer import load_tokenizer
from models.build import build_model
from models.config import ModelConfig
from models.initialize import counter_normal, parameter_key
from parallel import checkpoint_io
from parallel.config import OptimizerConfig, ParallelConfig, Precision
from parallel.engine import MegatronEngine, checkpoint_metadata
from parallel.megatron import MegatronModule
from parallel.runtime import initialize, shutdown
from pretrain.config import PretrainConfig
from pretrain.export_check import full_logits
from pretrain.generate import load_model
from pretrain.run_identity import FORMAT, model_identity
from pretrain.train_state import TrainState

VOCAB = 120  # of 128 rows


def write_run(
    run: Path, model: ModelConfig, step: int = 3, tokens: int = 96, data: DataConfig | None = None
) -> Path:
    """A run folder with a checkpoint of `model` at `step`, every weight off its initial value; the
    checkpoint. Must be called on one rank (`run_on_gloo(1, write_run, ...)`)."""
    config = PretrainConfig(model=model, data=data or DataConfig(), run_dir=str(run))
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    parallel = ParallelConfig(precision=Precision.fp32)
    runtime = initialize(parallel, 1)
    size = model.vocab_size or VOCAB
    chunk = build_model(model, parallel, runtime, vocab_size=size, seed=step)[0]
    disturb(chunk)
    save(chunk, run, model, size, step, tokens)
    shutdown(runtime)
    return run / "checkpoints" / f"step_{step:08d}"


@cache
def demo_fingerprint() -> str:
    return load_tokenizer(DEMO_TOKENIZER).fingerprint


def disturb(chunk: MegatronModule) -> None:
    """Norms and biases that are not 1 and 0, so that none can be missing unnoticed."""
    for name, value in chunk.state_dict().items():
        if torch.is_tensor(value):
            noise = counter_normal(parameter_key(1, name), torch.arange(value.numel()))
            value.add_(0.1 * noise.view(value.shape))


def save(
    chunk: MegatronModule, run: Path, model: ModelConfig, size: int, step: int, tokens: int
) -> None:
    state = TrainState(step=step, consumed_sequences=step, consumed_tokens=tokens)
    identity = {"model": model_identity(model, size), "data": {"tokenizer": demo_fingerprint()}}
    checkpoint_io.save(
        {
            "model0": chunk.sharded_state_dict(metadata=checkpoint_metadata()),
            "format": FORMAT,
            "train_state": state.to_dict(),
            "identity": identity,
        },
        run / "checkpoints" / f"step_{step:08d}",
        metadata=checkpoint_metadata(),
    )


def write_trained_run(run: Path, model: ModelConfig, parallel: ParallelConfig, step: int) -> None:
    """A run folder with a checkpoint that has an optimizer; all ranks must call it."""
    config = PretrainConfig(model=model, parallel=parallel, run_dir=str(run))
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    runtime = initialize(parallel, 1)
    chunks = build_model(model, parallel, runtime, vocab_size=VOCAB, seed=step)
    engine = MegatronEngine(chunks, parallel, OptimizerConfig(), runtime)
    state = TrainState(step=step, consumed_sequences=step, consumed_tokens=32 * step)
    checkpoint_io.save(
        {
            **engine.sharded_state_dict(),
            "format": FORMAT,
            "train_state": state.to_dict(),
            "identity": {"model": model_identity(model, VOCAB)},
        },
        run / "checkpoints" / f"step_{step:08d}",
        metadata=checkpoint_metadata(),
    )
    shutdown(runtime)


def save_again(source: Path, run: Path, model: ModelConfig, parallel: ParallelConfig) -> None:
    """The weights of `source`, saved under another layout into the run folder `run`."""
    runtime = initialize(parallel, 1)
    chunk = load_model(replace(model, vocab_size=VOCAB), parallel, runtime, source)[0]
    save(chunk, run, model, VOCAB, 3, 96)
    shutdown(runtime)


def live_logits(
    checkpoint: Path, model: ModelConfig, ids: list[list[int]], seed: int = 0
) -> Tensor:
    """fp32 [b, s, vocabulary] of the checkpoint's model on one rank."""
    parallel = ParallelConfig(precision=Precision.fp32)
    runtime = initialize(parallel, 1)
    size = model.vocab_size or VOCAB
    chunk = load_model(replace(model, vocab_size=size), parallel, runtime, checkpoint)[0]
    torch.manual_seed(seed)
    logits = full_logits(chunk, torch.tensor(ids))[..., :size]
    shutdown(runtime)
    return logits


def main_with(main: Any, words: list[str]) -> int:
    """Exit status of a command's `main` called with these words; 0 where it returns."""
    import sys

    sys.argv = ["command", *words]
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0

"""Sampling from a run's checkpoint, under any layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor

from data.open_data import open_tokenizer
from models.build import build_model
from models.config import ModelConfig
from models.parameter_count import padded_vocab_size
from parallel import checkpoint_io
from parallel.config import ParallelConfig
from parallel.engine import checkpoint_metadata
from parallel.inference import last_token_logits
from parallel.megatron import MegatronModule
from parallel.runtime import Runtime, initialize, shutdown
from pretrain.checkpoint import Checkpoints
from pretrain.config import PretrainConfig


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    max_new_tokens: int = 40
    temperature: float = 0.8  # 0: always the likeliest token
    top_k: int = 50  # 0: the whole vocabulary
    seed: int = 1234

    def __post_init__(self) -> None:
        rules = (
            (self.max_new_tokens >= 1, f"--max-new-tokens={self.max_new_tokens} must be >= 1"),
            (self.temperature >= 0, f"--temperature={self.temperature} must be >= 0"),
            (self.top_k >= 0, f"--top-k={self.top_k} must be >= 0"),
        )
        problems = [text for holds, text in rules if not holds]
        if problems:
            raise ValueError("; ".join(problems))


def load_run_config(run_dir: Path) -> PretrainConfig:
    """The settings a run wrote first (its newest start).

    Raises:
        FileNotFoundError: `run_dir` is not a run folder.
    """
    found = sorted(run_dir.glob("config*.yaml"), key=lambda path: (path.stat().st_mtime, path.name))
    if not found:
        raise FileNotFoundError(f"{run_dir} is not a run folder: it holds no config.yaml")
    merged = OmegaConf.merge(OmegaConf.structured(PretrainConfig), OmegaConf.load(found[-1]))
    config = OmegaConf.to_object(merged)
    assert isinstance(config, PretrainConfig)
    return config


def generate(
    run_dir: Path, prompts: Sequence[str], parallel: ParallelConfig, sampling: SamplingConfig
) -> list[str]:
    """Continue each prompt with the newest checkpoint of `run_dir`; the same texts on every rank.

    The layout is free: it need not be the one the run was trained with. All ranks must call it.

    Raises:
        FileNotFoundError: no run, or no complete checkpoint, in `run_dir`.
        ValueError: a prompt and its continuation exceed the model's `max_position_embeddings`.
    """
    config = load_run_config(run_dir)
    newest = Checkpoints(run_dir / "checkpoints", config.checkpoint, {}).steps()
    if not newest:
        raise FileNotFoundError(f"{run_dir}/checkpoints holds no complete checkpoint")
    tokenizer = open_tokenizer(config.data)
    model = replace(config.model, vocab_size=config.model.vocab_size or tokenizer.vocab_size)
    ids = [tokenizer.encode(prompt) or [tokenizer.eod_id] for prompt in prompts]
    longest = max(map(len, ids)) + sampling.max_new_tokens
    if longest > model.max_position_embeddings:
        raise ValueError(
            f"the prompt and --max-new-tokens={sampling.max_new_tokens} make {longest} tokens, "
            f"more than model.max_position_embeddings={model.max_position_embeddings}"
        )
    runtime = initialize(parallel, sampling.seed)
    chunks = load_model(model, parallel, runtime, newest[-1])
    texts = [
        tokenizer.decode(_continue(chunks, prompt, model, runtime, sampling, tokenizer.eod_id))
        for prompt in ids
    ]
    shutdown(runtime)
    return texts


def load_model(
    model: ModelConfig, parallel: ParallelConfig, runtime: Runtime, checkpoint: Path
) -> list[MegatronModule]:
    """The model of a checkpoint, for inference; `model.vocab_size` must be set."""
    assert model.vocab_size is not None
    chunks = build_model(model, parallel, runtime, vocab_size=model.vocab_size, seed=0)
    metadata = checkpoint_metadata()
    state = {"model0": chunks[0].sharded_state_dict(metadata=metadata)}
    loaded = checkpoint_io.load(state, checkpoint, weights_only=True)
    chunks[0].load_state_dict(loaded["model0"])
    chunks[0].eval()
    return list(chunks)


def _continue(
    chunks: list[MegatronModule],
    prompt: list[int],
    model: ModelConfig,
    runtime: Runtime,
    sampling: SamplingConfig,
    eod_id: int,
) -> list[int]:
    assert model.vocab_size is not None
    generator = torch.Generator().manual_seed(sampling.seed)  # every rank draws the same token
    rows = padded_vocab_size(model.vocab_size, model.make_vocab_size_divisible_by)
    ids = list(prompt)
    for _ in range(sampling.max_new_tokens):
        tokens = torch.tensor([ids], device=runtime.device)
        logits = last_token_logits(chunks, tokens, runtime, padded_vocab_size=rows)
        token = sample(logits[0, : model.vocab_size].cpu(), sampling, generator)
        if token == eod_id:
            break
        ids.append(token)
    return ids


def sample(logits: Tensor, sampling: SamplingConfig, generator: torch.Generator) -> int:
    """One token id from logits [v]."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    if sampling.top_k:
        kept = logits.topk(min(sampling.top_k, logits.numel()))
        choice = torch.multinomial(
            (kept.values / sampling.temperature).softmax(-1), 1, generator=generator
        )
        return int(kept.indices[choice])
    return int(
        torch.multinomial((logits / sampling.temperature).softmax(-1), 1, generator=generator)
    )

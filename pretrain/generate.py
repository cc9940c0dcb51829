"""Sampling from a run's checkpoint, under any layout."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from data.config import DataConfig
from data.open_data import open_tokenizer
from data.tokenizer import Tokenizer
from models.build import build_model
from models.config import ModelConfig
from models.parameter_count import padded_vocab_size
from parallel import checkpoint_io
from parallel.checkpoint_reader import CheckpointReader
from parallel.config import ParallelConfig
from parallel.engine import checkpoint_metadata
from parallel.inference import last_token_logits
from parallel.megatron import MegatronModule
from parallel.runtime import Runtime, initialize, shutdown
from pretrain.checkpoint_list import check_content, find_checkpoint, settings_file
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


def open_checkpoint(path: Path, step: int | None = None) -> tuple[Path, PretrainConfig]:
    """The checkpoint that `path` names (a run folder, its checkpoints folder, a checkpoint, a copy
    by launch.checkpoint), of `step` or the newest, and the settings it was made with.

    Raises:
        FileNotFoundError: no checkpoint, or no settings in it nor in a run folder around it.
        ValueError: they are not of this version.
    """
    checkpoint = find_checkpoint(path, step)
    settings = settings_file(checkpoint)
    if settings is None:
        raise FileNotFoundError(
            f"{checkpoint} has no config.yaml beside it, nor in a run folder around it: copy the "
            "run's config.yaml into it"
        )
    try:
        return checkpoint, load_run_config(settings.parent)
    except OmegaConfBaseException as error:
        raise ValueError(
            f"{settings} is not a configuration of this version: {str(error).splitlines()[0]}"
        ) from error


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


def tokenizer_of(
    checkpoint: Path, data: DataConfig, identity: dict[str, Any], vocab_size: int | None
) -> Tokenizer:
    """The tokenizer of a checkpoint's model: the one of `data`, compared with what is known.

    Args:
        identity: the checkpoint's; of an import it says nothing about a tokenizer.
        vocab_size: the model's; None: the tokenizer's.

    Raises:
        ValueError: it is another one; or nothing says which one it is, or it has ids that the model
            does not have.
    """
    trained_with = (identity.get("data") or {}).get("tokenizer")
    if trained_with is None and not data.tokenizer:
        raise ValueError(
            f"{checkpoint} does not say with which tokenizer its model was trained (imported "
            "weights do not), and data.tokenizer is empty: name its file with --tokenizer"
        )
    tokenizer = open_tokenizer(data)
    if trained_with not in (None, tokenizer.fingerprint):
        raise ValueError(
            f"{tokenizer.path} is not the tokenizer this model was trained with (its fingerprint "
            f"is {tokenizer.fingerprint[:12]}..., not {trained_with[:12]}...); name that one with "
            "--tokenizer"
        )
    if trained_with is None and vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"{tokenizer.path} is not this model's tokenizer: it has {tokenizer.vocab_size} ids, "
            f"the model {vocab_size}; name the right one with --tokenizer"
        )
    return tokenizer


def generate(
    path: Path,
    prompts: Sequence[str],
    parallel: ParallelConfig,
    sampling: SamplingConfig,
    tokenizer_file: str = "",
) -> list[str]:
    """Continue each prompt with the checkpoint that `path` names; the same texts on every rank.

    The layout is free: it need not be the one the run was trained with. All ranks must call it.

    path: as `open_checkpoint` takes it.
    tokenizer_file: if it is not where the run's settings say.

    Raises:
        FileNotFoundError: no complete checkpoint, or no settings of a run beside it.
        ValueError: a prompt and its continuation exceed the model's `max_position_embeddings`, or
            the tokenizer is not known, or not the model's.
        DamagedCheckpointError: the checkpoint is not what its manifest says, found before any
            process group exists; where there is no manifest rank 0 warns on stderr.
        CheckpointError: it cannot be read, or loading it could run a program.
    """
    checkpoint, config = open_checkpoint(path)
    check_content(checkpoint, tensors=False)
    identity = CheckpointReader(checkpoint).plain.get("identity") or {}
    size = (identity.get("model") or {}).get("vocab_size") or config.model.vocab_size
    data = replace(config.data, tokenizer=tokenizer_file or config.data.tokenizer)
    tokenizer = tokenizer_of(checkpoint, data, identity, size)
    model = replace(config.model, vocab_size=size or tokenizer.vocab_size)
    ids = [tokenizer.encode(prompt) or [tokenizer.eod_id] for prompt in prompts]
    longest = max(map(len, ids)) + sampling.max_new_tokens
    if longest > model.max_position_embeddings:
        raise ValueError(
            f"the prompt and --max-new-tokens={sampling.max_new_tokens} make {longest} tokens, "
            f"more than model.max_position_embeddings={model.max_position_embeddings}"
        )
    # Every rank reads all of it, side by side through their host's page cache. Before there is a
    # process group: in a collective the others would wait no longer than its timeout.
    unknown = check_content(checkpoint)
    if unknown and os.environ.get("RANK", "0") == "0":
        print(f"warning: {unknown}", file=sys.stderr)
    runtime = initialize(parallel, sampling.seed)
    chunks = load_model(model, parallel, runtime, checkpoint)
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

"""A checkpoint as a folder for `transformers`. Start reading at `export`.

One process, any layout. All files of the checkpoint are compared with its manifest first, which
reads them once more. Memory of the conversion, whatever the model's size: what torch and
megatron-core take when imported, and four times the largest stored weight (as read, cut out, in its
new type, and while it is written). The check that follows holds the whole model in fp32, first in a
process of its own, then in this one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.tokenizer import PAD, Tokenizer
from models import hugging_face
from models.config import ModelConfig
from models.hugging_face.mapping import Architecture, Source, architecture_of, config_of, sources
from parallel.checkpoint_reader import CheckpointReader, StoredWeights
from parallel.new_folder import new_folder
from pretrain.checkpoint_list import losses_of, refuse_damaged, run_folder_of, settings_file
from pretrain.config import PretrainConfig
from pretrain.convert_checkpoint import new_dtype
from pretrain.export_check import Check, ExportError, check_export
from pretrain.generate import open_checkpoint, tokenizer_of
from pretrain.model_card import model_card
from pretrain.run_identity import model_identity
from pretrain.safetensors_file import Entry, write_sharded

REPORT_FILE = "export_report.json"
MODELING_FILE = "modeling_magneto.py"


@dataclass(frozen=True, kw_only=True)
class ExportSource:
    """What is exported: a checkpoint, and what its run knows about it."""

    checkpoint: Path
    config: PretrainConfig
    model: ModelConfig  # with its vocabulary
    tokenizer: Tokenizer
    step: int | None
    tokens: int | None  # trained on
    loss: tuple[str, float] | None
    record: dict[str, Any]  # run.json


def export(
    path: Path,
    out: Path,
    *,
    step: int | None = None,
    dtype: torch.dtype | None = None,
    max_bytes: int = 5 * 10**9,
    tokenizer: str = "",
    check: bool = True,
) -> dict[str, Any]:
    """Write the folder `out`; returns the report, which is in it as export_report.json.

    Args:
        path: run folder, checkpoints folder, or checkpoint.
        step: of the checkpoint; None: the newest.
        dtype: of the weights; None: as they are stored. Routers keep theirs.
        max_bytes: of one file of weights.
        tokenizer: its file, if it is not where the run's settings say.
        check: compare what the folder computes with what the checkpoint computes here.

    Raises:
        FileNotFoundError: no checkpoint, no settings of a run beside it, or no tokenizer.
        FileExistsError: `out` exists.
        DamagedCheckpointError: the checkpoint is not what its manifest says; without a manifest
            there is a warning on stderr.
        ExportError: settings or weights are not those of the checkpoint's model, or the exported
            model does not compute the same; `out` is then absent.
        ValueError: a damaged checkpoint, or one that could run a program when loaded; or its
            settings are not of this version; or the tokenizer is not known, or not the model's.
    """
    source = open_source(path, step, tokenizer)
    architecture = architecture_of(source.model)
    with new_folder(out) as partial:
        sums = write_weights(source, architecture, partial, dtype, max_bytes)
        write_settings(source, architecture, partial, dtype)
        found = (
            check_export(source.checkpoint, source.model, source.tokenizer, partial, dtype)
            if check
            else None
        )
        report = _report(source, architecture, partial, sums, found)
        (partial / "README.md").write_text(model_card(report, source.config))
        (partial / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n")
    return report


def open_source(path: Path, step: int | None = None, tokenizer: str = "") -> ExportSource:
    """The checkpoint at `path` with what is known about it. Raises as `export`."""
    checkpoint, config = open_checkpoint(path, step)
    if tokenizer:
        config.data = replace(config.data, tokenizer=tokenizer)
    refuse_damaged(checkpoint)
    reader = CheckpointReader(checkpoint)
    reader.check_harmless()
    identity = reader.plain.get("identity") or {}
    state = reader.plain.get("train_state") or {}
    saved = identity.get("model") or {}
    known = saved.get("vocab_size") or config.model.vocab_size
    opened = tokenizer_of(checkpoint, config.data, identity, known)
    size = known or opened.vocab_size
    now = model_identity(config.model, size)
    differ = [f"{k}={now[k]} and {saved[k]}" for k in saved if k in now and now[k] != saved[k]]
    if differ:
        raise ExportError(
            f"{settings_file(checkpoint)} and {checkpoint} disagree about the model: "
            + "; ".join(differ)
        )
    run = run_folder_of(checkpoint)
    done = state.get("step")
    return ExportSource(
        checkpoint=checkpoint,
        config=config,
        model=replace(config.model, vocab_size=size),
        tokenizer=opened,
        step=done,
        tokens=state.get("consumed_tokens"),
        loss=losses_of(run).get(done) if done is not None else None,
        record=_run_record(run),
    )


def _run_record(run: Path | None) -> dict[str, Any]:
    found = sorted(run.glob("run*.json"), key=lambda p: p.stat().st_mtime) if run else []
    return json.loads(found[-1].read_text()) if found else {}


# ---------------------------------------------------------------- weights


def write_weights(
    source: ExportSource,
    architecture: Architecture,
    folder: Path,
    dtype: torch.dtype | None,
    max_bytes: int,
) -> dict[str, str]:
    """Write the weights, a stored one at a time; returns file -> sha256."""
    weights = StoredWeights(CheckpointReader(source.checkpoint))
    mapped = sources(source.model, architecture)
    _check_names(weights, mapped, source.checkpoint)
    shapes = weights.shapes()
    entries = []
    for one in mapped:
        kind = new_dtype(one.name, getattr(torch, weights.dtype(one.name)), dtype)
        like = torch.empty(shapes[one.name], dtype=kind, device="meta")
        entries += [Entry(name, tuple(take(like).shape), kind) for name, take in one.parts]

    def tensors() -> Iterator[Tensor]:
        kinds = iter(entries)
        for one in mapped:
            stored = weights.read(one.name)
            for _, take in one.parts:
                yield take(stored).to(next(kinds).dtype)

    return write_sharded(folder, "model", entries, tensors(), max_bytes)


def _check_names(weights: StoredWeights, mapped: list[Source], checkpoint: Path) -> None:
    stored, wanted = set(weights.shapes()), {source.name for source in mapped}
    problems = [
        f"{text}: {', '.join(sorted(names)[:5])}" + (", ..." if len(names) > 5 else "")
        for text, names in {
            "not stored": wanted - stored,
            "stored, and of no use to its model": stored - wanted,
        }.items()
        if names
    ]
    if problems:
        raise ExportError(
            f"{checkpoint} holds the weights of another model than its settings say; "
            + "; ".join(problems)
        )


# ---------------------------------------------------------------- files beside the weights


def write_settings(
    source: ExportSource, architecture: Architecture, folder: Path, dtype: torch.dtype | None
) -> None:
    """config.json, generation_config.json, the tokenizer, and the code where there must be some."""
    special = _special_tokens(source.tokenizer)
    ids = {f"{role}_token_id": number for role, (_, number) in special.items()}
    stored = StoredWeights(CheckpointReader(source.checkpoint))
    kind = new_dtype(
        "", getattr(torch, stored.dtype("decoder.layers.0.input_layernorm.weight")), dtype
    )
    config = config_of(source.model, architecture) | ids | {"dtype": _type_name(kind)}
    _write_json(folder / "config.json", config)
    # generate() looks here and not into config.json
    _write_json(folder / "generation_config.json", ids | {"use_cache": config["use_cache"]})
    _write_tokenizer(source, folder, special)
    if architecture is Architecture.magneto:
        shutil.copyfile(Path(hugging_face.__path__[0]) / MODELING_FILE, folder / MODELING_FILE)


def _special_tokens(tokenizer: Tokenizer) -> dict[str, tuple[str, int]]:
    """Role -> (how it is spelled, its id). A text begins where another one ends."""
    end = (tokenizer.decode([tokenizer.eod_id]), tokenizer.eod_id)
    pad = next(
        (i for i in range(min(8, tokenizer.vocab_size)) if tokenizer.decode([i]) == PAD), None
    )
    return {"bos": end, "eos": end, "pad": end if pad is None else (PAD, pad)}


def _write_tokenizer(
    source: ExportSource, folder: Path, special: dict[str, tuple[str, int]]
) -> None:
    tokenizer = source.tokenizer
    if tokenizer.kind != "hf":  # as it is, for the library that reads it
        shutil.copyfile(tokenizer.path, folder / Path(tokenizer.path).name)
        return
    shutil.copyfile(tokenizer.path, folder / "tokenizer.json")
    spelled = {f"{role}_token": text for role, (text, _) in special.items()}
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": source.model.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
            **spelled,
        },
    )


# ---------------------------------------------------------------- report


def _report(
    source: ExportSource,
    architecture: Architecture,
    folder: Path,
    sums: dict[str, str],
    check: Check | None,
) -> dict[str, Any]:
    record = source.record
    manifest = source.checkpoint / "manifest.json"
    packages = record.get("packages") or {}
    return {
        "name": source.model.name,
        "architecture": architecture.value,
        "source": {
            "checkpoint": source.checkpoint.name,
            "manifest_sha256": _sha256(manifest) if manifest.is_file() else None,
            "step": source.step,
            "tokens": source.tokens,
            "loss": dict([source.loss]) if source.loss else None,
            "git": (record.get("git") or {}).get("commit"),
            "trained_with": {
                name: packages[name]
                for name in ("magnetron", "megatron-core", "torch")
                if name in packages
            },
            "tokenizer": source.tokenizer.fingerprint,
        },
        "check": None if check is None else check.as_dict(),
        "files": {
            path.name: sums.get(path.name) or _sha256(path)
            for path in sorted(folder.iterdir())
            if path.is_file()
        },
    }


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""Copies of a checkpoint: without its optimizer, in another type, as safetensors.

One process, any layout: pieces are read, changed and written one after the other. Memory: what the
largest piece takes as it is read, in its new type, and once more. Before that all files are read
once, and compared with the manifest: the copy gets one of its own, which would make damage look
sound.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from parallel.checkpoint_manifest import write_manifest
from parallel.checkpoint_reader import OPTIMIZER_PREFIX, CheckpointReader, StoredWeights
from parallel.checkpoint_writer import new_checkpoint
from parallel.new_folder import new_folder
from pretrain.checkpoint_list import (
    VALUES_FILE,
    refuse_damaged,
    run_folder_of,
    settings_file,
    step_of,
)
from pretrain.safetensors_file import Entry, write_sharded

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# What stays fp32 in every model (models.router): rounding would change who is asked
_KEEPS_ITS_TYPE = ".router."


def new_dtype(name: str, dtype: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """The type that a weight is written in where `wanted` is asked for; None: as it is."""
    if wanted is None or not dtype.is_floating_point or _KEEPS_ITS_TYPE in name:
        return dtype
    return wanted


def to_checkpoint(
    source: Path, target: Path, *, dtype: torch.dtype | None, weights_only: bool
) -> None:
    """Copy a checkpoint into the folder `target`, one that runs read like their own.

    Args:
        dtype: of the weights; None: as they are. Routers and optimizer state keep theirs.
        weights_only: leave the optimizer's state out.

    Without a manifest in `source` there is a warning on stderr.

    Raises:
        FileExistsError: there is a `target`.
        DamagedCheckpointError: `source` is not what its manifest says.
        ValueError: `target` has the name of another step's checkpoint, or lies among those of a
            run; and what `CheckpointReader` raises.
    """
    reader = _open(source, target)
    plain = dict(reader.plain)
    if weights_only:
        plain.pop("optimizer", None)
    wanted = reader.weights if weights_only else reader.tensors
    with new_checkpoint(target, plain) as writer:
        for name, stored in wanted.items():
            is_weight = not name.startswith(OPTIMIZER_PREFIX)
            for piece in stored.pieces:
                tensor = reader.read_piece(stored, piece)
                kind = new_dtype(name, tensor.dtype, dtype) if is_weight else tensor.dtype
                writer.add(name, stored.shape, piece.box[0], tensor.to(kind))
        for name in reader.objects:
            if not (weights_only and name.startswith(OPTIMIZER_PREFIX)):
                writer.add_object(name, reader.read_object(name))
        settings = settings_file(source)
        if settings is not None:
            shutil.copyfile(settings, writer.folder / "config.yaml")


def to_safetensors(
    source: Path, target: Path, *, dtype: torch.dtype | None, max_bytes: int
) -> None:
    """Write a checkpoint's weights, under their names in the whole model, as safetensors.

    Beside them `checkpoint.json` with the plain values. Raises as `to_checkpoint`.
    """
    reader = _open(source, target)
    weights = StoredWeights(reader)
    entries = [
        Entry(name, shape, new_dtype(name, getattr(torch, weights.dtype(name)), dtype))
        for name, shape in weights.shapes().items()
    ]

    def tensors() -> Iterator[Tensor]:
        for entry in entries:
            yield weights.read(entry.name).to(entry.dtype)

    with new_folder(target) as partial:
        write_sharded(partial, "model", entries, tensors(), max_bytes)
        values = {key: reader.plain.get(key) for key in ("train_state", "identity")}
        (partial / VALUES_FILE).write_text(json.dumps(values, indent=1) + "\n")
        settings = settings_file(source)
        if settings is not None:
            shutil.copyfile(settings, partial / "config.yaml")
        write_manifest(partial)


def _open(source: Path, target: Path) -> CheckpointReader:
    """A sound `source`, where `target` may be made of it. Raises as `to_checkpoint`."""
    reader = CheckpointReader(source)
    refuse_damaged(source)
    _check_name(reader, target)
    return reader


def _check_name(reader: CheckpointReader, target: Path) -> None:
    """Runs, and the commands here, take folders by their names for checkpoints of a step."""
    if not target.name.startswith("step_"):
        return
    run = run_folder_of(target)
    if run is not None:
        raise ValueError(
            f"{target} lies among the checkpoints of the run {run}, which would take it for one of "
            "its own; choose a folder outside of that run, or a name that does not begin with step_"
        )
    state = reader.plain.get("train_state") or {}
    step = state.get("step", step_of(reader.folder))
    if step_of(target) not in (step, -1):
        raise ValueError(
            f"{target} has the name of step {step_of(target)}, and {reader.folder} is of step "
            f"{step}; choose step_{step:08d}, or a name that does not begin with step_"
        )

"""Which checkpoints there are, and what each says about itself. Imports neither torch nor megatron.

A path may name a checkpoint, a folder of checkpoints, or a run folder, here and in the commands.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from data.run_folders import runs_below
from parallel.checkpoint_manifest import (
    MISSING,
    NO_CHECKSUMS,
    NewerManifestError,
    read_manifest,
    verify,
)
from parallel.checkpoint_manifest import NAME as MANIFEST_FILE
from parallel.checkpoint_reader import FORMAT_FILE, INDEX_FILE, PLAIN_FILE, CheckpointReader

_STEP = re.compile(r"step_(\d+)")
TAKEN_BACK_SUFFIX = ".taken_back"  # of checkpoints of steps that a rollback took back
_SOMETHING_ELSE = re.compile(r"step_\d+\.(partial|damaged(-\d+)?|taken_back(\.partial)?)")
SOUND = "sound"
VALUES_FILE = "checkpoint.json"  # of a copy as safetensors: the plain values
UNVERIFIED = "not verifiable: saved before there were manifests"

# beside the tensors, what is read of a checkpoint
_SMALL_FILES = (FORMAT_FILE, INDEX_FILE, PLAIN_FILE)


class DamagedCheckpointError(ValueError):
    """A checkpoint whose files are not those its manifest lists."""


@dataclass(frozen=True)
class Facts:
    """A line of the list."""

    folder: Path
    bytes: int
    saved: datetime
    step: int | None
    tokens: int | None
    loss: tuple[str, float] | None  # of which kind, and its value
    model: dict[str, Any] | None  # the shape the checkpoint was saved with
    state: str  # "sound", or what is wrong


def find_checkpoints(path: Path) -> list[Path]:
    """The complete checkpoints that `path` names, oldest first; none where there are none."""
    if is_checkpoint(path):
        return [path]
    for folder in (path / "checkpoints", path):
        if folder.is_dir():
            found = [p for p in folder.iterdir() if _STEP.fullmatch(p.name) and is_checkpoint(p)]
            if found:
                return sorted(found, key=step_of)
    return []


def find_checkpoint(path: Path, step: int | None = None) -> Path:
    """The newest checkpoint that `path` names, or the one of `step`.

    Raises FileNotFoundError where there is none, saying what there is.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder")
    found = find_checkpoints(path)
    if not found:
        if is_safetensors(path):
            raise FileNotFoundError(
                f"{path} holds safetensors and no checkpoint: `launch.checkpoint verify` reads it, "
                "and nothing else of ours; name the checkpoint that it is a copy of"
            )
        wanted = "; name a run folder, its checkpoints folder, or one of the checkpoints in it"
        raise FileNotFoundError(f"{path} holds no complete checkpoint{runs_below(path) or wanted}")
    if step is None:
        return found[-1]
    for folder in found:
        if step_of(folder) == step:
            return folder
    if found == [path]:
        raise FileNotFoundError(f"{path} is one checkpoint, whose step is not asked for: leave it")
    steps = ", ".join(str(step_of(folder)) for folder in found)
    raise FileNotFoundError(f"{path} holds no checkpoint of step {step}; there are {steps}")


def is_checkpoint(path: Path) -> bool:
    """Whether a save published this folder; its content may have been damaged since."""
    return not path.name.endswith(".partial") and (path / FORMAT_FILE).is_file()


def is_safetensors(path: Path) -> bool:
    """Whether `path` is a copy by `convert --safetensors`; it may have been damaged since."""
    of_copies = (VALUES_FILE, "model.safetensors", "model.safetensors.index.json")
    return (
        not is_checkpoint(path)
        and (path / MANIFEST_FILE).is_file()
        and any((path / name).is_file() for name in of_copies)
    )


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name; -1 where it has another name."""
    found = _STEP.fullmatch(folder.name)
    return int(found[1]) if found else -1


def others(path: Path) -> dict[Path, str]:
    """Folders beside those checkpoints that look like one -> what they are."""
    folders = [f for f in (path / "checkpoints", path) if f.is_dir()]
    found = {}
    for folder in sorted(p for parent in folders for p in parent.iterdir() if p.is_dir()):
        if _SOMETHING_ELSE.fullmatch(folder.name):
            found[folder] = "unfinished save"
            if ".damaged" in folder.name:
                found[folder] = "damaged, set aside by a run"
            elif folder.name.endswith(TAKEN_BACK_SUFFIX):
                found[folder] = "set aside by a rollback, which took its step back"
        elif _STEP.fullmatch(folder.name) and not is_checkpoint(folder):
            found[folder] = f"damaged: {FORMAT_FILE} is missing"
    return found


def run_folder_of(checkpoint: Path) -> Path | None:
    """The run that a checkpoint belongs to, None for one that lies by itself."""
    folder = checkpoint.resolve().parent.parent
    return folder if list(_settings_in(folder)) else None


def settings_file(checkpoint: Path) -> Path | None:
    """The settings a checkpoint was made with: beside its files, or the newest of its run."""
    folders = [checkpoint, *filter(None, [run_folder_of(checkpoint)])]
    return next(filter(None, map(newest_settings, folders)), None)


def newest_settings(folder: Path) -> Path | None:
    """The settings that the newest start of a run wrote in its folder."""
    found = sorted(_settings_in(folder), key=lambda p: (p.stat().st_mtime, p.name))
    return found[-1] if found else None


def _settings_in(folder: Path) -> Iterator[Path]:
    return folder.glob("config*.yaml")


def facts_of(folder: Path, losses: dict[int, tuple[str, float]]) -> Facts:
    """What a checkpoint says about itself; compares sizes, and reads no tensor and no checksum."""
    state: dict[str, Any] = {}
    model = None
    problems = problems_of(folder, checksums=False)
    sound = SOUND
    if is_unverifiable(folder, problems):
        problems, sound = [], UNVERIFIED
    try:
        plain = CheckpointReader(folder).plain
        state = plain.get("train_state") or {}
        model = (plain.get("identity") or {}).get("model")
    except ValueError as error:
        problems = problems or [str(error)]
    files = [path.stat() for path in folder.rglob("*") if path.is_file()]
    step = state.get("step", step_of(folder) if step_of(folder) >= 0 else None)
    return Facts(
        folder=folder,
        bytes=sum(file.st_size for file in files),
        saved=datetime.fromtimestamp((folder / FORMAT_FILE).stat().st_mtime),
        step=step,
        tokens=state.get("consumed_tokens"),
        loss=losses.get(step) if step is not None else None,
        model=model,
        state=f"damaged: {problems[0]}" if problems else sound,
    )


def problems_of(folder: Path, *, checksums: bool) -> list[str]:
    """What is wrong with the files of a checkpoint according to its manifest, one line each."""
    try:
        return verify(folder, checksums=checksums)
    except NewerManifestError as error:
        return [str(error)]


def check_content(folder: Path, *, tensors: bool = True) -> str:
    """Compare what will be read of a checkpoint with its manifest, checksums too; reads all of it.

    Args:
        tensors: False: the small files alone.

    Returns why the content cannot be compared, for a warning; "" where it was.

    Raises:
        DamagedCheckpointError: files are missing, of another size or content, or not listed.
        NewerManifestError: see `read_manifest`.
    """
    read = {path.name for path in folder.glob("*.distcp")} if tensors else set()
    read.update(name for name in _SMALL_FILES if (folder / name).exists())
    problems = verify(folder, names=None if tensors else _SMALL_FILES)
    if problems == [MISSING]:
        return f"{folder} has no {MANIFEST_FILE}: nothing tells whether its content has changed"
    if not problems:
        manifest = read_manifest(folder)
        problems = [
            f"{name} is not in {MANIFEST_FILE}" for name in sorted(read - set(manifest["files"]))
        ]
    if problems:
        shown = "; ".join(problems[:5]) + ("; ..." if problems[5:] else "")
        raise DamagedCheckpointError(
            f"{folder} is damaged: {shown}. Nothing was made of it: put the file back from a copy, "
            "or name another checkpoint"
        )
    if manifest["algorithm"] == NO_CHECKSUMS:
        return (
            f"{folder} was saved without checksums (checkpoint.verify_integrity=false): sizes are "
            "right, nothing tells whether its content has changed"
        )
    return ""


def refuse_damaged(folder: Path) -> None:
    """`check_content`, with what it returns as a warning on stderr. Raises as it does."""
    if unknown := check_content(folder):
        print(f"warning: {unknown}", file=sys.stderr)


def is_unverifiable(folder: Path, problems: list[str]) -> bool:
    """Whether it has no manifest because it was saved before there were any."""
    if problems != [MISSING]:
        return False
    try:
        return "format" not in CheckpointReader(folder).plain
    except ValueError:
        return False


def structural_problems(folder: Path) -> list[str]:
    """What is wrong with a checkpoint according to its own index."""
    try:
        return CheckpointReader(folder).problems()
    except ValueError as error:
        return [str(error)]


def losses_of(run: Path | None) -> dict[int, tuple[str, float]]:
    """Step -> (kind, loss) out of a run's metrics: validation, or else training."""
    path = run / "metrics.jsonl" if run is not None else None
    if path is None or not path.is_file():
        return {}
    losses: dict[int, tuple[str, float]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            step = int(record["step"])
            found = {kind: record.get(f"{kind}/loss") for kind in ("train", "eval")}
            values = {kind: float(loss) for kind, loss in found.items() if loss is not None}
        except (ValueError, TypeError, KeyError):
            continue  # cut off by a kill, or damaged
        for kind, value in values.items():
            if kind == "eval" or losses.get(step, ("train",))[0] == "train":
                losses[step] = (kind, value)
    return losses

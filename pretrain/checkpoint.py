"""When a run saves, which checkpoint it goes on from, and what it refuses to go on from."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data.language_mixture import stream_differences
from parallel import checkpoint_io
from parallel.checkpoint_io import CheckpointError
from parallel.engine import MegatronEngine, checkpoint_metadata
from pretrain.config import CheckpointConfig, Resume
from pretrain.train_state import TrainState

_STEP_FOLDER = re.compile(r"step_(\d+)")


class Checkpoints:
    """The checkpoints of one run, in ``run_dir/checkpoints/step_00000100`` and so on.

    Args:
        folder: where they are.
        config: how often, how many, whether to resume.
        identity: what must not change between saving and resuming, as nested plain values:
            {"model": {...}, "data": {...}}. Compared on resume, setting by setting.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, identity: dict[str, Any]) -> None:
        self.folder = folder
        self.config = config
        self.identity = identity

    def steps(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        found = [
            path
            for path in self.folder.iterdir()
            if _STEP_FOLDER.fullmatch(path.name) and checkpoint_io.is_complete(path)
        ]
        return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))

    def due(self, step: int) -> bool:
        return self.config.save_interval > 0 and step % self.config.save_interval == 0

    def save(self, engine: MegatronEngine, state: TrainState) -> Path:
        """Save this step, then remove what retention does not keep. All ranks must call it."""
        target = self.folder / f"step_{state.step:08d}"
        if checkpoint_io.is_complete(target):
            return target
        checkpoint_io.save(
            {
                **engine.sharded_state_dict(),
                "train_state": state.to_dict(),
                "identity": self.identity,
            },
            target,
            metadata=checkpoint_metadata(),
        )
        if dist.get_rank() == 0 and self.config.keep_last > 0:
            for old in self.steps()[: -self.config.keep_last]:
                _remove(old)
        return target

    def resume(self, engine: MegatronEngine) -> TrainState:
        """Bring the engine to where the run stopped, following `checkpoint.resume` and `.load`.

        All ranks must call it, and must see the same folder.

        Raises:
            CheckpointError: the setting and the folder contradict each other, or the checkpoint
                belongs to another model or other data.
        """
        existing = self.steps()
        if self.config.resume is Resume.never and existing:
            raise CheckpointError(
                f"checkpoint.resume=never, but {self.folder} holds {existing[-1].name}; "
                "choose another run_dir, or checkpoint.resume=auto to go on"
            )
        if self.config.resume is Resume.required and not existing:
            raise CheckpointError(
                f"checkpoint.resume=required, but {self.folder} holds no complete checkpoint; "
                "check run_dir, or use checkpoint.resume=auto to start anew"
            )
        if existing:
            return self._load(engine, existing[-1])
        if self.config.load:
            self._load(engine, self._given(self.config.load), parts=("model",))
        return TrainState()

    def _given(self, load: str) -> Path:
        """`checkpoint.load` may name a checkpoint, a folder of them, or a run folder."""
        path = Path(load)
        for folder in (path, path / "checkpoints"):
            newest = Checkpoints(folder, self.config, self.identity).steps()
            if newest:
                return newest[-1]
        if path.is_dir() and checkpoint_io.is_complete(path):
            return path
        raise CheckpointError(f"checkpoint.load={load}: no complete checkpoint is there")

    def _load(
        self, engine: MegatronEngine, path: Path, parts: tuple[str, ...] = ("model", "data")
    ) -> TrainState:
        stored = checkpoint_io.load_plain_values(path)
        consumed = stored["train_state"]["consumed_sequences"]
        check_identity(stored.get("identity", {}), self.identity, path, parts, consumed)
        # Another run may have trained what is frozen here: then its optimizer state does not fit.
        weights_only = "data" not in parts and _on_any_rank(engine.has_frozen_parameters)
        wanted = engine.sharded_state_dict(is_loading=True, weights_only=weights_only)
        state = checkpoint_io.load(wanted, path)
        if weights_only:
            state.pop("optimizer", None)  # of what is not sharded all is read
        engine.load_state_dict(state)
        return TrainState(**stored["train_state"])


def _on_any_rank(mine: bool) -> bool:
    found: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return any(found)


def check_identity(
    saved: dict[str, Any],
    current: dict[str, Any],
    path: Path,
    parts: tuple[str, ...],
    consumed_sequences: int,
) -> None:
    """Raise CheckpointError naming everything in `parts` in which the two differ.

    The data may differ in what comes after `consumed_sequences`.
    """
    differences = []
    if "model" in parts:
        before, now = saved.get("model", {}), current.get("model", {})
        differences += [
            f"  model.{key}: {before.get(key)!r} saved, {now.get(key)!r} now"
            for key in sorted({*before, *now})
            if before.get(key) != now.get(key)
        ]
    if "data" in parts:
        stream = stream_differences(
            saved.get("data", {}), current.get("data", {}), consumed_sequences
        )
        differences += [f"  data: {line}" for line in stream]
    if differences:
        raise CheckpointError(
            f"{path} was saved by another run; it differs in\n"
            + "\n".join(differences)
            + "\nUse the saved settings, or another run_dir to start a new run."
        )


def _remove(folder: Path) -> None:
    """Rename first: a removal that is interrupted must not leave a folder that looks complete."""
    doomed = folder.with_name(folder.name + checkpoint_io.PARTIAL_SUFFIX)
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)

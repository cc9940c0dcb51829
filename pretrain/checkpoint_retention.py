"""Which checkpoints of a run are kept, and the removal of the others. Imports no torch."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from parallel.checkpoint_manifest import verify
from pretrain.checkpoint_list import find_checkpoints, step_of
from pretrain.config import CheckpointConfig

# in the checkpoints' folder: {"100": eval/loss, ...}
EVALUATIONS = "evaluations.json"
DOOMED_SUFFIX = ".partial"  # nothing loads these, and the next save clears them away


def kept(steps: Iterable[int], losses: Mapping[int, float], config: CheckpointConfig) -> set[int]:
    """Of checkpoints at `steps` those that stay: the newest in any case, `keep_last`, multiples of
    `keep_every`, and `keep_best` by what `losses` has of them (the later one of equal ones)."""
    ordered = sorted(steps)
    if config.keep_last == 0:
        return set(ordered)
    keep = set(ordered[-config.keep_last :])
    if config.keep_every > 0:
        keep |= {step for step in ordered if step % config.keep_every == 0}
    evaluated = [step for step in ordered if math.isfinite(losses.get(step, math.nan))]
    best = sorted(evaluated, key=lambda step: (losses[step], -step))
    return keep | set(best[: config.keep_best])


class Retention:
    """On rank 0: what evaluations said, and the removal."""

    def __init__(self, folder: Path, config: CheckpointConfig) -> None:
        self.folder = folder
        self.config = config
        self._losses: dict[int, float] | None = None  # by step; None: not read yet

    @property
    def losses(self) -> dict[int, float]:
        if self._losses is None:
            self._losses = _read(self.folder / EVALUATIONS)
        return self._losses

    def record(self, step: int, loss: float) -> None:
        """eval/loss of the weights after `step`. Raises OSError where it cannot be written."""
        self.losses[step] = loss
        if not self.folder.is_dir():
            return  # it will be written with the evaluation after the first save
        path = self.folder / EVALUATIONS
        draft = path.with_name(path.name + ".tmp")
        draft.write_text(json.dumps({str(s): value for s, value in sorted(self.losses.items())}))
        os.replace(draft, path)

    def apply(self) -> list[str]:
        """Remove what is not kept; the names removed. Raises OSError.

        Nothing is removed while the newest checkpoint is not whole (its sizes are looked at).
        """
        folders = find_checkpoints(self.folder)
        if not folders or verify(folders[-1], checksums=False):
            return []
        keep = kept([step_of(folder) for folder in folders], self.losses, self.config)
        doomed = [folder for folder in folders if step_of(folder) not in keep]
        for folder in doomed:
            remove(folder)
        return [folder.name for folder in doomed]


def remove(folder: Path) -> None:
    """Rename first: a removal that is interrupted must not leave a folder that looks complete."""
    doomed = folder.with_name(folder.name + DOOMED_SUFFIX)
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _read(path: Path) -> dict[int, float]:
    try:
        return {int(step): float(loss) for step, loss in json.loads(path.read_bytes()).items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}  # of use for keep_best only, and written anew with the next evaluation

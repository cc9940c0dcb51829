"""Which checkpoints of a run are kept; removal and other names for the others. Imports no torch."""

from __future__ import annotations

import json
import math
import shlex
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from parallel.checkpoint_manifest import verify
from pretrain.checkpoint_list import TAKEN_BACK_SUFFIX, find_checkpoints, losses_of, step_of
from pretrain.config import CheckpointConfig
from pretrain.provenance import atomic_write_text
from pretrain.run_identity import DAMAGED_SUFFIX

# in the checkpoints' folder: {"100": eval/loss, ...}
EVALUATIONS = "evaluations.json"
DOOMED_SUFFIX = ".partial"  # nothing loads these, and the next save clears them away


def kept(
    steps: Iterable[int],
    losses: Mapping[int, float],
    config: CheckpointConfig,
    *,
    rolls_back: bool = False,
) -> set[int]:
    """Of checkpoints at `steps` those that stay: the newest in any case, `keep_last`, multiples of
    `keep_every`, and `keep_best` by what `losses` has of them (the later one of equal ones).

    rolls_back: the newest regular one (`CheckpointConfig.is_regular`) as well.
    """
    ordered = sorted(steps)
    if config.keep_last == 0:
        return set(ordered)
    keep = set(ordered[-config.keep_last :])
    if rolls_back:
        keep |= set([step for step in ordered if config.is_regular(step)][-1:])
    if config.keep_every > 0:
        keep |= {step for step in ordered if step % config.keep_every == 0}
    evaluated = [step for step in ordered if math.isfinite(losses.get(step, math.nan))]
    best = sorted(evaluated, key=lambda step: (losses[step], -step))
    return keep | set(best[: config.keep_best])


class Retention:
    """On rank 0: what evaluations said, and the removal."""

    def __init__(self, folder: Path, config: CheckpointConfig, *, rolls_back: bool = False) -> None:
        self.folder = folder
        self.config = config
        self.rolls_back = rolls_back
        self._losses: dict[int, float] | None = None  # by step; None: not read yet
        self._looked_up: set[int] = set()  # steps whose loss was looked for in the run's metrics
        self._unknown: set[int] = set()  # those of them that were evaluated, nobody knows how
        self._news: list[str] = []

    @property
    def losses(self) -> dict[int, float]:
        if self._losses is None:
            try:
                self._losses = _read(self.folder / EVALUATIONS)
            except (OSError, ValueError, AttributeError, TypeError) as error:
                self._losses = {}
                self._news.append(
                    f"{self.folder / EVALUATIONS} cannot be read ({type(error).__name__}: {error}) "
                    "and is written anew; what it said of checkpoints is taken from metrics.jsonl"
                )
        return self._losses

    def news(self) -> str:
        """What a person should know of, since it was asked last."""
        told, self._news = self._news, []
        return "; ".join(told)

    def record(self, step: int, loss: float) -> None:
        """eval/loss of the weights after `step`. Raises OSError where it cannot be written."""
        self.losses[step] = loss
        self._write()

    def forget_after(self, step: int) -> None:
        """The run goes on from `step` and takes later steps anew, with other losses: what those of
        before were must not decide which checkpoint is the best.

        Raises OSError where it cannot be written; it is forgotten anyway.
        """
        if self.config.keep_best == 0 and not self._readable():
            return  # nobody asks for it
        stale = [later for later in self.losses if later > step]
        for later in stale:
            del self.losses[later]
        self._looked_up = {seen for seen in self._looked_up if seen <= step}
        self._unknown = {seen for seen in self._unknown if seen <= step}
        if stale:
            self._write()

    def _readable(self) -> bool:
        try:
            _read(self.folder / EVALUATIONS)
        except (OSError, ValueError, AttributeError, TypeError):
            return False
        return True

    def _write(self) -> None:
        if not self.folder.is_dir():
            return  # it will be written with the evaluation after the first save
        content = {str(step): value for step, value in sorted(self.losses.items())}
        atomic_write_text(self.folder / EVALUATIONS, json.dumps(content))

    def apply(self) -> list[str]:
        """Remove what is not kept; the names removed. Raises OSError.

        Nothing is removed while the newest checkpoint is not whole (its sizes are looked at). With
        `keep_best` nothing is removed either whose loss should be known and is not.
        """
        folders = find_checkpoints(self.folder)
        if not folders or verify(folders[-1], checksums=False):
            return []
        steps = [step_of(folder) for folder in folders]
        losses: dict[int, float] = {}
        if self.config.keep_best:
            self._look_up(steps[:-1])  # the newest stays, and may yet have to be evaluated
            losses = self.losses
        keep = kept(steps, losses, self.config, rolls_back=self.rolls_back)
        keep |= self._unknown - losses.keys()
        doomed = [folder for folder in folders if step_of(folder) not in keep]
        for folder in doomed:
            remove(folder)
        return [folder.name for folder in doomed]

    def _look_up(self, steps: list[int]) -> None:
        """What `losses` lacks of `steps` is taken from the run's metrics.

        That of a regular save must be in one of them: `save_interval` is a multiple of
        `train.eval_interval`.
        """
        lacking = set(steps) - self.losses.keys() - self._looked_up
        if not lacking:
            return
        found = losses_of(self.folder.parent)
        for step in lacking:
            kind, loss = found.get(step, ("", math.nan))
            if kind == "eval":
                self.losses[step] = loss
            elif self.config.is_regular(step):
                self._unknown.add(step)
                self._news.append(
                    f"eval/loss of step {step} is neither in {EVALUATIONS} nor in metrics.jsonl: "
                    "its checkpoint may be the best and stays; remove it by hand if it need not"
                )
        self._looked_up |= lacking


def remove(folder: Path) -> None:
    """Rename first: a removal that is interrupted must not leave a folder that looks complete."""
    doomed = folder.with_name(folder.name + DOOMED_SUFFIX)
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def set_aside(folder: Path) -> str:
    """Give a damaged checkpoint a name that nothing loads, counts or removes; returns that."""
    name, count = folder.name + DAMAGED_SUFFIX, 1
    while folder.with_name(name).exists():
        count += 1
        name = f"{folder.name}{DAMAGED_SUFFIX}-{count}"
    folder.rename(folder.with_name(name))
    return name


def take_back_after(folder: Path, step: int, must_hold: Callable[[], None]) -> str:
    """The same for the checkpoints in `folder` of steps after `step`, which a rollback takes back;
    returns what a person should know, "" where there are none.

    They may be more than the run will make again: the end of a run that was made longer, say. Of
    each step the one taken back last is kept: a run that goes back again and again must not fill
    the disk with the same steps.

    must_hold: raises where the run may not touch the folder any more.
    """
    must_hold()
    later = [path for path in folder.iterdir() if path.is_dir() and step_of(path) > step]
    names = []
    # the newest first: what is left at any moment is a run's own past
    for path in sorted(later, key=step_of, reverse=True):
        must_hold()
        aside = path.with_name(path.name + TAKEN_BACK_SUFFIX)
        if aside.exists():  # what cannot be deleted at once, the next save clears away
            doomed = aside.with_name(aside.name + DOOMED_SUFFIX)
            shutil.rmtree(doomed, ignore_errors=True)
            aside.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
        path.rename(aside)
        names.append(aside.name)
    if not names:
        return ""
    return (
        f"the run goes back to step {step} and takes the steps after it anew; their checkpoints "
        f"get other names, and nothing loads them: {', '.join(sorted(names))}. If nobody needs "
        f"them: rm -r {shlex.quote(str(folder))}/step_*{TAKEN_BACK_SUFFIX}"
    )


def _read(path: Path) -> dict[int, float]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return {}
    return {int(step): float(loss) for step, loss in json.loads(content).items()}

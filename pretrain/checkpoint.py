"""When a run saves, which checkpoint it goes on from, and what it refuses to go on from.

A save is begun by `save` and written behind the training; `check`, at every step, says how it went.
What fails for want of space is tried again; see `_retry_after`. docs/checkpoints.md tells it all.
"""

from __future__ import annotations

import functools
import itertools
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data.run_folders import runs_below
from parallel import checkpoint_io
from parallel.checkpoint_io import CheckpointError, SaveFailed
from parallel.checkpoint_manifest import MISSING
from parallel.checkpoint_plan import Plans, on_all_ranks
from parallel.checkpoint_save import HostMemory, PendingSave, StoreLost
from parallel.engine import Engine, checkpoint_metadata
from pretrain.checkpoint_list import find_checkpoints, step_of
from pretrain.checkpoint_retention import Retention, set_aside, take_back_after
from pretrain.config import CheckpointConfig
from pretrain.run_identity import (
    ALL_PARTS,
    DAMAGED_SUFFIX,
    FORMAT,
    identity_problem,
    none_sound,
    plain_values_problem,
    start_problem,
)
from pretrain.train_state import TrainState

# Seconds before each further attempt of the save that ends a run; the last one again and again, as
# long as `Checkpoints.patience` allows.
FINAL_SAVE_PAUSES = (2.0, 10.0)
# Seconds a failing run gives the save in flight to get published.
_FAREWELL_SECONDS = 5.0

# (kind, step, text): "saved", "save_failed", "save_recovered", "checkpoint_damaged", ...
Notify = Callable[[str, int, str], None]


class Checkpoints:
    """The checkpoints of one run, in ``run_dir/checkpoints/step_00000100`` and so on.

    Args:
        folder: where they are.
        config: how often, how many, whether to resume.
        identity: what must not change between saving and resuming, as nested plain values:
            {"model": {...}, "data": {...}, "train": {...}}. Compared on resume, setting by setting.
        notify: told what a person should know; called on every rank.
        rolls_back: whether `roll_back` may be called; keeps the checkpoint it needs.

    `may_publish`, asked on rank 0 before anything in `folder` is published or removed, says whether
    the run still holds it; `patience`, asked there when the last save begins, for how many seconds
    it is tried again, beyond FINAL_SAVE_PAUSES. Both may be set from outside.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        identity: dict[str, Any],
        notify: Notify = lambda kind, step, text: None,
        *,
        rolls_back: bool = False,
    ) -> None:
        self.folder = folder
        self.config = config
        self.identity = identity
        self.notify = notify
        self.may_publish: Callable[[], bool] = lambda: True
        self.patience: Callable[[], float] = lambda: 0.0
        self.retention = Retention(folder, config, rolls_back=rolls_back)
        self._memory = HostMemory()
        self._plans = Plans()
        self._pending: PendingSave | None = None
        self._seconds = 0.0  # the last save took, from its start to its end
        self._failures = 0  # in a row
        self._retry_step: int | None = None
        self._validated = False  # the state's layout, by the first save
        self._ending = False  # there will be no later step to save
        self._retention_trouble = ""  # on rank 0

    def steps(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return find_checkpoints(self.folder)

    def can_roll_back(self, step: int) -> bool:
        """After so many steps: whether there is a regular save. All ranks must call it, and all get
        what rank 0 sees. Waits for a save that is being written: what a run does about a step must
        not depend on how fast a disk is."""
        self.wait(step)
        return bool(
            checkpoint_io.on_rank_zero(
                lambda: any(self.config.is_regular(step_of(path)) for path in self.steps()),
                f"look at {self.folder}",
            )
        )

    def newest_before(self, step: int) -> Path | None:
        """The newest complete checkpoint of an earlier step. All ranks must call it, and all get
        what rank 0 sees."""
        self._finish_pending()
        earlier = checkpoint_io.on_rank_zero(
            lambda: [path for path in self.steps() if step_of(path) < step],
            f"look at {self.folder}",
        )
        return earlier[-1] if earlier else None

    @property
    def saving(self) -> bool:
        """Whether a save is being written."""
        return self._pending is not None

    @property
    def seconds(self) -> float:
        """What a save takes, behind the training or not: the last one, or the one so far."""
        return max(self._seconds, self._pending.seconds if self._pending is not None else 0.0)

    def due(self, step: int) -> bool:
        again = self._retry_step is not None and step >= self._retry_step
        return self.config.is_regular(step) or again

    def save(self, engine: Engine, state: TrainState) -> None:
        """Save this step, behind the training with checkpoint.async_save. All ranks must call it.

        Waits for a save that is still being written. A save that fails ends nothing: `notify` is
        told, and a later step is `due`.
        """
        self.wait(state.step)
        self._start(engine, state, self._memory if self.config.async_save else None)
        if not self.config.async_save:
            self.wait(state.step)

    def save_last(self, engine: Engine, state: TrainState) -> None:
        """Save the step a run ends with, before this returns. All ranks must call it.

        Raises:
            CheckpointError: on every rank alike, when it still failed after FINAL_SAVE_PAUSES and
                `patience`.
        """
        self.wait(state.step)
        self._ending = True
        begin, deadline = time.monotonic(), time.monotonic() + self.patience()
        for attempt in itertools.count(1):
            # On CUDA the state is copied in any case: to the memory there is, not to a second one.
            memory = self._memory if self._memory.bytes else None
            failure = self._start(engine, state, memory) or self.wait(state.step)
            if failure is None:
                return
            pause = FINAL_SAVE_PAUSES[min(attempt, len(FINAL_SAVE_PAUSES)) - 1]
            if attempt > len(FINAL_SAVE_PAUSES) and not checkpoint_io.on_rank_zero(
                functools.partial(_in_time, pause, deadline), "look at the clock"
            ):
                raise CheckpointError(
                    f"step {state.step}, at which this run ends, is not saved, after {attempt} "
                    f"attempts in {time.monotonic() - begin:.0f} s. {failure}\n{self._newest()} "
                    "Make room or bring the folder back; the same command then goes on from there."
                )
            self.notify("save_failed", state.step, f"trying again in {pause:g} s")
            time.sleep(pause)

    def check(self, step: int) -> None:
        """At the end of a step: take note of a save that is done on all ranks, if there is one.

        All ranks must call it. One small all-reduce while a save is being written, else nothing.
        """
        if self._pending is not None and on_all_ranks(self._pending.done):
            self.wait(step)

    def wait(self, step: int) -> SaveFailed | None:
        """Until the save that is being written is done; the error if it failed.

        All ranks must call it, at the same step.
        """
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        try:
            pending.wait()
        except SaveFailed as error:
            return self._note_failure(step, error)
        if self._failures:
            self.notify("save_recovered", step, f"saving works again: {pending.folder.name}")
        self._failures = 0
        self._seconds = pending.seconds
        for trouble in filter(None, (self._retention_trouble, self.retention.news())):
            self.notify("retention_failed", step, trouble)
        self.notify("saved", step, f"saved {pending.folder} ({pending.seconds:.1f} s)")
        return None

    def record_evaluation(self, step: int, loss: float) -> None:
        """eval/loss of the weights after `step`, for checkpoint.keep_best."""
        if self.config.keep_best and dist.get_rank() == 0:
            try:
                self.retention.record(step, loss)
            except OSError as error:
                self.notify("retention_failed", step, f"could not note eval/loss: {error}")
            if self._pending is None:  # else it will see to that
                self._retain()

    def close(self) -> None:
        """When the run ends, with an error perhaps: give the save in flight a moment."""
        if self._pending is not None:
            with suppress(SaveFailed, StoreLost):
                self._pending.wait(_FAREWELL_SECONDS)

    def _start(
        self, engine: Engine, state: TrainState, memory: HostMemory | None
    ) -> SaveFailed | None:
        target = self.folder / f"step_{state.step:08d}"
        self._retry_step = None
        try:
            if checkpoint_io.on_rank_zero(
                lambda: self._prepare(target), f"look at {self.folder}", SaveFailed
            ):
                return None
            self._pending = checkpoint_io.start_save(
                {**engine.sharded_state_dict(), **self._plain_values(state)},
                target,
                metadata=checkpoint_metadata(),
                memory=memory,
                checksums=self.config.verify_integrity,
                plans=self._plans,
                validate=not self._validated,
                when_published=self._retain,
                may_publish=self.may_publish,
            )
        except SaveFailed as error:
            return self._note_failure(state.step, error)
        self._validated = True
        return None

    def _prepare(self, target: Path) -> bool:
        """On rank 0: clear away what killed saves and removals left; whether `target` is there."""
        self._must_hold_the_folder()
        for leftover in self.folder.glob(f"step_*{checkpoint_io.PARTIAL_SUFFIX}"):
            shutil.rmtree(leftover, ignore_errors=True)
        return checkpoint_io.is_complete(target)

    def _must_hold_the_folder(self) -> None:
        if not self.may_publish():
            raise CheckpointError("this run does not hold its folder any more")

    def _plain_values(self, state: TrainState) -> dict[str, Any]:
        return {"format": FORMAT, "train_state": state.to_dict(), "identity": self.identity}

    def _note_failure(self, step: int, error: SaveFailed) -> SaveFailed:
        self._failures += 1
        text = f"SAVE FAILED: {error}. {self._newest()}"
        if self.config.save_interval > 0 and not self._ending:
            self._retry_step = step + self._retry_after()
            text += f" The training goes on and tries again after step {self._retry_step}."
        self.notify("save_failed", step, text)
        return error

    def _retry_after(self) -> int:
        """Steps: a tenth of checkpoint.save_interval, doubled with each failure in a row."""
        interval = self.config.save_interval
        return min(interval, max(1, interval // 10) * 2 ** (self._failures - 1))

    def _newest(self) -> str:
        try:
            steps = self.steps()
        except OSError as error:
            return f"{self.folder} cannot be read ({error})."
        return f"The newest checkpoint is {steps[-1].name}." if steps else "There is no checkpoint."

    def _retain(self) -> None:
        """On rank 0, after each save, in the thread that made it."""
        self._retention_trouble = ""
        try:
            if self.may_publish():
                self.retention.apply()
        except OSError as error:
            self._retention_trouble = f"could not remove an old checkpoint: {error}"

    def resume(self, engine: Engine) -> TrainState:
        """Bring the engine to where the run stopped, following `checkpoint.resume` and `.load`.

        All ranks must call it, and must see the same folder.

        Raises:
            CheckpointError: the setting and the folder contradict each other, or the checkpoint
                belongs to another model or other data, or none is sound.
        """
        self._finish_pending()
        existing, damaged = self._existing()
        if problem := start_problem(self.config, self.folder, existing, damaged):
            raise CheckpointError(problem)
        if existing:
            state, found = self._newest_sound(engine, existing)
            if state is None:
                raise CheckpointError(none_sound(self.folder, damaged + found))
        else:
            state = TrainState()
            if self.config.load:
                self._load_given(engine, self.config.load)
        self._forget_after(state.step)
        return state

    def roll_back(self, engine: Engine) -> TrainState:
        """Bring the engine to the newest sound regular save of this run, and set the checkpoints
        after it aside: they belong to steps that are taken back. All ranks must call it.

        Where a run was stopped, and saved for that, must not decide how it goes on. What is set
        aside, damaged checkpoints too, gets another name, and `notify` is told.

        Raises:
            CheckpointError: there is none, or it belongs to another model or other data, or those
                after it cannot be renamed.
        """
        self._finish_pending()
        existing, _ = self._existing()
        regular = [path for path in existing if self.config.is_regular(step_of(path))]
        state, damaged = self._newest_sound(engine, regular)
        if state is None:
            raise CheckpointError(
                f"a rollback finds no sound checkpoint in {self.folder} of a multiple of "
                f"checkpoint.save_interval={self.config.save_interval}; damaged: "
                f"{', '.join(damaged) or 'none'}. Put one back from a copy (without the suffix), "
                "or set anomaly.on_nonfinite=skip and anomaly.on_spike=skip"
            )
        told = checkpoint_io.on_rank_zero(
            lambda: take_back_after(self.folder, state.step, self._must_hold_the_folder),
            f"set aside the checkpoints after step {state.step}, to which the run goes back",
        )
        if told:
            self.notify("checkpoints_taken_back", state.step, told)
        self._forget_after(state.step)
        return state

    def _newest_sound(
        self, engine: Engine, existing: list[Path]
    ) -> tuple[TrainState | None, list[str]]:
        """Loads it; None where there is none. And the names of the damaged ones set aside."""
        damaged: list[str] = []
        for path in reversed(existing):
            state, problems = self._load(engine, path, ALL_PARTS)
            if not problems:
                return state, damaged
            damaged.append(self._set_aside(path, problems))
        return None, damaged

    def _forget_after(self, step: int) -> None:
        """On rank 0: eval/loss of later steps, which are taken anew, does not count any more."""
        if dist.get_rank() == 0 and self.may_publish():
            try:
                self.retention.forget_after(step)
            except OSError as error:
                text = f"eval/loss of steps that are taken anew stays in the file: {error}"
                self.notify("retention_failed", step, text)

    def _finish_pending(self) -> None:
        if self._pending is not None:
            self.wait(step_of(self._pending.folder))

    def _existing(self) -> tuple[list[Path], list[str]]:
        """What rank 0 sees: folders of steps, oldest first, and names of those set aside."""

        def look() -> tuple[list[Path], list[str]]:
            if not self.folder.is_dir():
                return [], []
            found = [path for path in self.folder.iterdir() if path.is_dir()]
            steps = sorted((path for path in found if step_of(path) >= 0), key=step_of)
            return steps, sorted(path.name for path in found if DAMAGED_SUFFIX in path.name)

        return checkpoint_io.on_rank_zero(look, f"look at {self.folder}")

    def _set_aside(self, path: Path, problems: list[str]) -> str:
        name = checkpoint_io.on_rank_zero(lambda: set_aside(path), f"set {path} aside")
        shown = "; ".join(problems[:5]) + ("; ..." if problems[5:] else "")
        self.notify(
            "checkpoint_damaged",
            step_of(path),
            f"DAMAGED CHECKPOINT: {path.name} is not used and now called {name}: {shown}",
        )
        return name

    def _load_given(self, engine: Engine, load: str) -> None:
        """`checkpoint.load` may name a checkpoint, a folder of them, or a run folder."""
        found = checkpoint_io.on_rank_zero(
            lambda: find_checkpoints(Path(load)), f"look at checkpoint.load={load}"
        )
        if not found:
            raise CheckpointError(
                f"checkpoint.load={load}: no complete checkpoint is there{runs_below(load)}"
            )
        _, problems = self._load(engine, found[-1], ("model",))
        if problems:
            raise CheckpointError(
                f"checkpoint.load={load}: {found[-1]} is damaged: {'; '.join(problems[:5])}. "
                "Name another checkpoint; this one was left as it is"
            )

    def _load(
        self, engine: Engine, path: Path, parts: tuple[str, ...]
    ) -> tuple[TrainState, list[str]]:
        """The state of the run and what is wrong with the checkpoint: then the engine's weights
        are of no use."""
        checkpoint_io.read_ahead(path)
        problems = self._problems(path)
        if problems:
            return TrainState(), problems
        stored = checkpoint_io.plain_values_on_all_ranks(path)
        state = self._checked_values(stored, path, parts)
        # Another run may have trained what is frozen here: then its optimizer state does not fit.
        # Imported and converted checkpoints have none.
        weights_only = parts != ALL_PARTS and (
            "optimizer" not in stored or _on_any_rank(engine.has_frozen_parameters)
        )
        search = checkpoint_io.DamageSearch(path) if self.config.verify_integrity else None
        try:
            self._load_tensors(engine, path, search, weights_only=weights_only)
        except CheckpointError:
            problems = search.result() if search is not None else []
            if not problems:  # then it does not belong to this run
                raise
        else:
            problems = search.result() if search is not None else []
        return state, [problem for problem in problems if problem != MISSING]

    def _problems(self, path: Path) -> list[str]:
        problems = checkpoint_io.damage(path)
        if problems == [MISSING] and _format(path) == 1:
            text = f"{path.name} cannot be verified: it was saved before there were manifests"
            self.notify("unverified", step_of(path), text)
            return []
        return problems

    def _checked_values(
        self, stored: dict[str, Any], path: Path, parts: tuple[str, ...]
    ) -> TrainState:
        """What the run goes on from besides tensors; raises where it belongs to another run."""
        if parts == ALL_PARTS:
            check_plain_values(stored, self._plain_values(TrainState()), path)
        saved = stored.get("train_state", {})
        consumed = saved.get("consumed_sequences", 0)
        check_identity(stored.get("identity", {}), self.identity, path, parts, consumed)
        return TrainState(**saved) if parts == ALL_PARTS else TrainState()

    def _load_tensors(
        self,
        engine: Engine,
        path: Path,
        search: checkpoint_io.DamageSearch | None,
        *,
        weights_only: bool,
    ) -> None:
        wanted = engine.sharded_state_dict(is_loading=True, weights_only=weights_only)
        state = checkpoint_io.load(wanted, path, weights_only=weights_only, search=search)
        if weights_only:
            state.pop("optimizer", None)  # of what is not sharded all is read
        engine.load_state_dict(state)


def check_plain_values(stored: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    """Raise CheckpointError naming what a checkpoint holds and nobody reads, and what it lacks."""
    if problem := plain_values_problem(stored, wanted, path):
        raise CheckpointError(problem)


def check_identity(
    saved: dict[str, Any],
    current: dict[str, Any],
    path: Path,
    parts: tuple[str, ...],
    consumed_sequences: int,
) -> None:
    """Raise CheckpointError naming everything in `parts` in which the two differ, but for data
    after `consumed_sequences`."""
    if problem := identity_problem(saved, current, path, parts, consumed_sequences):
        raise CheckpointError(problem)


def _format(path: Path) -> int | None:
    """Of a checkpoint's plain values, as rank 0 reads it; None: they cannot be read."""
    try:
        return checkpoint_io.on_rank_zero(
            lambda: checkpoint_io.load_plain_values(path).get("format", 1), f"read {path}"
        )
    except CheckpointError:
        return None


def _in_time(seconds: float, deadline: float) -> bool:
    return time.monotonic() + seconds <= deadline


def _on_any_rank(mine: bool) -> bool:
    found: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return any(found)

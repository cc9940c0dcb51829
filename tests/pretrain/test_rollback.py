"""A rollback goes to the same checkpoint whether a run was stopped before it or left alone."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.ledger import read_ledger
from parallel.checkpoint_io import CheckpointError
from parallel.checkpoint_manifest import verify
from parallel.runtime import shutdown
from pretrain.checkpoint import Checkpoints
from pretrain.checkpoint_list import find_checkpoints, others
from pretrain.config import AnomalyConfig, CheckpointConfig, OnSpike
from pretrain.events import read_events
from pretrain.metrics_file import read_metrics
from pretrain.train_state import TrainState
from tests.distributed import run_on_gloo
from tests.pretrain import poisoned
from tests.pretrain.poisoned import BATCH, Diary, Poison, replayed
from tests.pretrain.test_checkpoint import IDENTITY, engine
from tests.pretrain.test_exact_resume import weights
from tests.pretrain.test_poisoned_document import killed_after_rollback

STEPS = (5, 7, 10, 11, 12)  # saved; regular ones are multiples of 5
SPIKE_STEP, LAST_STEP = 16, 18
SPIKES = AnomalyConfig(
    spike_window=6, spike_warmup=4, on_spike=OnSpike.rollback, rollback_steps=2, rerun_sequences=0
)


# ---- which checkpoint ---------------------------------------------------------------------------


def save_all(folder: Path) -> list[bool]:
    """Whether it could be gone back, before each save."""
    runtime, machine = engine(seed=7)
    config = CheckpointConfig(save_interval=5, keep_last=0, async_save=False)
    checkpoints = Checkpoints(folder, config, IDENTITY)
    weight = next(machine.chunks[0].module.parameters())
    possible = []
    for step in (3, *STEPS):
        possible.append(checkpoints.can_roll_back(step))
        weight.data.fill_(step)
        checkpoints.save(machine, TrainState(step=step))
    shutdown(runtime)
    return possible


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bool]]:
    folder = tmp_path_factory.mktemp("saved")
    possible, same = run_on_gloo(2, save_all, folder)
    assert possible == same
    return folder, possible


@pytest.fixture
def folder(saved: tuple[Path, list[bool]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved[0], tmp_path / "checkpoints"))


def note(file: Path, *notice: Any) -> None:
    file.write_text(json.dumps(notice))


def roll_back(folder: Path, held: bool = True, told: str = "") -> tuple[int, float] | str:
    """The step gone back to and a weight there, or the error's text. Notices go to a file in
    the folder `told`, one for each rank."""
    runtime, machine = engine(seed=8)
    checkpoints = Checkpoints(folder, CheckpointConfig(save_interval=5, keep_last=0), IDENTITY)
    checkpoints.may_publish = lambda: held
    if told:
        checkpoints.notify = functools.partial(note, Path(told, str(runtime.rank)))
    try:
        state = checkpoints.roll_back(machine)
        return state.step, float(next(machine.chunks[0].module.parameters()).data.mean())
    except CheckpointError as error:
        return str(error)
    finally:
        shutdown(runtime)


def steps_in(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in find_checkpoints(folder)]


def test_it_is_possible_from_the_first_regular_save_on(saved: tuple[Path, list[bool]]) -> None:
    assert saved[1] == [False, False, True, True, True, True]  # before 3, 5, 7, ...


def test_the_newest_regular_save_is_taken_and_those_after_it_are_set_aside(
    folder: Path, tmp_path: Path
) -> None:
    (folder / "step_00000011.taken_back").mkdir()  # of an earlier rollback: the newer one is kept
    contents = {step: checkpoint_contents(folder / f"step_000000{step}") for step in (11, 12)}
    told = tmp_path / "told"
    told.mkdir()
    assert run_on_gloo(2, roll_back, folder, True, str(told)) == [(10, 10.0), (10, 10.0)]
    assert steps_in(folder) == [3, 5, 7, 10]
    names = [f"step_000000{step}.taken_back" for step in (11, 12)]
    assert sorted(path.name for path in folder.glob("*.*")) == names
    for step, name in zip((11, 12), names, strict=True):
        assert checkpoint_contents(folder / name) == contents[step]
    for rank in ("0", "1"):
        kind, step, text = json.loads((told / rank).read_text())
        assert (kind, step) == ("checkpoints_taken_back", 10)
        assert "goes back to step 10" in text and ", ".join(names) in text
        assert text.endswith(f"If nobody needs them: rm -r {folder}/step_*.taken_back")


def checkpoint_contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_was_taken_back_is_not_counted_nor_removed_but_listed(folder: Path) -> None:
    config = CheckpointConfig(save_interval=5, keep_last=1)
    for step in (11, 12):
        path = folder / f"step_000000{step}"
        path.rename(path.with_name(path.name + ".taken_back"))
    (folder / "step_00000007.taken_back.partial").mkdir()  # killed while it was removed
    assert [what.split(",")[0] for what in others(folder).values()] == [
        "unfinished save",
        "set aside by a rollback",
        "set aside by a rollback",
    ]
    checkpoints = Checkpoints(folder, config, IDENTITY)
    assert not checkpoints._prepare(folder / "step_00000012")
    checkpoints._retain()
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["step_00000010", "step_00000011.taken_back", "step_00000012.taken_back"]
    # whoever names one gets it
    (found,) = find_checkpoints(folder / "step_00000012.taken_back")
    assert verify(found) == [] and steps_in(folder) == [10]


def test_a_damaged_one_is_set_aside_and_the_regular_one_before_it_taken(folder: Path) -> None:
    (folder / "step_00000010/__0_0.distcp").write_bytes(b"cut")
    assert run_on_gloo(2, roll_back, folder) == [(5, 5.0), (5, 5.0)]
    assert steps_in(folder) == [3, 5] and (folder / "step_00000010.damaged").is_dir()
    (folder / "step_00000005/__0_0.distcp").write_bytes(b"cut")
    for error in run_on_gloo(2, roll_back, folder):
        text = "of a multiple of checkpoint.save_interval=5; damaged: step_00000005.damaged. Put"
        assert "a rollback finds no sound checkpoint" in str(error) and text in str(error)
    assert steps_in(folder) == [3]


def test_who_lost_the_folder_takes_nothing_back(folder: Path) -> None:
    for error in run_on_gloo(2, roll_back, folder, False):
        assert "could not set aside the checkpoints after step 10" in str(error)
        assert "this run does not hold its folder any more" in str(error)
    assert steps_in(folder) == [3, *STEPS]


def newest_before(folder: Path, steps: list[int]) -> list[str | None]:
    runtime, _ = engine(seed=8)
    checkpoints = Checkpoints(folder, CheckpointConfig(), IDENTITY)
    found = [checkpoints.newest_before(step) for step in steps]
    shutdown(runtime)
    return [path.name if path else None for path in found]


def test_the_newest_from_before_a_step(folder: Path) -> None:
    expected = [None, None, "step_00000003", "step_00000011", "step_00000012"]
    assert run_on_gloo(1, newest_before, folder, [0, 3, 5, 12, 99]) == [expected]


# ---- whole runs ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Poison]:
    folder = tmp_path_factory.mktemp("stores")
    return folder, poisoned.poisoned_stores(folder, SPIKE_STEP)


def settings_of(stores: tuple[Path, Poison], run_dir: Path, end: int, **changes: Any) -> Any:
    settings = {"anomaly": SPIKES, "save_interval": 6, "mixture_interval": 4, **changes}
    return poisoned.config(stores[0], run_dir, train_steps=end, **settings)


# (run_dir, the last step of each of its lives) -> what the last one saw
Live = Callable[..., Diary]


@pytest.fixture(scope="module")
def live(stores: tuple[Path, Poison]) -> Live:
    def run(run_dir: Path, *ends: int, **changes: Any) -> Diary:
        for end in ends:
            settings = settings_of(stores, run_dir, end, **changes)
            diary, same = run_on_gloo(2, poisoned.train, settings)
            assert repr(diary) == repr(same)
        return diary

    return run


@pytest.fixture(scope="module")
def whole(live: Live, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Diary]:
    run_dir = tmp_path_factory.mktemp("whole")
    return run_dir, live(run_dir, LAST_STEP)


def numbers(run_dir: Path) -> dict[tuple[int, str], float]:
    """All that a run recorded and no clock decides about."""
    return {
        (record["step"], name): value
        for record in read_metrics(run_dir / "metrics.jsonl")
        for name, value in record.items()
        if name.startswith(("train/", "anomaly/", "data/family/", "data/language/"))
    }


def assert_same(interrupted: Path, whole: Path) -> None:
    assert numbers(interrupted) == numbers(whole)
    assert replayed(interrupted, LAST_STEP) == replayed(whole, LAST_STEP)
    ours, expected = weights(interrupted, LAST_STEP), weights(whole, LAST_STEP)
    assert ours.keys() == expected.keys() and len(ours) > 20
    assert [name for name in ours if not ours[name].equal(expected[name])] == []


def test_a_stop_before_it_changes_nothing(
    live: Live, tmp_path: Path, whole: tuple[Path, Diary]
) -> None:
    """Stopped at 14, which is saved for that: all the same from 16 to 12."""
    resumed = live(tmp_path, 14, LAST_STEP)
    assert whole[1].steps == [*range(1, 17), *range(13, 19)]
    assert resumed.steps == [15, 16, *range(13, 19)]
    (entry,) = [e for e in read_ledger(tmp_path) if e["event"] == "rollback"]
    assert entry["step"] == 12
    assert_same(tmp_path, whole[0])
    assert steps_in(tmp_path / "checkpoints") == [6, 12, 18]
    assert (tmp_path / "checkpoints/step_00000014.taken_back/manifest.json").is_file()
    (event,) = [e for e in read_events(tmp_path) if e["kind"] == "checkpoints_taken_back"]
    assert event["step"] == 12 and "step_00000014.taken_back" in event["text"]


@pytest.mark.slow
@pytest.mark.parametrize("ends", [(13, 15), (12,), (15,), (7, 8, 9, 13, 14, 15), (17,)])
def test_nor_does_any_other(
    live: Live, tmp_path: Path, whole: tuple[Path, Diary], ends: tuple[int, ...]
) -> None:
    live(tmp_path, *ends, LAST_STEP)
    assert_same(tmp_path, whole[0])


@pytest.mark.slow
def test_a_kill_after_it_finds_no_checkpoint_of_what_was_taken_back(
    live: Live, tmp_path: Path, stores: tuple[Path, Poison], whole: tuple[Path, Diary]
) -> None:
    """Stopped at 14, killed right after going back to 12: the run does not go on from 14."""
    run_dir = tmp_path / "killed"
    live(run_dir, 14)
    settings = settings_of(stores, run_dir, LAST_STEP)
    assert run_on_gloo(2, killed_after_rollback, settings, "")[0].error == "RuntimeError: killed"
    assert steps_in(run_dir / "checkpoints") == [6, 12]
    assert live(run_dir, LAST_STEP).steps == [*range(13, LAST_STEP + 1)]
    assert_same(run_dir, whole[0])


def test_without_a_regular_save_a_stop_makes_no_rollback_of_a_skip(
    live: Live, tmp_path: Path
) -> None:
    last = live(tmp_path, 15, SPIKE_STEP, save_interval=100)
    assert last.actions == ["skip"] and last.samples[-1][1] == BATCH * SPIKE_STEP
    (event,) = [e for e in read_events(tmp_path) if e["kind"] == "spike"]
    assert "there is no checkpoint to go back to yet; update skipped" in event["text"]

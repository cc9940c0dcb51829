"""Damaged checkpoints, disks that are full, values nobody reads: what a run does about them."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from parallel import checkpoint_io, checkpoint_manifest
from parallel.checkpoint_io import CheckpointError
from parallel.config import ConfigError
from parallel.engine import MegatronEngine
from parallel.progress_beacon import beacon
from parallel.runtime import shutdown
from pretrain import checkpoint
from pretrain.checkpoint import Checkpoints, check_identity, check_plain_values
from pretrain.config import (
    AnomalyConfig,
    CheckpointConfig,
    OnNonfinite,
    OnSpike,
    PretrainConfig,
    Resume,
    TrainConfig,
)
from pretrain.config_rules import validate
from pretrain.train_state import TrainState
from tests.disks import read_only, small_disk, writable
from tests.distributed import run_on_gloo
from tests.launch.test_checkpoint import plant
from tests.parity import MODEL
from tests.pretrain.test_checkpoint import IDENTITY, engine, save_steps

Notices = list[tuple[str, int, str]]


def opened(folder: Path, config: CheckpointConfig, notices: Notices) -> Checkpoints:
    return Checkpoints(folder, config, IDENTITY, lambda *notice: notices.append(notice))


def resume(folder: Path, config: CheckpointConfig) -> tuple[str | int, Notices]:
    """The step resumed at, or the error's text; and what was told."""
    runtime, machine = engine(seed=8)
    notices: Notices = []
    try:
        return opened(folder, config, notices).resume(machine).step, notices
    except CheckpointError as error:
        return str(error), notices
    finally:
        shutdown(runtime)


def truncate(path: Path) -> None:
    file = path / "__0_1.distcp"
    os.truncate(file, file.stat().st_size // 2)


def add_a_file(path: Path) -> None:
    (path / "__7_0.distcp").write_bytes(b"of another checkpoint")


def flip_a_bit(path: Path) -> None:
    with open(path / "__1_0.distcp", "r+b") as file:
        file.seek(-2000, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 64]))


def half_delete(path: Path) -> None:
    for name in sorted(os.listdir(path))[::2]:
        (path / name).unlink()


def lose_the_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def lose_the_name(path: Path) -> None:
    (path / "metadata.json").unlink()


def scramble_the_values(path: Path) -> None:
    lose_the_manifest(path)
    (path / "common.pt").write_bytes(b"no pickle")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    run_on_gloo(2, save_steps, folder, [3, 5], 3)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """Checkpoints of steps 3 and 5, saved by two ranks."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (truncate, "__0_1.distcp has "),
        (flip_a_bit, "__1_0.distcp has checksum "),
        (add_a_file, "__7_0.distcp is not in manifest.json"),
        (half_delete, "manifest.json is missing"),
        (lose_the_manifest, "manifest.json is missing"),
        (lose_the_name, "metadata.json is missing"),
        (scramble_the_values, "manifest.json is missing"),
    ],
)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_taken(
    folder: Path, damage: Any, expected: str
) -> None:
    damage(folder / "step_00000005")
    config = CheckpointConfig()
    for step, notices in run_on_gloo(2, resume, folder, config):
        assert step == 3
        ((kind, of, text),) = notices
        assert (kind, of) == ("checkpoint_damaged", 5) and expected in text
        assert "step_00000005 is not used and now called step_00000005.damaged" in text
    assert sorted(os.listdir(folder)) == ["step_00000003", "step_00000005.damaged"]


def resume_elsewhere(place: Path, others: Path) -> tuple[str | int, Notices]:
    """Rank 0 works in `place`, the others in `others`: hosts that see different things."""
    before = os.getcwd()
    os.chdir(place if dist.get_rank() == 0 else others)
    try:
        return resume(Path("checkpoints"), CheckpointConfig())
    finally:
        os.chdir(before)


@pytest.mark.parametrize("seen", ["nothing", "another content"])
def test_a_host_that_cannot_see_the_folder_condemns_no_checkpoint(
    folder: Path, tmp_path: Path, seen: str
) -> None:
    others = tmp_path / "others"
    others.mkdir()
    if seen == "another content":
        shutil.copytree(folder, others / "checkpoints")
        flip_a_bit(others / "checkpoints" / "step_00000005")
    for text, notices in run_on_gloo(2, resume_elsewhere, tmp_path, others):
        assert "rank 1 on " in str(text)
        assert "cannot see or read checkpoints/step_00000005" in str(text)
        assert "left as it is" in str(text) and notices == []
    assert sorted(os.listdir(folder)) == ["step_00000003", "step_00000005"]


def test_without_verification_sizes_are_all_that_is_compared(folder: Path) -> None:
    config = CheckpointConfig(verify_integrity=False)
    truncate(folder / "step_00000005")
    assert run_on_gloo(1, resume, folder, config)[0][0] == 3
    assert checkpoint_io.is_complete(folder / "step_00000003")
    flip_a_bit(folder / "step_00000003")
    text, notices = run_on_gloo(1, resume, folder, config)[0]
    # torch has a checksum for each tensor, and may see it when it reads
    assert notices == [] and (text == 3 or "could not read" in text)


def test_when_none_is_sound_nothing_is_started_anew(folder: Path) -> None:
    truncate(folder / "step_00000005")
    flip_a_bit(folder / "step_00000003")
    names = ["step_00000003.damaged", "step_00000005.damaged"]
    for _ in range(2):  # the second time, they have their new names
        text, _ = run_on_gloo(1, resume, folder, CheckpointConfig())[0]
        assert "no sound checkpoint is left" in text and ", ".join(sorted(names)) in text
    assert sorted(os.listdir(folder)) == names


def test_a_step_that_was_damaged_twice_keeps_both(folder: Path) -> None:
    (folder / "step_00000005.damaged").mkdir()
    truncate(folder / "step_00000005")
    assert run_on_gloo(1, resume, folder, CheckpointConfig())[0][0] == 3
    assert (folder / "step_00000005.damaged-2").is_dir()


def test_a_damaged_checkpoint_of_another_run_is_refused_and_left_alone(folder: Path) -> None:
    truncate(folder / "step_00000005")
    config = CheckpointConfig(load=str(folder))
    text, _ = run_on_gloo(1, resume, folder / "new", config)[0]
    assert "checkpoint.load=" in text and "step_00000005 is damaged: __0_1.distcp has" in text
    assert (folder / "step_00000005").is_dir()


@pytest.mark.parametrize("file", [".metadata", "common.pt", "object", "tensor"])
def test_a_hostile_checkpoint_is_refused_and_not_run(
    folder: Path, tmp_path: Path, file: str
) -> None:
    """Its manifest fits: whoever can write the one can write the other."""
    newest, trap = folder / "step_00000005", tmp_path / "trap"
    plant(newest, file, trap)
    checkpoint_manifest.write_manifest(newest)
    before = sorted(os.listdir(folder))
    for said, _ in run_on_gloo(2, resume, folder, CheckpointConfig()):
        refusal = "names posix.system, which " + ("weights do" if file == "tensor" else "no ")
        assert isinstance(said, str) and refusal in said and str(newest) in said
    assert sorted(os.listdir(folder)) == before and not trap.exists()


def test_a_newer_manifest_is_refused_and_left_alone(folder: Path) -> None:
    file = folder / "step_00000005" / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 9}))
    text, _ = run_on_gloo(1, resume, folder, CheckpointConfig())[0]
    assert "use the version that wrote it" in text
    assert (folder / "step_00000005").is_dir()


def save_as_version_0_1(folder: Path) -> None:
    """Without manifest, format, seed, and the states that came later."""
    runtime, machine = engine(seed=7)
    plain = {
        "train_state": {"step": 4, "consumed_sequences": 32, "consumed_tokens": 9},
        "identity": IDENTITY,
    }
    path = folder / "step_00000004"
    checkpoint_io.save({**machine.sharded_state_dict(), **plain}, path, metadata={})
    (path / "manifest.json").unlink()
    shutdown(runtime)


def test_a_checkpoint_from_before_there_were_manifests_is_taken(tmp_path: Path) -> None:
    run_on_gloo(1, save_as_version_0_1, tmp_path)
    step, notices = run_on_gloo(1, resume, tmp_path, CheckpointConfig(resume=Resume.required))[0]
    assert step == 4
    assert [(kind, of) for kind, of, _ in notices] == [("unverified", 4)]


NOW: dict[str, Any] = {
    "format": checkpoint.FORMAT,
    "train_state": TrainState().to_dict(),
    "identity": {"model": {"a": 1}, "data": {}, "train": {"seed": 1}},
}


BEFORE_3 = {name: v for name, v in NOW["train_state"].items() if name != "unreported"}


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ({**NOW, "optimizer": {"x": 1}, "model0": {}, "content_metadata": {}}, None),
        ({**NOW, "identity": {**NOW["identity"], "model": {"b": 2}}}, None),  # check_identity's
        ({**NOW, "extra": 1}, "saved, and read by nobody: extra"),
        ({k: v for k, v in NOW.items() if k != "train_state"}, "missing: train_state"),
        (
            {**NOW, "train_state": {**NOW["train_state"], "mood": 1}},
            "saved, and read by nobody: train_state.mood",
        ),
        ({**NOW, "identity": {"model": {}, "data": {}}}, "missing: identity.train"),
        ({**NOW, "identity": {**NOW["identity"], "moon": 1}}, "by nobody: identity.moon"),
        ({**NOW, "format": 2, "train_state": BEFORE_3}, None),
        ({**NOW, "train_state": BEFORE_3}, "missing: train_state.unreported"),
        ({**NOW, "format": checkpoint.FORMAT + 1}, "knows formats up to"),
    ],
)
def test_values_that_nobody_reads_or_that_are_missing_are_named(
    stored: dict[str, Any], expected: str | None
) -> None:
    if expected is None:
        check_plain_values(stored, NOW, Path("c"))
        return
    with pytest.raises(CheckpointError, match=expected):
        check_plain_values(stored, NOW, Path("c"))


@pytest.mark.parametrize("name", ["save_interval", "keep_last", "keep_every", "keep_best"])
def test_numbers_of_the_settings_are_not_negative(name: str) -> None:
    settings: dict[str, Any] = {name: -1}
    with pytest.raises(ConfigError, match=rf"checkpoint\.{name}=-1 must be 0 or more"):
        CheckpointConfig(**settings)


@pytest.mark.parametrize(
    ("save", "evaluate", "problem"),
    [
        (100, 50, None),
        (0, 0, None),
        (100, 0, "use train.eval_interval=100, or a divisor of that"),
        (100, 30, "use checkpoint.save_interval=90 or 120"),
    ],
)
def test_the_best_are_evaluated_where_they_are_saved(
    save: int, evaluate: int, problem: str | None
) -> None:
    config = PretrainConfig(
        model=MODEL,
        train=TrainConfig(eval_interval=evaluate),
        checkpoint=CheckpointConfig(save_interval=save, keep_best=1),
    )
    if problem is None:
        validate(config, world_size=1)
        return
    with pytest.raises(ConfigError) as caught:
        validate(config, world_size=1)
    assert "checkpoint.keep_best=1 compares what is evaluated" in str(caught.value)
    assert problem in str(caught.value)


def test_a_rollback_needs_saves_to_go_back_to() -> None:
    both = AnomalyConfig(on_nonfinite=OnNonfinite.rollback, on_spike=OnSpike.rollback)
    config = PretrainConfig(model=MODEL, anomaly=both, checkpoint=CheckpointConfig(save_interval=0))
    with pytest.raises(ConfigError) as caught:
        validate(config, world_size=1)
    for name in ("on_nonfinite", "on_spike"):
        assert f"anomaly.{name}=rollback goes back to the multiples of" in str(caught.value)
        assert f"or use anomaly.{name}=skip" in str(caught.value)
    config.checkpoint.save_interval = 1
    validate(config, world_size=1)


def test_another_seed_is_refused() -> None:
    saved = {"model": {}, "data": {}, "train": {"seed": 1}}
    now = {**saved, "train": {"seed": 2}}
    with pytest.raises(CheckpointError, match=r"train\.seed: 1 saved, 2 now"):
        check_identity(saved, now, Path("c"), checkpoint.ALL_PARTS, 0)
    check_identity({"model": {}, "data": {}}, now, Path("c"), checkpoint.ALL_PARTS, 0)


def parameters(machine: MegatronEngine) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in machine.chunks[0].parameters()])


def change(machine: MegatronEngine, by: float) -> None:
    with torch.no_grad():
        for parameter in machine.chunks[0].parameters():
            parameter.add_(by)


def train_over_a_full_disk(folder: Path, ballast: Path) -> tuple[Notices, list[int], list[str]]:
    """Twenty steps of a run that saves every tenth, on a disk that has room from step 12 on."""
    runtime, machine = engine(seed=7)
    notices: Notices = []
    checkpoints = opened(folder, CheckpointConfig(save_interval=10), notices)
    due = []
    for step in range(1, 21):
        if step == 12 and dist.get_rank() == 0:
            ballast.unlink()
        change(machine, 0.25)
        checkpoints.check(step)
        if checkpoints.due(step):
            due.append(step)
            checkpoints.save(machine, TrainState(step=step))
            while (pending := checkpoints._pending) is not None and not pending.done:
                time.sleep(0.001)  # so that all ranks see it in the same step, whatever the disk
    checkpoints.wait(20)
    shutdown(runtime)
    return notices, due, [path.name for path in checkpoints.steps()]


def test_a_full_disk_does_not_end_the_training(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "8m") as disk:
        ballast = disk / "ballast"
        ballast.write_bytes(b"x" * (8 * 1024 - 100) * 1024)
        for notices, due, names in run_on_gloo(2, train_over_a_full_disk, disk / "c", ballast):
            kinds = [(kind, step) for kind, step, _ in notices]
            assert kinds == [
                ("save_failed", 11),
                ("save_recovered", 13),
                ("saved", 13),
                ("saved", 20),
            ]
            assert due == [10, 12, 20]  # a tenth of the interval after the failure was seen
            assert names == ["step_00000012", "step_00000020"]
            text = notices[0][2]
            assert "SAVE FAILED: could not write" in text and "No space left on device" in text
            assert "There is no checkpoint." in text and "tries again after step 12" in text
        assert not list(disk.glob("c/*.partial"))


def test_failures_in_a_row_are_tried_again_ever_later() -> None:
    checkpoints = Checkpoints(Path("c"), CheckpointConfig(save_interval=100), {})
    steps = []
    for failures in range(1, 7):
        checkpoints._failures = failures
        steps.append(checkpoints._retry_after())
    assert steps == [10, 20, 40, 80, 100, 100]


def last_save(
    folder: Path, free: str, pauses: tuple[float, ...], patience: float = 0.0, after: int = 1
) -> tuple[str, Notices]:
    """The error of the save that ends a run on a read-only disk, which a person may repair when
    it is tried again for the time `after`."""
    checkpoint.FINAL_SAVE_PAUSES = pauses  # type: ignore[assignment]
    runtime, machine = engine(seed=7)
    notices: Notices = []
    checkpoints = opened(folder, CheckpointConfig(save_interval=0), notices)
    # as in a run, only rank 0 knows the walltime
    checkpoints.patience = lambda: patience if dist.get_rank() == 0 else math.inf

    def notify(kind: str, step: int, text: str) -> None:
        notices.append((kind, step, text))
        tried = sum("trying again" in told for _, _, told in notices)
        if free and tried == after and dist.get_rank() == 0:
            writable(Path(free))

    checkpoints.notify = notify
    error = ""
    try:
        checkpoints.save_last(machine, TrainState(step=7))
    except CheckpointError as raised:
        error = str(raised)
    finally:
        shutdown(runtime)
    return error, notices


def test_the_last_save_is_tried_again_and_then_ends_the_run_with_an_error(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "8m") as disk:
        read_only(disk)
        for error, notices in run_on_gloo(2, last_save, disk / "c", "", (0.01, 0.02)):
            assert "step 7, at which this run ends, is not saved, after 3 attempts" in error
            assert "Read-only file system" in error and "There is no checkpoint" in error
            assert [kind for kind, _, _ in notices] == ["save_failed"] * 5
        for error, notices in run_on_gloo(2, last_save, disk / "c", str(disk), (0.01, 0.02)):
            assert error == ""
            assert [kind for kind, _, _ in notices][-2:] == ["save_recovered", "saved"]


def test_the_last_save_is_tried_again_for_as_long_as_there_is_time(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "8m") as disk:
        read_only(disk)
        pauses = (0.01, 0.1)
        for error, notices in run_on_gloo(2, last_save, disk / "c", "", pauses, 0.5):
            again = [text for _, _, text in notices if text.startswith("trying again in 0.1 s")]
            assert 2 <= len(again) <= 5  # the first is made whatever the time
            assert f"is not saved, after {len(again) + 2} attempts in " in error
        for error, notices in run_on_gloo(2, last_save, disk / "c", str(disk), pauses, 30.0, 6):
            assert error == ""
            assert [kind for kind, _, _ in notices][-2:] == ["save_recovered", "saved"]
            assert [kind for kind, _, _ in notices].count("save_failed") == 12


def save_behind_the_training(folder: Path) -> tuple[list[bool], bool, list[str]]:
    """What is stored is the moment of the save, though the weights go on changing."""
    runtime, machine = engine(seed=7)
    notices: Notices = []
    checkpoints = opened(folder, CheckpointConfig(keep_last=1), notices)
    expected, equal = {}, []
    for step in (1, 2, 3):
        expected[step] = parameters(machine).clone()
        checkpoints.save(machine, TrainState(step=step))
        assert checkpoints.saving
        change(machine, 1.0)
    assert checkpoints.resume(machine).step == 3  # waits for the one in flight
    equal.append(torch.equal(parameters(machine), expected[3]))
    checkpoints.check(3)
    checkpoints.save(machine, TrainState(step=3))  # is there already: nothing happens
    checkpoints.save(machine, TrainState(step=4))
    assert checkpoints.resume(machine).step == 4  # waits, too
    shutdown(runtime)
    return equal, checkpoints.saving, [kind for kind, _, _ in notices]


def test_a_save_behind_the_training_holds_the_step_it_is_of(tmp_path: Path) -> None:
    for equal, saving, kinds in run_on_gloo(2, save_behind_the_training, tmp_path):
        assert equal == [True] and not saving and kinds == ["saved"] * 4
    assert os.listdir(tmp_path) == ["step_00000004"]
    assert checkpoint_manifest.verify(tmp_path / "step_00000004") == []


def save_last_behind_another(folder: Path) -> tuple[bool, bool]:
    """Whether the last save copies to the memory of the one before; whether a load gets on."""
    runtime, machine = engine(seed=7)
    checkpoints = opened(folder, CheckpointConfig(), [])
    checkpoints.save(machine, TrainState(step=1))
    checkpoints.wait(1)
    checkpoints._memory._arena.fill_(255)
    checkpoints.save_last(machine, TrainState(step=2))
    reused = bool((checkpoints._memory._arena != 255).any())
    beacon._moved = time.monotonic() - 1000
    checkpoints.resume(machine)
    quiet = beacon.position().quiet
    shutdown(runtime)
    return reused, quiet < 100


def test_the_last_save_needs_no_second_memory_and_a_load_is_no_hang(tmp_path: Path) -> None:
    assert run_on_gloo(1, save_last_behind_another, tmp_path) == [(True, True)]


def test_who_lost_the_folder_removes_nothing(folder: Path) -> None:
    checkpoints = Checkpoints(folder, CheckpointConfig(keep_last=1), {})
    checkpoints.may_publish = lambda: False
    checkpoints._retain()
    with pytest.raises(CheckpointError, match="does not hold its folder"):
        checkpoints._prepare(folder / "step_00000007")
    assert len(checkpoints.steps()) == 2
    checkpoints.may_publish = lambda: True
    checkpoints._retain()
    assert len(checkpoints.steps()) == 1

import math
import time

import pytest

from parallel.config import ConfigError
from pretrain.config import FaultToleranceConfig
from pretrain.walltime import WallTime, end_of_time, walltime_seconds


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("23:30:00", 84600),
        ("1-00:00:00", 86400),
        ("2-01:02:03", 176523),
        ("100:00:00", 360000),
        ("0:00:01", 1),
        ("90", 5400),
        ("3599", 215940),
    ],
)
def test_walltime_as_batch_systems_write_it(text: str, seconds: float) -> None:
    assert walltime_seconds(text) == seconds
    assert FaultToleranceConfig(walltime=text, grace_seconds=0.5).walltime == text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("12h", "must be [D-]HH:MM:SS, such as 23:30:00, or minutes, such as 90"),
        ("1:30", "must be [D-]HH:MM:SS"),
        ("10:60:00", "must be [D-]HH:MM:SS"),
        ("-5", "must be [D-]HH:MM:SS"),
        ("", "must be [D-]HH:MM:SS"),
        ("0", "must be longer than nothing"),
        ("00:00:00", "must be longer than nothing"),
        ("43200", "is 720 hours if it means minutes; write [D-]HH:MM:SS, in a YAML file in quotes"),
    ],
)
def test_walltime_that_is_none(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        walltime_seconds(text)
    assert says in str(caught.value)
    with pytest.raises(ConfigError) as refused:
        FaultToleranceConfig(walltime=text)
    assert f"fault_tolerance.walltime={text} {says}" in str(refused.value)


@pytest.mark.parametrize("seconds", [-1.0, math.inf, math.nan])
def test_grace_time_is_a_finite_time(seconds: float) -> None:
    with pytest.raises(ConfigError, match=r"fault_tolerance\.grace_seconds=\S+ must be 0 or a"):
        FaultToleranceConfig(grace_seconds=seconds)


def test_a_last_save_is_tried_again_while_there_is_time() -> None:
    assert WallTime(None, grace_seconds=60).patience == 60
    assert WallTime(1100, grace_seconds=60, clock=lambda: 1000).patience == 60
    assert WallTime(1040, grace_seconds=60, clock=lambda: 1000).patience == 35  # 5 s to say so
    assert WallTime(990, grace_seconds=60, clock=lambda: 1000).patience < 0


def test_the_end_is_the_earlier_of_setting_and_slurm() -> None:
    slurm = {"SLURM_JOB_START_TIME": "1000", "SLURM_JOB_END_TIME": "4600"}
    assert end_of_time(None, {}) is None
    assert end_of_time(None, slurm) == 4600
    assert end_of_time("30", slurm) == 1000 + 1800  # from the job's start, not this process's
    assert end_of_time("2:00:00", slurm, started=5.0) == 4600
    assert end_of_time("2:00:00", {}, started=5.0) == 7205
    end = end_of_time("60", {})
    assert end is not None and 0 < end - time.time() <= 3600


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def take(walltime: WallTime, clock: Clock, what: str, seconds: float) -> None:
    with walltime.measuring(what):
        clock.now += seconds


def test_without_an_end_it_is_never_up() -> None:
    clock = Clock()
    walltime = WallTime(None, 60.0, clock)
    take(walltime, clock, "step", 1e9)
    assert not walltime.is_up(saving=True, evaluating=True)


def test_a_step_begins_only_where_the_one_after_it_could_still_be_saved() -> None:
    """Steps of 10 s, saves of 30 s, evaluations of 100 s, grace 60 s; the end at 1000 s."""
    clock = Clock()
    walltime = WallTime(1000.0, 60.0, clock)
    for what, seconds in (("step", 10), ("save", 30), ("evaluation", 100)):
        take(walltime, clock, what, seconds)
    # this step, then another, its save and the grace: 10 + 10 + 30 + 60
    clock.now = 1000 - 110
    assert not walltime.is_up(saving=False, evaluating=False)
    clock.now += 0.1
    assert walltime.is_up(saving=False, evaluating=False)
    clock.now = 1000 - 110 - 130
    assert not walltime.is_up(saving=True, evaluating=True)
    clock.now += 0.1
    assert walltime.is_up(saving=True, evaluating=True)
    assert not walltime.is_up(saving=True, evaluating=False)
    assert not walltime.is_up(saving=False, evaluating=True)


def test_simulated_runs_end_in_time_and_not_much_earlier() -> None:
    for save_interval, evaluation_interval in ((1, 0), (7, 20), (0, 3), (50, 11)):
        clock = Clock()
        walltime = WallTime(2000.0, 20.0, clock)
        step = 0
        while True:
            saving = save_interval > 0 and (step + 1) % save_interval == 0
            evaluating = evaluation_interval > 0 and (step + 1) % evaluation_interval == 0
            up = walltime.is_up(saving=saving, evaluating=evaluating)
            take(walltime, clock, "step", 3)
            step += 1
            if saving or up:
                take(walltime, clock, "save", 12)
            if up:
                break
            if evaluating:
                take(walltime, clock, "evaluation", 40)
        unknown = 0 if save_interval else 12  # the first save of a run is not foreseen
        # at most: a step and a save unused, and what was due and left out for it
        assert 2000 - 20 - (2 * 3 + 12 + 12 + 40) <= clock.now <= 2000 - 20 + unknown

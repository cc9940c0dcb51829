"""A run stops by itself before its time is up: the end of a SLURM job, or one given in settings.

Better than waiting for the batch system's signal: the run knows how long its steps and saves take.
Imports neither torch nor megatron-core.
"""

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import psutil  # type: ignore[import-untyped]

LAST_WORDS_SECONDS = 5.0  # in which a run that could not save says so and ends
WALLTIME = "walltime"  # what stopped a run, where signals are named by their names

_DAYS_AND_CLOCK = re.compile(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)")
_CLOCK = re.compile(r"(\d+):([0-5]\d)")
_WITH_UNIT = r"(\d+(?:\.\d+)?)\s*(d|h|m|s)(?:ays?|rs?|ours?|ins?|inutes?|ecs?|econds?)?"  # 24 hours
_SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
# YAML reads an unquoted 12:00:00 as a number to the base of 60. The smallest it makes of hours,
# minutes and seconds is this; numbers below can only have been meant as minutes.
_LONGEST_IN_MINUTES = 3600


def walltime_seconds(text: str) -> float:
    """ "[D-]HH:MM:SS" or whole minutes, as batch systems take them, in seconds.

    Raises ValueError for anything else, for zero, and for 3600 minutes or more.
    """
    if match := _DAYS_AND_CLOCK.fullmatch(text):
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    elif text.isdecimal() and int(text) < _LONGEST_IN_MINUTES:
        total = 60 * int(text)
    elif text.isdecimal():
        raise ValueError(
            f"is {int(text) // 60} hours if it means minutes; write [D-]HH:MM:SS, in a YAML file "
            "in quotes: unquoted, YAML takes 12:00:00 for the number 43200"
        )
    else:
        meant = _with_units(text)
        if meant and (clock := _CLOCK.fullmatch(text.strip())):
            meant += (
                f", or {int(clock[1]) // 60}:{int(clock[1]) % 60:02d}:{clock[2]} where minutes "
            )
            meant += "and seconds were meant, as SLURM reads it"
        raise ValueError(
            "must be [D-]HH:MM:SS, such as 23:30:00, or minutes, such as 90"
            + (f"; write {meant}" if meant else "")
        )
    if total == 0:
        raise ValueError("must be longer than nothing; leave it out for a run without an end")
    return float(total)


def grace_problem(grace: float, setting: str, walltime: str) -> str | None:
    """Why a run of this walltime (`setting` names it) would stop before it has begun; None where it
    would not. grace: in seconds."""
    seconds = walltime_seconds(walltime)
    if grace < seconds:
        return None
    return (
        f"fault_tolerance.grace_seconds={grace:g} must be shorter than {setting}={walltime}, or "
        f"the run is told to stop before it has started; use {min(60, seconds / 2):g}"
    )


def _with_units(text: str) -> str | None:
    """24h, 1d12h, 90 min and 12:30 as HH:MM:SS; None for what is no time."""
    text = text.strip().lower()
    if re.fullmatch(rf"(?:{_WITH_UNIT}\s*)+", text):
        found = re.findall(_WITH_UNIT, text)
        seconds = sum(float(number) * _SECONDS[unit] for number, unit in found)
    elif clock := _CLOCK.fullmatch(text):
        seconds = 60 * (60 * int(clock[1]) + int(clock[2]))
    else:
        return None
    if not seconds:
        return None
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def end_of_time(
    walltime: str | None, environment: Mapping[str, str], started: float | None = None
) -> float | None:
    """Unix seconds at which this process will have to be gone; None: never.

    The earlier of `walltime` after the start and SLURM's own end of the job. The start is that of
    the SLURM job, so that restarts within a job do not begin to count anew, else the process's.

    Args:
        environment: of the process; SLURM_JOB_START_TIME and SLURM_JOB_END_TIME are looked up.
        started: when the process started; None: asks the operating system.
    """
    ends = []
    if walltime is not None:
        begin = environment.get("SLURM_JOB_START_TIME") or started or psutil.Process().create_time()
        ends.append(float(begin) + walltime_seconds(walltime))
    if end := environment.get("SLURM_JOB_END_TIME"):
        ends.append(float(end))
    return min(ends, default=None)


class WallTime:
    """How much of the run's time is left, and whether that is enough for one more step.

    One rank asks and tells the others: clocks of hosts differ.

    Args:
        end: Unix seconds; None: there is no end.
        grace_seconds: kept free for whatever nobody has measured, such as ending the processes.
        clock: Unix seconds now.
    """

    def __init__(
        self,
        end: float | None = None,
        grace_seconds: float = 0.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.end = math.inf if end is None else end
        self.grace_seconds = grace_seconds
        self._clock = clock
        self._seconds = dict.fromkeys(("step", "save", "evaluation"), 0.0)

    @property
    def left(self) -> float:
        """Seconds until the end; infinite where there is none."""
        return self.end - self._clock()

    @property
    def patience(self) -> float:
        """Seconds that the save which ends the run may be tried again: the grace time, or what is
        left, but for the moment it takes to say that it failed."""
        return min(self.grace_seconds, self.left - LAST_WORDS_SECONDS)

    @contextmanager
    def measuring(self, what: str) -> Iterator[None]:
        """Around a "step", a "save" or an "evaluation": the next one is expected to take as long.

        Until the first save, saving counts as no time: the grace time has to be enough for one.
        """
        begin = self._clock()
        yield
        self.took(what, self._clock() - begin)

    def took(self, what: str, seconds: float) -> None:
        """What `measuring` notes, of a save that was written while training went on."""
        self._seconds[what] = seconds

    def is_up(self, *, saving: bool, evaluating: bool) -> bool:
        """Ask before a step: must it be the last one?

        It need not where, after it and what is due after it, the time is still enough for another
        step, its save, and the grace time.

        Args:
            saving, evaluating: whether the run will do so after this step if it goes on.
        """
        step, save, evaluation = (self._seconds[key] for key in ("step", "save", "evaluation"))
        until_asked_again = step + saving * save + evaluating * evaluation
        return self.left - until_asked_again < self.grace_seconds + step + save

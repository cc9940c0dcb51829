"""What a number that no setting takes was meant to be: 300B, 1e6 for a count, 10min, 1,000."""

import math
import re
from typing import Any

from data.quantity import FACTORS

MOST_LIKELY_HOURS = 72  # of walltimes that are a mere number: minutes to SLURM and to us

_NUMBER = r"[+-]?\d[\d_]*(?:\.\d*)?(?:e[+-]?\d+)?"
_SECONDS = {
    **dict.fromkeys(("s", "sec", "second", "seconds"), 1.0),
    **dict.fromkeys(("m", "min", "minute", "minutes"), 60.0),
    **dict.fromkeys(("h", "hr", "hour", "hours"), 3600.0),
    **dict.fromkeys(("d", "day", "days"), 86400.0),
}


def number_meant(setting: str, text: str, kinds: tuple[Any, ...]) -> str | None:
    """The number to type instead of `text` for a setting of one of these types, or what it counts.

    None where `text` is no number with a unit.
    """
    if not {int, float} & set(kinds):
        return None
    text = text.strip().strip("'\"").lower()
    whole = float not in kinds
    seconds = _seconds(text)
    value = plain_number(text)
    if {seconds, value} & {math.inf, -math.inf}:  # 1e999, which no setting takes
        return None
    if setting.endswith("_seconds") and seconds is not None:
        return f"it is in seconds: {setting}={seconds:g}"
    counts, example = _counts(setting)
    if value is None:
        return None if seconds is None else f"{counts}, not time{example}"
    if whole and 0 < value < 1 and counts.endswith(" steps"):
        return f"{counts}: {value:g} of train.train_steps=10000 would be {round(1e4 * value)}"
    if whole and 0 < value < 1:
        return f"{counts} and is no share of them{example}"
    if whole and value != int(value):
        return None
    return f"write {setting}={int(value) if whole or value == int(value) else f'{value:g}'}"


def plain_number(text: str) -> float | None:
    """1,000 · 0,001 · 300b · 1e6 · 1% as numbers."""
    if re.fullmatch(r"[1-9]\d{0,2}(,\d{3})+(\.\d+)?", text):
        return float(text.replace(",", ""))
    if re.fullmatch(r"0+,\d+", text):  # of half the world's keyboards
        return float(text.replace(",", "."))
    found = re.fullmatch(rf"({_NUMBER})\s*([kmgbt%]?)(?:tokens|tok|iters|it|steps)?", text)
    if found is None:
        return None
    number = float(found[1].replace("_", ""))
    return number / 100 if found[2] == "%" else number * FACTORS.get(found[2], 1.0)


def _seconds(text: str) -> float | None:
    """10min, 2h, 90 s, 00:10:00 in seconds."""
    if clock := re.fullmatch(r"(?:(\d+):)?(\d{1,2}):(\d{2})", text):
        return 3600 * int(clock[1] or 0) + 60 * int(clock[2]) + int(clock[3])
    found = re.fullmatch(rf"({_NUMBER})\s*([a-z]+)", text)
    if found is None or found[2] not in _SECONDS:
        return None
    return float(found[1].replace("_", "")) * _SECONDS[found[2]]


def minutes_or_hours(setting: str, text: str | None) -> list[str]:
    """A warning where a walltime is a number of minutes that may well have been meant as hours."""
    if text is None or not text.isdecimal() or int(text) > MOST_LIKELY_HOURS:
        return []
    return [f"{setting}={text} is {text} minutes; if hours were meant: {setting}={int(text)}:00:00"]


def _counts(setting: str) -> tuple[str, str]:
    """What it counts, and a value that works where one fits any run."""
    what = _what(setting)
    example = {"steps": 100, "sequences": 64}.get(what)
    return f"it counts {what}", f", as in {setting}={example}" if example else ""


def _what(setting: str) -> str:
    """What a whole number counts, by the setting's name."""
    name = setting.rpartition(".")[2]
    if name.endswith(("_steps", "_interval", "_warmup", "_window")) or name == "keep_every":
        return "steps"
    if name.endswith(("batch_size", "_sequences")):
        return "sequences"
    return "whole things"

"""What a name that there is not was meant to be. Imports neither torch nor megatron-core."""

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

from launch.aliases import ADVICE, ALIASES

# one letter of four is another; below, words that share some letters seem to be meant
_LEAST_LIKENESS = 0.74


def advice_on(name: str, value: str, names: Sequence[str]) -> tuple[list[str], str]:
    """Which of `names` are meant by `name`, at most three; or, where other words are meant than a
    name, those.

    What other frameworks call it comes first, then the same last word, then what looks like it.
    """
    whole = name.lower().replace("-", "_")
    last = whole.rpartition(".")[2]
    value = value.strip().lower()
    if whole in names:  # typed in capitals, or with -
        return [whole], ""
    for known in (whole, last):
        betas = re.fullmatch(r"[\[(]?([\d.]+),\s*([\d.]+)[\])]?", value)
        if known == "betas" and betas:
            return [], f"write optimizer.adam_beta1={betas[1]} optimizer.adam_beta2={betas[2]}"
        if advice := ADVICE.get(f"{known}={value}") or ADVICE.get(known):
            return [], advice
        if known in ALIASES:
            return [ALIASES[known]], ""
    same = [other for other in names if other.rpartition(".")[2] == last]
    return (same if 1 <= len(same) <= 3 else closest(name, names)), ""


def closest(wish: str, names: Sequence[str]) -> list[str]:
    """At most three of `names` that look like `wish`, nearest first.

    Compares whole names, and last words alone, so that `lr` finds optimizer.lr.
    """
    section, end = _parted(wish)

    def likeness(name: str) -> float:
        its_section, its_end = _parted(name)
        shorter, longer = sorted((end, its_end), key=len)
        score = max(
            SequenceMatcher(None, f"{section}.{end}", f"{its_section}.{its_end}").ratio()
            if section != its_section
            else 0,
            SequenceMatcher(None, end, its_end).ratio(),
            # a part of the name, as `steps` of train_steps; not `load` of cpu_offload
            0.65 + 0.3 * len(shorter) / len(longer) if f"_{shorter}" in f"_{longer}" else 0,
        )
        same_start = end.split("_")[0] == its_end.split("_")[0]
        same_section = (section == its_section) * (0.15 if section else 0.1)
        return score + same_section + 0.05 * same_start

    scores = {name: likeness(name) for name in names} if end else {}
    least = max(_LEAST_LIKENESS, max(scores.values(), default=0) - 0.1)
    close = [name for name in names if scores.get(name, 0) >= least]
    return sorted(close, key=lambda name: -scores[name])[:3]


def _parted(name: str) -> tuple[str, str]:
    """Section and last word of a setting; of an option without its dashes, none and all of it."""
    section, _, end = name.lower().lstrip("-").replace("-", "_").replace("/", ".").rpartition(".")
    return section, end

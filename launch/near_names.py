"""What a name that there is not was meant to be. Imports neither torch nor megatron-core."""

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

from launch.aliases import ADVICE, ALIASES


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
    section, _, end = wish.lower().rpartition(".")

    def likeness(name: str) -> float:
        its_section, _, its_end = name.lower().rpartition(".")
        shorter, longer = sorted((end, its_end), key=len)
        score = max(
            SequenceMatcher(None, wish.lower(), name.lower()).ratio()
            if section != its_section
            else 0,
            SequenceMatcher(None, end, its_end).ratio(),
            # a part of the name, as `steps` of train_steps
            0.65 + 0.3 * len(shorter) / len(longer) if shorter and shorter in longer else 0,
        )
        same_start = end.split("_")[0] == its_end.split("_")[0]
        return score + 0.15 * (section == its_section) + 0.05 * same_start

    scores = {name: likeness(name) for name in names}
    least = max(0.7, max(scores.values(), default=0) - 0.1)
    close = [name for name in names if scores[name] >= least]
    return sorted(close, key=lambda name: -scores[name])[:3]

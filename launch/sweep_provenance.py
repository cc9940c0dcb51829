"""What the runs of a sweep had in common besides their ratios, for the law that is fitted to them.

Imports neither torch nor megatron-core.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from data.config import MixtureConfig
from data.mixture_law import drawn_languages
from data.scaling_law.sweep_config import SweepConfig
from launch.sweep_folder import SWEEP_FILE, read_sweep_folder

# settings of data.mixture that decide what "a family's loss" is the loss of
CARRIED = ("within_family", "within_family_alpha", "language_shares", "drop_languages")


def family_rule(table: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """CARRIED as the sweep of the table set them, and what is odd about them.

    None where there is no sweep beside the table; what its design does not say has its default.
    """
    if not (table.parent / SWEEP_FILE).is_file():
        return None, []
    config = read_sweep_folder(table.parent).config
    first, *others = config.models
    rule = _rule_of(config, first)
    odd = [
        f"the sweep's {other} shares out the samples within a family otherwise than {first}, whose "
        "rule mixture.yaml has"
        for other in others
        if _rule_of(config, other) != rule
    ]
    return rule, odd


def _rule_of(config: SweepConfig, model: str) -> dict[str, Any]:
    merged: Any = OmegaConf.merge(config.settings, config.models[model].settings)
    settings: Any = OmegaConf.to_container(merged)
    mixture = (settings.get("data") or {}).get("mixture") or {}
    return {name: mixture[name] for name in CARRIED if name in mixture}


def typed_otherwise(rule: dict[str, Any], typed: MixtureConfig, words: Iterable[str]) -> list[str]:
    """A line for each of CARRIED that `words` give another value than the sweep had."""
    sweep: Any = OmegaConf.merge(OmegaConf.structured(MixtureConfig), rule)
    names = {word.partition("=")[0].lstrip("+") for word in words}
    return [
        f"data.mixture.{name}={_shown(getattr(typed, name))}: the sweep's runs had "
        f"{_shown(sweep[name])}, which mixture.yaml has, and the law speaks of these"
        for name in CARRIED
        if is_typed(name, names) and getattr(typed, name) != sweep[name]
    ]


def is_typed(name: str, names: Iterable[str]) -> bool:
    setting = f"data.mixture.{name}"
    return any(word == setting or word.startswith(f"{setting}.") for word in names)


def _shown(value: Any) -> Any:
    return getattr(value, "value", value)


def data_of_runs(table: Path, runs: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """What the runs' records say of their data, for a law's provenance, and what differs in them.

    {"seq_length": [...], "tokenizer": [...], "languages": {family: [...]}}: what there was, over
    all runs; {} where the records are not beside the table.
    """
    found = [_fingerprint(table.parent / "runs" / name / "run.json") for name in runs]
    prints = [fingerprint for fingerprint in found if fingerprint]
    if not prints:
        return {}, []
    languages: dict[str, set[str]] = {}
    for fingerprint in prints:
        shares = (segment["shares"] for segment in fingerprint["ratios"])
        for family, codes in drawn_languages(fingerprint["families"], shares).items():
            languages.setdefault(family, set()).update(codes)
    data: dict[str, Any] = {
        name: sorted({fingerprint[name] for fingerprint in prints})
        for name in ("seq_length", "tokenizer")
    }
    mixed = [
        f"the runs have several of {name}: {', '.join(map(str, values))}; their losses do not "
        "compare"
        for name, values in data.items()
        if len(values) > 1
    ]
    return data | {"languages": {f: sorted(c) for f, c in sorted(languages.items())}}, mixed


def _fingerprint(record: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(record.read_text(encoding="utf-8"))["data_fingerprint"]
    except (OSError, ValueError, KeyError):
        return None
    known = {"seq_length", "tokenizer", "families", "ratios"}
    return found if isinstance(found, dict) and known <= set(found) else None

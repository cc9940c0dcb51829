"""data.mixture.law: the fitted law that a run's losses are held against. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from data.scaling_law.law import ScalingLaw

if TYPE_CHECKING:
    from data.language_mixture import LanguageMixture

SPARSE = (
    "is sparse; its N counts all experts, and what N means for a sparse model in this law is not "
    "known"
)


def open_law(path: str) -> ScalingLaw:
    """The law in a file as data.mixture.law names it.

    Raises ValueError where there is none, or something else.
    """
    try:
        return ScalingLaw.load(Path(path).expanduser())
    except (OSError, ValueError) as error:
        raise ValueError(f"data.mixture.law={path}: {error}") from None


def open_law_of(mixture: LanguageMixture, path: str) -> ScalingLaw:
    """The same, and it must know every family that `mixture` ever draws; it may know others.

    Raises ValueError.
    """
    law = open_law(path)
    if lacking := sorted(set(_drawn(mixture)) - set(law.families)):
        raise ValueError(
            f"data.mixture.law={path} knows nothing of {', '.join(lacking)}, which the data has; "
            f"it was fitted to {', '.join(law.families)}. Set data.families to the grouping of its "
            "sweep, fit a law to these families, or leave data.mixture.law out"
        )
    return law


def differences(law: ScalingLaw, mixture: LanguageMixture, *, sparse: bool) -> list[str]:
    """A line for each way in which a run is of another kind than those the law was fitted to.

    A law whose provenance does not say what its runs were trained on is compared in nothing.
    sparse: whether the run's model has experts.
    """
    data = law.provenance.get("data", {})
    here = {
        "seq_length": mixture.seq_length,
        "tokenizer": mixture.stores[0].info.tokenizer_fingerprint,
    }
    found = ["the model " + SPARSE] if sparse else []
    for name, value in here.items():
        fitted = data.get(name, [value])
        if value not in fitted:
            found.append(
                f"{name}={_short(value)}: the runs of its sweep had "
                f"{' and '.join(_short(one) for one in fitted)}, so the losses do not compare"
            )
    fitted_languages = data.get("languages", {})
    for family, codes in _drawn(mixture).items():
        fitted = set(fitted_languages.get(family, codes))
        parts = {"without": sorted(fitted - codes), "with": sorted(codes - fitted)}
        told = [f"{how} {', '.join(codes)}" for how, codes in parts.items() if codes]
        if told:
            found.append(f"{family} is {' and '.join(told)}, unlike in the runs of its sweep")
    return found


def drawn_languages(
    family_of: Mapping[str, str], shares: Iterable[Mapping[str, float]]
) -> dict[str, set[str]]:
    """By family, the languages with a share above 0 in any of `shares`."""
    found: dict[str, set[str]] = {}
    for of_languages in shares:
        for code, share in of_languages.items():
            if share > 0:
                found.setdefault(family_of[code], set()).add(code)
    return found


def _drawn(mixture: LanguageMixture) -> dict[str, set[str]]:
    """By family, the languages that are ever drawn."""
    shares = (
        dict(zip(mixture.languages, shares.tolist(), strict=True))
        for _, _, shares in mixture.ratios.segments()
    )
    return drawn_languages(mixture.family_of, shares)


def _short(value: object) -> str:
    """Of a fingerprint, as much as tells it from others."""
    return str(value)[:16]

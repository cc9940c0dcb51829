"""data.mixture.law: the fitted law that a run's losses are held against. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from data.scaling_law.law import ScalingLaw

if TYPE_CHECKING:
    from data.language_mixture import LanguageMixture


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
    drawn = {
        mixture.family_of[code]
        for _, _, shares in mixture.ratios.segments()
        for code, share in zip(mixture.languages, shares.tolist(), strict=True)
        if share > 0
    }
    if lacking := sorted(drawn - set(law.families)):
        raise ValueError(
            f"data.mixture.law={path} knows nothing of {', '.join(lacking)}, which the data has; "
            f"it was fitted to {', '.join(law.families)}. Set data.families to the grouping of its "
            "sweep, fit a law to these families, or leave data.mixture.law out"
        )
    return law

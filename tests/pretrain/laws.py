"""Scaling laws made up for tests."""

from collections.abc import Sequence

from data.scaling_law.law import FamilyLaw, FittedRange, ScalingLaw


def a_law(families: Sequence[str], *, tokens: tuple[float, float] = (1e3, 1e9)) -> ScalingLaw:
    """Losses of 2 to 12 nats for the tiniest models, with three refits around each family's."""

    def one(scale: float) -> FamilyLaw:
        return FamilyLaw(E=1.5 * scale, A=40 * scale, alpha=0.3, B=80 * scale, beta=0.4, gamma=0.1)

    return ScalingLaw(
        families={name: one(1 + 0.1 * place) for place, name in enumerate(families)},
        fitted_range=FittedRange((1e3, 1e9), tokens, dict.fromkeys(families, (0.01, 1.0))),
        residual_std=dict.fromkeys(families, 0.01),
        bootstrap={
            name: [one((1 + 0.1 * place) * around) for around in (0.97, 1.0, 1.03)]
            for place, name in enumerate(families)
        },
        provenance={"made_up": True},
    )

"""The multilingual scaling law of arXiv 2410.12883, as fitted: predictions, intervals, a file.

    L_f(N, D, p_f) = (E_f + A_f / N^alpha_f + B_f / D^beta_f) * p_f^-gamma_f

L_f  validation loss of family f: mean over its tokens, in nats a token
N    parameters without the embedding
D    training tokens of the whole mixture. That the paper counts all families' tokens is our
     reading: the ratio enters on its own
p_f  the family's share of these tokens, above 0 and at most 1

The bracket is the loss of a model trained on family f alone (p_f = 1). `data.scaling_law.fit`
makes laws; `data.scaling_law.optimum` asks them for ratios.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import yaml  # type: ignore[import-untyped]
from numpy.typing import ArrayLike

from data.scaling_law.yaml_file import read_yaml, write_yaml

FORMAT = 1  # of the file
FORMULA = "L = (E + A / N^alpha + B / D^beta) * p^-gamma"
TERMS = ("E", "A", "B")  # of the bracket
NEAR = 1.01  # factor by which values may leave the fitted range before that is worth a line


@dataclass(frozen=True)
class FamilyLaw:
    """Six numbers of one family. Raises ValueError for such as no loss can follow."""

    E: float  # nats a token
    A: float  # nats a token; 0: no term in N
    alpha: float
    B: float  # nats a token; 0: no term in D
    beta: float
    gamma: float

    def __post_init__(self) -> None:
        bad = [f"{name}={value}" for name, value in asdict(self).items() if not _finite(value)]
        if bad:
            raise ValueError(f"{', '.join(bad)}: must be finite numbers")
        negative = [
            f"{name}={getattr(self, name)}"
            for name in ("E", "A", "alpha", "B", "beta")
            if getattr(self, name) < 0
        ]
        if negative:
            raise ValueError(f"{', '.join(negative)}: must be at least 0")
        if self.E + self.A + self.B == 0:
            raise ValueError("E=0, A=0, B=0: one of them must be above 0, or no loss is left")

    def single_family_loss(self, num_parameters: ArrayLike, tokens: ArrayLike) -> Any:
        """E + A / N^alpha + B / D^beta in nats a token; arguments broadcast as numpy's do."""
        return (
            self.E
            + self.A * _positive("num_parameters", num_parameters) ** -self.alpha
            + self.B * _positive("tokens", tokens) ** -self.beta
        )

    def loss(self, num_parameters: ArrayLike, tokens: ArrayLike, ratio: ArrayLike) -> Any:
        """The law in nats a token; arguments broadcast as numpy's do.

        Raises ValueError for sizes not above 0, and for ratios outside of (0, 1]: at 0 the law is
        infinite, which no model's loss is.
        """
        p = np.asarray(ratio, dtype=float)
        if not np.all((p > 0) & (p <= 1 + 1e-9)):
            raise ValueError(
                f"ratio={p.tolist()}: must lie above 0 and be at most 1. The law is infinite at 0: "
                "leave out families that are not drawn, or give them a floor, such as 0.01"
            )
        return self.single_family_loss(num_parameters, tokens) * p**-self.gamma


@dataclass(frozen=True)
class FittedRange:
    """Smallest and largest of what the law was fitted to."""

    num_parameters: tuple[float, float]
    tokens: tuple[float, float]
    ratios: dict[str, tuple[float, float]]  # by family


@dataclass(kw_only=True)
class ScalingLaw:
    """The law of several families, with what is known about how far it can be trusted."""

    families: dict[str, FamilyLaw]
    fitted_range: FittedRange
    residual_std: dict[str, float]  # by family: of ln(measured loss) around the law
    # by family: the law refitted to resampled runs; entry i of all families is the same resample
    bootstrap: dict[str, list[FamilyLaw]] = field(default_factory=dict)
    terms: tuple[str, ...] = TERMS  # which of E, A, B were fitted or set; the others are 0
    fixed: dict[str, float] = field(default_factory=dict)  # parameters that were set, not fitted
    quality: dict[str, dict[str, float]] = field(default_factory=dict)  # by family, of the fit
    # sweep folder, checksum of the table, date, versions, settings, runs used and left out
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = ", ".join(self.families)
        found = [
            f"{what} is given for {', '.join(values) or 'none'}; the law has {known}"
            for what, values in (
                ("residual_std", self.residual_std),
                ("fitted_range.ratios", self.fitted_range.ratios),
                ("bootstrap", self.bootstrap or self.families),
            )
            if set(values) != set(self.families)
        ]
        if len({len(refits) for refits in self.bootstrap.values()}) > 1:
            found.append("bootstrap: families have different numbers of refits")
        if found:
            raise ValueError("; ".join(found))

    @property
    def gamma(self) -> dict[str, float]:
        return {name: law.gamma for name, law in self.families.items()}

    def single_family_losses(self, num_parameters: float, tokens: float) -> dict[str, float]:
        """Loss of a model trained on each family alone, in nats a token."""
        return {
            name: float(law.single_family_loss(num_parameters, tokens))
            for name, law in self.families.items()
        }

    def loss(
        self, num_parameters: float, tokens: float, ratios: Mapping[str, float]
    ) -> dict[str, float]:
        """Predicted loss of every family that `ratios` names, in nats a token.

        Raises ValueError for families the law does not know and for ratios outside of (0, 1].
        """
        self._known(ratios)
        return {
            name: float(self.families[name].loss(num_parameters, tokens, p))
            for name, p in ratios.items()
        }

    def interval(
        self,
        num_parameters: float,
        tokens: float,
        ratios: Mapping[str, float],
        level: float = 0.9,
    ) -> dict[str, tuple[float, float]]:
        """Where the loss of one more run would lie with probability `level`, by family.

        Each refit predicts ln L with a normal scatter of residual_std around it; the interval cuts
        (1 - level) / 2 off either end of the mean of these distributions. Without refits only the
        scatter is in it. It holds for runs like those of the sweep: what else may change outside
        of the fitted range is not in it (`extrapolation`). Raises ValueError as `loss` does.
        """
        if not 0 < level < 1:
            raise ValueError(f"level={level}: must lie between 0 and 1, such as 0.9")
        self._known(ratios)
        result = {}
        for name, p in ratios.items():
            refits = self.bootstrap.get(name) or [self.families[name]]
            centres = np.log([law.loss(num_parameters, tokens, p) for law in refits])
            low, high = (
                math.exp(_mixture_quantile(centres, self.residual_std[name], q))
                for q in ((1 - level) / 2, (1 + level) / 2)
            )
            result[name] = (low, high)
        return result

    def extrapolation(
        self, num_parameters: float, tokens: float, ratios: Mapping[str, float]
    ) -> list[str]:
        """A line for everything outside of what was fitted, with the factor; empty inside."""
        self._known(ratios)
        lines = []
        for what, value, bounds, term in (
            ("num_parameters", num_parameters, self.fitted_range.num_parameters, "A"),
            ("tokens", tokens, self.fitted_range.tokens, "B"),
        ):
            outside = _outside(value, bounds)
            if outside and term not in self.terms:
                outside += f"; the law has no term in {what}, so its prediction does not change"
            if outside:
                lines.append(f"{what}={value:.4g}: {outside}")
        for name, p in ratios.items():
            outside = _outside(p, self.fitted_range.ratios[name])
            if outside:
                lines.append(f"ratio of {name}={p:.4g}: {outside}")
        return lines

    def save(self, path: str | Path) -> None:
        """Write the law as YAML; `path` holds its old content or all of the new."""
        write_yaml(path, _as_yaml(self), f"{FORMULA}; losses in nats a token")

    @classmethod
    def load(cls, path: str | Path) -> "ScalingLaw":
        """Read what `save` wrote.

        Raises FileNotFoundError for none, ValueError for one that is not a law or of another
        format, naming the file.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: there is no such scaling law; python -m launch.fit_mixture writes one"
            )
        try:
            return _from_yaml(read_yaml(path))
        except (
            yaml.YAMLError,
            UnicodeDecodeError,
            AttributeError,  # a list where a mapping is due
            KeyError,
            TypeError,
            ValueError,
        ) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{path} is not a scaling law of format {FORMAT}: {reason}") from error

    def _known(self, names: Mapping[str, float]) -> None:
        unknown = sorted(set(names) - set(self.families))
        if unknown:
            raise ValueError(
                f"the law knows nothing of {', '.join(unknown)}; it was fitted to "
                f"{', '.join(self.families)}"
            )


_NAMES = [item.name for item in fields(FamilyLaw)]


def _as_yaml(law: ScalingLaw) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "terms": list(law.terms),
        "fixed": law.fixed,
        "families": {name: asdict(one) for name, one in law.families.items()},
        "residual_std": law.residual_std,
        "fitted_range": {
            "num_parameters": list(law.fitted_range.num_parameters),
            "tokens": list(law.fitted_range.tokens),
            "ratios": {name: list(pair) for name, pair in law.fitted_range.ratios.items()},
        },
        "quality": law.quality,
        "provenance": law.provenance,
        "bootstrap_columns": _NAMES,
        "bootstrap": {
            name: [[getattr(refit, item) for item in _NAMES] for refit in refits]
            for name, refits in law.bootstrap.items()
        },
    }


def _from_yaml(content: Any) -> ScalingLaw:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"format is {found}")
    columns = content["bootstrap_columns"]
    bounds = content["fitted_range"]
    return ScalingLaw(
        families={name: FamilyLaw(**one) for name, one in content["families"].items()},
        fitted_range=FittedRange(
            num_parameters=_pair(bounds["num_parameters"]),
            tokens=_pair(bounds["tokens"]),
            ratios={name: _pair(pair) for name, pair in bounds["ratios"].items()},
        ),
        residual_std=content["residual_std"],
        bootstrap={
            name: [FamilyLaw(**dict(zip(columns, row, strict=True))) for row in rows]
            for name, rows in content["bootstrap"].items()
        },
        terms=tuple(content["terms"]),
        fixed=content["fixed"],
        quality=content["quality"],
        provenance=content["provenance"],
    )


def _pair(values: Any) -> tuple[float, float]:
    low, high = values
    return float(low), float(high)


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _positive(what: str, values: ArrayLike) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    if not np.all((array > 0) & np.isfinite(array)):
        raise ValueError(f"{what}={array.tolist()}: must be finite and above 0")
    return array


def _outside(value: float, bounds: tuple[float, float]) -> str:
    low, high = bounds
    if value > high * NEAR:
        return f"{value / high:.3g} times the largest fitted ({high:.4g})"
    if value < low / NEAR:
        return f"{low / value:.3g} times below the smallest fitted ({low:.4g})"
    return ""


def _mixture_quantile(centres: np.ndarray, std: float, probability: float) -> float:
    """The x below which `probability` of the mean of normal distributions lies."""
    if std == 0:
        return float(np.quantile(centres, probability))
    # not above: every start of a run imports this file, and scipy takes 0.2 CPU seconds
    from scipy.special import ndtr, ndtri  # type: ignore[import-untyped]

    tail = std * float(ndtri(probability))
    below, above = float(centres.min()) + tail, float(centres.max()) + tail
    for _ in range(60):  # halves the distance to below the last bit
        middle = (below + above) / 2
        if ndtr((middle - centres) / std).mean() < probability:
            below = middle
        else:
            above = middle
    return (below + above) / 2

"""Tables of runs that follow a known law, with noise."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from data.scaling_law.law import FamilyLaw
from data.scaling_law.runs_table import RunsTable, make_table

TRUE = {
    "germanic": FamilyLaw(E=1.7, A=60.0, alpha=0.25, B=200.0, beta=0.30, gamma=0.08),
    "slavic": FamilyLaw(E=1.5, A=120.0, alpha=0.30, B=150.0, beta=0.28, gamma=0.10),
    "indic": FamilyLaw(E=1.2, A=90.0, alpha=0.28, B=400.0, beta=0.33, gamma=0.15),
}
SIZES = (1e6, 4e6, 16e6, 64e6)
LENGTHS = (3e7, 1.2e8, 4.8e8)
MIXTURES = ((1, 0, 0), (0, 1, 0), (0, 0, 1), (0.6, 0.2, 0.2), (0.2, 0.6, 0.2), (0.2, 0.2, 0.6))


def row(**values: Any) -> dict[str, Any]:
    """A row of the table; what is not given does not matter."""
    defaults = {
        "run": "r",
        "model": "m",
        "num_parameters": 1_000_000,
        "tokens": 30_000_000,
        "seed": 1,
        "purpose": "grid",
        "family": "germanic",
        "ratio": 0.5,
        "loss": 3.0,
        "eval_tokens": 10_000,
        "epochs": 0.5,
    }
    return defaults | values


def sweep(
    sizes: Iterable[float] = SIZES,
    lengths: Iterable[float] = LENGTHS,
    mixtures: Iterable[Sequence[float]] = MIXTURES,
    *,
    laws: Mapping[str, FamilyLaw] = TRUE,
    noise: float = 0.0,
    seeds: int = 1,
    seed: int = 0,
) -> RunsTable:
    """Every mixture at every size and length; `noise` is the standard deviation of ln L."""
    points = [
        (int(n), int(d), tuple(p), s)
        for n in sizes
        for d in lengths
        for p in mixtures
        for s in range(seeds)
    ]
    return runs_at(points, laws=laws, noise=noise, seed=seed)


def runs_at(
    points: Iterable[tuple[float, float, Sequence[float], int]],
    *,
    laws: Mapping[str, FamilyLaw] = TRUE,
    noise: float = 0.0,
    seed: int = 0,
) -> RunsTable:
    """A run for each (num_parameters, tokens, ratios, seed); families at ratio 0 have a row too."""
    random = np.random.default_rng(seed)
    rows = []
    for number, (n, d, ratios, run_seed) in enumerate(points):
        for (family, law), p in zip(laws.items(), ratios, strict=True):
            loss = law.loss(n, d, p) * np.exp(noise * random.normal()) if p else 11.0
            rows.append(
                row(
                    run=f"run{number}",
                    num_parameters=int(n),
                    tokens=int(d),
                    seed=run_seed,
                    purpose="single_family" if max(ratios) == 1 else "grid",
                    family=family,
                    ratio=float(p),
                    loss=float(loss),
                )
            )
    return make_table(rows)

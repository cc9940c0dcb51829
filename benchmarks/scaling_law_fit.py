"""How long the fit of the multilingual scaling law takes, and its optimum.

    python -m benchmarks.scaling_law_fit --runs 200 --families 5 --bootstrap 200

Synthetic runs of known laws, with a noise of 0.5 % of the loss, at sizes, training lengths and
ratios drawn at random. Prints seconds for the fit with its refits and held-out errors; beside the
known gamma the fitted one; how far the optimum lies above that of scipy's L-BFGS-B alone, from the
same grid of exponents; and milliseconds for an optimum of the ratios.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import numpy as np
from scipy.optimize import minimize  # type: ignore[import-untyped]

from data.scaling_law.fit import GRID, FitSettings, fit_law
from data.scaling_law.fit_settings import rows_of_family
from data.scaling_law.huber_fit import HIGH, LOW, Rows
from data.scaling_law.identify import model_of
from data.scaling_law.law import FamilyLaw, ScalingLaw
from data.scaling_law.optimum import Goal, optimal_ratios
from data.scaling_law.runs_table import RunsTable, make_table

NOISE = 0.005


def known_laws(families: int, random: np.random.Generator) -> dict[str, FamilyLaw]:
    """Laws of the size that English text has (arXiv 2203.15556), each a little different."""
    return {
        f"family{number}": FamilyLaw(
            E=random.uniform(1.2, 2.0),
            A=random.uniform(50, 150),
            alpha=random.uniform(0.22, 0.34),
            B=random.uniform(150, 400),
            beta=random.uniform(0.25, 0.35),
            gamma=random.uniform(0.05, 0.15),
        )
        for number in range(families)
    }


def synthetic_runs(laws: dict[str, FamilyLaw], runs: int, random: np.random.Generator) -> RunsTable:
    """Runs that draw all families, of 4 sizes and 4 lengths."""
    rows = []
    for number in range(runs):
        size = int(random.choice([1e6, 4e6, 16e6, 64e6]))
        tokens = int(random.choice([3e7, 1.2e8, 4.8e8, 2e9]))
        ratios = random.dirichlet([1.0] * len(laws)) * 0.95 + 0.05 / len(laws)
        for (name, law), p in zip(laws.items(), ratios, strict=True):
            loss = law.loss(size, tokens, p) * np.exp(NOISE * random.normal())
            rows.append(
                {
                    "run": f"run{number}",
                    "model": f"{size}",
                    "num_parameters": size,
                    "tokens": tokens,
                    "seed": number,
                    "purpose": "grid",
                    "family": name,
                    "ratio": p,
                    "loss": loss,
                    "eval_tokens": 100_000,
                    "epochs": 0.5,
                }
            )
    return make_table(rows)


def by_scipy_alone(rows: Rows, delta: float) -> float:
    """The lowest objective of L-BFGS-B from every start of the grid; the reference for ours."""
    model = model_of({})

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        predicted, jacobian = model.jacobian(theta, rows)
        residual = rows.log_loss - predicted
        size = np.abs(residual)
        huber = np.where(size <= delta, size**2 / 2, delta * (size - delta / 2)).sum()
        slope = np.clip(residual, -delta, delta)
        return float(huber) / delta**2, -(slope @ jacobian) / delta**2

    third = float(rows.log_loss.mean()) - np.log(3)
    starts = [[third, third, x, third, y, 0.1] for x in GRID for y in GRID]
    bounds = list(zip(LOW, HIGH, strict=True))
    options = {"maxiter": 1000, "ftol": 1e-12, "gtol": 1e-9}
    found = [
        minimize(objective, start, jac=True, bounds=bounds, options=options) for start in starts
    ]
    return min(float(one.fun) for one in found) * delta**2


def objective_of(law: FamilyLaw, rows: Rows, delta: float) -> float:
    predicted = np.log(
        law.loss(
            np.exp(rows.log_n + rows.log_n0), np.exp(rows.log_d + rows.log_d0), np.exp(rows.log_p)
        )
    )
    size = np.abs(rows.log_loss - predicted)
    return float(np.where(size <= delta, size**2 / 2, delta * (size - delta / 2)).sum())


def optimum_milliseconds(law: ScalingLaw, rounds: int = 20) -> float:
    """Median time of one optimum with none of its options."""
    took = []
    goal = Goal(num_parameters=64e6, tokens=2e9)
    for _ in range(rounds):
        begin = time.perf_counter()
        optimal_ratios(law, goal)
        took.append(time.perf_counter() - begin)
    return 1e3 * median(took)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--families", type=int, default=5)
    parser.add_argument("--bootstrap", type=int, default=200)
    arguments = parser.parse_args()
    random = np.random.default_rng(0)
    known = known_laws(arguments.families, random)
    table = synthetic_runs(known, arguments.runs, random)
    settings = FitSettings(bootstrap=arguments.bootstrap)

    begin, begin_cpu = time.perf_counter(), time.process_time()
    law = fit_law(table, settings)
    wall, cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
    print(
        f"{arguments.families} families x {arguments.runs} runs, {arguments.bootstrap} refits: "
        f"{wall:.2f} s, {cpu:.2f} CPU s"
    )
    print(f"{'':12}{'gamma':>8}{'known':>8}{'held out':>10}{'objective over L-BFGS-B alone':>32}")
    begin_cpu = time.process_time()
    for name, one in law.families.items():
        rows = rows_of_family(table, name)
        reference = by_scipy_alone(rows, settings.huber_delta)
        print(
            f"{name:12}{one.gamma:8.4f}{known[name].gamma:8.4f}"
            f"{law.quality[name]['held_out_rms']:10.5f}"
            f"{objective_of(one, rows, settings.huber_delta) / reference - 1:32.1e}"
        )
    print(f"L-BFGS-B alone, no refits: {time.process_time() - begin_cpu:.2f} CPU s")
    print(f"optimum: {optimum_milliseconds(law):.1f} ms")


if __name__ == "__main__":
    main()

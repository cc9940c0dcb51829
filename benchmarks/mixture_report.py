"""Tables, figure and numbers of benchmarks/mixture_study.py, out of what its sweeps left behind.

    python -m benchmarks.mixture_report STUDY --out docs      # what the study's last stage does

Writes mixture_study.csv (every loss), mixture_study.md (tables), mixture_study.json (every number
of them) and mixture_study.png. Parts whose runs are not there yet are left out.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.mixture_figure import plot
from benchmarks.mixture_numbers import (
    MixtureResult,
    Prediction,
    SplitTest,
    compare_mixtures,
    partner_effects,
    predictions,
    split_tests,
)
from data.scaling_law.alternatives import exponent_check
from data.scaling_law.law import ScalingLaw
from data.scaling_law.law_checks import check_lines
from data.scaling_law.runs_table import COLUMNS, RunsTable, read_runs
from launch.sweep_folder import TABLE_FILE

SWEEPS = ("main", "disjoint", "confirm")
PAIR_RATIO = 0.4
HEAD = """\
# Tables of the mixture study

Written by `python -m benchmarks.mixture_report`; [science.md](science.md) says what they mean,
under "Does the multilingual scaling law hold for small models?". Losses are nats per token,
standard deviations and partners' effects those of ln L. A *split* is one way to share out what a
family leaves to the others; *largest* is the highest minus the lowest mean of a split; *p* is that
of splits as different from noise alone."""


def report(study: Path, out: Path) -> None:
    """Raises FileNotFoundError where phase 1 has not been collected."""
    tables = {name: read_runs(study / name / TABLE_FILE) for name in SWEEPS if _there(study, name)}
    if "main" not in tables:
        raise FileNotFoundError(f"{study}/main/{TABLE_FILE}: phase 1 has not been collected")
    law_file = study / "law.yaml"
    law = ScalingLaw.load(law_file) if law_file.is_file() else None
    out.mkdir(parents=True, exist_ok=True)
    write_csv(tables, out / "mixture_study.csv")
    sections: list[str] = []
    numbers: dict[str, Any] = {}
    for name in ("main", "disjoint"):
        if name in tables:
            tests = split_tests(tables[name])
            effects = partner_effects(tables[name], PAIR_RATIO)
            numbers[f"hypothesis_{name}"] = [asdict(test) for test in tests]
            numbers[f"partners_{name}"] = effects
            sections += [f"## Hypothesis, corpus `{name}`", split_table(tests)]
            sections.append(partner_table(effects))
    if law is not None:
        sections += ["## The law", law_table(law, tables["main"])]
        sections += ["## Checks", "\n".join(["```", *check_lines(tables["main"], law), "```"])]
        numbers["law"] = {f: asdict(one) for f, one in law.families.items()}
        numbers["quality"] = law.quality
    compared: list[MixtureResult] = []
    predicted: list[Prediction] = []
    if law is not None and "confirm" in tables:
        compared = compare_mixtures(law, tables["main"], tables["confirm"])
        predicted = predictions(law, tables["confirm"])
        numbers["mixtures"] = [asdict(result) for result in compared]
        numbers["predictions"] = [asdict(one) for one in predicted]
        sections += ["## Mixtures", mixture_table(compared)]
        sections += ["## Predicted losses", prediction_table(predicted)]
    text = "\n\n".join([HEAD, *sections])
    (out / "mixture_study.md").write_text(text + "\n", encoding="utf-8")
    text = json.dumps(_without_nan(numbers), indent=1)
    (out / "mixture_study.json").write_text(text + "\n", encoding="utf-8")
    plot(tables, law, compared, predicted, out / "mixture_study.png")
    print(f"wrote mixture_study.csv, .md, .json and .png into {out}")


def _there(study: Path, name: str) -> bool:
    return (study / name / TABLE_FILE).is_file()


def write_csv(tables: dict[str, RunsTable], path: Path) -> None:
    """All rows, with the sweep they are of in front; `read_runs` takes those of one sweep."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["sweep", *COLUMNS])
        writer.writeheader()
        for name, table in tables.items():
            for row in table.rows:
                rounded = {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}
                writer.writerow({"sweep": name, **rounded})


# ---------------------------------------------------------------- tables


def split_table(tests: Sequence[SplitTest]) -> str:
    return _table(
        ["family", "own ratio", "splits x seeds", "std of splits", "std of seeds", "largest", "p"],
        [
            [
                test.family,
                f"{test.ratio:.2f}",
                f"{test.splits} x {test.seeds}",
                f"{test.split_std:.4f}",
                _number(test.seed_std, ".4f"),
                f"{test.largest:.4f}",
                _number(test.p_value, ".2g"),
            ]
            for test in tests
        ],
    )


def partner_table(effects: dict[str, dict[str, float]]) -> str:
    names = list(effects)
    return _table(
        [f"ln L at {PAIR_RATIO}, beside", *names],
        [
            [family, *(_number(of_family.get(name, math.nan), "+.4f") for name in names)]
            for family, of_family in effects.items()
        ],
    )


def law_table(law: ScalingLaw, table: RunsTable) -> str:
    rows = []
    checks = exponent_check(table)
    for family, one in law.families.items():
        gammas = sorted(refit.gamma for refit in law.bootstrap.get(family, []))
        ends = [gammas[int(q * (len(gammas) - 1))] for q in (0.05, 0.95)] if gammas else []
        quality, check = law.quality.get(family, {}), checks.get(family)
        rows.append(
            [
                family,
                *(f"{getattr(one, name):.3g}" for name in ("E", "A", "alpha", "B", "beta")),
                f"{one.gamma:.4f}" + (f" [{ends[0]:.4f}, {ends[1]:.4f}]" if ends else ""),
                f"{check.shared.gamma:.4f} ± {check.shared.std_error:.4f}" if check else "-",
                _number(check.p_value if check else math.nan, ".2g"),
                _number(quality.get("r2", math.nan), ".4f"),
                _number(quality.get("rms", math.nan), ".4f"),
                _number(quality.get("held_out_rms", math.nan), ".4f"),
                _number(quality.get("largest_size_rms", math.nan), ".4f"),
            ]
        )
    heads = ["family", "E", "A", "alpha", "B", "beta", "gamma [90 %]", "gamma, slopes alone"]
    heads += ["p, one gamma", "R2", "rms", "rms, runs left out", "rms, largest N left out"]
    return _table(heads, rows)


def mixture_table(results: Sequence[MixtureResult]) -> str:
    families = list(results[0].ratios)
    heads = ["N", "mixture", *families, "Σ L/L*", "by the law", "minus uniform", "Σ L"]
    return _table(
        heads,
        [
            [
                f"{r.num_parameters:,}",
                r.mixture,
                *(f"{p:.3f}" for p in r.ratios.values()),
                f"{r.normalized:.4f} ± {_number(r.normalized_std, '.4f')} ({r.seeds})",
                f"{r.predicted:.4f}",
                f"{r.against_uniform:+.4f} ± {_number(r.against_uniform_std, '.4f')}",
                f"{r.total:.3f}",
            ]
            for r in results
        ],
    )


def prediction_table(predicted: Sequence[Prediction]) -> str:
    """Errors in ln L by size; the 90 % interval should hold 9 of 10."""
    rows = []
    for size in sorted({one.num_parameters for one in predicted}):
        own = [one for one in predicted if one.num_parameters == size]
        errors = [math.log(one.measured / one.predicted) for one in own]
        inside = sum(one.low <= one.measured <= one.high for one in own)
        rms = math.sqrt(math.fsum(e * e for e in errors) / len(errors))
        rows.append(
            [f"{size:,}", str(len(own)), f"{rms:.4f}", f"{math.fsum(errors) / len(errors):+.4f}",
             f"{inside / len(own):.0%}"]
        )  # fmt: skip
    return _table(["N", "losses", "rms of ln L", "mean of ln L", "in the 90 % interval"], rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(heads)} |", "|---|" + "--:|" * (len(heads) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.6g}")
    return value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, help="the --out of benchmarks.mixture_study")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    given = parser.parse_args()
    try:
        report(given.study, given.out)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Trains twins that differ in their router alone, and compares how they route: dense, SMoE, X-MoE.

    python -m benchmarks.routing_study --seeds 3
    python -m benchmarks.routing_study --corpus CORPUS --steps 1000 model.hidden_size=192

SMoE is Switch (arXiv 2101.03961): linear router, softmax gate, one expert a token. X-MoE (arXiv
2204.09179) scores by cosines in few dimensions. The dense twin has as many active parameters but
for the router's. Twins of one seed see the same batches and start from the same weights outside
their routers, as initial weights depend on the seed and on each parameter's name: their difference
is taken seed by seed.

Each run is a process of its own, `launch/pretrain.py` with the settings below; words after the
options are further settings, given to every run. A run that is complete in --out is not run again.
Writes study.md (tables), study.json (every number) and study.png (curves) into --out.
docs/science.md says what the numbers mean, and what came out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from benchmarks.train_step import cpu_name
from models.config import ModelConfig
from models.parameter_count import ParameterCount, parameter_count
from pretrain.report import Curve, family_of, read_curves

REPOSITORY = Path(__file__).resolve().parents[1]
SETTINGS_FILE, LOG_FILE = "study_settings.json", "output.log"  # in a run's folder

EVALUATIONS, ROUTER_REPORTS = 10, 20  # over a run, evenly spaced


@dataclass(frozen=True)
class Twin:
    name: str
    label: str
    colour: str
    settings: tuple[str, ...]
    sparse: bool = True


DENSE = Twin("dense", "dense", "#666666", ("model.moe.num_experts=0",), sparse=False)
SMOE = Twin("smoe", "SMoE", "#c8552b", ("model.moe.router=linear",))
XMOE = Twin("xmoe", "X-MoE", "#1f5fa8", ("model.moe.router=xmoe",))
TWINS = (DENSE, SMOE, XMOE)
SPARSE = (SMOE, XMOE)
DIFFERENCES = ((SMOE, DENSE), (XMOE, SMOE))  # of twins with the same seed

# for every run; what is said on the command line comes after it and wins
COMMON = (
    "+model=xmoe_tiny",
    "model.moe.num_experts=16",
    "model.moe.router_topk=1",
    "model.moe.router_score_function=softmax",
    "model.moe.aux_loss_coeff=0.01",
    "data.seq_length=128",
    "train.micro_batch_size=16",
    "train.global_batch_size=16",
    "train.eval_sequences=2",
    "optimizer.lr=4e-3",
    "checkpoint.save_interval=0",
    "wandb.mode=disabled",
)

# of a run's last report or evaluation: metric, its name in the table
MEASURES = (
    ("eval/loss", "validation loss, nats per token"),
    ("router/load_max", "busiest expert, × even share"),
    ("router/unused_experts", "unused experts, all layers"),
    ("router/balance_loss", "balance loss (even: 1)"),
    ("router/entropy", "routing entropy, nats"),
    ("router/collapse", "Tr(Σ_W pinv(Σ_B)) (smaller: more collapse)"),
    ("router/fluctuation", "tokens that moved since the last evaluation"),
)

Loads = list[list[list[int]]]  # choices in one interval, by layer, family, expert


class BrokenRun(ValueError):
    """A run's folder that does not hold a whole run."""


@dataclass(frozen=True)
class Run:
    """What a finished run left behind."""

    twin: str
    seed: int
    model: ModelConfig
    curves: dict[str, Curve]  # by metric
    loads: dict[int, Loads]  # by step: choices since the step before; {} for a dense model

    def final(self, metric: str) -> float:
        """The metric at the last step; NaN where the run has none."""
        steps, values = self.curves.get(metric, ([], []))
        last_step = self.curves["eval/loss"][0][-1]
        return values[-1] if steps and steps[-1] == last_step else math.nan


@dataclass(frozen=True)
class Spread:
    """Of n values that are no NaN: mean and standard deviation (n - 1; NaN for one value)."""

    mean: float
    deviation: float
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        there = [value for value in values if not math.isnan(value)]
        return cls(
            mean=mean(there) if there else math.nan,
            deviation=stdev(there) if len(there) > 1 else math.nan,
            n=len(there),
        )


@dataclass(frozen=True)
class Row:
    """One measure of every twin, and of DIFFERENCES taken seed by seed, in their order."""

    name: str
    twins: dict[str, Spread]
    differences: list[Spread]


# ---------------------------------------------------------------- running


@dataclass(frozen=True)
class Job:
    """One run to be made."""

    twin: Twin
    seed: int
    steps: int
    folder: Path
    settings: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.twin.name} seed {self.seed}"


def plan_jobs(given: argparse.Namespace) -> list[Job]:
    """Seed by seed, so that a study cut short has whole sets of twins."""
    data = [f"data.corpus={given.corpus.resolve()}"] if given.corpus else []
    data += [f"data.tokenizer={given.tokenizer.resolve()}"] if given.tokenizer else []
    length = [
        f"train.train_steps={given.steps}",
        f"train.eval_interval={given.steps // EVALUATIONS}",
        f"train.router_health_interval={given.steps // ROUTER_REPORTS}",
        f"schedule.lr_warmup_steps={given.steps // 10}",
    ]
    return [
        Job(
            twin,
            seed,
            given.steps,
            given.out / f"{twin.name}_seed{seed}",
            (*COMMON, *length, *data, *given.settings, *twin.settings, f"train.seed={seed}"),
        )
        for seed in range(1, given.seeds + 1)
        for twin in TWINS
    ]


def refuse_other_settings(jobs: Sequence[Job]) -> None:
    """Raises ValueError where a folder holds a run with settings other than its job's."""
    for job in jobs:
        path = job.folder / SETTINGS_FILE
        there = json.loads(path.read_text(encoding="utf-8")) if path.exists() else job.settings
        changed = sorted(set(there) ^ set(job.settings))
        if changed:
            raise ValueError(
                f"--out={job.folder.parent}: {job.folder.name} was run with other settings "
                f"({', '.join(changed)}); name another folder, or remove this one"
            )


def train(job: Job, threads: int) -> str | None:
    """Run the job unless it is complete already; why it failed, or None."""
    if _is_complete(job):
        print(f"{job.name}: complete already", file=sys.stderr, flush=True)
        return None
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / SETTINGS_FILE).write_text(json.dumps(job.settings, indent=1) + "\n")
    began = time.monotonic()
    with open(job.folder / LOG_FILE, "w", encoding="utf-8") as log:
        script = REPOSITORY / "launch" / "pretrain.py"
        ended = subprocess.run(
            [sys.executable, str(script), *job.settings, f"run_dir={job.folder.resolve()}"],
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    seconds = time.monotonic() - began
    if ended.returncode:
        lines = (job.folder / LOG_FILE).read_text(encoding="utf-8").strip().splitlines()
        reason = lines[-1] if lines else "it said nothing"
        return f"exit code {ended.returncode} after {seconds:.0f} s: {reason}"
    print(f"{job.name}: trained in {seconds:.0f} s", file=sys.stderr, flush=True)
    return None


def _is_complete(job: Job) -> bool:
    try:
        read_run(job.folder, job.twin, job.seed, job.steps)
    except BrokenRun:
        return False
    return True


# ---------------------------------------------------------------- reading


def read_run(folder: Path, twin: Twin, seed: int, steps: int) -> Run:
    """The run in `folder`. Raises BrokenRun where it is not a whole run of so many steps."""
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise BrokenRun(f"{folder}: no metrics.jsonl; the run did not start")
    curves = read_curves(metrics)
    for name in ("eval/loss", "router/load_max") if twin.sparse else ("eval/loss",):
        last = curves[name][0][-1] if name in curves else None
        if last != steps:
            reached = "is missing" if last is None else f"ends at step {last}"
            raise BrokenRun(
                f"{folder}: {name} {reached} and must reach step {steps}; run the study again"
            )
    loads = _read_loads(folder / "router.jsonl") if twin.sparse else {}
    if twin.sparse and steps not in loads:
        raise BrokenRun(f"{folder}: router.jsonl has no line of step {steps}; remove the folder")
    model = OmegaConf.merge(
        OmegaConf.structured(ModelConfig), OmegaConf.load(folder / "config.yaml").model
    )
    settings: Any = OmegaConf.to_object(model)
    return Run(twin.name, seed, settings, curves, loads)


def _read_loads(path: Path) -> dict[int, Loads]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {table["step"]: table["load"] for table in map(json.loads, lines)}


# ---------------------------------------------------------------- arithmetic


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's correlation of two vectors; NaN where one of them is constant."""
    x, y = a - a.mean(), b - b.mean()
    length = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / length if length else math.nan


def load_correlations(loads: Sequence[Loads]) -> list[float]:
    """Inter-run consistency (arXiv 2204.09179 section 4.5), of each pair of runs.

    Pearson's correlation of the two vectors of expert loads, mean over layers. It takes expert k to
    be the same expert in each run, as in fine-tunings of one model. Runs from different seeds have
    no such names in common: 0 is what to expect of them.
    """
    return _over_pairs(loads, lambda families: np.asarray(families).sum(0))


def family_agreements(loads: Sequence[Loads]) -> list[float]:
    """Do two runs agree on which families share experts? Of each pair of runs.

    Pearson's correlation of the two runs' `overlaps`, mean over layers: it does not depend on how
    experts are numbered. Not in the paper.
    """
    return _over_pairs(loads, overlaps)


def overlaps(families: Sequence[Sequence[int]]) -> np.ndarray:
    """Choices [F, E] → of each pair of families the share of tokens that meet: Σ_e min(p_e, q_e).

    p and q are the two families' shares of experts: 1 where they are sent alike, 0 where no expert
    has tokens of both. Families without tokens are left out.
    """
    counts = np.asarray([family for family in families if sum(family)], float)
    shares = counts / counts.sum(1, keepdims=True)
    first, second = np.triu_indices(len(shares), k=1)
    return np.minimum(shares[first], shares[second]).sum(1)


def _over_pairs(loads: Sequence[Loads], vector: Callable[[Any], np.ndarray]) -> list[float]:
    vectors = [[vector(layer) for layer in layers] for layers in loads]
    return [
        mean(pearson(x, y) for x, y in zip(one, other, strict=True))
        for one, other in itertools.combinations(vectors, 2)
    ]


def paired(runs: Sequence[Run], metric: str, plus: Twin, minus: Twin) -> list[float]:
    """The first twin's last value minus the second's, of each seed that both have."""
    values = {(run.twin, run.seed): run.final(metric) for run in runs}
    seeds = sorted(seed for twin, seed in values if twin == plus.name)
    return [
        values[plus.name, seed] - values[minus.name, seed]
        for seed in seeds
        if (minus.name, seed) in values
    ]


def summarize(runs: Sequence[Run]) -> list[Row]:
    """The rows of the table over all tokens."""
    rows = [metric_row(runs, metric, name) for metric, name in MEASURES]
    consistency = (
        ("inter-run consistency: loads, experts as numbered", load_correlations),
        ("inter-run consistency: which families share experts", family_agreements),
    )
    for name, measure in consistency:
        spreads = {twin.name: Spread.of(measure(last_loads(runs, twin))) for twin in SPARSE}
        rows.append(Row(name, spreads, [Spread.of([])] * len(DIFFERENCES)))
    return rows


def summarize_families(runs: Sequence[Run]) -> list[Row]:
    """Validation loss of every family, one row each."""
    metrics = sorted({name for run in runs for name in run.curves if family_of(name)})
    return [metric_row(runs, metric, family_of(metric) or "") for metric in metrics]


def metric_row(runs: Sequence[Run], metric: str, name: str) -> Row:
    spreads = {
        twin.name: Spread.of(run.final(metric) for run in runs if run.twin == twin.name)
        for twin in TWINS
    }
    differences = [Spread.of(paired(runs, metric, *twins)) for twins in DIFFERENCES]
    return Row(name, spreads, differences)


def last_loads(runs: Sequence[Run], twin: Twin) -> list[Loads]:
    return [run.loads[max(run.loads)] for run in runs if run.twin == twin.name]


def parameter_counts(runs: Sequence[Run]) -> dict[str, ParameterCount]:
    """Of each twin; the embedding counts one row, and is left out of what is shown."""
    return {run.twin: parameter_count(run.model, vocab_size=1) for run in runs}


# ---------------------------------------------------------------- showing


def markdown_table(heading: str, rows: Sequence[Row]) -> str:
    """Mean ± standard deviation (number of values) of each twin and of differences."""
    labels = [twin.label for twin in TWINS]
    labels += [f"{plus.label} − {minus.label}" for plus, minus in DIFFERENCES]
    lines = [f"| {heading} | {' | '.join(labels)} |", "|---|" + "--:|" * len(labels)]
    for row in rows:
        cells = [_cell(row.twins.get(twin.name)) for twin in TWINS]
        cells += [_cell(spread, "+") for spread in row.differences]
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(spread: Spread | None, sign: str = "") -> str:
    if spread is None or not spread.n:
        return "-"
    deviation = "" if math.isnan(spread.deviation) else f" ± {spread.deviation:.3f}"
    return f"{spread.mean:{sign}.3f}{deviation} ({spread.n})"


def describe_parameters(runs: Sequence[Run]) -> str:
    """One line a twin: parameters without the embedding, and those a token goes through."""
    parts = []
    for name, count in parameter_counts(runs).items():
        active = count.non_embedding - count.experts + count.active_experts
        parts.append(f"{name} {count.non_embedding:,}, active {active:,}")
    return "Parameters without the embedding: " + "; ".join(parts) + "."


def plot(runs: Sequence[Run], path: Path) -> None:
    """Curves over optimizer steps: mean over seeds, in a band from the smallest to the largest."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # a Figure with its own canvas: pyplot would keep global state and choose a display
    figure: Any = Figure(figsize=(17, 7.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 4).flat
    for axes, (title, curves) in zip(panels, _panels(runs).items(), strict=True):
        axes.set_title(title, loc="left", fontsize=10)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.xaxis.get_major_locator().set_params(integer=True)
        for twin in TWINS:
            _draw_band(axes, twin, curves.get(twin.name, []))
        if "minus" in title:
            axes.axhline(0, color="0.4", linewidth=0.8)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=3, frameon=False, fontsize=10)
    seeds = len({run.seed for run in runs})
    figure.supxlabel(
        f"optimizer step; line: mean over {seeds} seeds, band: all of them", fontsize=9
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _panels(runs: Sequence[Run]) -> dict[str, dict[str, list[Curve]]]:
    """Title → twin → one curve for each seed, or each pair of seeds."""

    def curves(metric: str) -> dict[str, list[Curve]]:
        return {
            twin.name: [
                run.curves[metric] for run in runs if run.twin == twin.name and metric in run.curves
            ]
            for twin in TWINS
        }

    dense = {run.seed: run for run in runs if run.twin == DENSE.name}
    against_dense = {
        twin.name: [
            _difference(run.curves["eval/loss"], dense[run.seed].curves["eval/loss"])
            for run in runs
            if run.twin == twin.name and run.seed in dense
        ]
        for twin in SPARSE
    }
    return {
        "Validation loss, nats per token": curves("eval/loss"),
        "Validation loss minus the dense twin's": against_dense,
        "Busiest expert, x even share": curves("router/load_max"),
        "Balance loss (even: 1)": curves("router/balance_loss"),
        "Routing entropy, nats": curves("router/entropy"),
        "Tr(Σ_W pinv(Σ_B)), small: collapse": curves("router/collapse"),
        "Share of tokens that moved": curves("router/fluctuation"),
        "Agreement of runs on which families share experts": {
            twin.name: agreement_curves(runs, twin) for twin in SPARSE
        },
    }


def agreement_curves(runs: Sequence[Run], twin: Twin) -> list[Curve]:
    """`family_agreements` over steps, one curve for each pair of seeds."""
    own = [run for run in runs if run.twin == twin.name]
    steps = sorted(set.intersection(*(set(run.loads) for run in own))) if own else []
    by_step = [family_agreements([run.loads[step] for run in own]) for step in steps]
    return [(steps, list(values)) for values in zip(*by_step, strict=True)]


def _difference(one: Curve, other: Curve) -> Curve:
    there = dict(zip(*other, strict=True))
    steps = [step for step in one[0] if step in there]
    return steps, [value - there[step] for step, value in zip(*one, strict=True) if step in there]


def _draw_band(axes: Any, twin: Twin, curves: Sequence[Curve]) -> None:
    if not curves:
        return
    steps = sorted(set.intersection(*(set(steps) for steps, _ in curves)))
    values = [dict(zip(*curve, strict=True)) for curve in curves]
    at = np.asarray([[seed[step] for seed in values] for step in steps])  # [steps, seeds]
    axes.plot(
        steps, at.mean(1), color=twin.colour, linewidth=1.8, marker="o", markersize=3,
        label=twin.label,
    )  # fmt: skip
    axes.fill_between(steps, at.min(1), at.max(1), color=twin.colour, alpha=0.2, linewidth=0)


def document(given: argparse.Namespace, runs: Sequence[Run]) -> dict[str, Any]:
    """Every number of the study, as JSON takes it: NaN is null."""
    metrics = [name for name, _ in MEASURES]
    families = sorted({name for run in runs for name in run.curves if family_of(name)})
    tables = {"all": summarize(runs), "families": summarize_families(runs)}
    return _without_nan(
        {
            "machine": f"{cpu_name()}, {os.cpu_count()} CPUs",
            "steps": given.steps,
            "corpus": given.corpus.resolve().name if given.corpus else "of the package",
            "settings": [*COMMON, *given.settings],
            "twins": {twin.name: list(twin.settings) for twin in TWINS},
            "tables": {name: [asdict(row) for row in rows] for name, rows in tables.items()},
            "runs": [
                {
                    "twin": run.twin,
                    "seed": run.seed,
                    "final": {name: run.final(name) for name in (*metrics, *families)},
                    "curves": {name: run.curves[name] for name in metrics if name in run.curves},
                    "last_loads": run.loads[max(run.loads)] if run.loads else None,
                }
                for run in runs
            ],
        }
    )


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    if isinstance(value, float):
        return None if math.isnan(value) else round(value, 6)
    return value


# ---------------------------------------------------------------- the command


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--corpus", type=Path, default=None,
        help="a folder that `python -m data.corpora build` made (default: the text that ships "
        "with the package)",
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer", type=Path, default=None,
        help="a tokenizer.json (default: the one that ships with the package)",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=3, help="runs of each twin (default: 3)")
    parser.add_argument("--steps", type=int, default=400, help="of each run (default: 400)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--out", type=Path, default=Path("runs/routing_study"))
    parser.add_argument("settings", nargs="*", help="SETTING=VALUE, for every run")
    given = parser.parse_args()
    for option in ("seeds", "steps", "jobs"):
        if getattr(given, option) < 1:
            parser.error(f"--{option}={getattr(given, option)}: at least 1 is needed")
    if given.steps % ROUTER_REPORTS:
        parser.error(
            f"--steps={given.steps} must be a multiple of {ROUTER_REPORTS}, or the last evaluation "
            "is nearer to the one before than others are"
        )
    for option in ("corpus", "tokenizer"):
        path = getattr(given, option)
        if path is not None and not path.exists():
            parser.error(f"--{option}={path} does not exist")
    return given


def main() -> int:
    given = parse_arguments()
    jobs = plan_jobs(given)
    try:
        refuse_other_settings(jobs)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    threads = max(1, (os.cpu_count() or 1) // given.jobs)
    with ThreadPoolExecutor(given.jobs) as pool:
        failures = list(pool.map(lambda job: train(job, threads), jobs))
    runs, problems = [], []
    for job, failure in zip(jobs, failures, strict=True):
        try:
            runs.append(read_run(job.folder, job.twin, job.seed, job.steps))
        except BrokenRun as error:
            problems.append(f"{job.name}: {failure or error}")
    for problem in problems:
        print(f"FAILED {problem}", file=sys.stderr)
    if not runs:
        return 1
    text = "\n\n".join(
        [
            markdown_table("all tokens", summarize(runs)),
            markdown_table("validation loss", summarize_families(runs)),
            "Mean ± standard deviation (number of runs, or of pairs); differences seed by seed.",
            describe_parameters(runs),
            *(f"- left out: {problem}" for problem in problems),
        ]
    )
    print(text, flush=True)
    (given.out / "study.md").write_text(text + "\n", encoding="utf-8")
    numbers = json.dumps(document(given, runs), ensure_ascii=False)
    (given.out / "study.json").write_text(numbers + "\n", encoding="utf-8")
    plot(runs, given.out / "study.png")
    print(f"\nwritten: {given.out}/study.md, study.json, study.png", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

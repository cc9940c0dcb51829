"""The best mixture for a model: fits the multilingual scaling law to a sweep and solves for ratios.

    python -m launch.fit_mixture SWEEP --target magneto_1b --tokens 300B
        [--objective normalized|sum|weights] [--weights germanic=1,indic=2] [--at-least 0.02]
        [--max-epochs 4] [--supply germanic=90B,indic=5B] [--output DIR] [data.store_dir=STORES ...]

Reads SWEEP/runs.parquet (or a .parquet or .csv of runs), which `python -m launch.sweep` writes, and
writes into the output folder (SWEEP/fit/TARGET-TOKENS-OBJECTIVE):

    law.yaml          the fitted law (data/scaling_law/law.py)
    mixture.yaml      the optimum, for data/mixture=.../mixture.yaml on a command line
    comparison.json   the table that is printed: the optimum beside other mixtures
    comparison.png    the same as a picture

Exit status: 0; 2 for what does not fit. Imports neither torch nor megatron-core.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from data.interrupted import say_interrupted

if __name__ == "__main__":
    say_interrupted()  # also amid the imports below

import yaml  # type: ignore[import-untyped]

from data.command_line import run_command
from data.mixture_law import SPARSE
from data.plan import short
from data.scaling_law.fit import fit_law
from data.scaling_law.identify import UnderdeterminedError
from data.scaling_law.law import ScalingLaw
from data.scaling_law.law_checks import check_lines
from data.scaling_law.law_table import describe_law
from data.scaling_law.mixture_table import (
    MixtureTable,
    as_json,
    baselines,
    compare_mixtures,
    describe,
)
from data.scaling_law.optimum import Objective
from data.scaling_law.runs_table import RunsTable, read_runs
from launch.fit_arguments import Request, read_request, supply_of
from launch.sweep_provenance import data_of_runs
from parallel.new_folder import new_folder


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    given = _parser().parse_intermixed_args(words)
    return run_command("python -m launch.fit_mixture", lambda: _run(given, words))


def _run(given: argparse.Namespace, words: list[str]) -> int:
    request = read_request(given)
    table = read_runs(request.table)
    families = request.fit.families or table.families
    supply, source = supply_of(request, table, families)
    goal = request.goal(supply)
    goal.check(families)
    law = _fit(request, table)
    print(f"{request.table}: {len(table.runs)} runs, {len(law.provenance['runs'])} fitted\n")
    print(describe_law(law, request.level))
    if given.checks:
        print("\n".join([*check_lines(table, law, request.fit), ""]))
    others = baselines(families, supply, goal.tokens, goal.max_epochs)
    mixtures = compare_mixtures(law, goal, others, request.level)
    print(
        f"Mixtures for {request.target.name}: N = {goal.num_parameters:,} parameters without the "
        f"embedding, D = {short(goal.tokens)} tokens\nobjective: {goal.objective.value}; sizes of "
        f"the families: {source}\n"
    )
    print(describe(mixtures))
    _print_warnings(request, law, mixtures)
    _write(request, law, mixtures, words)
    print(
        f"\nWritten: {request.output}/{{law.yaml, mixture.yaml, comparison.json, comparison.png}}"
    )
    print(f"Train with it:\n  {training_command(request)}")
    return 0


def _fit(request: Request, table: RunsTable) -> ScalingLaw:
    try:
        law = fit_law(table, request.fit, source=str(request.table.resolve()))
    except UnderdeterminedError as error:
        if not error.enough:
            raise
        fixed = ",".join(f"{name}={value:g}" for name, value in error.enough.items())
        raise ValueError(f"{error} (here: --fix {fixed})") from None
    data, mixed = data_of_runs(request.table, law.provenance["runs"])
    law.provenance["warnings"] += mixed
    return replace(law, provenance=law.provenance | ({"data": data} if data else {}))


def _print_warnings(request: Request, law: ScalingLaw, mixtures: MixtureTable) -> None:
    goal = mixtures.goal
    lines = law.extrapolation(goal.num_parameters, goal.tokens, mixtures.optimum.ratios)
    if request.target.model is not None and request.target.model.moe.num_experts:
        lines.append(f"{request.target.name} {SPARSE}")
    lines += request.doubts
    if lines:
        print("\nOutside of what was fitted:\n" + "\n".join(f"  {line}" for line in lines))


def _write(request: Request, law: ScalingLaw, mixtures: MixtureTable, words: list[str]) -> None:
    from data.scaling_law.mixture_plot import plot_mixtures  # matplotlib takes a second to import

    with new_folder(request.output) as folder:
        law.save(folder / "law.yaml")
        (folder / "mixture.yaml").write_text(_mixture_file(request, mixtures, words), "utf-8")
        content = json.dumps(as_json(mixtures), indent=1, ensure_ascii=False)
        (folder / "comparison.json").write_text(content + "\n", "utf-8")
        plot_mixtures(mixtures, folder / "comparison.png")


def _mixture_file(request: Request, mixtures: MixtureTable, words: list[str]) -> str:
    """Settings of data.mixture; the law is named as its neighbour, so the folder may move."""
    goal = mixtures.goal
    settings: dict[str, Any] = {"weighting": "ratios", "ratios": mixtures.optimum.ratios}
    settings |= request.family_rule | {"law": "law.yaml"}
    return (
        f"# The optimum by law.yaml for N = {goal.num_parameters:,} parameters without the "
        f"embedding and\n# D = {goal.tokens:.12g} tokens; objective: {goal.objective.value}. "
        "Written by\n"
        f"#   python -m launch.fit_mixture {shlex.join(words)}\n"
        + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=1000)
    )


def training_command(request: Request) -> str:
    """What starts the training that the mixture is for; its steps make the tokens of the goal."""
    settings = request.settings
    try:
        tokens_per_step = settings.global_batch_size * settings.seq_length
        steps = str(max(1, round(request.tokens / tokens_per_step)))
    except ValueError:  # nobody said how long a sequence is
        steps = "STEPS"
    model = request.target.name if request.target.model else "MODEL"
    words = [
        f"+model={model}",
        f"data/mixture={request.output / 'mixture.yaml'}",
        *request.words,
        f"train.train_steps={steps}",
    ]
    return f"torchrun --standalone --nproc-per-node 1 launch/pretrain.py {shlex.join(words)}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch.fit_mixture",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "words",
        nargs="*",
        metavar="SWEEP | SETTING=VALUE",
        help="a sweep's folder or a table of runs, and the launcher's settings of data and batch",
    )
    add("--target", required=True, help="a model of conf/model, or parameters, as in 1.2B")
    add("--tokens", required=True, help="tokens of the training, as in 300B, 50e9, 1.5T")
    add(
        "--objective",
        choices=[objective.value for objective in Objective],
        help="normalized: sum of L / L* (default); sum: of L; weights: of w L",
    )
    add("--weights", metavar="FAMILY=W,...", help="w of families; those not named count 1")
    add("--at-least", default="0", metavar="RATIO", help="of every family, or FAMILY=RATIO,...")
    add("--max-epochs", metavar="N", help="most passes over a family's text")
    add(
        "--supply",
        metavar="FAMILY=TOKENS,...",
        help="text there is; default: of data.store_dir, or what the sweep's runs passed over",
    )
    add("--output", metavar="DIR", help="default: SWEEP/fit/TARGET-TOKENS-OBJECTIVE")
    add("--level", default="0.9", help="of all intervals (0.9)")
    fit = parser.add_argument_group("the fit")
    fit.add_argument("--families", metavar="A,B,...", help="only these")
    fit.add_argument(
        "--leave-out",
        default="confirm",
        metavar="PURPOSE,...",
        help="runs that are not fitted, by what they were for (confirm)",
    )
    fit.add_argument("--fix", metavar="E=0,...", help="parameters to set for all families")
    fit.add_argument("--held-out", default="5", metavar="FOLDS", help="0: no held-out error (5)")
    fit.add_argument("--bootstrap", default="200", metavar="REFITS", help="0: no intervals (200)")
    fit.add_argument(
        "--checks", action="store_true", help="print what the runs say about the law's assumptions"
    )
    fit.add_argument("--seed", default="0", help="of resamples and folds (0)")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""Everything about a launch that can be found wrong without launching it.

    python -m launch.check +model=magneto_1b parallel=tp8_sp --nodes 4 --gpus-per-node 8
    python -m launch.check +experiment=demo cluster=gpu8_infiniband nodes=1 --device h100-80gb
    python -m launch.check +experiment=demo --processes 4 --json

Takes the words of launch/pretrain.py, and those of launch.slurm where cluster=NAME is among them.
Looks at settings, layout, text, checkpoints, disk, memory, SLURM and W&B; starts nothing, needs no
GPU and no network, and says all that is wrong at once. docs/check.md tells what is looked at.

Exit status: 0 sound; 1 there are warnings, with --strict; 2 there are errors. Imports neither torch
nor megatron-core.
"""

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from data.interrupted import say_interrupted

if __name__ == "__main__":
    say_interrupted()  # also amid the imports below

from launch.check_checkpoints import check_checkpoints
from launch.check_data import DataFacts, check_data
from launch.check_disk import check_room
from launch.check_engine import check_engine
from launch.check_flops import check_flops
from launch.check_machines import Machines, check_tensor_ranks, plan
from launch.check_memory import check_memory
from launch.check_paths import path_of
from launch.check_plausibility import check_plausibility
from launch.check_report import Report, as_json, describe
from launch.check_scale import check_scale
from launch.check_slurm import check_job, check_time
from launch.cluster_origins import cluster_origins, job_origins
from launch.command_line import add_config_dir, parse_words, words_parser
from launch.composition import (
    Composition,
    compose_what_fits,
    left_out_a_model,
)
from launch.config import ClusterConfig
from launch.findings import ERROR, WARNING, Findings, accused, many
from launch.nearest_layout import nearest_layout
from launch.repeated_words import repeated
from launch.schema import broken_rules_across_rooms, build
from launch.site_settings import cluster_that_fits
from launch.slurm import Wish, searched, sort_words
from launch.slurm_script import Job
from parallel.config import ConfigError
from pretrain.config import PretrainConfig
from pretrain.walltime import walltime_seconds

_LAYOUT_SETTINGS = ("parallel.", "train.global_batch_size=", "train.micro_batch_size=")


def main(arguments: Sequence[str] | None = None) -> int:
    given, problems = parse_words(_parser(), arguments)
    machines = Machines(given.processes, given.nodes, given.gpus_per_node, given.device)
    report = check(given.words, machines, config_dir=given.config_dir, known=problems)
    if given.json:
        _say(json.dumps(as_json(report), indent=1, ensure_ascii=False))
    else:
        _say("\n".join(describe(report, everything=given.provenance)))
    if report.of(ERROR):
        return 2
    return 1 if given.strict and report.of(WARNING) else 0


def _say(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # whoever reads has read enough, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at its end


def _parser() -> argparse.ArgumentParser:
    parser = words_parser("python -m launch.check", __doc__)
    add_config_dir(parser)
    many = parser.add_argument_group(
        "how many processes; by default as few as the layout needs, or what cluster= and nodes= say"
    )
    many.add_argument("--processes", type=_count, metavar="N")
    many.add_argument("--nodes", type=_count, metavar="N")
    many.add_argument("--gpus-per-node", type=_count, metavar="N", help="processes on each node")
    parser.add_argument(
        "--device", metavar="NAME", help="whether it fits: h100-80gb, a100-40gb, ... or 80GiB"
    )
    parser.add_argument("--strict", action="store_true", help="exit with 1 for warnings")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument(
        "--provenance", action="store_true", help="where every value comes from, defaults too"
    )
    return parser


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"{text} must be a whole number, 1 or more, as in 8")
    return int(text)


def check(
    words: Sequence[str],
    machines: Machines | None = None,
    *,
    config_dir: str | None = None,
    known: Sequence[str] = (),
) -> Report:
    """Looks at everything that these words on a command line would start.

    known: what is wrong besides.
    """
    began, machines, findings = time.perf_counter(), machines or Machines(), Findings()
    wish = sort_words(words)
    findings.errors("settings", [*known, *wish.problems])
    hidden: list[str] = []
    try:
        hidden = searched(config_dir)
    except ConfigError as error:
        findings.errors("settings", error.problems)
    composed = compose_what_fits(wish.training, hidden)
    twice = repeated([word for word in words if word not in composed.refused])
    findings.warnings("settings", twice)
    of_words = [*known, *wish.problems, *twice]
    findings.errors("settings", composed.problems)
    config, broken = _config(composed, findings)
    cluster, of_cluster = _cluster(wish)
    findings.errors("slurm", of_cluster)
    planned = plan(config, wish, words, machines, cluster, findings)
    legal, data = False, DataFacts()
    if config is not None:
        legal = _layout(config, planned.processes, broken, findings)
        check_tensor_ranks(config, planned, findings)
        check_engine(config, machines.device, cluster, findings)
        # Values that break their own rules, which has been told, make nonsense of what follows.
        # Most of it can be looked at all the same; what cannot ends with an error of arithmetic.
        guard = _nonsense_is_told if findings.of(ERROR) else nullcontext
        with guard():
            check_plausibility(config, findings, composed.typed)
        with guard():
            check_scale(config, planned.processes, findings)
        with guard():
            check_data(config, data, findings)
        with path_of("run_dir", config.run_dir, findings):
            with guard():
                check_checkpoints(config, data, findings)
            with guard():
                check_room(config, data.vocab_size, planned.nodes, findings)
            with guard():
                _time(config, cluster, wish, planned.nodes, findings)
    sound = config if legal else None
    check_flops(sound, planned.processes, data.vocab_size, findings)
    check_memory(sound, planned, data.vocab_size, machines.device, cluster, findings)
    findings.forget_about(composed.lost, but=[*of_words, *composed.problems])
    findings.forget_about(accused(broken), but=[*of_words, *broken])
    findings.forget_about(accused(of_cluster), but=[*of_words, *of_cluster])
    name = config.model.name if config else None
    report = Report(planned.processes, planned.how_many, name, words, findings.all)
    report.origins = list(composed.origins.values())
    options = ["nodes"] if machines.nodes is not None else []
    report.origins += job_origins(words, planned.nodes, options, wish.chain)
    report.origins += cluster_origins(cluster, wish) if cluster is not None else []
    report.seconds = time.perf_counter() - began
    return report


@contextmanager
def _nonsense_is_told() -> Iterator[None]:
    with warnings.catch_warnings(), suppress(ArithmeticError, ValueError):
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of the same arithmetic
        yield


def _time(
    config: PretrainConfig,
    cluster: ClusterConfig | None,
    wish: Wish,
    nodes: int | None,
    findings: Findings,
) -> None:
    """The job, where there is to be one, and the time it has."""
    own = config.fault_tolerance.walltime
    if cluster is not None:
        python = cluster.python or sys.executable
        job = Job(
            config=config,
            cluster=cluster,
            nodes=nodes or wish.nodes,
            words=wish.training,
            folder=Path.cwd(),
            python=python,
        )
        check_job(job, findings)
        setting = f"cluster.walltime={cluster.walltime}"
        check_time(config, walltime_seconds(cluster.walltime), setting, findings)
    elif own is not None:
        check_time(config, walltime_seconds(own), f"fault_tolerance.walltime={own}", findings)


def _config(composed: Composition, findings: Findings) -> tuple[PretrainConfig | None, list[str]]:
    """The settings as far as they can be had, and what their own classes say of them."""
    if composed.cfg is None:
        return None, []
    config, problems = build(composed.cfg, composed.words)
    if left_out_a_model(composed):
        problems = [line for line in problems if not line.startswith("no model is chosen")]
    without = {f"{name} has no value" for name in composed.of_files.settings}  # it did not fit
    problems = [line for line in problems if line not in without]
    findings.errors("settings", problems)
    return config, problems


def _cluster(wish: Wish) -> tuple[ClusterConfig | None, list[str]]:
    """The site without the words that do not fit it, and what is wrong with these."""
    if wish.cluster is None and not wish.settings and wish.chain == 1:
        return None, []
    try:
        return cluster_that_fits(wish.cluster, wish.settings)
    except ConfigError as error:
        return None, list(error.problems)


def _layout(config: PretrainConfig, processes: int, known: list[str], findings: Findings) -> bool:
    """Holds the settings against the rules across rooms; whether no rule at all is broken.

    known: what is told of them already.
    """
    sound = not findings.of(ERROR)
    broken = [
        problem.replace(" started;", " planned;").replace(" with torchrun --nproc-per-node", "")
        for problem in broken_rules_across_rooms(config, processes, known)
    ]
    of_layout = [line for line in broken if line.startswith(_LAYOUT_SETTINGS)]
    findings.errors("layout", of_layout)
    findings.errors("settings", [line for line in broken if line not in of_layout])
    if of_layout:
        try:
            words = nearest_layout(config, processes)
        except (ArithmeticError, ValueError):  # sizes of 0 and the like, told already
            words = []
        if words:
            findings.notes(
                "layout",
                [
                    f"the nearest layout that works on {many(processes, 'process')}: "
                    f"{' '.join(words)}"
                ],
            )
    return sound and not broken


if __name__ == "__main__":
    sys.exit(main())

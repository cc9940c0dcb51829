"""Sweeps for the multilingual scaling law: design them, run them, collect their table.

    python -m launch.sweep design laptop --out runs/laptop      # what it costs; starts nothing
    python -m launch.sweep run runs/laptop                      # again: goes on where it was
    python -m launch.sweep status runs/laptop
    python -m launch.sweep collect runs/laptop                  # writes runs/laptop/runs.parquet

A design is a file of conf/sweep, or a YAML file of yours; SETTING=VALUE words change it, as in
grid.points=12. `run` starts trainings on this machine, several at a time; `run --multirun` shows
the same as one command of Hydra's, which `--slurm` submits as SLURM jobs. See docs/scaling_law.md.
Imports neither torch nor megatron-core.
"""

import argparse
import shlex
import sys
from collections.abc import Collection, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from data.interrupted import say_interrupted

if __name__ == "__main__":
    say_interrupted()  # also amid the imports below

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.folder_lock import FolderBusyError, FolderLock
from data.open_mixture import prepare
from data.scaling_law.design import design
from data.scaling_law.sweep_config import SweepConfig, read_sweep
from launch.findings import many
from launch.near_names import closest
from launch.setting_names import CONF
from launch.sweep_collect import check_evaluation, collect, evaluation_tokens, family_tokens
from launch.sweep_devices import most_jobs, usable_gpus
from launch.sweep_folder import (
    BEGUN,
    CARRIED_ON,
    DONE,
    FAILED,
    SweepFolder,
    compose_run,
    describe_cost,
    read_sweep_folder,
    run_seconds,
    settings_of,
    shapes_of,
    write_sweep_folder,
)
from launch.sweep_runner import Runner, usable_cores
from launch.sweep_slurm import LAUNCHER, SlurmJobs, multirun_command, queued, slurm_words, too_short
from parallel.config import ConfigError
from pretrain.config import PretrainConfig
from pretrain.progress import format_duration

NOTHING_TO_START = "every run is finished, at work or failed (--retry); there is nothing to start"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0; 1 where runs are left to do, of status where one has failed; 2 for what the user
    has to mend."""
    given = _parser().parse_intermixed_args(arguments)
    try:
        commands: dict[str, Any] = {
            "design": _design,
            "run": _run,
            "status": _status,
            "collect": _collect,
        }
        return int(commands[given.command](given))
    except ConfigError as error:
        problems: Sequence[str] = error.problems
    except FolderBusyError as error:
        problems = [f"{error}; two runners of one sweep would start its runs twice"]
    except (OSError, ValueError) as error:
        problems = str(error).splitlines()
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=("design", "run", "status", "collect"))
    parser.add_argument("what", help="design: a name in conf/sweep or a YAML file; else: the sweep")
    parser.add_argument(
        "words", nargs="*", default=[], metavar="SETTING=VALUE", help="design, --slurm: settings"
    )
    parser.add_argument("--out", type=Path, metavar="SWEEP", help="design: write the sweep here")
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="run: trainings at a time (default: what fits)"
    )
    parser.add_argument(
        "--threads", type=int, default=1, metavar="N", help="run: of each process (default: 1)"
    )
    parser.add_argument(
        "--gpus", type=int, metavar="N", help="run: GPUs to use (default: what nvidia-smi lists)"
    )
    parser.add_argument("--retry", action="store_true", help="run: failed runs as well")
    parser.add_argument(
        "--keep-checkpoints", action="store_true", help="run: of finished runs, which lose theirs"
    )
    parser.add_argument(
        "--multirun", action="store_true", help="run: show Hydra's command instead of running"
    )
    parser.add_argument(
        "--slurm", action="store_true", help="run: submit, with words such as "
        "hydra.launcher.partition=gpu"
    )  # fmt: skip
    return parser


# ---------------------------------------------------------------- design


def _design(given: argparse.Namespace) -> int:
    config = read_sweep(_design_file(given.what), _changes(given.words))
    shapes = shapes_of(config)
    runs = design(config, shapes)
    folder = SweepFolder((given.out or Path("SWEEP")).resolve(), config, runs)
    for name, shape in shapes.items():
        print(
            f"{name:<14} {shape.num_parameters:>14,} parameters  {shape.flops_per_token:>9.3g} "
            f"FLOPs a token  {shape.tokens_per_step:,} tokens a step"
        )
    print("\n".join(describe_cost(folder, _most_epochs(folder, build=given.out is not None))))
    if given.out is None:
        print("nothing is written; --out SWEEP writes the runs")
        return 0
    folder = write_sweep_folder(given.out, config, runs)
    for name in {run.model: run.name for run in runs}.values():
        compose_run(folder, name)  # what is wrong with it is told now
    print(f"written     {folder.path}\nnext        python -m launch.sweep run {given.out}")
    return 0


def _design_file(what: str) -> Path:
    path = Path(what)
    if path.suffix in (".yaml", ".yml"):
        return path
    path = CONF / "sweep" / f"{what}.yaml"
    if not path.is_file():
        there = sorted(file.stem for file in path.parent.glob("*.yaml"))
        meant = closest(what, there)
        hint = f"; did you mean {' or '.join(meant)}?" if meant else "."
        raise ValueError(
            f"{what}: there is no {path}{hint} There are {', '.join(there)}; a file of yours is "
            "named with its .yaml"
        )
    return path


def _changes(words: Sequence[str]) -> dict[str, Any]:
    bad = [word for word in words if "=" not in word]
    if bad:
        raise ValueError(f"{bad[0]}: changes are SETTING=VALUE, as in grid.points=12")
    names = _setting_names(SweepConfig)
    for word in words:
        name = word.partition("=")[0]
        if not any(name == known or name.startswith(f"{known}.") for known in names):
            meant = closest(name, names)
            there = f"there are {', '.join(names)}"
            hint = f"did you mean {' or '.join(meant)}?" if meant else there
            raise ValueError(f"{word}: there is no setting {name}; {hint}")
    try:
        return dict(OmegaConf.to_container(OmegaConf.from_dotlist(list(words))))  # type: ignore[arg-type]
    except OmegaConfBaseException as error:
        raise ValueError(str(error).splitlines()[0]) from None


def _setting_names(of: type, prefix: str = "") -> list[str]:
    """Of a sweep, as they are typed; those of grid, single_family, ... by their own names."""
    names = []
    for name, kind in get_type_hints(of).items():
        inside = is_dataclass(kind) and isinstance(kind, type)
        names += _setting_names(kind, f"{prefix}{name}.") if inside else [f"{prefix}{name}"]
    return names


def _most_epochs(folder: SweepFolder, build: bool) -> dict[str, float]:
    """By family: passes over its text in the run that has most; {} where stores are missing."""
    settings = _settings_of_first(folder.config)
    if build:
        prepare(settings.data)
    try:
        sizes = family_tokens(settings.data, settings.seq_length)
    except FileNotFoundError:
        print("passes over the text are known once its token stores are there: --out builds them")
        return {}
    if set(sizes) != set(folder.config.families):
        raise ValueError(
            f"families={folder.config.families}: the data has {', '.join(sorted(sizes))}; name "
            "these, or choose among them with data.languages and data.families in settings"
        )
    if build:
        check_evaluation(folder.config.families, evaluation_tokens(settings))
    drawn = {f: max(run.tokens * run.ratios[f] for run in folder.runs) for f in sizes}
    return {family: drawn[family] / sizes[family] for family in sizes}


def _settings_of_first(config: SweepConfig) -> PretrainConfig:
    return settings_of(config, next(iter(config.models.values())))


# ---------------------------------------------------------------- run


def _run(given: argparse.Namespace) -> int:
    folder = read_sweep_folder(Path(given.what))
    for name in ("jobs", "threads", "gpus"):
        value = getattr(given, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: must be at least 1")
    if given.multirun or given.slurm:
        return _multirun(folder, given)
    if given.words:
        raise ValueError(f"{given.words[0]}: a run is what its design says; see design")
    if in_queue := queued(folder):
        raise ValueError(
            f"in SLURM's queue, and would run twice: {many(len(in_queue), 'run')}; wait with "
            f"--slurm, or end them: scancel {' '.join(in_queue.values())}"
        )
    gpus = usable_gpus(folder.config, given.gpus)
    most = most_jobs(folder.config, gpus, usable_cores(), given.threads)
    if gpus and given.jobs is not None and given.jobs > most:
        raise ValueError(
            f"--jobs {given.jobs}: {len(gpus)} GPUs are enough for {most} trainings of "
            f"processes_per_run={folder.config.processes_per_run} at a time"
        )
    return 0 if Runner(
        folder,
        jobs=given.jobs or most,
        threads=given.threads,
        retry=given.retry,
        keep_checkpoints=given.keep_checkpoints,
        gpus=gpus,
        say=lambda text: print(text, flush=True),
    ).run() else 1  # fmt: skip


def _multirun(folder: SweepFolder, given: argparse.Namespace) -> int:
    if not given.slurm and folder.config.processes_per_run > 1:
        raise ValueError(
            "--multirun: Hydra starts one process a run here, and this sweep has "
            f"processes_per_run={folder.config.processes_per_run}; leave it out, or add --slurm"
        )
    if given.slurm and given.gpus is not None:
        raise ValueError(
            f"--gpus {given.gpus}: GPUs of this machine; a job's are processes_per_run="
            f"{folder.config.processes_per_run} for device=gpu, or what you type as "
            "hydra.launcher.gpus_per_node"
        )
    if given.multirun:
        names = _to_start(folder, given.retry, queued(folder) if given.slurm else ())
        print(shlex.join(_hydra_command(folder, names, given)) if names else NOTHING_TO_START)
        return 0
    with FolderLock(folder.path):
        jobs = SlurmJobs(folder, given.keep_checkpoints, say=lambda text: print(text, flush=True))
        jobs.look()  # what ended while nobody waited
        names = _to_start(folder, given.retry, jobs.waiting)
        if not names and not jobs.waiting:
            print(NOTHING_TO_START)
            return 0
        if names and (told := too_short(folder, names, given.words)):
            print(f"WARNING: {told}")
        return 0 if jobs.run(names, _hydra_command(folder, names, given), given.threads) else 1


def _to_start(folder: SweepFolder, retry: bool, in_queue: Collection[str]) -> list[str]:
    wanted = (*CARRIED_ON, FAILED) if retry else CARRIED_ON
    states = folder.states()
    return [name for name, state in states.items() if state in wanted and name not in in_queue]


def _hydra_command(
    folder: SweepFolder, names: Sequence[str], given: argparse.Namespace
) -> list[str]:
    own = slurm_words(folder.config, given.words, given.jobs, given.threads) if given.slurm else []
    launcher = [LAUNCHER, *own] if given.slurm else []
    return multirun_command(folder, names, [*launcher, *given.words])


# ---------------------------------------------------------------- status, collect


def _status(given: argparse.Namespace) -> int:
    folder = read_sweep_folder(Path(given.what))
    states = folder.states()
    for state in dict.fromkeys(states.values()):
        print(f"{state:<10} {list(states.values()).count(state):>4}")
    for name, attempt in folder.last_attempts().items():
        if states.get(name) == FAILED:
            print(f"  failed: {name}: {attempt['reason']}")
    here = [a for a in folder.attempts() if "seconds" in a]  # of a job it is not known
    took = [a for a in here if states.get(a["run"]) == DONE and a["exit_code"] == 0]
    if took:
        planned = sum(run_seconds(folder.config, folder.by_name[a["run"]]) for a in took)
        factor = sum(a["seconds"] for a in took) / planned
        left = [folder.by_name[n] for n, state in states.items() if state not in (DONE, FAILED)]
        seconds = sum(run_seconds(folder.config, run) for run in left) * factor
        print(
            f"finished runs took {factor:.2f} times the estimate; by that those left take "
            f"{format_duration(seconds)} of one run at a time"
        )
    for name, job in queued(folder).items():
        print(f"  in SLURM's queue: {name}: job {job}")
    begun = [name for name, state in states.items() if state == BEGUN]
    if begun:
        print(f"begun, to go on from a checkpoint: {', '.join(begun)}")
    return 1 if FAILED in states.values() else 0


def _collect(given: argparse.Namespace) -> int:
    folder = read_sweep_folder(Path(given.what))
    table, left_out = collect(folder)
    table.save(given.out or folder.table)
    print(f"{given.out or folder.table}: {many(len(table.runs), 'run')}, {len(table.rows)} rows")
    for line in left_out:
        print(f"  not in it, or without a loss: {line}")
    return 1 if left_out else 0


if __name__ == "__main__":
    sys.exit(main())

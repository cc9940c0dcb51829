"""Train under SLURM: check the settings, write the batch script, submit it.

    python -m launch.slurm +model=magneto_1b parallel=tp8_sp cluster=gpu8_infiniband nodes=8
    python -m launch.slurm ... nodes=8 chain=3 cluster.walltime=12:00:00 --submit

Takes the SETTING=VALUE words of launch/pretrain.py and its --config-dir, and besides

    cluster=NAME         a file of conf/cluster, or the path of one of your own
    cluster.SETTING=...  one of its settings for this job (launch/config.py)
    nodes=N              how many
    chain=N              so many jobs, one after the other, for sites that do not requeue

Without --submit it starts nothing and writes nothing: what the job would be goes to standard
error, the script to standard output. docs/slurm.md tells what the script does. Exit status: 0,
1 where SLURM refuses or is not here, 2 where settings do not fit. Imports neither torch nor
megatron-core.
"""

import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.interrupted import say_interrupted

if __name__ == "__main__":
    say_interrupted()  # also amid the imports below

from launch.check_engine import refused_on_gpu
from launch.check_presence import absent
from launch.check_scale import too_much_for_shipped_text
from launch.command_line import add_config_dir, parse_words, words_parser
from launch.config import ClusterConfig
from launch.findings import many
from launch.repeated_words import repeated
from launch.schema import load
from launch.site_settings import load_cluster
from launch.slurm_commands import SlurmError, ask_slurm
from launch.slurm_partitions import check_partition
from launch.slurm_script import Job, grace_seconds, render
from launch.status import SUBMITTED, last_training_record, remaining_seconds
from launch.units import minutes_or_hours
from parallel.config import ConfigError
from pretrain.config import PretrainConfig
from pretrain.config_rules import validate
from pretrain.progress import format_duration
from pretrain.walltime import grace_problem, walltime_seconds


@dataclass
class Wish:
    """The words of the command line, sorted."""

    cluster: str | None = None
    settings: list[str] = field(default_factory=list)  # cluster.SETTING=VALUE, without "cluster."
    nodes: int = 1
    chain: int = 1
    training: list[str] = field(default_factory=list)  # for the launcher
    config_dir: str | None = None  # the launcher's --config-dir
    problems: list[str] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = words_parser("python -m launch.slurm", __doc__)
    add_config_dir(parser)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--submit", action="store_true", help="write the script and submit it")
    action.add_argument("--dry-run", action="store_true", help="only show it, as without --submit")
    given, problems = parse_words(parser, arguments)
    try:
        wish = sort_words(given.words)
        wish.problems += problems
        wish.config_dir = given.config_dir
        job, unchecked = make_job(wish)
    except ConfigError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return 2
    lines = describe(job, wish.chain, unchecked)
    lines += [f"warning: {text}" for text in repeated(given.words)]
    print("\n".join(lines), file=sys.stderr)
    if not given.submit:
        print(render(job), end="")
        print("nothing is submitted; add --submit to do so", file=sys.stderr)
        return 0
    try:
        submit(job, wish.chain)
    except OSError as error:
        print(
            f"error: run_dir={job.config.run_dir}: the script cannot be written there "
            f"({error.strerror}: {error.filename}); choose another run_dir",
            file=sys.stderr,
        )
        return 1
    except SlurmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def sort_words(words: Sequence[str]) -> Wish:
    wish = Wish()
    for word in words:
        name, equals, value = word.partition("=")
        if name == "cluster" and equals:
            wish.cluster = value
        elif name.startswith("cluster.") and not equals:
            wish.problems.append(f"{word} is not SETTING=VALUE; write {word}=VALUE")
        elif name.startswith("cluster."):
            wish.settings.append(word.removeprefix("cluster."))
        elif name not in ("nodes", "chain"):
            wish.training.append(word)
        elif value.isascii() and value.isdigit() and int(value) >= 1:
            setattr(wish, name, int(value))
        else:
            wish.problems.append(f"{word} must be a whole number, 1 or more, as in {name}=8")
    return wish


def make_job(wish: Wish) -> tuple[Job, list[str]]:
    """The job, and what could not be looked at, with the reason.

    Raises ConfigError with everything that can be found wrong before there is a job.
    """
    problems = list(wish.problems)
    cluster: ClusterConfig | None = None
    config: PretrainConfig | None = None
    try:
        cluster = load_cluster(wish.cluster, wish.settings)
    except ConfigError as error:
        problems += error.problems
    try:
        config = load([*wish.training, *searched(wish.config_dir)])
    except ConfigError as error:
        problems += error.problems
    if cluster is None or config is None:
        raise ConfigError(*problems)
    job = Job(
        config=config,
        cluster=cluster,
        nodes=wish.nodes,
        words=[*(["--config-dir", wish.config_dir] if wish.config_dir else []), *wish.training],
        folder=Path.cwd(),
        python=cluster.python or sys.executable,
    )
    partition = check_partition(job)
    problems += check_paths(job) + check_layout(job) + check_times(job) + partition.problems
    problems += refused_on_gpu(config) if cluster.gpus_per_node else []
    if problems:
        raise ConfigError(*problems)
    return job, partition.notes


def searched(config_dir: str | None) -> list[str]:
    """The word by which Hydra's compose looks into a --config-dir, where the launcher does too.

    Raises ConfigError.
    """
    if config_dir is None:
        return []
    if not Path(config_dir).is_dir():
        raise ConfigError(
            f"--config-dir {config_dir}: there is no such folder; leave it out, or give one that "
            "holds groups as conf/ does, as DIR/parallel/mine.yaml for parallel=mine"
        )
    path = str(Path(config_dir).resolve()).replace("'", r"\'")
    return [f"hydra.searchpath=['file://{path}']"]


def check_paths(job: Job) -> list[str]:
    """What would end a line of #SBATCH before its time."""
    paths = {"run_dir": str(job.run_dir), "this folder": str(job.folder)}
    return [
        f"{name}={path!r} must have no line break and no double quote: SLURM's options know no "
        "way to write them"
        for name, path in paths.items()
        if "\n" in path or '"' in path
    ]


def check_layout(job: Job) -> list[str]:
    """The launcher's rules for so many processes."""
    try:
        validate(job.config, world_size=job.processes)
    except ConfigError as error:
        counted = f"(nodes={job.nodes} x {job.cluster.processes} on each)"
        # a line about the number of processes tells whoever calls torchrun what to do
        return [
            problem.replace(" started;", f" asked for {counted};").replace(
                " with torchrun --nproc-per-node", ""
            )
            for problem in error.problems
        ]
    return []


def check_times(job: Job) -> list[str]:
    problem = grace_problem(grace_seconds(job.config), "cluster.walltime", job.cluster.walltime)
    return [problem] if problem else []


def describe(job: Job, chain: int, unchecked: Sequence[str] = ()) -> list[str]:
    """What the job is and what it costs, a line for each thing; what was not looked at, and what
    may go wrong."""
    cluster, config = job.cluster, job.config
    seconds = walltime_seconds(cluster.walltime)
    units, unit = (job.gpus, "GPU") if job.gpus else (job.nodes, "node")
    hours = units * seconds / 3600
    where = f"partition {cluster.partition}" if cluster.partition else "the default partition"
    gpus = f" x {cluster.gpus_per_node} GPUs = {job.gpus} GPUs" if job.gpus else ""
    lines = [
        f"run       {job.run_dir}",
        f"training  {config.model.name}, {config.train.train_steps:,} steps of "
        f"{config.train.global_batch_size:,} sequences",
        f"job       {job.name} on {where}: {many(job.nodes, 'node')}{gpus}, "
        f"{many(job.processes, 'process')}",
        f"time      {cluster.walltime} a job, {hours:,.1f} {unit}-hours; started now it would end "
        f"{_clock(seconds)}",
    ]
    left = remaining_seconds(last_training_record(job.run_dir), config.train.train_steps)
    if left is not None:
        lines.append(
            f"to go     {format_duration(left)} at the speed so far, {_clock(left)} if it ran now"
        )
    lines.append(
        f"end       saves {grace_seconds(config)} s before its time is up; requeued up to "
        f"{many(cluster.max_requeues, 'time')}; {cluster.max_failures} starts in a row without a "
        "new checkpoint end it"
    )
    if chain > 1:
        lines.append(f"chain     {chain} jobs, at most {chain * hours:,.1f} {unit}-hours")
    tensor = config.parallel.tensor_model_parallel_size
    if job.nodes > 1 and tensor > cluster.processes:
        lines.append(
            f"note      parallel.tensor_model_parallel_size={tensor} spans nodes of "
            f"{cluster.processes} processes, at the speed of the network"
        )
    lines += [f"note      {text}" for text in unchecked]
    # warnings, for the nodes may see file systems that a login node does not
    warnings = [f"{text} (as this machine sees it)" for text in absent(config.data)]
    warnings += too_much_for_shipped_text(config, job.processes)
    warnings += minutes_or_hours("cluster.walltime", cluster.walltime)
    return lines + [f"warning: {text}" for text in warnings]


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + seconds))


def submit(job: Job, chain: int) -> None:
    """Writes the script into the run's folder and hands it to SLURM `chain` times.

    Raises OSError where the folder cannot be written, SlurmError; the script stays.
    """
    job.script.parent.mkdir(parents=True, exist_ok=True)
    (job.run_dir / "logs").mkdir(exist_ok=True)  # SLURM does not make it, and would write nothing
    job.script.write_text(render(job), encoding="utf-8")
    (job.script.parent / "failures").unlink(missing_ok=True)
    if shutil.which("sbatch") is None:
        raise SlurmError(
            f"sbatch is not on this machine; the script is {job.script}. Where it is, with this "
            f"folder at the same place: sbatch {job.script}"
        )
    for _ in range(chain):
        number = ask_slurm("sbatch", "--parsable", str(job.script)).strip().partition(";")[0]
        with open(job.run_dir / SUBMITTED, "a", encoding="utf-8") as file:
            file.write(json.dumps({"time": round(time.time(), 3), "job_id": number}) + "\n")
        print(f"submitted job {number}")
    print(f"script    {job.script}\nlogs      {job.run_dir}/logs/slurm-{number}*.log")
    print(f"how it is python -m launch.status {job.config.run_dir}")


if __name__ == "__main__":
    sys.exit(main())

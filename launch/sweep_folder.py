"""A sweep's folder: its runs as Hydra configs, where each of them stands, what its table says.

    SWEEP/sweep.yaml           as designed: the settings, and every run with what it costs
    SWEEP/conf/run/NAME.yaml   a run for the launcher: --config-dir SWEEP/conf +run=NAME
    SWEEP/runs/NAME/           its run folder
    SWEEP/attempts.jsonl       every start and how it ended
    SWEEP/jobs.jsonl           which run was submitted to SLURM as which job
    SWEEP/runs.parquet         the table, of `python -m launch.sweep collect`

Imports neither torch nor megatron-core.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import yaml  # type: ignore[import-untyped]
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from data.folder_lock import describe_holder
from data.open_mixture import open_tokenizer
from data.scaling_law.design import ModelShape, PlannedRun, total_flops
from data.scaling_law.sweep_config import SweepConfig, SweepModel, make_sweep
from launch.file_keys import explained
from launch.schema import register, to_pretrain_config
from launch.setting_names import CONF
from models.parameter_count import flops_per_token, parameter_count
from parallel.config import ConfigError
from pretrain.config import PretrainConfig
from pretrain.config_rules import validate
from pretrain.run_status import FINISHED, read_status

SWEEP_FILE, ATTEMPTS_FILE, TABLE_FILE = "sweep.yaml", "attempts.jsonl", "runs.parquet"
RUN_GROUP = "run"

# where a run stands
DONE, FAILED, RUNNING, BEGUN, NEW = "finished", "failed", "running", "begun", "new"
CARRIED_ON = (BEGUN, NEW)


@dataclass(frozen=True)
class SweepFolder:
    """A designed sweep. Nothing is kept in memory of how far it is."""

    path: Path
    config: SweepConfig
    runs: list[PlannedRun]

    @property
    def conf(self) -> Path:
        return self.path / "conf"

    @property
    def table(self) -> Path:
        return self.path / TABLE_FILE

    @cached_property
    def by_name(self) -> dict[str, PlannedRun]:
        return {run.name: run for run in self.runs}

    def run_dir(self, name: str) -> Path:
        return self.path / "runs" / name

    def states(self) -> dict[str, str]:
        """Name -> DONE, FAILED, RUNNING, BEGUN (goes on from its checkpoint) or NEW."""
        failed = {name for name, last in self.last_attempts().items() if last["failed"]}
        return {run.name: self._state(run, failed) for run in self.runs}

    def _state(self, run: PlannedRun, failed: set[str]) -> str:
        folder = self.run_dir(run.name)
        status = read_status(folder) or {}
        if status.get("state") == FINISHED and status.get("step") == run.train_steps:
            return DONE
        if describe_holder(folder):
            return RUNNING
        if run.name in failed:
            return FAILED
        return BEGUN if status else NEW

    def last_attempts(self) -> dict[str, dict[str, Any]]:
        return {attempt["run"]: attempt for attempt in self.attempts()}

    def attempts(self) -> list[dict[str, Any]]:
        """What was started and has ended, oldest first; a line cut off by a kill is left out."""
        path, found = self.path / ATTEMPTS_FILE, []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found

    def record(self, attempt: Mapping[str, Any]) -> None:
        """Adds a line to the attempts; one that a kill cut off stays a line of its own."""
        with open(self.path / ATTEMPTS_FILE, "a+b") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - 1))
            torn = file.read(1) not in (b"", b"\n")
            file.write((("\n" if torn else "") + json.dumps(attempt) + "\n").encode())

    def words(self, names: Sequence[str]) -> list[str]:
        """The launcher's words for these runs."""
        return ["--config-dir", str(self.conf), f"+{RUN_GROUP}={','.join(names)}"]


def read_sweep_folder(path: Path) -> SweepFolder:
    """Raises FileNotFoundError where there is no sweep, ValueError where its file is not one."""
    file = path / SWEEP_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{path} holds no {SWEEP_FILE}; python -m launch.sweep design makes a sweep's folder"
        )
    content = yaml.load(file.read_text(encoding="utf-8"), Loader=_LOADER)
    config = make_sweep(content["config"], str(file))
    return SweepFolder(path.resolve(), config, [PlannedRun(**run) for run in content["runs"]])


def write_sweep_folder(path: Path, config: SweepConfig, runs: Sequence[PlannedRun]) -> SweepFolder:
    """Writes sweep.yaml, last, and a file for each run.

    Raises ValueError where the folder holds another sweep; the same one again changes nothing.
    """
    folder = SweepFolder(path.resolve(), config, list(runs))
    content = {
        "config": OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True),
        "runs": [dataclasses.asdict(run) for run in runs],
    }
    text = yaml.dump(content, Dumper=_DUMPER, sort_keys=False, width=100, allow_unicode=True)
    file = path / SWEEP_FILE
    if file.is_file():
        if file.read_text(encoding="utf-8") == text:
            return folder
        raise ValueError(
            f"{path} holds another sweep; name another folder, or remove this one with its runs"
        )
    (folder.conf / RUN_GROUP).mkdir(parents=True, exist_ok=True)
    for run in runs:
        (folder.conf / RUN_GROUP / f"{run.name}.yaml").write_text(
            _run_file(folder, run), encoding="utf-8"
        )
    partial = file.with_name(f".{SWEEP_FILE}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)
    return folder


def _run_file(folder: SweepFolder, run: PlannedRun) -> str:
    config = folder.config
    model = config.models[run.model]
    own = {
        "model": {"name": run.model},
        "data": {
            "mixture": {
                "weighting": "ratios",
                "ratios": run.ratios,
            },
            "seed": run.seed,
        },
        "train": {
            "train_steps": run.train_steps,
            "seed": run.seed,
            "eval_interval": 0,
            "mixture_interval": run.train_steps,  # one report, at the end
        },
        "schedule": {"lr_warmup_steps": round(config.warmup * run.train_steps)},
        "checkpoint": {"save_interval": save_interval(config, run), "keep_last": 1},
        "run_dir": str(folder.run_dir(run.name)),
    }
    settings = _merged(config.settings, model.settings, own)
    content = {"defaults": [{"/model": model.base}, "_self_"], **settings}
    return (
        "# @package _global_\n"
        f"# A run of the sweep {config.name}, {run.purpose}: {run.flops:.3g} FLOPs.\n"
        + yaml.dump(content, Dumper=_DUMPER, sort_keys=False, width=100, allow_unicode=True)
    )


def save_interval(config: SweepConfig, run: PlannedRun) -> int:
    """Steps between two checkpoints: about config.save_minutes; 0 for a run shorter than that."""
    seconds = run.flops / run.train_steps / (config.flops_per_second * config.processes_per_run)
    steps = max(1, round(60 * config.save_minutes / seconds))
    return steps if steps < run.train_steps else 0


def run_seconds(config: SweepConfig, run: PlannedRun) -> float:
    """How long a run takes by the sweep's own estimate."""
    speed = config.flops_per_second * config.processes_per_run
    return config.startup_seconds + run.flops / speed


def device_hours(config: SweepConfig, runs: Sequence[PlannedRun]) -> float:
    return sum(run_seconds(config, run) for run in runs) * config.processes_per_run / 3600


def settings_of(config: SweepConfig, model: SweepModel) -> PretrainConfig:
    """The settings of a model's runs, but for what differs between runs. Raises ConfigError."""
    register()
    words = [f"+model={model.base}"]
    with explained(words):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = compose("pretrain", overrides=words)
        merged = OmegaConf.merge(composed, _merged(config.settings, model.settings))
    return to_pretrain_config(cast(DictConfig, merged), words)


def compose_run(folder: SweepFolder, name: str) -> PretrainConfig:
    """A run's settings as the launcher sees them. Raises ConfigError as the launcher prints it."""
    register()
    words = [f"hydra.searchpath=[file://{folder.conf}]", f"+{RUN_GROUP}={name}"]
    with explained(words), initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("pretrain", overrides=words)
    return to_pretrain_config(composed, words)


def shapes_of(config: SweepConfig) -> dict[str, ModelShape]:
    """Of each model of the sweep. Raises ConfigError with the problems of all of them."""
    shapes, problems = {}, []
    for name, model in config.models.items():
        try:
            settings = settings_of(config, model)
            validate(settings, world_size=config.processes_per_run)
        except ConfigError as error:
            problems += [f"models.{name}: {_asked(problem, config)}" for problem in error.problems]
            continue
        vocabulary = settings.model.vocab_size or open_tokenizer(settings.data).vocab_size
        shapes[name] = ModelShape(
            num_parameters=parameter_count(settings.model, vocabulary).non_embedding,
            flops_per_token=flops_per_token(settings.model, settings.seq_length, vocabulary),
            tokens_per_step=settings.train.global_batch_size * settings.seq_length,
        )
    if problems:
        raise ConfigError(*problems)
    return shapes


def _asked(problem: str, config: SweepConfig) -> str:
    """A rule about the number of processes, in the words of a sweep instead of torchrun's."""
    counted = f" asked for (processes_per_run={config.processes_per_run});"
    return problem.replace(" started;", counted).replace(" with torchrun --nproc-per-node", "")


def describe_cost(folder: SweepFolder, epochs: Mapping[str, float] | None = None) -> list[str]:
    """Runs, tokens, FLOPs and device hours by purpose, a line each; epochs: most, by family."""
    config, lines = folder.config, []
    for purpose in dict.fromkeys(run.purpose for run in folder.runs):
        lines.append(_cost(config, purpose, [r for r in folder.runs if r.purpose == purpose]))
    lines.append(_cost(config, "all", folder.runs))
    longest = max(run_seconds(config, run) for run in folder.runs)
    lines.append(
        f"time by flops_per_second={config.flops_per_second:.3g} and startup_seconds="
        f"{config.startup_seconds:g}; the longest run takes {longest / 60:,.1f} minutes"
    )
    for family, number in sorted((epochs or {}).items()):
        told = "" if number <= 4 else "  (more than 4: repeated text teaches less)"
        lines.append(f"  {family:<16} at most {number:6.2f} passes over its text{told}")
    return lines


def _cost(config: SweepConfig, what: str, runs: Sequence[PlannedRun]) -> str:
    hours = device_hours(config, runs)
    unit = "core-hours" if config.device.value == "cpu_core" else "GPU-hours"
    tokens = sum(run.tokens for run in runs)
    return (
        f"{what:<14} {len(runs):>4} runs  {tokens:>18,} tokens  {total_flops(runs):>9.3g} FLOPs  "
        f"{hours:>10,.2f} {unit}"
    )


def _merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    merged = OmegaConf.merge(*(OmegaConf.create(dict(part)) for part in parts))
    return cast(dict[str, Any], OmegaConf.to_container(merged, resolve=False))


# the C ones, where PyYAML has them: a sweep of 200 runs is read in 0.1 s instead of 1 s
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_BASE_DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


class _DUMPER(_BASE_DUMPER):
    """Lists of numbers and tables of ratios on one line each; no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

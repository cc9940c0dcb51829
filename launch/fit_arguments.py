"""What launch.fit_mixture was asked for, checked: target, tokens, objective, bounds, settings.

Imports neither torch nor megatron-core.
"""

import argparse
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from data.quantity import quantity
from data.scaling_law.fit_settings import FitSettings
from data.scaling_law.optimum import Goal, Objective
from data.scaling_law.runs_table import RunsTable
from data.stream_settings import StreamSettings, open_stream, read_settings
from launch.near_names import closest
from launch.setting_names import shipped_models
from launch.sweep_provenance import family_rule, is_typed, typed_otherwise
from models.config import ModelConfig
from models.parameter_count import parameter_count
from parallel.config import ConfigError

_DECIDED = tuple(
    f"data.mixture.{setting}"
    for setting in ("weighting", "ratios", "alpha", "gamma", "losses", "budget", "stages", "law")
)


@dataclass(frozen=True)
class Target:
    """The model that the mixture is for."""

    name: str  # a model of conf/model, or the number as typed
    num_parameters: int  # without the embedding
    model: ModelConfig | None  # None: only its size is known


@dataclass(frozen=True)
class Request:
    table: Path  # of the sweep's runs
    output: Path  # folder to write, absolute
    target: Target
    tokens: float
    objective: Objective
    weights: dict[str, float] | None
    at_least: float | dict[str, float]
    supply: dict[str, float] | None  # as typed
    max_epochs: float | None
    level: float  # of the intervals
    fit: FitSettings
    settings: StreamSettings
    words: list[str]  # settings as typed, for the training command
    family_rule: dict[str, Any]  # settings of data.mixture that the sweep's runs had
    doubts: list[str]  # about these settings

    def goal(self, supply: Mapping[str, float] | None) -> Goal:
        return Goal(
            num_parameters=self.target.num_parameters,
            tokens=self.tokens,
            objective=self.objective,
            weights=self.weights,
            at_least=self.at_least,
            supply=supply,
            max_epochs=self.max_epochs,
        )


def read_request(given: argparse.Namespace) -> Request:
    """The request behind the words of the command line. Raises ConfigError with all problems."""
    problems: list[str] = []

    def read(function: Callable[..., Any], *arguments: Any, instead: Any = None) -> Any:
        try:
            return function(*arguments)
        except (ValueError, OSError) as error:
            problems.extend(str(error).splitlines())
            return instead

    words = [word for word in given.words if "=" in word]
    paths = [word for word in given.words if "=" not in word]
    if len(paths) != 1:
        problems.append(
            f"{' '.join(paths) or 'no sweep'}: name one folder of a sweep, or one table of runs; "
            "settings are SETTING=VALUE"
        )
    target = read(_target, given.target)
    table = read(_table_of, Path(paths[0]).expanduser()) if len(paths) == 1 else None
    rule, doubts = read(family_rule, table, instead=(None, [])) if table else (None, [])
    weights = read(_table, "--weights", given.weights) if given.weights is not None else None
    request = {
        "tokens": read(quantity, "--tokens", given.tokens),
        "objective": _objective(given),
        "weights": weights,
        "at_least": read(_number_or_table, "--at-least", given.at_least),
        "supply": read(_table, "--supply", given.supply) if given.supply else None,
        "max_epochs": read(quantity, "--max-epochs", given.max_epochs)
        if given.max_epochs is not None
        else None,
        "level": read(_level, given.level),
        "fit": read(_fit_settings, given),
        "settings": read(_settings, words, target, rule or {}),
    }
    if problems or table is None:
        raise ConfigError(*problems)
    name = re.sub(r"[^\w.+-]", "_", f"{target.name}-{given.tokens}-{request['objective'].value}")
    output = Path(given.output).expanduser() if given.output else table.parent / "fit" / name
    if output.exists():
        raise ConfigError(
            f"{output} exists already; name another folder with --output, or remove it"
        )
    if rule is not None:
        doubts = [*doubts, *typed_otherwise(rule, request["settings"].data.mixture, words)]
    return Request(
        table=table,
        output=output.resolve(),
        target=target,
        words=words,
        family_rule=rule or {},
        doubts=doubts,
        **request,
    )


def supply_of(
    request: Request, table: RunsTable, families: Sequence[str]
) -> tuple[dict[str, float] | None, str]:
    """Tokens of training text by family, and where the numbers are from.

    As typed; else of the text that the settings name; else of the sweep's own, by the passes that
    its runs made over it; else None. Raises ValueError for text of other families.
    """
    if request.supply is not None:
        return request.supply, "--supply"
    data = request.settings.data
    if data.store_dir or data.corpus:
        return _supply_of_data(request.settings, families), data.store_dir or data.corpus
    sizes: dict[str, list[float]] = {family: [] for family in families}
    for row in table.rows:
        if row["family"] in sizes and row["epochs"] > 0 and row["ratio"] > 0:
            sizes[row["family"]].append(row["ratio"] * row["tokens"] / row["epochs"])
    if not all(sizes.values()):
        return None, "not known"
    return {family: median(found) for family, found in sizes.items()}, "the sweep's text"


def _supply_of_data(settings: StreamSettings, families: Sequence[str]) -> dict[str, float]:
    mixture = open_stream(settings).mixture
    supply = dict.fromkeys(mixture.families, 0.0)
    dropped = settings.data.mixture.drop_languages
    for code, sequences in zip(mixture.languages, mixture.sequences, strict=True):
        if code in dropped:
            continue
        supply[mixture.family_of[code]] += len(sequences) * mixture.seq_length
    unknown = sorted(set(supply) - set(families))
    lacking = [family for family in families if family not in supply]
    problems = []
    if unknown:
        problems.append(
            f"the data has {', '.join(unknown)}, of which the sweep knows nothing; leave them out "
            "with data.languages, or group them as the sweep did with data.families"
        )
    if lacking:
        problems.append(
            f"the sweep has {', '.join(lacking)}, of which there is no text in the data"
        )
    if problems:
        raise ConfigError(*problems)
    return supply


def _target(text: str) -> Target:
    if text[:1].isdigit() or text[:1] == ".":
        return Target(text, round(quantity("--target", text)), None)
    models = shipped_models()
    if text in models:
        model = models[text]
        return Target(text, parameter_count(model, vocab_size=1).non_embedding, model)
    meant = closest(text, list(models))
    hint = f"; did you mean {' or '.join(meant)}?" if meant else "."
    raise ValueError(
        f"--target {text}: there is no such model{hint} Name one of {', '.join(models)}, or a "
        "number of parameters without the embedding, such as 1.2B"
    )


def _objective(given: argparse.Namespace) -> Objective:
    if given.objective is None:
        return Objective.weights if given.weights is not None else Objective.normalized
    return Objective(given.objective)


def _number_or_table(setting: str, text: str) -> float | dict[str, float]:
    if "=" in text:
        return _table(setting, text, zero=True)
    return _number(setting, text)


def _table(setting: str, text: str, zero: bool = False) -> dict[str, float]:
    """germanic=1,indic=2.5 as a table of numbers."""
    values: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = part.strip().partition("=")
        if not name or not number or name in values:
            raise ValueError(
                f"{setting} {text}: must be numbers of families, each once, as in "
                "germanic=1,indic=2.5"
            )
        values[name] = _number(f"{setting} {name}", number) if zero else quantity(setting, number)
    return values


def _number(setting: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{setting} {text}: must be a number, such as 0.02")
    return value


def _level(text: str) -> float:
    value = _number("--level", text)
    if not 0 < value < 1:
        raise ValueError(f"--level {text}: must lie between 0 and 1, such as 0.9")
    return value


def _table_of(path: Path) -> Path:
    if path.is_dir():
        tables = [path / name for name in ("runs.parquet", "runs.csv")]
        found = [table for table in tables if table.is_file()]
        if not found:
            raise ValueError(
                f"{path} has no runs.parquet: python -m launch.sweep writes it when runs have ended"
            )
        return found[0]
    if not path.is_file():
        raise ValueError(f"{path}: there is no such sweep and no such table of runs")
    return path


def _fit_settings(given: argparse.Namespace) -> FitSettings:
    return FitSettings(
        fixed=_table("--fix", given.fix, zero=True) if given.fix else {},
        bootstrap=_whole("--bootstrap", given.bootstrap),
        folds=_whole("--held-out", given.held_out),
        families=given.families.split(",") if given.families else [],
        without_purposes=[name for name in given.leave_out.split(",") if name],
        seed=_whole("--seed", given.seed),
    )


def _whole(setting: str, text: str) -> int:
    if not re.fullmatch(r"\d+", text):
        raise ValueError(f"{setting} {text}: must be a whole number of at least 0")
    return int(text)


def _settings(words: list[str], target: Target | None, rule: Mapping[str, Any]) -> StreamSettings:
    """As typed; what is not, of how a family's samples are shared, as the sweep had it."""
    for word in words:
        name = word.partition("=")[0]
        if name == "train.train_steps":
            raise ValueError(f"{word}: the steps follow from --tokens; leave it out")
        if name in ("data/mixture", "data.mixture") or name.startswith(_DECIDED):
            raise ValueError(f"{word}: this is what the fit decides; leave it out")
    names = [word.partition("=")[0] for word in words]
    values: dict[str, Any] = {
        f"data.mixture.{name}": value for name, value in rule.items() if not is_typed(name, names)
    }
    if target is not None and target.model is not None:
        values["model.max_position_embeddings"] = target.model.max_position_embeddings
    return read_settings(words, values=values)

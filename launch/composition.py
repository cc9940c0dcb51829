"""Words of a command line put together as far as they go, and where each value comes from.

Hydra stops at the first word it cannot place. Here such a word is noted and left out, and the rest
composed, so that all that is wrong is found at once. Imports neither torch nor megatron-core.
"""

import re
import typing
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from data.mixture_file import read_mixture_file
from launch.mixture_file import WORD as MIXTURE
from launch.mixture_file import mixture_path, with_mixture_files
from launch.schema import (
    ADDED,
    CONF,
    CompositionError,
    explain,
    groups,
    override_of,
    register,
    settings,
)
from parallel.config import ConfigError
from pretrain.config import PretrainConfig

DEFAULT = "default"
COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Origin:
    """A setting's value, and who said so: "default", a file, or "command line"."""

    setting: str
    value: Any
    source: str
    changed: bool  # it is not the default's value


@dataclass
class Composition:
    cfg: DictConfig | None  # None: not even the shipped files fit together
    words: list[str]  # those that took part
    refused: list[str] = field(default_factory=list)  # as typed
    problems: list[str] = field(default_factory=list)
    origins: dict[str, Origin] = field(default_factory=dict)

    @property
    def lost(self) -> list[str]:
        """Settings and groups that somebody typed, and that have another value, because it was
        refused."""
        took_part = {_name(word) for word in self.words}
        names = {_name(word) for word in self.refused} - took_part
        return sorted(names & {*settings(), *groups()})

    def typed(self, setting: str) -> bool:
        """Whether somebody chose the value: it is not the dataclass's default."""
        origin = self.origins.get(setting)
        return origin is not None and origin.source != DEFAULT


def compose_what_fits(words: Sequence[str], hidden: Sequence[str] = ()) -> Composition:
    """Composes `words`; those that Hydra refuses are left out, each with a problem that says why.

    hidden: words that nobody typed, such as the one that stands for --config-dir.
    """
    register()
    nameless = [word for word in words if not _name(word)]  # for which Hydra has no words
    made = Composition(None, [word for word in words if _name(word)], nameless)
    made.problems += [f"{word} is not SETTING=VALUE: it names no setting" for word in nameless]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        while True:
            try:
                cfg = compose(
                    "pretrain",
                    overrides=with_mixture_files([*made.words, *hidden]),
                    return_hydra_config=True,
                )
                if not _leave_out_unresolved(cfg, made):
                    break
            except ConfigError as error:  # of data/mixture=FILE
                made.problems += error.problems
                made.refused += [word for word in made.words if _is_mixture(word)]
                made.words = [word for word in made.words if not _is_mixture(word)]
            except CompositionError as error:
                told = explain(error, made.words).problems
                made.problems += [problem for problem in told if problem not in made.problems]
                culprit = _culprit(told[0], made.words, hidden)
                if culprit is None:
                    return made
                made.refused.append(culprit)
                place = made.words.index(culprit)
                made.words[place : place + 1] = _corrected(culprit, told[0])
    with open_dict(cfg):
        hydra = cfg.pop("hydra")
    made.cfg = cfg
    files = _with_mixture(_files(hydra), [*made.words, *hidden])
    made.origins = _origins(cfg, made.words, files)
    return made


def left_out_a_model(made: Composition) -> bool:
    """Whether the word that would have chosen the model is among those refused."""
    return any(name in ADDED for name in made.lost)


def _leave_out_unresolved(cfg: DictConfig, made: Composition) -> bool:
    """Whether words were left out because of what they refer to: a variable of the environment, or
    another setting, that is not there."""
    count = len(made.words)
    for setting in settings():
        try:
            value = OmegaConf.select(cfg, setting)
            if OmegaConf.is_config(value):
                OmegaConf.to_container(value, resolve=True)
        except InterpolationToMissingValueError:
            continue  # ${model.name} of no model
        except OmegaConfBaseException as error:
            word = override_of(setting, made.words)
            if word is not None and "${" in word:
                made.problems += explain(error, made.words).problems
                made.refused.append(word)
                made.words.remove(word)
    return len(made.words) < count


def _culprit(problem: str, words: Sequence[str], hidden: Sequence[str]) -> str | None:
    """The word that `problem` is about; None where it is about none of them."""
    if named := [word for word in words if problem.startswith(word)]:
        return max(named, key=len)
    if named := [word for word in words if word in problem]:
        return max(named, key=len)
    if file := re.search(r"(\w+)/([\w.-]+)\.yaml\b", problem):
        chosen = [word for word in words if word.lstrip("+").partition("=")[0] == file[1]]
        if chosen:
            return chosen[-1]
    return next((word for i, word in enumerate(words) if not _fits(words[: i + 1], hidden)), None)


def _fits(words: Sequence[str], hidden: Sequence[str]) -> bool:
    try:
        compose("pretrain", overrides=with_mixture_files([*words, *hidden]))
    except (*CompositionError, ConfigError):
        return False
    return True


def _is_mixture(word: str) -> bool:
    return _name(word) == MIXTURE


def _name(word: str) -> str:
    return word.lstrip("+~").partition("=")[0]


def _corrected(word: str, problem: str) -> list[str]:
    """The word as the problem says it should be, where a + or a number's unit is wrong."""
    other = word.lstrip("+") if word.startswith("+") else f"+{word}"
    if problem.endswith((f"write {other}", f": {other}", f"replace it with {other}")):
        return [other]
    name = re.escape(word.lstrip("+").partition("=")[0])
    number = re.search(rf"({name}=[\d.e+-]+)$", problem)
    return [number[1]] if number and number[1] != word else []


# ---- where values come from


@dataclass(frozen=True)
class _File:
    shown: str  # as in conf/parallel/tp2.yaml
    values: dict[str, Any]  # by dotted name


def _origins(cfg: DictConfig, words: Sequence[str], files: Sequence[_File]) -> dict[str, Origin]:
    defaults = _defaults()
    found = {}
    for setting in settings():
        try:
            value = OmegaConf.select(cfg, setting)
        except OmegaConfBaseException:  # it refers to what is not there, which is told elsewhere
            value = None
        value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        source = _source(setting, value, words, files, defaults)
        changed = not (setting in defaults and _same(defaults[setting], value))
        found[setting] = Origin(setting, value, source, changed)
    return found


def _source(
    setting: str,
    value: Any,
    words: Sequence[str],
    files: Sequence[_File],
    defaults: dict[str, Any],
) -> str:
    if override_of(setting, [word for word in words if "." in word or "/" not in word]):
        return COMMAND_LINE
    setters = [file for file in files if setting in file.values]
    for file in reversed(setters):
        if _same(file.values[setting], value):
            return file.shown
    if setters:
        return setters[-1].shown
    if setting in defaults and not _same(defaults[setting], value):
        return "a file of the configuration"  # of a group that we do not look into
    return DEFAULT


def _same(written: Any, value: Any) -> bool:
    if isinstance(value, Enum):
        return written in (value.name, value)
    if isinstance(value, float) and isinstance(written, str):  # 1e-3, which YAML 1.1 takes for text
        try:
            return float(written) == value
        except ValueError:
            return False
    return "${" in str(written) or written == value


def _defaults(cls: type = PretrainConfig, prefix: str = "") -> dict[str, Any]:
    """What the dataclasses say where nobody else does, by dotted name."""
    values: dict[str, Any] = {}
    kinds = typing.get_type_hints(cls)
    for one in fields(cls):
        key, kind = f"{prefix}{one.name}", kinds[one.name]
        if is_dataclass(kind):
            values |= _defaults(typing.cast(type, kind), f"{key}.")
        elif one.default is not MISSING:
            values[key] = one.default
        elif one.default_factory is not MISSING:
            values[key] = one.default_factory()
    return values


def _files(hydra: DictConfig) -> list[_File]:
    """The files that were put together, later ones over earlier ones."""
    folders = [
        Path(source.path.removeprefix("file://"))
        for source in hydra.runtime.config_sources
        if source.path and (source.path.startswith("file://") or source.path.startswith("/"))
    ]
    choices = {
        str(group): str(name)
        for group, name in hydra.runtime.choices.items()
        if not str(group).startswith("hydra/") and name is not None
    }
    order = sorted(choices, key=lambda group: group == "experiment")
    files: list[_File] = []
    for group in order:
        files += _read(folders, group, choices[group])
    return files


def _with_mixture(files: list[_File], words: Sequence[str]) -> list[_File]:
    """With data/mixture=FILE, which stands for all of data.mixture, on top of the files."""
    for word in filter(_is_mixture, words):
        path = mixture_path(word.partition("=")[2], words)
        assert path is not None  # or the words would not have been put together
        prefix = MIXTURE.replace("/", ".") + "."
        kept = [
            _File(f.shown, {k: v for k, v in f.values.items() if not k.startswith(prefix)})
            for f in files
        ]
        return [*kept, _File(_shown(path), _flat(read_mixture_file(path), prefix))]
    return files


def _shown(path: Path) -> str:
    return f"conf/{path.relative_to(CONF)}" if path.is_relative_to(CONF) else str(path)


def _read(folders: Iterable[Path], group: str, name: str) -> list[_File]:
    """A file of settings, after those of its group that its defaults list builds on."""
    path = next((f for folder in folders if (f := folder / group / f"{name}.yaml").is_file()), None)
    if path is None:
        return []
    text = path.read_text(encoding="utf-8")
    content = yaml.safe_load(text) or {}
    if not isinstance(content, dict):
        return []
    bases = [base for base in content.pop("defaults", None) or [] if isinstance(base, str)]
    files = []
    for base in bases:
        if base != "_self_":
            files += _read(folders, group, base)
    package = re.search(r"^#\s*@package\s+(\S+)", text, re.MULTILINE)
    prefix = group.replace("/", ".") + "."
    if package is not None:
        prefix = "" if package[1] == "_global_" else package[1].replace("_group_", group) + "."
    return [*files, _File(_shown(path), _flat(content, prefix))]


def _flat(content: dict[str, Any], prefix: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    known = settings()
    for name, value in content.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in known:
            values |= _flat(value, f"{key}.")
        else:
            values[key] = value
    return values

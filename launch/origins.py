"""Where each value of a launch comes from: the default, a file, or the command line.

Imports neither torch nor megatron-core.
"""

import re
import typing
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.mixture_file import read_mixture_file
from launch.mixture_file import WORD as MIXTURE
from launch.mixture_file import mixture_path
from launch.setting_names import CONF, override_of, settings
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


def name_of(word: str) -> str:
    """The setting or group that a word of the command line names; "" for none."""
    return word.lstrip("+~").partition("=")[0]


def is_mixture(word: str) -> bool:
    """Whether the word is data/mixture=FILE."""
    return name_of(word) == MIXTURE


@dataclass(frozen=True)
class _File:
    shown: str  # as in conf/parallel/tp2.yaml
    values: dict[str, Any]  # by dotted name


def origins_of(
    cfg: DictConfig, hydra: DictConfig, words: Sequence[str], hidden: Sequence[str]
) -> dict[str, Origin]:
    """Of each setting of `cfg`, which Hydra, as `hydra` tells, put together of `words`.

    hidden: words that nobody typed, such as the one that stands for --config-dir.
    """
    files, defaults = _with_mixture(_files(hydra), [*words, *hidden]), _defaults()
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
    if override_of(setting, words):
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
    for word in filter(is_mixture, words):
        path = mixture_path(word.partition("=")[2], words)
        assert path is not None  # or the words would not have been put together
        prefix = MIXTURE.replace("/", ".") + "."
        kept = [
            _File(f.shown, {k: v for k, v in f.values.items() if not k.startswith(prefix)})
            for f in files
        ]
        return [*kept, _File(shown(path), _flat(read_mixture_file(path), prefix))]
    return files


def shown(path: Path) -> str:
    """A file as reports name it: conf/GROUP/NAME.yaml, or the path of one of the user's."""
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
    return [*files, _File(shown(path), _flat(content, prefix))]


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

"""What settings there are, the type of each, and the files of conf/ that can be chosen.

Imports neither torch nor megatron-core.
"""

import dataclasses
import typing
from collections.abc import Iterator, Sequence
from enum import Enum
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any

from omegaconf import DictConfig, OmegaConf

from launch.mixture_file import WORD
from models.config import ModelConfig
from models.parameter_count import parameter_count
from pretrain.config import PretrainConfig

CONF = Path(__file__).resolve().parent.parent / "conf"
ADDED = ("model", "experiment")  # groups chosen with a + in front: no default stands for them
SITES = "cluster"  # not a group of the launcher's: launch.site_settings reads these files
SWEEPS = "sweep"  # neither: launch.sweep does


@cache
def settings() -> dict[str, Any]:
    """Every setting by its dotted name -> its annotation."""
    return dict(_walk(PretrainConfig, ""))


@cache
def listed_classes() -> dict[str, type]:
    """The dataclasses that settings are lists of, by name."""
    classes = (cls for annotation in settings().values() for cls in typing.get_args(annotation))
    return {
        cls.__name__: cls
        for cls in classes
        if isinstance(cls, type) and dataclasses.is_dataclass(cls)
    }


@cache
def sections() -> set[str]:
    return {name.rpartition(".")[0] for name in settings()} - {""}


@cache
def groups() -> list[str]:
    """Folders of conf that a command line chooses files of."""
    folders = (folder.name for folder in CONF.iterdir() if folder.is_dir())
    return sorted({*folders, WORD} - {SITES, SWEEPS})


def files_of(group: str) -> list[str]:
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


def annotation_of(key: str) -> Any:
    """Type of a setting, or of an entry of a table of settings; None for any other key."""
    table = settings().get(key.rpartition(".")[0])
    return typing.get_args(table)[1] if table is not None else settings().get(key)


def kinds_of(annotation: Any) -> tuple[Any, ...]:
    """The types that one value of this type may have; none for tables and lists of values."""
    if typing.get_origin(annotation) in (dict, list):
        return ()
    return (annotation, *typing.get_args(annotation))


def _walk(cls: type, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, annotation in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(annotation):
            yield from _walk(typing.cast(type, annotation), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", annotation


def rule_of(annotation: Any) -> tuple[str, list[str]]:
    """What a value of this type looks like, and the choices where there are few."""
    options = typing.get_args(annotation)
    if NoneType in options:
        rule, choices = rule_of(next(option for option in options if option is not NoneType))
        return f"{rule}, or null", choices
    kind = typing.get_origin(annotation) or annotation
    if issubclass(kind, Enum):
        return f"one of {', '.join(kind.__members__)}", list(kind.__members__)
    if kind is dict and options[1] is str:
        return "a table, as in {NAME:VALUE}", []
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        list: "a list, as in [a,b]",
        dict: "a table of numbers, as in {a:1,b:2}",
    }
    return words[kind], []


def override_of(key: str, overrides: Sequence[str], value: str | None = None) -> str | None:
    """The word on the command line that sets `key`, one below it, or a table it lies in.

    The last of several, which is what Hydra takes; but the last with `value`, if there is one.
    """
    named = [(word, word.lstrip("+~").partition("=")[0]) for word in overrides]
    for found in (
        [word for word, name in named if name == key],
        [word for word, name in named if name.startswith(f"{key}.")],
        [word for word, name in named if key.startswith(f"{name}.") and "{" in word],
    ):
        if found:
            quoted = [word for word in found if word.partition("=")[2] == value]
            return (quoted or found)[-1]
    return None


def typed_word(key: str, overrides: Sequence[str]) -> str:
    return override_of(key, overrides) or key


def shipped_models() -> dict[str, ModelConfig]:
    """The models of conf/model, smallest first."""
    models = {path.stem: _model(path) for path in (CONF / "model").glob("*.yaml")}
    return dict(sorted(models.items(), key=lambda item: (body_parameters(item[1]), item[0])))


def _model(path: Path) -> ModelConfig:
    """A file of conf/model, with those that its defaults list names below it."""
    own = typing.cast(DictConfig, OmegaConf.load(path))
    bases = [name for name in own.pop("defaults", []) if name != "_self_"]
    parts = [OmegaConf.load(path.with_name(f"{base}.yaml")) for base in bases]
    merged = OmegaConf.merge(OmegaConf.structured(ModelConfig), *parts, own)
    return typing.cast(ModelConfig, OmegaConf.to_object(merged))


def body_parameters(model: ModelConfig) -> int:
    return parameter_count(model, vocab_size=1).non_embedding

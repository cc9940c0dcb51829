"""A mixture file: settings of data.mixture in YAML, for `data/mixture=FILE.yaml`.

    weighting: ratios
    ratios: {germanic: 0.4, slavic: 0.6}
    law: law.yaml        # counted from the folder of this file

Imports neither torch nor numpy.
"""

import re
from collections.abc import Iterator
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.config import MixtureConfig, MixtureStage

SETTINGS = [item.name for item in fields(MixtureConfig)]
OF_STAGES = [item.name for item in fields(MixtureStage)]


def read_mixture_file(path: Path) -> dict[str, Any]:
    """The settings that a mixture file names, as YAML has them; `law` as an absolute path.

    What the settings mean together is checked where they are used: others may join them.

    Raises FileNotFoundError, and ValueError with a line for every setting that does not exist or
    whose value is of the wrong kind.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        content = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    except OSError as error:  # a number, a date
        raise ValueError(f"{path}: must be a table of settings: {error}") from None
    if not OmegaConf.is_dict(content) or not content:
        raise ValueError(f"{path}: must be a table of settings, such as weighting: uniform")
    settings: dict[Any, Any] = OmegaConf.to_container(content, resolve=False)  # type: ignore[assignment]
    problems = [*_unknown(settings), *_not_text(settings)] or [
        *_not_path(settings),
        *_misfits(settings),
    ]
    if problems:
        raise ValueError("\n".join(f"{path}: {problem}" for problem in problems))
    law = settings.get("law")
    if law and not law.startswith("${"):
        settings["law"] = str(path.resolve().parent / Path(law).expanduser())
    return settings


def _unknown(settings: dict[Any, Any]) -> Iterator[str]:
    for name in settings:
        if name in ("data", "mixture"):
            yield f"{name}: settings of data.mixture stand by themselves, not below {name}:"
        elif name not in SETTINGS:
            yield _no_such(str(name), SETTINGS)
    stages = settings.get("stages")
    for number, stage in enumerate(stages if isinstance(stages, list) else []):
        for name in stage if isinstance(stage, dict) else []:
            if name not in OF_STAGES:
                yield f"stages[{number}]: {_no_such(str(name), OF_STAGES)}"


def _no_such(name: str, names: list[str]) -> str:
    meant = get_close_matches(name, names, n=2)
    hint = f"did you mean {' or '.join(meant)}?" if meant else f"there are {', '.join(names)}"
    return f"there is no setting {name}; {hint}"


def _not_text(value: Any, where: str = "") -> Iterator[str]:
    """Names of families and languages that YAML does not read as text, such as Norwegian's."""
    if isinstance(value, dict):
        for name, item in value.items():
            if not isinstance(name, str):
                yield _quote(where, name)
            yield from _not_text(item, f"{where}.{name}".lstrip("."))
    elif isinstance(value, list):
        for item in value:
            if isinstance(item, (dict, list)):
                yield from _not_text(item, where)
            elif not isinstance(item, str):
                yield _quote(where, item)


def _not_path(settings: dict[Any, Any]) -> Iterator[str]:
    """OmegaConf would take a number for text."""
    law = settings.get("law", "")
    if not isinstance(law, str):
        yield f"law={law!r}: must be text, the path of a law's file; put it in quotes"


def _quote(where: str, value: object) -> str:
    return (
        f"{where}: {value!r} is not a name; YAML reads no, off and yes as true and false, and "
        "digits as numbers: put names like these in quotes, as in 'no'"
    )


def _misfits(settings: dict[Any, Any]) -> list[str]:
    """One line for each setting whose value is of the wrong kind."""
    found = []
    for name, value in settings.items():
        try:
            OmegaConf.merge(OmegaConf.structured(MixtureConfig), {name: value})
        except OmegaConfBaseException as error:
            text = str(error)
            key = (re.search(r"full_key: (\S+)", text) or ["", name])[1]
            found.append(f"{key} does not fit: {text.splitlines()[0]}")
    return found

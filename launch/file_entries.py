"""Entries of lists in YAML files, such as stages of a mixture, without the keys that do not fit.

Imports neither torch nor megatron-core.
"""

import dataclasses
import typing
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, Node, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launch.near_names import closest
from launch.setting_names import rule_of, settings
from launch.yaml_lines import in_file


def take_out_slips(config: DictConfig, file: str, path: Path) -> dict[str, list[str]]:
    """Takes keys that do not fit out of the entries of all lists of `config`, which is `file`
    (GROUP/NAME) at `path`; what is wrong with each, by the setting that is the list."""
    told: dict[str, list[str]] = {}
    for setting, cls in _lists().items():
        where = _place_of(config, setting)
        for number, entry in enumerate(_entries(_node_at(config, where))):
            for own in entry if isinstance(entry, DictConfig) else ():
                key, rule = str(own), _broken(cls, own, entry)
                if rule is None:
                    continue
                where_it_is = in_file(f"{file}.yaml", path, f"{where}[{number}].{key}")
                place = f"{where_it_is}: {setting}[{number}].{key}"
                told.setdefault(setting, []).append(f"{place}{rule}")
    for setting, cls in _lists().items() if told else ():
        if setting not in told:
            continue
        for entry in _entries(_node_at(config, _place_of(config, setting))):
            if isinstance(entry, DictConfig):
                for slip in [key for key in entry if _broken(cls, key, entry)]:
                    del entry[slip]
    return told


def take_out_switches(config: DictConfig, file: str, path: Path) -> dict[str, list[str]]:
    """As `take_out_slips`, of on, off, yes and no where text belongs, as in run_dir: off or
    languages: [de, no]: YAML takes them for true and false, OmegaConf makes these True and False.
    """
    told: dict[str, list[str]] = {}
    group = file.rpartition("/")[0].replace("/", ".")

    def look(node: DictConfig, above: str) -> None:
        for key in list(map(str, node)):
            name, value = f"{above}{key}", node._get_node(key)
            if isinstance(value, DictConfig):
                look(value, f"{name}.")
                continue
            setting = next((s for s in (name, f"{group}.{name}") if s in settings()), None)
            entries = _entries(value) if isinstance(value, ListConfig) else [value]
            found = [entry._value() for entry in entries if isinstance(entry, Node)]
            if setting is None or not any(isinstance(one, bool) for one in found):
                continue
            if _is_text(settings()[setting], in_list=isinstance(value, ListConfig)):
                word = "on, yes or true" if True in found else "off, no or false"
                told[setting] = [
                    f"{in_file(f'{file}.yaml', path, name)}: {setting} must be text; YAML reads "
                    f"{word} without quotes as true or false, so write the text in quotes"
                ]
                del node[key]

    look(config, "")
    return told


def _is_text(annotation: Any, *, in_list: bool) -> bool:
    kind = typing.get_origin(annotation)
    if in_list or kind in (list, dict):
        return in_list and kind is list and typing.get_args(annotation) == (str,)
    return str in (annotation, *typing.get_args(annotation))


def _lists() -> dict[str, type]:
    """The settings that are lists of dataclasses, and of which."""
    found = {}
    for setting, annotation in settings().items():
        cls = next(iter(typing.get_args(annotation)), None)
        if typing.get_origin(annotation) is list and dataclasses.is_dataclass(cls):
            found[setting] = typing.cast(type, cls)
    return found


def _place_of(config: Any, setting: str) -> str:
    """What a file calls the setting: stages, in one of data/mixture; "" where it has it not."""
    parts = setting.split(".")
    names = [".".join(parts[first:]) for first in range(len(parts))]
    return next((name for name in names if _has(config, name)), "")


def _has(config: DictConfig, name: str) -> bool:
    above, _, last = name.rpartition(".")
    node = _node_at(config, above)
    return isinstance(node, DictConfig) and node._get_node(last) is not None


def _node_at(config: DictConfig, name: str) -> Any:
    """None where there is none. What is written there is not resolved: what it refers to may be in
    another file."""
    node: Any = config
    for part in name.split(".") if name else ():
        node = node._get_node(part) if isinstance(node, DictConfig) else None
    return node


def _entries(node: Any) -> list[Any]:
    """Of a list, not resolved; none where it is no list."""
    if not isinstance(node, ListConfig):
        return []
    return [node._get_node(number) for number in range(len(node))]


def _broken(cls: type, key: Any, entry: DictConfig) -> str | None:
    """The rule that the value of `key` breaks, as the end of a sentence; None for none."""
    names = [field.name for field in dataclasses.fields(cls)]
    if key not in names:
        meant = closest(str(key), names)
        hint = (
            f"; did you mean {' or '.join(meant)}?" if meant else f"; there are {', '.join(names)}"
        )
        return f": there is no such setting in an entry of this list{hint}"
    value = entry._get_node(key)
    try:
        OmegaConf.merge(OmegaConf.structured(cls), {key: value})
    except OmegaConfBaseException:
        return f"={value} must be {rule_of(typing.get_type_hints(cls)[key])[0]}"
    return None

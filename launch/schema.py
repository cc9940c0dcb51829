"""From Hydra's YAML and command line to the dataclasses.

Registers the dataclasses with Hydra, so that types are checked and unknown settings refused;
`launch.explain` says what does not fit. Imports neither torch nor megatron-core.
"""

import dataclasses
import typing
from collections.abc import Sequence
from functools import cache
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from launch.explain import explain, no_model, no_such_setting
from launch.file_keys import explained
from launch.findings import accused, naming
from launch.mixture_file import with_mixture_files
from launch.setting_names import CONF, override_of, rule_of, sections, settings
from launch.values_that_work import with_values
from models.config import ModelConfig
from parallel.config import ConfigError
from pretrain.config import PretrainConfig
from pretrain.config_rules import validate

Built = typing.TypeVar("Built")


@cache
def register() -> None:
    """Makes the dataclasses known to Hydra as `schema`, the first entry of conf/pretrain.yaml."""
    schema = OmegaConf.structured(PretrainConfig)
    schema.model = ModelConfig  # its fields one by one, instead of a whole that is missing
    # families are named by the data: data.mixture.ratios.slavic=2 needs no + in front
    OmegaConf.set_struct(schema.data.mixture, False)
    ConfigStore.instance().store(name="schema", node=schema)


def load(overrides: Sequence[str] = ()) -> PretrainConfig:
    """The configuration of a launch with these words on its command line.

    Raises ConfigError as the launcher prints it. The rules across rooms, which need the number of
    processes, are those of `pretrain.config_rules.validate`.
    """
    register()
    with explained(overrides), initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("pretrain", overrides=with_mixture_files(overrides))
    return to_pretrain_config(cfg, overrides)


def to_pretrain_config(cfg: DictConfig, overrides: Sequence[str] = ()) -> PretrainConfig:
    """Builds the dataclasses, each of which checks its own rules.

    Raises ConfigError with the problems of all of them: settings that do not exist (a + in front
    gets them past Hydra), settings without a value, broken rules.
    """
    config, problems = build(cfg, overrides)
    if config is None or problems:
        raise ConfigError(*problems)
    return config


def validated(cfg: DictConfig, overrides: Sequence[str], world_size: int) -> PretrainConfig:
    """`to_pretrain_config`, held against the rules across rooms as well.

    Raises ConfigError with everything that is wrong, of all classes and across them.
    """
    config, problems = build(cfg, overrides)
    if config is not None:
        problems += broken_rules_across_rooms(config, world_size, problems)
    if config is None or problems:
        raise ConfigError(*problems)
    return config


def build(
    cfg: DictConfig, overrides: Sequence[str] = ()
) -> tuple[PretrainConfig | None, list[str]]:
    """The dataclasses, and everything that is wrong with the values of each.

    Where something is, the objects hold what was typed without having passed their own rules, so
    that the rules of the others can still be looked at. None where settings have no value.
    """
    problems = [no_such_setting(key, overrides) for key in _unknown_settings(cfg)]
    if OmegaConf.is_missing(cfg.model, "name"):
        problems.append(no_model())
    else:
        problems += [f"{key} has no value" for key in sorted(OmegaConf.missing_keys(cfg.model))]
    config, found = _build(PretrainConfig, cfg, overrides)
    return config, problems + with_values(found, cfg)


def broken_rules_across_rooms(
    config: PretrainConfig, world_size: int, known: Sequence[str]
) -> list[str]:
    """What `pretrain.config_rules.validate` says, but for what is in `known`, and for rules of
    settings whose own values are wrong, as `known` says: there is no better value for the others
    before those are right."""
    wrong = naming(accused(known))
    try:
        validate(config, world_size)
    except ConfigError as error:
        return [line for line in error.problems if line not in known and not wrong(line)]
    except (ArithmeticError, ValueError):
        if not known:  # sizes of 0 and the like, which have been told, make nonsense of the rest
            raise
    return []


def _build(
    cls: type[Built], node: DictConfig, overrides: Sequence[str]
) -> tuple[Built | None, list[str]]:
    """An object of `cls` with the values of `node`, and what is wrong with them; see `build`."""
    values: dict[str, Any] = {}
    problems: list[str] = []
    for name, annotation in typing.get_type_hints(cls).items():
        try:
            if OmegaConf.is_missing(node, name):
                continue  # told by whoever asked
            value = node[name]
            if dataclasses.is_dataclass(annotation):
                value, found = _build(typing.cast(type, annotation), value, overrides)
                problems += found
                if value is None:
                    continue
            elif OmegaConf.is_config(value):
                value = OmegaConf.to_object(value)
                value, found = _without_nested(f"{node._get_full_key(name)}", value, overrides)
                problems += found
        except InterpolationToMissingValueError:
            continue
        except (ValueError, OmegaConfBaseException) as error:
            problems += explain(error, overrides).problems
        else:
            values[name] = value
    if any(field.name not in values for field in dataclasses.fields(typing.cast(Any, cls))):
        return None, problems
    try:
        return cls(**values), problems
    except (ValueError, OmegaConfBaseException) as error:
        problems += [p for p in explain(error, overrides).problems if p not in problems]
    unchecked = object.__new__(cls)
    vars(unchecked).update(values)
    return unchecked, problems


def _without_nested(key: str, value: Any, overrides: Sequence[str]) -> tuple[Any, list[str]]:
    """A list of values without the lists and tables among them, which OmegaConf lets pass, and what
    is wrong with those."""
    element = next(iter(typing.get_args(settings().get(key))), None)
    if not isinstance(value, list) or element not in (str, int, float):
        return value, []
    wrong = [i for i, entry in enumerate(value) if isinstance(entry, (list, dict))]
    typed = override_of(key, overrides) or f"{key}={value}"
    rule = rule_of(element)[0]
    return [entry for i, entry in enumerate(value) if i not in wrong], [
        f"{typed}: entry {i + 1} must be {rule}" for i in wrong
    ]


def _unknown_settings(cfg: DictConfig) -> list[str]:
    unknown = []

    def look(node: DictConfig, prefix: str) -> None:
        for name in map(str, node):
            key = f"{prefix}{name}"
            if key in sections():
                look(node[name], f"{key}.")
            elif key not in settings():
                unknown.append(key)

    look(cfg, "")
    return unknown

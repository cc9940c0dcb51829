"""From Hydra's YAML and command line to the dataclasses, and clear words where they do not fit.

Registers the dataclasses with Hydra, so that types are checked and unknown settings refused.
`explain` turns what Hydra and OmegaConf say into one line each: the setting as typed, the rule,
and what was probably meant. It reads their messages, which tests hold to the versions we allow.
Imports neither torch nor megatron-core.
"""

import dataclasses
import re
import typing
from collections.abc import Iterator, Sequence
from enum import Enum
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any

import yaml  # type: ignore[import-untyped]
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, QuotedString, Sweep
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from launch.aliases import ADVICE, ALL_THERE_ARE, REFUSED_VALUES
from launch.findings import accused, naming
from launch.mixture_file import WORD, with_mixture_files
from launch.near_names import advice_on, closest
from launch.units import number_meant
from launch.values_that_work import with_values
from models.config import ModelConfig
from models.parameter_count import parameter_count
from parallel.config import ConfigError
from pretrain.config import PretrainConfig
from pretrain.config_rules import validate

CONF = Path(__file__).resolve().parent.parent / "conf"
ADDED = ("model", "experiment")  # groups chosen with a + in front: no default stands for them
SITES = "cluster"  # not a group of the launcher's: launch.site_settings reads these files
SWEEPS = "sweep"  # neither: launch.sweep does

Built = typing.TypeVar("Built")

# what Hydra, OmegaConf and the YAML reader raise while they put a configuration together
CompositionError = (HydraException, OmegaConfBaseException, yaml.YAMLError)


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
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("pretrain", overrides=with_mixture_files(overrides))
    except CompositionError as error:
        raise explain(error, overrides) from None
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
    problems = [_no_such_setting(key, overrides) for key in _unknown_settings(cfg)]
    if OmegaConf.is_missing(cfg.model, "name"):
        problems.append(_no_model())
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


def shipped_models() -> dict[str, ModelConfig]:
    """The models of conf/model, smallest first."""
    models = {path.stem: _model(path) for path in (CONF / "model").glob("*.yaml")}
    return dict(sorted(models.items(), key=lambda item: (_body(item[1]), item[0])))


def explain(error: Exception, overrides: Sequence[str] = ()) -> ConfigError:
    """What `error` means for the one who typed `overrides`, as a ConfigError."""
    if isinstance(error, ConfigError):
        return error
    if not isinstance(error, CompositionError):
        return ConfigError(str(error))
    # Hydra wraps an error of an override (cause) and quotes one of a YAML file (text)
    text = f"{error}\n{error.__cause__ or ''}"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        asker = re.match(r"In '([^']+)':", text)
        return ConfigError(
            _no_such_file(error.missing_cfg_file, overrides, asker[1] if asker else None)
        )
    if found := re.search(rf"Could not override '({SITES}|{SWEEPS})'\.", text):
        return ConfigError(_of_another_command(found[1], overrides))
    if found := re.search(r"Could not override '(\w+)'\. No match in the defaults list", text):
        return ConfigError(_not_yet_chosen(found[1], overrides))
    if found := re.search(r"Multiple values for (\w+)\.|^(\w+) appears more than once", text):
        return ConfigError(_already_chosen(found[1] or found[2], overrides))
    if isinstance(error, OverrideParseException):
        return ConfigError(_unreadable(error.override, text))
    if found := re.search(r"An item is already at '(.+)'", text):
        typed = _typed(found[1], [word for word in overrides if word.startswith("+")])
        return ConfigError(f"{typed} exists already; drop the +: {typed.lstrip('+')}")
    if found := re.search(r"Ambiguous value for argument '(.*)'", text):
        return ConfigError(_several_values(found[1]))
    if found := re.search(
        r"""Environment variable '(.+?)' not found["']?\s+full_key: (\S+)""", text
    ):
        return ConfigError(_not_in_the_environment(found[1], found[2], overrides))
    if found := re.search(r"full_key: (\S+)", text):
        return ConfigError(_wrong_setting(found[1], text, overrides))
    if found := re.search(r"In '([^']+)': \w+ raised while composing config:\n(.*)", text):
        return ConfigError(f"{found[1]}.yaml: does not fit: {found[2]}")
    return ConfigError(" ".join(str(error).split()))  # the YAML reader names file, line and column


def _unreadable(word: str, text: str) -> str:
    reason = text.split(f"override '{word}'")[-1].strip().splitlines()[0]
    name, equals, value = word.partition("=")
    if not equals and (meant := _with_a_value(word)):
        return f"{word} is not SETTING=VALUE; write {meant}"
    if value.startswith("="):
        return f"{word}: one = is enough; write {name}={value.lstrip('=')}"
    could_be_text = value and not set(value) & set("[]{}()'\"") and str in _kinds(_annotation(name))
    hint = f"; if the value is text, quote it: \"{name}='{value}'\"" if could_be_text else ""
    return f"{word} is not SETTING=VALUE as Hydra reads it: {reason}{hint}"


def _with_a_value(name: str) -> str | None:
    """A word for what was typed alone: a setting, a group of them, or the name of a file."""
    if name in settings():
        return f"{name}=VALUE"
    if name in _sections():
        members = [one for one in settings() if one.startswith(f"{name}.")]
        return f"{name}.SETTING=VALUE, as in {members[0]}"
    for group in ADDED:
        if (CONF / group / f"{name}.yaml").is_file():
            return f"+{group}={name}"
    return None


def _several_values(word: str) -> str:
    name, _, value = word.lstrip("+").partition("=")
    if meant := number_meant(name, value, _kinds(_annotation(name))):
        return f"{word} is no number; {meant}"
    return f"{word} is a list or a sweep; write [a,b] for a list, add --multirun for a sweep"


def _wrong_setting(key: str, text: str, overrides: Sequence[str]) -> str:
    """An error of OmegaConf about `key`: it does not exist, or its value does not fit."""
    entry = re.fullmatch(r"([^\[]+)\[(\d+)\]", key)  # wandb.tags[2]: the third of wandb.tags
    key = entry[1] if entry else key
    value = re.search(r"[Vv]alue '(.*?)'", text)
    override = override_of(key, overrides, value[1] if value else None)
    file = re.search(r"In '([^']+)': \w+ raised while composing", text)
    where = f"{file[1]}.yaml: " if file and not override else ""
    if found := re.search(r"Key '.*' not in '(\w+)'", text):
        return where + _no_such_setting(key, overrides, _entries().get(found[1]))
    if re.search(r"Key '.*' is not in", text):
        return where + _no_such_setting(key, overrides)
    if found := re.search(r"Interpolation key '(.*)' not found", text):
        return f"{where}{key} refers to ${{{found[1]}}}, which does not exist"
    if "does not support deletion" in text:
        return f"{override}: a setting cannot be taken away; it has its default when not named"
    if key in _sections() and override and (advice := ADVICE.get(override.lower())):
        return f"{override}: {key} is a group of settings; {advice}"
    if key in _sections():
        members = [name for name in settings() if name.startswith(f"{key}.")]
        return f"{where}{override or key}: {key} is a group of settings: {', '.join(members)}"
    typed = override or (f"{key}={value[1]}" if value else key)
    annotation = _annotation(key)
    if annotation is None:  # a table where one value belongs, or one of Hydra's own settings
        return f"{where}{typed} does not fit: {text.splitlines()[1]}"
    element = next(iter(typing.get_args(annotation)), None)
    if entry and element in (str, int, float):
        return f"{where}{typed}: entry {int(entry[2]) + 1} must be {rule_of(element)[0]}"
    rule, choices = rule_of(annotation)
    given = typed.partition("=")[2]
    hint = number_meant(key, given, _kinds(annotation))
    hint = hint or REFUSED_VALUES.get(key, {}).get(given.lower())
    if hint is None and (meant := closest(given, choices)):
        hint = f"did you mean {meant[0]}?"
    if where and choices and given in ("True", "False"):
        hint = f"{hint or ''} YAML takes on, off, yes and no for true and false".strip()
    return f"{where}{typed} must be {rule}" + (f"; {hint}" if hint else "")


def written(setting: str, value: str) -> str:
    """`value` as the setting takes it, where it is plain what that is: 10000 for 10k, rms_norm for
    RMSNorm."""
    annotation = settings()[setting]
    kinds, (_, choices) = _kinds(annotation), rule_of(annotation)
    if choices:
        return value if value in choices else next(iter(closest(value, choices)), value)
    try:
        _ = {int: int, float: float}[next(kind for kind in (int, float) if kind in kinds)](value)
    except StopIteration:  # text
        return value
    except ValueError:
        meant = number_meant(setting, value, kinds) or ""
        return meant.partition(f"{setting}=")[2] if meant.startswith("write ") else value
    return value


def _not_in_the_environment(name: str, key: str, overrides: Sequence[str]) -> str:
    return (
        f"{_typed(key, overrides)}: {name} is not set in the environment; export it, or give what "
        f"holds without it: ${{oc.env:{name},VALUE}}"
    )


def _no_such_setting(key: str, overrides: Sequence[str], cls: type | None = None) -> str:
    """cls: of whose objects there is a list, as of stages, in one of which there is not the key."""
    if cls is not None:
        meant = closest(key, [field.name for field in dataclasses.fields(typing.cast(Any, cls))])
        hint = f"; did you mean {' or '.join(meant)}?" if meant else ""
        typed = next((word for word in overrides if key in word), key)
        return f"{typed}: there is no setting {key} in an entry of this list{hint}"
    typed = _typed(key, overrides)
    name, _, value = typed.lstrip("+~").partition("=")
    if key.startswith(f"{name}."):  # in a table that was typed
        name, value = key, ""
    if name in ADDED and value:
        return (
            f"{typed}: its file has no line `# @package _global_`, so that its settings lie below "
            f"{name}; write that as its first"
        )
    if name == SWEEPS:
        return _of_another_command(name, overrides)
    typed_as = {group: f"+{group}" if group in ADDED else group for group in groups()}
    names = [*settings(), *typed_as] if "." not in name else list(settings())
    near, advice = advice_on(name, value, names)
    group = name.rpartition(".")[0]
    if not near and not advice and typed.startswith(f"{group}={{") and group in groups():
        there = _files_of(group)
        advice = f"{group}=NAME chooses a file of conf/{group}: {', '.join(there)}" if there else ""
    if near:
        advice = f"did you mean {' or '.join(typed_as.get(one, one) for one in near)}?"
    return f"{typed}: there is no setting {name}; {advice or ALL_THERE_ARE}"


def _of_another_command(group: str, overrides: Sequence[str]) -> str:
    typed = _typed(group, overrides)
    if group == SITES:
        return f"{typed} is a word for python -m launch.slurm"
    return f"{typed} is no word of a run's; python -m launch.sweep design takes files of conf/sweep"


def _no_such_file(path: str, overrides: Sequence[str], asker: str | None) -> str:
    """asker: the file whose defaults list names it; None for the command line."""
    group, _, name = path.rpartition("/")
    there = _files_of(group)
    plus = "+" if group in ADDED else ""
    if not group or not there:
        its_group = group.rpartition("/")[2]
        slash = f"; write `/{its_group}: {name}` in its defaults, with a slash"
        where = f"{asker}.yaml: " if asker else ""
        return f"{where}{path}.yaml is not among the configuration files" + slash * (
            asker is not None and its_group in groups()
        )
    typed, meant = f"{plus}{group}={name}", closest(name, there)
    if asker is not None and override_of(group, overrides, name) is None:  # nobody typed it
        typed = f"{asker}.yaml: `/{group}: {name}` of its defaults"
    else:
        meant = [f"{plus}{group}={near}" for near in meant]
    hint = f"; did you mean {' or '.join(meant)}?" if meant else "."
    return f"{typed}: there is no conf/{path}.yaml{hint} Choose from {', '.join(there)}"


def nameless_choices(words: Sequence[str]) -> dict[str, str]:
    """What is wrong with words such as parallel=2, by the word; Hydra fails on them unexplained."""
    return {
        word: f"{word} names no file of conf/{group}; choose from {', '.join(_files_of(group))}"
        for word in words
        if (group := word.lstrip("+").partition("=")[0]) in groups() and group != WORD
        if "=" in word and not _may_name_files(word)
    }


def _files_of(group: str) -> list[str]:
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


def _may_name_files(word: str) -> bool:
    try:
        value = OverridesParser.create().parse_override(word).value()
    except HydraException:  # which Hydra will say
        return True
    values = value.list if isinstance(value, ChoiceSweep) else value
    if not isinstance(values, list):
        values = [values]
    return all(isinstance(one, (str, dict, QuotedString, Sweep)) for one in values)


def _not_yet_chosen(group: str, overrides: Sequence[str]) -> str:
    typed = _typed(group, overrides)
    return (
        f"{typed}: no {group} is chosen yet that this could replace; write "
        f"+{typed.partition('=')[0]}={typed.partition('=')[2] or 'NAME'}"
    )


def _already_chosen(group: str, overrides: Sequence[str]) -> str:
    typed = _typed(group, [word for word in overrides if word.startswith("+")])
    if typed == group:  # nobody typed it
        return (
            f"the defaults of a file choose {group} a second time; write `override /{group}: NAME` "
            "there"
        )
    return f"{typed}: {_a(group)} is chosen already; replace it with {typed.lstrip('+')}"


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _no_model() -> str:
    rows = [
        f"  {name:<14} {model.num_layers:>3} layers of {model.hidden_size:>4} {_body(model):>16,}"
        for name, model in shipped_models().items()
    ]
    return "\n".join(
        [
            "no model is chosen; add +model=NAME, as in +model=magneto_1b. There are, with their "
            "parameters outside the embedding:",
            *rows,
        ]
    )


def _model(path: Path) -> ModelConfig:
    """A file of conf/model, with those that its defaults list names below it."""
    own = typing.cast(DictConfig, OmegaConf.load(path))
    bases = [name for name in own.pop("defaults", []) if name != "_self_"]
    parts = [OmegaConf.load(path.with_name(f"{base}.yaml")) for base in bases]
    merged = OmegaConf.merge(OmegaConf.structured(ModelConfig), *parts, own)
    return typing.cast(ModelConfig, OmegaConf.to_object(merged))


def _body(model: ModelConfig) -> int:
    return parameter_count(model, vocab_size=1).non_embedding


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


def _typed(key: str, overrides: Sequence[str]) -> str:
    return override_of(key, overrides) or key


@cache
def settings() -> dict[str, Any]:
    """Every setting by its dotted name -> its annotation."""
    return dict(_walk(PretrainConfig, ""))


@cache
def _entries() -> dict[str, type]:
    """The dataclasses that settings are lists of, by name."""
    classes = (cls for annotation in settings().values() for cls in typing.get_args(annotation))
    return {
        cls.__name__: cls
        for cls in classes
        if isinstance(cls, type) and dataclasses.is_dataclass(cls)
    }


@cache
def _sections() -> set[str]:
    return {name.rpartition(".")[0] for name in settings()} - {""}


@cache
def groups() -> list[str]:
    """Folders of conf that a command line chooses files of."""
    folders = (folder.name for folder in CONF.iterdir() if folder.is_dir())
    return sorted({*folders, WORD} - {SITES, SWEEPS})


def _annotation(key: str) -> Any:
    """Type of a setting, or of an entry of a table of settings; None for any other key."""
    table = settings().get(key.rpartition(".")[0])
    return typing.get_args(table)[1] if table is not None else settings().get(key)


def _kinds(annotation: Any) -> tuple[Any, ...]:
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


def _unknown_settings(cfg: DictConfig) -> list[str]:
    unknown = []

    def look(node: DictConfig, prefix: str) -> None:
        for name in map(str, node):
            key = f"{prefix}{name}"
            if key in _sections():
                look(node[name], f"{key}.")
            elif key not in settings():
                unknown.append(key)

    look(cfg, "")
    return unknown


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

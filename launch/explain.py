"""Clear words where a command line or a YAML file does not fit.

`explain` turns what Hydra and OmegaConf say into one line each: the setting as typed, the rule,
and what was probably meant. It reads their messages, which tests hold to the versions we allow.
Imports neither torch nor megatron-core.
"""

import dataclasses
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, QuotedString, Sweep
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from launch.aliases import ADVICE, ALL_THERE_ARE, REFUSED_VALUES
from launch.mixture_file import WORD
from launch.near_names import advice_on, closest
from launch.setting_names import (
    ADDED,
    CONF,
    SITES,
    SWEEPS,
    annotation_of,
    body_parameters,
    files_of,
    groups,
    kinds_of,
    listed_classes,
    override_of,
    rule_of,
    sections,
    settings,
    shipped_models,
    typed_word,
)
from launch.units import number_meant
from launch.yaml_lines import in_file
from parallel.config import ConfigError

# what Hydra, OmegaConf and the YAML reader raise while they put a configuration together
CompositionError = (HydraException, OmegaConfBaseException, yaml.YAMLError)


def explain(
    error: Exception, overrides: Sequence[str] = (), files: Mapping[str, Path] | None = None
) -> ConfigError:
    """What `error` means for the one who typed `overrides`, as a ConfigError.

    files: those that were read, by GROUP/NAME; of what is in one the line is told.
    """
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
        typed = typed_word(found[1], [word for word in overrides if word.startswith("+")])
        return ConfigError(f"{typed} exists already; drop the +: {typed.lstrip('+')}")
    if found := re.search(r"Ambiguous value for argument '(.*)'", text):
        return ConfigError(_several_values(found[1]))
    if found := re.search(
        r"""Environment variable '(.+?)' not found["']?\s+full_key: (\S+)""", text
    ):
        return ConfigError(_not_in_the_environment(found[1], found[2], overrides))
    if found := re.search(r"full_key: (\S+)", text):
        return ConfigError(_wrong_setting(found[1], text, overrides, files or {}))
    if found := re.search(r"In '([^']+)': \w+ raised while composing config:\n(.*)", text):
        return ConfigError(f"{found[1]}.yaml: does not fit: {found[2]}")
    said = str(error) or str(error.__cause__ or type(error).__name__)
    return ConfigError(" ".join(said.split()))  # the YAML reader names file, line and column


def _unreadable(word: str, text: str) -> str:
    reason = text.split(f"override '{word}'")[-1].strip().splitlines()[0]
    name, equals, value = word.partition("=")
    if not equals and (meant := _with_a_value(word)):
        return f"{word} is not SETTING=VALUE; write {meant}"
    if value.startswith("="):
        return f"{word}: one = is enough; write {name}={value.lstrip('=')}"
    could_be_text = (
        value and not set(value) & set("[]{}()'\"") and str in kinds_of(annotation_of(name))
    )
    hint = f"; if the value is text, quote it: \"{name}='{value}'\"" if could_be_text else ""
    return f"{word} is not SETTING=VALUE as Hydra reads it: {reason}{hint}"


def _with_a_value(name: str) -> str | None:
    """A word for what was typed alone: a setting, a group of them, or the name of a file."""
    if name in settings():
        return f"{name}=VALUE"
    if name in sections():
        members = [one for one in settings() if one.startswith(f"{name}.")]
        return f"{name}.SETTING=VALUE, as in {members[0]}"
    for group in ADDED:
        if (CONF / group / f"{name}.yaml").is_file():
            return f"+{group}={name}"
    return None


def _several_values(word: str) -> str:
    name, _, value = word.lstrip("+").partition("=")
    if meant := number_meant(name, value, kinds_of(annotation_of(name))):
        return f"{word} is no number; {meant}"
    return f"{word} is a list or a sweep; write [a,b] for a list, add --multirun for a sweep"


def _wrong_setting(key: str, text: str, overrides: Sequence[str], files: Mapping[str, Path]) -> str:
    """An error of OmegaConf about `key`: it does not exist, or its value does not fit."""
    entry = re.fullmatch(r"([^\[]+)\[(\d+)\]", key)  # wandb.tags[2]: the third of wandb.tags
    key = entry[1] if entry else key
    value = re.search(r"[Vv]alue '(.*?)'", text)
    override = override_of(key, overrides, value[1] if value else None)
    file = re.search(r"In '([^']+)': \w+ raised while composing", text)
    where = f"{_place_in(file[1], key, files)}: " if file and not override else ""
    if found := re.search(r"Key '.*' not in '(\w+)'", text):
        return where + no_such_setting(key, overrides, listed_classes().get(found[1]))
    if re.search(r"Key '.*' is not in", text):
        return where + no_such_setting(key, overrides)
    if found := re.search(r"Interpolation key '(.*)' not found", text):
        return f"{where}{key} refers to ${{{found[1]}}}, which does not exist"
    if "does not support deletion" in text:
        return f"{override}: a setting cannot be taken away; it has its default when not named"
    if key in sections() and override and (advice := ADVICE.get(override.lower())):
        return f"{override}: {key} is a group of settings; {advice}"
    if key in sections():
        members = [name for name in settings() if name.startswith(f"{key}.")]
        return f"{where}{override or key}: {key} is a group of settings: {', '.join(members)}"
    typed = override or (f"{key}={value[1]}" if value else key)
    annotation = annotation_of(key)
    if annotation is None:  # a table where one value belongs, or one of Hydra's own settings
        return f"{where}{typed} does not fit: {text.splitlines()[1]}"
    element = next(iter(typing.get_args(annotation)), None)
    if entry and element in (str, int, float):
        return f"{where}{typed}: entry {int(entry[2]) + 1} must be {rule_of(element)[0]}"
    rule, choices = rule_of(annotation)
    given = typed.partition("=")[2]
    hint = number_meant(key, given, kinds_of(annotation))
    hint = hint or REFUSED_VALUES.get(key, {}).get(given.lower())
    if hint is None and (meant := closest(given, choices)):
        hint = f"did you mean {meant[0]}?"
    if where and choices and given in ("True", "False"):
        hint = f"{hint or ''} YAML takes on, off, yes and no for true and false".strip()
    return f"{where}{typed} must be {rule}" + (f"; {hint}" if hint else "")


def _place_in(file: str, setting: str, files: Mapping[str, Path]) -> str:
    """Where a file sets it; a file of the group train says train_steps for train.train_steps."""
    shown = f"{file}.yaml"
    if file not in files:
        return shown
    parts = setting.split(".")
    return in_file(shown, files[file], *(".".join(parts[i:]) for i in range(len(parts))))


def written(setting: str, value: str) -> str:
    """`value` as the setting takes it, where it is plain what that is: 10000 for 10k, rms_norm for
    RMSNorm."""
    annotation = settings()[setting]
    kinds, (_, choices) = kinds_of(annotation), rule_of(annotation)
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
        f"{typed_word(key, overrides)}: {name} is not set in the environment; export it, or give "
        f"what holds without it: ${{oc.env:{name},VALUE}}"
    )


def no_such_setting(key: str, overrides: Sequence[str], cls: type | None = None) -> str:
    """cls: of whose objects there is a list, as of stages, in one of which there is not the key."""
    if cls is not None:
        meant = closest(key, [field.name for field in dataclasses.fields(typing.cast(Any, cls))])
        hint = f"; did you mean {' or '.join(meant)}?" if meant else ""
        typed = next((word for word in overrides if key in word), key)
        return f"{typed}: there is no setting {key} in an entry of this list{hint}"
    typed = typed_word(key, overrides)
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
        there = files_of(group)
        advice = f"{group}=NAME chooses a file of conf/{group}: {', '.join(there)}" if there else ""
    if near:
        advice = f"did you mean {' or '.join(typed_as.get(one, one) for one in near)}?"
    return f"{typed}: there is no setting {name}; {advice or ALL_THERE_ARE}"


def _of_another_command(group: str, overrides: Sequence[str]) -> str:
    typed = typed_word(group, overrides)
    if group == SITES:
        return f"{typed} is a word for python -m launch.slurm"
    return f"{typed} is no word of a run's; python -m launch.sweep design takes files of conf/sweep"


def _no_such_file(path: str, overrides: Sequence[str], asker: str | None) -> str:
    """asker: the file whose defaults list names it; None for the command line."""
    group, _, name = path.rpartition("/")
    there = files_of(group)
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
        word: f"{word} names no file of conf/{group}; choose from {', '.join(files_of(group))}"
        for word in words
        if (group := word.lstrip("+").partition("=")[0]) in groups() and group != WORD
        if "=" in word and not _may_name_files(word)
    }


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
    typed = typed_word(group, overrides)
    return (
        f"{typed}: no {group} is chosen yet that this could replace; write "
        f"+{typed.partition('=')[0]}={typed.partition('=')[2] or 'NAME'}"
    )


def _already_chosen(group: str, overrides: Sequence[str]) -> str:
    typed = typed_word(group, [word for word in overrides if word.startswith("+")])
    if typed == group:  # nobody typed it
        return (
            f"the defaults of a file choose {group} a second time; write `override /{group}: NAME` "
            "there"
        )
    return f"{typed}: {_a(group)} is chosen already; replace it with {typed.lstrip('+')}"


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def no_model() -> str:
    rows = [
        f"  {name:<14} {model.num_layers:>3} layers of {model.hidden_size:>4} "
        f"{body_parameters(model):>16,}"
        for name, model in shipped_models().items()
    ]
    return "\n".join(
        [
            "no model is chosen; add +model=NAME, as in +model=magneto_1b. There are, with their "
            "parameters outside the embedding:",
            *rows,
        ]
    )

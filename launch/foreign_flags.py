"""`--tensor-model-parallel-size 2`: options as other frameworks take them, as words of ours.

Imports neither torch nor megatron-core.
"""

import argparse
import re
from collections.abc import Sequence

from launch.aliases import ADVICE, ALL_THERE_ARE
from launch.explain import written
from launch.near_names import advice_on, closest
from launch.repeated_words import OF_THE_JOB
from launch.setting_names import ADDED, groups, settings

# what Hydra itself takes on the launcher's command line
HYDRAS_OPTIONS = (
    *("--help", "--hydra-help", "--version", "--cfg", "--resolve", "--package", "--run"),
    *("--multirun", "--shell-completion", "--config-path", "--config-name", "--config-dir"),
    *("--experimental-rerun", "--info"),
)
_NAME = re.compile(r"\+?[A-Za-z_][\w./]*")
_NUMBER = re.compile(r"-\d[\d.e-]*")


def options_of(parser: argparse.ArgumentParser) -> list[str]:
    return ["--help", *re.findall(r"--[\w-]+", parser.format_usage())]


def with_words(
    arguments: Sequence[str], options: Sequence[str], *, job: bool = True
) -> tuple[list[str], list[str]]:
    """The arguments with words in place of --NAME [VALUE] of options that there are not, where
    there is no doubt which are meant, else without; and for each such option what is wrong.

    job: the command takes words of SLURM jobs, such as nodes=2. Two words that a = should join are
    told and joined as well. A beginning of one of `options` counts as that option, as it does for
    argparse.
    """
    words: list[str] = []
    problems: list[str] = []
    left, after_option = list(arguments), False
    while left:
        argument = left.pop(0)
        name, equals, value = argument.partition("=")
        known = any(option.startswith(name) for option in options)
        if _NAME.fullmatch(argument) and left and not after_option and _is_value(left[0]):
            value = left.pop(0)
            instead, text = _joined(argument, value, job)
            words += [instead] if instead else []
            problems.append(f"{argument} {value}: {text}")
            continue
        after_option = argument.startswith("-") and not equals  # what follows may be its value
        if not name.startswith("--") or known:
            words.append(argument)
            continue
        after_option = False
        if not equals and left and _is_value(left[0]):
            value = left.pop(0)
        instead, text = _instead(name.lstrip("-").lower().replace("-", "_"), value, job)
        words += [instead] if instead else []
        problems.append(f"{name} {value}".strip() + f": {text or _no_option(name, value, options)}")
    return words, problems


def _is_value(argument: str) -> bool:
    if "=" in argument:  # a word of its own
        return False
    return not argument.startswith(("-", "+", "~")) or bool(_NUMBER.fullmatch(argument))


def _no_option(flag: str, value: str, options: Sequence[str]) -> str:
    if flag in HYDRAS_OPTIONS:
        return "it is an option of the launcher, launch/pretrain.py; leave it out here"
    near = [f"{option} {value}".strip() for option in closest(flag, options)]
    hint = f"did you mean {' or '.join(near)}?" if near else f"of settings {ALL_THERE_ARE}"
    return f"there is no such option; {hint}"


def _joined(name: str, value: str, job: bool) -> tuple[str | None, str]:
    """As `_instead`, of a name and a value with a space between."""
    bare = name.lstrip("+")
    if bare in OF_THE_JOB and not job:
        return None, _of_a_job(bare)
    if bare in (*settings(), *groups(), *OF_THE_JOB):
        plus = "+" if bare in ADDED else ""
        return f"{plus}{bare}={value}", f"settings are one word; write {plus}{bare}={value}"
    near, _ = advice_on(bare, value, [*settings(), *groups(), *(OF_THE_JOB if job else ())])
    if not near and job and value.isdigit():
        near = ["nodes"]
    hint = f"did you mean {' or '.join(f'{one}={value}' for one in near)}?" if near else ""
    return None, f"settings are one word, SETTING=VALUE; {hint or ALL_THERE_ARE}"


def _of_a_job(name: str) -> str:
    return ADVICE.get(name, f"{name} is a word for python -m launch.slurm; leave it out here")


def _instead(name: str, value: str, job: bool) -> tuple[str | None, str]:
    """A word, and the advice; no word where several could be meant, no advice where none."""
    if name in OF_THE_JOB and not job:
        return None, _of_a_job(name)
    if name in (*groups(), *OF_THE_JOB):
        word = f"{'+' if name in ADDED else ''}{name}={value or 'NAME'}"
        return word if value else None, f"settings are words here; write {word}"
    off = name.startswith("no_")
    near, advice = advice_on(name.removeprefix("no_"), value or str(not off), list(settings()))
    if advice:
        found = re.search(r"write (\S+=\S+)$", advice)
        return (found[1] if found and not off else None), advice
    # likeness alone does not make a flag a setting: --processes is nearly data.something
    near = [one for one in near if _means(name.removeprefix("no_"), one)]
    if not near:
        return None, ""
    words = [f"{one}={written(one, value) if value else _unsaid(one, off)}" for one in near]
    sure = len(words) == 1 and not words[0].endswith("=VALUE")
    return words[0] if sure else None, f"settings are words here; write {' or '.join(words)}"


def _means(name: str, setting: str) -> bool:
    aliases, _ = advice_on(name, "", [])
    return setting in aliases or setting.rpartition(".")[2] == name.rpartition(".")[2]


def _unsaid(setting: str, off: bool) -> str:
    """The value of a flag without one."""
    return str(not off).lower() if settings()[setting] is bool else "VALUE"

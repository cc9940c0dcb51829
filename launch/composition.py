"""Words of a command line put together as far as they go.

Hydra stops at the first word it cannot place. Here such a word is noted and left out, and the rest
composed, so that all that is wrong is found at once. Imports neither torch nor megatron-core.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from launch.aliases import TOKENS
from launch.explain import CompositionError, explain, nameless_choices
from launch.file_keys import LeftOut, accused
from launch.mixture_file import with_mixture_files
from launch.origins import DEFAULT, Origin, is_mixture, name_of, origins_of
from launch.schema import register
from launch.setting_names import ADDED, CONF, groups, override_of, settings
from launch.units import plain_number
from parallel.config import ConfigError


@dataclass
class Composition:
    cfg: DictConfig | None  # None: not even the shipped files fit together
    words: list[str]  # those that took part
    refused: list[str] = field(default_factory=list)  # as typed
    problems: list[str] = field(default_factory=list)
    origins: dict[str, Origin] = field(default_factory=dict)
    of_files: LeftOut = field(default_factory=LeftOut)

    @property
    def lost(self) -> list[str]:
        """Settings and groups that somebody typed or wrote into a file, and that have another
        value, because it was refused."""
        took_part = {name_of(word) for word in self.words}
        names = {name_of(word) for word in self.refused} - took_part
        return sorted({*names, *self.of_files.settings} & {*settings(), *groups()})

    def typed(self, setting: str) -> bool:
        """Whether somebody chose the value: it is not the dataclass's default."""
        origin = self.origins.get(setting)
        return origin is not None and origin.source != DEFAULT


def compose_what_fits(words: Sequence[str], hidden: Sequence[str] = ()) -> Composition:
    """Composes `words`; those that Hydra refuses are left out, each with a problem that says why.

    hidden: words that nobody typed, such as the one that stands for --config-dir.
    """
    register()
    nameless = [word for word in words if not name_of(word)]  # for which Hydra has no words
    made = Composition(None, [word for word in words if name_of(word)], nameless)
    made.problems += [f"{word} is not SETTING=VALUE: it names no setting" for word in nameless]
    nameless_files = nameless_choices(made.words)
    made.problems += nameless_files.values()
    made.refused += nameless_files
    made.words = [word for word in made.words if word not in nameless_files]
    with initialize_config_dir(str(CONF), version_base="1.3"), made.of_files.watched():
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
                mixtures = [word for word in made.words if is_mixture(word)]
                if not mixtures:  # of a file that cannot be read
                    return made
                made.refused += mixtures
                made.words = [word for word in made.words if not is_mixture(word)]
            except CompositionError as error:
                told = explain(error, made.words, made.of_files.paths).problems
                made.problems += [problem for problem in told if problem not in made.problems]
                key = accused(error)
                if key is not None and made.of_files.is_new(key):
                    made.of_files.add(key)
                    continue
                culprit = _culprit(told[0], made.words, hidden)
                if culprit is None:
                    return made
                made.refused.append(culprit)
                place = made.words.index(culprit)
                made.words[place : place + 1] = _corrected(culprit, told[0])
    made.problems += made.of_files.problems
    with open_dict(cfg):
        hydra = cfg.pop("hydra")
    made.cfg = cfg
    made.problems = [_counted_in_steps(problem, cfg) for problem in made.problems]
    made.origins = origins_of(cfg, hydra, made.words, hidden)
    return made


def _counted_in_steps(problem: str, cfg: DictConfig) -> str:
    """With a number of steps, where a run's length was given in tokens."""
    if not problem.endswith(TOKENS):
        return problem
    text = problem.partition(": ")[0].partition("=")[2]
    tokens, batch = plain_number(text.lower()), cfg.train.global_batch_size
    try:
        length = cfg.data.seq_length or cfg.model.max_position_embeddings
    except OmegaConfBaseException:  # no model is chosen
        return problem
    if tokens is None or not math.isfinite(tokens) or min(tokens, batch, length) <= 0:
        return problem
    steps = math.ceil(tokens / (batch * length))
    counted = f"with {batch} sequences of {length} tokens, {text} are train.train_steps={steps}"
    return f"{problem}; {counted}"


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


def _corrected(word: str, problem: str) -> list[str]:
    """The word as the problem says it should be, where a + or a number's unit is wrong."""
    other = word.lstrip("+") if word.startswith("+") else f"+{word}"
    if problem.endswith((f"write {other}", f": {other}", f"replace it with {other}")):
        return [other]
    name = re.escape(word.lstrip("+").partition("=")[0])
    number = re.search(rf"({name}=[\d.e+-]+)$", problem)
    return [number[1]] if number and number[1] != word else []

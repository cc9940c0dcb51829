"""Words that are no settings, and values that need a hint, are told with one that works."""

import re
from pathlib import Path

import pytest
from hydra._internal.utils import get_args_parser

from data.corpus import corpus_files
from launch.aliases import ADVICE
from launch.check import check
from launch.foreign_flags import HYDRAS_OPTIONS
from launch.schema import load, settings
from parallel.config import ConfigError

TINY = "+model=magneto_tiny"


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("train", "train is not SETTING=VALUE; write train.SETTING=VALUE, as in train.train_steps"),
        ("train.train_steps", "train.train_steps is not SETTING=VALUE; write train.train_steps=VA"),
        ("magneto_1b", "magneto_1b is not SETTING=VALUE; write +model=magneto_1b"),
        ("schedule.lr_warmup_steps=0.01", "no share of them, as in schedule.lr_warmup_steps=100"),
        ("checkpoint.save_interval=2h", "not time, as in checkpoint.save_interval=100 steps"),
        ("wandb.tags=[a,1,null]", "wandb.tags=[a,1,null]: entry 3 must be text"),
        ("profile.ranks=[0,a]", "profile.ranks=[0,a]: entry 2 must be a whole number"),
        ("data.mixture.stages=[3]", "data.mixture.stages=[3] must be a list"),
        ("data.mixture.stages=[{from_tokens: 1},{alfa: 1}]", "there is no setting alfa"),
    ],
)  # fmt: skip
def test_a_value_that_works(word: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load([TINY, word])
    (problem,) = caught.value.problems
    assert says in problem


def test_tokens_of_no_model() -> None:
    told = [one.text for one in check(["train.train_tokens=1B"]).of("error")]
    assert any(text.startswith("train.train_tokens=1B: ") for text in told)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("data.corpus=s3://bucket/text", "data.corpus=s3://bucket/text: URLs are not read; copy"),
        ("data.families=foo", "there is no such grouping. There are branch, "),
        ("data.eod_token=foo", "data.eod_token=foo is not in the vocabulary of data.tokenizer="),
    ],
)
def test_data(word: str, says: str) -> None:
    (error,) = check([TINY, word]).of("error")
    assert says in error.text


def test_a_path_with_a_colon_is_a_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        corpus_files(tmp_path / "a:" / "b")


def test_hydras_options_are_those_it_has() -> None:
    actions = get_args_parser()._actions
    has = {option for action in actions for option in action.option_strings}
    assert set(HYDRAS_OPTIONS) == {option for option in has if option.startswith("--")}


def test_advice_names_settings_that_there_are() -> None:
    named = {name for text in ADVICE.values() for name in re.findall(r"[a-z_]+\.[a-z_0-9.]+", text)}
    assert named and named <= set(settings())

"""Words that are no settings, and values that need a hint, are told with one that works."""

import re
from pathlib import Path

import pytest
from hydra._internal.utils import get_args_parser

from data.corpus import corpus_files
from launch.aliases import ADVICE
from launch.check import Machines, check
from launch.foreign_flags import HYDRAS_OPTIONS
from launch.schema import load
from launch.setting_names import settings
from parallel.config import ConfigError

TINY = "+model=magneto_tiny"


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("train", "train is not SETTING=VALUE; write train.SETTING=VALUE, as in train.train_steps"),
        ("train.train_steps", "train.train_steps is not SETTING=VALUE; write train.train_steps=VA"),
        ("magneto_1b", "magneto_1b is not SETTING=VALUE; write +model=magneto_1b"),
        ("schedule.lr_warmup_steps=0.01", "0.01 of train.train_steps=10000 would be 100"),
        ("train.global_batch_size=0.5", "no share of them, as in train.global_batch_size=64"),
        ("optimizer.lr=0,001", "optimizer.lr=0,001 is no number; write optimizer.lr=0.001"),
        ("data.mixture.language_max_epochs.de=2k", "write data.mixture.language_max_epochs.de=20"),
        ("partition=gpu", "there is no setting partition; magnetron-pretrain --cfg job prints all"),
        ("checkpoint.save_interval=2h", "not time, as in checkpoint.save_interval=100"),
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


def test_a_table_is_not_one_number() -> None:
    (error,) = check([TINY, "data.mixture.ratios=1"]).of("error")
    assert error.text.endswith("must be a table of numbers, as in {a:1,b:2}")


def test_a_chain_of_jobs_needs_a_site() -> None:
    (error,) = check([TINY, "chain=3"]).of("error")
    assert error.text.startswith("no site is chosen; add cluster=NAME")


@pytest.mark.parametrize(
    ("words", "machines"),
    [
        (["schedule.lr_warmup_steps=100", "train.train_steps=50"], Machines()),
        ([], Machines(processes=3, nodes=2)),
    ],
)
def test_one_message_for_one_slip(words: list[str], machines: Machines) -> None:
    report = check([TINY, "wandb.mode=disabled", *words], machines)
    assert len(report.of("error")) == 1 and not report.of("warning")


def test_a_range_of_one_number_is_a_number() -> None:
    words = ["schedule.lr_warmup_steps=9", "train.train_steps=10", "wandb.mode=disabled"]
    (warning,) = check([TINY, *words]).of("warning")
    assert "; use 1, or a longer run" in warning.text


_GLOBAL = "# @package _global_\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train: {train_steps: 5}", "+experiment=own: its file has no line `# @package _global_`"),
        ("", "+experiment=own: its file has no line `# @package _global_`"),
        (f"{_GLOBAL}defaults: [/parallel: tp2]", "choose parallel a second time; write `override"),
        (f"{_GLOBAL}defaults: [model: x]", "experiment/own.yaml: experiment/model/x.yaml is not"),
        (f"{_GLOBAL}defaults: [model: x]", "; write `/model: x` in its defaults, with a slash"),
        (f"{_GLOBAL}defaults: [/model: magneto_tinny]",
         "experiment/own.yaml: `/model: magneto_tinny` of its defaults: there is no conf/model/"),
        (f"{_GLOBAL}defaults: [/model: magneto_tinny]", "did you mean magneto_tiny? Choose"),
        (f"{_GLOBAL}wandb: {{mode: off}}", "did you mean disabled? YAML takes on, off, yes and no"),
        (f"{_GLOBAL}optimizer: {{lr: '0,001'}}", "write optimizer.lr=0.001"),
    ],
)  # fmt: skip
def test_an_experiment_of_ones_own(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "own.yaml").write_text(text)
    told = check(["+experiment=own"], config_dir=str(tmp_path)).of("error")
    assert any(says in one.text for one in told), told


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


def test_the_same_of_several_files_is_said_once(tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        (tmp_path / f"{name}.txt").write_text("text of no language")
    (error,) = check([TINY, f"data.corpus={tmp_path}"]).of("error")
    assert error.text.startswith(f"data.corpus={tmp_path}: {tmp_path}/one.txt: no field")
    assert error.text.endswith("; and so 2 other files")


def test_a_corpus_that_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    told = check([TINY, f"data.store_dir={tmp_path}", "data.corpus=text"]).of("warning")
    says = f"data.corpus=text is not read, because data.store_dir={tmp_path} is there"
    assert any(one.text.startswith(says) for one in told)


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

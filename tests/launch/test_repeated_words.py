"""A setting typed twice: which value is meant, and that it is said."""

from pathlib import Path

import pytest

from launch.check import check
from launch.pretrain import warn_of_repeated_words
from launch.repeated_words import repeated
from launch.schema import load
from launch.slurm import main as slurm
from parallel.config import ConfigError

TINY = "+model=magneto_tiny"


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["optimizer.lr=1e-3", "optimizer.lr=fast"], "optimizer.lr=fast must be a number"),
        (["optimizer.lr=fast", "optimizer.lr=1e-3"], "optimizer.lr=fast must be a number"),
        (
            ["train.train_steps=5", "train.train_steps=10k"],
            "train.train_steps=10k must be a whole number; write train.train_steps=10000",
        ),
        (["train.train_steps=10k", "train.train_steps=5"], "write train.train_steps=10000"),
        (["train.step=1", "train.step=2"], "train.step=2: there is no setting train.step; "),
    ],
)
def test_the_value_that_is_wrong_is_named(words: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load([TINY, *words])
    (problem,) = caught.value.problems
    assert says in problem
    told = [one.text for one in check([TINY, *words]).of("error")]
    assert any(says in text for text in told)
    assert len(told) == (2 if "there is no setting" in says else 1)


def test_bad_values_do_not_hide_it() -> None:
    report = check([TINY, "optimizer.lr=0", "optimizer.lr=-1"])
    assert [one for one in report.of("warning") if "typed twice" in one.text]


@pytest.mark.parametrize(
    "words",
    [
        ["train.train_steps=20", "train.train_steps=10k"],
        ["train.train_steps=20", "+train.train_steps=20"],
        ["data/mixture=a", "data/mixture=b"],
    ],
)
def test_a_refused_word_does_not_count(words: list[str]) -> None:
    report = check([TINY, *words])
    assert len(report.of("error")) == 1
    assert not [one for one in report.of("warning") if "typed twice" in one.text]


def test_two_values_are_warned_of() -> None:
    words = [TINY, "train.train_steps=5", "data.seq_length=64", "train.train_steps=10"]
    (warning,) = [one for one in check(words).of("warning") if one.topic == "settings"]
    assert warning.text == (
        "train.train_steps=5 and train.train_steps=10: typed twice, and the last one, "
        "train.train_steps=10, counts; leave the other out"
    )


@pytest.mark.parametrize(
    "words",
    [
        ["optimizer.lr=1e-3", "optimizer.lr=1e-3"],
        ["+model=magneto_tiny", "model=magneto_1b"],
        ["data.mixture.ratios={a: 1}", "data.mixture.ratios={b: 1}"],
        ["hydra.verbose=true", "hydra.verbose=false"],
        ["data.mixture=???", "data.mixture={}"],
    ],
)
def test_what_is_no_contradiction(words: list[str]) -> None:
    assert repeated(words) == []


def test_more_than_two_and_words_of_the_cluster() -> None:
    (told,) = repeated(["train.seed=1", "+train.seed=2", "train.seed=3"])
    assert told.startswith("train.seed=1, +train.seed=2 and train.seed=3: typed 3 times")
    assert len(repeated(["data.mixture.ratios.a=1", "data.mixture.ratios.a=2"])) == 1
    for word in ("nodes", "cluster", "cluster.walltime"):
        assert len(repeated([f"{word}=1", f"{word}=2"])) == 1


def test_the_launchers_say_it(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train.train_steps=5", "train.train_steps=10"]
    warn_of_repeated_words(words)
    assert capsys.readouterr().err.startswith("warning: train.train_steps=5 and train.train_steps=")
    assert slurm([TINY, "cluster=lab", *words]) == 0
    assert "warning: train.train_steps=5 and train.train_steps=10: " in capsys.readouterr().err

"""Slips that a file of settings may hold, and words with a space where a = belongs."""

import re
from pathlib import Path

import pytest

from launch.check import check
from launch.foreign_flags import with_words
from launch.schema import load
from parallel.config import ConfigError

MODEL = "+model=magneto_tiny"


def errors(words: list[str], config_dir: Path | None = None) -> list[str]:
    report = check(words, config_dir=str(config_dir) if config_dir else None)
    return [one.text for one in report.of("error")]


def write(folder: Path, text: str) -> Path:
    (folder / "experiment").mkdir()
    (folder / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}")
    return folder


def test_slips_in_entries_of_a_list(tmp_path: Path) -> None:
    write(
        tmp_path,
        "data:\n  mixture:\n    stages:\n"
        "    - {from_tokens: 1000, weightin: ratios}\n"
        "    - from_tokens: 2000\n      ramp_tokens: many\n"
        "      ratios: {slavic: x}\n"
        "train:\n  train_steps: 7\n  train_stps: 3\n",
    )
    report = check([MODEL, "+experiment=mine"], config_dir=str(tmp_path))
    told = [one.text for one in report.of("error")]
    stages = "experiment/mine.yaml line {}: data.mixture.stages[{}]."
    for text in (
        stages.format(5, 0) + "weightin: there is no such setting in an entry of this list; did "
        "you mean weighting?",
        stages.format(7, 1) + "ramp_tokens=many must be a whole number",
        stages.format(8, 1) + "ratios={'slavic': 'x'} must be a table of numbers, as in {a:1,b:2}",
    ):
        assert text in told, told
    assert [text for text in told if "train.train_stps" in text]
    assert len(told) == 4, told
    values = {one.setting: one.value for one in report.origins}
    assert values["train.train_steps"] == 7
    assert [stage["from_tokens"] for stage in values["data.mixture.stages"]] == [1000, 2000]


@pytest.mark.parametrize("entry", ["foo", ""])
def test_an_entry_that_is_no_table(entry: str, tmp_path: Path) -> None:
    stages = f"    - {{from_tokens: 1000, weightin: x}}\n    - {entry}\n"
    write(tmp_path, f"data:\n  mixture:\n    stages:\n{stages}")
    told = errors([MODEL, "+experiment=mine"], tmp_path)
    assert any("stages[0].weightin: there is no such setting" in text for text in told), told


def test_slips_that_come_by_a_merge_have_no_line(tmp_path: Path) -> None:
    entry = "{<<: {weightin: x}, from_tokens: 1000}"
    write(tmp_path, f"data: {{mixture: {{stages: [{entry}]}}}}\n")
    told = errors([MODEL, "+experiment=mine"], tmp_path)
    assert told[0].startswith("experiment/mine.yaml: data.mixture.stages[0].weightin: "), told


def test_norwegian_is_text(tmp_path: Path) -> None:
    write(tmp_path, "data:\n  languages: [de, no]\nwandb: {tags: [no, yes]}\n")
    told = errors([MODEL, "+experiment=mine"], tmp_path)
    for line, setting in ((3, "data.languages"), (4, "wandb.tags")):
        start = f"experiment/mine.yaml line {line}: {setting} must be text; YAML reads "
        assert [text for text in told if text.startswith(start)], told


def test_no_budget_is_advised_that_cannot_be_known() -> None:
    for words in (
        ["data.mixture.weighting=unimax"],  # of which model
        [MODEL, "data.mixture.stages=[{from_tokens: 64, weighting: unimax}]"],  # for which part
    ):
        told = "\n".join(errors(words))
        assert "weighting=unimax needs what the planned run" in told and "budget=1" not in told
        assert "use data.mixture.budget" not in told and "].budget=2" not in told, told


def test_a_switch_where_text_belongs(tmp_path: Path) -> None:
    write(tmp_path, "run_dir: off\nwandb: {project: yes, tags: [a]}\ntrain: {train_steps: 7}\n")
    told = errors([MODEL, "+experiment=mine"], tmp_path)
    assert told == [
        f"experiment/mine.yaml line {line}: {setting} must be text; YAML reads {word} without "
        "quotes as true or false, so write the text in quotes"
        for line, setting, word in (
            (2, "run_dir", "off, no or false"),
            (3, "wandb.project", "on, yes or true"),
        )
    ]


REFUSED = {
    "run_dir: off": "run_dir must be text; YAML reads off, no or false",
    "data: {mixture: {stages: [{from_token: 1}]}}": "data.mixture.stages[0].from_token: there is "
    "no such setting in an entry of this list; did you mean from_tokens?",
    "train: {train_stps: 3}": "train.train_stps: there is no setting train.train_stps",
}


@pytest.mark.parametrize("text", REFUSED)
def test_commands_that_run_refuse_what_check_refuses(text: str, tmp_path: Path) -> None:
    write(tmp_path, text)
    with pytest.raises(ConfigError) as refused:
        load([MODEL, "+experiment=mine", f"hydra.searchpath=[file://{tmp_path}]"])
    (told,) = refused.value.problems
    assert told.startswith(f"experiment/mine.yaml line 2: {REFUSED[text]}")


REFERENCES = """
defaults: [{override /hydra/launcher: submitit_slurm}]
wandb: {tags: ["${model.name}", x]}
data: {languages: ["${data.eod_token}"]}
hydra: {launcher: {setup: ["cd ${hydra:runtime.cwd}"]}}
"""


def test_lists_may_refer_to_what_is_in_other_files(tmp_path: Path) -> None:
    write(tmp_path, REFERENCES)
    config = load([MODEL, "+experiment=mine", f"hydra.searchpath=[file://{tmp_path}]"])
    assert config.wandb.tags == ["magneto_tiny", "x"]
    assert not [one for one in errors([MODEL, "+experiment=mine"], tmp_path) if "mine.yaml" in one]


def test_what_a_list_cannot_refer_to_is_said(tmp_path: Path) -> None:
    write(tmp_path, "wandb: {tags: ['${model.nme}', x]}\n")
    with pytest.raises(ConfigError, match=r"model\.nme"):
        load([MODEL, "+experiment=mine", f"hydra.searchpath=[file://{tmp_path}]"])
    assert any("model.nme" in text for text in errors([MODEL, "+experiment=mine"], tmp_path))


def test_a_key_that_is_a_number(tmp_path: Path) -> None:
    write(tmp_path, "data: {mixture: {stages: [{1: 2, from_tokens: 5}]}}\n")
    (told, *_) = errors([MODEL, "+experiment=mine"], tmp_path)
    start = "experiment/mine.yaml line 2: data.mixture.stages[0].1: there is no such setting"
    assert told.startswith(start), told


def test_a_file_that_is_not_utf_8(tmp_path: Path) -> None:
    write(tmp_path, "")
    (tmp_path / "experiment" / "mine.yaml").write_bytes(b"# \xff\n")
    with pytest.raises(ConfigError, match=r"experiment/mine\.yaml: it is not UTF-8"):
        load([MODEL, "+experiment=mine", f"hydra.searchpath=[file://{tmp_path}]"])
    assert any("it is not UTF-8" in text for text in errors([MODEL, "+experiment=mine"], tmp_path))


UNIMAX_NEEDS = ("data.mixture.budget", "data.mixture.max_epochs")


@pytest.mark.parametrize("budget", [None, "0", "-5"])
def test_a_budget_that_works(budget: str | None) -> None:
    words = [MODEL, "data.mixture.weighting=unimax"]
    given = [] if budget is None else [f"data.mixture.budget={budget}"]
    (told,) = errors([*words, *given])  # and max_epochs, in a line of its own
    values = [re.search(rf"^{name}=.*; use ({name}=\d+)$", told, re.M) for name in UNIMAX_NEEDS]
    assert all(values), told
    report = check([*words, *(value[1] for value in values if value)])
    assert not report.of("error"), report.of("error")
    assert not [one for one in report.of("warning") if "budget" in one.text]


@pytest.mark.parametrize("word", ["data.mixture.max_epochs=0", "data.mixture={max_epochs: 0.0}"])
def test_one_setting_is_named_as_it_is_typed(word: str) -> None:
    (told,) = errors([MODEL, word])
    assert told.startswith("data.mixture.max_epochs=0.0 must be a finite number above 0"), told
    assert not errors([MODEL, told.rpartition("use ")[2]])


def test_a_table_where_a_file_belongs() -> None:
    (told,) = errors([MODEL, "parallel={a:1}"])
    assert "parallel=NAME chooses a file of conf/parallel: cp2, " in told


@pytest.mark.parametrize(
    ("arguments", "job", "words", "says"),
    [
        (["nodes", "4"], True, ["nodes=4"], "nodes 4: settings are one word; write nodes=4"),
        (["model", "tiny"], True, ["+model=tiny"], "write +model=tiny"),
        (["foo", "4"], True, [], "foo 4: settings are one word, SETTING=VALUE; did you mean nodes"),
        (["nodes", "4"], False, [], "torchrun's --nnodes says how many"),
        (["--nodes", "4"], False, [], "torchrun's --nnodes says how many"),
        (["--cluster", "lab"], False, [], "is a word for python -m launch.slurm"),
        (["--nodes", "4"], True, ["nodes=4"], "write nodes=4"),
    ],
)
def test_two_words_that_are_one(
    arguments: list[str], job: bool, words: list[str], says: str
) -> None:
    made, (told,) = with_words(arguments, [], job=job)
    assert made == words
    assert says in told


def test_the_value_of_an_option_is_no_name() -> None:
    assert with_words(["--device", "cpu", "x"], ["--device"]) == (["--device", "cpu", "x"], [])

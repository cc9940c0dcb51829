"""A file that stands for data.mixture: what it may hold, and the commands of the data room."""

import json
from pathlib import Path

import pytest

from data.mixture_file import read_mixture_file
from data.plan import main
from data.stream_settings import read_settings


def test_what_a_file_says(tmp_path: Path) -> None:
    path = tmp_path / "mixture.yaml"
    path.write_text(
        "# from a sweep\nweighting: ratios\nratios: {sino-tibetan: 0.4, slavic: 0.6}\n"
        "budget: 3e8\nstages: [{from_tokens: 100_000, weighting: uniform}]\nlaw: laws/law.yaml\n"
    )
    assert read_mixture_file(path) == {
        "weighting": "ratios",
        "ratios": {"sino-tibetan": 0.4, "slavic": 0.6},
        "budget": 3e8,
        "stages": [{"from_tokens": 100_000, "weighting": "uniform"}],
        "law": str(tmp_path / "laws" / "law.yaml"),
    }
    path.write_text("law: /elsewhere/law.yaml")
    assert read_mixture_file(path) == {"law": "/elsewhere/law.yaml"}


REFUSED = {
    "weigting: ratios": "there is no setting weigting; did you mean weighting?",
    "foo: 1": "there is no setting foo; there are weighting, alpha, ",
    "mixture: {alpha: 1}": "mixture: settings of data.mixture stand by themselves",
    "stages: [{from_tokens: 1}, {alfa: 1}]": "stages[1]: there is no setting alfa; did you mean al",
    "alpha: x": "alpha does not fit: Value 'x' of type 'str' could not be converted to Float",
    "weighting: rations": "weighting does not fit: Invalid value 'rations', expected one of",
    "ratios: 3": "ratios does not fit",
    "law: 5": "law=5: must be text, the path of a law's file",
    "drop_languages: [no]": "drop_languages: False is not a name; YAML reads no, off and yes",
    "language_shares: {no: 1}": "language_shares: False is not a name",
    "stages: [{ratios: {1: 1}}]": "stages.ratios: 1 is not a name",
    "alpha: 1\nalpha: 2": "not YAML: ",
    "a: [": "not YAML: ",
    "[]": "must be a table of settings",
    "": "must be a table of settings",
    "3": "must be a table of settings",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_a_file_may_not_say(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mixture.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        read_mixture_file(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert REFUSED[text] in str(caught.value)


def test_every_problem_has_a_line(tmp_path: Path) -> None:
    path = tmp_path / "mixture.yaml"
    path.write_text("alpha: x\nbudget: y\nnormalize: true\n")
    with pytest.raises(ValueError) as caught:
        read_mixture_file(path)
    assert [line.split()[1] for line in str(caught.value).splitlines()] == ["alpha", "budget"]
    with pytest.raises(FileNotFoundError, match=r"none\.yaml: no such file"):
        read_mixture_file(tmp_path / "none.yaml")


def test_it_stands_for_all_of_the_mixture_of_a_run(tmp_path: Path) -> None:
    mixture = {"weighting": "ratios", "ratios": {"slavic": 1.0}, "max_epochs": 2}
    (tmp_path / "config.yaml").write_text(json.dumps({"data": {"mixture": mixture}}))
    path = tmp_path / "mixture.yaml"
    path.write_text("weighting: uniform")
    of_run = read_settings(run=tmp_path).data.mixture
    assert of_run.ratios == {"slavic": 1.0}
    for settings in (
        read_settings(["data.seed=1"], run=tmp_path, mixture=path),
        read_settings(["data.seed=1", f"data/mixture={path}"], run=tmp_path),
    ):
        assert settings.data.mixture.weighting.value == "uniform"
        assert settings.data.mixture.ratios == {} and settings.data.mixture.max_epochs is None
    more = read_settings(["data.mixture.max_epochs=4", f"data/mixture={path}"]).data.mixture
    assert more.max_epochs == 4
    with pytest.raises(ValueError, match=r"python -m launch\.plan reads the launcher's words"):
        read_settings(["data/mixture=uniform"])


def test_a_plan_wants_a_law_of_its_families(
    demo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.pretrain.laws import a_law

    words = [str(demo_folder), "--samples", "100", "--seq-length", "32", "data.languages=[de,ru]"]
    path = tmp_path / "mixture.yaml"
    path.write_text("weighting: uniform\nlaw: law.yaml\n")
    assert main([*words, f"data/mixture={path}"]) == 2
    assert "law.yaml: there is no such scaling law" in capsys.readouterr().err
    a_law(["germanic", "indic"]).save(tmp_path / "law.yaml")
    assert main([*words, f"data/mixture={path}"]) == 2
    assert "law.yaml knows nothing of slavic, which the data has" in capsys.readouterr().err
    assert main([*words, f"data/mixture={path}", "data.mixture.drop_languages=[ru]"]) == 0
    a_law(["germanic", "indic", "slavic"]).save(tmp_path / "law.yaml")
    assert main([*words, "--mixture", str(path)]) == 0

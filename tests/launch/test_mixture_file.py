"""data/mixture=FILE.yaml on the launcher's command lines."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from data.config import MixtureConfig, Weighting, WhenExhausted
from launch import slurm, verify
from launch.mixture_file import SHIPPED, short_name, with_mixture_files
from launch.schema import load
from parallel.config import ConfigError
from pretrain.config_rules import validate
from tests.pretrain.laws import a_law

ROOT = Path(__file__).resolve().parents[2]
TINY = "+model=magneto_tiny"
BUDGET = "data.mixture.budget=1e9"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mix.yaml"
    path.write_text("weighting: ratios\nratios: {slavic: 0.25, sino-tibetan: 0.75}\n")
    return path


def mixture(*words: str) -> MixtureConfig:
    return load([TINY, *words]).data.mixture


def problems(*words: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load([TINY, *words])
    return caught.value.problems


def test_it_replaces_the_mixture_as_a_whole(file: Path, tmp_path: Path) -> None:
    expected = MixtureConfig(
        weighting=Weighting.ratios, ratios={"slavic": 0.25, "sino-tibetan": 0.75}
    )
    assert mixture(f"data/mixture={file}") == expected
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text(
        "# @package _global_\ndata: {mixture: {weighting: unimax, budget: 3, max_epochs: 2, "
        "ratios: {indic: 1.0}, language_max_epochs: {de: 1}, drop_languages: [zh]}}"
    )
    searched = f"hydra.searchpath=[file://{tmp_path}]"
    assert mixture(searched, "+experiment=mine", f"data/mixture={file}") == expected


def test_typed_words_win_wherever_they_stand(file: Path) -> None:
    word = f"data/mixture={file}"
    before = mixture("data.mixture.max_epochs=4", "data.mixture.ratios.slavic=0.25", word)
    after = mixture(word, "data.mixture.max_epochs=4", "data.mixture.ratios.slavic=0.25")
    assert before == after
    assert before.max_epochs == 4 and before.ratios["sino-tibetan"] == 0.75
    # families that the file does not name need no + either
    more = mixture(word, "data.mixture.normalize=true", "data.mixture.ratios.indic=1")
    assert set(more.ratios) == {"slavic", "sino-tibetan", "indic"}


def test_values_arrive_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "mix.yaml"
    path.write_text(
        "alpha: 1e-5\nunit: bytes\nmax_epochs: null\nwhen_exhausted: stop\n"
        'law: "it\'s \\\\ a law.y\\\\"\n'
        "drop_languages: ['no', zh-Hant, 'null']\nlanguage_max_epochs: {zh-Hant: 3, 'a (b) c': 1}\n"
        "stages: [{alpha: 0.3, from_tokens: 100_000_000, normalize: true}]\n"
    )
    found = mixture(f"data/mixture={path}")
    assert found.alpha == 1e-5 and found.max_epochs is None
    assert found.when_exhausted is WhenExhausted.stop
    assert found.drop_languages == ["no", "zh-Hant", "null"]
    assert found.language_max_epochs == {"zh-Hant": 3.0, "a (b) c": 1.0}
    assert found.stages[0].alpha == 0.3 and found.stages[0].from_tokens == 10**8
    assert found.law == str(tmp_path / "it's \\ a law.y\\")


@pytest.mark.parametrize("name", sorted(path.stem for path in SHIPPED.glob("*.yaml")))
def test_shipped_ones(name: str) -> None:
    words = [f"data/mixture={name}", *([BUDGET] if name == "unimax" else [])]
    config = load([TINY, *words])
    validate(config, world_size=1)
    assert config.data.mixture.weighting.value == name


def test_what_is_refused(file: Path, tmp_path: Path) -> None:
    told = {
        "data/mixture=unifrm": "conf/data/mixture/unifrm.yaml; did you mean data/mixture=uniform?",
        "data/mixture=": "There are proportional, temperature, uniform, unimax; or give the path",
        "data/mixture=none.yaml": "data/mixture=none.yaml: no such file",
        "~data/mixture=uniform": "~data/mixture=uniform: write data/mixture=uniform",
        "data/mixture=~nosuchuser/mix.yaml": "home directory",
        "data/mixtur=uniform": "there is no setting data/mixtur; did you mean data/mixture?",
        f"data/mixture={file},uniform": "add --multirun for a sweep",
    }
    for word, words in told.items():
        (problem,) = problems(word)
        assert words in problem
    (twice,) = problems("data/mixture=uniform", f"data/mixture={file}")
    assert (
        twice == f"data/mixture=uniform data/mixture={file}: one mixture at a time; keep one of "
        "these words"
    )
    file.write_text("weigting: x\nfoo: 1\n")
    first, second = problems(f"data/mixture={file}")
    assert first == f"data/mixture={file}: there is no setting weigting; did you mean weighting?"
    assert second.startswith(f"data/mixture={file}: there is no setting foo")
    file.write_text("ratios: {'a & b': 1.0}\nlanguage_shares: {'null': 1}\nalpha: 1\n")
    first, second = problems(f"data/mixture={file}")
    assert f"data/mixture={file}: ratios: {{'a & b': 1.0}} cannot be written on a command" in first
    assert "language_shares: {'null': 1} cannot be written" in second


def test_a_sweep_over_files(file: Path) -> None:
    typed = ["--multirun", TINY, "data.mixture.max_epochs=2", f"data/mixture={file},uniform"]
    words = with_mixture_files(typed)
    assert words[:2] == typed[:2] and words[4:] == ["data.mixture.max_epochs=2"]
    sweep = OverridesParser.create().parse_override(words[3])
    assert sweep.is_sweep_override()
    jobs = [f"data.mixture={value}" for value in sweep.sweep_string_iterator()]
    of_file, uniform = (mixture(words[2], job, *words[4:]) for job in jobs)
    assert of_file.ratios == {"slavic": 0.25, "sino-tibetan": 0.75}
    assert uniform.weighting is Weighting.uniform and uniform.ratios == {}
    assert of_file.max_epochs == uniform.max_epochs == 2
    # names of the jobs' folders
    names = [short_name(job) for job in jobs]
    assert names[0] is not None and names[0].startswith("data.mixture=ratios-")
    assert names[1] is not None and names[1].startswith("data.mixture=uniform-")
    assert len(names[0]) < 32
    assert [short_name(word) for word in words[:3]] == [None] * 3
    # words of Hydra's own, which conf/pretrain.yaml takes out of the folder's name as well
    assert short_name(f"+{jobs[0]}") == short_name(f"++{jobs[0]}") == names[0]


def test_names_of_ones_own(tmp_path: Path) -> None:
    """In a --config-dir, also where one of ours has the name, and with the + that Hydra takes."""
    folder = tmp_path / "conf" / "data" / "mixture"
    folder.mkdir(parents=True)
    for name in ("mine", "uniform"):
        (folder / f"{name}.yaml").write_text("alpha: 0.125\n")
    searched = f"hydra.searchpath=['file://{tmp_path / 'conf'}']"
    for word in ("data/mixture=mine", "+data/mixture=mine", "data/mixture=uniform"):
        assert mixture(searched, word) == MixtureConfig(alpha=0.125)
        for option in (["--config-dir", str(tmp_path / "conf")], [f"-cd={tmp_path / 'conf'}"]):
            assert with_mixture_files([*option, word])[-1] == "data.mixture={alpha:0.125}"
    assert mixture("+data/mixture=uniform").weighting is Weighting.uniform
    (problem,) = problems(searched, "data/mixture=mien")
    assert "did you mean data/mixture=mine? There are mine, proportional" in problem


def start(*words: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / "pretrain.py"), *words],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_the_launcher(file: Path, tmp_path: Path) -> None:
    shown = start("--cfg", "job", TINY, "data/mixture=mix.yaml", folder=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "    weighting: ratios\n" in shown.stdout and "      slavic: 0.25\n" in shown.stdout
    ranks = {"WORLD_SIZE": "2", "RANK": "1"}
    for local_rank, told in (("0", "error: data/mixture=no.yaml: no such file\n"), ("1", "")):
        ended = start(TINY, "data/mixture=no.yaml", folder=tmp_path, LOCAL_RANK=local_rank, **ranks)
        assert (ended.returncode, ended.stderr) == (2, told)  # once on each node, but all leave


@pytest.mark.slow
def test_jobs_of_a_sweep(file: Path, tmp_path: Path) -> None:
    """Two whole runs, one after the other, each in a folder of its own."""
    words = ["--multirun", "+experiment=tiny_cpu", "data/mixture=mix.yaml,uniform"]
    words += ["data.languages=[ru,zh]", "train.train_steps=1", "run_dir=runs"]
    words += ["schedule.lr_warmup_steps=0"]
    ended = start(*words, folder=tmp_path, XDG_CACHE_HOME=str(tmp_path), OMP_NUM_THREADS="1")
    assert ended.returncode == 0, ended.stderr
    folders = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert len(folders) == 2
    assert "data.mixture_ratios-" in folders[0] and "data.mixture_uniform-" in folders[1]


def test_slurm_and_verify_take_it(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [TINY, "cluster=lab", "nodes=2", f"data/mixture={file}"]
    assert slurm.main(words) == 0
    assert f"data/mixture={file}" in capsys.readouterr().out  # read again when the job starts
    file.write_text("alfa: 1")
    assert slurm.main(words) == 2
    assert "did you mean alpha" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["verify", TINY, f"data/mixture={file}"])
    with pytest.raises(SystemExit, match="2"):
        verify.main()
    assert "did you mean alpha" in capsys.readouterr().err


def test_a_law_is_looked_at_before_there_are_ranks(file: Path, tmp_path: Path) -> None:
    def told() -> tuple[str, ...]:
        with pytest.raises(ConfigError) as caught:
            validate(load([TINY, f"data/mixture={file}"]), world_size=1)
        return caught.value.problems

    law = tmp_path / "laws" / "law.yaml"
    file.write_text("law: laws/law.yaml")
    assert told() == (
        f"data.mixture.law={law}: {law}: there is no such scaling law; python -m "
        "launch.fit_mixture writes one",
    )
    law.parent.mkdir()
    law.write_text("format: 0")
    assert f"data.mixture.law={law}: {law} is not a scaling law of format 1" in told()[0]
    a_law(["slavic"]).save(law)
    validate(load([TINY, f"data/mixture={file}"]), world_size=1)

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.config import MixtureConfig, MixtureStage, Weighting, WhenExhausted
from data.language_mixture import LanguageMixture
from data.plan import Plan, PlanRow, describe, main, make_plan, short, whole_number
from data.plan_plot import plot_plan
from data.token_store import TokenStore

ROOT = Path(__file__).resolve().parents[2]
SEQ = 16


@pytest.fixture
def stores(make_store: Callable[..., TokenStore]) -> list[TokenStore]:
    """Ratios 1 : 1 / 4 : 1 / 4 of 3000, and a language shorter than a sequence."""
    return [
        make_store("de", "germanic", tokens=16 * 100 + 1),
        make_store("nl", "germanic", tokens=16 * 25 + 1),
        make_store("hi", "indic", tokens=16 * 25 + 1),
        make_store("ka", "kartvelian", tokens=4),
    ]


def plan_of(stores: list[TokenStore], samples: int, **rules: Any) -> tuple[Plan, LanguageMixture]:
    config = MixtureConfig(**rules)
    mixture = LanguageMixture(stores, SEQ, config, seed=1)
    return make_plan(mixture, config, samples, global_batch_size=8), mixture


def row(plan: Plan, name: str) -> PlanRow:
    return next(r for r in plan.rows if name in (r.language, "" if r.language else r.family))


def test_the_plan_is_what_the_mixture_draws(stores: list[TokenStore]) -> None:
    plan, mixture = plan_of(stores, 3001)
    drawn, _ = mixture.locate(np.arange(3001))
    counted = np.bincount(drawn, minlength=4)
    for code, count in zip(mixture.languages, counted.tolist(), strict=True):
        planned = row(plan, code)
        assert planned.planned_samples == count
        assert planned.planned_tokens == count * SEQ
        assert planned.realised == count / 3001
        assert abs(planned.asked * 3001 - count) < 1
    assert plan.drawn == plan.samples == 3001 and plan.ok
    assert sum(r.realised for r in plan.families) == pytest.approx(1)
    assert row(plan, "germanic").planned_samples == counted[[0, 3]].sum()  # de, nl
    assert [r.language for r in plan.languages_of("germanic")] == ["de", "nl"]  # larger first


def test_epochs(stores: list[TokenStore]) -> None:
    plan, _ = plan_of(stores, 400, weighting=Weighting.uniform)
    hindi, georgian, germanic = row(plan, "hi"), row(plan, "ka"), row(plan, "germanic")
    assert hindi.sequences == 25
    assert hindi.epochs == hindi.planned_samples / 25
    # its 4 tokens fill a sequence of 16 four times over
    assert georgian.epochs == georgian.planned_samples * 4
    assert germanic.epochs == pytest.approx(germanic.planned_samples / 125, rel=1e-3)


def test_a_cap_with_repeats_is_broken(stores: list[TokenStore]) -> None:
    ratios = {"germanic": 0.5, "indic": 0.5, "kartvelian": 0.0}
    caps = {"weighting": Weighting.ratios, "ratios": ratios, "max_epochs": 4.0}
    plan, _ = plan_of(stores, 200, **caps)  # 100 samples of Hindi: 4 epochs
    assert plan.ok and row(plan, "hi").epochs == 4
    assert row(plan, "hi").ends_at is None  # it would be later
    plan, _ = plan_of(stores, 202, **caps)
    assert not plan.ok and row(plan, "hi").broken and row(plan, "indic").broken
    assert not row(plan, "germanic").broken
    assert row(plan, "ka").planned_samples == 0 and not row(plan, "ka").broken
    text = describe(plan)
    assert "CAP BROKEN" in text and "never drawn" in text
    assert "1 language goes beyond the cap, most of all hi: 4.04 epochs, 4 allowed" in text
    assert "the cap, data.mixture.language_max_epochs.hi or data.mixture.max_epochs." in text


def test_a_cap_with_redistribution_holds(stores: list[TokenStore]) -> None:
    ratios = {"germanic": 0.5, "indic": 0.5, "kartvelian": 0.0}
    plan, _ = plan_of(
        stores,
        400,
        weighting=Weighting.ratios,
        ratios=ratios,
        language_max_epochs={"hi": 4.0},
        when_exhausted=WhenExhausted.redistribute,
    )
    hindi = row(plan, "hi")
    assert plan.ok and plan.drawn == 400
    assert hindi.planned_samples == 100 and hindi.epochs == 4 and hindi.max_epochs == 4
    assert hindi.ends_at == 200 and row(plan, "de").ends_at is None
    assert hindi.asked == pytest.approx(0.5) and hindi.realised == 0.25
    assert row(plan, "de").max_epochs is None
    text = describe(plan)
    assert "cap reached at sample 200" in text
    assert "1 language reaches the cap; the share goes to others" in text
    assert "-100.00" in text  # off by 100 samples, and says so


@pytest.mark.parametrize(
    ("policy", "advice"),
    [
        (WhenExhausted.stop, "set data.mixture.when_exhausted=redistribute"),
        (WhenExhausted.redistribute, "every language that is drawn has reached its cap"),
    ],
)
def test_data_that_ends_early(stores: list[TokenStore], policy: WhenExhausted, advice: str) -> None:
    plan, mixture = plan_of(stores[:3], 10_000, max_epochs=2.0, when_exhausted=policy)
    assert mixture.end is not None and plan.drawn == mixture.end < 10_000
    assert not plan.ok and not any(r.broken for r in plan.rows)
    assert sum(r.planned_samples for r in plan.families) == plan.drawn
    assert f"The data ends at sample {plan.drawn:,} of 10,000, in step " in describe(plan)
    fits = plan.drawn // plan.global_batch_size
    assert f"Use train.train_steps={fits} or less, " in describe(plan)
    assert advice in describe(plan)


def test_a_cap_to_judge_by_changes_nothing(stores: list[TokenStore]) -> None:
    config = MixtureConfig(max_epochs=50.0)
    mixture = LanguageMixture(stores[:3], SEQ, config, seed=1)
    free = make_plan(mixture, config, 1000, global_batch_size=8)
    judged = make_plan(mixture, config, 1000, global_batch_size=8, max_epochs=3)
    assert free.ok and not judged.ok
    assert {r.max_epochs for r in judged.rows if r.language} == {3}
    assert [r.planned_samples for r in free.rows] == [r.planned_samples for r in judged.rows]


def test_stages_are_averaged(stores: list[TokenStore]) -> None:
    ratios = {"germanic": 1.0, "indic": 0.0, "kartvelian": 0.0}
    later = {"germanic": 0.0, "indic": 1.0, "kartvelian": 0.0}
    stage = MixtureStage(weighting=Weighting.ratios, ratios=later, from_tokens=300 * SEQ)
    plan, _ = plan_of(stores, 400, weighting=Weighting.ratios, ratios=ratios, stages=[stage])
    assert row(plan, "indic").asked == pytest.approx(0.25)
    assert row(plan, "indic").planned_samples == 100
    assert "Ratios change over 2 stages" in describe(plan)
    assert plan.course[0] == (0, ratios) and plan.course[-1][1] == later
    assert all(shares == (ratios if at < 300 else later) for at, shares in plan.course)


def test_no_samples(stores: list[TokenStore]) -> None:
    with pytest.raises(ValueError, match="at least 1 sample, not 0"):
        plan_of(stores, 0)


def test_short_numbers() -> None:
    numbers = [0, 12.5, 999.96, 1234567, 999_950_000, 2.5e12]
    assert [short(n) for n in numbers] == ["0", "12.5", "1k", "1.235M", "1G", "2.5T"]


def test_the_table_is_narrow_enough(stores: list[TokenStore]) -> None:
    plan, _ = plan_of(stores, 10**12)
    lines = describe(plan).splitlines()
    assert max(map(len, lines)) <= 100


_RULES_TO_DRAW: dict[str, dict[str, Any]] = {
    "free": {},
    "broken": {"max_epochs": 1.0},
    "changing": {"stages": [MixtureStage(alpha=0.0, from_tokens=100 * SEQ, ramp_tokens=50 * SEQ)]},
}


def test_a_plot(stores: list[TokenStore], tmp_path: Path) -> None:
    for name, rules in _RULES_TO_DRAW.items():
        plan, _ = plan_of(stores, 300, **rules)
        path = plot_plan(plan, tmp_path / "new folder" / f"{name}.png")
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


# ---- the command


def test_the_command(demo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, plot = tmp_path / "new" / "plan.json", tmp_path / "plan.png"
    words = [str(demo_folder), "--steps", "100", "--seq-length", "64", "--global-batch-size", "16"]
    words += ["data.families=five_families", "--json", str(report), "--plot", str(plot)]
    status = main(words)
    out = capsys.readouterr().out
    assert status == 0
    assert "1,600 samples of 64 tokens = 102.4k tokens in 100 steps of 16" in out
    assert "No epoch cap is set" in out and plot.is_file()
    plan = json.loads(report.read_text())
    assert plan["ok"] is True and plan["samples"] == 1600 and plan["tokens"] == 102400
    families = {r["family"] for r in plan["rows"]}
    assert families == {"germanic", "romance", "slavic", "indic", "sino-tibetan"}
    assert sum(r["planned_samples"] for r in plan["rows"] if not r["language"]) == 1600
    assert [r["family"] for r in plan["rows"] if r["language"] == "kn"] == ["indic"]


def test_a_broken_cap_is_exit_status_1(
    demo_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(demo_folder), "--tokens", "40M", "--seq-length", "64"]
    assert main([*words, "data.mixture.max_epochs=1000"]) == 0
    assert "No epoch cap is broken." in capsys.readouterr().out
    assert main([*words, "data.mixture.max_epochs=10"]) == 1
    assert main([*words, "--max-epochs", "10"]) == 1
    assert "CAP BROKEN" in capsys.readouterr().out


def test_the_settings_of_a_run(
    demo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {
        "model": {"name": "x", "max_position_embeddings": 32, "hidden_size": 8},
        "data": {"store_dir": str(demo_folder), "mixture": {"alpha": 0.3}, "seq_length": None},
        "train": {"train_steps": 10, "global_batch_size": 4, "micro_batch_size": 1},
        "optimizer": {"lr": 1},
    }
    (tmp_path / "config.yaml").write_text("data: {seed: -1}")  # an older start of the run
    (tmp_path / "config.2.yaml").write_text(json.dumps(settings))
    assert main(["--run", str(tmp_path)]) == 0
    assert "40 samples of 32 tokens" in capsys.readouterr().out
    assert main(["--run", str(tmp_path / "config.2.yaml"), "train.train_steps=20"]) == 0
    assert "80 samples of 32 tokens" in capsys.readouterr().out


def test_a_file_of_mixture_settings(
    demo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mixture.yaml"
    words = [str(demo_folder), "--samples", "100", "--seq-length", "32", "--mixture", str(path)]
    path.write_text("weighting: ratios\nratios: {germanic: 0.75, slavic: 0.25}\n")
    assert main([*words, "data.languages=[de,ru]"]) == 0
    assert " 75.000000" in capsys.readouterr().out
    path.write_text("weighting: ratios\nratios: {germanic: 0.75, slavic: 0.2}\n")
    assert main([*words, "data.languages=[de,ru]"]) == 2
    assert "sum to 0.95, 0.05 too little" in capsys.readouterr().err
    path.write_text("[]")
    assert main(words) == 2
    assert "mixture.yaml: must be a table" in capsys.readouterr().err
    path.write_text("a: [")
    assert main(words) == 2
    assert "mixture.yaml: not YAML" in capsys.readouterr().err
    assert main([*words[:-1], str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml: no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["data.mixture.alfa=1"], "data.mixture.alfa=1: there is no setting data.mixture.alfa; "),
        (["data.mixture.alfa=1"], "did you mean data.mixture.alpha"),
        (["data.train_steps=1"], "there is no setting data.train_steps; did you mean train.train"),
        (["data.seq_length=long"], "data.seq_length=long: data.seq_length does not fit: Value"),
        (["data.languages=[de,gr]"], "has no training store of gr. It has am, ar, "),
        (
            ["data.languages=[deu,german,rus]"],
            "of deu, german, rus; did you mean de for deu, ",
        ),
        (["data.mixture.drop_languages=[rus]"], "names rus; did you mean ru? The data has"),
        (
            ["data.mixture.language_max_epochs.deu=1"],
            "names deu; did you mean de? The data has",
        ),
        (["--tokens", "200x"], "error: --tokens 200x: must be a number above 0, such as 300B"),
        (["data.families=branches"], "there is no such grouping; did you mean branch?"),
        (["data.mixture.alpha=-1"], "data.mixture.alpha=-1.0: must be a number of at least 0"),
        (["optimizer.lr=1"], "the stream of samples does not depend on optimizer.lr"),
        (["+model=magneto_tiny"], "python -m launch.plan reads the launcher's words"),
        (["data=demo"], "python -m launch.plan reads the launcher's words"),
        (["data.seed=[1"], "data.seed=[1 is not SETTING=VALUE"),
        (["=3"], "=3 is not SETTING=VALUE"),
        (["data.seed=1,2"], "data.seed=1,2: one value for one setting"),
        (["train.global_batch_size=0"], "train.global_batch_size=0 must be at least 1"),
        (["another", "folder"], "one folder of token stores at a time"),
        (["--samples", "0"], "at least 1 sample, not 0"),
        (["--run", "nowhere"], "nowhere: no run folder, because there is no config.yaml in it"),
    ],
)
def test_settings_that_do_not_fit(
    demo_folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    words = [str(demo_folder), "--seq-length", "64", *words]
    if not {"--samples", "--tokens"} & {*words}:
        words += ["--samples", "10"]
    assert main(words) == 2
    err = capsys.readouterr().err
    assert says in err and err.startswith("python -m data.plan: error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(("typed", "number"), [("10", 10), ("1e3", 1000), ("2k", 2000)])
def test_lengths_as_people_type_them(typed: str, number: int) -> None:
    assert whole_number(typed) == number


@pytest.mark.parametrize("typed", ["1.5", "-3", "many"])
def test_a_length_that_is_none(capsys: pytest.CaptureFixture[str], typed: str) -> None:
    with pytest.raises(SystemExit):
        main(["folder", f"--steps={typed}"])
    said = capsys.readouterr().err
    assert f"argument --steps: {typed}: must be a whole number above 0, such as 20000" in said


def test_what_must_be_said(
    demo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(demo_folder), "--samples", "10"]) == 2
    assert "the length of a training sequence is not said" in capsys.readouterr().err
    assert main([str(demo_folder), "--seq-length", "64"]) == 2
    assert "how long is the run?" in capsys.readouterr().err
    assert main([str(tmp_path / "none"), "--seq-length", "64", "--steps", "1"]) == 2
    assert "no folder with a train/ folder of token stores" in capsys.readouterr().err
    (tmp_path / "20260101").mkdir()
    (tmp_path / "20260101" / "config.yaml").write_text("{}")
    assert main(["--run", str(tmp_path)]) == 2
    assert f"; it holds runs: {tmp_path / '20260101'}; name one of them" in capsys.readouterr().err


def test_ten_billion_samples_without_torch(demo_folder: Path) -> None:
    code = (
        "import sys, time; start = time.perf_counter(); from data.plan import main; "
        "status = main(sys.argv[1:]); print(f'{time.perf_counter() - start:.2f} s in all'); "
        "heavy = ('torch', 'megatron', 'matplotlib', 'wandb'); "
        "print('imported:', [m for m in heavy if m in sys.modules]); sys.exit(status)"
    )
    words = [str(demo_folder), "--samples", str(10**10), "--seq-length", "2048"]
    ended = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    print(ended.stdout[-200:])  # the time, to be looked at and not asserted on a busy machine
    assert ended.returncode == 0, ended.stderr
    assert "imported: []" in ended.stdout
    assert "10,000,000,000 samples of 2,048 tokens = 20.48T tokens" in ended.stdout


def test_a_reader_that_has_seen_enough(demo_folder: Path) -> None:
    words = f"{sys.executable} -m data.plan {demo_folder} --samples 10 --seq-length 64 | head -1"
    ended = subprocess.run(words, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.stdout.startswith("10 samples of 64 tokens") and ended.stderr == ""

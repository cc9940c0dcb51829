"""The study of the multilingual scaling law: its corpora, and what its tables say, on losses of
known origin."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import mixture_study as study
from benchmarks.mixture_numbers import compare_mixtures, partner_effects, predictions, split_tests
from benchmarks.mixture_report import report
from data.scaling_law.design import ModelShape, PlannedRun, design
from data.scaling_law.law import FamilyLaw, FittedRange, ScalingLaw
from data.scaling_law.runs_table import RunsTable, make_table
from data.scaling_law.sweep_config import make_sweep

SHAPES = {
    name: ModelShape(num_parameters=n, flops_per_token=6.0 * n, tokens_per_step=2048)
    for name, n in ((study.SMALL, 127_872), (study.MIDDLE, 338_592), (study.LARGE, 1_008_864))
}
GAMMA = dict(zip(study.FAMILIES, (0.06, 0.12, 0.08, 0.1, 0.09), strict=True))
LAW = ScalingLaw(
    families={
        family: FamilyLaw(E=2.0, A=300.0, alpha=0.5, B=2000.0, beta=0.5, gamma=gamma)
        for family, gamma in GAMMA.items()
    },
    fitted_range=FittedRange(
        num_parameters=(1e5, 1e6), tokens=(2e5, 1.2e6), ratios=dict.fromkeys(GAMMA, (0.05, 1.0))
    ),
    residual_std=dict.fromkeys(GAMMA, 0.01),
    bootstrap={},
    provenance={},
)
NOISE = 0.004  # of ln L
# Slavic text helps Romance: what its loss loses beside 0.4 of it
HELP = 0.05


def runs(name: str, **changes: Any) -> list[PlannedRun]:
    return design(make_sweep(study.sweeps(Path("out"))[name], name, changes), SHAPES)


def measured(planned: list[PlannedRun], transfer: float = 0.0) -> RunsTable:
    random = np.random.default_rng(0)
    rows = []
    for run in planned:
        of_seed = np.random.default_rng(run.seed).normal(0, NOISE)
        for family, ratio in run.ratios.items():
            loss = math.nan
            if ratio > 0:
                loss = LAW.loss(run.num_parameters, run.tokens, {family: ratio})[family]
                loss *= math.exp(random.normal(0, NOISE) + of_seed)
            if family == "romance":
                loss *= math.exp(-transfer * run.ratios["slavic"] / 0.4)
            rows.append(
                {
                    "run": run.name, "model": run.model, "num_parameters": run.num_parameters,
                    "tokens": run.tokens, "seed": run.seed, "purpose": run.purpose,
                    "family": family, "ratio": ratio, "loss": loss, "eval_tokens": 1000,
                    "epochs": 0.1,
                }
            )  # fmt: skip
    return make_table(rows)


def test_no_document_is_in_two_families(tmp_path: Path) -> None:
    ids = [f"source/{number}" for number in range(400)]
    for language in (code for codes in study.LANGUAGES.values() for code in codes):
        lines = [json.dumps({"text": f"{language} {i}", "doc_id": i}) + "\n" for i in ids]
        (tmp_path / f"{language}.jsonl").write_text("".join(lines))
    study.write_corpus(tmp_path, tmp_path / "main", disjoint=False)
    study.write_corpus(tmp_path, tmp_path / "disjoint", disjoint=True)
    kept = {}
    for family, languages in study.LANGUAGES.items():
        of_language = [
            {json.loads(line)["doc_id"] for line in study.documents(tmp_path / "disjoint", code)}
            for code in languages
        ]
        assert all(one == of_language[0] for one in of_language)
        kept[family] = of_language[0]
        share = len(kept[family]) / len(ids)
        assert share == pytest.approx(study.DISJOINT_SHARES[family], abs=0.08)
        assert len(list(study.documents(tmp_path / "main", languages[0]))) == len(ids)
    assert sum(map(len, kept.values())) == len(set.union(*kept.values())) == len(ids)
    assert math.fsum(study.DISJOINT_SHARES.values()) == pytest.approx(1)


def test_the_tokenizer_sees_as_much_of_each_family(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "TOKENIZER_CHARACTERS", 1000)
    for languages in study.LANGUAGES.values():
        for code in languages:
            lines = [json.dumps({"text": "x" * 50, "language": code}) + "\n"] * 100
            (tmp_path / f"{code}.jsonl").write_text("".join(lines))
    study.write_tokenizer_sample(tmp_path, tmp_path / "sample.jsonl")
    seen = [json.loads(line)["language"] for line in study.documents(tmp_path, "sample")]
    for languages in study.LANGUAGES.values():
        counts = [seen.count(code) for code in languages]
        assert sum(counts) == 20 and max(counts) - min(counts) <= 1


def test_the_sweeps_of_phase_1() -> None:
    main, disjoint = runs("main"), runs("disjoint")
    assert {run.purpose for run in main} == {"grid", "single_family", "hypothesis"}
    own = {tuple(run.ratios.values()) for run in disjoint}
    assert own <= {tuple(run.ratios.values()) for run in main if run.purpose == "hypothesis"}


def test_a_transfer_that_is_there_is_found_and_none_that_is_not() -> None:
    planned = runs("main", hypothesis={"seeds": 3})
    for transfer in (0.0, HELP):
        tests = {(t.family, t.ratio): t for t in split_tests(measured(planned, transfer))}
        assert tests["romance", 0.4].splits == 5 and tests["romance", 0.4].seeds == 3
        for (family, _), test in tests.items():
            assert (test.p_value < 1e-4) == (family == "romance" and transfer > 0)
        seeds = [test.seed_std for test in tests.values()]
        assert np.mean(seeds) == pytest.approx(NOISE, rel=0.25)
    assert tests["romance", 0.4].largest == pytest.approx(5 / 6 * HELP, abs=3 * NOISE)
    effects = partner_effects(measured(planned, HELP), 0.4)
    assert min(effects["romance"], key=effects["romance"].__getitem__) == "slavic"
    assert effects["romance"]["slavic"] == pytest.approx(-0.75 * HELP * 5 / 6, abs=2 * NOISE)
    assert sum(effects["indic"].values()) == pytest.approx(0)


def comparison() -> RunsTable:
    mixtures = {"uniform": dict.fromkeys(GAMMA, 0.2), "lopsided": dict.fromkeys(GAMMA, 0.1)}
    mixtures["lopsided"]["slavic"] = 0.6
    both = {study.SMALL: [6e5], study.LARGE: [6e5]}
    changes = {"confirm": {"cells": both, "mixtures": mixtures, "seeds": 2}}
    return measured([run for run in runs("main", **changes) if run.purpose == "confirm"])


def test_mixtures_are_compared_by_the_losses_of_single_families() -> None:
    results = compare_mixtures(LAW, measured(runs("main")), comparison())
    assert [result.mixture for result in results] == ["uniform", "lopsided"] * 2
    for result in results:
        assert result.normalized == pytest.approx(result.predicted, abs=20 * NOISE)
        assert (result.against_uniform == 0) == (result.mixture == "uniform")
        assert result.predicted == pytest.approx(
            sum(p ** -GAMMA[family] for family, p in result.ratios.items())
        )
    only_small = measured(runs("main", single_family={"cells": {study.LARGE: [2e5]}}))
    with pytest.raises(ValueError, match="no runs of single families"):
        compare_mixtures(LAW, only_small, comparison())


def test_predictions() -> None:
    found = predictions(LAW, comparison())
    assert len(found) == 2 * 2 * 2 * 5
    errors = [math.log(one.measured / one.predicted) for one in found]
    assert NOISE / 2 < np.std(errors) < 2 * NOISE
    assert all(one.low < one.predicted < one.high for one in found)


def test_the_report_before_there_is_a_law(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="phase 1 has not been collected"):
        report(tmp_path, tmp_path / "docs")
    measured(runs("main")).save(tmp_path / "main" / "runs.parquet")
    report(tmp_path, tmp_path / "docs")
    assert "corpus `main`" in (tmp_path / "docs" / "mixture_study.md").read_text()


@pytest.mark.slow
def test_the_report(tmp_path: Path) -> None:
    out = tmp_path / "docs"
    measured(runs("main")).save(tmp_path / "main" / "runs.parquet")
    LAW.save(tmp_path / "law.yaml")
    measured(runs("disjoint")).save(tmp_path / "disjoint" / "runs.parquet")
    comparison().save(tmp_path / "confirm" / "runs.parquet")
    report(tmp_path, out)
    text = (out / "mixture_study.md").read_text()
    for heading in ("corpus `main`", "corpus `disjoint`", "The law", "Mixtures", "Predicted"):
        assert heading in text
    with open(out / "mixture_study.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["sweep"] for row in rows} == {"main", "disjoint", "confirm"}
    assert len(json.loads((out / "mixture_study.json").read_text())["mixtures"]) == 4
    assert (out / "mixture_study.png").stat().st_size > 50_000

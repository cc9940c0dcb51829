"""The table of metrics against a run that logs all of them, and the reports behind some of them."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.config import MixtureConfig, Weighting
from data.language_mixture import LanguageMixture
from data.store_writer import TokenStoreWriter
from data.token_store import TokenStore
from launch.schema import load
from models.parameter_count import parameter_count
from parallel.config import ConfigError
from pretrain import metrics
from pretrain.config import TrainConfig
from pretrain.loss import LanguageLosses
from pretrain.metrics import METRICS, Section, charts, find
from pretrain.metrics_file import read_metrics
from pretrain.mixture_report import MixtureReport
from pretrain.run import run
from pretrain.throughput import ThroughputMeter, pipeline_bubble
from pretrain.train_state import TrainState, Unreported
from tests.distributed import run_on_gloo
from tests.pretrain.laws import a_law

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = ("germanic", "indic", "sino-tibetan")  # of the run's languages


def whole_run(run_dir: str) -> str:
    """Four steps of a real run with everything switched on; what this rank printed."""
    os.environ["XDG_CACHE_HOME"] = f"{run_dir}/cache"
    settings = [
        "+experiment=tiny_cpu",
        "model=xmoe_tiny",
        "parallel=pp2",
        "data.languages=[de,hi,zh]",
        "data.seq_length=32",
        "train.train_steps=4",
        "train.eval_interval=2",
        "train.eval_sequences=2",
        "train.router_health_interval=2",
        "train.mixture_interval=2",
        "train.gradient_norm_interval=2",
        "checkpoint.save_interval=4",
        "anomaly.spike_warmup=2",
        "profile.straggler_interval=2",
        "profile.start_step=4",
        "profile.steps=1",
        f"data.mixture.law={run_dir}/law.yaml",
        f"run_dir={run_dir}/run",
    ]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run(load(settings))
    return printed.getvalue()


@pytest.fixture(scope="module")
def a_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("metrics")
    a_law(FAMILIES).save(folder / "law.yaml")
    printed, others = run_on_gloo(2, whole_run, str(folder))
    assert "Where the time went" not in others
    return folder / "run", printed


def logged(run_dir: Path) -> dict[str, dict[int, float]]:
    """name -> step -> value; no name twice at a step, but for the axis."""
    found: dict[str, dict[int, float]] = {}
    for record in read_metrics(run_dir / "metrics.jsonl"):
        step = int(record.pop("step"))
        record.pop("time")
        for name, value in record.items():
            assert step not in found.get(name, {}) or name == "train/consumed_tokens", (name, step)
            found.setdefault(name, {})[step] = value
    return found


def test_a_run_logs_what_the_table_says(a_run: tuple[Path, str]) -> None:
    names = logged(a_run[0])
    unknown = [name for name in names if find(name) is None]
    assert not unknown, f"not in pretrain/metrics.py: {unknown}"
    seen = {find(name) for name in names}
    missing = [m.name for m in METRICS if m not in seen and m.needs != "a GPU"]
    assert not missing, f"in the table, but no run logs them: {missing}"


def test_numbers_of_a_run_fit_together(a_run: tuple[Path, str]) -> None:
    run_dir, printed = a_run
    found = logged(run_dir)
    for step in (2, 4):
        of_families = [v[step] for k, v in found.items() if k.startswith("data/family/")]
        assert of_families
        for kind in ("ratio", "asked_ratio"):
            shares = [v[step] for k, v in found.items() if k.endswith(f"/{kind}")]
            assert sum(shares) == pytest.approx(1.0)
        blocks = [v[step] for k, v in found.items() if k.startswith("gradients/block/")]
        assert math.hypot(*blocks) == pytest.approx(found["train/grad_norm"][step], rel=1e-5)
        tokens = [v[step] for k, v in found.items() if k.startswith("data/language/")]
        assert sum(v for v in tokens if v >= 32) == found["train/consumed_sequences"][step] * 32
        stages = [v[step] for k, v in found.items() if k.startswith("time/")]
        assert len(stages) == 8 and all(value >= 0 for value in stages)
        assert found["stragglers/slowdown"][step] >= 1
        assert found["memory/peak_bytes_max"][step] >= found["memory/host_bytes"][step] / 4
    assert found["throughput/pipeline_bubble"][4] == pytest.approx(0.5)  # 1 micro-batch, 2 stages
    assert 0 < found["throughput/data_wait_seconds"][4] < found["throughput/step_seconds"][4]
    assert list(found["eval/seconds"]) == [0, 2, 4] == list(found["eval/loss"])
    assert found["checkpoint/stall_seconds"].keys() == {4}
    assert (run_dir / "profile" / "rank_0000.json").is_file()
    table = (run_dir / "profile" / "step_times.txt").read_text()
    assert table.strip() in printed and "\ncheckpoint " in table and "\nevaluation " in table


def test_losses_are_held_against_the_law(a_run: tuple[Path, str]) -> None:
    run_dir, printed = a_run
    found, law = logged(run_dir), a_law(FAMILIES)
    model = json.loads((run_dir / "predicted_losses.json").read_text())["num_parameters"]
    assert model == parameter_count(load(["+model=xmoe_tiny"]).model, vocab_size=1).non_embedding
    for family in FAMILIES:
        prefix = f"eval/family/{family}/"
        predicted = found[f"{prefix}predicted_loss"]
        assert list(predicted) == [2, 4]  # nothing is known before the first token
        for step in (2, 4):
            tokens = found["train/consumed_tokens"][step]
            ratio = found[f"data/family/{family}/tokens"][step] / tokens
            assert predicted[step] == pytest.approx(law.families[family].loss(model, tokens, ratio))
            low, high = (found[f"{prefix}predicted_{end}"][step] for end in ("low", "high"))
            assert low < predicted[step] < high
            measured = found[f"{prefix}loss"][step]
            ratio = found[f"{prefix}loss_over_prediction"][step]
            assert ratio == pytest.approx(measured / predicted[step])
        assert f"  {family} {predicted[4]:.3f} (" in printed  # what the start said of the end
    assert "WARNING: the law is used outside of its fit: tokens=512: 1.95 times below" in printed
    assert "Against the scaling law: " in printed
    assert (run_dir / "scaling_law.yaml").read_bytes() == (run_dir.parent / "law.yaml").read_bytes()
    assert "germanic: measured and predicted loss" in (run_dir / "report.html").read_text()


def test_documentation_is_the_table() -> None:
    """Else: python -m pretrain.metrics > docs/metrics.md"""
    assert (ROOT / "docs" / "metrics.md").read_text() == metrics.markdown()


def test_the_table_is_sound() -> None:
    names = [metric.name for metric in METRICS]
    assert len(names) == len(set(names))
    for metric in METRICS:
        assert find(metric.name) is metric, "one pattern swallows another's name"
        assert metric.best in ("", "min", "max")
        assert (ROOT / metric.computed_in).is_file(), metric
    of_charts = [m for section in Section for chart in charts(section) for m in chart.metrics]
    assert sorted(m.name for m in of_charts) == sorted(names)
    for section in Section:
        for chart in charts(section):
            assert len({m.axis for m in chart.metrics}) == 1, chart


@pytest.mark.parametrize("interval", ["mixture_interval", "gradient_norm_interval"])
def test_intervals_are_checked(interval: str) -> None:
    with pytest.raises(ConfigError, match=rf"^train\.{interval}=-1 must be 0 or more$"):
        TrainConfig(**{interval: -1})


def test_find() -> None:
    assert find("eval/family/slavic/loss").name == "eval/family/<family>/loss"  # type: ignore[union-attr]
    assert find("router/layer_02/entropy").name == "router/layer_<layer>/entropy"  # type: ignore[union-attr]
    assert find("eval/family/slavic/perplexity") is None
    assert find("retrain/loss") is None and find("train/loss2") is None


def test_the_table_is_light() -> None:
    code = "import sys, pretrain.metrics; print({'torch', 'wandb', 'megatron'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_pipeline_bubble() -> None:
    assert pipeline_bubble(1, 1, 4) == 0
    assert pipeline_bubble(4, 1, 9) == pytest.approx(0.25)
    assert pipeline_bubble(4, 3, 9) == pytest.approx(0.1)


def test_data_wait_is_the_mean_over_steps() -> None:
    meter = ThroughputMeter(1.0, window=2)
    for waits in ((), (0.0,), (0.02, 0.02)):
        with meter.step(1):
            for seconds in waits:
                with meter.waiting_for_data():
                    time.sleep(seconds)
    waited = meter.metrics()["throughput/data_wait_seconds"]
    assert 0.02 <= waited < meter.metrics()["throughput/step_seconds"]


FAMILY_OF = {"de": "germanic", "en": "germanic", "hi": "indic"}
SEQUENCES = {"de": 40, "en": 20, "hi": 20}  # of 8 tokens


@pytest.fixture
def mixture(tmp_path: Path) -> LanguageMixture:
    """Half of the samples of each family."""
    stores = []
    about: Any = {"tokenizer_fingerprint": "f" * 64, "vocab_size": 100, "eod_id": 0}
    for language, family in FAMILY_OF.items():
        prefix = tmp_path / language
        with TokenStoreWriter(prefix, language=language, family=family, **about) as writer:
            writer.add_document(np.arange(SEQUENCES[language] * 8) % 50 + 1)
        stores.append(TokenStore(prefix))
    return LanguageMixture(stores, 8, MixtureConfig(weighting=Weighting.uniform), seed=1)


def losses(mixture: LanguageMixture, **rows: tuple[float, int]) -> LanguageLosses:
    """rows: language=(loss sum, tokens)."""
    made = LanguageLosses(mixture.languages)
    for language, (loss_sum, tokens) in rows.items():
        row = made.totals[mixture.languages.index(language)]
        row[0], row[1] = loss_sum, tokens
    return made


def test_mixture_report(mixture: LanguageMixture) -> None:
    report = MixtureReport(mixture, TrainState())
    report.add(losses(mixture, de=(12.0, 4), hi=(10.0, 4)))
    report.add(losses(mixture, de=(4.0, 4), en=(9.0, 3), hi=(5.0, 1)))
    found = report.metrics(30)
    assert found["train/family/germanic/loss"] == pytest.approx(25 / 11)
    assert found["train/family/indic/loss"] == pytest.approx(3.0)
    assert found["train/language/de/loss"] == pytest.approx(2.0)
    assert found["data/family/germanic/ratio"] == pytest.approx(11 / 16)
    assert found["data/family/germanic/asked_ratio"] == pytest.approx(0.5)
    counts = mixture.counts(30)
    assert found["data/family/indic/tokens"] == 8 * counts["hi"] and counts["hi"] in (14, 15, 16)
    assert found["data/family/indic/epochs"] == pytest.approx(
        counts["hi"] / len(mixture.sequences[2])
    )
    drawn = counts["de"] + counts["en"]
    of_family = sum(len(packed) for packed in mixture.sequences[:2])
    assert found["data/family/germanic/epochs"] == pytest.approx(drawn / of_family)
    assert found["data/language/en/epochs"] == mixture.epochs(30)["en"]

    report.add(losses(mixture, en=(3.0, 1)))  # a new interval: of germanic only
    again = report.metrics(32)
    assert again["train/family/germanic/loss"] == 3.0 and "train/family/indic/loss" not in again
    assert again["data/family/germanic/ratio"] == 1.0 and again["data/family/indic/ratio"] == 0.0
    resumed = MixtureReport(mixture, TrainState(consumed_sequences=30))
    resumed.add(losses(mixture, en=(3.0, 1)))
    assert resumed.metrics(32) == again
    assert "data/family/indic/asked_ratio" not in report.metrics(32)  # nothing asked since


def test_what_is_not_reported_yet_outlives_the_run(mixture: LanguageMixture) -> None:
    """Through a checkpoint in the middle of an interval, in numbers that have no short form."""
    steps = [losses(mixture, de=(1 / 3, 4)), losses(mixture, de=(0.1, 1), hi=(math.pi, 3))]
    whole = MixtureReport(mixture, TrainState())
    for step in steps:
        whole.add(step)
    state = TrainState(step=1, consumed_sequences=9)
    report = MixtureReport(mixture, TrainState())
    report.add(steps[0])
    state.unreported = report.unreported()
    resumed = MixtureReport(mixture, TrainState(**state.to_dict()))
    resumed.add(steps[1])
    expected = whole.metrics(18)
    assert "train/language/de/loss" in expected and resumed.metrics(18) == expected
    assert resumed.unreported() == Unreported(18, [])
    back = TrainState(step=2, consumed_sequences=18, unreported=resumed.unreported())
    back.go_back(state, [9, 18])  # a rollback: what led to the checkpoint is in it
    report.go_on(back)
    report.add(steps[1])
    assert report.metrics(18) == expected


def test_losses_of_no_token_are_left_out(mixture: LanguageMixture) -> None:
    found = MixtureReport(mixture, TrainState()).metrics(0)
    assert not [name for name in found if name.startswith("train/") or name.endswith("ratio")]

"""Predictions of a law for a model and a stream of samples, and what is shown of them."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.config import MixtureConfig, Weighting, WhenExhausted
from data.language_mixture import LanguageMixture
from data.mixture_law import differences, open_law, open_law_of
from data.store_writer import TokenStoreWriter
from data.token_store import TokenStore
from launch.schema import load
from pretrain.html_report import render, write_html_report
from pretrain.predicted_losses import (
    EndPoint,
    PredictedLosses,
    Prediction,
    keep_law,
    read_prediction,
    write_prediction,
)
from pretrain.prediction_figures import prediction_figures
from pretrain.report import Curve, prediction_table, print_report
from pretrain.run_identity import identity
from pretrain.train_state import TrainState
from tests.pretrain.laws import a_law

FAMILY_OF = {"de": "germanic", "en": "germanic", "hi": "indic"}
N = 1_000_000


@pytest.fixture
def stores(tmp_path: Path) -> list[TokenStore]:
    about: Any = {"tokenizer_fingerprint": "f" * 64, "vocab_size": 100, "eod_id": 0}
    for language, family in FAMILY_OF.items():
        with TokenStoreWriter(tmp_path / language, language=language, family=family, **about) as w:
            w.add_document(np.arange(320) % 50 + 1)
    return [TokenStore(tmp_path / language) for language in FAMILY_OF]


def mixture_of(stores: list[TokenStore], **settings: Any) -> LanguageMixture:
    """Sequences of 8 tokens; a quarter of the samples Indic."""
    settings.setdefault("ratios", {"germanic": 0.75, "indic": 0.25})
    config = MixtureConfig(weighting=Weighting.ratios, **settings)
    return LanguageMixture(stores, 8, config, seed=1)


def test_the_law_at_what_was_drawn(stores: list[TokenStore]) -> None:
    mixture, law = mixture_of(stores), a_law(["germanic", "indic"])
    predictions = PredictedLosses(law, mixture, N)
    assert predictions.at(0, 0) == {}
    found = predictions.at(100, 790)  # 10 tokens carried no loss
    counts = mixture.counts(100)
    ratios = {"germanic": (counts["de"] + counts["en"]) / 100, "indic": counts["hi"] / 100}
    for family, ratio in ratios.items():
        assert found[family].loss == law.families[family].loss(N, 790, ratio)
        low_high = law.interval(N, 790, ratios, level=0.9)[family]
        assert (found[family].low, found[family].high) == low_high
    first = predictions.at(1, 8)
    assert list(first) == ["germanic"]  # the others have not been drawn, and have no ratio yet


def test_metrics_of_an_evaluation(stores: list[TokenStore]) -> None:
    predictions = PredictedLosses(a_law(["germanic", "indic"]), mixture_of(stores), N)
    state = TrainState(step=10, consumed_sequences=100, consumed_tokens=800)
    of_indic = predictions.at(100, 800)["indic"]
    found = predictions.metrics(state, {"eval/family/indic/loss": 2 * of_indic.loss})
    assert found["eval/family/indic/loss_over_prediction"] == pytest.approx(2.0)
    assert found["eval/family/indic/predicted_high"] == of_indic.high
    assert "eval/family/germanic/loss_over_prediction" not in found  # not evaluated
    assert "eval/family/germanic/predicted_loss" in found
    assert predictions.metrics(TrainState(), {"eval/family/indic/loss": 9.0}) == {}


def test_the_end_of_a_run(stores: list[TokenStore]) -> None:
    law = a_law(["germanic", "indic"], tokens=(1e3, 1e4))
    predictions = PredictedLosses(law, mixture_of(stores), N)
    state = TrainState(step=10, consumed_sequences=100, consumed_tokens=790)
    end = predictions.end_point(state, train_steps=1010, global_batch_size=10)
    assert (end.step, end.tokens) == (1010, 790 + 1000 * 10 * 8)
    assert end.families == predictions.at(100 + 10_000, end.tokens)
    assert end.warnings == ["tokens=8.079e+04: 8.08 times the largest fitted (1e+04)"]
    lines = end.lines("my/law.yaml")
    assert lines[0].startswith("data.mixture.law=my/law.yaml predicts these validation losses at ")
    assert lines[-1].startswith("WARNING: the law is used outside of its fit: tokens=")
    assert len(lines) == 4
    # the data may end before the steps do
    stops = mixture_of(stores, max_epochs=1.0, when_exhausted=WhenExhausted.stop)
    assert stops.end is not None
    short = PredictedLosses(law, stops, N).end_point(TrainState(), 1010, global_batch_size=10)
    assert short.step == stops.end // 10 and short.tokens == short.step * 10 * 8
    done = predictions.end_point(state, train_steps=5, global_batch_size=10)
    assert (done.step, done.tokens) == (10, 790)


def test_a_run_of_another_kind_than_those_of_the_law(stores: list[TokenStore]) -> None:
    law, mixture = a_law(["germanic", "indic"]), mixture_of(stores)
    assert differences(law, mixture, sparse=False) == []  # what its runs had is not known
    same = {
        "seq_length": [8],
        "tokenizer": ["f" * 64],
        "languages": {"germanic": ["de", "en"], "indic": ["hi"], "slavic": ["cs"]},
    }
    law.provenance["data"] = same
    assert differences(law, mixture, sparse=False) == []
    law.provenance["data"] = {
        "seq_length": [16, 32],
        "tokenizer": ["e" * 64],
        "languages": {"germanic": ["en", "nl"], "indic": ["hi"]},
    }
    found = differences(law, mixture, sparse=True)
    assert len(found) == 4
    assert found[0].startswith("the model is sparse; its N counts all experts")
    assert found[1].startswith("seq_length=8: the runs of its sweep had 16 and 32")
    assert found[2].startswith(f"tokenizer={'f' * 16}: the runs of its sweep had {'e' * 16},")
    assert found[3].startswith("germanic is without nl and with de, unlike")
    never = mixture_of(stores, ratios={"germanic": 0.0, "indic": 1.0})
    assert not any("germanic" in line for line in differences(law, never, sparse=False))
    end = PredictedLosses(law, mixture, N, found).end_point(TrainState(), 100, 10)
    assert end.warnings == found
    assert end.lines("law.yaml")[-1] == f"WARNING: the law is used outside of its fit: {found[3]}"


def test_it_is_kept_in_the_run_folder(tmp_path: Path) -> None:
    assert read_prediction(tmp_path) is None
    end = EndPoint(5, N, 40, {"indic": Prediction(3.0, 2.5, 3.5)}, ["far"])
    write_prediction(tmp_path, end)
    assert read_prediction(tmp_path) == end
    (tmp_path / "mine.yaml").write_text("a law")
    for record, copy in (("run.json", "scaling_law.yaml"), ("run.3.json", "scaling_law.3.yaml")):
        keep_law(str(tmp_path / "mine.yaml"), tmp_path / record)
        assert (tmp_path / copy).read_text() == "a law"


def test_laws_that_do_not_fit(stores: list[TokenStore], tmp_path: Path) -> None:
    path = tmp_path / "law.yaml"
    with pytest.raises(ValueError, match=r"^data\.mixture\.law=.*: there is no such scaling law"):
        open_law(str(path))
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"^data\.mixture\.law=.*is not a scaling law of format"):
        open_law(str(path))
    a_law(["germanic", "slavic"]).save(path)
    with pytest.raises(ValueError, match=r"knows nothing of indic, which the data has; it was fit"):
        open_law_of(mixture_of(stores), str(path))
    never = mixture_of(stores, ratios={"germanic": 1.0, "indic": 0.0})
    assert open_law_of(never, str(path)).gamma["germanic"] == 0.1


def test_a_resume_may_change_the_law(stores: list[TokenStore]) -> None:
    with_law, without = mixture_of(stores, law="law.yaml"), mixture_of(stores)
    assert with_law.fingerprint() == without.fingerprint()
    one, other = (
        identity(load(["+model=magneto_tiny", *words]), 100, without.fingerprint())
        for words in ((), ("data.mixture.law=law.yaml",))
    )
    assert one == other


END = {
    "eval/family/germanic/loss": 3.0,
    "eval/family/germanic/predicted_loss": 2.9,
    "eval/family/germanic/predicted_low": 2.8,
    "eval/family/germanic/predicted_high": 3.1,
    "eval/family/indic/loss": 4.0,
    "eval/family/indic/predicted_loss": 3.2,
    "eval/family/indic/predicted_low": 3.1,
    "eval/family/indic/predicted_high": 3.3,
    "eval/family/slavic/loss": math.nan,
    "eval/family/slavic/predicted_loss": 3.2,
    "eval/family/slavic/predicted_low": 3.1,
    "eval/family/slavic/predicted_high": 3.3,
    "eval/family/uralic/loss": 1.0,
    "eval/family/uralic/predicted_loss": 3.2,
    "eval/family/uralic/predicted_low": 3.1,
    "eval/family/uralic/predicted_high": 3.3,
}


def test_the_table_at_the_end() -> None:
    out = io.StringIO()
    print_report({}, END, file=out)
    rows = [line.split() for line in out.getvalue().splitlines()]
    assert ["germanic", "3.000", "2.900", "2.800", "to", "3.100", "1.034", "yes"] in rows
    assert ["indic", "4.000", "3.200", "3.100", "to", "3.300", "1.250", "above"] in rows
    assert ["slavic", "-", "3.200", "3.100", "to", "3.300", "-", "-"] in rows
    assert ["uralic", "1.000", "3.200", "3.100", "to", "3.300", "0.312", "below"] in rows
    words = " ".join(out.getvalue().split())
    assert "Against the scaling law: 1 of 4 families inside its 90 % interval" in words
    assert prediction_table({"eval/family/indic/loss": 3.0}) is None


CURVES: dict[str, Curve] = {
    "eval/family/indic/loss": ([0, 5, 10], [9.0, 6.0, 4.0]),
    "eval/family/indic/predicted_loss": ([5, 10], [80.0, 4.2]),
    "eval/family/indic/predicted_low": ([5, 10], [70.0, 4.0]),
    "eval/family/indic/predicted_high": ([5, 10], [90.0, math.nan]),
    "eval/family/slavic/loss": ([0], [9.0]),  # not drawn
}


def test_figures_of_families() -> None:
    end = EndPoint(20, N, 400, {"indic": Prediction(3.0, 2.5, 3.75)}, [])
    ((traces, layout),) = prediction_figures(CURVES, end)
    named = {trace["name"]: trace for trace in traces}
    band = named["90 % interval of the law"]
    assert band["fill"] == "tonexty" and band["y"] == [90.0, None]
    assert traces[traces.index(band) - 1]["y"] == [70.0, 4.0]  # what it is filled down to
    assert named["measured"]["x"] == [0, 5, 10]
    point = named["predicted end"]
    assert (point["x"], point["y"]) == ([20], [3.0])
    assert point["error_y"]["array"] == [0.75] and point["error_y"]["arrayminus"] == [0.5]
    low, high = layout["yaxis"]["range"]  # the first prediction does not squeeze the rest
    assert low < 2.5 and 9.0 < high < 10
    assert layout["title"]["text"] == "indic: measured and predicted loss"
    ((traces, _),) = prediction_figures(CURVES, None)  # an end that is not known
    assert "predicted end" not in {trace["name"] for trace in traces}
    assert prediction_figures({"eval/family/indic/loss": ([0], [9.0])}, end) == []


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of which an evaluation at step 20 is still to come."""
    lines = []
    for step in (0, 5, 10):
        record: dict[str, float] = {"step": step, "time": 1e9, "eval/loss": 9.0}
        for name, (steps, values) in CURVES.items():
            if step in steps and math.isfinite(value := values[steps.index(step)]):
                record[name] = value
        lines.append(json.dumps(record))
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    end = EndPoint(20, N, 400, {"indic": Prediction(3.0, 2.5, 3.5)}, [])
    write_prediction(tmp_path, end)
    return tmp_path


def test_the_page_of_a_run(run_dir: Path) -> None:
    page = render(run_dir)
    assert page.count("indic: measured and predicted loss") == 1
    assert "Predicted loss by family" not in page  # the figures are instead of it
    (run_dir / "metrics.jsonl").write_text('{"step": 0, "eval/family/indic/loss": 9.0}\n')
    assert "predicted" not in re.sub(r"<script>.{100000,}?</script>", "", render(run_dir))


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium (Debian: chromium)")
def test_a_browser_draws_the_band(run_dir: Path, tmp_path: Path) -> None:
    page = write_html_report(run_dir)
    options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run"
    options += " --disable-background-networking --disable-component-update --disable-sync"
    command = ["chromium", *options.split(), "--virtual-time-budget=10000", "--dump-dom"]
    done = subprocess.run(
        [*command, f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "fill: rgb(224, 138, 60); fill-opacity: 0.25" in done.stdout  # the band itself
    assert "indic: measured and predicted loss" in done.stdout
    assert "predicted end" in done.stdout

"""Whole runs that meet one poisoned document: it is found by name, whatever the layout, and every
way to go on is the same on all ranks and after a resume."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.ledger import read_ledger
from models.moe_config import MoEConfig
from parallel.config import ParallelConfig
from pretrain.anomaly_watch import AnomalyWatch
from pretrain.config import AnomalyConfig, OnNonfinite, OnSpike, PretrainConfig
from pretrain.events import read_events
from pretrain.metrics_file import read_metrics
from tests.distributed import run_on_gloo
from tests.pretrain import poisoned
from tests.pretrain.poisoned import BATCH, Diary, Poison, replayed, report_of

SPIKE_STEP, LAST_STEP = 16, 18
EARLY = 3
ANOMALY = AnomalyConfig(spike_window=6, spike_warmup=4, keep_batches=3)
SKIP = replace(ANOMALY, on_spike=OnSpike.skip)
TP2_PP2 = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)


@pytest.fixture(scope="module")
def late(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Poison]:
    """Stores whose poisoned document is met at SPIKE_STEP, when the model knows the others."""
    folder = tmp_path_factory.mktemp("late")
    return folder, poisoned.poisoned_stores(folder, SPIKE_STEP)


@pytest.fixture(scope="module")
def early(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Poison]:
    folder = tmp_path_factory.mktemp("early")
    return folder, poisoned.poisoned_stores(folder, EARLY)


def run(
    ranks: int,
    stores: tuple[Path, Poison],
    run_dir: Path,
    steps: int,
    damage: str = "",
    **more: Any,
) -> Diary:
    """What all ranks saw alike."""
    settings = poisoned.config(stores[0], run_dir, train_steps=steps, **more)
    diaries = run_on_gloo(ranks, poisoned.train, settings, damage)
    assert len({repr(diary) for diary in diaries}) == 1  # NaN included
    return diaries[0]


def assert_names(document: dict[str, Any], poison: Poison, stores: Path) -> None:
    expected = {
        "language": poison.language,
        "document": poison.document,
        "doc_id": f"{poison.language}-{poison.document}",
        "store": str(stores / "train" / poison.language),
        "sample": poison.sample,
        "source": "made up",
    }
    assert {key: document[key] for key in expected} == expected


@pytest.fixture(scope="module")
def whole(late: tuple[Path, Poison], tmp_path_factory: pytest.TempPathFactory) -> Any:
    run_dir = tmp_path_factory.mktemp("whole")
    return run_dir, run(2, late, run_dir, LAST_STEP, anomaly=SKIP)


def test_a_spike_is_traced_to_its_document(late: tuple[Path, Poison], whole: Any) -> None:
    (stores, poison), (run_dir, diary) = late, whole
    expected = ["apply"] * LAST_STEP
    expected[SPIKE_STEP - 1] = "skip"
    assert diary.actions == expected and diary.steps == list(range(1, LAST_STEP + 1))
    report = report_of(run_dir, SPIKE_STEP)
    assert (report["kind"], report["decision"]) == ("spike", "skip")
    assert report["loss_z"] > 10 and report["loss"] == diary.losses[SPIKE_STEP - 1]
    worst, second = report["findings"]["documents"][:2]
    assert_names(worst, poison, stores)
    assert worst["mean_loss"] > 8 and worst["expected_loss"] < 2
    assert worst["labels"] == worst["tokens"] == poisoned.LENGTH
    assert worst["contribution"] == pytest.approx(worst["mean_loss"] * 11 / (BATCH * 32))
    assert worst["excess"] > 10 * second["excess"]
    earlier = report["findings"]["earlier"]  # of which none stands out
    assert [step["step"] for step in earlier] == [SPIKE_STEP - 1, SPIKE_STEP - 2]
    assert max(step["documents"][0]["excess"] for step in earlier) < 0.1
    by_language = {row["language"]: row for row in report["findings"]["languages"]}
    raised = by_language.pop(poison.language)
    assert raised["loss"] > raised["expected_loss"] + 1
    assert all(abs(row["loss"] - row["expected_loss"]) < 1 for row in by_language.values())


def test_a_skipped_update_is_on_record(late: tuple[Path, Poison], whole: Any) -> None:
    (_, poison), (run_dir, _) = late, whole
    samples = [BATCH * (SPIKE_STEP - 1), BATCH * SPIKE_STEP]
    (skip,) = [entry for entry in read_ledger(run_dir) if entry["event"] == "skip"]
    assert (skip["step"], skip["samples"]) == (SPIKE_STEP, samples)
    assert "robust standard deviations above the median" in skip["why"]
    (event,) = [event for event in read_events(run_dir) if event["kind"] == "spike"]
    assert event["step"] == SPIKE_STEP and event["samples"] == samples
    assert f"{poison.language}-{poison.document} ({poison.language})" in event["text"]
    text = (run_dir / event["report"]).read_text()
    assert text.startswith(f"# Step {SPIKE_STEP}: spike\n\nloss ")
    assert f"1. `{poison.language}-{poison.document}`, document {poison.document} of " in text
    counts = {
        record["step"]: [record[f"anomaly/{name}"] for name in ("count", "skipped_updates")]
        for record in read_metrics(run_dir / "metrics.jsonl")
        if "train/loss" in record
    }
    assert counts[SPIKE_STEP - 1] == [0, 0] and counts[SPIKE_STEP] == counts[LAST_STEP] == [1, 1]


def test_a_resumed_run_decides_as_one_that_was_not_interrupted(
    late: tuple[Path, Poison], whole: Any, tmp_path: Path
) -> None:
    """Interrupted closer to the spike than the warm-up is long."""
    _, uninterrupted = whole
    before = run(2, late, tmp_path, SPIKE_STEP - 2, anomaly=SKIP)
    after = run(2, late, tmp_path, LAST_STEP, anomaly=SKIP)
    assert before.losses + after.losses == uninterrupted.losses
    assert before.actions + after.actions == uninterrupted.actions
    assert_names(report_of(tmp_path, SPIKE_STEP)["findings"]["documents"][0], late[1], late[0])


@pytest.mark.slow
def test_the_document_is_found_under_tensor_and_pipeline_parallelism(
    late: tuple[Path, Poison], whole: Any, tmp_path: Path
) -> None:
    diary = run(4, late, tmp_path, SPIKE_STEP, anomaly=SKIP, parallel=TP2_PP2)
    assert diary.actions == whole[1].actions[:SPIKE_STEP]
    documents = report_of(tmp_path, SPIKE_STEP)["findings"]["documents"]
    assert_names(documents[0], late[1], late[0])
    same = report_of(whole[0], SPIKE_STEP)["findings"]["documents"]
    assert documents[0]["mean_loss"] == pytest.approx(same[0]["mean_loss"], rel=1e-3)


def test_a_rollback_goes_on_without_the_data(
    late: tuple[Path, Poison], whole: Any, tmp_path: Path
) -> None:
    """Back from 16 to 12, then 13, 14, and behind the samples of 15 and 16."""
    anomaly = replace(ANOMALY, on_spike=OnSpike.rollback, rollback_steps=2)
    settings: dict[str, Any] = {"anomaly": anomaly, "save_interval": 12}
    diary = run(2, late, tmp_path, LAST_STEP, **settings)
    assert diary.steps == [*range(1, 17), *range(13, 19)]
    # what is taken again is the same, bit by bit; so is the skip that the rollback stands for
    assert diary.losses[:16] == whole[1].losses[:16]
    assert diary.losses[16:18] == diary.losses[12:14]
    assert diary.samples[18:] == [(first, first + BATCH) for first in range(64, 80, BATCH)]
    # the ledger tells which samples each step was made of in the end
    final = dict(zip(diary.steps, diary.samples, strict=True))
    assert replayed(tmp_path, LAST_STEP) == final
    (entry,) = [e for e in read_ledger(tmp_path) if e["event"] == "rollback"]
    assert (entry["step"], entry["from_step"], entry["left_out"]) == (12, 16, [56, 64])
    (event,) = [e for e in read_events(tmp_path) if e["kind"] == "rollback"]
    assert "back to step 12, rollback 1 of at most 3; samples 56 to 63" in event["text"]
    steps = [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl") if "train/loss" in r]
    assert steps == list(range(1, LAST_STEP + 1))


@pytest.mark.slow
def test_a_run_resumed_after_a_rollback_is_the_same(
    late: tuple[Path, Poison], tmp_path: Path
) -> None:
    """With experts, whose report goes back as well."""
    settings: dict[str, Any] = {
        "anomaly": replace(ANOMALY, on_spike=OnSpike.rollback, rollback_steps=2),
        "save_interval": 12,
        "model": replace(poisoned.MODEL, moe=MoEConfig(num_experts=4)),
        "eval_interval": 5,
        "router_health_interval": 5,
    }
    whole = run(2, late, tmp_path / "one", LAST_STEP, **settings)
    first = run(2, late, tmp_path / "two", LAST_STEP - 1, **settings)
    second = run(2, late, tmp_path / "two", LAST_STEP, **settings)
    assert first.losses + second.losses == whole.losses
    assert whole.steps == [*range(1, 17), *range(13, 19)]
    assert replayed(tmp_path / "two", LAST_STEP) == replayed(tmp_path / "one", LAST_STEP)
    tables = [json.loads(line) for line in (tmp_path / "one/router.jsonl").read_text().splitlines()]
    # 15 was reported once before going back to 12, which does not count
    spans = [(table["first_step"], table["step"]) for table in tables]
    assert spans == [(1, 5), (6, 10), (13, 15), (16, 18)]


def test_rollbacks_come_to_an_end(late: tuple[Path, Poison], tmp_path: Path) -> None:
    anomaly = replace(ANOMALY, on_spike=OnSpike.rollback, max_rollbacks=0)
    diary = run(2, late, tmp_path, LAST_STEP, anomaly=anomaly, save_interval=12)
    assert diary.actions[-1] == "stop" and diary.steps[-1] == SPIKE_STEP
    assert diary.error.startswith(f"AnomalyError: step {SPIKE_STEP} was not taken: loss ")
    assert "anomaly.max_rollbacks=0 are used up" in diary.error
    assert "set anomaly.on_spike=skip or rollback" in diary.error


def killed_after_rollback(settings: PretrainConfig, damage: str) -> Diary:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AnomalyWatch, "rolled_back", killed)
        return poisoned.train(settings, damage)


def killed(*given: Any) -> None:
    raise RuntimeError("killed")


def test_a_rollback_outlives_the_run(early: tuple[Path, Poison], tmp_path: Path) -> None:
    """Killed before the next save, whose checkpoint would know of it."""
    limits = replace(ANOMALY, on_nonfinite=OnNonfinite.rollback, max_rollbacks=1)
    settings = poisoned.config(
        early[0], tmp_path, train_steps=EARLY + 1, anomaly=limits, save_interval=EARLY - 1
    )
    first = run_on_gloo(2, killed_after_rollback, settings, "embedding")[0]
    assert first.error == "RuntimeError: killed" and first.actions[-1] == "rollback"
    left_out = first.samples[-1]
    after = run_on_gloo(2, poisoned.train, settings, "once")  # in its second step
    assert repr(after[0]) == repr(after[1]) and after[0].steps == [EARLY, EARLY + 1]
    assert left_out not in after[0].samples and after[0].actions == ["apply", "stop"]
    assert "anomaly.max_rollbacks=1 are used up" in after[0].error


def test_without_a_checkpoint_a_rollback_is_a_skip(
    early: tuple[Path, Poison], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "anomaly": replace(ANOMALY, on_nonfinite=OnNonfinite.rollback),
        "save_interval": EARLY + 1,
    }
    diary = run(2, early, tmp_path, EARLY + 1, "embedding", **settings)
    assert diary.actions == ["apply"] * (EARLY - 1) + ["skip", "apply"]
    assert "there is no checkpoint to go back to yet" in report_of(tmp_path, EARLY)["why"]


@pytest.mark.parametrize(("ranks", "parallel"), [(2, ParallelConfig()), (4, TP2_PP2)])
def test_a_loss_that_is_not_finite_is_traced_to_its_document(
    early: tuple[Path, Poison], tmp_path: Path, ranks: int, parallel: ParallelConfig
) -> None:
    """The embedding of one token is NaN; so is the loss of its whole sequence."""
    stores, poison = early
    diary = run(ranks, early, tmp_path, EARLY + 1, "embedding", parallel=parallel)
    assert diary.actions == ["apply"] * (EARLY - 1) + ["skip", "apply"]
    report = report_of(tmp_path, EARLY)
    assert (report["kind"], report["loss"]) == ("nonfinite", None)
    found = report["findings"]
    assert found["nonfinite_samples"] == [poison.sample]
    broken, *others = found["documents"]
    assert_names(broken, poison, stores)
    assert broken["alone"] == "not finite"
    neighbours = [row for row in others if row["sample"] == poison.sample]
    assert len(neighbours) >= 2 and {row["alone"] for row in neighbours} == {"finite"}
    assert found["remarks"] == [
        "1 of 4 sequences have a loss that is not finite; of 1 run again by themselves, 1 are not "
        "finite again"
    ]


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [(2, ParallelConfig()), pytest.param(4, TP2_PP2, marks=pytest.mark.slow)],
)
def test_a_gradient_that_is_not_finite_is_traced_to_its_document(
    early: tuple[Path, Poison], tmp_path: Path, ranks: int, parallel: ParallelConfig
) -> None:
    """All losses are finite."""
    stores, poison = early
    diary = run(ranks, early, tmp_path, EARLY + 1, "gradient", parallel=parallel)
    assert diary.actions == ["apply"] * (EARLY - 1) + ["skip", "apply"]
    report = report_of(tmp_path, EARLY)
    assert report["loss"] == diary.losses[EARLY - 1] and report["grad_norm"] is None
    found = report["findings"]
    assert found["nonfinite_samples"] == [poison.sample]
    assert "the gradient of 1 sequences is not, run by themselves" in found["remarks"][0]
    assert_names(found["documents"][0], poison, stores)
    assert [row["alone"] for row in found["documents"]].count("not finite") == 1


def test_what_is_not_the_datas_fault_is_told_so(early: tuple[Path, Poison], tmp_path: Path) -> None:
    once = run(2, early, tmp_path / "once", 2, "once")
    assert once.actions == ["apply", "skip"]
    found = report_of(tmp_path / "once", 2)["findings"]
    assert found["no_culprit"].startswith("it did not happen again: a fault of the machine")
    stop = replace(ANOMALY, on_nonfinite=OnNonfinite.stop)
    broken = run(2, early, tmp_path / "weights", 2, "weights", anomaly=stop)
    assert broken.steps == [1] and broken.actions == ["stop"]
    assert "set anomaly.on_nonfinite=skip or rollback" in broken.error
    found = report_of(tmp_path / "weights", 1)["findings"]
    assert found["no_culprit"].endswith("are broken, and no document is to blame")
    events = read_events(tmp_path / "weights")
    (event,) = [event for event in events if event["kind"] == "nonfinite"]
    assert event["decision"] == "stop" and found["no_culprit"] in event["text"]


def test_broken_weights_are_blamed_on_no_document_again(
    early: tuple[Path, Poison], tmp_path: Path
) -> None:
    """No update is made, so what was found out at the first step holds for those after it."""
    diary = run(2, early, tmp_path / "rerun", 3, "weights")
    assert diary.actions == ["skip"] * 3
    first, *later = [e["text"] for e in read_events(tmp_path / "rerun") if e["kind"] == "nonfinite"]
    assert "update skipped; a sequence of nothing but end-of-document tokens" in first
    assert len(later) == 2
    assert all("skipped; as at step 1: a sequence of nothing but end-of" in e for e in later)
    looks_only = replace(ANOMALY, rerun_sequences=0)
    run(2, early, tmp_path / "not", 2, "weights", anomaly=looks_only)
    reports = [report_of(tmp_path / "not", step)["findings"]["no_culprit"] for step in (1, 2)]
    assert reports[0].startswith("no sequence of the step has a finite loss: ")
    assert reports[1] == f"as at step 1: {reports[0]}"

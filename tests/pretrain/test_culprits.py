"""Losses by document are those of training under every layout, and looking leaves no trace."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from data.open_data import open_data
from data.packing_config import PackingConfig, PackingMode
from models.build import build_model
from models.moe_config import MoEConfig, RouterType
from parallel.config import OptimizerConfig, ParallelConfig
from parallel.engine import MegatronEngine
from parallel.runtime import initialize, shutdown
from pretrain import culprits
from pretrain.anomaly import Action, Verdict
from pretrain.anomaly_report import (
    AnomalyReport,
    DocumentRow,
    Findings,
    markdown,
    write_report,
)
from pretrain.anomaly_watch import AnomalyWatch
from pretrain.config import AnomalyConfig, PretrainConfig
from pretrain.culprits import Culprits, label_spans
from pretrain.events import Events, read_events
from pretrain.loss import LanguageLosses
from pretrain.progress import Progress
from pretrain.router_report import open_router_report
from pretrain.train_state import TrainState
from pretrain.train_step import StepMetrics, train_step
from tests.distributed import run_on_gloo
from tests.pretrain import poisoned
from tests.pretrain.poisoned import Poison

GLOBAL_BATCH, ONE = 8, range(1)
SPIKE, NONFINITE = Verdict(kind="spike", loss_z=0.0, grad_norm_z=20.0), Verdict(kind="nonfinite")
MODEL = replace(poisoned.MODEL, num_layers=4)
BALANCED_BY_BIAS = replace(
    MODEL, moe=MoEConfig(num_experts=4, router=RouterType.aux_free, router_topk=1)
)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Poison]:
    folder = tmp_path_factory.mktemp("stores")
    return folder, poisoned.poisoned_stores(folder, 1)


def settings_of(
    folder: Path, parallel: ParallelConfig, model: Any = MODEL, packing: Any = None
) -> PretrainConfig:
    settings = poisoned.config(folder, folder / "run", parallel=parallel, model=model)
    settings.train.global_batch_size, settings.train.micro_batch_size = GLOBAL_BATCH, 2
    settings.anomaly = AnomalyConfig(max_documents=1000, rerun_sequences=2, keep_batches=2)
    settings.data.packing = packing or PackingConfig()
    return settings


def train(
    settings: PretrainConfig, steps: range, verdict: Verdict | None = None, damage: str = ""
) -> tuple[list[float], Any, list[Any]]:
    """(losses and gradient norms, router counts, findings) of a few steps; after each one the
    culprits of `verdict` are looked for."""
    runtime = initialize(settings.parallel, 1)
    data = open_data(settings.data, settings.seq_length)
    chunks = build_model(
        settings.model,
        settings.parallel,
        runtime,
        vocab_size=data.tokenizer.vocab_size,
        seed=7,
    )
    for chunk in chunks:
        if damage and hasattr(chunk, "embedding"):
            poisoned.spoil(chunk.embedding.word_embeddings, damage)
    engine = MegatronEngine(chunks, settings.parallel, OptimizerConfig(lr=1e-2), runtime)
    router = open_router_report(settings, engine, data, runtime, None)
    looking = Culprits(settings.anomaly, settings.train, engine, runtime, data)
    loader = data.train_loader(
        micro_batch_size=settings.train.micro_batch_size,
        global_batch_size=settings.train.global_batch_size,
        data_parallel_rank=runtime.data_parallel_rank,
        data_parallel_size=runtime.data_parallel_size,
    )
    numbers, findings = [], []
    for step in steps:
        metrics = train_step(
            engine,
            list(loader.micro_batches(step * GLOBAL_BATCH)),
            runtime,
            learning_rate=1e-2,
            languages=data.languages,
            stop_requested=False,
        )
        numbers += [metrics.losses.mean(), metrics.grad_norm]
        looking.keep(step + 1, step * GLOBAL_BATCH, metrics)
        if verdict is not None:
            findings.append(looking.find(verdict, rerun=True))
    routing = router.training_metrics(steps.stop) if router else {}
    if router is not None:
        router.close()
    shutdown(runtime)
    return numbers, routing, findings


LAYOUTS = {
    "data": (2, ParallelConfig()),
    "tensor": (2, ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)),
    "context": (2, ParallelConfig(context_parallel_size=2)),
    "interleaved pipeline": (
        2,
        ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
    ),
}


@pytest.fixture(scope="module")
def alone(stores: tuple[Path, Poison]) -> Any:
    return run_on_gloo(1, train, settings_of(stores[0], ParallelConfig()), ONE, SPIKE)[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_documents_have_their_own_losses_under_every_layout(
    stores: tuple[Path, Poison], alone: Any, name: str
) -> None:
    ranks, parallel = LAYOUTS[name]
    settings = settings_of(stores[0], parallel)
    _, _, (found,) = run_on_gloo(ranks, train, settings, ONE, SPIKE)[0]
    expected = {(r.sample, r.first_token): r for r in alone[2][0].documents}
    assert {(r.sample, r.first_token) for r in found.documents} == expected.keys()
    for row in found.documents:
        same = expected[row.sample, row.first_token]
        assert (row.labels, row.document) == (same.labels, same.document)
        assert row.mean_loss == pytest.approx(same.mean_loss, rel=1e-5, nan_ok=True)
    norms = {row.sample: row.gradient_norm for row in alone[2][0].sequences}
    assert {r.sample: r.gradient_norm for r in found.sequences} == pytest.approx(norms, rel=1e-4)


def test_documents_add_up_to_the_step(alone: Any) -> None:
    (loss, grad_norm), _, (found,) = alone
    assert sum(row.contribution for row in found.documents) == pytest.approx(loss, rel=1e-6)
    assert sum(row.labels for row in found.documents) == GLOBAL_BATCH * poisoned.SEQ_LENGTH
    assert sum(found.gradient_share_by_language.values()) > 0
    # two of eight sequences were run again; each has the gradient of its own mean loss
    assert len(found.sequences) == 2
    for row in found.sequences:
        assert row.gradient_share == pytest.approx(row.gradient_norm / GLOBAL_BATCH)
        assert 0.3 < row.gradient_norm / grad_norm < 30
    taken_apart = [row for row in found.documents if row.gradient_norm is not None]
    assert {row.sample for row in taken_apart} == {row.sample for row in found.sequences}


@pytest.mark.parametrize("overlap", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_looking_leaves_no_trace(stores: tuple[Path, Poison], overlap: bool) -> None:
    """Routers of this kind move with every pass that has gradients, and count what they see."""
    parallel = ParallelConfig(
        expert_model_parallel_size=2, overlap_grad_reduce=overlap, overlap_param_gather=overlap
    )
    settings = settings_of(stores[0], parallel, model=BALANCED_BY_BIAS)
    plain = run_on_gloo(2, train, settings, range(2))[0]
    for verdict in (SPIKE, NONFINITE):
        watched = run_on_gloo(2, train, settings, range(2), verdict)[0]
        assert watched[:2] == plain[:2]
        assert len(watched[2][0].remarks) > 0
    assert watched[2][0].no_culprit.startswith("it did not happen again")


@pytest.mark.parametrize(
    "packing",
    [
        PackingConfig(reset_attention=True, reset_positions=True),
        PackingConfig(mode=PackingMode.best_fit, mask_boundary_loss=True),
    ],
    ids=["reset", "best fit"],
)
def test_documents_are_found_however_they_are_packed(
    stores: tuple[Path, Poison], packing: PackingConfig
) -> None:
    folder, poison = stores
    settings = settings_of(folder, ParallelConfig(), packing=packing)
    if packing.mode is PackingMode.best_fit:  # the document is elsewhere then
        poison = replace(poison, sample=first_sample_with(settings, poison))
    step = poison.sample // GLOBAL_BATCH
    steps = range(step, step + 1)
    _, _, (found,) = run_on_gloo(1, train, settings, steps, NONFINITE, "embedding")[0]
    worst, second = found.documents[:2]
    assert (worst.sample, worst.language, worst.document) == (
        poison.sample,
        poison.language,
        poison.document,
    )
    assert worst.alone == "not finite" != second.alone


def first_sample_with(settings: PretrainConfig, poison: Poison) -> int:
    mixture = open_data(settings.data, settings.seq_length).mixture
    language = mixture.languages.index(poison.language)
    store = mixture.stores[language]
    for sample in range(1000):
        found, number = mixture.locate_one(sample)
        pieces = mixture.sequences[found].pieces(number)
        if found == language and poison.document in [store.document_of(s) for s, _ in pieces]:
            return sample
    raise AssertionError("the document is not drawn")


def look_at_damaged_data(settings: PretrainConfig, broken: str, verdict: Verdict) -> Findings:
    """One name that the look at the data uses raises, on rank 0 alone: no other looks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(culprits, broken, unreadable)
        return train(settings, range(2), verdict)[2][-1]


def unreadable(*given: Any) -> None:
    raise OSError(5, "input/output error")


@pytest.mark.parametrize("verdict", [SPIKE, NONFINITE], ids=["spike", "nonfinite"])
def test_documents_that_cannot_be_read_end_nothing(
    stores: tuple[Path, Poison], verdict: Verdict
) -> None:
    settings = settings_of(stores[0], ParallelConfig())
    found, _ = run_on_gloo(2, look_at_damaged_data, settings, "label_spans", verdict)
    assert found.documents == [] and found.earlier[0].documents == [] and found.languages
    assert found.remarks == [
        f"the documents of step {step} cannot be read: OSError(5, 'input/output error')"
        for step in (2, 1)
    ]


def look_where_rank_one_cannot_read(settings: PretrainConfig, damage: str) -> Findings:
    """Rank 1 reads nothing but what is run again."""
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(culprits, "batch_of", unreadable)
        return train(settings, range(2), NONFINITE if damage else SPIKE, damage)[2][-1]


@pytest.mark.parametrize("damage", ["", "loss", "gradient"])
def test_sequences_that_one_rank_cannot_read_again_end_nothing(
    stores: tuple[Path, Poison], damage: str
) -> None:
    settings = settings_of(stores[0], ParallelConfig())
    found, _ = run_on_gloo(2, look_where_rank_one_cannot_read, settings, damage)
    assert len(found.documents) > GLOBAL_BATCH and not found.sequences
    assert found.remarks == [
        "running sequences again was given up: rank 1 cannot read them: "
        "OSError(5, 'input/output error')"
    ]


def test_documents_that_cannot_be_named_keep_their_numbers(stores: tuple[Path, Poison]) -> None:
    settings = settings_of(stores[0], ParallelConfig())
    found, _ = run_on_gloo(2, look_at_damaged_data, settings, "replay_sample", SPIKE)
    worst = found.documents[0]
    assert worst.mean_loss > 0 and worst.document == -1
    text = f"the document at token {worst.first_token} of {worst.store}"
    assert f"{text} cannot be read: OSError(5, 'input/output error')" in found.remarks
    assert f"1. {text} (" in markdown(replace(REPORT, findings=found))


def test_labels_belong_to_the_documents_they_are_tokens_of() -> None:
    # ids 0 1 2 | 3 4 | 5, labels are ids 1 to 5
    assert label_spans([3, 2, 1], 5) == [(0, 2), (2, 4), (4, 5)]
    assert label_spans([1, 5], 5) == [(0, 0), (0, 5)]
    assert label_spans([2, 1], 5) == [(0, 1), (1, 2)]  # padding follows


REPORT = AnomalyReport(
    7, "spike", "rollback", "why", [48, 56], 3.0, math.inf, 11.0, math.nan, 0.1, Findings()
)


def test_reports_of_one_step_with_other_data_stand_side_by_side(tmp_path: Path) -> None:
    for samples in ([48, 56], [64, 72], [48, 56], [64, 72]):
        path = write_report(tmp_path, replace(REPORT, samples=samples))
    assert path.name == "step_00000007.2.md"
    names = sorted(path.name for path in (tmp_path / "anomalies").iterdir())
    assert names == [f"step_00000007{n}.{kind}" for n in (".2", "") for kind in ("json", "md")]
    content = json.loads((tmp_path / "anomalies/step_00000007.json").read_text())
    assert content["grad_norm"] is None and content["samples"] == [48, 56]


def watch_of(run_dir: Path) -> AnomalyWatch:
    unused: Any = None
    return AnomalyWatch(
        AnomalyConfig(),
        run_dir,
        unused,
        unused,
        progress=Progress(10, enabled=False),
        events=Events(run_dir, enabled=True),
        writes=True,
    )


def test_a_report_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "anomalies").write_text("in the way")
    watch = watch_of(tmp_path)
    row = DocumentRow(1, "de", "germanic", "s/de", 0, 9, 9, 3.0, 2.0, 0.1, 0.03, 0, document=4)
    watch._write(replace(REPORT, findings=Findings(documents=[row])))
    (event,) = read_events(tmp_path)
    assert "document 4 of s/de (de), without a report: " in event["text"]
    assert event["report"] == "" and event["decision"] == "rollback"


def test_texts_that_no_file_takes_are_written_all_the_same(tmp_path: Path) -> None:
    row = DocumentRow(1, "de", "germanic", "s\udc80/de", 0, 9, 9, 3.0, 2.0, 0.1, 0.03, 0)
    row.doc_id, row.source, row.text = "a\ud800", "b\ud800", "c\ud800"
    watch_of(tmp_path)._write(replace(REPORT, findings=Findings(documents=[row])))
    (event,) = read_events(tmp_path)
    assert "most suspicious is a? (de)" in event["text"]
    readable = (tmp_path / event["report"]).read_text()
    assert "`a?`" in readable and "s?/de" in readable and "b?" in readable and "c?" in readable


def test_an_update_ends_what_was_found_out_about_no_document(tmp_path: Path) -> None:
    watch, found = watch_of(tmp_path), [Findings(no_culprit="weights"), Findings(), Findings()]
    watch.culprits = Found(found)  # type: ignore[assignment]
    watch.writes = False
    skipped, updated = Verdict(Action.skip, "nonfinite"), Verdict()
    for step, verdict in enumerate((skipped, skipped, updated, skipped), 1):
        losses = LanguageLosses(["de"])
        metrics = StepMetrics(losses, 1.0, verdict is updated, False, verdict)
        watch.after_step(TrainState(step=step), 4, metrics, 0.1)
    assert [f.no_culprit for f in found] == ["weights", "as at step 1: weights", ""]


class Found:
    """Culprits that find what they are told."""

    def __init__(self, findings: list[Findings]) -> None:
        self.findings = iter(findings)

    def keep(self, *given: Any) -> None: ...

    def find(self, verdict: Verdict, *, rerun: bool) -> Findings:
        return next(self.findings)


def test_a_report_that_is_no_json_ends_nothing(tmp_path: Path) -> None:
    found = Findings(gradient_share_by_language={math.nan: 1.0})  # type: ignore[dict-item]
    watch_of(tmp_path)._write(replace(REPORT, findings=found))
    (event,) = read_events(tmp_path)
    assert "no document could be looked at, without a report: " in event["text"]


def test_a_rollback_that_cannot_be_kept_or_read_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "anomalies").write_text("in the way")
    state = TrainState(step=4)
    watch_of(tmp_path).remember_rollback(state)
    (event,) = read_events(tmp_path)
    assert event["kind"] == "rollback_unsaved" and event["step"] == 4
    assert "forgotten if the run ends before its next checkpoint: " in event["text"]
    (tmp_path / "anomalies").unlink()
    watch = watch_of(tmp_path)
    assert watch._last_rollback(4) is None and len(read_events(tmp_path)) == 1
    watch.remember_rollback(state)
    assert watch._last_rollback(4) == state.rollback()
    file = tmp_path / "anomalies/rollback.json"
    for damaged in ("{", "[]", "{}"):
        file.write_text(damaged)
        assert watch._last_rollback(4) is None
    assert "rollback.json is not what a run wrote" in read_events(tmp_path)[-1]["text"]
    assert watch._last_rollback(0) is None and not file.exists()  # a run from the beginning
    assert len(read_events(tmp_path)) == 4

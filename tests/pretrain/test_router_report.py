"""Routing statistics of every layout are those of one process; files, names and the picture."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import matplotlib.image
import pytest
import torch
from torch import Tensor

from launch.schema import load
from models.build import build_model
from models.config import ModelConfig
from models.moe_config import MoEConfig
from models.router_health import RouterHealth, RouterTotals
from parallel.config import ConfigError, OptimizerConfig, ParallelConfig, RecomputeGranularity
from parallel.context_parallel import shard_sequence
from parallel.engine import MegatronEngine
from parallel.runtime import Runtime, initialize, shutdown
from pretrain import parity, router_report
from pretrain.config import PretrainConfig, TrainConfig
from pretrain.report import read_curves
from pretrain.router_plot import evenly_spaced, last_table, plot_router, relative_shares
from pretrain.router_report import RouterReport, open_router_report, routing_metrics
from pretrain.run import run
from pretrain.tracker import NullTracker
from pretrain.train_step import forward_losses, train_step
from tests.distributed import run_on_gloo
from tests.parity import MODEL, VOCAB, exercise_of, layout, variant
from tests.pretrain.test_tracker import of_type, records, run_wandb, steps

EXPERTS, TOPK, WIDTH = 8, 2, 32
POSITIONS, SEQUENCES, PADDING = 16, 8, 1  # the last sequence of an evaluation is padding
FAMILY_OF = {"de": "germanic", "en": "germanic", "hi": "indic"}
LANGUAGES = list(FAMILY_OF)
SPARSE = variant(moe=MoEConfig(num_experts=EXPERTS, router_topk=TOPK, layer_freq=2))
LAYERS = (2, 4)


@dataclass
class Routing:
    """What every router does with every token of a global batch: [positions, sequences, ...]."""

    probs: Tensor  # ... E
    hidden: Tensor  # ... h
    kept: Tensor  # ... E
    mask: Tensor
    languages: Tensor  # [sequences]

    @property
    def chosen(self) -> Tensor:
        return torch.zeros_like(self.kept).scatter_(-1, self.probs.topk(TOPK).indices, True)


def routing(layer: int, step: int) -> Routing:
    generator = torch.Generator().manual_seed(10 * layer + step)
    place = (POSITIONS, SEQUENCES)
    hidden = torch.randn(*place, WIDTH, generator=generator)
    probs = (hidden[..., :EXPERTS] * 2).softmax(-1)
    probs[..., 0] = 0  # an expert that nobody asks for
    kept = torch.zeros(*place, EXPERTS, dtype=torch.bool)
    kept.scatter_(-1, probs.topk(TOPK).indices, True)
    kept &= torch.rand(*place, EXPERTS, generator=generator) < 0.9
    lengths = torch.tensor([16, 3, 16, 16, 9, 16, 16, 0])
    return Routing(
        probs,
        hidden,
        kept,
        torch.arange(POSITIONS)[:, None] < lengths,
        torch.tensor([0, 0, 0, 1, 1, 2, 2, 0]),
    )


@dataclass
class Validation:
    """As much of a data.loader.ValidationSet as tells which sequence is where."""

    num_micro_batches: int

    def __len__(self) -> int:
        return SEQUENCES - PADDING


def report_of(
    runtime: Runtime,
    healths: list[RouterHealth],
    parallel: ParallelConfig,
    run_dir: str,
    micro_batch_size: int = 1,
    resumed_step: int | None = None,
) -> RouterReport:
    return RouterReport(
        healths,
        runtime,
        model=SPARSE,
        parallel=parallel,
        train=TrainConfig(router_health_interval=5, micro_batch_size=micro_batch_size),
        languages=LANGUAGES,
        family_of=FAMILY_OF,
        seq_length=POSITIONS,
        run_dir=Path(run_dir),
        resumed_step=resumed_step,
    )


def run_on_rank(parallel: ParallelConfig, micro_batch_size: int, run_dir: str) -> dict[str, Any]:
    """Records this rank's part of two training steps and four evaluations."""
    runtime = initialize(parallel, seed=1)
    stages = runtime.pipeline_parallel_size
    chunks = parallel.virtual_pipeline_model_parallel_size
    depth = MODEL.num_layers // (stages * chunks)
    healths = [RouterHealth() for _ in range(chunks)]
    report = report_of(runtime, healths, parallel, run_dir, micro_batch_size)
    data_ranks = runtime.data_parallel_size
    micro_batches = SEQUENCES // (data_ranks * micro_batch_size)

    def forward(step: int, training: bool) -> None:
        for number in range(micro_batches):
            first = (number * data_ranks + runtime.data_parallel_rank) * micro_batch_size
            for chunk, health in enumerate(healths):
                start = (chunk * stages + runtime.pipeline_parallel_rank) * depth
                for layer in (n for n in LAYERS if start < n <= start + depth):
                    record(health, layer, first, step, training)

    def record(health: RouterHealth, layer: int, first: int, step: int, training: bool) -> None:
        everything = routing(layer, step)
        there = slice(first, first + micro_batch_size)

        def mine(tensor: Tensor) -> Tensor:
            part = shard_sequence(
                tensor[:, there], runtime.context_parallel_rank, runtime.context_parallel_size
            )
            return part

        def local(tensor: Tensor) -> Tensor:
            part = mine(tensor)
            if parallel.sequence_parallel:
                part = part.chunk(runtime.tensor_parallel_size)[runtime.tensor_parallel_rank]
            return part.flatten(0, 1)

        health.language_ids = everything.languages[there]
        health.loss_mask = mine(everything.mask).t()
        probs = local(everything.probs)
        health.record(
            layer,
            first=probs.argmax(1),
            chosen=local(everything.chosen),
            kept=local(everything.kept),
            probs=probs,
            balance_loss=probs[:, 1].mean(),
            batch_size=micro_batch_size,
            hidden=local(everything.hidden),
            training=training,
        )

    out: dict[str, Any] = {"evaluations": []}
    forward(1, training=True)
    forward(2, training=True)
    out["training"] = report.training_metrics(2)
    out["nothing"] = report.training_metrics(3)
    report.write_table(NullTracker())
    # of seven sequences, the first, third and fifth (and not the padding)
    with mock.patch.object(router_report, "PROBE_TOKENS", 3 * POSITIONS):
        for step in (1, 1, 2, 2):
            with report.probing(Validation(micro_batches)):  # type: ignore[arg-type]
                forward(step, training=False)
            out["evaluations"].append(report.evaluation_metrics())
    report.close()
    shutdown(runtime)
    return out


def collected(
    parallel: ParallelConfig, ranks: int, run_dir: Path, micro_batch_size: int = 1
) -> Any:
    results = run_on_gloo(ranks, run_on_rank, parallel, micro_batch_size, str(run_dir))
    assert all(repr(result) == repr(results[0]) for result in results)
    return results[0]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[dict[str, Any]]]:
    run_dir = tmp_path_factory.mktemp("one")
    return collected(ParallelConfig(), 1, run_dir, 2), table_lines(run_dir)


def table_lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "router.jsonl").read_text().splitlines()]


LAYOUTS = {
    "micro_batch_8": (ParallelConfig(), 1, 8),
    "tp2": (layout(tp=2), 2, 2),
    "tp2_sp": (layout(tp=2, sp=True), 2, 2),
    "pp2": (layout(pp=2), 2, 1),
    "pp2_vpp2": (layout(pp=2, vpp=2), 2, 1),
    "dp2": (ParallelConfig(), 2, 2),
    "ep2": (ParallelConfig(expert_model_parallel_size=2), 2, 1),
    "cp2": (ParallelConfig(context_parallel_size=2), 2, 2),
    "tp2_sp_cp2_pp2": (
        layout(tp=2, sp=True, pp=2, context_parallel_size=2),
        8,
        2,
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_counts_the_same(
    name: str, one_process: tuple[Any, list[dict[str, Any]]], tmp_path: Path
) -> None:
    parallel, ranks, micro_batch_size = LAYOUTS[name]
    found = collected(parallel, ranks, tmp_path, micro_batch_size)
    expected, table = one_process
    assert table_lines(tmp_path) == table  # counts, to the last token
    assert found["training"] == pytest.approx(expected["training"], rel=1e-5)
    assert found["training"].keys() == expected["training"].keys()
    for mine, reference in zip(found["evaluations"], expected["evaluations"], strict=True):
        assert mine.keys() == reference.keys()
        assert mine == pytest.approx(reference, rel=1e-9)


def test_one_process_counts_what_was_routed(one_process: tuple[Any, list[dict[str, Any]]]) -> None:
    found, (table,) = one_process
    metrics = found["training"]
    families = [0, 0, 1]  # of the languages
    for row, layer in enumerate(LAYERS):
        steps = [routing(layer, step) for step in (1, 2)]
        load = torch.zeros(2, EXPERTS, dtype=torch.int64)
        for step in steps:
            for sequence in range(SEQUENCES):
                load[families[step.languages[sequence]]] += step.chosen[:, sequence].sum(0)
        assert table["load"][row] == load.tolist()
        dropped = sum((step.chosen & ~step.kept).sum((0, 1)) for step in steps)
        assert torch.is_tensor(dropped) and table["dropped"][row] == dropped.tolist()
        name = f"router/layer_{layer:02d}"
        by_expert, choices = load.sum(0), 2 * POSITIONS * SEQUENCES * TOPK
        assert metrics[f"{name}/load_max"] == pytest.approx(by_expert.max() / choices * EXPERTS)
        assert metrics[f"{name}/load_min"] == metrics[f"{name}/unused_experts"] - 1 == 0
        assert metrics[f"{name}/dropped_share"] == pytest.approx(dropped.sum() / choices)
        probs = torch.stack([step.probs for step in steps])
        entropy = torch.special.entr(probs).sum(-1).mean()
        assert metrics[f"{name}/entropy"] == pytest.approx(float(entropy), rel=1e-5)
        assert metrics[f"{name}/balance_loss"] == pytest.approx(float(probs[..., 1].mean()))
    assert (table["step"], table["first_step"]) == (3, 1)
    assert table["layers"] == [2, 4] and table["families"] == ["germanic", "indic"]
    per_layer = [
        [metrics[f"router/layer_{n:02d}/{kind}"] for n in LAYERS]
        for kind in ("load_max", "load_min", "entropy", "balance_loss", "unused_experts")
    ]
    assert metrics["router/load_max"] == max(per_layer[0])
    assert metrics["router/load_min"] == min(per_layer[1])
    assert metrics["router/entropy"] == pytest.approx(sum(per_layer[2]) / 2)
    assert metrics["router/balance_loss"] == pytest.approx(sum(per_layer[3]) / 2)
    assert metrics["router/unused_experts"] == sum(per_layer[4]) == 2
    assert found["nothing"] == {}


def test_collapse_and_fluctuation_of_the_probe(
    one_process: tuple[Any, list[dict[str, Any]]],
) -> None:
    first, same, other, settled = one_process[0]["evaluations"]
    assert not [name for name in first if name.endswith("fluctuation")]  # nothing to compare with
    for unmoved in (same, settled):
        assert unmoved["router/fluctuation"] == unmoved["router/layer_02/fluctuation"] == 0
    valid = torch.zeros(POSITIONS, SEQUENCES, dtype=torch.bool)
    valid[:, [0, 3, 5]] = True
    for layer in LAYERS:
        before, now = routing(layer, 1), routing(layer, 2)
        valid &= now.mask
        choices = [step.probs.argmax(-1)[valid] for step in (before, now)]
        name = f"router/layer_{layer:02d}"
        moved = (choices[0] != choices[1]).double().mean()
        assert 0 < moved < 1
        assert other[f"{name}/fluctuation"] == pytest.approx(float(moved))
        assert other[f"{name}/collapse"] == pytest.approx(
            collapse(now.hidden[valid].double(), choices[1]), rel=1e-9
        )
    assert other["router/collapse"] == pytest.approx(
        sum(other[f"router/layer_{layer:02d}/collapse"] for layer in LAYERS) / 2
    )


def collapse(x: Tensor, experts: Tensor) -> float:
    means = torch.stack([x[experts == expert].mean(0) for expert in experts])
    within, between = (x - means).t() @ (x - means), (means - x.mean(0)).t() @ (means - x.mean(0))
    return float((within @ torch.linalg.pinv(between, hermitian=True)).trace())


def train_on_rank(parallel: ParallelConfig, run_dir: str) -> dict[str, Any]:
    """Two real steps of a model with experts, and an evaluation on the second batch."""
    runtime = initialize(parallel, seed=1)
    exercise = exercise_of(SPARSE)
    chunks = build_model(SPARSE, parallel, runtime, vocab_size=VOCAB, seed=7)
    engine = MegatronEngine(chunks, parallel, OptimizerConfig(lr=1e-3), runtime)
    healths = [chunk.router_health for chunk in chunks]
    assert all(healths)
    report = report_of(runtime, healths, parallel, run_dir)  # type: ignore[arg-type]
    place = runtime.data_parallel_rank, runtime.data_parallel_size
    for step in range(2):
        batches = parity.micro_batches(exercise, step, *place)
        train_step(
            engine, batches, runtime, learning_rate=1e-3, languages=LANGUAGES, stop_requested=False
        )
    out = {"training": report.training_metrics(2)}
    report.write_table(NullTracker())
    with report.probing(Validation(len(batches))):  # type: ignore[arg-type]
        forward_losses(engine, batches, runtime, languages=LANGUAGES)
    out["evaluation"] = report.evaluation_metrics()
    report.close()
    shutdown(runtime)
    return out


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[dict[str, Any]]]:
    run_dir = tmp_path_factory.mktemp("trained")
    return run_on_gloo(1, train_on_rank, ParallelConfig(), str(run_dir))[0], table_lines(run_dir)


def test_a_real_model_reports(trained: tuple[Any, list[dict[str, Any]]]) -> None:
    found, (table,) = trained
    batches = [
        b for step in range(2) for b in parity.micro_batches(exercise_of(SPARSE), step, 0, 1)
    ]
    indic = sum(int((batch.language_ids == 2).sum()) for batch in batches)
    choices = [n * POSITIONS * TOPK for n in (2 * SEQUENCES - indic, indic)]
    assert [list(map(sum, layer)) for layer in table["load"]] == [choices] * 2
    assert 1 <= found["training"]["router/load_max"] < EXPERTS / TOPK
    assert 0 < found["training"]["router/entropy"] <= math.log(EXPERTS)
    assert 0.9 < found["training"]["router/balance_loss"] < EXPERTS
    assert found["training"]["router/dropped_share"] == 0
    assert found["evaluation"]["router/layer_04/collapse"] > 0


REAL_LAYOUTS = {
    "tp2_sp": (layout(tp=2, sp=True), 2),
    "pp2": (layout(pp=2), 2),
    "pp2_vpp2": (layout(pp=2, vpp=2), 2),
    "ep2": (ParallelConfig(expert_model_parallel_size=2), 2),
    "cp2": (ParallelConfig(context_parallel_size=2), 2),
    "recompute": (
        ParallelConfig(recompute_granularity=RecomputeGranularity.full),
        1,
    ),
}


@pytest.mark.parametrize("name", REAL_LAYOUTS)
def test_a_real_model_reports_the_same_in_every_layout(
    name: str, trained: tuple[Any, list[dict[str, Any]]], tmp_path: Path
) -> None:
    parallel, ranks = REAL_LAYOUTS[name]
    found = run_on_gloo(ranks, train_on_rank, parallel, str(tmp_path))[0]
    expected, table = trained
    assert table_lines(tmp_path) == table
    for part in ("training", "evaluation"):
        assert found[part] == pytest.approx(expected[part], rel=1e-4)


def test_routers_without_a_balance_loss_report_none() -> None:
    totals = RouterTotals(1, 1, 2, torch.device("cpu"))
    assert routing_metrics(totals, [3]) == {}
    totals.load[0, 0] = torch.tensor([30, 10])
    totals.kept[0] = torch.tensor([20, 10])
    totals.sums[0] = torch.tensor([40.0, 8.0, 0.0])
    assert routing_metrics(totals, [3]) == {
        **dict.fromkeys(("router/load_max", "router/layer_03/load_max"), 1.5),
        **dict.fromkeys(("router/load_min", "router/layer_03/load_min"), 0.5),
        **dict.fromkeys(("router/dropped_share", "router/layer_03/dropped_share"), 0.25),
        **dict.fromkeys(("router/unused_experts", "router/layer_03/unused_experts"), 0.0),
        **dict.fromkeys(("router/entropy", "router/layer_03/entropy"), pytest.approx(0.2)),
    }


def resumed_on_rank(run_dir: str) -> list[dict[str, Any]]:
    """A run of four steps with tables at 2 and 4, and one that goes on from step 3: the lines of
    both."""
    runtime = initialize(ParallelConfig(), seed=1)
    lines = []
    for first, resumed_step in ((1, None), (4, 3)):
        health = RouterHealth()
        report = report_of(runtime, [health], ParallelConfig(), run_dir, resumed_step=resumed_step)
        for step in range(first, 5):
            assert report.due(step) == (step == 5)
            assert health.totals is not None
            health.totals.load += step
            report.training_metrics(step)
            if step % 2 == 0:
                report.write_table(NullTracker())
                report.write_table(NullTracker())  # nothing new: no second line
        report.close()
        lines += table_lines(Path(run_dir))
    shutdown(runtime)
    return lines


def test_table_of_a_resumed_run(tmp_path: Path) -> None:
    first, second, kept, resumed = run_on_gloo(1, resumed_on_rank, str(tmp_path))[0]
    assert (first["first_step"], first["step"]) == (1, 2)
    assert first["load"][0] == [[6] * EXPERTS, [3] * EXPERTS]  # germanic are two of the languages
    assert (second["first_step"], second["step"]) == (3, 4)
    assert second["load"][1] == [[14] * EXPERTS, [7] * EXPERTS]
    assert kept == first
    assert (resumed["first_step"], resumed["step"]) == (4, 4)  # step 3 is in no line any more
    assert resumed["load"][1] == [[8] * EXPERTS, [4] * EXPERTS]


def test_table_in_weights_and_biases(tmp_path: Path) -> None:
    rows = "[[2, 'indic', 5, 6], [4, 'indic', 7, 8]]"
    table = f"['layer', 'family', 'expert_00', 'expert_01'], {rows}"
    log = f"step == 1 and tracker.log_table(1, 'router/load_by_family', {table})"
    done = run_wandb(tmp_path / "run", 0, 2, each_step=log)
    assert done.stderr == ""
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    (kept,) = folder.glob("files/media/table/router/*.json")
    assert json.loads(kept.read_text())["data"] == [[2, "indic", 5, 6], [4, "indic", 7, 8]]
    assert [row["item"]["step"] for row in of_type("history", records(folder))] == [0, 1, 2]
    assert steps(tmp_path / "run") == [0, 1, 2, 2]  # a table is no line of metrics.jsonl


def write_run(run_dir: Path, layers: int, *, measured: bool) -> None:
    """Files of a run in which expert 0 of the first layer is idle and expert 1 is busy."""
    load = [
        [[50 + 10 * ((e + f + n) % 3) for e in range(4)] for f in range(3)] for n in range(layers)
    ]
    for family in load[0]:
        family[0], family[1] = 0, 40_000
    table = {
        "step": 20,
        "first_step": 1,
        "layers": list(range(2, 2 * layers + 1, 2)),
        "families": ["indic", "slavic", "uralic"],
        "load": load,
        "dropped": [[0] * 4] * layers,
    }
    (run_dir / "router.jsonl").write_text(json.dumps(table) + "\n")
    lines = [
        {
            "step": step,
            **{f"router/layer_{2 * n + 2:02d}/entropy": 1 - step / 40 for n in range(layers)},
        }
        for step in (10, 20)
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines if measured))


@pytest.mark.parametrize(("layers", "measured"), [(1, True), (6, False)])
def test_picture(tmp_path: Path, layers: int, measured: bool) -> None:
    write_run(tmp_path, layers, measured=measured)
    png = plot_router(tmp_path, tmp_path / "router.png")
    assert png is not None
    image = matplotlib.image.imread(png)[..., :3]  # [height, width, RGB]
    height, width = image.shape[:2]
    assert height >= 800 and width >= 1600
    maps = image[: height // 2]
    dark_blue = (abs(maps - [0.02, 0.19, 0.38]) < 0.02).all(-1).sum()
    dark_red = (abs(maps - [0.40, 0.00, 0.12]) < 0.1).all(-1).sum()
    assert dark_blue > 2000 and dark_red > 2000  # the idle and the busy expert


def test_no_picture_without_routing(tmp_path: Path) -> None:
    assert plot_router(tmp_path, tmp_path / "router.png") is None
    (tmp_path / "router.jsonl").write_text("")
    assert last_table(tmp_path / "router.jsonl") is None
    assert plot_router(tmp_path, tmp_path / "router.png") is None
    assert not (tmp_path / "router.png").exists()


def test_shares() -> None:
    (even, uneven, nothing) = relative_shares([[5, 5, 5, 5], [0, 2, 4, 2], [0, 0, 0, 0]])
    assert even == [0, 0, 0, 0]
    assert uneven[0] < -2 and uneven[1:] == [0, 1, 0]
    assert all(math.isnan(share) for share in nothing)
    assert evenly_spaced(3, 4) == [0, 1, 2]
    assert evenly_spaced(12, 4) == [0, 4, 7, 11]


def test_interval_rule() -> None:
    with pytest.raises(ConfigError, match=r"^train\.router_health_interval=-1 must be 0 or more$"):
        TrainConfig(router_health_interval=-1)


@pytest.mark.parametrize(("model", "interval"), [(MODEL, 10), (SPARSE, 0)])
def test_no_report_of_dense_models_nor_where_none_is_wanted(
    model: ModelConfig, interval: int
) -> None:
    train = TrainConfig(router_health_interval=interval)
    unused: Any = None
    config = PretrainConfig(model=model, train=train)
    assert open_router_report(config, unused, unused, unused, None) is None


def whole_run(run_dir: str) -> str:
    """Six steps of a real run on this rank; what it printed."""
    os.environ["XDG_CACHE_HOME"] = f"{run_dir}/cache"
    settings = ["+experiment=tiny_cpu", "model=xmoe_tiny", "data.languages=[de,hi,zh]"]
    settings += ["data.seq_length=32", "train.train_steps=6", "train.eval_interval=2"]
    settings += ["train.router_health_interval=2", "train.eval_sequences=2"]
    config = load([*settings, "parallel=pp2", f"run_dir={run_dir}"])
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run(config)
    return printed.getvalue()


def test_a_run_reports_its_routing(tmp_path: Path) -> None:
    printed, _ = run_on_gloo(2, whole_run, str(tmp_path))
    assert f"routing  {tmp_path}/router.png" in printed
    assert (tmp_path / "router.png").read_bytes().startswith(b"\x89PNG")
    assert [(line["first_step"], line["step"]) for line in table_lines(tmp_path)] == [
        (1, 2),
        (3, 4),
        (5, 6),
    ]
    curves = read_curves(tmp_path / "metrics.jsonl")
    assert curves["router/layer_04/entropy"][0] == [2, 4, 6]
    assert curves["router/layer_02/collapse"][0] == [0, 2, 4, 6]
    assert curves["router/fluctuation"][0] == [2, 4, 6]

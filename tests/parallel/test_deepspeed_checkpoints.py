"""A run started on one engine goes on on the other, at any ZeRO stage: every weight, master and
moment is the same, bit for bit.

What DeepSpeed holds is read with its own functions, what megatron-core holds as in
test_checkpoint_layouts: nothing of the code under test takes part.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from models.build import build_model
from models.config import ModelConfig
from models.initialize import global_parameters
from parallel import checkpoint_io
from parallel.config import ParallelConfig, Precision
from parallel.deepspeed_config import DeepSpeedConfig
from parallel.deepspeed_engine import DeepSpeedEngine
from parallel.engine import checkpoint_metadata
from parallel.runtime import Runtime, initialize, shutdown
from pretrain.parity import Bounds, _cuts
from tests.distributed import run_on_gloo
from tests.parallel import test_checkpoint_layouts as megatron
from tests.parallel.test_checkpoint_layouts import MODELS, Held, assemble, train
from tests.parallel.test_deepspeed_engine import EP2, PATIENCE
from tests.parity import OPTIMIZER, VOCAB, layout

run_on = partial(run_on_gloo, timeout=PATIENCE)
TP2_SP, EP2_OF = layout(tp=2, sp=True), layout(**EP2)
# kind of model, layout, ZeRO stage or None for megatron-core's engine
STATES: dict[str, tuple[str, ParallelConfig, int | None]] = {
    "dense megatron tp2 sp": ("dense", TP2_SP, None),
    "dense megatron dp2": ("dense", layout(), None),
    "dense zero 0 dp2": ("dense", layout(), 0),
    "dense zero 1 tp2 sp": ("dense", TP2_SP, 1),
    "dense zero 2 dp2": ("dense", layout(), 2),
    "dense zero 3 dp2": ("dense", layout(), 3),
    "dense zero 3 tp2 sp": ("dense", TP2_SP, 3),
    "sparse megatron dp2": ("sparse", layout(), None),
    "sparse megatron ep2": ("sparse", EP2_OF, None),
    "sparse zero 0 ep2": ("sparse", EP2_OF, 0),
    "sparse zero 1 ep2": ("sparse", EP2_OF, 1),
    "sparse zero 2 ep2": ("sparse", EP2_OF, 2),
}


def build(
    model: ModelConfig, parallel: ParallelConfig, stage: int, seed: int
) -> tuple[Runtime, DeepSpeedEngine]:
    runtime = initialize(parallel, 1)
    chunks = build_model(model, parallel, runtime, vocab_size=VOCAB, seed=seed)
    # few parameters stay whole under ZeRO-3, and a bucket does not hold all gradients
    settings = DeepSpeedConfig(
        zero_stage=stage, param_persistence_threshold=100, reduce_bucket_size=5000
    )
    return runtime, DeepSpeedEngine(chunks, parallel, OPTIMIZER, settings, runtime)


def held_by(engine: DeepSpeedEngine, stage: int) -> dict[str, Held]:
    """As `test_checkpoint_layouts.held_by`, with each tensor-parallel shard whole."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    (wrapped,) = engine.chunks
    if stage in (1, 2):  # DeepSpeed's reading functions work from the first update on
        wrapped.optimizer._lazy_init_hp_params_optimizer_state()
    model = wrapped.module
    found = {}
    for name, parameter in global_parameters(model):
        cuts = _cuts(parameter, model.tp_group.size(), model.tp_group.rank())
        with GatheredParameters([parameter], enabled=stage == 3):
            weight = parameter.detach().float().clone()
        tensors = {"weight": weight}
        for kind in ("exp_avg", "exp_avg_sq"):
            tensors[kind] = (
                engine.optimizer.state[parameter][kind]
                if stage == 0
                else safe_get_full_optimizer_state(parameter, kind)
            )
        master = weight if stage == 0 else safe_get_full_fp32_param(parameter)
        if parameter.dtype is torch.float32:
            assert torch.equal(master.view_as(weight), weight), name
        else:
            tensors["master"] = master
        for kind, tensor in tensors.items():
            values = tensor.detach().clone().flatten()
            assert values.dtype is torch.float32
            found[f"{kind} {name}"] = Held(values, 0, tuple(weight.shape), cuts)
    return found


def train_and_save(
    model: ModelConfig, parallel: ParallelConfig, stage: int, folder: Path, more_steps: int = 0
) -> tuple[dict[str, Held], dict[str, Held]]:
    """What this rank holds at the time of the save after two steps, and some steps later."""
    runtime, engine = build(model, parallel, stage, seed=7)
    for step in range(2):
        train(runtime, engine, step)  # type: ignore[arg-type]
    checkpoint_io.save(engine.sharded_state_dict(), folder, metadata=checkpoint_metadata())
    saved = held_by(engine, stage)
    for step in range(2, 2 + more_steps):
        train(runtime, engine, step)  # type: ignore[arg-type]
    engine.sharded_state_dict()  # brings weights to where the next step would find them
    later = held_by(engine, stage)
    shutdown(runtime)
    return saved, later


def load_each(
    model: ModelConfig, parallel: ParallelConfig, stage: int, folders: list[Path]
) -> list[tuple[dict[str, Held], set[int]]]:
    """What this rank holds after loading each checkpoint into an engine with another history, and
    Adam's step."""
    runtime, engine = build(model, parallel, stage, seed=8)
    found = []
    for folder in folders:
        train(runtime, engine, 5)  # type: ignore[arg-type]
        load(engine, folder)
        found.append((held_by(engine, stage), engine._steps()))
    shutdown(runtime)
    return found


def load(engine: DeepSpeedEngine, folder: Path) -> None:
    state = engine.sharded_state_dict(is_loading=True)
    engine.load_state_dict(checkpoint_io.load(state, folder))


def load_and_train(
    model: ModelConfig, parallel: ParallelConfig, stage: int, folder: Path
) -> dict[str, Held]:
    """What this rank holds one step after loading."""
    runtime, engine = build(model, parallel, stage, seed=8)
    train(runtime, engine, 5)  # type: ignore[arg-type]
    load(engine, folder)
    train(runtime, engine, 2)  # type: ignore[arg-type]
    engine.sharded_state_dict()  # brings weights to where the next step would find them
    held = held_by(engine, stage)
    shutdown(runtime)
    return held


@dataclass
class Shelf:
    """Checkpoints after two steps, made when first asked for."""

    root: Path
    made: dict[str, Path] = field(default_factory=dict)

    def of(self, name: str, precision: Precision = Precision.fp32) -> Path:
        key = f"{name} {precision.value}"
        if key not in self.made:
            folder = self.root / key.replace(" ", "_")
            kind, parallel, stage = STATES[name]
            parallel = replace(parallel, precision=precision)
            arguments = [MODELS[kind], parallel, folder]
            if stage is None:
                ranks = run_on(2, megatron.train_and_save, *arguments)
            else:
                arguments.insert(2, stage)
                ranks = run_on(2, train_and_save, *arguments)
            torch.save(assemble([saved for saved, _ in ranks]), folder / "expected.pt")
            self.made[key] = folder
        return self.made[key]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("engines"))


def assert_loads(target: str, folders: list[Path], precision: Precision = Precision.fp32) -> None:
    kind, parallel, stage = STATES[target]
    parallel = replace(parallel, precision=precision)
    if stage is None:
        for rank in run_on(2, megatron.load_each, MODELS[kind], parallel, folders):
            assert [wrong for _, wrong in rank] == [[]] * len(folders)
        return
    ranks = run_on(2, load_each, MODELS[kind], parallel, stage, folders)
    for index, folder in enumerate(folders):
        assert [rank[index][1] for rank in ranks] == [{2}] * 2
        found = assemble([rank[index][0] for rank in ranks])
        expected = torch.load(folder / "expected.pt")
        assert found.keys() == expected.keys()
        different = [key for key in expected if not torch.equal(found[key], expected[key])]
        assert different == [], f"{folder.name} -> {target}"


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("dense megatron tp2 sp", "dense zero 3 dp2"),
        ("dense zero 3 dp2", "dense zero 1 tp2 sp"),
        ("dense zero 1 tp2 sp", "dense megatron dp2"),
        ("sparse zero 2 ep2", "sparse megatron dp2"),
    ],
)
def test_from_one_engine_to_the_other(shelf: Shelf, source: str, target: str) -> None:
    assert_loads(target, [shelf.of(source)])


@pytest.mark.slow
@pytest.mark.parametrize("target", STATES)
def test_all_ordered_pairs(shelf: Shelf, target: str) -> None:
    kind = STATES[target][0]
    assert_loads(target, [shelf.of(source) for source in STATES if STATES[source][0] == kind])


BF16 = [name for name, (kind, _, stage) in STATES.items() if kind == "dense" and stage != 0]


@pytest.mark.slow
@pytest.mark.parametrize("target", BF16)
def test_bf16_weights_and_their_masters(shelf: Shelf, target: str) -> None:
    folders = [shelf.of(source, Precision.bf16) for source in BF16]
    assert_loads(target, folders, Precision.bf16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("dense megatron tp2 sp", "dense zero 3 dp2"),
        ("dense zero 2 dp2", "dense zero 1 tp2 sp"),
        ("sparse megatron dp2", "sparse zero 2 ep2"),
    ],
)
def test_training_goes_on_as_if_nothing_had_happened(
    source: str, target: str, tmp_path: Path
) -> None:
    """One more step after loading, and without the pause: equal within what rounding explains."""
    kind, parallel, stage = STATES[source]
    arguments: list[Any] = [MODELS[kind], parallel, tmp_path / "saved", 1]
    if stage is None:
        ranks = run_on(2, megatron.train_and_save, *arguments)
    else:
        arguments.insert(2, stage)
        ranks = run_on(2, train_and_save, *arguments)
    before = assemble([saved for saved, _ in ranks])
    whole = assemble([later for _, later in ranks])
    _, parallel, stage = STATES[target]
    assert stage is not None
    resumed = assemble(run_on(2, load_and_train, MODELS[kind], parallel, stage, tmp_path / "saved"))
    assert resumed.keys() == whole.keys()
    for key in (key for key in whole if key.startswith("weight ")):
        moved = max(float((whole[key] - before[key]).abs().max()), OPTIMIZER.lr)
        assert float((resumed[key] - whole[key]).abs().max()) <= Bounds().weights * moved, key

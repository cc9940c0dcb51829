"""Saved under any layout, loaded under any other: every weight, master and moment is the same, bit
for bit.

What an engine holds is read here from its memory, by the definition of ZeRO-1's shares, and put
together by the cuts that parameters declare: nothing of the code under test takes part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.build import build_model
from models.config import Activation, ModelConfig
from models.initialize import global_parameters
from models.moe_config import MoEConfig
from parallel import checkpoint_io
from parallel.config import ParallelConfig, Precision
from parallel.engine import MegatronEngine, checkpoint_metadata
from parallel.megatron import dist_checkpointing
from parallel.runtime import Runtime, initialize, shutdown
from pretrain.parity import Bounds, Cut, _cuts, _place
from pretrain.train_step import train_step
from tests.distributed import run_on_gloo
from tests.parity import LANGUAGES, MODEL, OPTIMIZER, VOCAB, layout, micro_batches

DENSE = replace(MODEL, activation=Activation.swiglu, share_embeddings_and_output_weights=True)
SPARSE = replace(
    MODEL,
    share_embeddings_and_output_weights=False,
    moe=MoEConfig(num_experts=4, router_topk=2, router_dim=8, shared_expert_intermediate_size=32),
)
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
ZERO, PLAIN = {"zero": True}, {"zero": False}
EP2, ETP2 = {"expert_model_parallel_size": 2}, {"expert_tensor_parallel_size": 2}
LAYOUTS: dict[str, dict[str, tuple[int, ParallelConfig]]] = {
    "dense": {
        "single": (1, layout(**PLAIN)),
        "dp2": (2, layout()),
        "dp2 plain": (2, layout(**PLAIN)),
        "dp2 overlap": (2, layout(**OVERLAP)),
        "tp2 sp": (2, layout(tp=2, sp=True)),
        "pp2": (2, layout(pp=2)),
        "pp2 vpp2 plain": (2, layout(pp=2, vpp=2, **PLAIN)),
        "cp2": (2, layout(context_parallel_size=2)),
        "tp2 sp pp2": (4, layout(tp=2, sp=True, pp=2)),
        "dp4": (4, layout()),
        "tp2 sp dp2 plain": (4, layout(tp=2, sp=True, **PLAIN)),
        "pp2 vpp2 dp2 overlap": (4, layout(pp=2, vpp=2, **OVERLAP)),
    },
    "sparse": {
        "single": (1, layout(**PLAIN)),
        "dp2": (2, layout()),
        "dp2 plain": (2, layout(**PLAIN)),
        "ep4": (4, layout(expert_model_parallel_size=4)),
        "tp2 sp": (2, layout(tp=2, sp=True)),
        "pp2 vpp2": (2, layout(pp=2, vpp=2)),
        "cp2 ep2": (2, layout(context_parallel_size=2, **EP2)),
        "ep2": (2, layout(**EP2)),
        "ep2 plain": (2, layout(**EP2, **PLAIN)),
        "etp2": (2, layout(**ETP2)),
        "ep2 pp2 dp2": (4, layout(pp=2, **EP2)),
        "tp2 sp ep2 etp2 dp2 overlap": (4, layout(tp=2, sp=True, **EP2, **ETP2, **OVERLAP)),
    },
}
MODELS = {"dense": DENSE, "sparse": SPARSE}


# ---- what an engine holds ------------------------------------------------------------------------


@dataclass
class Held:
    """Some elements of a tensor: [start, start + n) of this rank's shard of it, flattened."""

    values: Tensor  # [n]
    start: int
    shape: tuple[int, ...]  # of the shard
    cuts: tuple[Cut, ...]

    def place(self) -> tuple[list[int], Tensor]:
        """The full tensor's shape, and where in it (flattened) the values belong."""
        shape = list(self.shape)
        for cut in self.cuts:
            shape[cut.dim] *= cut.parts
        index = torch.arange(torch.Size(shape).numel()).view(shape)
        mine = index[_place(shape, self.cuts)] if shape else index
        return shape, mine.flatten()[self.start : self.start + self.values.numel()]


def held_by(engine: MegatronEngine) -> dict[str, Held]:
    """Weights, masters and moments on this rank: "weight <name>", "exp_avg <name>", ..."""
    found = {}
    inner = [one.optimizer for one in engine.optimizer.chained_optimizers]
    state = {tensor: held for one in inner for tensor, held in one.state.items()}
    for chunk in engine.chunks:
        shares = dict(shares_of(chunk, engine.parallel.use_distributed_optimizer))
        group = chunk.module.tp_group
        for name, parameter in global_parameters(chunk.module):
            where = (tuple(parameter.shape), _cuts(parameter, group.size(), group.rank()))
            found[f"weight {name}"] = Held(parameter.detach().float().flatten(), 0, *where)
            start, end = shares[parameter]
            if start >= end:
                continue
            master = updated(parameter, start, end, state)
            tensors = {f"{kind} {name}": tensor for kind, tensor in state[master].items()}
            if parameter.dtype is not torch.float32:
                tensors[f"master {name}"] = master
            for key, tensor in tensors.items():
                assert tensor.numel() == end - start and tensor.dtype is torch.float32
                found[key] = Held(tensor.detach().flatten().clone(), start, *where)
    return found


def shares_of(chunk: Any, shared_out: bool) -> Iterator[tuple[Tensor, tuple[int, int]]]:
    """Which elements of each parameter this rank updates: all, or its share of a bucket."""
    for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            share = bucket.grad_data.numel() // group.size()
            low = bucket.offset + group.rank() * share
            for parameter in bucket.params:
                start, end, _ = buffer.param_index_map[parameter]
                mine = max(start, low) - start, min(end, low + share) - start
                yield parameter, mine if shared_out else (0, end - start)


def updated(parameter: Any, start: int, end: int, state: dict[Tensor, Any]) -> Tensor:
    """The tensor that Adam updates for these elements of a parameter."""
    if parameter.dtype is not torch.float32:
        return parameter.main_param
    address = parameter.data_ptr() + 4 * start
    (found,) = (t for t in state if t.data_ptr() == address and t.numel() == end - start)
    return found


def assemble(ranks: list[dict[str, Held]]) -> dict[str, Tensor]:
    """Full tensors of what all ranks hold; ranks that hold the same elements must agree."""
    full: dict[str, Tensor] = {}
    for rank in ranks:
        for key, held in rank.items():
            shape, place = held.place()
            flat = full.setdefault(key, torch.full(shape, torch.nan)).view(-1)
            there = flat[place]
            assert torch.equal(torch.where(there.isnan(), held.values, there), held.values), key
            flat[place] = held.values
    assert not any(tensor.isnan().any() for tensor in full.values())
    return full


def differing(engine: MegatronEngine, expected: dict[str, Tensor]) -> list[str]:
    """What this rank holds other than expected, in any bit."""
    held = held_by(engine)
    return [
        key
        for key, one in held.items()
        if not torch.equal(
            one.values.view(torch.int32), expected[key].view(-1)[one.place()[1]].view(torch.int32)
        )
    ]


# ---- jobs ----------------------------------------------------------------------------------------


def build(
    model: ModelConfig, parallel: ParallelConfig, seed: int = 7
) -> tuple[Runtime, MegatronEngine]:
    runtime = initialize(parallel, 1)
    chunks = build_model(model, parallel, runtime, vocab_size=VOCAB, seed=seed)
    return runtime, MegatronEngine(chunks, parallel, OPTIMIZER, runtime)


def train(runtime: Runtime, engine: MegatronEngine, step: int) -> None:
    batches = micro_batches(step, 2, runtime.data_parallel_rank, runtime.data_parallel_size)
    train_step(
        engine,
        batches,
        runtime,
        learning_rate=OPTIMIZER.lr,
        languages=LANGUAGES,
        stop_requested=False,
    )


def train_and_save(
    model: ModelConfig, parallel: ParallelConfig, folder: Path, more_steps: int = 0
) -> tuple[dict[str, Held], dict[str, Held]]:
    """What this rank holds at the time of the save after two steps, and some steps later."""
    runtime, engine = build(model, parallel)
    for step in range(2):
        train(runtime, engine, step)
    checkpoint_io.save(engine.sharded_state_dict(), folder, metadata=checkpoint_metadata())
    saved = held_by(engine)
    for step in range(2, 2 + more_steps):
        train(runtime, engine, step)
    engine.sharded_state_dict()  # gathers what the last step left to the next
    later = held_by(engine)
    shutdown(runtime)
    return saved, later


def load_each(
    model: ModelConfig, parallel: ParallelConfig, folders: list[Path], wanted: str = "expected.pt"
) -> list[tuple[Path, list[str]]]:
    """For each checkpoint, what differs on this rank after loading it over noise."""
    runtime, engine = build(model, parallel)
    results = []
    for folder in folders:
        expected = torch.load(folder / wanted, mmap=True)
        fill_with_noise(engine)
        load(engine, folder)
        wrong = differing(engine, expected)
        wrong += [f"step {step}" for step in steps_of(engine) if step != 2]
        results.append((folder, wrong))
    shutdown(runtime)
    return results


def load(engine: MegatronEngine, folder: Path) -> None:
    state = engine.sharded_state_dict(is_loading=True)
    engine.load_state_dict(checkpoint_io.load(state, folder))


def load_and_train(model: ModelConfig, parallel: ParallelConfig, folder: Path) -> dict[str, Held]:
    """What this rank holds one step after loading into an engine that has been trained before."""
    runtime, engine = build(model, parallel)
    train(runtime, engine, 5)
    fill_with_noise(engine)
    load(engine, folder)
    train(runtime, engine, 2)
    engine.sharded_state_dict()
    held = held_by(engine)
    shutdown(runtime)
    return held


@torch.no_grad()
def fill_with_noise(engine: MegatronEngine) -> None:
    for chunk in engine.chunks:
        for parameter in chunk.parameters():
            parameter.normal_()
    for one in engine.optimizer.chained_optimizers:
        for group in one.optimizer.param_groups:
            group["step"] = 77
            for tensor in group["params"]:
                tensor.normal_()
        for moments in one.optimizer.state.values():
            for tensor in moments.values():
                tensor.normal_()


def steps_of(engine: MegatronEngine) -> set[int]:
    return {group["step"] for group in engine.optimizer.param_groups}


# ---- tests ---------------------------------------------------------------------------------------


@dataclass
class Shelf:
    """Checkpoints of two steps, one for each model and layout, made when first asked for."""

    root: Path
    made: dict[tuple[str, str, str], Path] = field(default_factory=dict)

    def of(self, kind: str, name: str, precision: Precision = Precision.fp32) -> Path:
        key = (kind, name, precision.value)
        if key not in self.made:
            folder = self.root / "_".join(key).replace(" ", "_")
            world_size, parallel = LAYOUTS[kind][name]
            parallel = replace(parallel, precision=precision)
            ranks = run_on_gloo(world_size, train_and_save, MODELS[kind], parallel, folder)
            torch.save(assemble([saved for saved, _ in ranks]), folder / "expected.pt")
            self.made[key] = folder
        return self.made[key]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("layouts"))


def assert_loads(
    kind: str,
    target: str,
    folders: list[Path],
    precision: Precision = Precision.fp32,
    wanted: str = "expected.pt",
) -> None:
    world_size, parallel = LAYOUTS[kind][target]
    parallel = replace(parallel, precision=precision)
    ranks = run_on_gloo(world_size, load_each, MODELS[kind], parallel, folders, wanted)
    for rank, results in enumerate(ranks):
        for folder, wrong in results:
            assert wrong == [], f"{folder.name} -> {target}, rank {rank}"


def cover(kind: str) -> Iterator[tuple[str, str]]:
    """(saved, loaded): each layout once, as one of the two."""
    names = list(LAYOUTS[kind])
    for index in range(kind == "sparse", len(names), 2):
        yield names[(index + 5) % len(names)], names[index]


@pytest.mark.parametrize(
    ("kind", "source", "target"), [(kind, *pair) for kind in LAYOUTS for pair in cover(kind)]
)
def test_a_cover_of_pairs(shelf: Shelf, kind: str, source: str, target: str) -> None:
    assert_loads(kind, target, [shelf.of(kind, source)])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "target"), [(kind, name) for kind in LAYOUTS for name in LAYOUTS[kind]]
)
def test_all_ordered_pairs_of_layouts(shelf: Shelf, kind: str, target: str) -> None:
    assert_loads(kind, target, [shelf.of(kind, source) for source in LAYOUTS[kind]])


@pytest.mark.parametrize(
    ("kind", "name", "precision"),
    [("dense", "dp4", Precision.fp32), ("sparse", "ep2 pp2 dp2", Precision.bf16)],
)
def test_what_a_checkpoint_is_made_of(
    shelf: Shelf, kind: str, name: str, precision: Precision
) -> None:
    """By its names, which other programs rely on; layers lie one behind another along axis 0."""
    folder = shelf.of(kind, name, precision)
    expected = torch.load(folder / "expected.pt")
    stored = run_on_gloo(1, dist_checkpointing.load_plain_tensors, str(folder))[0]
    kinds = {f"optimizer.state.{one}.": f"{one} " for one in ("exp_avg", "exp_avg_sq")}
    kinds |= {"optimizer.state.fp32_param.": "master ", "": "weight "}
    found = set()
    for key, tensor in stored.items():
        if not torch.is_tensor(tensor):  # plain values
            continue
        prefix = next(prefix for prefix in kinds if key.startswith(prefix))
        bare = key.removeprefix(prefix)
        _, stacked, rest = bare.partition("decoder.layers.")
        if stacked and not rest[0].isdigit():
            layers = {f"{stacked}{i}.{rest}": one for i, one in enumerate(tensor)}
        else:
            layers = {bare: tensor}
        for place, value in layers.items():
            assert torch.equal(value.float(), expected[kinds[prefix] + place]), key
            found.add(kinds[prefix] + place)
    assert found == expected.keys()


BF16 = ["ep2", "ep2 plain", "single", "ep2 pp2 dp2"]  # routers stay fp32 in each


@pytest.mark.parametrize("target", BF16)
def test_bf16_weights_and_their_masters(shelf: Shelf, target: str) -> None:
    """Under the plain optimizer too, which holds routers in fp32 beside masters of the rest."""
    source = BF16[BF16.index(target) - 1]
    folder = shelf.of("sparse", source, Precision.bf16)
    expected = torch.load(folder / "expected.pt")
    finer = [
        name
        for key, master in expected.items()
        if (name := key.removeprefix("master ")) != key
        and not torch.equal(master, expected[f"weight {name}"])
    ]
    assert finer and not any("router" in name for name in finer)
    assert_loads("sparse", target, [folder], Precision.bf16)


@pytest.mark.parametrize(("source", "target"), [("ep2", "tp2 sp"), ("ep2 plain", "single")])
def test_bf16_to_fp32_takes_the_masters_for_weights(shelf: Shelf, source: str, target: str) -> None:
    folder = shelf.of("sparse", source, Precision.bf16)
    expected = torch.load(folder / "expected.pt")
    for key in [key for key in expected if key.startswith("master ")]:
        expected["weight " + key.removeprefix("master ")] = expected.pop(key)
    torch.save(expected, folder / "as_fp32.pt")
    assert_loads("sparse", target, [folder], wanted="as_fp32.pt")


@pytest.mark.parametrize(("source", "target"), [("tp2 sp", "ep2"), ("dp2 plain", "ep2 plain")])
def test_fp32_to_bf16_takes_the_weights_for_masters(shelf: Shelf, source: str, target: str) -> None:
    folder = shelf.of("sparse", source)
    expected = torch.load(folder / "expected.pt")
    for key in [key for key in expected if key.startswith("weight ") and ".router." not in key]:
        weight = expected[key]
        expected["master " + key.removeprefix("weight ")] = weight
        expected[key] = weight.bfloat16().float()
    torch.save(expected, folder / "as_bf16.pt")
    assert_loads("sparse", target, [folder], Precision.bf16, "as_bf16.pt")


@pytest.mark.parametrize(
    ("kind", "source", "target"),
    [("dense", "tp2 sp", "pp2 vpp2 dp2 overlap"), ("sparse", "ep2", "pp2 vpp2")],
)
def test_training_goes_on_as_if_nothing_had_happened(
    kind: str, source: str, target: str, tmp_path: Path
) -> None:
    """One more step after loading, and without the pause: equal within what rounding explains."""
    model = MODELS[kind]
    world_size, parallel = LAYOUTS[kind][source]
    ranks = run_on_gloo(world_size, train_and_save, model, parallel, tmp_path / "saved", 1)
    before = assemble([saved for saved, _ in ranks])
    whole = assemble([later for _, later in ranks])
    world_size, parallel = LAYOUTS[kind][target]
    resumed = assemble(run_on_gloo(world_size, load_and_train, model, parallel, tmp_path / "saved"))
    assert resumed.keys() == whole.keys()
    for key in (key for key in whole if key.startswith("weight ")):
        moved = max(float((whole[key] - before[key]).abs().max()), OPTIMIZER.lr)
        assert float((resumed[key] - whole[key]).abs().max()) <= Bounds().weights * moved, key

"""Does a layout train the same model as one process? Trains a model both ways and compares.

`train_on_rank` runs on every rank of a layout and of the one process; `merge` puts the shards of
all ranks together, in the parent and by their cuts alone, so that no code of the engine takes part
in the comparison; `compare` says how far two results are from each other. The tests, the parity
matrix (tests/parity_matrix.py) and the check before a launch (launch/verify.py) all stand on it.

What is compared, and what it stands for:

    initial weights       `models.initialize` draws the same model under any layout: no deviation
    losses, by language   the forward pass, and which sequences each rank was given
    auxiliary losses      the balance loss of each sparse layer, and the router's part of gradients
    expert loads          how many tokens of each language each expert was chosen for: equal
    gradients             of the first step, every one by its global name: the backward pass and all
                          reductions, before the optimizer can hide anything
    gradient norms        every parameter counted once, which clipping depends on
    weights               after the last step: the update, its sharding, and what gathers it
    copies                ranks that hold the same part of a tensor hold the same bits

Bounds. All arithmetic is fp32, with unit roundoff u = 6e-8. Layouts differ in nothing but the order
in which sums are taken: over the tokens of a step, the channels of a matrix, the ranks. A sum of n
products is off by about sqrt(n) u of its largest terms when rounding errors are independent, and
what a layer computes from it passes that error on, amplified little, since norms keep activations
of order one. With a few hundred tokens and channels and a few layers that is some tens of u, about
1e-6 of the largest entry of a gradient. A loss is a mean over tokens of numbers near 5, whose
errors cancel: a few u. The bounds leave room above what docs/parity.md lists, and lie far below
the weakest defect of tests/test_parity_mutants.py. They are made for small models: sums over more
tokens and channels need looser ones.

The largest entry tells how large the terms of a sum were unless they cancel, as they may in tensors
of few entries: the gradient of a router's temperature, a sum over all tokens, comes out a thousand
times smaller than its partial sums, and these are rounded to u. Gradients below `SMALL` = 1e-2 of
the gradient norm are therefore measured as if they were so large, which lets through 1e-7 of the
norm, about u, and still shows whatever is wrong by more.

Weights are measured against the distance they moved, or lr where they moved less. Adam divides by
the gradient's own size, so where a gradient is rounding noise the update is of order lr under any
layout; `OPTIMIZER` has an eps above the noise, which keeps the update linear in the gradient there:
an error of d in the gradient of an entry moves its weight by lr d / eps at most.

Experts. A token whose two best scores are closer than rounding goes to another expert under another
layout, and everything after it differs; that is no defect, and no bound can tell it from one.
`Result.smallest_gap` is the smallest distance between neighbours among a token's best scores, over
all tokens, sparse layers and steps (`models.router.ExpertRouter.track_gap`), and `compare` refuses
a reference with less than `SAFE_GAP`: with other batches (`without_near_ties`) ties lie elsewhere.
Routers that draw random numbers, and capacities, which count the tokens of a rank, make another
model of each layout and cannot be compared at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from data.batch import Batch
from models.build import build_model
from models.config import ModelConfig
from models.initialize import global_parameters
from models.router import ExpertRouter
from parallel.collectives import all_gather
from parallel.config import OptimizerConfig, ParallelConfig
from parallel.deepspeed_config import DeepSpeedConfig
from parallel.deepspeed_engine import DeepSpeedEngine
from parallel.deepspeed_reading import whole_gradient, whole_weight
from parallel.engine import Engine, MegatronEngine
from parallel.runtime import Runtime, initialize, shutdown
from pretrain.train_step import forward_step, reduce_losses

LANGUAGES = ("de", "hi", "zh")
OPTIMIZER = OptimizerConfig(lr=1e-2, adam_eps=1e-3, clip_grad=1.0)
SMALL = 1e-2  # of the gradient norm
SAFE_GAP = 1e-5  # scores are of order one, and rounding moves them by 1e-6 within a few steps


@dataclass(frozen=True)
class Bounds:
    """Largest deviations that rounding explains; see the module's docstring."""

    losses: float = 5e-7  # relative
    auxiliary_losses: float = 5e-6  # relative
    gradients: float = 1e-5  # of the tensor's largest entry, or of `SMALL` x the gradient norm
    grad_norms: float = 2e-6  # relative
    weights: float = 1e-4  # of the furthest that an entry of the tensor moved, or of lr


@dataclass(frozen=True, kw_only=True)
class Exercise:
    """A short training on generated batches; the model, and all that is the same in any layout."""

    model: ModelConfig
    vocab_size: int = 120
    seq_length: int = 16
    micro_batch_size: int = 1
    global_batch_size: int = 8
    steps: int = 2
    resets: bool = False  # several documents in a sequence; attention and positions start anew
    optimizer: OptimizerConfig = field(default_factory=lambda: OPTIMIZER)
    batch_seed: int = 100


# ---- what a rank does ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """Along `dim` the full tensor is `stride` blocks (gate and up), each cut into `parts`."""

    dim: int
    parts: int
    index: int
    stride: int = 1


@dataclass(frozen=True)
class Shard:
    """This rank's part of a tensor: a copy of the whole where there are no cuts."""

    tensor: Tensor
    cuts: tuple[Cut, ...]


@dataclass
class RankRecord:
    """What one rank saw; the parent makes a `Result` of all of them."""

    losses: list[float] = field(default_factory=list)
    language_totals: list[Tensor] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    # of each step, what routers counted here: see models.router_health.RouterTotals
    loads: list[Tensor] = field(default_factory=list)  # [sparse layers, languages, experts]
    routing_sums: list[Tensor] = field(default_factory=list)  # [sparse layers, 3]
    smallest_gap: float = math.inf
    initial: dict[str, Shard] = field(default_factory=dict)
    gradients: dict[str, Shard] = field(default_factory=dict)
    weights: dict[str, Shard] = field(default_factory=dict)


def train_on_rank(
    exercise: Exercise, parallel: ParallelConfig, deepspeed: DeepSpeedConfig | None = None
) -> RankRecord:
    """The exercise under the layout; all ranks of it call this, each in a process of its own.

    deepspeed: with engine=deepspeed its settings; None: engine=megatron.
    """
    runtime = initialize(parallel, seed=1)
    chunks = build_model(exercise.model, parallel, runtime, vocab_size=exercise.vocab_size, seed=7)
    record = RankRecord(initial=shards(chunks, lambda parameter: parameter.data))
    watch_routers(chunks, exercise.model, runtime)
    engine: Engine
    if deepspeed is None:
        engine = MegatronEngine(chunks, parallel, exercise.optimizer, runtime)
    else:
        engine = DeepSpeedEngine(chunks, parallel, exercise.optimizer, deepspeed, runtime)
    for step in range(exercise.steps):
        metrics = engine.forward_backward(
            micro_batches(exercise, step, runtime.data_parallel_rank, runtime.data_parallel_size),
            partial(forward_step, device=runtime.device),
            seq_length=exercise.seq_length,
            micro_batch_size=exercise.micro_batch_size,
        )
        losses, _ = reduce_losses(metrics, runtime, LANGUAGES, False)
        record.losses.append(losses.mean())
        record.language_totals.append(losses.totals)
        take_routing(chunks, record)
        if step == 0:
            # frozen experts and routers have none
            record.gradients = shards(chunks, gathered_gradients(engine))
        record.grad_norms.append(engine.step(exercise.optimizer.lr).grad_norm)
    record.weights = shards(chunks, gathered_weights(engine))
    gaps = [router.smallest_gap for router in routers_of(chunks)]
    record.smallest_gap = min((float(gap) for gap in gaps if gap is not None), default=math.inf)
    shutdown(runtime)
    return record


def global_batch(exercise: Exercise, step: int) -> Batch:
    """The step's sequences, with a ragged loss mask, the same in every layout."""
    sequences, length = exercise.global_batch_size, exercise.seq_length
    generator = torch.Generator().manual_seed(exercise.batch_seed + step)
    ids = torch.randint(0, exercise.vocab_size, (sequences, length + 1), generator=generator)
    lengths = torch.randint(1, length + 1, (sequences,), generator=generator)
    mask = (torch.arange(length) < lengths[:, None]).float()
    languages = torch.randint(0, len(LANGUAGES), (sequences,), generator=generator)
    documents = None
    if exercise.resets:
        begins = torch.rand((sequences, length), generator=generator) < 0.2
        documents = begins.cumsum(1).int()
    return Batch(
        ids[:, :-1].contiguous(),
        ids[:, 1:].contiguous(),
        mask,
        languages,
        documents,
        exercise.resets,
    )


def micro_batches(exercise: Exercise, step: int, rank: int, ranks: int) -> list[Batch]:
    """What this data-parallel rank of `ranks` is given in a step."""
    batch = global_batch(exercise, step)
    order = torch.arange(exercise.global_batch_size)
    return [
        Batch(
            batch.tokens[rows],
            batch.labels[rows],
            batch.loss_mask[rows],
            batch.language_ids[rows],
            None if batch.documents is None else batch.documents[rows],
            batch.reset_positions,
        )
        for rows in order.view(-1, ranks, exercise.micro_batch_size)[:, rank]
    ]


def gathered_gradients(engine: Engine) -> Callable[[Any], Tensor | None]:
    """Of a parameter; all ranks must call both."""
    if isinstance(engine, DeepSpeedEngine):
        return whole_gradient
    assert isinstance(engine, MegatronEngine)
    gather_gradients(engine)
    return lambda parameter: parameter.main_grad if parameter.requires_grad else None


def gathered_weights(engine: Engine) -> Callable[[Any], Tensor | None]:
    """Of a parameter; all ranks must call both."""
    if isinstance(engine, DeepSpeedEngine):
        return whole_weight
    assert isinstance(engine, MegatronEngine)
    if engine.parallel.overlap_param_gather:
        for chunk in engine.chunks:
            chunk.start_param_sync(force_sync=True)
    return lambda parameter: parameter.data


def gather_gradients(engine: MegatronEngine) -> None:
    """Under the distributed optimizer each rank holds only its share of the reduced gradients."""
    if not engine.parallel.use_distributed_optimizer:
        return
    for chunk in engine.chunks:
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                share = bucket.grad_data.numel() // group.size()
                mine = bucket.grad_data[group.rank() * share : (group.rank() + 1) * share].clone()
                all_gather(bucket.grad_data, mine, group=group)


def routers_of(chunks: Sequence[Any]) -> list[ExpertRouter]:
    modules = [module for chunk in chunks for module in chunk.modules()]
    return [module for module in modules if isinstance(module, ExpertRouter)]


def watch_routers(chunks: Sequence[Any], model: ModelConfig, runtime: Runtime) -> None:
    """Let the routers count, and look for near ties; nothing in a dense model."""
    for router in routers_of(chunks):
        router.track_gap = True
    for chunk in chunks:
        if chunk.router_health is not None:
            chunk.router_health.start(
                num_experts=model.moe.num_experts,
                layers=[layer + 1 for layer in model.moe.sparse_layers(model.num_layers)],
                languages=len(LANGUAGES),
                device=runtime.device,
                tensor_parallel_rank=runtime.tensor_parallel_rank,
                sequence_parallel=chunk.config.sequence_parallel,
            )


def take_routing(chunks: Sequence[Any], record: RankRecord) -> None:
    """Move what the routers counted in a step into the record."""
    totals = [chunk.router_health.totals for chunk in chunks if chunk.router_health is not None]
    if not totals:
        return
    record.loads.append(torch.stack([part.load for part in totals]).sum(0))
    record.routing_sums.append(torch.stack([part.sums for part in totals]).sum(0))
    for part in totals:
        part.zero()


def shards(chunks: Sequence[Any], value: Callable[[Any], Tensor | None]) -> dict[str, Shard]:
    """`value` of every parameter this rank holds, by global name, but for those that have none."""
    tensor_parallel = chunks[0].tp_group
    return {
        name: Shard(
            found.detach().clone().float(),
            _cuts(parameter, tensor_parallel.size(), tensor_parallel.rank()),
        )
        for chunk in chunks
        for name, parameter in global_parameters(chunk)
        if (found := value(parameter)) is not None
    }


def _cuts(parameter: Any, size: int, rank: int) -> tuple[Cut, ...]:
    """How a parameter says it is cut: experts by `shards`, others as megatron-core has it."""
    if hasattr(parameter, "shards"):  # dim -> (parts, index)
        return tuple(Cut(dim, *shard) for dim, shard in parameter.shards.items())
    if getattr(parameter, "tensor_model_parallel", False):
        return (Cut(parameter.partition_dim, size, rank, parameter.partition_stride),)
    return ()


# ---- what the parent does ------------------------------------------------------------------------


@dataclass
class Result:
    """What must not depend on the layout."""

    losses: list[float]
    language_totals: list[Tensor]  # of each step [languages, 2]: loss sum, valid tokens
    auxiliary_losses: list[Tensor]  # of each step [sparse layers]; empty for a dense model
    loads: list[Tensor]  # of each step [sparse layers, languages, experts]
    grad_norms: list[float]
    initial: dict[str, Tensor]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    smallest_gap: float
    copies_differ: list[str]  # what ranks that should hold the same bits do not agree on


def merge(ranks: Sequence[RankRecord]) -> Result:
    """One result of what all ranks of a layout saw."""
    first = ranks[0]
    differ = [
        f"{what} of rank {rank}"
        for what in ("losses", "grad_norms")
        for rank, other in enumerate(ranks)
        if getattr(other, what) != getattr(first, what)
    ]
    tensors = {}
    for what in ("initial", "gradients", "weights"):
        tensors[what], unequal = assemble([getattr(rank, what) for rank in ranks])
        differ += [f"{what}: {name}" for name in unequal]
    # ranks have counted different tokens, or other layers
    sums = [
        torch.stack(parts).sum(0) for parts in zip(*(r.routing_sums for r in ranks), strict=True)
    ]
    return Result(
        losses=first.losses,
        language_totals=first.language_totals,
        auxiliary_losses=[balance / tokens for tokens, _, balance in (s.unbind(1) for s in sums)],
        loads=[torch.stack(parts).sum(0) for parts in zip(*(r.loads for r in ranks), strict=True)],
        grad_norms=first.grad_norms,
        **tensors,
        smallest_gap=min(rank.smallest_gap for rank in ranks),
        copies_differ=differ,
    )


def assemble(ranks: Iterable[dict[str, Shard]]) -> tuple[dict[str, Tensor], list[str]]:
    """Full tensors from every rank's shards, and the names of those whose copies differ in a bit.

    Entries that no rank holds stay NaN, which no comparison lets pass.
    """
    full: dict[str, Tensor] = {}
    differ: dict[str, None] = {}
    for rank in ranks:
        for name, shard in rank.items():
            shape = list(shard.tensor.shape)
            for cut in shard.cuts:
                shape[cut.dim] *= cut.parts
            if name not in full:
                full[name] = torch.full(shape, torch.nan)
            place = _place(shape, shard.cuts)
            there = full[name][place]
            if not torch.equal(torch.where(there.isnan(), shard.tensor, there), shard.tensor):
                differ[name] = None
            full[name][place] = shard.tensor
    return full, list(differ)


def _place(shape: list[int], cuts: tuple[Cut, ...]) -> tuple[Tensor, ...]:
    """Indices of a shard's entries in the full tensor, for indexing all its axes at once."""
    axes = [torch.arange(size) for size in shape]
    for cut in cuts:
        blocks = axes[cut.dim].chunk(cut.parts * cut.stride)
        axes[cut.dim] = torch.cat(blocks[cut.index :: cut.parts])
    return torch.meshgrid(*axes, indexing="ij")


# ---- the comparison ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """The worst deviation of one kind of number; `where` says of which one."""

    what: str
    deviation: float  # relative; infinite where there is nothing to compare
    bound: float
    where: str = ""

    @property
    def ok(self) -> bool:
        return self.deviation <= self.bound  # NaN is not


class NearTie(ValueError):
    """Routing of the exercise hangs on rounding, so layouts cannot be compared by it."""


def without_near_ties(
    exercise: Exercise, train: Callable[[Exercise], Result], attempts: int = 5
) -> tuple[Exercise, Result]:
    """The exercise with batches that leave no routing to rounding, and what `train` makes of it.

    `train` is the training in one process. The last attempt is returned as it is; `compare` will
    refuse it.
    """
    for attempt in range(attempts):
        tried = replace(exercise, batch_seed=exercise.batch_seed + 1000 * attempt)
        result = train(tried)
        if result.smallest_gap >= SAFE_GAP:
            break
    return tried, result


def compare(result: Result, expected: Result, bounds: Bounds | None = None) -> list[Difference]:
    """The worst deviation of each kind of number from what one process has.

    Raises NearTie where a token of `expected` has two experts to choose from that rounding decides
    between.
    """
    if expected.smallest_gap < SAFE_GAP:
        raise NearTie(
            f"the router chose between scores {expected.smallest_gap:.1e} apart, and rounding "
            f"may swap what is closer than {SAFE_GAP:g}: a layout that sends this token elsewhere "
            "would not be wrong. Choose another Exercise.batch_seed"
        )
    bounds = bounds or Bounds()
    small = SMALL * expected.grad_norms[0]
    sizes = {name: max(_largest(full), small) for name, full in expected.gradients.items()}
    moved = {
        name: max(_largest(expected.weights[name] - start), OPTIMIZER.lr)
        for name, start in expected.initial.items()
    }
    deviations: dict[str, tuple[dict[str, float], float]] = {
        "initial weights": (_of_tensors(result.initial, expected.initial), 0.0),
        "losses": (_of_steps(result.losses, expected.losses), bounds.losses),
        "losses by language": (
            _of_steps(result.language_totals, expected.language_totals),
            bounds.losses,
        ),
        "gradients": (_of_tensors(result.gradients, expected.gradients, sizes), bounds.gradients),
        "gradient norms": (_of_steps(result.grad_norms, expected.grad_norms), bounds.grad_norms),
        "weights": (_of_tensors(result.weights, expected.weights, moved), bounds.weights),
        "copies": (dict.fromkeys(result.copies_differ, math.inf), 0.0),
    }
    if expected.loads:
        auxiliary = _of_steps(result.auxiliary_losses, expected.auxiliary_losses)
        deviations["auxiliary losses"] = (auxiliary, bounds.auxiliary_losses)
        deviations["expert loads"] = (_of_steps(result.loads, expected.loads), 0.0)
    return [_worst(what, found, bound) for what, (found, bound) in deviations.items()]


def _of_steps(found: Sequence[Any], expected: Sequence[Any]) -> dict[str, float]:
    """Relative deviation in each step, of numbers or of tables of them."""
    if len(found) != len(expected):
        return {f"{len(found)} steps instead of {len(expected)}": math.inf}
    return {
        f"step {step}": _relative(_double(one), _double(other))
        for step, (one, other) in enumerate(zip(found, expected, strict=True))
    }


def _of_tensors(
    found: dict[str, Tensor], expected: dict[str, Tensor], scales: dict[str, float] | None = None
) -> dict[str, float]:
    """Deviation of each tensor, in units of its largest expected entry or of its scale."""
    deviations = {f"{name}, not expected": math.inf for name in found.keys() - expected.keys()}
    for name, tensor in expected.items():
        if name not in found:
            deviations[f"{name}, missing"] = math.inf
        elif found[name].shape != tensor.shape:
            deviations[f"{name}, {list(found[name].shape)}"] = math.inf
        else:
            scale = None if scales is None else scales[name]
            deviations[name] = _relative(found[name], tensor, scale)
    return deviations


def _relative(found: Tensor, expected: Tensor, scale: float | None = None) -> float:
    """Largest deviation of an entry over the largest expected entry; 0 where both are zero."""
    deviation = _largest(found - expected)
    scale = _largest(expected) if scale is None else scale
    if deviation == 0:
        return 0.0
    return deviation / scale if scale else math.inf


def _double(numbers: Any) -> Tensor:
    return torch.as_tensor(numbers, dtype=torch.float64)


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max())


def _worst(what: str, deviations: dict[str, float], bound: float) -> Difference:
    """The largest of them, NaN above all."""
    if not deviations:
        return Difference(what, 0.0, bound)
    where, deviation = max(deviations.items(), key=lambda item: (math.isnan(item[1]), item[1]))
    return Difference(what, deviation, bound, where)


def table(differences: Sequence[Difference]) -> str:
    """One line for each kind of number: deviation, bound, verdict, and where the worst is."""
    return "\n".join(
        f"{row.what:<22} {row.deviation:8.1e}  {'within' if row.ok else 'BEYOND'} {row.bound:7.1e}"
        f"  {row.where}".rstrip()
        for row in differences
    )

"""Predicted memory (models/memory.py) against the memory that a training step was seen to take.

    python -m benchmarks.memory [NAME ...]

Each case runs in real processes over gloo. What is there before the first step is counted tensor by
tensor; what the step takes on top is the peak of what torch's profiler sees its CPU allocator hand
out and take back, which is exact whatever the operating system does. Prints a table by part.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from models.config import Activation, LayerNormPlacement, ModelConfig, Normalization
from models.memory import StageMemory, predict_memory, readable
from models.moe_config import MoEConfig, RouterType
from parallel.config import (
    ContextParallelComm,
    OptimizerConfig,
    ParallelConfig,
    Precision,
    RecomputeGranularity,
    SubLayerNormReduction,
    TokenDispatcher,
)

VOCABULARY = 512
MODEL = ModelConfig(
    name="memory",
    num_layers=4,
    hidden_size=128,
    ffn_hidden_size=512,
    num_attention_heads=4,
    max_position_embeddings=512,
)
GROUPED = replace(
    MODEL,
    num_query_groups=2,
    activation=Activation.swiglu,
    normalization=Normalization.rms_norm,
    add_bias_linear=False,
    share_embeddings_and_output_weights=False,
    layer_norm_placement=LayerNormPlacement.pre_ln,
)
SPARSE = replace(MODEL, moe=MoEConfig(num_experts=4, router_topk=2, layer_freq=2))


@dataclass(frozen=True, kw_only=True)
class Case:
    model: ModelConfig = field(default_factory=lambda: MODEL)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    world_size: int = 1
    seq_length: int = 256
    micro_batch_size: int = 2
    micro_batches: int = 2
    resets: bool = False


@dataclass(frozen=True)
class Measured:
    """Bytes that one rank took in its first step."""

    stage: int
    parameters: int
    gradients: int
    optimizer: int
    step: int  # what the step took on top, at most
    expert_load: float  # rows of this rank's experts over the even share, the mean of all layers

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.step


def layout(**sizes: Any) -> ParallelConfig:
    long = {
        "tp": "tensor_model_parallel_size",
        "pp": "pipeline_model_parallel_size",
        "vpp": "virtual_pipeline_model_parallel_size",
        "cp": "context_parallel_size",
        "ep": "expert_model_parallel_size",
        "etp": "expert_tensor_parallel_size",
        "sp": "sequence_parallel",
        "zero": "use_distributed_optimizer",
        "recompute": "recompute_granularity",
    }
    return ParallelConfig(**{long.get(name, name): value for name, value in sizes.items()})


_FULL, _SELECTIVE = RecomputeGranularity.full, RecomputeGranularity.selective
CASES = {
    "dense": Case(),
    "pre-LN": Case(model=replace(MODEL, layer_norm_placement=LayerNormPlacement.pre_ln)),
    "post-LN": Case(model=replace(MODEL, layer_norm_placement=LayerNormPlacement.post_ln)),
    "grouped, SwiGLU, RMSNorm": Case(model=GROUPED),
    "dropout": Case(model=replace(MODEL, hidden_dropout=0.1)),
    "large vocabulary": Case(model=replace(MODEL, vocab_size=20_000)),
    "one sequence": Case(micro_batch_size=1, seq_length=512),
    "documents": Case(resets=True),
    "bf16": Case(parallel=layout(precision=Precision.bf16)),
    "selective": Case(parallel=layout(recompute=_SELECTIVE)),
    "full": Case(parallel=layout(recompute=_FULL)),
    "full, groups of 2": Case(parallel=layout(recompute=_FULL, recompute_num_layers=2)),
    "TP 2": Case(parallel=layout(tp=2), world_size=2),
    "TP 2, SP": Case(parallel=layout(tp=2, sp=True), world_size=2),
    "TP 2, SP, pre-LN, GQA": Case(model=GROUPED, parallel=layout(tp=2, sp=True), world_size=2),
    "TP 2, statistics by all-reduce": Case(
        parallel=layout(tp=2, sub_layernorm_reduction=SubLayerNormReduction.all_reduce),
        world_size=2,
    ),
    "PP 2": Case(parallel=layout(pp=2), world_size=2, micro_batches=4),
    "PP 4": Case(parallel=layout(pp=4), world_size=4, micro_batches=6),
    "PP 2, VPP 2": Case(parallel=layout(pp=2, vpp=2), world_size=2, micro_batches=4),
    "DP 2": Case(world_size=2),
    "DP 2, no ZeRO": Case(parallel=layout(zero=False), world_size=2),
    "DP 2, bf16": Case(parallel=layout(precision=Precision.bf16), world_size=2),
    "CP 2": Case(parallel=layout(cp=2), world_size=2),
    "CP 2, a2a": Case(parallel=layout(cp=2, cp_comm_type=ContextParallelComm.a2a), world_size=2),
    "experts": Case(model=SPARSE),
    "experts, Switch": Case(
        model=replace(SPARSE, moe=replace(SPARSE.moe, router=RouterType.linear, router_topk=1))
    ),
    "experts, EP 2": Case(model=SPARSE, parallel=layout(ep=2), world_size=2),
    "experts, EP 2, all-gather": Case(
        model=SPARSE,
        parallel=layout(ep=2, moe_token_dispatcher_type=TokenDispatcher.allgather),
        world_size=2,
    ),
    "experts, shards of them": Case(model=SPARSE, parallel=layout(etp=2), world_size=2),
    "experts, TP 2, SP": Case(model=SPARSE, parallel=layout(tp=2, sp=True), world_size=2),
    "experts, stacked": Case(
        model=replace(
            MODEL, moe=MoEConfig(num_experts=4, sparse_after_layer=2, stacked_sublayers=2)
        )
    ),
    "experts, shared one": Case(
        model=replace(SPARSE, moe=replace(SPARSE.moe, shared_expert_intermediate_size=256))
    ),
    "TP 2, PP 2, SP, full": Case(
        model=replace(MODEL, num_layers=8),
        parallel=layout(tp=2, pp=2, sp=True, recompute=_FULL, recompute_num_layers=4),
        world_size=4,
        micro_batches=4,
    ),
}


# ---- what a rank does ---------------------------------------------------------------------------


def measure_on_rank(case: Case) -> Measured:
    """The first training step of the case; all ranks of it call this, each in a process."""
    from models.build import build_model
    from parallel.engine import MegatronEngine
    from parallel.runtime import initialize, shutdown
    from pretrain.parity import Exercise, micro_batches
    from pretrain.train_step import train_step

    runtime = initialize(case.parallel, seed=1)
    vocabulary = case.model.vocab_size or VOCABULARY
    chunks = build_model(case.model, case.parallel, runtime, vocab_size=vocabulary, seed=1)
    engine = MegatronEngine(chunks, case.parallel, OptimizerConfig(), runtime)
    loads = watch_experts(case, chunks)
    exercise = Exercise(
        model=case.model,
        vocab_size=vocabulary,
        seq_length=case.seq_length,
        micro_batch_size=case.micro_batch_size,
        global_batch_size=(case.micro_batches * case.micro_batch_size * runtime.data_parallel_size),
    )

    def step() -> None:
        batches = micro_batches(exercise, 0, runtime.data_parallel_rank, runtime.data_parallel_size)
        if case.resets:
            batches = [with_documents(batch) for batch in batches]
        train_step(
            engine,
            batches,
            runtime,
            learning_rate=1e-3,
            languages=("de", "hi", "zh"),
            stop_requested=False,
        )

    weights, gradients, optimizer = state_bytes(engine)
    peak = peak_bytes(step, times=1 if case.world_size == 1 else 3)
    stage = runtime.pipeline_parallel_rank
    shutdown(runtime)
    return Measured(
        stage, weights, gradients, optimizer, peak, sum(loads) / len(loads) if loads else 1.0
    )


def with_documents(batch: Any, length: int = 50) -> Any:
    """The batch as documents of this many tokens, packed one after the other."""
    import torch

    number = torch.arange(batch.tokens.shape[1]) // length
    documents = number.int().expand(batch.tokens.shape).contiguous()
    return replace(batch, documents=documents, reset_positions=True)


def watch_experts(case: Case, chunks: Iterable[Any]) -> list[float]:
    """A list that is filled with each pass's rows of this rank's experts over the even share."""
    from models.experts import ExpertFeedForward, StackedExperts

    parallel, loads = case.parallel, []
    own = case.micro_batch_size * case.seq_length // parallel.context_parallel_size
    if parallel.sequence_parallel:
        own //= parallel.tensor_model_parallel_size
    even = own * case.model.moe.router_topk * parallel.expert_tensor_parallel_size

    def note(module: Any, arguments: tuple[Any, ...]) -> None:
        loads.append(len(arguments[0]) / even)

    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, ExpertFeedForward | StackedExperts):
                module.register_forward_pre_hook(note)
    return loads


def state_bytes(engine: Any) -> tuple[int, int, int]:
    """Bytes of parameters, gradient buffers, and of what the optimizer holds beside them."""
    chunks = engine.chunks
    buffers = [b for chunk in chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    weights = _bytes([p for chunk in chunks for p in chunk.parameters()])
    gradients = _bytes([buffer.grad_data for buffer in buffers])
    optimizers = getattr(engine.optimizer, "chained_optimizers", [engine.optimizer])
    held = [
        tensor
        for one in optimizers
        if one.optimizer is not None
        for parameter, state in one.optimizer.state.items()
        for tensor in (parameter, state["exp_avg"], state["exp_avg_sq"])
    ]
    known = {p.untyped_storage().data_ptr() for chunk in chunks for p in chunk.parameters()}
    return weights, gradients, _bytes(held, known)


def _bytes(tensors: Iterable[Any], known: Iterable[int] = ()) -> int:
    """Of the tensors' storages, each once, without those at the addresses `known`."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
    return sum(s.nbytes() for address, s in storages.items() if address not in set(known))


def peak_bytes(action: Callable[[], None], times: int) -> int:
    """Most bytes of torch's CPU allocator that `action` holds at a time, beside what was there.

    The least of several `times`, with what earlier ones left: gloo's threads hold on to a tensor a
    moment longer when other processes have the cores.
    """
    peaks, left = [], 0
    for _ in range(times):
        now = most = 0
        for change in _allocations(action):
            now += change
            most = max(most, now)
        peaks.append(left + most)
        left += now
    return min(peaks)


def _allocations(action: Callable[[], None]) -> list[int]:
    """What is allocated (bytes, negative where it is freed) while `action` runs, in order."""
    import torch

    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        action()
    assert profile.profiler is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


# ---- what the parent does -----------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Of one pipeline stage."""

    predicted: StageMemory
    measured: Measured

    @property
    def deviation(self) -> float:
        """(predicted - measured) / measured."""
        return self.predicted.total / self.measured.total - 1


def compare(case: Case) -> list[Comparison]:
    """Runs the case and predicts it, with the load of experts that was seen.

    Of the ranks of a stage, which should take the same, the one counts that takes least.
    """
    from tests.distributed import run_on_gloo

    ranks = run_on_gloo(case.world_size, measure_on_rank, case)
    stages = [
        min((rank for rank in ranks if rank.stage == stage), key=lambda rank: rank.total)
        for stage in range(case.parallel.pipeline_model_parallel_size)
    ]
    return [
        Comparison(predicted(case, found.expert_load).stages[found.stage], found)
        for found in stages
    ]


def predicted(case: Case, expert_load: float = 1.0) -> Any:
    return predict_memory(
        case.model,
        case.parallel,
        world_size=case.world_size,
        seq_length=case.seq_length,
        micro_batch_size=case.micro_batch_size,
        micro_batches=case.micro_batches,
        vocab_size=VOCABULARY if case.model.vocab_size is None else None,
        device="cpu",
        expert_load=expert_load,
        resets_attention=case.resets,
        resets_positions=case.resets,
    )


def main(names: list[str]) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print(f"{'case':<32} stage   {'state':^23}   {'step':^23}   {'in all':^23} deviation")
    for name in names or CASES:
        for row in compare(CASES[name]):
            there, seen = row.predicted, row.measured
            state = there.parameters + there.gradients + there.optimizer
            cells = [
                (state, seen.total - seen.step),
                (there.total - state, seen.step),
                (there.total, seen.total),
            ]
            text = "   ".join(f"{readable(a):>11} {readable(b):>11}" for a, b in cells)
            print(
                f"{name:<32} {there.stage:>5}   {text} {row.deviation:>+9.1%}  {there.moment}",
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1:])

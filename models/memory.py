"""How much memory a run will take on its devices, from the settings alone.

    parameters    e P
    gradients     4 P, fp32: the buffer that all micro-batches are added up in
    optimizer     8 P for Adam's two moments, and 4 P for fp32 master weights where e = 2
    activations   what forward passes have kept when most is in use (models/activation_memory.py):
                  the sum over the micro-batches in flight, of which 1F1B has stages - stage, and
                  the interleaved schedule about (chunks - 1) stages + 2 (stages - stage) - 1 chunks
    temporary     what the operation that runs at that moment needs beside it
    other         what stays for the whole step: batches, losses by token, tables of positions,
                  under sequence parallelism megatron-core's buffer for gathered inputs, e t h, and
                  between pipeline stages what they send each other, e u h a message

P is the parameters of the rank, e the bytes of one (2 in bf16, 4 in fp32; routers always 4). With
the distributed optimizer (ZeRO-1) parameters and gradients lie in buffers padded to a multiple of
lcm(D, 128) elements and `optimizer` is the D-th part of them, D being the data-parallel ranks x the
context-parallel ones; for experts, the expert-data-parallel ranks. Starts of parameters whose sizes
are no multiples of 64 are padded too, which is left out: 63 elements a parameter at most. Gradients
are reduced and parameters gathered within these buffers, at no further memory.

What is predicted is the peak of torch's allocator, `torch.cuda.max_memory_allocated`. The device
also holds what torch does not count: the CUDA context, NCCL's buffers, and what the allocator
reserved and cannot use. Evaluation, anomaly reports and other things at intervals are left out.

So it is with engine=megatron; what engine=deepspeed holds instead of parameters, gradients and
optimizer as above stands in models/deepspeed_memory.py.

Imports neither torch nor megatron-core.
"""

import math
from dataclasses import dataclass

from models.activation_memory import Sizes
from models.config import ModelConfig, PositionEmbedding
from models.deepspeed_memory import Trained, buffers_of, peak_of_step
from models.parameter_count import padded_rows, parameters_on_rank
from models.stage_memory import chunk_operations, walk
from parallel.config import ParallelConfig, Precision
from parallel.deepspeed_config import DeepSpeedConfig
from parallel.pipeline_order import in_flight, passes
from parallel.rank_layout import RankLayout

BUFFER_ALIGNMENT = 128  # elements; of megatron-core's buckets under the distributed optimizer
PARTS = ("parameters", "gradients", "optimizer", "activations", "temporary", "other")


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Bytes that each rank of one pipeline stage takes when it takes most."""

    stage: int
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    temporary: int
    other: int
    in_flight: int  # model chunks' forward passes that wait for their backward pass, at most
    moment: str  # where in a step most is in use
    host: int = 0  # in the host's memory, in no sum: what is offloaded

    @property
    def total(self) -> int:
        return sum(getattr(self, part) for part in PARTS)

    def describe(self) -> str:
        """One line for the log."""
        parts = ", ".join(f"{part} {readable(getattr(self, part))}" for part in PARTS)
        host = f"; {readable(self.host)} of host memory offloaded" if self.host else ""
        return (
            f"memory: {readable(self.total)} of torch's allocator predicted for a rank of stage "
            f"{self.stage} ({parts}; most in the {self.moment}){host}"
        )


@dataclass(frozen=True)
class MemoryPrediction:
    """What every rank of a run takes at most; all ranks of a stage take the same."""

    stages: tuple[StageMemory, ...]
    layout: RankLayout

    @property
    def peak(self) -> StageMemory:
        """The stage that takes most; the first of equals."""
        return max(self.stages, key=lambda stage: stage.total)

    def of_rank(self, rank: int) -> StageMemory:
        """Raises ValueError for a rank outside the world."""
        return self.stages[self.layout.coordinates(rank).pp]

    def lines(self) -> list[str]:
        """A table for people: a line for each part, a column for each stage."""
        head = " ".join(f"{f'stage {stage.stage}':>10}" for stage in self.stages)
        found = [f"{'bytes of a rank':<16} {head}"]
        for part in (*PARTS, "total"):
            row = " ".join(f"{readable(getattr(stage, part)):>10}" for stage in self.stages)
            found.append(f"{part:<16} {row}")
        peak = self.peak
        if peak.host:
            found.append(f"on the host, offloaded: {readable(peak.host)} of a rank")
        return [*found, f"most on stage {peak.stage}, in the {peak.moment}"]


def readable(size: float) -> str:
    """Bytes with a unit a person reads: 79.6 GiB."""
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def predict_memory(
    model: ModelConfig,
    parallel: ParallelConfig,
    *,
    world_size: int,
    seq_length: int,
    micro_batch_size: int,
    micro_batches: int,
    vocab_size: int | None = None,
    device: str = "cuda",
    expert_load: float = 1.0,
    resets_attention: bool = False,
    resets_positions: bool = False,
    deepspeed: DeepSpeedConfig | None = None,
) -> MemoryPrediction:
    """What each rank takes at most in a training step; see the module's docstring.

    Args:
        world_size: processes; sizes must divide as `pretrain.config_rules.validate` checks.
        seq_length: tokens of a sequence. micro_batch_size: sequences of a forward pass.
        micro_batches: forward passes of a data-parallel rank in a step.
        vocab_size: the tokenizer's; None takes `model.vocab_size`.
        device: "cuda" or "cpu", whose kernels keep other things.
        expert_load: rows that reach the busiest rank's experts, in multiples of the even share;
            `worst_expert_load` is the most there can be.
        resets_attention: it stops at the borders of documents. What comes out is for 16-bit types
            on a GPU; in fp32 the [s, s] mask comes on top, which is left out.
        resets_positions: they count from each document's first token.
        deepspeed: with engine=deepspeed its settings; None: engine=megatron.

    Raises ValueError for another device and without a vocabulary.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device={device}: memory is predicted for cpu and cuda; use one of these")
    layout = RankLayout.of(parallel, world_size)
    job = _Job(
        model,
        parallel,
        layout,
        _sizes(
            model,
            parallel,
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            vocabulary=padded_rows(model, vocab_size),
            device=device,
            expert_load=expert_load,
            resets_attention=resets_attention,
            resets_positions=resets_positions,
            fused=deepspeed is None,
        ),
        micro_batches,
        vocab_size,
        deepspeed,
    )
    return MemoryPrediction(tuple(map(job.stage, range(layout.sizes.pp))), layout)


def worst_expert_load(model: ModelConfig, parallel: ParallelConfig) -> float:
    """The largest `expert_load` there can be: the busiest rank gets all its experts can take.

    Without a capacity all tokens of the expert-parallel ranks may come to one, each for as many
    experts as it is sent to and the rank has; with one (`model.moe.expert_capacity_factor`) no
    expert takes more than that multiple of the even share.
    """
    moe, ranks = model.moe, parallel.expert_model_parallel_size
    if moe.num_experts == 0:
        return 1.0
    here = moe.num_experts // ranks
    most = ranks * min(moe.router_topk, here) / moe.router_topk
    return min(most, moe.expert_capacity_factor or most)


@dataclass(frozen=True)
class _Job:
    model: ModelConfig
    parallel: ParallelConfig
    layout: RankLayout
    sizes: Sizes
    micro_batches: int
    vocab_size: int | None
    deepspeed: DeepSpeedConfig | None

    def stage(self, stage: int) -> StageMemory:
        if self.deepspeed is not None:
            return self._under_deepspeed(self.deepspeed)
        pipeline = self._pipeline(stage)
        moment = walk(
            passes(*pipeline), chunk_operations(self.model, self.parallel, self.sizes, stage)
        )
        weights, gradients, optimizer = self._with_megatron(self._trained(stage))
        return StageMemory(
            stage=stage,
            parameters=weights,
            gradients=gradients,
            optimizer=optimizer,
            activations=moment.kept,
            temporary=moment.running,
            other=self._other(stage),
            in_flight=in_flight(*pipeline),
            moment=moment.name,
        )

    def _under_deepspeed(self, deepspeed: DeepSpeedConfig) -> StageMemory:
        """Of the only stage there is."""
        (operations,) = chunk_operations(self.model, self.parallel, self.sizes, 0).values()
        buffers = buffers_of(
            deepspeed,
            self._trained(0),
            operations,
            element=self.sizes.element,
            on_cpu=self.sizes.on_cpu,
            micro_batches=self.micro_batches,
        )
        peak = peak_of_step(buffers, operations, self.micro_batches)
        return StageMemory(
            stage=0,
            parameters=buffers.parameters + peak.gathered,
            gradients=buffers.gradients + peak.gradients,
            optimizer=buffers.optimizer,
            activations=peak.moment.kept,
            temporary=peak.moment.running,
            other=self._other(0),
            in_flight=1,
            moment=peak.moment.name,
            host=buffers.host,
        )

    def _pipeline(self, stage: int) -> tuple[int, int, int, int]:
        """What parallel.pipeline_order asks for, with no more micro-batches than it takes to see
        the warm-up, some steady passes and the end: all steady ones are alike."""
        stages, chunks = self.layout.sizes.pp, self.parallel.virtual_pipeline_model_parallel_size
        return stage, stages, chunks, min(self.micro_batches, 4 * stages * chunks)

    def _trained(self, stage: int) -> Trained:
        layout = self.layout
        count = parameters_on_rank(
            self.model,
            self.vocab_size,
            tensor_model_parallel_size=layout.tensor_model_parallel_size,
            pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
            pipeline_rank=stage,
            virtual_pipeline_model_parallel_size=self.parallel.virtual_pipeline_model_parallel_size,
            expert_model_parallel_size=layout.expert_model_parallel_size,
            expert_tensor_parallel_size=layout.expert_tensor_parallel_size,
        )
        return Trained(
            dense=count.total - count.experts - count.routers,
            routers=count.routers,
            experts=count.experts,
            frozen=self.model.moe.freeze_routing,
            replicas=layout.data_parallel_size * layout.context_parallel_size,
            expert_replicas=layout.expert_data_parallel_size,
        )

    def _with_megatron(self, trained: Trained) -> tuple[int, int, int]:
        """Bytes of parameters, of their gradients and of what the optimizer holds for them."""
        parallel, e, replicas = self.parallel, self.sizes.element, trained.replicas
        # elements, bytes of one, ranks that share them out
        buffers = [
            (trained.dense, e, replicas),
            (trained.routers, 4, replicas),
            (trained.experts, e, trained.expert_replicas),
        ]
        if e == 4:
            buffers[:2] = [(trained.dense + trained.routers, 4, replicas)]
        frozen = 0
        if trained.frozen:
            frozen = 4 * trained.routers + e * trained.experts
            buffers = [(trained.dense, e, replicas)]
        weights = gradients = optimizer = 0
        for elements, element, ranks in buffers:
            share = elements
            if parallel.use_distributed_optimizer:
                unit = math.lcm(ranks, BUFFER_ALIGNMENT)
                elements = -(-elements // unit) * unit
                share = elements // ranks
            weights += element * elements
            gradients += 4 * elements
            optimizer += (8 if element == 4 else 12) * share
        return weights + frozen, gradients, optimizer

    def _other(self, stage: int) -> int:
        model, sizes = self.model, self.sizes
        last = stage == self.layout.sizes.pp - 1
        batch = 20 * sizes.tokens  # ids and labels in int64, mask in fp32
        waiting = in_flight(*self._pipeline(stage))
        kept = self.micro_batches * (batch + 4 * sizes.tokens) if last else waiting * batch
        if sizes.on_cpu:  # where the host's batches are: whole sequences, of all micro-batches
            kept = self.micro_batches * (batch * sizes.context + (4 * sizes.tokens if last else 0))
        tables = {PositionEmbedding.xpos: 2, PositionEmbedding.rope: 1, PositionEmbedding.none: 0}
        positions = tables[model.position_embedding_type] * 4 * model.head_width
        kept += positions * (sizes.tokens // sizes.sequences)
        kept += self._exchanged(stage)
        return kept + (sizes.sheet(sizes.hidden) if sizes.sequence_parallel else 0)

    def _exchanged(self, stage: int) -> int:
        """What neighbouring stages hand each other: the gradient sent back last, and with several
        chunks on each stage the messages that are on their way meanwhile."""
        if self.parallel.virtual_pipeline_model_parallel_size > 1:
            return 4 * self.sizes.stream
        return self.sizes.stream if stage > 0 else 0


def _sizes(
    model: ModelConfig,
    parallel: ParallelConfig,
    *,
    seq_length: int,
    micro_batch_size: int,
    vocabulary: int,
    device: str,
    expert_load: float,
    resets_attention: bool,
    resets_positions: bool,
    fused: bool,
) -> Sizes:
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    bf16 = parallel.precision is Precision.bf16
    if parallel.precision is Precision.auto:
        bf16 = device == "cuda"
    tokens = micro_batch_size * seq_length // context
    own = tokens // tensor if parallel.sequence_parallel else tokens
    expert_ranks = parallel.expert_model_parallel_size
    dispatched = expert_ranks > 1 or parallel.expert_tensor_parallel_size > 1
    even = own * parallel.expert_tensor_parallel_size * model.moe.router_topk
    return Sizes(
        device=device,
        element=2 if bf16 else 4,
        sequences=micro_batch_size,
        tokens=tokens,
        own_tokens=own,
        hidden=model.hidden_size,
        heads=model.num_attention_heads // tensor,
        attention=model.num_attention_heads * model.head_width // tensor,
        keys=model.query_groups * model.head_width // tensor,
        vocabulary=vocabulary // tensor,
        rows=math.ceil(even * expert_load),
        tensor=tensor,
        context=context,
        dispatched=dispatched,
        sequence_parallel=parallel.sequence_parallel,
        resets_attention=resets_attention,
        resets_positions=resets_positions,
        fused=fused,
    )

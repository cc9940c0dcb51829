"""What is alive at each moment of a step on one pipeline stage, and when it is most.

The operations of models/activation_memory.py and models/expert_memory.py, put together to model
chunks and walked through forward and back in the order of the pipeline's schedule. Imports neither
torch nor megatron-core.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from models.activation_memory import (
    Operation,
    Sizes,
    attention_operations,
    embedding_operation,
    feed_forward_operations,
    loss_operations,
    norm_operation,
)
from models.config import LayerNormPlacement, ModelConfig
from models.expert_memory import sparse_operations
from models.parameter_count import layers_of_stage
from parallel.config import ParallelConfig, RecomputeGranularity


@dataclass(frozen=True)
class Moment:
    """What is alive at one moment of a step."""

    kept: int = 0  # for backward passes to come
    running: int = 0  # of the operation that runs
    name: str = ""

    @property
    def total(self) -> int:
        return self.kept + self.running


def walk(passes: Iterable[tuple[bool, int]], chunks: Mapping[int, Sequence[Operation]]) -> Moment:
    """The moment at which most is alive, of these passes (forward?, chunk) over model chunks."""
    kept, peak = 0, Moment()
    for forward, chunk in passes:
        for operation in chunks[chunk] if forward else reversed(chunks[chunk]):
            kept += operation.kept if forward else 0
            running = operation.forward if forward else operation.backward
            if kept + running > peak.total:
                direction = "forward" if forward else "backward"
                peak = Moment(kept, running, f"{direction} pass of {operation.name}")
            kept -= 0 if forward else operation.kept
    return peak


def chunk_operations(
    model: ModelConfig, parallel: ParallelConfig, sizes: Sizes, stage: int
) -> dict[int, list[Operation]]:
    """The operations of each model chunk of pipeline stage `stage`, in their order."""
    stages = parallel.pipeline_model_parallel_size
    count = parallel.virtual_pipeline_model_parallel_size
    found = {}
    for chunk, layers in enumerate(layers_of_stage(model, stage, stages=stages, chunks=count)):
        operations = _group_layers(
            [_layer_operations(model, parallel, sizes, layer) for layer in layers], parallel, sizes
        )
        if stage == 0 and chunk == 0:
            operations.insert(0, embedding_operation(model, sizes, alone=stages == 1))
        if stage == stages - 1 and chunk == count - 1:
            operations += loss_operations(model, sizes, alone=stages == 1)
        elif count > 1 and sizes.on_cpu:
            # overlapped sends over gloo read the output, which is freed elsewhere (models/build.py)
            operations.append(Operation("output", sizes.stream, backward=0))
        found[chunk] = operations
    return found


def _layer_operations(
    model: ModelConfig, parallel: ParallelConfig, sizes: Sizes, layer: int
) -> list[Operation]:
    """The operations of layer `layer`, counted from 0, in their order."""
    sparse = layer in model.moe.sparse_layers(model.num_layers)
    attention = attention_operations(model, parallel, sizes)
    feed_forward = feed_forward_operations(model, parallel, sizes, model.ffn_hidden_size)
    norm = norm_operation(model, sizes)
    if sparse and not model.moe.sparse_after_layer:
        feed_forward = sparse_operations(model, parallel, sizes)
    if model.layer_norm_placement in (LayerNormPlacement.post_ln, LayerNormPlacement.deepnorm):
        found = [*attention, norm, *feed_forward, norm]
    else:
        found = [norm, *attention, norm, *feed_forward]
    if sparse and model.moe.sparse_after_layer:
        found += sparse_operations(model, parallel, sizes)
    return [replace(op, name=f"layer {layer + 1}'s {op.name}") for op in found]


def _recomputed(operations: Sequence[Operation], sizes: Sizes) -> Operation:
    """Layers whose operations are run again in the backward pass: only their input is kept."""
    again = walk([(True, 0), (False, 0)], {0: operations})
    # the input is there already; the output of the second pass lives as long as it
    first, last = operations[0].name.split("'")[0], operations[-1].name.split("'")[0]
    alone = max(operation.kept + operation.forward for operation in operations)
    name = first if first == last else f"{first} to {last.removeprefix('layer ')}"
    matrices = tuple(size for operation in operations for size in operation.matrices)
    return Operation(name, sizes.stream, again.total, sizes.stream + alone, matrices)


def _group_layers(
    layers: Sequence[Sequence[Operation]], parallel: ParallelConfig, sizes: Sizes
) -> list[Operation]:
    """The operations of a chunk's layers, in groups where they are recomputed in full."""
    if parallel.recompute_granularity is not RecomputeGranularity.full:
        return [operation for layer in layers for operation in layer]
    size = parallel.recompute_num_layers
    groups = [layers[at : at + size] for at in range(0, len(layers), size)]
    return [_recomputed([op for layer in group for op in layer], sizes) for group in groups]

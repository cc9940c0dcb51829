"""Bytes that the operations of a forward pass keep for the backward pass, and need while they run.

Imports neither torch nor megatron-core. models/stage_memory.py puts the operations together.

The formulas follow the code of this project; those for a CPU are checked against measured peaks
(benchmarks/memory.py), those for a GPU by tests/gpu/test_memory.py where there is one.

t is the tokens of a micro-batch on this rank (micro_batch_size x seq_length / CP), u = t/TP under
sequence parallelism and t otherwise, h the hidden size; of this tensor-parallel rank a is the width
of its query heads, k that of its key heads, d that of one head, f its feed-forward width, g the
matrices in front of the activation (2 with SwiGLU), v its part of the vocabulary; e is the bytes of
an element (2 in bf16, 4 in fp32). For experts T is the rows that reach this rank, n the width of an
expert on it, E the number of all experts. Kept, in bytes:

    norm             e u h, its input, and 8 u for mean and deviation (RMSNorm 4 u)
    linear_qkv       e u h, its input
    core attention   e t (a + 2 k) for queries, keys and values, e t a for the output, 4 t a/d for
                     the sums of exponentials; on a GPU with positions e t (a + k) more, because
                     the values are a view of linear_qkv's output and keep all of it
      selective      e t (a + 2 k), and e t a more with grouped queries
      documents      as without; on a GPU with several sequences copies, e t (3 a + 2 k) in all;
                     where positions start anew too, 8 t d for each token's table entries
      all_gather     keys and values of the whole sequence: CP times 2 e t k, on a CPU copied for
                     each of two parts, (2 CP + 1) e t k, and e bytes of each entry of two masks
    linear_proj      e t a, its input, but on a GPU where attention wrote and keeps just that; with
                     a folded sub-LayerNorm e u h + 8 u more, with one by all_reduce e t a
    linear_fc1       e u h, its input
    activation       g e t f, its input
    linear_fc2       e t f, its input, and with a sub-LayerNorm as linear_proj
    router           e u h, its input; tables of about 4 u (6 E + 3 router_dim); 24 T for the order
    experts          e T h rows, e T h outputs before the gate, g e T n rows before the activation,
                     4 T gates
    loss             e t h, the gradient of its input, which is taken in the forward pass
    dropout          of the embedding and each residual branch u h, on a CPU e u h
    full recompute   e u h a group of layers, in the place of all of the above

Backward, an operation needs its incoming and outgoing gradients, what it evaluates again, and a
matrix of its weight's size: the gradient, or what autograd is handed for one that went into the
gradient buffer already (parallel/weight_gradient.py:gradient_placeholder); and all the way e u h
for the gradient of the residual stream. Without such buffers, with engine=deepspeed, the loss keeps
4 v h more: the gradient of the output projection, taken in the forward pass.

With attention_dropout a CPU, which has no kernel for it, keeps 12 bytes for each of a head's s x s
scores, and 12 t a for its inputs; where attention stops at documents, less than predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from models.config import (
    Activation,
    LayerNormPlacement,
    ModelConfig,
    Normalization,
    PositionEmbedding,
)
from parallel.config import (
    CompileElementwise,
    ContextParallelComm,
    ParallelConfig,
    RecomputeGranularity,
    SubLayerNormReduction,
)

# parallel.cross_entropy's, which imports torch
LOGITS_CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}


@dataclass(frozen=True)
class Operation:
    """A step of the forward pass and its way back; bytes."""

    name: str
    kept: int  # from its forward to its backward pass
    backward: int  # beside what is kept, while its backward pass runs
    forward: int = 0  # beside what is kept, while its forward pass runs
    matrices: tuple[int, ...] = ()  # elements of each of its weights

    @property
    def weights(self) -> int:
        return sum(self.matrices)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What tensors of a rank are as large as; the letters of the module's docstring."""

    device: str  # "cpu" or "cuda"
    element: int  # e
    sequences: int  # of a micro-batch
    tokens: int  # t
    own_tokens: int  # u
    hidden: int  # h
    heads: int  # number of query heads here
    attention: int  # a
    keys: int  # k
    vocabulary: int  # v
    rows: int  # T
    tensor: int  # tensor-parallel ranks
    context: int  # context-parallel ranks
    dispatched: bool  # whether tokens travel to their experts
    sequence_parallel: bool
    resets_attention: bool  # it stops at the borders of documents
    resets_positions: bool  # they count from there
    fused: bool = True  # gradients of weights go straight into fp32 buffers

    @property
    def on_cpu(self) -> bool:
        return self.device == "cpu"

    @property
    def stream(self) -> int:
        """Bytes of hidden states between two sublayers."""
        return self.element * self.own_tokens * self.hidden

    def sheet(self, width: int) -> int:
        """Bytes of all tokens at this width."""
        return self.element * self.tokens * width

    def widened(self, width: int) -> int:
        """Bytes of the fp32 copies that a CPU makes of 16-bit factors of a weight gradient."""
        widens = self.on_cpu and self.element == 2 and self.fused
        return 4 * self.tokens * width if widens else 0


def norm_operation(model: ModelConfig, sizes: Sizes) -> Operation:
    rms = model.normalization is Normalization.rms_norm
    kept = sizes.stream + (4 if rms else 8) * sizes.own_tokens
    backward = 3 * sizes.stream
    if rms and sizes.on_cpu and sizes.element == 2:
        backward += 4 * sizes.stream  # in fp32: the standardised input and two gradients
    return Operation("norm", kept, backward)


def attention_operations(
    model: ModelConfig, parallel: ParallelConfig, sizes: Sizes
) -> list[Operation]:
    qkv = sizes.attention + 2 * sizes.keys
    # its gradient, and before it those of queries, keys and values
    gradients = 2 * sizes.sheet(qkv) + sizes.sheet(sizes.attention)
    if model.position_embedding_type is not PositionEmbedding.none and sizes.element == 2:
        gradients += 8 * sizes.tokens * sizes.attention  # rotated in fp32
    kept, scores = _kept_by_attention(model, parallel, sizes), 0
    if model.attention_dropout and sizes.on_cpu:
        kept, scores = _kept_with_dropout(parallel, sizes)
    core = Operation(
        "core attention",
        kept,
        backward=sizes.stream + gradients + scores,
        forward=sizes.sheet(qkv),
    )
    if parallel.recompute_granularity is RecomputeGranularity.selective:
        out = sizes.sheet(sizes.attention)
        grouped = out if model.query_groups != model.num_attention_heads else 0
        inputs = sizes.sheet(qkv) + grouped
        core = Operation(core.name, inputs, core.backward + core.kept, forward=core.kept)
    branch = [
        linear_operation("linear_qkv", sizes, sizes.hidden, qkv),
        core,
        row_parallel_operation(
            "linear_proj",
            model,
            parallel,
            sizes,
            sizes.attention,
            kept=_kept_by_projection(parallel, sizes),
        ),
    ]
    return _with_dropout(branch, model, sizes)


def _kept_by_attention(model: ModelConfig, parallel: ParallelConfig, sizes: Sizes) -> int:
    """Of queries, keys, values, output, and the sums of exponentials in fp32."""
    rotated = model.position_embedding_type is not PositionEmbedding.none
    a, k, ranks = sizes.attention, sizes.keys, sizes.context
    kept = 4 * sizes.tokens * sizes.heads
    if rotated and sizes.resets_positions:
        kept += 8 * sizes.tokens * model.head_width
    if ranks > 1 and parallel.cp_comm_type is ContextParallelComm.all_gather:
        kept += sizes.sheet(2 * a)
        if not sizes.on_cpu:
            return kept + sizes.sheet(2 * k * ranks)
        half = sizes.tokens // sizes.sequences // 2
        seen = half * (2 * ranks + 1)  # keys of both halves
        return kept + sizes.sheet((2 * ranks + 1) * k) + sizes.element * half * seen
    kept += sizes.sheet(2 * a + 2 * k)
    views = not sizes.on_cpu and ranks == 1
    copied = sizes.resets_attention and sizes.sequences > 1
    return kept + (sizes.sheet(a + k) if views and rotated and not copied else 0)


def _kept_with_dropout(parallel: ParallelConfig, sizes: Sizes) -> tuple[int, int]:
    """Of a CPU, which has no kernel for attention_dropout: bytes kept, and those of the scores.

    Queries, keys and values in fp32, each key for each query head, and three times the scores: the
    probabilities before and after dropout, and its mask.
    """
    length, ranks = sizes.tokens // sizes.sequences, sizes.context
    queries, keys, heads = length, length, sizes.heads
    scores = length * length
    if ranks > 1 and parallel.cp_comm_type is ContextParallelComm.a2a:
        scores *= ranks  # of fewer heads, over the whole sequence
    elif ranks > 1:  # two parts, each with the keys up to its end
        keys = length // 2 * (2 * ranks + 1)
        scores = length // 2 * keys
    width = sizes.attention
    bytes_of_scores = 4 * sizes.sequences * heads * scores
    inputs = 4 * sizes.sequences * width * (queries + 2 * keys)
    return inputs + 3 * bytes_of_scores, bytes_of_scores


def _kept_by_projection(parallel: ParallelConfig, sizes: Sizes) -> int:
    """Of linear_proj's input, where that is not what attention's kernel has written."""
    selective = parallel.recompute_granularity is RecomputeGranularity.selective
    in_order = not sizes.on_cpu and sizes.context == 1
    copied = sizes.resets_attention and sizes.sequences > 1
    return 0 if in_order and not copied and not selective else sizes.sheet(sizes.attention)


def feed_forward_operations(
    model: ModelConfig, parallel: ParallelConfig, sizes: Sizes, ffn_hidden_size: int
) -> list[Operation]:
    """Of a dense feed-forward of this width, which all tensor-parallel ranks share."""
    gated = model.activation is Activation.swiglu
    f = ffn_hidden_size // sizes.tensor
    g = 2 if gated else 1
    # the gradients of output and input, and on the way there, of a SwiGLU, both halves of the
    # input's gradient and the input with its bias again
    backward, biased = (1 + g) * f, g * f if model.add_bias_linear else 0
    if gated and not _compiled(parallel, sizes):
        backward += 2 * f + biased
    activation = Operation(
        "activation",
        sizes.sheet(g * f),
        backward=sizes.stream + sizes.sheet(backward),
        forward=sizes.sheet(biased + (f if gated else 0)),
    )
    branch = [
        linear_operation("linear_fc1", sizes, sizes.hidden, g * f),
        activation,
        row_parallel_operation("linear_fc2", model, parallel, sizes, f, kept=sizes.sheet(f)),
    ]
    return _with_dropout(branch, model, sizes)


def _compiled(parallel: ParallelConfig, sizes: Sizes) -> bool:
    """As `parallel.compiled.compiles` decides, where Triton is installed with CUDA."""
    wanted = parallel.compile_elementwise
    if wanted is CompileElementwise.auto:
        return not sizes.on_cpu
    return wanted is CompileElementwise.always


def linear_operation(name: str, sizes: Sizes, inputs: int, outputs: int) -> Operation:
    """A column-parallel linear layer: keeps its input, of which a rank has its own tokens."""
    backward = sizes.stream + sizes.sheet(inputs + outputs) + sizes.element * inputs * outputs
    if sizes.sequence_parallel:
        backward += sizes.stream
    return Operation(
        name,
        sizes.stream,
        backward=backward + sizes.widened(inputs + outputs),
        forward=sizes.sheet(outputs),
        matrices=(inputs * outputs,),
    )


def row_parallel_operation(
    name: str,
    model: ModelConfig,
    parallel: ParallelConfig,
    sizes: Sizes,
    inputs: int,
    *,
    kept: int,
) -> Operation:
    """linear_proj or linear_fc2, whose input is `kept` bytes that nothing else keeps."""
    e, h, weights = sizes.element, sizes.hidden, inputs * sizes.hidden
    backward = sizes.stream + e * weights + sizes.widened(inputs + h)
    if sizes.sequence_parallel:
        backward += sizes.sheet(h)  # the output's gradient, gathered
    if model.layer_norm_placement is not LayerNormPlacement.sub_ln:
        return Operation(name, kept, backward + sizes.sheet(inputs), sizes.sheet(h), (weights,))
    if sizes.tensor == 1:
        # the input normalised again, and either what the weight's gradient needs, or the gradients
        # of that and of the input
        widened = sizes.widened(inputs + h)
        backward += max(sizes.sheet(3 * inputs), sizes.sheet(inputs) + widened) - widened
        return Operation(name, kept, backward, sizes.sheet(inputs), (weights,))
    wide = 4 * sizes.tokens * inputs
    # the standardised input and g dz in fp32, dz, and one product
    backward += 3 * wide + (sizes.sheet(inputs) if e == 2 else 0)
    if parallel.sub_layernorm_reduction is SubLayerNormReduction.all_reduce:
        kept += sizes.sheet(inputs) + 8 * sizes.tokens
    else:
        kept += sizes.stream + 8 * sizes.own_tokens
    return Operation(name, kept, backward, wide + sizes.sheet(h), (weights,))


def _with_dropout(branch: Sequence[Operation], model: ModelConfig, sizes: Sizes) -> list[Operation]:
    """The branch, its output dropped out: its gradient is no longer the residual stream's."""
    if model.hidden_dropout == 0:
        return list(branch)
    *first, last = branch
    last = replace(last, backward=last.backward + sizes.stream)
    return [*first, last, Operation("dropout", _dropout_mask(sizes), backward=2 * sizes.stream)]


def _dropout_mask(sizes: Sizes) -> int:
    return sizes.own_tokens * sizes.hidden * (sizes.element if sizes.on_cpu else 1)


def embedding_operation(model: ModelConfig, sizes: Sizes, *, alone: bool) -> Operation:
    """Its gradient is a matrix of the vocabulary, or a placeholder of that size.

    alone: on the only stage, where a tied output projection is the same weight.
    """
    weights = sizes.vocabulary * sizes.hidden
    mask = _dropout_mask(sizes) if model.hidden_dropout else 0
    backward = sizes.element * weights + sizes.sheet(sizes.hidden)
    tied = alone and model.share_embeddings_and_output_weights
    return Operation("embedding", mask, backward, matrices=() if tied else (weights,))


def loss_operations(model: ModelConfig, sizes: Sizes, *, alone: bool) -> list[Operation]:
    """The final norm, if there is one, and output projection with cross-entropy in chunks.

    A chunk has c = min(t, budget / (4 v) in multiples of 128, at least 128) tokens, and c v logits
    in fp32, beside them in e = 2 those of the matrix product.
    """
    e, h, v = sizes.element, sizes.hidden, sizes.vocabulary
    budget = LOGITS_CHUNK_BYTES[sizes.device] // (4 * v)
    chunk = min(sizes.tokens, max(128, budget - budget % 128))
    buffers = chunk * (v * (4 if e == 4 else 6) + h * e)
    if sizes.on_cpu and e == 2:
        buffers += 4 * chunk * (v + h)  # fp32 copies for the weight's gradient
    # a tied embedding on the same stage, the only one (`alone`), gets no placeholder
    tied = alone and model.share_embeddings_and_output_weights
    kept, backward = sizes.sheet(h), 0 if tied else e * v * h
    if not sizes.fused:  # the weight's gradient in fp32; on a GPU scaled, in 16 bits rounded
        kept += 4 * v * h
        backward = (0 if sizes.on_cpu else 4 * v * h) + (2 * v * h if e == 2 else 0)
    loss = Operation("loss", kept, backward, sizes.sheet(h) + buffers, matrices=(v * h,))
    if model.layer_norm_placement in (LayerNormPlacement.post_ln, LayerNormPlacement.deepnorm):
        return [loss]
    return [replace(norm_operation(model, sizes), name="final norm"), loss]

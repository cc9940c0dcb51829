"""Parameters and floating-point operations of a model, from its settings alone.

Imports neither torch nor megatron-core. `h` is hidden_size, `a` the width of all heads together
(num_attention_heads x head width), `k` that of all key heads, `f` ffn_hidden_size, `L` num_layers,
`V` the padded vocabulary, `s` seq_length, `E` the number of experts.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

from models.config import Activation, LayerNormPlacement, ModelConfig, Normalization
from models.moe_config import RouterType
from parallel.config import RecomputeGranularity


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Parameters of the whole model, by what they are for; sums over all layers."""

    embedding: int  # V x h
    output_layer: int  # V x h, or 0 where it shares the embedding
    attention: int  # linear_qkv and linear_proj, with their biases
    feed_forward: int  # of dense layers and shared experts, with their biases
    routers: int
    experts: int  # all of them, with their biases and inner norms
    active_experts: int  # those that a token goes through: router_topk / num_experts of them
    norms: int  # of the layers, and the final one
    biases: int  # those of attention and feed_forward, which count them too

    @property
    def total(self) -> int:
        return self.embedding + self.output_layer + self.non_embedding

    @property
    def non_embedding(self) -> int:
        """Without the embedding and the output layer: the N of most scaling laws."""
        return self.attention + self.feed_forward + self.routers + self.experts + self.norms

    @property
    def active(self) -> int:
        """Of `total`, what one token goes through; all of it in a dense model."""
        return self.total - self.experts + self.active_experts


TORCHSCALE_ROUTER_DIM = 16  # written into its code


def padded_vocab_size(vocab_size: int, divisible_by: int) -> int:
    """`vocab_size` rounded up to a multiple of `divisible_by`: the rows of the embedding."""
    return -(-vocab_size // divisible_by) * divisible_by


def parameter_count(config: ModelConfig, vocab_size: int | None = None) -> ParameterCount:
    """Counts the parameters of `config` as models/build.py builds it.

    `vocab_size` is the tokenizer's, before padding; None takes `config.vocab_size`. Raises
    ValueError where both are None.
    """
    return _count(config, padded_rows(config, vocab_size))


def parameters_on_rank(
    config: ModelConfig,
    vocab_size: int | None = None,
    *,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    pipeline_rank: int = 0,
    virtual_pipeline_model_parallel_size: int = 1,
    expert_model_parallel_size: int = 1,
    expert_tensor_parallel_size: int = 1,
) -> ParameterCount:
    """Parameters that one rank holds, by what they are for.

    Every tensor-parallel rank of a stage holds as many. Split over them are the embedding, the
    weights of all dense linear layers, the biases of the column-parallel ones (linear_qkv,
    linear_fc1) and the sub-LayerNorms, which work on sharded widths; every rank has the other norms
    and biases and the routers whole. Experts are split over expert_model_parallel_size x
    expert_tensor_parallel_size ranks. With a shared embedding the last stage holds a second copy of
    it where there is more than one stage. The sizes must divide what they split, as
    `pretrain.config_rules.validate` checks.
    """
    rows = padded_rows(config, vocab_size)
    stages = pipeline_model_parallel_size
    first, last = pipeline_rank == 0, pipeline_rank == stages - 1
    chunks = layers_of_stage(
        config, pipeline_rank, stages=stages, chunks=virtual_pipeline_model_parallel_size
    )
    shard = _count(
        config,
        rows,
        layers=[layer for chunk in chunks for layer in chunk],
        tensor_parallel_size=tensor_model_parallel_size,
        expert_ranks=expert_model_parallel_size * expert_tensor_parallel_size,
    )
    has_embedding = first or (last and config.share_embeddings_and_output_weights)
    return replace(
        shard,
        embedding=shard.embedding if has_embedding else 0,
        output_layer=shard.output_layer if last else 0,
        norms=shard.norms if last else shard.norms - _final_norm(config),
    )


def layers_of_stage(
    config: ModelConfig, pipeline_rank: int, *, stages: int, chunks: int = 1
) -> list[list[int]]:
    """The layers, counted from 0, of each model chunk of a pipeline stage: with several chunks
    (interleaved) every `stages`-th piece of the model."""
    size = config.num_layers // (stages * chunks)
    starts = [(chunk * stages + pipeline_rank) * size for chunk in range(chunks)]
    return [list(range(start, start + size)) for start in starts]


def flops_per_token(
    config: ModelConfig,
    seq_length: int,
    vocab_size: int | None = None,
    *,
    causal: bool = False,
    forward_only: bool = False,
) -> int:
    """Floating-point operations that the mathematics of the model asks for, for one token.

    A multiply-add counts as two. Forward: 2 x (weights of the linear layers, of the V x h output
    layer also where it shares the embedding, and of the experts that a token is sent to) +
    4 x L x a x (keys a token sees), the scores and their sum over values. The backward pass counts
    twice the forward pass. Left out: the embedding (a look-up), norms, biases, activations,
    softmax, rotary positions, the way of tokens to their experts, and any recomputation, so that
    utilisation by this count is *model* FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B,
    whose 6N + 12LHQT this equals, but that its N has all parameters).

    A token counts as seeing all `seq_length` keys, as PaLM has it; with `causal`, the
    (seq_length + 1) / 2 that it sees on average. `vocab_size` as in `parameter_count`.
    """
    rows = padded_rows(config, vocab_size)
    weights = _layer_weights(config) + rows * config.hidden_size
    forward = 2 * weights + _attention_flops(config, seq_length, causal)
    return forward if forward_only else 3 * forward


def hardware_flops_per_token(
    config: ModelConfig,
    seq_length: int,
    vocab_size: int | None = None,
    *,
    recompute: RecomputeGranularity = RecomputeGranularity.none,
    causal: bool = False,
) -> int:
    """`flops_per_token` and what recomputation does again: what *hardware* FLOPs utilisation counts
    (PaLM, arXiv 2204.02311, section 4.1).

    full: every layer's forward pass once more, but neither embedding nor output layer. selective:
    the scores and their sum over values. The scores that flash kernels evaluate again in every
    backward pass are not counted, as they are not where a kernel keeps them.
    """
    attention = _attention_flops(config, seq_length, causal)
    again = {
        RecomputeGranularity.none: 0,
        RecomputeGranularity.selective: attention,
        RecomputeGranularity.full: 2 * _layer_weights(config) + attention,
    }[recompute]
    return flops_per_token(config, seq_length, vocab_size, causal=causal) + again


def flops_per_step(
    config: ModelConfig,
    seq_length: int,
    global_batch_size: int,
    vocab_size: int | None = None,
    *,
    recompute: RecomputeGranularity = RecomputeGranularity.none,
    causal: bool = False,
) -> int:
    """`hardware_flops_per_token` of all tokens of an optimizer step, on all devices together."""
    tokens = seq_length * global_batch_size
    return tokens * hardware_flops_per_token(
        config, seq_length, vocab_size, recompute=recompute, causal=causal
    )


def _layer_weights(config: ModelConfig) -> int:
    """Weights of all layers that one token is multiplied with."""
    count = _count(config, 0)
    experts = len(_sparse(config)) * config.moe.router_topk * _expert_weights(config)
    return count.attention + count.feed_forward - count.biases + count.routers + experts


def _attention_flops(config: ModelConfig, seq_length: int, causal: bool) -> int:
    """Of the scores and their sum over values, forward, for one token."""
    keys_twice = seq_length + 1 if causal else 2 * seq_length
    heads_width = config.num_attention_heads * config.head_width
    return 2 * config.num_layers * heads_width * keys_twice


def padded_rows(config: ModelConfig, vocab_size: int | None) -> int:
    """Rows of the embedding of a tokenizer with `vocab_size` ids; None takes `config.vocab_size`.

    Raises ValueError where both are None.
    """
    if vocab_size is None:
        vocab_size = config.vocab_size
    if vocab_size is None:
        raise ValueError(
            f"{config.name} takes the tokenizer's vocabulary: pass vocab_size, or set "
            "model.vocab_size"
        )
    return padded_vocab_size(vocab_size, config.make_vocab_size_divisible_by)


def _count(
    config: ModelConfig,
    rows: int,
    *,
    layers: Iterable[int] | None = None,
    tensor_parallel_size: int = 1,
    expert_ranks: int = 1,
) -> ParameterCount:
    """These layers (None: all) and the rest, as one rank holds them."""
    embedding = rows // tensor_parallel_size * config.hidden_size
    total = ParameterCount(
        embedding=embedding,
        output_layer=0 if config.share_embeddings_and_output_weights else embedding,
        norms=_final_norm(config),
        **dict.fromkeys(
            ("attention", "feed_forward", "routers", "experts", "active_experts", "biases"), 0
        ),
    )
    for layer in range(config.num_layers) if layers is None else layers:
        total = _sum(total, _layer(config, layer, tensor_parallel_size, expert_ranks))
    return total


def _sum(one: ParameterCount, other: ParameterCount) -> ParameterCount:
    return ParameterCount(
        **{f.name: getattr(one, f.name) + getattr(other, f.name) for f in fields(ParameterCount)}
    )


def _layer(config: ModelConfig, layer: int, tp: int, expert_ranks: int) -> ParameterCount:
    hidden, moe = config.hidden_size, config.moe
    vectors, sub_ln = _vectors_per_norm(config), _has_sub_ln(config)
    heads_width = config.num_attention_heads * config.head_width // tp
    qkv_width = heads_width + 2 * config.query_groups * config.head_width // tp
    attention_biases = qkv_width + hidden if config.add_bias_linear else 0
    norms = vectors * (2 * hidden + (heads_width if sub_ln else 0))
    sparse = layer in _sparse(config)
    experts = active = routers = 0
    widths = []  # of the dense feed-forwards
    if not sparse or moe.sparse_after_layer:
        widths.append(config.ffn_hidden_size)
    if sparse:
        if moe.shared_expert_intermediate_size:
            widths.append(moe.shared_expert_intermediate_size)
        experts = moe.num_experts * _expert(config) // expert_ranks
        active = moe.router_topk * _expert(config) // expert_ranks
        routers = _router(config)
    feed_forward = ff_biases = 0
    for width in widths:
        biases = _gates(config) * width // tp + hidden if config.add_bias_linear else 0
        feed_forward += (_gates(config) + 1) * hidden * width // tp + biases
        ff_biases += biases
        norms += vectors * width // tp if sub_ln else 0
    return ParameterCount(
        embedding=0,
        output_layer=0,
        attention=hidden * qkv_width + heads_width * hidden + attention_biases,
        feed_forward=feed_forward,
        routers=routers,
        experts=experts,
        active_experts=active,
        norms=norms,
        biases=attention_biases + ff_biases,
    )


def _expert_weights(config: ModelConfig) -> int:
    """Weights of one expert that tokens are multiplied with."""
    width = config.expert_ffn_hidden_size
    return config.moe.stacked_sublayers * (_gates(config) + 1) * config.hidden_size * width


def _expert(config: ModelConfig) -> int:
    """All parameters of one expert."""
    hidden, width = config.hidden_size, config.expert_ffn_hidden_size
    vectors = 0
    if config.add_bias_linear:
        vectors += _gates(config) * width + hidden
    if _has_sub_ln(config):
        vectors += _vectors_per_norm(config) * width
    if config.moe.sparse_after_layer:  # each sublayer norms its own input
        vectors += _vectors_per_norm(config) * hidden
    return _expert_weights(config) + config.moe.stacked_sublayers * vectors


def _router(config: ModelConfig) -> int:
    hidden, moe = config.hidden_size, config.moe
    if moe.router is RouterType.xmoe:
        return moe.dim * (hidden + moe.num_experts) + 1  # and the temperature
    if moe.router is RouterType.torchscale_xmoe:
        return TORCHSCALE_ROUTER_DIM * (hidden + moe.num_experts)
    return moe.num_experts * hidden


def _sparse(config: ModelConfig) -> list[int]:
    return config.moe.sparse_layers(config.num_layers)


def _gates(config: ModelConfig) -> int:
    """Matrices in front of the activation."""
    return 2 if config.activation is Activation.swiglu else 1


def _has_sub_ln(config: ModelConfig) -> bool:
    return config.layer_norm_placement is LayerNormPlacement.sub_ln


def _final_norm(config: ModelConfig) -> int:
    if config.layer_norm_placement in (LayerNormPlacement.post_ln, LayerNormPlacement.deepnorm):
        return 0  # the last layer ends in its own norm
    return config.hidden_size * _vectors_per_norm(config)


def _vectors_per_norm(config: ModelConfig) -> int:
    return 2 if config.normalization == Normalization.layer_norm else 1  # weight and bias

"""Parameters and floating-point operations of a model, from its settings alone.

Imports neither torch nor megatron-core. `h` is hidden_size, `a` the width of all heads together
(num_attention_heads x head width), `k` that of all key heads, `f` ffn_hidden_size, `L` num_layers,
`V` the padded vocabulary, `s` seq_length.
"""

from dataclasses import dataclass

from models.config import Activation, LayerNormPlacement, ModelConfig, Normalization


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Parameters of the whole model, by what they are for; sums over all layers."""

    embedding: int  # V x h
    output_layer: int  # V x h, or 0 where it shares the embedding
    attention: int  # linear_qkv and linear_proj, with their biases
    feed_forward: int  # linear_fc1 and linear_fc2, with their biases
    norms: int  # of the layers, and the final one
    biases: int  # those of the linear layers; part of attention and feed_forward
    per_layer: int  # all of one layer

    @property
    def total(self) -> int:
        return self.embedding + self.output_layer + self.non_embedding

    @property
    def non_embedding(self) -> int:
        """Without the embedding and the output layer: the N of most scaling laws."""
        return self.attention + self.feed_forward + self.norms


def padded_vocab_size(vocab_size: int, divisible_by: int) -> int:
    """`vocab_size` rounded up to a multiple of `divisible_by`: the rows of the embedding."""
    return -(-vocab_size // divisible_by) * divisible_by


def parameter_count(config: ModelConfig, vocab_size: int | None = None) -> ParameterCount:
    """Counts the parameters of `config` as models/build.py builds it.

    `vocab_size` is the tokenizer's, before padding; None takes `config.vocab_size`. Raises
    ValueError where both are None.
    """
    return _count(config, _padded_rows(config, vocab_size), tensor_parallel_size=1)


def parameters_on_rank(
    config: ModelConfig,
    vocab_size: int | None = None,
    *,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    pipeline_rank: int = 0,
) -> int:
    """Parameters that one rank holds.

    Every tensor-parallel rank of a stage holds as many. Split over them are the embedding, the
    weights of all linear layers, the biases of the column-parallel ones (linear_qkv, linear_fc1)
    and the sub-LayerNorms, which work on sharded widths; every rank has the other norms and biases
    whole. With a shared embedding the last stage holds a second copy of it where there is more
    than one stage. Interleaved stages hold as many layers as plain ones. The sizes must divide
    what they split, as `pretrain.config.validate` checks.
    """
    rows = _padded_rows(config, vocab_size)
    shard = _count(config, rows, tensor_parallel_size=tensor_model_parallel_size)
    first = pipeline_rank == 0
    last = pipeline_rank == pipeline_model_parallel_size - 1
    parameters = shard.per_layer * config.num_layers // pipeline_model_parallel_size
    if first:
        parameters += shard.embedding
    if last:
        parameters += _final_norm(config) + shard.output_layer
    if last and not first and config.share_embeddings_and_output_weights:
        parameters += shard.embedding
    return parameters


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
    layer also where it shares the embedding) + 4 x L x a x (keys a token sees), the scores and
    their sum over values. The backward pass counts twice the forward pass. Left out: the embedding
    (a look-up), norms, biases, activations, softmax, rotary positions, and any recomputation, so
    that utilisation by this count is *model* FLOPs utilisation (PaLM, arXiv 2204.02311, appendix
    B, whose 6N + 12LHQT this equals, but that its N has all parameters).

    A token counts as seeing all `seq_length` keys, as PaLM has it; with `causal`, the
    (seq_length + 1) / 2 that it sees on average. `vocab_size` as in `parameter_count`.
    """
    rows = _padded_rows(config, vocab_size)
    count = _count(config, rows, tensor_parallel_size=1)
    weights = count.attention + count.feed_forward - count.biases + rows * config.hidden_size
    keys_twice = seq_length + 1 if causal else 2 * seq_length
    heads_width = config.num_attention_heads * config.head_width
    forward = 2 * weights + 2 * config.num_layers * heads_width * keys_twice
    return forward if forward_only else 3 * forward


def _padded_rows(config: ModelConfig, vocab_size: int | None) -> int:
    if vocab_size is None:
        vocab_size = config.vocab_size
    if vocab_size is None:
        raise ValueError(
            f"{config.name} takes the tokenizer's vocabulary: pass vocab_size, or set "
            "model.vocab_size"
        )
    return padded_vocab_size(vocab_size, config.make_vocab_size_divisible_by)


def _count(config: ModelConfig, rows: int, *, tensor_parallel_size: int) -> ParameterCount:
    """All layers as one tensor-parallel rank of `tensor_parallel_size` holds them."""
    tp = tensor_parallel_size
    hidden = config.hidden_size
    heads_width = config.num_attention_heads * config.head_width // tp
    qkv_width = heads_width + 2 * config.query_groups * config.head_width // tp
    ffn = config.ffn_hidden_size // tp
    fc1_width = 2 * ffn if config.activation == Activation.swiglu else ffn

    qkv_bias, proj_bias, fc1_bias, fc2_bias = (
        (qkv_width, hidden, fc1_width, hidden) if config.add_bias_linear else (0, 0, 0, 0)
    )
    attention = hidden * qkv_width + heads_width * hidden + qkv_bias + proj_bias
    feed_forward = hidden * fc1_width + ffn * hidden + fc1_bias + fc2_bias
    norms = _norms_per_layer(config, tp)
    embedding = rows // tp * hidden
    layers = config.num_layers
    return ParameterCount(
        embedding=embedding,
        output_layer=0 if config.share_embeddings_and_output_weights else embedding,
        attention=layers * attention,
        feed_forward=layers * feed_forward,
        norms=layers * norms + _final_norm(config),
        biases=layers * (qkv_bias + proj_bias + fc1_bias + fc2_bias),
        per_layer=attention + feed_forward + norms,
    )


def _norms_per_layer(config: ModelConfig, tensor_parallel_size: int) -> int:
    widths = 2 * config.hidden_size
    if config.layer_norm_placement == LayerNormPlacement.sub_ln:
        inner = config.num_attention_heads * config.head_width + config.ffn_hidden_size
        widths += inner // tensor_parallel_size
    return widths * _vectors_per_norm(config)


def _final_norm(config: ModelConfig) -> int:
    if config.layer_norm_placement in (LayerNormPlacement.post_ln, LayerNormPlacement.deepnorm):
        return 0  # the last layer ends in its own norm
    return config.hidden_size * _vectors_per_norm(config)


def _vectors_per_norm(config: ModelConfig) -> int:
    return 2 if config.normalization == Normalization.layer_norm else 1  # weight and bias

"""Settings of the model: its shape, and which published variant each part follows.

Imports neither torch nor megatron-core.
"""

from dataclasses import dataclass
from enum import Enum


class LayerNormPlacement(Enum):
    """Where the layer norms sit in a residual block, and how the residual is scaled."""

    sub_ln = "sub_ln"  # Magneto (arXiv 2210.06423 section 3.1): before each sublayer and inside it
    pre_ln = "pre_ln"
    post_ln = "post_ln"
    deepnorm = "deepnorm"  # arXiv 2203.00555: post-LN with an up-scaled residual
    # TorchScale's default decoder with deepnorm=True: DeepNorm's residual scale on a pre-LN block
    deepnorm_pre_ln = "deepnorm_pre_ln"


class Normalization(Enum):
    layer_norm = "LayerNorm"
    rms_norm = "RMSNorm"


class PositionEmbedding(Enum):
    xpos = "xpos"  # arXiv 2212.10554
    rope = "rope"
    none = "none"


class Activation(Enum):
    gelu = "gelu"
    swiglu = "swiglu"


class InitMethod(Enum):
    """Distribution of the linear weights before the variant's gain."""

    xavier_normal = "xavier_normal"  # std sqrt(2 / (fan_in + fan_out)), full fans of each separate matrix
    normal = "normal"  # std init_method_std everywhere
    # TorchScale: U(-1/sqrt(fan_in), 1/sqrt(fan_in)); the gain multiplies biases too, and not a GLU's gate
    torchscale = "torchscale"


@dataclass(kw_only=True)
class ModelConfig:
    """A decoder-only transformer language model."""

    name: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int | None = None  # None: as many as heads (multi-head attention)
    kv_channels: int | None = None  # width of one head; None: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048  # longest sequence the model may be trained on, in tokens
    vocab_size: int | None = None  # None: the tokenizer's
    # the embedding is padded up to a multiple of this; independent of the layout on purpose
    make_vocab_size_divisible_by: int = 128
    layer_norm_placement: LayerNormPlacement = LayerNormPlacement.sub_ln
    normalization: Normalization = Normalization.layer_norm
    layernorm_epsilon: float = 1e-5
    position_embedding_type: PositionEmbedding = PositionEmbedding.xpos
    rotary_base: float = 10000.0
    xpos_scale_base: float = 512.0
    activation: Activation = Activation.gelu
    add_bias_linear: bool = True
    share_embeddings_and_output_weights: bool = True
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    init_method: InitMethod = InitMethod.xavier_normal
    init_method_std: float = 0.02  # only with init_method=normal

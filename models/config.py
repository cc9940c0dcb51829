"""Settings of the model: its shape, and which published variant each part follows.

Imports neither torch nor megatron-core.
"""

from dataclasses import dataclass, field
from enum import Enum

from models.moe_config import MoEConfig
from parallel.config import ConfigError, below, not_positive


class LayerNormPlacement(Enum):
    """Where the layer norms sit in a residual block, and how the residual is scaled."""

    sub_ln = "sub_ln"  # Magneto (arXiv 2210.06423 section 3.1): before each sublayer and inside it
    pre_ln = "pre_ln"
    post_ln = "post_ln"
    deepnorm = "deepnorm"  # arXiv 2203.00555: post-LN with an up-scaled residual
    # DeepNorm's residual scale on a pre-LN block: what TorchScale's decoder with deepnorm=True is
    # in its repository (the released 0.3.0 builds the paper's)
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

    # std sqrt(2 / (fan_in + fan_out)), full fans of each separate matrix
    xavier_normal = "xavier_normal"
    normal = "normal"  # std init_method_std everywhere
    # TorchScale: U(-1/sqrt(fan_in), 1/sqrt(fan_in)); the gain multiplies biases too, and not a
    # GLU's gate
    torchscale = "torchscale"


@dataclass(kw_only=True)
class ModelConfig:
    """A decoder-only transformer language model, dense or with experts (`moe`)."""

    name: str  # in logs, run records and the default run_dir
    num_layers: int  # transformer layers, each attention and feed-forward
    hidden_size: int  # width of the residual stream
    ffn_hidden_size: int  # inner width of a feed-forward
    num_attention_heads: int  # query heads of a layer
    num_query_groups: int | None = None  # None: as many as heads (multi-head attention)
    kv_channels: int | None = None  # width of one head; None: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048  # longest sequence the model may be trained on, in tokens
    vocab_size: int | None = None  # None: the tokenizer's
    # the embedding is padded up to a multiple of this; independent of the layout on purpose
    make_vocab_size_divisible_by: int = 128
    layer_norm_placement: LayerNormPlacement = LayerNormPlacement.sub_ln
    normalization: Normalization = Normalization.layer_norm  # the kind of norm
    layernorm_epsilon: float = 1e-5  # added to the variance
    # how attention learns of positions
    position_embedding_type: PositionEmbedding = PositionEmbedding.xpos
    rotary_base: float = 10000.0  # of the angles of xpos and rope
    xpos_scale_base: float = 512.0  # tokens; the larger, the slower attention decays with distance
    activation: Activation = Activation.gelu  # of the feed-forwards; swiglu has a third matrix
    add_bias_linear: bool = True  # biases in all linear layers
    share_embeddings_and_output_weights: bool = True  # one matrix for both (tied)
    hidden_dropout: float = 0.0  # share of sublayer outputs set to 0 in training
    attention_dropout: float = 0.0  # share of attention weights set to 0 in training
    init_method: InitMethod = InitMethod.xavier_normal
    init_method_std: float = 0.02  # only with init_method=normal
    moe: MoEConfig = field(default_factory=MoEConfig)

    @property
    def expert_ffn_hidden_size(self) -> int:
        """Width of one expert: `moe.ffn_hidden_size`, or that of the dense layers."""
        return self.moe.ffn_hidden_size or self.ffn_hidden_size

    @property
    def query_groups(self) -> int:
        """Key and value heads: `num_query_groups`, or one for each head."""
        if self.num_query_groups is None:
            return self.num_attention_heads
        return self.num_query_groups

    @property
    def head_width(self) -> int:
        """Width of one head: `kv_channels`, or the heads' share of the hidden size."""
        if self.kv_channels is None:
            return self.hidden_size // self.num_attention_heads
        return self.kv_channels

    def __post_init__(self) -> None:
        """Raises ConfigError for what is wrong whatever the layout."""
        sizes: dict[str, float] = {
            "model.num_layers": self.num_layers,
            "model.hidden_size": self.hidden_size,
            "model.ffn_hidden_size": self.ffn_hidden_size,
            "model.num_attention_heads": self.num_attention_heads,
            "model.max_position_embeddings": self.max_position_embeddings,
            "model.make_vocab_size_divisible_by": self.make_vocab_size_divisible_by,
        }
        for name, size in {
            "model.num_query_groups": self.num_query_groups,
            "model.kv_channels": self.kv_channels,
            "model.vocab_size": self.vocab_size,
        }.items():
            if size is not None:
                sizes[name] = size
        problems = below(sizes, 1)
        if not problems:  # the arithmetic below divides by the sizes
            problems += self._heads_that_do_not_fit()
            problems += self._experts_that_do_not_fit()
        problems += not_positive(
            {
                "model.layernorm_epsilon": self.layernorm_epsilon,
                "model.rotary_base": self.rotary_base,
                "model.xpos_scale_base": self.xpos_scale_base,
                "model.init_method_std": self.init_method_std,
            }
        )
        for name, probability in {
            "model.hidden_dropout": self.hidden_dropout,
            "model.attention_dropout": self.attention_dropout,
        }.items():
            if not 0 <= probability < 1:
                problems.append(f"{name}={probability} must be at least 0 and below 1; 0 is off")
        if not self.name:
            problems.append("model.name= is empty; it names the run's folder")
        if problems:
            raise ConfigError(*problems)

    def _heads_that_do_not_fit(self) -> list[str]:
        heads, hidden = self.num_attention_heads, self.hidden_size
        problems = []
        if self.kv_channels is None and hidden % heads:
            problems.append(
                f"model.num_attention_heads={heads} must divide model.hidden_size={hidden}; "
                f"use {nearest_divisor(hidden, heads)} heads, or give the width of one head as "
                "model.kv_channels"
            )
        elif self.position_embedding_type != PositionEmbedding.none and self.head_width % 2:
            problems.append(
                f"model.position_embedding_type={self.position_embedding_type.value} turns pairs "
                f"of channels, and a head has an odd number of them: {self.head_width}; set "
                f"model.kv_channels={self.head_width + 1}, or "
                "model.position_embedding_type=none"
            )
        if heads % self.query_groups:
            problems.append(
                f"model.num_query_groups={self.query_groups} must divide "
                f"model.num_attention_heads={heads}; use "
                f"{nearest_divisor(heads, self.query_groups)}"
            )
        return problems

    def _experts_that_do_not_fit(self) -> list[str]:
        moe, layers = self.moe, self.num_layers
        if moe.num_experts == 0:
            return []
        if moe.sparse_after_layer > layers:
            return [
                f"model.moe.sparse_after_layer={moe.sparse_after_layer} must not exceed "
                f"model.num_layers={layers}; the paper has half: {max(1, layers // 2)}"
            ]
        if not moe.sparse_layers(layers):
            return [
                f"model.moe.layer_freq={moe.layer_freq} leaves none of model.num_layers={layers} "
                f"layers sparse; use {layers} or less"
            ]
        placement = self.layer_norm_placement
        norm_first = (LayerNormPlacement.sub_ln, LayerNormPlacement.pre_ln)
        if moe.sparse_after_layer and placement not in norm_first:
            return [
                f"model.moe.sparse_after_layer={moe.sparse_after_layer} adds a sublayer that "
                f"norms its input, beside a plain residual, which model.layer_norm_placement="
                f"{placement.value} has not; use sub_ln or pre_ln, or model.moe.layer_freq"
            ]
        return []


def nearest_divisor(number: int, wish: int) -> int:
    """The divisor of `number` closest to `wish`; the larger of two equally close."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: (abs(d - wish), -d))

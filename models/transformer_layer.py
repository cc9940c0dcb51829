"""One residual block, in its five placements of the layer norm.

    pre_ln, sub_ln        x ← x + attention(norm(x));      x ← x + mlp(norm(x))
    post_ln               x ← norm(x + attention(x));      x ← norm(x + mlp(x))
    deepnorm              x ← norm(α·x + attention(x));    x ← norm(α·x + mlp(x))
    deepnorm_pre_ln       x ← α·x + attention(norm(x));    x ← α·x + mlp(norm(x))

sub_ln (Magneto) differs from pre_ln inside the sublayers: attention's output projection and the
second feed-forward matrix each normalise their input, over its full width
(`parallel.layers.SubLayerNormRowParallelLinear`).

In a sparse layer the feed-forward is a `models.moe_layer.MoELayer`, or, in X-MoE's placement, one
more sublayer behind the dense feed-forward: x ← x + experts(x), whose norms lie inside the experts.

Attention is megatron-core's module, and the feed-forward but for its activation; this layer takes
the place of its TransformerLayer inside its TransformerBlock. Activations are sequence-first:
[s, b, h].
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from models.config import LayerNormPlacement
from models.document_segments import DocumentSegments
from models.moe_layer import MoELayer
from parallel.compiled import Compilable
from parallel.megatron import (
    BaseTransformerLayer,
    MegatronModule,
    ModuleSpec,
    TransformerConfig,
    build_module,
    get_transformer_layer_offset,
)
from parallel.norm import is_compiled


@dataclass
class TransformerLayerSubmodules:
    norm: Any
    self_attention: ModuleSpec
    mlp: ModuleSpec  # of a FeedForward or a MoELayer
    placement: LayerNormPlacement
    residual_scale: float
    sparse: ModuleSpec | None = None  # of a MoELayer behind the dense feed-forward


class TransformerLayer(MegatronModule, BaseTransformerLayer):
    """Attention and feed-forward, each in a residual branch; see the table above.

    `input_layernorm` and `pre_mlp_layernorm` keep megatron-core's names in every placement, so
    that checkpoints of the placements have the same keys.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        layer_number: int = 1,
        pg_collection: Any = None,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config)
        offset = get_transformer_layer_offset(config, vp_stage, pg_collection.pp.rank())
        self.layer_number = layer_number + offset  # 1-based, over the whole model
        self.norm_first = submodules.placement not in (
            LayerNormPlacement.post_ln,
            LayerNormPlacement.deepnorm,
        )
        self.residual_scale = submodules.residual_scale
        self.dropout = config.hidden_dropout
        width = {"hidden_size": config.hidden_size, "eps": config.layernorm_epsilon}
        self.input_layernorm = submodules.norm(config=config, **width)
        self.self_attention = build_module(
            submodules.self_attention,
            config=config,
            layer_number=layer_number,
            pg_collection=pg_collection,
        )
        self.pre_mlp_layernorm = submodules.norm(config=config, **width)
        place = {"layer_number": self.layer_number, "pg_collection": pg_collection}
        is_sparse = submodules.mlp.module is MoELayer
        self.mlp = build_module(submodules.mlp, config=config, **(place if is_sparse else {}))
        self.sparse = None
        if submodules.sparse is not None:
            self.sparse = build_module(submodules.sparse, config=config, **place)
        for sublayer in (self.mlp, self.sparse):
            if isinstance(sublayer, MoELayer):
                sublayer.set_layer_number(self.layer_number)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_params: DocumentSegments | None = None,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states [s, b, h] (s/tp under sequence parallelism) -> the same shape.

        packed_seq_params: the documents attention stays in; None: it crosses them. The second
        result is megatron-core's cross-attention context, which a decoder-only model has not.
        """
        attention = partial(self._attention, segments=packed_seq_params)
        x = self._residual(hidden_states, attention, self.input_layernorm)
        x = self._residual(x, self.mlp, self.pre_mlp_layernorm)
        if self.sparse is not None:
            x = self._residual(x, self.sparse, nn.Identity())
        return x, None

    def _attention(
        self, x: Tensor, segments: DocumentSegments | None
    ) -> tuple[Tensor, Tensor | None]:
        return self.self_attention(x, attention_mask=None, packed_seq_params=segments)

    def _residual(self, x: Tensor, sublayer: Any, norm: Any) -> Tensor:
        out, bias = sublayer(norm(x) if self.norm_first else x)
        dropout = self.dropout if self.training else 0.0
        # its draws are torch's own, not a compiler's
        compiled = is_compiled(self.config) and not dropout
        x = _add(compiled, x, out, bias, self.residual_scale, dropout)
        return x if self.norm_first else norm(x)


@Compilable
def _add(x: Tensor, out: Tensor, bias: Tensor | None, scale: float, dropout: float) -> Tensor:
    """scale · x + dropout(out + bias)"""
    if bias is not None:
        out = out + bias
    if dropout:
        out = F.dropout(out, dropout)
    return (x if scale == 1.0 else scale * x) + out

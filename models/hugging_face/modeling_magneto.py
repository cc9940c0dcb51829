"""Magneto and X-MoE language models for `transformers`; needs torch and transformers, nothing else.

A decoder-only transformer in five placements of the layer norm, of which sub_ln is Magneto
(arXiv 2210.06423), with xPos (arXiv 2212.10554), RoPE or no positions, dense or with sparse layers
(X-MoE, arXiv 2204.09179, and other routers). For inference and further training of weights that
were trained elsewhere: what routers do only in pretraining (balance losses, capacity, sampling of
SparseMixer) is not here; they choose as in evaluation.

Shapes: b sequences, s tokens, h hidden_size, n heads, d head_dim, t = b s tokens in the order of
their sequences, E experts, k of them for each token.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

XPOS_GAMMA = 0.4  # of the authors' code; arXiv 2212.10554 equation 9 leaves it open
SHORTEST = 1e-6  # projected tokens below this length have score 0 with every expert
NORM_FIRST = ("sub_ln", "pre_ln", "deepnorm_pre_ln")


class MagnetoConfig(PretrainedConfig):
    """The shape of the model.

    layer_norm_placement: sub_ln, pre_ln, post_ln, deepnorm or deepnorm_pre_ln. position_embedding:
    xpos, rope or none. normalization: LayerNorm or RMSNorm. activation: gelu or swiglu. moe: None,
    or the settings of the sparse layers (`Router` and `SparseLayer` say which).
    """

    model_type = "magneto"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 768,
        intermediate_size: int = 3072,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        max_position_embeddings: int = 2048,
        layer_norm_placement: str = "sub_ln",
        residual_scale: float = 1.0,
        normalization: str = "LayerNorm",
        layer_norm_eps: float = 1e-5,
        position_embedding: str = "xpos",
        rotary_base: float = 10000.0,
        xpos_scale_base: float = 512.0,
        activation: str = "gelu",
        use_bias: bool = True,
        moe: dict[str, Any] | None = None,
        use_cache: bool = True,
        tie_word_embeddings: bool = True,
        **others: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.layer_norm_placement = layer_norm_placement
        self.residual_scale = residual_scale
        self.normalization = normalization
        self.layer_norm_eps = layer_norm_eps
        self.position_embedding = position_embedding
        self.rotary_base = rotary_base
        self.xpos_scale_base = xpos_scale_base
        self.activation = activation
        self.use_bias = use_bias
        self.moe = moe
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **others)


def make_norm(config: MagnetoConfig, width: int) -> nn.Module:
    if config.normalization == "RMSNorm":
        return nn.RMSNorm(width, eps=config.layer_norm_eps)
    return nn.LayerNorm(width, eps=config.layer_norm_eps)


def position_tables(
    config: MagnetoConfig, positions: Tensor
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """(cos, sin) for queries and for keys of tokens at `positions` [b, s]: [b, 1, s, d/2] each.

    xPos multiplies queries by ζ^m and keys by ζ^(-m), m = (position - centre) / xpos_scale_base;
    the centre cancels in every score. A fixed one lets cached keys stay as they are.
    """
    if config.position_embedding == "none":
        return None
    d = config.head_dim
    even = torch.arange(0, d, 2, dtype=torch.float64, device="cpu") / d
    theta = (config.rotary_base**-even).to(positions.device)
    angle = positions[:, None, :, None].double() * theta
    cos, sin = angle.cos(), angle.sin()
    if config.position_embedding == "rope":
        return (cos.float(), sin.float()), (cos.float(), sin.float())
    zeta = ((even + XPOS_GAMMA) / (1 + XPOS_GAMMA)).to(positions.device)
    centre = config.max_position_embeddings // 2
    scale = zeta ** ((positions[:, None, :, None].double() - centre) / config.xpos_scale_base)
    return (
        ((cos * scale).float(), (sin * scale).float()),
        ((cos / scale).float(), (sin / scale).float()),
    )


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair of neighbouring channels of x [b, n, s, d]; in fp32, returned in x's type."""
    cos, sin = table
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Causal attention; in sub_ln its output projection normalises its input."""

    def __init__(self, config: MagnetoConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        h, d = config.hidden_size, config.head_dim
        heads, groups, bias = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.use_bias,
        )
        self.q_proj = nn.Linear(h, heads * d, bias=bias)
        self.k_proj = nn.Linear(h, groups * d, bias=bias)
        self.v_proj = nn.Linear(h, groups * d, bias=bias)
        self.o_proj = nn.Linear(heads * d, h, bias=bias)
        sub_ln = config.layer_norm_placement == "sub_ln"
        self.inner_layernorm = make_norm(config, heads * d) if sub_ln else nn.Identity()

    def forward(self, x: Tensor, tables: Any, mask: Tensor | None, cache: Any) -> Tensor:
        """x [b, s, h] -> [b, s, h]; mask: bool [b, 1, s, keys], or None: causal, all keys new."""
        d = self.config.head_dim
        q, k, v = (
            projection(x).unflatten(-1, (-1, d)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # [b, n, s, d]
        if tables is not None:
            q, k = rotate(q, tables[0]), rotate(k, tables[1])
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=k.shape[1] != q.shape[1],
        )
        return self.o_proj(self.inner_layernorm(out.transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    """down(norm(σ(up x))), or with swiglu down(norm(silu(gate x) · up x)); the norm in sub_ln."""

    def __init__(self, config: MagnetoConfig, width: int) -> None:
        super().__init__()
        h, bias = config.hidden_size, config.use_bias
        gated = config.activation == "swiglu"
        self.gate_proj = nn.Linear(h, width, bias=bias) if gated else None
        self.up_proj = nn.Linear(h, width, bias=bias)
        self.down_proj = nn.Linear(width, h, bias=bias)
        sub_ln = config.layer_norm_placement == "sub_ln"
        self.inner_layernorm = make_norm(config, width) if sub_ln else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            inner = F.gelu(self.up_proj(x))
        else:
            inner = F.silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(self.inner_layernorm(inner))


# ---------------------------------------------------------------- routers


class Router(nn.Module):
    """Gates [t, E] in fp32 of tokens [t, h]; 0 where an expert does not take the token.

    moe["router"]: linear (Switch, GShard), aux_free (arXiv 2408.15664), xmoe (arXiv 2204.09179),
    sparsemixer (arXiv 2409.12136), torchscale or torchscale_xmoe (TorchScale 0.3.0's gates, with
    their capacity in evaluation, which makes what a token gets depend on the tokens beside it).
    Parameters are fp32 in every model.
    """

    def __init__(self, config: MagnetoConfig) -> None:
        super().__init__()
        moe = config.moe
        assert moe is not None
        self.moe, self.kind, self.topk = moe, moe["router"], moe["router_topk"]
        experts, h = moe["num_experts"], config.hidden_size
        self.num_experts = experts
        if self.kind == "xmoe":
            self.projection = _fp32(moe["router_dim"], h)
            self.expert_embeddings = _fp32(experts, moe["router_dim"])
            self.temperature = _fp32(1)
        elif self.kind == "torchscale_xmoe":
            self.wg_reduction = _fp32(16, h)
            self.wg = _fp32(experts, 16)
        elif self.kind == "torchscale":
            self.wg = _fp32(experts, h)
        else:
            self.weight = _fp32(experts, h)
        if self.kind == "aux_free":
            self.expert_bias: Tensor
            self.register_buffer("expert_bias", torch.zeros(experts, dtype=torch.float32))

    def forward(self, tokens: Tensor, sequences: int) -> Tensor:
        x = tokens.float()
        if self.kind == "xmoe":
            return self._xmoe(x)
        if self.kind == "aux_free":
            return self._aux_free(F.linear(x, self.weight))
        if self.kind == "sparsemixer":
            return self._sparsemixer(F.linear(x, self.weight))
        if self.kind.startswith("torchscale"):
            return self._torchscale(x, sequences)
        logits = F.linear(x, self.weight)
        experts = logits.topk(self.topk, dim=1).indices
        gates = self._score(logits, experts)
        if self.topk > 1:
            gates = gates / (gates.sum(dim=1, keepdim=True) + 1e-20)
        return self._spread(logits, experts, gates)

    def _score(self, logits: Tensor, experts: Tensor) -> Tensor:
        if self.moe["router_score_function"] == "softmax":
            return logits.softmax(dim=1).gather(1, experts)
        return logits.gather(1, experts).sigmoid()

    def _spread(self, logits: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
        return torch.zeros_like(logits).scatter(1, experts, gates)

    def _xmoe(self, x: Tensor) -> Tensor:
        cosines = F.linear(
            _directions(F.linear(x, self.projection)), _directions(self.expert_embeddings)
        )
        experts = cosines.topk(self.topk, dim=1).indices
        logits = cosines / self.temperature
        return self._spread(logits, experts, self._score(logits, experts))

    def _aux_free(self, logits: Tensor) -> Tensor:
        scores = logits.sigmoid()
        experts = (scores + self.expert_bias).topk(self.topk, dim=1).indices
        gates = scores.gather(1, experts)
        if self.topk > 1:
            gates = gates / (gates.sum(dim=1, keepdim=True) + 1e-20)
        return self._spread(logits, experts, gates)

    def _sparsemixer(self, logits: Tensor) -> Tensor:
        gates = torch.zeros_like(logits)
        excluded = torch.zeros_like(logits, dtype=torch.bool)
        for _ in range(self.topk):
            best, expert = logits.masked_fill(excluded, -math.inf).max(dim=1, keepdim=True)
            far = (best - logits) > 2 * self.moe["router_jitter_eps"] * logits.abs().maximum(best)
            probabilities = logits.masked_fill(far | excluded, -math.inf).softmax(dim=1)
            gates = gates.scatter(1, expert, probabilities.gather(1, expert))
            excluded = excluded.scatter(1, expert, True)
        return gates

    # -------- TorchScale's gates

    def _torchscale(self, x: Tensor, sequences: int) -> Tensor:
        if self.kind == "torchscale":
            logits = F.linear(x, self.wg)
        else:
            logits = F.linear(F.linear(x, self.wg_reduction), F.normalize(self.wg, dim=1))
            finite = logits.isfinite()
            logits = torch.where(finite, logits, logits.masked_fill(~finite, math.inf).amin())
        scores = logits.softmax(dim=1)
        experts = scores.argmax(dim=1, keepdim=True)
        asked = torch.ones_like(experts, dtype=torch.bool)
        if self.topk == 2:
            experts, asked, gates = self._second(logits, scores, experts, sequences)
        else:
            gates = scores.gather(1, experts)
        fraction = self.moe["eval_capacity_token_fraction"]
        tokens = len(logits)
        capacity = self.topk * math.ceil(tokens / self.num_experts)
        if fraction > 0:
            capacity = math.ceil(fraction * tokens)
        gates = gates * (asked & (_places(experts, asked) < capacity))
        if self.topk == 2 and not self.moe["normalize_gate_prob_before_dropping"]:
            gates = _sum_to_one(gates)
        return self._spread(logits, experts, gates)

    def _second(
        self, logits: Tensor, scores: Tensor, first: Tensor, sequences: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Both experts [t, 2], whether each is asked, and their gates before any is dropped."""
        policy, ranked = self.moe["second_expert_policy"], logits
        shape = (sequences, len(logits) // sequences)
        if policy == "sampling":
            drawn = torch.rand(*shape, self.num_experts, device=logits.device).flatten(0, 1)
            limits = torch.finfo(drawn.dtype)
            ranked = logits - (-(drawn * (1 - limits.eps) + limits.tiny).log()).log()
        second = ranked.scatter(1, first, -math.inf).argmax(dim=1, keepdim=True)
        experts = torch.cat([first, second], dim=1)
        asked = torch.ones_like(experts, dtype=torch.bool)
        gates = scores.gather(1, experts)
        if self.moe["normalize_gate_prob_before_dropping"]:
            gates = _sum_to_one(gates)
        if policy == "random":
            asked[:, 1] = 2 * gates[:, 1] > torch.rand(*shape, device=logits.device).flatten()
        return experts, asked, gates


def _fp32(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=torch.float32))


def _directions(vectors: Tensor) -> Tensor:
    lengths = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return vectors / lengths.masked_fill(lengths < SHORTEST, math.inf)


def _sum_to_one(gates: Tensor) -> Tensor:
    return gates / gates.sum(dim=1, keepdim=True).clamp(min=torch.finfo(gates.dtype).eps)


def _places(experts: Tensor, asked: Tensor) -> Tensor:
    """Each token's place, from 0, in the queues of its experts [t, k]; all first choices stand
    before all second ones."""
    queue = experts.masked_fill(~asked, -1).t().flatten()
    ordered, order = queue.sort(stable=True)
    place = torch.arange(len(order), device=order.device) - torch.searchsorted(ordered, ordered)
    return torch.empty_like(place).scatter_(0, order, place).view(experts.shape[1], -1).t()


# ---------------------------------------------------------------- sparse layers


class Experts(nn.Module):
    """One feed-forward sublayer of every expert, weights stacked; g: 2 with swiglu, else 1.

    fc1_weight [E, g, f, h], fc2_weight [E, h, f], biases and norms of the same kind.
    """

    def __init__(self, config: MagnetoConfig, *, input_norm: bool) -> None:
        super().__init__()
        assert config.moe is not None
        self.config = config
        e, f, h = config.moe["num_experts"], config.moe["intermediate_size"], config.hidden_size
        g = 2 if config.activation == "swiglu" else 1
        shapes: dict[str, tuple[int, ...]] = {"fc1_weight": (e, g, f, h), "fc2_weight": (e, h, f)}
        if config.use_bias:
            shapes |= {"fc1_bias": (e, g, f), "fc2_bias": (e, h)}
        norms = {"norm": f} if config.layer_norm_placement == "sub_ln" else {}
        if input_norm:
            norms["input_norm"] = h
        for name, width in norms.items():
            shapes[f"{name}_weight"] = (e, width)
            if config.normalization == "LayerNorm":
                shapes[f"{name}_bias"] = (e, width)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def forward(self, expert: int, x: Tensor) -> Tensor:
        """x [rows, h] -> the same shape, of one expert and without a gate."""
        x = self._norm("input_norm", expert, x)
        up = F.linear(x, self._of("fc1_weight", expert).flatten(0, 1))
        bias = self._of("fc1_bias", expert)
        up = up if bias is None else up + bias.flatten()
        if self.config.activation == "swiglu":
            gate, up = up.chunk(2, dim=-1)
            inner = F.silu(gate) * up
        else:
            inner = F.gelu(up)
        inner = self._norm("norm", expert, inner)
        return F.linear(inner, self._of("fc2_weight", expert), self._of("fc2_bias", expert))

    def _of(self, name: str, expert: int) -> Any:
        value = getattr(self, name, None)
        return None if value is None else value[expert]

    def _norm(self, name: str, expert: int, x: Tensor) -> Tensor:
        weight, bias = self._of(f"{name}_weight", expert), self._of(f"{name}_bias", expert)
        if weight is None:
            return x
        if self.config.normalization == "RMSNorm":
            return F.rms_norm(x, weight.shape, weight, self.config.layer_norm_eps)
        return F.layer_norm(x, weight.shape, weight, bias, self.config.layer_norm_eps)


class SparseLayer(nn.Module):
    """Σ gate · expert(x) over the experts a token goes to, and the shared expert's output."""

    def __init__(self, config: MagnetoConfig) -> None:
        super().__init__()
        moe = config.moe
        assert moe is not None
        self.router = Router(config)
        # X-MoE's placement has feed-forwards stacked in each expert, with residuals and norms
        stacked = moe["placement"] == "behind"
        count = moe["stacked_sublayers"] if stacked else 1
        self.stacked = stacked
        self.experts = nn.ModuleList(Experts(config, input_norm=stacked) for _ in range(count))
        width = moe["shared_intermediate_size"]
        self.shared_experts = FeedForward(config, width) if width else None

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        gates = self.router(rows, x.shape[0])
        out = torch.zeros_like(rows)
        for expert in range(gates.shape[1]):
            taken = gates[:, expert].nonzero().flatten()
            if taken.numel():
                weighted = self._expert(expert, rows[taken]) * gates[taken, expert, None]
                out.index_add_(0, taken, weighted.to(out.dtype))
        out = out.view(x.shape)
        return out if self.shared_experts is None else out + self.shared_experts(x)

    def _expert(self, expert: int, x: Tensor) -> Tensor:
        added = self.experts[0](expert, x)
        for sublayer in list(self.experts)[1:]:
            added = added + sublayer(expert, x + added)
        return added


# ---------------------------------------------------------------- the model


class MagnetoLayer(nn.Module):
    """Attention, feed-forward and, in X-MoE's placement, experts, each in a residual branch.

    sub_ln, pre_ln, deepnorm_pre_ln: x ← α x + f(norm(x)); post_ln, deepnorm: x ← norm(α x + f(x)).
    """

    def __init__(self, config: MagnetoConfig, layer: int) -> None:
        super().__init__()
        self.norm_first = config.layer_norm_placement in NORM_FIRST
        self.residual_scale = config.residual_scale
        moe = config.moe
        sparse = moe is not None and layer in moe["sparse_layers"]
        behind = sparse and moe is not None and moe["placement"] == "behind"
        self.input_layernorm = make_norm(config, config.hidden_size)
        self.self_attn = Attention(config, layer)
        self.pre_mlp_layernorm = make_norm(config, config.hidden_size)
        self.mlp: nn.Module = (
            SparseLayer(config)
            if sparse and not behind
            else FeedForward(config, config.intermediate_size)
        )
        self.sparse = SparseLayer(config) if behind else None

    def forward(self, x: Tensor, tables: Any, mask: Tensor | None, cache: Any) -> Tensor:
        inner = self.input_layernorm(x) if self.norm_first else x
        x = self._add(x, self.self_attn(inner, tables, mask, cache), self.input_layernorm)
        inner = self.pre_mlp_layernorm(x) if self.norm_first else x
        x = self._add(x, self.mlp(inner), self.pre_mlp_layernorm)
        return x if self.sparse is None else x + self.sparse(x)

    def _add(self, x: Tensor, out: Tensor, norm: nn.Module) -> Tensor:
        x = self.residual_scale * x + out
        return x if self.norm_first else norm(x)


class MagnetoPreTrainedModel(PreTrainedModel):
    config_class = MagnetoConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = False
    _no_split_modules = ("MagnetoLayer",)
    _supports_sdpa = True


class MagnetoModel(nn.Module):
    """Embedding and layers."""

    def __init__(self, config: MagnetoConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            MagnetoLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        # post-LN blocks end in a norm already
        norm_first = config.layer_norm_placement in NORM_FIRST
        self.norm = make_norm(config, config.hidden_size) if norm_first else nn.Identity()

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
        tables = position_tables(self.config, positions)
        for layer in self.layers:
            x = layer(x, tables, mask, cache)
        return self.norm(x)


class MagnetoForCausalLM(MagnetoPreTrainedModel, GenerationMixin):
    """Token ids [b, s] to logits [b, s, vocab_size]."""

    # what shares the embedding's weight where tie_word_embeddings is set
    _tied_weights_keys: Any = (
        ["lm_head.weight"]
        if transformers.__version__.startswith("4.")
        else {"lm_head.weight": "model.embed_tokens.weight"}
    )
    # The loss is a mean: without this Trainer takes `**unused` for a sign that it divides by
    # num_items_in_batch, and does not divide by gradient_accumulation_steps itself.
    accepts_loss_kwargs = False

    def __init__(self, config: MagnetoConfig) -> None:
        super().__init__(config)
        self.model = MagnetoModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.moe is not None:
            self._keep_in_fp32_modules_strict = {"router"}
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **unused: Any,
    ) -> Any:
        """attention_mask [b, keys]: 0 for padding, which nothing attends to. labels [b, s]: -100 is
        ignored; they are shifted here. logits_to_keep: of the last so many tokens only; 0: all."""
        if inputs_embeds is None:
            inputs_embeds = self.model.embed_tokens(input_ids)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None and not self.training:
            past_key_values = DynamicCache()
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        length = inputs_embeds.shape[1]
        if position_ids is None:
            position_ids = _positions(inputs_embeds, past, attention_mask)
        hidden = self.model(
            inputs_embeds,
            position_ids,
            _mask(inputs_embeds, past, attention_mask),
            past_key_values,
        )
        if isinstance(logits_to_keep, int):
            hidden = hidden[:, -logits_to_keep:] if logits_to_keep else hidden
        else:
            hidden = hidden[:, logits_to_keep]
        logits = self.lm_head(hidden)
        loss = None
        if labels is not None:
            assert logits.shape[1] == length, "labels need the logits of every token"
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        if return_dict is False:
            return (logits, past_key_values) if loss is None else (loss, logits, past_key_values)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)


def _positions(x: Tensor, past: int, attention_mask: Tensor | None) -> Tensor:
    """[b, s]; padding on the left is not counted."""
    b, s = x.shape[:2]
    if attention_mask is None or attention_mask.dim() != 2:
        return torch.arange(past, past + s, device=x.device).expand(b, s)
    counted = attention_mask.long().cumsum(dim=1) - 1
    return counted.clamp(min=0)[:, -s:]


def _mask(x: Tensor, past: int, attention_mask: Tensor | None) -> Tensor | None:
    """True where a token may attend [b, 1, s, past + s]; None where that is plain causal."""
    s = x.shape[1]
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask if attention_mask.dtype == torch.bool else attention_mask >= 0
    padded = attention_mask is not None and not bool(attention_mask.all())
    if past == 0 and not padded:
        return None
    causal = torch.ones(s, past + s, dtype=torch.bool, device=x.device).tril(past)
    if attention_mask is None or not padded:
        return causal[None, None]
    # a padding token attends to itself, or its softmax would be over nothing
    itself = torch.arange(past + s, device=x.device) == torch.arange(
        past, past + s, device=x.device
    ).unsqueeze(1)
    return (causal & attention_mask.bool()[:, None, None]) | itself

"""Weights that do not know the layout.

Every element of every parameter is a pure function of (seed, global parameter name, position in
the full tensor). A rank evaluates it for the elements it holds and for no others, so the same seed
gives the same full weights under every tensor, pipeline, interleaved and expert layout, no rank
ever holds more than its own share plus one block of temporary values, and nothing is communicated.

The function is a counter-based generator: the element's index, offset by a 64-bit key hashed from
seed and name, goes through the finaliser of SplitMix64 (Steele, Lea and Flood 2014), and the two
32-bit halves make one normal number by Box and Muller's transform. Integers are exact everywhere;
the transform is evaluated in fp32, so values on GPU and CPU agree to rounding (about 1e-6).

Which scale each matrix gets is `weight_scale`; see `models.magneto` for the published gains.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.config import Activation, InitMethod, LayerNormPlacement, ModelConfig
from models.magneto import initial_gain
from models.moe_config import RouterType
from parallel.megatron import MegatronModule, get_transformer_layer_offset, parallel_state

# Elements evaluated at once, which bounds the temporary memory: what stays in a CPU core's cache
# (25 ns an element, against 47 with blocks of a million), what keeps a GPU busy (0.6 GB).
_BLOCK = {"cpu": 1 << 16, "cuda": 1 << 24}
_LOW_32 = (1 << 32) - 1
EMBEDDING = "embedding.word_embeddings.weight"
EMBEDDING_NORM = 0.1  # of X-MoE's expert embeddings


@dataclass(frozen=True)
class Scale:
    """Distribution of one block of rows: N(0, std²), or U(-std·√3, std·√3) when uniform."""

    std: float
    uniform: bool = False


@torch.no_grad()
def initialize_weights(chunks: list[MegatronModule], model: ModelConfig, seed: int) -> None:
    """Fill the parameters of this rank's model chunks in place."""
    for chunk in chunks:
        for name, parameter in global_parameters(chunk):
            _fill(parameter, name, model, seed)


def global_parameters(chunk: MegatronModule) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(name, parameter) with the layer's number in the whole model instead of in this stage.

    The last stage's copy of a tied embedding carries the embedding's name, so both copies are
    drawn alike.
    """
    offset = get_transformer_layer_offset(
        chunk.config, chunk.vp_stage, chunk.pg_collection.pp.rank()
    )
    for name, parameter in chunk.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(int(parts[2]) + offset)
        if getattr(parameter, "shared_embedding", False):
            yield EMBEDDING, parameter
        else:
            yield ".".join(parts), parameter


def weight_scale(name: str, model: ModelConfig) -> list[tuple[int, Scale]]:
    """Scales of a weight matrix as repeating blocks of rows: [(rows, scale), ...].

    Fans are those of each separate matrix (query, key and value apart; gate and up apart; each
    expert by itself), unsharded. megatron-core stores query, key and value interleaved by query
    group, which is why a pattern of rows is needed at all.
    """
    h, heads = model.hidden_size, model.num_attention_heads
    groups = model.num_query_groups or heads
    d = model.kv_channels or h // heads
    gain = initial_gain(model.layer_norm_placement, model.num_layers)
    if name.endswith("linear_qkv.weight"):
        queries = heads // groups * d  # rows of one group
        return [
            (queries, _scale(model, h, heads * d, 1.0)),
            (d, _scale(model, h, groups * d, 1.0)),
            (d, _scale(model, h, groups * d, gain)),
        ]
    if name.endswith("linear_proj.weight"):
        return [(h, _scale(model, heads * d, h, gain, output=True))]
    if name.endswith(("fc1.weight", "fc1_weight")):
        ffn, gated = _ffn_width(name, model), model.activation is Activation.swiglu
        # TorchScale's filter is by name ("fc1", "fc2", ...), which its GLU's "gate" escapes
        gate = 1.0 if model.init_method is InitMethod.torchscale else gain
        blocks = [(ffn, _scale(model, h, ffn, gate))] if gated else []
        return [*blocks, (ffn, _scale(model, h, ffn, gain))]
    if name.endswith(("fc2.weight", "fc2_weight")):
        return [(h, _scale(model, _ffn_width(name, model), h, gain, output=True))]
    if name in (EMBEDDING, "output_layer.weight"):
        # N(0, 1/h), the convention of fairseq and TorchScale; with a final layer norm the first
        # logits then have unit variance
        std = model.init_method_std if model.init_method is InitMethod.normal else h**-0.5
        return [(1, Scale(std))]
    if (router := _ROUTER.search(name)) is not None:
        return [(1, _router_scale(router[1], model))]
    raise ValueError(f"no initial scale is known for the parameter {name!r}")


_ROUTER = re.compile(r"\.router\.(\w+)$")


def _router_scale(parameter: str, model: ModelConfig) -> Scale:
    """The papers do not say how routers start. `expert_embeddings` and `wg` are shaped afterwards
    (`_shape_rows`): only the directions of what is drawn here stay."""
    experts, h = model.moe.num_experts, model.hidden_size
    xmoe_gate = model.moe.router is RouterType.torchscale_xmoe
    if parameter == "expert_embeddings" or (parameter == "wg" and xmoe_gate):
        return Scale(1.0)
    if parameter in ("wg", "wg_reduction"):  # nn.Linear's default
        return Scale(1 / math.sqrt(3 * h), uniform=True)
    outputs = model.moe.dim if parameter == "projection" else experts
    return _scale(model, h, outputs, 1.0)


def _ffn_width(name: str, model: ModelConfig) -> int:
    if ".shared_experts." in name:
        return model.moe.shared_expert_intermediate_size
    return model.expert_ffn_hidden_size if ".experts." in name else model.ffn_hidden_size


def _scale(
    model: ModelConfig, fan_in: int, fan_out: int, gain: float, *, output: bool = False
) -> Scale:
    if model.init_method is InitMethod.torchscale:
        # nn.Linear's default, U(-1/sqrt(fan_in), 1/sqrt(fan_in)): its reset_parameters with
        # Xavier is never called
        return Scale(gain / math.sqrt(3 * fan_in), uniform=True)
    if model.init_method is InitMethod.xavier_normal:
        return Scale(gain * math.sqrt(2 / (fan_in + fan_out)))
    std = model.init_method_std * gain
    if output and model.layer_norm_placement is LayerNormPlacement.pre_ln:
        std /= math.sqrt(2 * model.num_layers)  # GPT-2's scaling of residual projections
    return Scale(std)


def bias_scale(name: str, model: ModelConfig) -> list[tuple[int, Scale]] | None:
    """Scales of a bias vector, or None for zeros (the papers are silent; zero is customary).

    TorchScale keeps nn.Linear's uniform biases, and its gain, being applied by parameter name,
    multiplies them too.
    """
    if model.init_method is not InitMethod.torchscale:
        return None
    weight = name.removesuffix("bias") + "weight"
    return weight_scale(weight, model)


def counter_normal(key: int, index: Tensor) -> Tensor:
    """Standard normal numbers for int64 counters of any shape: fp32 of that shape."""
    high, low = _hash_halves(key, index)
    radius = torch.sqrt(-2.0 * torch.log(high))
    return radius * torch.cos(2 * math.pi * low)


def counter_uniform(key: int, index: Tensor) -> Tensor:
    """Numbers in (-1, 1) for int64 counters of any shape: fp32 of that shape."""
    high, _ = _hash_halves(key, index)
    return 2 * high - 1


def parameter_key(seed: int, name: str) -> int:
    """The parameter's own 64-bit key."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _hash_halves(key: int, index: Tensor) -> tuple[Tensor, Tensor]:
    """SplitMix64's finaliser; both 32-bit halves mapped to the open interval (0, 1)."""
    z = index * -7046029254386353131 + key  # 0x9E3779B97F4A7C15 as a signed number; wraps
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685  # 0x94D049BB133111EB
    z = z ^ ((z >> 31) & 0x1FFFFFFFF)
    high = ((z >> 32) & _LOW_32).float().add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    low = (z & _LOW_32).float().add_(0.5).mul_(2.0**-32)
    return high, low


def _fill(parameter: torch.nn.Parameter, name: str, model: ModelConfig, seed: int) -> None:
    if "norm" in name:
        parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        return
    if name.endswith("router.temperature"):
        parameter.fill_(model.moe.temperature)
        return
    is_bias = name.endswith("bias")
    pattern = bias_scale(name, model) if is_bias else weight_scale(name, model)
    if pattern is None:
        parameter.zero_()
        return
    # a bias is a matrix of one column; of more than two dimensions all but the last make the rows
    value = parameter.data[..., None] if is_bias else parameter.data
    places = [_global_index(parameter, dim) for dim in range(parameter.dim())]
    sizes = [_full_size(parameter, dim) for dim in range(parameter.dim())]
    columns, width = places[-1], sizes[-1]
    if is_bias:
        columns, width = torch.zeros(1, dtype=torch.int64, device=parameter.device), 1
    else:
        places, sizes = places[:-1], sizes[:-1]
    rows = places[0]
    for place, size in zip(places[1:], sizes[1:], strict=True):
        rows = (rows[:, None] * size + place).flatten()
    local = value.view(rows.numel(), columns.numel())
    std, uniform = _per_row(pattern, rows)
    key = parameter_key(seed, name)
    step = max(1, _BLOCK[parameter.device.type] // max(1, columns.numel()))
    for start in range(0, rows.numel(), step):
        block = rows[start : start + step]
        index = block[:, None] * width + columns[None]
        if uniform:
            values = counter_uniform(key, index) * math.sqrt(3)
        else:
            values = counter_normal(key, index)
        local[start : start + step].copy_(values * std[start : start + step, None])
    _shape_rows(parameter, name, model)


def _shape_rows(parameter: torch.nn.Parameter, name: str, model: ModelConfig) -> None:
    """What a router's expert embeddings, which every rank holds whole, are made into.

    X-MoE: rows of norm 0.1 (arXiv 2204.09179, "Implementation Tips"). TorchScale's use_xmoe: what
    torch.nn.init.orthogonal_ with gain 0.32 makes of them.
    """
    if name.endswith("router.expert_embeddings"):
        parameter.copy_(EMBEDDING_NORM * F.normalize(parameter.double(), dim=-1))
    elif name.endswith("router.wg") and model.moe.router is RouterType.torchscale_xmoe:
        drawn = parameter.double()
        tall = drawn.shape[0] > drawn.shape[1]
        q, r = torch.linalg.qr(drawn if tall else drawn.t())
        q = q * r.diagonal().sign()
        parameter.copy_(0.32 * (q if tall else q.t()))


def _per_row(pattern: list[tuple[int, Scale]], rows: Tensor) -> tuple[Tensor, bool]:
    period = sum(count for count, _ in pattern)
    table = torch.cat([torch.full((count,), scale.std) for count, scale in pattern])
    return table.to(rows.device)[rows % period], pattern[0][1].uniform


def _sharding(parameter: torch.nn.Parameter, dim: int) -> tuple[int, int, int]:
    """(size, rank, stride) of the sharding of `dim`: over how many ranks, which one this is.

    `shards`, where a parameter has it (experts), names each sharded dimension; otherwise
    megatron-core's attributes name one, over the tensor-parallel ranks.
    """
    if (shards := getattr(parameter, "shards", None)) is not None:
        return *shards.get(dim, (1, 0)), 1
    sharded = getattr(parameter, "tensor_model_parallel", False)
    if not sharded or parameter.partition_dim != dim:  # type: ignore[attr-defined]
        return 1, 0, 1
    return (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
        parameter.partition_stride,  # type: ignore[attr-defined]
    )


def _full_size(parameter: torch.nn.Parameter, dim: int) -> int:
    return parameter.shape[dim] * _sharding(parameter, dim)[0]


def _global_index(parameter: torch.nn.Parameter, dim: int) -> Tensor:
    """Positions in the full tensor of this rank's slices along `dim`.

    With stride k the full dimension is k parts (gate and up), each sharded by itself.
    """
    size, rank, stride = _sharding(parameter, dim)
    full = torch.arange(_full_size(parameter, dim), device=parameter.device)
    return torch.cat(full.chunk(size * stride)[rank::size])

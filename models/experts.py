"""Experts of a sparse layer: feed-forward networks whose weights lie stacked in one parameter.

Expert i maps a token x, whose gate (routing probability) is p, to

    p · (W2_i · Norm_i(σ(W1_i x + a_i)) + c_i)

Norm_i is Magneto's sub-LayerNorm (arXiv 2210.06423 section 3.1) over the expert's full width, there
only with `sub_layernorm`. σ is GELU, or SwiGLU (arXiv 2002.05202), where W1 holds gate and up.
megatron-core multiplies the gate on before W2; a norm would cancel it there, and with it the
router's gradient, so here it comes last.

Shapes: T rows sorted by expert, e experts on this rank, h hidden, f an expert's width, n = f/etp
what this rank has of it, g matrices in W1 (2 with SwiGLU).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.config import LayerNormPlacement, ModelConfig
from models.feed_forward import gelu, swiglu
from parallel.grouped_linear import (
    Block,
    GradientSum,
    add_to_groups,
    blocks_of,
    grouped_matmul,
    sum_groups,
)
from parallel.megatron import (
    MegatronModule,
    ModuleSpec,
    ProcessGroupCollection,
    ShardedTensor,
    TransformerConfig,
)
from parallel.norm import is_rms_norm, normalize, parameter_device
from parallel.sub_layernorm import ShardedNorm
from parallel.weight_gradient import fused_main_grad

# On a CPU rows are worked off in blocks of this many elements of an expert's activation. Smaller
# ones cost more in matmuls than they save in the cache (f = 1024: 1.3 times the CPU-seconds with an
# eighth of it), larger ones only take more memory.
BLOCK_ELEMENTS = 1 << 20


def expert_spec(model: ModelConfig) -> ModuleSpec:
    """The experts that `model` asks for, for `models.moe_layer.MoELayer` to build."""
    params: dict[str, Any] = {
        "sub_layernorm": model.layer_norm_placement is LayerNormPlacement.sub_ln,
        "frozen": model.moe.freeze_routing,
    }
    if model.moe.sparse_after_layer:
        params["sublayers"] = model.moe.stacked_sublayers
        return ModuleSpec(module=StackedExperts, params=params)
    return ModuleSpec(module=ExpertFeedForward, params=params)


class ExpertFeedForward(MegatronModule):
    """One feed-forward sublayer of each of this rank's experts; see the module's docstring.

    Parameters: `fc1_weight` [e, g, n, h], `fc2_weight` [e, h, n]; with `config.add_bias_linear`
    `fc1_bias` [e, g, n] and `fc2_bias` [e, h/etp]; with `sub_layernorm` `norm_weight` [e, n] and,
    unless it is an RMSNorm, `norm_bias`; with `input_norm`, which normalises x first,
    `input_norm_weight` [e, h] and `input_norm_bias`. Each has `shards`: axis -> (number of pieces
    that the tensor of all experts, [E, ...], is cut into along it, which of them is here).
    Weights are left unset: models.initialize draws them. `frozen` ones take no gradient.

    Raises ValueError for an activation other than those two, for widths that
    expert_tensor_parallel_size does not divide, and for an input norm with it above 1.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        *,
        sub_layernorm: bool,
        frozen: bool = False,
        input_norm: bool = False,
    ) -> None:
        super().__init__(config)
        self.expert_tp_group = pg_collection.expt_tp
        self.expert_dp_group = pg_collection.expt_dp
        etp, rank = self.expert_tp_group.size(), self.expert_tp_group.rank()
        _check(config, etp, input_norm)
        self.num_local_experts, self.frozen = num_local_experts, frozen
        self._experts = (pg_collection.ep.size(), pg_collection.ep.rank())
        h, n = config.hidden_size, config.moe_ffn_hidden_size // etp
        g = 2 if config.gated_linear_unit else 1
        self.rms = is_rms_norm(config)
        # each expert-tensor rank adds its own part of the second bias to its summand of the output
        self.bias_columns = slice(rank * (h // etp), (rank + 1) * (h // etp))

        self.fc1_weight = self._parameter(g, n, h, axis=2)
        self.fc2_weight = self._parameter(h, n, axis=2)
        bias = config.add_bias_linear
        self.fc1_bias = self._parameter(g, n, axis=2, fill=0.0) if bias else None
        self.fc2_bias = self._parameter(h // etp, axis=1, fill=0.0) if bias else None
        self.norm_weight = self.norm_bias = None
        if sub_layernorm:
            self.norm_weight = self._parameter(n, axis=1, fill=1.0)
            self.norm_bias = None if self.rms else self._parameter(n, axis=1, fill=0.0)
        self.input_norm_weight = self.input_norm_bias = None
        if input_norm:
            self.input_norm_weight = self._parameter(h, fill=1.0)
            self.input_norm_bias = None if self.rms else self._parameter(h, fill=0.0)

    def _parameter(self, *shape: int, axis: int = 0, fill: float | None = None) -> nn.Parameter:
        """[e, *shape], cut into experts along axis 0 and by expert-tensor ranks along `axis`."""
        place = {"dtype": self.config.params_dtype, "device": parameter_device(self.config)}
        value = torch.empty(self.num_local_experts, *shape, **place)
        made: Any = nn.Parameter(value if fill is None else value.fill_(fill))
        made.requires_grad = not self.frozen
        made.allreduce = False  # its gradient is summed over the expert-data-parallel group
        # What the gradient norm counts on every rank: no two ranks of a model replica share experts
        made.tensor_model_parallel, made.partition_dim, made.partition_stride = True, axis, 1
        made.shards = {0: self._experts}
        if axis:
            made.shards[axis] = (self.expert_tp_group.size(), self.expert_tp_group.rank())
        if fill is not None:
            made.no_weight_decay = True
        return made

    def forward(
        self, x: Tensor, tokens_per_expert: Tensor | Sequence[int], gates: Tensor | None
    ) -> tuple[Tensor, None]:
        """Rows x [T, h] and their gates [T] (None: 1) -> [T, h], a summand of it where etp > 1.

        `tokens_per_expert` [e] is read on the host.
        """
        rows = _as_list(tokens_per_expert)
        if self.input_norm_weight is not None:
            norm = (self.input_norm_weight, self.input_norm_bias)
            x = _grouped_norm(x, *norm, rows, self.config.layernorm_epsilon, self.rms)
        out = _FeedForward.apply(
            *(x, gates, self.fc1_weight, self.fc1_bias, self.norm_weight, self.norm_bias),
            *(self.fc2_weight, self.fc2_bias, rows, self),
        )
        return out, None

    def activation_and_norm(
        self, u: Tensor, g: Tensor | None, b: Tensor | None, rows: Sequence[int]
    ) -> Tensor:
        """Norm_i(σ(u_i)) [t, n] for rows u [t, g n] of the groups that g and b [e, n] belong to."""
        a = swiglu(u) if self.config.gated_linear_unit else gelu(u)
        if g is None:
            return a
        group = self.expert_tp_group
        return _grouped_norm(a, g, b, rows, self.config.layernorm_epsilon, self.rms, group)

    def blocks(self, rows: Sequence[int]) -> list[Block]:
        """How the rows are worked off: see `_FeedForward`.

        With one block the norm's statistics take one all-reduce of the expert-tensor group.
        """
        whole = self.fc1_weight.is_cuda or self.expert_tp_group.size() > 1
        limit = None if whole else max(64, BLOCK_ELEMENTS // self.fc2_weight.shape[-1])
        return list(blocks_of(rows, limit))

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Each parameter as a piece of the tensor of all experts, which any layout can read."""
        ahead = len(sharded_offsets)
        state = {}
        for name, parameter in self.named_parameters():
            shards: dict[int, tuple[int, int]] = parameter.shards
            state[prefix + name] = ShardedTensor.from_rank_offsets(
                prefix + name,
                parameter,
                *sharded_offsets,
                *((ahead + axis, place, pieces) for axis, (pieces, place) in shards.items()),
                replica_id=(0, 0, self.expert_dp_group.rank()),
                prepend_axis_num=ahead,
            )
        return state


class StackedExperts(MegatronModule):
    """Experts of several feed-forward sublayers with residuals (arXiv 2204.09179 section 4.1).

    x_j = x_{j-1} + ffn_j(norm_j(x_{j-1})), each expert with norms of its own. The result is
    p · (x_last - x_0), to which the layer around it adds x_0.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        *,
        sublayers: int,
        sub_layernorm: bool,
        frozen: bool = False,
    ) -> None:
        super().__init__(config)
        self.sublayers = nn.ModuleList(
            ExpertFeedForward(
                num_local_experts,
                config,
                pg_collection,
                sub_layernorm=sub_layernorm,
                frozen=frozen,
                input_norm=True,
            )
            for _ in range(sublayers)
        )

    def forward(
        self, x: Tensor, tokens_per_expert: Tensor | Sequence[int], gates: Tensor
    ) -> tuple[Tensor, None]:
        """As `ExpertFeedForward.forward`."""
        rows = _as_list(tokens_per_expert)
        added, _ = self.sublayers[0](x, rows, None)
        for sublayer in self.sublayers[1:]:
            added = added + sublayer(x + added, rows, None)[0]
        return (added * gates.unsqueeze(-1)).to(x.dtype), None

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """That of each sublayer; megatron-core's own does not look into a ModuleList."""
        state: dict[str, Any] = {}
        for index, sublayer in enumerate(self.sublayers):
            assert isinstance(sublayer, ExpertFeedForward)
            place = f"{prefix}sublayers.{index}."
            state |= sublayer.sharded_state_dict(place, sharded_offsets, metadata)
        return state


def _check(config: TransformerConfig, etp: int, input_norm: bool) -> None:
    wanted = F.silu if config.gated_linear_unit else F.gelu
    if config.activation_func is not wanted:
        raise ValueError(
            f"activation_func={config.activation_func.__name__} with gated_linear_unit="
            f"{config.gated_linear_unit}: experts have gelu, or silu with gated_linear_unit=True."
        )
    sizes = {"hidden_size": config.hidden_size, "moe_ffn_hidden_size": config.moe_ffn_hidden_size}
    for name, size in sizes.items():
        if size % etp:
            raise ValueError(
                f"{name}={size} must be a multiple of expert_tensor_parallel_size={etp}; change "
                "one of them."
            )
    if input_norm and etp > 1:
        raise ValueError(
            f"expert_tensor_parallel_size={etp}: stacked experts need whole tokens between their "
            "sublayers; use expert_tensor_parallel_size=1."
        )


def _as_list(tokens_per_expert: Tensor | Sequence[int]) -> Sequence[int]:
    if isinstance(tokens_per_expert, Tensor):
        return tokens_per_expert.tolist()  # with CUDA the host waits, if they are not on it already
    return tokens_per_expert


def _grouped_norm(
    x: Tensor,
    g: Tensor,
    b: Tensor | None,
    rows: Sequence[int],
    eps: float,
    rms: bool,
    tp_group: Any = None,
) -> Tensor:
    """Norm of x [t, n] with gains g [e, n] and biases b of each row's group.

    With a `tp_group` of several ranks each has n of the width's columns.
    """
    whole = tp_group is None or tp_group.size() == 1
    if whole and len(rows) == 1:
        return normalize(x, g[0], None if b is None else b[0], eps, rms)
    if not whole:
        one, zero = x.new_ones(x.shape[1]), None if rms else x.new_zeros(x.shape[1])
        x = ShardedNorm.apply(x, one, zero, eps, rms, False, tp_group)
    normalized = []
    for x_i, g_i, b_i in zip(x.split(rows), g, [None] * len(g) if b is None else b, strict=True):
        if whole:
            normalized.append(normalize(x_i, g_i, b_i, eps, rms))
        else:
            normalized.append(x_i * g_i if b_i is None else torch.addcmul(b_i, x_i, g_i))
    return torch.cat(normalized)


# ---- autograd ----------------------------------------------------------------------------------


class _FeedForward(torch.autograd.Function):
    """The experts' feed-forward as one function of rows, gates and parameters.

    Kept for the backward pass: the input, the rows before the activation, and those before the
    gate; activation and norm are evaluated again. On a CPU the rows are worked off in blocks of one
    expert, so that beside what is kept nothing of an expert's width exists for all rows. On a GPU,
    and where the norm's statistics span several ranks, there is one block.
    """

    @staticmethod
    def forward(ctx, x, gates, w1, b1, g, b, w2, b2, rows, owner):  # type: ignore[no-untyped-def]
        x = x.contiguous()
        matrix_1, bias_1 = _as_matrices(w1, b1)
        kept = []
        out = torch.empty_like(x)
        y = out if gates is None else torch.empty_like(x)
        blocks = owner.blocks(rows)
        for block in blocks:
            span, of, n = block
            u = grouped_matmul(x[span], matrix_1[of].transpose(1, 2), n)
            add_to_groups(u, _some(bias_1, of), n)
            kept.append(u)
            z = owner.activation_and_norm(u, _some(g, of), _some(b, of), n)
            grouped_matmul(z, w2[of].transpose(1, 2), n, out=y[span])
            add_to_groups(y[span, owner.bias_columns], _some(b2, of), n)
            if gates is not None:
                torch.mul(y[span], gates[span, None], out=out[span])
        ungated = None if gates is None else y
        ctx.save_for_backward(x, gates, ungated, w1, b1, g, b, w2, b2, *kept)
        ctx.blocks, ctx.owner = blocks, owner
        fusion = owner.config.gradient_accumulation_fusion
        ctx.main_grads = fused_main_grad(w1, fusion), fused_main_grad(w2, fusion)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):  # type: ignore[no-untyped-def]
        x, gates, y, w1, b1, g, b, w2, b2, *kept = ctx.saved_tensors
        owner, d_out = ctx.owner, d_out.contiguous()
        matrix_1, _ = _as_matrices(w1, b1)
        dw1, dw2 = (GradientSum(w, m) for w, m in zip((w1, w2), ctx.main_grads, strict=True))
        db1, dg, db, db2 = (GradientSum(p) for p in (b1, g, b, b2))
        dx = torch.empty_like(x)
        dgates = None if gates is None else torch.empty_like(gates)
        for block, u in zip(ctx.blocks, kept, strict=True):
            span, of, n = block
            leaves = [_leaf(u), _leaf(_some(g, of)), _leaf(_some(b, of))]
            with torch.enable_grad():
                z = owner.activation_and_norm(*leaves, n)
            dy = d_out[span]
            if dgates is not None:
                dgates[span] = (dy.float() * y[span]).sum(
                    -1
                )  # fp32 products: all a router learns from
                dy = (dy * gates[span, None]).to(x.dtype)
            dz = grouped_matmul(dy, w2[of], n)
            du, *d_norm = torch.autograd.grad(z, [p for p in leaves if p is not None], dz)
            grouped_matmul(du, matrix_1[of], n, out=dx[span])
            dw1.add_product(block, x[span], du)
            dw2.add_product(block, z.detach(), dy)
            for total, gradient in zip((dg, db), d_norm, strict=False):
                total.add(block, gradient)
            if b1 is not None:
                db1.add(block, sum_groups(du, n))
                db2.add(block, sum_groups(dy[:, owner.bias_columns], n))
        parameters = [total.result() for total in (dw1, db1, dg, db, dw2, db2)]
        return dx, dgates, *parameters, None, None


def _as_matrices(w1: Tensor, b1: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The first layer's weight as [e, g n, h] and its bias as [e, g n]."""
    return w1.flatten(1, 2), None if b1 is None else b1.flatten(1)


def _some(parameter: Tensor | None, groups: slice) -> Tensor | None:
    return None if parameter is None else parameter[groups]


def _leaf(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().requires_grad_()

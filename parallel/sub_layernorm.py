"""Row-parallel linear with a norm over its full, sharded input width in front.

Magneto's sub-LayerNorm (arXiv 2210.06423, section 3.1) stands before the output projection of
attention and before the second linear of the feed-forward network, where tensor parallelism has
cut the width N into P shards of n. Its statistics span all shards. Three ways to obtain them:

P = 1. Norm and product in one autograd function that keeps only the norm's input.

"folded". Centring and scaling are linear in a token, so they can follow the product. With m_p the
mean of shard p and s_p its standard deviation, each known on its rank,

    A_p = W_p (g_p ⊙ (x_p - m_p))        u_p = W_p g_p        c_p = W_p b_p
    y   = r [Σ_p A_p + Σ_p (m_p - μ) u_p] + Σ_p c_p           r = 1 / sqrt(σ² + eps)

where μ and σ² follow from the m_p and s_p. Everything rides on the one all-reduce (under sequence
parallelism: reduce-scatter) the layer makes anyway: m_p and s_p² as columns beside A_p, u_p and
Σ c_p as rows below it. Subtracting m_p before the product rather than μ u after it is what makes
this hold in bf16: |m_p - μ| is at most sqrt(P - 1) σ, so a mean far from zero cancels in fp32,
inside the norm kernel, and never as a difference of rounded products. Measured (bf16, P = 4,
N = 512, relative error of y): 3.6e-3 at |μ| = 0, 10 and 100 σ, where the normalise-first form has
3.5e-3, and subtracting μ u after the product 2.9e-3, 2.7e-2 and 0.27. RMSNorm (arXiv 1910.07467)
has no means: y = r Σ_p A_p.

The backward pass is that of a norm and a linear, but for the two means over the full width, which
become dot products over the output width: with dz = Wᵀ dy, u = Σ u_p and c = Σ c_p,

    Σ_N g ⊙ dz = dy · u        Σ_N g ⊙ dz ⊙ x̂ = dy · (y - c)

so it needs no collective. Under sequence parallelism each rank has y for its own tokens only;
four numbers a token then ride on the all-gather of dy that the layer makes anyway. The price is
that y is kept for the backward pass.

"all_reduce". Statistics by an all-reduce of their own, forward and backward, then the plain
row-parallel linear, which keeps the normalised input as well.

The names in equations are those in the code. Shapes: t tokens (t/P where a sequence-parallel rank
has only its own), n = N/P input width here, h output width, P tensor-parallel ranks.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from parallel.collectives import all_gather, reduce_scatter
from parallel.compiled import Compilable
from parallel.config import SubLayerNormReduction
from parallel.megatron import (
    RowParallelLinear,
    TransformerConfig,
    make_sharded_tensors_for_checkpoint,
    set_tensor_model_parallel_attributes,
)
from parallel.norm import is_compiled, is_rms_norm, normalize
from parallel.weight_gradient import fused_main_grad, matmul_in_fp32, weight_gradient

# Rows of the reduced buffer start on multiples of this, for vectorised kernels and copies.
ALIGNMENT_BYTES = 16


class SubLayerNormRowParallelLinear(RowParallelLinear):
    """y = W · Norm(x) + bias, with x sharded over the tensor-parallel ranks along its last axis.

    A drop-in for megatron-core's linear_proj and linear_fc2: same constructor, and forward maps
    [s, b, N/P] to ([s, b, h] or under sequence parallelism [s/P, b, h], bias or None). All ranks
    of `tp_group` must call it. Besides RowParallelLinear's parameters it has `norm_weight` and,
    for LayerNorm, `norm_bias`, both [N/P] and sharded.

    `config.normalization`, `config.layernorm_epsilon` and `config.sub_layernorm_reduction`
    ("folded" unless set; see the module's docstring) choose the norm and how it is computed.

    Collectives: "folded" makes those of RowParallelLinear and no other; "all_reduce" one more
    forward and one more backward.

    Experts have a sub-LayerNorm of their own form (models/experts.py).

    Raises ValueError for expert layers, an input that is not sharded, and unknown settings.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        input_is_parallel: bool = True,
        is_expert: bool = False,
        **arguments: Any,
    ) -> None:
        if is_expert:
            raise ValueError(
                "is_expert=True: this norm would cancel the routing probability, which "
                "megatron-core's experts multiply on before their second linear; use the experts "
                "of models/experts.py, which multiply it on after it."
            )
        if not input_is_parallel:
            raise ValueError(
                "input_is_parallel=False: the norm works on the shards a column-parallel layer "
                "leaves; set input_is_parallel=True."
            )
        super().__init__(
            input_size,
            output_size,
            config=config,
            input_is_parallel=input_is_parallel,
            is_expert=is_expert,
            **arguments,
        )
        self.rms = is_rms_norm(config)
        self.eps = config.layernorm_epsilon
        self.compiled = is_compiled(config)
        self.reduction = _reduction(config)
        shard = {"dtype": self.weight.dtype, "device": self.weight.device}
        n = self.input_size_per_partition
        self.norm_weight = nn.Parameter(torch.ones(n, **shard))
        self.norm_bias = None if self.rms else nn.Parameter(torch.zeros(n, **shard))
        for parameter in (self.norm_weight, self.norm_bias):
            if parameter is not None:
                set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)
                # a dense parameter to the data-parallel reduction
                parameter.allreduce = True  # type: ignore[attr-defined]

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        norm = (self.norm_weight, self.norm_bias, self.eps, self.rms, self.compiled)
        if self.tp_group.size() == 1:
            y = _NormLinear.apply(input_, self.weight, *norm, self.gradient_accumulation_fusion)
        elif self.reduction is SubLayerNormReduction.folded:
            y = _FoldedNormLinear.apply(
                input_,
                self.weight,
                *norm,
                self.gradient_accumulation_fusion,
                self.sequence_parallel,
                self.tp_group,
            )
        else:
            return super().forward(ShardedNorm.apply(input_, *norm, self.tp_group))
        if self.skip_bias_add:
            return y, self.bias
        return (y if self.bias is None else y + self.bias), None

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The weight sharded along axis 1, the norm's parameters along axis 0, the bias whole."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 1, "norm_weight": 0, "norm_bias": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )


def _reduction(config: TransformerConfig) -> SubLayerNormReduction:
    value = getattr(config, "sub_layernorm_reduction", SubLayerNormReduction.folded)
    try:
        return SubLayerNormReduction(value)
    except ValueError:
        choices = ", ".join(choice.value for choice in SubLayerNormReduction)
        raise ValueError(f"sub_layernorm_reduction={value}: must be one of {choices}.") from None


# ---- mathematics on local tensors --------------------------------------------------------------


def shard_statistics(x: Tensor, rms: bool) -> Tensor:
    """Of each row of x [t, n]: mean and variance, or with `rms` the mean square; [t, 2 or 1]."""
    if rms:  # one pass, with no copy of x in fp32
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return norm.square() / x.shape[-1]
    variance, mean = torch.var_mean(x.float(), -1, correction=0)
    return torch.stack([mean, variance], -1)


def combine_statistics(statistics: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean [t] and 1 / sqrt(variance + eps) [t] of rows cut into P equal shards.

    `statistics` is [t, P, 2 or 1], what `shard_statistics` gives for each shard; with mean squares
    the mean returned is 0. The variance is that within shards plus that between their means
    (Chan, Golub and LeVeque 1983), which does not cancel as E[x²] - E[x]² does.
    """
    if statistics.shape[-1] == 1:
        mean_square = statistics[..., 0].mean(-1)
        return torch.zeros_like(mean_square), torch.rsqrt(mean_square + eps)
    shard_mean, shard_variance = statistics.unbind(-1)
    mean = shard_mean.mean(-1)
    variance = (shard_variance + (shard_mean - mean.unsqueeze(-1)).square()).mean(-1)
    return mean, torch.rsqrt(variance + eps)


def standardize(x: Tensor, mean: Tensor, rstd: Tensor, rms: bool) -> Tensor:
    """x̂ = (x - mean) · rstd in fp32; x is [t, n], mean and rstd [t]."""
    if rms:
        return x * rstd.unsqueeze(-1)
    return (x - mean.unsqueeze(-1)).mul_(rstd.unsqueeze(-1))


def scale_and_shift(x_hat: Tensor, g: Tensor, b: Tensor | None, dtype: torch.dtype) -> Tensor:
    """z = g ⊙ x̂ + b, rounded to `dtype`."""
    z = torch.empty_like(x_hat, dtype=dtype)
    if b is None:
        return torch.mul(x_hat, g, out=z)
    return torch.addcmul(b.float(), x_hat, g.float(), out=z)


def norm_input_gradient(
    g_dz: Tensor, x_hat: Tensor, rstd: Tensor, mean_1: Tensor, mean_2: Tensor, rms: bool
) -> Tensor:
    """dx = rstd · (g dz - mean_1 - x̂ mean_2), in place of both g_dz and x̂ [t, n], in fp32.

    mean_1 and mean_2 [t] are the means of g ⊙ dz and g ⊙ dz ⊙ x̂ over the full width; an RMSNorm
    has no mean_1.
    """
    g_dz.sub_(x_hat.mul_(mean_2.unsqueeze(-1)))
    if not rms:
        g_dz.sub_(mean_1.unsqueeze(-1))
    return g_dz.mul_(rstd.unsqueeze(-1))


@Compilable
def normalize_shard(
    x: Tensor, mean: Tensor, rstd: Tensor, g: Tensor, b: Tensor | None, rms: bool
) -> Tensor:
    """g ⊙ x̂ + b in x's type; x is [t, n], mean and rstd [t], g and b [n]."""
    return scale_and_shift(standardize(x, mean, rstd, rms), g, b, x.dtype)


@Compilable
def shard_gradients(
    dz: Tensor,
    x: Tensor,
    g: Tensor,
    mean: Tensor,
    rstd: Tensor,
    mean_1: Tensor,
    mean_2: Tensor,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dx [t, n], dg [n] and db [n] of `normalize_shard`; mean_1 and mean_2 as above.

    x̂ is computed once more, so that nothing lies in memory while the weight's gradient is taken.
    """
    x_hat = standardize(x, mean, rstd, rms)
    dg = (dz * x_hat).sum(0).to(g.dtype)
    dx = norm_input_gradient(dz.float() * g, x_hat, rstd, mean_1, mean_2, rms)
    return dx.to(x.dtype), dg, None if rms else dz.sum(0)


def split_exactly(values: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 values [...] as sums of `dtype` values [..., pieces]: one in fp32, three in bf16.

    Three 8-bit significands hold the 24 bits of an fp32 one. Adding zeros to the pieces leaves
    them as they are, so they pass a reduction in which every other rank contributes zero.
    """
    pieces = []
    for _ in range(1 if dtype == torch.float32 else 3):
        pieces.append(values.to(dtype))
        values = values - pieces[-1].float()
    return torch.stack(pieces, -1)


def folded_partial(
    x: Tensor,
    weight: Tensor,
    g: Tensor,
    b: Tensor | None,
    eps: float,
    rms: bool,
    compiled: bool,
    rank: int,
    ranks: int,
    chunks: int,
) -> Tensor:
    """What one rank contributes to the layer's reduction: [chunks, t/chunks + rows, h + columns].

    Each of the `chunks` equal parts of the tokens (1, or P if a reduce-scatter will hand them out)
    has [A_p | statistics] for its tokens and below them, for LayerNorm, the rows u_0 ... u_{P-1}
    and Σ c_p. Statistics and u have a slot for each rank, which is zero on the others: a sum that
    works as a gather. In bf16 the slots cost 6 P columns (LayerNorm), 3 P (RMSNorm), in fp32 a
    third of that, and P + 1 rows in each chunk.
    """
    t, h = x.shape[0], weight.shape[0]
    if rms:
        statistics = shard_statistics(x, rms)
        std = (statistics + eps).sqrt()
        normalized = normalize(x, g, None, eps, rms, compiled=compiled)
    else:
        # One kernel gives g (x_p - m_p) / s_p, m_p and 1 / s_p. On the CPU these two are in fp32
        # only if the gain is.
        gain = g if x.is_cuda else g.float()
        normalized, mean, rstd = torch.native_layer_norm(x, g.shape, gain, None, eps)
        std = rstd.reciprocal()  # with eps inside, which the variance sent must not have
        statistics = torch.cat([mean, (std.square() - eps).clamp_min_(0)], 1)
    pieces = split_exactly(statistics, x.dtype)
    columns = pieces[0].numel()
    alignment = ALIGNMENT_BYTES // x.element_size()
    width = h + ranks * columns + (-(h + ranks * columns)) % alignment
    rows = 0 if rms else ranks + 1
    buffer = x.new_empty(chunks, t // chunks + rows, width)
    tokens, extra = buffer.split([t // chunks, rows], 1)

    # A_p is scaled back by s_p on the way into the buffer: one rounding, not two
    product = matmul_in_fp32(normalized, weight.t()).view(chunks, -1, h)
    torch.mul(product, std.view(chunks, -1, 1), out=tokens[..., :h])
    slots = tokens[..., h:].zero_()
    slots[..., rank * columns : (rank + 1) * columns] = pieces.view(chunks, -1, columns)
    if b is not None:  # LayerNorm
        extra.zero_()
        u_and_c = weight @ torch.stack([g, b], 1)
        extra[:, rank, :h] = u_and_c[:, 0]
        extra[:, ranks, :h] = u_and_c[:, 1]
    return buffer


def folded_output(
    reduced: Tensor, t: int, h: int, eps: float, rms: bool, ranks: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """From the summed buffer [t + rows, h + columns]: y [t, h], mean and rstd [t], u and c [h]."""
    pieces = 1 if reduced.dtype == torch.float32 else 3
    values = 1 if rms else 2
    slots = reduced[:t, h : h + ranks * values * pieces].float()
    statistics = slots.view(t, ranks, values, pieces).sum(-1)
    mean, rstd = combine_statistics(statistics, eps)
    y = reduced[:t, :h].float() * rstd.unsqueeze(-1)
    if rms:
        return y.to(reduced.dtype), mean, rstd, None, None
    extra = reduced[t:, :h].float()
    from_shard_means = (statistics[..., 0] - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
    factors = torch.cat([from_shard_means, torch.ones_like(mean).unsqueeze(-1)], -1)
    y.addmm_(factors, extra)
    return y.to(reduced.dtype), mean, rstd, extra[:-1].sum(0), extra[-1].clone()


def full_width_means(
    dy: Tensor, y: Tensor, u: Tensor | None, c: Tensor | None, width: int
) -> tuple[Tensor, Tensor]:
    """Means over the full width of g ⊙ dz and of g ⊙ dz ⊙ x̂, from dy and y [t, h]: two [t]."""
    dy = dy.float()
    dy_y = (dy * y).sum(-1)
    if u is None or c is None:
        return torch.zeros_like(dy_y), dy_y / width
    dy_u, dy_c = (dy @ torch.stack([u, c], 1)).unbind(1)
    return dy_u / width, (dy_y - dy_c) / width


# ---- autograd ----------------------------------------------------------------------------------


class _NormLinear(torch.autograd.Function):
    """W · Norm(x) on one rank; keeps x, and normalises it again in the backward pass.

    That spares a tensor of [t, n] for the price of one more pass of the norm kernel.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x, weight, g, b, eps, rms, compiled, gradient_accumulation_fusion
    ):
        ctx.save_for_backward(x, weight, g, b)
        ctx.norm = partial(normalize, eps=eps, rms=rms, compiled=compiled)
        ctx.main_grad = fused_main_grad(weight, gradient_accumulation_fusion)
        return ctx.norm(x, g, b) @ weight.t()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, weight, g, b = ctx.saved_tensors
        inputs = [p.detach().requires_grad_() for p in (x, g, b) if p is not None]
        with torch.enable_grad():
            z = ctx.norm(inputs[0], inputs[1], None if b is None else inputs[2])
        dy = dy.reshape(-1, dy.shape[-1])
        dw = None
        if ctx.needs_input_grad[1]:
            dw = weight_gradient(weight, ctx.main_grad, z.detach().flatten(0, -2), dy)
        dz = (dy @ weight).view_as(x)
        dx, dg, db = (*torch.autograd.grad(z, inputs, dz), None)[:3]
        return dx, dw, dg, db, *(None,) * 4


class _FoldedNormLinear(torch.autograd.Function):
    """The "folded" form of the module's docstring."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        x,
        weight,
        g,
        b,
        eps,
        rms,
        compiled,
        gradient_accumulation_fusion,
        sequence_parallel,
        tp_group,
    ):
        ranks, h = tp_group.size(), weight.shape[0]
        chunks = ranks if sequence_parallel else 1
        if x.shape[0] % chunks:
            raise ValueError(
                f"seq_length={x.shape[0]}: under sequence_parallel it must be a multiple of "
                f"tensor_model_parallel_size={ranks}; change one of them."
            )
        x_2d = x.reshape(-1, x.shape[-1])
        t = x_2d.shape[0] // chunks
        norm = (g, b, eps, rms, compiled)
        buffer = folded_partial(x_2d, weight, *norm, tp_group.rank(), ranks, chunks)
        if sequence_parallel:
            reduced = torch.empty_like(buffer[0])
            reduce_scatter(reduced, buffer.flatten(0, 1), group=tp_group)
        else:
            reduced = buffer[0]
            dist.all_reduce(reduced, group=tp_group)
        y, mean, rstd, u, c = folded_output(reduced, t, h, eps, rms, ranks)
        y = y.view(x.shape[0] // chunks, *x.shape[1:-1], h)
        ctx.save_for_backward(x, weight, g, b, y, mean, rstd, u, c)
        ctx.rms, ctx.compiled = rms, compiled
        ctx.sequence_parallel, ctx.tp_group = sequence_parallel, tp_group
        ctx.main_grad = fused_main_grad(weight, gradient_accumulation_fusion)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, weight, g, b, y, mean, rstd, u, c = ctx.saved_tensors
        ranks, h = ctx.tp_group.size(), weight.shape[0]
        dy = dy.reshape(-1, h)
        means = full_width_means(dy, y.view(-1, h), u, c, ranks * x.shape[-1])
        per_token = torch.stack([mean, rstd, *means], 1)
        if ctx.sequence_parallel:
            dy, per_token = _gather_with_columns(dy, per_token, ctx.tp_group)
        mean, rstd, mean_1, mean_2 = per_token.unbind(1)

        x_2d, dw = x.reshape(-1, x.shape[-1]), None
        if ctx.needs_input_grad[1]:
            z = normalize_shard(ctx.compiled, x_2d, mean, rstd, g, b, ctx.rms)
            dw = weight_gradient(weight, ctx.main_grad, z, dy)
            del z
        dz = dy @ weight
        dx, dg, db = shard_gradients(ctx.compiled, dz, x_2d, g, mean, rstd, mean_1, mean_2, ctx.rms)
        return (dx.view_as(x), dw, dg, db, *(None,) * 6)


class ShardedNorm(torch.autograd.Function):
    """Norm over the full width of x [s, b, N/P]; one all-reduce of [t, 2 P] fp32 numbers (RMSNorm:
    [t, P]) forward and one of [2, t] backward."""

    @staticmethod
    def forward(ctx, x, g, b, eps, rms, compiled, tp_group):  # type: ignore[no-untyped-def]
        x_2d = x.reshape(-1, x.shape[-1])
        mine = shard_statistics(x_2d, rms)
        statistics = mine.new_zeros(mine.shape[0], tp_group.size(), mine.shape[1])
        statistics[:, tp_group.rank()] = mine
        dist.all_reduce(statistics, group=tp_group)
        mean, rstd = combine_statistics(statistics, eps)
        ctx.save_for_backward(x, g, mean, rstd)
        ctx.rms, ctx.tp_group = rms, tp_group
        return normalize_shard(compiled, x_2d, mean, rstd, g, b, rms).view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dz):  # type: ignore[no-untyped-def]
        x, g, mean, rstd = ctx.saved_tensors
        dz = dz.reshape(-1, dz.shape[-1])
        x_hat = standardize(x.reshape(-1, x.shape[-1]), mean, rstd, ctx.rms)
        g_dz = dz.float() * g
        sums = torch.stack([g_dz.sum(-1), (g_dz * x_hat).sum(-1)])
        dist.all_reduce(sums, group=ctx.tp_group)
        mean_1, mean_2 = sums / (ctx.tp_group.size() * x.shape[-1])
        dg = (dz * x_hat).sum(0).to(g.dtype)
        db = None if ctx.rms else dz.sum(0)
        dx = norm_input_gradient(g_dz, x_hat, rstd, mean_1, mean_2, ctx.rms)
        return dx.to(x.dtype).view_as(x), dg, db, *(None,) * 4


def _gather_with_columns(
    dy: Tensor, per_token: Tensor, tp_group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """All ranks' dy [t/P, h] and fp32 columns [t/P, k] in one all-gather: [t, h] and [t, k].

    A gather copies bits, so the columns travel as pairs of bf16 without loss.
    """
    h = dy.shape[1]
    mine = torch.cat([dy, per_token.view(dy.dtype)], 1)
    gathered = mine.new_empty(tp_group.size() * mine.shape[0], mine.shape[1])
    all_gather(gathered, mine, group=tp_group)
    return gathered[:, :h], gathered[:, h:].contiguous().view(torch.float32)

"""Output projection and cross-entropy in one, over a vocabulary sharded across ranks.

The logits of a whole micro-batch are the largest tensor of a language model: 2048 tokens by 32 000
words are 262 MB in fp32, and log-softmax and its backward pass each make another. Here they exist
for one chunk of tokens at a time, and the gradient is taken while they do: for a sum of losses it
needs nothing from later layers but one factor. Nothing is recomputed, so this costs the three
matrix products of the plain form and fewer passes over the logits.

Shapes: t tokens, h hidden size, v vocabulary, P tensor-parallel ranks, c tokens in a chunk.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.collectives import all_gather
from parallel.weight_gradient import (
    accumulate_weight_gradient,
    fused_main_grad,
    gradient_placeholder,
)

# Size of the fp32 logits of one chunk. On the CPU (one AVX-512 core, t = 2048, h = 512, v = 32 000)
# 128 to 2048 tokens all take 1.6 to 1.9 s, 1.5 s of which are the matrix products (F.linear and
# F.cross_entropy: 2.0 s), so memory decides: 32 MiB are 256 tokens, 129 MB at the peak instead of
# 776. On a GPU a chunk must only be long enough to fill the device.
LOGITS_CHUNK_BYTES_CPU = 32 * 2**20
LOGITS_CHUNK_BYTES_GPU = 512 * 2**20
# Logits passed over together by one CPU thread, so that every pass finds them in its L2 cache (of
# 2 MiB, where half of it took three quarters of the time that all of it did).
CPU_CACHE_BYTES = 2**20
# Where a shard's words have less probability than this, it is taken to be this: 1 / it is finite.
SMALLEST_FACTOR = 1e-30


def default_chunk_tokens(vocabulary_shard: int, device: torch.device) -> int:
    """Tokens whose fp32 logits over this rank's part of the vocabulary fill the chunk budget."""
    budget = LOGITS_CHUNK_BYTES_GPU if device.type == "cuda" else LOGITS_CHUNK_BYTES_CPU
    tokens = budget // (4 * vocabulary_shard)
    return max(128, tokens - tokens % 128)


def vocab_parallel_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_mask: Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    chunk_tokens: int | None = None,
    gradient_accumulation_fusion: bool = True,
    accumulate_in_forward: bool = False,
) -> tuple[Tensor, Tensor]:
    """Masked sum of the cross-entropy of softmax(hidden · weightᵀ) over the whole vocabulary.

    Every rank of `tp_group` (None: no sharding) must call it with the same `hidden`, `labels` and
    `loss_mask` and its own rows of the weight, rank r holding words r·v/P to (r+1)·v/P.

    Args:
        hidden: [t, h], fp32 or bf16.
        weight: [v/P, h], same type.
        labels: [t], int64; at masked positions any number is allowed.
        loss_mask: [t], factor of each token's loss; 0 leaves it out.
        chunk_tokens: tokens taken at a time; None: `default_chunk_tokens`.
        gradient_accumulation_fusion: add the weight's gradient to `weight.main_grad` if it exists
            (where it does DistributedDataParallel made it, and expects either).
        accumulate_in_forward: with such a `main_grad`, add to it here and not in the backward
            pass. That spares a matrix of the weight's size at the moment when most memory is in
            use, and with it filling and adding it. For callers that are sure to differentiate
            `loss_sum`, once and as it is: its gradient must be 1.

    Returns:
        loss_sum: Σ_t loss_mask_t · loss_t, an fp32 scalar equal on all ranks.
        per_token_loss: [t] fp32 in nats, unmasked and detached; at a position whose label is no
            word of the vocabulary it is the log-sum-exp of the logits, which means nothing.

    The gradient of `hidden` is this rank's part of a sum over `tp_group`: the mapping the caller
    put in front (copy_to_tensor_model_parallel_region, or the gather under sequence parallelism)
    adds it up. Matrix products are in the type of `hidden`; softmax and loss in fp32.

    Raises ValueError if shapes disagree or chunk_tokens < 1, RuntimeError if an unmasked label is
    outside the vocabulary, and in the backward pass if `accumulate_in_forward` was promised another
    gradient (on a GPU as device-side assertions, since looking would wait for it).
    """
    t = hidden.shape[0]
    if hidden.dim() != 2 or labels.shape != (t,) or loss_mask.shape != (t,):
        raise ValueError(
            "hidden, labels and loss_mask must be [t, h], [t] and [t]; got "
            f"{list(hidden.shape)}, {list(labels.shape)} and {list(loss_mask.shape)}; flatten "
            "sequence and batch first."
        )
    if chunk_tokens is None:
        chunk_tokens = default_chunk_tokens(weight.shape[0], hidden.device)
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens}: must be at least 1, or None to choose.")
    vocabulary = weight.shape[0] * (1 if tp_group is None else tp_group.size())
    torch._assert_async(  # no wait on a GPU
        ((loss_mask == 0) | ((labels >= 0) & (labels < vocabulary))).all(),
        f"a label with a non-zero loss_mask is not in the vocabulary of {vocabulary} words",
    )
    how = _How(tp_group, chunk_tokens, gradient_accumulation_fusion, accumulate_in_forward)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(hidden, weight, labels, loss_mask, how)
    found = _ChunkedLoss(hidden, weight, labels, loss_mask, how)
    found.run()
    return torch.dot(found.loss, loss_mask.float()), found.loss


@dataclass(frozen=True)
class _How:
    """The arguments of `vocab_parallel_linear_cross_entropy` behind the tensors."""

    tp_group: dist.ProcessGroup | None
    chunk_tokens: int
    gradient_accumulation_fusion: bool
    accumulate_in_forward: bool


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, loss_mask, how):  # type: ignore[no-untyped-def]
        needs_grad_hidden, needs_grad_weight = ctx.needs_input_grad[:2]
        ctx.main_grad = fused_main_grad(weight, how.gradient_accumulation_fusion)
        ctx.accumulated = (
            needs_grad_weight and how.accumulate_in_forward and ctx.main_grad is not None
        )
        found = _ChunkedLoss(
            hidden,
            weight,
            labels,
            loss_mask,
            how,
            needs_grad_hidden=needs_grad_hidden,
            needs_grad_weight=needs_grad_weight,
            main_grad=ctx.main_grad if ctx.accumulated else None,
        )
        found.run()
        ctx.save_for_backward(
            weight, found.grad_hidden, None if ctx.accumulated else found.grad_weight
        )
        ctx.mark_non_differentiable(found.loss)
        return torch.dot(found.loss, loss_mask.float()), found.loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss_sum, _):  # type: ignore[no-untyped-def]
        weight, grad_hidden, grad_weight = ctx.saved_tensors
        if ctx.accumulated:
            torch._assert_async(
                grad_loss_sum == 1,
                "accumulate_in_forward=True, but the gradient of loss_sum is not 1; change one of "
                "them, for main_grad holds what belongs to a gradient of 1",
            )
            return grad_hidden, gradient_placeholder(weight), None, None, None
        # Reading the factor off a GPU would wait for it; on the CPU it is free and mostly 1.
        factor = grad_loss_sum if grad_loss_sum.is_cuda else grad_loss_sum.item()
        scaled = not (isinstance(factor, float) and factor == 1.0)
        if grad_hidden is not None and scaled:
            grad_hidden = grad_hidden * factor
        if grad_weight is not None and ctx.main_grad is not None:
            if isinstance(factor, float):
                ctx.main_grad.add_(grad_weight, alpha=factor)
            else:
                ctx.main_grad.addcmul_(grad_weight, factor)
            grad_weight = gradient_placeholder(weight)
        elif grad_weight is not None:
            grad_weight = (grad_weight * factor if scaled else grad_weight).to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None


class _ChunkedLoss:
    """Per-token loss and the gradients of the masked sum; `run` makes them, chunk by chunk.

    loss: [t] fp32. grad_hidden: [t, h]; None: not wanted. grad_weight: [v/P, h] in fp32, or
    `main_grad` where there is one, to which it is added; None: not wanted.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        loss_mask: Tensor,
        how: _How,
        *,
        needs_grad_hidden: bool = False,
        needs_grad_weight: bool = False,
        main_grad: Tensor | None = None,
    ) -> None:
        t, shard = hidden.shape[0], weight.shape[0]
        self._hidden, self._weight, self._labels = hidden, weight, labels
        self._loss_mask = loss_mask.float()
        self._tp_group = how.tp_group
        self._first_word = 0 if how.tp_group is None else how.tp_group.rank() * shard
        self.loss = torch.empty(t, dtype=torch.float32, device=hidden.device)
        self.grad_hidden = torch.empty_like(hidden) if needs_grad_hidden else None
        self.grad_weight = main_grad
        if needs_grad_weight and main_grad is None:
            self.grad_weight = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
        # its memory holds nothing yet: the first chunk writes, the others add
        self._weight_is_new = self.grad_weight is not None and main_grad is None
        # in fp32 one buffer is logits, exponentials and gradient in turn; in bf16 the exponentials,
        # and so softmax and loss, have an fp32 buffer of their own
        self._one_buffer = hidden.dtype == torch.float32
        chunk_tokens = min(how.chunk_tokens, max(t, 1))
        self._logits = hidden.new_empty(chunk_tokens, shard)
        self._exp = self._logits
        if not self._one_buffer:
            self._exp = torch.empty_like(self._logits, dtype=torch.float32)

    def run(self) -> None:
        t, step = len(self._hidden), len(self._logits)
        for start in range(0, t, step):
            self._run_chunk(slice(start, min(start + step, t)))
        if self.grad_weight is not None and self._weight_is_new:  # no token at all
            self.grad_weight.zero_()

    def _run_chunk(self, chunk: slice) -> None:
        c, shard = chunk.stop - chunk.start, self._weight.shape[0]
        logits, exp = self._logits[:c], self._exp[:c]
        torch.mm(self._hidden[chunk], self._weight.t(), out=logits)
        if not self._one_buffer:
            exp.copy_(logits)
        word = self._labels[chunk] - self._first_word
        owned = (word >= 0) & (word < shard)
        word = word.clamp_(0, shard - 1).unsqueeze(1)
        target_logit = exp.gather(1, word).squeeze(1) * owned
        local_max, local_sum = exponentiate_rows_(exp)

        statistics = torch.stack([local_max, local_sum, target_logit])
        row_max, row_sum, target_logit = combine_softmax_shards(_gather(statistics, self._tp_group))
        self.loss[chunk] = row_sum.log() + row_max - target_logit

        if self.grad_hidden is not None or self.grad_weight is not None:
            share = (local_max - row_max).exp()
            if self._one_buffer:
                self._differentiate_in_place(chunk, exp, word, owned, share, row_sum)
            else:
                self._differentiate(chunk, exp, logits, word, owned, share, row_sum)

    # The gradient of a logit is mask · (share / row_sum · exp - [this word is the label]).

    def _differentiate_in_place(
        self, chunk: slice, exp: Tensor, word: Tensor, owned: Tensor, share: Tensor, row_sum: Tensor
    ) -> None:
        """A row's common factor goes onto hidden [c, h]: that spares a pass over [c, v]."""
        word_exp = exp.gather(1, word)
        factor = (share / row_sum).clamp_min_(SMALLEST_FACTOR).unsqueeze(1)
        grad_logits = exp.scatter_(1, word, word_exp - owned.unsqueeze(1) / factor)
        factor *= self._loss_mask[chunk].unsqueeze(1)
        inputs = self._hidden[chunk] * factor
        self._multiply(chunk, grad_logits, inputs)
        if self.grad_hidden is not None:
            self.grad_hidden[chunk].mul_(factor)

    def _differentiate(
        self,
        chunk: slice,
        exp: Tensor,
        logits: Tensor,
        word: Tensor,
        owned: Tensor,
        share: Tensor,
        row_sum: Tensor,
    ) -> None:
        """From the fp32 exponentials into the buffer of the logits."""
        mask = self._loss_mask[chunk]
        factor = (mask * share / row_sum).unsqueeze(1)
        target_gradient = exp.gather(1, word) * factor - (owned * mask).unsqueeze(1)
        grad_logits = torch.mul(exp, factor, out=logits)
        grad_logits.scatter_(1, word, target_gradient.to(logits.dtype))
        self._multiply(chunk, grad_logits, self._hidden[chunk])

    def _multiply(self, chunk: slice, grad_logits: Tensor, inputs: Tensor) -> None:
        """The two matrix products of the backward pass."""
        if self.grad_hidden is not None:
            torch.mm(grad_logits, self._weight, out=self.grad_hidden[chunk])
        if self.grad_weight is None:
            return
        if self._weight_is_new:
            self._weight_is_new = False
            if self.grad_weight.dtype == inputs.dtype:
                torch.mm(grad_logits.t(), inputs, out=self.grad_weight)  # saves writing zeros first
                return
            self.grad_weight.zero_()
        accumulate_weight_gradient(inputs, grad_logits, self.grad_weight)


def exponentiate_rows_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """logits [c, n] fp32 become exp(logits - row maximum) in place; returns maximum and sum [c].

    On the CPU a few rows at a time, so that they stay in cache through the four passes.
    """
    c, n = logits.shape
    row_max, row_sum = logits.new_empty(c, 1), logits.new_empty(c, 1)
    cached_rows = CPU_CACHE_BYTES * torch.get_num_threads() // (4 * n)
    block = c if logits.is_cuda else max(1, cached_rows)
    for start in range(0, c, block):
        rows = slice(start, start + block)
        x = logits[rows]
        torch.amax(x, 1, keepdim=True, out=row_max[rows])
        x.sub_(row_max[rows]).exp_()
        torch.sum(x, 1, keepdim=True, out=row_sum[rows])
    return row_max.squeeze(1), row_sum.squeeze(1)


def combine_softmax_shards(statistics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From every shard's statistics [P, 3, c] those of the whole row: maximum, sum, target logit.

    The three are, over a shard: the maximum logit, Σ exp(logit - that maximum), and the label's
    logit if the shard holds it, else 0.
    """
    shard_max, shard_sum, shard_target = statistics.unbind(1)
    row_max = shard_max.amax(0)
    row_sum = (shard_sum * (shard_max - row_max).exp()).sum(0)
    return row_max, row_sum, shard_target.sum(0)


def _gather(statistics: Tensor, tp_group: dist.ProcessGroup | None) -> Tensor:
    """[3, c] of every rank, as [P, 3, c]: the only collective, 12 bytes a token and rank."""
    if tp_group is None or tp_group.size() == 1:
        return statistics.unsqueeze(0)
    ranks, (values, c) = tp_group.size(), statistics.shape
    gathered = statistics.new_empty(ranks * values, c)
    all_gather(gathered, statistics, group=tp_group)
    return gathered.view(ranks, values, c)

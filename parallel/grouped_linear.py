"""Matrix products of rows sorted by group, each group with a matrix of its own: layers of experts.

y_i = x_i W_i over the rows of group i, in three forms with one result:

loop         one matmul a group, into one output. What torch's own kernel does on a CPU, without
             that kernel's limits on strides.
grouped_mm   torch's kernel for this product on a GPU: one launch, however uneven the groups are.
padded       groups padded to the largest and one batched matmul, for devices, types and strides the
             kernel is not for.

Weight gradients are added group by group into an fp32 buffer: `weight.main_grad`, where
DistributedDataParallel has made one (parallel.weight_gradient).

Shapes: t rows, `rows` how many of them belong to each of the e groups (on the host), k input
width, n output width.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.weight_gradient import accumulate_weight_gradient, gradient_placeholder

# Major compute capabilities that torch has the kernel for: Hopper and data-centre Blackwell.
GROUPED_KERNEL_GENERATIONS = (9, 10)


class Block(NamedTuple):
    """Neighbouring rows and the neighbouring groups they belong to."""

    span: slice  # of all rows
    groups: slice
    rows: list[int]  # of each of these groups


def blocks_of(rows: Sequence[int], limit: int | None) -> Iterator[Block]:
    """All rows as blocks of one group and at most `limit` rows, or with None as one block."""
    if limit is None:
        yield Block(slice(0, sum(rows)), slice(0, len(rows)), list(rows))
        return
    end = 0
    for group, count in enumerate(rows):
        start, end = end, end + count
        for first in range(start, end, limit):
            last = min(first + limit, end)
            yield Block(slice(first, last), slice(group, group + 1), [last - first])


def grouped_matmul(
    x: Tensor, weight: Tensor, rows: Sequence[int], out: Tensor | None = None
) -> Tensor:
    """y [t, n] with y_i = x_i · weight[i]; x [t, k], weight [e, k, n], which may be a view.

    `out` is written to and returned, if given.
    """
    if x.device.type == "cpu" or len(rows) == 1 or len(x) == 0:
        return matmul_loop(x, weight, rows, out)
    if _takes_grouped_kernel(x, weight):
        y = matmul_grouped_mm(x, weight, rows)
    else:
        y = matmul_padded(x, weight, rows)
    return y if out is None else out.copy_(y)


def matmul_loop(
    x: Tensor, weight: Tensor, rows: Sequence[int], out: Tensor | None = None
) -> Tensor:
    """`grouped_matmul` as one matmul a group."""
    if out is None:
        out = x.new_empty(x.shape[0], weight.shape[2])
    for x_i, w_i, y_i in zip(x.split(rows), weight, out.split(rows), strict=True):
        torch.mm(x_i, w_i, out=y_i)
    return out


def matmul_grouped_mm(x: Tensor, weight: Tensor, rows: Sequence[int]) -> Tensor:
    """`grouped_matmul` by torch's kernel, which wants to know where each group's rows end."""
    ends = torch.tensor(rows).cumsum(0, dtype=torch.int32)
    return F.grouped_mm(x, weight, offs=ends.to(x.device, non_blocking=True))


def matmul_padded(x: Tensor, weight: Tensor, rows: Sequence[int]) -> Tensor:
    """`grouped_matmul` by a batched matmul, in which every group costs what the largest does."""
    padded = x.new_zeros(len(rows), max(rows), x.shape[1])
    for place, x_i in zip(padded, x.split(rows), strict=True):
        place[: len(x_i)] = x_i
    products = torch.bmm(padded, weight)
    return torch.cat([product[:count] for product, count in zip(products, rows, strict=True)])


def has_grouped_kernel(device: torch.device) -> bool:
    """Whether torch has one kernel for the product on this GPU: see `GROUPED_KERNEL_GENERATIONS`.

    On others torch (2.10 and later) loops over the groups, and for that makes the host wait for the
    device to know where they end; earlier versions refuse.
    """
    return (
        hasattr(F, "grouped_mm")
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device)[0] in GROUPED_KERNEL_GENERATIONS
    )


def _takes_grouped_kernel(x: Tensor, weight: Tensor) -> bool:
    """The kernel is for bf16, and rows that start on multiples of 16 bytes."""
    if x.dtype != torch.bfloat16 or not has_grouped_kernel(x.device):
        return False
    steps = [stride for stride in (*x.stride(), *weight.stride()) if stride != 1]
    return all(stride * x.element_size() % 16 == 0 for stride in steps)


def add_to_groups(y: Tensor, bias: Tensor | None, rows: Sequence[int]) -> None:
    """y_i += bias[i] in place; y [t, n], bias [e, n] or None."""
    if bias is not None:
        for y_i, bias_i in zip(y.split(rows), bias, strict=True):
            y_i.add_(bias_i)


def sum_groups(y: Tensor, rows: Sequence[int]) -> Tensor:
    """Sums [e, n] over the rows of each group of y [t, n]."""
    return torch.stack([y_i.sum(0) for y_i in y.split(rows)])


class GradientSum:
    """The gradient of a parameter [e, ...], one entry for each group, collected block by block.

    `total` is `main_grad`, or an fp32 buffer of its own where that is None. For a parameter that is
    None or takes no gradient there is nothing to collect, and the result is None.
    """

    def __init__(self, parameter: Tensor | None, main_grad: Tensor | None = None) -> None:
        self.parameter, self.main_grad = parameter, main_grad
        self.total = main_grad
        self.wanted = parameter is not None and parameter.requires_grad
        if parameter is not None and self.wanted and main_grad is None:
            self.total = torch.zeros_like(parameter, dtype=torch.float32)

    def add(self, block: Block, gradient: Tensor) -> None:
        """Adds the gradient of the block's groups, [its groups, ...]."""
        if self.wanted:
            assert self.total is not None
            total = self.total[block.groups]
            total += gradient.view_as(total)

    def add_product(self, block: Block, inputs: Tensor, grad_output: Tensor) -> None:
        """Adds grad_output_iᵀ · inputs_i for the groups of a block; [t, k] and [t, n] its rows."""
        if not self.wanted:
            return
        assert self.total is not None
        total = self.total[block.groups].view(len(block.rows), -1, self.total.shape[-1])
        pieces = zip(inputs.split(block.rows), grad_output.split(block.rows), total, strict=True)
        for inputs_i, grad_output_i, total_i in pieces:
            if len(inputs_i):
                accumulate_weight_gradient(inputs_i, grad_output_i, total_i)

    def result(self) -> Tensor | None:
        """What a backward pass returns for the parameter."""
        if self.parameter is None or not self.wanted:
            return None
        if self.main_grad is not None:
            return gradient_placeholder(self.parameter)
        assert self.total is not None
        return self.total.to(self.parameter.dtype)

"""parallel.grouped_linear: all forms give one result, whatever the groups."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.grouped_linear import (
    Block,
    GradientSum,
    add_to_groups,
    blocks_of,
    grouped_matmul,
    matmul_grouped_mm,
    matmul_loop,
    matmul_padded,
    sum_groups,
)

K, N = 16, 24
ROWS = [[3, 5, 0, 8], [0, 0, 16, 0], [4, 4, 4, 4], [0, 0, 0, 1], [0, 0, 0, 0]]
FORMS = [matmul_loop, matmul_padded, grouped_matmul]
if hasattr(F, "grouped_mm"):
    FORMS.append(matmul_grouped_mm)
# of one rounding of a result of size 1 (bf16), or of a sum of K products (fp32)
BOUND = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def tensors(rows: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(rows), K, generator=generator)
    return x.to(dtype), (torch.randn(len(rows), K, N, generator=generator) / K**0.5).to(dtype)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_all_forms_agree(rows: list[int], dtype: torch.dtype, transposed: bool) -> None:
    x, weight = tensors(rows, dtype)
    if transposed:  # as a forward pass has it
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    expected = x.new_empty(sum(rows), N, dtype=torch.float64)
    row = 0
    for group, count in enumerate(rows):
        for _ in range(count):
            expected[row] = x[row].double() @ weight[group].double()
            row += 1
    for form in FORMS:
        actual = form(x, weight, rows)
        assert actual.dtype == dtype and actual.shape == expected.shape
        error = (actual.double() - expected).abs().max() if row else torch.zeros(())
        assert error < BOUND[dtype], (form.__name__, error)


def test_product_is_written_where_asked() -> None:
    x, weight = tensors([3, 5, 0, 8], torch.float32)
    out = torch.zeros(20, N)
    result = grouped_matmul(x, weight, [3, 5, 0, 8], out=out[2:18])
    assert result.data_ptr() == out[2:].data_ptr()
    assert torch.equal(out[2:18], matmul_loop(x, weight, [3, 5, 0, 8]))
    assert bool((out[:2] == 0).all() and (out[18:] == 0).all())


def test_blocks_are_of_one_group_and_cover_all_rows() -> None:
    assert list(blocks_of([3, 0, 5], limit=2)) == [
        Block(slice(0, 2), slice(0, 1), [2]),
        Block(slice(2, 3), slice(0, 1), [1]),
        Block(slice(3, 5), slice(2, 3), [2]),
        Block(slice(5, 7), slice(2, 3), [2]),
        Block(slice(7, 8), slice(2, 3), [1]),
    ]
    assert list(blocks_of([3, 0, 5], limit=None)) == [Block(slice(0, 8), slice(0, 3), [3, 0, 5])]
    assert list(blocks_of([0, 0], limit=4)) == []


def test_bias_and_its_gradient() -> None:
    y = torch.zeros(4, 2)
    add_to_groups(y, torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), [1, 0, 3])
    assert y.tolist() == [[1.0, 2.0], [5.0, 6.0], [5.0, 6.0], [5.0, 6.0]]
    add_to_groups(y, None, [1, 0, 3])
    assert sum_groups(y, [1, 0, 3]).tolist() == [[1.0, 2.0], [0.0, 0.0], [15.0, 18.0]]


@pytest.mark.parametrize("limit", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_weight_gradient(rows: list[int], dtype: torch.dtype, limit: int | None) -> None:
    """Added to main_grad unrounded, or returned in the weight's type; also for a 4-D weight."""
    x, _ = tensors(rows, dtype)
    dy = torch.randn(sum(rows), N, generator=torch.Generator().manual_seed(2)).to(dtype)
    weight = torch.nn.Parameter(torch.zeros(len(rows), 2, N // 2, K, dtype=dtype))
    expected = torch.stack(
        [a.double().t() @ b.double() for a, b in zip(dy.split(rows), x.split(rows), strict=True)]
    ).view_as(weight)

    own, main = GradientSum(weight), GradientSum(weight, torch.ones(weight.shape))
    for block in blocks_of(rows, limit):
        for total in (own, main):
            total.add_product(block, x[block.span], dy[block.span])
    assert main.total is not None
    torch.testing.assert_close(main.total.double() - 1, expected, rtol=1e-5, atol=1e-5)
    result = own.result()
    assert result is not None and result.dtype == dtype
    torch.testing.assert_close(result.double(), expected, rtol=BOUND[dtype], atol=BOUND[dtype])
    # in main_grad already; DistributedDataParallel would have set the attribute
    assert main.result() is None
    weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    placeholder = main.result()
    assert placeholder is not None and placeholder.shape == weight.shape
    assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]


def test_sums_of_small_parameters() -> None:
    total = GradientSum(torch.nn.Parameter(torch.zeros(3, 2)))
    for group in (0, 2, 2):
        total.add(Block(slice(0, 1), slice(group, group + 1), [1]), torch.ones(1, 2))
    result = total.result()
    assert result is not None and result.tolist() == [[1.0, 1.0], [0.0, 0.0], [2.0, 2.0]]


@pytest.mark.parametrize("parameter", [None, torch.zeros(2, N, K)], ids=["none", "frozen"])
def test_nothing_is_collected_for_what_takes_no_gradient(parameter: Tensor | None) -> None:
    main_grad = torch.zeros(2, N, K)
    total = GradientSum(parameter, main_grad)
    block = Block(slice(0, 1), slice(0, 1), [1])
    total.add(block, torch.ones(1, N, K))
    total.add_product(block, torch.ones(1, K), torch.ones(1, N))
    assert total.result() is None and bool((main_grad == 0).all())

"""The comparison itself, on results made by hand; what it sees of real bugs is in
tests/test_parity_mutants.py."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.parity import (
    Bounds,
    Cut,
    Difference,
    Exercise,
    NearTie,
    RankRecord,
    Result,
    Shard,
    assemble,
    compare,
    global_batch,
    merge,
    micro_batches,
    table,
    without_near_ties,
)
from tests.parity import EXERCISE

FULL = torch.arange(48.0).view(4, 3, 4)


def result(**changes: Any) -> Result:
    tensors = {"w": torch.tensor([1.0, -2.0]), "b": torch.tensor([0.0])}
    made = Result(
        losses=[5.0, 4.0],
        language_totals=[torch.tensor([[10.0, 2.0]]), torch.tensor([[8.0, 2.0]])],
        auxiliary_losses=[torch.tensor([1.0, 1.0])] * 2,
        loads=[torch.tensor([[[3, 5]]])] * 2,
        grad_norms=[1.0, 1.0],
        initial={name: tensor.clone() for name, tensor in tensors.items()},
        gradients={name: tensor.clone() for name, tensor in tensors.items()},
        weights={"w": torch.tensor([1.1, -2.0]), "b": torch.tensor([0.1])},
        smallest_gap=math.inf,
        copies_differ=[],
    )
    return replace(made, **changes)


def beyond(found: Result) -> list[str]:
    return [f"{row.what}: {row.where}" for row in compare(found, result()) if not row.ok]


def test_equal_results_are_equal() -> None:
    assert beyond(result()) == []
    assert {row.deviation for row in compare(result(), result())} == {0.0}


@pytest.mark.parametrize(
    ("changes", "seen"),
    [
        ({"losses": [5.0, 4.00001]}, "losses: step 1"),
        ({"losses": [5.0]}, "losses: 1 steps instead of 2"),
        ({"losses": [5.0, math.nan]}, "losses: step 1"),
        ({"language_totals": [torch.ones(1, 2)] * 2}, "losses by language: step 0"),
        ({"auxiliary_losses": []}, "auxiliary losses: 0 steps instead of 2"),
        ({"auxiliary_losses": [torch.tensor([2.0, 1.0])] * 2}, "auxiliary losses: step 0"),
        ({"loads": [torch.tensor([[[4, 4]]])] * 2}, "expert loads: step 0"),
        ({"grad_norms": [1.0, 1.00001]}, "gradient norms: step 1"),
        ({"initial": {"w": Tensor([1.0, -2.0])}}, "initial weights: b, missing"),
        ({"copies_differ": ["weights: w"]}, "copies: weights: w"),
    ],
)
def test_what_differs_is_named(changes: dict[str, Any], seen: str) -> None:
    assert beyond(result(**changes)) == [seen]


@pytest.mark.parametrize(
    ("gradients", "where"),
    [
        ({"w": Tensor([1.0, -2.0001]), "b": Tensor([0.0])}, "w"),
        ({"w": Tensor([1.0, math.nan]), "b": Tensor([0.0])}, "w"),
        ({"w": Tensor([1.0, -2.0]), "b": Tensor([1e-6])}, "b"),  # all of it should be zero
        ({"w": Tensor([1.0]), "b": Tensor([0.0])}, "w, [1]"),
        ({"w": Tensor([1.0, -2.0]), "b": Tensor([0.0]), "x": Tensor([0.0])}, "x, not expected"),
    ],
)
def test_gradients_that_differ_are_named(gradients: dict[str, Tensor], where: str) -> None:
    assert beyond(result(gradients=gradients)) == [f"gradients: {where}"]


def test_weights_are_measured_against_how_far_they_moved() -> None:
    bound = Bounds().weights  # and b moved by 0.1
    off = result().weights | {"b": torch.tensor([0.1 + 0.1 * 2 * bound])}
    assert beyond(result(weights=off)) == ["weights: b"]
    w = {row.what: row.deviation for row in compare(result(weights=off), result())}["weights"]
    assert w == pytest.approx(2 * bound, rel=0.05)


def test_a_sum_that_cancels_is_measured_by_the_gradient_norm() -> None:
    rounding = {"w": Tensor([1.0, -2.0]), "b": Tensor([5e-8])}
    assert beyond(result(gradients=rounding)) == []


def test_a_near_tie_of_the_router_is_refused() -> None:
    with pytest.raises(NearTie, match=r"scores 1\.0e-07 apart.*Choose another Exercise.batch_seed"):
        compare(result(), result(smallest_gap=1e-7))


def test_table_says_where() -> None:
    rows = [Difference("losses", 1e-8, 5e-7, "step 1"), Difference("gradients", 0.5, 5e-6, "w")]
    good, bad = table(rows).splitlines()
    assert good.split() == ["losses", "1.0e-08", "within", "5.0e-07", "step", "1"]
    assert bad.split() == ["gradients", "5.0e-01", "BEYOND", "5.0e-06", "w"]


def shard_of(cuts: tuple[Cut, ...]) -> Shard:
    tensor = FULL
    for cut in cuts:
        blocks = tensor.chunk(cut.parts * cut.stride, cut.dim)
        tensor = torch.cat(blocks[cut.index :: cut.parts], cut.dim)
    return Shard(tensor, cuts)


def test_shards_are_put_together_along_every_axis_they_are_cut_along() -> None:
    ranks = [
        {"x": shard_of((Cut(0, 2, first), Cut(2, 2, last, stride=2)))}
        for first in range(2)
        for last in range(2)
    ]
    full, differ = assemble(ranks)
    assert torch.equal(full["x"], FULL) and differ == []
    missing, _ = assemble(ranks[:3])
    assert int(missing["x"].isnan().sum()) == 12


def test_copies_that_differ_in_a_bit_are_named() -> None:
    copy = Shard(FULL.clone(), ())
    copy.tensor[0, 0, 0] += 1e-7
    assert assemble([{"x": Shard(FULL, ())}, {"x": copy}])[1] == ["x"]
    one, other = RankRecord(losses=[1.0]), RankRecord(losses=[1.0], weights={"x": copy})
    assert merge([one, other]).copies_differ == []
    other.losses = [1.0 + 1e-12]
    one.weights = {"x": Shard(FULL, ())}
    assert merge([one, other]).copies_differ == ["losses of rank 1", "weights: x"]


def test_micro_batches_share_out_the_global_batch() -> None:
    exercise: Exercise = replace(EXERCISE, micro_batch_size=2, resets=True)
    whole = global_batch(exercise, step=1)
    parts = [micro_batches(exercise, 1, rank, 2) for rank in range(2)]
    assert [len(part) for part in parts] == [2, 2]
    rows = [batch for pair in zip(*parts, strict=True) for batch in pair]
    for name in ("tokens", "labels", "loss_mask", "language_ids", "documents"):
        together = torch.cat([getattr(batch, name) for batch in rows])
        assert torch.equal(together, getattr(whole, name))
    assert len({tuple(row) for row in whole.tokens.tolist()}) == 8
    assert not torch.equal(whole.tokens, global_batch(exercise, step=0).tokens)


def test_batches_are_changed_until_no_tie_is_near() -> None:
    gaps = iter([1e-8, 1e-7, 1e-3])
    seen: list[int] = []

    def train(exercise: Exercise) -> Result:
        seen.append(exercise.batch_seed)
        return result(smallest_gap=next(gaps))

    exercise, found = without_near_ties(EXERCISE, train)
    assert found.smallest_gap == 1e-3 and exercise.batch_seed == seen[-1]
    assert len(set(seen)) == 3

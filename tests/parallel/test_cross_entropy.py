"""parallel.cross_entropy against torch's own linear and cross_entropy, on 1, 2 and 4 gloo ranks."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from parallel.cross_entropy import default_chunk_tokens, vocab_parallel_linear_cross_entropy
from tests.distributed import run_on_gloo
from tests.parallel.test_sub_layernorm import CollectiveCounter

TOKENS, HIDDEN, VOCABULARY = 50, 24, 96
# Relative Frobenius error of fp32 against fp64. Seen: at most 4.3e-7, logits being about 15.
FP32_BOUND = 1e-6


def inputs(dtype: torch.dtype = torch.float32, masked: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(TOKENS, generator=generator)
    mask[::7] = 0
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    if masked:
        labels[0], labels[7] = -100, VOCABULARY + 5  # masked, hence allowed
    return {
        # logits of about ±10: shards differ in their maximum by more than exp can hide
        "hidden": (3 * torch.randn(TOKENS, HIDDEN, generator=generator)).to(dtype),
        "weight": torch.randn(VOCABULARY, HIDDEN, generator=generator).to(dtype),
        "labels": labels,
        "loss_mask": mask if masked else torch.ones(TOKENS),
    }


def reference(tensors: dict[str, Tensor], factor: float = 1.0) -> dict[str, Tensor]:
    hidden = tensors["hidden"].double().requires_grad_()
    weight = tensors["weight"].double().requires_grad_()
    labels = tensors["labels"].clamp(0, VOCABULARY - 1)
    per_token = F.cross_entropy(F.linear(hidden, weight), labels, reduction="none")
    loss = (per_token * tensors["loss_mask"].double()).sum()
    (factor * loss).backward()
    return {
        "loss": loss.detach(),
        "per_token": per_token.detach(),
        "hidden": hidden.grad,
        "weight": weight.grad,
    }


def error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def on_shard(
    dtype: torch.dtype, masked: bool, chunk_tokens: int | None, factor: float
) -> dict[str, Any]:
    tensors = inputs(dtype, masked)
    hidden = tensors.pop("hidden").requires_grad_()
    ranks, rank = dist.get_world_size(), dist.get_rank()
    weight = tensors.pop("weight").chunk(ranks)[rank].clone().requires_grad_()
    options = {"tp_group": dist.group.WORLD, "chunk_tokens": chunk_tokens}
    with CollectiveCounter() as collectives:
        loss, per_token = vocab_parallel_linear_cross_entropy(hidden, weight, **tensors, **options)
        (factor * loss).backward()
    with torch.no_grad():
        plain = vocab_parallel_linear_cross_entropy(hidden, weight, **tensors, **options)
    assert torch.equal(plain[0], loss) and torch.equal(plain[1], per_token)
    assert not per_token.requires_grad and per_token.dtype == torch.float32
    return {
        "loss": loss.detach(),
        "per_token": per_token,
        "hidden": hidden.grad,
        "weight": weight.grad,
        "collectives": collectives.counts,
    }


@pytest.mark.parametrize("chunk_tokens", [1, 16, None])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(("masked", "factor"), [(False, 1.0), (True, 0.25)])
def test_equals_linear_and_cross_entropy(
    ranks: int, masked: bool, factor: float, chunk_tokens: int | None
) -> None:
    tensors = inputs(masked=masked)
    expected = reference(tensors, factor)
    parts = run_on_gloo(ranks, on_shard, torch.float32, masked, chunk_tokens, factor)
    words = (tensors["labels"] >= 0) & (tensors["labels"] < VOCABULARY)
    for part in parts:
        assert error(part["loss"], expected["loss"]) < FP32_BOUND
        assert error(part["per_token"][words], expected["per_token"][words]) < FP32_BOUND
    assert error(sum(part["hidden"] for part in parts), expected["hidden"]) < FP32_BOUND
    assert error(torch.cat([part["weight"] for part in parts]), expected["weight"]) < FP32_BOUND
    chunks = -(-TOKENS // (chunk_tokens or TOKENS))
    gathers = Counter({"_allgather_base_": chunks}) if ranks > 1 else Counter()
    assert parts[0]["collectives"] == gathers


@pytest.mark.parametrize("ranks", [1, 2])
def test_bf16_is_as_good_as_plain_bf16(ranks: int) -> None:
    """Against linear in bf16, then cross_entropy in fp32, both differentiated by torch."""
    tensors = inputs(torch.bfloat16)
    expected = reference(tensors)
    parts = run_on_gloo(ranks, on_shard, torch.bfloat16, True, 16, 1.0)

    hidden, weight = tensors["hidden"].requires_grad_(), tensors["weight"].requires_grad_()
    labels = tensors["labels"].clamp(0, VOCABULARY - 1)
    per_token = F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="none")
    loss = (per_token * tensors["loss_mask"]).sum()
    loss.backward()
    assert error(parts[0]["loss"], expected["loss"]) < 1.1 * error(loss, expected["loss"]) + 1e-6
    actual = sum(part["hidden"].float() for part in parts)
    assert error(actual, expected["hidden"]) < 1.3 * error(hidden.grad, expected["hidden"])
    actual = torch.cat([part["weight"] for part in parts])
    assert error(actual, expected["weight"]) < 1.1 * error(weight.grad, expected["weight"])


def test_gradient_of_a_near_certain_label_keeps_its_digits() -> None:
    """p - 1 is taken in fp32, before any rounding to bf16."""
    weight = torch.zeros(VOCABULARY, HIDDEN)
    weight[5, 0] = 12.0
    hidden = torch.zeros(1, HIDDEN)
    hidden[0, 0] = 1.0
    tensors = {
        "hidden": hidden,
        "weight": weight,
        "labels": torch.tensor([5]),
        "loss_mask": torch.ones(1),
    }
    expected = reference(tensors)
    tensors["hidden"] = tensors["hidden"].bfloat16().requires_grad_()
    tensors["weight"] = tensors["weight"].bfloat16()
    vocab_parallel_linear_cross_entropy(**tensors)[0].backward()
    assert error(tensors["hidden"].grad, expected["hidden"]) < 0.01


def on_distant_shard() -> dict[str, Any]:
    """Logits of the second shard are 300 below those of the first, where all labels but one are."""
    tensors = distant_shards()
    rank = dist.get_rank()
    weight = tensors.pop("weight").chunk(2)[rank].clone().requires_grad_()
    hidden = tensors.pop("hidden").requires_grad_()
    vocab_parallel_linear_cross_entropy(hidden, weight, **tensors, tp_group=dist.group.WORLD)[
        0
    ].backward()
    return {"hidden": hidden.grad, "weight": weight.grad}


def distant_shards() -> dict[str, Tensor]:
    tensors = inputs(masked=False)
    tensors["hidden"][:, 0] = 1.0
    tensors["weight"][:, 0] = 0.0
    tensors["weight"][VOCABULARY // 2 :, 0] = -300.0
    tensors["labels"] %= VOCABULARY // 2
    tensors["labels"][3] = VOCABULARY - 1
    return tensors


def test_label_on_a_shard_without_probability() -> None:
    """exp(-300) is 0 in fp32, and the gradient of such a label -1 all the same."""
    expected = reference(distant_shards())
    parts = run_on_gloo(2, on_distant_shard)
    assert error(sum(part["hidden"] for part in parts), expected["hidden"]) < FP32_BOUND
    assert error(torch.cat([part["weight"] for part in parts]), expected["weight"]) < FP32_BOUND


def test_frozen_weight_or_hidden() -> None:
    expected = reference(inputs())
    for name, other in (("hidden", "weight"), ("weight", "hidden")):
        tensors = inputs()
        tensors[name].requires_grad_()
        vocab_parallel_linear_cross_entropy(**tensors, chunk_tokens=16)[0].backward()
        assert error(tensors[name].grad, expected[name]) < FP32_BOUND
        assert tensors[other].grad is None


def test_main_grad_is_added_to() -> None:
    expected = reference(inputs(), 0.5)
    for factor, start in ((1.0, 0.0), (0.5, 2.0)):
        tensors = inputs()
        tensors["weight"].requires_grad_()
        main_grad = torch.full((VOCABULARY, HIDDEN), start)
        tensors["weight"].main_grad = main_grad
        loss, _ = vocab_parallel_linear_cross_entropy(**tensors, chunk_tokens=16)
        (factor * loss).backward()
        assert error((main_grad - start) / (2 * factor), expected["weight"]) < 2e-6
        assert tensors["weight"].grad is None


def test_accumulate_in_forward() -> None:
    expected = reference(inputs())
    tensors = inputs()
    tensors["hidden"].requires_grad_()
    tensors["weight"].requires_grad_()
    main_grad = torch.full((VOCABULARY, HIDDEN), 2.0)
    tensors["weight"].main_grad = main_grad
    options = {"chunk_tokens": 16, "accumulate_in_forward": True}
    loss, _ = vocab_parallel_linear_cross_entropy(**tensors, **options)
    assert error(main_grad - 2.0, expected["weight"]) < 2e-6
    loss.backward()
    assert error(main_grad - 2.0, expected["weight"]) < 2e-6  # not a second time
    assert error(tensors["hidden"].grad, expected["hidden"]) < FP32_BOUND
    assert tensors["weight"].grad is None

    loss, _ = vocab_parallel_linear_cross_entropy(**tensors, **options)
    with pytest.raises(RuntimeError, match="accumulate_in_forward"):
        (0.5 * loss).backward()


def test_no_tokens() -> None:
    tensors = {name: t[:0] if name != "weight" else t for name, t in inputs().items()}
    tensors["weight"].requires_grad_()
    loss, per_token = vocab_parallel_linear_cross_entropy(**tensors)
    loss.backward()
    assert loss == 0 and per_token.shape == (0,) and not tensors["weight"].grad.any()


@pytest.mark.parametrize(
    ("change", "error_class", "message"),
    [
        ({"labels": torch.zeros(5, 10, dtype=torch.int64)}, ValueError, r"\[5, 10\]"),
        ({"chunk_tokens": 0}, ValueError, "chunk_tokens=0"),
        ({"labels": torch.full((TOKENS,), VOCABULARY)}, RuntimeError, "vocabulary of 96 words"),
        ({"labels": torch.full((TOKENS,), -1)}, RuntimeError, "vocabulary of 96 words"),
    ],
)
def test_refuses(change: dict[str, Any], error_class: type, message: str) -> None:
    with pytest.raises(error_class, match=message):
        vocab_parallel_linear_cross_entropy(**(inputs() | change))


def test_default_chunk() -> None:
    assert default_chunk_tokens(32_000, torch.device("cpu")) == 256
    assert default_chunk_tokens(10**6, torch.device("cpu")) == 128
    assert default_chunk_tokens(8_000, torch.device("cuda")) == 16_768

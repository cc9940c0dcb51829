"""One definition of the mean, and per-language totals that can be merged in any order."""

import math

import pytest
import torch

from pretrain.loss import LanguageLosses, mean_over_valid_tokens

FAMILIES = {"de": "Germanic", "en": "Germanic", "fr": "Romance", "fi": "Uralic"}
LANGUAGES = ["de", "en", "fr", "fi"]


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    losses = torch.tensor([[1.0, 2.0, 9.0], [3.0, 5.0, 7.0], [4.0, 9.0, 9.0]])  # [b=3, s=3]
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    return losses, mask, torch.tensor([0, 2, 1])  # de, fr, en


def test_mean_is_sum_over_count_and_not_a_mean_of_means():
    sums, tokens = torch.tensor([10.0, 1.0]), torch.tensor([2, 8])
    assert mean_over_valid_tokens(sums.sum(), tokens.sum()).item() == pytest.approx(1.1)
    assert mean_over_valid_tokens(sums, tokens).tolist() == [5.0, 0.125]


def test_mean_over_no_tokens_is_nan():
    means = mean_over_valid_tokens(torch.tensor([0.0, 3.0]), torch.tensor([0, 2]))
    assert math.isnan(means[0]) and means[1] == 1.5


def test_mean_passes_gradients():
    loss_sum = torch.tensor(6.0, requires_grad=True)
    mean_over_valid_tokens(loss_sum, torch.tensor(4)).backward()
    assert loss_sum.grad == 0.25


def test_views_weight_by_tokens():
    losses = LanguageLosses(LANGUAGES)
    losses.add(*batch())
    assert losses.totals.dtype == torch.float64
    assert losses.totals.tolist() == [[3, 2], [4, 1], [15, 3], [0, 0]]
    assert losses.per_language() == {"de": 1.5, "en": 4.0, "fr": 5.0}  # fi has no tokens
    assert losses.per_family(FAMILIES) == {"Germanic": pytest.approx(7 / 3), "Romance": 5.0}
    assert losses.mean() == pytest.approx(22 / 6)
    assert losses.valid_tokens() == 6


def test_metric_names():
    losses = LanguageLosses(LANGUAGES)
    losses.add(*batch())
    assert losses.metrics(FAMILIES) == pytest.approx(
        {
            "eval/loss": 22 / 6,
            "eval/family/Germanic/loss": 7 / 3,
            "eval/family/Romance/loss": 5.0,
            "eval/language/de/loss": 1.5,
            "eval/language/en/loss": 4.0,
            "eval/language/fr/loss": 5.0,
        }
    )


def test_nan_under_the_mask_is_never_read():
    values, mask, ids = batch()
    losses = LanguageLosses(LANGUAGES)
    losses.add(values.masked_fill(mask == 0, torch.nan), mask.bool(), ids)
    assert losses.mean() == pytest.approx(22 / 6)


def test_a_language_twice_in_one_micro_batch_counts_twice():
    values, mask, _ = batch()
    losses = LanguageLosses(LANGUAGES)
    losses.add(values, mask, torch.tensor([3, 3, 3]))
    assert losses.totals[3].tolist() == [22, 6]


def test_any_split_into_micro_batches_merges_to_the_same():
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(12, 7, generator=generator, dtype=torch.float32)
    mask = torch.rand(12, 7, generator=generator) < 0.5
    ids = torch.randint(0, 4, (12,), generator=generator)
    whole = LanguageLosses(LANGUAGES)
    whole.add(values, mask, ids)
    for size in (1, 5):
        merged = LanguageLosses(LANGUAGES)
        for start in range(0, 12, size):
            part = LanguageLosses(LANGUAGES)
            part.add(*(t[start : start + size] for t in (values, mask, ids)))
            merged.merge(part)
        torch.testing.assert_close(merged.totals, whole.totals, rtol=1e-14, atol=0)


def test_no_tokens_at_all():
    losses = LanguageLosses(LANGUAGES)
    assert math.isnan(losses.mean()) and losses.per_family(FAMILIES) == {}


def test_refusals():
    losses = LanguageLosses(LANGUAGES)
    values, mask, ids = batch()
    with pytest.raises(ValueError, match=r"\[3, 3\], \[3, 2\] and \[3\]"):
        losses.add(values, mask[:, :2], ids)
    with pytest.raises(ValueError, match=r"and \[2\]"):
        losses.add(values, mask, ids[:2])
    for outside in (4, -1):
        with pytest.raises(RuntimeError, match="out of bounds"):
            losses.add(values, mask, torch.tensor([0, 1, outside]))
    with pytest.raises(ValueError, match="cannot be merged"):
        losses.merge(LanguageLosses(["de"]))
    with pytest.raises(ValueError, match=r"\['fi'\]"):
        losses.per_family({"de": "Germanic", "en": "Germanic", "fr": "Romance"})

from collections.abc import Callable

import numpy as np
import pytest
import torch

from data.batch import Batch
from data.config import MixtureConfig
from data.language_mixture import LanguageMixture
from data.loader import MicroBatchLoader, ValidationSet, fingerprint_differences
from data.packing_config import PackingConfig, PackingMode
from data.token_store import TokenStore

LENGTH = 16


@pytest.fixture
def stores(make_store: Callable[..., TokenStore]) -> list[TokenStore]:
    return [
        make_store("de", "germanic", 2000),
        make_store("ru", "slavic", 500),
        make_store("th", "kra-dai", 9),
    ]


@pytest.fixture
def mixture(stores: list[TokenStore]) -> LanguageMixture:
    return LanguageMixture(stores, LENGTH, MixtureConfig(), seed=3)


def loader(mixture: LanguageMixture, micro: int, total: int, rank: int, ranks: int):
    return MicroBatchLoader(
        mixture,
        micro_batch_size=micro,
        global_batch_size=total,
        data_parallel_rank=rank,
        data_parallel_size=ranks,
    )


def validation(stores: list[TokenStore], rank: int, ranks: int, **settings: int) -> ValidationSet:
    defaults = {"sequences_per_language": 8, "micro_batch_size": 2}
    return ValidationSet(
        stores,
        LENGTH,
        languages=["de", "fr", "ru", "th"],
        data_parallel_rank=rank,
        data_parallel_size=ranks,
        **(defaults | settings),
    )


def rows(batches: list[Batch]) -> list[tuple]:
    return [
        (tuple(tokens.tolist()), tuple(labels.tolist()), int(language))
        for batch in batches
        for tokens, labels, language in zip(
            batch.tokens, batch.labels, batch.language_ids, strict=True
        )
    ]


def test_batches_have_the_shapes_and_types_they_say(mixture: LanguageMixture) -> None:
    batches = list(loader(mixture, 4, 24, rank=1, ranks=2).micro_batches(5))
    assert len(batches) == 3 == loader(mixture, 4, 24, 1, 2).num_micro_batches
    for batch in batches:
        assert batch.tokens.shape == batch.labels.shape == batch.loss_mask.shape == (4, LENGTH)
        assert batch.tokens.dtype == batch.labels.dtype == batch.language_ids.dtype == torch.int64
        assert batch.loss_mask.dtype == torch.float32 and (batch.loss_mask == 1).all()
        assert batch.language_ids.shape == (4,)
        assert (batch.tokens[:, 1:] == batch.labels[:, :-1]).all()
        assert batch.labels.data_ptr() - batch.tokens.data_ptr() == 8  # views of one buffer


def test_which_samples_a_micro_batch_holds(mixture: LanguageMixture) -> None:
    """Micro-batch j of rank r of R: samples c + (j R + r) m and the next m - 1."""
    consumed, micro, total, ranks = 85, 2, 12, 3
    for rank in range(ranks):
        batches = loader(mixture, micro, total, rank, ranks).micro_batches(consumed)
        for j, batch in enumerate(batches):
            first = consumed + (j * ranks + rank) * micro
            languages, numbers = mixture.locate(np.arange(first, first + micro))
            ids = mixture.read(languages, numbers).ids
            assert batch.tokens.tolist() == ids[:, :-1].tolist()
            assert batch.labels.tolist() == ids[:, 1:].tolist()
            assert batch.language_ids.tolist() == languages.tolist()


@pytest.mark.parametrize(("micro", "ranks"), [(1, 1), (2, 1), (1, 4), (2, 4), (8, 1), (1, 8)])
def test_the_set_of_a_step_does_not_depend_on_the_layout(
    mixture: LanguageMixture, micro: int, ranks: int
) -> None:
    for step in (0, 3, 1000):
        reference = rows(list(loader(mixture, 8, 8, 0, 1).micro_batches(step)))
        dealt = [
            list(loader(mixture, micro, 8, r, ranks).micro_batches(step)) for r in range(ranks)
        ]
        in_order = [batch for round_ in zip(*dealt, strict=True) for batch in round_]
        assert rows(in_order) == reference


def test_a_step_is_a_function_of_what_was_consumed(mixture: LanguageMixture) -> None:
    first = loader(mixture, 2, 8, 0, 1)
    for step in range(5):
        list(first.micro_batches(8 * step))
    resumed = loader(mixture, 2, 8, 0, 1)
    assert rows(list(resumed.micro_batches(40))) == rows(list(first.micro_batches(40)))
    assert rows(list(resumed.micro_batches(48))) != rows(list(resumed.micro_batches(40)))


def test_a_changed_batch_size_neither_repeats_nor_skips(mixture: LanguageMixture) -> None:
    small = [batch for c in (40, 44) for batch in loader(mixture, 2, 4, 0, 1).micro_batches(c)]
    large = list(loader(mixture, 2, 8, 0, 1).micro_batches(40))
    assert rows(small) == rows(large)


@pytest.mark.parametrize(
    ("micro", "total", "ranks", "words"),
    [
        (3, 8, 2, r"global_batch_size=8 .*micro_batch_size=3 .*size 2 \(= 6\); .*=6 or 12 would"),
        (4, 8, 4, "train.global_batch_size=16 would work"),
        (1, 0, 1, "train.global_batch_size=1 would work"),
        (0, 8, 1, "train.micro_batch_size=0"),
    ],
)
def test_divisibility(
    mixture: LanguageMixture, micro: int, total: int, ranks: int, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        loader(mixture, micro, total, 0, ranks)


def test_loader_refuses_impossible_ranks_and_steps(mixture: LanguageMixture) -> None:
    with pytest.raises(ValueError, match="data-parallel rank 2 of 2"):
        loader(mixture, 1, 8, 2, 2)
    with pytest.raises(ValueError, match="consumed_sequences=-1"):
        loader(mixture, 1, 8, 0, 2).micro_batches(-1)


def test_fingerprint_and_its_differences(
    stores: list[TokenStore], mixture: LanguageMixture
) -> None:
    one, other_layout = loader(mixture, 2, 8, 0, 1), loader(mixture, 1, 4, 1, 2)
    assert one.fingerprint() == other_layout.fingerprint() == mixture.fingerprint()
    assert fingerprint_differences(one.fingerprint(), other_layout.fingerprint()) == []
    changed = LanguageMixture(stores[:2], LENGTH, MixtureConfig(), seed=4).fingerprint()
    lines = fingerprint_differences(one.fingerprint(), changed)
    assert "seed: was 3, is 4" in lines
    assert any(line.startswith("stores of th: was") and line.endswith("is None") for line in lines)
    assert not any(line.startswith("stores of de") for line in lines)


@pytest.mark.parametrize(
    ("micro", "ranks", "multiple"), [(2, 1, 1), (3, 2, 1), (4, 8, 1), (2, 2, 4)]
)
def test_validation_deals_every_sequence_once(
    stores: list[TokenStore], micro: int, ranks: int, multiple: int
) -> None:
    """8 of de, 8 of ru, 1 of th; every rank the same number of micro-batches."""
    sets = [
        validation(stores, r, ranks, micro_batch_size=micro, micro_batch_multiple=multiple)
        for r in range(ranks)
    ]
    dealt = [list(one.micro_batches()) for one in sets]
    assert {len(batches) for batches in dealt} == {sets[0].num_micro_batches}
    assert sets[0].num_micro_batches % multiple == 0
    assert len(sets[0]) == 17
    in_order = [batch for round_ in zip(*dealt, strict=True) for batch in round_]
    masks = torch.cat([batch.loss_mask for batch in in_order])
    languages = torch.cat([batch.language_ids for batch in in_order])
    tokens = torch.cat([batch.tokens for batch in in_order])
    assert languages[:17].tolist() == [0] * 8 + [2] * 8 + [3]  # places in de, fr, ru, th
    assert (masks[:16] == 1).all()
    assert masks[16].tolist() == [1.0] * 8 + [0.0] * 8  # th has 9 tokens: 8 to predict
    assert (masks[17:] == 0).all() and (tokens[17:] == 0).all()
    assert len(masks) - 17 < micro * ranks * multiple
    for number in range(8):
        start = number * LENGTH
        assert tokens[number].tolist() == stores[0].read(start, start + LENGTH).tolist()


def test_validation_is_the_same_every_time(stores: list[TokenStore]) -> None:
    one = validation(stores, 0, 2)
    assert rows(list(one.micro_batches())) == rows(list(one.micro_batches()))


def test_validation_refuses(stores: list[TokenStore]) -> None:
    with pytest.raises(ValueError, match=r"train.eval_sequences=0"):
        validation(stores, 0, 1, sequences_per_language=0)
    with pytest.raises(ValueError, match=r"no validation stores; raise data.validation_fraction"):
        validation([], 0, 1)


RESETS = PackingConfig(
    mode=PackingMode.best_fit,
    reset_attention=True,
    reset_positions=True,
    mask_boundary_loss=True,
)


def test_batches_carry_what_attention_needs(stores: list[TokenStore]) -> None:
    mixture = LanguageMixture(stores, LENGTH, MixtureConfig(), seed=3, packing=RESETS)
    batches = MicroBatchLoader(
        mixture,
        micro_batch_size=4,
        global_batch_size=8,
        data_parallel_rank=0,
        data_parallel_size=1,
        packing=RESETS,
    ).micro_batches(0)
    several = 0
    for batch in batches:
        assert batch.reset_positions and batch.documents is not None
        assert batch.documents.shape == (4, LENGTH) and batch.documents.dtype == torch.int32
        steps = batch.documents.diff(dim=1)
        assert (batch.documents[:, 0] == 0).all() and ((steps == 0) | (steps == 1)).all()
        # where the next token belongs to another document, its label carries no loss
        assert not batch.loss_mask[:, :-1][steps == 1].any()
        assert batch.loss_mask.sum() > 0
        several += int(steps.sum())
    assert several


def test_a_source_that_forgets_the_borders_is_found(mixture: LanguageMixture) -> None:
    plain = MicroBatchLoader(
        mixture,
        micro_batch_size=1,
        global_batch_size=1,
        data_parallel_rank=0,
        data_parallel_size=1,
        packing=PackingConfig(reset_attention=True),
    )
    with pytest.raises(AssertionError):
        list(plain.micro_batches(0))


@pytest.mark.parametrize("mode", PackingMode)
def test_validation_with_resets(stores: list[TokenStore], mode: PackingMode) -> None:
    packing = PackingConfig(mode=mode, reset_attention=True)
    one = ValidationSet(
        stores,
        LENGTH,
        languages=["de", "fr", "ru", "th"],
        sequences_per_language=1000,
        micro_batch_size=4,
        data_parallel_rank=0,
        data_parallel_size=1,
        packing=packing,
    )
    batches = list(one.micro_batches())
    assert {tuple(batch.tokens.shape) for batch in batches} == {(4, LENGTH)}
    assert all(batch.documents is not None for batch in batches)
    counted = sum(float(batch.loss_mask.sum()) for batch in batches)
    predicted = sum(store.tokens - 1 for store in stores)
    if mode is PackingMode.concatenate:
        assert counted == predicted  # every token once
    else:  # but the first of each sequence
        assert 0.8 * predicted < counted < predicted

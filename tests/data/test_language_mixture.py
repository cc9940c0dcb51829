import logging
import time
from collections.abc import Callable

import numpy as np
import pytest

from data.config import MixtureConfig, Weighting
from data.language_mixture import (
    SAMPLES_PER_BLOCK,
    LanguageMixture,
    apportion,
    balanced_schedule,
    family_weights,
)
from data.token_store import TokenStore

# language: family, tokens
SIZES = {
    "de": ("germanic", 50_000),
    "en": ("germanic", 90_000),
    "ru": ("slavic", 20_000),
    "uk": ("slavic", 1_000),
    "hi": ("indic", 4_000),
    "th": ("kra-dai", 150),
}


@pytest.fixture
def stores(make_store: Callable[..., TokenStore]) -> list[TokenStore]:
    return [make_store(code, family, tokens) for code, (family, tokens) in SIZES.items()]


def mixture_of(stores: list[TokenStore], seed: int = 1, **settings: object) -> LanguageMixture:
    return LanguageMixture(stores, 32, MixtureConfig(**settings), seed)


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (0.7, [0.804904, 0.160599, 0.034496]),
        (0.5, [0.703414, 0.222439, 0.074146]),
        (0.3, [0.568039, 0.284694, 0.147267]),
    ],
)
def test_temperature_weights(alpha: float, expected: list[float]) -> None:
    """p proportional to n ** alpha on shares of 0.9, 0.09 and 0.01, worked out by hand."""
    tokens = {"a": 900.0, "b": 90.0, "c": 10.0}
    weights = family_weights(tokens, MixtureConfig(alpha=alpha))
    np.testing.assert_allclose(list(weights.values()), expected, atol=1e-6)


def test_other_weightings() -> None:
    tokens = {"a": 900.0, "b": 90.0, "c": 10.0}

    def weights(**settings: object) -> list[float]:
        return list(family_weights(tokens, MixtureConfig(**settings)).values())

    assert weights(weighting=Weighting.proportional) == pytest.approx([0.9, 0.09, 0.01])
    assert weights(weighting=Weighting.uniform) == pytest.approx([1 / 3] * 3)
    ratios = {"c": 5, "a": 3, "b": 2}
    assert weights(weighting=Weighting.ratios, ratios=ratios) == pytest.approx([0.3, 0.2, 0.5])


def test_ratios_must_name_the_families_of_the_data() -> None:
    tokens = {"slavic": 1.0, "indic": 1.0}
    with pytest.raises(ValueError, match="missing indic; not in the data: indik; the families are"):
        family_weights(
            tokens, MixtureConfig(weighting=Weighting.ratios, ratios={"slavic": 1, "indik": 1})
        )
    with pytest.raises(ValueError, match="missing indic; the families are indic, slavic"):
        family_weights(tokens, MixtureConfig(weighting=Weighting.ratios, ratios={"slavic": 1}))


def test_weights_act_on_families_and_tokens_within(stores: list[TokenStore]) -> None:
    ratios = {"germanic": 0.2, "slavic": 0.4, "indic": 0.3, "kra-dai": 0.1}
    mixture = mixture_of(stores, weighting=Weighting.ratios, ratios=ratios)
    expected = {
        "de": 0.2 * 50 / 140,
        "en": 0.2 * 90 / 140,
        "hi": 0.3,
        "ru": 0.4 * 20 / 21,
        "th": 0.1,
        "uk": 0.4 * 1 / 21,
    }
    assert mixture.languages == sorted(SIZES)
    for code, weight in expected.items():
        assert abs(mixture.weights[code] - weight) <= 1 / SAMPLES_PER_BLOCK
    assert sum(mixture.weights.values()) == 1


@pytest.mark.parametrize("weighting", [Weighting.temperature, Weighting.uniform])
def test_ratios_hold_at_every_prefix(stores: list[TokenStore], weighting: Weighting) -> None:
    """Less than one sample off for every language, through three blocks."""
    mixture = mixture_of(stores, weighting=weighting)
    total = 2 * SAMPLES_PER_BLOCK + 12_345
    language, _ = mixture.locate(np.arange(total))
    for number, code in enumerate(mixture.languages):
        drawn = np.cumsum(language == number)
        error = np.abs(drawn - mixture.weights[code] * np.arange(1, total + 1)).max()
        assert error < 1, (code, error)


@pytest.mark.parametrize("seed", range(20))
def test_schedule_keeps_tijdemans_bound(seed: int) -> None:
    generator = np.random.default_rng(seed)
    kinds = int(generator.integers(2, 60))
    counts = apportion(generator.pareto(0.5, kinds), int(generator.integers(200, 3000)))
    schedule = balanced_schedule(counts)
    assert np.bincount(schedule, minlength=kinds).tolist() == counts.tolist()
    drawn = np.cumsum(np.eye(kinds)[schedule], axis=0)
    share = np.outer(np.arange(1, len(schedule) + 1), counts / counts.sum())
    taking_part = max(2, np.count_nonzero(counts))
    assert np.abs(drawn - share).max() <= 1 - 1 / (2 * taking_part - 2) + 1e-9


def test_one_language_alone(make_store: Callable[..., TokenStore]) -> None:
    mixture = mixture_of([make_store("de", "germanic", 1000)])
    language, number = mixture.locate(np.arange(31))
    assert set(language.tolist()) == {0} and sorted(number.tolist()) == list(range(31))


def test_random_access_equals_reading_in_order(stores: list[TokenStore]) -> None:
    mixture = mixture_of(stores)
    samples = np.arange(60_000, 72_000)  # across a block's border
    language, number = mixture.locate(samples)
    shuffled = np.random.default_rng(0).permutation(len(samples))
    again_language, again_number = mixture.locate(samples[shuffled])
    assert (again_language == language[shuffled]).all()
    assert (again_number == number[shuffled]).all()
    for i in (0, 1, 5536, 11_999):
        one_language, one_number = mixture.locate(samples[i : i + 1])
        assert (one_language[0], one_number[0]) == (language[i], number[i])
    # far out, where any index would be long
    assert mixture.locate(np.array([10**14]))[0].shape == (1,)


def test_every_epoch_of_a_language_sees_each_sequence_once(stores: list[TokenStore]) -> None:
    mixture = mixture_of(stores)
    language, number = mixture.locate(np.arange(3 * SAMPLES_PER_BLOCK))
    for i, store in enumerate(mixture.stores):
        sequences = max(1, (store.tokens - 1) // 32)
        drawn = number[language == i]
        epochs = drawn[: len(drawn) // sequences * sequences].reshape(-1, sequences)
        assert len(epochs) >= 2
        assert (np.sort(epochs, axis=1) == np.arange(sequences)).all()
        if sequences > 10:
            assert (epochs[0] != epochs[1]).any()  # in another order


def test_seed_changes_the_order_and_other_languages_do_not(stores: list[TokenStore]) -> None:
    samples = np.arange(2000)

    def order(mixture: LanguageMixture, code: str) -> list[int]:
        language, number = mixture.locate(samples)
        return number[language == mixture.languages.index(code)][:100].tolist()

    assert order(mixture_of(stores), "en") == order(mixture_of(stores), "en")
    assert order(mixture_of(stores), "en") != order(mixture_of(stores, seed=2), "en")
    assert order(mixture_of(stores), "en") != order(mixture_of(stores), "de")
    without_hindi = [store for store in stores if store.language != "hi"]
    assert order(mixture_of(stores), "en") == order(mixture_of(without_hindi), "en")


def test_languages_of_one_size_are_not_in_step(make_store: Callable[..., TokenStore]) -> None:
    """Translations lie at the same places of their stores; they must not come up together."""
    stores = [make_store(code, "germanic", 3000) for code in ("de", "nl")]
    mixture = mixture_of(stores)
    language, number = mixture.locate(np.arange(180))
    assert (number[language == 0] == number[language == 1]).mean() < 0.1


def test_read_gives_the_located_tokens(stores: list[TokenStore]) -> None:
    mixture = mixture_of(stores)
    language, number = mixture.locate(np.arange(200))
    ids, valid = mixture.read(language, number)
    assert ids.shape == (200, 33) and ids.dtype == np.int64 and (valid == 32).all()
    for row in range(200):
        store = mixture.stores[language[row]]
        start = number[row] * 32
        assert ids[row].tolist() == store.read(start, start + 33).tolist()


def test_speed_is_no_bottleneck(stores: list[TokenStore]) -> None:
    """25 000 samples of 2048 tokens a second on one core; a tenth is asked on a shared machine."""
    mixture = LanguageMixture(stores, 2048, MixtureConfig(), 1)
    start = time.process_time()
    for step in range(20):
        mixture.read(*mixture.locate(np.arange(step * 512, step * 512 + 512)))
    assert 20 * 512 / (time.process_time() - start) > 2_500


def test_a_weight_that_rounds_to_nothing_is_reported(
    make_store: Callable[..., TokenStore], caplog: pytest.LogCaptureFixture
) -> None:
    stores = [make_store("de", "germanic", 1000), make_store("ru", "slavic", 1000)]
    ratios = {"germanic": 1.0, "slavic": 1e-6}
    with caplog.at_level(logging.WARNING):
        mixture = mixture_of(stores, weighting=Weighting.ratios, ratios=ratios)
    assert "weight of ru is below 1/131072" in caplog.text
    assert mixture.weights == {"de": 1.0, "ru": 0.0}

    caplog.clear()  # a ratio of 0 is a wish, not an accident
    mixture_of(stores, weighting=Weighting.ratios, ratios={"germanic": 1.0, "slavic": 0.0})
    assert not caplog.records


def test_describe(stores: list[TokenStore]) -> None:
    mixture = mixture_of(stores, weighting=Weighting.uniform)
    rows = {(row.family, row.language): row for row in mixture.rows()}
    total = sum(tokens for _, tokens in SIZES.values())
    assert len(rows) == 4 + 6
    slavic = rows["slavic", ""]
    assert slavic.tokens == 21_000 and slavic.weight == pytest.approx(0.25, abs=1e-4)
    assert slavic.sampling_ratio == pytest.approx(0.25 * total / 21_000, rel=1e-3)
    assert rows["germanic", ""].sampling_ratio < 1 < rows["kra-dai", "th"].sampling_ratio
    table = mixture.describe().splitlines()
    assert len(table) == 11 and table[7].split()[:3] == ["th", "150", "4"]


def test_fingerprint_follows_what_the_stream_depends_on(stores: list[TokenStore]) -> None:
    base = mixture_of(stores).fingerprint()
    assert mixture_of(list(reversed(stores))).fingerprint() == base
    for changed in (
        mixture_of(stores, seed=2),
        mixture_of(stores, alpha=0.3),
        mixture_of(stores[1:]),
        LanguageMixture(stores, 64, MixtureConfig(), 1),
    ):
        assert changed.fingerprint() != base


def test_mixture_refuses(make_store: Callable[..., TokenStore]) -> None:
    german = make_store("de", "germanic", 100)
    with pytest.raises(ValueError, match="at least one token store"):
        mixture_of([])
    with pytest.raises(ValueError, match="more than one token store of de"):
        mixture_of([german, german])
    other = make_store("ru", "slavic", 100, tokenizer_fingerprint="0" * 64)
    with pytest.raises(ValueError, match=r"different tokenizers: .*/de of fff.*/ru of 000"):
        mixture_of([german, other])

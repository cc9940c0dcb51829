import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from data.config import (
    MixtureConfig,
    MixtureStage,
    RatioUnit,
    Weighting,
    WhenExhausted,
    WithinFamily,
)
from data.language_mixture import LanguageMixture, language_shares, stream_differences
from data.mixture_schedule import BLOCK
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


FAMILY = {code: family for code, (family, _) in SIZES.items()}
TOKENS = {code: float(tokens) for code, (_, tokens) in SIZES.items()}


def families(shares: dict[str, float]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for code, share in shares.items():
        sums[FAMILY[code]] = sums.get(FAMILY[code], 0.0) + share
    return sums


def shares_of(**settings: Any) -> dict[str, float]:
    mixture = MixtureConfig(**settings)
    return language_shares(mixture, TOKENS, FAMILY, mixture.max_epochs)


def test_weightings_act_on_families() -> None:
    of_families = {"germanic": 140_000, "slavic": 21_000, "indic": 4_000, "kra-dai": 150}
    total = sum(of_families.values())
    expected = {family: n / total for family, n in of_families.items()}
    assert families(shares_of(weighting=Weighting.proportional)) == pytest.approx(expected)
    powers = {family: n**0.3 for family, n in of_families.items()}
    expected = {family: n / sum(powers.values()) for family, n in powers.items()}
    assert families(shares_of(alpha=0.3)) == pytest.approx(expected)
    quarter = dict.fromkeys(of_families, 0.25)
    assert families(shares_of(weighting=Weighting.uniform)) == pytest.approx(quarter)
    ratios = {"germanic": 0.2, "slavic": 0.4, "indic": 0.3, "kra-dai": 0.1}
    assert families(shares_of(weighting=Weighting.ratios, ratios=ratios)) == pytest.approx(ratios)
    # normalised objective of the law: p proportional to (gamma / lambda) ** (1 / (1 + gamma))
    gamma = {"germanic": 0.1, "slavic": 0.1, "indic": 0.2, "kra-dai": 0.1}
    optimum = families(shares_of(weighting=Weighting.scaling_law, gamma=gamma))
    price = {f: g / optimum[f] ** (1 + g) for f, g in gamma.items()}
    assert list(price.values()) == pytest.approx([price["indic"]] * 4)
    losses = {"germanic": 1.0, "slavic": 2.0, "indic": 1.0, "kra-dai": 1.0}
    weighted = families(shares_of(weighting=Weighting.scaling_law, gamma=gamma, losses=losses))
    assert weighted["slavic"] > optimum["slavic"]


def test_unimax_weighs_languages() -> None:
    """Of 200 000 tokens at one pass: th and uk, hi are taken whole, the rest shared evenly."""
    shares = shares_of(weighting=Weighting.unimax, budget=100_000, max_epochs=1)
    amounts = {"th": 150, "uk": 1000, "hi": 4000, "ru": 20_000, "de": 37_425, "en": 37_425}
    assert shares == pytest.approx({code: n / 100_000 for code, n in amounts.items()})


def test_rules_within_a_family() -> None:
    def germanic(**settings: Any) -> float:
        shares = shares_of(**settings)
        return shares["de"] / (shares["de"] + shares["en"])

    assert germanic() == pytest.approx(5 / 14)
    assert germanic(within_family=WithinFamily.uniform) == pytest.approx(0.5)
    root = germanic(within_family=WithinFamily.temperature, within_family_alpha=0.5)
    assert root == pytest.approx(5**0.5 / (5**0.5 + 3))
    given = {"de": 0.9, "en": 0.1, "ru": 1.0, "uk": 0.0, "hi": 1.0, "th": 1.0}
    settings: Any = {"within_family": WithinFamily.shares, "language_shares": given}
    assert germanic(**settings) == pytest.approx(0.9)
    assert shares_of(**settings)["uk"] == 0


def test_dropped_languages_leave_their_families_to_the_others() -> None:
    ratios = {"germanic": 0.5, "slavic": 0.5, "indic": 0.0, "kra-dai": 0.0}
    shares = shares_of(weighting=Weighting.ratios, ratios=ratios, drop_languages=["de"])
    assert shares["de"] == 0 and shares["en"] == pytest.approx(0.5)


def test_rules_that_do_not_fit_the_data() -> None:
    ratios = {"slavic": 0.5, "indik": 0.5}
    with pytest.raises(ValueError, match=r"mixture\.ratios lacks germanic, indic, kra-dai and nam"):
        shares_of(weighting=Weighting.ratios, ratios=ratios)
    with pytest.raises(ValueError, match=r"mixture\.gamma lacks germanic"):
        shares_of(weighting=Weighting.scaling_law, gamma={"slavic": 0.1})
    gamma = {"germanic": 0.1, "slavic": 0.1, "indic": 0.2, "kra-dai": 0.1}
    with pytest.raises(ValueError, match=r"mixture\.losses lacks germanic"):
        shares_of(weighting=Weighting.scaling_law, gamma=gamma, losses={"slavic": 0.1})
    with pytest.raises(ValueError, match="language_shares does not name de of the family germanic"):
        shares_of(within_family=WithinFamily.shares, language_shares={"en": 1.0})
    with pytest.raises(ValueError, match=r"language_shares names dee; did you mean de\? The data"):
        shares_of(within_family=WithinFamily.shares, language_shares={"en": 1.0, "dee": 1.0})
    with pytest.raises(ValueError, match=r"language_shares of germanic sum to 1\.4"):
        shares_of(
            within_family=WithinFamily.shares,
            language_shares={"en": 0.5, "de": 0.9, "ru": 1, "uk": 0, "hi": 1, "th": 1},
        )
    with pytest.raises(ValueError, match="drop_languages names xx"):
        shares_of(drop_languages=["xx"])
    with pytest.raises(ValueError, match="leaves no language"):
        shares_of(drop_languages=list(TOKENS))
    ratios = {"germanic": 0.5, "slavic": 0.5, "indic": 0.0, "kra-dai": 0.0}
    with pytest.raises(ValueError, match="slavic has a ratio but no language that is drawn"):
        shares_of(weighting=Weighting.ratios, ratios=ratios, drop_languages=["ru", "uk"])


def test_ratios_of_characters(make_store: Callable[..., TokenStore]) -> None:
    """Half of the characters, not half of the tokens: de has 4 characters a token, hi 2."""
    stores = [
        make_store("de", "germanic", 1000, characters=4000),
        make_store("hi", "indic", 1000, characters=2000),
    ]
    ratios = {"germanic": 0.5, "indic": 0.5}
    mixture = mixture_of(
        stores, weighting=Weighting.ratios, ratios=ratios, unit=RatioUnit.characters
    )
    assert mixture.weights == pytest.approx({"de": 1 / 3, "hi": 2 / 3})
    with pytest.raises(ValueError, match=r"unit=bytes: .*/de does not record its bytes"):
        mixture_of(stores, unit=RatioUnit.bytes)


@pytest.mark.parametrize("weighting", [Weighting.temperature, Weighting.uniform])
def test_ratios_hold_at_every_prefix(stores: list[TokenStore], weighting: Weighting) -> None:
    """Within one sample for every language and family, through three blocks."""
    mixture = mixture_of(stores, weighting=weighting)
    total = 2 * BLOCK + 1234
    language, _ = mixture.locate(np.arange(total))
    drawn = np.cumsum(np.eye(len(SIZES))[language], axis=0)
    weights = np.array(list(mixture.weights.values()))
    error = np.abs(drawn - np.outer(np.arange(1, total + 1), weights))
    assert error.max() < 1 + 1e-6
    member = np.array([[FAMILY[c] == f for f in mixture.families] for c in mixture.languages])
    assert np.abs((drawn - np.outer(np.arange(1, total + 1), weights)) @ member).max() < 1 + 1e-6
    assert mixture.counts(total) == dict(
        zip(mixture.languages, drawn[-1].astype(int).tolist(), strict=True)
    )


def test_one_language_alone(make_store: Callable[..., TokenStore]) -> None:
    mixture = mixture_of([make_store("de", "germanic", 1000)])
    language, number = mixture.locate(np.arange(31))
    assert set(language.tolist()) == {0} and sorted(number.tolist()) == list(range(31))


def test_random_access_equals_reading_in_order(stores: list[TokenStore]) -> None:
    mixture = mixture_of(stores)
    samples = np.arange(1_000, 5_000)  # across blocks' borders
    language, number = mixture.locate(samples)
    shuffled = np.random.default_rng(0).permutation(len(samples))
    again_language, again_number = mixture.locate(samples[shuffled])
    assert (again_language == language[shuffled]).all()
    assert (again_number == number[shuffled]).all()
    for i in (0, 1, 1048, 3_999):
        one_language, one_number = mixture.locate(samples[i : i + 1])
        assert (one_language[0], one_number[0]) == (language[i], number[i])
        assert mixture.locate_one(int(samples[i])) == (language[i], number[i])
    # far out, where any index would be long
    assert mixture.locate(np.array([10**14]))[0].shape == (1,)


def test_every_epoch_of_a_language_sees_each_sequence_once(stores: list[TokenStore]) -> None:
    mixture = mixture_of(stores)
    language, number = mixture.locate(np.arange(60_000))
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
    rows = mixture.read(language, number)
    ids, valid = rows.ids, rows.valid
    assert ids.shape == (200, 33) and ids.dtype == np.int64 and (valid == 32).all()
    for row in range(200):
        store = mixture.stores[language[row]]
        start = number[row] * 32
        assert ids[row].tolist() == store.read(start, start + 33).tolist()


def test_an_epoch_cap_is_never_exceeded(stores: list[TokenStore]) -> None:
    """th has 4 sequences, uk 31: what they leave goes to their families, then to all."""
    settings: Any = {"weighting": Weighting.uniform, "within_family": WithinFamily.uniform}
    mixture = mixture_of(
        stores, max_epochs=2, when_exhausted=WhenExhausted.redistribute, **settings
    )
    sequences = {s.store.language: len(s) for s in mixture.sequences}
    assert mixture.end is not None  # two passes over everything
    assert mixture.end == sum(2 * n for n in sequences.values())
    assert [code for _, code in mixture.exhausted()] == ["th", "uk", "hi", "ru", "de", "en"]
    language, number = mixture.locate(np.arange(mixture.end))
    for i, code in enumerate(mixture.languages):
        drawn = np.bincount(number[language == i], minlength=sequences[code])
        assert (drawn == 2).all()  # every sequence exactly twice
    assert mixture.epochs(mixture.end) == pytest.approx(dict.fromkeys(sequences, 2.0))
    at, _ = mixture.exhausted()[1]  # uk: ru takes over within the family
    before, after = mixture.ratios.shares(at - 1), mixture.ratios.shares(at)
    ru, uk = mixture.languages.index("ru"), mixture.languages.index("uk")
    assert after[ru] == pytest.approx(before[ru] + before[uk])

    stopped = mixture_of(stores, max_epochs=2, when_exhausted=WhenExhausted.stop, **settings)
    assert stopped.end == mixture.exhausted()[0][0]
    endless = mixture_of(stores, max_epochs=2, **settings)
    assert endless.end is None and endless.exhausted()[0] == mixture.exhausted()[0]
    more = mixture_of(
        stores, language_max_epochs={"th": 1}, when_exhausted=WhenExhausted.stop, **settings
    )
    assert more.end is not None and more.end < stopped.end
    with pytest.raises(ValueError, match="language_max_epochs names xx"):
        mixture_of(stores, language_max_epochs={"xx": 1})


def test_a_stage_changes_ratios_and_no_sample_is_lost_or_repeated(
    stores: list[TokenStore],
) -> None:
    """Dropped and back: each language goes on in its own order where it had stopped."""
    stages = [
        MixtureStage(from_tokens=32 * 3000, weighting=Weighting.uniform, drop_languages=["en"]),
        MixtureStage(from_tokens=32 * 7000, ramp_tokens=32 * 500, weighting=Weighting.proportional),
    ]
    plain, staged = mixture_of(stores), mixture_of(stores, stages=stages)
    language, number = staged.locate(np.arange(12_000))
    en = staged.languages.index("en")
    # whole samples: one that was asked for in part by then may come after
    assert (language[3000:7000] == en).sum() <= 1 and (language[7000:] == en).sum() > 1000
    for i in range(len(stores)):
        mine = number[language == i]
        plain_language, plain_number = plain.locate(np.arange(30_000))
        theirs = plain_number[plain_language == i]
        both = min(len(mine), len(theirs))
        assert both > 50 and (mine[:both] == theirs[:both]).all()


def test_rounding_to_sequences_keeps_stages_in_order(stores: list[TokenStore]) -> None:
    """3.5 sequences and a ramp of 3.5 are 4 + 4, the next stage, from 7.03 on, would be 7."""
    stages = [
        MixtureStage(from_tokens=112, ramp_tokens=112, weighting=Weighting.uniform),
        MixtureStage(from_tokens=225, weighting=Weighting.proportional),
    ]
    mixture = mixture_of(stores, stages=stages)
    assert [start for start, _, _ in mixture.ratios.segments()] == [0, 4, 8, 8]
    for n in (3, 4, 7, 8, 9, 1000):
        assert sum(mixture.asked(n).values()) == pytest.approx(n)


def test_a_run_may_change_what_comes_later(stores: list[TokenStore]) -> None:
    plain = mixture_of(stores)
    change = MixtureStage(from_tokens=32 * 9000, weighting=Weighting.uniform)
    changed = mixture_of(stores, stages=[change])
    assert stream_differences(plain.fingerprint(), changed.fingerprint(), 9000) == []
    (line,) = stream_differences(plain.fingerprint(), changed.fingerprint(), 9001)
    assert line == "the ratios that changed at sample 9000, before sample 9001, are new"
    (line,) = stream_differences(changed.fingerprint(), plain.fingerprint(), 9001)
    assert line.endswith("have gone")
    assert stream_differences(plain.fingerprint(), mixture_of(stores, alpha=0.3).fingerprint(), 1)
    earlier = mixture_of(stores, stages=[MixtureStage(from_tokens=32 * 5, ramp_tokens=320)])
    later = mixture_of(stores, stages=[MixtureStage(from_tokens=32 * 6, ramp_tokens=320)])
    (line,) = stream_differences(earlier.fingerprint(), later.fingerprint(), 100)[:1]
    assert line.startswith("from_sample of a change of ratios: was 5, is 6")


def test_a_language_may_be_added_to_a_run(
    stores: list[TokenStore], make_store: Callable[..., TokenStore]
) -> None:
    """The new store takes no part before its stage, and moves none of the samples before it."""
    with_fi = [*stores, make_store("fi", "uralic", 5000)]
    stage = MixtureStage(from_tokens=32 * 4096)
    before = mixture_of(stores)
    after = mixture_of(with_fi, drop_languages=["fi"], stages=[stage])
    assert stream_differences(before.fingerprint(), after.fingerprint(), 4096) == []
    samples = np.arange(2048)
    language, number = before.locate(samples)
    new_language, new_number = after.locate(samples)
    assert (number == new_number).all()
    assert [before.languages[i] for i in language] == [after.languages[i] for i in new_language]
    fi = after.languages.index("fi")
    drawn, _ = after.locate(np.arange(9000))
    assert fi not in drawn[:4096] and fi in drawn[4096:]


def test_describe(stores: list[TokenStore]) -> None:
    mixture = mixture_of(stores, weighting=Weighting.uniform)
    rows = {(row.family, row.language): row for row in mixture.rows()}
    total = sum(tokens for _, tokens in SIZES.values())
    assert len(rows) == 4 + 6
    slavic = rows["slavic", ""]
    assert slavic.tokens == 21_000 and slavic.weight == pytest.approx(0.25)
    assert slavic.sampling_ratio == pytest.approx(0.25 * total / 21_000, rel=1e-3)
    assert rows["germanic", ""].sampling_ratio < 1 < rows["kra-dai", "th"].sampling_ratio
    table = mixture.describe().splitlines()
    assert len(table) == 11 and table[7].split()[:3] == ["th", "150", "4"]


def test_fingerprint_follows_what_the_stream_depends_on(stores: list[TokenStore]) -> None:
    base = mixture_of(stores).fingerprint()
    assert mixture_of(list(reversed(stores))).fingerprint() == base
    one_family = dict.fromkeys(FAMILY, "all")
    for changed, line in (
        (mixture_of(stores, seed=2), "seed: was 1, is 2"),
        (mixture_of(stores, alpha=0.3), "share of de from sample 0: was"),
        (mixture_of(stores[1:]), "token store of de: was "),
        (LanguageMixture(stores, 64, MixtureConfig(), 1), "seq_length: was 32, is 64"),
        (
            LanguageMixture(stores, 32, MixtureConfig(), 1, families=one_family),
            "family of de: was germanic, is all",
        ),
    ):
        differences = stream_differences(base, changed.fingerprint(), 10)
        assert any(found.startswith(line) for found in differences), differences


def test_differences_do_not_bury_their_reason(stores: list[TokenStore]) -> None:
    base = mixture_of(stores).fingerprint()
    longer = LanguageMixture(stores, 64, MixtureConfig(), 1).fingerprint()
    assert stream_differences(base, longer, 10) == ["seq_length: was 32, is 64"]
    lines = stream_differences(base, mixture_of(stores, alpha=0.3).fingerprint(), 10)
    assert len(lines) == 4 and lines[3] == f"... and {len(SIZES) - 3} more"
    assert re.fullmatch(r"share of de from sample 0: was 0\.\d{4}, is 0\.\d{4}", lines[0])
    nearly = json.loads(json.dumps(base))
    nearly["ratios"][0]["shares"]["de"] *= 1 + 1e-9
    (line,) = stream_differences(base, nearly, 10)
    assert re.fullmatch(r"share of de from sample 0: was 0\.\d{9,}, is 0\.\d{9,}", line)
    gone = stream_differences(base, base | {"stores": {}}, 10)
    assert len(gone) == 4 and gone[0].endswith("is not there")


def test_mixture_refuses(make_store: Callable[..., TokenStore]) -> None:
    german = make_store("de", "germanic", 100)
    with pytest.raises(ValueError, match="at least one token store"):
        mixture_of([])
    with pytest.raises(ValueError, match="more than one token store of de"):
        mixture_of([german, german])
    other = make_store("ru", "slavic", 100, tokenizer_fingerprint="0" * 64)
    with pytest.raises(ValueError, match=r"different tokenizers: .*/de of fff.*/ru of 000"):
        mixture_of([german, other])

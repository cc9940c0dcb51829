import re

import pytest

from data.language_families import (
    LANGUAGES,
    canonical_code,
    family_of,
    find_language,
    near,
    unknown_language,
)

# every language of the text that data.corpora builds
CORPORA = """
af am ar as az bg bn bo ca cs cy da de dz el en es et eu fa fi fil fr ga gl gu he hi hr hu hy id it
ja ka kk km kn ko lo lt lv mk ml mn mr ms mt my nb ne nl nn om or pa pl pt pt-BR ro ru si sk sl so
sr sr-Latn sv sw ta te th tr ug uk ur uz vi xh zh zh-Hant zu
"""


def test_the_table_is_wide_enough_and_consistent() -> None:
    assert len(LANGUAGES) >= 150
    assert len({language.family for language in LANGUAGES.values()}) >= 40
    for code, language in LANGUAGES.items():
        assert language.code == code and language.name and language.stock
        assert language.family == language.family.lower().strip()
        assert re.fullmatch("[a-z]{3}", language.iso639_3)
        assert re.fullmatch("([a-z]{2})?", language.iso639_1)
        assert language.scripts
        assert all(re.fullmatch("[A-Z][a-z]{3}", script) for script in language.scripts)


def test_one_stock_per_family_and_one_language_per_code() -> None:
    stocks: dict[str, set[str]] = {}
    for language in LANGUAGES.values():
        stocks.setdefault(language.family, set()).add(language.stock)
    assert all(len(found) == 1 for found in stocks.values())
    # a grouping may name stocks too: where a stock is written as a branch, it is that branch
    for language in LANGUAGES.values():
        if language.stock.lower() in stocks:
            assert stocks[language.stock.lower()] == {language.stock}
    written_twice = [lang.iso639_3 for lang in LANGUAGES.values() if "-" not in lang.code]
    assert len(written_twice) == len(set(written_twice))


def test_the_languages_of_the_corpora_are_in() -> None:
    assert not [code for code in CORPORA.split() if code not in LANGUAGES]


def test_a_row() -> None:
    hindi = LANGUAGES["hi"]
    assert (hindi.name, hindi.iso639_1, hindi.iso639_3) == ("Hindi", "hi", "hin")
    assert (hindi.family, hindi.stock, hindi.scripts) == ("indic", "Indo-European", ("Deva",))
    assert LANGUAGES["fil"].iso639_1 == "" and LANGUAGES["pt-BR"].iso639_1 == "pt"


@pytest.mark.parametrize(
    ("code", "family"),
    [
        ("de", "germanic"),
        ("pt-BR", "romance"),
        ("hi", "indic"),
        ("kn", "dravidian"),
        ("zh-Hant", "sino-tibetan"),
        ("sr-Latn", "slavic"),
        ("th", "kra-dai"),
        ("sw", "bantu"),
        ("deu", "germanic"),
    ],
)
def test_families_are_branches(code: str, family: str) -> None:
    assert family_of(code) == family


@pytest.mark.parametrize(
    ("code", "canonical"),
    [
        ("no", "nb"),
        ("iw", "he"),
        ("in", "id"),
        ("tl", "fil"),
        ("zh-CN", "zh"),
        ("zh_TW", "zh-Hant"),
        ("zh-hant", "zh-Hant"),
        ("zho_Hant", "zh-Hant"),
        ("zh-Hant-HK", "zh-Hant"),
        ("deu", "de"),
        ("ger", "de"),
        ("deu_Latn", "de"),
        ("srp_Latn", "sr-Latn"),
        ("sr_Cyrl", "sr"),
        ("por", "pt"),
        ("pt-br", "pt-BR"),
        ("pt-PT", "pt"),
        ("uz-Cyrl", "uz"),
        ("es-419", "es"),
        ("arb_Arab", "ar"),
    ],
)
def test_other_ways_to_write_a_code(code: str, canonical: str) -> None:
    assert canonical_code(code) == canonical


def test_every_code_is_its_own() -> None:
    """No alias takes a code that the table has."""
    assert {code: canonical_code(code) for code in LANGUAGES} == {code: code for code in LANGUAGES}


@pytest.mark.parametrize("code", ["hrb", "xx", "", "de-foobar", "zh-hantt", "english text"])
def test_no_row_for_what_is_no_code(code: str) -> None:
    assert find_language(code) is None


def test_unknown_language_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"'zh-hantt'.*did you mean 'zh-Hant'.*\"family\" field"):
        family_of("zh-hantt")
    assert "did you mean 'de'" in unknown_language("germn")
    assert "did you mean" not in unknown_language("qqqq")


def test_near() -> None:
    assert near("Germanik", ["romance", "germanic", "slavic"]) == ["germanic"]

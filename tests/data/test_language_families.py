import pytest

from data.language_families import LANGUAGES, family_of


def test_the_table_is_wide_enough_and_consistent() -> None:
    assert len(LANGUAGES) >= 60
    assert len({language.family for language in LANGUAGES.values()}) >= 20
    for code, language in LANGUAGES.items():
        assert language.code == code and language.name and language.stock
        assert language.family == language.family.lower().strip()


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
    ],
)
def test_families_are_branches(code: str, family: str) -> None:
    assert family_of(code) == family


def test_unknown_language_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"'zh-hant'.*did you mean 'zh-Hant'.*\"family\" field"):
        family_of("zh-hant")

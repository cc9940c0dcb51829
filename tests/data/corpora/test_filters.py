"""Which languages, and which segments, make it into a corpus."""

import pytest

from data.corpora.filters import English, Pages, is_translated, kept_pages, tidy, tidy_markup
from data.corpora.languages import CODES, NON_LATIN, our_code, parse_languages
from data.corpora.tiers import SOURCES, TIERS, select_sources
from data.language_families import family_of


def test_languages_are_in_the_family_table() -> None:
    assert len(CODES) == len(set(CODES)) == 82
    assert len({family_of(code) for code in CODES}) == 24
    assert set(CODES) > NON_LATIN


@pytest.mark.parametrize(
    ("code", "ours"),
    [
        *[("C", "en"), ("en_GB", "en"), ("zh_TW", "zh-Hant"), ("zh-CN", "zh"), ("nb", "nb")],
        *[("pt-br", "pt-BR"), ("pt_PT", "pt"), ("no", "nb"), ("sr@latin", "sr-Latn")],
        *[("es-419", None), ("de-CH", None), ("ca-valencia", None), ("zh-HK", None), ("xx", None)],
    ],
)
def test_the_packages_names_of_languages(code: str, ours: str | None) -> None:
    assert our_code(code) == ours


def test_countries_that_say_nothing() -> None:
    codes = ("de-DE", "nb-NO", "pt-BR", "zh-TW", "ar-MA", "pa-in", "xx-XX")
    ours = ["de", "nb", "pt-BR", "zh-Hant", "ar", "pa", None]
    assert [our_code(code, with_country=True) for code in codes] == ours


def test_asking_for_languages() -> None:
    assert parse_languages("hi, de,en") == ("en", "de", "hi")
    assert parse_languages("") == ()
    with pytest.raises(ValueError, match=r"--langs en,pt-br: .*'pt-br'; did you mean 'pt-BR'\?"):
        parse_languages("en,pt-br")
    with pytest.raises(ValueError, match=r"no package of these corpora has 'is' \(Icelandic\)"):
        parse_languages("is")


def test_sources_and_tiers() -> None:
    assert {name: len(sources) for name, sources in TIERS.items()} == {
        "tiny": 1, "small": 3, "full": 6, "xl": 8,
    }  # fmt: skip
    for source in SOURCES.values():
        first = next(iter(source.parts))
        assert first in ("all", "en")
        assert set(source.parts) <= {"all", *CODES}
        assert source.license
    names = [s.name for s in select_sources("small", frozen=True, exclude=[])]
    assert names == ["udhr", "gnome"]
    with pytest.raises(ValueError, match="--tier big: there are tiny, small, full, xl"):
        select_sources("big", frozen=False, exclude=[])
    with pytest.raises(ValueError, match="--exclude-source gnom: the sources are udhr, gnome"):
        select_sources("small", frozen=False, exclude=["gnom"])
    with pytest.raises(ValueError, match="--exclude-source udhr: nothing of --tier tiny is left"):
        select_sources("tiny", frozen=False, exclude=["udhr"])


def test_tidy() -> None:
    assert tidy(" e\u0301a\u00adb\n\u200e c\u2028d\x00\ufeff ") == "éab c d"
    for kept in ("\u200b", "\u200c", "\u200d"):  # Khmer words, Persian and Indic letters
        assert tidy(f"a{kept}b") == f"a{kept}b"
    assert tidy_markup("<p>a &lt;b&gt; <em>c</em>&nbsp;d</p>") == "a <b> c d"


def test_what_counts_as_translated() -> None:
    assert is_translated("en", "with the")
    assert is_translated("de", "Will auf das Portal")
    assert is_translated("de", "Der Film „The Matrix“")
    assert not is_translated("de", "Click the button with this name")
    assert is_translated("hi", "Linux चलाएँ और देखें")
    assert not is_translated("hi", "Linux GNOME")
    assert not is_translated("hi", "यह एक हिंदी वाक्य है और यह and the rest of that")
    assert not is_translated("fr", "bytes \ufffd broken")


def kept(language: str, pages: Pages, english: Pages, by_page: bool = False) -> list[tuple]:
    found = kept_pages(language, pages, English(english), by_page=by_page)
    return [(page.page, page.seg_ids, page.segments) for page in found]


def test_english_decides_for_all_languages() -> None:
    english: Pages = {
        "one": [
            ("a", "The first sentence of this page."),
            ("b", "Short"),
            ("c", "The second sentence of this page."),
            ("d", "An untranslated sentence of the page."),
        ],
        "two": [("a", "The first sentence of this page."), ("b", "1234567 1234567 12345")],
    }
    german: Pages = {
        "one": [
            ("a", "Der erste Satz auf dieser Seite."),
            ("b", "Ein Satz, der auf Englisch zu kurz war."),
            ("c", "Der zweite Satz auf dieser Seite, und er ist lang."),
            ("d", "An untranslated sentence of the page."),
            ("e", "Ein Satz, den es auf Englisch gar nicht gibt."),
        ],
        "two": [("a", "Der erste Satz auf dieser Seite."), ("b", "Eine andere Sache hier.")],
    }
    assert kept("en", english, english) == [
        ("one", ["a", "c", "d"], [english["one"][i][1] for i in (0, 2, 3)])
    ]
    assert kept("de", german, english) == [
        ("one", ["a", "c"], [german["one"][i][1] for i in (0, 2)])
    ]


def test_pages_align_by_place_or_as_a_whole() -> None:
    texts = [f"Sentence number {word} of the English page." for word in ("one", "two", "three")]
    english: Pages = {"p": [(None, text) for text in texts]}
    same: Pages = {"p": [(None, f"Satz {i} der deutschen Seite") for i in range(3)]}
    assert kept("de", same, english) == [("p", ["0", "1", "2"], [t for _, t in same["p"]])]
    more: Pages = {"p": [*same["p"], (None, "Satz 1 der deutschen Seite"), (None, "kurz")]}
    assert kept("de", more, english) == [("p", None, [t for _, t in same["p"]])]
    assert kept("de", same, english, by_page=True) == [("p", None, [t for _, t in same["p"]])]
    tiny: Pages = {"p": [("0", "Satz 1 der deutschen Seite")]}
    assert kept("de", tiny, {"p": [("0", texts[0])]}) == []  # under 40 bytes

from collections.abc import Callable
from pathlib import Path

import pytest

from data.family_grouping import NoGroupError, load_grouping
from data.language_families import LANGUAGES

# what the paper's abstract and section 3 say: five families, Kannada among the Indic, Chinese alone
FIVE = {"germanic", "romance", "slavic", "indic", "sino-tibetan"}


@pytest.fixture
def grouping_file(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_branch_is_the_default_and_the_corpus_wins() -> None:
    assert load_grouping().family_of("de") == "germanic"
    recorded = {"de": "west", "tlh": "klingonic"}
    grouping = load_grouping(recorded=recorded)
    assert grouping.families_of(["de", "tlh", "fr"]) == recorded | {"fr": "romance"}
    with pytest.raises(ValueError, match="'tlh' is not in the family table"):
        load_grouping().family_of("tlh")


def test_stock_and_one_each() -> None:
    stock = load_grouping("stock", {"tlh": "klingonic"})
    assert stock.families_of(["de", "hi", "ar", "tlh"]) == {
        "de": "indo-european",
        "hi": "indo-european",
        "ar": "afro-asiatic",
        "tlh": "klingonic",
    }
    assert load_grouping("one_each").families_of(["de", "fr"]) == {"de": "de", "fr": "fr"}


def test_the_five_families_of_the_paper(caplog: pytest.LogCaptureFixture) -> None:
    five = load_grouping("five_families")
    families = five.families_of(list(LANGUAGES))
    assert set(families.values()) == FIVE
    assert families["kn"] == "indic"  # areal
    assert {code for code in families if families[code] == "sino-tibetan"} == {"zh", "zh-Hant"}
    assert families["ca"] == "romance" and families["ru"] == "slavic"
    assert five.family_of("ja") is None and five.family_of("my") is None
    assert "five_families leaves out " in caplog.text and " ja" in caplog.text


def test_a_grouping_of_ones_own(grouping_file: Callable[[str], str]) -> None:
    path = grouping_file(
        "north: [germanic, Uralic, no, lit]\nasia: [sino-tibetan, ja]\nown: [klingonic]\nrest: keep"
    )
    families = load_grouping(path, {"tlh": "klingonic", "et": "finnic"}).families_of(
        ["de", "nb", "fi", "et", "lt", "lv", "ja", "zh-Hant", "tlh"]
    )
    assert families == {
        "de": "north",
        "nb": "north",
        "fi": "north",
        "et": "north",  # by its stock, though the corpus calls its family finnic
        "lt": "north",  # by its ISO 639-3 code
        "lv": "baltic",  # the rest
        "ja": "asia",
        "zh-Hant": "asia",
        "tlh": "own",
    }


def test_a_language_goes_before_its_family_and_that_before_its_stock(
    grouping_file: Callable[[str], str],
) -> None:
    path = grouping_file("a: [en]\nb: [germanic]\nc: [indo-european]\n")
    families = load_grouping(path).families_of(["fr", "de", "en"])
    assert families == {"fr": "c", "de": "b", "en": "a"}


def test_languages_of_no_group(grouping_file: Callable[[str], str]) -> None:
    grouping = load_grouping(grouping_file("north: [germanic]"))
    with pytest.raises(NoGroupError, match=r"mine.yaml: fr, hi in none of its groups.*rest: drop"):
        grouping.families_of(["de", "fr", "hi"])
    with pytest.raises(NoGroupError, match="fr in none"):
        grouping.family_of("fr")
    dropping = load_grouping(grouping_file("north: [germanic]\nrest: drop"))
    assert dropping.families_of(["de", "fr"]) == {"de": "north"}
    with pytest.raises(ValueError, match="none of the languages fr, hi is in one of its groups"):
        dropping.families_of(["fr", "hi"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("north: [germanik]", r"group north: 'germanik' is neither.*did you mean 'germanic'"),
        ("north: [qqqq]", r"group north: 'qqqq' is neither a language nor a family nor a stock;"),
        ("a: [de]\nb: [germanic, de]", "de is named twice, in a and in b"),
        ("a: [nb]\nb: ['no']", "no is named twice, in a and in b"),
        ("a: [nb]\nb: [no]", "no is named twice, in a and in b"),  # YAML's false
        ("a: germanic", r"a must be a list.*and is 'germanic'"),
        ("a: []", "a must be a list"),
        ("- germanic", "must be a table of lists"),
        ("", "must be a table of lists"),
        ("a: [de]\nrest: other", "rest: other must be drop or keep"),
        ("a: [de", "not YAML"),
    ],
)
def test_bad_groupings(grouping_file: Callable[[str], str], text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load_grouping(grouping_file(text))


def test_no_such_grouping(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"five_familys: there is no.*did you mean five_families"):
        load_grouping("five_familys")
    with pytest.raises(ValueError, match=r"There are branch, stock, one_each, five_families"):
        load_grouping("qqqq")
    with pytest.raises(FileNotFoundError, match=r"none.yaml: no such file"):
        load_grouping(str(tmp_path / "none.yaml"))

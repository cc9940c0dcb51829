"""The languages a corpus may hold, and the packages' names for them."""

import difflib

from data.language_families import LANGUAGES

# in the order of docs and tables: by family, larger languages first
_CODES = """
    en de nl sv da nb nn af  fr es it pt pt-BR ro ca gl  ru uk pl cs sk sl hr sr sr-Latn bg mk
    lt lv  el  cy ga  hy  hi bn gu mr ur as pa ne or si  fa  ta te kn ml  ar he am mt  om so
    fi hu et  tr kk ug az uz  mn  ka  eu  zh zh-Hant dz my bo  ja  ko  id ms fil  vi km  th lo
    sw zu xh
"""
CODES: tuple[str, ...] = tuple(_CODES.split())

# Written in an alphabet with no ASCII letters: a translation without any other letter is none.
_NON_LATIN = """
    ru uk sr bg mk el hy hi bn gu mr ur as pa ne or si fa ta te kn ml ar he am kk ug mn ka
    zh zh-Hant dz my bo ja ko km th lo
"""
NON_LATIN: frozenset[str] = frozenset(_NON_LATIN.split())

_ALIASES = {
    "c": "en",
    "en-gb": "en",
    "en-us": "en",
    "no": "nb",
    "pt-pt": "pt",
    "sr@latin": "sr-Latn",
    "zh-cn": "zh",
    "zh-tw": "zh-Hant",
}
# The Debian handbook names a country with every language; only these are variants of their own.
_COUNTRIES = {"pt-br", "zh-cn", "zh-tw", "pt-pt", "en-us", "en-gb"}
_BY_LOWER = {code.lower(): code for code in CODES}


def our_code(code: str, *, with_country: bool = False) -> str | None:
    """BCP 47 code for a package's name of a language; None for one we do not take.

    "zh_TW" -> "zh-Hant", "C" -> "en", "es-419" -> None. with_country: the package always adds a
    country that says nothing, "de-DE" -> "de"; otherwise "de-CH" is another language than "de".
    """
    code = code.replace("_", "-").lower()
    code = _ALIASES.get(code, code)
    if with_country and code not in _COUNTRIES and code.lower() not in _BY_LOWER:
        code = code.partition("-")[0]
    return _BY_LOWER.get(code.lower())


def parse_languages(text: str) -> tuple[str, ...]:
    """The codes of `--langs de,hi,zh-Hant`, each once and in the table's order.

    Raises ValueError for a code no package of ours has, with the nearest that one has.
    """
    asked = [code for code in text.replace(",", " ").split() if code]
    for code in asked:
        if code not in CODES:
            close = difflib.get_close_matches(code, CODES, n=1, cutoff=0.5)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            name = f" ({LANGUAGES[code].name})" if code in LANGUAGES else ""
            raise ValueError(
                f"--langs {text}: no package of these corpora has {code!r}{name}{hint} "
                f"They have: {' '.join(CODES)}"
            )
    return tuple(code for code in CODES if code in asked)

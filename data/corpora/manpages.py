"""manpages-XX: the manual pages of Linux, in troff macros.

Pages align by name only: translators merge and split paragraphs. Some troff is left in the text.
"""

import gzip
import re
import zlib

from data.corpora.filters import Pages, tidy
from data.corpora.languages import our_code
from data.corpora.packages import BrokenPackageError, Package

SHORTEST_PARAGRAPH = 30  # characters

_ESCAPE = re.compile(
    r"\\f(?:\[[^\]]*\]|\(..|.)|\\s[+-]?\d+|\\[&|^/,%:]|\\\*\(..|\\\*.|\\c$|\\m\[[^\]]*\]"
)
_CHARACTERS = {
    "\\-": "-",
    "\\(aq": "'",
    "\\(cq": "’",
    "\\(oq": "‘",
    "\\(lq": "“",
    "\\(rq": "”",
    "\\(bu": "•",
    "\\(em": "—",
    "\\(en": "–",
    "\\(Fo": "«",
    "\\(Fc": "»",
    "\\(ha": "^",
    "\\(ti": "~",
    "\\ ": " ",
    "\\~": " ",
    "\\e": "\\",
}
_VERBATIM = {".nf", ".EX", ".Bd"}
_VERBATIM_ENDS = {".fi", ".EE", ".Ed"}
# inside a sentence: their arguments are words of it
_FONTS = ".B .I .BR .RB .IR .RI .BI .IB .SM"
_MEANINGS = ".Nm .Ar .Fl .Xr .Pa .Dq .Ql"
_INLINE = {*_FONTS.split(), *_MEANINGS.split()}


def paragraphs(troff: str) -> list[str]:
    """The running text of a manual page; tables, code and headings left out."""
    result: list[str] = []
    words: list[str] = []

    def flush() -> None:
        text = " ".join(words)
        words.clear()
        for escape, character in _CHARACTERS.items():
            text = text.replace(escape, character)
        text = tidy(_ESCAPE.sub("", text))
        if len(text) >= SHORTEST_PARAGRAPH:
            result.append(text)

    verbatim = False
    for line in troff.split("\n"):
        if line[:1] in (".", "'"):
            macro, _, arguments = line.partition(" ")
            if macro in _VERBATIM or macro in _VERBATIM_ENDS:
                verbatim = macro in _VERBATIM
            if macro in _INLINE:
                if not verbatim and arguments:
                    words.append(arguments.replace('" "', "").replace('"', ""))
            elif not macro.startswith('.\\"'):  # a comment
                flush()
        elif not line.strip():
            flush()
        elif not verbatim:
            words.append(line)
    flush()
    return result


def read(package: Package) -> dict[str, Pages]:
    suffix = package.name.removeprefix("manpages").removesuffix("-dev").removeprefix("-")
    language = our_code(suffix or "en")
    if language is None:
        raise BrokenPackageError(f"{package.path}: no language known by the name {package.name}")
    pages: Pages = {}
    for name, content in package.files(lambda n: "/man/" in n and n.endswith(".gz")):
        if language == "zh" and "/zh_CN/" not in name:
            continue
        try:
            troff = gzip.decompress(content).decode("utf-8", "replace")
        except (OSError, EOFError, zlib.error) as error:
            raise BrokenPackageError(f"{package.path}: {name} is no gzip file: {error}") from error
        page = name.rsplit("/", 1)[-1].removesuffix(".gz")
        pages[page] = [(None, text) for text in paragraphs(troff)]
    return {language: pages}

"""gnome-user-docs: the help of the GNOME desktop, Mallard XML, one page per topic.

Translations keep the order of paragraphs, so segments align by their place on the page.
"""

import xml.etree.ElementTree as ElementTree

from data.corpora.filters import Pages, tidy
from data.corpora.languages import our_code
from data.corpora.packages import BrokenPackageError, Package

_MALLARD = "{http://projectmallard.org/1.0/}"
_TEXT = {_MALLARD + tag for tag in ("p", "title", "desc")}
_FOLDER = "/share/help/"


def read(package: Package) -> dict[str, Pages]:
    result: dict[str, Pages] = {}
    for name, content in package.files(lambda n: n.endswith(".page") and _FOLDER in n):
        locale, book, page = name.split(_FOLDER, 1)[1].split("/", 2)
        language = our_code(locale)
        if language:
            # no entity tricks to fear: the package is signed, and expat limits expansion
            try:
                root = ElementTree.fromstring(content)
            except ElementTree.ParseError as error:
                raise BrokenPackageError(f"{package.path}: {name} is no XML: {error}") from error
            segments: list[str] = []
            _collect(root, segments)
            pages = result.setdefault(language, {})
            pages[f"{book}/{page.removesuffix('.page')}"] = [(None, text) for text in segments]
    return result


def _collect(element: ElementTree.Element, segments: list[str]) -> None:
    for child in element:
        if child.tag in _TEXT:
            segments.append(tidy("".join(child.itertext())))
        elif child.tag != _MALLARD + "comment":  # notes to editors: not translated everywhere
            _collect(child, segments)

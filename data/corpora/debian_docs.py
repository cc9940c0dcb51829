"""debian-handbook and installation-guide-amd64: books as DocBook HTML, one file per section.

Translations keep the order of blocks, so segments align by their place on the page.
"""

import re
from collections.abc import Callable

from data.corpora.filters import Pages, tidy_markup
from data.corpora.languages import our_code
from data.corpora.packages import Package

_BLOCK = re.compile(
    r"</?(?:div|p|ul|ol|dl|li|dt|dd|table|thead|tbody|tr|td|th|h[1-6]|blockquote|hr|br|body|html"
    r"|head|title|a id)\b[^>]*>"
)
_NOT_TEXT = re.compile(
    r"<(pre|script|style)\b.*?</\1>|<!--.*?-->"
    r'|<div class="(?:navheader|navfooter|toc|footnotes)".*?</div>',
    re.S,
)


def _read(package: Package, folder: str, code: Callable[[str], str | None]) -> dict[str, Pages]:
    result: dict[str, Pages] = {}
    for name, content in package.files(lambda n: folder in n and n.endswith(".html")):
        locale, page = name.split(folder, 1)[1].split("/")[:2]
        language = code(locale)
        if language and not page.startswith("bk"):  # bk..: the book's own table of contents
            markup = _NOT_TEXT.sub("<p>", content.decode("utf-8", "replace"))
            markup = markup[max(markup.find("<body"), 0) :]
            segments = [text for text in map(tidy_markup, _BLOCK.split(markup)) if text]
            result.setdefault(language, {})[page.removesuffix(".html")] = [
                (None, text) for text in segments
            ]
    return result


def read_handbook(package: Package) -> dict[str, Pages]:
    return _read(
        package, "/debian-handbook/html/", lambda locale: our_code(locale, with_country=True)
    )


def read_installation_guide(package: Package) -> dict[str, Pages]:
    return _read(package, "/doc/installation-guide-amd64/", our_code)

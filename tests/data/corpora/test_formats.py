"""Each format of package, from bytes to pages of segments."""

import struct
from pathlib import Path

import pytest

from data.corpora import chromium, debian_docs, gnome, libreoffice, manpages, udhr
from data.corpora.packages import BrokenPackageError, Package
from tests.data.corpora.made import deb, gz, mo, npm, pak, udhr_files


def package(folder: Path, name: str, files: dict[str, bytes]) -> Package:
    if name.startswith("npm:"):
        path = npm(folder / "it.tgz", files)
    else:
        path = deb(folder / f"{name}_1_all.deb", files)
    return Package(name, path, "")


def test_gnome(tmp_path: Path) -> None:
    page = (
        '<page xmlns="http://projectmallard.org/1.0/"><info><desc>What  it\n is.</desc></info>'
        "<title>{title}</title><comment><p>Not for readers.</p></comment>"
        "<steps><item><p>Press <key>Tab</key>.</p></item></steps></page>"
    )
    files = {
        "usr/share/help/C/gnome-help/a.page": page.format(title="Keys").encode(),
        "usr/share/help/sr@latin/gnome-help/a.page": page.format(title="Tasteri").encode(),
        "usr/share/help/xx/gnome-help/a.page": b"not read, and no XML",
        "usr/share/help/C/gnome-help/a.png": b"an image",
        "usr/share/doc/gnome-user-docs/copyright": b"CC",
    }
    it = package(tmp_path, "gnome-user-docs", files)
    assert gnome.read(it) == {
        "en": {"gnome-help/a": [(None, "What it is."), (None, "Keys"), (None, "Press Tab.")]},
        "sr-Latn": {
            "gnome-help/a": [(None, "What it is."), (None, "Tasteri"), (None, "Press Tab.")]
        },
    }
    assert it.copyright == "CC"
    files["usr/share/help/C/gnome-help/b.page"] = b"<page>"
    with pytest.raises(BrokenPackageError, match=r"gnome-help/b.page is no XML"):
        gnome.read(package(tmp_path, "gnome-user-docs", files))


def test_chromium(tmp_path: Path) -> None:
    long = "This is a longer string"
    en = {1: f"{long} one", 2: "Short", 3: "{N, plural, one {a b c d}}", 4: f"{long} &amp; <b>two"}
    de = {1: "Eins\u00ad und noch mehr (&E)", 2: "Kurz", 4: "Zwei"}
    files = {
        "usr/lib/chromium/locales/en-GB.pak": pak(en, {5: 0}),
        "usr/lib/chromium/locales/de.pak": pak(de),
        "usr/lib/chromium/locales/de_NEUTER.pak": b"not read",
        "usr/lib/chromium/locales/es-419.pak": b"not read",
        "usr/lib/chromium/locales/en-GB.pak.info": b"A,1,../../a.grdp\nB,2,../../a.grdp\n"
        b"C,3,../../a.grdp\nD,4,../../a.grdp\nE,5,../../b/c.grd\nF,9,../../b/c.grd\n",
    }
    assert chromium.read(package(tmp_path, "chromium-l10n", files)) == {
        "en": {
            "a#000": [("A", f"{long} one"), ("D", f"{long} & two")],
            "b/c#000": [("E", f"{long} one")],
        },
        "de": {"a#000": [("A", "Eins und noch mehr"), ("D", "Zwei")], "b/c#000": [("E", "")]},
    }
    del files["usr/lib/chromium/locales/en-GB.pak.info"]
    with pytest.raises(BrokenPackageError, match=r"no en-GB.pak with its .pak.info in it"):
        chromium.read(package(tmp_path, "chromium-l10n", files))


def test_paks_that_are_none() -> None:
    with pytest.raises(ValueError, match="got 4 and 1"):
        chromium.read_pak(struct.pack("<IB3xHH", 4, 1, 0, 0) + bytes(6))
    whole = pak({1: "some text", 2: "more"}, {3: 1})
    assert chromium.read_pak(whole) == {1: b"some text", 2: b"more", 3: b"more"}
    for size in range(len(whole)):
        with pytest.raises(ValueError, match="cut short"):
            chromium.read_pak(whole[:size])


def test_debian_docs(tmp_path: Path) -> None:
    page = (
        "<html><head><title>Left out</title></head><body>"
        '<div class="navheader"><p>Next</p></div>'
        "<h1>1. {title}</h1><p>One &mdash; <em>two</em>.</p><pre>code</pre><ul><li>Item</li></ul>"
        "<!-- note --></body></html>"
    )
    handbook, guide = "usr/share/doc/debian-handbook/html", "usr/share/doc/installation-guide-amd64"
    one = page.format(title="Titel").encode()
    expected = [(None, "1. Titel"), (None, "One — two."), (None, "Item")]
    files = {f"{handbook}/{code}/sect.a.html": one for code in ("de-DE", "pt-BR", "zh-TW", "eo-XX")}
    files[f"{handbook}/de-DE/bk01-toc.html"] = one
    assert debian_docs.read_handbook(package(tmp_path, "debian-handbook", files)) == {
        code: {"sect.a": expected} for code in ("de", "pt-BR", "zh-Hant")
    }
    files = {f"{guide}/{code}/ch01.html": one for code in ("en", "zh_CN", "pt")}
    files[f"{guide}/en/install.txt"] = b"the whole book again"
    it = package(tmp_path, "installation-guide-amd64", files)
    assert debian_docs.read_installation_guide(it) == {
        code: {"ch01": expected} for code in ("en", "zh", "pt")
    }


def test_libreoffice_help(tmp_path: Path) -> None:
    page = (
        '<p id="menu">Menu entry before the page.</p><div id="DisplayArea">'
        '<h1 id="hd_1">{title}</h1><p id="par_1" class="paragraph">Press '
        '<span hidden="true" id="x" class="MAC">Command</span><span>Ctrl</span>+S.</p>'
        '<p id="par_2" class="bascode">Dim x</p><p id="par_1">Twice</p><p id="bm_module">x</p>'
        '<p id="par_3"> </p></div>'
    )
    root = "usr/share/libreoffice/help"
    files = {
        f"{root}/ca/text/swriter/a.html": page.format(title="Desa").encode(),
        f"{root}/ca-valencia/text/swriter/a.html": page.format(title="Guarda").encode(),
        f"{root}/ca/index.html": b"<p id='a'>not a page</p>",
    }
    expected = [("hd_1", "Desa"), ("par_1", "Press Ctrl+S.")]
    it = package(tmp_path, "libreoffice-help-ca", files)
    assert libreoffice.read_help(it) == {"ca": {"swriter/a": expected}}
    with pytest.raises(BrokenPackageError, match=r"no language known by the name .*-help-xx"):
        libreoffice.read_help(package(tmp_path, "libreoffice-help-xx", files))


def test_libreoffice_ui(tmp_path: Path) -> None:
    messages = {
        "": "Project-Id-Version: 1",
        "STR_A|tip\x04_Save all of the files": "सभी फ़ाइलें _सहेजें",
        "STR_B\x04Short one": "छोटा",
        "STR_C\x04One file is here\x00%d files": "बहुवचन",
    }
    files = {"usr/lib/libreoffice/program/resource/hi/LC_MESSAGES/sw.mo": mo(messages)}
    read = libreoffice.read_ui(package(tmp_path, "libreoffice-l10n-hi", files))
    ((seg_id, english),) = read["en"]["sw#STR_A"]
    assert english == "Save all of the files"
    assert read["hi"] == {"sw#STR_A": [(seg_id, "सभी फ़ाइलें सहेजें")]}
    whole = mo(messages)
    with pytest.raises(ValueError, match=r"little-endian .mo file, got one that starts 0xde120495"):
        list(libreoffice.read_mo(struct.pack(">I", 0x950412DE) + whole[4:]))
    for size in (0, 3, 20, 40, len(whole) - 4):
        with pytest.raises(ValueError, match="cut short"):
            list(libreoffice.read_mo(whole[:size]))


def test_udhr(tmp_path: Path) -> None:
    files = udhr_files(articles=2)
    files["declaration/007.html"] = b"<p>a language we do not take</p>"
    files["declaration/mlt.html"] = (
        "<p>Bidu</p><p> </p><article data-number='1'></article>"
        '<article data-number="12"><p>Wieħed.</p><ol><li>Tnejn.</li></ol></article>'
    ).encode()
    it = package(tmp_path, "npm:udhr@6.0.0", files)
    read = udhr.read(it)
    assert set(read) == {"en", "de", "hi", "zh-Hant", "mt"}
    assert list(read["en"]) == ["preamble", "article01", "article02"]
    assert read["mt"] == {"preamble": [("0", "Bidu")], "article12": [("0", "Wieħed. Tnejn.")]}
    assert it.copyright == "(The MIT License)\n"


def test_manpages(tmp_path: Path) -> None:
    page = r"""
.\" a comment between
.TH LS 1
.SH NAME
ls \- Verzeichnisinhalte auflisten und noch mehr
.PP
Dieser \fIText\fP hat \(lqZeichen\(rq und
.B \-\-fette
.\" nicht zu sehen
.BR Namen (1)
in einem Satz.
.nf
int main(void); /* code is not running text */
.fi
Kurz.
"""
    files = {
        "usr/share/man/de/man1/ls.1.gz": gz(page),
        "usr/share/man/de/man1/so.1.gz": gz(".so man1/ls.1\n"),
    }
    read = manpages.read(package(tmp_path, "manpages-de-dev", files))
    assert read == {
        "de": {
            "ls.1": [
                (None, "ls - Verzeichnisinhalte auflisten und noch mehr"),
                (None, "Dieser Text hat “Zeichen” und --fette Namen (1) in einem Satz."),
            ],
            "so.1": [],
        }
    }
    assert list(manpages.read(package(tmp_path, "manpages", {}))) == ["en"]
    chinese = {f"usr/share/man/zh_{c}/man1/a.1.gz": gz("文" * 40 + c) for c in ("CN", "TW")}
    read = manpages.read(package(tmp_path, "manpages-zh", chinese))
    assert read == {"zh": {"a.1": [(None, "文" * 40 + "CN")]}}
    with pytest.raises(BrokenPackageError, match="no language known by the name manpages-xx"):
        manpages.read(package(tmp_path, "manpages-xx", {}))
    files["usr/share/man/de/man1/so.1.gz"] = gz("cut")[:-3]
    with pytest.raises(BrokenPackageError, match=r"so.1.gz is no gzip file"):
        manpages.read(package(tmp_path, "manpages-de", files))

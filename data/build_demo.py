"""Rebuilds data/demo/ from Chromium's own translations: `python -m data.build_demo`.

    chromium-l10n (.deb) -> one .pak of strings per language -> sentences present and translated in
    every language -> documents of neighbouring sentences -> chromium_ui.jsonl.gz, tokenizer.json

Needs a Debian-like system with apt-get, or a package file given with --deb. The package is only
unpacked in memory, never installed. The same package gives the same bytes, but Debian updates it
with every Chromium release, so a rebuild with a newer one gives newer sentences: the README beside
the text names the version in use.
"""

import argparse
import gzip
import json
import re
import subprocess
import tempfile
from pathlib import Path

from data.corpora import chromium
from data.corpora.packages import package_files, sha256_of
from data.interrupted import say_interrupted
from data.language_families import LANGUAGES, family_of
from data.tokenizer import train_tokenizer

PACKAGE = "chromium-l10n"
# 18 families, of which germanic, romance, slavic, indic and sino-tibetan are the five of
# arXiv 2410.12883
_SAME_CODE = """
de nl sv  fr es it ro  ru uk pl cs  lt  el  hi bn mr ur  fa  ta te kn  ar he am  fi hu  tr
ja  ko  id fil  vi  th  sw
"""
_LATIN = "en de nl sv es fr it pt ro pl cs lt fi hu tr id fil vi sw"
# ours -> the package's
LOCALES = {code: code for code in _SAME_CODE.split()} | {
    "en": "en-GB",
    "pt": "pt-PT",
    "zh": "zh-CN",
    "zh-Hant": "zh-TW",
}
SENTENCES = 264
SENTENCES_PER_DOCUMENT = 8
VOCAB_SIZE = 8192
# lengths of the English sentence in characters: long enough to be prose, short enough for variety
SHORTEST, LONGEST = 45, 160

_NON_LATIN = set(LOCALES) - set(_LATIN.split())


def download(folder: Path) -> Path:
    """Fetches the package with the system's own client and returns its path."""
    result = subprocess.run(
        ["apt-get", "--quiet", "download", PACKAGE], cwd=folder, capture_output=True, text=True
    )
    found = sorted(folder.glob(f"{PACKAGE}_*.deb"))
    if result.returncode or not found:
        raise RuntimeError(
            f"apt-get download {PACKAGE} failed with status {result.returncode}; run apt-get "
            f"update, or give a downloaded package with --deb\n{result.stderr.strip()}"
        )
    return found[0]


def read_pak(content: bytes) -> dict[int, str]:
    """Strings by resource id from a Chromium .pak file, cleaned."""
    strings = chromium.read_pak(content)
    return {i: chromium.clean(text.decode("utf-8", "replace")) for i, text in strings.items()}


def is_prose(english: str) -> bool:
    return (
        SHORTEST <= len(english) <= LONGEST
        and english[-1] in ".!?"
        and not re.search(r"[{}$<>|\\\ufffd]|https?:|www\.", english)
    )


def is_translated(language: str, text: str, english: str) -> bool:
    """Whether a string is in the language, as far as script and identity to English can tell."""
    if not text or re.search(r"[{}$<>|\\\ufffd]", text):
        return False
    if language == "en":
        return True
    ascii_share = sum(c.isascii() for c in text) / len(text)
    return text != english and not (language in _NON_LATIN and ascii_share > 0.75)


def select_sentences(
    strings: dict[str, dict[int, str]], resource_info: str
) -> list[tuple[str, int]]:
    """(source file, resource id) of SENTENCES sentences that are translated in every language.

    Takes runs of neighbours from the package's own order, spread evenly over all of it, so that a
    document is about one thing and the whole is about many.
    """
    usable, seen = [], set()
    for line in resource_info.splitlines():
        _, resource, source = chromium.source_file(line)
        english = strings["en"].get(resource, "")
        if not english or english in seen or not is_prose(english):
            continue
        if all(
            is_translated(language, strings[language].get(resource, ""), english)
            for language in LOCALES
        ):
            seen.add(english)
            usable.append((source, resource))
    usable.sort(key=lambda item: item[0])  # stable: neighbours in one source file stay neighbours
    runs = [
        usable[i : i + SENTENCES_PER_DOCUMENT]
        for i in range(0, len(usable), SENTENCES_PER_DOCUMENT)
    ]
    runs = [run for run in runs if len(run) == SENTENCES_PER_DOCUMENT]
    wanted = SENTENCES // SENTENCES_PER_DOCUMENT
    if len(runs) < wanted:
        raise ValueError(f"{len(runs)} documents of parallel sentences, {wanted} wanted")
    return [item for i in range(wanted) for item in runs[i * len(runs) // wanted]]


def build(deb: Path, out: Path) -> None:
    """Writes chromium_ui.jsonl.gz, tokenizer.json, LICENSE.chromium and README.md into `out`."""
    of_locale = {locale: language for language, locale in LOCALES.items()}
    strings, resource_info, copyright_file = {}, "", ""
    for name, content in package_files(deb):
        base = name.rsplit("/", 1)[-1]
        if base.endswith(".pak") and base[:-4] in of_locale:
            strings[of_locale[base[:-4]]] = read_pak(content)
        elif base == "en-GB.pak.info":
            resource_info = content.decode()
        elif base == "copyright":
            copyright_file = content.decode()
    missing = sorted(set(LOCALES) - set(strings))
    if missing:
        raise ValueError(f"{deb}: no strings for {', '.join(missing)}")

    chosen = select_sentences(strings, resource_info)
    lines = []
    for language in sorted(LOCALES):
        for first in range(0, len(chosen), SENTENCES_PER_DOCUMENT):
            run = chosen[first : first + SENTENCES_PER_DOCUMENT]
            record = {
                "text": "\n".join(strings[language][resource] for _, resource in run),
                "language": language,
                "family": family_of(language),
                "source": "chromium",
                "license": "BSD-3-Clause",
                "doc_id": f"chromium/{run[0][0]}/{first // SENTENCES_PER_DOCUMENT:03d}",
            }
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    text = "".join(lines).encode()
    out.mkdir(parents=True, exist_ok=True)
    # filename="" and mtime=0 keep the gzip header free of anything but the text
    with (
        open(out / "chromium_ui.jsonl.gz", "wb") as file,
        gzip.GzipFile(filename="", mode="wb", fileobj=file, compresslevel=9, mtime=0) as zipped,
    ):
        zipped.write(text)

    records = [json.loads(line) for line in lines]
    train_tokenizer((r["text"] for r in records), VOCAB_SIZE).save(str(out / "tokenizer.json"))
    (out / "LICENSE.chromium").write_text(chromium_license(copyright_file), encoding="utf-8")
    (out / "README.md").write_text(readme(deb, records), encoding="utf-8")


def chromium_license(copyright_file: str) -> str:
    """Copyright line and BSD text of Chromium's own files, out of Debian's copyright file."""
    holder = re.search(r"^Files: \*\nCopyright: (.*)\nLicense: BSD-3-clause$", copyright_file, re.M)
    terms = re.search(
        r"^License: BSD-3-clause\n((?: .*\n)+)",
        copyright_file[holder.end() if holder else 0 :],
        re.M,
    )
    if not holder or not terms:
        raise ValueError("the package's copyright file no longer has the BSD text where it was")
    body = [line[1:] if line != " ." else "" for line in terms.group(1).rstrip("\n").split("\n")]
    return f"Copyright {holder.group(1)}\n\n" + "\n".join(body) + "\n"


def readme(deb: Path, records: list[dict[str, str]]) -> str:
    families: dict[str, list[str]] = {}
    for code in sorted(LOCALES):
        families.setdefault(family_of(code), []).append(f"{LANGUAGES[code].name} ({code})")
    rows = "\n".join(f"| {family} | {', '.join(families[family])} |" for family in sorted(families))
    megabytes = sum(len(r["text"].encode()) for r in records) / 1e6
    return f"""# The demo text

Sentences from the user interface of Chromium, as translated by its project: the same {SENTENCES}
sentences in {len(LOCALES)} languages of {len(families)} families, {megabytes:.2f} MB of UTF-8.
Each document is {SENTENCES_PER_DOCUMENT} neighbouring sentences, one a line; documents with the
same `doc_id` are translations of each other. English is British, Portuguese European.

- `chromium_ui.jsonl.gz`: one document a line, with the fields
  `text`, `language`, `family`, `source`, `license`, `doc_id`
- `tokenizer.json`: byte-level BPE with {VOCAB_SIZE} entries, trained on that text
- `LICENSE.chromium`: the licence of the text, BSD-3-Clause, not of the code around it

Made by `python -m data.build_demo` from the Debian package `{deb.name}`
(sha256 `{sha256_of(deb)}`).

It is text of one narrow domain, and parallel: good for trying things and for tests, and no basis
for a claim about any language.

| family | languages |
|---|---|
{rows}
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data.build_demo", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--deb", type=Path, help=f"a {PACKAGE} package; default: apt-get download")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "demo")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        build(arguments.deb or download(Path(folder)), arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    say_interrupted()
    main()

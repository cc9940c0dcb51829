"""One part of a source, from packages to kept segments, into the cache.

    CACHE/extracted/SOURCE-PART-KEY/de.jsonl    a line per page: [page, seg_ids or null, text]
                                    part.json   counts, sha256 of the files, seconds
                                    english.json   only in a part "en": what the others need
                                    licenses/   the packages' own licence files

The folder is written under another name and renamed, so it is whole or not there; KEY is a digest
of the packages and of the code that reads them, so it is never stale.
"""

import hashlib
import inspect
import json
import os
import shutil
import tempfile
import time
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from data.corpora import filters, languages, packages
from data.corpora.files import write_text
from data.corpora.filters import English, Pages, kept_pages
from data.corpora.packages import BrokenPackageError, Package, sha256_of
from data.corpora.tiers import Source
from data.durable_files import sync_folder


@dataclass(frozen=True)
class Part:
    source: Source
    label: str  # "all", "en" or a language
    packages: tuple[Package, ...]
    english: str | None  # key of the part that has the English side; None: this part has it itself
    key: str

    def folder(self, cache: Path) -> Path:
        return cache / "extracted" / f"{self.source.name}-{self.label}-{self.key}"

    @property
    def name(self) -> str:
        return self.source.name + ("" if self.label == "all" else f" {self.label}")


def part_key(source: Source, label: str, sha256s: list[str], english: str | None) -> str:
    """16 hex digits that change with anything that can change the part's text."""
    digest = hashlib.sha256()
    code = [inspect.getsourcefile(module) for module in (filters, languages, packages)]
    for file in [*code, inspect.getsourcefile(source.read), __file__]:
        assert file
        digest.update(Path(file).read_bytes())
    facts = [source.name, source.by_page, label, sha256s, english, unicodedata.unidata_version]
    digest.update(json.dumps(facts).encode())
    return digest.hexdigest()[:16]


def plan_parts(
    sources: tuple[Source, ...], fetched: dict[str, Package], wanted: set[str] | None
) -> list[Part]:
    """The parts to read, each after the one with its English. wanted: None means all languages."""
    result = []
    for source in sources:
        english: str | None = None
        for label, names in source.parts.items():
            if label not in ("all", "en") and wanted is not None and label not in wanted:
                continue
            found = tuple(fetched[name] for name in names)
            key = part_key(source, label, [package.sha256 for package in found], english)
            result.append(Part(source, label, found, english, key))
            if label == "en":
                english = key
    return result


def package_names(sources: tuple[Source, ...], wanted: set[str] | None) -> dict[str, Source]:
    """The packages that the parts need, and whose they are."""
    return {
        name: source
        for source in sources
        for label, names in source.parts.items()
        if label in ("all", "en") or wanted is None or label in wanted
        for name in names
    }


def is_extracted(part: Part, cache: Path) -> bool:
    """Whether the part is in the cache, undamaged; what is there but damaged is removed."""
    folder = part.folder(cache)
    if not folder.exists():
        return False
    try:
        facts = json.loads((folder / "part.json").read_text(encoding="utf-8"))
        if all(sha256_of(folder / name) == digest for name, digest in facts["sha256"].items()):
            return True
    except (OSError, ValueError, KeyError):
        pass
    shutil.rmtree(folder)
    return False


def extract(part: Part, cache: Path) -> None:
    """Reads the part's packages and leaves its folder in the cache. Raises BrokenPackageError."""
    started, cpu = time.monotonic(), time.process_time()
    target = part.folder(cache)
    target.parent.mkdir(parents=True, exist_ok=True)
    pages = _read(part)
    if part.english is None:
        if not pages.get("en"):
            raise BrokenPackageError(f"{part.packages[0].path}: no English text found in it")
        english_pages = pages["en"]
    else:
        english_folder = target.with_name(f"{part.source.name}-en-{part.english}")
        english_pages = json.loads((english_folder / "english.json").read_text(encoding="utf-8"))
    english = English(english_pages)

    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=".extracting-"))
    try:
        counts: dict[str, dict[str, int]] = {}
        for language, of_language in pages.items():
            # a part "en" may see other languages, and others English: each writes its own
            if part.label in ("all", language):
                counts[language] = _write(temporary, language, of_language, english, part.source)
        if part.label == "en":
            write_text(temporary / "english.json", json.dumps(english_pages, ensure_ascii=False))
        (temporary / "licenses").mkdir()
        for package in part.packages:
            if package.copyright:
                name = (
                    package.name.replace(":", "-") + ".copyright"
                )  # not .txt: that is text to train on
                write_text(temporary / "licenses" / name, package.copyright)
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        facts = {
            "counts": counts,
            "sha256": {str(path.relative_to(temporary)): sha256_of(path) for path in files},
            "seconds": round(time.monotonic() - started, 2),
            "cpu_seconds": round(time.process_time() - cpu, 2),
        }
        write_text(temporary / "part.json", json.dumps(facts, indent=1))
        for old in target.parent.iterdir():  # no glob: "help-zh-*" would be "help-zh-Hant-..." too
            if old.name.rpartition("-")[0] == target.name.rpartition("-")[0]:
                shutil.rmtree(old)  # of other packages, or of older code
        os.rename(temporary, target)
        sync_folder(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _read(part: Part) -> dict[str, Pages]:
    """All packages of the part as one: pages of one name are joined by segment id."""
    merged: dict[str, Pages] = {}
    for package in part.packages:
        try:
            read = part.source.read(package)
        except BrokenPackageError:
            raise
        except ValueError as error:
            raise BrokenPackageError(f"{package.path}: {error}") from error
        for language, pages in read.items():
            if part.label not in ("all", language):
                continue
            ours = merged.setdefault(language, {})
            for page, segments in pages.items():
                if page not in ours:
                    ours[page] = list(segments)
                elif segments and segments[0][0] is not None:
                    known = {seg_id for seg_id, _ in ours[page]}
                    ours[page] += [s for s in segments if s[0] not in known]
    return merged


def _write(
    folder: Path, language: str, pages: Pages, english: English, source: Source
) -> dict[str, int]:
    counts: Counter[str] = Counter()
    lines = []
    for kept in kept_pages(language, pages, english, by_page=source.by_page):
        text = "\n".join(kept.segments)
        lines.append(json.dumps([kept.page, kept.seg_ids, text], ensure_ascii=False) + "\n")
        counts["documents"] += 1
        counts["segments"] += len(kept.segments)
        counts["aligned_segments"] += len(kept.segments) if kept.seg_ids is not None else 0
        counts["characters"] += len(text)
        counts["utf8_bytes"] += len(text.encode())
    if lines:
        write_text(folder / f"{language}.jsonl", "".join(lines))
    return dict(counts)

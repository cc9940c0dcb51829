"""The corpus folder: one JSONL file per language, the packages' licences, and the manifest.

    OUT/de.jsonl          {"text", "language", "family", "source", "license", "doc_id", "seg_ids"}
    OUT/licenses/         the licence file of every package, as it came
    OUT/manifest.json     written last: a folder without it is an unfinished build

In a record, text is one segment per line, and seg_ids names each line, or is null where the
document corresponds to its translations only as a whole. (doc_id, seg_id) is the same content in
every language.
"""

import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data.corpora.extract import Part
from data.corpora.files import LOCK, PARTIAL, only_one, write_text
from data.corpora.languages import CODES
from data.durable_files import sync_folder
from data.language_families import family_of

MANIFEST = "manifest.json"
FORMAT = "magnetron-corpus-1"
SMALLEST_LANGUAGE = 5000  # UTF-8 bytes: less gives no validation split worth the name


def check_folder(out: Path) -> None:
    """Refuses a folder with somebody else's text: it would be lost, or read as part of the corpus.

    Raises ValueError.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file; name a folder")
    # a build that was killed leaves no manifest, but its lock file
    ours = (out / MANIFEST).exists() or (out / LOCK).exists()
    known = {f"{code}.jsonl" for code in CODES} | {_partial(out, code).name for code in CODES}
    strange = sorted(
        path.name for path in out.glob("*.jsonl*") if not ours or path.name not in known
    )
    if strange:
        raise ValueError(
            f"--out {out}: holds {', '.join(strange[:3])}, which no build wrote; choose another "
            "folder, or move that away"
        )


def read_manifest(corpus: Path) -> dict[str, Any]:
    """Raises FileNotFoundError if there is none, ValueError if it is not one of ours."""
    path = corpus / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file: not a corpus of ours, or its build did not end; "
            f"python -m data.corpora build --out {corpus} finishes it"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a manifest of data.corpora ({error!r})") from error
    if found != FORMAT:
        raise ValueError(f"{path}: format {found!r}, this version reads {FORMAT!r}; build it again")
    return manifest


def write_corpus(
    out: Path,
    parts: list[Part],
    cache: Path,
    *,
    wanted: set[str] | None,
    say: Callable[[str], None],
    facts: dict[str, Any],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """Writes the folder from extracted parts and returns the manifest.

    All files are written under temporary names first, then the old manifest goes, the files get
    their names, and the new manifest comes last.
    """
    details = {
        part.key: json.loads((part.folder(cache) / "part.json").read_text(encoding="utf-8"))
        for part in parts
    }
    with only_one(out, say):
        try:
            languages, too_small = _write_languages(out, parts, cache, wanted, details)
            for language in sorted(wanted or ()):
                if language not in languages:
                    size = too_small.get(language, 0)
                    say(f"warning: {language}: {size} bytes, too little: no file")
            manifest: dict[str, Any] = {
                "format": FORMAT,
                **facts,
                "sources": _sources(parts, languages),
                "languages": languages,
                "too_small": too_small,
                # everything above is the same in every build of the same packages; times are not
                "seconds": {
                    "fetch": round(seconds["fetch"], 1),
                    "read": {
                        source: round(sum(details[p.key]["cpu_seconds"] for p in of_source), 1)
                        for source, of_source in _by_source(parts).items()
                    },
                    "total": 0.0,
                },
            }
            _publish(out, list(languages), parts, cache)
            manifest["seconds"]["total"] = round(time.monotonic() - seconds["started"], 1)
            write_text(out / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
            return manifest
        finally:
            for code in CODES:
                _partial(out, code).unlink(missing_ok=True)


def _write_languages(
    out: Path,
    parts: list[Part],
    cache: Path,
    wanted: set[str] | None,
    details: dict[str, dict[str, Any]],
) -> tuple[dict[str, dict[str, Any]], dict[str, int]]:
    """The manifest's entry of every language that has a file now; the bytes of those too small."""
    languages: dict[str, dict[str, Any]] = {}
    too_small: dict[str, int] = {}
    for language in CODES:
        if wanted is not None and language not in wanted:
            continue
        counts = _counts(language, parts, details)
        size = sum(c.get("utf8_bytes", 0) for c in counts.values())
        if size < SMALLEST_LANGUAGE:
            if size:
                too_small[language] = size
            continue
        path = out / f"{language}.jsonl"
        digest, file_bytes = _write_language(path, language, parts, cache)
        total: Counter[str] = sum((Counter(c) for c in counts.values()), Counter())
        languages[language] = {
            "family": family_of(language),
            "file": path.name,
            "sha256": digest,
            "file_bytes": file_bytes,
            **_ordered(total),
            "sources": {source: _ordered(Counter(c)) for source, c in counts.items()},
        }
    if not languages:
        raise ValueError(
            f"--langs {','.join(sorted(wanted or ()))}: the sources {_names(parts)} hold less than "
            f"{SMALLEST_LANGUAGE} bytes of each; take a larger --tier"
        )
    return languages, too_small


def _partial(out: Path, code: str) -> Path:
    return out / f"{code}.jsonl{PARTIAL}"


def _write_language(path: Path, language: str, parts: list[Part], cache: Path) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    with open(_partial(path.parent, language), "wb") as file:
        for record in records(language, parts, cache):
            line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
            digest.update(line)
            size += len(line)
            file.write(line)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest(), size


def records(language: str, parts: list[Part], cache: Path) -> Iterator[dict[str, Any]]:
    family = family_of(language)
    for part in parts:
        path = part.folder(cache) / f"{language}.jsonl"
        if not path.exists():
            continue
        with open(path, encoding="utf-8", newline="\n") as lines:
            for line in lines:
                page, seg_ids, text = json.loads(line)
                yield {
                    "text": text,
                    "language": language,
                    "family": family,
                    "source": part.source.name,
                    "license": part.source.license,
                    "doc_id": f"{part.source.name}/{page}",
                    "seg_ids": seg_ids,
                }


def _publish(out: Path, languages: list[str], parts: list[Part], cache: Path) -> None:
    """From here to the new manifest the folder is visibly unfinished."""
    (out / MANIFEST).unlink(missing_ok=True)
    sync_folder(out)
    licenses = out / "licenses"
    shutil.rmtree(licenses, ignore_errors=True)
    licenses.mkdir()
    for part in parts:
        for path in sorted((part.folder(cache) / "licenses").iterdir()):
            shutil.copyfile(path, licenses / path.name)
    for code in CODES:
        path = out / f"{code}.jsonl"
        if code in languages:
            _partial(out, code).replace(path)
        else:
            path.unlink(missing_ok=True)  # of the corpus that was here
    sync_folder(out)


def _by_source(parts: list[Part]) -> dict[str, list[Part]]:
    result: dict[str, list[Part]] = {}
    for part in parts:
        result.setdefault(part.source.name, []).append(part)
    return result


def _names(parts: list[Part]) -> str:
    return ", ".join(_by_source(parts))


def _counts(
    language: str, parts: list[Part], details: dict[str, dict[str, Any]]
) -> dict[str, dict[str, int]]:
    """Source -> counts of one language."""
    result: dict[str, dict[str, int]] = {}
    for part in parts:
        counts = details[part.key]["counts"].get(language)
        if counts:
            result[part.source.name] = counts
    return result


def _ordered(counts: Counter[str]) -> dict[str, int]:
    fields = ("documents", "segments", "aligned_segments", "utf8_bytes", "characters")
    return {name: counts[name] for name in fields}


def _sources(parts: list[Part], languages: dict[str, dict[str, Any]]) -> dict[str, Any]:
    result = {}
    for name, of_source in _by_source(parts).items():
        source = of_source[0].source
        packages = {package.name: package for part in of_source for package in part.packages}
        result[name] = {
            "title": source.title,
            "license": source.license,
            "moving": source.moving,
            "languages": sum(name in entry["sources"] for entry in languages.values()),
            "utf8_bytes": sum(
                entry["sources"].get(name, {}).get("utf8_bytes", 0) for entry in languages.values()
            ),
            "packages": [
                {
                    "name": package.name,
                    "file": package.path.name,
                    "bytes": package.path.stat().st_size,
                    "sha256": package.sha256,
                }
                for package in packages.values()
            ],
        }
    return result

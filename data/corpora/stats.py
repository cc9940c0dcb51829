"""What a corpus holds: tables out of its manifest, and a check of its files against it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.corpora.output import read_manifest
from data.corpora.packages import sha256_of


def tables(manifest: dict[str, Any]) -> Iterator[str]:
    """Lines of text: languages by family, families, sources with licences. Sizes in 10^6 bytes."""
    languages, sources = manifest["languages"], manifest["sources"]
    by_family: dict[str, list[str]] = {}
    for code, entry in languages.items():
        by_family.setdefault(entry["family"], []).append(code)

    widths = [max(8, len(name)) for name in sources]
    yield (
        f"{'family':<14} {'language':<9} {'documents':>9} {'segments':>9} "
        + " ".join(f"{name:>{width}}" for name, width in zip(sources, widths, strict=True))
        + f" {'MB':>8} {'M chars':>8}"
    )
    for family, codes in by_family.items():
        for code in codes:
            entry = languages[code]
            cells = [
                f"{entry['sources'][name]['utf8_bytes'] / 1e6:>{width}.2f}"
                if name in entry["sources"]
                else " " * width
                for name, width in zip(sources, widths, strict=True)
            ]
            yield (
                f"{family:<14} {code:<9} {entry['documents']:>9,} {entry['segments']:>9,} "
                + " ".join(cells)
                + f" {entry['utf8_bytes'] / 1e6:>8.2f} {entry['characters'] / 1e6:>8.2f}"
            )
    yield ""
    yield f"{'family':<14} {'MB':>8} {'M chars':>8}  languages"
    for family, codes in by_family.items():
        yield (
            f"{family:<14} {_total(manifest, codes, 'utf8_bytes'):>8.2f} "
            f"{_total(manifest, codes, 'characters'):>8.2f}  {' '.join(codes)}"
        )
    yield ""
    yield f"{'source':<19} {'MB':>8} {'languages':>9} {'packages':>8} {'fetched':>9}  licence"
    for name, source in sources.items():
        fetched = sum(package["bytes"] for package in source["packages"]) / 1e6
        yield (
            f"{name:<19} {source['utf8_bytes'] / 1e6:>8.2f} {source['languages']:>9} "
            f"{len(source['packages']):>8} {fetched:>6.1f} MB  {source['license']}"
        )
    yield ""
    yield summary(manifest)


def _total(manifest: dict[str, Any], codes: list[str], field: str) -> float:
    return sum(manifest["languages"][code][field] for code in codes) / 1e6


def summary(manifest: dict[str, Any]) -> str:
    languages = manifest["languages"]
    families = {entry["family"] for entry in languages.values()}
    return (
        f"{len(languages)} languages of {len(families)} families, "
        f"{_total(manifest, list(languages), 'utf8_bytes'):.1f} MB, "
        f"{_total(manifest, list(languages), 'characters'):.1f} million characters "
        f"(tier {manifest['tier']}{', frozen' if manifest['frozen'] else ''}, "
        f"built in {manifest['seconds']['total']:.0f} s)"
    )


def damages(corpus: Path) -> list[str]:
    """One line for every file that is not what the manifest says; empty if all are."""
    result = []
    for code, entry in read_manifest(corpus)["languages"].items():
        path = corpus / entry["file"]
        if not path.is_file():
            result.append(f"{path}: missing")
        elif path.stat().st_size != entry["file_bytes"]:
            result.append(
                f"{path}: {path.stat().st_size} bytes, the manifest says {entry['file_bytes']}"
            )
        elif sha256_of(path) != entry["sha256"]:
            result.append(f"{path}: changed since the build (sha256 differs), language {code}")
    return result

"""Is what lies in a folder of token stores what was written there?

    python -m data.verify STORES [--quick] [--threads N]

STORES is a folder of token stores (with or without train/ and validation/ in it) or one store.
Reads every byte once, on all cores, and finds any change to any file of a store: a flipped bit,
a file cut off or lengthened, files swapped between stores, ids outside the vocabulary, boundaries
that do not add up, documents without their end, two stores of one language, stores of different
tokenizers, training and validation data mixed up, stores that the folder's manifest.json lists and
that are gone. Exit status 0: all is well; 1: something is wrong; 2: there is nothing to check.

--quick checks what a run checks at its start, in well under a millisecond a store: the checksum of
each sidecar, all file sizes, headers, counts, the first and the last 64 KiB of each file, and that
the stores of the folder fit together. It does not see a bit that flipped elsewhere.
"""

import argparse
import json
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.checksums import CHUNK_BYTES
from data.interrupted import say_interrupted
from data.store_checks import Problem, check_contents, check_edges
from data.store_format import DATA_SUFFIXES, with_suffix
from data.token_store import TokenStore

_SPLITS = ("train", "validation")
_SUFFIXES = {*DATA_SUFFIXES, ".sums", ".json"}


@dataclass(frozen=True)
class Report:
    """What was found in one folder: prefix -> opened store, None if it does not even open."""

    stores: dict[Path, TokenStore | None]
    problems: list[Problem]
    leftovers: list[Path]  # hidden temporary files of writers that were killed or are still at work
    bytes_read: int
    seconds: float


def verify_stores(folder: Path | str, full: bool, threads: int = 0) -> list[Problem]:
    """All that is wrong with the stores in a folder, sorted by store; empty if all is well.

    full=False costs milliseconds. threads: 0 takes one per core this process may use. Raises
    FileNotFoundError if the folder holds no store at all.
    """
    return inspect_stores(folder, full, threads).problems


def inspect_stores(
    folder: Path | str,
    full: bool,
    threads: int = 0,
    progress: Callable[[int], None] = lambda _: None,
) -> Report:
    """What verify_stores finds, and how it was found."""
    began = time.perf_counter()
    folder = Path(folder)
    stores: dict[Path, TokenStore | None] = {}
    problems: list[Problem] = []
    for prefix in find_stores(folder):
        try:
            stores[prefix] = TokenStore(prefix)
        except (OSError, ValueError) as error:
            stores[prefix] = None
            problems.append(Problem(prefix, str(error).removeprefix(f"{prefix}: ")))
    problems += _missing(folder, stores)
    opened = [store for store in stores.values() if store]
    problems += check_stores(opened, full, threads, progress)
    read = sum(
        state[1] if full else min(state[1], 2 * CHUNK_BYTES)
        for store in opened
        for state in store.file_states.values()
    )
    problems.sort(key=lambda problem: str(problem.store))
    leftovers = sorted(folder.rglob(".*.tmp")) if folder.is_dir() else []
    return Report(stores, problems, leftovers, read, time.perf_counter() - began)


def check_stores(
    stores: Sequence[TokenStore],
    full: bool,
    threads: int = 0,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Problem]:
    """The same for stores that are open already. progress: told how many bytes have been read."""
    problems = _fit_together(stores)
    if full:
        problems += check_contents(stores, threads or len(os.sched_getaffinity(0)), progress)
    else:
        for store in stores:
            try:
                problems += check_edges(store)
            except OSError as error:
                problems.append(Problem(store.prefix, f"cannot be read: {error}"))
    return problems


def verify_store(store: TokenStore, threads: int = 0) -> list[Problem]:
    """All that is wrong with one open store."""
    return check_stores([store], full=True, threads=threads)


def find_stores(path: Path) -> list[Path]:
    """The prefixes of all stores in a folder and below, also of those that lost files; or of one.

    Raises FileNotFoundError if there is none.
    """
    if not path.is_dir():
        prefix = path.with_suffix("") if path.suffix in _SUFFIXES else path
        if not with_suffix(prefix, ".json").exists() and not with_suffix(prefix, ".idx").exists():
            raise FileNotFoundError(f"{path}: no such folder, and no token store of that name")
        return [prefix]
    prefixes = set()
    for parent, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        suffixes = {os.path.splitext(name)[1] for name in names}
        # a folder of stores may hold none but what is left of one; elsewhere .json is anything
        holds_stores = Path(parent).name in _SPLITS or suffixes & {".bin", ".idx", ".docs"}
        wanted = _SUFFIXES if holds_stores else _SUFFIXES - {".json"}
        for name in names:
            stem, suffix = os.path.splitext(name)
            if suffix in wanted and not name.startswith(".") and name != "manifest.json":
                prefixes.add(Path(parent) / stem)
    if not prefixes:
        raise FileNotFoundError(f"{path}: there is no token store in this folder")
    return sorted(prefixes)


# ---- one store against the others


def _missing(folder: Path, stores: Mapping[Path, TokenStore | None]) -> list[Problem]:
    """What does not agree with the manifest that data.tokenize leaves in its folder, if any."""
    path = folder / "manifest.json"
    try:
        splits = json.loads(path.read_bytes()).get("splits", {})
        listed = {
            folder / split / language: counts["documents"]
            for split, languages in splits.items()
            for language, counts in languages.items()
        }
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        return [Problem(folder, f"manifest.json cannot be read ({error!r})")]
    problems = []
    for prefix, documents in listed.items():
        store = stores.get(prefix)
        if prefix not in stores:
            problems.append(Problem(prefix, "listed in manifest.json, but nothing of it is there"))
        elif store is not None and store.documents != documents:
            what = f"{store.documents:,} documents, but {documents:,} in manifest.json"
            problems.append(Problem(prefix, what))
    return problems


def _fit_together(stores: Sequence[TokenStore]) -> list[Problem]:
    problems = []
    by_folder = defaultdict(list)
    for store in stores:
        by_folder[store.prefix.parent].append(store)
    for group in by_folder.values():
        count = Counter(store.language for store in group)
        for store in group:
            written_as, lies_in = store.info.split, store.prefix.parent.name
            if written_as != lies_in and {written_as, lies_in} <= set(_SPLITS):
                what = f"was written as {written_as} data and lies in {lies_in}"
                problems.append(Problem(store.prefix, what))
            if count[store.language] > 1:
                others = [s.prefix.name for s in group if s.language == store.language]
                what = f"more than one store of language {store.language!r}: {', '.join(others)}"
                problems.append(Problem(store.prefix, what))
            elif store.language != store.prefix.name and store.prefix.name in count:
                what = f"holds language {store.language!r}: it was swapped with another store"
                problems.append(Problem(store.prefix, what))
    problems += _odd_ones_out(
        stores,
        "tokenizer",
        lambda s: (
            f"{s.info.tokenizer_fingerprint[:16]} of {s.info.vocab_size} entries, "
            f"end of document {s.info.eod_id}, stored as {s.info.dtype}"
        ),
    )
    for language in {store.language for store in stores}:
        same = [store for store in stores if store.language == language]
        problems += _odd_ones_out(same, "family", lambda s: repr(s.family))
    return problems


def _odd_ones_out(
    stores: Sequence[TokenStore], name: str, value: Callable[[TokenStore], str]
) -> list[Problem]:
    values = Counter(value(store) for store in stores)
    if len(values) < 2:
        return []
    usual = values.most_common(1)[0][0]
    example = next(store.prefix for store in stores if value(store) == usual)
    return [
        Problem(store.prefix, f"{name} {value(store)}, but {example} has {usual}")
        for store in stores
        if value(store) != usual
    ]


# ---- the command line


def _table(report: Report, folder: Path) -> str:
    by_store: dict[Path, list[str]] = defaultdict(list)
    for problem in report.problems:
        by_store[problem.store].append(problem.what)
    rows = []
    for prefix in sorted({*report.stores, *by_store}):
        store = report.stores.get(prefix)
        numbers = ["-", "-", "-"]
        if store is not None:
            on_disk = sum(state[1] for state in store.file_states.values())
            numbers = [f"{store.tokens:,}", f"{store.documents:,}", f"{on_disk / 1e6:,.2f}"]
        name = str(prefix.relative_to(folder)) if folder in prefix.parents else str(prefix)
        old = store is not None and store.info.format_version == 1
        ok = "ok (version 1: less is checked)" if old else "ok"
        rows.append((name, numbers, "BAD" if prefix in by_store else ok, by_store.get(prefix, [])))
    width = max(len("store"), *(len(name) for name, *_ in rows))
    lines = [f"{'store':<{width}}{'tokens':>17}{'documents':>14}{'MB':>12}   result"]
    for name, (tokens, documents, size), result, what in rows:
        lines.append(f"{name:<{width}}{tokens:>17}{documents:>14}{size:>12}   {result}")
        lines += [f"    {words}" for words in what]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data.verify", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("stores", type=Path, help="a folder of token stores, or one store")
    parser.add_argument("--quick", action="store_true", help="only what a run checks at its start")
    parser.add_argument("--threads", type=int, default=0, help="default: one per core")
    given = parser.parse_args(argv)
    if given.threads < 0:
        parser.error(f"--threads={given.threads}: must be at least 1, or 0 for one per core")
    began = shown = time.perf_counter()

    def progress(done: int) -> None:
        nonlocal shown
        now = time.perf_counter()
        if sys.stderr.isatty() and now - shown > 0.5:
            shown = now
            speed = done / 1e9 / (now - began)
            print(f"\r{done / 1e9:,.1f} GB read, {speed:.2f} GB/s ", end="", file=sys.stderr)

    try:
        report = inspect_stores(given.stores, not given.quick, given.threads, progress)
    except OSError as error:
        print(error, file=sys.stderr)
        return 2
    if shown > began:
        print("\r\033[K", end="", file=sys.stderr)
    print(_table(report, given.stores))
    for path in report.leftovers:
        print(f"{path}: left by a writer that was killed, or is still at work")
    bad = {problem.store for problem in report.problems}
    megabytes = report.bytes_read / 1e6
    print(
        f"{len(bad.union(report.stores))} stores, {len(bad)} bad; read {megabytes:,.1f} MB in "
        f"{report.seconds:.3f} s, {megabytes / report.seconds:,.0f} MB/s"
        + ("; not everything was read (--quick)" if given.quick else "")
    )
    return 1 if bad else 0


if __name__ == "__main__":
    say_interrupted()
    sys.exit(main())

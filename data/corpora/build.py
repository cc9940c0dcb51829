"""Builds a corpus folder: fetch packages, extract the parts not in the cache, write the folder."""

import contextlib
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.corpora import output
from data.corpora.extract import Part, extract, is_extracted, package_names, plan_parts
from data.corpora.files import only_one
from data.corpora.languages import parse_languages
from data.corpora.packages import BrokenPackageError, fetch
from data.corpora.tiers import select_sources


@dataclass(frozen=True, kw_only=True)
class Request:
    tier: str
    out: Path
    cache: Path
    langs: str = ""  # codes with commas between; empty: every language
    frozen: bool = False
    exclude: list[str] = field(default_factory=list)
    jobs: int = 0  # worker processes; 0: one for each core this process may use


def build(request: Request, say: Callable[[str], None]) -> dict[str, Any]:
    """Writes the corpus into request.out and returns its manifest.

    A build that was killed continues where it was: packages and finished parts are in the cache.
    Raises ValueError for a request that cannot be met, PackageError and BrokenPackageError for
    packages, OSError for the disk; a corpus that was in `out` stays until the new one is complete.
    """
    started = time.monotonic()
    wanted = set(parse_languages(request.langs)) or None
    if request.jobs < 0:
        raise ValueError(f"--jobs {request.jobs}: must be 1 or more, or 0 for one per core")
    sources = select_sources(request.tier, frozen=request.frozen, exclude=request.exclude)
    output.check_folder(request.out)
    with only_one(request.cache, say):
        owners = package_names(sources, wanted)
        fetched, missing = fetch(list(owners), request.cache / "packages", say)
        left_out = {owners[name].name: reason for name, reason in missing.items()}
        for name, reason in left_out.items():
            say(f"warning: left out {name}: {reason}")
        sources = tuple(source for source in sources if source.name not in left_out)
        if not sources:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
            raise ValueError(
                f"--tier {request.tier}: nothing to build ({reasons}); install npm "
                "(package npm of Debian), or take --tier small"
            )
        fetch_seconds = time.monotonic() - started

        parts = plan_parts(sources, fetched, wanted)
        for leftover in (request.cache / "extracted").glob(".extracting-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        todo = [part for part in parts if not is_extracted(part, request.cache)]
        if todo:
            say(f"{len(parts) - len(todo)} of {len(parts)} parts are in the cache")
            _extract_all(todo, request, say)
        manifest = output.write_corpus(
            request.out,
            parts,
            request.cache,
            wanted=wanted,
            say=say,
            facts={
                "tier": request.tier,
                "frozen": request.frozen,
                "excluded_sources": sorted(request.exclude),
                "languages_asked": sorted(wanted or ()),
                "left_out": left_out,
            },
            seconds={"fetch": fetch_seconds, "started": started},
        )
    return manifest


def _extract_all(todo: list[Part], request: Request, say: Callable[[str], None]) -> None:
    """English first, because the other parts of a source need it; then everything else."""
    jobs = min(request.jobs or len(os.sched_getaffinity(0)), len(todo))
    problems: list[str] = []
    done = 0
    started = time.monotonic()
    pool = ProcessPoolExecutor(jobs, initializer=_end_with_parent, initargs=(os.getpid(),))
    try:
        for phase in (
            [part for part in todo if part.english is None],
            [part for part in todo if part.english is not None],
        ):
            with _interrupt_held_back():  # workers are forked here, and inherit it
                futures = {pool.submit(extract, part, request.cache): part for part in phase}
            for future in as_completed(futures):
                part = futures[future]
                try:
                    future.result()
                except BrokenPackageError as error:
                    problems.append(str(error))
                    continue
                done += 1
                left = (time.monotonic() - started) / done * (len(todo) - done)
                say(f"read {part.name} ({done} of {len(todo)}, about {left:.0f} s left)")
            if problems:
                raise BrokenPackageError("\n".join(problems))
    except BrokenProcessPool as error:
        raise OSError(
            f"a worker process died after {done} of {len(todo)} parts (out of memory?); "
            "build again with a smaller --jobs: what is finished is kept"
        ) from error
    finally:
        # after Ctrl-C or on a full disk, what waits is not started. Not by `with`: its own
        # shutdown would take the cancelling back.
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _interrupt_held_back() -> Iterator[None]:
    """Ctrl-C waits until the end of the block: a fork it hits prints a traceback of its own."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent(parent: int) -> None:
    """In a worker: ends it when the build was killed, or it would wait for work for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the build to handle

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def say_on_stderr(message: str) -> None:
    print(f"[corpora] {message}", file=sys.stderr, flush=True)

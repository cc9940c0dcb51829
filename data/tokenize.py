"""Tokenizes a corpus: `python -m data.tokenize CORPUS --out STORES --tokenizer FILE`.

The corpus may be JSON Lines, Parquet, plain text or a folder that datasets.save_to_disk wrote
(data/corpus.py). It uses all cores, a bounded amount of memory, and goes on where it was stopped if
the same command is given again. What comes out is described in data/tokenize_corpus.py.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from data.documents import ReadOptions
from data.interrupted import say_interrupted
from data.store_folder import SPLITS, building_folder, is_complete, open_stores, read_manifest
from data.tokenize_corpus import DEMO_TOKENIZER, TokenizeOptions, differences, write_stores
from data.tokenize_progress import Progress
from data.tokenizer import Tokenizer, load_tokenizer

_LINE_EVERY_SECONDS = 10.0
# How settings of a run are called here
_FLAGS = {
    " of python -m data.tokenize, whose --out is then data.store_dir": "",
    " of python -m data.tokenize": "",
    "data.corpus=": "",
    "data.validation_fraction=": "--validation-fraction ",
    "data.languages:": "--languages:",
    "data.tokenizer=": "--tokenizer ",
    "data.eod_token=": "--eod-token ",
    "set data.eod_token": "set --eod-token",
    "; set data.cache_dir to a folder you may write to": "",
    "; leave data.tokenizer empty for the one that ships with the package": "",
    "; leave data.corpus empty for the text that ships with the package": "",
}


def usable_cores() -> int:
    """Cores this process may run on, which in a container or batch job are fewer than there are."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 2 for anything the user has to mend; 130 for an interruption."""
    given = _parser().parse_args(argv)
    try:
        return _run(given)
    except KeyboardInterrupt:
        print(f"interrupted{_kept(given.out)}", file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:
        message = str(error)
        if isinstance(error, OSError) and error.strerror and error.filename is None:
            message = error.strerror  # without its number
        for setting, flag in _FLAGS.items():
            message = message.replace(setting, flag)
        kept = "" if "finished work is kept" in message else _kept(given.out)
        print(f"error: {message}{kept}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data.tokenize",
        description="Tokenizes a corpus into memory-mapped token stores, one per language and "
        "split. Given again after it was stopped, the same command goes on where it was.",
    )
    add = parser.add_argument
    add("corpus", type=Path, help="a file or folder: JSONL, Parquet, text, save_to_disk")
    add("--out", type=Path, required=True, metavar="STORES", help="the folder to make")
    add("--tokenizer", type=Path, default=DEMO_TOKENIZER, help="default: the demo's")
    add("--eod-token", default="", help="the token that ends a document; default: a known name")
    add("--workers", type=int, default=None, metavar="N", help="processes; default: usable cores")
    add("--validation-fraction", type=float, default=0.05, help="of documents (default: 0.05)")
    add("--languages", default="", metavar="de,fr", help="only these; default: all there are")
    add("--normalize", choices=("nfc", "none"), default="nfc", help="Unicode form (default: nfc)")
    add("--skip-bad", type=int, default=0, metavar="N", help="leave out up to N bad documents")
    read = parser.add_argument_group("how records are read")
    read.add_argument("--text-field", default="text", help="(default: text)")
    read.add_argument("--language-field", default="language", help="(default: language)")
    read.add_argument("--id-field", default="doc_id", help="(default: doc_id)")
    read.add_argument("--language", default="", help="of records, files and folders that name none")
    read.add_argument("--source", default="", help="of records that name none")
    read.add_argument("--license", default="", help="of records that name none")
    read.add_argument(
        "--text-documents",
        choices=("file", "paragraph"),
        default="file",
        help="what a document of a .txt file is: all of it, or what stands between blank lines",
    )
    add("--plot", type=Path, metavar="PNG", help="draw bytes and characters a token by language")
    add("--quiet", action="store_true", help="no progress")
    return parser


def _run(given: argparse.Namespace) -> int:
    _check(given)
    languages = [code for code in given.languages.split(",") if code]
    options = TokenizeOptions(
        read=ReadOptions(
            text_field=given.text_field,
            language_field=given.language_field,
            id_field=given.id_field,
            language=given.language,
            source=given.source,
            license=given.license,
            text_documents=given.text_documents,
        ),
        normalize=given.normalize,
        skip_bad=given.skip_bad,
        workers=given.workers or usable_cores(),
    )
    tokenizer = load_tokenizer(given.tokenizer, given.eod_token)
    arguments = (tokenizer, given.validation_fraction, languages)
    start = time.monotonic()
    if is_complete(given.out):
        found = differences(given.out, given.corpus, *arguments, options)
        if found:
            raise ValueError(
                f"--out {given.out}: there are finished token stores already, and they differ: "
                + "; ".join(found)
                + ". Give another --out, or delete that folder"
            )
        print(f"{given.out} is finished already", file=sys.stderr)
    else:
        shown: AbstractContextManager[Callable[[Progress], None] | None] = nullcontext()
        if not given.quiet:
            shown = _Bar() if sys.stderr.isatty() else _Lines()
        with shown as report:
            write_stores(
                given.corpus,
                tokenizer,
                given.out,
                given.validation_fraction,
                languages,
                options=options,
                report=report,
            )
    print(table(given.out), end="")
    if given.plot:
        plot(given.out, tokenizer, str(given.corpus), given.plot)
    if not given.quiet:
        print(f"{given.out}: done in {time.monotonic() - start:.1f} s", file=sys.stderr)
    return 0


def _check(given: argparse.Namespace) -> None:
    if not 0 < given.validation_fraction < 1:
        raise ValueError(
            f"--validation-fraction {given.validation_fraction}: must lie between 0 and 1, both "
            "excluded"
        )
    if given.workers is not None and given.workers < 1:
        raise ValueError(f"--workers {given.workers}: must be at least 1")
    if given.skip_bad < 0:
        raise ValueError(f"--skip-bad {given.skip_bad}: must be at least 0")
    corpus, out = given.corpus.resolve(), given.out.resolve()
    if corpus.is_dir() and out.is_relative_to(corpus):
        raise ValueError(
            f"--out {given.out}: lies in the corpus {given.corpus}, whose files would change"
        )


def _kept(out: Path) -> str:
    """What to say about the work of a run that failed."""
    if (building_folder(out) / "parts").is_dir():
        return f" [finished work is kept in {building_folder(out)}; the same command goes on there]"
    return ""


def table(folder: Path) -> str:
    """Documents, tokens, and how much text a token holds, by language and by family.

    Tokens include one end-of-document token a document; the ratios do not count it.
    """
    rows = [
        ((store.family, store.language, split), _counts(store.info))
        for split in SPLITS
        for store in open_stores(folder, split)
    ]
    lines = [
        f"{'family':<16}{'language':<10}{'split':<12}{'documents':>12}{'tokens':>16}"
        f"{'bytes/token':>13}{'chars/token':>13}\n"
    ]
    lines += [_row(key, counts) for key, counts in sorted(rows)]
    lines.append("\n")
    for family in sorted({key[0] for key, _ in rows}):
        members = [counts for key, counts in rows if key[0] == family]
        languages = len({key[1] for key, _ in rows if key[0] == family})
        lines.append(_row((family, str(languages), "both"), _sum(members)))
    languages = len({key[1] for key, _ in rows})
    lines.append(_row(("all", str(languages), "both"), _sum([counts for _, counts in rows])))
    bad = read_manifest(folder)["bad_documents"]
    if bad["count"]:
        lines.append(f"\nleft out as bad: {bad['count']} documents\n")
        lines += [f"  {what}\n" for what in bad["first"][:10]]
    return "".join(lines)


def plot(folder: Path, tokenizer: Tokenizer, corpus: str, png_path: Path) -> None:
    """Bytes and characters per token of everything in the stores: tokenizer_report's picture.

    That module measures a sample, and also what is lost; this draws the whole without reading it.
    """
    from data import tokenizer_report  # brings matplotlib

    counted = tokenizer_report.TokenizerCounts(tokenizer)
    family_of: dict[str, str] = {}
    for split in SPLITS:
        for store in open_stores(folder, split):
            info = store.info
            family_of[store.language] = store.family
            counts = tokenizer_report.Counts(
                documents=info.documents,
                characters=info.characters,
                utf8_bytes=info.utf8_bytes,
                tokens=info.tokens - info.documents,
            )
            for groups, name in (
                (counted.languages, store.language),
                (counted.families, store.family),
            ):
                groups.setdefault(name, tokenizer_report.Counts()).add(counts)
            counted.all.add(counts)
    ordered = dict(sorted(family_of.items(), key=lambda item: (item[1], item[0])))
    report = tokenizer_report.Report(corpus, tokenizer_report.REFERENCE, ordered, [counted])
    tokenizer_report.plot(report, png_path)


def _counts(info: Any) -> tuple[int, int, int, int]:
    return info.documents, info.tokens, info.utf8_bytes, info.characters


def _sum(counts: list[tuple[int, int, int, int]]) -> tuple[int, ...]:
    return tuple(sum(column) for column in zip(*counts, strict=True))


def _row(key: tuple[str, str, str], counts: tuple[int, ...]) -> str:
    documents, tokens, utf8_bytes, characters = counts
    of_text = max(tokens - documents, 1)
    return (
        f"{key[0]:<16}{key[1]:<10}{key[2]:<12}{documents:>12,}{tokens:>16,}"
        f"{utf8_bytes / of_text:>13.2f}{characters / of_text:>13.2f}\n"
    )


class _Lines:
    """A line now and then, for log files."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._said = self._start

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def __call__(self, now: Progress) -> None:
        if time.monotonic() - self._said < _LINE_EVERY_SECONDS:
            return
        self._said = time.monotonic()
        print(describe(now, self._said - self._start), file=sys.stderr, flush=True)


class _Bar:
    """A bar, for terminals."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self._bar = RichProgress(
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.description}"),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task("", total=None)
        self._start = time.monotonic()

    def __enter__(self) -> "_Bar":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def __call__(self, now: Progress) -> None:
        text = describe(now, time.monotonic() - self._start)
        self._bar.update(self._task, completed=now.done, total=now.total, description=text)


def describe(now: Progress, seconds: float) -> str:
    """One line: how far, how much, how fast, how long it will take."""
    share = now.done / max(now.total, 1)
    here = now.done - now.resumed  # what this run has done itself tells its speed
    if now.stage == "writing":
        return f"writing stores {share:6.1%}  {now.documents:,} documents, {now.tokens:,} tokens"
    left = _duration((now.total - now.done) * seconds / here) if here > 0 else "?"
    return (
        f"tokenizing {share:6.1%}  {now.documents:,} documents, {now.tokens:,} tokens, "
        f"{here / max(seconds, 1e-9) / 1e6:.1f} MB/s, {left} left"
        + (f" ({now.resumed / max(now.total, 1):.0%} was there already)" if now.resumed else "")
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


if __name__ == "__main__":
    say_interrupted()
    sys.exit(main())

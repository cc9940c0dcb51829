"""What several commands of launch/ have on their command lines, and how they end.

Imports neither torch nor megatron-core.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from launch.foreign_flags import options_of, with_words


def words_parser(program: str, description: str | None) -> argparse.ArgumentParser:
    """A parser that takes the launcher's SETTING=VALUE words."""
    parser = argparse.ArgumentParser(
        prog=program,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="*", metavar="SETTING=VALUE", help="as for the launcher")
    return parser


def add_config_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config-dir", "-cd", metavar="DIR", help="as for the launcher")


def parse_words(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, *, job: bool = True
) -> tuple[argparse.Namespace, list[str]]:
    """What is on a command line, and what is wrong with options that the parser has not.

    Those of other frameworks are among its words as ours, where it is plain which are meant. job:
    the command takes words of SLURM jobs.
    """
    options = options_of(parser)
    words, problems = with_words(sys.argv[1:] if arguments is None else arguments, options, job=job)
    return parser.parse_intermixed_args(words), problems


def run_on_one_cpu(work: Callable[[], None]) -> None:
    """work() in one process on the CPU, also where there are GPUs; to be called before torch is
    imported. What is wrong with settings or files is one line on stderr and exit status 2."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        work()
    except (ValueError, OSError, RuntimeError) as error:  # also ConfigError, CheckpointError
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

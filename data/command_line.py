"""What data.plan and data.inspect take from their command lines alike, and how they end.

Imports neither torch nor megatron-core.
"""

import argparse
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.stream_settings import StreamSettings, read_settings


def stream_parser(program: str, description: str | None) -> argparse.ArgumentParser:
    """A parser with the arguments words, run and seq_length of `settings_of`."""
    parser = argparse.ArgumentParser(
        prog=program,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="STORES | SETTING=VALUE",
        help="a folder of token stores (data.store_dir), and settings as the launcher has them",
    )
    parser.add_argument("--run", metavar="FOLDER", help="settings of this run (its config.yaml)")
    parser.add_argument("--seq-length", type=int, metavar="N", help="data.seq_length")
    return parser


def settings_of(given: argparse.Namespace, more: dict[str, Any]) -> StreamSettings:
    """Settings from the arguments words, run, mixture, seq_length and global_batch_size."""
    stores = [word for word in given.words if "=" not in word]
    if len(stores) > 1:
        raise ValueError(
            f"{' '.join(stores)}: one folder of token stores at a time; settings are SETTING=VALUE"
        )
    flags = {
        "data.store_dir": str(Path(stores[0]).expanduser()) if stores else None,
        "data.seq_length": given.seq_length,
        "train.global_batch_size": given.global_batch_size,
    } | more
    return read_settings(
        [word for word in given.words if "=" in word],
        run=given.run,
        mixture=given.mixture,
        values={name: value for name, value in flags.items() if value is not None},
    )


def run_command(program: str, command: Callable[[], int]) -> int:
    """command() with the errors of settings as one line on stderr and exit status 2."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        return command()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, ValueError) as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2

"""data.plan for the words of a launch: what this run will draw from its token stores.

    python -m launch.plan +experiment=demo train.train_steps=1000 [--json FILE] [--plot FILE.png]

Takes what the launcher takes, checks it as the launcher does, and starts nothing. See data/plan.py
for what is printed and for the exit status. Imports neither torch nor megatron-core.
"""

import argparse
import sys
from collections.abc import Sequence

from data.plan import add_output_arguments, run_command, show
from data.stream_settings import StreamSettings
from launch.schema import load


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launch.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="*", metavar="SETTING=VALUE", help="as for the launcher")
    add_output_arguments(parser)
    given = parser.parse_intermixed_args(arguments)

    def command() -> int:
        config = load(given.words)
        train = config.train
        settings = StreamSettings(
            config.data,
            config.model.max_position_embeddings,
            train.global_batch_size,
            train.train_steps,
        )
        return show(settings, train.train_steps * train.global_batch_size, given)

    return run_command("python -m launch.plan", command)


if __name__ == "__main__":
    sys.exit(main())

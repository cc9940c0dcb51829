"""data.plan for the words of a launch: what this run will draw from its token stores.

    python -m launch.plan +experiment=demo train.train_steps=1000 [--json FILE] [--plot FILE.png]

Takes what the launcher takes, checks it as the launcher does, and starts nothing. See data/plan.py
for what is printed and for the exit status. Imports neither torch nor megatron-core.
"""

import sys
from collections.abc import Sequence

from data.interrupted import say_interrupted

if __name__ == "__main__":
    say_interrupted()  # also amid the imports below

from data.command_line import run_command
from data.plan import add_output_arguments, show
from data.stream_settings import StreamSettings
from launch.command_line import parse_words, words_parser
from launch.schema import load
from parallel.config import ConfigError


def main(arguments: Sequence[str] | None = None) -> int:
    parser = words_parser("python -m launch.plan", __doc__)
    add_output_arguments(parser)
    given, problems = parse_words(parser, arguments, job=False)

    def command() -> int:
        if problems:
            raise ConfigError(*problems)
        config = load(given.words)
        train = config.train
        settings = StreamSettings(
            config.data,
            config.model.max_position_embeddings,
            train.global_batch_size,
            train.train_steps,
        )
        samples = train.train_steps * train.global_batch_size
        return show(settings, samples, given, sparse=bool(config.model.moe.num_experts))

    return run_command("python -m launch.plan", command)


if __name__ == "__main__":
    sys.exit(main())

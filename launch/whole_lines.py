"""torchrun runs its workers with `python -u`: what several ranks print at once mixes amid lines."""

import io
import sys


def write_whole_lines() -> None:
    """From here on stdout and stderr hand each line over in one write, as Python does without -u:
    with it, `print` writes the end of a line by itself, and the last line of a traceback comes in
    four parts. What is printed appears no later, except for a line that is not ended yet.

    `print` still writes the end of a text of several lines by itself; give it a text that has its
    end, and end="". For processes that run a command, not for modules that others import."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None where the descriptor is closed
            stream.reconfigure(line_buffering=True, write_through=False)

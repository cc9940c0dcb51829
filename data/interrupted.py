"""Ctrl-C ends a command with one word on stderr, instead of with a traceback.

Imports nothing that Python has not loaded by itself, so that a command may begin with it.
"""

import _thread
import sys
import time
from types import TracebackType

EXIT_STATUS = 130  # 128 + SIGINT, as shells have it


def say_interrupted() -> None:
    """From here on a KeyboardInterrupt that nobody catches, also one amid imports, is told as
    `interrupted`, and the exit status is 130. What is open has been closed by then, as with any
    error. For processes that run a command, not for modules that others import."""
    sys.excepthook = _told
    sys.unraisablehook = _ignored


def _told(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
        return
    print("interrupted", file=sys.stderr)
    sys.exit(EXIT_STATUS)


def _ignored(unraisable: "sys.UnraisableHookArgs") -> None:
    """Python drops what is raised in a finalizer or in a callback of a weak reference, of which its
    imports have one for each module: a Ctrl-C there would be lost, so it comes again."""
    if unraisable.exc_type is KeyboardInterrupt:
        _thread.start_new_thread(_interrupt_again, ())
    else:
        sys.__unraisablehook__(unraisable)


def _interrupt_again() -> None:
    time.sleep(0.01)  # until the finalizer is left
    _thread.interrupt_main()

"""Not keeping in memory what is read from a file once.

The kernel keeps the pages of what was read until it needs their memory. For a checkpoint that is of
no use: what was loaded lies in tensors. It costs: each page has to be found (a virtual machine
whose host takes back unused memory gets a new one from there: reading 3.6 GB took 2 to 5 s instead
of 1.2), and the pages of the token files that the training is about to read may go for it.
"""

from __future__ import annotations

import os
from contextlib import suppress

_ENOUGH_BYTES = 32 << 20  # pages are let go of in stretches of so many
_GAP_BYTES = 64 << 10  # what may lie between two reads that count as one stretch


class PagesBehind:
    """Lets go of the pages of an open file that have been read, in stretches."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._begin = self._end = 0

    def done_with(self, begin: int, end: int) -> None:
        """Nobody needs these bytes of the file any more."""
        if not 0 <= begin - self._end <= _GAP_BYTES:
            self.let_go()
            self._begin = begin
        self._end = end
        if end - self._begin >= _ENOUGH_BYTES:
            self.let_go()

    def let_go(self) -> None:
        if self._end > self._begin:
            with suppress(OSError):  # advice, which not all file systems take
                os.posix_fadvise(
                    self._descriptor,
                    self._begin,
                    self._end - self._begin,
                    os.POSIX_FADV_DONTNEED,
                )
        self._begin = self._end

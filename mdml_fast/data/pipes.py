"""Input that is read while it is being written."""

from __future__ import annotations

import io
import select
import time
from typing import Any, BinaryIO

# Seconds without input after which what has come is handed on, and the most that it waits while more keeps coming.
PAUSE, PATIENCE = 0.05, 0.5


class Pipe(io.RawIOBase):
    """Standard input, or another stream of bytes, some of which may come much later than others.

    `read` and `readinto` wait for all bytes that they are asked for, as pyarrow's readers expect. Where the system
    can't tell whether a stream has more (bytes in memory, pipes on Windows), it is taken to have.

    Args:
        source: open for reading, nothing read yet.
    """

    def __init__(self, source: BinaryIO) -> None:
        # Not its buffer, whose bytes the system takes for read.
        self._source: Any = getattr(source, "raw", source)
        self._peeked, self._ended, self._came_short = b"", False, False
        try:
            select.select([self._source], [], [], 0)
            self._can_wait = True
        except (OSError, ValueError, TypeError):
            self._can_wait = False

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, unless the stream ends before; how many bytes were read."""
        view, filled = memoryview(buffer).cast("B"), 0
        while filled < len(view) and (data := self._next(len(view) - filled)):
            view[filled : filled + len(data)] = data
            filled += len(data)
        return filled

    def peek(self, size: int) -> bytes:
        """The next bytes, which stay to be read; fewer where the stream ends."""
        self._peeked = self.read(size) or b""
        return self._peeked

    def read_ready(self, size: int) -> bytes:
        """At most so many bytes: what comes before a `PAUSE`, or within `PATIENCE`; none at the end."""
        data, until = bytearray(self._next(size)), time.monotonic() + PATIENCE
        while len(data) < size and not self._ended and time.monotonic() < until and self.has_input(PAUSE):
            data += self._next(size - len(data))
        self._came_short = len(data) < size and not self._ended
        return bytes(data)

    def paused(self) -> bool:
        """Whether `read_ready` last gave all that had come, or no more comes within a `PAUSE` now."""
        return self._came_short or not self.has_input(PAUSE)

    def has_input(self, seconds: float | None) -> bool:
        """Whether there are bytes to read, or the end, within so many seconds; None waits for them."""
        if self._peeked or self._ended or not self._can_wait:
            return True
        return bool(select.select([self._source], [], [], seconds)[0])

    def _next(self, size: int) -> bytes:
        """At most so many bytes, as soon as there are any; none at the end, and ever after."""
        data: bytes | None = None
        if self._peeked:
            data, self._peeked = self._peeked[:size], self._peeked[size:]
            return data
        if self._ended:  # a terminal would ask for more
            return b""
        while data is None:  # of a pipe that does not block, and has nothing
            self.has_input(None)
            data = self._source.read(size)
        self._ended = not data
        return data

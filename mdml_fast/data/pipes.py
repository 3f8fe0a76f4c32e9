"""Input that is read while it is being written."""

from __future__ import annotations

import io
import select
import time
from typing import Any, BinaryIO

# Seconds without input after which what has come is handed on, and the most that it waits while some keeps coming.
PAUSE, PATIENCE = 0.05, 0.5


class Pipe(io.RawIOBase):
    """Standard input, or another stream of bytes, some of which may come much later than others.

    `read` and `readinto` wait for all bytes that they are asked for, as pyarrow's readers expect. Where the system
    can't tell whether a stream has more (bytes in memory, pipes on Windows), it is taken to have.

    Args:
        source: open for reading, nothing read yet.
    """

    def __init__(self, source: BinaryIO) -> None:
        # Without its buffer: what is in there the system knows nothing of.
        self._source: Any = getattr(source, "raw", source)
        self._head = b""
        self._handed_on = time.monotonic()
        try:
            select.select([self._source], [], [], 0)
            self._tells = True
        except (OSError, ValueError, TypeError):
            self._tells = False

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
        self._head = self.read(size) or b""
        return self._head

    def read_ready(self, size: int) -> bytes:
        """At most so many bytes: what comes before a pause, or within `PATIENCE`; none at the end."""
        pieces, until = [self._next(size)], time.monotonic() + PATIENCE
        size -= len(pieces[0])
        while pieces[-1] and size and time.monotonic() < until and self._comes(PAUSE):
            pieces.append(self._next(size))
            size -= len(pieces[-1])
        return b"".join(pieces)

    def rests(self) -> bool:
        """Whether to hand on what has come: nothing more does for now, or little at a time since `PATIENCE`."""
        late = time.monotonic() - self._handed_on > PATIENCE
        if self._comes(0 if late else PAUSE):
            return False
        self._handed_on = time.monotonic()
        return True

    def _next(self, size: int) -> bytes:
        """At most so many bytes, as soon as there are any; none at the end."""
        if self._head:
            data, self._head = self._head[:size], self._head[size:]
            return data
        self._comes(None)  # a pipe that does not block would have nothing
        return self._source.read(size) or b""

    def _comes(self, seconds: float | None) -> bool:
        """Whether there are bytes to read, or the end, within so many seconds; None waits for them."""
        return bool(self._head) or not self._tells or bool(select.select([self._source], [], [], seconds)[0])

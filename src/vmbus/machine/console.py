"""The host's side of a guest's serial console: what it said last, and what is typed to it."""

import re
from collections.abc import Callable
from typing import Final

__all__ = ["TRANSCRIPT_LIMIT", "Console"]

LONGEST_MATCH: Final = 1024
"""Bytes before new output that are searched again: output comes byte by byte, and a transcript gets long."""
TRANSCRIPT_LIMIT: Final = 8 << 20
"""Bytes of output that a console keeps by default: many times what a boot says."""
_LONGEST_LINE: Final = 1024
"""Bytes in which a line's end is looked for, so that a shortened transcript begins with a whole line."""

Pattern = str | bytes | re.Pattern[bytes]


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogateescape")  # what a shell passes need not be UTF-8


class Console:
    """A transcript of the guest's output that can be searched, and a way to type.

    A guest may print for ever, so the transcript is bounded: it holds the last `limit` bytes at least, and up to an
    eighth more. What is older is dropped and only counted.

    Args:
        deliver: gives typed bytes to the serial port.
        limit: bytes of output to keep, at least `LONGEST_MATCH`; 8 MiB by default.

    Attributes:
        output: what the guest has sent last (see above).
        dropped: how many bytes it sent before that.
        echo: called with every piece of output, for instance to show it or to write all of it to a file.
    """

    def __init__(self, deliver: Callable[[bytes], None], limit: int = TRANSCRIPT_LIMIT) -> None:
        if limit < LONGEST_MATCH:
            raise ValueError(f"a transcript of {limit} bytes: at least {LONGEST_MATCH}")
        self.output = bytearray()
        self.dropped = 0
        self._limit = limit
        self.echo: Callable[[bytes], None] | None = None
        self._deliver = deliver
        self._seen = 0  # positions in all that was sent, not in what is kept
        self._searched = 0
        self._awaited: re.Pattern[bytes] | None = None
        self._on_match: Callable[[], None] | None = None

    def __repr__(self) -> str:
        return f"<Console: {self.dropped + len(self.output):,} bytes, last {bytes(self.output[-40:])!r}>"

    @property
    def text(self) -> str:
        """The transcript with plain line ends; bytes that are not UTF-8 are shown as replacement characters."""
        return self.output.decode(errors="replace").replace("\r\n", "\n")

    def send(self, data: str | bytes) -> None:
        """Type `data`; the guest reads it when it runs."""
        self._deliver(_bytes(data) if isinstance(data, str) else data)

    def feed(self, data: bytes | bytearray) -> None:
        """Take output of the guest."""
        self.output += data
        if self.echo is not None:
            self.echo(bytes(data))
        seen = -1
        while self._seen > seen and self._awaited is not None and self._on_match is not None:
            seen = self._seen  # whoever is told may await the next, which the same piece may hold
            if not self.search():
                break
            self._awaited = None
            self._on_match()
        if len(self.output) > self._limit + self._limit // 8:
            self._shorten()

    def _shorten(self) -> None:
        """Drop what is older than the limit, up to the beginning of a line. What was awaited has been looked for."""
        end = len(self.output) - self._limit
        line = self.output.rfind(b"\n", max(0, end - _LONGEST_LINE), end)
        if line >= 0:
            end = line + 1
        del self.output[:end]
        self.dropped += end

    def expect(self, pattern: Pattern, on_match: Callable[[], None]) -> None:
        """Have `on_match` called once output behind the last match contains `pattern`; what was dropped before this
        call is not searched.

        A string or bytes are searched for as they stand; a compiled pattern of bytes as a regular expression, whose
        match must not be longer than `LONGEST_MATCH`.
        """
        if isinstance(pattern, str):
            pattern = _bytes(pattern)
        self._awaited = re.compile(re.escape(pattern)) if isinstance(pattern, bytes) else pattern
        self._searched = self._seen
        self._on_match = on_match

    def forget(self) -> None:
        """Expect nothing any more."""
        self._awaited = None

    def search(self) -> bool:
        """Whether what is expected is there already; if so, the next search starts behind it."""
        if self._awaited is None:
            return False
        dropped = self.dropped
        match = self._awaited.search(
            self.output, max(0, self._seen - dropped, self._searched - dropped - LONGEST_MATCH)
        )
        self._searched = dropped + len(self.output)
        if match is None:
            return False
        self._seen = dropped + match.end()
        return True

"""The host's side of a guest's serial console: everything it said, and what is typed to it."""

import re
from collections.abc import Callable

__all__ = ["Console"]

LONGEST_MATCH = 1024
"""Bytes before new output that are searched again: output comes byte by byte, and a transcript gets long."""

Pattern = str | bytes | re.Pattern[bytes]


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogateescape")  # what a shell passes need not be UTF-8


class Console:
    """A transcript of the guest's output that can be searched, and a way to type.

    Args:
        deliver: gives typed bytes to the serial port.

    Attributes:
        output: everything that the guest has sent.
        echo: called with every piece of output, for instance to show it.
    """

    def __init__(self, deliver: Callable[[bytes], None]) -> None:
        self.output = bytearray()
        self.echo: Callable[[bytes], None] | None = None
        self._deliver = deliver
        self._seen = 0
        self._searched = 0
        self._awaited: re.Pattern[bytes] | None = None
        self._on_match: Callable[[], None] | None = None

    def __repr__(self) -> str:
        return f"<Console: {len(self.output):,} bytes, last {bytes(self.output[-40:])!r}>"

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
        if self._awaited is not None and self.search() and self._on_match is not None:
            self._awaited = None
            self._on_match()

    def expect(self, pattern: Pattern, on_match: Callable[[], None]) -> None:
        """Have `on_match` called once output behind the last match contains `pattern`.

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
        match = self._awaited.search(self.output, max(self._seen, self._searched - LONGEST_MATCH))
        self._searched = len(self.output)
        if match is None:
            return False
        self._seen = match.end()
        return True

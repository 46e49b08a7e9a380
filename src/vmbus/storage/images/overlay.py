"""What a log would change in a file, laid over what is read from the file."""

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence

__all__ = ["PAGE", "Overlay"]

PAGE = 4096


class Overlay:
    """Changes that reads see and the file does not have yet. Without any it is false.

    Zeros are kept as stretches: their number is bounded by the log that has them, their length is not.

    Args:
        pages: content by file offset, `PAGE` bytes each at multiples of `PAGE`.
        zeros: stretches (start, stop) that read as zeros, ascending, apart from each other and from `pages`.
        size: the file has at least this size with the changes, bytes; 0 if they do not make it larger.
    """

    def __init__(
        self, pages: Mapping[int, bytes] | None = None, zeros: Sequence[tuple[int, int]] = (), size: int = 0
    ) -> None:
        self.pages = {} if pages is None else pages
        self.zeros = zeros
        self.size = size
        self._offsets = sorted(self.pages)
        self._stops = [stop for _, stop in zeros]

    def __bool__(self) -> bool:
        return bool(self.pages or self.zeros or self.size)

    def __len__(self) -> int:
        return len(self.pages) + len(self.zeros)

    def pages_in(self, start: int, stop: int) -> Sequence[int]:
        """Offsets of the pages with new content that reach into the range."""
        return self._offsets[bisect_right(self._offsets, start - PAGE) : bisect_left(self._offsets, stop)]

    def lay_over(self, offset: int, out: memoryview) -> None:
        """Change `out`, which was read at `offset`."""
        end = offset + len(out)
        for index in range(bisect_right(self._stops, offset), len(self.zeros)):
            start, stop = self.zeros[index]
            if start >= end:
                break
            start, stop = max(start, offset), min(stop, end)
            out[start - offset : stop - offset] = bytes(stop - start)
        for page in self.pages_in(offset, end):
            start, stop = max(page, offset), min(page + PAGE, end)
            out[start - offset : stop - offset] = self.pages[page][start - page : stop - page]

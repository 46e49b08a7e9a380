"""How much work a call does, in numbers that do not depend on the machine: lines of Python, and bytes of host files.

A clock would say the same of a slow machine and of a bad input. What compiled code does in one call is not seen here;
it is bounded by the memory it is given, and that by the bytes read.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import pytest

__all__ = ["TooMuchWork", "Work", "bounded"]


class TooMuchWork(AssertionError):
    """A call did more than its bound; raised on the spot, a hang would not end by itself."""


@dataclass
class Work:
    """What was done.

    Attributes:
        lines: executed in the package's Python code.
        reads: system calls that read a file.
        bytes: read from files.
    """

    lines: int = 0
    reads: int = 0
    bytes: int = 0


@contextmanager
def bounded(*, lines: int, read: int) -> Iterator[Work]:
    """Count the work of this thread inside; more than that many lines, or bytes read, is an error.

    Raises:
        TooMuchWork: as soon as a bound is passed.
    """
    work = Work()

    def step(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            work.lines += 1
            if work.lines > lines:
                raise TooMuchWork(f"more than {lines} lines, in {frame.f_code.co_qualname}")
        return step

    def enter(frame: FrameType, event: str, _: Any) -> Any:
        return step if frame.f_globals.get("__name__", "").startswith("vmbus.") else None

    def count(call: Callable[..., Any], size: Callable[[Any], int]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            result = call(*arguments)
            work.reads += 1
            work.bytes += size(result)
            if work.bytes > read:
                raise TooMuchWork(f"more than {read} bytes read")
            return result

        return counted

    before = sys.gettrace()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pread", count(os.pread, len))
        patch.setattr(os, "preadv", count(os.preadv, int))
        sys.settrace(enter)
        try:
            yield work
        finally:
            sys.settrace(before)

"""Exceptions from outside, as Ctrl-C brings them, at any point of given source files."""

import linecache
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupted(BaseException):
    """What comes: not an `Exception`, so that no handler takes it for one of its own."""


@contextmanager
def interrupted_at(point: int, *files: str, opcodes: bool = False) -> Iterator[None]:
    """Raise `Interrupted` at the `point`-th line (or bytecode) that this thread executes in `files`.

    Args:
        point: 0 is the first.
        files: ends of file names.
        opcodes: count bytecodes, not lines: finer than Python's own signals are.
    """
    left = point

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal left
        del arg
        if not frame.f_code.co_filename.endswith(files) or _finalizes(frame):
            return None
        frame.f_trace_opcodes = opcodes
        if event == ("opcode" if opcodes else "line") and not _no_signal_comes(frame):
            left -= 1
            if left < 0:
                sys.settrace(None)
                raise Interrupted
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def _no_signal_comes(frame: FrameType) -> bool:
    """Whether Python does not look for signals there.

    Neither at a bare ``try``, which executes nothing, nor where a `with` block is about to be left, before its context
    has ended.
    """
    code, number = frame.f_code, frame.f_lineno or 0
    text = linecache.getline(code.co_filename, number).strip()
    if not text.startswith("with "):
        return text == "try:"
    entered = -1  # where the instructions end that enter it; whatever is of that line behind them leaves it
    for start, end, line in code.co_lines():
        if line == number and entered in (-1, start):
            entered = end
    return frame.f_lasti >= entered


def _finalizes(frame: FrameType | None) -> bool:
    """Whether the frame is in a finalizer: Python itself drops what is raised there."""
    while frame is not None:
        if frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False

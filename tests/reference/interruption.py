"""Exceptions from outside, as Ctrl-C brings them, at any point of given source files."""

import linecache
import opcode
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_LOAD_CONST = opcode.opmap["LOAD_CONST"]


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
        if event == ("opcode" if opcodes else "line") and not _leaves_with(frame):
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


def _leaves_with(frame: FrameType) -> bool:
    """Whether a `with` block is about to be left: there Python looks for signals only when its context has ended."""
    code = frame.f_code
    line = linecache.getline(code.co_filename, frame.f_lineno or 0).lstrip()
    return line.startswith("with ") and code.co_code[frame.f_lasti] == _LOAD_CONST


def _finalizes(frame: FrameType | None) -> bool:
    """Whether the frame is in a finalizer: Python itself drops what is raised there."""
    while frame is not None:
        if frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False

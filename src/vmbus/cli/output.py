"""Where a subcommand's results go: the terminal, a pipe, files.

Whatever a guest, an image or a server wrote goes through `printable` before it is printed: nothing of theirs commands
the user's terminal, except the guest's console where that is shown.
"""

import logging
import re
import sys
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.table import Table

from vmbus.errors import VmbusError, printable

__all__ = ["PlainFormatter", "Screen", "check_file", "check_output", "is_stdout", "write_output"]

LONGEST_LINE = 2000
"""Characters of a line that a log or a message shows at most."""


class Screen(Console):
    """Standard output for tables; a reader that goes away is the command's business (`vmbus.cli.main`).

    Brackets in what is printed are text, not markup: names of files may have any.
    """

    def __init__(self) -> None:
        super().__init__(markup=False)

    def on_broken_pipe(self) -> NoReturn:
        """Pass the error on: by itself `rich` ends the process with status 1, which here means wrong data."""
        raise BrokenPipeError

    def show(self, table: Table) -> None:
        """Print a table whose first columns are words and whose right-aligned ones are figures.

        Where the terminal is narrow the words are folded, and where that is not enough lines become longer than it:
        a figure is never cut.
        """
        least = 1
        for column in table.columns:
            texts = [str(column.header), *map(str, column.cells)]
            if column.justify == "right":
                column.no_wrap, column.min_width = True, max(map(len, texts))
            else:
                column.min_width = max(len(piece) for text in texts for piece in re.findall(r"\s*\S+", text))
            least += column.min_width + 3  # a border and two spaces
        width = self.width
        self.width = max(width, least)
        self.print(table)
        self.width = width


class PlainFormatter(logging.Formatter):
    """Log lines for a terminal: also those of a traceback show no control characters."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's lines, each safe for a terminal."""
        return "\n".join(printable(line, LONGEST_LINE) for line in super().format(record).split("\n"))


def is_stdout(path: Path | None) -> bool:
    """Whether a result goes to standard output: ``-``, as usual."""
    return path is not None and str(path) == "-"


def check_file(path: Path | None, option: str) -> None:
    """As `check_output`, for what is written only to files.

    Raises:
        VmbusError: it is ``-``.
        OSError: it cannot be written.
    """
    if is_stdout(path):
        raise VmbusError(f"{option} writes to a file, not to standard output")
    check_output(path)


def check_output(path: Path | None) -> None:
    """Find out before the work whether a result can be written there afterwards. What exists stays as it is.

    Raises:
        OSError: it cannot; the error names the file.
    """
    if path is None or is_stdout(path) or (path.exists() and not path.is_file() and not path.is_dir()):
        return  # a pipe or a device must not be opened twice
    known = path.exists()
    path.open("ab").close()
    if not known:
        path.unlink()


def write_output(path: Path, text: str) -> None:
    """Write a result to a file, or to standard output if that is ``-``.

    Raises:
        OSError: it cannot be written; the error names the file.
    """
    if is_stdout(path):
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    try:
        path.write_text(text, encoding="utf-8")
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error

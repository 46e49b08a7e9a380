"""Where a subcommand's results go: the terminal, a pipe, files."""

import re
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.table import Table

__all__ = ["Screen", "check_output", "write_output"]


class Screen(Console):
    """Standard output for tables; a reader that goes away is the command's business (`vmbus.cli.main`)."""

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


def check_output(path: Path | None) -> None:
    """Find out before the work whether a result can be written there afterwards. What exists stays as it is.

    Raises:
        OSError: it cannot; the error names the file.
    """
    if path is None or (path.exists() and not path.is_file() and not path.is_dir()):
        return  # a pipe or a device must not be opened twice
    known = path.exists()
    path.open("ab").close()
    if not known:
        path.unlink()


def write_output(path: Path, text: str) -> None:
    """Write a result to a file.

    Raises:
        OSError: it cannot be written; the error names the file.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error

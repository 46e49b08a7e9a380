"""The `vmbus` command: one module of this package for each subcommand.

A subcommand module has ``add_parser(subparsers)``, which sets ``run`` as the parser's default, and
``run(args) -> int``, which returns the exit status. What a user can mend raises a `VmbusError`
or an `OSError`: it is printed as one sentence, and the exit status is 2.
"""

import argparse
import io
import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module

import vmbus
from vmbus.cli.output import PlainFormatter
from vmbus.errors import VmbusError, printable

__all__ = ["SUBCOMMANDS", "main"]

SUBCOMMANDS: tuple[str, ...] = ("compare", "boot", "guest")
"""The modules of this package that are subcommands, in the order of the help text."""


def parser() -> argparse.ArgumentParser:
    """The command's argument parser, with all subcommands."""
    top = argparse.ArgumentParser(
        prog="vmbus",
        description="Hyper-V's I/O architecture: partitions, VMBus, enlightened and emulated devices.",
    )
    top.add_argument("--version", action="version", version=f"vmbus {vmbus.__version__}")
    top.add_argument("-v", "--verbose", action="count", default=0, help="log more; twice: everything")
    subparsers = top.add_subparsers(metavar="COMMAND", required=True)
    for name in SUBCOMMANDS:
        import_module(f"vmbus.cli.{name}").add_parser(subparsers)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: the command line without the program's name; that of the process by default.

    Returns:
        The exit status: 0, what the subcommand returns, or 2 after one sentence about what is wrong.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # in a locale without UTF-8 "µ" becomes "?"
    try:
        args = parser().parse_args(arguments)
        level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(args.verbose, 2)]
        handler = logging.StreamHandler()
        handler.setFormatter(PlainFormatter("%(levelname)s %(name)s: %(message)s"))
        logging.basicConfig(level=level, handlers=[handler])
        status = args.run(args)
        assert isinstance(status, int)
        if sys.stdout is not None:
            sys.stdout.flush()  # a full disk or a closed pipe is noticed here, not while Python ends
        return status
    except KeyboardInterrupt:
        print("vmbus: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader of our output went away
        return 0
    except (VmbusError, OSError) as error:
        print(f"vmbus: {describe(error)}", file=sys.stderr)
        return 2


def describe(error: Exception) -> str:
    """One sentence for an error that a user can mend; whoever wrote parts of it, a terminal may show it."""
    sentence = str(error)
    if isinstance(error, OSError) and error.strerror:
        sentence = f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    return printable(sentence, 2000)

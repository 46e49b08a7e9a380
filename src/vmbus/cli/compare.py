"""`vmbus compare`: the same disk over VMBus and over emulated hardware, counted and timed."""

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from vmbus.cli.disks import FORM, HELP, disk
from vmbus.cli.output import Screen, check_file, check_output, is_stdout, write_output
from vmbus.cli.units import format_size, size
from vmbus.errors import VmbusError, printable
from vmbus.machine.comparison import PATHS, Comparison, compare

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["ROWS", "add_parser", "check_plot", "plot", "report", "run"]

ROWS = (
    ("exits", "exits to the hypervisor"),
    ("exits.io_port", "  port accesses"),
    ("exits.mmio", "  memory-mapped accesses"),
    ("exits.hypercall", "  hypercalls"),
    ("exits.rdmsr", "  MSR reads"),
    ("exits.wrmsr", "  MSR writes"),
    ("exits.halt", "  halts"),
    ("instructions", "driver instructions interpreted"),
    ("interrupts", "interrupts"),
    ("doorbells_sent", "doorbells sent"),
    ("doorbells_suppressed", "doorbells suppressed"),
    ("packets_sent", "ring packets sent"),
    ("bytes_copied", "bytes copied by a processor"),
    ("backend_calls", "backend calls"),
    ("microseconds", "time, µs"),
)
"""What the table shows: the ledger's name of a count (per operation), and what people call it."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `vmbus compare`."""
    parser = subparsers.add_parser(
        "compare",
        help="the same disk over VMBus and over emulated hardware, counted and timed",
        description="Reads a whole disk, and writes a quarter of its blocks, over enlightened storage and over an "
        "emulated IDE controller. Checks the data by hash, then prints counts and times per operation.",
    )
    parser.add_argument(
        "--disk", type=disk, metavar=FORM, help=f"{HELP} (without --disk: one is made for the run)"
    )
    parser.add_argument("--size", type=size, default=4 << 20, help="of the image that is made (default: 4M)")
    parser.add_argument("--block", type=size, default=4096, help="bytes of an operation (default: 4K)")
    parser.add_argument("--depth", type=int, default=32, help="requests under way at once (default: 32)")
    parser.add_argument(
        "--seed", type=int, default=0, help="for the blocks written and their data (default: 0)"
    )
    parser.add_argument(
        "--write",
        action="store_true",
        help="write to the image given with --disk; otherwise it stays as it is and an empty disk of the same "
        "size takes the writes",
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        type=Path,
        help="write everything counted to FILE; with - to standard output, instead of the table",
    )
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw the table to FILE (.png, .svg, .pdf)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the comparison and print it; 1 if a path moved wrong bytes."""
    if args.plot:
        check_plot(args.plot)  # what is missing is said before the work, not after
    if args.write and args.disk is None:
        raise VmbusError("--write needs the image to write to: add --disk IMAGE")
    if args.write and args.disk.read_only:
        raise VmbusError(f"{args.disk.place}: --write, and read-only at once")
    check_output(args.json)
    check_file(args.plot, "--plot")
    terminal = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=terminal,
        transient=True,
        disable=not terminal.is_terminal,
    ) as bars:
        tasks: dict[str, TaskID] = {}

        def progress(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total)
            bars.update(tasks[phase], completed=done)

        with nullcontext() if args.disk is None else args.disk.open(read_only=not args.write) as image:
            result = compare(
                image,
                size=args.size,
                block=args.block,
                depth=args.depth,
                seed=args.seed,
                write=args.write,
                progress=progress,
            )
    if not is_stdout(args.json):
        report(result, Screen())
    if args.json:
        write_output(args.json, json.dumps(result.to_dict(), indent=2) + "\n")
    if args.plot:
        plot(result, args.plot)
    return 0 if result.correct else 1


def report(result: Comparison, console: Screen) -> None:
    """Print the comparison as a table."""
    blocks = f"{format_size(result.block)} blocks, depth {result.depth}"
    title = f"{format_size(result.size)} disk ({printable(str(result.image))}), {blocks}"
    table = Table(title=title, title_justify="left")
    table.add_column("per operation")
    for path in PATHS:
        table.add_column(path, justify="right")
    table.add_column("ratio", justify="right", style="bold")
    for phase, paths in result.phases.items():
        if not paths["enlightened"].operations:
            continue  # a disk smaller than a block has none to write
        table.add_section()
        count = paths["enlightened"].operations
        table.add_row(f"{count} {phase if count > 1 else phase.removesuffix('s')}", style="bold")
        enlightened, emulated = (paths[path].per_operation() for path in PATHS)
        for name, label in ROWS:
            pair = enlightened.get(name, 0.0), emulated.get(name, 0.0)
            if any(pair):
                ratio = f"{_number(pair[1] / pair[0])} ×" if all(pair) else ""
                table.add_row(f"  {label}", *map(_number, pair), ratio)
    console.show(table)
    for phase, paths in result.phases.items():
        if not paths["enlightened"].operations:
            continue
        expected = result.expected[phase]
        console.print(f"{phase}: SHA-256 of the image {expected[:16]}…", highlight=False)
        for path in PATHS:
            verdict = (
                "the same" if paths[path].sha256 == expected else f"DIFFERENT: {paths[path].sha256[:16]}…"
            )
            console.print(f"  over the {path} path: {verdict}", highlight=False)
    reads = result.phases["reads"]["emulated"]
    exits = reads.counts.exits.total() / (reads.size // 512)
    wrote = bool(result.phases["writes"]["emulated"].operations)
    console.print(
        f"Reads took {result.ratio('reads'):.0f} times as long on the emulated path, "
        + (f"writes {result.ratio('writes'):.0f} times; " if wrote else "")
        + f"it exits {exits:.4g} times for each sector read.",
        highlight=False,
    )


def _number(value: float) -> str:
    if value == 0:
        return "0"
    if value == int(value) or value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def check_plot(path: Path) -> None:
    """Find out before the work whether a picture can be drawn to that file.

    Raises:
        VmbusError: matplotlib is not installed, or the file's ending is no picture format.
    """
    _pyplot()
    from matplotlib.figure import Figure

    known = Figure().canvas.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in known:
        raise VmbusError(f"{path}: the ending names no picture format; there are {', '.join(sorted(known))}")


def plot(result: Comparison, path: Path) -> None:
    """Draw counts and times per operation, logarithmic, one group of bars a row.

    Raises:
        VmbusError: matplotlib is not installed, or the file's ending is no picture format.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, len(result.phases), figsize=(12, 6), sharey=True, layout="constrained")
    try:
        for axis, (phase, paths) in zip(axes, result.phases.items(), strict=True):
            _bars(axis, phase, {path: paths[path].per_operation() for path in PATHS})
        axes[0].legend()
        figure.suptitle(f"{format_size(result.block)} operations on {result.image}")
        figure.savefig(path, dpi=120)
    except ValueError as error:
        raise VmbusError(f"{path}: {error}") from error
    finally:
        pyplot.close(figure)


def _bars(axis: "Axes", phase: str, figures: dict[str, dict[str, float]]) -> None:
    rows = [(n, label) for n, label in ROWS if any(f.get(n) for f in figures.values())][::-1]
    for shift, (path, values) in zip((0.2, -0.2), figures.items(), strict=True):
        bars = axis.barh(
            [i + shift for i in range(len(rows))], [values.get(n, 0.0) for n, _ in rows], 0.38, label=path
        )
        axis.bar_label(bars, labels=[_number(values.get(n, 0.0)) for n, _ in rows], padding=3, fontsize=8)
    axis.set_xscale("symlog", linthresh=0.01)
    axis.margins(x=0.15)
    axis.set_yticks(range(len(rows)), [label.strip() for _, label in rows])
    axis.set_title(f"per {phase.removesuffix('s')}")


def _pyplot() -> Any:  # matplotlib is optional: its types are not there without it
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise VmbusError("--plot needs matplotlib: pip install 'vmbus[plot]'") from error
    return pyplot

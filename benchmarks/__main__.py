"""``python -m benchmarks``: one table of ours beside the peers, with the targets, the commit and the machine."""

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

import vmbus
from benchmarks.harness import Row

TOPICS = {
    "nogil_ring": "The ring in nogil code",
    "calls": "Per call, from Python",
    "batches": "Batches, from Python, one thread",
    "processes": "Throughput between two processes",
    "roundtrip": "Round trips between two processes",
    "storage": "Disk reads over the storage channel",
    "network": "Ethernet frames between two guests",
    "redirect": "The redirect chain: a disk through several partitions",
    "messages": "Messages and events between partitions",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 0 whatever the figures are, 2 for a wrong argument."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--only", action="append", choices=TOPICS, metavar="TOPIC", help=f"one of {', '.join(TOPICS)}"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few short rounds: shows that it runs, not how fast"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows there as well")
    arguments = parser.parse_args(argv)
    if arguments.json is not None:
        try:
            arguments.json.open("a").close()  # said now, not after some minutes of work
        except OSError as error:
            parser.error(f"{arguments.json}: {error.strerror}")

    about = environment()
    results: dict[str, list[Row]] = {}
    waiting = Console(stderr=True)
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=waiting
    ) as progress:
        task = progress.add_task("", total=None)
        for topic in arguments.only or TOPICS:
            progress.update(task, description=TOPICS[topic])
            results[topic] = list(importlib.import_module(f"benchmarks.{topic}").rows(arguments.quick))
    console = Console() if sys.stdout.isatty() else Console(width=148)
    console.print(table(results, about))
    console.print(verdict(results), highlight=False)
    if arguments.quick:
        console.print("[bold]--quick: these figures show that everything runs, not how fast it is.[/bold]")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(as_json(results, about), indent=1), encoding="utf-8")
    return 0


def environment() -> dict[str, str]:
    """What the figures depend on."""
    return {
        "version": vmbus.__version__,
        "commit": commit(),
        "machine": f"{processor()}, {len(os.sched_getaffinity(0))} CPUs, Linux {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def commit() -> str:
    """The commit of the tree that holds this file, marked when it has uncommitted changes."""
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
        "--exclude=*",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown (not a git tree)"


def processor() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def table(results: dict[str, list[Row]], about: dict[str, str]) -> Table:
    """All rows, with a section for each topic."""
    made = Table(
        title="vmbus beside its peers: nanoseconds of one operation, medians of interleaved rounds",
        caption="{machine} · {python} · {date}\nvmbus {version} at {commit}".format_map(about),
    )
    made.add_column("operation", min_width=36)
    made.add_column("peer", min_width=34)
    for name in ("ours, ns", "peer, ns", "peer ÷ ours"):
        made.add_column(name, justify="right", no_wrap=True)
    made.add_column("target", width=18)
    made.add_column("", min_width=6)
    verdicts = {True: "[green]met[/green]", False: "[red]missed[/red]", None: ""}
    for topic, rows in results.items():
        made.add_section()
        made.add_row(f"[bold]{TOPICS[topic]}[/bold]")
        last = ""
        for row in rows:
            operation = f"{row.what} ({row.ours})"
            verdict = row.note or verdicts[row.met]
            times = (number(row.ours_ns), number(row.peer_ns), number(row.speedup))
            made.add_row("" if operation == last else operation, row.peer, *times, row.target.text, verdict)
            last = operation
    return made


def verdict(results: dict[str, list[Row]]) -> str:
    """How many targets were met, and which were not."""
    judged = [(topic, row) for topic, rows in results.items() for row in rows if row.target.text]
    missed = [
        f"  missed: {topic}: {row.what}, beside {row.peer}: {row.target.text}"
        for topic, row in judged
        if row.met is False
    ]
    silent = [
        f"  not measured: {topic}: {row.what}, beside {row.peer}: {row.note}"
        for topic, row in judged
        if row.met is None
    ]
    met = len(judged) - len(missed) - len(silent)
    return "\n".join([f"{met} of {len(judged)} targets met", *missed, *silent])


def number(value: float | None) -> str:
    """Three significant digits; large numbers whole."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def as_json(results: dict[str, list[Row]], about: dict[str, str]) -> dict[str, object]:
    """What ``--json`` writes."""
    rows = [
        {"topic": topic, **asdict(row), "met": row.met} for topic, rows in results.items() for row in rows
    ]
    return {**about, "rows": rows}


if __name__ == "__main__":
    sys.exit(main())

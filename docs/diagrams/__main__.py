"""Draws the sequence diagrams of the pages and of README.md from runs made now.

    python docs/diagrams            # rewrite the diagrams
    python docs/diagrams --check    # exit status 1 if one is not that of a run

Each module beside this one has a function `record` that makes a run, the same every time unless the code does
something else, and gives the lines of a Mermaid diagram. A diagram's place in a page is between two comments with
its name.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import control_plane_sequence
import network_sequence
import storage_sequence

from vmbus.bus import Version

DOCS = Path(__file__).resolve().parents[1]
START, END = "<!-- generated: {name} -->", "<!-- end of {name} -->"

DIAGRAMS: dict[Path, dict[str, Callable[[], Iterable[str]]]] = {
    DOCS.parent / "README.md": {"a channel": lambda: control_plane_sequence.record(Version.V5_3, brief=True)},
    DOCS / "control-plane.md": {
        "version 5.3": lambda: control_plane_sequence.record(Version.V5_3),
        "version 1.1": lambda: control_plane_sequence.record(Version.V1_1),
    },
    DOCS / "storage.md": {"storage": storage_sequence.record},
    DOCS / "network.md": {"network": network_sequence.record},
}


def updated(page: Path) -> str:
    """The page with the diagrams of runs made now."""
    text = page.read_text(encoding="utf-8")
    for name, draw in DIAGRAMS[page].items():
        start, end = START.format(name=name), END.format(name=name)
        before, _, rest = text.partition(start)
        _, found, after = rest.partition(end)
        if not found:
            raise SystemExit(f"{page.name} has no place for the diagram of {name}")
        diagram = "\n".join(draw())
        text = f"{before}{start}\n```mermaid\n{diagram}\n```\n{end}{after}"
    return text


def main() -> int:
    """Rewrite or check the pages."""
    parser = argparse.ArgumentParser(
        prog="python docs/diagrams",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="only say whether the pages are up to date")
    check = parser.parse_args().check
    outdated = 0
    for page in DIAGRAMS:
        new = updated(page)
        if new != page.read_text(encoding="utf-8"):
            outdated += 1
            if check:
                print(f"{page.name} is out of date: run python docs/diagrams", file=sys.stderr)
            else:
                page.write_text(new, encoding="utf-8")
    return int(check and outdated > 0)


if __name__ == "__main__":
    sys.exit(main())

"""Runs the commands whose output README.md shows, and puts the output there: ``python docs/readme.py [PART…]``.

A place is a comment ``<!-- output of: COMMAND -->`` with a fenced ``text`` block below it. Given parts of commands,
only the commands with one of them are run; so a long benchmark need not be repeated for a change elsewhere.
"""

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
PLACE = re.compile(
    r"(?P<mark><!-- output of: (?P<command>.*?) -->\n+```text\n)(?P<output>.*?)(?P<end>^```$)", re.S | re.M
)


def main(parts: list[str]) -> int:
    """Refresh README.md."""

    def refresh(place: re.Match[str]) -> str:
        command = place["command"]
        if parts and not any(part in command for part in parts):
            return place[0]
        print(f"$ {command}", file=sys.stderr)
        shell = ["bash", "-o", "pipefail", "-c", command]
        done = subprocess.run(shell, check=True, stdout=subprocess.PIPE, text=True, cwd=README.parent)
        lines = [line.rstrip() for line in done.stdout.strip("\n").splitlines()]
        if not lines:
            raise SystemExit(f"it printed nothing: {command}")
        return place["mark"] + "\n".join(lines) + "\n" + place["end"]

    README.write_text(PLACE.sub(refresh, README.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

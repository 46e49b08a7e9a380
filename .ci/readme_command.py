"""Prints the N-th shell block of README.md (counted from 1), so that what is tested is what is written there."""

import re
import sys
from pathlib import Path

PROMPT = re.compile(r"^\$ ", re.MULTILINE)


def shell_blocks(text: str) -> list[str]:
    """The contents of the fenced ``sh``, ``bash``, ``shell`` and ``console`` blocks, without prompts or output."""
    blocks = []
    for language, body in re.findall(
        r"^```(sh|bash|shell|console)[ \t]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL
    ):
        if language == "console":
            body = "\n".join(line for line in body.splitlines() if line.startswith("$ "))
        blocks.append(PROMPT.sub("", body).strip())
    return blocks


def main() -> int:
    """Print the block whose number is the only argument."""
    number = int(sys.argv[1])
    blocks = shell_blocks(Path(__file__).parent.parent.joinpath("README.md").read_text(encoding="utf-8"))
    if len(blocks) < number:
        print(f"README.md has {len(blocks)} shell blocks; number {number} is wanted", file=sys.stderr)
        return 1
    print(blocks[number - 1])
    return 0


if __name__ == "__main__":
    sys.exit(main())

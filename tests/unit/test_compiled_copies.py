"""What compiled code copies out of shared memory is read from there once.

A compiler takes the result of a plain memcpy for the same value as its source and may read the source again where the
copy is used: it did, between a check and a use. `copy_from_shared` forbids it, so that is how such copies are made.
"""

import re
from pathlib import Path

import pytest

EXT = Path(__file__).parents[2] / "ext"
SHARED = re.compile(r"\bmemcpy\(\s*[^,]+,\s*[^,]*\b(start|base|slot|buffer|code)\b[^,]*,")


@pytest.mark.parametrize("room", ["ring", "blockio", "netio", "dispatch", "memory", "x86"])
def test_copies_of_what_a_peer_wrote_are_made_by_the_helper(room: str) -> None:
    files = [EXT / f"{room}.pyx", *sorted((EXT / room).glob("*.pxi"))]
    assert files[0].exists()
    for file in files:
        for number, line in enumerate(file.read_text().splitlines(), 1):
            assert not SHARED.search(line), f"{file.name}:{number}: {line.strip()}"


def test_the_pattern_finds_what_it_is_for() -> None:
    for line in (
        "memcpy(&head, buffer + at, HEADER)",
        "memcpy(wire, start + packet.offset, sizeof(wire_request_t))",
        "memcpy(&span, at.start + 24 + 8 * index, 8)",
        "memcpy(&sender, self.slot + 8, 8)",
        "memcpy(&head, self.base + offset, HEADER)",
    ):
        assert SHARED.search(line)
    assert not SHARED.search("memcpy(start + 32, self.pfns, 8)")

"""Which contents each sector may have after a crash: the last one that a flush covered, or any written since."""

import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from vmbus.storage.disk import Disk

Step: TypeAlias = tuple[str, int, int]
"""``write``, ``unmap`` or ``flush``; first sector; number of sectors."""


def steps(seed: int, sectors: int, block_sectors: int) -> Iterator[Step]:
    """An endless, repeatable sequence of random work."""
    rnd = random.Random(seed)
    while True:
        kind = rnd.choices(["write", "unmap", "flush"], [12, 4, 2])[0]
        first = rnd.randrange(sectors)
        count = rnd.choice([1, 1, 3, 8, 64, block_sectors])
        if rnd.random() < 0.4:
            first, count = first - first % block_sectors, block_sectors
        yield kind, first, min(count, sectors - first)


def content(version: int, sector: int, sector_size: int) -> bytes:
    """A sector as step number `version` writes it; version 0 means zeros."""
    return struct.pack("<QQ", version, sector) * (sector_size // 16) if version else bytes(sector_size)


def perform(disk: Disk, version: int, step: Step) -> None:
    """Do one step on a disk; steps are numbered from 1."""
    kind, first, count = step
    size = disk.sector_size
    if kind == "write":
        disk.write(first * size, b"".join(content(version, first + i, size) for i in range(count)))
    elif kind == "unmap":
        disk.unmap(first * size, count * size)
    else:
        disk.flush()


PARENT = 1 << 40
"""The version of all sectors of a parent image."""


@dataclass
class History:
    """Versions by sector: the first of each list is what was there for sure at the last flush.

    Sectors that no step touched have version `base`.
    """

    base: int = 0
    versions: dict[int, list[int]] = field(default_factory=dict)

    def begin(self, version: int, step: Step) -> None:
        """A step was started; it may have done nothing, all, or some of its sectors."""
        kind, first, count = step
        if kind != "flush":
            for sector in range(first, first + count):
                self.versions.setdefault(sector, [self.base]).append(version if kind == "write" else 0)

    def end(self, step: Step) -> None:
        """A step returned: a flush makes the newest version of every sector the only one."""
        if step[0] == "flush":
            self.versions = {sector: found[-1:] for sector, found in self.versions.items()}

    def check(self, disk: Disk, sectors: int) -> None:
        """Every sector has one of the contents it may have."""
        size = disk.sector_size
        whole = disk.read(0, sectors * size)
        for sector in range(sectors):
            found = whole[sector * size : (sector + 1) * size]
            allowed = self.versions.get(sector, [self.base])
            assert any(found == content(version, sector, size) for version in allowed), (
                f"sector {sector} is of version {struct.unpack_from('<Q', found)[0]}, allowed are {allowed}"
            )

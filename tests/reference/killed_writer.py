"""Works on a disk until it is killed: IMAGE LOG SEED SECTORS BLOCK_SECTORS. A line per step, before and after it."""

import os
import sys

from sector_history import perform, steps

from vmbus.storage.images import open_disk


def main(image: str, log: str, seed: int, sectors: int, block_sectors: int) -> None:
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    disk = open_disk(image)
    for version, step in enumerate(steps(seed, sectors, block_sectors), 1):
        os.write(fd, b"begin\n")
        perform(disk, version, step)
        os.write(fd, b"end\n")


main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))

"""The experiment this package exists for: the same reads and writes over VMBus and over emulated hardware.

Two machines that differ in nothing but the guest's disk driver do the same operations on the same bytes, block by
block in turn, so that whatever else the host does disturbs both alike. The data is checked by hash against
the image, the ledgers are compared per operation, and the time of both is taken.
"""

import hashlib
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vmbus.core.memory import PAGE_SIZE
from vmbus.errors import DeviceError
from vmbus.machine.block import BlockDevice
from vmbus.machine.model import ModelMachine
from vmbus.sizes import byte_count
from vmbus.storage.disk import Disk, RawDisk
from vmbus.storage.images import open_disk
from vmbus.trace.ledger import Account

__all__ = ["PATHS", "Comparison", "Phase", "compare"]

PATHS = ("enlightened", "emulated")
"""The two ways of a request: storage VSC → VMBus → storage VSP, and ATA driver → intercepts → IDE controller."""

MAX_UNDER_WAY = 1 << 30
"""Bytes of all requests that may be under way at once."""
MIN_MEMORY = 64 << 20
"""Bytes of the guests' memory, at least."""
_PART = 1 << 20
"""Bytes that the host's own reads and writes move at once."""

Progress = Callable[[str, int, int], None]
"""``progress(phase, done, total)`` in operations."""


@dataclass(slots=True)
class Phase:
    """What one path did in one phase.

    Attributes:
        operations: reads or writes.
        size: bytes moved.
        seconds: time spent in the guest's disk calls.
        counts: what the ledger of that machine counted.
        sha256: of the bytes read, or of the blocks as they are in the image after the writes.
    """

    operations: int = 0
    size: int = 0
    seconds: float = 0.0
    counts: Account = field(default_factory=Account)
    sha256: str = ""

    def per_operation(self) -> dict[str, float]:
        """The counts and the time in microseconds, divided by the operations."""
        counts = self.counts.to_dict()
        flat = {name: value for name, value in counts.items() if not isinstance(value, dict)}
        flat["exits"] = sum(counts["exits"].values())
        flat |= {f"exits.{reason}": n for reason, n in counts["exits"].items()}
        flat["hypercalls"] = sum(counts["hypercalls"].values())
        flat["interrupts"] = sum(counts["interrupts"].values())
        flat["microseconds"] = self.seconds * 1e6
        return {name: value / max(1, self.operations) for name, value in flat.items()}


@dataclass(slots=True)
class Comparison:
    """The outcome: phases by name ("reads", "writes") and path, and what the bytes should be.

    Attributes:
        image: the disk's name.
        size: bytes of the disk.
        block: bytes of an operation.
        depth: requests that may be under way at once.
        expected: SHA-256 of the image's bytes, computed on the host, by phase.
        phases: by phase name and path.
    """

    image: str
    size: int
    block: int
    depth: int
    expected: dict[str, str]
    phases: dict[str, dict[str, Phase]]

    @property
    def correct(self) -> bool:
        """Whether every path moved exactly the right bytes in every phase."""
        return all(
            phase.sha256 == self.expected[name]
            for name, paths in self.phases.items()
            for phase in paths.values()
        )

    def ratio(self, phase: str) -> float:
        """How many times longer the emulated path took."""
        paths = self.phases[phase]
        return paths["emulated"].seconds / max(paths["enlightened"].seconds, 1e-9)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; counts in total and per operation."""
        return {
            "image": self.image,
            "size": self.size,
            "block": self.block,
            "depth": self.depth,
            "correct": self.correct,
            "expected": self.expected,
            "time_ratio": {name: self.ratio(name) for name in self.phases},
            "phases": {
                name: {
                    path: asdict(phase)
                    | {"counts": phase.counts.to_dict(), "per_operation": phase.per_operation()}
                    for path, phase in paths.items()
                }
                for name, paths in self.phases.items()
            },
        }


def compare(
    image: str | os.PathLike[str] | Disk | None = None,
    *,
    size: int = 4 << 20,
    block: int = 4096,
    depth: int = 32,
    seed: int = 0,
    write: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """Read a whole disk, and write a quarter of its blocks, over both paths.

    Args:
        image: what `open_disk` takes, or an open disk, which stays open; None makes one of `size` bytes of noise for
            this run.
        size: bytes of the image that is made; ignored when one is given.
        block: bytes of one operation, whole sectors.
        depth: requests that may be under way at once where the path can have more than one.
        seed: chooses the blocks written and their data (and the noise of an image that is made).
        write: write to the given image itself. Otherwise it is opened read-only and the writes go to an empty
            disk of the same size.
        progress: called after every batch.

    Raises:
        DeviceError: the image cannot be opened (`open_disk`), has sectors that an emulated disk cannot have, is to be
            written and read-only, or `block` or `depth` make no sense.
        TypeError: a size is no integer.
    """
    block, size = byte_count(block, "blocks"), byte_count(size, "the image")
    if block <= 0 or block % 512:
        raise DeviceError(f"blocks of {block} bytes: must be a positive multiple of 512")
    if depth < 1:
        raise DeviceError(f"a queue depth of {depth}: must be at least 1")
    if depth * block > MAX_UNDER_WAY:
        raise DeviceError(
            f"{depth} requests of {block} bytes under way: at most {MAX_UNDER_WAY >> 20} MiB of the guest's memory"
        )
    if size <= 0 or size % 512:
        raise DeviceError(f"an image of {size} bytes: must be a positive multiple of 512")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vmbus-compare-")))
        if isinstance(image, Disk):
            name, disk = _name(image), image
        elif image is None:
            name, disk = (
                "made for this run",
                stack.enter_context(_make_image(folder / "disk.img", size, seed)),
            )
        else:
            name, disk = os.fspath(image), stack.enter_context(open_disk(image, read_only=not write))
        if write and disk.read_only:
            raise DeviceError(f"{name}: is read-only and cannot be written")
        length = disk.size
        reads, read_hash = _reads(disk, block, depth, progress)
        if write:
            targets = dict.fromkeys(PATHS, disk)
        else:
            targets = {
                path: stack.enter_context(RawDisk.create(folder / f"{path}.img", length)) for path in PATHS
            }
        writes, write_hash = _writes(targets, length, block, depth, seed, progress)
    return Comparison(
        name,
        length,
        block,
        depth,
        {"reads": read_hash, "writes": write_hash},
        {"reads": reads, "writes": writes},
    )


def _name(disk: Disk) -> str:
    """What to call a disk that somebody else opened."""
    return str(getattr(disk, "path", "") or getattr(disk, "name", "") or type(disk).__name__)


def _make_image(path: Path, size: int, seed: int) -> RawDisk:
    noise = random.Random(seed)
    disk = RawDisk.create(path, size)
    for offset in range(0, size, _PART):
        disk.write(offset, noise.randbytes(min(_PART, size - offset)))
    return disk


def _operations(length: int, block: int, depth: int) -> Iterator[tuple[list[int], int]]:
    """Batches of equal operations that cover `length` bytes: offsets, and the bytes of each."""
    whole = length - length % block
    for start in range(0, whole, block * depth):
        yield list(range(start, min(start + block * depth, whole), block)), block
    if length % block:
        yield [whole], length % block


class _Path:
    """One machine, its guest's disk, and the phase that it is in."""

    def __init__(self, kind: str, disk: Disk, block: int, depth: int) -> None:
        # Half of the guest's memory may be data pages; the depth that is reported has to be in force.
        memory = max(MIN_MEMORY, 4 * -(-depth * block // PAGE_SIZE) * PAGE_SIZE)
        self.machine = ModelMachine(memory_size=memory)
        self.device: BlockDevice = (
            self.machine.add_enlightened_disk(disk, depth=depth, request_size=block)
            if kind == "enlightened"
            else self.machine.add_emulated_disk(disk)
        )
        self.phase = Phase()
        self.before = self.machine.ledger.total()

    def done(self, sha256: str) -> Phase:
        self.phase.sha256 = sha256
        self.machine.close()
        return self.phase

    def stop_counting(self) -> None:
        self.phase.counts = self.machine.ledger.total() - self.before


def _reads(disk: Disk, block: int, depth: int, progress: Progress | None) -> tuple[dict[str, Phase], str]:
    paths = {kind: _Path(kind, disk, block, depth) for kind in PATHS}
    hashes = {kind: hashlib.sha256() for kind in PATHS}
    total = -(-disk.size // block)
    done = 0
    for offsets, length in _operations(disk.size, block, depth):
        for kind, path in paths.items():
            started = time.perf_counter()
            data = path.device.read_batch(offsets, length)
            path.phase.seconds += time.perf_counter() - started
            path.phase.operations += len(offsets)
            path.phase.size += length * len(offsets)
            for part in data:
                hashes[kind].update(part)
        done += len(offsets)
        if progress is not None:
            progress("reads", done, total)
    for path in paths.values():
        path.stop_counting()
    expected = hashlib.sha256()
    for offset in range(0, disk.size, _PART):
        expected.update(disk.read(offset, min(_PART, disk.size - offset)))
    results = {kind: path.done(hashes[kind].hexdigest()) for kind, path in paths.items()}
    return results, expected.hexdigest()


def _writes(
    disks: dict[str, Disk], length: int, block: int, depth: int, seed: int, progress: Progress | None
) -> tuple[dict[str, Phase], str]:
    """Write a quarter of the blocks, flush, and read them back from the disks on the host."""
    choice = random.Random(f"blocks {seed}")
    noise = random.Random(f"data {seed}")
    whole = range(0, length - length % block, block)
    offsets = sorted(choice.sample(whole, max(1, len(whole) // 4))) if whole else []
    expected = hashlib.sha256()
    paths = {kind: _Path(kind, disk, block, depth) for kind, disk in disks.items()}
    for start in range(0, len(offsets), depth):
        batch = offsets[start : start + depth]
        data = [noise.randbytes(block) for _ in batch]
        for part in data:
            expected.update(part)
        for path in paths.values():
            started = time.perf_counter()
            path.device.write_batch(batch, data)
            path.phase.seconds += time.perf_counter() - started
            path.phase.operations += len(batch)
            path.phase.size += block * len(batch)
        if progress is not None:
            progress("writes", start + len(batch), len(offsets))
    results = {}
    for kind, path in paths.items():
        path.stop_counting()
        path.device.flush()  # not counted and timed: it is the host's fsync, the same for both
        written = hashlib.sha256()
        for offset in offsets:
            written.update(disks[kind].read(offset, block))
        results[kind] = path.done(written.hexdigest())
    return results, expected.hexdigest()

"""Machine code → intercepts → the emulated IDE channel: data, counts and failures."""

import random
from collections.abc import Callable
from typing import Any

import pytest

from vmbus.emulated.ports import attach_ide, detach_ide
from vmbus.errors import DeviceError, LocalProtocolError
from vmbus.hypervisor import Hypervisor, Partition
from vmbus.machine.ide_guest import IdeDisk
from vmbus.storage.disk import MemoryDisk
from vmbus.trace.ledger import Account

SECTORS = 4096
MODES = [
    {},
    {"interrupts": False},
    {"string": False},
    {"string": False, "interrupts": False},
    {"multiple": 8},
    {"multiple": 16, "interrupts": False, "extended": True},
    {"extended": True},
    {"string_elements": 1},
]


@pytest.fixture
def medium() -> MemoryDisk:
    disk = MemoryDisk(SECTORS * 512)
    disk.write(0, random.Random(7).randbytes(SECTORS * 512))
    return disk


@pytest.fixture
def child(medium: MemoryDisk) -> Partition:
    hv = Hypervisor()
    hv.create_root(name="root")
    child = hv.create_child(hv.root, name="c0", memory_size=16 << 20, vps=1)
    attach_ide(child, medium)
    return child


def counted(child: Partition, action: Callable[[], Any]) -> Account:
    ledger = child.hypervisor.ledger
    before = ledger.total("c0").copy()
    action()
    return ledger.total("c0") - before


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_reads_and_writes_move_the_right_bytes(
    child: Partition, medium: MemoryDisk, mode: dict[str, Any]
) -> None:
    disk = IdeDisk(child.vps[0], **mode)
    assert disk.size == SECTORS * 512
    rng = random.Random(3)
    for _ in range(4):
        length = 512 * rng.randrange(1, 20)
        offset = 512 * rng.randrange(SECTORS - length // 512)
        assert disk.read(offset, length) == medium.read(offset, length)
        data = rng.randbytes(length)
        disk.write(offset, data)
        assert medium.read(offset, length) == data
    disk.flush()


def test_batches_are_split_into_commands_and_rounds(child: Partition, medium: MemoryDisk) -> None:
    disk = IdeDisk(child.vps[0], multiple=128, buffer_size=128 << 10)
    offsets = [512 * n * 9 for n in range(200)]
    assert disk.read_batch(offsets, 1024) == [medium.read(offset, 1024) for offset in offsets]
    data = [bytes([n]) * 1536 for n in range(200)]
    disk.write_batch(offsets, data)
    assert all(medium.read(offset, 1536) == wanted for offset, wanted in zip(offsets, data, strict=True))
    large = random.Random(1).randbytes(1 << 20)
    disk.write(512, large)
    assert disk.read(512, 1 << 20) == large == medium.read(512, 1 << 20)
    assert disk.read_batch([], 512) == []
    assert disk.read(0, 0) == b""


@pytest.mark.parametrize(
    ("mode", "port", "instructions"),
    [
        # task file and command 6, delay 1, poll or interrupt 1 a sector, data 1 a sector
        ({"interrupts": False}, 6 + 8 * (1 + 1 + 1), None),
        ({}, 6 + 8 * (1 + 1), None),
        ({"multiple": 8}, 6 + 1 + 2, None),  # 2048 words are two string exits
        ({"extended": True}, 10 + 8 * (1 + 1), None),
        ({"string": False}, 6 + 8 * (1 + 256), 8 * 256 * 4),
        ({"string_elements": 1}, 6 + 8 * (1 + 256), None),
    ],
    ids=str,
)
def test_exits_of_a_4k_read(
    child: Partition, mode: dict[str, Any], port: int, instructions: int | None
) -> None:
    disk = IdeDisk(child.vps[0], **mode)
    counts = counted(child, lambda: disk.read(0, 4096))
    interrupts = 0 if mode.get("interrupts") is False else 1 if mode.get("multiple") else 8
    wanted = {"io_port": port, "halt": 1} | ({"mmio": interrupts} if interrupts else {})  # an EOI each
    assert counts.exits == wanted
    assert sum(counts.interrupts.values()) == interrupts
    assert counts.bytes_copied == 4096
    assert counts.backend_calls == 1
    if instructions is not None:
        assert instructions < counts.instructions < instructions + 600
    assert counted(child, lambda: disk.read(0, 4096)) == counts  # exactly repeatable


class Faulty(MemoryDisk):
    """Fails where it is told to."""

    def read(self, offset: int, length: int) -> bytes:
        if offset <= 100 * 512 < offset + length:
            raise DeviceError("medium error")
        return super().read(offset, length)

    def flush(self) -> None:
        raise DeviceError("no")


@pytest.mark.parametrize("interrupts", [True, False])
def test_errors_of_the_medium_reach_the_caller(child: Partition, interrupts: bool) -> None:
    detach_ide(child)
    attach_ide(child, Faulty(SECTORS * 512))
    disk = IdeDisk(child.vps[0], interrupts=interrupts)
    with pytest.raises(DeviceError, match="READ at sector 98 failed: status 0x51, error 0x40"):
        disk.read(98 * 512, 8 * 512)
    with pytest.raises(DeviceError, match="FLUSH"):
        disk.flush()
    assert len(disk.read(0, 4096)) == 4096  # and goes on


def test_a_device_that_raises_does_not_spoil_the_driver(child: Partition) -> None:
    class Broken(MemoryDisk):
        broken = False

        def read(self, offset: int, length: int) -> bytes:
            if self.broken:
                raise RuntimeError("a bug in a backend")
            return super().read(offset, length)

    detach_ide(child)
    medium = Broken(SECTORS * 512)
    attach_ide(child, medium)
    disk = IdeDisk(child.vps[0])
    medium.broken = True
    with pytest.raises(RuntimeError):
        disk.read(0, 512)
    medium.broken = False
    assert disk.read(512, 4096) == bytes(4096)


def test_a_disk_that_shrinks_under_the_driver_is_an_error(child: Partition, medium: MemoryDisk) -> None:
    disk = IdeDisk(child.vps[0])
    medium.sector_count = 100
    with pytest.raises(DeviceError, match="error 0x10"):
        disk.read(200 * 512, 512)


def test_without_a_disk_there_is_an_error(child: Partition) -> None:
    detach_ide(child)
    with pytest.raises(DeviceError, match="there is no IDE disk"):
        IdeDisk(child.vps[0])


@pytest.mark.parametrize(
    ("offset", "length"), [(1, 512), (0, 100), (SECTORS * 512, 512), (-512, 512), (0, -512)]
)
def test_misuse_is_refused(child: Partition, offset: int, length: int) -> None:
    disk = IdeDisk(child.vps[0])
    with pytest.raises(LocalProtocolError):
        disk.read(offset, length)


def test_48_bit_addresses_are_used_where_they_are_needed(child: Partition) -> None:
    class Huge(MemoryDisk):
        """Claims 1 TB and keeps one sector."""

        def __init__(self) -> None:
            super().__init__(4096)
            self.sector_count = 1 << 31
            self.seen: list[int] = []

        def read(self, offset: int, length: int) -> bytes:
            self.seen.append(offset // 512)
            return bytes(length)

    detach_ide(child)
    huge = Huge()
    attach_ide(child, huge)
    disk = IdeDisk(child.vps[0])
    assert disk.size == 1 << 40
    assert counted(child, lambda: disk.read((1 << 40) - 512, 512)).exits["io_port"] == 10 + 2
    assert counted(child, lambda: disk.read(512, 512)).exits["io_port"] == 6 + 2
    assert huge.seen == [(1 << 31) - 1, 1]

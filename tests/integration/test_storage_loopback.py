"""The storage client and provider over two rings and guest memory."""

import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest
from reference.storage_attacker import (
    GPA_DIRECT,
    IN_BAND,
    Attacker,
    control,
    gpa_header,
    read10,
    srb,
    status_of,
    write10,
)

from vmbus.bus.channel import Channel, loopback
from vmbus.core.memory import GuestMemory
from vmbus.errors import LocalProtocolError
from vmbus.storage.disk import Disk, MemoryDisk, RawDisk
from vmbus.storage.scsi.codes import AdditionalSense, Opcode, SenseKey
from vmbus.storage.scsi.sense import Sense
from vmbus.storage.vsc import CommandError, StorageVsc
from vmbus.storage.vsp import StorageVsp
from vmbus.storage.wire import NtStatus, SrbStatus, Version

MIB = 1 << 20
CONTENT = os.urandom(8 * MIB)

Connect = Callable[..., tuple[StorageVsp, StorageVsc]]


class Slow(Disk):
    """A disk without a file descriptor: every byte goes through its Python methods."""

    def __init__(self, inner: Disk) -> None:
        self.inner = inner
        self.sector_size, self.sector_count = inner.sector_size, inner.sector_count
        self.physical_sector_size, self.read_only = inner.physical_sector_size, inner.read_only
        self.read, self.write, self.flush, self.close = inner.read, inner.write, inner.flush, inner.close  # type: ignore[method-assign]

    def read(self, offset: int, length: int) -> bytes:
        raise NotImplementedError

    def write(self, offset: int, data: object) -> None:
        raise NotImplementedError

    def flush(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


@pytest.fixture
def connect() -> Iterator[Connect]:
    opened: list[tuple[StorageVsp, Channel]] = []

    def make(
        disks: dict[tuple[int, int], Disk], *, versions: list[int] | None = None, **options: int
    ) -> tuple[StorageVsp, StorageVsc]:
        memory = GuestMemory(16 * MIB)
        guest, host = loopback(memory, 16, 16)
        vsp = StorageVsp(disks, **options)  # type: ignore[arg-type]
        vsp.open(host)
        opened.append((vsp, host))
        pages = list(range(1024, 0, -7))  # scattered, in falling order
        vsc = StorageVsc(guest, pages, **({"versions": versions} if versions else {}))  # type: ignore[arg-type]
        vsc.connect()
        return vsp, vsc

    yield make
    for vsp, host in opened:
        vsp.shutdown()
        host.close()


@pytest.mark.parametrize("version", list(Version))
@pytest.mark.parametrize("wrap", [lambda disk: disk, Slow], ids=["file", "python"])
@pytest.mark.parametrize("workers", [0, 3])
def test_a_disk_reads_writes_and_gives_back(
    connect: Connect, version: Version, wrap: Callable[[Disk], Disk], workers: int
) -> None:
    disk = MemoryDisk(8 * MIB, content=CONTENT)
    vsp, vsc = connect({(0, 0): wrap(disk)}, versions=[version], workers=workers)
    assert vsp.version == version
    device = vsc.disk()
    assert (device.size, device.sector_size) == (8 * MIB, 512)
    for offset, length in ((0, 512), (4096, 4096), (512, 3 * 512), (8 * MIB - 512, 512), (MIB, 2 * MIB)):
        assert device.read(offset, length) == CONTENT[offset : offset + length]
    data = os.urandom(700 * 1024)
    device.write(3 * 512, data)
    device.write(0, b"\x55" * 512, fua=True)
    device.flush()
    assert disk.read(0, 512) == b"\x55" * 512
    assert disk.read(3 * 512, len(data)) == data
    if device.thin:
        device.unmap(4 * MIB, MIB)
        assert disk.read(4 * MIB, MIB) == bytes(MIB)
        assert device.read(4 * MIB, MIB) == bytes(MIB)


@pytest.mark.parametrize(("sector", "physical"), [(512, 512), (512, 4096), (4096, 4096)])
def test_geometries(connect: Connect, sector: int, physical: int) -> None:
    disk = MemoryDisk(MIB, sector_size=sector, physical_sector_size=physical, content=CONTENT[:MIB])
    _, vsc = connect({(0, 3): disk})
    device = vsc.disk(0, 3)
    assert (device.sector_size, device.physical_sector_size, device.size) == (sector, physical, MIB)
    assert device.read(sector, 2 * sector) == CONTENT[sector : 3 * sector]
    with pytest.raises(LocalProtocolError):
        device.read(100, sector)


def test_a_command_to_nobody(connect: Connect) -> None:
    _, vsc = connect({(0, 1): MemoryDisk(MIB)})
    assert vsc.luns(0) == [1]
    assert vsc.luns(1) == []
    result = vsc.execute(0, 0, bytes([Opcode.TEST_UNIT_READY]))
    assert result.srb_status == SrbStatus.INVALID_LUN
    assert result.sense == Sense(SenseKey.ILLEGAL_REQUEST, AdditionalSense.LOGICAL_UNIT_NOT_SUPPORTED)
    # Guests look for the units of a target at LUN 0, so that must answer INQUIRY all the same.
    inquiry = vsc.execute(0, 0, struct.pack(">BBBHx", Opcode.INQUIRY, 0, 0, 36), data_in=36)
    assert inquiry.good
    assert inquiry.data[0] == 0x7F


def test_hot_add_and_remove_are_told_and_take_effect(connect: Connect) -> None:
    vsp, vsc = connect({(0, 0): MemoryDisk(MIB)})
    seen: list[list[int]] = []
    vsc.on_change = lambda: seen.append(vsc.luns())
    vsp.add_disk((0, 5), MemoryDisk(2 * MIB))
    vsc.poll()
    device = vsc.disk(0, 5)
    assert device.size == 2 * MIB
    vsp.remove_disk((0, 5))
    vsc.poll()
    assert seen == [[0, 5], [0]]
    with pytest.raises(CommandError) as caught:
        device.read(0, 512)
    assert caught.value.srb_status == SrbStatus.INVALID_LUN
    with pytest.raises(LocalProtocolError):
        vsp.remove_disk((0, 5))
    with pytest.raises(LocalProtocolError):
        vsp.add_disk((0, 0), MemoryDisk(MIB))


def test_old_guests_get_no_notice_that_they_do_not_know(connect: Connect) -> None:
    vsp, vsc = connect({}, versions=[Version.WIN6])
    vsp.add_disk((0, 0), MemoryDisk(MIB))
    assert vsc.channels[0].incoming.available_bytes == 0
    assert vsc.disk().size == MIB


def test_a_reset_is_told_to_the_next_command(connect: Connect) -> None:
    _, vsc = connect({(0, 0): MemoryDisk(MIB)})
    device = vsc.disk()
    vsc.reset()
    result = vsc.execute(0, 0, bytes([Opcode.TEST_UNIT_READY]))
    assert result.sense == Sense(SenseKey.UNIT_ATTENTION, AdditionalSense.BUS_RESET_OCCURRED)
    assert device.read(0, 512) == bytes(512)


@pytest.mark.parametrize(("operation", "aborted"), [(4, [0]), (5, [0, 1]), (6, [0, 1])])
def test_a_reset_aborts_what_has_not_begun(operation: int, aborted: list[int]) -> None:
    """A unit's reset leaves the requests of other units alone; what a worker is at ends as usual; all complete once."""
    entered, gate = threading.Event(), threading.Event()

    class Gated(Slow):
        def __init__(self, inner: Disk) -> None:
            super().__init__(inner)
            self.read = self.gated  # type: ignore[method-assign]

        def gated(self, offset: int, length: int) -> bytes:
            entered.set()
            assert gate.wait(5)
            return self.inner.read(offset, length)

    attacker = Attacker()
    disks: dict[tuple[int, int], Disk] = {(0, lun): Gated(MemoryDisk(MIB)) for lun in (0, 1)}
    provider = StorageVsp(disks, workers=1)
    provider.open(attacker.host)
    attacker.negotiate()
    sent: dict[int, list[int]] = {0: [], 1: []}
    for number in range(8):
        lun = number % 2
        packet = srb(read10(0, 1), 512, lun=lun)
        sent[lun].append(attacker.send(GPA_DIRECT, packet, gpa_header([(512, 0, [3 + number])])))
    assert entered.wait(5)
    body = srb(bytes(6))[12:]  # the address of unit 0
    assert status_of(attacker.ask(IN_BAND, control(operation, body)))[0] == 0
    gate.set()
    wanted = {*sent[0], *sent[1]}
    ends = time.monotonic() + 5
    while wanted - set(attacker.answers) and time.monotonic() < ends:
        attacker.collect()
        time.sleep(0.001)
    assert not wanted - set(attacker.answers)
    first = sent[0][0]
    for lun, tids in sent.items():
        for tid in tids:
            status, srb_status, _ = status_of(attacker.answers[tid])
            if lun in aborted and tid != first:
                assert (status, srb_status) == (NtStatus.CANCELLED, SrbStatus.ABORTED)
            else:
                assert srb_status in (
                    SrbStatus.SUCCESS,
                    SrbStatus.ERROR,
                )  # or the unit attention of the reset
                assert status != NtStatus.CANCELLED
    assert status_of(attacker.answers[first])[1] == SrbStatus.SUCCESS
    provider.shutdown()


def test_requests_overlap_and_finish_in_any_order(connect: Connect) -> None:
    gate = threading.Event()
    order: list[int] = []

    class Gated(Slow):
        def __init__(self, inner: Disk) -> None:
            super().__init__(inner)
            self.read = self.gated  # type: ignore[method-assign]

        def gated(self, offset: int, length: int) -> bytes:
            if offset == 0:
                assert gate.wait(5), "the second request never ran beside the first"
            order.append(offset)
            gate.set()
            return self.inner.read(offset, length)

    _, vsc = connect({(0, 0): Gated(MemoryDisk(MIB, content=CONTENT[:MIB]))}, workers=2)
    device = vsc.disk()
    assert device.read_batch([0, 4096], 4096) == [CONTENT[:4096], CONTENT[4096:8192]]
    assert order == [4096, 0]


def test_the_ide_accelerator_ignores_the_path_that_the_guest_gives() -> None:
    memory = GuestMemory(4 * MIB)
    vsp = StorageVsp.ide_accelerator(MemoryDisk(MIB, content=CONTENT[:MIB]), path=1, target=1)
    assert vsp.offer.instance_id.bytes_le[4:6] == b"\1\0"  # where Linux reads the target
    assert vsp.offer.user_defined[2:4] == bytes([1, 1])
    guest, host = loopback(memory, 4, 4, offer=vsp.offer)
    vsp.open(host)
    vsc = StorageVsc(guest, range(64))
    vsc.connect()
    assert vsc.disk(1, 0).read(0, 4096) == CONTENT[:4096]
    vsp.shutdown()
    guest.close()


def test_requests_before_the_negotiation_are_refused() -> None:
    from vmbus.storage.wire import NtStatus, Operation, PacketHeader

    memory = GuestMemory(MIB)
    guest, host = loopback(memory)
    vsp = StorageVsp({(0, 0): MemoryDisk(MIB)})
    vsp.open(host)
    guest.send(PacketHeader(Operation.EXECUTE_SRB).pack() + bytes(52), 7, flags=1)
    packet = guest.incoming.recv_packet()
    assert packet.transaction_id == 7
    assert PacketHeader.unpack(packet.payload).status == NtStatus.INVALID_DEVICE_STATE
    guest.close()


def test_a_flush_is_an_fsync_before_its_completion(
    connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, pwritev = os.fsync, os.pwritev
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(
        os, "pwritev", lambda *a: (calls.append(f"pwritev {a[3] == os.RWF_DSYNC}"), pwritev(*a))[1]
    )
    disk = RawDisk.create(tmp_path / "disk", MIB)
    _, vsc = connect({(0, 0): disk})
    device = vsc.disk()
    device.write(0, b"1" * 4096)
    assert calls == []  # written by compiled code, to the page cache
    device.flush()
    assert calls == ["fsync"]
    device.write(0, b"2" * 4096, fua=True)
    assert calls == ["fsync", "pwritev True"]
    page = bytearray(vsc.check(0, 0, bytes([0x1A, 8, 8, 0, 255]), data_in=255)[4:])
    page[2] &= ~4  # write cache off
    vsc.check(0, 0, bytes([0x15, 0x10, 0, 0, 4 + len(page)]), data_out=bytes(4) + page)
    del calls[:]
    device.write_batch([0, 4096], [b"3" * 4096] * 2)
    assert calls == ["pwritev True"] * 2


@pytest.mark.parametrize("kind", ["file", "memory", "python"])
def test_ledger_counts_are_exact(connect: Connect, tmp_path: Path, kind: str) -> None:
    disk = RawDisk.create(tmp_path / "disk", MIB) if kind == "file" else MemoryDisk(MIB)
    vsp, vsc = connect({(0, 0): Slow(disk) if kind == "python" else disk})
    device = vsc.disk()
    host = vsp._servers[0].channel.account
    guest = vsc.channels[0].account
    before_host, before_guest = host.copy(), guest.copy()
    for index in range(10):
        device.read(index * 4096, 4096)
    device.read_batch(range(0, MIB, 4096), 4096)
    spent_host, spent_guest = host - before_host, guest - before_guest
    total = 10 + 256
    assert (spent_host.packets_received, spent_host.packets_sent) == (total, total)
    assert spent_host.backend_calls == total
    assert spent_host.bytes_copied == (0 if kind == "file" else total * 4096)
    assert (spent_guest.packets_sent, spent_guest.packets_received) == (total, total)
    # One doorbell a request, and one for each refill of the queue: 146 buffer pages make two batches.
    assert spent_guest.doorbells_sent == 10 + 5 + 4
    assert spent_host.doorbells_sent == 10


@pytest.mark.parametrize("kind", ["file", "memory", "python"])
@pytest.mark.parametrize("length", [512, 4096, 5 * 512, 20480])
def test_batches(connect: Connect, tmp_path: Path, kind: str, length: int) -> None:
    disk = RawDisk.create(tmp_path / "disk", MIB) if kind == "file" else MemoryDisk(MIB)
    disk.write(0, CONTENT[:MIB])
    _, vsc = connect({(0, 0): Slow(disk) if kind == "python" else disk})
    device = vsc.disk()
    random = Random(length)
    offsets = [random.randrange((MIB - length) // 512) * 512 for _ in range(500)]
    assert device.read_batch(offsets, length) == [CONTENT[at : at + length] for at in offsets]
    shadow = bytearray(CONTENT[:MIB])
    places = random.sample(range(MIB // length), min(300, MIB // length))
    pieces = [random.randbytes(length) for _ in places]
    device.write_batch([place * length for place in places], pieces)
    for place, piece in zip(places, pieces, strict=True):
        shadow[place * length : (place + 1) * length] = piece
    assert disk.read(0, MIB) == shadow
    with pytest.raises(CommandError) as caught:
        device.read_batch([0, MIB, 4096], length)
    assert caught.value.sense == Sense(SenseKey.ILLEGAL_REQUEST, AdditionalSense.LBA_OUT_OF_RANGE)


def test_pages_of_the_caller(connect: Connect) -> None:
    disk = MemoryDisk(MIB, content=CONTENT[:MIB])
    _, vsc = connect({(0, 0): disk})
    device = vsc.disk()
    memory = vsc.channels[0].memory
    pfns = np.arange(2000, 2100, dtype=np.uint64)
    offsets = np.arange(100, dtype=np.uint64) * np.uint64(4096)
    assert device.transfer_batch(offsets, pfns, 4096, write=False) == []
    assert memory.read(2000 << 12, 100 * 4096) == CONTENT[: 100 * 4096]
    outside = np.array([1, 1 << 40], dtype=np.uint64)
    assert device.transfer_batch(offsets[:2], outside, 4096, write=False) == [1]


@pytest.mark.parametrize("kind", ["file", "memory", "python"])
def test_requests_of_several_ranges(tmp_path: Path, kind: str) -> None:
    """Ranges of odd lengths and offsets, scattered over pages, taken one after the other."""
    disk = RawDisk.create(tmp_path / "disk", MIB) if kind == "file" else MemoryDisk(MIB)
    disk.write(0, CONTENT[:MIB])
    attacker = Attacker()
    provider = StorageVsp({(0, 0): Slow(disk) if kind == "python" else disk})
    provider.open(attacker.host)
    attacker.negotiate()
    ranges = [(100, 4000, [9, 3]), (1, 5, [7]), (7000, 1000, [20, 11]), (4, 4092, [4]), (87 + 1000, 0, [30])]
    assert sum(length for length, _, _ in ranges) == 16 * 512
    places = [(9 << 12) + 4000, (7 << 12) + 5, (20 << 12) + 1000, (4 << 12) + 4092, 30 << 12]

    def gather() -> bytes:
        memory = attacker.memory
        first = memory.read(places[0], 96) + memory.read(3 << 12, 4)
        third = memory.read(places[2], 3096) + memory.read(11 << 12, 3904)
        return (
            first
            + memory.read(places[1], 1)
            + third
            + memory.read(places[3], 4)
            + memory.read(places[4], 1087)
        )

    answer = attacker.execute(read10(40, 16), 16 * 512, ranges)
    assert status_of(answer) == (0, 1, 0)
    assert gather() == CONTENT[40 * 512 : 56 * 512]
    assert status_of(attacker.execute(write10(100, 16), 16 * 512, ranges)) == (0, 1, 0)
    assert disk.read(100 * 512, 16 * 512) == CONTENT[40 * 512 : 56 * 512]
    # fewer blocks than the buffer holds
    assert status_of(attacker.execute(write10(200, 3), 16 * 512, ranges)) == (0, 1, 0)
    assert disk.read(200 * 512, 4 * 512) == CONTENT[40 * 512 : 43 * 512] + CONTENT[203 * 512 : 204 * 512]
    provider.shutdown()
    attacker.guest.close()


def test_a_guest_that_wants_no_autosense_can_ask_for_it() -> None:
    attacker = Attacker()
    provider = StorageVsp({(0, 0): MemoryDisk(MIB)})
    provider.open(attacker.host)
    attacker.negotiate()
    ranges = [(512, 0, [3])]
    packet = bytearray(srb(read10(1 << 20, 1), 512))
    packet[12 + 40] |= 0x20  # SRB_FLAGS_DISABLE_AUTOSENSE
    answer = attacker.ask(GPA_DIRECT, bytes(packet), gpa_header(ranges))
    assert status_of(answer)[2] == 2
    assert (answer[14] & 0x80, answer[21]) == (0, 0)
    request_sense = bytes([0x03, 0, 0, 0, 252, 0])
    out_of_range = Sense(SenseKey.ILLEGAL_REQUEST, AdditionalSense.LBA_OUT_OF_RANGE)
    attacker.execute(request_sense, 252, [(252, 0, [5])])
    assert Sense.unpack(attacker.memory.read(5 << 12, 18)) == out_of_range
    attacker.execute(request_sense, 252, [(252, 0, [5])])
    assert Sense.unpack(attacker.memory.read(5 << 12, 18)) == Sense(SenseKey.NO_SENSE, AdditionalSense.NONE)
    attacker.ask(GPA_DIRECT, bytes(packet), gpa_header(ranges))
    attacker.execute(bytes(6), 0, [])  # any other command, and it is gone
    attacker.execute(request_sense, 252, [(252, 0, [5])])
    assert Sense.unpack(attacker.memory.read(5 << 12, 18)) == Sense(SenseKey.NO_SENSE, AdditionalSense.NONE)
    provider.shutdown()

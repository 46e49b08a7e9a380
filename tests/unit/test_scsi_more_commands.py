"""Commands that independent suites ask for, reservations by the standards' tables, and what the unit says it has."""

import os
import struct
import threading
from collections.abc import Iterator
from uuid import UUID

import pytest

from vmbus.bus.channel import loopback
from vmbus.core.memory import GuestMemory
from vmbus.errors import LocalProtocolError
from vmbus.storage.disk import Buffer, Disk, MemoryDisk
from vmbus.storage.scsi import BytesBuffer, CdromUnit, DiskUnit, Limits, LogicalUnit, Sense, Task
from vmbus.storage.scsi.codes import AdditionalSense, ScsiStatus, SenseKey
from vmbus.storage.scsi.raw_sector import raw_sector
from vmbus.storage.vsc import StorageVsc
from vmbus.storage.vsp import StorageVsp

MIB = 1 << 20
SERIAL = UUID(int=9)
INVALID = (SenseKey.ILLEGAL_REQUEST, AdditionalSense.INVALID_FIELD_IN_CDB)


@pytest.fixture
def disk() -> Iterator[MemoryDisk]:
    with MemoryDisk(MIB, content=os.urandom(MIB)) as made:
        yield made


@pytest.fixture
def unit(disk: MemoryDisk) -> DiskUnit:
    made = DiskUnit(disk, SERIAL)
    for nexus in "abc":
        made.attach(nexus)
    return made


def run(
    unit: LogicalUnit, cdb: str | bytes, data: bytes | int = 4096, nexus: str = "a"
) -> tuple[int, Sense | None, bytes]:
    buffer = BytesBuffer(data)
    raw = bytes.fromhex(cdb) if isinstance(cdb, str) else cdb
    outcome = unit.execute(Task(raw.ljust(16, b"\0"), buffer, nexus))
    sense = Sense.unpack(outcome.sense) if outcome.sense else None
    return outcome.status, sense, bytes(buffer.content[: outcome.transferred])


def good(unit: LogicalUnit, cdb: str | bytes, data: bytes | int = 4096, nexus: str = "a") -> bytes:
    status, sense, moved = run(unit, cdb, data, nexus)
    assert status == ScsiStatus.GOOD, sense
    return moved


def refused(
    unit: LogicalUnit, cdb: str | bytes, data: bytes | int = 4096, nexus: str = "a"
) -> tuple[int, int]:
    status, sense, _ = run(unit, cdb, data, nexus)
    assert status == ScsiStatus.CHECK_CONDITION
    assert sense is not None
    return sense.key, sense.additional


# Limits


def test_the_longest_transfer_is_as_announced() -> None:
    guest, host = loopback(GuestMemory(8 << 20), 16, 16)
    provider = StorageVsp({(0, 0): MemoryDisk(4 * MIB)}, max_transfer=65536)
    provider.open(host)
    client = StorageVsc(guest, range(1, 1024))
    client.connect()
    blocks = int.from_bytes(client.execute(0, 0, bytes.fromhex("1201b0004000"), data_in=64).data[8:12], "big")
    assert blocks * 512 == client.negotiation.properties.max_transfer_bytes == 65536
    for opcode, field in ((0x28, 7), (0x88, 10), (0x2A, 7), (0x8A, 10)):
        for count, fits in ((blocks, True), (blocks + 1, False)):
            if opcode < 0x80:
                cdb = struct.pack(">BxIxHx", opcode, 0, count)
            else:
                cdb = struct.pack(">BxQIxx", opcode, 0, count)
            data = bytes(count * 512)
            if opcode & 2:
                result = client.execute(0, 0, cdb, data_out=data)
            else:
                result = client.execute(0, 0, cdb, data_in=len(data))
            assert result.good == fits
            if not fits:
                assert result.sense is not None
                assert result.sense.field == (field, None)
    # The channel's own limit counts for every command, however little it would move.
    result = client.execute(0, 0, bytes.fromhex("120000002400"), data_in=65536 + 512)
    assert not result.good
    assert client.execute(0, 0, bytes.fromhex("120000002400"), data_in=65536).good
    provider.shutdown()


def test_commands_of_several_kinds_keep_to_the_limit(disk: MemoryDisk) -> None:
    unit = DiskUnit(disk, SERIAL, limits=Limits(max_transfer=8))
    for opcode in (0x88, 0x8A, 0x8B, 0x8E):
        cdb = struct.pack(">BBQIxx", opcode, 0, 0, 9)
        assert refused(unit, cdb, bytes(9 * 512)) == INVALID
    assert refused(unit, struct.pack(">BBQIxx", 0x8F, 2, 0, 9), bytes(9 * 512)) == INVALID  # VERIFY, BYTCHK 1
    good(unit, struct.pack(">BBQIxx", 0x8F, 0, 0, 900))  # moves nothing
    assert refused(unit, struct.pack(">BxQxxHxx", 0x9C, 0, 9), bytes(9 * 512)) == INVALID


def test_write_same_unmap_only_where_it_is_announced(disk: MemoryDisk) -> None:
    thick = DiskUnit(_without_holes(disk), SERIAL)
    status, sense, _ = run(thick, struct.pack(">BBQIxx", 0x93, 8, 0, 8), bytes(512))
    assert (status, sense) == (
        ScsiStatus.CHECK_CONDITION,
        Sense(SenseKey.ILLEGAL_REQUEST, AdditionalSense.INVALID_FIELD_IN_CDB, None, (1, 3)),
    )
    assert refused(thick, struct.pack(">BBIxHx", 0x41, 8, 0, 8), bytes(512)) == INVALID
    for opcode in ("93", "41"):
        usage = good(thick, f"a30c01{opcode}0000000000400000")[4:]
        assert not usage[1] & 8
    with MemoryDisk(4096) as thin:
        assert good(DiskUnit(thin, SERIAL), "a30c01930000000000400000")[5] & 8


def _without_holes(disk: Disk) -> Disk:
    disk.unmap_granularity = 0
    return disk


@pytest.mark.parametrize("to_end", [False, True])
def test_write_same_of_no_blocks(disk: MemoryDisk, to_end: bool) -> None:
    unit = DiskUnit(disk, SERIAL, limits=Limits(write_same_to_end=to_end, max_write_same=1024))
    assert good(unit, "1201b0004000")[4] & 1 == (not to_end)
    last = disk.sector_count - 1024
    for lba, fits in ((last, to_end), (last - 1, False)):
        cdb = struct.pack(">BxQIxx", 0x93, lba, 0)
        if fits:
            good(unit, cdb, b"\x5a" * 512)
            assert disk.read(last * 512, 1024 * 512) == b"\x5a" * (1024 * 512)
        else:
            assert refused(unit, cdb, b"\x5a" * 512) == INVALID
    if to_end:
        past = struct.pack(">BxQIxx", 0x93, disk.sector_count + 1, 0)
        assert refused(unit, past, bytes(512))[1] == AdditionalSense.LBA_OUT_OF_RANGE


# What a unit says it has


def every_descriptor(unit: LogicalUnit) -> list[tuple[int, int | None]]:
    data = good(unit, "a30c00000000000040000000", 1 << 14)
    found, at = [], 4
    while at < len(data):
        opcode, action, flags, size = struct.unpack(">BxHxBH", data[at : at + 8])
        found.append((opcode, action if flags & 1 else None))
        assert size in (6, 10, 12, 16)
        at += 8
    return found


@pytest.mark.parametrize("kind", ["disk", "CD-ROM"])
def test_every_command_that_is_reported_is_there(disk: MemoryDisk, kind: str) -> None:
    unit = DiskUnit(disk, SERIAL) if kind == "disk" else CdromUnit(disk, SERIAL)
    for opcode, action in every_descriptor(unit):
        if opcode == 0x48:
            continue  # SANITIZE does what it says
        cdb = bytes([opcode, action or 0]).ljust(16, b"\0")
        status, sense, _ = run(unit, cdb)
        assert status != ScsiStatus.CHECK_CONDITION or (
            sense is not None
            and sense.additional
            not in (AdditionalSense.INVALID_OPERATION_CODE, AdditionalSense.INTERNAL_TARGET_FAILURE)
        ), hex(opcode)
    assert unit.faults == 0


def test_long_form_of_task_management_functions(unit: DiskUnit) -> None:
    assert good(unit, "a30d000000000000001000") == bytes([0x08, 0, 0, 0])
    assert good(unit, "a30d800000000000001000") == bytes([0x08, 0, 0, 0x0C]) + bytes(12)


def test_report_luns_of_a_unit_by_itself(unit: DiskUnit) -> None:
    assert good(unit, "a00000000000000000100000") == bytes([0, 0, 0, 8]) + bytes(12)
    assert good(unit, "a00001000000000000100000") == bytes(8)
    assert refused(unit, "a00003000000000000100000") == INVALID
    assert unit.faults == 0


# Reservations

ALLOWED_ALWAYS = {
    "TEST UNIT READY": "00",
    "INQUIRY": "1200000024",
    "REQUEST SENSE": "0300000012",
    "REPORT LUNS": "a00000000000000000100000",
    "READ CAPACITY (10)": "25",
    "READ CAPACITY (16)": "9e10000000000000000000000020",
    "START STOP UNIT, START": "1b0000000100",
    "PREVENT ALLOW, PREVENT 0": "1e",
    "PERSISTENT RESERVE IN": "5e0000000000000040",
}
ALLOWED_TO_READERS = {
    "READ (6)": "0800000001",
    "READ (10)": "28000000000000000100",
    "READ (16)": "8800000000000000000000000001",
    "VERIFY (10)": "2f000000000000000100",
    "PRE-FETCH (10)": "34000000000000000100",
    "PRE-FETCH (16)": "9000000000000000000000000001",
    "READ DEFECT DATA (10)": "37000000000000004000",
    "READ DEFECT DATA (12)": "b70000000000000000400000",
    "GET LBA STATUS": "9e12000000000000000000000018",
    "MODE SENSE (6)": "1a003f00ff",
    "REPORT SUPPORTED OPERATION CODES": "a30c00000000000040000000",
}
NEVER_ALLOWED = {
    "WRITE (10)": "2a000000000000000100",
    "WRITE (16)": "8a00000000000000000000000001",
    "WRITE AND VERIFY (10)": "2e000000000000000100",
    "ORWRITE (16)": "8b00000000000000000000000001",
    "WRITE ATOMIC (16)": "9c00000000000000000000000001",
    "COMPARE AND WRITE": "8900000000000000000000000001",
    "UNMAP": "42000000000000000800",
    "WRITE SAME (10)": "41000000000000000100",
    "SYNCHRONIZE CACHE (10)": "35",
    "SANITIZE": "48020000000000000000",
    "START STOP UNIT, STOP": "1b",
    "START STOP UNIT, STANDBY": "1b0000003000",
    "START STOP UNIT, ACTIVE": "1b0000001000",
    "PREVENT ALLOW, PREVENT 1": "1e0000000100",
    "MODE SELECT (6)": "15100000",
    "SEND DIAGNOSTIC": "1d04",
}


@pytest.mark.parametrize("kind", [1, 3])
def test_the_table_of_persistent_reservations(unit: DiskUnit, kind: int) -> None:
    """SPC-4 table 66 and SBC-3 table 13, for an initiator that is not registered."""
    parameters = struct.pack(">QQ8x", 0, 7)
    good(unit, "5f000000000000001800", parameters)
    good(unit, struct.pack(">BBBxxIx", 0x5F, 1, kind, 24), struct.pack(">QQ8x", 7, 0))
    for name, cdb in ALLOWED_ALWAYS.items():
        assert run(unit, cdb, nexus="b")[0] == ScsiStatus.GOOD, name
    for name, cdb in ALLOWED_TO_READERS.items():
        wanted = ScsiStatus.GOOD if kind == 1 else ScsiStatus.RESERVATION_CONFLICT
        assert run(unit, cdb, nexus="b")[0] == wanted, name
    for name, cdb in NEVER_ALLOWED.items():
        assert run(unit, cdb, nexus="b")[0] == ScsiStatus.RESERVATION_CONFLICT, name
    for cdb in ALLOWED_TO_READERS.values():
        good(unit, cdb)


def test_reserve_and_release(unit: DiskUnit) -> None:
    good(unit, "16")
    good(unit, "16")
    assert not unit.plain
    conflict = ScsiStatus.RESERVATION_CONFLICT
    for cdb in ("16", "00", "28000000000000000100", "2a000000000000000100", "5e0000000000000040"):
        assert run(unit, cdb, nexus="b")[0] == conflict, cdb
    for cdb in ("1200000024", "0300000012", "a00000000000000000100000", "25", "17"):
        assert run(unit, cdb, nexus="b")[0] == ScsiStatus.GOOD, cdb
    good(unit, "2a000000000000000100", bytes(512))
    good(unit, "17")
    assert unit.plain
    good(unit, "16", nexus="b")
    assert refused(unit, "1610") == INVALID  # for a third party
    assert refused(unit, "1601") == INVALID  # a part


@pytest.mark.parametrize("how", ["reset", "loss"])
def test_what_ends_a_reserve(unit: DiskUnit, how: str) -> None:
    good(unit, "16")
    if how == "reset":
        unit.reset()
        refused(unit, "00", nexus="b")
    else:
        unit.detach("a")
    good(unit, "16", nexus="b")


def test_reserve_beside_registrations(unit: DiskUnit) -> None:
    """REPORT CAPABILITIES says CRH 0: the two kinds exclude each other (SPC-4 5.13.3)."""
    good(unit, "5f000000000000001800", struct.pack(">QQ8x", 0, 7))
    for cdb in ("16", "17"):
        assert run(unit, cdb)[0] == ScsiStatus.RESERVATION_CONFLICT
        assert run(unit, cdb, nexus="b")[0] == ScsiStatus.RESERVATION_CONFLICT


# Commands


def test_or_write(unit: DiskUnit, disk: MemoryDisk) -> None:
    before, bits = disk.read(1024, 1024), os.urandom(1024)
    cdb = struct.pack(">BBQIxx", 0x8B, 8, 2, 2)
    good(unit, cdb, bits)
    assert disk.read(1024, 1024) == bytes(a | b for a, b in zip(before, bits, strict=True))


def test_write_atomic_and_what_the_limits_say(unit: DiskUnit, disk: MemoryDisk) -> None:
    page = good(unit, "1201b0004000")
    assert len(page) == 64
    most, alignment, granularity, bounded, boundary = struct.unpack(">5I", page[44:64])
    assert (alignment, granularity, bounded, boundary) == (1, 1, 0, 0)
    data = os.urandom(256 * 512)
    good(unit, struct.pack(">BxQxxHxx", 0x9C, 5, 256), data)
    assert disk.read(5 * 512, len(data)) == data
    assert refused(unit, struct.pack(">BxQxxHxx", 0x9C, 0, most + 1), bytes((most + 1) * 512)) == INVALID
    assert refused(unit, struct.pack(">BxQHHxx", 0x9C, 0, 8, 8), bytes(4096)) == INVALID  # a boundary


def test_prefetch(unit: DiskUnit, disk: MemoryDisk) -> None:
    for cdb in (
        struct.pack(">BBIxHx", 0x34, 2, 0, 0xFFFF & disk.sector_count),
        struct.pack(">BBIxHx", 0x34, 0, 7, 0),
        struct.pack(">BBQIxx", 0x90, 0, 0, disk.sector_count),
    ):
        assert good(unit, cdb) == b""
    beyond = (SenseKey.ILLEGAL_REQUEST, AdditionalSense.LBA_OUT_OF_RANGE)
    assert refused(unit, struct.pack(">BBIxHx", 0x34, 0, disk.sector_count - 1, 2)) == beyond
    assert refused(unit, struct.pack(">BBQIxx", 0x90, 0, 2**63, 1)) == beyond


def test_read_defect_data(unit: DiskUnit) -> None:
    assert good(unit, "37001d0000000000ff00") == bytes([0, 0x1D, 0, 0])
    assert good(unit, "b71d000000000000ff000000"[:24], 64) == bytes([0, 0x1D, 0, 0, 0, 0, 0, 0])


@pytest.mark.parametrize("invert", [0, 0x80])
@pytest.mark.parametrize("pattern", [b"\xaa" * 512, b"\1\2\3\4", b"\7"])
def test_sanitize_overwrite(unit: DiskUnit, disk: MemoryDisk, pattern: bytes, invert: int) -> None:
    parameters = bytes([2 | invert, 0]) + struct.pack(">H", len(pattern)) + pattern
    good(unit, struct.pack(">BB5xHx", 0x48, 1, len(parameters)), parameters)
    block = (pattern * 512)[:512]
    if invert:
        block = bytes(byte ^ 0xFF for byte in block)
    assert disk.read(0, MIB) == block * (MIB // 512)


@pytest.mark.parametrize(
    "parameters",
    [
        b"",
        bytes(4),
        b"\1\0\2\1" + bytes(513),
        b"\0\0\2\0" + bytes(512),
        b"\1\0\0\0" + bytes(512),
        b"\1\0\2\4" + bytes(512),
    ],
)
def test_a_wrong_sanitize_changes_nothing(unit: DiskUnit, disk: MemoryDisk, parameters: bytes) -> None:
    before = disk.read(0, MIB)
    assert refused(unit, struct.pack(">BB5xHx", 0x48, 1, len(parameters)), parameters) == INVALID
    assert disk.read(0, MIB) == before
    assert refused(unit, "48020000000000000400", bytes(4)) == INVALID  # BLOCK ERASE has no parameters


@pytest.mark.parametrize("cdb", ["48010000000000000000", "48020000000000000400"])
def test_a_wrong_sanitize_ends_no_command_of_others(cdb: str) -> None:
    class Slow(Disk):
        def __init__(self) -> None:
            self.sector_size = self.physical_sector_size = 512
            self.sector_count, self.read_only = 8, False
            self.answer: object = None

        def read(self, offset: int, length: int) -> bytes:
            return bytes(length)

        def write(self, offset: int, data: Buffer) -> None:
            asking = threading.Thread(target=self.ask)
            asking.start()
            asking.join(10)

        def ask(self) -> None:
            self.answer = refused(unit, cdb, b"", "b")

        def flush(self) -> None:
            pass

        def close(self) -> None:
            pass

    slow = Slow()
    unit = DiskUnit(slow, SERIAL)
    unit.tasks.max_wait = 1.0
    assert run(unit, "2a000000000000000100", bytes(512))[0] == ScsiStatus.GOOD
    assert isinstance(slow.answer, tuple)
    assert slow.answer[0] == SenseKey.ILLEGAL_REQUEST


def test_sanitize_block_erase(unit: DiskUnit, disk: MemoryDisk) -> None:
    good(unit, "48020000000000000000", b"")
    assert disk.read(0, MIB) == bytes(MIB)
    assert [extent.allocated for extent in disk.extents(0, MIB)] == [False]
    good(unit, "481f0000000000000000", b"")
    with MemoryDisk(4096, read_only=True) as fixed:
        protected = (SenseKey.DATA_PROTECT, AdditionalSense.WRITE_PROTECTED)
        assert refused(DiskUnit(fixed, SERIAL), "48020000000000000000", b"") == protected


def test_while_it_sanitizes_a_unit_is_not_ready(disk: MemoryDisk) -> None:
    class Asking(Disk):
        def __init__(self) -> None:
            self.sector_size, self.sector_count = 512, disk.sector_count
            self.physical_sector_size, self.read_only = 512, False
            self.found: list[object] = []

        def read(self, offset: int, length: int) -> bytes:
            return disk.read(offset, length)

        def write(self, offset: int, data: Buffer) -> None:
            if not self.found:
                self.found += [refused(unit, "28000000000000000100", nexus="b"), refused(unit, "00")]
                good(unit, "1200000024")
                assert not unit.plain
            disk.write(offset, data)

        def flush(self) -> None:
            pass

        def close(self) -> None:
            pass

    asking = Asking()
    unit = DiskUnit(asking, SERIAL)
    good(unit, "48010000000000000500", b"\1\0\0\1\x55")
    busy = (SenseKey.NOT_READY, AdditionalSense.NOT_READY_SANITIZE_IN_PROGRESS)
    assert asking.found == [busy, busy]
    assert unit.plain


# A removable disk


def test_a_removable_disk(disk: MemoryDisk) -> None:
    unit = DiskUnit(disk, SERIAL, removable=True)
    for nexus in "ab":
        unit.attach(nexus)
    assert good(unit, "1200000024")[1] == 0x80
    good(unit, "1b0000000200")
    absent = (SenseKey.NOT_READY, AdditionalSense.MEDIUM_NOT_PRESENT)
    for cdb in ("00", "25", "28000000000000000100", "2a000000000000000100", "35"):
        assert refused(unit, cdb, bytes(512)) == absent, cdb
    good(unit, "1200000024")
    assert not unit.plain
    good(unit, "1b0000000300")
    changed = (SenseKey.UNIT_ATTENTION, AdditionalSense.MEDIUM_MAY_HAVE_CHANGED)
    assert refused(unit, "00", nexus="b") == changed
    good(unit, "28000000000000000100", 512)
    good(unit, "1e0000000100", nexus="b")
    locked = (SenseKey.ILLEGAL_REQUEST, AdditionalSense.MEDIUM_REMOVAL_PREVENTED)
    assert refused(unit, "1b0000000200") == locked
    unit.eject()  # the host may
    assert refused(unit, "00") == absent
    unit.insert()
    assert refused(unit, "00") == changed
    unit.detach("b")
    good(unit, "1b0000000200")


def test_a_fixed_disk_stays(unit: DiskUnit) -> None:
    assert good(unit, "1200000024")[1] == 0
    assert refused(unit, "1b0000000200") == INVALID
    with pytest.raises(LocalProtocolError):
        unit.eject()


# A CD-ROM drive


@pytest.fixture
def drive(disk: MemoryDisk) -> CdromUnit:
    return CdromUnit(disk, SERIAL)


def test_features_have_their_commands(drive: CdromUnit) -> None:
    """MMC-6 5.3: what the commands of each feature are; none may be unknown."""
    commands = {
        0x1E: (0xBE, 0xB9, 0x43),
        0x1F: (0x28, 0xA8, 0xAD),
        0x10: (0x28, 0x25),
        0x03: (0x1B, 0x1E, 0xBD),
    }
    known = {opcode for opcode, _ in every_descriptor(drive)}
    data = good(drive, "46000000000000040000"[:20])
    found, rest = set(), data[8:]
    while rest:
        number, _, size = struct.unpack(">HBB", rest[:4])
        found.add(number)
        rest = rest[4 + size :]
    assert set(commands) <= found
    for number, opcodes in commands.items():
        assert set(opcodes) <= known, hex(number)


def test_read_cd(drive: CdromUnit, disk: MemoryDisk) -> None:
    user = disk.read(16 * 2048, 2 * 2048)
    cdb = "be 00 00000010 000002 10 00 00"
    assert good(drive, cdb) == user
    assert good(drive, "b9 00 00 000210 000212 10 00 00", 8192) == user
    assert good(drive, "be 08 00000010 000001 f8 00 00") == raw_sector(16, user[:2048])
    assert good(drive, "be 00 00000010 000001 30 00 00") == bytes.fromhex("00021601") + user[:2048]
    assert good(drive, "be 00 00000010 000002 00 00 00") == b""
    assert refused(drive, "be 04 00000010 000001 10 00 00") == (
        SenseKey.ILLEGAL_REQUEST,
        AdditionalSense.ILLEGAL_MODE_FOR_THIS_TRACK,
    )
    assert refused(drive, "be 00 00000010 000001 12 00 00") == INVALID
    assert refused(drive, "be 00 00000010 000001 10 01 00") == INVALID
    assert refused(drive, "be 00 00000010 000003 10 00 00") == INVALID  # more than there is room for
    assert refused(drive, "be 00 00000200 000001 10 00 00")[1] == AdditionalSense.LBA_OUT_OF_RANGE


def test_a_raw_sector_checks_itself() -> None:
    """Every parity vector of P and Q is a code word: its sum, and its weighted sum, over GF(2^8) are zero."""
    sector = raw_sector(4500, os.urandom(2048))
    assert len(sector) == 2352
    assert sector[:16] == b"\0" + b"\xff" * 10 + b"\0" + bytes.fromhex("01020001")
    body = sector[12:]

    def times_2(value: int) -> int:
        return value << 1 ^ (0x11D if value & 0x80 else 0)

    p = [[2 * column + half + 86 * row for row in range(26)] for column in range(43) for half in (0, 1)]
    for word in p:
        total = weighted = 0
        for at in word:
            total ^= body[at]
            weighted = times_2(weighted) ^ body[at]
        assert total == weighted == 0


def test_read_disc_structure(drive: CdromUnit) -> None:
    incompatible = (SenseKey.ILLEGAL_REQUEST, AdditionalSense.CANNOT_READ_MEDIUM_INCOMPATIBLE_FORMAT)
    assert refused(drive, "ad0000000000000008040000") == incompatible
    listed = good(drive, "ad00000000000 0ff08040000".replace(" ", ""))
    assert [entry[0] for entry in zip(listed[4::4], strict=True)] == [0, 1, 4]

    class Large(Disk):
        sector_size, sector_count, physical_sector_size, read_only = 2048, 2_000_000, 2048, True

        def read(self, offset: int, length: int) -> bytes:
            return bytes(length)

        def write(self, offset: int, data: Buffer) -> None:
            raise NotImplementedError

        def flush(self) -> None:
            pass

        def close(self) -> None:
            pass

    dvd = CdromUnit(Large(), SERIAL)
    data = good(dvd, "ad0000000000000008040000")
    assert struct.unpack(">H", data[:2]) == (2050,)
    first, last = struct.unpack(">II", data[8:16])
    assert (first, last - first + 1) == (0x30000, 2_000_000)
    assert good(dvd, "ad0000000000000108040000") == bytes([0, 6]) + bytes(6)
    assert refused(dvd, "ad0000000000000508040000") == INVALID
    assert refused(dvd, "ad0000000000010008040000") == INVALID
    assert refused(dvd, "be 00 00000010 000001 10 00 00")[1] == AdditionalSense.ILLEGAL_MODE_FOR_THIS_TRACK


# Reading costs nothing


@pytest.mark.parametrize("cdb", ["8f00 0000000000000000 ffffffff 0000", "af00 00000000 7fffffff 0000"])
def test_verifying_a_large_hole_reads_nothing(cdb: str) -> None:
    """One command may name 2 TiB, and whoever carries it out has other things to do."""
    read: list[int] = []

    class Sparse(MemoryDisk):
        def read(self, offset: int, length: int) -> bytes:
            read.append(length)
            return super().read(offset, length)

    with Sparse(1 << 42) as disk:
        disk.write(1 << 30, b"x" * 512)
        unit = DiskUnit(disk, SERIAL)
        good(unit, cdb, b"")
        assert sum(read) == 4096


@pytest.mark.parametrize("batch", [False, True])
def test_reading_holes_allocates_nothing(batch: bool) -> None:
    guest, host = loopback(GuestMemory(8 << 20), 16, 16)
    with MemoryDisk(16 * MIB) as sparse:
        provider = StorageVsp({(0, 0): sparse})
        provider.open(host)
        client = StorageVsc(guest, range(1, 512))
        client.connect()
        device = client.disk()

        def allocated() -> int:
            return os.fstat(sparse.fd).st_blocks * 512

        def everything() -> bytes:
            if batch:
                return b"".join(device.read_batch(range(0, 16 * MIB, 32768), 32768))
            return device.read(0, 16 * MIB)

        assert everything() == bytes(16 * MIB)
        assert allocated() == 0
        device.write(MIB + 512, b"\x33" * 1024)
        sparse.write(3 * MIB, b"\x44" * 512)  # by the host, past the compiled path
        for _ in range(2):
            found = everything()
            assert found[MIB : MIB + 2048] == bytes(512) + b"\x33" * 1024 + bytes(512)
            assert found[3 * MIB : 3 * MIB + 512] == b"\x44" * 512
            assert found.count(b"\0") == 16 * MIB - 1024 - 512
        assert allocated() == 8192
        device.unmap(MIB, 4096)
        everything()
        assert device.read(MIB, 4096) == bytes(4096)
        assert allocated() == 4096
        provider.shutdown()

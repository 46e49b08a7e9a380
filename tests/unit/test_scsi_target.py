"""The SCSI target's answers, byte by byte where the standards fix them."""

import errno
import struct
import threading
from collections.abc import Iterator
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmbus.errors import RemoteProtocolError
from vmbus.storage.disk import Buffer, Disk, DiskError, Extent, MemoryDisk
from vmbus.storage.scsi import BytesBuffer, DiskUnit, LogicalUnit, Sense, Task
from vmbus.storage.scsi.cdb import BLOCK_COMMANDS
from vmbus.storage.scsi.codes import AdditionalSense, Opcode, ScsiStatus, SenseKey

MIB = 1 << 20
SERIAL = UUID("12345678-9abc-4def-8012-3456789abcde")


@pytest.fixture
def disk() -> Iterator[MemoryDisk]:
    with MemoryDisk(MIB, physical_sector_size=4096, content=bytes(range(256)) * 4096) as made:
        yield made


@pytest.fixture
def unit(disk: MemoryDisk) -> DiskUnit:
    made = DiskUnit(disk, SERIAL)
    made.attach("a")
    made.attach("b")
    return made


def run(
    unit: LogicalUnit, cdb: bytes | list[int], data: bytes | int = 4096, nexus: str = "a"
) -> tuple[int, Sense | None, bytes]:
    """Status, sense, and what the command moved to (or left of) the buffer."""
    buffer = BytesBuffer(data)
    outcome = unit.execute(Task(bytes(cdb).ljust(16, b"\0"), buffer, nexus))
    sense = Sense.unpack(outcome.sense) if outcome.sense else None
    return outcome.status, sense, bytes(buffer.content[: outcome.transferred])


def good(unit: LogicalUnit, cdb: bytes | list[int], data: bytes | int = 4096, nexus: str = "a") -> bytes:
    status, sense, moved = run(unit, cdb, data, nexus)
    assert status == ScsiStatus.GOOD, sense
    return moved


def refused(
    unit: LogicalUnit, cdb: bytes | list[int], data: bytes | int = 4096, nexus: str = "a"
) -> tuple[int, int]:
    status, sense, moved = run(unit, cdb, data, nexus)
    assert status == ScsiStatus.CHECK_CONDITION
    assert moved == b""
    assert sense is not None
    return sense.key, sense.additional


INVALID_FIELD = (SenseKey.ILLEGAL_REQUEST, AdditionalSense.INVALID_FIELD_IN_CDB)
INVALID_PARAMETER = (SenseKey.ILLEGAL_REQUEST, AdditionalSense.INVALID_FIELD_IN_PARAMETER_LIST)
LIST_LENGTH = (SenseKey.ILLEGAL_REQUEST, AdditionalSense.PARAMETER_LIST_LENGTH_ERROR)


# Sense data


@given(
    st.integers(0, 15),
    st.integers(0, 0xFFFF),
    st.one_of(st.none(), st.integers(0, 2**64 - 1)),
    st.one_of(st.none(), st.tuples(st.integers(0, 0xFFFF), st.one_of(st.none(), st.integers(0, 7)))),
    st.booleans(),
    st.booleans(),
)
def test_sense_data_survive_the_wire(
    key: int,
    additional: int,
    information: int | None,
    field: tuple[int, int | None] | None,
    in_parameters: bool,
    descriptor: bool,
) -> None:
    sense = Sense(key, additional, information, field, in_parameters and field is not None)
    packed = sense.pack(descriptor=descriptor)
    assert len(packed) == 18 or descriptor
    found = Sense.unpack(packed)
    if not descriptor and information is not None and information >= 2**32:
        assert found.information is None
        found = Sense(found.key, found.additional, information, found.field, found.in_parameters)
    assert found == sense


@given(st.binary(max_size=60))
def test_no_sense_data_break_the_parser(data: bytes) -> None:
    try:
        Sense.unpack(data)
    except RemoteProtocolError:
        assert len(data) < 4 or data[0] & 0x7F not in (0x70, 0x71, 0x72, 0x73)


def test_fixed_sense_byte_by_byte() -> None:
    packed = Sense(SenseKey.ILLEGAL_REQUEST, AdditionalSense.INVALID_FIELD_IN_CDB, None, (2, 5)).pack()
    assert packed.hex() == "70000500000000" + "0a" + "00000000" + "2400" + "00" + "cd0002"


# INQUIRY


def test_standard_inquiry(unit: DiskUnit) -> None:
    data = good(unit, [0x12, 0, 0, 0, 255, 0])
    assert data[:5] == bytes([0, 0, 6, 2, len(data) - 5])
    assert data[8:36] == b"Msft    Virtual Disk    1.0 "
    assert data[7] & 2  # tagged commands
    assert good(unit, [0x12, 0, 0, 0, 5, 0]) == data[:5]  # cut to the allocation length
    assert run(unit, [0x12, 0, 0, 0, 255, 0], 36)[2] == data[:36]  # and to the buffer


def test_vital_product_data(unit: DiskUnit) -> None:
    pages = good(unit, [0x12, 1, 0, 0, 255, 0])
    assert pages == bytes([0, 0, 0, 6, 0x00, 0x80, 0x83, 0xB0, 0xB1, 0xB2])
    for code in pages[4:]:
        page = good(unit, [0x12, 1, code, 0, 255, 0])
        assert page[:2] == bytes([0, code])
        assert int.from_bytes(page[2:4], "big") == len(page) - 4
    assert good(unit, [0x12, 1, 0x80, 0, 255, 0])[4:] == SERIAL.hex.encode()
    identification = good(unit, [0x12, 1, 0x83, 0, 255, 0])[4:]
    designators = {}
    while identification:
        size = 4 + identification[3]
        designators[identification[1] & 0xF] = identification[4:size]
        identification = identification[size:]
    assert designators[1] == b"Msft    " + SERIAL.hex.encode()
    assert designators[3][0] >> 4 == 6
    assert len(designators[3]) == 16
    limits = good(unit, [0x12, 1, 0xB0, 0, 255, 0])
    assert len(limits) == 64
    assert limits[4:8] == bytes([1, 128, 0, 8])  # WSNZ; COMPARE AND WRITE; 8 blocks a physical block
    assert struct.unpack(">IIII", limits[20:36]) == (0xFFFFFFFF, 256, 8, 0x80000000)
    assert good(unit, [0x12, 1, 0xB1, 0, 255, 0])[4:6] == b"\0\1"
    assert good(unit, [0x12, 1, 0xB2, 0, 255, 0])[5:7] == b"\xe4\x02"


@pytest.mark.parametrize("cdb", [[0x12, 1, 0x99], [0x12, 0, 0x80], [0x12, 1, 0xC0]])
def test_inquiry_of_what_is_not_there(unit: DiskUnit, cdb: list[int]) -> None:
    assert refused(unit, [*cdb, 0, 255, 0]) == INVALID_FIELD


def test_a_disk_that_cannot_unmap_does_not_claim_to(disk: MemoryDisk) -> None:
    disk.unmap_granularity = 0
    unit = DiskUnit(disk, SERIAL)
    assert good(unit, [0x12, 1, 0xB2, 0, 255, 0])[5:7] == b"\0\0"
    assert good(unit, [0x9E, 0x10] + [0] * 11 + [32])[14] & 0xC0 == 0
    assert refused(unit, [0x42]) == (SenseKey.ILLEGAL_REQUEST, AdditionalSense.INVALID_OPERATION_CODE)


# Capacity and block status


def test_read_capacity(unit: DiskUnit) -> None:
    assert good(unit, [0x25]) == struct.pack(">II", MIB // 512 - 1, 512)
    long = good(unit, [0x9E, 0x10] + [0] * 11 + [32])
    assert struct.unpack(">QI", long[:12]) == (MIB // 512 - 1, 512)
    assert long[13] & 0xF == 3  # 8 logical blocks a physical one
    assert long[14] & 0xC0 == 0xC0  # thin, and zeros after UNMAP
    assert refused(unit, [0x9E, 0x11] + [0] * 11 + [32]) == INVALID_FIELD


class Huge(MemoryDisk):
    """Claims more than 2 TiB; only its start is there."""

    def __init__(self) -> None:
        super().__init__(MIB)
        self.sector_count = 1 << 33

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        yield Extent(offset, length, False)


def test_a_disk_beyond_32_bits() -> None:
    with Huge() as disk:
        unit = DiskUnit(disk, SERIAL)
        assert good(unit, [0x25])[:4] == b"\xff\xff\xff\xff"
        assert good(unit, [0x9E, 0x10] + [0] * 11 + [32])[:8] == ((1 << 33) - 1).to_bytes(8, "big")
        status = good(unit, [0x9E, 0x12] + [0] * 10 + [1, 0])
        entries = [struct.unpack(">QIB", status[at : at + 13]) for at in range(8, len(status), 16)]
        assert sum(count for _, count, _ in entries) == 1 << 33
        assert {state for _, _, state in entries} == {1}


def test_a_changed_capacity_is_a_unit_attention_for_every_initiator(unit: DiskUnit, disk: MemoryDisk) -> None:
    disk.sector_count -= 8
    changed = (SenseKey.UNIT_ATTENTION, AdditionalSense.CAPACITY_DATA_CHANGED)
    assert refused(unit, [0x28, 0, 0, 0, 0, 0, 0, 0, 1], 512) == changed
    assert not unit.plain  # initiator b does not know yet
    assert good(unit, [0x25])[:4] == struct.pack(">I", MIB // 512 - 9)
    assert good(unit, [0x12, 0, 0, 0, 36], nexus="b")  # INQUIRY is carried out all the same
    assert refused(unit, [0x00], nexus="b") == changed
    assert unit.plain


def test_get_lba_status_shows_holes(unit: DiskUnit, disk: MemoryDisk) -> None:
    disk.unmap(65536, 131072)
    data = good(unit, [0x9E, 0x12] + [0] * 10 + [1, 0])
    assert data[:4] == struct.pack(">I", len(data) - 4)
    assert [struct.unpack(">QIB", data[at : at + 13]) for at in range(8, len(data), 16)] == [
        (0, 128, 0),
        (128, 256, 1),
        (384, 2048 - 384, 0),
    ]
    assert refused(unit, struct.pack(">BBQIxx", 0x9E, 0x12, 2048, 24)) == (
        SenseKey.ILLEGAL_REQUEST,
        AdditionalSense.LBA_OUT_OF_RANGE,
    )


# Mode pages


def mode_page(unit: DiskUnit, code: int, control: int = 0) -> bytes:
    data = good(unit, [0x1A, 8, control << 6 | code, 0, 255])
    assert data[0] == len(data) - 1
    return data[4:]


def test_mode_sense(unit: DiskUnit) -> None:
    every = good(unit, [0x5A, 0, 0x3F, 0, 0, 0, 0, 1, 0])
    assert struct.unpack(">H", every[:2])[0] == len(every) - 2
    assert every[3] == 0x10  # DPO and FUA are known; not write protected
    assert every[6:8] == b"\0\x08"
    assert every[8:16] == struct.pack(">II", MIB // 512, 512)
    codes, rest = [], every[16:]
    while rest:
        codes.append(rest[0])
        rest = rest[2 + rest[1] :]
    assert codes == [0x01, 0x08, 0x0A, 0x1C]
    long = good(unit, [0x5A, 0x10, 0x08, 0, 0, 0, 0, 1, 0])
    assert long[4] == 1
    assert struct.unpack(">Q4xI", long[8:24]) == (MIB // 512, 512)
    assert mode_page(unit, 8)[2] == 0x04
    assert mode_page(unit, 8, 1)[2] == 0x04  # the write cache can be turned off
    assert refused(unit, [0x1A, 0, 0xC8, 0, 255])[1] == AdditionalSense.SAVING_PARAMETERS_NOT_SUPPORTED
    assert refused(unit, [0x1A, 0, 0x05, 0, 255]) == INVALID_FIELD
    assert refused(unit, [0x1A, 0, 0x08, 7, 255]) == INVALID_FIELD


def test_a_read_only_disk_says_so() -> None:
    with MemoryDisk(MIB, read_only=True) as disk:
        unit = DiskUnit(disk, SERIAL)
        assert good(unit, [0x1A, 0, 0x3F, 0, 255])[2] & 0x80
        protected = (SenseKey.DATA_PROTECT, AdditionalSense.WRITE_PROTECTED)
        assert refused(unit, [0x2A, 0, 0, 0, 0, 0, 0, 0, 1], bytes(512)) == protected


def select(page: bytes, *, ten: bool = False, descriptor: bytes = b"") -> tuple[bytes, bytes]:
    if ten:
        data = struct.pack(">HBBBxH", 0, 0, 0, 0, len(descriptor)) + descriptor + page
        return struct.pack(">BB5xHx", 0x55, 0x10, len(data)), data
    data = bytes([0, 0, 0, len(descriptor)]) + descriptor + page
    return bytes([0x15, 0x10, 0, 0, len(data), 0]), data


@pytest.mark.parametrize("ten", [False, True])
def test_the_write_cache_can_be_turned_off(unit: DiskUnit, ten: bool) -> None:
    through: list[int] = []
    flushed: list[bool] = []
    unit.disk.write_through = lambda offset, data: through.append(offset)  # type: ignore[method-assign]
    unit.disk.flush = lambda: flushed.append(True)  # type: ignore[method-assign]
    write = [0x2A, 0, 0, 0, 0, 1, 0, 0, 1]
    good(unit, write, bytes(512))
    assert not through
    page = bytearray(mode_page(unit, 8))
    page[2] = 0
    descriptor = struct.pack(">II", 0, 512)
    good(unit, *select(bytes(page), ten=ten, descriptor=descriptor))
    assert flushed == [True]
    assert not unit.plain
    assert mode_page(unit, 8)[2] == 0
    assert mode_page(unit, 8, 2)[2] == 4  # the default stays
    good(unit, write, bytes(512))
    assert through == [512]
    changed = (SenseKey.UNIT_ATTENTION, AdditionalSense.MODE_PARAMETERS_CHANGED)
    assert refused(unit, [0x00], nexus="b") == changed
    unit.reset()
    assert unit.block.write_cache


def test_mode_select_refuses_what_cannot_be(unit: DiskUnit) -> None:
    before = [mode_page(unit, code) for code in (1, 8, 10)]
    page = bytearray(mode_page(unit, 8))
    page[3] ^= 1
    assert refused(unit, *select(bytes(page))) == INVALID_PARAMETER
    assert refused(unit, *select(b"\x05\x02\0\0")) == INVALID_PARAMETER
    assert refused(unit, *select(mode_page(unit, 8)[:-3])) == LIST_LENGTH
    assert refused(unit, *select(b"\x08\x10" + bytes(16))) == INVALID_PARAMETER
    assert (
        refused(unit, *select(mode_page(unit, 8), descriptor=struct.pack(">II", 0, 4096)))
        == INVALID_PARAMETER
    )
    cdb, data = select(mode_page(unit, 8))
    assert refused(unit, bytes([cdb[0], 0x11, *cdb[2:]]), data) == INVALID_FIELD  # save pages
    assert refused(unit, cdb, data[:-1]) == INVALID_FIELD  # less data than announced
    good_then_bad = bytes(mode_page(unit, 10)[:4] + b"\x08" + mode_page(unit, 10)[5:]) + b"\x05\x00"
    assert refused(unit, *select(good_then_bad)) == INVALID_PARAMETER
    assert [mode_page(unit, code) for code in (1, 8, 10)] == before


def test_software_write_protection_and_descriptor_sense(unit: DiskUnit) -> None:
    page = bytearray(mode_page(unit, 10))
    page[4] |= 0x08
    page[2] |= 0x04
    good(unit, *select(bytes(page)))
    protected = (SenseKey.DATA_PROTECT, AdditionalSense.SOFTWARE_WRITE_PROTECTED)
    assert refused(unit, [0x2A, 0, 0, 0, 0, 0, 0, 0, 1], bytes(512)) == protected
    assert unit.execute(Task(bytes([0x2A] + [0] * 15), BytesBuffer())).sense[0] == 0x72
    good(unit, [0x28, 0, 0, 0, 0, 0, 0, 0, 1], 512)


# Which commands there are


def test_reported_commands_are_exactly_those_that_work(unit: DiskUnit) -> None:
    data = good(unit, [0xA3, 0x0C, 0, 0, 0, 0, 0, 0, 0x20, 0], 8192)
    assert struct.unpack(">I", data[:4])[0] == len(data) - 4
    known = set()
    for at in range(4, len(data), 8):
        opcode, action, flags, size = struct.unpack(">BxHxBH", data[at : at + 8])
        known.add((opcode, action if flags & 1 else None))
        assert size == (6, 10, 10, 0, 16, 12)[opcode >> 5]
    assert known == {(command.opcode, command.service_action) for command in BLOCK_COMMANDS}
    for opcode in range(256):
        status, sense, _ = run(unit, bytes([opcode]) + bytes(15), 0)
        unknown = sense is not None and sense.additional == AdditionalSense.INVALID_OPERATION_CODE
        assert unknown == (opcode not in {each for each, _ in known}), hex(opcode)
        assert status != ScsiStatus.BUSY
        unit.execute(Task(bytes([0x1B, 0, 0, 0, 1]).ljust(16, b"\0"), BytesBuffer()))  # START again


def test_one_reported_command(unit: DiskUnit) -> None:
    read10 = good(unit, [0xA3, 0x0C, 1, 0x28, 0, 0, 0, 0, 1, 0])
    assert read10[:4] == bytes([0, 3, 0, 10])
    assert read10[4] == 0x28
    assert read10[6:10] == b"\xff" * 4
    timed = good(unit, [0xA3, 0x0C, 0x81, 0x28, 0, 0, 0, 0, 1, 0])
    assert len(timed) == len(read10) + 12
    assert good(unit, [0xA3, 0x0C, 1, 0x04, 0, 0, 0, 0, 1, 0])[1] == 1  # FORMAT UNIT: not supported
    assert good(unit, [0xA3, 0x0C, 2, 0x9E, 0, 0x10, 0, 0, 1, 0])[1] == 3
    assert good(unit, [0xA3, 0x0C, 3, 0x9E, 0, 0x11, 0, 0, 1, 0])[1] == 1
    assert refused(unit, [0xA3, 0x0C, 1, 0x9E, 0, 0, 0, 0, 1, 0]) == INVALID_FIELD  # needs its service action
    assert refused(unit, [0xA3, 0x0C, 2, 0x28, 0, 0, 0, 0, 1, 0]) == INVALID_FIELD
    assert refused(unit, [0xA3, 0x0C, 7, 0x28, 0, 0, 0, 0, 1, 0]) == INVALID_FIELD
    assert good(unit, [0xA3, 0x0D, 0, 0, 0, 0, 0, 0, 0, 4]) == b"\x08\0\0\0"


def test_naca_is_refused(unit: DiskUnit) -> None:
    assert refused(unit, [0x00, 0, 0, 0, 0, 0x04]) == INVALID_FIELD
    assert refused(unit, [0x28] + [0] * 8 + [0x04], 512) == INVALID_FIELD


def test_the_default_self_test_passes(unit: DiskUnit) -> None:
    assert good(unit, [0x1D, 0x04, 0, 0, 0, 0]) == b""
    assert refused(unit, [0x1D, 0x20, 0, 0, 0, 0]) == INVALID_FIELD  # the background short self-test
    assert refused(unit, [0x1D, 0x10, 0, 0, 8, 0], 8) == INVALID_FIELD  # a diagnostic page


# Start, stop, sense on request


def test_a_stopped_disk_is_not_ready(unit: DiskUnit) -> None:
    flushed: list[bool] = []
    unit.disk.flush = lambda: flushed.append(True)  # type: ignore[method-assign]
    good(unit, [0x1B, 0, 0, 0, 0])
    assert flushed == [True]
    not_ready = (SenseKey.NOT_READY, AdditionalSense.NOT_READY_INITIALIZING_COMMAND_REQUIRED)
    assert refused(unit, [0x00]) == not_ready
    assert refused(unit, [0x28, 0, 0, 0, 0, 0, 0, 0, 1]) == not_ready
    assert not unit.plain
    good(unit, [0x12, 0, 0, 0, 36])
    good(unit, [0x1B, 0, 0, 0, 1])
    good(unit, [0x00])
    assert unit.plain
    assert refused(unit, [0x1B, 0, 0, 0, 2]) == INVALID_FIELD  # nothing to eject
    good(unit, [0x1E, 0, 0, 0, 1])


def test_request_sense_takes_the_unit_attention(unit: DiskUnit) -> None:
    unit.reset()
    data = good(unit, [0x03, 0, 0, 0, 252])
    assert Sense.unpack(data) == Sense(SenseKey.UNIT_ATTENTION, AdditionalSense.DEVICE_RESET_OCCURRED)
    assert Sense.unpack(good(unit, [0x03, 1, 0, 0, 252])) == Sense(SenseKey.NO_SENSE, AdditionalSense.NONE)
    good(unit, [0x00])
    assert refused(unit, [0x00], nexus="b") == (
        SenseKey.UNIT_ATTENTION,
        AdditionalSense.DEVICE_RESET_OCCURRED,
    )


# Failing backends


class Failing(Disk):
    sector_size = physical_sector_size = 512
    sector_count = 2048
    read_only = False

    def __init__(self, number: int) -> None:
        self.number = number

    def _fail(self) -> DiskError:
        return DiskError("it broke", self.number)

    def read(self, offset: int, length: int) -> bytes:
        raise self._fail()

    def write(self, offset: int, data: Buffer) -> None:
        raise self._fail()

    def flush(self) -> None:
        raise self._fail()

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("number", "writing", "key", "additional"),
    [
        (errno.ENOSPC, True, SenseKey.DATA_PROTECT, AdditionalSense.SPACE_ALLOCATION_FAILED),
        (errno.EDQUOT, True, SenseKey.DATA_PROTECT, AdditionalSense.SPACE_ALLOCATION_FAILED),
        (errno.EROFS, True, SenseKey.DATA_PROTECT, AdditionalSense.WRITE_PROTECTED),
        (errno.EIO, True, SenseKey.MEDIUM_ERROR, AdditionalSense.WRITE_ERROR),
        (errno.EIO, False, SenseKey.MEDIUM_ERROR, AdditionalSense.UNRECOVERED_READ_ERROR),
        (errno.EPIPE, False, SenseKey.HARDWARE_ERROR, AdditionalSense.LOGICAL_UNIT_COMMUNICATION_FAILURE),
    ],
)
def test_the_sense_data_of_a_failing_backend(
    number: int, writing: bool, key: SenseKey, additional: AdditionalSense
) -> None:
    unit = DiskUnit(Failing(number), SERIAL)
    opcode = 0x2A if writing else 0x28
    status, sense, _ = run(unit, [opcode, 0, 0, 0, 0, 7, 0, 0, 1], 512)
    assert status == ScsiStatus.CHECK_CONDITION
    assert sense is not None
    assert (sense.key, sense.additional) == (key, additional)
    if key == SenseKey.MEDIUM_ERROR:
        assert sense.information == 7
    if writing:
        for other in ([0x35], [0x41, 0, 0, 0, 0, 0, 0, 0, 1], [0x8A, 8] + [0] * 11 + [1]):
            assert refused(unit, other, 512) == (key, additional)


def test_a_fault_of_ours_costs_one_command(unit: DiskUnit, caplog: pytest.LogCaptureFixture) -> None:
    unit._handlers[Opcode.TEST_UNIT_READY] = lambda task: 1 // 0
    assert refused(unit, [0x00]) == (SenseKey.HARDWARE_ERROR, AdditionalSense.INTERNAL_TARGET_FAILURE)
    assert "ZeroDivisionError" in caplog.text
    good(unit, [0x25])


# Forced unit access, atomic writes


def test_fua_and_write_and_verify_are_durable(unit: DiskUnit) -> None:
    through: list[int] = []
    write_through = unit.disk.write_through
    unit.disk.write_through = lambda o, d: (through.append(o), write_through(o, d))[1]  # type: ignore[func-returns-value,method-assign]
    for opcode, flag in ((0x2A, 8), (0xAA, 8), (0x8A, 8), (0x2E, 2), (0x8E, 0)):
        cdb = bytearray(16)
        cdb[0], cdb[1] = opcode, flag
        cdb[8 if opcode < 0x80 else 9 if opcode >= 0xA0 else 13] = 1
        through.clear()
        good(unit, cdb, b"\x77" * 512)
        assert through == [0], hex(opcode)


def test_compare_and_write_is_atomic(unit: DiskUnit) -> None:
    """Threads count up one block by compare and swap; no step may be lost."""
    unit.disk.write(0, bytes(512))
    cdb = bytes([0x89] + [0] * 12 + [1, 0, 0])

    def count(times: int) -> None:
        while times:
            now = int.from_bytes(unit.disk.read(0, 512)[:8], "big")
            data = now.to_bytes(8, "big").ljust(512, b"\0") + (now + 1).to_bytes(8, "big").ljust(512, b"\0")
            status, sense, _ = run(unit, cdb, data)
            if status == ScsiStatus.GOOD:
                times -= 1
            else:
                assert sense is not None
                assert sense.key == SenseKey.MISCOMPARE
                assert sense.information is not None
                assert sense.information < 8

    threads = [threading.Thread(target=count, args=(50,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert int.from_bytes(unit.disk.read(0, 8 * 64)[:8], "big") == 200
    assert unit.plain

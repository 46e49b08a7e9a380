"""Block commands of the SCSI target against a slow, obvious disk, command by command."""

import struct
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference.scsi_disk import ScsiDisk

from vmbus.storage.disk import MemoryDisk
from vmbus.storage.scsi import BytesBuffer, CdromUnit, DiskUnit, LogicalUnit, Sense, Task
from vmbus.storage.scsi.codes import ScsiStatus

BLOCKS = 64
SERIAL = UUID(int=7)

lbas = st.one_of(
    st.integers(0, BLOCKS + 2),
    st.sampled_from([2**21 - 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1, 2**64 - 8]),
)
counts = st.one_of(
    st.integers(0, 6),
    st.sampled_from([BLOCKS, 127, 128, 129, 255, 256, 0xFFFF, 0x10000, 0x20001, 2**32 - 1]),
)
flags = st.one_of(st.just(0), st.integers(0, 255))


def build(opcode: int, lba: int, count: int, flag: int) -> bytes:
    group = opcode >> 5
    if group == 0:
        cdb = bytes([opcode, lba >> 16 & 0x1F, lba >> 8 & 0xFF, lba & 0xFF, count & 0xFF])
    elif opcode == 0x89:
        cdb = struct.pack(">BBQxxxB", opcode, flag, lba % 2**64, count & 0xFF)
    elif opcode == 0x9C:
        cdb = struct.pack(">BBQxBH", opcode, flag, lba % 2**64, flag & 1, count & 0xFFFF)
    elif group == 4:
        cdb = struct.pack(">BBQI", opcode, flag, lba % 2**64, count % 2**32)
    elif group == 5:
        cdb = struct.pack(">BBII", opcode, flag, lba % 2**32, count % 2**32)
    else:
        cdb = struct.pack(">BBIxH", opcode, flag, lba % 2**32, count & 0xFFFF)
    return cdb.ljust(16, b"\0")


simple = st.builds(
    build,
    st.sampled_from(bytes.fromhex("08 0a 28 2a a8 aa 88 8a 2f af 8f 89 41 93 35 91 25 34 90 8b 9c")),
    lbas,
    counts,
    flags,
)


@st.composite
def unmaps(draw: st.DrawFn) -> tuple[bytes, bytes]:
    ranges = draw(st.lists(st.tuples(lbas, counts), max_size=4))
    body = b"".join(struct.pack(">QI4x", lba % 2**64, count % 2**32) for lba, count in ranges)
    said = draw(st.one_of(st.just(len(body)), st.integers(0, 0xFFFF)))
    length = draw(st.one_of(st.just(8 + len(body)), st.integers(0, 100), st.just(0xFFFF)))
    data = struct.pack(">HH4x", (len(body) + 6) & 0xFFFF, said) + body
    cdb = struct.pack(">BB5xHx", 0x42, draw(st.integers(0, 1)), length).ljust(16, b"\0")
    return cdb, data


@st.composite
def steps(draw: st.DrawFn, block: int = 512) -> tuple[bytes, bytes]:
    if draw(st.integers(0, 5)) == 0:
        return draw(unmaps())
    cdb = draw(simple)
    size = draw(st.sampled_from([0, 100, block, 2 * block, 4 * block, 12 * block, 300 * block]))
    if cdb[0] in (0x41, 0x89, 0x93) and draw(st.integers(0, 3)):
        # They take no other length than the right one.
        size = 2 * cdb[13] * block if cdb[0] == 0x89 else block
    fill = draw(st.sampled_from([b"\0", b"\x5a", b"\1\2\3\4\5\6\7"]))
    return cdb, (fill * (size // len(fill) + 1))[:size]


@pytest.mark.parametrize("read_only", [False, True])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.data_too_large])
@given(st.lists(steps(), min_size=1, max_size=25))
def test_every_command_does_what_the_slow_disk_does(
    read_only: bool, commands: list[tuple[bytes, bytes]]
) -> None:
    content = bytes(range(256)) * (BLOCKS * 2)
    slow = ScsiDisk(content, 512, read_only=read_only)
    with MemoryDisk(len(content), content=content, read_only=read_only) as disk:
        unit = DiskUnit(disk, SERIAL)
        for cdb, given_data in commands:
            data = given_data
            if cdb[0] in (0x2F, 0xAF, 0x8F, 0x89) and given_data[:1] == b"\x5a":
                # Half of the comparisons should be of what is there.
                lba = slow.place(cdb)[0] if cdb[1] < 0x20 else 0
                data = bytes(slow.content[lba * 512 : lba * 512 + len(data) // 2]).ljust(len(data), b"\x33")
            expected = slow.execute(cdb, data)
            buffer = BytesBuffer(data)
            outcome = unit.execute(Task(cdb, buffer))
            if expected.key is None:
                assert (outcome.status, outcome.sense) == (ScsiStatus.GOOD, b""), cdb.hex()
                assert outcome.transferred == expected.transferred
                if expected.data:
                    assert bytes(buffer.content[: len(expected.data)]) == expected.data
                else:
                    assert bytes(buffer.content) == data
            else:
                assert outcome.status == ScsiStatus.CHECK_CONDITION, cdb.hex()
                sense = Sense.unpack(outcome.sense)
                assert (sense.key, sense.additional) == (expected.key, expected.code), cdb.hex()
                assert outcome.transferred == 0
            assert disk.read(0, len(content)) == slow.content


@given(st.binary(min_size=16, max_size=16), st.binary(max_size=600))
@settings(max_examples=500, deadline=None)
def test_no_command_at_all_breaks_the_target(cdb: bytes, data: bytes) -> None:
    with MemoryDisk(BLOCKS * 512) as disk:
        for unit in (DiskUnit(disk, SERIAL), DiskUnit(disk, SERIAL, removable=True), CdromUnit(disk, SERIAL)):
            one_command(unit, cdb, data)


def one_command(unit: LogicalUnit, cdb: bytes, data: bytes) -> None:
    buffer = BytesBuffer(data)
    outcome = unit.execute(Task(cdb, buffer))
    assert len(buffer.content) == len(data)
    assert outcome.transferred <= len(data)
    if outcome.status == ScsiStatus.CHECK_CONDITION:
        sense = Sense.unpack(outcome.sense)
        assert sense.additional != 0x4400, "an internal failure"

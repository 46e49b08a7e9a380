"""The CD-ROM drive: what guests ask of it before and while they read a disc."""

import os
import struct
from collections.abc import Iterator
from uuid import UUID

import pytest

from vmbus.storage.disk import MemoryDisk
from vmbus.storage.scsi import BytesBuffer, CdromUnit, Sense, Task
from vmbus.storage.scsi.codes import AdditionalSense, ScsiStatus, SenseKey

BLOCKS = 1000
ISO = os.urandom(BLOCKS * 2048)


@pytest.fixture
def drive() -> Iterator[CdromUnit]:
    with MemoryDisk(len(ISO), sector_size=2048, content=ISO, read_only=True) as disc:
        made = CdromUnit(disc, UUID(int=3))
        made.attach("a")
        yield made


def run(drive: CdromUnit, cdb: list[int], room: int = 4096) -> tuple[int, Sense | None, bytes]:
    buffer = BytesBuffer(room)
    outcome = drive.execute(Task(bytes(cdb).ljust(16, b"\0"), buffer, "a"))
    sense = Sense.unpack(outcome.sense) if outcome.sense else None
    return outcome.status, sense, bytes(buffer.content[: outcome.transferred])


def good(drive: CdromUnit, cdb: list[int], room: int = 4096) -> bytes:
    status, sense, data = run(drive, cdb, room)
    assert status == ScsiStatus.GOOD, sense
    return data


def refused(drive: CdromUnit, cdb: list[int]) -> tuple[int, int]:
    status, sense, _ = run(drive, cdb)
    assert status == ScsiStatus.CHECK_CONDITION
    assert sense is not None
    return sense.key, sense.additional


def test_it_says_what_it_is(drive: CdromUnit) -> None:
    data = good(drive, [0x12, 0, 0, 0, 96])
    assert data[:2] == bytes([0x05, 0x80])
    assert data[16:32] == b"Virtual DVD-ROM "
    assert good(drive, [0x25]) == struct.pack(">II", BLOCKS - 1, 2048)
    capabilities = good(drive, [0x5A, 0, 0x2A, 0, 0, 0, 0, 0, 128])
    page = capabilities[8:]
    assert (page[0], page[1]) == (0x2A, len(page) - 2)
    assert page[2] == 0x0B  # reads CD-R, CD-RW, DVD-ROM
    assert page[3:6] == bytes(3)  # writes nothing, plays nothing
    assert page[6] == 0x29  # a tray that locks and ejects
    assert good(drive, [0x46, 0, 0, 0, 0, 0, 0, 4, 0])[6:8] == b"\0\x08"


def test_reads(drive: CdromUnit) -> None:
    assert good(drive, [0x28, 0, 0, 0, 0, 16, 0, 0, 3], 3 * 2048) == ISO[16 * 2048 : 19 * 2048]
    assert good(drive, [0xA8, 0, 0, 0, 3, 0xE7, 0, 0, 0, 1], 2048) == ISO[-2048:]
    out_of_range = (SenseKey.ILLEGAL_REQUEST, AdditionalSense.LBA_OUT_OF_RANGE)
    assert refused(drive, [0x28, 0, 0, 0, 3, 0xE7, 0, 0, 2]) == out_of_range
    assert refused(drive, [0x28, 0, 0, 0, 0, 0, 0, 0, 9])[1] == AdditionalSense.INVALID_FIELD_IN_CDB
    assert refused(drive, [0x2A, 0, 0, 0, 0, 0, 0, 0, 1])[1] == AdditionalSense.INVALID_OPERATION_CODE


def test_an_image_of_512_byte_sectors_reads_the_same() -> None:
    with MemoryDisk(len(ISO), content=ISO) as disc:
        drive = CdromUnit(disc, UUID(int=3))
        assert good(drive, [0x28, 0, 0, 0, 0, 5, 0, 0, 1]) == ISO[5 * 2048 : 6 * 2048]


def test_table_of_contents(drive: CdromUnit) -> None:
    toc = good(drive, [0x43, 0, 0, 0, 0, 0, 0, 0, 64])
    assert toc == bytes([0, 18, 1, 1, 0, 0x14, 1, 0, 0, 0, 0, 0, 0, 0x14, 0xAA, 0]) + struct.pack(
        ">I", BLOCKS
    )
    in_time = good(drive, [0x43, 2, 0, 0, 0, 0, 0xAA, 0, 64])
    frames = BLOCKS + 150
    assert in_time[-4:] == bytes([0, frames // 4500, frames // 75 % 60, frames % 75])
    session = good(drive, [0x43, 0, 1, 0, 0, 0, 0, 0, 64])
    assert session == bytes([0, 10, 1, 1, 0, 0x14, 1, 0, 0, 0, 0, 0])
    assert good(drive, [0x43, 0, 0, 0, 0, 0, 0, 0, 64, 0x40]) == session  # the format in the old place
    assert refused(drive, [0x43, 0, 0, 0, 0, 0, 5, 0, 64])[0] == SenseKey.ILLEGAL_REQUEST
    assert refused(drive, [0x43, 0, 5, 0, 0, 0, 0, 0, 64])[0] == SenseKey.ILLEGAL_REQUEST


def test_configuration(drive: CdromUnit) -> None:
    data = good(drive, [0x46, 0, 0, 0, 0, 0, 0, 4, 0])
    assert int.from_bytes(data[:4], "big") == len(data) - 4
    features, rest = [], data[8:]
    while rest:
        number, _, size = struct.unpack(">HBB", rest[:4])
        features.append(number)
        rest = rest[4 + size :]
    assert features == sorted(features)
    assert {0, 1, 2, 3, 0x10, 0x1E, 0x1F} == set(features)
    one = good(drive, [0x46, 2, 0, 0x10, 0, 0, 0, 4, 0])
    assert len(one) == 8 + 4 + 8
    current = good(drive, [0x46, 1, 0, 0, 0, 0, 0, 4, 0])
    assert len(current) < len(data)


def test_discs_come_and_go(drive: CdromUnit) -> None:
    event = [0x4A, 1, 0, 0, 0x10, 0, 0, 0, 8]
    assert good(drive, event)[4:6] == bytes([0, 2])
    disc = drive.eject()
    assert disc is not None
    assert good(drive, event)[4:6] == bytes([3, 1])
    absent = (SenseKey.NOT_READY, AdditionalSense.MEDIUM_NOT_PRESENT_TRAY_OPEN)
    assert refused(drive, [0x00]) == absent
    assert refused(drive, [0x25]) == absent
    good(drive, [0x1B, 0, 0, 0, 3])  # close the tray
    assert refused(drive, [0x00]) == (SenseKey.NOT_READY, AdditionalSense.MEDIUM_NOT_PRESENT_TRAY_CLOSED)
    good(drive, event)
    assert drive.insert(disc) is None
    assert refused(drive, [0x00]) == (SenseKey.UNIT_ATTENTION, AdditionalSense.MEDIUM_MAY_HAVE_CHANGED)
    good(drive, [0x00])
    assert good(drive, event)[4:6] == bytes([2, 2])


def test_a_locked_tray_stays_shut_until_its_guest_is_gone(drive: CdromUnit) -> None:
    good(drive, [0x1E, 0, 0, 0, 1])
    assert refused(drive, [0x1B, 0, 0, 0, 2]) == (
        SenseKey.ILLEGAL_REQUEST,
        AdditionalSense.MEDIUM_REMOVAL_PREVENTED,
    )
    drive.detach("a")
    good(drive, [0x1B, 0, 0, 0, 2])
    assert drive.tray_open
    assert good(drive, [0xBD, 0, 0, 0, 0, 0, 0, 0, 0, 8])[1] == 0x10


def test_disc_and_track_information(drive: CdromUnit) -> None:
    assert good(drive, [0x51, 0, 0, 0, 0, 0, 0, 0, 64])[:3] == bytes([0, 32, 0x0E])
    track = good(drive, [0x52, 1, 0, 0, 0, 1, 0, 0, 64])
    assert struct.unpack(">I", track[24:28]) == (BLOCKS,)
    assert refused(drive, [0x52, 1, 0, 0, 0, 2, 0, 0, 64])[0] == SenseKey.ILLEGAL_REQUEST

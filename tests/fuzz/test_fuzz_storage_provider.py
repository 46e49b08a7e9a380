"""Fuzz targets: a guest that sends anything at all to the storage provider, on one thread and on several."""

import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from reference.disk_model import fast_folder
from reference.fuzz import Fuzz
from reference.mutation import mutate
from reference.storage_attacker import (
    CONTENT,
    GPA_DIRECT,
    IN_BAND,
    MIB,
    TRANSFER,
    Attacker,
    Room,
    control,
    gpa_header,
    read10,
    srb,
    write10,
)

from vmbus.storage.disk import Disk, MemoryDisk, RawDisk
from vmbus.storage.images import create_vhdx, open_disk

tmp_path = pytest.fixture(fast_folder, name="tmp_path")

LONG_COMMANDS = (0x88, 0x8A, 0x89, 0x8E, 0x8F, 0x91, 0x93, 0x9E)
SHORT_COMMANDS = (
    0x00,
    0x03,
    0x12,
    0x15,
    0x1A,
    0x1B,
    0x1E,
    0x25,
    0x41,
    0x42,
    0x55,
    0x5A,
    0x5E,
    0x5F,
    0xA0,
    0xA3,
    0xA8,
)


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[list[Disk]]:
    """What a guest may find: mapped memory, a file, an image, and disks that it must not be able to change."""
    raw = RawDisk.create(tmp_path / "raw", MIB)
    raw.write(0, CONTENT)
    (tmp_path / "fixed").write_bytes((tmp_path / "raw").read_bytes())
    image = tmp_path / "image.vhdx"
    with create_vhdx(image, 4 * MIB, block_size=MIB) as disk:
        disk.write(0, CONTENT)
    made: list[Disk] = [
        MemoryDisk(MIB, content=CONTENT),
        raw,
        open_disk(image),
        MemoryDisk(MIB, content=CONTENT, read_only=True),
        RawDisk(tmp_path / "fixed", read_only=True, sector_size=4096),
    ]
    yield made
    for disk in made:
        disk.close()


def some_command(rng: random.Random) -> tuple[bytes, int]:
    blocks = rng.choice([0, 1, 8, 64, 2000])
    lba = rng.choice([0, 1, 2047, 2048, 1 << 31, rng.randrange(2048)])
    cdb = rng.choice(
        [
            read10(lba, blocks),
            write10(lba, blocks),
            struct.pack(">BBQIxx", rng.choice(LONG_COMMANDS), rng.choice([0, 0, 8, 18, 255]), lba, blocks),
            bytes([rng.choice(SHORT_COMMANDS)]) + rng.randbytes(15),
            rng.randbytes(16),
        ]
    )
    return cdb[:16], rng.choice([0, 512, 4096, blocks * 512, 1 << 20])


def some_header(rng: random.Random, length: int) -> bytes:
    """Ranges; most are well formed, because the others close the channel, and name pages that there are not."""
    if rng.random() < 0.03:
        pages = [rng.choice([3, 1 << 40]) for _ in range(rng.randrange(1, 5))]
        offset, count = rng.choice([0, 4095, 4096]), rng.choice([length, 0, 0xFFFFFFFF])
        header = gpa_header([(count, offset, pages)], count=rng.choice([1, 0, 2, 0xFFFFFFFF]))
        return mutate(rng, header)[: len(header) // 8 * 8]
    ranges = []
    left = max(1, rng.choice([length, length, length, 512, length + 4096]))
    while left and len(ranges) < 8:
        offset = rng.choice([0, 0, 0, 512, 4095])
        size = min(left, rng.choice([left, left, left, 512, 4096, 5000]))
        count = -(-(offset + size) // 4096)
        pages = [rng.choice([3, 4, 5, 700]) for _ in range(count)]
        if rng.random() < 0.05:
            pages[rng.randrange(count)] = rng.choice([1023, 1024, 1 << 40, (1 << 64) - 1])
        ranges.append((size, offset, pages))
        left -= size
    return gpa_header(ranges)


def some_packet(rng: random.Random) -> tuple[int, bytes, bytes]:
    """Type, payload and header of a packet that is a little wrong, or very."""
    cdb, length = some_command(rng)
    header = some_header(rng, length)
    kind = rng.choice([GPA_DIRECT] * 16 + [IN_BAND] * 3 + [rng.choice([TRANSFER, rng.getrandbits(16)])])
    lun = rng.choice([0, 0, 0, 0, 1, 255])
    payload = srb(cdb, length, lun=lun, direction=rng.randrange(3), size=rng.choice([52, 52, 52, 36]))
    if rng.random() < 0.2:
        payload = control(rng.randrange(16), rng.randbytes(8))
    return kind, mutate(rng, payload), header


def a_guest_that_may_send_anything(rng: random.Random, disk: Disk, workers: int) -> None:
    before = disk.read(0, MIB) if disk.read_only else b""
    room = Room(disk, workers=workers, max_sub_channels=2)
    attacker = room.attacker
    if rng.random() < 0.1:  # the negotiation, too
        room.provider.close(attacker.host)
        attacker = Attacker()
        room.provider.open(attacker.host)
    for _ in range(rng.randrange(1, 200)):
        kind, payload, header = some_packet(rng)
        attacker.next_id += 1
        padded = header + bytes(-len(header) % 8)
        if not attacker.ring.write(kind, rng.choice([0, 1, 1, 1]), attacker.next_id, padded, payload):
            break
        attacker.ring.publish()
        attacker.knock()
        if not attacker.guest.is_open:
            break
        if rng.random() < 0.9:
            attacker.collect()
        if rng.random() < 0.02:
            if (0, 1) in room.provider.units:
                room.provider.remove_disk((0, 1))
            else:
                room.provider.add_disk((0, 1), disk)
    if attacker.guest.is_open:  # and in the end the ring itself
        word = rng.choice([0, 8, 4096, 65528, 0xFFFFFFF8, rng.getrandbits(32)])
        attacker.ring.set_word(rng.choice([0, 4, 8, 12]), word)
        attacker.knock()
        attacker.knock()
    room.close()
    assert disk.size in (MIB, 4 * MIB)
    if disk.read_only:
        assert disk.read(0, MIB) == before


@pytest.mark.parametrize("workers", [0, 2])
def test_storage_provider(fuzz: Fuzz, disks: list[Disk], workers: int) -> None:
    fuzz.run(lambda rng: a_guest_that_may_send_anything(rng, rng.choice(disks), workers), cases=7000)

"""Images built field by field, any of which may be twisted, with every checksum right: what a careful attacker writes.

A checker of random damage mostly finds a wrong checksum, and nothing behind it.
"""

import random
import struct
from dataclasses import dataclass
from uuid import UUID

from vmbus.core.crc32c import crc32c
from vmbus.storage.images import vhdx_wire as x

__all__ = ["Twist", "build_vhd", "build_vhdx"]

MIB = 1 << 20
KIB64 = 64 << 10
PAGE = 4096
BLOCK = MIB
LOG_GUID = UUID(int=0x1234)


@dataclass
class Twist:
    """Replaces numbers now and then.

    Attributes:
        rng: chooses.
        rate: how often, 0 to 1.
        size: bytes of the file, which hostile numbers like to be near.
    """

    rng: random.Random
    rate: float
    size: int

    def __call__(self, value: int, bits: int) -> int:
        """A field of that width."""
        rng = self.rng
        if rng.random() < self.rate:
            value = rng.choice(
                [
                    *(
                        0,
                        1,
                        value + 1,
                        value - 1,
                        value * 2,
                        value + MIB,
                        value - MIB,
                        value ^ 1 << rng.randrange(bits),
                    ),
                    *(
                        (1 << bits) - 1,
                        (1 << bits) - MIB,
                        1 << bits - 1,
                        self.size,
                        self.size - MIB,
                        self.size - 512,
                    ),
                    rng.randrange(self.size) // MIB * MIB,
                    rng.getrandbits(bits),
                ]
            )
        return value & (1 << bits) - 1


def sealed(raw: bytes) -> bytes:
    """With the checksum of a VHDX structure."""
    return raw[:4] + struct.pack("<I", crc32c(raw[:4] + bytes(4) + raw[8:])) + raw[8:]


def log_entry(
    twist: Twist, sequence: int, tail: int, changes: list[tuple[int, int]], file_size: int
) -> bytes:
    """An entry of (offset, length) stretches of zeros, or of pages where the length is 0."""
    rng, descriptors, sectors = twist.rng, bytearray(), bytearray()
    for at, length in changes:
        number = twist(sequence, 64)
        if length:
            descriptors += struct.pack("<4sIQQQ", b"zero", 0, twist(length, 64), twist(at, 64), number)
        else:
            descriptors += struct.pack("<4s4s8sQQ", b"desc", b"tail", b"headhead", twist(at, 64), number)
            sectors += struct.pack("<4sI4084sI", b"data", number >> 32, b"", number & 0xFFFFFFFF)
    head = -(-(64 + len(descriptors)) // PAGE) * PAGE
    length = head + len(sectors)
    raw = struct.pack(
        "<4sIIIQII16sQQ",
        *(b"loge", 0, twist(length, 32), twist(tail, 32), twist(sequence, 64), twist(len(changes), 32), 0),
        *(LOG_GUID.bytes_le, twist(file_size, 64), twist(file_size + rng.choice([0, MIB, 8 << 30]), 64)),
    )
    return (raw + descriptors).ljust(head, b"\0") + sectors


def build_log(twist: Twist, length: int, bat: int, size: int) -> bytes:
    """A log in one of the ways in which it can be made to cost time."""
    rng, log = twist.rng, bytearray(length)
    style, at, sequence, tail = rng.randrange(4), 0, rng.randrange(1, 1000), 0
    longest = rng.choice([1, 10, 300, 300 if style == 3 else (length - PAGE) // 32 - 1])
    while at < length:
        changes = []
        for _ in range(rng.randrange(longest) if longest <= 300 else longest):
            zeros = rng.choice([PAGE, MIB, 8 << 30] if longest > 300 else [0, 0, PAGE, MIB, 8 << 30])
            changes.append((rng.choice([bat, bat + PAGE, size - MIB, size, 3 * KIB64]) // PAGE * PAGE, zeros))
        raw = log_entry(twist, sequence, rng.choice([tail, tail, at]), changes, size)[: length - at]
        log[at : at + len(raw)] = raw
        if rng.random() < 0.1 and style == 2:
            tail = at
        # Entries that lie inside of others, or one after the other.
        at += PAGE if style == 3 else len(raw)
        sequence += 1
        if rng.random() < 0.02:
            break
    # The checksums come last: an entry may hold parts of others. Going backwards, those inside are right first.
    for start in range(length - PAGE, -1, -PAGE):
        if log[start : start + 4] == b"loge" and rng.random() < 0.98:
            (claimed,) = struct.unpack_from("<I", log, start + 8)
            part = bytes(log[start : start + claimed]) + bytes(log[: max(0, start + claimed - length)])
            if 64 <= claimed <= length:
                log[start + 4 : start + 8] = sealed(part)[4:8]
    return bytes(log)


def build_vhdx(rng: random.Random, parent: str = "", linkage: UUID = x.NO_GUID) -> bytes:
    """A VHDX of some MiB: header, region table, log, metadata, block table, a few blocks."""
    blocks, log_length = rng.randrange(1, 12), rng.choice([1, 1, 1, 2]) * MIB
    order = ["log", "metadata", "bat", *["block"] * rng.randrange(blocks + 1)]
    rng.shuffle(order)
    place = {name: (1 + i) * MIB + (log_length - MIB) * ("log" in order[:i]) for i, name in enumerate(order)}
    size = MIB * len(order) + log_length
    free = [
        (1 + i) * MIB + (log_length - MIB) * ("log" in order[:i]) for i, n in enumerate(order) if n == "block"
    ]
    twist = Twist(rng, rng.choice([0, 0.003, 0.02, 0.1]), size)
    raw = bytearray(size)
    raw[:8] = x.FILE_SIGNATURE
    logged = rng.random() < 0.7
    for slot, offset in enumerate(x.HEADER_OFFSETS):
        header = struct.pack(
            "<4sIQ16s16s16sHHIQ",
            *(b"head", 0, twist(7 + slot, 64), UUID(int=1).bytes_le, UUID(int=2).bytes_le),
            *((LOG_GUID if logged else x.NO_GUID).bytes_le, twist(0, 16), twist(1, 16)),
            *(twist(log_length, 32), twist(place["log"], 64)),
        )
        raw[offset : offset + PAGE] = sealed(header.ljust(PAGE, b"\0"))
    table = struct.pack("<4sIII", b"regi", 0, twist(2, 32), 0)
    for guid, name in ((x.BAT_REGION, "bat"), (x.METADATA_REGION, "metadata")):
        table += struct.pack("<16sQII", guid.bytes_le, twist(place[name], 64), twist(MIB, 32), twist(1, 32))
    for offset in x.REGION_TABLE_OFFSETS:
        raw[offset : offset + KIB64] = sealed(table.ljust(KIB64, b"\0"))
    disk = blocks * BLOCK - rng.choice([0, 0, 512, 4096])
    items = [
        (
            x.FILE_PARAMETERS,
            struct.pack("<II", twist(BLOCK, 32), twist(2 if parent else rng.randrange(2), 32)),
        ),
        (x.VIRTUAL_DISK_SIZE, struct.pack("<Q", twist(disk // 4096 * 4096, 64))),
        (x.PAGE83, UUID(int=3).bytes_le),
        (x.LOGICAL_SECTOR_SIZE, struct.pack("<I", twist(rng.choice([512, 4096]), 32))),
        (x.PHYSICAL_SECTOR_SIZE, struct.pack("<I", twist(4096, 32))),
    ]
    if parent:
        items.append((x.PARENT_LOCATOR, parent_locator(twist, parent, linkage)))
    rng.shuffle(items)
    metadata = struct.pack("<8sHH20s", b"metadata", 0, twist(len(items), 16), b"")
    content = b""
    for item, value in items:
        metadata += struct.pack(
            "<16sIIII", item.bytes_le, twist(KIB64 + len(content), 32), twist(len(value), 32), twist(4, 32), 0
        )
        content += value
    at = place["metadata"]
    raw[at : at + KIB64 + len(content)] = metadata.ljust(KIB64, b"\0") + content
    ratio, entries = (1 << 23) * 512 // BLOCK, []
    for block in range(blocks):
        state = rng.choice([0, 1, 2, 3, 5, 6, 6, 6])
        entries.append(twist(free.pop() | 6 if state == 6 and free else state % 6, 64))
        if block % ratio == ratio - 1:
            entries.append(twist(0, 64))
    struct.pack_into(f"<{len(entries)}Q", raw, place["bat"], *entries)
    if logged:
        raw[place["log"] : place["log"] + log_length] = build_log(twist, log_length, place["bat"], size)
    return bytes(raw)


def parent_locator(twist: Twist, parent: str, linkage: UUID) -> bytes:
    """The item that names a parent."""
    pairs = {"parent_linkage": f"{{{linkage}}}", "relative_path": parent}
    at, head, text = 20 + 12 * len(pairs), x.PARENT_LOCATOR_VHDX.bytes_le, b""
    head += struct.pack("<HH", 0, twist(len(pairs), 16))
    for key, value in pairs.items():
        one, two = key.encode("utf-16-le"), value.encode("utf-16-le")
        places = twist(at + len(text), 32), twist(at + len(text) + len(one), 32)
        head += struct.pack("<IIHH", *places, twist(len(one), 16), twist(len(two), 16))
        text += one + two
    return head + text


def build_vhd(rng: random.Random, parent: str = "", identity: UUID = x.NO_GUID) -> bytes:
    """A dynamic or differencing VHD of some blocks."""
    block, blocks = 4096 * rng.choice([1, 8, 128]), rng.randrange(1, 40)
    bitmap = -(-block // 512 // 8 // 512) * 512
    there = [number for number in range(blocks) if rng.random() < 0.5]
    locator_at = 1536 + -(-4 * blocks // 512) * 512
    data_at = locator_at + 1024
    size = data_at + len(there) * (bitmap + block) + 512
    twist = Twist(rng, rng.choice([0, 0.003, 0.02, 0.1]), size)
    name = parent.encode("utf-16-le")

    def summed(raw: bytes, at: int) -> bytes:
        return raw[:at] + struct.pack(">I", ~sum(raw[:at] + raw[at + 4 :]) & 0xFFFFFFFF) + raw[at + 4 :]

    def footer() -> bytes:
        kind = 4 if parent else 3
        raw = struct.pack(
            ">8sIIQI4sI4sQQ", b"conectix", 2, twist(0x10000, 32), twist(512, 64), 0, b"vm", 1, b"", 0, 0
        )
        raw = raw[:40] + struct.pack(
            ">QQIII", twist(blocks * block, 64), twist(blocks * block, 64), 0, twist(kind, 32), 0
        )
        return summed((raw + UUID(int=5).bytes).ljust(512, b"\0"), 64)

    header = struct.pack(
        ">8sQQIII", b"cxsparse", twist((1 << 64) - 1, 64), twist(1536, 64), twist(0x10000, 32), 0, 0
    )
    header = header[:28] + struct.pack(">III", twist(blocks, 32), twist(block, 32), 0)
    header += identity.bytes + bytes(8) + parent.encode("utf-16-be")[:512].ljust(512, b"\0")
    if parent:
        for code in (b"W2ru", rng.choice([b"W2ku", b"MacX", bytes(4)])):
            header += code + struct.pack(
                ">IIIQ", twist(512, 32), twist(len(name), 32), 0, twist(locator_at, 64)
            )
    entries = [0xFFFFFFFF] * blocks
    raw = bytearray(size)
    for index, number in enumerate(there):
        at = data_at + index * (bitmap + block)
        entries[number] = twist(at // 512, 32)
        raw[at : at + bitmap] = rng.choice([b"\xff" * bitmap, rng.randbytes(bitmap)])
    raw[:512] = footer()
    raw[512:1536] = summed(header.ljust(1024, b"\0"), 36)
    struct.pack_into(f">{blocks}I", raw, 1536, *entries)
    raw[locator_at : locator_at + len(name)] = name
    raw[-512:] = footer() if rng.random() < 0.3 else raw[:512]
    return bytes(raw)

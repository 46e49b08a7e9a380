"""A SCSI disk, slow and obvious: one bytearray, one `if` for each rule of SBC-3 that the tests rely on.

It knows nothing of the package. A command gives (key, code, transferred, data for the initiator); key and code
are None when the command succeeds.
"""

from dataclasses import dataclass

ILLEGAL, PROTECT, MISCOMPARE = 0x5, 0x7, 0xE
BAD_OPCODE, BAD_LBA, BAD_FIELD, BAD_LIST, BAD_LIST_LENGTH = 0x2000, 0x2100, 0x2400, 0x2600, 0x1A00
WRITE_PROTECTED, DIFFERENT = 0x2700, 0x1D00


@dataclass
class Answer:
    key: int | None
    code: int | None
    transferred: int
    data: bytes


class Refused(Exception):
    def __init__(self, key: int, code: int) -> None:
        super().__init__(key, code)
        self.key, self.code = key, code


class ScsiDisk:
    def __init__(self, content: bytes, block: int, *, read_only: bool = False) -> None:
        self.content = bytearray(content)
        self.block = block
        self.blocks = len(content) // block
        self.read_only = read_only

    def execute(self, cdb: bytes, buffer: bytes) -> Answer:
        """`buffer` is what the initiator gives: data for the disk, or room for data from it."""
        before = bytes(self.content)
        try:
            moved, data = self.command(cdb, buffer)
        except Refused as refused:
            if refused.key != MISCOMPARE:
                assert self.content == before
            return Answer(refused.key, refused.code, 0, b"")
        return Answer(None, None, moved, data)

    def command(self, cdb: bytes, buffer: bytes) -> tuple[int, bytes]:
        op = cdb[0]
        if op in (0x08, 0x28, 0xA8, 0x88):
            lba, count = self.place(cdb)
            self.inside(lba, count)
            self.room(count * self.block, buffer)
            data = bytes(self.content[lba * self.block : (lba + count) * self.block])
            return len(data), data
        if op in (0x0A, 0x2A, 0xAA, 0x8A):
            lba, count = self.place(cdb)
            self.writable()
            self.inside(lba, count)
            self.room(count * self.block, buffer)
            self.put(lba, buffer[: count * self.block])
            return count * self.block, b""
        if op in (0x2F, 0xAF, 0x8F):
            return self.verify(cdb, buffer), b""
        if op == 0x89:
            return self.compare_and_write(cdb, buffer), b""
        if op in (0x41, 0x93):
            return self.write_same(cdb, buffer), b""
        if op == 0x42:
            return self.unmap(cdb, buffer), b""
        if op == 0x8B:  # sets bits
            lba, count = self.place(cdb)
            self.writable()
            self.inside(lba, count)
            self.room(count * self.block, buffer)
            there = self.content[lba * self.block : (lba + count) * self.block]
            self.put(lba, bytes(a | b for a, b in zip(there, buffer, strict=False)))
            return count * self.block, b""
        if op == 0x9C:  # atomic
            if cdb[10] or cdb[11]:
                raise Refused(ILLEGAL, BAD_FIELD)
            lba, count = self.place(cdb)
            if count > 2048:
                raise Refused(ILLEGAL, BAD_FIELD)
            self.writable()
            self.inside(lba, count)
            self.room(count * self.block, buffer)
            self.put(lba, buffer[: count * self.block])
            return count * self.block, b""
        if op in (0x35, 0x91, 0x34, 0x90):
            lba, count = self.place(cdb)
            self.inside(lba, count)
            return 0, b""
        if op == 0x25:
            data = (self.blocks - 1).to_bytes(4, "big") + self.block.to_bytes(4, "big")
            return min(8, len(buffer)), data[: len(buffer)]
        raise Refused(ILLEGAL, BAD_OPCODE)

    def place(self, cdb: bytes) -> tuple[int, int]:
        op = cdb[0]
        if op < 0x20:
            lba = int.from_bytes(cdb[1:4], "big") % (1 << 21)
            return lba, cdb[4] if cdb[4] != 0 else 256
        if cdb[1] >= 0x20:  # protection fields
            raise Refused(ILLEGAL, BAD_FIELD)
        if op < 0x60:
            return int.from_bytes(cdb[2:6], "big"), int.from_bytes(cdb[7:9], "big")
        if op >= 0xA0:
            return int.from_bytes(cdb[2:6], "big"), int.from_bytes(cdb[6:10], "big")
        if op == 0x89:
            return int.from_bytes(cdb[2:10], "big"), cdb[13]
        if op == 0x9C:
            return int.from_bytes(cdb[2:10], "big"), int.from_bytes(cdb[12:14], "big")
        return int.from_bytes(cdb[2:10], "big"), int.from_bytes(cdb[10:14], "big")

    def inside(self, lba: int, count: int) -> None:
        if lba >= self.blocks or lba + count > self.blocks:
            raise Refused(ILLEGAL, BAD_LBA)

    def writable(self) -> None:
        if self.read_only:
            raise Refused(PROTECT, WRITE_PROTECTED)

    def room(self, length: int, buffer: bytes) -> None:
        if len(buffer) < length:
            raise Refused(ILLEGAL, BAD_FIELD)

    def just(self, length: int, buffer: bytes) -> None:
        if len(buffer) != length:
            raise Refused(ILLEGAL, BAD_FIELD)

    def put(self, lba: int, data: bytes) -> None:
        self.content[lba * self.block : lba * self.block + len(data)] = data

    def verify(self, cdb: bytes, buffer: bytes) -> int:
        lba, count = self.place(cdb)
        self.inside(lba, count)
        check = (cdb[1] // 2) % 4
        found = self.content[lba * self.block : (lba + count) * self.block]
        if check == 0:
            return 0
        if check == 2:
            raise Refused(ILLEGAL, BAD_FIELD)
        if check == 1:
            self.room(len(found), buffer)
            if found != buffer[: len(found)]:
                raise Refused(MISCOMPARE, DIFFERENT)
            return len(found)
        size = self.block if count else 0
        self.room(size, buffer)
        for at in range(0, len(found), self.block):
            if found[at : at + self.block] != buffer[: self.block]:
                raise Refused(MISCOMPARE, DIFFERENT)
        return size

    def compare_and_write(self, cdb: bytes, buffer: bytes) -> int:
        lba, count = self.place(cdb)
        if count > 128:
            raise Refused(ILLEGAL, BAD_FIELD)
        self.writable()
        self.inside(lba, count)
        size = count * self.block
        self.just(2 * size, buffer)
        if self.content[lba * self.block : lba * self.block + size] != buffer[:size]:
            raise Refused(MISCOMPARE, DIFFERENT)
        self.put(lba, buffer[size : 2 * size])
        return 2 * size

    def write_same(self, cdb: bytes, buffer: bytes) -> int:
        lba, count = self.place(cdb)
        if cdb[1] & 0x16:  # ANCHOR, and two obsolete bits
            raise Refused(ILLEGAL, BAD_FIELD)
        if count == 0 or count > 0x20000:
            raise Refused(ILLEGAL, BAD_FIELD)
        self.writable()
        self.inside(lba, count)
        if cdb[0] == 0x93 and cdb[1] & 1:
            self.put(lba, bytes(count * self.block))
            return 0
        self.just(self.block, buffer)
        self.put(lba, buffer[: self.block] * count)
        return self.block

    def unmap(self, cdb: bytes, buffer: bytes) -> int:
        if cdb[1] & 1:
            raise Refused(ILLEGAL, BAD_FIELD)
        length = int.from_bytes(cdb[7:9], "big")
        if length == 0:
            return 0
        self.room(length, buffer)
        if length < 8:
            raise Refused(ILLEGAL, BAD_LIST_LENGTH)
        self.writable()
        listed = min(int.from_bytes(buffer[2:4], "big"), length - 8) // 16
        if listed > 256:
            raise Refused(ILLEGAL, BAD_LIST)
        ranges = []
        for index in range(listed):
            descriptor = buffer[8 + 16 * index : 24 + 16 * index]
            lba, count = int.from_bytes(descriptor[:8], "big"), int.from_bytes(descriptor[8:12], "big")
            if count:
                self.inside(lba, count)
                ranges.append((lba, count))
        for lba, count in ranges:
            self.put(lba, bytes(count * self.block))
        return length

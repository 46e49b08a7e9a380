"""A slow, obvious VMBus ring over a plain bytearray: no mirror, no cache, one byte at a time.

Written from the wire format alone, to check the compiled ring against.
"""

import struct
from dataclasses import dataclass, field


@dataclass
class ReferenceRing:
    """Both ends of one ring in `memory`: a control page, then the data area."""

    memory: bytearray
    published: int = 0  # the writer's index when it last published
    released: int = 0
    writer_index: int = 0
    reader_index: int = 0
    log: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        return len(self.memory) - 4096

    def word(self, offset: int) -> int:
        return struct.unpack_from("<I", self.memory, offset)[0]

    def set_word(self, offset: int, value: int) -> None:
        struct.pack_into("<I", self.memory, offset, value)

    def put(self, index: int, data: bytes) -> None:
        for i, byte in enumerate(data):
            self.memory[4096 + (index + i) % self.size] = byte

    def get(self, index: int, count: int) -> bytes:
        return bytes(self.memory[4096 + (index + i) % self.size] for i in range(count))

    def free(self) -> int:
        return self.size - 8 - (self.writer_index - self.word(4)) % self.size

    def write(self, kind: int, flags: int, transaction_id: int, header: bytes, payload: bytes) -> bool:
        body = header + payload + bytes(-len(payload) % 8)
        packet = struct.pack(
            "<HHHHQ", kind, (16 + len(header)) // 8, (16 + len(body)) // 8, flags, transaction_id
        )
        packet += body + struct.pack("<II", 0, self.writer_index)
        if len(packet) > self.free():
            return False
        self.put(self.writer_index, packet)
        self.writer_index = (self.writer_index + len(packet)) % self.size
        return True

    def publish(self) -> bool:
        before, self.published = self.published, self.writer_index
        self.set_word(0, self.writer_index)
        return before != self.writer_index and self.word(8) == 0 and self.word(4) == before

    def read(self) -> tuple[int, int, int, bytes, bytes] | None:
        """(type, flags, transaction id, rest of the header, payload), or None."""
        if self.reader_index == self.word(0):
            return None
        kind, offset8, length8, flags, tid = struct.unpack("<HHHHQ", self.get(self.reader_index, 16))
        packet = self.get(self.reader_index, length8 * 8 + 8)
        assert struct.unpack("<II", packet[-8:]) == (0, self.reader_index)
        self.reader_index = (self.reader_index + len(packet)) % self.size
        return kind, flags, tid, packet[16 : offset8 * 8], packet[offset8 * 8 : -8]

    def release(self) -> bool:
        def free(index: int) -> int:
            return self.size - 8 - (self.word(0) - index) % self.size

        before, self.released = self.released, self.reader_index
        self.set_word(4, self.reader_index)
        pending = self.word(12) // 8 * 8
        return pending != 0 and free(before) < pending <= free(self.reader_index)

"""A guest or a host of a storage channel that writes whatever it likes, byte by byte.

Packets are laid out here by hand, from the wire format alone, with the slow reference ring.
"""

import random
import struct
import time
from collections.abc import Sequence
from contextlib import suppress

from reference.ring import ReferenceRing

from vmbus.bus.channel import loopback
from vmbus.core.memory import GuestMemory
from vmbus.errors import LocalProtocolError
from vmbus.storage.disk import Disk, MemoryDisk
from vmbus.storage.vsp import StorageVsp

IN_BAND, TRANSFER, GPA_DIRECT, COMPLETION = 6, 7, 9, 11
PAGE = 4096
MIB = 1 << 20
CONTENT = random.Random(1).randbytes(MIB)
"""What the disks of a `Room` hold."""


def srb(
    cdb: bytes,
    length: int = 0,
    *,
    target: int = 0,
    lun: int = 0,
    path: int = 0,
    direction: int = 1,
    size: int = 52,
) -> bytes:
    """An EXECUTE_SRB packet: 12 bytes of header, then the request."""
    body = struct.pack("<HBBBBBBBBBBI", size, 0, 0, 0, path, target, lun, len(cdb), 20, direction, 0, length)
    body += cdb.ljust(20, b"\0") + struct.pack("<HBBIII", 0, 0, 0, 0x40 if direction else 0x80, 60, 0)
    return struct.pack("<III", 3, 1, 0) + body[:size]


def control(operation: int, body: bytes = b"", size: int = 64) -> bytes:
    return (struct.pack("<III", operation, 1, 0) + body).ljust(size, b"\0")


def read10(lba: int, blocks: int) -> bytes:
    return struct.pack(">BBIBHB", 0x28, 0, lba, 0, blocks, 0)


def write10(lba: int, blocks: int) -> bytes:
    return struct.pack(">BBIBHB", 0x2A, 0, lba, 0, blocks, 0)


def gpa_header(ranges: Sequence[tuple[int, int, Sequence[int]]], *, count: int | None = None) -> bytes:
    """What follows the descriptor of a GPA-direct packet."""
    header = struct.pack("<II", 0, len(ranges) if count is None else count)
    for byte_count, byte_offset, pfns in ranges:
        header += struct.pack(f"<II{len(pfns)}Q", byte_count, byte_offset, *pfns)
    return header


class Attacker:
    """The guest's end of a storage channel. `host` is the provider's end."""

    def __init__(self, memory_size: int = 4 << 20, pages: int = 16) -> None:
        self.memory = GuestMemory(memory_size)
        self.guest, self.host = loopback(self.memory, pages, pages)
        view = self.guest.outgoing.window.view()
        self.ring = ReferenceRing(view)  # type: ignore[arg-type]
        self.next_id = 0x1000
        self.answers: dict[int, bytes] = {}
        self.notices: list[bytes] = []
        self.guest.on_signal = lambda: None

    def send(
        self, kind: int, payload: bytes, header: bytes = b"", *, flags: int = 1, tid: int | None = None
    ) -> int:
        if tid is None:
            self.next_id += 1
            tid = self.next_id
        if not self.ring.write(kind, flags, tid, header, payload):
            raise AssertionError("the attacker's ring is full")
        self.ring.publish()
        self.knock()
        return tid

    def knock(self) -> None:
        """Ring the host, needed or not."""
        with suppress(
            LocalProtocolError
        ):  # a worker thread of the provider may close the channel at any moment
            self.guest.signal()

    def collect(self) -> None:
        while self.guest.is_open and (packets := self.guest.incoming.recv_packets(64)):
            for packet in packets:
                if packet.type == COMPLETION:
                    assert packet.transaction_id not in self.answers, "completed twice"
                    self.answers[packet.transaction_id] = packet.payload
                else:
                    assert packet.transaction_id == 0
                    self.notices.append(packet.payload)
            if self.guest.incoming.take_signal():
                self.knock()

    def ask(self, kind: int, payload: bytes, header: bytes = b"") -> bytes:
        tid = self.send(kind, payload, header)
        deadline = time.monotonic() + 5
        self.collect()
        while tid not in self.answers:  # a provider with worker threads takes a moment
            assert time.monotonic() < deadline, "no answer"
            time.sleep(0.0005)
            self.collect()
        return self.answers[tid]

    def negotiate(self, version: int = 0x0602) -> None:
        for operation, body in ((7, b""), (9, struct.pack("<HH", version, 0)), (10, b""), (8, b"")):
            answer = self.ask(IN_BAND, control(operation, body))
            assert struct.unpack_from("<III", answer) == (1, 0, 0)

    def execute(
        self, cdb: bytes, length: int, ranges: Sequence[tuple[int, int, Sequence[int]]], **request: int
    ) -> bytes:
        """One SCSI request; the completion's payload."""
        packet = srb(cdb, length, **request)
        return self.ask(GPA_DIRECT, packet, gpa_header(ranges)) if ranges else self.ask(IN_BAND, packet)

    def works(self) -> bool:
        """Whether a plain read still succeeds."""
        answer = self.execute(read10(0, 1), 512, [(512, 0, [3])])
        return answer[12 + 2] & 0x3F == 1 and answer[12 + 3] == 0


def status_of(answer: bytes) -> tuple[int, int, int]:
    """(status of the packet, SRB status without flags, SCSI status) of a completion."""
    return struct.unpack_from("<I", answer, 8)[0], answer[14] & 0x3F, answer[15]


class Room:
    """One provider per guest, over one shared disk and one of its own; `victim` is a second, honest guest."""

    def __init__(self, disk: Disk, **options: int) -> None:
        self.disk = disk
        self.attacker = Attacker()
        self.provider = StorageVsp({(0, 0): disk}, **options)  # type: ignore[arg-type]
        self.provider.open(self.attacker.host)
        self.attacker.negotiate()
        self.victim = Attacker()
        self.other = StorageVsp({(0, 0): MemoryDisk(MIB, content=CONTENT)})
        self.other.open(self.victim.host)
        self.victim.negotiate()

    def close(self) -> None:
        assert self.victim.works(), "another guest was harmed"
        self.provider.shutdown()
        self.other.shutdown()

"""A host of a storage channel that answers what it is told to."""

import struct
from collections.abc import Callable

from reference.storage_attacker import COMPLETION

from vmbus.bus.channel import loopback
from vmbus.core.memory import GuestMemory
from vmbus.core.ring import Packet
from vmbus.errors import RingFull
from vmbus.storage.vsc import StorageVsc

MIB = 1 << 20


def completion(
    status: int = 0,
    srb_status: int = 1,
    scsi_status: int = 0,
    moved: int = 0,
    payload: bytes = b"",
    sense: int = 0,
) -> bytes:
    body = struct.pack("<III", 1, 0, status)
    body += struct.pack("<HBBBBBBBBBBI", 52, srb_status, scsi_status, 0, 0, 0, 0, 16, sense, 1, 0, moved)
    return (body + payload.ljust(20, b"\0")).ljust(64, b"\0")


class Host:
    """Answers the negotiation and READ CAPACITY honestly; everything else is up to `answer`."""

    def __init__(self) -> None:
        self.memory = GuestMemory(4 * MIB)
        self.guest, self.host = loopback(self.memory, 16, 16)
        self.answer: Callable[[Packet], list[tuple[int, bytes]]] = self.honest
        self.taken: list[Packet] = []
        self.host.on_signal = self.serve
        self.client = StorageVsc(self.guest, range(64, 320), timeout=0.3)

    def serve(self) -> None:
        while self.host.is_open and (packets := self.host.incoming.recv_packets(64)):
            for packet in packets:
                self.taken.append(packet)
                for tid, payload in self.answer(packet):
                    self.send(tid, payload)

    def send(self, tid: int, payload: bytes, kind: int = COMPLETION) -> None:
        try:
            if self.host.outgoing.send(payload, tid, kind):
                self.host.signal()
        except RingFull:
            pass

    def honest(self, packet: Packet) -> list[tuple[int, bytes]]:
        operation = struct.unpack_from("<I", packet.payload)[0]
        tid = packet.transaction_id
        if operation == 10:
            properties = struct.pack("<IHHIIQ", 0, 0, 0, 0, 1 << 18, 0)
            return [(tid, (struct.pack("<III", 1, 0, 0) + properties).ljust(64, b"\0"))]
        if operation != 3:
            return [(tid, struct.pack("<III", 1, 0, 0).ljust(64, b"\0"))]
        cdb = packet.payload[28:44]
        wanted = struct.unpack_from("<I", packet.payload, 24)[0]
        if cdb[0] == 0x9E and packet.ranges is not None:
            packet.ranges.write(self.memory, struct.pack(">QI20x", 2 * MIB // 512 - 1, 512))
            return [(tid, completion(moved=32))]
        if cdb[0] == 0x88 and packet.ranges is not None:
            lba = int.from_bytes(cdb[2:10], "big")
            packet.ranges.write(self.memory, bytes([lba % 251]) * wanted)
        return [(tid, completion(moved=wanted))]

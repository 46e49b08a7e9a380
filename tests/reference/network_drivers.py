"""Drivers of other systems against our provider: what they send byte for byte, and what they insist on.

Nothing here uses the structures of `vmbus.network`, so that a wrong structure is not its own oracle. Each `Driver`
speaks raw NVSP and RNDIS; `Rules` says what its system does with packets from the host.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from reference.netpair import Guest, make_guest

from vmbus.bus.channel import Channel
from vmbus.core.memory import GpaRanges, GuestMemory
from vmbus.core.ring import COMPLETION, COMPLETION_REQUESTED, IN_BAND, TRANSFER_PAGES
from vmbus.network.switch import Switch

PAGE = 4096
RECEIVE_PAGE, SEND_PAGE, CONTROL_PAGE, DATA_PAGE = 16, 600, 1000, 1100
ACK = struct.pack("<2I", 108, 1)

INITIALIZE, HALT, QUERY, SET, KEEPALIVE, INDICATE = 2, 3, 4, 5, 8, 7
DONE = 0x80000000


@dataclass
class Rules:
    """How a system's driver differs.

    Attributes:
        name: for messages.
        request_size: bytes of its NVSP requests.
        receive_id: transfer-page set id of its receive buffer.
        receive_pages: size of that.
        send_pages: size of the send buffer; 0 for none.
        indexed_by_id: keeps what it receives in an array of as many packets as the host granted sections.
        control_in_sections: sends control messages through the send buffer.
        asks_for_completions: of messages without an answer.
    """

    name: str
    request_size: int = 32
    receive_id: int = 0xCAFE
    receive_pages: int = 256
    send_pages: int = 240
    indexed_by_id: bool = False
    control_in_sections: bool = False
    asks_for_completions: bool = False


FREEBSD = Rules("FreeBSD")
DPDK = Rules("DPDK", request_size=40, indexed_by_id=True)
OPENBSD = Rules("OpenBSD", send_pages=0, asks_for_completions=True)
UEFI = Rules(
    "UEFI",
    receive_id=0x1981,
    receive_pages=48,
    send_pages=48,
    control_in_sections=True,
    asks_for_completions=True,
)
OPENVMM = Rules("OpenVMM's tests", receive_id=0, receive_pages=8, send_pages=1, asks_for_completions=True)


@dataclass
class Message:
    """An RNDIS message from the host, with the packet that it came in."""

    data: bytes
    channel: int
    transaction_id: int

    @property
    def kind(self) -> int:
        return int.from_bytes(self.data[:4], "little")

    def words(self, count: int, at: int = 8) -> tuple[int, ...]:
        return struct.unpack_from(f"<{count}I", self.data, at)


@dataclass
class Attached:
    """A guest's end of a channel of a real bus."""

    memory: GuestMemory
    guest_end: Channel


@dataclass
class Driver:
    """A driver on a guest's end of a channel that has no client."""

    guest: "Guest | Attached"
    rules: Rules
    sections: int = 0
    section_size: int = 0
    send_section: int = 0
    messages: list[Message] = field(default_factory=list)
    notes: list[tuple[bytes, int, int]] = field(default_factory=list)
    answers: dict[int, bytes] = field(default_factory=dict)
    gpadls: list[int] = field(default_factory=list)
    acknowledge: bool = True
    first_page: int = 0
    rid: int = 0x10000
    tid: int = 1 << 40

    def __post_init__(self) -> None:
        self.channel = self.guest.guest_end
        self.channel.on_signal = None

    # ---- the channel

    def poll(self) -> None:
        while packets := self.channel.incoming.recv_packets(64):
            for packet in packets:
                if packet.type == COMPLETION:
                    self.answers[packet.transaction_id] = packet.payload
                elif packet.type == TRANSFER_PAGES:
                    self._received(packet.payload, packet.transaction_id, packet)
                else:
                    assert packet.type == IN_BAND
                    self.notes.append((packet.payload, packet.flags, packet.transaction_id))
            if self.channel.incoming.take_signal():
                self.channel.signal()

    def _received(self, payload: bytes, transaction_id: int, packet: object) -> None:
        kind, channel, section, size = struct.unpack_from("<4I", payload)
        assert (kind, section, size) == (107, 0xFFFFFFFF, 0)
        assert packet.transfer_set_id == self.rules.receive_id  # type: ignore[attr-defined]
        if self.rules.indexed_by_id and transaction_id > self.sections:
            return  # DPDK logs it and completes nothing
        base = (self.first_page + RECEIVE_PAGE) * PAGE
        for length, offset in packet.transfer_ranges:  # type: ignore[attr-defined]
            assert length > 0
            assert offset + length <= self.rules.receive_pages * PAGE
            data = self.guest.memory.read(base + offset, length)
            assert int.from_bytes(data[4:8], "little") <= length
            self.messages.append(Message(data, channel, transaction_id))
        if self.acknowledge:
            self.complete(transaction_id)

    def complete(self, transaction_id: int, payload: bytes = ACK) -> None:
        if self.channel.outgoing.send(payload, transaction_id, COMPLETION, 0):
            self.channel.signal()

    def nvsp(self, kind: int, *words: int, wanted: bool = True) -> bytes | None:
        """Send an NVSP request; its completion."""
        payload = struct.pack(f"<{1 + len(words)}I", kind, *words).ljust(self.rules.request_size, b"\0")
        self.tid += 1
        flags = COMPLETION_REQUESTED if wanted else 0
        if self.channel.outgoing.send(payload, self.tid, IN_BAND, flags):
            self.channel.signal()
        self.poll()
        return self.answers.pop(self.tid, None)

    # ---- RNDIS

    def transfer(self, parts: Sequence[bytes], *, channel: int = 0, pages: int = DATA_PAGE) -> int:
        """An RNDIS message in guest pages, each part in a page of its own; the NVSP status."""
        ranges = []
        pages += self.first_page
        for number, part in enumerate(parts):
            self.guest.memory.write((pages + number) * PAGE, part)
            ranges.append((len(part), 0, [pages + number + n for n in range(-(-len(part) // PAGE))]))
        self.tid += 1
        payload = struct.pack("<4I", 107, channel, 0xFFFFFFFF, 0).ljust(self.rules.request_size, b"\0")
        if self.channel.outgoing.send_gpa_direct(payload, GpaRanges(ranges), self.tid):
            self.channel.signal()
        self.poll()
        return self._status()

    def in_section(self, section: int, data: bytes, *, channel: int = 0) -> int:
        """An RNDIS message in a section of the send buffer; the NVSP status."""
        self.guest.memory.write((self.first_page + SEND_PAGE) * PAGE + section * self.send_section, data)
        answer = self.nvsp(107, channel, section, len(data))
        assert answer is not None
        self.answers[self.tid] = answer
        return self._status()

    def _status(self) -> int:
        answer = self.answers.pop(self.tid)
        assert answer[:4] == b"\x6c\0\0\0"
        return int.from_bytes(answer[4:8], "little")

    def control(self, kind: int, *words: int, data: bytes = b"", answered: bool = True) -> Message | None:
        """Send a control message with a new request id; the answer, which must come."""
        self.rid += 0x10000
        content = struct.pack(f"<{1 + len(words)}I", self.rid, *words) + data
        message = struct.pack("<2I", kind, 8 + len(content)) + content
        seen = len(self.messages)
        if self.rules.control_in_sections:
            status = self.in_section(0, message, channel=1)
        else:
            status = self.transfer([message], channel=1, pages=CONTROL_PAGE)
        assert status == 1, f"{self.rules.name}: RNDIS message {kind} completed with {status}"
        if not answered:
            return None
        for reply in self.messages[seen:]:
            if reply.kind == kind | DONE and reply.words(1)[0] == self.rid:
                assert reply.channel == 1
                return reply
        raise AssertionError(f"{self.rules.name}: no answer to RNDIS message {kind}")

    def query(self, oid: int, data: bytes = b"") -> bytes:
        reply = self.control(QUERY, oid, len(data), 20, 0, data=data)
        assert reply is not None
        _, status, length, offset = reply.words(4)
        assert status == 0, f"{self.rules.name}: OID {oid:#x}: status {status:#x}"
        assert offset == 16, "OpenBSD takes what stands right behind the structure"
        assert 8 + offset + length == int.from_bytes(reply.data[4:8], "little")
        return reply.data[24 : 24 + length]

    def set(self, oid: int, data: bytes) -> int:
        reply = self.control(SET, oid, len(data), 20, 0, data=data)
        assert reply is not None
        return reply.words(2)[1]

    # ---- the steps that all have

    def negotiate(self, versions: Sequence[int]) -> int:
        for version in versions:
            answer = self.nvsp(1, version, version)
            assert answer is not None
            assert answer[:4] == b"\2\0\0\0"
            assert len(answer) >= 16
            if answer[12:16] == b"\1\0\0\0":
                return version
        raise AssertionError(f"{self.rules.name}: no version")

    def configure(self, frame: int, capabilities: int, ndis: tuple[int, int]) -> None:
        wanted = self.rules.asks_for_completions
        for message in ((125, frame, 0, capabilities, 0), (100, *ndis)):
            answer = self.nvsp(*message, wanted=wanted)
            assert (answer is not None) == wanted, f"{self.rules.name}: completion of {message[0]}"

    def hand_over(self) -> None:
        rules = self.rules
        gpadl = self._gpadl(RECEIVE_PAGE, rules.receive_pages)
        answer = self.nvsp(101, gpadl, rules.receive_id)
        assert answer is not None
        kind, status, number, offset, size, count, end = struct.unpack_from("<7I", answer)
        assert (kind, status, number, offset, end) == (102, 1, 1, 0, size * count)
        assert size * count <= rules.receive_pages * PAGE
        self.sections, self.section_size = count, size
        if rules.send_pages:
            gpadl = self._gpadl(SEND_PAGE, rules.send_pages)
            answer = self.nvsp(104, gpadl, 0xFACE)
            assert answer is not None
            kind, status, section = struct.unpack_from("<3I", answer)
            assert (kind, status) == (105, 1), f"{rules.name}: send buffer refused with {status}"
            assert section > 0
            assert section % 4 == 0
            self.send_section = section

    def _gpadl(self, start: int, count: int) -> int:
        first = self.first_page + start
        self.gpadls.append(self.channel.create_gpadl(range(first, first + count)))
        return self.gpadls[-1]

    def initialize(self, transfer_size: int = 2048) -> tuple[int, ...]:
        reply = self.control(INITIALIZE, 1, 0, transfer_size)
        assert reply is not None
        words = reply.words(9)
        assert words[1:4] == (0, 1, 0)
        return words

    def revoke(self) -> None:
        assert self.nvsp(103, self.rules.receive_id, wanted=False) is None
        if self.rules.send_pages:
            assert self.nvsp(106, 0xFACE, wanted=False) is None


def packet(data: bytes, *info: tuple[int, int], pad: int = 0, offset: int | None = None) -> bytes:
    """An RNDIS packet message; `info` holds (type, value) of per-packet information."""
    items = b"".join(struct.pack("<4I", 16, kind, 12, value) for kind, value in info)
    start = 36 + len(items) if offset is None else offset
    size = 44 + len(items) + len(data)
    total = size + (-size % pad if pad else 0)
    head = struct.pack("<11I", 1, total, start, len(data), 0, 0, 0, 36 if items else 0, len(items), 0, 0)
    return (head + items + data).ljust(total, b"\0")


def make_driver(rules: Rules, switch: Switch | None = None, number: int = 1, **config: object) -> Driver:
    return Driver(make_guest(switch or Switch(), number, **config), rules)  # type: ignore[arg-type]

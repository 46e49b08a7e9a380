"""Hostile hosts against the network client: an error or a skipped packet, never a crash, a hang or a wrong frame."""

import struct
import time
from collections.abc import Callable
from contextlib import suppress

import pytest
from reference.netpair import frame, mac, make_guest
from reference.network_attacker import (
    GOOD,
    fragment,
    put,
    seized_host,
)

from vmbus.core.ring import COMPLETION, Packet, RingReader
from vmbus.errors import DeviceError, RemoteProtocolError, RingFull
from vmbus.network import rndis
from vmbus.network.rndis import Frame, NdisStatus, PacketIdFlags, RndisType
from vmbus.network.switch import Switch


@pytest.mark.parametrize(
    ("ranges", "set_id"),
    [
        ([(100, 0xFFFFFFFF)], 0xCAFE),
        ([(0xFFFFFFFF, 0)], 0xCAFE),
        ([(1809, 0)], 0xCAFE),
        ([(100, 652 * 1808)], 0xCAFE),
        ([(0, 0)], 0xCAFE),
        ([(7, 0)], 0xCAFE),
        ([(100, 0)], 0),
        ([(100, 0)], 0xBEEF),
        ([(100, 0)] * 563, 0xCAFE),
        ([], 0xCAFE),
    ],
)
def test_wrong_transfer_pages(ranges: list[tuple[int, int]], set_id: int) -> None:
    host, guest = seized_host()
    put(guest, 0, bytes(2000))
    host.receive_ranges(ranges, set_id=set_id)
    assert guest.nic.receive() == []
    host.drain()
    assert host.next_id in host.answers  # completed all the same: the host gets its sections back
    put(guest, 0, GOOD)
    host.receive_ranges([(len(GOOD), 0)])
    assert guest.nic.receive() == [frame(mac(2), mac(1))]
    assert guest.nic.protocol.violations == (1 if ranges else 0)


@pytest.mark.parametrize(
    "flags",
    [
        [PacketIdFlags.SUB_ALLOCATION],
        [PacketIdFlags.SUB_ALLOCATION | PacketIdFlags.LAST],
        [PacketIdFlags.SUB_ALLOCATION | PacketIdFlags.FIRST],
        [PacketIdFlags.SUB_ALLOCATION | PacketIdFlags.FIRST, 0],
        [PacketIdFlags.SUB_ALLOCATION | PacketIdFlags.FIRST, PacketIdFlags.SUB_ALLOCATION],
    ],
)
def test_fragments_without_beginning_or_end(flags: list[int]) -> None:
    host, guest = seized_host()
    ranges = []
    for number, value in enumerate(flags):
        message = fragment(value, bytes(100))
        put(guest, number * 1808, message)
        ranges.append((len(message), number * 1808))
    host.receive_ranges(ranges)
    assert all(value == 0 for value in flags) or len(guest.nic.receive()) == flags.count(0)
    assert guest.nic._fragments == []


def test_coalesced_packet_longer_than_ip_allows() -> None:
    host, guest = seized_host()
    message = fragment(PacketIdFlags.SUB_ALLOCATION, bytes(1700))
    put(guest, 1808, message)
    first = fragment(PacketIdFlags.SUB_ALLOCATION | PacketIdFlags.FIRST, bytes(1700))
    put(guest, 0, first)
    host.receive_ranges([(len(first), 0)] + [(len(message), 1808)] * 500)
    assert guest.nic.receive() == []
    assert guest.nic.protocol.violations == 1
    assert guest.nic._fragments == []


def test_completions_that_nobody_waits_for() -> None:
    host, guest = seized_host()
    for tid in (1, 2, 77, 0xFFFFFFFFFFFFFFFF):
        host.send(b"\x6c\0\0\0\1\0\0\0", kind=COMPLETION, flags=0, tid=tid)
    assert guest.nic.protocol.violations == 4
    size = guest.nic.protocol.send_section[1]
    assert guest.nic._sections.available == size
    assert guest.nic.send_batch([frame(mac(2), mac(1))] * 8) == 8
    sent = [p.transaction_id for p in host.channel.incoming.recv_packets(64)]
    for answer in (b"", b"\x6c\0\0\0", b"\x6c\0\0\0\1\0\0\0"):
        for tid in sent:
            host.send(answer, kind=COMPLETION, flags=0, tid=tid)
    assert guest.nic._sections.available == size
    assert (guest.nic.sent_frames, guest.nic.failed_frames) == (0, 8)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\x86\0\0\0",
        struct.pack("<III", 134, 16, 17).ljust(76, b"\0"),  # the ring pads to 80 bytes
        struct.pack("<III", 134, 15, 12).ljust(76, b"\0"),
        struct.pack("<III", 134, 16, 0xFFFFFFFF).ljust(76, b"\0"),
        struct.pack("<I", 1).ljust(28, b"\0"),
        struct.pack("<I", 108).ljust(28, b"\0"),
        struct.pack("<II", 129, 1).ljust(28, b"\0"),
    ],
)
def test_wrong_messages_of_a_host(payload: bytes) -> None:
    host, guest = seized_host()
    host.send(payload, flags=0)
    assert guest.nic.protocol.violations == 1
    assert guest.nic.is_open


def test_send_table_names_channels_that_there_are_not() -> None:
    host, guest = seized_host()
    host.send(struct.pack("<III", 134, 16, 12) + struct.pack("<16I", *[0xFFFFFFFF] * 16), flags=0)
    assert guest.nic.protocol.violations == 0
    assert guest.nic.send(frame(mac(2), mac(1)))


def test_rndis_of_a_host_that_lies() -> None:
    host, guest = seized_host()
    nic = guest.nic
    wrong = [
        rndis.pack_control(RndisType.QUERY_COMPLETE, rndis.QueryComplete(1, 0, 0, 0)),
        rndis.pack_control(RndisType.QUERY, rndis.QueryRequest(1, 1, 0, 0, 0)),
        rndis.pack_control(RndisType.RESET_COMPLETE, rndis.ResetComplete(0, 0)),
        rndis.pack_control(
            RndisType.INDICATE_STATUS, rndis.IndicateStatus(NdisStatus.LINK_SPEED_CHANGE, 0, 0)
        ),
        rndis.pack_control(
            RndisType.INDICATE_STATUS,
            rndis.IndicateStatus(NdisStatus.TASK_OFFLOAD_CURRENT_CONFIG, 0, 0),
            b"xx",
        ),
        struct.pack("<II", 0x77777777, 8),
        struct.pack("<II", 0x80000004, 0xFFFFFFFF),
    ]
    for number, message in enumerate(wrong):
        put(guest, 0, message)
        host.receive_ranges([(len(message), 0)])
        assert nic.protocol.violations == number + 1
    assert nic.is_open


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("word", range(19))
def test_every_word_of_a_received_message(word: int, plain: bool) -> None:
    """Header, per-packet information and data of an RNDIS packet: a frame inside the buffer, or a violation."""
    host, guest = seized_host()
    guest.nic.use_compiled_path = plain
    sent = Frame(frame(mac(1), mac(2)), checksum=0, vlan=7)
    taken = 0
    for value in (0, 1, 12, 0x2C, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF):
        message = bytearray(rndis.pack_packet(sent))
        struct.pack_into("<I", message, word * 4, value)
        put(guest, 0, bytes(message))
        before = guest.nic.protocol.violations
        host.receive_ranges([(len(message), 0)])
        frames = guest.nic.receive()
        host.drain()
        assert host.next_id in host.answers, "the host gets its section back"
        assert len(frames) <= 1
        assert all(len(got) <= len(message) for got in frames)
        taken += len(frames)
        assert guest.nic.protocol.violations >= before
    assert taken < 7 or word >= 10  # words 0 to 9 place something: not every value can be right
    put(guest, 0, GOOD)
    host.receive_ranges([(len(GOOD), 0)])
    assert guest.nic.receive() == [frame(mac(2), mac(1))]


@pytest.mark.parametrize("plain", [True, False])
def test_frames_that_are_never_completed(plain: bool) -> None:
    """The client runs out of sections, says so, and goes on when the host comes to its senses."""
    host, guest = seized_host()
    nic = guest.nic
    nic.use_compiled_path = plain
    count = nic.protocol.send_section[1]
    frames = [frame(mac(2), mac(1), bytes(1400))] * (8 * count)
    sent = nic.send_batch(frames)
    assert 0 < sent < len(frames)
    assert nic.send_batch(frames) == 0
    assert nic.sent_frames == 0
    tids = []
    while packets := host.channel.incoming.recv_packets(64):
        tids += [packet.transaction_id for packet in packets]
    host.channel.incoming.take_signal()
    for tid in tids:
        host.send(b"\x6c\0\0\0\1\0\0\0", kind=COMPLETION, flags=0, tid=tid)
    nic.receive()
    assert nic.sent_frames == sent
    assert nic.send_batch(frames[:8]) == 8


def hostile_answers() -> list[Callable[[bytes], bytes]]:
    def word(at: int, value: int) -> Callable[[bytes], bytes]:
        def change(payload: bytes) -> bytes:
            return payload[:at] + value.to_bytes(4, "little") + payload[at + 4 :]

        return change

    values = (0, 1, 67, 0x7FFFFFFF, 0xFFFFFFFF)
    return [word(at, value) for at in range(0, 32, 4) for value in values] + [lambda p: p[:4], lambda p: b""]


def test_bring_up_with_one_wrong_answer() -> None:
    """Every word of every NVSP answer, one at a time: the client comes up usable or says what is wrong."""
    came_up = 0
    for change in hostile_answers():
        for which in range(3):
            guest = make_guest(Switch(), 1, memory_size=4 << 20)
            real = guest.vsp._queues[0].completions
            answered = [0]

            class Liar(type(real)):  # type: ignore[misc]
                def append(self, item, change=change, which=which, answered=answered):  # type: ignore[no-untyped-def]
                    if item[1]:
                        answered[0] += 1
                        if answered[0] - 1 == which:
                            item = (item[0], change(item[1]), *item[2:])
                    super().append(item)

            guest.vsp._queues[0].completions = Liar()
            try:
                guest.start(page_count=150, timeout=0.02)
            except (DeviceError, RemoteProtocolError):
                continue
            size, count = guest.nic.protocol.receive_section
            assert size >= 68
            assert size * count <= guest.nic._receive.window.size
            size, count = guest.nic.protocol.send_section
            assert size * count <= guest.nic._send.window.size
            came_up += 1
    assert came_up > 10


class Endless:
    """A ring that its writer fills whenever it is looked at."""

    def __init__(self, reader: RingReader, refill: Callable[[], None]) -> None:
        self.reader = reader
        self.refill = refill

    def recv_packets(self, most: int) -> list[Packet]:
        self.refill()
        return self.reader.recv_packets(most)

    def __getattr__(self, name: str) -> object:
        return getattr(self.reader, name)


@pytest.mark.parametrize("noise", ["frames", "strangers", "nonsense"])
def test_a_host_that_never_stops_talking_does_not_keep_the_client(noise: str) -> None:
    host, guest = seized_host()
    nic = guest.nic
    nic.use_compiled_path = False
    nic.timeout = 0.2
    put(guest, 0, GOOD)

    def talk() -> None:
        with suppress(RingFull):
            for _ in range(20):
                if noise == "frames":
                    host.receive_ranges([(len(GOOD), 0)])
                elif noise == "strangers":
                    host.send(bytes(8), kind=COMPLETION, flags=0, tid=77)
                else:
                    host.send(b"\xff" * 40, flags=0)
        host.drain()

    ring = guest.guest_end.incoming
    guest.guest_end.incoming = Endless(ring, talk)  # type: ignore[assignment]
    began = time.monotonic()
    assert len(nic.receive(64)) == (64 if noise == "frames" else 0)
    with pytest.raises(DeviceError, match="did not answer"):
        nic.keepalive()
    assert nic.send_batch([frame(mac(2), mac(1))] * 10) == 10
    assert time.monotonic() - began < 60
    guest.guest_end.incoming = ring

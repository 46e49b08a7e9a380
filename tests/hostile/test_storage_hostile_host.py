"""Hostile hosts against the storage client: an error or a skipped packet, never a crash, a hang or wrong data."""

import random
import struct
import threading
import time
from collections.abc import Iterator

import pytest
from reference.storage_attacker import COMPLETION, IN_BAND
from reference.storage_liar import Host, completion

from vmbus.core.ring import Packet
from vmbus.errors import DeviceError, RemoteProtocolError, VmbusError

MIB = 1 << 20


@pytest.fixture
def host() -> Iterator[Host]:
    made = Host()
    made.client.connect()
    yield made
    made.guest.close()


def content(offset: int, length: int) -> bytes:
    return bytes([offset // 512 % 251]) * length


def test_completions_twice_and_of_strangers_are_counted_and_dropped(host: Host) -> None:
    disk = host.client.disk()

    def twice(packet: Packet) -> list[tuple[int, bytes]]:
        answers = host.honest(packet)
        strangers = [
            (tid, completion(moved=4096)) for tid in (0x77777, packet.transaction_id + 1000, 1 << 63)
        ]
        return strangers + answers + answers

    host.answer = twice
    assert disk.read(512, 4096) == content(512, 4096)
    host.answer = host.honest
    assert disk.read(1024, 4096) == content(1024, 4096)
    assert host.client.stale_completions == 4
    host.answer = twice
    offsets = list(range(0, 64 * 4096, 4096))
    assert disk.read_batch(offsets, 4096) == [content(offset, 4096) for offset in offsets]
    assert host.client.stale_completions >= 4 + 64


def test_a_completion_of_the_batch_before_is_not_taken_for_one_of_this(host: Host) -> None:
    disk = host.client.disk()
    disk.read_batch([0, 512, 1024], 512)
    old = [packet.transaction_id for packet in host.taken[-3:]]
    honest = host.honest
    host.answer = lambda packet: [*((tid, completion(moved=512)) for tid in old), *honest(packet)]
    assert disk.read_batch([512 * n for n in range(40)], 512) == [content(512 * n, 512) for n in range(40)]


def test_a_request_that_is_never_completed_is_an_error(host: Host) -> None:
    disk = host.client.disk()
    host.answer = lambda packet: []
    started = time.monotonic()
    with pytest.raises(DeviceError, match="did not complete"):
        disk.read(0, 4096)
    assert time.monotonic() - started < 60
    host.answer = host.honest
    # Its pages may still be written to: the client does not go on as if nothing had been.
    with pytest.raises(DeviceError, match="did not complete"):
        disk.read(0, 4096)


def test_a_batch_that_is_never_finished_is_an_error(host: Host) -> None:
    disk = host.client.disk()
    seen = []

    def forgetful(packet: Packet) -> list[tuple[int, bytes]]:
        seen.append(packet)
        return [] if len(seen) == 20 else host.honest(packet)

    host.answer = forgetful
    with pytest.raises(DeviceError, match="did not complete"):
        disk.read_batch(range(0, 64 * 512, 512), 512)
    with pytest.raises(DeviceError):
        disk.write_batch([0], [bytes(512)])


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        bytes(4),
        bytes(11),
        struct.pack("<III", 1, 0, 0),
        struct.pack("<III", 3, 0, 0).ljust(64, b"\0"),
        struct.pack("<III", 1, 0, 0xC0000001).ljust(64, b"\1"),
        completion(moved=0xFFFFFFFF),
        completion(srb_status=0x84, scsi_status=2, sense=255, payload=b"\xff" * 20),
        completion(srb_status=0x84, scsi_status=2, sense=0),
        completion(
            srb_status=0x84, scsi_status=2, sense=20, payload=b"\x72\x05\x20\0\0\0\0\xff" + b"\xff" * 12
        ),
        completion(srb_status=0xFF, scsi_status=0xFF),
        completion(srb_status=0),
        completion(moved=100),
    ],
)
def test_nonsense_in_a_completion_is_an_error_of_that_request(host: Host, bad: bytes) -> None:
    disk = host.client.disk()
    host.answer = lambda packet: [(packet.transaction_id, bad)]
    for attempt in (lambda: disk.read(0, 4096), lambda: disk.read_batch([0, 4096], 4096)):
        try:
            data = attempt()
        except (DeviceError, RemoteProtocolError):
            continue
        assert len(data) in (2, 4096)  # a lie about the length does not change what was asked for
    host.answer = host.honest
    assert disk.read(512, 512) == content(512, 512)


@pytest.mark.parametrize("word", range(16))
def test_every_word_of_a_completion(host: Host, word: int) -> None:
    """Each field at its limits: the data that were asked for, or an error; and the next request is right."""
    disk = host.client.disk()
    for value in (0, 1, 2, 4, 0x84, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF):

        def lying(packet: Packet, value: int = value) -> list[tuple[int, bytes]]:
            ((tid, payload),) = host.honest(packet)
            changed = bytearray(payload)
            struct.pack_into("<I", changed, word * 4, value)
            return [(tid, bytes(changed))]

        host.answer = lying
        for attempt in (lambda: disk.read(0, 4096), lambda: b"".join(disk.read_batch([0, 4096], 4096)[:1])):
            try:
                assert attempt() == content(0, 4096)
            except (DeviceError, RemoteProtocolError):
                continue
        host.answer = host.honest
        assert disk.read(512, 512) == content(512, 512)


@pytest.mark.parametrize(
    "capacity",
    [
        bytes(32),
        b"\xff" * 32,
        struct.pack(">QI20x", 100, 0),
        struct.pack(">QI20x", 100, 513),
        struct.pack(">QI20x", 100, 1 << 31),
        struct.pack(">QI20x", 100, 8192),
    ],
)
def test_impossible_capacities_are_refused(host: Host, capacity: bytes) -> None:
    def lying(packet: Packet) -> list[tuple[int, bytes]]:
        answers = host.honest(packet)
        if packet.payload[28] == 0x9E and packet.ranges is not None:
            packet.ranges.write(host.memory, capacity)
        return answers

    host.answer = lying
    with pytest.raises(RemoteProtocolError):
        host.client.disk()


def lba_status(*descriptors: tuple[int, int, int], told: int | None = None) -> bytes:
    body = b"".join(struct.pack(">QIB3x", *descriptor) for descriptor in descriptors)
    return struct.pack(">I4x", len(body) + 4 if told is None else told) + body


@pytest.mark.parametrize(
    ("answer", "states"),
    [
        (b"", None),
        (bytes(8), None),
        (lba_status((0, 0, 0)), None),
        (lba_status((1, 8, 1)), None),
        (lba_status((1 << 63, 8, 1)), None),
        (lba_status((0, 8, 1), (0, 8, 0)), None),
        (lba_status((0, 8, 1), (16, 8, 0)), None),
        (lba_status((0, 8, 1), told=8), None),
        (lba_status((0, 8, 1), (8, 8, 0), told=0xFFFFFFFF), [(0, 4096, False), (4096, 4096, True)]),
        (lba_status((0, 0xFFFFFFFF, 0xF1)), [(0, MIB, False)]),
        (lba_status((0, 8, 1)) + bytes(5), [(0, 4096, False)]),
    ],
)
def test_states_of_allocation_that_cannot_be(
    host: Host, answer: bytes, states: list[tuple[int, int, bool]] | None
) -> None:
    def lying(packet: Packet) -> list[tuple[int, bytes]]:
        if packet.payload[28:30] == b"\x9e\x12" and packet.ranges is not None:
            packet.ranges.write(host.memory, answer)
            return [(packet.transaction_id, completion(moved=len(answer)))]
        answers = host.honest(packet)
        if packet.payload[28] == 0x9E and packet.ranges is not None:
            packet.ranges.write(host.memory, struct.pack(">QIxBH16x", 2 * MIB // 512 - 1, 512, 0, 0xC000))
        return answers

    host.answer = lying
    disk = host.client.disk()
    assert disk.thin
    if states is None:
        with pytest.raises(RemoteProtocolError, match="GET LBA STATUS"):
            disk.lba_status(0, MIB)
    else:
        assert [tuple(extent) for extent in disk.lba_status(0, MIB)] == states


def test_notices_of_any_kind_and_length(host: Host) -> None:
    told: list[bool] = []
    host.client.on_change = lambda: told.append(True)
    for payload in (
        b"",
        b"\x0b",
        struct.pack("<I", 11),
        struct.pack("<I", 2),
        struct.pack("<I", 99),
        bytes(64),
    ):
        host.send(0, payload, IN_BAND)
        host.client.poll()
    assert len(told) == 3  # one byte is padded to eight on the ring, and then is a whole notice
    assert host.client.disk().read(0, 512) == content(0, 512)


def test_a_host_that_never_reads(host: Host) -> None:
    disk = host.client.disk()
    host.host.on_signal = None
    with pytest.raises(DeviceError, match="did not complete"):
        disk.read_batch(range(0, 2 * MIB - 65536, 512), 512)


def test_a_channel_closed_under_a_batch(host: Host) -> None:
    disk = host.client.disk()

    def closing(packet: Packet) -> list[tuple[int, bytes]]:
        if len(host.taken) % 10 == 9:
            host.host.close()
            return []
        return host.honest(packet)

    host.answer = closing
    with pytest.raises(VmbusError):
        disk.read_batch(range(0, 100 * 512, 512), 512)


def test_a_hostile_negotiation_ends_with_an_error() -> None:
    numbers = random.Random(4)
    for _ in range(200):
        host = Host()
        host.client.timeout = 0.02
        host.answer = lambda packet: [
            (packet.transaction_id, numbers.randbytes(numbers.choice([0, 12, 40, 64])))
        ]
        with pytest.raises(VmbusError):
            host.client.connect()
        host.guest.close()


def test_a_control_completion_that_comes_again_and_again_is_kept_once(host: Host) -> None:
    tids = [packet.transaction_id for packet in host.taken]
    for tid in tids * 50:
        host.send(tid, bytes(64))
        host.client.poll()
    assert len(host.client._control) == 1
    assert host.client.stale_completions == 50 * len(tids)
    assert host.client.disk().read(0, 512) == content(0, 512)


@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize(
    "noise",
    [
        (77, completion(), COMPLETION),
        (0, bytes(64), IN_BAND),
        (1 << 60, bytes(64), COMPLETION),
        (None, completion(), COMPLETION),
    ],
    ids=["stranger", "notice", "far", "stale"],
)
def test_a_host_that_never_stops_talking_does_not_keep_the_client(
    batch: bool, noise: tuple[int | None, bytes, int]
) -> None:
    """Packets that complete nothing do not put off the end of the wait."""
    host = Host()
    host.client.connect()
    disk = host.client.disk()
    disk.read_batch([0], 512)
    stop = threading.Event()
    tid = host.taken[-1].transaction_id if noise[0] is None else noise[0]
    host.answer = lambda packet: []

    def talk() -> None:
        while not stop.is_set():
            host.send(tid, noise[1], noise[2])

    talker = threading.Thread(target=talk)
    talker.start()
    began = time.monotonic()
    try:
        with pytest.raises(DeviceError, match="did not complete"):
            disk.read_batch([0, 512, 1024], 512) if batch else disk.read(0, 512)
    finally:
        stop.set()
        talker.join()
    assert time.monotonic() - began < 60
    host.guest.close()

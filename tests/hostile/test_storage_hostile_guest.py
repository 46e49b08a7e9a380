"""Hostile guests against the storage provider.

Whatever a guest sends: no exception but a closed channel, no access outside its memory or the disk, no hang, and
no harm to another guest of the same provider's host.
"""

import random
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest
from reference.eventually import eventually
from reference.seeds import chosen_seed
from reference.storage_attacker import (
    COMPLETION,
    CONTENT,
    GPA_DIRECT,
    IN_BAND,
    TRANSFER,
    Attacker,
    Room,
    control,
    gpa_header,
    read10,
    srb,
    status_of,
    write10,
)

from vmbus.storage.disk import Disk, MemoryDisk, RawDisk
from vmbus.storage.scsi import DiskUnit
from vmbus.storage.scsi.codes import AdditionalSense
from vmbus.storage.vsp import MAX_OUTSTANDING, StorageVsp

MIB = 1 << 20
ROUNDS = 40
"""Rings that are flipped until they break."""

INVALID_REQUEST, INVALID_LUN, SUCCESS = 0x06, 0x20, 0x01
RESET_LUN = 4


@pytest.fixture(params=["file", "memory"])
def room(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Room]:
    if request.param == "file":
        disk: Disk = RawDisk.create(tmp_path / "disk", MIB)
        disk.write(0, CONTENT)
    else:
        disk = MemoryDisk(MIB, content=CONTENT)
    made = Room(disk)
    yield made
    made.close()
    disk.close()


# The list of bugs that real hosts had


def test_a_gpa_direct_header_shorter_than_24_bytes_closes_only_that_channel(room: Room) -> None:
    room.attacker.send(GPA_DIRECT, srb(read10(0, 1), 512), b"")
    assert not room.attacker.guest.is_open


def test_a_transfer_page_header_shorter_than_24_bytes_closes_only_that_channel(room: Room) -> None:
    room.attacker.send(TRANSFER, srb(read10(0, 1), 512), b"")
    assert not room.attacker.guest.is_open


@pytest.mark.parametrize("offset", [4096, 4097, 0x7FFFFFFF, 0xFFFFFFFF])
def test_a_gpa_range_that_begins_behind_its_first_page_is_corruption(room: Room, offset: int) -> None:
    room.attacker.send(GPA_DIRECT, srb(read10(0, 1), 512), gpa_header([(512, offset, [3, 4])]))
    assert not room.attacker.guest.is_open


def test_a_request_longer_than_expected_during_initialization_is_taken() -> None:
    """Linux 6.1 sends 64 bytes before the version is known; more must not hurt either."""
    attacker = Attacker()
    provider = StorageVsp({(0, 0): MemoryDisk(MIB)})
    provider.open(attacker.host)
    for operation, body in ((7, b""), (9, struct.pack("<HH", 0x0602, 0)), (10, b""), (8, b"")):
        answer = attacker.ask(IN_BAND, control(operation, body, size=200))
        assert struct.unpack_from("<III", answer) == (1, 0, 0)
        assert len(answer) == 64
    assert attacker.works()
    provider.shutdown()


def test_an_unknown_operation_does_not_kill_the_channel(room: Room) -> None:
    for operation in (0, 12, 14, 15, 99, 0x80000000, 0xFFFFFFFF):
        answer = room.attacker.ask(IN_BAND, control(operation))
        assert status_of(answer)[0] != 0
        assert room.attacker.works()


def test_a_pending_send_size_of_the_ring_less_one_is_honoured(room: Room) -> None:
    """Some guests mean "when the ring is empty": the host must ring when it has read everything."""
    attacker = room.attacker
    rung: list[bool] = []
    attacker.guest.on_signal = lambda: rung.append(True)
    attacker.ring.set_word(12, attacker.ring.size - 1)
    for _ in range(4):
        rung.clear()
        attacker.ask(GPA_DIRECT, srb(read10(0, 1), 512), gpa_header([(512, 0, [3])]))
        assert rung


# Requests that do not make sense


@pytest.mark.parametrize(
    ("cdb", "length", "ranges"),
    [
        (read10(0, 1), 512, [(512, 0, [1 << 40])]),
        (read10(0, 1), 512, [(512, 0, [(1 << 64) - 1])]),
        (read10(0, 1), 512, [(512, 0, [1 << 52])]),
        (read10(0, 8), 4096, [(4096, 2048, [3, 1 << 30])]),
        (write10(0, 8), 4096, [(4096, 2048, [3, 1 << 30])]),
        (read10(0, 1), 1 << 20, [(512, 0, [3])]),
        (read10(0, 1), 512, []),
        (read10(0, 16), 4096, [(4096, 0, [3])]),
        (read10(0, 16), 0, [(8192, 0, [3, 4])]),
        (bytes([0xA0] + [0] * 8 + [16, 0, 0]), 16, [(16, 0, [1 << 33])]),
        (bytes([0x12, 0, 0, 0, 36, 0]), 36, [(36, 4080, [3, 1 << 33])]),
        (bytes([0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0]), 24, [(24, 0, [1 << 33])]),
    ],
)
def test_a_buffer_that_is_not_there_is_an_error_of_that_request(
    room: Room, cdb: bytes, length: int, ranges: list[tuple[int, int, list[int]]]
) -> None:
    answer = room.attacker.execute(cdb, length, ranges)
    assert status_of(answer)[1] not in (SUCCESS, 0)
    assert status_of(answer)[0] != 0
    assert room.disk.read(0, MIB) == CONTENT
    assert room.attacker.works()


VALUES = (0, 1, 2, 0x40, 0xFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


@pytest.mark.parametrize("word", range(16))
def test_every_word_of_a_request(room: Room, word: int) -> None:
    """Each field at its limits: an answer to that request, nothing outside of the disk, and the channel goes on."""
    attacker = room.attacker
    for value in VALUES:
        packet = bytearray(srb(read10(0, 8), 4096))
        struct.pack_into("<I", packet, word * 4, value)
        answer = attacker.ask(GPA_DIRECT, bytes(packet), gpa_header([(4096, 0, [3])]))
        assert len(answer) == 64
        assert struct.unpack_from("<I", answer)[0] == 1
        if status_of(answer)[0] == 0 and status_of(answer)[1] == SUCCESS:
            assert struct.unpack_from("<I", answer, 24)[0] <= 4096
        attacker.execute(bytes(6), 0, [])  # a reset leaves a unit attention
        attacker.execute(bytes(6), 0, [])
        assert attacker.works()
    assert room.disk.read(0, MIB) == CONTENT


@pytest.mark.parametrize("word", range(6))
def test_every_word_of_a_range(word: int) -> None:
    """Count, lengths, offsets and page numbers: the channel closes, or the request fails; nobody else notices."""
    for value in VALUES:
        made = Room(MemoryDisk(MIB, content=CONTENT))
        header = bytearray(gpa_header([(8192, 0, [3, 4])]))
        struct.pack_into("<I", header, 4 + word * 4, value)
        tid = made.attacker.send(GPA_DIRECT, srb(read10(0, 16), 8192), bytes(header))
        if made.attacker.guest.is_open:
            made.attacker.collect()
            assert tid in made.attacker.answers
            assert made.attacker.works()
        made.close()


def test_addresses_of_nobody(room: Room) -> None:
    for address in ({"target": 1}, {"target": 255}, {"lun": 1}, {"lun": 255}, {"path": 1}, {"path": 255}):
        answer = room.attacker.execute(read10(0, 1), 512, [(512, 0, [3])], **address)
        assert status_of(answer)[1] == INVALID_LUN
    assert room.attacker.works()


@pytest.mark.parametrize("size", [0, 4, 11, 12, 13, 16, 20, 40])
def test_packets_too_short_for_what_they_say(room: Room, size: int) -> None:
    for operation in range(1, 15):
        tid = room.attacker.send(IN_BAND, control(operation)[:size])
        room.attacker.collect()
        # resets need nothing more, and no sub-channels at all (13, padded with zeros) may be asked for
        assert status_of(room.attacker.answers[tid])[0] != 0 or operation in (4, 5, 6, 13), operation
    # resets are taken in any size and leave a unit attention behind
    room.attacker.execute(bytes(6), 0, [])
    assert room.attacker.works()


def test_wrong_packet_types_are_passed_over_and_logged_once(
    room: Room, caplog: pytest.LogCaptureFixture
) -> None:
    for kind in (0, 1, 2, 5, 8, 10, COMPLETION, 12, 0xFFFF):
        room.attacker.send(kind, srb(read10(0, 1), 512))
        room.attacker.collect()
    assert room.provider.violations == 9
    assert len(caplog.records) == 1
    assert room.attacker.works()


def test_requests_that_want_no_completion_get_none(room: Room) -> None:
    before = len(room.attacker.answers)
    tid = room.attacker.send(GPA_DIRECT, srb(read10(0, 1), 512), gpa_header([(512, 0, [3])]), flags=0)
    room.attacker.collect()
    assert tid not in room.attacker.answers
    assert len(room.attacker.answers) == before
    assert room.attacker.memory.read(3 << 12, 512) == CONTENT[:512]


def test_any_transaction_id_comes_back(room: Room) -> None:
    for tid in (0, 1, (1 << 64) - 1, 1 << 63):
        room.attacker.send(GPA_DIRECT, srb(read10(0, 1), 512), gpa_header([(512, 0, [3])]), tid=tid)
        room.attacker.collect()
        assert status_of(room.attacker.answers[tid])[1] == SUCCESS


def test_renegotiation_on_a_running_channel_is_refused(room: Room) -> None:
    for operation in (7, 8, 9, 10):
        assert status_of(room.attacker.ask(IN_BAND, control(operation, b"\2\6")))[0] == 0xC0000184
    assert room.attacker.works()


@pytest.mark.parametrize("count", [1, 0xFFFF])
def test_sub_channels_that_were_not_offered_are_refused(room: Room, count: int) -> None:
    assert status_of(room.attacker.ask(IN_BAND, control(13, struct.pack("<H", count))))[0] == 0xC000000D


# Rings


@pytest.mark.parametrize("workers", [0, 2])
def test_a_guest_that_never_reads_its_completions_costs_bounded_memory(workers: int) -> None:
    room = Room(MemoryDisk(MIB, content=CONTENT), workers=workers)
    attacker = room.attacker
    sent: list[int] = []
    for _ in range(5 * MAX_OUTSTANDING):
        attacker.next_id += 1
        packet = (GPA_DIRECT, 1, attacker.next_id, gpa_header([(512, 0, [3])]), srb(read10(0, 1), 512))
        if not attacker.ring.write(*packet):
            break
        sent.append(attacker.next_id)
        attacker.ring.publish()
        attacker.knock()
    assert len(sent) < 5 * MAX_OUTSTANDING, "the provider goes on reading although nobody takes its answers"
    server = room.provider._servers[0]
    assert len(server.completions) + len(server.running) <= MAX_OUTSTANDING + 64
    deadline = time.monotonic() + 10
    while set(sent) - set(attacker.answers) and time.monotonic() < deadline:
        attacker.collect()  # a guest that comes to its senses gets every one of them
        attacker.knock()
    assert not set(sent) - set(attacker.answers)
    assert attacker.works()
    room.close()


@pytest.mark.parametrize("word", [0, 4, 8, 12, 64])
def test_control_words_of_any_value(word: int) -> None:
    numbers = random.Random(word)
    disk = MemoryDisk(MIB, content=CONTENT)
    for _ in range(60):
        room = Room(disk)
        attacker = room.attacker
        value = numbers.choice(
            [1, 4, 7, 65535, 65536, 65544, 0x7FFFFFFF, 0xFFFFFFF8, numbers.getrandbits(32)]
        )
        which = attacker.guest.outgoing if numbers.random() < 0.5 else attacker.guest.incoming
        view = which.window.view()
        struct.pack_into("<I", view, word, value)
        view.release()
        attacker.knock()
        if attacker.guest.is_open:
            attacker.ring.write(GPA_DIRECT, 1, 5, gpa_header([(512, 0, [3])]), srb(read10(0, 1), 512))
            attacker.knock()
        room.close()
        assert disk.read(0, MIB) == CONTENT
    room = Room(disk)
    assert room.attacker.works(), "the disk still serves a guest that means well"
    room.close()


def test_a_channel_closed_in_the_middle_of_requests() -> None:
    gate = threading.Event()

    class Waiting(MemoryDisk):
        def __init__(self) -> None:
            super().__init__(MIB, content=CONTENT)
            self.entered = 0

        def read(self, offset: int, length: int) -> bytes:
            self.entered += 1
            gate.wait(5)
            return super().read(offset, length)

    disk = Waiting()
    file, disk.fd = disk.fd, -1  # no short cut past `read`
    room = Room(disk, workers=2)
    for _ in range(10):
        room.attacker.send(GPA_DIRECT, srb(read10(0, 1), 512), gpa_header([(512, 0, [3])]))
    while not disk.entered:
        time.sleep(0.001)
    closing = threading.Thread(target=lambda: room.provider.close(room.attacker.host))
    closing.start()
    closing.join(0.1)
    assert closing.is_alive(), "closing must wait for requests that are in the disk"
    gate.set()
    closing.join(5)
    assert not closing.is_alive()
    assert disk.entered <= 4, "requests that had not begun were begun after the close"
    room.attacker.guest.close()
    room.close()
    disk.fd = file
    disk.close()


class ResetsLate(DiskUnit):
    """A unit whose resets wait for `gate`."""

    def __init__(self, disk: Disk) -> None:
        super().__init__(disk, UUID(int=1))
        self.resetting, self.gate = threading.Event(), threading.Event()

    def reset(self, what: AdditionalSense = AdditionalSense.DEVICE_RESET_OCCURRED) -> None:
        self.resetting.set()
        assert self.gate.wait(10)
        super().reset(what)


@pytest.mark.parametrize("behind", ["another reset", "a write that it aborts"])
def test_a_ring_that_breaks_during_a_reset_closes_the_channel(behind: str) -> None:
    """The channel's end waits for the reset, so the reset's thread must not be the one that ends the channel."""
    reading, gate = threading.Event(), threading.Event()

    class ReadsLate(MemoryDisk):
        def read(self, offset: int, length: int) -> bytes:
            reading.set()
            assert gate.wait(10)
            return super().read(offset, length)

    disk = ReadsLate(MIB, content=CONTENT)
    disk.fd = -1  # no short cut past `read`
    unit = ResetsLate(disk)
    provider = StorageVsp({(0, 0): unit}, workers=1)
    attacker = Attacker()
    provider.open(attacker.host)
    attacker.negotiate()
    reset = control(RESET_LUN, bytes(52))
    attacker.send(IN_BAND, reset)
    assert unit.resetting.wait(10)
    if behind == "another reset":
        attacker.send(IN_BAND, reset)
    else:
        attacker.send(GPA_DIRECT, srb(read10(0, 1), 512), gpa_header([(512, 0, [3])]))
        assert reading.wait(10)  # the only worker thread is busy
        attacker.send(GPA_DIRECT, srb(write10(0, 1), 512), gpa_header([(512, 0, [3])]))
        assert len(unit.tasks) == 2
    attacker.ring.set_word(0, 5)  # and no signal: whoever looks next finds it
    unit.gate.set()
    if behind != "another reset":
        assert eventually(lambda: len(unit.tasks) == 1), "the reset aborts the write, and spares the read"
    gate.set()
    assert eventually(lambda: not attacker.guest.is_open)
    provider.shutdown()
    assert len(unit.tasks) == 0
    disk.close()


def test_memory_that_changes_while_it_is_read() -> None:
    """A second thread of the guest flips bits in the ring while the host serves from it."""
    seed = chosen_seed()
    print(f"seed {seed}")
    numbers = random.Random(seed)
    disk = MemoryDisk(MIB, content=CONTENT, read_only=True)
    closed = 0
    for _ in range(ROUNDS):
        room = Room(disk)
        attacker = room.attacker
        view = attacker.guest.outgoing.window.view()
        stop = threading.Event()

        def flip(
            view: memoryview = view, stop: threading.Event = stop, key: int = numbers.getrandbits(32)
        ) -> None:
            mine = random.Random(key)
            while not stop.is_set():
                at = mine.randrange(4096, len(view))
                view[at] = view[at] ^ 1 << mine.randrange(8)

        flipper = threading.Thread(target=flip)
        flipper.start()
        for _ in range(100):
            packet = srb(read10(numbers.randrange(2048), 1), 512)
            attacker.next_id += 1
            if not attacker.ring.write(GPA_DIRECT, 1, attacker.next_id, gpa_header([(512, 0, [3])]), packet):
                break
            attacker.ring.publish()
            attacker.knock()
            if not attacker.guest.is_open:
                closed += 1
                break
            attacker.guest.incoming.recv_packets(64)
        stop.set()
        flipper.join()
        room.close()
    assert disk.read(0, MIB) == CONTENT
    disk.close()

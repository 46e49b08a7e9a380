"""The compiled server and client of plain reads and writes, by themselves."""

import os
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vmbus.bus.channel import Channel, loopback
from vmbus.core import blockio
from vmbus.core.blockio import DEFERRED, DONE, EMPTY, FULL, MORE, BlockClient, BlockServer, Request
from vmbus.core.memory import GuestMemory
from vmbus.errors import DeviceError, GuestMemoryError, RingCorrupt
from vmbus.storage.wire import PacketHeader, ScsiRequest, rules

MIB = 1 << 20
CONTENT = os.urandom(MIB)


class Pair:
    def __init__(self, fd: int, pages: int = 16) -> None:
        self.memory = GuestMemory(4 * MIB)
        self.guest, self.host = loopback(self.memory, pages, pages)
        self.server = BlockServer(self.host.incoming, self.host.outgoing, self.memory)
        self.client = BlockClient(self.guest.outgoing, self.guest.incoming, self.memory, 0, 0, 512, 64)
        self.fd = fd
        self.next_id = 1

    def begin(self, offsets: list[int], length: int = 4096, *, write: bool = False, depth: int = 32) -> None:
        each = -(-length // 4096)
        pfns = array("Q", range(16, 16 + each * len(offsets)))
        self.client.begin(array("Q", offsets), pfns, length, self.next_id, write, depth)
        self.next_id += len(offsets)

    def finish(self) -> None:
        for _ in range(1000):
            if self.client.step() & DONE:
                return
            self.server.serve()
        raise AssertionError("the batch does not end")


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    path = tmp_path / "disk"
    path.write_bytes(CONTENT)
    fd = os.open(path, os.O_RDWR)
    yield Pair(fd)
    os.close(fd)


def test_the_compiled_structures_are_those_of_the_wire() -> None:
    found = blockio.layout()
    expected = dict(PacketHeader.OFFSETS)
    expected |= {name: PacketHeader.SIZE + offset for name, offset in ScsiRequest.OFFSETS.items()}
    for name, rule in (("short packet", rules(0x0402)), ("long packet", rules(0x0602))):
        assert rule is not None
        expected[name] = rule.packet_size
    assert found == expected


@pytest.mark.parametrize("how", ["fd", "mapping", "handler"])
@pytest.mark.parametrize("length", [512, 4096, 12288])
def test_reads_and_writes(pair: Pair, how: str, length: int) -> None:
    mapped = memoryview(bytearray(CONTENT))

    def handler(request: Request) -> None:
        assert request.length == length
        if request.write:
            mapped[request.offset : request.offset + request.length] = request.fetch()
        else:
            request.store(mapped[request.offset : request.offset + request.length])

    backend = {"fd": {"fd": pair.fd}, "mapping": {"mapping": mapped}, "handler": {"handler": handler}}[how]
    assert pair.server.enable(0, 0, 512, MIB // 512, True, **backend)  # type: ignore[arg-type]
    offsets = [length * n for n in range(40)]
    pair.begin(offsets, length)
    pair.finish()
    assert pair.client.failures() == []
    assert pair.client.results() == [CONTENT[at : at + length] for at in offsets]
    pair.memory.write(16 << 12, b"\x5a" * (40 * 12288))
    pair.begin(offsets, length, write=True)
    pair.finish()
    wanted = b"\x5a" * (40 * length) + CONTENT[40 * length :]
    assert (os.pread(pair.fd, MIB, 0) if how == "fd" else bytes(mapped)) == wanted
    assert pair.server.packets == pair.server.backend_calls == 80
    assert pair.server.bytes_copied == (0 if how == "fd" else 80 * length)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda pair: pair.server.disable(0, 0),
        lambda pair: pair.server.enable(
            0, 0, 512, 8, True, fd=pair.fd
        ),  # the disk is smaller than the requests
        lambda pair: pair.server.enable(0, 1, 512, 8, True, fd=pair.fd) and pair.server.disable(0, 0),
        lambda pair: os.truncate(pair.fd, 4096),
    ],
)
def test_what_is_not_plain_stays_in_the_ring(pair: Pair, spoil: Callable[[Pair], object]) -> None:
    pair.server.enable(0, 0, 512, MIB // 512, True, fd=pair.fd)
    spoil(pair)
    pair.begin([8192, 0])
    pair.client.step()
    assert pair.server.serve() == DEFERRED
    assert pair.server.packets == 0
    assert len(pair.host.incoming.recv_packets()) == 2


def test_writes_to_a_read_only_unit_are_left(pair: Pair) -> None:
    pair.server.enable(0, 0, 512, MIB // 512, False, fd=pair.fd)
    pair.begin([0], write=True)
    pair.client.step()
    assert pair.server.serve() == DEFERRED
    assert os.pread(pair.fd, MIB, 0) == CONTENT


def test_a_handler_that_fails_leaves_the_request(pair: Pair) -> None:
    def handler(request: Request) -> None:
        with pytest.raises(ValueError, match="for a read of 4096"):
            request.store(b"too short")
        raise OSError("broken")

    pair.server.enable(0, 0, 512, MIB // 512, True, handler=handler)
    pair.begin([0])
    pair.client.step()
    assert pair.server.serve() == DEFERRED
    assert pair.host.incoming.available_bytes > 0


def test_a_handler_moves_data_between_a_file_and_the_guest(pair: Pair) -> None:
    pair.server.enable(0, 0, 512, MIB // 512, True, handler=lambda request: request.transfer(pair.fd))
    pair.begin([4096, 0])
    pair.finish()
    assert pair.client.results() == [CONTENT[4096:8192], CONTENT[:4096]]


def test_a_handler_sees_a_buffer_outside_the_guest_as_an_error(pair: Pair) -> None:
    caught: list[type] = []

    def handler(request: Request) -> None:
        for attempt in (lambda: request.store(bytes(4096)), request.fetch, lambda: request.transfer(pair.fd)):
            with pytest.raises(GuestMemoryError):
                attempt()
            caught.append(GuestMemoryError)
        raise GuestMemoryError

    pair.server.enable(0, 0, 512, MIB // 512, True, handler=handler)
    pair.client.begin(array("Q", [0]), array("Q", [1 << 40]), 4096, 1, False, 1)
    pair.client.step()
    assert pair.server.serve() == DEFERRED
    assert len(caught) == 3


def test_limits_and_codes(pair: Pair) -> None:
    assert pair.server.serve() == DEFERRED  # nothing to serve: everything is for others
    pair.server.enable(0, 0, 512, MIB // 512, True, fd=pair.fd)
    assert pair.server.serve() == EMPTY
    pair.begin([0] * 10)
    pair.client.step()
    assert pair.server.serve(4) == MORE
    assert pair.server.packets == 4
    assert pair.server.serve(64) == EMPTY
    pair.client.step()


def test_a_full_ring_of_completions_stops_the_server(pair: Pair) -> None:
    pair.server.enable(0, 0, 512, MIB // 512, True, fd=pair.fd)
    small = Pair(pair.fd, pages=1)
    small.server.enable(0, 0, 512, MIB // 512, True, fd=pair.fd)
    code = EMPTY
    for turn in range(60):
        small.client.begin(array("Q", [0] * 8), array("Q", [16] * 8), 4096, 1 + turn * 8, False, 8)
        small.client.step()
        code = small.server.serve()
        if code != EMPTY:
            break
        small.client.abandon()  # and never read a completion
    assert code == FULL
    before = small.server.packets
    assert small.server.serve() == FULL
    assert small.server.packets == before
    while small.guest.incoming.recv_packets():
        pass
    assert small.server.serve() == EMPTY


def test_a_file_is_held_by_the_server_itself(pair: Pair) -> None:
    other = os.dup(pair.fd)
    pair.server.enable(0, 0, 512, MIB // 512, True, fd=other)
    os.close(other)
    pair.begin([0])
    pair.finish()
    assert pair.client.results() == [CONTENT[:4096]]


def test_misuse_is_refused(pair: Pair) -> None:
    with pytest.raises(ValueError, match="needs a mapping"):
        pair.server.enable(0, 0, 512, 8, True)
    with pytest.raises(ValueError, match="smaller"):
        pair.server.enable(0, 0, 512, 8, True, mapping=memoryview(bytearray(4095)))
    with pytest.raises(ValueError, match="read-only"):
        pair.server.enable(0, 0, 512, 8, True, mapping=memoryview(bytes(4096)))
    for offsets, pfns, length, depth in (
        ([0], [1], 0, 1),
        ([0], [1], 100, 1),
        ([0], [1], 4096, 0),
        ([0, 1], [1], 4096, 1),
        ([0], [1], 8192, 1),
    ):
        with pytest.raises(ValueError, match=r"."):
            pair.client.begin(array("Q", offsets), array("Q", pfns), length, 1, False, depth)
    with pytest.raises(ValueError, match="64-bit"):
        pair.client.begin(array("I", [0]), array("Q", [1]), 4096, 1, False, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="packets of 60"):
        BlockClient(pair.guest.outgoing, pair.guest.incoming, pair.memory, 0, 0, 512, 60)
    pair.begin([0])
    with pytest.raises(DeviceError, match="not finished"):
        pair.begin([0])


def test_more_units_than_there_is_room_for(pair: Pair) -> None:
    taken = [pair.server.enable(0, lun, 512, 8, True, fd=pair.fd) for lun in range(70)]
    assert taken == [True] * 64 + [False] * 6
    pair.server.disable(0, 3)
    assert pair.server.enable(0, 69, 512, 8, True, fd=pair.fd)


def test_broken_rings_are_told(pair: Pair) -> None:
    pair.server.enable(0, 0, 512, MIB // 512, True, fd=pair.fd)
    pair.begin([0])
    corrupt(pair.guest)
    with pytest.raises(RingCorrupt):
        pair.server.serve()
    corrupt(pair.host)
    with pytest.raises(RingCorrupt):
        pair.client.step()


def corrupt(channel: Channel) -> None:
    view = channel.outgoing.window.view()
    view[0:4] = b"\x01\xff\xff\xff"
    view.release()


def test_without_the_gil(pair: Pair) -> None:
    pair.server.enable(0, 0, 512, MIB // 512, True, fd=pair.fd)
    pair.begin([4096 * n for n in range(200)])
    assert blockio.run_without_gil(pair.client, pair.server) == 200
    assert pair.client.failures() == []
    assert pair.client.results() == [CONTENT[4096 * n : 4096 * n + 4096] for n in range(200)]

"""Fuzz target: an NBD server that answers anything, against the protocol alone and against the disk over a socket."""

import random
import socket
import struct
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from reference.disk_model import fast_folder
from reference.fuzz import Fuzz
from reference.mutation import mutate

from vmbus.errors import VmbusError
from vmbus.storage.disk import DiskError
from vmbus.storage.images.nbd import NbdDisk
from vmbus.storage.images.nbd_protocol import NbdClient
from vmbus.storage.images.nbd_wire import Command

SIZE = 1 << 20
MOST_NEEDED = 32 << 20
GREETING = struct.pack(">8sQH", b"NBDMAGIC", 0x49484156454F5054, 3)
GO, STRUCTURED, META = 7, 8, 10
tmp_path = pytest.fixture(fast_folder, name="tmp_path")


def answer(option: int, kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", 0x3E889045565A9, option, kind, len(data)) + data


def chunk(cookie: int, kind: int, data: bytes = b"", *, done: bool = True) -> bytes:
    return struct.pack(">IHHQI", 0x668E33EF, int(done), kind, cookie, len(data)) + data


SHAKE = [
    GREETING,
    answer(STRUCTURED, 1),
    answer(META, 4, struct.pack(">I", 7) + b"base:allocation") + answer(META, 1),
    answer(GO, 3, struct.pack(">HQH", 0, SIZE, 1 | 4 | 8 | 32 | 64))
    + answer(GO, 3, struct.pack(">HIII", 3, 512, 4096, 1 << 20))
    + answer(GO, 1),
]


def reply(rng: random.Random, command: int, cookie: int, offset: int, length: int) -> bytes:
    """A right answer to a request, in one of the ways that a server may choose."""
    if command == Command.READ:
        kind = rng.randrange(4)
        where = struct.pack(">Q", offset)
        if kind == 0 and length > 512:
            first = chunk(cookie, 1, where + b"\x11" * 512, done=False)
            return first + chunk(cookie, 2, struct.pack(">QI", offset + 512, length - 512))
        if kind == 1:
            return chunk(cookie, 2, struct.pack(">QI", offset, length))
        if kind == 2:
            return chunk(cookie, 0x8001, struct.pack(">IH", 5, 3) + b"bad")
        return chunk(cookie, 1, where + b"\x22" * length)
    if command == Command.BLOCK_STATUS:
        half = length // 1024 * 512
        entries = (
            struct.pack(">III", 7, half, 0) + struct.pack(">II", length - half, 3) if half else b"\0\0\0\7"
        )
        return chunk(cookie, 5, entries + (b"" if half else struct.pack(">II", length, 0)))
    return chunk(cookie, 0)


def feed(client: NbdClient, data: bytes) -> None:
    while len(data) >= client.needs:
        assert client.needs <= MOST_NEEDED, "a server makes the client wait for as much as it likes"
        part, data = data[: client.needs], data[client.needs :]
        client.feed(part)
        if not data:
            return


def against_the_protocol(rng: random.Random) -> None:
    client = NbdClient("disk")
    pending: dict[int, tuple[int, int, int]] = {}
    with suppress(VmbusError):
        shake = list(SHAKE)
        if rng.random() < 0.3:
            shake[rng.randrange(4)] = mutate(rng, rng.choice(shake))
        feed(client, b"".join(shake))
        if not client.ready:
            return
        for _ in range(30):
            command = rng.choice(
                [Command.READ, Command.READ, Command.BLOCK_STATUS, Command.FLUSH, Command.WRITE]
            )
            offset, length = rng.randrange(64) * 512, rng.choice([512, 4096])
            data = bytes(length) if command == Command.WRITE else b""
            pending[client.submit(command, offset, length, data)] = (command, offset, length)
            assert len(client.outgoing) < 1 << 20
            while pending and rng.random() < 0.7:
                cookie = rng.choice(list(pending))
                stream = reply(rng, pending[cookie][0], cookie, *pending[cookie][1:])
                if rng.random() < 0.1:
                    stream = mutate(rng, stream)
                feed(client, stream)
                if client.is_done(cookie):
                    command, offset, length = pending.pop(cookie)
                    result = client.take(cookie)
                    if not result.error:  # a reply that counts as good has all of its data
                        assert len(result.data) == (length if command == Command.READ else 0)
                        assert all(part > 0 for part, _ in result.status)


def serve(listener: socket.socket, rng: random.Random) -> None:
    """One connection of a server that is wrong now and then."""
    connection, _ = listener.accept()
    wrong = rng.choice([0.02, 0.1])

    def send(data: bytes) -> None:
        connection.sendall(mutate(rng, data) if rng.random() < wrong else data)

    def read(count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = connection.recv(count - len(data))
            if not part:
                raise OSError
            data += part
        return data

    with connection, suppress(OSError):
        connection.settimeout(2)
        send(SHAKE[0])
        read(4)
        while True:
            _, option, length = struct.unpack(">8sII", read(16))
            read(min(length, 1 << 16))
            send({STRUCTURED: SHAKE[1], META: SHAKE[2]}.get(option, SHAKE[3]))
            if option == GO:
                break
        while True:
            _, _, command, cookie, offset, length = struct.unpack(">IHHQQI", read(28))
            if command == Command.WRITE:
                read(length)
            if command == Command.DISCONNECT:
                return
            send(reply(rng, command, cookie, offset, length))


def against_the_disk(rng: random.Random, path: Path) -> None:
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        listener.settimeout(2)
        server = threading.Thread(target=serve, args=(listener, random.Random(rng.getrandbits(32))))
        server.start()
        with suppress(DiskError), NbdDisk(f"nbd+unix:///disk?socket={path}", timeout=0.05) as disk:
            for _ in range(30):
                at = rng.randrange(min(disk.sector_count, 2000)) * disk.sector_size
                length = min(rng.choice([1, 8]) * disk.sector_size, disk.size - at)
                what = rng.randrange(5)
                if what == 0:
                    assert len(disk.read(at, length)) == length
                elif what == 1:
                    disk.write(at, bytes(length))
                elif what == 2:
                    disk.unmap(at, length)
                elif what == 3:
                    assert sum(extent.length for extent in disk.extents(at, length)) == length
                else:
                    disk.flush()
        server.join(10)
        assert not server.is_alive()


def test_nbd_client(fuzz: Fuzz, tmp_path: Path) -> None:
    def case(rng: random.Random) -> None:
        if rng.random() < 0.1:
            against_the_disk(rng, tmp_path / "socket")
        else:
            against_the_protocol(rng)

    fuzz.run(case, cases=80_000)

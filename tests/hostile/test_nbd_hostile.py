"""NBD servers that keep a client busy for ever, or try to: every one of them is given up.

The time limits themselves are tested on a clock of their own; here it is only seen that they hold for the whole client.
"""

import signal
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest
from reference.certificates import make_certificates

from vmbus.storage.disk import DiskError
from vmbus.storage.images import NbdDisk

MIB = 1 << 20
GREETING = struct.pack(">8sQH", b"NBDMAGIC", 0x49484156454F5054, 3)
START_TLS, GO, STRUCTURED, META = 5, 7, 8, 10
READ, BLOCK_STATUS = 0, 7
LIMIT = 0.25
"""Seconds; what a test waits for is only whether it ends."""
ENDS = 60


def answer(option: int, kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", 0x3E889045565A9, option, kind, len(data)) + data


def chunk(cookie: int, kind: int, data: bytes = b"", *, done: bool = True) -> bytes:
    return struct.pack(">IHHQI", 0x668E33EF, int(done), kind, cookie, len(data)) + data


class Server:
    """One connection to a client that is to be kept busy; stops when the client does."""

    def __init__(self, connection: socket.socket, size: int = MIB) -> None:
        self._connection = connection
        self._size = size
        self.send = connection.sendall

    def drip(self, data: bytes) -> None:
        for byte in data:
            self.send(bytes([byte]))
            time.sleep(LIMIT * 0.4)

    def read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = self._connection.recv(count - len(data))
            if not part:
                raise OSError
            data += part
        return data

    def option(self) -> int:
        _, option, length = struct.unpack(">8sII", self.read(16))
        self.read(length)
        return int(option)

    def encrypt(self, context: ssl.SSLContext) -> None:
        self._connection = context.wrap_socket(self._connection, server_side=True)
        self.send = self._connection.sendall

    def close(self) -> None:
        self._connection.close()

    def shake(self) -> None:
        self.send(GREETING)
        self.read(4)
        while (option := self.option()) != GO:
            context = answer(META, 4, struct.pack(">I", 7) + b"base:allocation") if option == META else b""
            self.send(context + answer(option, 1))
        self.send(answer(GO, 3, struct.pack(">HQH", 0, self._size, 1 | 4 | 8)) + answer(GO, 1))

    def request(self) -> tuple[int, int, int, int]:
        """Command, cookie, offset and length of the next one."""
        _, _, command, cookie, offset, length = struct.unpack(">IHHQQI", self.read(28))
        if command == 1:
            self.read(length)
        return command, cookie, offset, length


@contextmanager
def serving(folder: Path, behave: Callable[[Server], None], *, size: int = MIB) -> Iterator[str]:
    path = folder / "socket"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        listener.settimeout(ENDS)

        def serve() -> None:
            connection, _ = listener.accept()
            connection.settimeout(ENDS)
            with closing(Server(connection, size)) as server, suppress(OSError):
                behave(server)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"nbd+unix:///?socket={path}"
        thread.join(ENDS)
        assert not thread.is_alive()


def ends_in_an_error(use: Callable[[], object]) -> str:
    """Run it beside this thread, which does not want to wait for ever either; its error's sentence."""
    sentences: list[str] = []

    def run() -> None:
        with pytest.raises(DiskError) as caught:
            use()
        sentences.append(str(caught.value))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(ENDS)
    assert sentences, "the client waits for ever"
    assert sentences[0].isprintable()
    return sentences[0]


def greets_byte_by_byte(server: Server) -> None:
    server.drip(GREETING * 100)


def answers_an_option_for_ever(server: Server) -> None:
    server.send(GREETING)
    server.read(4)
    option = server.option()
    while True:
        server.send(answer(option, 3, bytes(4096)))


def answers_each_option_a_little_late(server: Server) -> None:
    server.send(GREETING)
    server.read(4)
    option = server.option()
    while True:
        server.send(answer(option, 3))
        time.sleep(LIMIT * 0.6)


def begins_tls_and_drips(server: Server) -> None:
    server.send(GREETING)
    server.read(4)
    assert server.option() == START_TLS
    server.send(answer(START_TLS, 1))
    server.drip(b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc" + bytes(16000))


def test_what_somebody_says_in_the_clear_where_tls_begins(tmp_path: Path) -> None:
    """Before the server could encrypt it, and so that the client would believe it after."""

    def serve(server: Server) -> None:
        server.send(GREETING)
        server.read(4)
        assert server.option() == START_TLS
        server.send(answer(START_TLS, 1) + answer(STRUCTURED, 1))
        server.read(1)

    with serving(tmp_path, serve) as uri:
        secret = uri.replace("nbd+unix:", "nbds+unix:")
        assert "in the clear" in ends_in_an_error(lambda: NbdDisk(secret, timeout=10))


def test_tls_records_without_any_data_do_not_go_on_for_ever(tmp_path: Path) -> None:
    """Tickets for sessions that nobody will resume: each is progress, and none of them is an answer."""
    certificates = make_certificates(tmp_path / "pki")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "server-cert.pem", certificates / "server-key.pem")
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 20_000

    def serve(server: Server) -> None:
        server.send(GREETING)
        server.read(4)
        assert server.option() == START_TLS
        server.send(answer(START_TLS, 1))
        server.encrypt(context)
        while True:
            server.send(answer(server.option(), 1))

    with serving(tmp_path, serve) as uri:
        secret = uri.replace("nbd+unix:", "nbds+unix:") + f"&tls-certificates={certificates}"
        assert "without any data" in ends_in_an_error(lambda: NbdDisk(secret))


@pytest.mark.parametrize(
    "behave",
    [
        greets_byte_by_byte,
        answers_an_option_for_ever,
        answers_each_option_a_little_late,
        begins_tls_and_drips,
    ],
)
def test_handshakes_that_do_not_end(behave: Callable[[Server], None], tmp_path: Path) -> None:
    with serving(tmp_path, behave) as uri:
        if behave is begins_tls_and_drips:
            uri = uri.replace("nbd+unix:", "nbds+unix:")
        ends_in_an_error(lambda: NbdDisk(uri, timeout=LIMIT))


def drips_the_header(server: Server) -> None:
    _, cookie, offset, length = server.request()
    server.drip(chunk(cookie, 1, struct.pack(">Q", offset) + bytes(length)))


def drips_the_data(server: Server) -> None:
    _, cookie, offset, length = server.request()
    whole = chunk(cookie, 1, struct.pack(">Q", offset) + bytes(length))
    server.send(whole[:40])
    server.drip(whole[40:])


def sends_one_byte_in_each_chunk(server: Server) -> None:
    _, cookie, offset, length = server.request()
    for at in range(offset, offset + length):
        server.send(chunk(cookie, 1, struct.pack(">Q", at) + b"x", done=False))
        time.sleep(LIMIT * 0.4)


def reports_errors_for_ever(server: Server) -> None:
    _, cookie, _, _ = server.request()
    while True:
        server.send(chunk(cookie, 0x8001, struct.pack(">IH", 5, 60000) + b"\x1b" * 60000, done=False))


def reports_small_errors_for_ever(server: Server) -> None:
    _, cookie, _, _ = server.request()
    while True:
        server.send(chunk(cookie, 0x8002, struct.pack(">IHQ", 5, 0, 0), done=False) * 100)


def sends_the_same_data_for_ever(server: Server) -> None:
    _, cookie, offset, length = server.request()
    while True:
        server.send(chunk(cookie, 1, struct.pack(">Q", offset) + bytes(length), done=False))


def is_silent(server: Server) -> None:
    server.request()
    time.sleep(0)
    server.read(1)


@pytest.mark.parametrize(
    "behave",
    [
        drips_the_header,
        drips_the_data,
        sends_one_byte_in_each_chunk,
        reports_errors_for_ever,
        reports_small_errors_for_ever,
        sends_the_same_data_for_ever,
        is_silent,
    ],
)
def test_replies_that_do_not_end(behave: Callable[[Server], None], tmp_path: Path) -> None:
    def serve(server: Server) -> None:
        server.shake()
        behave(server)

    with serving(tmp_path, serve) as uri, NbdDisk(uri, timeout=LIMIT) as disk:
        ends_in_an_error(lambda: disk.read(0, 4096))
        with pytest.raises(DiskError):  # at once: the connection is of no use any more
            disk.read(0, 512)


def test_a_server_that_takes_nothing(tmp_path: Path) -> None:
    over = threading.Event()

    def serve(server: Server) -> None:
        server.shake()
        over.wait(ENDS)

    with serving(tmp_path, serve, size=64 * MIB) as uri:
        with NbdDisk(uri, timeout=LIMIT) as disk:
            ends_in_an_error(lambda: disk.write(0, bytes(32 * MIB)))
        over.set()


def test_a_request_that_is_overtaken_for_ever(tmp_path: Path) -> None:
    """The connection is never silent, and the others' requests are answered at once."""

    def serve(server: Server) -> None:
        server.shake()
        while True:
            _, cookie, offset, length = server.request()
            if offset:
                server.send(chunk(cookie, 1, struct.pack(">Q", offset) + bytes(length)))

    with serving(tmp_path, serve) as uri, NbdDisk(uri, timeout=0.05) as disk:
        over = threading.Event()

        def others() -> None:
            with suppress(DiskError):
                while not over.is_set():
                    disk.read(512, 512)

        thread = threading.Thread(target=others)
        thread.start()
        sentence = ends_in_an_error(lambda: disk.read(0, 512))
        over.set()
        thread.join(ENDS)
        assert "answers other requests" in sentence or "does not answer" in sentence


@pytest.mark.slow
def test_a_server_that_tells_the_state_of_one_sector_at_a_time(tmp_path: Path) -> None:
    """Of a disk of 8 EiB: the rest counts as allocated, which is never wrong."""

    def serve(server: Server) -> None:
        server.shake()
        while True:
            command, cookie, _, _ = server.request()
            if command != BLOCK_STATUS:
                return
            server.send(chunk(cookie, 5, struct.pack(">III", 7, 512, 3)))

    size = 1 << 62
    with serving(tmp_path, serve, size=size) as uri, NbdDisk(uri) as disk:
        extents = list(disk.extents(0, size))
    assert sum(extent.length for extent in extents) == size
    assert [extent.allocated for extent in extents] == [False, True]


@pytest.mark.parametrize("where", ["read", "handshake"])
def test_the_words_of_a_server_cannot_command_a_terminal(where: str, tmp_path: Path) -> None:
    evil = "\x1b]0;x\x07\u202e\r\n".encode() + b"\xff" + b"x" * 5000

    def serve(server: Server) -> None:
        if where == "handshake":
            server.send(GREETING)
            server.read(4)
            while True:
                server.send(answer(server.option(), (1 << 31) + 2, evil))
        server.shake()
        _, cookie, _, _ = server.request()
        server.send(chunk(cookie, 0x8001, struct.pack(">IH", 5, len(evil)) + evil))

    with serving(tmp_path, serve) as uri:
        with pytest.raises(DiskError) as caught, NbdDisk(uri) as disk:
            disk.read(0, 512)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 600


def test_an_interrupted_request_never_gives_its_data_to_another(tmp_path: Path) -> None:
    """Ctrl-C in the middle of a reply: what follows on the connection is no beginning of anything."""
    over, main = threading.Event(), threading.get_ident()

    def serve(server: Server) -> None:
        server.shake()
        _, cookie, offset, length = server.request()
        whole = chunk(cookie, 1, struct.pack(">Q", offset) + b"1" * length)
        server.send(whole[:100])
        signal.pthread_kill(main, signal.SIGINT)
        over.wait(ENDS)
        server.send(whole[100:])

    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # whoever started the tests may ignore it
    try:
        with serving(tmp_path, serve) as uri, NbdDisk(uri) as disk:
            with pytest.raises(KeyboardInterrupt):
                disk.read(0, 4096)
            over.set()
            with pytest.raises(DiskError, match="interrupted"):
                disk.read(0, 4096)
    finally:
        signal.signal(signal.SIGINT, before)

"""The NBD client's state machine against servers that follow the protocol, and against some that do not."""

import errno
import random
import struct
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmbus.errors import DeviceError, LocalProtocolError, RemoteProtocolError, VmbusError
from vmbus.storage.images.nbd_protocol import NbdClient, Reply
from vmbus.storage.images.nbd_wire import Command

SIZE = 1 << 20
FLAGS = 1 | 4 | 8 | 64
GREETING = struct.pack(">8sQH", b"NBDMAGIC", 0x49484156454F5054, 3)
GO, STRUCTURED, META = 7, 8, 10
UNSUPPORTED = (1 << 31) + 1


def answer(option: int, kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", 0x3E889045565A9, option, kind, len(data)) + data


def feed(client: NbdClient, data: bytes) -> bytes:
    """Give the client all of it; returns what is left when it is ready or satisfied."""
    while len(data) >= client.needs:
        part, data = data[: client.needs], data[client.needs :]
        client.feed(part)
        if not data:
            break
    return data


EXPORT = struct.pack(">HQH", 0, SIZE, FLAGS)
SHAKE = (
    GREETING
    + answer(STRUCTURED, 1)
    + answer(META, 4, struct.pack(">I", 7) + b"base:allocation")
    + answer(META, 1)
    + answer(GO, 3, EXPORT)
    + answer(GO, 3, struct.pack(">HIII", 3, 512, 4096, 1 << 20))
    + answer(GO, 1)
)


def connected(shake: bytes = SHAKE) -> NbdClient:
    client = NbdClient("disk")
    assert feed(client, shake) == b""
    assert client.ready
    client.outgoing.clear()
    return client


def chunk(cookie: int, kind: int, data: bytes = b"", *, done: bool = True) -> bytes:
    return struct.pack(">IHHQI", 0x668E33EF, int(done), kind, cookie, len(data)) + data


def test_the_handshake() -> None:
    client = NbdClient("disk")
    assert not client.ready
    feed(client, GREETING)
    assert bytes(client.outgoing) == struct.pack(">I", 3) + struct.pack(">8sII", b"IHAVEOPT", STRUCTURED, 0)
    client = connected()
    export = client.export
    assert (export.size, export.flags, export.minimum_block, export.maximum_block) == (
        SIZE,
        FLAGS,
        512,
        1 << 20,
    )
    assert export.structured
    assert export.allocation_context == 7


def test_tls_comes_before_anything_else_is_said() -> None:
    client = NbdClient("disk", tls=True)
    feed(client, GREETING)
    assert bytes(client.outgoing) == struct.pack(">I8sII", 3, b"IHAVEOPT", 5, 0)
    assert not client.wants_tls
    client.outgoing.clear()
    feed(client, answer(5, 1))
    assert client.wants_tls
    assert bytes(client.outgoing) == struct.pack(">8sII", b"IHAVEOPT", STRUCTURED, 0)  # to be sent encrypted
    client.wants_tls = False
    feed(client, SHAKE[len(GREETING) :])
    assert client.ready


@pytest.mark.parametrize("number", [1, 2, 3, 99])
def test_a_server_without_tls_is_given_up(number: int) -> None:
    client = NbdClient("disk", tls=True)
    with pytest.raises(DeviceError, match="refuses to encrypt"):
        feed(client, GREETING + answer(5, (1 << 31) + number))
    assert not client.ready


def test_a_server_may_report_many_errors_but_not_for_ever() -> None:
    client = connected()
    cookie = client.submit(Command.READ, 0, 1 << 20)
    one = chunk(cookie, 0x8002, struct.pack(">IH3sQ", errno.EIO, 3, b"bad", 0), done=False)
    feed(client, one * 2048)  # one for each sector
    with pytest.raises(RemoteProtocolError, match="without an end"):
        feed(client, one * 4096)


def test_a_read_never_brings_more_than_was_asked_for() -> None:
    client = connected()
    cookie = client.submit(Command.READ, 0, 4096)
    one = chunk(cookie, 1, bytes(8) + bytes(4096), done=False)
    with pytest.raises(RemoteProtocolError, match="not asked for"):
        feed(client, one * 2)


def test_a_server_that_knows_only_the_option_of_old() -> None:
    shake = GREETING + answer(STRUCTURED, UNSUPPORTED) + answer(GO, UNSUPPORTED) + struct.pack(">QH", SIZE, 1)
    client = connected(shake)
    assert (client.export.size, client.export.structured, client.export.allocation_context) == (
        SIZE,
        False,
        None,
    )


def test_a_server_that_pads_with_zeroes() -> None:
    greeting = struct.pack(">8sQH", b"NBDMAGIC", 0x49484156454F5054, 1)
    shake = greeting + answer(STRUCTURED, UNSUPPORTED) + answer(GO, UNSUPPORTED)
    client = connected(shake + struct.pack(">QH", SIZE, 1) + bytes(124))
    assert client.export.size == SIZE


@pytest.mark.parametrize(
    ("shake", "sentence"),
    [
        (bytes(18), "does not speak NBD"),
        (struct.pack(">8sQH", b"NBDMAGIC", 0x420281861253, 0), "old handshake"),
        (struct.pack(">8sQH", b"NBDMAGIC", 0x49484156454F5054, 0), "fixed newstyle"),
        (GREETING + answer(GO, 1), "to another option"),
        (GREETING + bytes(20), "to another option"),
        (GREETING + struct.pack(">QIII", 0x3E889045565A9, STRUCTURED, 3, 1 << 31), "absurd"),
        (GREETING + answer(STRUCTURED, 3) * 64, "without an end"),
        (GREETING + answer(STRUCTURED, 1) + answer(META, 1) + answer(GO, 1), "how large the export is"),
        (
            GREETING
            + answer(STRUCTURED, 1)
            + answer(META, 1)
            + answer(GO, 3, struct.pack(">HIII", 3, 3, 4096, 8192)),
            "block sizes from 3",
        ),
        (GREETING + answer(STRUCTURED, 1) + answer(META, 1) + answer(GO, 3, b"\0\0\0"), "truncated"),
    ],
)
def test_handshakes_that_break_the_rules(shake: bytes, sentence: str) -> None:
    client = NbdClient("disk")
    with pytest.raises(RemoteProtocolError, match=sentence):
        feed(client, shake)
    assert not client.ready


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (6, "no such export"),
        (5, "TLS"),
        (2, "policy"),
        (7, "shutting down"),
        (8, "block sizes"),
        (99, "0x80000063"),
    ],
)
def test_refusals(number: int, sentence: str) -> None:
    client = NbdClient("disk")
    with pytest.raises(DeviceError, match=sentence):
        feed(client, GREETING + answer(STRUCTURED, UNSUPPORTED) + answer(GO, (1 << 31) + number))


def test_requests_wait_for_the_handshake() -> None:
    client = NbdClient("disk")
    with pytest.raises(LocalProtocolError):
        client.submit(Command.READ, 0, 512)
    with pytest.raises(LocalProtocolError):
        client.feed(b"x")
    with pytest.raises(LocalProtocolError):
        NbdClient("x" * 5000)


def test_replies_in_another_order_and_in_pieces() -> None:
    client = connected()
    one = client.submit(Command.READ, 4096, 8192)
    two = client.submit(Command.WRITE, 0, 512, bytes(512))
    three = client.submit(Command.READ, 0, 512)
    assert len(client.outgoing) == 3 * 28 + 512
    feed(client, chunk(three, 1, struct.pack(">Q", 0) + b"c" * 512))
    feed(client, chunk(one, 1, struct.pack(">Q", 8192) + b"b" * 4096, done=False))
    assert client.is_done(three)
    assert not client.is_done(one)
    feed(client, chunk(two, 0))
    feed(client, chunk(one, 2, struct.pack(">QI", 4096, 4096)))
    assert bytes(client.take(one).data) == bytes(4096) + b"b" * 4096
    assert client.take(two).error == 0
    assert bytes(client.take(three).data) == b"c" * 512


def test_simple_replies_without_structure() -> None:
    client = connected(GREETING + answer(STRUCTURED, UNSUPPORTED) + answer(GO, 3, EXPORT) + answer(GO, 1))
    one, two = client.submit(Command.READ, 0, 512), client.submit(Command.READ, 512, 512)
    feed(client, struct.pack(">IIQ", 0x67446698, 0, two) + b"2" * 512)
    feed(client, struct.pack(">IIQ", 0x67446698, errno.EIO, one))
    assert bytes(client.take(two).data) == b"2" * 512
    assert client.take(one).error == errno.EIO


def test_block_status() -> None:
    client = connected()
    cookie = client.submit(Command.BLOCK_STATUS, 0, 65536)
    feed(client, chunk(cookie, 5, struct.pack(">IIIII", 7, 4096, 0, 61440, 3)))
    assert client.take(cookie).status == [(4096, 0), (61440, 3)]


def test_errors_with_words_and_unknown_numbers() -> None:
    client = connected()
    one, two = client.submit(Command.READ, 0, 512), client.submit(Command.WRITE, 0, 512, bytes(512))
    feed(client, chunk(one, 0x8001, struct.pack(">IH", errno.ENOSPC, 4) + b"full"))
    feed(client, chunk(two, 0x8002, struct.pack(">IHQ", 0xFFFFFFF0, 0, 0)))
    reply = client.take(one)
    assert (reply.error, reply.message) == (errno.ENOSPC, "full")
    assert client.take(two).error == errno.EIO


Break = Callable[[int], bytes]
BROKEN: dict[str, Break] = {
    "unknown magic": lambda c: struct.pack(">I", 0x12345678),
    "unknown cookie": lambda c: chunk(c + 1, 0),
    "simple reply to a structured read": lambda c: struct.pack(">IIQ", 0x67446698, 0, c),
    "none with content": lambda c: chunk(c, 0, b"1234"),
    "none that is not the last": lambda c: chunk(c, 0, done=False),
    "data before the range": lambda c: chunk(c, 1, struct.pack(">Q", 0) + bytes(512)),
    "data behind the range": lambda c: chunk(c, 1, struct.pack(">Q", 8192) + bytes(512)),
    "data at the end of all offsets": lambda c: chunk(c, 1, struct.pack(">Q", (1 << 64) - 512) + bytes(512)),
    "too many data": lambda c: struct.pack(">IHHQI", 0x668E33EF, 1, 1, c, 0xFFFFFFFF),
    "no data": lambda c: chunk(c, 1, struct.pack(">Q", 4096)),
    "empty hole": lambda c: chunk(c, 2, struct.pack(">QI", 4096, 0)),
    "hole of another size": lambda c: chunk(c, 2, bytes(16)),
    "gap": lambda c: chunk(c, 1, struct.pack(">Q", 4096) + bytes(512)),
    "twice": lambda c: (
        chunk(c, 2, struct.pack(">QI", 4096, 4096), done=False) + chunk(c, 2, struct.pack(">QI", 4096, 4096))
    ),
    "done without data": lambda c: chunk(c, 0),
    "status for a read": lambda c: chunk(c, 5, struct.pack(">III", 7, 4096, 0)),
    "unknown type": lambda c: chunk(c, 77, bytes(8)),
    "error without a number": lambda c: chunk(c, 0x8001, b"12"),
    "endless error": lambda c: struct.pack(">IHHQI", 0x668E33EF, 1, 0x8001, c, 1 << 30),
}


@pytest.mark.parametrize("name", BROKEN)
def test_replies_that_break_the_rules(name: str) -> None:
    client = connected()
    cookie = client.submit(Command.READ, 4096, 4096)
    with pytest.raises(RemoteProtocolError):
        feed(client, BROKEN[name](cookie))


@pytest.mark.parametrize(
    "data",
    [
        struct.pack(">III", 8, 4096, 0),
        struct.pack(">III", 7, 0, 0),
        struct.pack(">I", 7),
        struct.pack(">IQ", 7, 1) + b"1",
    ],
)
def test_block_status_that_breaks_the_rules(data: bytes) -> None:
    client = connected()
    cookie = client.submit(Command.BLOCK_STATUS, 0, 4096)
    with pytest.raises(RemoteProtocolError):
        feed(client, chunk(cookie, 5, data))


def test_an_answer_after_the_answer_is_an_error() -> None:
    client = connected()
    cookie = client.submit(Command.FLUSH, 0, 0)
    feed(client, chunk(cookie, 0))
    with pytest.raises(RemoteProtocolError, match="not pending"):
        feed(client, chunk(cookie, 0))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300), st.integers(0, len(SHAKE)))
def test_any_bytes_at_all_are_an_error_or_nothing(noise: bytes, kept: int) -> None:
    client = NbdClient("disk")
    pending: list[int] = []
    rest = SHAKE[:kept] + noise
    try:
        while len(rest) >= client.needs:
            part, rest = rest[: client.needs], rest[client.needs :]
            client.feed(part)
            if client.ready and not pending:
                pending = [client.submit(Command.READ, 0, 64), client.submit(Command.BLOCK_STATUS, 0, 4096)]
            assert client.needs <= 32 << 20
    except VmbusError:
        return


@pytest.mark.parametrize("seed", range(20))
def test_bits_flipped_in_good_answers(seed: int) -> None:
    """Whatever happens, a reply that counts as good has all of its data."""
    rnd = random.Random(seed)
    for _ in range(100):
        client = connected()
        reads = [client.submit(Command.READ, at * 512, 512) for at in range(4)]
        stream = bytearray()
        for at, cookie in enumerate(reads):
            stream += chunk(cookie, 1, struct.pack(">Q", at * 512) + bytes([at]) * 512)
        for _ in range(rnd.randrange(1, 4)):
            stream[rnd.randrange(len(stream))] ^= 1 << rnd.randrange(8)
        try:
            feed(client, bytes(stream))
        except RemoteProtocolError:
            continue
        for cookie in reads:
            if client.is_done(cookie):
                reply: Reply = client.take(cookie)
                assert reply.error or len(reply.data) == 512

"""How long an NBD server is waited for, on a clock of the tests' own: slow means slow, and not a busy machine."""

import socket
from collections.abc import Iterator

import pytest
from reference.slow_peer import Script, SlowPeer

from vmbus.storage.images.nbd_link import LEAST_RATE, Link

KIB, MIB = 1 << 10, 1 << 20
LIMIT = 4.0


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowPeer]:
    made = SlowPeer(monkeypatch)
    yield made
    made.close()


@pytest.fixture
def link(peer: SlowPeer) -> Iterator[Link]:
    made = Link(peer.ours, LIMIT)
    made.shaken()
    yield made
    made.close()


def gives(count: int, piece: int, delay: float) -> Script:
    """So many bytes, a piece after each delay."""
    for start in range(0, count, piece):
        part = bytes(min(piece, count - start))
        yield delay, lambda peer, part=part: peer.sendall(part)  # type: ignore[misc]


def takes(piece: int, delay: float) -> Script:
    """Whatever comes, a piece after each delay, for ever."""

    def take(peer: socket.socket) -> None:
        try:
            peer.recv(piece)
        except BlockingIOError:
            return

    while True:
        yield delay, take


def messages(link: Link, *, answered: bool, count: int = 1000) -> None:
    """Receive messages of 20 bytes, each of which is an answer or is not."""
    for _ in range(count):
        link.receive(20)
        if answered:
            link.answered()


def test_silence_ends_after_the_limit(peer: SlowPeer, link: Link) -> None:
    with pytest.raises(TimeoutError, match="does not answer"):
        link.receive(1)
    assert peer.now == pytest.approx(LIMIT, abs=0.1)


@pytest.mark.parametrize(("piece", "delay"), [(LEAST_RATE, 0.9), (20 * KIB, 3.9), (100, 0.02)])
def test_a_slow_link_has_all_the_time_it_needs(peer: SlowPeer, link: Link, piece: int, delay: float) -> None:
    peer.play(gives(MIB, piece, delay))
    assert link.receive(MIB) == bytes(MIB)
    assert peer.now > 10 * LIMIT


@pytest.mark.parametrize(("piece", "delay"), [(1, 0.6), (1, 3.9), (100, 1), (LEAST_RATE, 2)])
@pytest.mark.parametrize("length", [4, 4096, MIB])
def test_a_drip_is_bounded_however_it_is_spread(
    peer: SlowPeer, link: Link, piece: int, delay: float, length: int
) -> None:
    peer.play(gives(length, piece, delay))
    most = LIMIT + length / LEAST_RATE
    try:
        link.receive(length)
    except TimeoutError as error:
        assert "slower than 4096 bytes a second" in str(error)  # noqa: PT017  (short ones may get through)
    assert peer.now <= most + 0.01


def test_a_drip_over_many_messages_is_one_drip(peer: SlowPeer, link: Link) -> None:
    """A message that completes nothing does not begin the limit anew; an answer does."""
    peer.play(gives(MIB, 20, 2.0))
    with pytest.raises(TimeoutError):
        messages(link, answered=False)
    assert peer.now < 2 * LIMIT
    link.answered()
    began = peer.now
    messages(link, answered=True, count=100)
    assert peer.now - began > 100


def test_the_handshake_is_bounded_as_a_whole(peer: SlowPeer) -> None:
    """However many answers it is stretched over."""
    link = Link(peer.ours, LIMIT)
    peer.play(gives(MIB, 20, 0.9 * LIMIT))
    with pytest.raises(TimeoutError, match="end of the handshake"):
        messages(link, answered=True)
    assert peer.now == pytest.approx(4 * LIMIT, abs=0.1)
    link.close()


@pytest.mark.parametrize(("piece", "delay"), [(20 * KIB, 0.9), (80 * KIB, 3.9)])
def test_a_slow_taker_has_all_the_time_it_needs(peer: SlowPeer, link: Link, piece: int, delay: float) -> None:
    """Unix sockets show what was taken in steps of some 40 KiB."""
    peer.play(takes(piece, delay))
    link.send(bytes(4 * MIB))
    assert peer.now > 10 * LIMIT


def test_who_takes_nothing_is_given_up(peer: SlowPeer, link: Link) -> None:
    with pytest.raises(TimeoutError, match=r"takes nothing|slower than"):
        link.send(bytes(16 * MIB))
    assert peer.now <= 2 * LIMIT


def test_who_takes_a_byte_now_and_then_is_given_up(peer: SlowPeer, link: Link) -> None:
    peer.play(takes(1, 0.5))
    with pytest.raises(TimeoutError, match="slower than"):
        link.send(bytes(16 * MIB))
    assert peer.now < 20 * LIMIT


def test_who_still_takes_what_was_sent_may_answer_later(peer: SlowPeer, link: Link) -> None:
    """The host's buffers have it all; the link to the server does not yet."""
    sent = 0
    peer.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MIB)
    while True:  # fill them
        try:
            sent += peer.ours.send(bytes(4 * KIB))
        except BlockingIOError:
            break

    def script() -> Script:
        drain = takes(4 * KIB, 0.5)
        for _ in range(sent // (4 * KIB)):
            yield next(drain)
        yield 1.0, lambda peer: peer.sendall(b"done")

    peer.play(script())
    assert link.receive(4) == b"done"
    assert peer.now > 4 * LIMIT


def test_time_in_which_this_process_did_not_run_is_not_the_servers(
    peer: SlowPeer, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(peer_end: socket.socket) -> None:
        peer.now += 3600  # stopped, and continued an hour later
        peer_end.sendall(b"x" * 4096)

    def script() -> Script:
        yield 0.1, late
        yield 0.5, lambda peer: peer.sendall(b"y" * 4096)

    peer.play(script())
    assert link.receive(8192) == b"x" * 4096 + b"y" * 4096

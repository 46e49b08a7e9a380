"""Ethernet frames from one model guest to another through the virtual switch, beside what the host's kernel offers.

One operation is one frame, from the sender's call to the receiver's list. All contestants move the same frames in
batches of the same size, on one thread, doorbells included.
"""

import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

from benchmarks.harness import Case, Comparison, Row, Run, at_most_ns, faster, rows_of, timed
from vmbus.bus.channel import loopback
from vmbus.core.memory import GuestMemory
from vmbus.errors import DeviceError
from vmbus.network.switch import Switch
from vmbus.network.uplink import TapUplink
from vmbus.network.vsc import NetworkVsc, default_page_count
from vmbus.network.vsp import NetworkVsp
from vmbus.network.vsp_oid import AdapterConfig

BATCH = 256
SIZES = (64, 1500)
"""Bytes of a frame, without its frame check sequence."""
FIRST_PAGE = 64
RING_PAGES = 32


def mac(number: int) -> bytes:
    return b"\x00\x15\x5d\0\0" + bytes([number])


def frames_of(size: int, count: int = BATCH) -> list[bytes]:
    return [mac(2) + mac(1) + b"\x88\xb5" + n.to_bytes(2, "big") * ((size - 14) // 2) for n in range(count)]


def check(got: list[bytes], size: int) -> None:
    if got != frames_of(size):
        raise AssertionError("the frames that came are not those that went")


def in_batches(size: int, move: Callable[[list[bytes]], list[bytes]]) -> Run:
    """A run of a function that moves a list of frames and returns what came out."""
    frames = frames_of(size)
    check(move(frames), size)

    def work(count: int) -> None:
        while count > 0:
            part = frames if count >= BATCH else frames[:count]
            if len(move(part)) != len(part):
                raise AssertionError("frames were lost")
            count -= len(part)

    return timed(work)


@contextmanager
def guests(size: int, plain: bool) -> Iterator[Run]:
    """Two model guests with an adapter each; with `plain` false all in Python, without the compiled path."""
    switch = Switch()
    clients = []
    for number in (1, 2):
        memory = GuestMemory(16 << 20)
        guest, host = loopback(memory, RING_PAGES, RING_PAGES)
        vsp = NetworkVsp(host, switch.connect(f"guest{number}"), AdapterConfig(mac(number)))
        pages = range(FIRST_PAGE, FIRST_PAGE + default_page_count(receive_sections=768, send_sections=128))
        client = NetworkVsc(guest, list(pages))
        if not plain:
            vsp.use_compiled_path = client.use_compiled_path = False
        clients.append(client)
    sender, receiver = clients
    if receiver.send_batch([mac(1) + mac(2) + b"\x88\xb5" + bytes(46)]) != 1 or not sender.receive():
        raise AssertionError("the switch did not learn")

    def move(frames: list[bytes]) -> list[bytes]:
        sent, got = 0, []
        while sent < len(frames):
            sent += sender.send_batch(frames[sent:] if sent else frames)
            got += receiver.receive(BATCH)
        return got

    yield in_batches(size, move)
    for client in clients:
        client.close()


@contextmanager
def seqpacket(size: int) -> Iterator[Run]:
    """A socketpair that keeps packets apart: a write and a read a frame."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right:
        left.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)

        def move(frames: list[bytes]) -> list[bytes]:
            got: list[bytes] = []
            for start in range(0, len(frames), 32):  # what the socket's buffer holds
                part = frames[start : start + 32]
                for frame in part:
                    left.send(frame)
                got += [right.recv(2048) for _ in part]
            return got

        yield in_batches(size, move)


@contextmanager
def taps(size: int) -> Iterator[Run]:
    """Two TAP interfaces that a kernel bridge joins: a write and a read a frame."""
    bridge = f"vmb{os.getpid() % 100000}"

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    with TapUplink() as left, TapUplink() as right:
        ip("link", "add", bridge, "type", "bridge", "forward_delay", "0", "mcast_snooping", "0")
        try:
            for name in (left.name, right.name):
                with suppress(OSError), open(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6", "w") as off:
                    off.write("1")
                ip("link", "set", name, "master", bridge, "up")
            ip("link", "set", bridge, "up")
            right.send([mac(1) + mac(2) + b"\x88\xb5" + bytes(46)])  # the bridge learns, too

            def move(frames: list[bytes]) -> list[bytes]:
                left.send(frames)
                got: list[bytes] = []
                for _ in range(1000):
                    got += [f for f in right.receive(BATCH) if f[12:14] == b"\x88\xb5"]
                    if len(got) >= len(frames):
                        break
                return got

            yield in_batches(size, move)
        finally:
            ip("link", "del", bridge)


def no_taps() -> str | None:
    """Why TAP interfaces cannot be made here."""
    if shutil.which("ip") is None:
        return "no ip command"
    try:
        with TapUplink():
            return None
    except DeviceError:
        return "no permission to make TAP interfaces"


@contextmanager
def copies(size: int) -> Iterator[Run]:
    """The floor of anything that hands out Python objects: a copy of every frame."""
    yield in_batches(size, lambda frames: [bytes(memoryview(frame)) for frame in frames])


def comparison(size: int) -> Comparison:
    name = f"a {size}-byte frame, batches of {BATCH}"
    peers = [
        (Case("socketpair(SOCK_SEQPACKET)", partial(seqpacket, size)), faster(1)),
        (Case("two TAPs and a kernel bridge", partial(taps, size), why_not=no_taps), faster(1)),
        (Case("the same in Python", partial(guests, size, False)), faster(10)),
    ]
    if size == 64:
        peers.append((Case("a copy of each frame", partial(copies, size)), at_most_ns(1000)))
    return Comparison(name, Case("guest to guest", partial(guests, size, True)), peers)


COMPARISONS = [comparison(size) for size in SIZES]


def rows(quick: bool) -> Iterator[Row]:
    """All rows of this topic."""
    return rows_of(COMPARISONS, quick)

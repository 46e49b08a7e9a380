"""Fuzz target: the parsers of RNDIS and of what offloads look at, on any bytes; the compiled against the slow."""

import random
from contextlib import suppress

from reference.fuzz import Fuzz
from reference.mutation import mutate
from reference.netpair import frame, mac

from vmbus.core import netio
from vmbus.core.memory import Window
from vmbus.core.ring import IN_BAND, RingReader, RingWriter
from vmbus.errors import ProtocolError
from vmbus.network import offload, rndis, wire
from vmbus.network.rndis import Frame, LargeSend, TransmitChecksum
from vmbus.network.wire import MessageType

MOST = 32
CONTROLS = [
    rndis.pack_control(kind, structure.unpack(bytes(structure.SIZE)), bytes(20))
    for kind, structure in rndis.CONTROL_MESSAGES.items()
]


def some_frame(rng: random.Random) -> bytes:
    """Something like IPv4 or IPv6 with TCP or UDP, or not."""
    transport = rng.choice((b"\x06", b"\x11", b"\x06", rng.randbytes(1)))
    payload = rng.randbytes(rng.choice((0, 1, 40, 200, 1500)))
    if rng.random() < 0.5:
        total = (20 + len(payload)).to_bytes(2, "big")
        body = b"\x45\0" + total + bytes(4) + b"\x40" + transport + bytes(2) + rng.randbytes(8) + payload
        kind = 0x800
    else:
        body = (
            b"\x60\0\0\0"
            + len(payload).to_bytes(2, "big")
            + transport
            + b"\x40"
            + rng.randbytes(32)
            + payload
        )
        kind = 0x86DD
    return frame(mac(2), mac(1), mutate(rng, body, (0, 0, 1, 2)), kind)


def parses_alike(rng: random.Random) -> None:
    to_host, from_host = Window.allocate(4), Window.allocate(4)
    writer = RingWriter(to_host)
    pool = netio.ReceivePool(Window.allocate(8), 2048, 8)
    queue = netio.HostQueue(RingReader(to_host), RingWriter(from_host), pool, 3, 0xCAFE, bytes(32), bytes(32))
    buffer = Window.allocate(8)
    queue.use_send_buffer(buffer, 8192, 4)
    view = buffer.view()
    answers = RingReader(from_host)
    for number in range(200):
        offers = {"vlan": rng.getrandbits(13)} if rng.random() < 0.2 else {}
        message = b"".join(
            rndis.pack_packet(Frame(some_frame(rng)[:1514], **offers), alignment=rng.choice((4, 8)))
            for _ in range(rng.choice((1, 1, 2, 4)))
        )
        message = mutate(rng, message, (0, 1, 1, 2))[:8192]
        view[: len(message)] = message
        request = wire.SendRndisPacket(0, 0, len(message))
        writer.send(wire.pack_message(MessageType.SEND_RNDIS_PACKET, request), number + 1, IN_BAND, 1)
        try:
            slow = [part.data for part in rndis.unpack_packets(message, MOST)]
        except ProtocolError:
            slow = []
        frames: list[bytes] = []
        taken, reason, _ = queue.drain(frames, 10)
        if taken:  # the compiled parser takes nothing that the slow one would not take
            assert frames == slow
        else:
            assert reason == netio.SLOW
            assert not frames
            return  # it waits for Python; the next case has rings of its own
        answers.recv_packets(64)


def other_parsers(rng: random.Random) -> None:
    for _ in range(100):
        data = mutate(rng, some_frame(rng))
        offload.check(data)
        layers = offload.parse(data)
        assert layers is None or layers.transport <= layers.end <= len(data)
        for group in offload.coalesce([data, data, mutate(rng, data)]):
            assert group
        flags = [rng.random() < 0.5 for _ in range(5)]
        with suppress(ProtocolError):
            done = offload.complete(data, TransmitChecksum(*flags, rng.getrandbits(10)))
            assert len(done) == len(data)
        with suppress(ProtocolError):
            parts = offload.segment(data, LargeSend(rng.choice((0, 1, 536, 1400)), rng.getrandbits(10)))
            assert sum(map(len, parts)) >= len(data)
        control = rng.choice(CONTROLS)
        with suppress(ProtocolError):
            rndis.unpack_control(mutate(rng, control))


def parsers(rng: random.Random) -> None:
    (parses_alike if rng.random() < 0.7 else other_parsers)(rng)


def test_rndis(fuzz: Fuzz) -> None:
    fuzz.run(parsers, cases=45_000)

"""Fuzz target: a host that sends anything to the network client."""

import random

from reference.fuzz import Fuzz
from reference.mutation import WORDS, mutate
from reference.netpair import frame, mac
from reference.network_attacker import GOOD, fragment, put, seized_host

from vmbus.core.ring import COMPLETION
from vmbus.errors import RingFull, VmbusError
from vmbus.network import rndis, wire
from vmbus.network.rndis import Frame
from vmbus.network.vsc import MAX_RECEIVED
from vmbus.network.wire import Version, pack_message

MESSAGES = [
    pack_message(kind, info.structure.unpack(bytes(info.structure.SIZE)), Version.V6_1)
    for kind, info in wire.MESSAGES.items()
]
CONTROLS = [
    rndis.pack_control(kind, structure.unpack(bytes(structure.SIZE)))
    for kind, structure in rndis.CONTROL_MESSAGES.items()
]
SECTION = 1808


def some_packet(rng: random.Random) -> bytes:
    informed = Frame(
        frame(mac(1), mac(2), bytes(60), 0x800), checksum=rng.getrandbits(12), vlan=rng.getrandbits(13)
    )
    return rng.choice(
        [GOOD, GOOD, fragment(rng.getrandbits(3), bytes(99)), rndis.pack_packet(informed), *CONTROLS]
    )


def a_host_that_may_send_anything(rng: random.Random) -> None:
    host, guest = seized_host()
    nic = guest.nic
    nic.timeout = 0.01
    for _ in range(rng.randrange(1, 300)):
        if not nic.is_open:
            break
        try:
            choice = rng.random()
            if choice < 0.6:
                ranges = []
                for number in range(rng.randrange(1, 6)):
                    data = mutate(rng, some_packet(rng), (0, 0, 1, 1, 3))
                    put(guest, number * SECTION, data[:SECTION])
                    ranges.append((len(data), number * SECTION))
                if rng.random() < 0.2:
                    ranges.append((rng.choice((*WORDS, 100)), rng.choice((*WORDS, rng.getrandbits(20)))))
                if rng.random() < 0.02:
                    ranges *= rng.choice([100, 200])
                host.receive_ranges(ranges, set_id=0xCAFE if rng.random() < 0.9 else rng.getrandbits(16))
            elif choice < 0.8:
                payload = mutate(rng, rng.choice(MESSAGES))
                host.send(
                    payload, kind=rng.choice((6, 6, 8)), flags=rng.getrandbits(1), tid=rng.getrandbits(5) + 1
                )
            else:
                answer = mutate(rng, b"\x6c\0\0\0" + rng.choice((1, 2, 5)).to_bytes(4, "little"), (0, 0, 1))
                tid = rng.choice([rng.getrandbits(5) + 1, rng.getrandbits(64), rng.getrandbits(5) | 1 << 32])
                host.send(answer, kind=COMPLETION, flags=0, tid=tid)
        except RingFull:
            pass
        if rng.random() < 0.5:
            host.drain()
        try:
            if rng.random() < 0.7:
                nic.receive(64)
            if rng.random() < 0.2:
                nic.send_batch([frame(mac(2), mac(1))] * rng.randrange(20))
            if rng.random() < 0.05:
                nic.send_batch([Frame(frame(mac(2), mac(1), bytes(rng.randrange(1500))), vlan=5)])
            if rng.random() < 0.02:
                rng.choice([nic.keepalive, nic.reset, lambda: nic.query(0x10106)])()
        except VmbusError:
            pass
        assert len(nic._completions.get(0, ())) <= 8192
        assert len(nic._received) <= MAX_RECEIVED
        assert len(nic._sent) <= 1024
    nic.close()


def test_network_client(fuzz: Fuzz) -> None:
    fuzz.run(a_host_that_may_send_anything, cases=4500)

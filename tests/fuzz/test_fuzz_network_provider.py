"""Fuzz target: a guest that sends anything to the network provider, beside two honest guests on the same switch."""

import random
from contextlib import suppress

from reference.fuzz import Fuzz
from reference.mutation import WORDS, mutate
from reference.netpair import Guest, frame, mac
from reference.network_attacker import (
    GOOD,
    PAGE,
    Raw,
    neighbours_are_well,
    provider_is_consistent,
    seized,
    write,
)

from vmbus.core.memory import GpaRanges
from vmbus.errors import RingFull
from vmbus.network import rndis, wire
from vmbus.network.oid import Oid
from vmbus.network.rndis import Frame, LargeSend, RndisType, TransmitChecksum
from vmbus.network.switch import BROADCAST
from vmbus.network.wire import MessageType, Version, pack_message

QUERIES = (
    Oid.GEN_LINK_STATE,
    Oid.GEN_SUPPORTED_LIST,
    Oid.TCP_OFFLOAD_HARDWARE_CAPABILITIES,
    Oid.GEN_FRIENDLY_NAME,
)
SETS = (
    Oid.GEN_RECEIVE_SCALE_PARAMETERS,
    Oid.TCP_OFFLOAD_PARAMETERS,
    Oid.GEN_RNDIS_CONFIG_PARAMETER,
    Oid.ETHERNET_MULTICAST_LIST,
    Oid.OFFLOAD_ENCAPSULATION,
    Oid.GEN_CURRENT_PACKET_FILTER,
)
CONTROLS = [
    *(rndis.pack_control(RndisType.QUERY, rndis.QueryRequest(1, oid, 0, 0, 0), bytes(18)) for oid in QUERIES),
    *(rndis.pack_control(RndisType.SET, rndis.SetRequest(1, oid, 0, 0, 0), bytes(60)) for oid in SETS),
    *(
        rndis.pack_control(kind, structure.unpack(bytes(structure.SIZE)))
        for kind, structure in rndis.CONTROL_MESSAGES.items()
    ),
]
REVOCATIONS = (MessageType.REVOKE_RECEIVE_BUFFER, MessageType.REVOKE_SEND_BUFFER)
MESSAGES = [
    (kind, pack_message(kind, info.structure.unpack(bytes(info.structure.SIZE)), Version.V6_1))
    for kind, info in wire.MESSAGES.items()
]


def tcp_frame(rng: random.Random) -> bytes:
    """The beginning of a TCP segment, for offloads to work on."""
    size = rng.choice([0, 1, 100, 1400, 3000])
    ip = bytearray(b"\x45\0\0\0\0\0\x40\0\x40\x06\0\0\x0a\0\0\x01\x0a\0\0\x02")
    ip[2:4] = (40 + size).to_bytes(2, "big")
    tcp = b"\x12\x34\0\x50\0\0\0\1\0\0\0\2\x50\x18\xff\xff\0\0\0\0"
    return frame(mac(2), mac(1), bytes(ip) + tcp + bytes(size), 0x800)


def some_message(rng: random.Random) -> bytes:
    """RNDIS messages, a little wrong."""
    choice = rng.random()
    if choice < 0.3:
        data = GOOD * rng.choice([1, 1, 2, 8, 9])
    elif choice < 0.6:
        offers: dict[str, int] = {}
        if rng.random() < 0.6:
            offers["checksum"] = TransmitChecksum(ipv4=True, tcp=True, transport_offset=34).pack()
        if rng.random() < 0.4:
            offers["large_send"] = LargeSend(rng.choice([0, 1, 100, 1400]), 34).pack()
        if rng.random() < 0.3:
            offers["vlan"] = rng.getrandbits(32)
        offers = {
            name: value ^ (1 << rng.randrange(32)) * (rng.random() < 0.2) for name, value in offers.items()
        }
        data = rndis.pack_packet(Frame(mutate(rng, tcp_frame(rng), (0, 0, 1)), **offers))
    else:
        data = rng.choice(CONTROLS)
    return mutate(rng, data, (0, 0, 1, 1, 3))[:6144]


def send_something(rng: random.Random, raw: Raw, bad: Guest) -> None:
    choice = rng.random()
    if choice < 0.55:
        data = some_message(rng)
        write(bad, 1, data)
        section = rng.choice((1, 1, 1, 1, 1, 1, 2, rng.choice(WORDS)))
        size = rng.choice((len(data), len(data), len(data), rng.choice(WORDS), rng.randrange(6200)))
        body = wire.SendRndisPacket(rng.choice([0, 1, 1, 7]), section, size)
        payload = pack_message(MessageType.SEND_RNDIS_PACKET, body, Version.V6_1)
        raw.send(mutate(rng, payload) if rng.random() < 0.1 else payload)
    elif choice < 0.75:
        data = some_message(rng)
        at = 1000 * PAGE + rng.randrange(PAGE)
        bad.memory.write(at, data)
        pages = list(range(at // PAGE, (at + max(1, len(data)) - 1) // PAGE + 1))
        if rng.random() < 0.1:
            pages[rng.randrange(len(pages))] = rng.choice([4095, 4096, rng.getrandbits(52)])
        body = wire.SendRndisPacket(
            rng.choice([0, 1]), rng.choice([wire.NO_SECTION] * 4 + [2]), rng.choice([0, 0, 40])
        )
        payload = pack_message(MessageType.SEND_RNDIS_PACKET, body, Version.V6_1)
        ranges = GpaRanges([(max(1, len(data)), at % PAGE, pages)])
        tid = rng.getrandbits(64)
        if raw.channel.outgoing.send_gpa_direct(mutate(rng, payload, (0, 0, 1)), ranges, tid):
            raw.channel.signal()
    else:
        kind, payload = rng.choice(MESSAGES)
        if kind in REVOCATIONS and rng.random() < 0.9:
            return
        raw.send(mutate(rng, payload), kind=rng.choice((6, 6, 6, 7, 11, 11, 8, 99)), flags=rng.getrandbits(1))


def a_guest_that_may_send_anything(rng: random.Random) -> None:
    raw, bad, good, third = seized(max_queues=4, plain=rng.random() < 0.5)
    for _ in range(rng.randrange(1, 300)):
        if not bad.vsp.is_open:
            break
        if rng.random() < 0.2:
            good.nic.send_batch([frame(rng.choice((mac(1), BROADCAST)), mac(2))] * rng.randrange(1, 20))
        with suppress(RingFull):
            send_something(rng, raw, bad)
        if rng.random() < 0.5:
            raw.drain()
        provider_is_consistent(bad)
    if bad.vsp.is_open:  # and in the end the ring itself
        view = rng.choice((bad.guest_end.outgoing, bad.guest_end.incoming)).window.view()
        view[rng.choice((0, 4, 8, 12)) :][:4] = rng.choice((*WORDS, rng.getrandbits(32))).to_bytes(
            4, "little"
        )
        view.release()
        bad.guest_end.signal()
    neighbours_are_well(good, third)


def test_network_provider(fuzz: Fuzz) -> None:
    fuzz.run(a_guest_that_may_send_anything, cases=9000)

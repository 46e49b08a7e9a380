"""Hostile guests against the network provider, hostile hosts against the client.

What must hold whatever the peer does: no exception but the documented ones, no hang, bounded memory, and no harm
to the neighbours on the same switch.
"""

import os
import random
import struct
import time
from collections.abc import Callable

import pytest
from reference.netpair import Guest, frame, mac, make_guest, make_pair, receive_all, send_all

from vmbus.bus.channel import Channel
from vmbus.core.memory import GpaRanges
from vmbus.core.ring import COMPLETION, COMPLETION_REQUESTED, IN_BAND
from vmbus.errors import DeviceError, RemoteProtocolError, RingFull, VmbusError
from vmbus.network import rndis, wire
from vmbus.network.oid import HashTypes, Offloads, Oid, ReceiveScaleParameters
from vmbus.network.rndis import Frame, LargeSend, NdisStatus, PacketIdFlags, RndisType, TransmitChecksum
from vmbus.network.switch import BROADCAST, Switch
from vmbus.network.vsc_protocol import GuestConfig
from vmbus.network.vsp import MAX_CONTROL_BACKLOG
from vmbus.network.vsp_delivery import MAX_BACKLOG
from vmbus.network.vsp_protocol import HostState
from vmbus.network.wire import Capabilities, MessageType, NvspStatus, Version, pack_message

SECONDS = float(os.environ.get("VMBUS_FUZZ_SECONDS", "2"))
PAGE = 4096


class Raw:
    """A peer that writes what it likes to a channel that an honest client or provider brought up."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        channel.on_signal = None
        self.answers: dict[int, bytes] = {}
        self.next_id = 1 << 40

    def send(
        self, payload: bytes, *, kind: int = IN_BAND, flags: int = COMPLETION_REQUESTED, tid: int = 0
    ) -> int:
        self.next_id += 1
        tid = tid or self.next_id
        if self.channel.outgoing.send(payload, tid, kind, flags):
            self.channel.signal()
        return tid

    def drain(self) -> None:
        while self.channel.is_open and (packets := self.channel.incoming.recv_packets(64)):
            for packet in packets:
                if packet.type == COMPLETION:
                    self.answers[packet.transaction_id] = packet.payload
            if self.channel.incoming.take_signal():
                self.channel.signal()

    def ask(self, payload: bytes) -> bytes:
        tid = self.send(payload)
        self.drain()
        return self.answers.pop(tid)

    def rndis(self, section: int, size: int, channel_type: int = 0) -> int:
        """The status of an RNDIS packet in the send buffer."""
        body = wire.SendRndisPacket(channel_type, section, size)
        answer = self.ask(pack_message(MessageType.SEND_RNDIS_PACKET, body, Version.V6_1))
        assert answer[:4] == b"\x6c\0\0\0"
        return int.from_bytes(answer[4:8], "little")

    def gpa(self, memory_size_page: int, parts: list[tuple[int, int, list[int]]]) -> int:
        """The status of an RNDIS packet in GPA ranges."""
        del memory_size_page
        self.next_id += 1
        payload = pack_message(
            MessageType.SEND_RNDIS_PACKET, wire.SendRndisPacket(0, wire.NO_SECTION, 0), Version.V6_1
        )
        if self.channel.outgoing.send_gpa_direct(payload, GpaRanges(parts), self.next_id):
            self.channel.signal()
        self.drain()
        return int.from_bytes(self.answers.pop(self.next_id)[4:8], "little")


def everything() -> GuestConfig:
    capabilities = Capabilities.IEEE_8021Q | Capabilities.SRIOV | Capabilities.RSC
    return GuestConfig(offloads=Offloads.everything(), capabilities=capabilities)


def seized(*, plain: bool = False, **adapter: object) -> tuple[Raw, Guest, Guest, Guest]:
    """A hostile guest, itself, and two honest neighbours; with `plain` frames reach it by the compiled path."""
    switch, bad, good = make_pair(GuestConfig() if plain else everything(), **adapter)
    third = make_guest(switch, 3)
    third.start()
    return Raw(bad.guest_end), bad, good, third


def neighbours_are_well(good: Guest, third: Guest) -> None:
    receive_all(good.nic)
    receive_all(third.nic)
    frames = [frame(mac(3), mac(2), bytes([n]) * 100) for n in range(20)]
    send_all(good.nic, frames)
    assert receive_all(third.nic) == frames


def provider_is_consistent(guest: Guest) -> None:
    vsp = guest.vsp
    if vsp._receive is not None:
        held = [section for part in vsp._receive.in_flight().values() for section in part]
        assert len(set(held)) == len(held) == vsp._receive.count - vsp._receive.available
    for queue in vsp._queues.values():
        assert len(queue.backlog) <= MAX_BACKLOG
        assert len(queue.completions) <= 128
    assert len(vsp._control) <= MAX_CONTROL_BACKLOG


def write(guest: Guest, section: int, data: bytes) -> None:
    start = section * guest.nic.protocol.send_section[0]
    guest.nic._send.view[start : start + len(data)] = data


GOOD = rndis.pack_packet(Frame(frame(mac(2), mac(1))))


# ---- the list of bugs that real hosts had


@pytest.mark.parametrize("offset8", [0, 1, 2])
@pytest.mark.parametrize("kind", [7, 9])
def test_external_header_shorter_than_24_bytes(kind: int, offset8: int) -> None:
    _, bad, good, third = seized()
    ring = bad.guest_end.outgoing.window.view()
    at = PAGE + int.from_bytes(ring[:4], "little")
    struct.pack_into("<4HQ", ring, at, kind, offset8, 8, 1, 5)
    struct.pack_into("<I", ring, 0, (at - PAGE + 72) % (len(ring) - PAGE))
    bad.guest_end.signal()
    ring.release()
    assert not bad.vsp.is_open
    neighbours_are_well(good, third)


def test_gpa_byte_offset_of_a_page_or_more() -> None:
    _, bad, good, third = seized()
    ring = bad.guest_end.outgoing.window.view()
    at = PAGE + int.from_bytes(ring[:4], "little")
    message = pack_message(MessageType.SEND_RNDIS_PACKET, wire.SendRndisPacket(0, wire.NO_SECTION, 0))
    header = struct.pack("<4HQIIIIQ", 9, 5, 9, 1, 5, 0, 1, 100, 4096, 3)
    ring[at : at + len(header) + len(message)] = header + message
    struct.pack_into("<I", ring, 0, at - PAGE + 80)
    bad.guest_end.signal()
    ring.release()
    assert not bad.vsp.is_open
    neighbours_are_well(good, third)


def test_gpa_outside_of_memory_is_an_error_to_the_guest() -> None:
    raw, bad, good, third = seized()
    last = bad.memory.size // PAGE
    for pfns in ([last], [last - 1, last], [1 << 40], [(1 << 52) - 1]):
        assert raw.gpa(0, [(len(pfns) * PAGE, 0, pfns)]) == NvspStatus.INVALID_RNDIS_PACKET
    assert raw.gpa(0, [(PAGE, 0, [5])] * 33) == NvspStatus.INVALID_RNDIS_PACKET
    assert bad.vsp.is_open
    neighbours_are_well(good, third)


def test_pending_send_size_of_the_whole_ring() -> None:
    """Some guests ask for a signal when the ring has size − 1 bytes free, which it never has."""
    raw, bad, good, third = seized()
    control = bad.guest_end.outgoing.window.view()
    struct.pack_into("<I", control, 12, len(control) - PAGE - 1)
    control.release()
    write(bad, 0, GOOD)
    for _ in range(300):
        assert raw.rndis(0, len(GOOD)) == NvspStatus.SUCCESS
    neighbours_are_well(good, third)
    assert bad.vsp.is_open


@pytest.mark.parametrize("split", [1, 8, 20, 43, 44, 50, 59, 60, 74])
def test_rndis_header_that_crosses_a_page(split: int) -> None:
    raw, bad, good, _ = seized()
    message = rndis.pack_packet(Frame(frame(mac(2), mac(1)), checksum=0))
    bad.memory.write(1000 * PAGE + PAGE - split, message)
    assert raw.gpa(0, [(len(message), PAGE - split, [1000, 1001])]) == NvspStatus.SUCCESS
    bad.memory.write(1002 * PAGE - split, message[:split])
    bad.memory.write(1005 * PAGE, message[split:])
    parts = [(split, PAGE - split, [1001]), (len(message) - split, 0, [1005])]
    assert raw.gpa(0, parts) == NvspStatus.SUCCESS
    assert receive_all(good.nic) == [frame(mac(2), mac(1))] * 2


def test_section_and_ranges_are_one_message() -> None:
    """Linux puts the RNDIS header of a frame into a section behind others and leaves its data in place."""
    raw, bad, good, _ = seized()
    message = GOOD + rndis.pack_packet(Frame(frame(mac(2), mac(1), b"z" * 900)))
    write(bad, 2, message[:150])
    bad.memory.write(1000 * PAGE + 99, message[150:])
    raw.next_id += 1
    body = wire.SendRndisPacket(0, 2, 150)
    payload = pack_message(MessageType.SEND_RNDIS_PACKET, body, Version.V6_1)
    ranges = GpaRanges([(len(message) - 150, 99, [1000])])
    if raw.channel.outgoing.send_gpa_direct(payload, ranges, raw.next_id):
        raw.channel.signal()
    assert len(receive_all(good.nic)) == 2


def test_completion_of_an_unknown_id() -> None:
    raw, bad, good, third = seized()
    before = bad.vsp.statistics.violations
    for tid in (0, 1, 2, 0xFFFFFFFFFFFFFFFF):
        raw.send(bytes(8), kind=COMPLETION, flags=0, tid=tid or 1 << 63)
    assert bad.vsp.statistics.violations == before + 4
    provider_is_consistent(bad)
    neighbours_are_well(good, third)


@pytest.mark.parametrize("plain", [True, False])
def test_completed_twice(plain: bool) -> None:
    raw, bad, good, third = seized(plain=plain)
    send_all(good.nic, [frame(BROADCAST, mac(2))] * 10)
    ids = [p.transaction_id for p in raw.channel.incoming.recv_packets(64) if p.type != COMPLETION]
    assert ids
    done = bytes(wire.SendRndisPacketComplete(1).pack())
    for tid in ids * 3:
        raw.send(b"\x6c\0\0\0" + done, kind=COMPLETION, flags=0, tid=tid)
    assert bad.vsp.statistics.violations == 2 * len(ids)
    provider_is_consistent(bad)
    neighbours_are_well(good, third)


@pytest.mark.parametrize("size", [0, 2, 5, 4 * 129, 0xFFFF])
def test_rss_table_of_impossible_size(size: int) -> None:
    _, a, _ = make_pair(everything(), max_queues=4)
    parameters = rss_parameters(size=size)
    with pytest.raises(DeviceError, match=f"{int(NdisStatus.INVALID_DATA):x}"):
        a.nic.set(Oid.GEN_RECEIVE_SCALE_PARAMETERS, parameters + bytes(2000))
    assert a.vsp.protocol.oids.rss is None


def rss_parameters(**change: int) -> bytes:
    fields = {
        "size": 16,
        "table": 40,
        "key": 56,
        "key_size": 40,
        "info": int(HashTypes.TOEPLITZ | HashTypes.IPV4),
    }
    fields |= change
    parameters = ReceiveScaleParameters.unpack(bytes(40))
    parameters.indirection_table_size = fields["size"]
    parameters.indirection_table_offset = fields["table"]
    parameters.hash_secret_key_offset = fields["key"]
    parameters.hash_secret_key_size = fields["key_size"]
    parameters.hash_information = fields["info"]
    return parameters.pack()


@pytest.mark.parametrize(
    "change",
    [{"table": 0xFFFFFFFF}, {"table": 85}, {"key": 0xFFFFFFF0}, {"key": 57}, {"key_size": 39}, {"info": 2}],
)
def test_rss_offsets_must_lie_inside(change: dict[str, int]) -> None:
    _, a, _ = make_pair(everything(), max_queues=4)
    data = rss_parameters() + struct.pack("<4I", 0, 1, 2, 3) + bytes(40)
    a.nic.set(Oid.GEN_RECEIVE_SCALE_PARAMETERS, data)
    before = a.vsp.protocol.oids.rss
    with pytest.raises(DeviceError):
        a.nic.set(Oid.GEN_RECEIVE_SCALE_PARAMETERS, rss_parameters(**change) + data[40:])
    with pytest.raises(DeviceError):
        a.nic.set(
            Oid.GEN_RECEIVE_SCALE_PARAMETERS, rss_parameters() + struct.pack("<4I", 0, 1, 2, 4) + bytes(40)
        )
    assert a.vsp.protocol.oids.rss is before


def test_request_of_an_unknown_kind_does_not_stop_the_rest() -> None:
    raw, bad, good, third = seized()
    for kind in (0, 3, 99, 109, 120, 126, 130, 137, 0xFFFFFFFF):
        assert raw.ask(struct.pack("<I", kind) + bytes(36)) == b""
    write(bad, 0, GOOD)
    assert raw.rndis(0, len(GOOD)) == NvspStatus.SUCCESS
    neighbours_are_well(good, third)


# ---- every field of the data path


@pytest.mark.parametrize(
    ("section", "size"),
    [(0, 6145), (0, 0xFFFFFFFF), (64, 100), (0xFFFFFFFE, 100), (0x7FFFFFFF, 6144), (0, 0), (0, 3), (0, 44)],
)
def test_wrong_sections(section: int, size: int) -> None:
    raw, bad, good, third = seized()
    write(bad, 0, GOOD)
    assert raw.rndis(section, size) == NvspStatus.INVALID_RNDIS_PACKET
    neighbours_are_well(good, third)


@pytest.mark.parametrize("word", range(15))
def test_every_header_word(word: int) -> None:
    raw, bad, good, third = seized()
    for value in (0, 1, 0x2C, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF):
        message = bytearray(rndis.pack_packet(Frame(frame(mac(2), mac(1)), vlan=0)))
        struct.pack_into("<I", message, word * 4, value)
        write(bad, 0, bytes(message))
        assert raw.rndis(0, len(message)) in (NvspStatus.SUCCESS, NvspStatus.INVALID_RNDIS_PACKET)
    neighbours_are_well(good, third)


@pytest.mark.parametrize(
    "offload",
    [
        {"checksum": TransmitChecksum(ipv4=True, tcp=True, transport_offset=1023).pack()},
        {"checksum": 0xFFFFFFFF},
        {"large_send": LargeSend(0, 34).pack()},
        {"large_send": LargeSend(1, 34).pack()},
        {"large_send": 0xFFFFFFFF},
        {"vlan": 0xFFFFFFFF},
        {"checksum": 5, "large_send": 7, "hash_value": 9, "packet_id": 0xFFFFFFFF},
    ],
)
def test_offloads_that_do_not_fit_the_frame(offload: dict[str, int]) -> None:
    raw, bad, good, third = seized()
    for data in (frame(mac(2), mac(1)), frame(mac(2), mac(1), bytes(60), 0x800), bytes(14), bytes(13)):
        message = rndis.pack_packet(Frame(data, **offload))
        write(bad, 0, message)
        assert raw.rndis(0, len(message)) in (NvspStatus.SUCCESS, NvspStatus.INVALID_RNDIS_PACKET)
    neighbours_are_well(good, third)


def test_more_packets_in_a_message_than_allowed() -> None:
    raw, bad, good, third = seized()
    small = rndis.pack_packet(Frame(bytes(14)))
    write(bad, 0, small * 100)
    assert raw.rndis(0, len(small) * 100) == NvspStatus.INVALID_RNDIS_PACKET
    assert bad.port.counters.received_frames == 0
    neighbours_are_well(good, third)


def test_control_messages_that_are_never_read() -> None:
    """Answers pile up when the guest does not complete: they are bounded, then the guest hears BUSY."""
    raw, bad, good, third = seized()
    keepalive = rndis.pack_control(RndisType.KEEPALIVE, rndis.KeepaliveRequest(1))
    write(bad, 0, keepalive)
    statuses = [raw.rndis(0, len(keepalive), 1) for _ in range(1000)]
    assert statuses[0] == NvspStatus.SUCCESS
    assert statuses[-1] == NvspStatus.BUSY
    provider_is_consistent(bad)
    neighbours_are_well(good, third)


def test_a_guest_that_never_reads_its_completions() -> None:
    raw, bad, good, third = seized()
    write(bad, 0, GOOD)
    payload = pack_message(MessageType.SEND_RNDIS_PACKET, wire.SendRndisPacket(0, 0, len(GOOD)), Version.V6_1)
    sent = 0
    while raw.channel.outgoing.free_bytes > 100:
        raw.send(payload)
        sent += 1
    assert sent > 500
    provider_is_consistent(bad)
    neighbours_are_well(good, third)
    raw.drain()
    bad.host_end.deliver_signal()
    raw.drain()
    assert raw.rndis(0, len(GOOD)) == NvspStatus.SUCCESS


def test_control_state_machine_refuses_disorder() -> None:
    guest = make_guest(Switch(), 1)
    raw = Raw(guest.guest_end)
    pages = guest.guest_end.create_gpadl(range(10, 200))
    small = guest.guest_end.create_gpadl([300])

    def send(kind: int, body: wire.Structure) -> bytes:
        return raw.ask(pack_message(kind, body, Version.V6_1))

    buffer = wire.SendReceiveBuffer(pages, 0xCAFE, 0)
    assert send(MessageType.SEND_RECEIVE_BUFFER, buffer)[4:8] == b"\2\0\0\0"
    assert send(MessageType.SUB_CHANNEL, wire.SubchannelRequest(1, 1))[4:8] == b"\2\0\0\0"
    assert send(MessageType.INIT, wire.Init(0x12345, 0x12345))[12:16] == b"\0\0\0\0"
    assert send(MessageType.INIT, wire.Init(Version.V6_1, 0))[12:16] == b"\1\0\0\0"
    assert send(MessageType.INIT, wire.Init(Version.V6_1, 0))[12:16] == b"\2\0\0\0"
    assert send(MessageType.SEND_NDIS_CONFIG, wire.SendNdisConfig(0xFFFFFFFF, 0, (1 << 64) - 1)) == b""
    assert guest.vsp.protocol.frame_size == 1514
    assert send(MessageType.SEND_NDIS_VERSION, wire.SendNdisVersion(6, 30)) == b""
    for gpadl in (0, 0xDEAD, small):
        refused = send(MessageType.SEND_RECEIVE_BUFFER, wire.SendReceiveBuffer(gpadl, 1, 0))
        assert refused[:8] == b"\x66\0\0\0\2\0\0\0"
    assert guest.vsp._receive is None
    assert send(MessageType.SEND_RECEIVE_BUFFER, buffer)[4:8] == b"\1\0\0\0"
    assert send(MessageType.SEND_RECEIVE_BUFFER, buffer)[4:8] == b"\2\0\0\0"
    assert send(MessageType.SEND_SEND_BUFFER, wire.SendSendBuffer(small, 0, 0))[4:8] == b"\2\0\0\0"
    assert send(MessageType.PD_API, wire.PdApiRequest(1, b""))[8:12] == b"\xbb\0\0\xc0"
    assert send(MessageType.OID_QUERY_EX, wire.OidQueryEx(0, 0, 0, 1))[4:8] == b"\xbb\0\0\xc0"
    assert send(MessageType.SWITCH_DATA_PATH, wire.SwitchDataPath(7)) == b""
    # RNDIS before INITIALIZE
    message = rndis.pack_control(RndisType.QUERY, rndis.QueryRequest(1, Oid.GEN_LINK_STATE, 0, 0, 0))
    guest.memory.write(400 * PAGE, message)
    assert raw.gpa(0, [(len(message), 0, [400])]) == NvspStatus.INVALID_RNDIS_PACKET
    assert send(MessageType.REVOKE_RECEIVE_BUFFER, wire.RevokeReceiveBuffer(0xCAFE, 0)) == b""
    assert guest.vsp.protocol.state == HostState.REVOKED
    assert guest.vsp._receive is None
    assert raw.gpa(0, [(len(message), 0, [400])]) == NvspStatus.INVALID_RNDIS_PACKET
    assert guest.vsp.is_open


def test_gpadls_that_are_no_buffers() -> None:
    guest = make_guest(Switch(), 1)
    raw = Raw(guest.guest_end)
    for kind, body in (
        (MessageType.INIT, wire.Init(Version.V6_1, 0)),
        (MessageType.SEND_NDIS_VERSION, wire.SendNdisVersion(6, 30)),
    ):
        raw.ask(pack_message(kind, body, Version.V6_1))
    outside = guest.memory.size // PAGE
    gpadls = [
        guest.guest_end.create_gpadl(range(10, 91), 80 * PAGE + 8, 8),
        guest.guest_end.create_gpadl(range(10, 91), 80 * PAGE + 8, 0),
        guest.guest_end.create_gpadl(range(outside, outside + 90)),
    ]
    for gpadl in gpadls:
        message = wire.SendReceiveBuffer(gpadl, 0xCAFE, 0)
        assert (
            raw.ask(pack_message(MessageType.SEND_RECEIVE_BUFFER, message, Version.V6_1))[4:8] == b"\2\0\0\0"
        )
    assert guest.vsp.is_open


# ---- seeded fuzzing


def seed_of(request: pytest.FixtureRequest) -> int:
    del request
    seed = int(os.environ.get("VMBUS_FUZZ_SEED", "0")) or random.SystemRandom().getrandbits(32)
    print(f"seed {seed} (VMBUS_FUZZ_SEED={seed} repeats it)")
    return seed


def mutate(rng: random.Random, data: bytes) -> bytes:
    result = bytearray(data)
    for _ in range(rng.choice((0, 1, 1, 2, 5))):
        if not result:
            break
        choice = rng.random()
        at = rng.randrange(len(result))
        if choice < 0.4:
            result[at] ^= 1 << rng.randrange(8)
        elif choice < 0.8 and len(result) >= 4:
            at = rng.randrange(len(result) - 3) & ~3
            value = rng.choice((0, 1, 7, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, rng.getrandbits(32), len(result)))
            struct.pack_into("<I", result, at, value)
        elif choice < 0.9:
            del result[at:]
        else:
            result += rng.randbytes(rng.randrange(40))
    return bytes(result)


def test_fuzzed_guest(request: pytest.FixtureRequest) -> None:
    seed = seed_of(request)
    rng = random.Random(seed)
    deadline = time.monotonic() + SECONDS
    raw, bad, good, third = seized(max_queues=4, plain=seed % 2 == 0)
    controls = [
        rndis.pack_control(RndisType.QUERY, rndis.QueryRequest(1, oid, 0, 0, 0), bytes(18))
        for oid in (Oid.GEN_LINK_STATE, Oid.GEN_SUPPORTED_LIST, Oid.TCP_OFFLOAD_HARDWARE_CAPABILITIES)
    ] + [
        rndis.pack_control(RndisType.SET, rndis.SetRequest(1, oid, 0, 0, 0), bytes(60))
        for oid in (
            Oid.GEN_RECEIVE_SCALE_PARAMETERS, Oid.TCP_OFFLOAD_PARAMETERS, Oid.GEN_RNDIS_CONFIG_PARAMETER,
            Oid.ETHERNET_MULTICAST_LIST, Oid.OFFLOAD_ENCAPSULATION, Oid.GEN_CURRENT_PACKET_FILTER,
        )
    ]  # fmt: skip
    messages = [
        pack_message(kind, info.structure.unpack(bytes(info.structure.SIZE)), Version.V6_1)
        for kind, info in wire.MESSAGES.items()
        if kind not in (MessageType.REVOKE_RECEIVE_BUFFER, MessageType.REVOKE_SEND_BUFFER)
    ]
    rounds = 0
    while time.monotonic() < deadline or rounds < 200:
        rounds += 1
        if rounds % 1000 == 0:
            raw, bad, good, third = seized(max_queues=4, plain=rng.random() < 0.5)
        if not bad.vsp.is_open or bad.vsp.protocol.state != HostState.READY:
            raw, bad, good, third = seized(max_queues=4, plain=rng.random() < 0.5)
        if rng.random() < 0.3:
            good.nic.send_batch([frame(rng.choice((mac(1), BROADCAST)), mac(2))] * rng.randrange(1, 20))
        try:
            if rng.random() < 0.5:
                data = GOOD if rng.random() < 0.5 else rng.choice(controls)
                data = mutate(rng, data)[:6144]
                write(bad, 1, data)
                index = rng.choice((1, 1, 1, 1, 2, rng.getrandbits(32)))
                size = rng.choice((len(data), len(data), rng.getrandbits(32), rng.randrange(6200)))
                body = pack_message(
                    MessageType.SEND_RNDIS_PACKET, wire.SendRndisPacket(0, index, size), 0x60001
                )
                raw.send(mutate(rng, body) if rng.random() < 0.2 else body)
            elif rng.random() < 0.3:
                count = rng.randrange(1, 6)
                pfns = [rng.choice((rng.randrange(2000), rng.getrandbits(40))) for _ in range(count)]
                ranges = GpaRanges([(rng.randrange(1, count * PAGE), 0, pfns)])
                payload = pack_message(
                    MessageType.SEND_RNDIS_PACKET, wire.SendRndisPacket(0, wire.NO_SECTION, 0)
                )
                if raw.channel.outgoing.send_gpa_direct(mutate(rng, payload), ranges, rng.getrandbits(64)):
                    raw.channel.signal()
            else:
                payload = mutate(rng, rng.choice(messages))
                raw.send(payload, kind=rng.choice((6, 6, 6, 7, 11, 8, 99)), flags=rng.getrandbits(1))
        except (RingFull, ValueError):
            pass
        if bad.vsp.is_open and rng.random() < 0.5:
            raw.drain()
        if bad.vsp.is_open:
            provider_is_consistent(bad)
        if rounds % 50 == 0:
            neighbours_are_well(good, third)
    neighbours_are_well(good, third)


# ---- hostile hosts


class RawHost(Raw):
    """The host's end of a channel whose client is honest."""

    def receive_ranges(
        self, ranges: list[tuple[int, int]], *, set_id: int = 0xCAFE, payload: bytes | None = None
    ) -> None:
        self.next_id += 1
        body = pack_message(
            MessageType.SEND_RNDIS_PACKET, wire.SendRndisPacket(0, wire.NO_SECTION, 0), 0x60001
        )
        if self.channel.outgoing.send_transfer_pages(
            body if payload is None else payload, set_id, ranges, self.next_id
        ):
            self.channel.signal()


def seized_host() -> tuple[RawHost, Guest]:
    guest = make_guest(Switch(), 1)
    guest.start(everything())
    return RawHost(guest.host_end), guest


def put(guest: Guest, at: int, data: bytes) -> None:
    guest.nic._receive.view[at : at + len(data)] = data


@pytest.mark.parametrize(
    ("ranges", "set_id"),
    [
        ([(100, 0xFFFFFFFF)], 0xCAFE),
        ([(0xFFFFFFFF, 0)], 0xCAFE),
        ([(1809, 0)], 0xCAFE),
        ([(100, 652 * 1808)], 0xCAFE),
        ([(0, 0)], 0xCAFE),
        ([(7, 0)], 0xCAFE),
        ([(100, 0)], 0),
        ([(100, 0)], 0xBEEF),
        ([(100, 0)] * 563, 0xCAFE),
        ([], 0xCAFE),
    ],
)
def test_wrong_transfer_pages(ranges: list[tuple[int, int]], set_id: int) -> None:
    host, guest = seized_host()
    put(guest, 0, bytes(2000))
    host.receive_ranges(ranges, set_id=set_id)
    assert guest.nic.receive() == []
    host.drain()
    assert host.next_id in host.answers  # completed all the same: the host gets its sections back
    put(guest, 0, GOOD)
    host.receive_ranges([(len(GOOD), 0)])
    assert guest.nic.receive() == [frame(mac(2), mac(1))]
    assert guest.nic.protocol.violations == (1 if ranges else 0)


def fragment(flags: int, data: bytes) -> bytes:
    return rndis.pack_packet(Frame(data, packet_id=1 | flags << 8 | 5 << 16))


@pytest.mark.parametrize(
    "flags",
    [
        [PacketIdFlags.SUB_ALLOCATION],
        [PacketIdFlags.SUB_ALLOCATION | PacketIdFlags.LAST],
        [PacketIdFlags.SUB_ALLOCATION | PacketIdFlags.FIRST],
        [PacketIdFlags.SUB_ALLOCATION | PacketIdFlags.FIRST, 0],
        [PacketIdFlags.SUB_ALLOCATION | PacketIdFlags.FIRST, PacketIdFlags.SUB_ALLOCATION],
    ],
)
def test_fragments_without_beginning_or_end(flags: list[int]) -> None:
    host, guest = seized_host()
    ranges = []
    for number, value in enumerate(flags):
        message = fragment(value, bytes(100))
        put(guest, number * 1808, message)
        ranges.append((len(message), number * 1808))
    host.receive_ranges(ranges)
    assert all(value == 0 for value in flags) or len(guest.nic.receive()) == flags.count(0)
    assert guest.nic._fragments == []


def test_coalesced_packet_longer_than_ip_allows() -> None:
    host, guest = seized_host()
    message = fragment(PacketIdFlags.SUB_ALLOCATION, bytes(1700))
    put(guest, 1808, message)
    first = fragment(PacketIdFlags.SUB_ALLOCATION | PacketIdFlags.FIRST, bytes(1700))
    put(guest, 0, first)
    host.receive_ranges([(len(first), 0)] + [(len(message), 1808)] * 500)
    assert guest.nic.receive() == []
    assert guest.nic.protocol.violations == 1
    assert guest.nic._fragments == []


def test_completions_that_nobody_waits_for() -> None:
    host, guest = seized_host()
    for tid in (1, 2, 77, 0xFFFFFFFFFFFFFFFF):
        host.send(b"\x6c\0\0\0\1\0\0\0", kind=COMPLETION, flags=0, tid=tid)
    assert guest.nic.protocol.violations == 4
    size = guest.nic.protocol.send_section[1]
    assert guest.nic._sections.available == size
    assert guest.nic.send_batch([frame(mac(2), mac(1))] * 8) == 8
    sent = [p.transaction_id for p in host.channel.incoming.recv_packets(64)]
    for answer in (b"", b"\x6c\0\0\0", b"\x6c\0\0\0\1\0\0\0"):
        for tid in sent:
            host.send(answer, kind=COMPLETION, flags=0, tid=tid)
    assert guest.nic._sections.available == size
    assert (guest.nic.sent_frames, guest.nic.failed_frames) == (0, 8)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\x86\0\0\0",
        struct.pack("<III", 134, 16, 17).ljust(76, b"\0"),  # the ring pads to 80 bytes
        struct.pack("<III", 134, 15, 12).ljust(76, b"\0"),
        struct.pack("<III", 134, 16, 0xFFFFFFFF).ljust(76, b"\0"),
        struct.pack("<I", 1).ljust(28, b"\0"),
        struct.pack("<I", 108).ljust(28, b"\0"),
        struct.pack("<II", 129, 1).ljust(28, b"\0"),
    ],
)
def test_wrong_messages_of_a_host(payload: bytes) -> None:
    host, guest = seized_host()
    host.send(payload, flags=0)
    assert guest.nic.protocol.violations == 1
    assert guest.nic.is_open


def test_send_table_names_channels_that_there_are_not() -> None:
    host, guest = seized_host()
    host.send(struct.pack("<III", 134, 16, 12) + struct.pack("<16I", *[0xFFFFFFFF] * 16), flags=0)
    assert guest.nic.protocol.violations == 0
    assert guest.nic.send(frame(mac(2), mac(1)))


def test_rndis_of_a_host_that_lies() -> None:
    host, guest = seized_host()
    nic = guest.nic
    wrong = [
        rndis.pack_control(RndisType.QUERY_COMPLETE, rndis.QueryComplete(1, 0, 0, 0)),
        rndis.pack_control(RndisType.QUERY, rndis.QueryRequest(1, 1, 0, 0, 0)),
        rndis.pack_control(RndisType.RESET_COMPLETE, rndis.ResetComplete(0, 0)),
        rndis.pack_control(
            RndisType.INDICATE_STATUS, rndis.IndicateStatus(NdisStatus.LINK_SPEED_CHANGE, 0, 0)
        ),
        rndis.pack_control(
            RndisType.INDICATE_STATUS,
            rndis.IndicateStatus(NdisStatus.TASK_OFFLOAD_CURRENT_CONFIG, 0, 0),
            b"xx",
        ),
        struct.pack("<II", 0x77777777, 8),
        struct.pack("<II", 0x80000004, 0xFFFFFFFF),
    ]
    for number, message in enumerate(wrong):
        put(guest, 0, message)
        host.receive_ranges([(len(message), 0)])
        assert nic.protocol.violations == number + 1
    assert nic.is_open


def hostile_answers() -> list[Callable[[bytes], bytes]]:
    def word(at: int, value: int) -> Callable[[bytes], bytes]:
        def change(payload: bytes) -> bytes:
            return payload[:at] + value.to_bytes(4, "little") + payload[at + 4 :]

        return change

    values = (0, 1, 67, 0x7FFFFFFF, 0xFFFFFFFF)
    return [word(at, value) for at in range(0, 32, 4) for value in values] + [lambda p: p[:4], lambda p: b""]


def test_bring_up_with_one_wrong_answer() -> None:
    """Every word of every NVSP answer, one at a time: the client comes up usable or says what is wrong."""
    came_up = 0
    for change in hostile_answers():
        for which in range(3):
            guest = make_guest(Switch(), 1, memory_size=4 << 20)
            real = guest.vsp._queues[0].completions
            answered = [0]

            class Liar(type(real)):  # type: ignore[misc]
                def append(self, item, change=change, which=which, answered=answered):  # type: ignore[no-untyped-def]
                    if item[1]:
                        answered[0] += 1
                        if answered[0] - 1 == which:
                            item = (item[0], change(item[1]))
                    super().append(item)

            guest.vsp._queues[0].completions = Liar()
            try:
                guest.start(page_count=150, timeout=0.02)
            except (DeviceError, RemoteProtocolError):
                continue
            size, count = guest.nic.protocol.receive_section
            assert size >= 68
            assert size * count <= guest.nic._receive.window.size
            size, count = guest.nic.protocol.send_section
            assert size * count <= guest.nic._send.window.size
            came_up += 1
    assert came_up > 10


def test_fuzzed_host(request: pytest.FixtureRequest) -> None:
    seed = seed_of(request)
    rng = random.Random(seed)
    deadline = time.monotonic() + SECONDS
    host, guest = seized_host()
    messages = [
        pack_message(kind, info.structure.unpack(bytes(info.structure.SIZE)), Version.V6_1)
        for kind, info in wire.MESSAGES.items()
    ]
    controls = [
        rndis.pack_control(kind, structure.unpack(bytes(structure.SIZE)))
        for kind, structure in rndis.CONTROL_MESSAGES.items()
    ]
    rounds = 0
    while time.monotonic() < deadline or rounds < 200:
        rounds += 1
        if not guest.nic.is_open:
            host, guest = seized_host()
        try:
            if rng.random() < 0.7:
                ranges = []
                for number in range(rng.randrange(1, 6)):
                    data = mutate(rng, rng.choice([GOOD, fragment(rng.getrandbits(3), bytes(99)), *controls]))
                    put(guest, number * 1808, data[:1808])
                    ranges.append((len(data), number * 1808))
                if rng.random() < 0.2:
                    ranges.append((rng.getrandbits(32), rng.getrandbits(32)))
                host.receive_ranges(ranges, set_id=0xCAFE if rng.random() < 0.9 else rng.getrandbits(16))
            else:
                payload = mutate(rng, rng.choice(messages))
                host.send(
                    payload, kind=rng.choice((6, 11, 8)), flags=rng.getrandbits(1), tid=rng.getrandbits(5) + 1
                )
        except (RingFull, ValueError):
            pass
        if rng.random() < 0.5:
            host.drain()
        guest.nic.receive(64)
        if rng.random() < 0.1:
            try:
                guest.nic.send_batch([frame(mac(2), mac(1))] * rng.randrange(20))
            except VmbusError:
                assert not guest.nic.is_open
        assert len(guest.nic._completions.get(0, ())) <= 128
    assert guest.nic.protocol.violations > 0

"""Hostile guests against the network provider.

What must hold whatever the guest does: no exception but the documented ones, no hang, bounded memory, and no harm
to the neighbours on the same switch.
"""

import struct

import pytest
from reference.netpair import frame, mac, make_guest, make_pair, receive_all, send_all
from reference.network_attacker import (
    GOOD,
    PAGE,
    Raw,
    everything,
    neighbours_are_well,
    provider_is_consistent,
    seized,
    write,
)

from vmbus.core.memory import GpaRanges
from vmbus.core.ring import COMPLETION
from vmbus.errors import DeviceError
from vmbus.network import rndis, wire
from vmbus.network.oid import HashTypes, Oid, ReceiveScaleParameters
from vmbus.network.rndis import Frame, LargeSend, NdisStatus, RndisType, TransmitChecksum
from vmbus.network.switch import BROADCAST, Switch
from vmbus.network.vsp_protocol import HostState
from vmbus.network.wire import MessageType, NvspStatus, Version, pack_message

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
        assert raw.gpa(0, [(len(pfns) * PAGE, 0, pfns)]) == NvspStatus.FAILURE
    assert raw.gpa(0, [(PAGE, 0, [5])] * 33) == NvspStatus.FAILURE
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


@pytest.mark.parametrize("size", [0, 2, 5, 0xFFFC, 0xFFFF])
def test_rss_table_of_impossible_size(size: int) -> None:
    _, a, _ = make_pair(everything(), max_queues=4, table_entries=0xFFFF)
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
    assert raw.rndis(section, size) == NvspStatus.FAILURE
    neighbours_are_well(good, third)


@pytest.mark.parametrize("word", range(15))
def test_every_header_word(word: int) -> None:
    raw, bad, good, third = seized()
    for value in (0, 1, 0x2C, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF):
        message = bytearray(rndis.pack_packet(Frame(frame(mac(2), mac(1)), vlan=0)))
        struct.pack_into("<I", message, word * 4, value)
        write(bad, 0, bytes(message))
        assert raw.rndis(0, len(message)) in (NvspStatus.SUCCESS, NvspStatus.FAILURE)
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
        assert raw.rndis(0, len(message)) in (NvspStatus.SUCCESS, NvspStatus.FAILURE)
    neighbours_are_well(good, third)


def test_more_packets_in_a_message_than_allowed() -> None:
    raw, bad, good, third = seized()
    small = rndis.pack_packet(Frame(bytes(14)))
    write(bad, 0, small * 100)
    assert raw.rndis(0, len(small) * 100) == NvspStatus.FAILURE
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
    assert send(MessageType.SEND_SEND_BUFFER, wire.SendSendBuffer(0xDEAD, 0, 0))[4:8] == b"\2\0\0\0"
    assert send(MessageType.SEND_SEND_BUFFER, wire.SendSendBuffer(small, 0, 0))[4:8] == b"\1\0\0\0"
    assert send(MessageType.SEND_SEND_BUFFER, wire.SendSendBuffer(small, 0, 0))[4:8] == b"\2\0\0\0"
    assert send(MessageType.PD_API, wire.PdApiRequest(1, b""))[8:12] == b"\xbb\0\0\xc0"
    assert send(MessageType.OID_QUERY_EX, wire.OidQueryEx(0, 0, 0, 1))[4:8] == b"\xbb\0\0\xc0"
    assert send(MessageType.SWITCH_DATA_PATH, wire.SwitchDataPath(7)) == b""
    # RNDIS before INITIALIZE, and after HALT
    message = rndis.pack_control(RndisType.QUERY, rndis.QueryRequest(1, Oid.GEN_LINK_STATE, 0, 0, 0))
    guest.memory.write(400 * PAGE, message)
    halt = rndis.pack_control(RndisType.HALT, rndis.HaltRequest(1))
    guest.memory.write(401 * PAGE, halt)
    assert raw.gpa(0, [(len(message), 0, [400])]) == NvspStatus.SUCCESS
    assert raw.gpa(0, [(len(halt), 0, [401])]) == NvspStatus.SUCCESS
    assert raw.gpa(0, [(len(message), 0, [400])]) == NvspStatus.FAILURE
    assert send(MessageType.REVOKE_RECEIVE_BUFFER, wire.RevokeReceiveBuffer(0xCAFE, 0)) == b""
    assert guest.vsp.protocol.state == HostState.REVOKED
    assert guest.vsp._receive is None
    assert raw.gpa(0, [(len(message), 0, [400])]) == NvspStatus.FAILURE
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

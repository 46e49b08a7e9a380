"""The client against hosts that differ from our provider in what others do."""

import struct

import pytest
from reference.netpair import Guest, frame, mac, make_guest
from reference.network_attacker import RawHost, put

from vmbus.core.ring import COMPLETION, COMPLETION_REQUESTED, IN_BAND
from vmbus.errors import DeviceError
from vmbus.network import rndis
from vmbus.network.oid import Offloads, Oid
from vmbus.network.rndis import Frame
from vmbus.network.switch import Switch
from vmbus.network.vsc_protocol import GuestConfig
from vmbus.network.wire import Version

OPTIONAL = (
    Oid.GEN_MAXIMUM_FRAME_SIZE,
    Oid.GEN_MEDIA_CONNECT_STATUS,
    Oid.GEN_LINK_SPEED,
    Oid.GEN_FRIENDLY_NAME,
    Oid.TCP_OFFLOAD_HARDWARE_CAPABILITIES,
    Oid.GEN_RECEIVE_SCALE_CAPABILITIES,
)


def without(*oids: int, **config: object) -> Guest:
    """A guest whose provider does not know some OIDs."""
    guest = make_guest(Switch(), 1, **config)  # type: ignore[arg-type]
    for oid in oids:
        guest.vsp.protocol.oids._queries.pop(oid)
    return guest


@pytest.mark.parametrize(
    "oids", [*((oid,) for oid in OPTIONAL), OPTIONAL], ids=lambda oids: f"{len(oids)}-{oids[0].name}"
)
def test_a_host_that_does_not_know_an_oid(oids: tuple[Oid, ...]) -> None:
    guest = without(*oids, max_queues=4)
    nic = guest.start(GuestConfig(offloads=Offloads.everything()))
    assert (nic.mac, nic.mtu, nic.link_up) == (mac(1), 1500, True)
    unknown = Oid.GEN_RECEIVE_SCALE_CAPABILITIES in oids
    assert nic.protocol.max_queues == (1 if unknown else 4)
    assert nic.protocol.offloads.lso4 == (Oid.TCP_OFFLOAD_HARDWARE_CAPABILITIES not in oids)
    assert nic.send_batch([frame(mac(2), mac(1))]) == 1
    assert guest.port.counters.received_frames == 1


def test_a_host_without_an_address_is_no_host() -> None:
    with pytest.raises(DeviceError):
        without(Oid.ETHERNET_PERMANENT_ADDRESS).start()


def test_rss_capabilities_of_revision_1() -> None:
    guest = make_guest(Switch(), 1, max_queues=4)
    queries = guest.vsp.protocol.oids._queries
    whole = queries[Oid.GEN_RECEIVE_SCALE_CAPABILITIES]
    queries[Oid.GEN_RECEIVE_SCALE_CAPABILITIES] = lambda data: whole(data)[:16]
    nic = guest.start()
    assert (nic.protocol.max_queues, nic.protocol.table_entries) == (4, 128)


@pytest.mark.parametrize("version", [Version.V5, Version.V6, Version.V6_1])
def test_a_send_table_that_is_not_where_the_host_says(version: Version) -> None:
    """Hosts up to NVSP 6 pad the message to its full length before the table, and say that it stands at 12."""
    guest = make_guest(Switch(), 1)
    nic = guest.start(GuestConfig(versions=(version,)))
    host = RawHost(guest.host_end)
    table = tuple(n % 3 for n in range(16))
    entries = struct.pack("<16I", *table)
    host.send(struct.pack("<3I", 134, 16, 12) + entries, flags=0)
    nic.receive()
    assert nic.protocol.send_table == table
    other = struct.pack("<16I", *reversed(table))
    host.send(struct.pack("<3I", 134, 16, 12) + bytes(16) + other, flags=0)
    nic.receive()
    assert (nic.protocol.send_table == table[::-1]) == (version != Version.V6_1)
    assert nic.protocol.violations == 0


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("extra", [1, 4, 7, 300])
def test_a_range_may_be_longer_than_its_message(plain: bool, extra: int) -> None:
    guest = make_guest(Switch(), 1)
    nic = guest.start()
    nic.use_compiled_path = plain
    host = RawHost(guest.host_end)
    data = frame(mac(1), mac(2))
    message = rndis.pack_packet(Frame(data))
    put(guest, 0, message + b"\xee" * extra)
    host.receive_ranges([(len(message) + extra, 0)])
    assert nic.receive() == [data]
    assert nic.protocol.violations == 0


def test_data_behind_256_bytes_and_checksums_beside_every_frame() -> None:
    """As OpenVMM sends them; transaction ids begin with 0."""
    guest = make_guest(Switch(), 1)
    nic = guest.start()
    host = RawHost(guest.host_end)
    size = nic.protocol.receive_section[0]
    frames = [frame(mac(1), mac(2), bytes([n]) * 50) for n in range(3)]
    for number, data in enumerate(frames):
        put(guest, number * size, rndis.pack_packet(Frame(data, checksum=0), data_at=256))
        payload = struct.pack("<4I", 107, 0, 0xFFFFFFFF, 0).ljust(40, b"\0")
        length = 256 + len(data)
        if host.channel.outgoing.send_transfer_pages(payload, 0xCAFE, [(length, number * size)], number):
            host.channel.signal()
    assert nic.receive() == frames
    host.drain()
    assert [host.answers[number][:8] for number in range(3)] == [b"\x6c\0\0\0\1\0\0\0"] * 3
    assert nic.protocol.violations == 0


def test_an_announcement_that_wants_a_completion_gets_one() -> None:
    guest = make_guest(Switch(), 1)
    nic = guest.start()
    host = RawHost(guest.host_end)
    tid = host.send(struct.pack("<3I", 128, 1, 7), kind=IN_BAND, flags=COMPLETION_REQUESTED, tid=1 << 63)
    nic.receive()
    host.drain()
    assert nic.protocol.vf_serial == 7
    assert tid in host.answers


@pytest.mark.parametrize("in_band", [True, False])
def test_completions_behind_a_control_message_free_their_sections(in_band: bool) -> None:
    """What the compiled path leaves to Python must not keep the sections of what follows."""
    guest = make_guest(Switch(), 1)
    nic = guest.start()
    assert nic._sections is not None
    free = nic._sections.available
    host = RawHost(guest.host_end)
    sent = [frame(mac(2), mac(1), bytes([n]) * 60) for n in range(6)]
    for data in sent:
        assert nic.send_batch([data]) == 1
    assert nic._sections.available == free - 6
    ids = [packet.transaction_id for packet in host.channel.incoming.recv_packets(64)]
    if in_band:
        host.channel.outgoing.send(struct.pack("<3I", 128, 1, 7).ljust(40, b"\0"), 0, IN_BAND, 0)
    else:
        put(guest, 0, struct.pack("<5I", 7, 20, 0x40010018, 0, 0))
        payload = struct.pack("<4I", 107, 1, 0xFFFFFFFF, 0).ljust(40, b"\0")
        host.channel.outgoing.send_transfer_pages(payload, 0xCAFE, [(20, 0)], 3)
    for tid in ids[:5]:
        host.channel.outgoing.send(struct.pack("<2I", 108, 1 if tid != ids[1] else 2), tid, COMPLETION, 0)
    host.channel.outgoing.send(b"", ids[5], COMPLETION, 0)
    host.channel.signal()
    nic.receive()
    assert nic._sections.available == free
    assert (nic.sent_frames, nic.failed_frames, nic.protocol.violations) == (4, 2, 0)
    assert nic.send_batch(sent) == len(sent)

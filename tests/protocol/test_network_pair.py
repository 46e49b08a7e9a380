"""Provider and client back to back: every version, frames of all kinds, control, and their ends."""

import gc
import random
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import netpair, packets
from reference.netpair import frame, mac, make_guest, make_pair, receive_all, send_all

from vmbus.bus.channel import loopback
from vmbus.errors import DeviceError, LocalProtocolError
from vmbus.network import vsp_delivery
from vmbus.network.offload import coalesce
from vmbus.network.oid import HashTypes, Offloads, Oid, PacketFilter
from vmbus.network.rndis import Frame, LargeSend, NdisStatus, ReceiveChecksum, TransmitChecksum, pack_packet
from vmbus.network.rss import DEFAULT_KEY
from vmbus.network.switch import BROADCAST, Access, Switch, Trunk, tag_frame
from vmbus.network.vsc_protocol import GuestConfig
from vmbus.network.vsp_protocol import HostState, RndisState
from vmbus.network.wire import Capabilities, Version

VERSIONS = pytest.mark.parametrize("version", list(Version), ids=lambda v: v.name)
EVERYTHING = Offloads.everything()
ALL_CAPABILITIES = Capabilities.IEEE_8021Q | Capabilities.SRIOV | Capabilities.TEAMING | Capabilities.RSC


def full(version: int = Version.V6_1, **more: object) -> GuestConfig:
    return GuestConfig(
        versions=(version,),
        offloads=EVERYTHING,
        capabilities=ALL_CAPABILITIES,
        **more,  # type: ignore[arg-type]
    )


@VERSIONS
def test_every_version_comes_up_and_moves_frames(version: Version) -> None:
    _, a, b = make_pair(full(version))
    assert a.nic.protocol.version == a.vsp.protocol.version == version
    assert (a.nic.mac, a.nic.mtu, a.nic.link_up) == (mac(1), 1500, True)
    assert a.nic.protocol.link_speed == 10_000_000_000
    assert a.nic.protocol.friendly_name == "Network Adapter"
    assert (a.vsp.protocol.state, a.vsp.protocol.rndis_state) == (HostState.READY, RndisState.INITIALIZED)
    expected = (6, 1) if version < Version.V5 else (6, 30)
    assert a.vsp.protocol.ndis_version == expected
    frames = [frame(mac(2), mac(1), bytes([n]) * size) for n, size in enumerate((1, 46, 600, 1400, 1500))]
    send_all(a.nic, frames)
    assert receive_all(b.nic) == frames
    assert a.nic.sent_frames == len(frames)
    assert a.nic.sent_bytes == sum(map(len, frames))
    assert a.vsp.statistics.violations == a.nic.protocol.violations == b.nic.protocol.violations == 0
    offloads = a.vsp.protocol.oids.offloads
    assert offloads.lso4
    assert offloads.transmit.udp4 == (version >= Version.V5)
    assert a.vsp.protocol.rsc == ((True, True) if version == Version.V6_1 else (False, False))


def test_the_best_common_version_is_taken() -> None:
    switch = Switch()
    guest = make_guest(switch, 1, versions=frozenset({Version.V1, Version.V4}))
    assert guest.start().protocol.version == Version.V4
    other = make_guest(switch, 2, versions=frozenset({Version.V1}))
    with pytest.raises(DeviceError, match="none of our NVSP versions"):
        other.start(GuestConfig(versions=(Version.V6_1, Version.V5)))
    assert other.vsp.protocol.state == HostState.CREATED


@given(st.integers(0, 2**32))
@settings(max_examples=12, deadline=None)
def test_any_mix_of_sizes_and_batches_arrives_in_order(seed: int) -> None:
    rng = random.Random(seed)
    _, a, b = make_pair(GuestConfig(versions=(rng.choice(list(Version)),)))
    for _ in range(20):
        count = rng.randint(1, 60)
        frames = [frame(mac(2), mac(1), rng.randbytes(rng.randint(1, 1500))) for _ in range(count)]
        assert a.nic.send_batch(frames) == count
        assert receive_all(b.nic) == frames


def test_large_frames_and_jumbo_mtu() -> None:
    config = GuestConfig(mtu=9000)
    _, a, b = make_pair(config)
    assert a.nic.mtu == 9000
    assert a.nic.protocol.receive_section[0] >= 9014 + 256 + 36
    frames = [
        frame(mac(2), mac(1), bytes([n]) * size) for n, size in enumerate((6000, 9000, 6100, 100, 8999))
    ]
    send_all(a.nic, frames)
    assert receive_all(b.nic) == frames
    send_all(a.nic, [frame(mac(2), mac(1), bytes(9100))])
    assert receive_all(b.nic) == []
    assert a.nic.failed_frames == 1


def test_version_1_has_no_jumbo_frames() -> None:
    _, a, _ = make_pair(GuestConfig(versions=(Version.V1,), mtu=9000))
    assert a.nic.mtu == 1500


@VERSIONS
def test_link_state_and_speed(version: Version) -> None:
    _, a, _ = make_pair(full(version))
    a.vsp.set_link(False)
    assert not a.nic.link_up
    assert a.nic.query(Oid.GEN_MEDIA_CONNECT_STATUS) == b"\1\0\0\0"
    assert a.nic.query(Oid.GEN_LINK_STATE)[4:8] == b"\2\0\0\0"
    a.vsp.set_link(True)
    a.vsp.set_link(True)
    assert a.nic.link_up
    a.vsp.set_link_speed(1_000_000_000)
    assert a.nic.protocol.link_speed == (1_000_000_000 if version >= Version.V5 else 10_000_000_000)
    a.vsp.network_changed()
    assert a.nic.protocol.network_changes == 1


def test_nothing_passes_while_the_link_is_down() -> None:
    _, a, b = make_pair()
    b.vsp.set_link(False)
    send_all(a.nic, [frame(mac(2), mac(1))])
    b.vsp.set_link(True)
    assert receive_all(b.nic) == []
    a.vsp.set_link(False)
    send_all(a.nic, [frame(mac(2), mac(1))])
    assert receive_all(b.nic) == []
    a.vsp.set_link(True)
    send_all(a.nic, [frame(mac(2), mac(1))])
    assert len(receive_all(b.nic)) == 1


def test_the_packet_filter_is_kept() -> None:
    _, a, b = make_pair()
    multicast, other = b"\x33\x33\0\0\0\1", b"\x33\x33\0\0\0\2"
    frames = [frame(to, mac(1)) for to in (mac(2), mac(9), BROADCAST, multicast, other)]

    def seen(wanted: PacketFilter) -> set[int]:
        b.nic.set_filter(wanted)
        send_all(a.nic, frames)
        got = receive_all(b.nic)
        return {frames.index(f) for f in got}

    assert seen(PacketFilter(0)) == set()
    assert seen(PacketFilter.DIRECTED) == {0}
    assert seen(PacketFilter.BROADCAST) == {2}
    assert seen(PacketFilter.DIRECTED | PacketFilter.ALL_MULTICAST) == {0, 3, 4}
    assert seen(PacketFilter.MULTICAST) == set()
    b.nic.set(Oid.ETHERNET_MULTICAST_LIST, multicast)
    assert seen(PacketFilter.MULTICAST) == {3}
    assert seen(PacketFilter.PROMISCUOUS) == {0, 1, 2, 3, 4}
    b.nic.reset()
    assert b.vsp.protocol.oids.multicast == frozenset()
    assert b.vsp.protocol.oids.packet_filter == 13


def test_vlan_tags_travel_beside_the_frame() -> None:
    _, a, b = make_pair()
    tagged = tag_frame(frame(mac(2), mac(1)), 0x6000 | 5)
    a.port.vlan = b.port.vlan = Trunk(frozenset({5}))
    send_all(a.nic, [tagged])
    assert receive_all(b.nic) == [tagged]
    b.port.vlan = Access(5)
    send_all(a.nic, [tagged])
    assert receive_all(b.nic) == [frame(mac(2), mac(1))]


@VERSIONS
@pytest.mark.parametrize("pair", [("10.0.0.1", "10.0.0.2"), ("fe80::1", "fe80::2")], ids=["ipv4", "ipv6"])
def test_checksum_offload_leaves_valid_frames(version: Version, pair: tuple[str, str]) -> None:
    _, a, b = make_pair(full(version))
    v4 = "." in pair[0]
    wanted = TransmitChecksum(ipv4=v4, ipv6=not v4, tcp=True, transport_offset=34 if v4 else 54)
    broken = packets.tcp_frame(*pair, b"data" * 20, checksum=0xDEAD)
    b.nic.set_filter(PacketFilter.PROMISCUOUS)
    assert a.nic.send(Frame(broken, checksum=wanted.pack()))
    (result,) = receive_all(b.nic)
    assert result == packets.tcp_frame(*pair, b"data" * 20)
    assert packets.is_valid(result)


@VERSIONS
@pytest.mark.parametrize("pair", [("10.0.0.1", "10.0.0.2"), ("fe80::1", "fe80::2")], ids=["ipv4", "ipv6"])
def test_large_sends_are_cut_and_coalesced(version: Version, pair: tuple[str, str]) -> None:
    _, a, b = make_pair(full(version))
    b.nic.set_filter(PacketFilter.PROMISCUOUS)
    v6 = ":" in pair[0]
    payload = random.Random(1).randbytes(40_000)
    large = packets.tcp_frame(*pair, payload, flags=0x18, checksum=0)
    mss = 1440 if v6 else 1460
    assert a.nic.send(Frame(large, large_send=LargeSend(mss, 54 if v6 else 34, v6).pack()))
    got = receive_all(b.nic)
    assert all(packets.is_valid(f) for f in got)
    header = 74 if v6 else 54
    assert b"".join(f[header:] for f in got) == payload
    assert len(got) == (1 if version == Version.V6_1 else -(-len(payload) // mss))
    assert a.vsp.port.counters.received_frames == -(-len(payload) // mss)


def test_a_host_that_leaves_the_checksum_of_what_it_coalesced(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the RSC interface allows it: checked before coalescing, and the header's value fits the first segment only."""

    def coalesced(frames: list[bytes], **wanted: bool) -> list[list[bytes]]:
        groups = coalesce(frames, **wanted)
        return [[group[0][:50] + b"\xab\xcd" + group[0][52:], *group[1:]] for group in groups]

    found = ReceiveChecksum.TCP_VALUE_INVALID | ReceiveChecksum.TCP_SUCCEEDED | ReceiveChecksum.IP_SUCCEEDED
    _, a, b = make_pair(full())
    b.nic.set_filter(PacketFilter.PROMISCUOUS)
    monkeypatch.setattr(vsp_delivery, "coalesce", coalesced)
    monkeypatch.setattr(b.vsp, "_checksum_of", lambda frame, many: int(found))
    large = packets.tcp_frame("10.0.0.1", "10.0.0.2", bytes(range(250)) * 20, flags=0x18)
    assert a.nic.send(Frame(large, large_send=LargeSend(1460, 34).pack()))
    assert receive_all(b.nic) == [large]


def test_rsc_is_only_for_those_who_asked() -> None:
    quiet = GuestConfig(offloads=EVERYTHING)
    _, a, b = make_pair(full(), quiet)
    b.nic.set_filter(PacketFilter.PROMISCUOUS)
    large = packets.tcp_frame("10.0.0.1", "10.0.0.2", bytes(5000), checksum=0)
    assert a.nic.send(Frame(large, large_send=LargeSend(1460, 34).pack()))
    assert len(receive_all(b.nic)) == 4


@pytest.mark.parametrize("version", [v for v in Version if v >= Version.V5], ids=lambda v: v.name)
def test_rss_spreads_over_subchannels(version: Version) -> None:
    _, a, b = make_pair(full(version), max_queues=4)
    b.open_subchannels(3)
    assert b.granted == [3]
    assert b.nic.protocol.send_table == tuple(i % 4 for i in range(16))
    b.nic.set_filter(PacketFilter.PROMISCUOUS)
    b.nic.set_rss([0, 1, 2, 3] * 32)
    frames = [packets.tcp_frame("10.0.0.1", "10.0.0.2", b"x", sport=port) for port in range(200)]
    for start in range(0, 200, 50):
        send_all(a.nic, frames[start : start + 50])
    got = receive_all(b.nic)
    assert sorted(got) == sorted(frames)
    used = [queue.channel.account.packets_sent for queue in b.vsp._queues.values()]
    assert min(used[1:]) > 0
    send_all(b.nic, frames[:50])  # spread over the channels by the host's table
    assert all(queue.channel.account.packets_received for queue in b.vsp._queues.values())
    b.nic.set_rss([0], DEFAULT_KEY, HashTypes(0))


def test_subchannel_requests_have_limits() -> None:
    _, a, _ = make_pair(max_queues=4)
    for count in (0, 4, 0xFFFFFFFF):
        with pytest.raises(DeviceError, match="refused"):
            a.nic.request_subchannels(count)
    assert a.nic.request_subchannels(2) == 2
    assert a.granted == [2]


def test_subchannels_asked_for_again_are_those_that_are_missing() -> None:
    _, a, _ = make_pair(max_queues=4)
    a.open_subchannels(1)
    for count, more in ((1, 0), (3, 2), (2, 0), (3, 0)):
        assert a.nic.request_subchannels(count) == more
    assert a.granted == [1, 3]
    with pytest.raises(DeviceError, match="refused"):
        a.nic.request_subchannels(4)
    for index in (2, 3):
        guest_end, host_end = loopback(a.memory, 16, 16)
        a.vsp.add_subchannel(index, host_end)
        a.nic.add_subchannel(index, guest_end)
    assert a.nic.protocol.send_table == tuple(i % 4 for i in range(16))
    assert a.vsp.statistics.violations == 1


def test_a_subchannel_may_close_with_packets_on_it() -> None:
    _, a, b = make_pair(full(), max_queues=2)
    b.open_subchannels(1)
    b.nic.set_filter(PacketFilter.PROMISCUOUS)
    b.nic.set_rss([1, 1])
    before = b.vsp._receive.available  # type: ignore[union-attr]
    sub = b.nic._channels[1]
    sub.on_signal = None  # the guest stops looking at it
    send_all(a.nic, [packets.tcp_frame("10.0.0.1", "10.0.0.2", b"x")] * 40)
    assert b.vsp._receive.available < before  # type: ignore[union-attr]
    sub.close()
    assert b.vsp._receive.available == before  # type: ignore[union-attr]
    send_all(a.nic, [packets.tcp_frame("10.0.0.1", "10.0.0.2", b"x")] * 4)
    assert len(receive_all(b.nic)) == 4  # by the primary channel now


@VERSIONS
def test_virtual_functions(version: Version) -> None:
    _, a, _ = make_pair(full(version))
    switched: list[bool] = []
    a.vsp.on_data_path = switched.append
    a.vsp.associate_vf(77)
    if version < Version.V5:  # such a guest does not say that it can do SR-IOV
        assert a.nic.protocol.vf_serial is None
        return
    assert a.nic.protocol.vf_serial == 77
    a.nic.switch_data_path(True)
    a.nic.switch_data_path(True)
    a.nic.switch_data_path(False)
    assert switched == [True, False]
    a.vsp.associate_vf(None)
    assert a.nic.protocol.vf_serial is None
    a.nic.switch_data_path(True)  # completed, but there is nothing to switch to
    assert switched == [True, False]
    assert a.vsp.statistics.violations == 1


@pytest.mark.parametrize("version", [Version.V1, Version.V2])
def test_what_a_version_does_not_know_is_not_sent(version: Version) -> None:
    _, a, b = make_pair(full(version))
    assert a.nic.request_subchannels(3) == 0
    with pytest.raises(LocalProtocolError, match="SWITCH_DATA_PATH"):
        a.nic.switch_data_path(True)
    assert a.vsp.statistics.violations == 0
    send_all(a.nic, [frame(mac(2), mac(1))])
    assert receive_all(b.nic) == [frame(mac(2), mac(1))]


def test_a_virtual_function_from_before_the_guest_came() -> None:
    guest = make_guest(Switch(), 1)
    guest.vsp.associate_vf(5)
    assert guest.start(full()).protocol.vf_serial == 5


def test_statistics_as_the_guest_sees_them() -> None:
    _, a, b = make_pair()
    send_all(a.nic, [frame(mac(2), mac(1)), frame(BROADCAST, mac(1)), frame(b"\1\0\x5e\0\0\1", mac(1))])
    receive_all(b.nic)

    def number(nic: object, oid: Oid) -> int:
        return int.from_bytes(nic.query(oid), "little")  # type: ignore[attr-defined]

    size = len(frame(mac(2), mac(1)))
    assert number(a.nic, Oid.GEN_XMIT_OK) == number(b.nic, Oid.GEN_RCV_OK) == 3
    for oid in (Oid.GEN_DIRECTED_FRAMES_XMIT, Oid.GEN_MULTICAST_FRAMES_XMIT, Oid.GEN_BROADCAST_FRAMES_XMIT):
        assert number(a.nic, oid) == 1
    assert number(b.nic, Oid.GEN_BYTES_RCV) == number(a.nic, Oid.GEN_BYTES_XMIT) == 3 * size


def test_every_listed_oid_answers() -> None:
    _, a, _ = make_pair(full())
    listed = a.nic.query(Oid.GEN_SUPPORTED_LIST)
    oids = [int.from_bytes(listed[at : at + 4], "little") for at in range(0, len(listed), 4)]
    assert {Oid.GEN_MAXIMUM_FRAME_SIZE, Oid.ETHERNET_PERMANENT_ADDRESS} <= set(oids)
    only_set = {Oid.GEN_RNDIS_CONFIG_PARAMETER, Oid.GEN_RECEIVE_SCALE_PARAMETERS, Oid.TCP_OFFLOAD_PARAMETERS,
                Oid.GEN_LINK_PARAMETERS, Oid.GEN_NETWORK_LAYER_ADDRESSES, Oid.GEN_PROTOCOL_OPTIONS}  # fmt: skip
    for oid in oids:
        if oid in only_set:
            with pytest.raises(DeviceError, match=f"{int(NdisStatus.NOT_SUPPORTED):x}"):
                a.nic.query(oid)
        elif oid != Oid.ETHERNET_MULTICAST_LIST:
            assert a.nic.query(oid)
    with pytest.raises(DeviceError):
        a.nic.query(0x12345678)
    with pytest.raises(DeviceError):
        a.nic.set(0x12345678, b"")


@pytest.mark.parametrize("allowed", [True, False])
def test_mac_change(allowed: bool) -> None:
    _, a, b = make_pair(allow_mac_change=allowed)
    name, value = "NetworkAddress".encode("utf-16-le"), "02aabbccddee".encode("utf-16-le")
    info = b"".join(n.to_bytes(4, "little") for n in (20, len(name), 2, 20 + len(name), len(value)))
    if not allowed:
        with pytest.raises(DeviceError):
            b.nic.set(Oid.GEN_RNDIS_CONFIG_PARAMETER, info + name + value)
        return
    b.nic.set(Oid.GEN_RNDIS_CONFIG_PARAMETER, info + name + value)
    new = bytes.fromhex("02aabbccddee")
    assert b.nic.query(Oid.ETHERNET_CURRENT_ADDRESS) == new
    assert b.nic.query(Oid.ETHERNET_PERMANENT_ADDRESS) == mac(2)
    send_all(a.nic, [frame(new, mac(1)), frame(mac(2), mac(1))])
    assert receive_all(b.nic) == [frame(new, mac(1))]


def test_keepalive_both_ways() -> None:
    _, a, _ = make_pair()
    a.nic.keepalive()
    assert a.nic.protocol.violations == 0


def test_a_guest_that_reads_nothing_loses_its_own_frames_only() -> None:
    switch, a, b = make_pair()
    c = make_guest(switch, 3)
    c.start()
    b.guest_end.on_signal = None
    total = 0
    for _ in range(200):
        total += a.nic.send_batch([frame(BROADCAST, mac(1), bytes(1000))] * 20)
        assert len(receive_all(c.nic)) == 20
    assert total == 4000
    statistics = b.vsp.statistics
    assert statistics.received_no_buffer > 0
    assert statistics.received + statistics.received_no_buffer == 4000
    got = receive_all(b.nic)  # and it may come back
    assert len(got) == statistics.received
    send_all(a.nic, [frame(mac(2), mac(1))])
    assert receive_all(b.nic) == [frame(mac(2), mac(1))]


def test_a_guest_with_a_full_outgoing_ring_gets_partial_counts() -> None:
    _, a, b = make_pair()
    a.host_end.on_signal, held = None, a.host_end.on_signal
    frames = [frame(mac(2), mac(1), bytes([n % 256]) * 1000) for n in range(2000)]
    sent = a.nic.send_batch(frames)
    assert 0 < sent < len(frames)
    assert a.nic.send_batch(frames[sent:]) == 0
    a.host_end.on_signal = held
    a.host_end.deliver_signal()
    got = receive_all(b.nic)
    rest = sent
    while rest < len(frames):
        rest += a.nic.send_batch(frames[rest:])
        got += receive_all(b.nic)
    assert got == frames


def test_module_unload_and_load() -> None:
    switch = Switch()
    guest = make_guest(switch, 1)
    guest.start()
    guest.nic.close()
    guest.nic.close()
    assert guest.vsp.protocol.state == HostState.REVOKED
    assert guest.vsp.protocol.rndis_state == RndisState.HALTED
    assert not guest.vsp.is_open
    assert not guest.nic.is_open
    with pytest.raises(LocalProtocolError):
        guest.nic.send(frame(mac(2), mac(1)))
    with pytest.raises(LocalProtocolError):
        guest.nic.query(Oid.GEN_LINK_STATE)
    again = make_guest(switch, 1)
    with again.start() as nic:
        assert nic.link_up


def test_rescinded_while_open() -> None:
    _, a, b = make_pair()
    a.host_end.close()
    assert not a.nic.link_up
    with pytest.raises(LocalProtocolError):
        a.nic.send(frame(mac(2), mac(1)))
    send_all(b.nic, [frame(mac(1), mac(2))])
    a.nic.close()
    a.vsp.set_link(False)
    gc.collect()


def test_too_little_memory_is_said() -> None:
    guest = make_guest(Switch(), 1)
    with pytest.raises(LocalProtocolError, match="pages"):
        guest.start(page_count=80)


def test_a_silent_host_times_out() -> None:
    guest = make_guest(Switch(), 1)
    guest.host_end.on_signal = None
    with pytest.raises(DeviceError, match="did not answer"):
        guest.start(timeout=0.05)


def test_frames_too_long_for_the_driver() -> None:
    _, a, _ = make_pair()
    with pytest.raises(LocalProtocolError):
        a.nic.send(bytes(80_000))


def test_two_guests_in_threads() -> None:
    """Both ends of both channels are driven from two threads at once; nothing is lost or reordered."""
    _, a, b = make_pair()
    rounds, size = 60, 16
    lost: list[str] = []

    def work(me: netpair.Guest, other: bytes, own: bytes) -> None:
        try:
            for number in range(rounds):
                batch = [frame(other, own, bytes([number, n]) + bytes(60)) for n in range(size)]
                done = 0
                while done < size:
                    done += me.nic.send_batch(batch[done:])
        except Exception as error:
            lost.append(repr(error))

    threads = [
        threading.Thread(target=work, args=(a, mac(2), mac(1))),
        threading.Thread(target=work, args=(b, mac(1), mac(2))),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert lost == []
    for guest, own, other in ((a, mac(1), mac(2)), (b, mac(2), mac(1))):
        got = receive_all(guest.nic)
        assert got == [
            frame(own, other, bytes([number, n]) + bytes(60)) for number in range(rounds) for n in range(size)
        ]


def test_a_provider_that_waits_for_room_is_woken() -> None:
    """The guest's ring is full of completions: the provider stops reading, and goes on when the guest reads."""
    for plain, deliver in ((True, False), (True, True), (False, False), (False, True)):
        _, a, b = make_pair()
        a.vsp.use_compiled_path = plain
        reading = a.guest_end.on_signal
        a.guest_end.on_signal = None
        frames = [frame(mac(2), mac(1), bytes([n % 256]) * 40) for n in range(100)]
        message = pack_packet(Frame(frame(mac(9), mac(1))))
        a.nic._send.view[: len(message)] = message
        payload = a.nic.protocol.rndis_packet(0, 0, len(message))
        while a.host_end.outgoing.free_bytes >= 64:  # the last completions that fit
            a.guest_end.send(payload, 1, 6, 1)
        for number in range(3):  # and some that do not
            a.guest_end.send(payload, 100 + number, 6, 1)
        assert a.host_end.incoming.available_bytes > 0 or a.vsp._queues[0].completions
        if deliver:  # what is delivered meanwhile must not undo the waiting
            b.nic.send_batch([frame(mac(1), mac(2))])
        a.guest_end.on_signal = reading
        a.nic.receive(1000)
        assert a.host_end.incoming.available_bytes == 0
        assert not a.vsp._queues[0].completions
        send_all(a.nic, frames)
        assert receive_all(b.nic) == frames

"""Frames on their way to a guest: one receive buffer for all channels, settings that change, what comes late."""

import struct
from collections.abc import Callable

import pytest
from reference.netpair import Guest, frame, mac, make_guest, make_pair, receive_all, send_all
from reference.network_drivers import DPDK, HALT, INDICATE, Driver, make_driver

from vmbus.core.ring import COMPLETION
from vmbus.network.offload import segment
from vmbus.network.oid import Offloads, PacketFilter
from vmbus.network.rndis import LargeSend
from vmbus.network.switch import BROADCAST, Port, Switch
from vmbus.network.vsc_protocol import GuestConfig
from vmbus.network.vsp_delivery import MAX_BACKLOG
from vmbus.network.wire import Capabilities

FILTER, OFFLOADS = 0x1010E, 0xFC01020C
FRAME, SET_COMPLETE, RESET, RESET_COMPLETE = 1, 0x80000005, 6, 0x80000006
RSC = GuestConfig(offloads=Offloads.everything(), capabilities=Capabilities.IEEE_8021Q | Capabilities.RSC)


def started(capabilities: int) -> tuple[Driver, Switch]:
    """A driver that is ready for frames, with one channel."""
    switch = Switch()
    driver = make_driver(DPDK, switch)
    driver.negotiate((0x60001,))
    driver.configure(1514, capabilities, (6, 30))
    driver.hand_over()
    driver.initialize()
    return driver, switch


def udp(number: int) -> bytes:
    """A frame to guest 1 whose RSS hash depends on `number`."""
    header = bytes.fromhex("450000200000400040110000") + bytes(
        [10, 0, number >> 8, number & 255, 10, 0, 0, 2]
    )
    return frame(mac(1), mac(9), header + bytes(12), 0x0800)


def with_channels(amount: int) -> tuple[Guest, Port, dict[int, list[bytes]]]:
    """A guest with sub-channels, a peer, and many frames by the channel that RSS gives them."""
    switch = Switch()
    guest = make_guest(switch, 1, max_queues=amount)
    guest.start()
    guest.open_subchannels(amount - 1)
    guest.nic.set_filter(PacketFilter.PROMISCUOUS)
    guest.nic.set_rss(list(range(amount)))
    rss = guest.vsp.protocol.oids.rss
    assert rss is not None
    frames: dict[int, list[bytes]] = {index: [] for index in range(amount)}
    for number in range(3000):
        made = udp(number)
        frames[rss.queue(rss.hash(made))].append(made)
    return guest, switch.connect("peer"), frames


def sections(guest: Guest) -> int:
    assert guest.vsp._receive is not None
    return guest.vsp._receive.count


def asleep(guest: Guest) -> None:
    """The guest takes no more interrupts of its channels."""
    for channel in guest.nic._channels.values():
        channel.on_signal = None


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("first", [0, 1])
def test_sections_of_one_channel_serve_the_frames_of_another(compiled: bool, first: int) -> None:
    guest, peer, frames = with_channels(2)
    guest.vsp.use_compiled_path = compiled
    asleep(guest)
    peer.send(frames[first][: sections(guest)])
    late = frames[1 - first][:5]
    peer.send(late)
    assert [f for f in receive_all(guest.nic) if f in late] == late


def read_and_complete(guest: Guest, index: int) -> int:
    """What a driver does with one channel: take all that is there, then complete it; how many frames it was."""
    channel, taken = guest.nic._channels[index], 0
    for packet in channel.incoming.recv_packets(64):
        taken += len(packet.transfer_ranges or ())
        channel.outgoing.send(struct.pack("<2I", 108, 1), packet.transaction_id, COMPLETION, 0)
    channel.signal()
    return taken


def test_a_channel_that_is_always_busy_does_not_take_every_section() -> None:
    guest, peer, frames = with_channels(3)
    asleep(guest)
    for index in range(3):
        peer.send(frames[index][:400])
    for _ in range(12):  # channel 0 gets frames as fast as it takes them
        peer.send(frames[0][: read_and_complete(guest, 0)])
    assert read_and_complete(guest, 1) > 100
    assert read_and_complete(guest, 2) > 100
    assert guest.vsp.statistics.received_no_buffer == 0


def test_control_messages_find_the_sections_of_a_sub_channel() -> None:
    """Sixteen sections are kept for them; the guest lets more of them wait than that."""
    guest, peer, frames = with_channels(2)
    asleep(guest)
    peer.send(frames[1][: sections(guest)])
    for up in (False, True) * 20:
        guest.vsp.set_link(up)
    receive_all(guest.nic)
    assert guest.vsp._receive is not None
    assert guest.vsp._receive.available == sections(guest)
    assert not guest.vsp._control
    assert guest.nic.link_up


def test_a_sub_channel_that_closes_leaves_its_frames_and_sections_to_the_primary_one() -> None:
    guest, peer, frames = with_channels(2)
    asleep(guest)
    peer.send(frames[1][: sections(guest)])  # in the ring of the sub-channel, and lost with it
    peer.send(frames[1][sections(guest) :][:100])  # these wait
    guest.nic._channels[1].close()
    peer.send(frames[0][:5])
    got = receive_all(guest.nic)
    assert all(f in got for f in frames[0][:5])
    lost = sections(guest) - 16
    assert [f for f in got if f in frames[1]] == frames[1][lost : sections(guest) + 100]


# ---- coalesced packets


def burst(size: int, mss: int) -> list[bytes]:
    head = mac(1) + mac(2) + b"\x08\0" + bytes.fromhex("4500000000004000400600000a0000010a000002")
    tcp = bytes.fromhex("1f900050000003e8000000015010200000000000")
    return segment(head + tcp + bytes(n % 251 for n in range(size)), LargeSend(mss, 34))


@pytest.mark.parametrize(("pages", "mss"), [(3000, 100), (160, 400), (95, 1400), (87, 1400)], ids=str)
def test_a_burst_of_more_segments_than_a_packet_takes_comes_in_several(pages: int, mss: int) -> None:
    """The last case has the fewest sections that a client takes: two for frames, sixteen for control messages."""
    switch = Switch()
    guest = make_guest(switch, 1, pages=256, memory_size=64 << 20)
    nic = guest.start(RSC, page_count=pages)
    peer = switch.connect("peer")
    for _ in range(3):
        frames = burst(60000, mss)
        peer.send(frames)
        payload = b"".join(got[54:] for got in receive_all(nic))
        assert payload == b"".join(f[54:] for f in frames)
    assert guest.vsp.statistics.received_no_buffer == 0
    assert guest.vsp.statistics.received == 3 * len(burst(60000, mss))


def test_coalescing_that_was_switched_off_has_ended_when_the_guest_hears_it() -> None:
    driver, switch = started(0x8 | 0x80)
    coalescing = struct.pack("<BBH", 0x80, 3, 28) + bytes(18) + b"%c%c" + bytes(4)
    assert driver.set(OFFLOADS, coalescing % (2, 2)) == 0
    assert driver.set(FILTER, struct.pack("<I", 0x20)) == 0
    switch.connect("peer").send(burst(60000, 200))
    switch.connect("another").send(burst(60000, 200))
    assert driver.set(OFFLOADS, coalescing % (1, 1)) == 0
    kinds = [message.kind for message in driver.messages]
    heard = len(kinds) - 1 - kinds[::-1].index(SET_COMPLETE)
    before, after = driver.messages[:heard], driver.messages[heard:]
    assert any(b"\1\0\0\x80" in m.data[44:92] for m in before), "some were fragments of a coalesced packet"
    assert [len(m.data) for m in after if m.kind == FRAME].count(44 + 254) > 20
    assert not any(b"\1\0\0\x80" in m.data[44:92] for m in after)


# ---- settings


def waiting_driver() -> tuple[Driver, Guest]:
    """A driver that has read nothing of a thousand frames: to itself, to everybody, to a group, to a stranger."""
    driver, switch = started(0x8)
    other = make_guest(switch, 2)
    other.start()
    assert driver.set(FILTER, struct.pack("<I", 0x20)) == 0
    send_all(other.nic, [frame(to, mac(2)) for to in (mac(1), BROADCAST, b"\x33\x33\0\0\0\1", mac(7))] * 250)
    return driver, other


def frames_after(driver: Driver, kind: int) -> list[bytes]:
    kinds = [message.kind for message in driver.messages]
    assert FRAME in kinds[: kinds.index(kind, 3)], "frames came, and then the answer"
    at = len(kinds) - 1 - kinds[::-1].index(kind)
    return [message.data[44:] for message in driver.messages[at:] if message.kind == FRAME]


@pytest.mark.parametrize(
    ("value", "passes"),
    [
        (0, lambda to: False),
        (0x01, lambda to: to == mac(1)),
        (0x09, lambda to: to in (mac(1), BROADCAST)),
        (0x03, lambda to: to == mac(1)),
    ],
    ids=["none", "directed", "directed and broadcast", "directed and a list of multicast"],
)
def test_after_a_narrower_filter_no_frame_comes_that_it_keeps_out(
    value: int, passes: Callable[[bytes], bool]
) -> None:
    driver, _ = waiting_driver()
    assert driver.set(FILTER, struct.pack("<I", value)) == 0
    after = frames_after(driver, SET_COMPLETE)
    assert all(passes(data[:6]) for data in after)
    assert bool(after) == bool(value)


def test_after_a_reset_no_frame_comes() -> None:
    driver, _ = waiting_driver()
    message = struct.pack("<3I", RESET, 12, 0)
    assert driver.transfer([message], channel=1) == 1
    assert frames_after(driver, RESET_COMPLETE) == []


def test_after_a_halt_no_frame_comes() -> None:
    driver, _ = waiting_driver()
    driver.acknowledge = False
    driver.poll()
    before = len(driver.messages)
    ids = {message.transaction_id for message in driver.messages}
    driver.control(HALT, answered=False)
    for tid in ids:
        driver.complete(tid)
    driver.poll()
    assert len(driver.messages) == before
    assert driver.guest.vsp.statistics.violations == 0  # type: ignore[union-attr]


def test_after_the_cable_was_pulled_no_frame_comes() -> None:
    driver, other = waiting_driver()
    assert isinstance(driver.guest, Guest)
    vsp = driver.guest.vsp
    waited = sum(len(queue.backlog) for queue in vsp._queues.values())
    vsp.set_link(False)
    driver.poll()
    kinds = [message.kind for message in driver.messages]
    assert kinds[-1] == INDICATE
    assert FRAME in kinds
    assert driver.guest.host_end.account.dropped == {"link is down": waited}
    vsp.set_link(True)
    send_all(other.nic, [frame(mac(1), mac(2), b"again" * 10)])
    driver.poll()
    assert [m.data[58:] for m in driver.messages[len(kinds) :] if m.kind == FRAME] == [b"again" * 10]


# ---- late


@pytest.mark.parametrize("plain", [True, False])
def test_packets_completed_after_the_buffer_was_revoked_break_no_rule(plain: bool) -> None:
    """As by Linux, when its driver is unloaded under traffic; once only, and only those that were in flight."""
    driver, _ = waiting_driver()
    assert isinstance(driver.guest, Guest)
    vsp = driver.guest.vsp
    vsp.use_compiled_path = plain
    driver.acknowledge = False
    driver.poll()
    flying = {message.transaction_id for message in driver.messages if message.kind == FRAME}
    assert len(flying) > 1
    driver.revoke()
    for tid in flying:
        driver.complete(tid)
    assert vsp.statistics.violations == 0
    driver.complete(flying.pop())
    assert vsp.statistics.violations == 1


# ---- what is lost is counted


def test_the_ledger_has_the_frames_that_found_no_room() -> None:
    _, a, b = make_pair()
    asleep(b)
    for _ in range(60):
        send_all(a.nic, [frame(mac(2), mac(1))] * 64)
    account, statistics = b.host_end.account, b.vsp.statistics
    assert statistics.received_no_buffer > 0
    assert account.dropped == {"guest has no buffer": statistics.received_no_buffer}
    assert a.host_end.account.dropped == {}
    b.guest_end.close()
    assert account.dropped["adapter closed"] == MAX_BACKLOG
    assert account.to_dict()["dropped"]["adapter closed"] == MAX_BACKLOG

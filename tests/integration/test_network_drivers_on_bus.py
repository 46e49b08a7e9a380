"""How drivers of other systems leave an adapter and come back, on a real bus with sub-channels."""

import struct
from uuid import UUID

import pytest
from reference.netpair import frame, mac
from reference.network_drivers import DPDK, FREEBSD, HALT, Attached, Driver, Rules, packet

from vmbus.bus import Inline, Offer, VmbusGuest, VmbusHost
from vmbus.bus.channel import Channel
from vmbus.hypervisor import Hypervisor, VirtualClock
from vmbus.network.adapter import NetworkAdapter
from vmbus.network.switch import BROADCAST, Switch
from vmbus.network.vsp_oid import AdapterConfig

FIRST_PAGE = 1500  # behind what the guest's bus takes for itself


class OnBus(Driver):
    def poll(self) -> None:
        for _ in range(2):
            self.channel.wait(lambda: False, 0.0)
            super().poll()


def subchannels(guest: VmbusGuest) -> list[Offer]:
    return sorted((o for o in guest.offers if o.is_subchannel), key=lambda offer: offer.subchannel_index)


def come_up(channel: Channel, rules: Rules, mtu: int) -> Driver:
    driver = OnBus(Attached(channel.memory, channel), rules, first_page=FIRST_PAGE)  # type: ignore[arg-type]
    driver.negotiate((0x60001,) if rules is DPDK else (0x50000,))
    driver.configure(mtu + 14, 8, (6, 30))
    driver.hand_over()
    driver.initialize()
    assert driver.query(0x10106) == struct.pack("<I", mtu)
    assert struct.unpack_from("<3I", driver.nvsp(133, 1, 3) or b"") == (133, 1, 3)
    return driver


@pytest.mark.parametrize("rules", [FREEBSD, DPDK], ids=lambda rules: rules.name)
def test_another_mtu_means_to_leave_and_come_back(rules: Rules) -> None:
    hypervisor = Hypervisor(clock=VirtualClock())
    root = hypervisor.create_root()
    child = hypervisor.create_child(root, name="c", memory_size=24 << 20, vps=2)
    hosting = Inline(seed=5)
    host = VmbusHost(hypervisor, child, hosting=hosting)
    switch = Switch()
    seen: list[bytes] = []
    switch.connect("wire").receiver = seen.extend
    adapter = NetworkAdapter(
        host, switch.connect("c"), AdapterConfig(mac(1), max_queues=4), instance_id=UUID(int=1)
    )
    guest = VmbusGuest(child.vps[0])
    guest.connect()
    for number, mtu in enumerate((1500, 9000, 1500), 1):
        (offer,) = [o for o in guest.offers if not o.is_subchannel]
        channel = guest.open(offer, 16, 16)
        driver = come_up(channel, rules, mtu)
        assert channel.wait(lambda: len(subchannels(guest)) == 3)
        others = [guest.open(offer, 4, 4) for offer in subchannels(guest)]
        assert driver.set(0x1010E, struct.pack("<I", 0xB)) == 0
        data = frame(BROADCAST, mac(1), bytes(mtu))
        assert driver.transfer([packet(data)]) == 1
        assert len(seen) == number
        assert seen[-1] == data
        if rules is FREEBSD:
            driver.control(HALT, answered=False)
            driver.revoke()
            for gpadl_id in driver.gpadls:  # before it closes the channel, on hosts up to Server 2016
                channel.teardown_gpadl(gpadl_id)
        else:
            driver.revoke()
            assert driver.transfer([struct.pack("<3I", HALT, 12, 1 << 20)], channel=1) == 1
        for other in others:
            other.close()
        channel.close()
        assert adapter.vsp is None
        assert subchannels(guest) == []
    assert adapter.statistics.violations == 0
    hosting.close()
    child.destroy()
    root.destroy()


def test_dpdk_waits_for_sub_channels_that_it_has_not_seen() -> None:
    """Each configuration of a port asks, and its new channels are those that DPDK finds no relid of in its list."""
    hypervisor = Hypervisor(clock=VirtualClock())
    root = hypervisor.create_root()
    child = hypervisor.create_child(root, name="c", memory_size=24 << 20, vps=2)
    hosting = Inline(seed=7)
    host = VmbusHost(hypervisor, child, hosting=hosting)
    adapter = NetworkAdapter(
        host, Switch().connect("c"), AdapterConfig(mac(1), max_queues=4), monitor_latency=100_000
    )
    guest = VmbusGuest(child.vps[0])
    guest.connect()
    channel = guest.open(guest.offers[0], 16, 16)
    driver = OnBus(Attached(channel.memory, channel), DPDK, first_page=FIRST_PAGE)  # type: ignore[arg-type]
    driver.negotiate((0x60001,))
    driver.configure(1514, 8, (6, 30))
    driver.hand_over()
    driver.initialize()
    known: dict[int, Channel] = {}
    for wanted in (1, 1, 3, 2):
        kind, status, more = struct.unpack_from("<3I", driver.nvsp(133, 1, wanted) or b"")
        assert (kind, status) == (133, 1)
        assert channel.wait(lambda more=more: len(subchannels(guest)) == len(known) + more)  # type: ignore[misc]
        for offer in subchannels(guest):
            if offer.channel_id not in known:
                assert offer.monitor_id is not None, (
                    "user space rings by the monitor page, and by nothing else"
                )
                known[offer.channel_id] = guest.open(offer, 4, 4)
                more -= 1
        assert more == 0
    assert len(known) == 3
    assert adapter.statistics.violations == 0
    hosting.close()
    child.destroy()
    root.destroy()

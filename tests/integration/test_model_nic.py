"""What the two kinds of network adapter cost a model guest, and what the emulated one cannot take."""

from reference.netpair import frame, mac

from vmbus.emulated.ports import attach_pci
from vmbus.hypervisor.personality import LINUX, WINDOWS_2000
from vmbus.machine.model import ModelMachine
from vmbus.machine.nic import TulipAdapter
from vmbus.machine.tulip_guest import TulipNic
from vmbus.network.switch import Switch


def test_same_work_fewer_exits() -> None:
    switch, exits = Switch(), {}
    with ModelMachine(memory_size=16 << 20) as other:
        peer = other.add_network(switch.connect("peer"), mac(1))
        for number, personality in enumerate((LINUX, WINDOWS_2000), 2):
            with ModelMachine(memory_size=16 << 20, personality=personality) as machine:
                nic = machine.add_network(switch.connect(personality.name), mac(number))
                before = machine.ledger.total("child").copy()
                frames = [frame(mac(1), mac(number), bytes([n]) * 100) for n in range(60)]
                assert nic.send_batch(frames) == 60
                assert peer.receive() == frames
                exits[personality.name] = sum((machine.ledger.total("child") - before).exits.values())
    assert exits["windows-2000"] >= 60 > 4 * exits["linux"] > 0


def test_frames_that_the_chip_cannot_take_stay_in_the_switch() -> None:
    switch, sent = Switch(), []
    guest = switch.connect("guest")
    peer = switch.connect("peer", receiver=sent.extend)
    with ModelMachine(memory_size=16 << 20, personality=WINDOWS_2000) as machine:
        nic = machine.add_network(guest, mac(1))
        peer.send([frame(mac(1), mac(2), bytes(1501)), frame(mac(1), mac(2), bytes(1500))])
        assert nic.receive() == [frame(mac(1), mac(2), bytes(1500))]
        assert guest.counters.sent_frames == 1
        peer.send([frame(mac(3), mac(2), bytes(60))])  # flooded by the switch, filtered by the chip
        assert nic.receive() == []
        assert nic.send(frame(mac(2), mac(1), bytes(60)))
    assert sent == [frame(mac(2), mac(1), bytes(60))]
    assert [port.name for port in switch.ports] == ["peer"]


def test_a_batch_longer_than_the_ring_waits_in_the_host() -> None:
    switch = Switch()
    peer, port = switch.connect("peer"), switch.connect("guest")
    frames = [frame(mac(1), mac(2), n.to_bytes(2, "big") * 50) for n in range(200)]
    with ModelMachine(memory_size=16 << 20, personality=WINDOWS_2000) as machine:
        device = TulipAdapter(machine.child, attach_pci(machine.child), port, mac(1), backlog=100)
        peer.send(frames)
        assert device.dropped == 200, "the guest does not receive yet"
        nic = TulipNic(machine.child.vps[0])
        peer.send(frames)  # 64 descriptors, and room for 100 more
        assert device.dropped == 200 + 36
        got: list[bytes] = []
        while part := nic.receive(1000):
            got += part
            device.poll()
        assert got == frames[:164]
        device.set_link(False)
        peer.send(frames[:5])
        assert nic.receive() == []
        device.set_link(True)
        peer.send(frames[:5])
        assert nic.receive() == frames[:5]

"""What the two kinds of network adapter cost a model guest, and what the emulated one cannot take."""

from reference.netpair import frame, mac

from vmbus.hypervisor.personality import LINUX, WINDOWS_2000
from vmbus.machine.model import ModelMachine
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

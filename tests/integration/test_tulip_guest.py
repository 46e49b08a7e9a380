"""Machine code → intercepts → the emulated DEC 21140, and a switch behind it."""

import random

import pytest

from vmbus.emulated.ports import attach_ide, attach_pci, attach_tulip
from vmbus.emulated.tulip import Tulip
from vmbus.errors import DeviceError, LocalProtocolError
from vmbus.hypervisor import Hypervisor, Partition
from vmbus.machine.ide_guest import IdeDisk
from vmbus.machine.tulip_guest import TulipNic
from vmbus.storage.disk import MemoryDisk

ADDRESS = bytes.fromhex("00155d010203")
PEER = bytes.fromhex("00155d0a0b0c")


def frame(destination: bytes, rng: random.Random, length: int = 0) -> bytes:
    length = length or rng.randrange(60, 1515)
    return (destination + PEER + b"\x08\x00" + rng.randbytes(1500))[:length]


class Station:
    """A partition with an adapter, and what it sent."""

    def __init__(self, hv: Hypervisor, name: str, address: bytes) -> None:
        self.child: Partition = hv.create_child(hv.root, name, memory_size=4 << 20)
        self.sent: list[bytes] = []
        self.tulip: Tulip
        self.tulip, self.function = attach_tulip(
            self.child, attach_pci(self.child), address, self.sent.append
        )


@pytest.fixture
def hv() -> Hypervisor:
    made = Hypervisor()
    made.create_root(name="root")
    return made


@pytest.fixture
def station(hv: Hypervisor) -> Station:
    return Station(hv, "c0", ADDRESS)


@pytest.mark.parametrize("ports", [False, True])
def test_frames_in_both_directions(station: Station, ports: bool) -> None:
    nic = TulipNic(station.child.vps[0], ports=ports)
    assert nic.mac == ADDRESS
    rng = random.Random(1)
    frames = [frame(PEER, rng) for _ in range(300)]
    assert nic.send_batch(frames) == 300
    assert station.sent == frames
    incoming = [frame(rng.choice((ADDRESS, b"\xff" * 6)), rng) for _ in range(200)]
    got: list[bytes] = []
    for start in range(0, 200, 50):
        assert all(station.tulip.receive(one) for one in incoming[start : start + 50])
        assert not station.tulip.receive(frame(PEER, rng))  # another station's
        got += nic.receive()
    assert got == incoming
    assert nic.receive() == []


@pytest.mark.parametrize(("ports", "reason"), [(False, "mmio"), (True, "io_port")])
def test_exits_are_exact(station: Station, ports: bool, reason: str) -> None:
    nic = TulipNic(station.child.vps[0], ports=ports)
    rng = random.Random(2)
    nic.send_batch(
        [frame(PEER, rng) for _ in range(31)]
    )  # behind the setup frame: half a ring, and its interrupt
    nic.receive()
    ledger = station.child.hypervisor.ledger
    before = ledger.total("c0").copy()
    nic.send_batch([frame(PEER, rng, 100) for _ in range(20)])
    counts = ledger.total("c0") - before
    assert counts.exits == {reason: 20, "halt": 1}
    assert counts.packets_sent == 20
    assert counts.bytes_copied == 2000
    for _ in range(10):
        station.tulip.receive(frame(ADDRESS, rng, 100))
    before = ledger.total("c0").copy()
    assert len(nic.receive()) == 10
    counts = ledger.total("c0") - before
    # one interrupt for all of them: status read, acknowledged, end of interrupt
    assert sum(counts.interrupts.values()) == 1
    assert counts.exits["mmio"] + counts.exits["io_port"] == 3
    assert nic.state.interrupts == 2


def test_a_full_ring_is_refilled(station: Station) -> None:
    nic = TulipNic(station.child.vps[0])
    rng = random.Random(3)
    incoming = [frame(ADDRESS, rng) for _ in range(70)]
    assert [station.tulip.receive(one) for one in incoming] == [True] * 64 + [False] * 6
    assert nic.receive(1000) == incoming[:64]
    assert station.tulip.receive(incoming[64])
    assert nic.receive() == [incoming[64]]


def test_two_guests_talk_to_each_other(hv: Hypervisor) -> None:
    first, second = Station(hv, "c0", ADDRESS), Station(hv, "c1", PEER)
    a, b = TulipNic(first.child.vps[0]), TulipNic(second.child.vps[0])
    rng = random.Random(4)
    frames = [frame(PEER, rng) for _ in range(20)]
    a.send_batch(frames)
    for one in first.sent:
        second.tulip.receive(one)
    assert b.receive() == frames


def test_disk_and_network_share_a_processor(station: Station) -> None:
    disk = MemoryDisk(1 << 20)
    attach_ide(station.child, disk)
    ide, nic = IdeDisk(station.child.vps[0]), TulipNic(station.child.vps[0])
    rng = random.Random(5)
    for n in range(20):
        incoming = frame(ADDRESS, rng)
        station.tulip.receive(incoming)  # its interrupt may come while the disk's driver runs
        data = rng.randbytes(4096)
        ide.write(n * 4096, data)
        assert disk.read(n * 4096, 4096) == data
        assert nic.receive() == [incoming]


def test_errors(hv: Hypervisor, station: Station) -> None:
    nic = TulipNic(station.child.vps[0])
    with pytest.raises(LocalProtocolError):
        nic.send(bytes(1600))
    station.child.vps[0].mmio_write(0xFEB00000 + 8 * 4, 4, 1 << 31)  # a transmit ring outside of memory
    nic.send(bytes(60))
    with pytest.raises(DeviceError, match="bus error"):
        nic.receive()
    empty = hv.create_child(hv.root, "c9", memory_size=4 << 20)
    with pytest.raises(DeviceError, match="no DEC 21140"):
        TulipNic(empty.vps[0])

"""A model guest OS chooses its drivers by its time, and offers one disk and one network API over either kind."""

import random

import pytest

from vmbus.errors import LocalProtocolError
from vmbus.hypervisor import PERSONALITIES, VirtualClock
from vmbus.machine.block import BlockDevice
from vmbus.machine.ide_guest import IdeDisk
from vmbus.machine.model import ModelMachine
from vmbus.machine.nic import NetworkDevice
from vmbus.machine.tulip_guest import TulipNic
from vmbus.network.switch import Switch
from vmbus.network.vsc import NetworkVsc
from vmbus.storage.disk import MemoryDisk
from vmbus.storage.guest_disk import StorageDisk

SIZE = 1 << 20
MACS = [bytes.fromhex(f"00155d0000{n:02x}") for n in range(1, 4)]
BROADCAST = b"\xff" * 6

# What the guests of the time were: personality, VMBus, storage protocol, NVSP.
ENLIGHTENED = {
    "server-2008": (0x0000_000D, 0x0200, 0x0_0002),
    "vista": (0x0000_000D, 0x0200, 0x0_0002),
    "suse-linux": (0x0000_000D, 0x0200, 0x0_0002),
    "server-2008-r2": (0x0001_0001, 0x0402, 0x3_0002),
    "server-2012": (0x0002_0004, 0x0501, 0x4_0000),
    "server-2012-r2": (0x0003_0000, 0x0600, 0x5_0000),
    "server-2016": (0x0004_0000, 0x0602, 0x6_0000),
    "server-2019": (0x0005_0002, 0x0602, 0x6_0001),
    "windows-10": (0x0005_0002, 0x0602, 0x6_0001),
    "server-2022": (0x0005_0003, 0x0602, 0x6_0001),
    "linux": (0x0005_0003, 0x0602, 0x6_0001),
}
EMULATED = ("windows-2000", "dos", "old-bsd")


class Application:
    """What runs on the guest: it has a disk and a network interface and cannot tell of which kind."""

    def __init__(self, disk: BlockDevice, nic: NetworkDevice) -> None:
        self.disk = disk
        self.nic = nic

    def store(self, seed: int) -> bytes:
        """Write everything, read everything; what was read."""
        rng = random.Random(seed)
        offsets = list(range(0, self.disk.size, 65536))
        blocks = [rng.randbytes(65536) for _ in offsets]
        self.disk.write_batch(offsets, blocks)
        self.disk.flush()
        assert b"".join(self.disk.read_batch(offsets, 65536)) == b"".join(blocks)
        self.disk.write(4096, b"one" * 512)
        assert self.disk.read(4096, 1536) == b"one" * 512
        return self.disk.read(0, 65536)

    def talk(self, destination: bytes, count: int) -> list[bytes]:
        frames = [
            destination + self.nic.mac + b"\x88\xb5" + n.to_bytes(2, "big") + bytes(44 + n * 20)
            for n in range(count)
        ]
        assert self.nic.send_batch(frames) == count
        return frames


def test_every_personality_is_tried() -> None:
    assert {*ENLIGHTENED, *EMULATED} == set(PERSONALITIES)


@pytest.mark.parametrize("name", PERSONALITIES)
def test_a_guest_uses_the_drivers_that_it_has(name: str) -> None:
    personality = PERSONALITIES[name]
    switch = Switch()
    heard: list[bytes] = []
    switch.connect("peer", receiver=lambda frames: heard.extend(bytes(f) for f in frames))
    with (
        ModelMachine(memory_size=16 << 20, personality=personality, clock=VirtualClock()) as machine,
        MemoryDisk(SIZE) as backing,
    ):
        disk = machine.add_disk(backing)
        nic = machine.add_network(switch.connect("guest"), MACS[0])
        if name in EMULATED:
            assert isinstance(disk, IdeDisk)
            assert isinstance(nic, TulipNic)
            with pytest.raises(LocalProtocolError, match="no VMBus driver"):
                _ = machine.guest
        else:
            assert isinstance(disk, StorageDisk)
            assert isinstance(nic, NetworkVsc)
            vmbus, storage, network = ENLIGHTENED[name]
            assert machine.guest.version == machine.host.version == vmbus
            assert machine._clients[0].negotiation.rules.version == storage
            assert nic.protocol.version == network
        application = Application(disk, nic)
        assert application.store(seed=1) == backing.read(0, 65536)
        assert (application.nic.mac, application.nic.mtu) == (MACS[0], 1500)
        assert application.talk(BROADCAST, 60) == heard
        counts = machine.ledger.total()
        assert (counts.exits["io_port"] > 0) == (name in EMULATED)
        assert (counts.exits["hypercall"] > 0) == (name not in EMULATED)


def test_guests_of_all_kinds_talk_to_each_other() -> None:
    """DOS, Server 2008 and a present-day Linux on one switch: frames go both ways between emulated and enlightened."""
    switch = Switch()
    machines = [
        ModelMachine(memory_size=16 << 20, personality=PERSONALITIES[name], clock=VirtualClock())
        for name in ("dos", "server-2008", "linux")
    ]
    nics = [m.add_network(switch.connect(f"g{n}"), MACS[n]) for n, m in enumerate(machines)]
    try:
        for sender in range(3):
            for receiver in range(3):
                if sender == receiver:
                    continue
                frame = MACS[receiver] + MACS[sender] + b"\x88\xb5" + bytes([sender, receiver]) * 30
                assert nics[sender].send(frame)
                arrived = [nic.receive() for nic in nics]
                assert frame in arrived[receiver]
                assert arrived[sender] == []
    finally:
        for machine in machines:
            machine.close()
    assert switch.ports == []


def test_both_kinds_side_by_side_keep_out_of_each_others_memory() -> None:
    """One guest with four drivers: large transfers on each leave the others' data alone."""
    switch = Switch()
    heard: list[bytes] = []
    switch.connect("peer", receiver=lambda frames: heard.extend(bytes(f) for f in frames))
    with ModelMachine(memory_size=16 << 20) as machine, MemoryDisk(SIZE) as one, MemoryDisk(SIZE) as two:
        applications = [
            Application(
                machine.add_enlightened_disk(one),
                machine.add_enlightened_network(switch.connect("a"), MACS[0]),
            ),
            Application(
                machine.add_emulated_disk(two), machine.add_emulated_network(switch.connect("b"), MACS[1])
            ),
        ]
        for seed in range(3):
            for application, backing in zip(applications, (one, two), strict=True):
                heard.clear()
                assert application.store(seed) == backing.read(0, 65536)
                assert application.talk(BROADCAST, 60) == heard
                for other in applications:
                    other.nic.receive(100)
        with pytest.raises(LocalProtocolError):
            machine.add_emulated_network(switch.connect("c"), MACS[2])


def test_a_machine_that_is_too_small() -> None:
    with pytest.raises(LocalProtocolError, match="8 MiB"):
        ModelMachine(memory_size=4 << 20)

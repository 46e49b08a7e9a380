"""What belongs to a controller and its disks outlives a guest's connection; what belongs to the connection does not."""

import struct
import threading
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any
from uuid import UUID

import pytest
from reference.eventually import eventually

from vmbus.bus import Threads, VmbusGuest, VmbusHost
from vmbus.bus.channel import Channel, loopback
from vmbus.bus.offer import Offer
from vmbus.bus.taking import take_packets
from vmbus.core.memory import GuestMemory
from vmbus.errors import DeviceError
from vmbus.hypervisor import Hypervisor
from vmbus.storage.disk import Buffer, Disk, MemoryDisk
from vmbus.storage.scsi import CdromUnit, DiskUnit
from vmbus.storage.scsi.codes import AdditionalSense, ScsiStatus, SenseKey
from vmbus.storage.vsc import StorageVsc
from vmbus.storage.vsp import StorageVsp

MIB = 1 << 20
TEST_UNIT_READY = bytes(6)


class Guest:
    """A guest that opens its controller again and again."""

    def __init__(self, unit: DiskUnit | CdromUnit, number: int) -> None:
        self.provider = StorageVsp({(0, 0): unit}, instance_id=UUID(int=number))
        self.client: StorageVsc | None = None

    def open(self) -> StorageVsc:
        if self.client is not None:
            self.client.close()
        guest, host = loopback(GuestMemory(4 * MIB), 16, 16)
        host.on_closed = lambda: self.provider.close(host)
        self.provider.open(host)
        self.client = StorageVsc(guest, range(64))
        self.client.connect()
        return self.client


def attentions(client: StorageVsc) -> list[int]:
    found: list[int] = []
    while (result := client.execute(0, 0, TEST_UNIT_READY)).sense is not None:
        assert result.sense.key == SenseKey.UNIT_ATTENTION
        found.append(result.sense.additional)
    return found


def reserve_out(client: StorageVsc, action: int, key: int, new: int = 0, kind: int = 0) -> int:
    cdb = struct.pack(">BBBxxIx", 0x5F, action, kind, 24)
    return client.execute(0, 0, cdb, data_out=struct.pack(">QQ8x", key, new)).scsi_status


@pytest.fixture
def guests() -> Iterator[tuple[Guest, Guest]]:
    unit = DiskUnit(MemoryDisk(MIB), UUID(int=5), removable=True)
    made = Guest(unit, 1), Guest(unit, 2)
    yield made
    for each in made:
        each.provider.shutdown()


def test_what_a_guest_has_to_be_told_waits_for_it(guests: tuple[Guest, Guest]) -> None:
    """B changes a mode page and preempts A while A is away."""
    a, b = guests
    client = a.open()
    other = b.open()
    assert reserve_out(client, 0, 0, 0xA) == reserve_out(other, 0, 0, 0xB) == ScsiStatus.GOOD
    client.close()
    page = bytes.fromhex("0812 0000 0000 0000 0000 0000 0000 0000 0000 0000")
    other.check(0, 0, bytes([0x15, 0x10, 0, 0, 24]), data_out=bytes(4) + page)
    assert reserve_out(other, 4, 0xB, 0xA, 1) == ScsiStatus.GOOD
    a.client = None
    told = attentions(a.open())
    assert told == [AdditionalSense.MODE_PARAMETERS_CHANGED, AdditionalSense.REGISTRATIONS_PREEMPTED]
    assert attentions(b.open()) == []


def test_registrations_and_mode_pages_last(guests: tuple[Guest, Guest]) -> None:
    a, b = guests
    client, other = a.open(), b.open()
    assert reserve_out(client, 0, 0, 0xA) == ScsiStatus.GOOD
    assert reserve_out(client, 1, 0xA, kind=3) == ScsiStatus.GOOD
    page = bytes.fromhex("0812 0000 0000 0000 0000 0000 0000 0000 0000 0000")
    client.check(0, 0, bytes([0x15, 0x10, 0, 0, 24]), data_out=bytes(4) + page)
    again = a.open()
    assert (
        again.check(0, 0, bytes.fromhex("1a000800ff00"), data_in=255)[14] == 0
    )  # the write cache is still off
    attentions(other)
    assert other.execute(0, 0, bytes.fromhex("28000000000000000100"), data_in=512).scsi_status == (
        ScsiStatus.RESERVATION_CONFLICT
    )
    again.disk().write(0, b"\1" * 512)


def test_what_a_guest_held_by_being_there_ends(guests: tuple[Guest, Guest]) -> None:
    a, b = guests
    client, other = a.open(), b.open()
    assert client.execute(0, 0, bytes([0x16, 0, 0, 0, 0, 0])).good  # RESERVE
    assert client.execute(0, 0, bytes([0x1E, 0, 0, 0, 1, 0])).good  # PREVENT
    assert other.execute(0, 0, TEST_UNIT_READY).scsi_status == ScsiStatus.RESERVATION_CONFLICT
    a.open()
    assert other.execute(0, 0, TEST_UNIT_READY).good
    assert other.execute(0, 0, bytes([0x1B, 0, 0, 0, 2, 0])).good


def test_a_guest_that_is_back_at_once_is_offered_its_sub_channels_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However late the host's worker is."""
    hypervisor = Hypervisor()
    root = hypervisor.create_root()
    hosting = Threads(workers=2)
    child = hypervisor.create_child(root, name="c", memory_size=32 * MIB, vps=2)
    host = VmbusHost(hypervisor, child, hosting=hosting)
    late: list[Any] = []
    ring, held = hosting.ring, [False]

    def ring_late(task: Any) -> None:
        if held[0] and task.name.endswith("sub-channels"):
            late.append(task)
        else:
            ring(task)

    monkeypatch.setattr(hosting, "ring", ring_late)
    provider = StorageVsp({(0, 0): MemoryDisk(MIB)}, max_sub_channels=2)
    provider.offer_on(host)
    guest = VmbusGuest(child.vps[0])
    guest.connect()

    def up() -> StorageVsc:
        (primary,) = [offer for offer in guest.offers if not offer.is_subchannel]
        client = StorageVsc(guest.open(primary, 16, 16), guest.pages.allocate(64), sub_channels=2)
        client.connect()
        return client

    def subs() -> list[Offer]:
        return [offer for offer in guest.offers if offer.is_subchannel]

    client = up()
    assert hosting.wait_for(lambda: len(subs()) == 2)
    for offer in subs():
        client.add_channel(guest.open(offer, 4, 4))
    gone: list[Offer] = []
    new: list[Offer] = []
    guest.on_rescind, guest.on_offer = gone.append, new.append
    held[0] = True
    client.close()
    client = up()
    assert client.negotiation.sub_channels == 2
    held[0] = False
    for task in late:
        ring(task)
    assert hosting.wait_for(lambda: len(gone) == 2 and len(new) == 2)
    assert hosting.wait_for(lambda: len(subs()) == 2)
    for offer in subs():
        client.add_channel(guest.open(offer, 4, 4))
    disk = client.disk()
    for turn in range(6):
        disk.write(turn * 512, bytes([turn]) * 512)
    assert disk.read(0, 6 * 512) == b"".join(bytes([turn]) * 512 for turn in range(6))
    provider.shutdown()
    hosting.close()
    child.destroy()


class Long(Disk):
    """A disk of 2 TiB in Python whose reads wait for `go_on`."""

    def __init__(self) -> None:
        self.sector_size = self.physical_sector_size = 512
        self.sector_count, self.read_only = 1 << 32, False
        self.reads = 0
        self.begun, self.go_on = threading.Event(), threading.Event()

    def read(self, offset: int, length: int) -> bytes:
        self.reads += 1
        self.begun.set()
        assert self.go_on.wait(30)
        return bytes(length)

    def write(self, offset: int, data: Buffer) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("end", ["close", "remove"])
def test_who_goes_away_does_not_wait_for_a_long_command(end: str, workers: int) -> None:
    """One VERIFY may read 2 TiB; a guest that asks for it and goes must not hold its host up."""
    disk = Long()
    guest, host = loopback(GuestMemory(8 << 20), 16, 16)
    provider = StorageVsp({(0, 0): disk}, workers=workers)
    provider.open(host)
    client = StorageVsc(guest, range(1, 100), timeout=1.0)
    client.connect()
    unit = provider.units[0, 0]

    def verify() -> None:
        with suppress(DeviceError):
            client.execute(0, 0, struct.pack(">BBQIxx", 0x8F, 0, 0, 0xFFFF_FFFF))

    asking = threading.Thread(target=verify, daemon=True)
    asking.start()
    assert disk.begun.wait(30)
    going = threading.Thread(
        target=partial(provider.close, host) if end == "close" else partial(provider.remove_disk, (0, 0)),
        daemon=True,
    )
    going.start()
    assert eventually(lambda: any(task.aborted for task in unit.tasks))
    disk.go_on.set()
    going.join(30)
    assert not going.is_alive()
    assert disk.reads == 1
    client.close()
    asking.join(30)
    provider.shutdown()


def reading(provider: StorageVsp, disk: Long) -> tuple[Channel, threading.Thread]:
    """A guest's read that waits in `disk`; the host's end, and the guest's thread."""
    guest, host = loopback(GuestMemory(8 << 20), 16, 16)
    provider.open(host)
    client = StorageVsc(guest, range(1, 100), timeout=1.0)
    client.connect()

    def read() -> None:
        with suppress(DeviceError):
            client.execute(0, 0, bytes.fromhex("28000000000000000100"), data_in=512)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    assert disk.begun.wait(30)
    return host, thread


def test_a_disk_is_removed_while_a_request_is_in_another_one() -> None:
    disk = Long()
    provider = StorageVsp({(0, 0): disk, (0, 1): MemoryDisk(MIB)}, workers=2)
    _, thread = reading(provider, disk)
    removing = threading.Thread(target=provider.remove_disk, args=((0, 1),), daemon=True)
    removing.start()
    removing.join(10)  # a read ends after 30 s by itself
    assert not removing.is_alive()
    disk.go_on.set()
    thread.join(30)
    provider.shutdown()


@pytest.mark.parametrize("second", ["close", "remove"])
@pytest.mark.parametrize("workers", [0, 1])
def test_no_request_is_in_a_disk_after_either_of_two_who_close(workers: int, second: str) -> None:
    disk = Long()
    provider = StorageVsp({(0, 0): disk}, workers=workers)
    host, thread = reading(provider, disk)
    first = threading.Thread(target=provider.close, args=(host,), daemon=True)
    first.start()
    assert eventually(lambda: host.on_signal is None)
    after: list[bool] = []

    def end() -> None:
        if second == "close":
            provider.close(host)
        else:
            provider.remove_disk((0, 0))
        after.append(disk.go_on.is_set())

    ending = threading.Thread(target=end, daemon=True)
    ending.start()
    ending.join(0.2)
    disk.go_on.set()
    for each in (first, ending, thread):
        each.join(30)
        assert not each.is_alive()
    assert after == [True]
    provider.shutdown()


def test_a_defect_on_a_worker_thread_closes_the_channel(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody waits for what a worker does after its request, so that nobody would hear of it."""
    disk = Long()
    provider = StorageVsp({(0, 0): disk}, workers=1)
    host, thread = reading(provider, disk)

    def failing(receive: Any, limit: int, into: Any) -> int:
        if threading.current_thread().name.startswith("storvsp"):
            raise MemoryError
        return take_packets(receive, limit, into)

    monkeypatch.setattr("vmbus.storage.vsp.take_packets", failing)
    provider._servers[0].settle()  # the thread that rang has left the server, so that it is the worker's
    disk.go_on.set()
    assert eventually(lambda: not host.is_open)
    assert "its server failed; the channel is closed" in caplog.text
    thread.join(30)
    provider.shutdown()

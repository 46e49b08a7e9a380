"""The PCI IDE controller: where its channels are decoded, its one interrupt, and what it refuses."""

import pytest

from vmbus.emulated.ata import Command, Register, Status
from vmbus.emulated.pci import PciBus
from vmbus.emulated.piix import PiixIde
from vmbus.errors import DeviceError, LocalProtocolError
from vmbus.hypervisor.devices import DeviceBus
from vmbus.storage.disk import MemoryDisk

SLOT = 7
BASES = (0x1000, 0x1010, 0x1020, 0x1030)
"""Where the guest puts the four ranges."""


class Guest:
    def __init__(self, disks: int) -> None:
        self.devices = DeviceBus(lambda vector: None)
        self.levels: list[bool] = []
        self.media = [MemoryDisk(1 << 20) for _ in range(disks)]
        for number, medium in enumerate(self.media):
            medium.write(0, bytes([number + 1]) * 512)
        self.ide = PiixIde(self.media, self.levels.append)
        self.bus = PciBus(self.devices)
        self.bus.add(SLOT, self.ide.function)
        for bar, base in enumerate(BASES):
            self.config_write(0x10 + 4 * bar, base)
        self.config_write(0x04, 1)  # decode ports

    def config_write(self, offset: int, value: int) -> None:
        self.devices.io_write(0xCF8, 4, 0x8000_0000 | SLOT << 11 | offset)
        self.devices.io_write(0xCFC, 4, value)

    def config_read(self, offset: int, size: int) -> int:
        self.devices.io_write(0xCF8, 4, 0x8000_0000 | SLOT << 11 | offset & 0xFC)
        return self.devices.io_read(0xCFC + (offset & 3), size)

    def read_sector(self, channel: int, slave: bool) -> bytes:
        base = BASES[2 * channel]
        for register, value in (
            (Register.DEVICE, 0xF0 if slave else 0xE0),
            (Register.COUNT, 1),
            (Register.LBA_LOW, 0),
            (Register.LBA_MID, 0),
            (Register.LBA_HIGH, 0),
            (Register.STATUS_COMMAND, Command.READ_SECTORS),
        ):
            self.devices.io_write(base + register, 1, value)
        assert self.devices.io_read(BASES[2 * channel + 1] + 2, 1) & Status.DRQ, "alternate status"
        return b"".join(self.devices.io_read(base, 2).to_bytes(2, "little") for _ in range(256))


def test_four_disks_on_two_channels() -> None:
    guest = Guest(4)
    for number in range(4):
        assert guest.read_sector(number // 2, bool(number % 2)) == bytes([number + 1]) * 512


def test_what_a_driver_asks_before_it_takes_the_controller() -> None:
    one, two = Guest(2), Guest(3)
    assert one.config_read(0, 4) == 0x7111_8086
    assert one.config_read(0x0A, 2) == 0x0101
    assert one.config_read(0x09, 1) & 5 == 5, "both channels in native mode"
    assert one.config_read(0x3D, 1) == 1, "INTA#"
    for guest, enabled in ((one, (True, False)), (two, (True, True))):
        assert tuple(bool(guest.config_read(at, 1) & 0x80) for at in (0x41, 0x43)) == enabled
    one.config_write(0x40, 0)
    assert one.config_read(0x41, 1) & 0x80, "timings are not for the guest to change"
    assert [one.ide.function.address(bar) for bar in range(2)] == list(BASES[:2])


def test_both_channels_drive_one_interrupt() -> None:
    guest = Guest(3)
    guest.read_sector(0, False)
    assert guest.levels == [True]
    guest.read_sector(1, False)
    assert guest.levels == [True], "asserted already"
    guest.devices.io_read(BASES[0] + Register.STATUS_COMMAND, 1)
    assert guest.levels == [True], "the other channel still wants it"
    guest.devices.io_read(BASES[2] + Register.STATUS_COMMAND, 1)
    assert guest.levels == [True, False]


def test_device_control_and_what_is_beside_it() -> None:
    guest = Guest(1)
    guest.devices.io_write(BASES[1] + 2, 1, 0x02)  # nIEN
    guest.read_sector(0, False)
    assert guest.levels == []
    guest.devices.io_write(BASES[1], 1, 0xFF)  # nothing there
    assert guest.devices.io_read(BASES[1], 1) == 0xFF
    assert guest.devices.io_read(BASES[1] + 3, 1) == 0xFF


@pytest.mark.parametrize("count", [0, 5])
def test_number_of_disks(count: int) -> None:
    with pytest.raises(LocalProtocolError, match="1 to 4 disks"):
        PiixIde([MemoryDisk(1 << 20)] * count, lambda level: None)


def test_sectors_of_another_size_are_refused() -> None:
    with pytest.raises(DeviceError):
        PiixIde([MemoryDisk(1 << 20, sector_size=4096)], lambda level: None)

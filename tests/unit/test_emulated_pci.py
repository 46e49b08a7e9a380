"""PCI configuration space and decoding, through the ports."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmbus.emulated.pci import Bar, PciBus, PciFunction, host_bridge
from vmbus.errors import LocalProtocolError
from vmbus.hypervisor.devices import DeviceBus


class Registers:
    def __init__(self) -> None:
        self.seen: list[tuple[object, ...]] = []

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        self.seen.append((bar, offset, size))
        return 0x5A

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        self.seen.append((bar, offset, size, value))


class Guest:
    """A guest's view of bus 0 with a card in slot 3."""

    def __init__(self) -> None:
        self.devices = DeviceBus(lambda vector: None)
        self.bus = PciBus(self.devices)
        self.bus.add(0, host_bridge())
        self.registers = Registers()
        self.card = PciFunction(
            0x1234,
            0x5678,
            0x020000,
            bars=(Bar(64, io=True), Bar(4096, io=False)),
            registers=self.registers,
            interrupt_pin=1,
        )
        self.bus.add(3, self.card)

    def select(self, slot: int, offset: int) -> None:
        self.devices.io_write(0xCF8, 4, 0x80000000 | slot << 11 | offset & 0xFC)

    def read(self, slot: int, offset: int, size: int = 4) -> int:
        self.select(slot, offset)
        return self.devices.io_read(0xCFC + (offset & 3), size)

    def write(self, slot: int, offset: int, value: int, size: int = 4) -> None:
        self.select(slot, offset)
        self.devices.io_write(0xCFC + (offset & 3), size, value)


@pytest.fixture
def guest() -> Guest:
    return Guest()


def test_enumeration(guest: Guest) -> None:
    found = {slot: guest.read(slot, 0) for slot in range(32) if guest.read(slot, 0) != 0xFFFFFFFF}
    assert found == {0: 0x71928086, 3: 0x56781234}
    assert guest.read(3, 0x0A, 2) == 0x0200
    assert guest.read(3, 0x3D, 1) == 1
    assert guest.read(3, 0x0E, 1) == 0


def test_the_address_register(guest: Guest) -> None:
    guest.devices.io_write(0xCF8, 4, 0xFFFFFFFF)
    assert guest.devices.io_read(0xCF8, 4) == 0x80FFFFFC
    guest.devices.io_write(0xCF8, 2, 0)  # narrow writes do not reach it
    assert guest.devices.io_read(0xCF8, 4) == 0x80FFFFFC
    guest.devices.io_write(0xCF8, 4, 3 << 11)  # not enabled
    assert guest.devices.io_read(0xCFC, 4) == 0xFFFFFFFF


def test_sizing_and_placing_base_addresses(guest: Guest) -> None:
    guest.write(3, 0x10, 0xFFFFFFFF)
    guest.write(3, 0x14, 0xFFFFFFFF)
    assert guest.read(3, 0x10) == 0xFFFFFFC1
    assert guest.read(3, 0x14) == 0xFFFFF000
    assert guest.read(3, 0x18) == 0
    guest.write(3, 0x10, 0xC000)
    guest.write(3, 0x14, 0xE0000000)
    assert guest.card.address(0) is None  # not enabled yet
    guest.write(3, 0x04, 0x0007, 2)
    assert guest.read(3, 0x04, 2) == 7
    assert (guest.card.address(0), guest.card.address(1)) == (0xC000, 0xE0000000)
    assert guest.devices.io_read(0xC004, 1) == 0x5A
    guest.devices.mmio_write(0xE0000FFC, 4, 9)
    assert guest.registers.seen == [(0, 4, 1), (1, 0xFFC, 4, 9)]
    guest.write(3, 0x10, 0xD000)  # moves at once
    assert guest.devices.io_read(0xC004, 1) == 0xFF
    assert guest.devices.io_read(0xD000, 1) == 0x5A
    guest.write(3, 0x04, 0, 2)
    assert guest.devices.io_read(0xD000, 1) == 0xFF
    assert not guest.devices.has_mmio(0xE0000000)


def test_a_range_on_top_of_another_device_is_not_decoded(guest: Guest) -> None:
    other = Registers()
    guest.bus.add(4, PciFunction(1, 2, 0, bars=(Bar(64, io=True),), registers=other))
    for slot in (3, 4):
        guest.write(slot, 0x10, 0xC000)
        guest.write(slot, 0x04, 1, 2)
    guest.devices.io_read(0xC000, 1)
    assert guest.registers.seen
    assert not other.seen
    guest.write(3, 0x10, 0xCF00)
    guest.write(4, 0x04, 1, 2)  # tries again
    guest.devices.io_read(0xC000, 1)
    assert other.seen
    guest.write(3, 0x10, 0xCC0 + 0x20)  # on the configuration ports themselves
    assert guest.read(3, 0) == 0x56781234


def test_removal(guest: Guest) -> None:
    guest.write(3, 0x10, 0xC000)
    guest.write(3, 0x04, 1, 2)
    guest.bus.remove(3)
    assert guest.read(3, 0) == 0xFFFFFFFF
    assert guest.devices.io_read(0xC000, 1) == 0xFF
    guest.bus.add(3, host_bridge())
    with pytest.raises(LocalProtocolError):
        guest.bus.add(3, host_bridge())
    with pytest.raises(LocalProtocolError):
        PciFunction(1, 2, 0, bars=(Bar(48, io=True),), registers=Registers())


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.booleans(),
            st.one_of(st.integers(0xCF8, 0xCFF), st.just(0xCF8), st.integers(0, 0xFFFF)),
            st.sampled_from([1, 2, 4]),
            st.one_of(
                st.integers(0, 0xFFFFFFFF),
                st.integers(0, 63).map(lambda n: 0x80000000 | 3 << 11 | 4 * n),
                st.sampled_from([7, 0xCF8, 0xC001, 0xFFFFFFF0]),
            ),
        ),
        max_size=60,
    )
)
def test_any_accesses_keep_the_identity_and_the_configuration_ports(
    steps: list[tuple[bool, int, int, int]],
) -> None:
    guest = Guest()
    for read, port, size, value in steps:
        if read:
            assert 0 <= guest.devices.io_read(port, size) < 1 << 8 * size
        else:
            guest.devices.io_write(port, size, value & (1 << 8 * size) - 1)
    assert guest.read(3, 0) == 0x56781234
    guest.bus.remove(3)
    assert guest.read(3, 0) == 0xFFFFFFFF

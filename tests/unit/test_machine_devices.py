"""The I/O APIC, the real-time clock and the console transcript."""

import re
from datetime import UTC, datetime

import pytest

from vmbus.emulated.ioapic import IO_APIC_ADDRESS, IoApic
from vmbus.emulated.rtc import RealTimeClock
from vmbus.hypervisor import Hypervisor, VirtualClock
from vmbus.machine.console import Console

LEVEL, MASKED, LOGICAL = 1 << 15, 1 << 16, 1 << 11


class Board:
    def __init__(self) -> None:
        hypervisor = Hypervisor(clock=VirtualClock())
        child = hypervisor.create_child(hypervisor.create_root(), "c", memory_size=1 << 20)
        self.vp = child.vps[0]
        self.vp.mmio_write(0xFEE0_00F0, 4, 0x1FF)  # enable the local APIC
        self.controller = IoApic(child)
        self.devices = child.devices

    def read(self, index: int) -> int:
        self.vp.mmio_write(IO_APIC_ADDRESS, 4, index)
        return self.vp.mmio_read(IO_APIC_ADDRESS + 0x10, 4)

    def write(self, index: int, value: int) -> None:
        self.vp.mmio_write(IO_APIC_ADDRESS, 4, index)
        self.vp.mmio_write(IO_APIC_ADDRESS + 0x10, 4, value)

    def route(self, line: int, low: int, destination: int = 0) -> None:
        self.write(0x11 + 2 * line, destination << 24)
        self.write(0x10 + 2 * line, low)

    def end(self) -> None:
        self.vp.mmio_write(0xFEE0_00B0, 4, 0)


def test_registers() -> None:
    board = Board()
    assert board.read(1) == 23 << 16 | 0x11
    board.write(0, 0x0500_0000)
    assert board.read(0) == 0x0500_0000
    assert board.read(0x10) == MASKED
    board.route(3, 0x45 | LEVEL, destination=7)
    assert (board.read(0x16), board.read(0x17)) == (0x45 | LEVEL, 7 << 24)
    for index in (0x40, 0x7F, 0xFF, 5):
        board.write(index, 0xFFFF_FFFF)
        assert board.read(index) == 0
    assert board.vp.mmio_read(IO_APIC_ADDRESS + 0x20, 4) == 0


def test_the_trigger_mode_shows_in_the_local_apic() -> None:
    """Linux masks and unmasks a level-triggered line around every interrupt whose TMR bit is clear."""
    board = Board()
    for low, bit in ((0x45 | LEVEL, 1 << 5), (0x45, 0)):
        board.route(9, low)
        board.devices.set_line(9, True)
        assert board.vp.pop_interrupt() == 0x45
        assert board.vp.mmio_read(0xFEE0_0180 + 0x20, 4) == bit
        board.devices.set_line(9, False)
        board.end()


def test_edges_are_delivered_once() -> None:
    board = Board()
    board.route(4, 0x41)
    board.devices.raise_irq(4)
    board.devices.raise_irq(4)
    assert board.vp.pop_interrupt() == 0x41
    board.end()
    assert board.vp.pop_interrupt() is None
    board.devices.lower_irq(4)
    board.devices.raise_irq(4)
    assert board.vp.pop_interrupt() == 0x41


def test_a_level_that_stays_is_delivered_again() -> None:
    board = Board()
    board.route(5, 0x42 | LEVEL)
    board.devices.raise_irq(5)
    for _ in range(3):
        assert board.vp.pop_interrupt() == 0x42
        assert board.vp.pop_interrupt() is None
        board.end()
    board.devices.lower_irq(5)
    assert board.vp.pop_interrupt() == 0x42  # the last one was requested while the line was high
    board.end()
    assert board.vp.pop_interrupt() is None


@pytest.mark.parametrize("low", [MASKED | 0x41, 0x41 | 2 << 8, 0x41 | 4 << 8, 0x0F])
def test_masked_lines_other_modes_and_bad_vectors_deliver_nothing(low: int) -> None:
    board = Board()
    board.route(4, low)
    board.devices.raise_irq(4)
    assert board.vp.pop_interrupt() is None


def test_destinations_and_lines_that_do_not_exist() -> None:
    board = Board()
    board.route(4, 0x41, destination=9)
    board.devices.raise_irq(4)
    board.devices.raise_irq(24)
    board.devices.raise_irq(-1)
    assert board.vp.pop_interrupt() is None
    board.vp.mmio_write(0xFEE0_00D0, 4, 0x0400_0000)
    board.route(6, 0x43 | LOGICAL, destination=0x04)
    board.devices.raise_irq(6)
    assert board.vp.pop_interrupt() == 0x43


def test_unmasking_an_asserted_level_delivers_it() -> None:
    board = Board()
    board.route(5, 0x42 | LEVEL | MASKED)
    board.devices.raise_irq(5)
    assert board.vp.pop_interrupt() is None
    board.route(5, 0x42 | LEVEL)
    assert board.vp.pop_interrupt() == 0x42


def test_clock_in_bcd_and_binary() -> None:
    now = [0]
    clock = RealTimeClock(lambda: now[0], datetime(2024, 12, 31, 23, 59, 58, tzinfo=UTC))

    def read(index: int) -> int:
        clock.io_write(0x70, 1, index | 0x80)
        return clock.io_read(0x71, 1)

    assert [read(i) for i in (0, 2, 4, 6, 7, 8, 9, 0x32)] == [0x58, 0x59, 0x23, 3, 0x31, 0x12, 0x24, 0x20]
    now[0] = 2_000_000_000
    clock.io_write(0x70, 1, 11)
    clock.io_write(0x71, 1, 0x06)
    assert [read(i) for i in (0, 2, 4, 6, 7, 8, 9, 0x32)] == [0, 0, 0, 4, 1, 1, 25, 20]
    clock.io_write(0x70, 1, 11)
    clock.io_write(0x71, 1, 0x00)  # twelve hours, BCD
    assert read(4) == 0x12
    now[0] += 13 * 3600 * 10**9
    assert read(4) == 0x81
    assert read(10) & 0x80 == 0
    assert read(13) == 0x80
    assert clock.io_read(0x70, 1) == 0xFF


def test_clock_keeps_bytes_but_not_a_new_time() -> None:
    clock = RealTimeClock(lambda: 0)
    for index, value in ((0x40, 0xAB), (9, 0x99), (12, 1), (13, 0)):
        clock.io_write(0x70, 1, index)
        clock.io_write(0x71, 1, value)
    clock.io_write(0x70, 1, 0x40)
    assert clock.io_read(0x71, 1) == 0xAB
    clock.io_write(0x70, 1, 9)
    assert clock.io_read(0x71, 1) == 0x24


def test_a_clock_that_is_set_to_the_last_second_there_is_stands_still() -> None:
    """A guest may set it to anything; reading it later must not be the host's trouble."""
    now = [0]
    clock = RealTimeClock(lambda: now[0])

    def write(index: int, value: int) -> None:
        clock.io_write(0x70, 1, index)
        clock.io_write(0x71, 1, value)

    write(11, 0x86)
    for index, value in ((0, 59), (2, 59), (4, 23), (7, 31), (8, 12), (9, 99), (0x32, 99)):
        write(index, value)
    write(11, 0x06)
    now[0] = 10**18
    clock.io_write(0x70, 1, 9)
    assert clock.io_read(0x71, 1) == 99
    assert clock.time.year == 9999
    write(11, 0x86)  # it can be set again
    write(9, 24)
    write(0x32, 20)
    write(11, 0x06)
    assert clock.time.year == 2024


@pytest.mark.parametrize("mode", [0x02, 0x06, 0x00, 0x04], ids=["BCD", "binary", "BCD-12", "binary-12"])
def test_a_clock_that_is_set_goes_on_from_there(mode: int) -> None:
    """As Linux's rtc_cmos does it: stop the registers, write them, let them go on."""
    now = [5_000_000_000]
    clock = RealTimeClock(lambda: now[0])

    def write(index: int, value: int) -> None:
        clock.io_write(0x70, 1, index)
        clock.io_write(0x71, 1, value)

    def code(value: int) -> int:
        return value if mode & 4 else value // 10 << 4 | value % 10

    wanted = datetime(2031, 12, 31, 23, 59, 58, tzinfo=UTC)
    hours = code(23) if mode & 2 else 0x80 | code(11)
    write(11, mode | 0x80)
    for index, value in (
        (0, code(58)),
        (2, code(59)),
        (4, hours),
        (7, code(31)),
        (8, code(12)),
        (9, code(31)),
    ):
        write(index, value)
    write(0x32, code(20))
    now[0] += 10_000_000_000  # the registers stand still meanwhile
    clock.io_write(0x70, 1, 0)
    assert clock.io_read(0x71, 1) == code(58)
    write(11, mode)
    assert clock.time == wanted
    now[0] += 3_000_000_000
    assert clock.time == datetime(2032, 1, 1, 0, 0, 1, tzinfo=UTC)
    before = clock.time
    write(11, mode | 0x80)
    write(8, code(14))
    write(11, mode)
    assert clock.time == before, "there is no month 14"


def test_console_finds_what_is_split_over_pieces_once() -> None:
    typed: list[bytes] = []
    console = Console(typed.append)
    hits: list[int] = []
    console.expect("login:", lambda: hits.append(len(console.output)))
    for piece in (b"Debian lo", b"gin", b": x", b" login: "):
        console.feed(piece)
    assert hits == [15]
    console.expect(re.compile(rb"log.n:"), lambda: hits.append(-1))
    assert console.search()
    assert not console.search()
    console.forget()
    console.send("root\n")
    console.send(b"\x03")
    assert typed == [b"root\n", b"\x03"]
    console.feed(b"\xff\r\n")
    assert console.text.endswith("\N{REPLACEMENT CHARACTER}\n")

"""The DEC 21140 seen by a driver: registers through PCI, rings in guest memory."""

import random
import struct
from binascii import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmbus.core.memory import GuestMemory
from vmbus.emulated.tulip import Tulip
from vmbus.errors import LocalProtocolError

ADDRESS = bytes.fromhex("00155d010203")
OTHER = bytes.fromhex("00155d0a0b0c")
BROADCAST = b"\xff" * 6
OWN = 1 << 31
TX_RING, RX_RING, SETUP, BUFFERS = 0x1000, 0x2000, 0x3000, 0x10000
ENTRIES = 8
ALL = 0x1FFFF
TX_IC, TX_LS, TX_FS, TX_SET, TER, TCH = 1 << 31, 1 << 30, 1 << 29, 1 << 27, 1 << 25, 1 << 24


class Driver:
    """What a driver does, from the manual."""

    def __init__(self) -> None:
        self.memory = GuestMemory(1 << 20)
        self.sent: list[bytes] = []
        self.levels: list[bool] = []
        self.nic = Tulip(self.memory, ADDRESS, self.sent.append, interrupt=self.levels.append)
        self.tx = self.rx = 0

    def read(self, csr: int) -> int:
        return self.nic.bar_read(0, 8 * csr, 4)

    def write(self, csr: int, value: int) -> None:
        self.nic.bar_write(0, 8 * csr, 4, value)

    def descriptor(self, at: int, *words: int) -> None:
        self.memory.write(at, struct.pack("<4I", *words))

    def status(self, at: int) -> int:
        return int.from_bytes(self.memory.read(at, 4), "little")

    def start(self, mode: int = 0) -> None:
        self.write(0, 1)
        self.tx = self.rx = 0
        for n in range(ENTRIES):
            ring = TER if n == ENTRIES - 1 else 0
            self.descriptor(TX_RING + 16 * n, 0, ring, 0, 0)
            self.descriptor(RX_RING + 16 * n, OWN, ring | 1536, BUFFERS + 2048 * n, 0)
        self.write(3, RX_RING)
        self.write(4, TX_RING)
        self.write(7, ALL)
        self.write(6, mode | 0x2002)
        self.filter([ADDRESS, BROADCAST])
        self.write(5, ALL)
        self.levels.clear()

    def queue(self, data: bytes, control: int, second: bytes = b"") -> int:
        """Fill the next transmit descriptor; returns its address."""
        at = TX_RING + 16 * self.tx
        buffer = BUFFERS + 0x8000 + 4096 * self.tx
        self.memory.write(buffer, data)
        self.memory.write(buffer + 2048, second)
        ring = TER if self.tx == ENTRIES - 1 else 0
        self.descriptor(at, OWN, control | ring | len(data) | len(second) << 11, buffer, buffer + 2048)
        self.tx = (self.tx + 1) % ENTRIES
        return at

    def send(self, frame: bytes) -> None:
        at = self.queue(frame, TX_IC | TX_FS | TX_LS)
        self.write(1, 1)
        assert self.status(at) == 0

    def filter(self, addresses: list[bytes], kind: int = 0) -> None:
        table = b"".join((addresses * 16)[:16])
        self.setup(table, kind)

    def setup(self, halves: bytes, kind: int) -> None:
        data = b"".join(halves[i : i + 2] * 2 for i in range(0, len(halves), 2)).ljust(192, b"\0")
        self.queue(data, TX_SET | kind)
        self.write(1, 1)

    def take(self) -> bytes | None:
        """The next received frame, or None; gives the descriptor back."""
        frame = b""
        while True:
            at = RX_RING + 16 * self.rx
            status = self.status(at)
            if status & OWN:
                return None
            length = (status >> 16 & 0x3FFF) - len(frame)
            frame += self.memory.read(BUFFERS + 2048 * self.rx, min(length, 1536) if status & 0x100 else 1536)
            self.memory.write(at, struct.pack("<I", OWN))
            self.rx = (self.rx + 1) % ENTRIES
            if status & 0x100:
                assert not status & 0x8000
                return frame


@pytest.fixture
def driver() -> Driver:
    made = Driver()
    made.start()
    return made


def ether(destination: bytes, length: int = 100) -> bytes:
    return (destination + OTHER + b"\x08\x00" + bytes(range(256)) * 6)[:length]


def test_frames_go_out_in_order_and_interrupt(driver: Driver) -> None:
    frames = [ether(OTHER, length) for length in (60, 61, 1000, 1514, 64, 70, 80, 90, 1514)]
    for one in frames:
        driver.send(one)
    assert driver.sent == frames
    assert driver.levels == [True]
    assert driver.read(5) & 0x10005 == 0x10005  # sent, and no more to send
    driver.write(5, ALL)
    assert driver.levels == [True, False]


def test_short_frames_are_padded_unless_asked_not_to(driver: Driver) -> None:
    driver.send(ether(OTHER, 20))
    driver.queue(ether(OTHER, 20), TX_FS | TX_LS | 1 << 23)
    driver.write(1, 0)
    assert driver.sent == [ether(OTHER, 20).ljust(60, b"\0"), ether(OTHER, 20)]


def test_a_frame_is_gathered_from_buffers_and_descriptors(driver: Driver) -> None:
    whole = ether(OTHER, 900)
    driver.queue(whole[:100], TX_FS, whole[100:350])
    driver.queue(whole[350:351], 0)
    driver.queue(whole[351:], TX_LS)
    driver.write(1, 0)
    assert driver.sent == [whole]


def test_chained_descriptors(driver: Driver) -> None:
    driver.memory.write(0x9000, ether(OTHER, 64))
    driver.descriptor(0x8000, OWN, TX_FS | TX_LS | TCH | 64, 0x9000, 0x8100)
    driver.descriptor(0x8100, OWN, TX_FS | TX_LS | TCH | 64, 0x9000, 0x8000)
    driver.write(4, 0x8000)
    driver.write(1, 0)
    assert len(driver.sent) == 2
    assert driver.status(0x8000) == driver.status(0x8100) == 0


def test_frames_come_in_with_their_check_sequence(driver: Driver) -> None:
    for length in (60, 100, 1514):
        sent = ether(ADDRESS, length)
        assert driver.nic.receive(sent)
        assert driver.take() == sent + struct.pack("<I", crc32(sent))
    assert driver.take() is None
    assert driver.levels == [True]
    short = ether(ADDRESS, 30)
    assert driver.nic.receive(short)
    assert driver.take() == short.ljust(60, b"\0") + struct.pack("<I", crc32(short.ljust(60, b"\0")))


def test_a_frame_is_scattered_over_small_buffers(driver: Driver) -> None:
    for n in range(ENTRIES):
        driver.descriptor(RX_RING + 16 * n, OWN, 64 | 32 << 11, BUFFERS + 2048 * n, BUFFERS + 2048 * n + 64)
    sent = ether(ADDRESS, 200)
    assert driver.nic.receive(sent)
    got = b"".join(driver.memory.read(BUFFERS + 2048 * n, 96) for n in range(3))
    assert got[:200] == sent
    states = [driver.status(RX_RING + 16 * n) for n in range(4)]
    assert [s & 0x300 for s in states] == [0x200, 0, 0x100, 0]
    assert states[2] >> 16 == 204
    assert states[3] == OWN


def test_without_a_free_descriptor_frames_are_missed_and_counted(driver: Driver) -> None:
    assert [driver.nic.receive(ether(ADDRESS)) for _ in range(10)] == [True] * 8 + [False] * 2
    assert driver.read(5) & 0x80
    assert driver.read(8) == 2
    assert driver.read(8) == 0
    driver.take()
    driver.write(2, 0)
    assert driver.nic.receive(ether(ADDRESS))


@pytest.mark.parametrize(
    ("mode", "kind", "destination", "accepted"),
    [
        (0, 0, ADDRESS, True),
        (0, 0, BROADCAST, True),
        (0, 0, OTHER, False),
        (0, 0, b"\x01\x00\x5e\x00\x00\x01", False),
        (0x80, 0, b"\x01\x00\x5e\x00\x00\x01", True),
        (0x40, 0, OTHER, True),
        (0, 1 << 28, ADDRESS, False),
        (0, 1 << 28, OTHER, True),
    ],
)
def test_perfect_and_inverse_filtering(mode: int, kind: int, destination: bytes, accepted: bool) -> None:
    driver = Driver()
    driver.start(mode)
    driver.filter([ADDRESS, BROADCAST], kind)
    assert driver.nic.receive(ether(destination)) == accepted


def test_hash_filtering(driver: Driver) -> None:
    group = b"\x01\x00\x5e\x01\x02\x03"
    halves = bytearray(96)
    index = ~crc32(group) & 0x1FF
    halves[index // 8] |= 1 << index % 8
    halves[78:84] = ADDRESS
    driver.setup(bytes(halves), 1 << 22)
    assert driver.read(6) & 0x15 == 0x01
    accepted = [driver.nic.receive(ether(d)) for d in (ADDRESS, group, OTHER, b"\x01\x00\x5e\x01\x02\x04")]
    assert accepted == [True, True, False, False]


def test_the_serial_rom_holds_the_address(driver: Driver) -> None:
    def word(address: int) -> int:
        command = 0b110 << 6 | address
        driver.write(9, 0x4800)
        driver.write(9, 0x4801)
        for bit in range(10, -1, -1):
            data = 4 if command >> bit & 1 else 0
            driver.write(9, 0x4801 | data)
            driver.write(9, 0x4803 | data)
        value = 0
        for _ in range(16):
            driver.write(9, 0x4801)
            driver.write(9, 0x4803)
            value = value << 1 | (driver.read(9) >> 3 & 1)
        driver.write(9, 0x4800)
        return value

    rom = struct.pack("<64H", *(word(n) for n in range(64)))
    assert rom[20:26] == ADDRESS
    assert rom[:4] == bytes.fromhex("000a1421"), (
        "Hyper-V's subsystem, which the chip shows in its configuration space"
    )
    assert struct.unpack("<H", rom[126:]) == (crc32(rom[:126]) & 0xFFFF,)


def test_stopping_and_resetting(driver: Driver) -> None:
    driver.write(6, 0)
    assert driver.read(5) & 0x102 == 0x102
    assert not driver.nic.receive(ether(ADDRESS))
    driver.queue(ether(OTHER), TX_FS | TX_LS)
    driver.write(1, 0)
    assert not driver.sent
    driver.write(6, 0x2000)
    assert len(driver.sent) == 1
    driver.write(0, 1)
    assert driver.read(5) == 0
    assert driver.levels[-1] is False


def test_loopback(driver: Driver) -> None:
    driver.write(6, 0x2002 | 1 << 10)
    driver.send(ether(ADDRESS))
    assert not driver.sent
    taken = driver.take()
    assert taken is not None
    assert taken[:-4] == ether(ADDRESS)


@pytest.mark.parametrize("where", ["descriptor", "buffer", "receive"])
def test_rings_and_buffers_outside_of_memory_are_bus_errors(driver: Driver, where: str) -> None:
    if where == "descriptor":
        driver.write(4, 0xFFFFFFF0)
    elif where == "buffer":
        driver.descriptor(TX_RING + 16 * driver.tx, OWN, TX_FS | TX_LS | 100, 1 << 20, 0)
    else:
        driver.write(3, 1 << 20)
        assert not driver.nic.receive(ether(ADDRESS))
    driver.write(1, 0)
    assert driver.read(5) & (1 << 13 | 1 << 15) == 1 << 13 | 1 << 15
    assert not driver.sent
    driver.start()
    driver.send(ether(OTHER))
    assert len(driver.sent) == 1


def test_frames_that_never_end_are_cut_off(driver: Driver) -> None:
    for n in range(3):
        driver.queue(bytes(1000), TX_FS if n == 0 else 0)
    driver.write(1, 0)
    assert driver.read(5) & 0x08
    assert not driver.sent
    driver.send(ether(OTHER))
    assert len(driver.sent) == 1


def test_an_address_must_be_one_stations() -> None:
    with pytest.raises(LocalProtocolError):
        Tulip(GuestMemory(4096), BROADCAST, print)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    steps=st.lists(st.tuples(st.integers(0, 17), st.integers(0, 0xFFFFFFFF)), max_size=40),
)
def test_any_registers_and_rings_leave_the_host_unharmed(seed: int, steps: list[tuple[int, int]]) -> None:
    driver = Driver()
    rng = random.Random(seed)
    driver.memory.write(0, rng.randbytes(0x4000))
    for at in range(0, 0x4000, 16):  # plausible pointers, random everything else
        if rng.random() < 0.7:
            words = rng.getrandbits(32), rng.getrandbits(32), rng.randrange(0x5000), rng.randrange(0x4000)
            driver.descriptor(at, *words)
    if rng.random() < 0.5:
        driver.start()
    for csr, value in steps:
        if csr == 16:
            driver.nic.receive(ether(ADDRESS, value % 1600))
        elif csr == 17:
            driver.nic.bar_read(value % 2, value % 128, 1 << value % 4)
        else:
            driver.write(csr, value & 0x3FFC if csr in (3, 4) else value)
    assert all(14 <= len(sent) <= 1518 for sent in driver.sent)
    assert all(a != b for a, b in zip(driver.levels, driver.levels[1:], strict=False))

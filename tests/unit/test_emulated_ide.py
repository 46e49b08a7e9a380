"""The IDE channel seen from its ports."""

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmbus.emulated.ata import Command, IdentifyDevice, Status
from vmbus.emulated.ide import PRIMARY_CONTROL, PRIMARY_PORT, IdeChannel
from vmbus.errors import DeviceError

DATA, ERROR, FEATURES, COUNT, LOW, MID, HIGH, DEVICE, STATUS = 0, 1, 1, 2, 3, 4, 5, 6, 7
READY, DRQ, ERR = 0x50, 0x58, 0x51
ABRT, IDNF, UNC = 0x04, 0x10, 0x40


class Medium:
    """A disk in memory with faults on demand."""

    sector_size = 512
    read_only = False

    def __init__(self, sectors: int) -> None:
        self.sector_count = sectors
        self.data = bytearray(b"".join(struct.pack("<Q", n) * 64 for n in range(sectors)))
        self.bad: set[int] = set()
        self.flushes = 0
        self.calls: list[tuple[str, int, int]] = []

    def _check(self, kind: str, offset: int, length: int) -> None:
        assert offset % 512 == 0
        assert length % 512 == 0
        assert 0 <= offset < offset + length <= len(self.data)
        self.calls.append((kind, offset // 512, length // 512))
        if self.bad & set(range(offset // 512, (offset + length) // 512)):
            raise DeviceError("bad sector")

    def read(self, offset: int, length: int) -> bytes:
        self._check("read", offset, length)
        return bytes(self.data[offset : offset + length])

    def write(self, offset: int, data: bytes) -> None:
        self._check("write", offset, len(data))
        self.data[offset : offset + len(data)] = data

    def flush(self) -> None:
        self.flushes += 1
        if -1 in self.bad:
            raise DeviceError("cannot flush")


class Host:
    """The host side of a channel: registers, and PIO by polling."""

    def __init__(self, sectors: int = 3000, slave: Medium | None = None) -> None:
        self.medium = Medium(sectors)
        self.levels: list[bool] = []
        self.ide = IdeChannel(self.medium, slave, interrupt=self.levels.append)

    def get(self, register: int) -> int:
        return self.ide.io_read(PRIMARY_PORT + register, 1)

    def put(self, register: int, value: int) -> None:
        self.ide.io_write(PRIMARY_PORT + register, 1, value)

    def control(self, value: int) -> None:
        self.ide.io_write(PRIMARY_CONTROL, 1, value)

    @property
    def alternate(self) -> int:
        return self.ide.io_read(PRIMARY_CONTROL, 1)

    def command(self, command: int, lba: int = 0, count: int = 1, *, extended: bool = False) -> int:
        if extended:
            for register, value in (
                (COUNT, count >> 8),
                (LOW, lba >> 24),
                (MID, lba >> 32),
                (HIGH, lba >> 40),
            ):
                self.put(register, value & 0xFF)
        self.put(COUNT, count & 0xFF)
        self.put(LOW, lba & 0xFF)
        self.put(MID, lba >> 8 & 0xFF)
        self.put(HIGH, lba >> 16 & 0xFF)
        self.put(DEVICE, 0x40 if extended else 0x40 | lba >> 24 & 0x0F)
        self.put(STATUS, command)
        return self.alternate

    def words(self, count: int) -> bytes:
        return b"".join(self.ide.io_read(PRIMARY_PORT, 2).to_bytes(2, "little") for _ in range(count))

    def send(self, data: bytes) -> None:
        for (word,) in struct.iter_unpack("<H", data):
            self.ide.io_write(PRIMARY_PORT, 2, word)


@pytest.fixture
def host() -> Host:
    return Host()


def test_identify(host: Host) -> None:
    assert host.command(Command.IDENTIFY_DEVICE) == DRQ
    data = IdentifyDevice.unpack(host.words(256))
    assert host.get(STATUS) == READY
    assert data.lba28_sectors == data.lba48_sectors == 3000
    assert data.model == b"MVUB SMELUTADED SI K".ljust(40)
    assert data.capabilities & 0x0200
    assert data.supported83 & 0x0400
    assert (data.cylinders, data.heads, data.sectors_per_track) == (2, 16, 63)
    assert data.multiple_most == 0x8080
    assert data.multiple_current == 0x0110


@pytest.mark.parametrize(
    ("command", "extended"), [(Command.READ_SECTORS, False), (0x21, False), (Command.READ_SECTORS_EXT, True)]
)
def test_read_sectors_interrupts_once_a_sector(host: Host, command: int, extended: bool) -> None:
    assert host.command(command, 100, 3, extended=extended) == DRQ
    for n in range(3):
        assert host.levels == [True]
        host.levels.clear()
        assert host.get(STATUS) == DRQ  # ends the interrupt
        assert host.levels == [False]
        host.levels.clear()
        assert host.words(256) == struct.pack("<Q", 100 + n) * 64
    assert host.levels == []
    assert host.get(STATUS) == READY
    assert host.medium.calls == [("read", 100, 3)]
    assert host.ide.account.backend_calls == 1
    assert host.ide.account.bytes_copied == 3 * 512


def test_write_sectors(host: Host) -> None:
    data = bytes(range(256)) * 4
    assert host.command(Command.WRITE_SECTORS, 7, 2) == DRQ
    assert host.levels == []  # the first block is polled for
    host.send(data[:512])
    assert host.levels == [True]
    assert host.get(STATUS) == DRQ
    host.send(data[512:])
    assert host.get(STATUS) == READY
    assert host.levels == [True, False, True, False]
    assert bytes(host.medium.data[7 * 512 : 9 * 512]) == data
    assert host.medium.calls == [("write", 7, 2)]


def test_a_disk_powers_on_with_sixteen_sectors_a_block(host: Host) -> None:
    """As firmware leaves real ones: Linux's libata uses what word 59 says and sets nothing itself."""
    for command in (Command.READ_MULTIPLE, Command.READ_MULTIPLE_EXT):
        host.levels.clear()
        assert host.command(command, 3, 40, extended=command == Command.READ_MULTIPLE_EXT) == DRQ
        data = b""
        for sectors in (16, 16, 8):
            assert host.get(STATUS) == DRQ
            data += host.words(256 * sectors)
        assert data == bytes(host.medium.data[3 * 512 : 43 * 512])
        assert host.levels == [True, False] * 3, "an interrupt for each block"
    host.command(Command.WRITE_MULTIPLE, 50, 20)
    host.send(bytes(20 * 512))
    assert host.get(STATUS) == READY
    assert bytes(host.medium.data[50 * 512 : 70 * 512]) == bytes(20 * 512)


def test_multiple_mode_moves_several_sectors_a_block(host: Host) -> None:
    assert host.command(Command.SET_MULTIPLE, count=0) == READY
    assert host.command(Command.READ_MULTIPLE, 0, 8) == ERR
    assert host.get(ERROR) == ABRT
    host.command(Command.IDENTIFY_DEVICE)
    assert IdentifyDevice.unpack(host.words(256)).multiple_current == 0
    assert host.command(Command.SET_MULTIPLE, count=3) == ERR
    assert host.command(Command.SET_MULTIPLE, count=4) == READY
    host.get(STATUS)
    host.levels.clear()
    assert host.command(Command.READ_MULTIPLE, 10, 10) == DRQ
    blocks = 0
    while host.get(STATUS) & Status.DRQ:
        blocks += 1
        count = min(4, 10 - 4 * (blocks - 1))
        assert host.words(256 * count)[:8] == struct.pack("<Q", 10 + 4 * (blocks - 1))
    assert blocks == 3
    assert host.levels == [True, False] * 3
    host.command(Command.WRITE_MULTIPLE, 20, 5)
    host.send(bytes(2560))
    assert host.get(STATUS) == READY
    assert host.medium.calls[-1] == ("write", 20, 5)


def test_a_count_of_zero_is_the_largest(host: Host) -> None:
    host.command(Command.READ_SECTORS, 0, 0)
    assert len(host.words(256 * 256)) == 256 * 512
    assert host.get(STATUS) == READY
    assert host.command(Command.READ_SECTORS_EXT, 0, 0, extended=True) == ERR  # 65536 sectors are not there
    assert host.get(ERROR) == IDNF
    assert host.medium.calls == [("read", 0, 128), ("read", 128, 128)]


def test_cylinder_head_sector_addresses(host: Host) -> None:
    host.put(COUNT, 10)
    host.put(DEVICE, 0xA3)  # 4 heads of 10 sectors
    host.put(STATUS, Command.INITIALIZE_PARAMETERS)
    assert host.get(STATUS) == READY
    for register, value in ((COUNT, 1), (LOW, 5), (MID, 2), (HIGH, 0), (DEVICE, 0xA1)):
        host.put(register, value)
    host.put(STATUS, Command.READ_SECTORS)
    assert host.words(256) == struct.pack("<Q", (2 * 4 + 1) * 10 + 4) * 64
    for sector, device in ((0, 0xA0), (11, 0xA0), (1, 0xA4)):
        host.put(LOW, sector)
        host.put(DEVICE, device)
        host.put(STATUS, Command.READ_SECTORS)
        assert host.get(STATUS) == ERR
        assert host.get(ERROR) == IDNF


def test_a_bad_sector_ends_the_read_at_its_address(host: Host) -> None:
    host.medium.bad = {203}
    host.command(Command.READ_SECTORS, 200, 8)
    for n in range(3):
        assert host.get(STATUS) == DRQ
        assert host.words(256)[:8] == struct.pack("<Q", 200 + n)
    assert host.get(STATUS) == ERR
    assert host.get(ERROR) == UNC
    assert [host.get(r) for r in (LOW, MID, HIGH)] == [203, 0, 0]


def test_a_failed_write_names_its_sector_and_faults(host: Host) -> None:
    host.medium.bad = {52}
    host.command(Command.WRITE_SECTORS_EXT, 50, 4, extended=True)
    host.send(b"\xee" * 2048)
    assert host.get(STATUS) == ERR | Status.DF
    assert host.get(LOW) == 52
    assert host.medium.data[51 * 512] == 0xEE


def test_read_only_media_abort_writes(host: Host) -> None:
    host.medium.read_only = True
    assert host.command(Command.WRITE_SECTORS) == ERR
    assert host.get(ERROR) == ABRT


def test_flush_and_write_through(host: Host) -> None:
    assert host.command(Command.FLUSH_CACHE) == READY
    assert host.command(Command.FLUSH_CACHE_EXT) == READY
    assert host.medium.flushes == 2
    host.put(FEATURES, 0x82)
    assert host.command(Command.SET_FEATURES) == READY
    host.command(Command.WRITE_SECTORS)
    host.send(bytes(512))
    assert host.medium.flushes == 4
    host.medium.bad = {-1}
    assert host.command(Command.FLUSH_CACHE) & (Status.ERR | Status.DF) == Status.ERR | Status.DF


@pytest.mark.parametrize("command", [0x00, 0x08, 0xA0, 0xA1, 0xC8, 0xCA, 0x25, 0xFF])
def test_unknown_commands_abort(host: Host, command: int) -> None:
    assert host.command(command) == ERR
    assert host.get(ERROR) == ABRT


@pytest.mark.parametrize(
    ("subcommand", "count", "status"), [(3, 0x0C, READY), (3, 0x45, ERR), (0x99, 0, ERR)]
)
def test_set_features(host: Host, subcommand: int, count: int, status: int) -> None:
    host.put(FEATURES, subcommand)
    assert host.command(Command.SET_FEATURES, count=count) == status


def test_software_reset_and_diagnostic_leave_the_signature(host: Host) -> None:
    for reset in (False, True):
        host.command(Command.READ_SECTORS, 5, 3)
        if reset:
            host.control(0x04)
            assert host.alternate == 0x80
            host.put(LOW, 77)
            host.control(0)
        else:
            host.put(STATUS, Command.EXECUTE_DIAGNOSTIC)
        assert host.get(STATUS) == READY
        assert [host.get(r) for r in (ERROR, COUNT, LOW, MID, HIGH)] == [1, 1, 1, 0, 0]
        assert host.words(1) == b"\0\0"


def test_interrupts_are_held_back_by_nien(host: Host) -> None:
    host.control(0x02)
    host.command(Command.FLUSH_CACHE)
    assert host.levels == []
    host.control(0)
    assert host.levels == [True]
    assert host.alternate == READY  # does not acknowledge
    assert host.levels == [True]
    host.get(STATUS)
    assert host.levels == [True, False]


def test_hob_shows_the_previous_contents(host: Host) -> None:
    host.command(Command.READ_NATIVE_MAX_EXT, extended=True)
    assert [host.get(r) for r in (LOW, MID, HIGH)] == [2999 & 0xFF, 2999 >> 8, 0]
    host.put(COUNT, 0x12)
    host.put(COUNT, 0x34)
    assert host.get(COUNT) == 0x34
    host.control(0x80)
    assert host.get(COUNT) == 0x12
    host.put(FEATURES, 0)  # any write ends it
    assert host.get(COUNT) == 0x34


def test_an_absent_drive_reads_as_nothing_and_takes_no_command(host: Host) -> None:
    host.put(DEVICE, 0x10)
    assert host.get(STATUS) == 0
    host.put(STATUS, Command.IDENTIFY_DEVICE)
    assert host.get(STATUS) == 0
    host.put(DEVICE, 0)
    assert host.get(STATUS) == READY
    assert host.levels == []


def test_two_drives_share_the_registers() -> None:
    slave = Medium(100)
    host = Host(slave=slave)
    host.put(DEVICE, 0x50)
    host.put(STATUS, Command.IDENTIFY_DEVICE)
    assert IdentifyDevice.unpack(host.words(256)).lba48_sectors == 100
    host.put(DEVICE, 0x40)
    host.put(STATUS, Command.IDENTIFY_DEVICE)
    assert IdentifyDevice.unpack(host.words(256)).lba48_sectors == 3000


def test_string_accesses_equal_single_ones(host: Host) -> None:
    host.command(Command.READ_SECTORS, 0, 4)
    first = host.ide.io_read_string(PRIMARY_PORT, 2, 300)  # across a sector
    rest = host.ide.io_read_string(PRIMARY_PORT, 4, 1024)  # and beyond the end
    assert first + rest == bytes(host.medium.data[:2048]).ljust(600 + 4096, b"\0")
    host.command(Command.WRITE_SECTORS, 0, 2)
    host.ide.io_write_string(PRIMARY_PORT, 2, b"\x55" * 1024)
    assert host.medium.data[:1024] == b"\x55" * 1024


def test_media_that_do_not_fit_are_refused() -> None:
    medium = Medium(10)
    medium.sector_size = 4096
    with pytest.raises(DeviceError, match="512"):
        IdeChannel(medium)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 8), st.sampled_from([1, 2, 4]), st.integers(0, 0xFFFFFFFF)),
        max_size=60,
    )
)
def test_any_accesses_keep_the_channel_sane(steps: list[tuple[bool, int, int, int]]) -> None:
    host = Host(300)
    commands = list(Command)
    for read, register, size, value in steps:
        port = PRIMARY_CONTROL if register == 8 else PRIMARY_PORT + register
        if read:
            assert 0 <= host.ide.io_read(port, size) < 1 << 8 * size
            host.ide.io_read_string(port, size, value % 600)
        elif register == STATUS and value % 2:
            host.ide.io_write(port, 1, commands[value % len(commands)])
        else:
            host.ide.io_write(port, size, value & (1 << 8 * size) - 1)
        assert all(a != b for a, b in zip(host.levels, host.levels[1:], strict=False))
    host.control(0x04)
    host.control(0x00)
    host.put(DEVICE, 0)
    assert host.get(STATUS) == READY

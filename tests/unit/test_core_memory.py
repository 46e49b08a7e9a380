import ctypes
import gc
import os

import pytest
from reference.descriptors import open_descriptors

from vmbus.core.memory import EXECUTE, PAGE_SIZE, READ, WRITE, GpaRange, GpaRanges, GuestMemory, Window
from vmbus.errors import GuestMemoryError, RingCorrupt


@pytest.fixture
def memory() -> GuestMemory:
    return GuestMemory(1 << 20)


def test_reads_what_was_written_across_pages(memory: GuestMemory) -> None:
    memory.write(4090, b"hello world")
    assert memory.read(4090, 11) == b"hello world"
    assert memory.view(4090, 5) == b"hello"
    assert memory.read(1 << 20, 0) == b""


@pytest.mark.parametrize(
    ("gpa", "length"), [(1 << 20, 1), (0, (1 << 20) + 1), ((1 << 64) - 1, 2), (5, (1 << 64) - 1)]
)
def test_outside_the_partition_is_an_error(memory: GuestMemory, gpa: int, length: int) -> None:
    with pytest.raises(GuestMemoryError):
        memory.read(gpa, length)
    with pytest.raises(GuestMemoryError):
        memory.view(gpa, length)


@pytest.mark.parametrize("size", [0, -4096, 100, 1 << 50])
def test_sizes_that_make_no_sense(size: int) -> None:
    with pytest.raises(ValueError, match="guest memory"):
        GuestMemory(size)


def test_a_refused_write_changes_nothing(memory: GuestMemory) -> None:
    memory.protect(PAGE_SIZE, PAGE_SIZE, READ)
    with pytest.raises(GuestMemoryError):
        memory.write(PAGE_SIZE - 4, b"12345678")
    assert memory.read(PAGE_SIZE - 4, 8) == bytes(8)
    memory.protect(PAGE_SIZE, PAGE_SIZE, 0)
    with pytest.raises(GuestMemoryError):
        memory.read(PAGE_SIZE, 1)


def test_pages_of_another_space_can_be_mapped_with_fewer_rights(memory: GuestMemory) -> None:
    child = GuestMemory(1 << 16, mapped=False)
    with pytest.raises(GuestMemoryError):
        child.read(0, 1)
    memory.write(0x3000, b"shared")
    child.map(0x8000, memory, 0x3000, 0x2000, READ)
    assert child.read(0x8000, 6) == b"shared"
    assert (child.access(0x8000), child.access(0x7000)) == (READ, 0)
    with pytest.raises(GuestMemoryError):
        child.write(0x8000, b"x")
    child.protect(0x8000, 0x2000, READ | WRITE)
    child.write(0x9000, b"seen by both")
    assert memory.read(0x4000, 12) == b"seen by both"
    child.unmap(0x8000, 0x1000)
    with pytest.raises(GuestMemoryError):
        child.read(0x8000, 1)
    assert child.read(0x9000, 4) == b"seen"
    with pytest.raises(GuestMemoryError, match="no page"):
        child.protect(0x8000, 0x1000, READ)


@pytest.mark.parametrize("closed", [False, True])
def test_a_mapping_outlives_the_space_it_came_from(closed: bool) -> None:
    first = GuestMemory(1 << 16)
    source = GuestMemory(1 << 16)
    source.write(0, b"kept")
    source.map(4096, first, 0, 4096, READ | WRITE | EXECUTE)
    child = GuestMemory(1 << 16, mapped=False)
    child.map(0, source, 0, 1 << 16, READ | WRITE | EXECUTE)
    descriptors = [first.fd, source.fd]
    if closed:
        first.close()
        source.close()
    del source, first
    gc.collect()
    other = os.memfd_create("something else")  # would get the number of a descriptor that was closed
    try:
        os.ftruncate(other, 1 << 16)
        assert other not in descriptors
        window = child.window([0, 3, 2])
        assert bytes(window.view()[:4]) == b"kept"
        assert child.backing(4096)[0] == descriptors[0]
    finally:
        os.close(other)
    child.close()
    for number in descriptors:
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(number)


def test_map_checks_both_sides(memory: GuestMemory) -> None:
    empty = GuestMemory(1 << 16, mapped=False)
    with pytest.raises(GuestMemoryError):
        empty.map(0, memory, 1 << 20, PAGE_SIZE, READ)
    with pytest.raises(GuestMemoryError):
        empty.map(1 << 16, memory, 0, PAGE_SIZE, READ)
    with pytest.raises(GuestMemoryError):
        memory.map(0, empty, 0, PAGE_SIZE, READ)
    with pytest.raises(ValueError, match="whole pages"):
        empty.map(1, memory, 0, PAGE_SIZE, READ)


def test_a_window_shows_scattered_pages_in_order_and_mirrors_the_data(memory: GuestMemory) -> None:
    pfns = [5, 9, 7, 8, 200]
    for index, pfn in enumerate(pfns):
        memory.write(pfn * PAGE_SIZE, bytes([index + 1]) * PAGE_SIZE)
    window = memory.window(pfns)
    assert window.size == 5 * PAGE_SIZE
    assert bytes(window.view()) == b"".join(bytes([i]) * PAGE_SIZE for i in range(1, 6))
    flat = (ctypes.c_ubyte * (9 * PAGE_SIZE)).from_address(window.address)
    flat[5 * PAGE_SIZE] = 99  # first byte of the mirror is the first byte of the data area
    assert memory.read(9 * PAGE_SIZE, 1) == b"\x63"


def test_a_window_without_mirror(memory: GuestMemory) -> None:
    window = memory.window([3], mirrored=False)
    window.view()[:3] = b"abc"
    assert memory.read(3 * PAGE_SIZE, 3) == b"abc"


@pytest.mark.parametrize("pfns", [[0, 256], [0, -1], [0, 1 << 60]])
def test_windows_stay_inside_the_partition(memory: GuestMemory, pfns: list[int]) -> None:
    with pytest.raises(GuestMemoryError):
        memory.window(pfns)


def test_windows_need_write_access(memory: GuestMemory) -> None:
    memory.protect(PAGE_SIZE, PAGE_SIZE, READ)
    with pytest.raises(GuestMemoryError):
        memory.window([0, 1])


def test_windows_of_files_check_the_length() -> None:
    fd = os.memfd_create("test")
    try:
        os.ftruncate(fd, 3 * PAGE_SIZE)
        with pytest.raises(ValueError, match="page 3"):
            Window.from_fd(fd, [0, 3])
        with pytest.raises(ValueError, match="control page"):
            Window.from_fd(fd, [0])
        assert Window.from_fd(fd, [2, 1]).size == 2 * PAGE_SIZE
    finally:
        os.close(fd)


def test_close_waits_for_views(memory: GuestMemory) -> None:
    view = memory.view(0, 10)
    with pytest.raises(BufferError):
        memory.close()
    view.release()
    memory.close()
    with pytest.raises(GuestMemoryError):
        memory.read(0, 1)
    window = Window.allocate(1)
    window.close()
    with pytest.raises(GuestMemoryError):
        window.view()


def test_a_holder_of_the_descriptor_cannot_shrink_it(memory: GuestMemory) -> None:
    with pytest.raises(PermissionError):
        os.ftruncate(memory.fd, PAGE_SIZE)


def test_no_descriptor_is_lost() -> None:
    before = open_descriptors()
    for _ in range(50):
        memory = GuestMemory(1 << 16)
        memory.window([0, 1, 2])
        Window.allocate(2)
    del memory
    assert open_descriptors() == before


def test_ranges_round_trip() -> None:
    ranges = GpaRanges([(6000, 100, [1, 8]), (10, 4090, [3, 4])])
    assert ranges.total == 6010
    assert len(ranges) == 2
    assert list(ranges) == [GpaRange(6000, 100, (1, 8)), GpaRange(10, 4090, (3, 4))]
    assert ranges[1].pfns == (3, 4)
    again = GpaRanges.parse(ranges.pack(), 2)
    assert list(again) == list(ranges)
    assert list(GpaRanges.contiguous(4000, 200)) == [GpaRange(200, 4000, (0, 1))]


@pytest.mark.parametrize(
    "ranges",
    [
        [],
        [(0, 0, [])],
        [(1, 4096, [1])],
        [(1, -1, [1])],
        [(1, 0, [1, 2])],
        [(4097, 0, [1])],
        [(1 << 32, 0, [1])],
    ],
)
def test_ranges_that_make_no_sense(ranges: list[tuple[int, int, list[int]]]) -> None:
    with pytest.raises(ValueError, match=r"range|pages"):
        GpaRanges(ranges)


@pytest.mark.parametrize(
    ("data", "count"),
    [
        (b"", 0),
        (b"", 1),
        (bytes(16), 1),  # no bytes
        ((1 | 4096 << 32).to_bytes(8, "little") + bytes(8), 1),  # starts after its first page
        ((4097).to_bytes(8, "little") + bytes(8), 1),  # two pages needed, one there
        ((0xFFFFFFFF | 4095 << 32).to_bytes(8, "little") + bytes(8), 1),  # a sum that overflows 32 bits
        ((8).to_bytes(8, "little") + bytes(8), 0xFFFFFFFF),
    ],
)
def test_malformed_ranges_of_a_peer(data: bytes, count: int) -> None:
    with pytest.raises(RingCorrupt):
        GpaRanges.parse(data, count)


def test_ranges_move_bytes(memory: GuestMemory) -> None:
    ranges = GpaRanges([(6000, 100, [1, 8]), (10, 4090, [3, 4])])
    data = bytes(i * 7 % 251 for i in range(6010))
    ranges.write(memory, data)
    assert ranges.read(memory) == data
    assert ranges.read(memory, 3990, 30) == data[3990:4020]
    assert memory.read(8 * PAGE_SIZE, 10) == data[3996:4006]
    ranges.write(memory, b"##", 6008)
    assert memory.read(4 * PAGE_SIZE + 2, 2) == b"##"
    with pytest.raises(GuestMemoryError):
        ranges.read(memory, 6000, 11)
    with pytest.raises(GuestMemoryError):
        ranges.write(memory, b"123", 6008)


def test_a_bad_page_in_the_middle_refuses_the_whole_copy(memory: GuestMemory) -> None:
    ranges = GpaRanges([(3 * PAGE_SIZE, 0, [1, 999999, 2])])
    with pytest.raises(GuestMemoryError):
        ranges.write(memory, b"x" * 3 * PAGE_SIZE)
    assert memory.read(PAGE_SIZE, 4) == bytes(4)


def test_file_io_between_host_file_and_guest_pages(memory: GuestMemory) -> None:
    pages = list(range(250, 30, -2))  # more vectors than one system call takes
    length = len(pages) * PAGE_SIZE - 100
    ranges = GpaRanges([(length, 50, pages)])
    data = os.urandom(length)
    fd = os.memfd_create("disk")
    try:
        os.write(fd, b"!" * 512 + data)
        assert ranges.preadv(memory, fd, 512) == length
        assert ranges.read(memory) == data
        assert ranges.preadv(memory, fd, 512 + length - 7) == 7  # end of the file
        assert ranges.preadv(memory, fd, 10**9) == 0
        ranges.write(memory, data)
        assert ranges.pwritev(memory, fd, 0, 1000, 5000) == 5000
        assert os.pread(fd, 5000, 0) == data[1000:6000]
        memory.protect(pages[50] * PAGE_SIZE, PAGE_SIZE, READ)
        with pytest.raises(GuestMemoryError):
            ranges.preadv(memory, fd, 0)
        assert ranges.pwritev(memory, fd, 0) == length  # reading the guest is still allowed
    finally:
        os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        ranges.pwritev(memory, fd, 0)


def test_the_same_memory_through_its_descriptor(memory: GuestMemory) -> None:
    twin = GuestMemory(1 << 20, fd=memory.fd)
    assert twin.fd != memory.fd
    twin.write(0x1234, b"both")
    assert memory.read(0x1234, 4) == b"both"
    twin.protect(0x1000, 0x1000, READ)
    memory.write(0x1234, b"each its own rights")
    twin.close()
    assert memory.read(0x1234, 4) == b"each"


def test_memory_that_could_shrink_is_refused(memory: GuestMemory) -> None:
    with pytest.raises(ValueError, match="too small"):
        GuestMemory(2 << 20, fd=memory.fd)
    fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    try:
        os.truncate(fd, 1 << 20)
        with pytest.raises(ValueError, match="not sealed"):
            GuestMemory(1 << 20, fd=fd)
    finally:
        os.close(fd)


def test_equal_backing_is_the_same_memory(memory: GuestMemory) -> None:
    child, grandchild = GuestMemory(1 << 16, mapped=False), GuestMemory(1 << 16, mapped=False)
    child.map(0x2000, memory, 0x7000, PAGE_SIZE, READ | WRITE)
    grandchild.map(0x5000, child, 0x2000, PAGE_SIZE, READ)
    assert (
        grandchild.backing(0x5123) == child.backing(0x2123) == memory.backing(0x7123) == (memory.fd, 0x7123)
    )
    assert memory.backing(0x8000) != memory.backing(0x7000)
    for nowhere in (0x3000, 1 << 16, 1 << 60):
        with pytest.raises(GuestMemoryError):
            child.backing(nowhere)


def test_a_source_that_closes_first_leaves_its_pages_to_whoever_has_them() -> None:
    """A window is made through the number of the memfd, which must not be another file's by then."""
    before = open_descriptors()
    source, borrower = GuestMemory(1 << 14), GuestMemory(1 << 14, mapped=False)
    again = GuestMemory(1 << 14, mapped=False)
    borrower.map(0x1000, source, 0x2000, PAGE_SIZE, READ | WRITE)
    again.map(0x3000, borrower, 0x1000, PAGE_SIZE, READ | WRITE)
    source.write(0x2000, b"still here")
    source.close()
    others = [GuestMemory(1 << 14) for _ in range(8)]
    for other in others:
        other.write(0x2000, b"not theirs")
    assert bytes(borrower.window([1], mirrored=False).view()[:10]) == b"still here"
    borrower.close()
    assert bytes(again.window([3], mirrored=False).view()[:10]) == b"still here"
    again.close()
    for other in others:
        other.close()
    assert open_descriptors() == before

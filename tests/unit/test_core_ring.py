import ctypes
import gc
import os
import struct
import threading

import numpy as np
import pytest

from vmbus.core.memory import GpaRanges, GuestMemory, Window
from vmbus.core.ring import (
    COMPLETION,
    COMPLETION_REQUESTED,
    GPA_DIRECT,
    IN_BAND,
    TRANSFER_PAGES,
    RingReader,
    RingWriter,
)
from vmbus.errors import RingCorrupt, RingEmpty, RingFull


@pytest.fixture
def window() -> Window:
    return Window.allocate(3)


@pytest.fixture
def ends(window: Window) -> tuple[RingWriter, RingReader]:
    return RingWriter(window), RingReader(window)


def test_bytes_of_a_packet_in_the_ring(window: Window) -> None:
    writer = RingWriter(window)
    writer.send(b"123456789", 0x1122334455667788, flags=COMPLETION_REQUESTED)
    writer.send(b"", 1, type=COMPLETION)
    assert bytes(window.view()[4096:][:64]) == (
        struct.pack("<HHHHQ", 6, 2, 4, 1, 0x1122334455667788)
        + b"123456789" + bytes(7) + struct.pack("<II", 0, 0)
        + struct.pack("<HHHHQ", 11, 2, 2, 0, 1) + struct.pack("<II", 0, 40)
    )  # fmt: skip
    assert struct.unpack_from("<IIII", window.view()) == (64, 0, 0, 0)
    assert struct.unpack_from("<I", window.view(), 64) == (1,)  # we understand pending_send_size


def test_bytes_of_packets_with_ranges(window: Window) -> None:
    writer = RingWriter(window)
    writer.send_gpa_direct(b"abc", GpaRanges([(5000, 8, [3, 9]), (1, 0, [4])]), 7)
    expected = struct.pack("<HHHHQ", 9, 8, 9, 1, 7) + struct.pack("<II", 0, 2)
    expected += struct.pack("<IIQQ", 5000, 8, 3, 9) + struct.pack("<IIQ", 1, 0, 4) + b"abc" + bytes(5)
    expected += struct.pack("<II", 0, 0)
    assert bytes(window.view()[4096 : 4096 + len(expected)]) == expected
    writer.send_transfer_pages(b"", 0xCAFE, [(100, 200)], 8, flags=0)
    second = (
        struct.pack("<HHHHQ", 7, 4, 4, 0, 8)
        + struct.pack("<HBBI", 0xCAFE, 0, 0, 1)
        + struct.pack("<II", 100, 200)
    )
    assert bytes(window.view()[4096 + len(expected) :][: len(second)]) == second


def test_packets_of_every_kind_arrive(ends: tuple[RingWriter, RingReader]) -> None:
    writer, reader = ends
    ranges = GpaRanges([(5000, 8, [3, 9])])
    writer.send(b"in band", 1, flags=COMPLETION_REQUESTED)
    writer.send(b"done", 2, type=COMPLETION)
    writer.send_gpa_direct(b"direct", ranges, 3)
    writer.send_transfer_pages(b"pages", 0xCAFE, [(1, 2), (3, 4)], 4)
    first, second, third, fourth = reader.recv_packets()
    assert (first.type, first.flags, first.transaction_id, first.payload) == (IN_BAND, 1, 1, b"in band\0")
    assert (second.type, second.flags, second.payload) == (COMPLETION, 0, b"done\0\0\0\0")
    assert third.type == GPA_DIRECT
    assert third.payload == b"direct\0\0"
    assert third.ranges is not None
    assert list(third.ranges) == list(ranges)
    assert (fourth.type, fourth.transfer_set_id) == (TRANSFER_PAGES, 0xCAFE)
    assert fourth.transfer_ranges == ((1, 2), (3, 4))
    with pytest.raises(RingEmpty):
        reader.recv()


@pytest.mark.parametrize("pages", [1, 2, 3, 7])
def test_packets_wrap_around_rings_of_any_page_count(pages: int) -> None:
    window = Window.allocate(pages)
    writer, reader = RingWriter(window), RingReader(window)
    for number in range(3000):
        payload = bytes([number & 255]) * (number * 37 % (pages * 4096 - 32))
        assert writer.send(payload, number)
        packet = reader.recv_packet()
        assert packet.transaction_id == number
        assert packet.payload == payload + bytes(-len(payload) % 8)


def test_a_ring_over_scattered_guest_pages() -> None:
    memory = GuestMemory(1 << 20)
    pfns = [17, 3, 200, 4, 90]
    writer, reader = RingWriter(memory.window(pfns)), RingReader(memory.window(pfns))
    for number in range(2000):
        writer.send(os.urandom(8) * (number % 900), number)
        assert reader.recv_packet().transaction_id == number
    write, read = struct.unpack("<II", memory.read(17 * 4096, 8))  # the control page is the first of the list
    assert write == read
    assert memory.read(3 * 4096, 8) == RingReader(memory.window(pfns)).window.view()[4096:4104]


def test_full_and_too_long(ends: tuple[RingWriter, RingReader]) -> None:
    writer, reader = ends
    assert writer.capacity == 3 * 4096 - 8
    with pytest.raises(ValueError, match="longer"):
        writer.send(bytes(3 * 4096 - 31))
    writer.send(bytes(3 * 4096 - 32))  # descriptor 16, trailer 8, 8 always free
    assert writer.free_bytes == 0
    with pytest.raises(RingFull):
        writer.send(b"")
    reader.recv()
    writer.send(b"")
    with pytest.raises(ValueError, match="longer"):
        writer.send(bytes(1 << 20))
    big = RingWriter(Window.allocate(200))
    with pytest.raises(ValueError, match="longer"):
        big.send(bytes(0xFFFF * 8))
    assert RingReader(big.window).recv_batch() == []


def test_signal_only_when_the_reader_had_read_everything(ends: tuple[RingWriter, RingReader]) -> None:
    writer, reader = ends
    assert writer.send(b"first")
    assert not writer.send(b"second")
    reader.recv()
    assert not writer.send(b"third")
    assert len(reader.recv_batch()) == 2
    assert writer.send(b"fourth")
    assert (writer.publishes, writer.doorbells) == (4, 2)


def test_no_signal_while_masked(ends: tuple[RingWriter, RingReader]) -> None:
    writer, reader = ends
    reader.mask()
    assert not writer.send(b"x")
    assert reader.unmask()  # a packet came meanwhile
    reader.recv()
    assert not reader.unmask()
    assert writer.send(b"x")


def test_the_reader_signals_when_enough_space_is_free(ends: tuple[RingWriter, RingReader]) -> None:
    writer, reader = ends
    count, _ = writer.send_batch([bytes(1000)] * 100)
    assert count == 11
    assert not writer.want_space(3000)
    signals = []
    for _ in range(count):
        reader.recv()
        signals.append(reader.take_signal())
    assert signals == [False, True] + [False] * 9  # once, when two packets' room was there
    assert writer.want_space(3000)
    writer.stop_waiting()
    assert reader.doorbells == 1


def test_pending_send_size_of_the_ring_less_one(window: Window) -> None:
    """Some guests mean "all of the ring" by its size minus 1, which no multiple of 8 reaches."""
    writer, reader = RingWriter(window), RingReader(window)
    writer.send_batch([b"x"] * 3)
    struct.pack_into("<I", window.view(), 12, 3 * 4096 - 1)
    reader.recv()
    reader.recv()
    assert not reader.take_signal()
    reader.recv()
    assert reader.take_signal()


def test_batches_stop_at_a_full_ring_and_signal_once(ends: tuple[RingWriter, RingReader]) -> None:
    writer, reader = ends
    payloads = [bytes([i]) * 64 for i in range(200)]
    count, signal = writer.send_batch(payloads, 1000, 1)
    assert (count, signal) == (139, True)  # (12288 - 8) // 88
    assert writer.send_batch([]) == (0, False)
    assert writer.publishes == 1
    packets = reader.recv_packets(1000)
    assert [p.payload for p in packets] == payloads[:count]
    assert [p.transaction_id for p in packets] == list(range(1000, 1000 + count))
    assert reader.releases == 1


def test_numpy_batches(ends: tuple[RingWriter, RingReader]) -> None:
    writer, reader = ends
    rows = np.arange(50 * 24, dtype=np.uint32).reshape(50, 24)
    assert writer.send_batch(rows) == (50, True)
    out = np.zeros((60, 24), dtype=np.uint32)
    assert reader.recv_into(out) == 50
    assert (out[:50] == rows).all()
    assert not out[50:].any()
    records = np.zeros(5, dtype=[("a", "<u8"), ("b", "<u8")])
    records["b"] = range(5)
    writer.send_batch(records)
    back = np.zeros_like(records)
    assert reader.recv_into(back) == 5
    assert (back == records).all()
    with pytest.raises(TypeError, match="one payload a row"):
        writer.send_batch(b"not rows")
    with pytest.raises((ValueError, BufferError)):
        writer.send_batch(rows[:, ::2])
    writer.send(b"odd one")
    with pytest.raises(ValueError, match="a row 96"):
        reader.recv_into(out)
    assert reader.recv() == b"odd one\0"


NUMBERS = ["u1", "i2", ">i4", "f2", "f8", "c16", "?", "S5", "U3", "M8[s]", "V7", [("Oh", "i1"), ("b", "f8")]]


@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 2)])
def test_rows_of_any_type_of_number(
    ends: tuple[RingWriter, RingReader], dtype: str, shape: tuple[int, ...]
) -> None:
    writer, reader = ends
    rows = np.frombuffer(os.urandom(12 * np.dtype(dtype).itemsize), dtype).reshape(shape)  # read-only, too
    assert writer.send_batch(rows) == (3, True)
    out = np.zeros(shape, dtype)
    assert reader.recv_into(out) == 3
    assert out.tobytes() == rows.tobytes()
    assert writer.send(rows) is True
    assert reader.recv()[: rows.nbytes] == rows.tobytes()


@pytest.mark.parametrize("dtype", ["O", [("a", "i1"), ("b", "O")]], ids=str)
def test_arrays_of_python_objects_are_refused(ends: tuple[RingWriter, RingReader], dtype: str) -> None:
    """Their bytes are addresses: sent they tell nothing, and overwritten they crash the interpreter."""
    writer, reader = ends
    objects = np.zeros((2, 8), dtype)
    memory = GuestMemory(4096)
    for use in (
        lambda: writer.send(objects),
        lambda: writer.send_batch(objects),
        lambda: writer.send_batch([b"good", objects]),
        lambda: writer.send_batch(memoryview(objects)),
        lambda: writer.send_gpa_direct(objects, GpaRanges.contiguous(0, 1), 1),
        lambda: memory.write(0, objects),
        lambda: GpaRanges.contiguous(0, 4096).write(memory, objects),
    ):
        with pytest.raises(TypeError, match="Python objects"):
            use()
    assert writer.packets == 0
    writer.send_batch([bytes(objects.itemsize * 8)] * 2)
    with pytest.raises(TypeError, match="Python objects"):
        reader.recv_into(objects)
    assert reader.packets_read == 0
    objects[:] = 5  # still whole
    with pytest.raises(TypeError, match="Python objects"):
        reader.recv_into((ctypes.py_object * 4)())
    memory.close()  # no buffer of it is held


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        (np.zeros((8, 8), "u1")[::2], "C-contiguous"),
        (np.zeros((8, 8), "u1").T[:4], "C-contiguous"),
        (np.zeros((8, 6), "u1", order="F"), "C-contiguous"),
        (np.zeros(8, "u1"), "one payload a row"),
        (np.array(5), "one payload a row"),
        (b"bytes", "one payload a row"),
        ((b"" for _ in range(2)), "one payload a row is needed, not something of type generator"),
        (None, "one payload a row is needed, not something of type NoneType"),
    ],
    ids=["strided", "transposed", "fortran", "flat", "scalar", "bytes", "generator", "none"],
)
def test_what_is_no_rows_is_a_clear_error(
    ends: tuple[RingWriter, RingReader], rows: object, error: str
) -> None:
    writer, reader = ends
    with pytest.raises((TypeError, ValueError), match=error):
        writer.send_batch(rows)  # type: ignore[arg-type]
    assert writer.packets == 0
    writer.send(bytes(8))
    with pytest.raises((TypeError, ValueError, BufferError), match=f"{error}|not writable"):
        reader.recv_into(rows)  # type: ignore[arg-type]
    assert reader.recv_into(np.zeros((0, 8), "u1")) == 0
    assert reader.recv() == bytes(8)


def test_a_read_only_array_receives_nothing(ends: tuple[RingWriter, RingReader]) -> None:
    writer, reader = ends
    writer.send(bytes(8))
    rows = np.ones((1, 8), "u1")
    rows.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        reader.recv_into(rows)
    assert rows.all()
    assert reader.recv() == bytes(8)


def test_numbers_that_do_not_fit_the_header_are_refused(ends: tuple[RingWriter, RingReader]) -> None:
    writer, reader = ends
    for number in (1 << 16, -1):
        for call in (
            lambda number=number: writer.send(b"", type=number),
            lambda number=number: writer.send(b"", flags=number),
            lambda number=number: writer.send_batch([b""], type=number),
            lambda number=number: writer.send_batch([b""], flags=number),
            lambda number=number: writer.send_transfer_pages(b"", 1, [(1, 1)], 1, flags=number),
            lambda number=number: writer.send_transfer_pages(b"", number, [(1, 1)], 1),
            lambda number=number: writer.send_gpa_direct(b"", GpaRanges.contiguous(0, 1), 1, flags=number),
            lambda number=number: writer.send_transfer_pages(b"", 1, [(number << 16, 1)], 1),
            lambda number=number: writer.send_transfer_pages(b"", 1, [(1, number << 16)], 1),
        ):
            with pytest.raises(ValueError, match="bits"):
                call()
    assert writer.packets == 0
    writer.send(b"", type=0xFFFF, flags=0xFFFF)  # unknown ones can be sent: somebody has to play the attacker
    writer.send_transfer_pages(b"", 0xFFFF, ((n, 0xFFFF_FFFF) for n in (1, 2)), 1)
    first, second = reader.recv_packets()
    assert (first.type, first.flags) == (0xFFFF, 0xFFFF)
    assert second.transfer_ranges == ((1, 0xFFFF_FFFF), (2, 0xFFFF_FFFF))


def test_a_batch_with_a_bad_item_sends_nothing(ends: tuple[RingWriter, RingReader]) -> None:
    writer, reader = ends
    with pytest.raises(TypeError):
        writer.send_batch([b"good", 5, b"good"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="longer"):
        writer.send_batch([b"good", bytes(1 << 20)])
    assert reader.recv_batch() == []
    assert (writer.packets, writer.publishes) == (0, 0)


def test_iteration_in_place(ends: tuple[RingWriter, RingReader]) -> None:
    writer, reader = ends
    writer.send_batch([bytes([i]) * 16 for i in range(10)])
    assert [view[0] for view in reader.packets(4)] == [0, 1, 2, 3]
    assert writer.free_bytes == writer.capacity - 6 * 40
    for view in reader.packets():
        assert view.readonly
        if view[0] == 6:
            break  # the packets seen are consumed, the rest stay
    del view
    gc.collect()
    assert [bytes(v[:1]) for v in reader.packets()] == [b"\x07", b"\x08", b"\x09"]
    assert list(reader.packets()) == []


def test_objects_keep_their_memory_alive() -> None:
    window = Window.allocate(1)
    writer, reader = RingWriter(window), RingReader(window)
    with pytest.raises(BufferError):
        window.close()
    writer.send(b"abcdefgh")
    view = next(reader.packets())
    del reader, writer
    gc.collect()
    with pytest.raises(BufferError):
        window.close()
    assert bytes(view) == b"abcdefgh"
    view.release()
    del view
    gc.collect()
    window.close()
    with pytest.raises(ValueError, match="open"):
        RingWriter(window)


def test_both_ends_go_on_where_the_ring_is(window: Window) -> None:
    writer, reader = RingWriter(window), RingReader(window)
    for _ in range(100):
        writer.send(bytes(200))
        reader.recv()
    writer.send(b"kept")
    assert RingReader(window).recv() == b"kept\0\0\0\0"
    RingWriter(window).send(b"after")
    assert reader.recv_batch() == [b"kept\0\0\0\0", b"after\0\0\0"]


def test_two_threads_move_everything_in_order() -> None:
    window = Window.allocate(2)
    writer, reader = RingWriter(window), RingReader(window)
    total = 20_000
    rows = np.arange(total, dtype=np.uint64).repeat(4).reshape(total, 4)

    def produce() -> None:
        sent = 0
        while sent < total:
            sent += writer.send_batch(rows[sent : sent + 50])[0]

    thread = threading.Thread(target=produce)
    thread.start()
    got: list[int] = []
    out = np.zeros((64, 4), dtype=np.uint64)
    while len(got) < total:
        got += out[: reader.recv_into(out), 3].tolist()
    thread.join()
    assert got == list(range(total))


@pytest.mark.parametrize(("offset", "value"), [(0, 4), (0, 3 * 4096), (0, 0xFFFFFFF8), (4, 12), (4, 1 << 31)])
def test_wrong_indices_at_the_start(window: Window, offset: int, value: int) -> None:
    struct.pack_into("<I", window.view(), offset, value)
    with pytest.raises(RingCorrupt):
        RingWriter(window)
    with pytest.raises(RingCorrupt):
        RingReader(window)

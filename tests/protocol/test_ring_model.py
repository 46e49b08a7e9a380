"""The compiled ring against the slow reference, byte for byte, over random histories of both ends."""

import struct

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from reference.ring import ReferenceRing

from vmbus.core.memory import GpaRanges, GuestMemory
from vmbus.core.ring import RingReader, RingWriter

PAGES = [11, 4, 30]
PAYLOADS = st.binary(max_size=40) | st.integers(0, 6000).map(bytes)
IDS = st.integers(0, 2**64 - 1)
RANGES = st.lists(
    st.tuples(st.integers(1, 9000), st.integers(0, 4095), st.integers(0, 2**40)), min_size=1, max_size=3
).map(lambda rs: [(n, o, range(p, p + (n + o + 4095) // 4096)) for n, o, p in rs])


class RingModel(RuleBasedStateMachine):
    """Both rings see the same calls; their memories must be the same bytes after each."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = GuestMemory(1 << 18)
        self.window = self.memory.window(PAGES)
        self.writer, self.reader = RingWriter(self.window), RingReader(self.window)
        self.reference = ReferenceRing(bytearray(self.window.view()))

    @rule(payload=PAYLOADS, tid=IDS, kind=st.sampled_from([6, 11]), flags=st.integers(0, 1))
    def send(self, payload: bytes, tid: int, kind: int, flags: int) -> None:
        if self.reference.write(kind, flags, tid, b"", payload):
            assert self.writer.send(payload, tid, kind, flags) == self.reference.publish()
        else:
            assert self.writer.send_batch([payload], tid) == (0, False)

    @rule(payload=PAYLOADS, tid=IDS, ranges=RANGES)
    def send_gpa_direct(self, payload: bytes, tid: int, ranges: list[tuple[int, int, range]]) -> None:
        packed = GpaRanges(ranges)
        header = struct.pack("<II", 0, len(ranges)) + packed.pack()
        if self.reference.write(9, 1, tid, header, payload):
            assert self.writer.send_gpa_direct(payload, packed, tid) == self.reference.publish()

    @rule(
        payload=PAYLOADS,
        tid=IDS,
        ranges=st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))),
    )
    def send_transfer_pages(self, payload: bytes, tid: int, ranges: list[tuple[int, int]]) -> None:
        header = struct.pack("<HBBI", 0xCAFE, 0, 0, len(ranges)) + b"".join(
            struct.pack("<II", *r) for r in ranges
        )
        if self.reference.write(7, 1, tid, header, payload):
            assert self.writer.send_transfer_pages(payload, 0xCAFE, ranges, tid) == self.reference.publish()

    @rule(payloads=st.lists(PAYLOADS, max_size=12), tid=st.integers(0, 2**63))
    def send_batch(self, payloads: list[bytes], tid: int) -> None:
        count = 0
        for i, payload in enumerate(payloads):
            if not self.reference.write(6, 0, tid + i, b"", payload):
                break
            count += 1
        assert self.writer.send_batch(payloads, tid, 1) == (count, self.reference.publish())

    @rule(limit=st.integers(1, 20))
    def receive(self, limit: int) -> None:
        expected = []
        while len(expected) < limit and (packet := self.reference.read()):
            expected.append(packet)
        signal = self.reference.release()
        got = self.reader.recv_packets(limit)
        assert [(p.type, p.flags, p.transaction_id, p.payload) for p in got] == [
            (kind, flags, tid, payload) for kind, flags, tid, _, payload in expected
        ]
        for packet, (kind, _, _, header, _) in zip(got, expected, strict=True):
            if kind == 9:
                assert packet.ranges is not None
                assert packet.ranges.pack() == header[8:]
            if kind == 7:
                assert b"".join(struct.pack("<II", *r) for r in packet.transfer_ranges) == header[8:]
        assert self.reader.take_signal() == signal

    @rule(limit=st.integers(1, 5))
    def receive_in_place(self, limit: int) -> None:
        expected = []
        while len(expected) < limit and (packet := self.reference.read()):
            expected.append(packet[4])
        signal = self.reference.release()
        assert [bytes(v) for v in self.reader.packets(limit)] == expected
        assert self.reader.take_signal() == signal

    @rule(masked=st.booleans())
    def mask(self, masked: bool) -> None:
        if masked:
            self.reader.mask()
        else:
            assert self.reader.unmask() == (self.reference.reader_index != self.reference.word(0))
        self.reference.set_word(8, int(masked))

    @rule(size=st.integers(0, 8000))
    def want_space(self, size: int) -> None:
        total = 24 + (size + 7) // 8 * 8
        room = self.reference.free() >= total
        assert self.writer.want_space(size) == room
        self.reference.set_word(12, 0 if room else total)

    @precondition(lambda self: self.reference.word(12))
    @rule()
    def stop_waiting(self) -> None:
        self.writer.stop_waiting()
        self.reference.set_word(12, 0)

    @rule()
    def reopen(self) -> None:
        """New objects over the same memory go on where the old ones were."""
        self.reader = RingReader(self.window)
        self.writer = RingWriter(self.window)
        self.reference.set_word(12, 0)

    @invariant()
    def same_bytes(self) -> None:
        assert self.window.view() == memoryview(self.reference.memory)
        assert self.writer.free_bytes == self.reference.free()


RingModel.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestRingModel = RingModel.TestCase

"""Payloads of every length at the alignments for which the copy has a way of its own, and at others."""

import random

import numpy as np
import pytest

from vmbus.core.memory import GuestMemory, Window
from vmbus.core.ring import RingReader, RingWriter

LENGTHS = [
    *range(130),
    *range(2046, 2052),
    *(2048 + 64 * n + extra for n in (1, 2, 31) for extra in (-1, 0, 1, 63)),
    65_536,
    100_001,
]


@pytest.mark.parametrize("alignment", [0, 1, 8, 15, 16, 17, 31, 32, 33, 48, 49, 56, 63, 64, 71, 79, 80])
def test_guest_memory_takes_and_gives_exactly_these_bytes(alignment: int) -> None:
    size = 1 << 20
    memory = GuestMemory(size)
    numbers = random.Random(alignment)
    for length in LENGTHS:
        at = 4096 + alignment
        data = numbers.randbytes(length)
        memory.write(0, b"\xaa" * (length + 8192))
        memory.write(at, data)
        assert memory.read(at, length) == data
        around = memory.read(0, length + 8192)
        assert around[:at] == b"\xaa" * at
        assert around[at + length :] == b"\xaa" * (8192 - at)


@pytest.mark.parametrize("length", [length for length in LENGTHS if 8 <= length < 65_000])
def test_packets_of_every_form_carry_exactly_these_bytes(length: int) -> None:
    window = Window.allocate(18)
    writer, reader = RingWriter(window), RingReader(window)
    data = random.Random(length).randbytes(length)
    padded = data + bytes(-length % 8)
    rows = np.frombuffer(data, np.uint8).reshape(1, length)
    for _ in range(3):  # so that the ring's end is crossed, too
        writer.send(data)
        assert reader.recv() == padded
        writer.send_batch([data])
        assert reader.recv_packets()[0].payload == padded
        writer.send_batch(rows)
        into = np.full((1, length), 0xAA, np.uint8)
        assert reader.recv_into(into) == 1
        assert into.tobytes() == data

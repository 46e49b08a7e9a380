"""How binary structures are declared, packed and parsed."""

import struct
from typing import Annotated
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmbus.errors import LocalProtocolError, RemoteProtocolError
from vmbus.wire import I32, I64, U8, U16, U32, U64, Fixed, Guid, Structure, wire

GUID = UUID("00112233-4455-6677-8899-aabbccddeeff")


@wire(size=16, offsets={"transaction_id": 8})
class Descriptor(Structure):
    type: U16
    data_offset8: U16
    length8: U16
    flags: U16
    transaction_id: U64


@wire(size=37)
class Every(Structure):
    a: U8
    b: U16
    c: U32
    d: U64
    e: I32
    f: I64
    g: Annotated[bytes, Fixed(10)]


@wire(size=4)
class Pair(Structure):
    x: U16
    y: U16


@wire(size=21, offsets={"inner": 1, "guid": 5})
class WithGuid(Structure):
    first: U8
    inner: Pair
    guid: Guid


@wire(size=44)
class Deep(Structure):
    left: WithGuid
    right: WithGuid
    last: U16


@wire(size=26, byte_order=">")
class Big(Structure):
    word: U32
    guid: Guid
    half: U16
    raw: Annotated[bytes, Fixed(4)]


@given(st.tuples(*[st.integers(0, (1 << bits) - 1) for bits in (16, 16, 16, 16, 64)]), st.binary(max_size=9))
def test_little_endian_fields_are_what_struct_says(values: tuple[int, ...], prefix: bytes) -> None:
    packed = Descriptor(*values).pack()
    assert packed == struct.pack("<4HQ", *values)
    assert Descriptor.unpack(prefix + packed + b"tail", len(prefix)) == Descriptor(*values)


@given(
    st.builds(
        Every,
        a=st.integers(0, 255),
        b=st.integers(0, 65535),
        c=st.integers(0, (1 << 32) - 1),
        d=st.integers(0, (1 << 64) - 1),
        e=st.integers(-(1 << 31), (1 << 31) - 1),
        f=st.integers(-(1 << 63), (1 << 63) - 1),
        g=st.binary(max_size=10),
    )
)
def test_every_width_survives_a_round_trip(every: Every) -> None:
    packed = every.pack()
    back = Every.unpack(packed)
    assert packed == struct.pack("<BHIQiq10s", every.a, every.b, every.c, every.d, every.e, every.f, every.g)
    assert (back.a, back.b, back.c, back.d, back.e, back.f) == (
        every.a,
        every.b,
        every.c,
        every.d,
        every.e,
        every.f,
    )
    assert back.g == every.g.ljust(10, b"\0")  # raw fields are padded with zeros


def test_sizes_and_offsets_are_public() -> None:
    assert Descriptor.SIZE == 16
    assert dict(Descriptor.OFFSETS) == {
        "type": 0,
        "data_offset8": 2,
        "length8": 4,
        "flags": 6,
        "transaction_id": 8,
    }
    with pytest.raises(TypeError):
        Descriptor.OFFSETS["type"] = 4  # type: ignore[index]


def test_guids_are_in_mixed_endian_order() -> None:
    packed = WithGuid(1, Pair(2, 3), GUID).pack()
    assert packed == b"\x01" + b"\x02\0\x03\0" + bytes.fromhex("33221100554477668899aabbccddeeff")
    assert WithGuid.unpack(packed).guid == GUID


def test_big_endian_structures() -> None:
    packed = Big(0x01020304, GUID, 0x0506, b"ab").pack()
    assert packed == bytes.fromhex("01020304 00112233445566778899aabbccddeeff 0506 6162 0000")
    assert Big.unpack(packed) == Big(0x01020304, GUID, 0x0506, b"ab\0\0")


def test_nested_structures_parse_to_any_depth() -> None:
    whole = Deep(WithGuid(1, Pair(2, 3), GUID), WithGuid(4, Pair(5, 6), UUID(int=7)), 8)
    again = Deep.unpack(whole.pack())
    assert again == whole
    assert isinstance(again.right.inner, Pair)
    assert Deep.OFFSETS["right"] == WithGuid.SIZE


@pytest.mark.parametrize("length", range(16))
def test_a_short_buffer_is_the_peers_fault(length: int) -> None:
    with pytest.raises(RemoteProtocolError, match=f"truncated Descriptor: {length} of 16"):
        Descriptor.unpack(bytes(length))


def test_offsets_beyond_or_before_the_buffer_are_refused() -> None:
    buffer = bytes(64)
    with pytest.raises(RemoteProtocolError, match="0 of 16"):
        Descriptor.unpack(buffer, 65)
    with pytest.raises(RemoteProtocolError, match="15 of 16"):
        Descriptor.unpack(buffer, 49)
    with pytest.raises(RemoteProtocolError, match="negative"):
        Descriptor.unpack(buffer, -16)


@pytest.mark.parametrize("buffer", [bytearray(16), memoryview(bytes(16))], ids=["bytearray", "memoryview"])
def test_other_buffers_parse_too(buffer: bytearray | memoryview) -> None:
    assert Descriptor.unpack(buffer) == Descriptor(0, 0, 0, 0, 0)


@pytest.mark.parametrize("value", [-1, 1 << 16])
def test_values_that_do_not_fit_are_our_own_fault(value: int) -> None:
    with pytest.raises(LocalProtocolError):
        Pair(value, 0).pack()


def test_raw_bytes_that_do_not_fit_are_refused_and_not_cut() -> None:
    with pytest.raises(LocalProtocolError, match=r"Every\.g is longer than its 10 bytes"):
        Every(0, 0, 0, 0, 0, 0, bytes(11)).pack()


def test_structures_are_slotted() -> None:
    with pytest.raises(AttributeError):
        Pair(1, 2).z = 3  # type: ignore[attr-defined]


def test_a_wrong_declaration_fails_at_import() -> None:
    with pytest.raises(TypeError, match="size 4, declared 5"):

        @wire(size=5)
        class WrongSize(Structure):
            x: U32

    with pytest.raises(TypeError, match=r"'y': \(2, 4\)"):

        @wire(size=4, offsets={"y": 4})
        class WrongOffset(Structure):
            x: U16
            y: U16

    with pytest.raises(TypeError, match=r"WithoutWidth\.x: .* has no width"):

        @wire(size=4)
        class WithoutWidth(Structure):
            x: int

    with pytest.raises(TypeError, match="other byte order"):

        @wire(size=4, byte_order=">")
        class Mixed(Structure):
            pair: Pair

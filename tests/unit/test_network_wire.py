"""NVSP and RNDIS structures and parsers, and the damage that parsers must survive."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmbus.errors import RemoteProtocolError
from vmbus.network import oid, rndis, wire
from vmbus.network.wire import MessageType, Sender, Version

U32 = st.integers(0, 0xFFFFFFFF)
FRAMES = st.builds(
    rndis.Frame,
    st.binary(min_size=1, max_size=100),
    st.none() | U32,
    st.none() | U32,
    st.none() | U32,
    st.none() | U32,
    st.none() | U32,
)


def test_sizes_of_messages() -> None:
    assert [wire.packet_size(version) for version in Version] == [28, 28, 28, 28, 28, 40]
    init = wire.pack_message(MessageType.INIT, wire.Init(2, 2))
    assert init == struct.pack("<III", 1, 2, 2).ljust(28, b"\0")
    assert max(info.structure.SIZE for info in wire.MESSAGES.values()) + 4 <= 28
    assert wire.receive_section_size(1514) == 1808
    assert oid.NdisOffload.OFFSETS["ipsec_v2"] == 112


def test_message_table_knows_versions_and_directions() -> None:
    config = wire.pack_message(MessageType.SEND_NDIS_CONFIG, wire.SendNdisConfig(1514, 0, 8))
    assert wire.unpack_message(config, Version.V2, Sender.GUEST)[1] == wire.SendNdisConfig(1514, 0, 8)
    with pytest.raises(RemoteProtocolError, match="needs version"):
        wire.unpack_message(config, Version.V1, Sender.GUEST)
    with pytest.raises(RemoteProtocolError, match="wrong end"):
        wire.unpack_message(config, Version.V2, Sender.HOST)
    with pytest.raises(RemoteProtocolError, match="unknown NVSP"):
        wire.unpack_message(b"\x6d\0\0\0" + bytes(24), Version.V6_1, Sender.GUEST)
    with pytest.raises(RemoteProtocolError, match="truncated"):
        wire.unpack_message(b"\1\0\0", 0, Sender.GUEST)
    with pytest.raises(RemoteProtocolError, match="truncated"):
        wire.unpack_message(config[:19], Version.V2, Sender.GUEST)
    answer = wire.pack_message(MessageType.SUB_CHANNEL, wire.SubchannelComplete(1, 3))
    assert wire.unpack_message(answer, Version.V5, Sender.HOST)[1] == wire.SubchannelComplete(1, 3)


@pytest.mark.parametrize("version", list(Version))
@pytest.mark.parametrize("sender", [Sender.GUEST, Sender.HOST])
@given(payload=st.binary(max_size=48), kind=st.integers(0, 140))
def test_any_bytes_parse_or_are_refused(version: Version, sender: Sender, payload: bytes, kind: int) -> None:
    try:
        message_type, body = wire.unpack_message(struct.pack("<I", kind) + payload, version, sender)
    except RemoteProtocolError:
        return
    assert message_type == kind
    assert body.pack() == payload[: body.SIZE]


@given(st.lists(FRAMES, min_size=1, max_size=8), st.sampled_from([1, 4, 8]), st.sampled_from([0, 256]))
def test_packets_survive_the_wire(frames: list[rndis.Frame], alignment: int, data_at: int) -> None:
    buffer = b"".join(rndis.pack_packet(frame, data_at, alignment) for frame in frames)
    assert rndis.unpack_packets(buffer, 8) == frames
    assert rndis.unpack_packets(memoryview(buffer), 8) == frames
    if len(frames) > 1:
        with pytest.raises(RemoteProtocolError, match="more than"):
            rndis.unpack_packets(buffer, len(frames) - 1)


@given(FRAMES, st.integers(0, 30), U32, st.integers(0, 200))
def test_damaged_packets_parse_or_are_refused(frame: rndis.Frame, word: int, value: int, cut: int) -> None:
    buffer = bytearray(rndis.pack_packet(frame))
    if word * 4 + 4 <= len(buffer):
        struct.pack_into("<I", buffer, word * 4, value)
    for damaged in (bytes(buffer), bytes(buffer[:cut])):
        try:
            frames = rndis.unpack_packets(damaged, 4)
        except RemoteProtocolError:
            continue
        assert sum(len(f.data) for f in frames) <= len(damaged)


def damage(field: int, value: int) -> bytes:
    buffer = bytearray(rndis.pack_packet(rndis.Frame(b"d" * 60, vlan=7)))
    struct.pack_into("<I", buffer, field, value)
    return bytes(buffer)


@pytest.mark.parametrize(
    ("buffer", "message"),
    [
        (b"", "empty"),
        (b"\1\0\0\0", "truncated"),
        (damage(0, 2), "type 0x2"),
        (damage(4, 43), "length 43"),
        (damage(4, 0xFFFFFFFF), "length"),
        (damage(8, 35), "16 bytes at 36"),
        (damage(8, 0xFFFFFFFF), "at 4294967295"),
        (damage(12, 61), "61 bytes"),
        (damage(12, 0xFFFFFFFF), "4294967295 bytes"),
        (damage(12, 0), "without data"),
        (damage(16, 4), "out-of-band"),
        (damage(28, 35), "at 35"),
        (damage(28, 0xFFFFFFF0), "at 4294967280"),
        (damage(28, 44), "16 bytes at 44"),
        (damage(32, 0xFFFFFFFF), "4294967295 bytes"),
        (damage(32, 13), "16 bytes where 13"),
        (damage(32, 11), "11 bytes behind"),
        (damage(36, 1), "virtual circuit"),
        (damage(44, 0), "of 0 bytes"),
        (damage(44, 17), "of 17 bytes"),
        (damage(52, 13), "at 13 of 16"),
        (damage(52, 8), "at 8 of 16"),
        (damage(52, 0xFFFFFFFF), "at 4294967295 of 16"),
    ],
)
def test_each_wrong_packet_field_is_named(buffer: bytes, message: str) -> None:
    with pytest.raises(RemoteProtocolError, match=message):
        rndis.unpack_packets(buffer, 8)


def test_control_messages() -> None:
    query = rndis.pack_control(rndis.RndisType.QUERY, rndis.QueryRequest(9, 0x10106, 0, 0, 0), b"abcd")
    assert rndis.unpack_control(query + b"junk") == (4, rndis.QueryRequest(9, 0x10106, 4, 20, 0), b"abcd")
    done = rndis.pack_control(rndis.RndisType.QUERY_COMPLETE, rndis.QueryComplete(9, 0, 0, 0))
    assert rndis.unpack_control(done) == (0x80000004, rndis.QueryComplete(9, 0, 0, 16), b"")
    for message_type, structure in rndis.CONTROL_MESSAGES.items():
        body = structure.unpack(bytes(structure.SIZE))
        message = rndis.pack_control(message_type, body)
        assert rndis.unpack_control(message)[:2] == (message_type, body)
        with pytest.raises(RemoteProtocolError):
            rndis.unpack_control(message[:-1])


@pytest.mark.parametrize(
    ("offset", "value"), [(16, 5), (16, 0xFFFFFFFF), (20, 19), (20, 25), (20, 0xFFFFFFF0)]
)
def test_control_buffer_must_lie_inside(offset: int, value: int) -> None:
    query = bytearray(rndis.pack_control(rndis.RndisType.QUERY, rndis.QueryRequest(9, 1, 0, 0, 0), b"abcd"))
    struct.pack_into("<I", query, offset, value)
    with pytest.raises(RemoteProtocolError, match="RNDIS buffer"):
        rndis.unpack_control(query)


@pytest.mark.parametrize(
    "message", [b"", b"\4\0\0\0\7\0\0\0", b"\1\0\0\0\x08\0\0\0", struct.pack("<II", 4, 1 << 20)]
)
def test_control_header_is_checked(message: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        rndis.unpack_control(message + bytes(8))


@given(st.integers(0, 0xFFFF))
def test_vlan_information(tci: int) -> None:
    assert rndis.unpack_vlan(rndis.pack_vlan(tci)) == tci


def test_bit_layouts_of_the_ndis_headers() -> None:
    assert rndis.pack_vlan(0xB123) == 5 | 1 << 3 | 0x123 << 4
    assert rndis.TransmitChecksum(ipv4=True, tcp=True, transport_offset=34).pack() == 0x00220005
    assert rndis.LargeSend(1460, 34).pack() == 1460 | 34 << 20 | 1 << 30
    assert rndis.LargeSend(1440, 54, ipv6=True).pack() == 1440 | 54 << 20 | 3 << 30
    assert rndis.LargeSend.unpack(1440 | 54 << 20 | 3 << 30) == rndis.LargeSend(1440, 54, True)
    assert rndis.TransmitChecksum.unpack(0x0022001F) == rndis.TransmitChecksum(
        True, True, True, True, True, 34
    )


@pytest.mark.parametrize("revision", [1, 2, 3])
def test_offloads_of_each_revision(revision: int) -> None:
    every = oid.Offloads.everything()
    packed = every.pack(revision)
    assert len(packed) == oid.OFFLOAD_SIZES[revision]
    assert packed[:4] == bytes([0xA7, revision]) + len(packed).to_bytes(2, "little")
    again = oid.Offloads.unpack(packed)
    assert again.transmit == every.transmit
    assert again.rsc4 == (revision == 3)
    assert oid.Offloads.unpack(oid.Offloads.nothing().pack(3)) == oid.Offloads.nothing()
    with pytest.raises(RemoteProtocolError):
        oid.Offloads.unpack(packed[:111])
    # What Linux looks for before it turns TSO on: TCP checksums with options, and extension headers.
    flags = oid.NdisOffload.unpack(every.pack(3))
    assert flags.ipv4_transmit & 0x14 == 0x14
    assert flags.ipv6_transmit & 0x15 == 0x15
    assert flags.lso_v2_ipv6_flags & 5 == 5

"""Checksums, LSOv2, RSC and Toeplitz against the slow oracles and Microsoft's test vectors."""

from ipaddress import ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import packets

from vmbus.errors import RemoteProtocolError
from vmbus.network import offload, rss
from vmbus.network.oid import HashTypes
from vmbus.network.rndis import LargeSend, ReceiveChecksum, TransmitChecksum

V4 = ("10.0.0.1", "10.0.0.2")
V6 = ("fe80::1", "fe80::2")
PAIRS = pytest.mark.parametrize("pair", [V4, V6], ids=["ipv4", "ipv6"])


@given(st.binary(max_size=300), st.integers(0, 0xFFFF))
def test_checksum_is_rfc_1071(data: bytes, initial: int) -> None:
    assert offload.checksum(data) == packets.slow_checksum(data)
    even = data + b"\0" * (len(data) % 2)
    assert offload.checksum(data, initial) == packets.slow_checksum(even + initial.to_bytes(2, "big"))


@pytest.mark.parametrize("data", [b"", b"\0", b"\0\0", b"\xff\xff", b"\xff\xff\xff\xff", b"\xff\xfe\0\x01"])
def test_checksum_of_both_zeros(data: bytes) -> None:
    assert offload.checksum(data) == packets.slow_checksum(data)


@PAIRS
@settings(max_examples=40)
@given(payload=st.binary(max_size=90))
def test_complete_fills_in_tcp_and_udp(pair: tuple[str, str], payload: bytes) -> None:
    v4 = pair == V4
    wanted = packets.tcp_frame(*pair, payload)
    given_ = packets.tcp_frame(*pair, payload, checksum=0x1234)
    ask = TransmitChecksum(ipv4=v4, ipv6=not v4, tcp=True, transport_offset=34 if v4 else 54)
    assert offload.complete(given_, ask) == wanted
    wanted = packets.udp_frame(*pair, payload)
    given_ = packets.udp_frame(*pair, payload, checksum=0xABCD)
    assert offload.complete(given_, TransmitChecksum(ipv4=v4, ipv6=not v4, udp=True)) == wanted


def test_udp_checksum_is_never_sent_as_zero() -> None:
    for value in range(0x10000):  # found within a few hundred tries
        payload = value.to_bytes(2, "big")
        datagram = packets.udp_datagram(*V4, payload, checksum=0)
        if packets.slow_checksum(packets.pseudo_header(*V4, 17, len(datagram)) + datagram) == 0:
            break
    else:
        pytest.fail("no such datagram")
    done = offload.complete(
        packets.udp_frame(*V4, payload, checksum=0), TransmitChecksum(ipv4=True, udp=True)
    )
    assert done[40:42] == b"\xff\xff"


def test_complete_fills_in_the_ip_header_only_when_asked() -> None:
    frame = bytearray(packets.udp_frame(*V4, b"abc"))
    right = bytes(frame)
    frame[24:26] = b"\x99\x99"
    assert offload.complete(bytes(frame), TransmitChecksum(ipv4=True, ip_header=True)) == right
    assert offload.complete(bytes(frame), TransmitChecksum(ipv4=True, udp=True))[24:26] == b"\x99\x99"


@pytest.mark.parametrize(
    ("frame", "ask"),
    [
        (b"\0" * 60, TransmitChecksum(ipv4=True, tcp=True)),
        (packets.udp_frame(*V4, b"x", checksum=1), TransmitChecksum(ipv4=True, tcp=True)),
        (packets.tcp_frame(*V4, b"x", checksum=1), TransmitChecksum(ipv4=True, udp=True)),
        (packets.tcp_frame(*V4, b"x", checksum=1)[:40], TransmitChecksum(ipv4=True, tcp=True)),
        (
            packets.ethernet(packets.ip_packet(*V4, 6, b"\0" * 19), 0x0800),
            TransmitChecksum(ipv4=True, tcp=True),
        ),
        (
            packets.ethernet(packets.ip_packet(*V4, 6, b"\0" * 40, fragment=0x2000), 0x0800),
            TransmitChecksum(ipv4=True, tcp=True),
        ),
    ],
)
def test_complete_leaves_out_what_the_frame_has_no_place_for(frame: bytes, ask: TransmitChecksum) -> None:
    assert offload.complete(frame, ask) == frame


@PAIRS
def test_complete_goes_by_the_frame(pair: tuple[str, str]) -> None:
    """OpenBSD says IPv4 of everything; and where TCP begins is what the headers say."""
    frame = packets.tcp_frame(*pair, b"abc", checksum=0x1234)
    for ask in (
        TransmitChecksum(ipv4=True, tcp=True),
        TransmitChecksum(ipv6=True, tcp=True),
        TransmitChecksum(tcp=True),
        TransmitChecksum(ipv4=True, ip_header=True, tcp=True, transport_offset=35),
    ):
        assert packets.is_valid(offload.complete(frame, ask))


@pytest.mark.parametrize(
    ("ask", "length"),
    [
        (TransmitChecksum(ipv4=True, tcp=True, transport_offset=1023), 55),
        (TransmitChecksum(ipv4=True, tcp=True, transport_offset=55), 55),
        (TransmitChecksum(ipv4=True, udp=True, transport_offset=33), 55),
        (TransmitChecksum(ipv6=True, tcp=True, transport_offset=53), 75),
    ],
)
def test_complete_refuses_a_header_that_cannot_be(ask: TransmitChecksum, length: int) -> None:
    frame = packets.tcp_frame(*(V6 if ask.ipv6 else V4), b"x")
    assert len(frame) == length
    with pytest.raises(RemoteProtocolError):
        offload.complete(frame, ask)


@PAIRS
@settings(max_examples=40)
@given(payload=st.binary(min_size=1, max_size=4000), mss=st.integers(20, 1500), flags=st.integers(0, 255))
def test_segments_join_to_what_was_sent(pair: tuple[str, str], payload: bytes, mss: int, flags: int) -> None:
    v6 = pair == V6
    options = bytes.fromhex("0101080a00000001 00000002")
    large = packets.tcp_frame(
        *pair, payload, sequence=0xFFFFFF00, flags=flags, options=options, checksum=0, identification=0xFFFE
    )
    if not v6:  # as Linux sends it
        large = large[:16] + b"\0\0" + large[18:24] + b"\0\0" + large[26:]
    frames = offload.segment(large, LargeSend(mss, 54 if v6 else 34, v6))
    transport = 54 if v6 else 34
    assert b"".join(frame[transport + 32 :] for frame in frames) == payload
    assert all(packets.is_valid(frame) for frame in frames)
    assert all(len(frame) == transport + 32 + mss for frame in frames[:-1])
    sequence = 0xFFFFFF00
    for index, frame in enumerate(frames):
        assert int.from_bytes(frame[transport + 4 : transport + 8], "big") == sequence & 0xFFFFFFFF
        sequence += len(frame) - transport - 32
        expected = flags
        if index:
            expected &= ~0x80
        if index < len(frames) - 1:
            expected &= ~0x09
        assert frame[transport + 13] == expected
        if not v6:
            assert int.from_bytes(frame[18:20], "big") == 0xFFFE + index & 0xFFFF


def test_segment_looks_behind_a_vlan_tag() -> None:
    frame = packets.tcp_frame(*V4, b"y" * 3000)
    tagged = frame[:12] + b"\x81\x00\x00\x05" + frame[12:]
    parts = offload.segment(tagged, LargeSend(1000, 38))
    assert [part[12:16] for part in parts] == [b"\x81\x00\x00\x05"] * 3
    assert all(packets.is_valid(part[:12] + part[16:]) for part in parts)


@pytest.mark.parametrize(
    ("frame", "ask"),
    [
        (packets.tcp_frame(*V4, b"x" * 99), LargeSend(0, 34)),
        (packets.tcp_frame(*V4, b"x" * 5000), LargeSend(1, 34)),
        (packets.tcp_frame(*V4, b"x" * 99), LargeSend(10, 33)),
        (packets.tcp_frame(*V4, b"")[:46], LargeSend(10, 34)),
        (b"\0" * 20, LargeSend(10, 34)),
    ],
)
def test_segment_refuses_nonsense(frame: bytes, ask: LargeSend) -> None:
    with pytest.raises(RemoteProtocolError):
        offload.segment(frame, ask)


@pytest.mark.parametrize(
    "frame",
    [
        packets.udp_frame(*V4, b"x" * 99),
        packets.tcp_frame(*V4, b"")[:50],
        packets.tcp_frame(*V4, b"x" * 9, options=b"\0" * 40)[:60],
        b"\0" * 60,
    ],
)
def test_segment_leaves_whole_what_is_no_tcp(frame: bytes) -> None:
    assert offload.segment(frame, LargeSend(10, 34)) == [frame]


@PAIRS
@pytest.mark.parametrize("ipv6", [False, True])
def test_segment_goes_by_the_frame(pair: tuple[str, str], ipv6: bool) -> None:
    frame = packets.tcp_frame(*pair, b"x" * 99, checksum=0)
    parts = offload.segment(frame, LargeSend(50, 40, ipv6))
    assert len(parts) == 2
    assert all(map(packets.is_valid, parts))


@PAIRS
def test_check_says_what_is_wrong(pair: tuple[str, str]) -> None:
    ip = ReceiveChecksum.IP_SUCCEEDED if pair == V4 else ReceiveChecksum(0)
    assert offload.check(packets.tcp_frame(*pair, b"abc")) == ip | ReceiveChecksum.TCP_SUCCEEDED
    assert offload.check(packets.udp_frame(*pair, b"abc")) == ip | ReceiveChecksum.UDP_SUCCEEDED
    assert offload.check(packets.tcp_frame(*pair, b"abc", checksum=1)) == ip | ReceiveChecksum.TCP_FAILED
    assert offload.check(packets.udp_frame(*pair, b"abc", checksum=1)) == ip | ReceiveChecksum.UDP_FAILED
    if pair == V4:
        broken = bytearray(packets.udp_frame(*pair, b"abc"))
        broken[22] ^= 1
        assert offload.check(bytes(broken)) == ReceiveChecksum.IP_FAILED | ReceiveChecksum.UDP_SUCCEEDED
        none = packets.udp_frame(*pair, b"abc", checksum=0)
        assert offload.check(none) & ReceiveChecksum.UDP_SUCCEEDED


def test_check_skips_padding_and_extensions() -> None:
    assert offload.check(packets.udp_frame(*V4, b"a") + b"\xff" * 17) & ReceiveChecksum.UDP_SUCCEEDED
    datagram = packets.udp_datagram(*V6, b"hello")
    hop = bytes([17, 0]) + b"\0" * 6
    packet = packets.ip_packet(*V6, 17, datagram, extensions=hop, next_header=0)
    assert offload.check(packets.ethernet(packet, 0x86DD)) == ReceiveChecksum.UDP_SUCCEEDED
    fragment = bytes([17, 0, 0, 1]) + b"\0" * 4
    packet = packets.ip_packet(*V6, 17, datagram, extensions=fragment, next_header=44)
    assert offload.check(packets.ethernet(packet, 0x86DD)) == 0


@given(st.binary(max_size=200))
def test_nothing_breaks_on_any_bytes(noise: bytes) -> None:
    for kind in (b"\x08\x00", b"\x86\xdd", b"\x81\x00"):
        frame = b"\2" * 12 + kind + noise
        offload.check(frame)
        offload.parse(frame)
        assert b"".join(offload.coalesce([frame])[0]) == frame
        for ask in (TransmitChecksum(ipv4=True, tcp=True), TransmitChecksum(ipv6=True, udp=True)):
            try:
                offload.complete(frame, ask)
            except RemoteProtocolError:
                continue


@PAIRS
@pytest.mark.parametrize("mss", [999, 1000])
def test_coalesce_undoes_segment(pair: tuple[str, str], mss: int) -> None:
    payload = bytes(range(256)) * 40
    large = packets.tcp_frame(*pair, payload, flags=0x18)
    frames = offload.segment(large, LargeSend(mss, 54 if pair == V6 else 34, pair == V6))
    groups = offload.coalesce(frames)
    assert len(groups) == 1
    assert len(groups[0]) == len(frames)
    whole = b"".join(groups[0])
    transport = 54 if pair == V6 else 34
    assert whole[transport + 20 :] == payload
    assert whole[transport + 13] == 0x18
    assert whole == large, "checksums and all"


def test_coalesce_keeps_apart_what_does_not_belong_together() -> None:
    def seg(sequence: int, **more: object) -> bytes:
        return packets.tcp_frame(*V4, b"p" * 100, sequence=sequence, **more)  # type: ignore[arg-type]

    other = packets.tcp_frame("10.0.0.9", "10.0.0.2", b"p" * 100, sequence=101)
    assert [len(g) for g in offload.coalesce([seg(1), seg(101), seg(201)])] == [3]
    assert [len(g) for g in offload.coalesce([seg(1), seg(102)])] == [1, 1]
    assert [len(g) for g in offload.coalesce([seg(1), seg(101, sport=9)])] == [1, 1]
    assert [len(g) for g in offload.coalesce([seg(1), seg(101, flags=0x11)])] == [1, 1]
    assert [len(g) for g in offload.coalesce([seg(1), seg(101, flags=0x18), seg(201)])] == [2, 1]
    assert [len(g) for g in offload.coalesce([seg(1), seg(101, checksum=5)])] == [1, 1]
    assert [len(g) for g in offload.coalesce([seg(1), seg(101, acknowledge=8)])] == [1, 1]
    assert [len(g) for g in offload.coalesce([seg(1), other])] == [1, 1]
    assert [len(g) for g in offload.coalesce([seg(1), seg(101)], ipv4=False)] == [1, 1]
    assert [len(g) for g in offload.coalesce([])] == []
    many = [packets.tcp_frame(*V4, b"q" * 1400, sequence=1 + 1400 * i) for i in range(60)]
    assert [len(g) for g in offload.coalesce(many)] == [46, 14]


VECTORS = [  # destination, port, source, port, hash of addresses, hash with ports
    ("161.142.100.80", 1766, "66.9.149.187", 2794, 0x323E8FC2, 0x51CCC178),
    ("65.69.140.83", 4739, "199.92.111.2", 14230, 0xD718262A, 0xC626B0EA),
    ("12.22.207.184", 38024, "24.19.198.95", 12898, 0xD2D0A5DE, 0x5C2B394A),
    ("209.142.163.6", 2217, "38.27.205.30", 48228, 0x82989176, 0xAFC7327F),
    ("202.188.127.2", 1303, "153.39.163.191", 44251, 0x5D1809C5, 0x10E828A2),
    ("3ffe:2501:200:3::1", 1766, "3ffe:2501:200:1fff::7", 2794, 0x2CC18CD5, 0x40207D3D),
    ("ff02::1", 4739, "3ffe:501:8::260:97ff:fe40:efab", 14230, 0x0F0C461C, 0xDDE51BBF),
    ("fe80::200:f8ff:fe21:67cf", 38024, "3ffe:1900:4545:3:200:f8ff:fe21:67cf", 44251, 0x4B61E985, 0x02D1FEEF),
]


@pytest.mark.parametrize("vector", VECTORS, ids=[v[0] for v in VECTORS])
def test_microsofts_rss_vectors(vector: tuple[str, int, str, int, int, int]) -> None:
    destination, dport, source, sport, alone, with_ports = vector
    toeplitz = rss.Toeplitz(rss.DEFAULT_KEY)
    addresses = ip_address(source).packed + ip_address(destination).packed
    ports = sport.to_bytes(2, "big") + dport.to_bytes(2, "big")
    assert toeplitz(addresses) == alone
    assert toeplitz(addresses + ports) == with_ports
    frame = packets.tcp_frame(source, destination, b"data", sport=sport, dport=dport)
    every = HashTypes.IPV4 | HashTypes.TCP_IPV4 | HashTypes.IPV6 | HashTypes.TCP_IPV6
    assert rss.RssState(every, [0], toeplitz).hash(frame) == with_ports
    assert rss.RssState(HashTypes.IPV4 | HashTypes.IPV6, [0], toeplitz).hash(frame) == alone
    udp = packets.udp_frame(source, destination, b"data", sport=sport, dport=dport)
    assert rss.RssState(every, [0], toeplitz).hash(udp) == alone
    both = HashTypes.UDP_IPV4 | HashTypes.UDP_IPV6
    assert rss.RssState(both, [0], toeplitz).hash(udp) == with_ports
    assert rss.RssState(both, [0], toeplitz).hash(frame) is None


@given(st.binary(min_size=40, max_size=40), st.binary(max_size=36))
@settings(max_examples=15, deadline=None)
def test_toeplitz_is_its_definition(key: bytes, data: bytes) -> None:
    assert rss.Toeplitz(key)(data) == packets.slow_toeplitz(key, data)


def test_rss_queue_and_bad_keys() -> None:
    state = rss.RssState(HashTypes.IPV4, [0, 1, 2, 3], rss.Toeplitz(rss.DEFAULT_KEY))
    assert [state.queue(n) for n in (None, 0, 5, 7)] == [0, 0, 1, 3]
    assert state.hash(b"\0" * 60) is None
    with pytest.raises(ValueError, match="39 bytes"):
        rss.Toeplitz(bytes(39))

"""What a network adapter does for its guest: checksums, cutting large sends (LSOv2) and coalescing (RSC).

Everything here is done for real: a frame that comes out is valid on any wire. Functions take and return whole
Ethernet frames, with or without an 802.1Q tag. The checksum is RFC 1071's; sums are taken modulo 65535 of one
big integer, which is what ones' complement addition of 16-bit words amounts to.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Final

from vmbus.errors import RemoteProtocolError
from vmbus.network.rndis import LargeSend, ReceiveChecksum, TransmitChecksum

__all__ = ["EtherType", "Layers", "Protocol", "check", "checksum", "coalesce", "complete", "parse", "segment"]

ETHERNET_HEADER: Final = 14
MIN_IPV4: Final = 20
MIN_IPV6: Final = 40
MIN_TCP: Final = 20
MIN_UDP: Final = 8
MAX_IP: Final = 0xFFFF
MAX_SEGMENTS: Final = 1024
"""Most frames that one large send is cut into; more means an MSS that only an attacker asks for."""

TCP_FIN, TCP_SYN, TCP_RST, TCP_PSH, TCP_ACK, TCP_URG, TCP_ECE, TCP_CWR = (1 << n for n in range(8))


class EtherType(IntEnum):
    """The EtherTypes this module looks behind."""

    IPV4 = 0x0800
    VLAN = 0x8100
    SERVICE_VLAN = 0x88A8
    IPV6 = 0x86DD


class Protocol(IntEnum):
    """IP protocol numbers."""

    HOP_BY_HOP = 0
    TCP = 6
    UDP = 17
    ROUTING = 43
    FRAGMENT = 44
    DESTINATION_OPTIONS = 60


_EXTENSIONS: Final = (Protocol.HOP_BY_HOP, Protocol.ROUTING, Protocol.DESTINATION_OPTIONS)

# Plain numbers: operations on members of enumerations cost more than the checks themselves, and these are per frame.
_TCP: Final = int(Protocol.TCP)
_UDP: Final = int(Protocol.UDP)
_IP_FAILED: Final = int(ReceiveChecksum.IP_FAILED)
_IP_SUCCEEDED: Final = int(ReceiveChecksum.IP_SUCCEEDED)
_TCP_FAILED: Final = int(ReceiveChecksum.TCP_FAILED)
_TCP_SUCCEEDED: Final = int(ReceiveChecksum.TCP_SUCCEEDED)
_UDP_FAILED: Final = int(ReceiveChecksum.UDP_FAILED)
_UDP_SUCCEEDED: Final = int(ReceiveChecksum.UDP_SUCCEEDED)


@dataclass(slots=True)
class Layers:
    """Where the headers of a frame are; all places are bytes from the start of the frame.

    Attributes:
        ip: the IP header.
        version: 4 or 6.
        protocol: `Protocol` behind the IP header and its extensions.
        transport: the TCP or UDP header; equal to `end` for a fragment that is not the first.
        end: end of the IP packet; the rest is padding of the Ethernet frame.
        fragment: the packet is a fragment, so its transport checksum covers more than this frame.
    """

    ip: int
    version: int
    protocol: int
    transport: int
    end: int
    fragment: bool


def checksum(data: bytes | bytearray | memoryview, initial: int = 0) -> int:
    """The Internet checksum (RFC 1071) of `data` and of the numbers already added up in `initial`."""
    length = len(data)
    total = int.from_bytes(data, "big") << 8 * (length & 1)
    total += initial
    if total == 0:
        return 0xFFFF
    return 0xFFFF - (total % 0xFFFF or 0xFFFF)


def parse(frame: bytes | bytearray) -> Layers | None:
    """Find the headers of an IP packet; None for anything else, broken IP included."""
    size = len(frame)
    if size < ETHERNET_HEADER + MIN_IPV4:
        return None
    at = 12
    kind = frame[at] << 8 | frame[at + 1]
    while kind in (EtherType.VLAN, EtherType.SERVICE_VLAN):
        at += 4
        if at + 2 > size:
            return None
        kind = frame[at] << 8 | frame[at + 1]
    ip = at + 2
    if kind == EtherType.IPV4:
        if size < ip + MIN_IPV4 or frame[ip] >> 4 != 4:
            return None
        transport = ip + (frame[ip] & 15) * 4
        end = ip + (frame[ip + 2] << 8 | frame[ip + 3])
        if transport < ip + MIN_IPV4 or transport > end or end > size:
            return None
        fragment = (frame[ip + 6] << 8 | frame[ip + 7]) & 0x3FFF
        first = fragment & 0x1FFF == 0
        return Layers(ip, 4, frame[ip + 9], transport if first else end, end, bool(fragment))
    if kind == EtherType.IPV6:
        if size < ip + MIN_IPV6 or frame[ip] >> 4 != 6:
            return None
        end = ip + MIN_IPV6 + (frame[ip + 4] << 8 | frame[ip + 5])
        return _skip_extensions(frame, ip, end) if end <= size else None
    return None


def _skip_extensions(frame: bytes | bytearray, ip: int, end: int) -> Layers | None:
    protocol, at, fragment = frame[ip + 6], ip + MIN_IPV6, False
    while protocol in _EXTENSIONS or protocol == Protocol.FRAGMENT:
        if at + 8 > end:
            return None
        if protocol == Protocol.FRAGMENT:
            place = frame[at + 2] << 8 | frame[at + 3]
            fragment = fragment or bool(place & 0xFFF9)
            if place & 0xFFF8:
                return Layers(ip, 6, frame[at], end, end, True)
            length = 8
        else:
            length = (frame[at + 1] + 1) * 8
        protocol = frame[at]
        at += length
        if at > end:
            return None
    return Layers(ip, 6, protocol, at, end, fragment)


def _pseudo_header(frame: bytes | bytearray, layers: Layers, protocol: int, length: int) -> int:
    if layers.version == 4:
        addresses = frame[layers.ip + 12 : layers.ip + 20]
    else:
        addresses = frame[layers.ip + 8 : layers.ip + 40]
    return int.from_bytes(addresses, "big") + protocol + length


def _transport_checksum(frame: bytes | bytearray, layers: Layers) -> int:
    """The checksum over the transport segment as it stands: 0 when the one in it is right."""
    length = layers.end - layers.transport
    return checksum(
        frame[layers.transport : layers.end], _pseudo_header(frame, layers, layers.protocol, length)
    )


def _fill_ip(frame: bytearray, layers: Layers) -> None:
    header = (frame[layers.ip] & 15) * 4
    frame[layers.ip + 10 : layers.ip + 12] = b"\0\0"
    value = checksum(frame[layers.ip : layers.ip + header])
    frame[layers.ip + 10 : layers.ip + 12] = value.to_bytes(2, "big")


def _fill_transport(frame: bytearray, layers: Layers) -> None:
    at = layers.transport + (16 if layers.protocol == _TCP else 6)
    frame[at : at + 2] = b"\0\0"
    value = _transport_checksum(frame, layers)
    if value == 0 and layers.protocol == _UDP:
        value = 0xFFFF  # RFC 768: 0 would mean that there is no checksum
    frame[at : at + 2] = value.to_bytes(2, "big")


def complete(frame: bytes, wanted: TransmitChecksum) -> bytes:
    """`frame` with the checksums that the guest left to the host.

    What the headers say counts, not what the guest says of them: OpenBSD asks for the checksums of TCP over IPv6
    with the flag of IPv4. A checksum that the frame has no place for is left out, as adapters do.

    Raises:
        RemoteProtocolError: the transport header is said to lie where none can be (refused by OpenVMM, too).
    """
    least = ETHERNET_HEADER + (MIN_IPV6 if wanted.ipv6 and not wanted.ipv4 else MIN_IPV4)
    if (wanted.tcp or wanted.udp) and wanted.transport_offset:
        _check_transport_offset(frame, wanted.transport_offset, least, 1)
    layers = parse(frame)
    if layers is None:
        return frame
    result = bytearray(frame)
    if layers.version == 4 and wanted.ip_header:
        _fill_ip(result, layers)
    length = layers.end - layers.transport
    if not layers.fragment and (
        (wanted.tcp and layers.protocol == _TCP and length >= MIN_TCP)
        or (wanted.udp and layers.protocol == _UDP and length >= MIN_UDP)
    ):
        _fill_transport(result, layers)
    return bytes(result)


def _check_transport_offset(frame: bytes, offset: int, least: int, needed: int) -> None:
    if offset < least or offset + needed > len(frame):
        raise RemoteProtocolError(f"transport header said to be at {offset} of {len(frame)} bytes")


def segment(frame: bytes, wanted: LargeSend) -> list[bytes]:
    """Cut a large TCP segment into frames of at most `wanted.mss` bytes of payload, checksums filled in.

    The IP total length of the frame given is not looked at (Linux clears it for LSOv2), and its headers say where
    TCP is, not the guest. IPv4 identifications count up; CWR stays on the first, FIN and PSH on the last frame. A
    frame without a TCP segment cannot be cut and stays whole.

    Raises:
        RemoteProtocolError: an MSS that makes no sense, or a TCP header outside of the frame.
    """
    if wanted.mss == 0:
        raise RemoteProtocolError("LSO into segments of 0 bytes")
    if wanted.transport_offset:
        _check_transport_offset(frame, wanted.transport_offset, ETHERNET_HEADER + MIN_IPV4, 13)
    found = _large_send_headers(frame)
    if found is None:
        return [frame]
    ip, transport, ipv6 = found
    header = transport + (frame[transport + 12] >> 4) * 4
    payload = len(frame) - header
    if header > len(frame) or header < transport + MIN_TCP:
        return [frame]
    if -(-payload // wanted.mss) > MAX_SEGMENTS:
        raise RemoteProtocolError(f"LSO of {payload} bytes into segments of {wanted.mss}")
    ip_header = MIN_IPV6 if ipv6 else 0
    if header + min(payload, wanted.mss) - ip - ip_header > MAX_IP:
        raise RemoteProtocolError("LSO segment longer than an IP packet can be")
    flags = frame[transport + 13]
    sequence = int.from_bytes(frame[transport + 4 : transport + 8], "big")
    identification = int.from_bytes(frame[ip + 4 : ip + 6], "big")
    result: list[bytes] = []
    for at in range(header, max(len(frame), header + 1), wanted.mss):
        part = bytearray(frame[:header]) + frame[at : at + wanted.mss]
        size = len(part) - ip
        if ipv6:
            part[ip + 4 : ip + 6] = (size - MIN_IPV6).to_bytes(2, "big")
        else:
            part[ip + 2 : ip + 4] = size.to_bytes(2, "big")
            part[ip + 4 : ip + 6] = (identification + len(result) & 0xFFFF).to_bytes(2, "big")
        part[transport + 4 : transport + 8] = (sequence + at - header & 0xFFFFFFFF).to_bytes(4, "big")
        drop = (TCP_CWR if at > header else 0) | (TCP_FIN | TCP_PSH if at + wanted.mss < len(frame) else 0)
        part[transport + 13] = flags & ~drop
        layers = Layers(ip, 6 if ipv6 else 4, Protocol.TCP, transport, len(part), False)
        if not ipv6:
            _fill_ip(part, layers)
        _fill_transport(part, layers)
        result.append(bytes(part))
    return result


def _large_send_headers(frame: bytes) -> tuple[int, int, bool] | None:
    """Places of the IP and TCP headers, found without the total length, and whether IP is IPv6; None without TCP."""
    kind, ip = int.from_bytes(frame[12:14], "big"), ETHERNET_HEADER
    while kind in (EtherType.VLAN, EtherType.SERVICE_VLAN) and len(frame) >= ip + 4:
        kind, ip = int.from_bytes(frame[ip + 2 : ip + 4], "big"), ip + 4
    ipv6 = kind == EtherType.IPV6
    if not (ipv6 or kind == EtherType.IPV4) or len(frame) < ip + (MIN_IPV6 if ipv6 else MIN_IPV4):
        return None
    if ipv6:
        layers = _skip_extensions(frame, ip, len(frame))
        if layers is None or layers.fragment:
            return None
        protocol, transport = layers.protocol, layers.transport
    else:
        protocol, transport = frame[ip + 9], ip + (frame[ip] & 15) * 4
        if transport < ip + MIN_IPV4:
            return None
    if protocol != Protocol.TCP or transport + MIN_TCP > len(frame):
        return None
    return ip, transport, ipv6


def check(frame: bytes) -> int:
    """What can be said about the checksums of a frame, as `ReceiveChecksum`; 0 when there is nothing to check."""
    layers = parse(frame)
    return 0 if layers is None else _check(frame, layers)


def _check(frame: bytes, layers: Layers) -> int:
    result = 0
    if layers.version == 4:
        header = frame[layers.ip : layers.ip + (frame[layers.ip] & 15) * 4]
        result = _IP_FAILED if checksum(header) else _IP_SUCCEEDED
    if layers.fragment:
        return result
    length = layers.end - layers.transport
    if layers.protocol == _TCP and length >= MIN_TCP:
        result |= _TCP_FAILED if _transport_checksum(frame, layers) else _TCP_SUCCEEDED
    elif layers.protocol == _UDP and length >= MIN_UDP:
        present = frame[layers.transport + 6] or frame[layers.transport + 7]
        if present:
            result |= _UDP_FAILED if _transport_checksum(frame, layers) else _UDP_SUCCEEDED
        elif layers.version == 4:
            result |= _UDP_SUCCEEDED  # RFC 768: the sender computed none
    return result


@dataclass(slots=True)
class _Run:
    """Consecutive TCP segments of one connection that may become one."""

    headers: bytearray
    layers: Layers
    payloads: list[bytes]
    next_sequence: int
    size: int


def coalesce(
    frames: Sequence[bytes], *, ipv4: bool = True, ipv6: bool = True, most: int = MAX_IP
) -> list[list[bytes]]:
    """Join consecutive TCP segments (receive segment coalescing) to lists of fragments.

    Args:
        frames: complete frames with right checksums, in the order they came in; others pass unchanged.
        ipv4: coalesce TCP over IPv4.
        ipv6: coalesce TCP over IPv6.
        most: fragments of one packet; a longer run becomes several packets.

    Returns:
        for every resulting packet its fragments: a single frame as it was, or the first frame with a new IP
        length and the payloads of the following ones. Both checksums are right for the whole: Linux verifies TCP's
        itself when it is told not to let the adapter do so (``ethtool -K eth0 rx off``), and still takes
        coalesced packets.
    """
    result: list[list[bytes]] = []
    run: _Run | None = None
    for frame in frames:
        layers = _coalescable(frame, ipv4, ipv6)
        if (
            run is not None
            and layers is not None
            and len(run.payloads) < most
            and _append(run, frame, layers)
        ):
            if frame[layers.transport + 13] & TCP_PSH:
                result.append(_finish(run))
                run = None
            continue
        if run is not None:
            result.append(_finish(run))
            run = None
        if layers is None or frame[layers.transport + 13] & TCP_PSH:
            result.append([frame])
            continue
        start = layers.transport + (frame[layers.transport + 12] >> 4) * 4
        sequence = int.from_bytes(frame[layers.transport + 4 : layers.transport + 8], "big")
        payload = frame[start : layers.end]
        run = _Run(
            bytearray(frame[:start]),
            layers,
            [payload],
            sequence + len(payload) & 0xFFFFFFFF,
            layers.end - layers.ip,
        )
    if run is not None:
        result.append(_finish(run))
    return result


def _coalescable(frame: bytes, ipv4: bool, ipv6: bool) -> Layers | None:
    layers = parse(frame)
    if layers is None or layers.protocol != _TCP or layers.fragment:
        return None
    if layers.version == 4:
        if not ipv4 or layers.transport - layers.ip != MIN_IPV4:
            return None
    elif not ipv6 or layers.transport - layers.ip != MIN_IPV6:
        return None
    transport = layers.transport
    if layers.end - transport < MIN_TCP:
        return None
    start = transport + (frame[transport + 12] >> 4) * 4
    if start < transport + MIN_TCP or start >= layers.end or frame[transport + 13] & ~TCP_PSH != TCP_ACK:
        return None
    good = _TCP_SUCCEEDED | _IP_SUCCEEDED if layers.version == 4 else _TCP_SUCCEEDED
    return layers if _check(frame, layers) == good else None


def _append(run: _Run, frame: bytes, layers: Layers) -> bool:
    """Take `frame` into the run if it is the next segment of the same connection with equal headers."""
    first, ip, transport = run.headers, layers.ip, layers.transport
    start = transport + (frame[transport + 12] >> 4) * 4
    payload = frame[start : layers.end]
    if (
        layers.version != run.layers.version
        or start != len(first)
        or run.size + len(payload) > MAX_IP
        or int.from_bytes(frame[transport + 4 : transport + 8], "big") != run.next_sequence
        or frame[:ip] != first[:ip]
    ):
        return False
    if layers.version == 4:
        # Type of service, flags, time to live and addresses; identification and length differ.
        same = (
            frame[ip : ip + 2] == first[ip : ip + 2]
            and frame[ip + 6 : ip + 10] == first[ip + 6 : ip + 10]
            and frame[ip + 12 : ip + 20] == first[ip + 12 : ip + 20]
        )
    else:
        same = frame[ip : ip + 4] == first[ip : ip + 4] and frame[ip + 6 : ip + 40] == first[ip + 6 : ip + 40]
    # Ports, acknowledgement, header length, window, and all options (RSC wants equal timestamps).
    if not (
        same
        and frame[transport : transport + 4] == first[transport : transport + 4]
        and frame[transport + 8 : transport + 13] == first[transport + 8 : transport + 13]
        and frame[transport + 14 : transport + 16] == first[transport + 14 : transport + 16]
        and frame[transport + 20 : start] == first[transport + 20 : start]
    ):
        return False
    run.headers[transport + 13] |= frame[transport + 13]
    run.payloads.append(payload)
    run.size += len(payload)
    run.next_sequence = run.next_sequence + len(payload) & 0xFFFFFFFF
    return True


def _finish(run: _Run) -> list[bytes]:
    headers, ip = run.headers, run.layers.ip
    if len(run.payloads) > 1:
        if run.layers.version == 4:
            headers[ip + 2 : ip + 4] = run.size.to_bytes(2, "big")
            _fill_ip(headers, run.layers)
        else:
            headers[ip + 4 : ip + 6] = (run.size - MIN_IPV6).to_bytes(2, "big")
        whole = headers + b"".join(run.payloads)
        _fill_transport(whole, replace(run.layers, end=ip + run.size))
        headers = whole[: len(headers)]
    return [bytes(headers) + run.payloads[0], *run.payloads[1:]]

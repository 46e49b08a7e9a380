"""Slow, obvious oracles for checksums, segmentation and Toeplitz hashing, and builders of IP packets."""

import struct
from ipaddress import ip_address


def ones_complement_sum(data: bytes) -> int:
    """RFC 1071, one 16-bit word after the other."""
    if len(data) % 2:
        data += b"\0"
    total = 0
    for index in range(0, len(data), 2):
        total += data[index] << 8 | data[index + 1]
        if total > 0xFFFF:
            total = (total & 0xFFFF) + 1
    return total


def slow_checksum(data: bytes) -> int:
    return 0xFFFF - ones_complement_sum(data)


def slow_toeplitz(key: bytes, data: bytes) -> int:
    """The definition: for every set input bit, xor the 32 key bits that start there."""
    key_bits = "".join(f"{byte:08b}" for byte in key)
    result = 0
    for index, bit in enumerate("".join(f"{byte:08b}" for byte in data)):
        if bit == "1":
            result ^= int(key_bits[index : index + 32], 2)
    return result


def ethernet(payload: bytes, ethertype: int, *, dst: bytes = b"\x02" * 6, src: bytes = b"\x04" * 6) -> bytes:
    return dst + src + ethertype.to_bytes(2, "big") + payload


def ip_packet(
    source: str,
    destination: str,
    protocol: int,
    payload: bytes,
    *,
    identification: int = 1,
    options: bytes = b"",
    extensions: bytes = b"",
    next_header: int | None = None,
    fragment: int = 0,
) -> bytes:
    """An IPv4 packet with a right header checksum, or an IPv6 packet, by the kind of the addresses."""
    src, dst = ip_address(source), ip_address(destination)
    if src.version == 4:
        size = 20 + len(options)
        total = size + len(payload)
        header = struct.pack(
            ">BBHHHBBH", 0x40 | size // 4, 0, total, identification, fragment, 64, protocol, 0
        )
        header += src.packed + dst.packed + options
        header = header[:10] + slow_checksum(header).to_bytes(2, "big") + header[12:]
        return header + payload
    first = protocol if next_header is None else next_header
    body = extensions + payload
    return struct.pack(">IHBB", 0x60000000, len(body), first, 64) + src.packed + dst.packed + body


def pseudo_header(source: str, destination: str, protocol: int, length: int) -> bytes:
    src, dst = ip_address(source), ip_address(destination)
    if src.version == 4:
        return src.packed + dst.packed + struct.pack(">BBH", 0, protocol, length)
    return src.packed + dst.packed + struct.pack(">II", length, protocol)


def tcp_segment(
    source: str,
    destination: str,
    payload: bytes,
    *,
    sport: int = 1000,
    dport: int = 2000,
    sequence: int = 1,
    acknowledge: int = 7,
    flags: int = 0x10,
    options: bytes = b"",
    checksum: int | None = None,
) -> bytes:
    def build(value: int) -> bytes:
        offset = (20 + len(options)) // 4 << 4
        header = struct.pack(">HHIIBBHHH", sport, dport, sequence, acknowledge, offset, flags, 512, value, 0)
        return header + options + payload

    if checksum is None:
        segment = build(0)
        checksum = slow_checksum(pseudo_header(source, destination, 6, len(segment)) + segment)
    return build(checksum)


def udp_datagram(
    source: str,
    destination: str,
    payload: bytes,
    *,
    sport: int = 53,
    dport: int = 99,
    checksum: int | None = None,
) -> bytes:
    length = 8 + len(payload)
    if checksum is None:
        raw = struct.pack(">HHHH", sport, dport, length, 0) + payload
        checksum = slow_checksum(pseudo_header(source, destination, 17, length) + raw) or 0xFFFF
    return struct.pack(">HHHH", sport, dport, length, checksum) + payload


def tcp_frame(
    source: str, destination: str, payload: bytes, *, identification: int = 1, **tcp: object
) -> bytes:
    segment = tcp_segment(source, destination, payload, **tcp)  # type: ignore[arg-type]
    packet = ip_packet(source, destination, 6, segment, identification=identification)
    return ethernet(packet, 0x0800 if "." in source else 0x86DD)


def udp_frame(source: str, destination: str, payload: bytes, **udp: object) -> bytes:
    datagram = udp_datagram(source, destination, payload, **udp)  # type: ignore[arg-type]
    return ethernet(ip_packet(source, destination, 17, datagram), 0x0800 if "." in source else 0x86DD)


def is_valid(frame: bytes) -> bool:
    """Whether lengths and checksums of a TCP or UDP frame (no VLAN tag, no extension headers) are right."""
    kind, packet = frame[12:14], frame[14:]
    if kind == b"\x08\x00":
        header = (packet[0] & 15) * 4
        if (
            int.from_bytes(packet[2:4], "big") != len(packet)
            or ones_complement_sum(packet[:header]) != 0xFFFF
        ):
            return False
        addresses, protocol, body = packet[12:20], packet[9], packet[header:]
        pseudo = addresses + struct.pack(">BBH", 0, protocol, len(body))
    else:
        if int.from_bytes(packet[4:6], "big") != len(packet) - 40:
            return False
        addresses, protocol, body = packet[8:40], packet[6], packet[40:]
        pseudo = addresses + struct.pack(">II", len(body), protocol)
    return ones_complement_sum(pseudo + body) == 0xFFFF

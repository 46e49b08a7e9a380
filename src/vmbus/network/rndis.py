"""RNDIS as Hyper-V's network channel uses it: control messages, packet messages and per-packet information.

All offsets inside an RNDIS message count from the start of its *body*, that is 8 bytes after the start of the
message. Nothing here keeps state; every function copies what it returns.

Sources: MS-RNDIS, NDIS headers as repeated in Linux ``drivers/net/hyperv/hyperv_net.h`` and
``include/linux/rndis.h``, and OpenVMM ``netvsp/src/rndisprot.rs``.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from types import MappingProxyType
from typing import Final, TypeAlias

from vmbus.errors import RemoteProtocolError
from vmbus.wire import U32, Structure, wire

Buffer: TypeAlias = bytes | bytearray | memoryview

HEADER_SIZE: Final = 8
"""Bytes of the message header: type and length."""
PACKET_HEADER_SIZE: Final = 44
"""Bytes of the message header and the packet body before any per-packet information."""
MAX_TRANSFER_SIZE: Final = 0xEFFFFFFF
"""`InitializeComplete.max_transfer_size` of Hyper-V hosts."""
MAX_CONTROL_SIZE: Final = 64 << 10
"""Longest control message accepted; the largest legal one (RSS parameters with 256 entries) has 1.1 KiB."""
MAJOR_VERSION: Final = 1
MINOR_VERSION: Final = 0


class RndisType(IntEnum):
    """RNDIS message types; completions have bit 31 set."""

    PACKET = 0x00000001
    INITIALIZE = 0x00000002
    HALT = 0x00000003
    QUERY = 0x00000004
    SET = 0x00000005
    RESET = 0x00000006
    INDICATE_STATUS = 0x00000007
    KEEPALIVE = 0x00000008
    INITIALIZE_COMPLETE = 0x80000002
    QUERY_COMPLETE = 0x80000004
    SET_COMPLETE = 0x80000005
    RESET_COMPLETE = 0x80000006
    KEEPALIVE_COMPLETE = 0x80000008


class NdisStatus(IntEnum):
    """NDIS status codes used in completions and indications."""

    SUCCESS = 0x00000000
    NETWORK_CHANGE = 0x40010018
    MEDIA_CONNECT = 0x4001000B
    MEDIA_DISCONNECT = 0x4001000C
    LINK_SPEED_CHANGE = 0x40010013
    TASK_OFFLOAD_CURRENT_CONFIG = 0x40020006
    BUFFER_OVERFLOW = 0x80000005
    FAILURE = 0xC0000001
    RESOURCES = 0xC000009A
    NOT_SUPPORTED = 0xC00000BB
    BAD_VERSION = 0xC0010004
    MULTICAST_FULL = 0xC0010009
    INVALID_LENGTH = 0xC0010014
    INVALID_DATA = 0xC0010015
    BUFFER_TOO_SHORT = 0xC0010016
    INVALID_OID = 0xC0010017


class PpiType(IntEnum):
    """Types of per-packet information; `PACKET_ID` is an internal one (bit 31 of the type field)."""

    TCP_IP_CHECKSUM = 0
    LARGE_SEND = 2
    VLAN = 6
    HASH_VALUE = 8
    HASH_INFO = 9
    PACKET_ID = 0x80000001


@wire(size=8)
class MessageHeader(Structure):
    """Start of every RNDIS message; `message_length` includes it."""

    message_type: U32
    message_length: U32


@wire(size=16)
class InitializeRequest(Structure):
    """Guest: start; `max_transfer_size` is the largest message it can take (Linux says 16384)."""

    request_id: U32
    major_version: U32
    minor_version: U32
    max_transfer_size: U32


@wire(size=44)
class InitializeComplete(Structure):
    """Host: how many packets one message may hold and how they are aligned (a power of two's exponent)."""

    request_id: U32
    status: U32
    major_version: U32
    minor_version: U32
    device_flags: U32
    medium: U32
    max_packets_per_message: U32
    max_transfer_size: U32
    packet_alignment_factor: U32
    af_list_offset: U32
    af_list_size: U32


@wire(size=4)
class HaltRequest(Structure):
    """Guest: stop; there is no answer."""

    request_id: U32


@wire(size=20)
class QueryRequest(Structure):
    """Guest: query an OID; some OIDs bring an NDIS object as input."""

    request_id: U32
    oid: U32
    information_buffer_length: U32
    information_buffer_offset: U32
    device_vc_handle: U32


@wire(size=16)
class QueryComplete(Structure):
    """Host: the answer to a query."""

    request_id: U32
    status: U32
    information_buffer_length: U32
    information_buffer_offset: U32


@wire(size=20)
class SetRequest(Structure):
    """Guest: set an OID."""

    request_id: U32
    oid: U32
    information_buffer_length: U32
    information_buffer_offset: U32
    device_vc_handle: U32


@wire(size=8)
class SetComplete(Structure):
    """Host: the answer to a set."""

    request_id: U32
    status: U32


@wire(size=4)
class ResetRequest(Structure):
    """Guest: forget the packet filter and multicast list."""

    reserved: U32


@wire(size=8)
class ResetComplete(Structure):
    """Host: `addressing_reset` 1 asks the guest to set filter and multicast list again."""

    status: U32
    addressing_reset: U32


@wire(size=12)
class IndicateStatus(Structure):
    """Host: something changed (`NdisStatus`)."""

    status: U32
    status_buffer_length: U32
    status_buffer_offset: U32


@wire(size=4)
class KeepaliveRequest(Structure):
    """Either end: are you there?"""

    request_id: U32


@wire(size=8)
class KeepaliveComplete(Structure):
    """Answer to a keepalive."""

    request_id: U32
    status: U32


@wire(size=36)
class PacketBody(Structure):
    """Body of a packet message: one Ethernet frame."""

    data_offset: U32
    data_length: U32
    oob_data_offset: U32
    oob_data_length: U32
    num_oob_data_elements: U32
    per_packet_info_offset: U32
    per_packet_info_length: U32
    vc_handle: U32
    reserved: U32


@wire(size=12)
class PerPacketInfoHeader(Structure):
    """Before each item of per-packet information; the offset counts from this header."""

    size: U32
    type: U32
    per_packet_information_offset: U32


CONTROL_MESSAGES: Final[Mapping[int, type[Structure]]] = MappingProxyType(
    {
        RndisType.INITIALIZE: InitializeRequest,
        RndisType.HALT: HaltRequest,
        RndisType.QUERY: QueryRequest,
        RndisType.SET: SetRequest,
        RndisType.RESET: ResetRequest,
        RndisType.INDICATE_STATUS: IndicateStatus,
        RndisType.KEEPALIVE: KeepaliveRequest,
        RndisType.INITIALIZE_COMPLETE: InitializeComplete,
        RndisType.QUERY_COMPLETE: QueryComplete,
        RndisType.SET_COMPLETE: SetComplete,
        RndisType.RESET_COMPLETE: ResetComplete,
        RndisType.KEEPALIVE_COMPLETE: KeepaliveComplete,
    }
)
"""The one table of RNDIS control messages."""

_BUFFER_FIELDS: Final[Mapping[int, tuple[str, str]]] = MappingProxyType(
    {
        RndisType.QUERY: ("information_buffer_offset", "information_buffer_length"),
        RndisType.SET: ("information_buffer_offset", "information_buffer_length"),
        RndisType.QUERY_COMPLETE: ("information_buffer_offset", "information_buffer_length"),
        RndisType.INDICATE_STATUS: ("status_buffer_offset", "status_buffer_length"),
    }
)


class ReceiveChecksum(IntFlag):
    """`PpiType.TCP_IP_CHECKSUM` from host to guest: what the host found out about the checksums."""

    TCP_FAILED = 1
    UDP_FAILED = 2
    IP_FAILED = 4
    TCP_SUCCEEDED = 8
    UDP_SUCCEEDED = 16
    IP_SUCCEEDED = 32
    LOOPBACK = 64
    TCP_VALUE_INVALID = 128
    """Checked before coalescing; the value in the header does not fit the whole."""
    IP_VALUE_INVALID = 256


class PacketIdFlags(IntFlag):
    """Flags of `PpiType.PACKET_ID`: this message is a fragment of a coalesced packet."""

    SUB_ALLOCATION = 1
    FIRST = 2
    LAST = 4


@dataclass(frozen=True, slots=True)
class TransmitChecksum:
    """`PpiType.TCP_IP_CHECKSUM` from guest to host: which checksums the host has to fill in.

    Attributes:
        transport_offset: bytes from the start of the frame to the TCP or UDP header; 0 lets the host find it.
    """

    ipv4: bool = False
    ipv6: bool = False
    tcp: bool = False
    udp: bool = False
    ip_header: bool = False
    transport_offset: int = 0

    @classmethod
    def unpack(cls, value: int) -> "TransmitChecksum":
        """From the 32-bit value of the wire."""
        return cls(
            bool(value & 1),
            bool(value & 2),
            bool(value & 4),
            bool(value & 8),
            bool(value & 16),
            value >> 16 & 0x3FF,
        )

    def pack(self) -> int:
        """To the 32-bit value of the wire."""
        return (
            self.ipv4
            | self.ipv6 << 1
            | self.tcp << 2
            | self.udp << 3
            | self.ip_header << 4
            | (self.transport_offset & 0x3FF) << 16
        )


@dataclass(frozen=True, slots=True)
class LargeSend:
    """`PpiType.LARGE_SEND` (LSOv2): cut the TCP segment into ones of at most `mss` bytes of payload.

    Attributes:
        mss: 20 bits.
        transport_offset: bytes from the start of the frame to the TCP header.
        ipv6: the version of IP.
        v2: LSO version 2; version 1 has the same layout, but nobody may enable it here.
    """

    mss: int
    transport_offset: int
    ipv6: bool = False
    v2: bool = True

    @classmethod
    def unpack(cls, value: int) -> "LargeSend":
        """From the 32-bit value of the wire."""
        return cls(value & 0xFFFFF, value >> 20 & 0x3FF, bool(value >> 31), bool(value >> 30 & 1))

    def pack(self) -> int:
        """To the 32-bit value of the wire."""
        return self.mss & 0xFFFFF | (self.transport_offset & 0x3FF) << 20 | self.v2 << 30 | self.ipv6 << 31


def pack_vlan(tci: int) -> int:
    """`PpiType.VLAN` from an 802.1Q TCI (priority in bits 13 to 15, DEI in 12, VLAN id in 0 to 11)."""
    return tci >> 13 & 7 | (tci >> 12 & 1) << 3 | (tci & 0xFFF) << 4


def unpack_vlan(value: int) -> int:
    """The 802.1Q TCI of a `PpiType.VLAN`."""
    return (value & 7) << 13 | (value >> 3 & 1) << 12 | value >> 4 & 0xFFF


@dataclass(slots=True)
class Frame:
    """An Ethernet frame with the per-packet information that travels beside it; the values are the wire's.

    Attributes:
        data: the frame from the destination address on, without a VLAN tag that is in `vlan` instead.
        checksum: see `TransmitChecksum` (guest to host) and `ReceiveChecksum` (host to guest).
        large_send: see `LargeSend`.
        vlan: see `pack_vlan`.
        hash_value: RSS hash.
        hash_info: function and types of that hash (`vmbus.network.oid.HashTypes`). FreeBSD and DPDK take no hash
            without it; Linux does not look at it.
        packet_id: version (8 bits), `PacketIdFlags` (8 bits), id of the coalesced packet (16 bits).
    """

    data: bytes
    checksum: int | None = None
    large_send: int | None = None
    vlan: int | None = None
    hash_value: int | None = None
    packet_id: int | None = None
    hash_info: int | None = None


_HEADER = struct.Struct("<II")
_PACKET = struct.Struct("<11I")
_PPI = struct.Struct("<4I")
_U32 = struct.Struct("<I")


def pack_control(message_type: int, body: Structure, data: bytes = b"") -> bytes:
    """A control message; `data` follows the body, whose offset and length fields are filled in for it."""
    fields = _BUFFER_FIELDS.get(message_type)
    if fields is not None:
        setattr(body, fields[0], body.SIZE if data else 0)
        setattr(body, fields[1], len(data))
        if message_type in (RndisType.QUERY, RndisType.SET, RndisType.QUERY_COMPLETE):
            # Linux takes no answer whose offset lies before the end of the body, not even an empty one.
            setattr(body, fields[0], body.SIZE)
    return _HEADER.pack(message_type, HEADER_SIZE + body.SIZE + len(data)) + body.pack() + data


def unpack_control(message: Buffer) -> tuple[int, Structure, bytes]:
    """The type, the body and the data buffer of a control message.

    Raises:
        RemoteProtocolError: a length or an offset is wrong, the type is unknown or the message too long.
    """
    size = len(message)
    if size < HEADER_SIZE:
        raise RemoteProtocolError(f"truncated RNDIS message: {size} bytes")
    message_type, length = _HEADER.unpack_from(message)
    if length < HEADER_SIZE or length > size or length > MAX_CONTROL_SIZE:
        raise RemoteProtocolError(f"RNDIS message length {length} in {size} bytes")
    structure = CONTROL_MESSAGES.get(message_type)
    if structure is None:
        raise RemoteProtocolError(f"unknown RNDIS message type 0x{message_type:x}")
    content = bytes(message[HEADER_SIZE:length])
    body = structure.unpack(content)
    fields = _BUFFER_FIELDS.get(message_type)
    if fields is None:
        return message_type, body, b""
    offset, count = getattr(body, fields[0]), getattr(body, fields[1])
    if count == 0:
        return message_type, body, b""
    if offset < body.SIZE or offset > len(content) or count > len(content) - offset:
        raise RemoteProtocolError(f"RNDIS buffer of {count} bytes at {offset} in a body of {len(content)}")
    return message_type, body, content[offset : offset + count]


def pack_packet(frame: Frame, data_at: int = 0, alignment: int = 1) -> bytes:
    """The packet message of one frame.

    Args:
        frame: what to send.
        data_at: place of the frame from the start of the message, 0 for directly behind the headers.
        alignment: the message is padded to a multiple of this (`InitializeComplete.packet_alignment_factor`).
    """
    info = b""
    for kind, value in (
        (PpiType.HASH_VALUE, frame.hash_value),
        (PpiType.HASH_INFO, frame.hash_info),
        (PpiType.VLAN, frame.vlan),
        (PpiType.LARGE_SEND, frame.large_send),
        (PpiType.TCP_IP_CHECKSUM, frame.checksum),
        (PpiType.PACKET_ID, frame.packet_id),
    ):
        if value is not None:
            info += _PPI.pack(16, kind, 12, value)
    start = max(PACKET_HEADER_SIZE + len(info), data_at)
    length = start + len(frame.data)
    padded = -(-length // alignment) * alignment
    header = _PACKET.pack(
        RndisType.PACKET,
        padded,
        start - HEADER_SIZE,
        len(frame.data),
        0,
        0,
        0,
        PACKET_HEADER_SIZE - HEADER_SIZE if info else 0,
        len(info),
        0,
        0,
    )
    gap = start - PACKET_HEADER_SIZE - len(info)
    return b"".join((header, info, bytes(gap), frame.data, bytes(padded - length)))


def unpack_packets(buffer: Buffer, limit: int) -> list[Frame]:
    """All frames of a buffer with one or more packet messages, one after the other.

    Args:
        buffer: exactly the bytes that the sender announced; its content must not change meanwhile, so a
            buffer in shared memory is copied by the caller first.
        limit: most packet messages allowed.

    Raises:
        RemoteProtocolError: anything does not fit; no frame of the buffer is valid then.
    """
    frames: list[Frame] = []
    at, size = 0, len(buffer)
    while at < size:
        if len(frames) == limit:
            raise RemoteProtocolError(f"more than {limit} packets in one RNDIS message")
        frame, length = _unpack_packet(buffer, at, size - at)
        frames.append(frame)
        at += length
    if not frames:
        raise RemoteProtocolError("empty RNDIS message")
    return frames


def unpack_first_packet(buffer: Buffer) -> Frame:
    """The frame of the packet message at the start of a range of the receive buffer.

    What stands behind the message is not looked at: a host may give the length of a range rounded up.

    Raises:
        RemoteProtocolError: anything does not fit.
    """
    return _unpack_packet(buffer, 0, len(buffer))[0]


def _unpack_packet(buffer: Buffer, at: int, size: int) -> tuple[Frame, int]:
    if size < PACKET_HEADER_SIZE:
        raise RemoteProtocolError(f"truncated RNDIS packet: {size} bytes")
    kind, length, data_offset, data_length, oob_at, oob_length, oob_count, info_at, info_length, handle, _ = (
        _PACKET.unpack_from(buffer, at)
    )
    if kind != RndisType.PACKET:
        raise RemoteProtocolError(f"RNDIS message of type 0x{kind:x} among packets")
    if length < PACKET_HEADER_SIZE or length > size:
        raise RemoteProtocolError(f"RNDIS packet length {length} in {size} bytes")
    body = length - HEADER_SIZE
    if oob_at or oob_length or oob_count or handle:
        raise RemoteProtocolError("out-of-band data or a virtual circuit in an RNDIS packet")
    # Data that begins inside of the header is odd, but harmless in a private copy; OpenVMM's own tests send it.
    if data_offset > body or data_length > body - data_offset:
        raise RemoteProtocolError(f"RNDIS data of {data_length} bytes at {data_offset} in a body of {body}")
    if data_length == 0:
        raise RemoteProtocolError("RNDIS packet without data")
    start = at + HEADER_SIZE + data_offset
    frame = Frame(bytes(buffer[start : start + data_length]))
    if info_length:
        if (
            info_at < PacketBody.SIZE
            or info_at > body
            or info_length > body - info_at
            or (info_at < data_offset + data_length and data_offset < info_at + info_length)
        ):
            raise RemoteProtocolError(f"per-packet information of {info_length} bytes at {info_at} in {body}")
        _unpack_info(frame, buffer, at + HEADER_SIZE + info_at, info_length)
    return frame, length


def _unpack_info(frame: Frame, buffer: Buffer, at: int, left: int) -> None:
    while left:
        if left < PerPacketInfoHeader.SIZE:
            raise RemoteProtocolError(f"{left} bytes behind the per-packet information")
        size, kind, offset = struct.unpack_from("<III", buffer, at)
        if size < PerPacketInfoHeader.SIZE or size > left:
            raise RemoteProtocolError(f"per-packet information of {size} bytes where {left} are left")
        name = _INFO_FIELDS.get(kind)
        if name is not None:
            if offset < PerPacketInfoHeader.SIZE or offset > size or size - offset < 4:
                raise RemoteProtocolError(f"per-packet information at {offset} of {size} bytes")
            setattr(frame, name, _U32.unpack_from(buffer, at + offset)[0])
        at += size
        left -= size


_INFO_FIELDS: Final[Mapping[int, str]] = MappingProxyType(
    {
        PpiType.TCP_IP_CHECKSUM: "checksum",
        PpiType.LARGE_SEND: "large_send",
        PpiType.VLAN: "vlan",
        PpiType.HASH_VALUE: "hash_value",
        PpiType.HASH_INFO: "hash_info",
        PpiType.PACKET_ID: "packet_id",
    }
)

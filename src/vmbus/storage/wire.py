"""The storage protocol ("vstor") as it is on the wire, for both ends.

A packet is a 12-byte header and a payload area whose size depends on the protocol version: 36 bytes
up to 4.2, 52 bytes from 5.1 on. All integers are little-endian; only the SCSI command and its data
are big-endian. Numbers and layouts are those of OpenVMM's ``storvsp_protocol`` and of Linux's
``drivers/scsi/storvsc_drv.c`` (``vstor_packet``, ``vmscsi_request``).
"""

from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Annotated
from uuid import UUID

from vmbus.errors import RemoteProtocolError
from vmbus.wire import U8, U16, U32, U64, Buffer, Fixed, Structure, wire

__all__ = [
    "CDB_SIZE",
    "IDE_ACCELERATOR_INTERFACE",
    "MAX_TRANSFER",
    "SCSI_INTERFACE",
    "SENSE_SIZE",
    "ChannelFlags",
    "ChannelProperties",
    "DataDirection",
    "NtStatus",
    "OfferFlags",
    "OfferProperties",
    "Operation",
    "PacketFlags",
    "PacketHeader",
    "ProtocolVersion",
    "ScsiRequest",
    "SrbFlags",
    "SrbStatus",
    "SubChannelCount",
    "Version",
    "VersionRules",
    "ide_instance",
    "parse_scsi_request",
    "rules",
]

SCSI_INTERFACE = UUID("ba6163d9-04a1-4d29-b605-72e2ffb1dc7f")
"""Interface of the synthetic SCSI controller."""

IDE_ACCELERATOR_INTERFACE = UUID("32412632-86cb-44a2-9b5c-50d1417354f5")
"""Interface of the channel that accelerates one emulated IDE disk: one channel per disk, no sub-channels."""

CDB_SIZE = 16
"""Bytes of the command field; longer SCSI commands cannot be sent."""

SENSE_SIZE = 20
"""Bytes of the area that the command shares with the returned sense data."""

MAX_TRANSFER = 0x40000
"""Data bytes of one request that OpenVMM and Hyper-V announce: 256 KiB."""


class Version(IntEnum):
    """Protocol versions, major in the high byte; names as in OpenVMM, the product in the comment."""

    WIN6 = 0x0200  # Server 2008
    WIN7 = 0x0402  # Server 2008 R2
    WIN8 = 0x0501  # Server 2012
    BLUE = 0x0600  # Server 2012 R2
    THRESHOLD = 0x0602  # Windows 10, Server 2016 and later


class Operation(IntEnum):
    """What a packet asks for or tells (Linux: ``enum vstor_packet_operation``)."""

    COMPLETE_IO = 1
    REMOVE_DEVICE = 2
    EXECUTE_SRB = 3
    RESET_LUN = 4
    RESET_ADAPTER = 5
    RESET_BUS = 6
    BEGIN_INITIALIZATION = 7
    END_INITIALIZATION = 8
    QUERY_PROTOCOL_VERSION = 9
    QUERY_PROPERTIES = 10
    ENUMERATE_BUS = 11
    FC_HBA_DATA = 12
    CREATE_SUB_CHANNELS = 13
    EVENT_NOTIFICATION = 14


class PacketFlags(IntFlag):
    """`PacketHeader.flags`."""

    REQUEST_COMPLETION = 0x1


class NtStatus(IntEnum):
    """`PacketHeader.status` of a completion; guests treat every value but 0 as failure."""

    SUCCESS = 0
    BUFFER_OVERFLOW = 0x80000005
    DEVICE_BUSY = 0x80000011
    UNSUCCESSFUL = 0xC0000001
    INVALID_PARAMETER = 0xC000000D
    INVALID_DEVICE_REQUEST = 0xC0000010
    REVISION_MISMATCH = 0xC0000059
    DEVICE_NOT_CONNECTED = 0xC000009D
    IO_TIMEOUT = 0xC00000B5
    DEVICE_DOES_NOT_EXIST = 0xC00000C0
    CANCELLED = 0xC0000120
    INVALID_DEVICE_STATE = 0xC0000184
    IO_DEVICE_ERROR = 0xC0000185


class SrbStatus(IntEnum):
    """`ScsiRequest.srb_status`: six bits of status, two flags (the SRB of Windows storage drivers)."""

    PENDING = 0x00
    SUCCESS = 0x01
    ABORTED = 0x02
    ABORT_FAILED = 0x03
    ERROR = 0x04
    BUSY = 0x05
    INVALID_REQUEST = 0x06
    INVALID_PATH_ID = 0x07
    NO_DEVICE = 0x08
    TIMEOUT = 0x09
    BUS_RESET = 0x0E
    DATA_OVERRUN = 0x12
    REQUEST_FLUSHED = 0x16
    INVALID_LUN = 0x20
    INVALID_TARGET_ID = 0x21
    BAD_FUNCTION = 0x22

    MASK = 0x3F
    QUEUE_FROZEN = 0x40
    AUTOSENSE_VALID = 0x80


class SrbFlags(IntFlag):
    """`ScsiRequest.srb_flags` (since 5.1)."""

    QUEUE_ACTION_ENABLE = 0x2
    DISABLE_SYNCH_TRANSFER = 0x8
    DISABLE_AUTOSENSE = 0x20
    DATA_IN = 0x40
    DATA_OUT = 0x80
    NO_QUEUE_FREEZE = 0x100


class DataDirection(IntEnum):
    """`ScsiRequest.data_in`."""

    OUT = 0
    IN = 1
    UNKNOWN = 2


class ChannelFlags(IntFlag):
    """`ChannelProperties.flags`."""

    SUPPORTS_MULTI_CHANNEL = 0x1


class OfferFlags(IntFlag):
    """`OfferProperties.flags`."""

    IDE_DEVICE = 0x2


@wire(size=12)
class PacketHeader(Structure):
    """What every packet begins with. `status` has a meaning only in completions."""

    operation: U32
    flags: U32 = 0
    status: U32 = 0


@wire(size=52, offsets={"data_transfer_length": 12, "payload": 16, "reserve": 36, "srb_flags": 40})
class ScsiRequest(Structure):
    """A SCSI request and, with the same layout, its completion (Linux: ``vmscsi_request``).

    Up to protocol 4.2 it ends after `payload`, at 36 bytes; the rest then counts as zero.

    Attributes:
        length: bytes of this structure in the negotiated version.
        srb_status: `SrbStatus` with its two flag bits.
        scsi_status: the SAM-5 status byte.
        reserved1: Linux calls it ``port_number`` and fills it; hosts ignore it.
        sense_info_length: bytes of `payload` that are sense data, or the room for them.
        data_in: `DataDirection`.
        data_transfer_length: bytes asked for; in a completion, bytes moved.
        payload: the command (16 bytes used); in a completion, sense data.
    """

    length: U16 = 52
    srb_status: U8 = 0
    scsi_status: U8 = 0
    reserved1: U8 = 0
    path_id: U8 = 0
    target_id: U8 = 0
    lun: U8 = 0
    cdb_length: U8 = 0
    sense_info_length: U8 = 0
    data_in: U8 = 0
    properties: U8 = 0
    data_transfer_length: U32 = 0
    payload: Annotated[bytes, Fixed(SENSE_SIZE)] = b""
    reserve: U16 = 0
    queue_tag: U8 = 0
    queue_action: U8 = 0
    srb_flags: U32 = 0
    time_out_value: U32 = 0
    queue_sort_key: U32 = 0


@wire(size=4)
class ProtocolVersion(Structure):
    """Payload of QUERY_PROTOCOL_VERSION and its completion."""

    major_minor: U16
    revision: U16 = 0


@wire(size=24, offsets={"flags": 8, "max_transfer_bytes": 12})
class ChannelProperties(Structure):
    """Payload of the completion of QUERY_PROPERTIES.

    Attributes:
        max_sub_channel_count: sub-channels that CREATE_SUB_CHANNELS may ask for.
        max_transfer_bytes: data bytes of one request; guests size their scatter lists by it.
    """

    reserved: U32 = 0
    max_sub_channel_count: U16 = 0
    reserved2: U16 = 0
    flags: U32 = 0
    max_transfer_bytes: U32 = MAX_TRANSFER
    reserved3: U64 = 0


@wire(size=2)
class SubChannelCount(Structure):
    """Payload of CREATE_SUB_CHANNELS."""

    count: U16


@wire(size=24, offsets={"flags": 8})
class OfferProperties(Structure):
    """The user-defined area of an IDE accelerator's offer; old Windows drivers read it, others the instance id."""

    reserved: U16 = 0
    path_id: U8 = 0
    target_id: U8 = 0
    reserved2: U32 = 0
    flags: U32 = OfferFlags.IDE_DEVICE
    reserved3: U32 = 0
    reserved4: U64 = 0


@dataclass(frozen=True)
class VersionRules:
    """What differs between protocol versions.

    Attributes:
        request_size: bytes of the payload area. Windows guests refuse completions of any other size.
        multi_channel: sub-channels exist.
        notifications: the host may send ENUMERATE_BUS (OpenVMM does from 4.2 on), of added and of removed disks.
        sense_size: usable bytes of sense data (18 before Windows 8, as Linux and FreeBSD knew those hosts).
    """

    version: Version
    request_size: int
    multi_channel: bool
    notifications: bool
    sense_size: int

    @property
    def packet_size(self) -> int:
        """Bytes of a whole packet."""
        return PacketHeader.SIZE + self.request_size


_RULES = {
    rule.version: rule
    for rule in (
        VersionRules(Version.WIN6, 36, False, False, 18),
        VersionRules(Version.WIN7, 36, False, True, 18),
        VersionRules(Version.WIN8, 52, True, True, SENSE_SIZE),
        VersionRules(Version.BLUE, 52, True, True, SENSE_SIZE),
        VersionRules(Version.THRESHOLD, 52, True, True, SENSE_SIZE),
    )
}

MAX_REQUEST_SIZE = ScsiRequest.SIZE
MIN_REQUEST_SIZE = 36


def rules(version: int) -> VersionRules | None:
    """The rules of a protocol version, None if it is not one of `Version`."""
    try:
        return _RULES[Version(version)]
    except ValueError:
        return None


def parse_scsi_request(packet: Buffer) -> ScsiRequest:
    """The request in an EXECUTE_SRB packet or its completion, in either size.

    Raises:
        RemoteProtocolError: shorter than the 36 bytes that every version has.
    """
    request = bytes(packet[PacketHeader.SIZE : PacketHeader.SIZE + MAX_REQUEST_SIZE])
    if len(request) < MIN_REQUEST_SIZE:
        raise RemoteProtocolError(f"truncated SCSI request: {len(request)} of {MIN_REQUEST_SIZE} bytes")
    return ScsiRequest.unpack(request.ljust(MAX_REQUEST_SIZE, b"\0"))


def ide_instance(path_id: int, target_id: int) -> UUID:
    """The instance id by which guests know which emulated IDE disk a channel accelerates.

    Linux reads the target from bytes 4 and 5; the fixed part is the same on every host.
    """
    return UUID(fields=(path_id, target_id, 0x8899, 0, 0, 0))

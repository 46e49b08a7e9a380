"""NVSP, the network protocol of VMBus: its message numbers, structures and versions, once for both ends.

Every NVSP message is a `MESSAGE_TYPE` of 32 bits followed by one of the structures below and padded to the
packet size of the negotiated version (`packet_size`). RNDIS messages do not travel inside NVSP messages but
in the send buffer, in GPA-direct ranges (guest to host) or in the receive buffer (host to guest); the NVSP
message only says where. See `vmbus.network.rndis`.

Sources of the values: Linux ``drivers/net/hyperv/hyperv_net.h`` and OpenVMM ``netvsp/src/protocol.rs``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from types import MappingProxyType
from typing import Annotated, Final
from uuid import UUID

from vmbus.errors import RemoteProtocolError
from vmbus.wire import U8, U16, U32, U64, Fixed, Structure, wire

__all__ = [
    "INTERFACE_ID",
    "MESSAGES",
    "NO_SECTION",
    "RECEIVE_BUFFER_ID",
    "SEND_BUFFER_ID",
    "Capabilities",
    "ChannelType",
    "DataPath",
    "Init",
    "InitComplete",
    "MessageInfo",
    "MessageType",
    "NvspStatus",
    "OidQueryEx",
    "OidQueryExComplete",
    "PdApiComplete",
    "PdApiRequest",
    "ReceiveBufferSection",
    "RevokeReceiveBuffer",
    "RevokeSendBuffer",
    "SendIndirectionTable",
    "SendNdisConfig",
    "SendNdisVersion",
    "SendReceiveBuffer",
    "SendReceiveBufferComplete",
    "SendRndisPacket",
    "SendRndisPacketComplete",
    "SendSendBuffer",
    "SendSendBufferComplete",
    "SendVfAssociation",
    "Sender",
    "SubchannelComplete",
    "SubchannelOperation",
    "SubchannelRequest",
    "SwitchDataPath",
    "Version",
    "pack_message",
    "packet_size",
    "receive_section_size",
    "unpack_message",
]

INTERFACE_ID: Final = UUID("f8615163-df3e-46c5-913f-f2d2f965ed0e")
"""The VMBus interface (device class) of synthetic network adapters."""

RECEIVE_BUFFER_ID: Final = 0xCAFE
"""Transfer-page set id that every known client gives its receive buffer (Linux, FreeBSD, DPDK)."""

SEND_BUFFER_ID: Final = 0
"""Id that Linux and DPDK give their send buffer."""

NO_SECTION: Final = 0xFFFFFFFF
"""`SendRndisPacket.send_buffer_section_index` when the send buffer is not used."""

SEND_SECTION_SIZE: Final = 6144
"""Bytes of one section of the send buffer, as Hyper-V and OpenVMM grant them."""

MAX_RECEIVE_RANGES: Final = 375
"""Transfer-page ranges in one host packet without RSC (NDIS 6 hosts; Linux accepts `MAX_RSC_RANGES`)."""

MAX_RSC_RANGES: Final = 562
"""Transfer-page ranges in one host packet with RSC over VMBus, also Linux's limit of RSC fragments."""

MAX_MDL_CHAIN: Final = 34
"""`InitComplete.maximum_mdl_chain_length`: GPA ranges that a guest may use for one packet."""

SEND_TABLE_ENTRIES: Final = 16
"""Entries of the send indirection table; Linux takes no other size."""

ETHERNET_HEADER: Final = 14
DEFAULT_FRAME: Final = 1514
"""Frame size (MTU 1500 and the Ethernet header) used when the guest states none or a silly one."""
MAX_FRAME: Final = 9216
"""Largest frame that `SendNdisConfig.mtu` may ask for."""


class Version(IntEnum):
    """NVSP versions: major in the upper, minor in the lower 16 bits."""

    V1 = 0x00002
    """Server 2008; also what an answer to a version 1 init says in `negotiated_version`."""
    V2 = 0x30002
    """Server 2008 R2: NDIS configuration, so that the MTU can be more than 1500."""
    V4 = 0x40000
    """Server 2012: SR-IOV."""
    V5 = 0x50000
    """Server 2012 R2: sub-channels and RSS."""
    V6 = 0x60000
    """Server 2016."""
    V6_1 = 0x60001
    """Server 2019: RSC over VMBus, larger packets."""


class MessageType(IntEnum):
    """Numbers of the NVSP messages."""

    NONE = 0
    INIT = 1
    INIT_COMPLETE = 2
    SEND_NDIS_VERSION = 100
    SEND_RECEIVE_BUFFER = 101
    SEND_RECEIVE_BUFFER_COMPLETE = 102
    REVOKE_RECEIVE_BUFFER = 103
    SEND_SEND_BUFFER = 104
    SEND_SEND_BUFFER_COMPLETE = 105
    REVOKE_SEND_BUFFER = 106
    SEND_RNDIS_PACKET = 107
    SEND_RNDIS_PACKET_COMPLETE = 108
    SEND_NDIS_CONFIG = 125
    SEND_VF_ASSOCIATION = 128
    SWITCH_DATA_PATH = 129
    UPLINK_CONNECT_STATE_DEPRECATED = 130
    OID_QUERY_EX = 131
    OID_QUERY_EX_COMPLETE = 132
    SUB_CHANNEL = 133
    SEND_INDIRECTION_TABLE = 134
    PD_API = 135
    PD_POST_BATCH = 136


class NvspStatus(IntEnum):
    """Status of an NVSP completion."""

    NONE = 0
    SUCCESS = 1
    FAILURE = 2
    PROTOCOL_TOO_NEW = 3
    PROTOCOL_TOO_OLD = 4
    INVALID_RNDIS_PACKET = 5
    BUSY = 6
    PROTOCOL_UNSUPPORTED = 7


class ChannelType(IntEnum):
    """`SendRndisPacket.channel_type`."""

    DATA = 0
    CONTROL = 1


class DataPath(IntEnum):
    """`SwitchDataPath.active_data_path`."""

    SYNTHETIC = 0
    VF = 1


class SubchannelOperation(IntEnum):
    """`SubchannelRequest.operation`."""

    NONE = 0
    ALLOCATE = 1


class Capabilities(IntFlag):
    """`SendNdisConfig.capabilities`."""

    VMQ = 1
    CHIMNEY = 2
    SRIOV = 4
    IEEE_8021Q = 8
    CORRELATION_ID = 16
    TEAMING = 32
    """Also what makes a host send link-speed changes."""
    VIRTUAL_SUBNET_ID = 64
    RSC = 128
    """RSC over VMBus: one TCP segment in several transfer-page ranges."""


class Sender(IntFlag):
    """Which end may send a message."""

    GUEST = 1
    HOST = 2
    BOTH = 3


@wire(size=8)
class Init(Structure):
    """Guest: the one version that it wants now (both fields the same since Server 2008 R2)."""

    protocol_version: U32
    protocol_version2: U32


@wire(size=12)
class InitComplete(Structure):
    """Host: `status` says whether the version is accepted.

    `negotiated_version` is 2 for version 1 and 0xFFFFFFFF for all later ones (Hyper-V, OpenVMM).
    """

    negotiated_version: U32
    maximum_mdl_chain_length: U32
    status: U32


@wire(size=8)
class SendNdisVersion(Structure):
    """Guest: the NDIS version that its OID requests follow, for instance 6.30 (major 6, minor 30)."""

    ndis_major_version: U32
    ndis_minor_version: U32


@wire(size=8)
class SendReceiveBuffer(Structure):
    """Guest: GPADL of its receive buffer and the transfer-page set id it wants to see with it."""

    gpadl_id: U32
    id: U16
    reserved: U16


@wire(size=16)
class ReceiveBufferSection(Structure):
    """A run of equally long sub-allocations of the receive buffer; offsets and sizes in bytes."""

    offset: U32
    sub_allocation_size: U32
    num_sub_allocations: U32
    end_offset: U32


@wire(size=24, offsets={"section": 8})
class SendReceiveBufferComplete(Structure):
    """Host: how it divided the receive buffer. Hosts send one section, Linux takes no more."""

    status: U32
    num_sections: U32
    section: ReceiveBufferSection


@wire(size=4)
class RevokeReceiveBuffer(Structure):
    """Guest: the host must not use the receive buffer again."""

    id: U16
    reserved: U16


@wire(size=8)
class SendSendBuffer(Structure):
    """Guest: GPADL of its send buffer ("chimney" buffer in FreeBSD and DPDK)."""

    gpadl_id: U32
    id: U16
    reserved: U16


@wire(size=8)
class SendSendBufferComplete(Structure):
    """Host: size in bytes of the sections that the send buffer is divided into."""

    status: U32
    section_size: U32


@wire(size=4)
class RevokeSendBuffer(Structure):
    """Guest: the host must not use the send buffer again."""

    id: U16
    reserved: U16


@wire(size=12)
class SendRndisPacket(Structure):
    """Both ends: an RNDIS message is in the named section, in GPA-direct ranges, or in transfer pages.

    A guest may use a section *and* GPA ranges; the message is then their concatenation.
    """

    channel_type: U32
    send_buffer_section_index: U32
    send_buffer_section_size: U32


@wire(size=4)
class SendRndisPacketComplete(Structure):
    """Both ends: the resources of the packet with this transaction id are free again."""

    status: U32


@wire(size=16, offsets={"capabilities": 8})
class SendNdisConfig(Structure):
    """Guest: `mtu` is its MTU plus the 14 bytes of the Ethernet header."""

    mtu: U32
    reserved: U32
    capabilities: U64


@wire(size=8)
class SendVfAssociation(Structure):
    """Host: a virtual function with this serial number belongs to (1) or has left (0) this adapter."""

    allocated: U32
    serial_number: U32


@wire(size=4)
class SwitchDataPath(Structure):
    """Guest: use this `DataPath` from now on. Completed with an empty completion packet."""

    active_data_path: U32


@wire(size=8)
class OidQueryEx(Structure):
    """Guest: query an OID without RNDIS; no known host answers it with anything but "not supported"."""

    object_type: U8
    revision: U8
    size: U16
    oid: U32


@wire(size=8)
class OidQueryExComplete(Structure):
    """Host: NDIS status and the number of bytes of the answer."""

    status: U32
    bytes: U32


@wire(size=8)
class SubchannelRequest(Structure):
    """Guest: offer me `num_sub_channels` more channels."""

    operation: U32
    num_sub_channels: U32


@wire(size=8)
class SubchannelComplete(Structure):
    """Host: how many sub-channels it offers for this request.

    DPDK asks again whenever its port is configured, and waits for as many channels that it does not know yet.
    """

    status: U32
    num_sub_channels: U32


@wire(size=8)
class SendIndirectionTable(Structure):
    """Host: `count` 32-bit channel numbers stand at `offset` from the start of the NVSP message."""

    count: U32
    offset: U32


@wire(size=24)
class PdApiRequest(Structure):
    """Guest: a PacketDirect operation (configuration is operation 1)."""

    operation: U32
    body: Annotated[bytes, Fixed(20)]


@wire(size=24)
class PdApiComplete(Structure):
    """Host: NT status of a PacketDirect operation."""

    operation: U32
    status: U32
    body: Annotated[bytes, Fixed(16)]


@dataclass(frozen=True, slots=True)
class MessageInfo:
    """What the message table knows of a message.

    Attributes:
        structure: what follows the message type.
        since: first version that has it; `INIT` is there before any version is agreed on.
        sender: which end may send it.
    """

    structure: type[Structure]
    since: Version
    sender: Sender


_G, _H, _B = Sender.GUEST, Sender.HOST, Sender.BOTH
MESSAGES: Final[Mapping[int, MessageInfo]] = MappingProxyType(
    {
        MessageType.INIT: MessageInfo(Init, Version.V1, _G),
        MessageType.INIT_COMPLETE: MessageInfo(InitComplete, Version.V1, _H),
        MessageType.SEND_NDIS_VERSION: MessageInfo(SendNdisVersion, Version.V1, _G),
        MessageType.SEND_RECEIVE_BUFFER: MessageInfo(SendReceiveBuffer, Version.V1, _G),
        MessageType.SEND_RECEIVE_BUFFER_COMPLETE: MessageInfo(SendReceiveBufferComplete, Version.V1, _H),
        MessageType.REVOKE_RECEIVE_BUFFER: MessageInfo(RevokeReceiveBuffer, Version.V1, _G),
        MessageType.SEND_SEND_BUFFER: MessageInfo(SendSendBuffer, Version.V1, _G),
        MessageType.SEND_SEND_BUFFER_COMPLETE: MessageInfo(SendSendBufferComplete, Version.V1, _H),
        MessageType.REVOKE_SEND_BUFFER: MessageInfo(RevokeSendBuffer, Version.V1, _G),
        MessageType.SEND_RNDIS_PACKET: MessageInfo(SendRndisPacket, Version.V1, _B),
        MessageType.SEND_RNDIS_PACKET_COMPLETE: MessageInfo(SendRndisPacketComplete, Version.V1, _B),
        MessageType.SEND_NDIS_CONFIG: MessageInfo(SendNdisConfig, Version.V2, _G),
        MessageType.SEND_VF_ASSOCIATION: MessageInfo(SendVfAssociation, Version.V4, _H),
        MessageType.SWITCH_DATA_PATH: MessageInfo(SwitchDataPath, Version.V4, _B),
        MessageType.OID_QUERY_EX: MessageInfo(OidQueryEx, Version.V5, _G),
        MessageType.OID_QUERY_EX_COMPLETE: MessageInfo(OidQueryExComplete, Version.V5, _H),
        # The request and its completion share a number; they are told apart by who sends them.
        MessageType.SUB_CHANNEL: MessageInfo(SubchannelRequest, Version.V5, _B),
        MessageType.SEND_INDIRECTION_TABLE: MessageInfo(SendIndirectionTable, Version.V5, _H),
        MessageType.PD_API: MessageInfo(PdApiRequest, Version.V6_1, _B),
    }
)
"""The one table of NVSP messages."""

_HOST_VARIANTS: Final[Mapping[int, type[Structure]]] = MappingProxyType(
    {MessageType.SUB_CHANNEL: SubchannelComplete, MessageType.PD_API: PdApiComplete}
)


def packet_size(version: int) -> int:
    """Bytes that a fixed-size NVSP message of this version is padded to: 28, from 6.1 on 40."""
    return 40 if version >= Version.V6_1 else 28


SUBCHANNEL_COMPLETE_SIZE: Final = 40
"""Bytes of `SubchannelComplete` in every version: DPDK takes no shorter one (hn_nvs_subch_resp), others need less."""


def receive_section_size(frame_size: int) -> int:
    """Bytes of a receive-buffer sub-allocation for frames of `frame_size` bytes (MTU + 14).

    256 bytes are kept for the RNDIS header with all per-packet information; 36 bytes at the end are left
    alone because newer Windows clients do not count them as theirs (known from OpenVMM).
    """
    return (256 + frame_size + 36 + 7) & ~7


def pack_message(
    message_type: int, body: Structure, version: int = Version.V1, trailer: bytes = b""
) -> bytes:
    """An NVSP message as it is put into a packet, padded to the size of `version`.

    With a `trailer`, which follows the structure directly, nothing is padded, because
    `SendIndirectionTable.offset` counts from the message's start.
    """
    message = int(message_type).to_bytes(4, "little") + body.pack() + trailer
    if trailer:
        return message
    size = SUBCHANNEL_COMPLETE_SIZE if isinstance(body, SubchannelComplete) else packet_size(version)
    return message.ljust(size, b"\0")


def unpack_message(payload: bytes, version: int, sender: Sender) -> tuple[int, Structure]:
    """The type and the structure of a message that `sender` sent under `version`.

    Args:
        payload: the whole payload of a VMBus packet.
        version: the negotiated version, or 0 while there is none (then only `INIT` and its answer are legal).
        sender: the end that it came from; a host's message from a guest is a violation, and the reverse.

    Raises:
        RemoteProtocolError: truncated, of unknown type, too new for the version, or from the wrong end.
    """
    if len(payload) < 4:
        raise RemoteProtocolError(f"truncated NVSP message: {len(payload)} bytes")
    message_type = int.from_bytes(payload[:4], "little")
    info = MESSAGES.get(message_type)
    if info is None:
        raise RemoteProtocolError(f"unknown NVSP message type {message_type}")
    if not info.sender & sender:
        raise RemoteProtocolError(f"NVSP {MessageType(message_type).name} from the wrong end")
    if message_type not in (MessageType.INIT, MessageType.INIT_COMPLETE) and version < info.since:
        raise RemoteProtocolError(
            f"NVSP {MessageType(message_type).name} needs version 0x{info.since:x}, agreed is 0x{version:x}"
        )
    structure = info.structure
    if sender == Sender.HOST:
        structure = _HOST_VARIANTS.get(message_type, structure)
    return message_type, structure.unpack(payload, 4)

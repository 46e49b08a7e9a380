"""OIDs and NDIS objects: what a guest asks its adapter for, and in which structures the answers come.

Sources: NDIS headers as repeated in Linux ``drivers/net/hyperv/hyperv_net.h``, DPDK
``drivers/net/netvsc/ndis.h`` and OpenVMM ``netvsp/src/rndisprot.rs``.
"""

from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Annotated, Final

from vmbus.wire import U8, U16, U32, U64, Fixed, Structure, wire

MAX_LARGE_SEND: Final = 0xF53C
"""Largest LSO segment in bytes that Hyper-V advertises."""
MIN_LARGE_SEND_SEGMENTS: Final = 2
HASH_KEY_SIZE: Final = 40
ENCAPSULATION_8023: Final = 2
VENDOR_ID: Final = 0x0000155D
"""The first bytes of Microsoft's MAC prefix 00-15-5D, as the virtual switch of Windows answers."""


class Oid(IntEnum):
    """The OIDs that Linux, Windows, FreeBSD and DPDK use on this adapter."""

    GEN_SUPPORTED_LIST = 0x00010101
    GEN_HARDWARE_STATUS = 0x00010102
    GEN_MEDIA_SUPPORTED = 0x00010103
    GEN_MEDIA_IN_USE = 0x00010104
    GEN_MAXIMUM_LOOKAHEAD = 0x00010105
    GEN_MAXIMUM_FRAME_SIZE = 0x00010106
    GEN_LINK_SPEED = 0x00010107
    GEN_TRANSMIT_BUFFER_SPACE = 0x00010108
    GEN_RECEIVE_BUFFER_SPACE = 0x00010109
    GEN_TRANSMIT_BLOCK_SIZE = 0x0001010A
    GEN_RECEIVE_BLOCK_SIZE = 0x0001010B
    GEN_VENDOR_ID = 0x0001010C
    GEN_VENDOR_DESCRIPTION = 0x0001010D
    GEN_CURRENT_PACKET_FILTER = 0x0001010E
    GEN_CURRENT_LOOKAHEAD = 0x0001010F
    GEN_DRIVER_VERSION = 0x00010110
    GEN_MAXIMUM_TOTAL_SIZE = 0x00010111
    GEN_PROTOCOL_OPTIONS = 0x00010112
    GEN_MAC_OPTIONS = 0x00010113
    GEN_MEDIA_CONNECT_STATUS = 0x00010114
    GEN_MAXIMUM_SEND_PACKETS = 0x00010115
    GEN_VENDOR_DRIVER_VERSION = 0x00010116
    GEN_NETWORK_LAYER_ADDRESSES = 0x00010118
    GEN_RECEIVE_SCALE_CAPABILITIES = 0x00010203
    GEN_RECEIVE_SCALE_PARAMETERS = 0x00010204
    GEN_MAX_LINK_SPEED = 0x00010206
    GEN_LINK_STATE = 0x00010207
    GEN_LINK_PARAMETERS = 0x00010208
    GEN_RNDIS_CONFIG_PARAMETER = 0x0001021B
    GEN_XMIT_OK = 0x00020101
    GEN_RCV_OK = 0x00020102
    GEN_XMIT_ERROR = 0x00020103
    GEN_RCV_ERROR = 0x00020104
    GEN_RCV_NO_BUFFER = 0x00020105
    GEN_DIRECTED_BYTES_XMIT = 0x00020201
    GEN_DIRECTED_FRAMES_XMIT = 0x00020202
    GEN_MULTICAST_BYTES_XMIT = 0x00020203
    GEN_MULTICAST_FRAMES_XMIT = 0x00020204
    GEN_BROADCAST_BYTES_XMIT = 0x00020205
    GEN_BROADCAST_FRAMES_XMIT = 0x00020206
    GEN_DIRECTED_BYTES_RCV = 0x00020207
    GEN_DIRECTED_FRAMES_RCV = 0x00020208
    GEN_MULTICAST_BYTES_RCV = 0x00020209
    GEN_MULTICAST_FRAMES_RCV = 0x0002020A
    GEN_BROADCAST_BYTES_RCV = 0x0002020B
    GEN_BROADCAST_FRAMES_RCV = 0x0002020C
    GEN_FRIENDLY_NAME = 0x00020216
    GEN_BYTES_RCV = 0x00020219
    GEN_BYTES_XMIT = 0x0002021A
    GEN_RCV_DISCARDS = 0x0002021B
    GEN_XMIT_DISCARDS = 0x0002021C
    ETHERNET_PERMANENT_ADDRESS = 0x01010101
    ETHERNET_CURRENT_ADDRESS = 0x01010102
    ETHERNET_MULTICAST_LIST = 0x01010103
    ETHERNET_MAXIMUM_LIST_SIZE = 0x01010104
    ETHERNET_RCV_ERROR_ALIGNMENT = 0x01020101
    ETHERNET_XMIT_ONE_COLLISION = 0x01020102
    ETHERNET_XMIT_MORE_COLLISIONS = 0x01020103
    OFFLOAD_ENCAPSULATION = 0x0101010A
    TCP_OFFLOAD_CURRENT_CONFIG = 0xFC01020B
    TCP_OFFLOAD_PARAMETERS = 0xFC01020C
    TCP_OFFLOAD_HARDWARE_CAPABILITIES = 0xFC01020D


class PacketFilter(IntFlag):
    """`Oid.GEN_CURRENT_PACKET_FILTER`; 0 stops reception."""

    DIRECTED = 1
    MULTICAST = 2
    ALL_MULTICAST = 4
    BROADCAST = 8
    PROMISCUOUS = 32


class NdisObjectType(IntEnum):
    """`type` of an `NdisObjectHeader`."""

    DEFAULT = 0x80
    RSS_CAPABILITIES = 0x88
    RSS_PARAMETERS = 0x89
    OFFLOAD = 0xA7
    OFFLOAD_ENCAPSULATION = 0xA8


class HashTypes(IntFlag):
    """`ReceiveScaleParameters.hash_information`: function in bits 0 to 7, types above."""

    TOEPLITZ = 0x00001
    IPV4 = 0x00100
    TCP_IPV4 = 0x00200
    IPV6 = 0x00400
    IPV6_EX = 0x00800
    TCP_IPV6 = 0x01000
    TCP_IPV6_EX = 0x02000
    UDP_IPV4 = 0x04000
    UDP_IPV6 = 0x08000
    UDP_IPV6_EX = 0x10000


class RssFlags(IntFlag):
    """`ReceiveScaleParameters.flags`."""

    BASE_CPU_UNCHANGED = 1
    HASH_INFO_UNCHANGED = 2
    TABLE_UNCHANGED = 4
    KEY_UNCHANGED = 8
    DISABLE_RSS = 16


class MacOptions(IntFlag):
    """`Oid.GEN_MAC_OPTIONS`."""

    COPY_LOOKAHEAD_DATA = 1
    TRANSFERS_NOT_PEND = 4
    NO_LOOPBACK = 8
    PRIORITY_8021P = 0x40
    VLAN_8021Q = 0x200


RSS_CAPABILITY_TCP_IPV4: Final = 0x00000100
RSS_CAPABILITY_TCP_IPV6: Final = 0x00000200
RSS_CAPABILITY_UDP_IPV4: Final = 0x00000800
RSS_CAPABILITY_UDP_IPV6: Final = 0x00001000


@wire(size=4)
class NdisObjectHeader(Structure):
    """Start of every NDIS object."""

    type: U8
    revision: U8
    size: U16


@wire(size=18)
class ReceiveScaleCapabilities(Structure):
    """Answer to `Oid.GEN_RECEIVE_SCALE_CAPABILITIES`, revision 2."""

    header: NdisObjectHeader
    capabilities_flags: U32
    number_of_interrupt_messages: U32
    number_of_receive_queues: U32
    number_of_indirection_table_entries: U16


RSS_CAPABILITIES_MIN_SIZE: Final = 16
"""Bytes of revision 1 of `ReceiveScaleCapabilities`, which says nothing of the indirection table."""


@wire(size=40, offsets={"indirection_table_offset": 16, "hash_secret_key_offset": 24})
class ReceiveScaleParameters(Structure):
    """`Oid.GEN_RECEIVE_SCALE_PARAMETERS`; offsets count from its start, sizes are in bytes."""

    header: NdisObjectHeader
    flags: U16
    base_cpu_number: U16
    hash_information: U32
    indirection_table_size: U16
    reserved0: U16
    indirection_table_offset: U32
    hash_secret_key_size: U16
    reserved1: U16
    hash_secret_key_offset: U32
    processor_masks_offset: U32
    number_of_processor_masks: U32
    processor_masks_entry_size: U32


@wire(size=156, offsets={"lso_v2_ipv4_encapsulation": 80, "flags": 108, "rsc_ipv4": 144})
class NdisOffload(Structure):
    """What can be or is offloaded, revision 3 (156 bytes); revisions 2 and 1 are its first 144 and 112."""

    header: NdisObjectHeader
    ipv4_transmit_encapsulation: U32
    ipv4_transmit: U32
    ipv4_receive_encapsulation: U32
    ipv4_receive: U32
    ipv6_transmit_encapsulation: U32
    ipv6_transmit: U32
    ipv6_receive_encapsulation: U32
    ipv6_receive: U32
    lso_v1: Annotated[bytes, Fixed(16)]
    ipsec_v1: Annotated[bytes, Fixed(28)]
    lso_v2_ipv4_encapsulation: U32
    lso_v2_ipv4_max_size: U32
    lso_v2_ipv4_min_segments: U32
    lso_v2_ipv6_encapsulation: U32
    lso_v2_ipv6_max_size: U32
    lso_v2_ipv6_min_segments: U32
    lso_v2_ipv6_flags: U32
    flags: U32
    ipsec_v2: Annotated[bytes, Fixed(32)]
    rsc_ipv4: U8
    rsc_ipv6: U8
    reserved: U16
    encapsulated_gre_flags: U32
    encapsulated_gre_max_header: U32


OFFLOAD_SIZES: Final = {1: 112, 2: 144, 3: 156}
"""Bytes of `NdisOffload` by revision."""


@wire(size=28, offsets={"flags": 16, "rsc_ipv4": 22})
class OffloadParameters(Structure):
    """`Oid.TCP_OFFLOAD_PARAMETERS`; Linux sends 22 bytes up to NVSP 4 and 28 from NVSP 5 on."""

    header: NdisObjectHeader
    ipv4_checksum: U8
    tcp4_checksum: U8
    udp4_checksum: U8
    tcp6_checksum: U8
    udp6_checksum: U8
    lso_v1: U8
    ipsec_v1: U8
    lso_v2_ipv4: U8
    lso_v2_ipv6: U8
    tcp_connection_ipv4: U8
    tcp_connection_ipv6: U8
    reserved0: U8
    flags: U32
    ipsec_v2: U8
    ipsec_v2_ipv4: U8
    rsc_ipv4: U8
    rsc_ipv6: U8
    encapsulated_offload: U8
    encapsulation_types: U8
    reserved1: U16


OFFLOAD_PARAMETERS_MIN_SIZE: Final = 20


@wire(size=28)
class OffloadEncapsulation(Structure):
    """`Oid.OFFLOAD_ENCAPSULATION`."""

    header: NdisObjectHeader
    ipv4_enabled: U32
    ipv4_encapsulation_type: U32
    ipv4_header_size: U32
    ipv6_enabled: U32
    ipv6_encapsulation_type: U32
    ipv6_header_size: U32


@wire(size=40, offsets={"transmit_link_speed": 16})
class LinkState(Structure):
    """Answer to `Oid.GEN_LINK_STATE`; speeds in bit/s."""

    header: NdisObjectHeader
    media_connect_state: U32
    media_duplex_state: U32
    padding: U32
    transmit_link_speed: U64
    receive_link_speed: U64
    pause_functions: U32
    auto_negotiation_flags: U32


@wire(size=20)
class ConfigParameterInfo(Structure):
    """`Oid.GEN_RNDIS_CONFIG_PARAMETER`: a named UTF-16 parameter; Linux sets ``NetworkAddress`` with it."""

    name_offset: U32
    name_length: U32
    type: U32
    value_offset: U32
    value_length: U32


CONFIG_PARAMETER_STRING: Final = 2


@dataclass(slots=True)
class ChecksumOffload:
    """Which checksums are handled in one direction."""

    ipv4_header: bool = False
    tcp4: bool = False
    udp4: bool = False
    tcp6: bool = False
    udp6: bool = False

    def flags(self) -> tuple[int, int]:
        """The capability words of IPv4 and IPv6, two bits a feature (1: supported)."""
        any4 = self.ipv4_header or self.tcp4 or self.udp4
        ipv4 = any4 | self.tcp4 << 2 | self.tcp4 << 4 | self.udp4 << 6 | self.ipv4_header << 8
        ipv6 = (self.tcp6 or self.udp6) | self.tcp6 << 2 | self.tcp6 << 4 | self.udp6 << 6
        return ipv4, ipv6

    @classmethod
    def from_flags(cls, ipv4: int, ipv6: int) -> "ChecksumOffload":
        """From the capability words."""
        on4, on6 = (
            [bool(ipv4 >> shift & 3) for shift in (8, 4, 6)],
            [bool(ipv6 >> shift & 3) for shift in (4, 6)],
        )
        return cls(*on4, *on6)


@dataclass(slots=True)
class Offloads:
    """What an adapter can offload, or does at the moment."""

    transmit: ChecksumOffload
    receive: ChecksumOffload
    lso4: bool = False
    lso6: bool = False
    rsc4: bool = False
    rsc6: bool = False

    @classmethod
    def everything(cls) -> "Offloads":
        """All that this package implements."""
        return cls(ChecksumOffload(*[True] * 5), ChecksumOffload(*[True] * 5), True, True, True, True)

    @classmethod
    def nothing(cls) -> "Offloads":
        """No offload at all."""
        return cls(ChecksumOffload(), ChecksumOffload())

    def copy(self) -> "Offloads":
        """An independent copy."""
        return Offloads.unpack(self.pack(3))

    def pack(self, revision: int) -> bytes:
        """The `NdisOffload` object of this revision (1, 2 or 3)."""
        transmit4, transmit6 = self.transmit.flags()
        receive4, receive6 = self.receive.flags()
        size = OFFLOAD_SIZES[revision]
        return NdisOffload(
            header=NdisObjectHeader(NdisObjectType.OFFLOAD, revision, size),
            ipv4_transmit_encapsulation=ENCAPSULATION_8023,
            ipv4_transmit=transmit4,
            ipv4_receive_encapsulation=ENCAPSULATION_8023,
            ipv4_receive=receive4,
            ipv6_transmit_encapsulation=ENCAPSULATION_8023,
            ipv6_transmit=transmit6,
            ipv6_receive_encapsulation=ENCAPSULATION_8023,
            ipv6_receive=receive6,
            lso_v1=b"",
            ipsec_v1=b"",
            lso_v2_ipv4_encapsulation=ENCAPSULATION_8023 if self.lso4 else 0,
            lso_v2_ipv4_max_size=MAX_LARGE_SEND if self.lso4 else 0,
            lso_v2_ipv4_min_segments=MIN_LARGE_SEND_SEGMENTS if self.lso4 else 0,
            lso_v2_ipv6_encapsulation=ENCAPSULATION_8023 if self.lso6 else 0,
            lso_v2_ipv6_max_size=MAX_LARGE_SEND if self.lso6 else 0,
            lso_v2_ipv6_min_segments=MIN_LARGE_SEND_SEGMENTS if self.lso6 else 0,
            lso_v2_ipv6_flags=0x5 if self.lso6 else 0,  # extension headers and TCP options
            flags=0,
            ipsec_v2=b"",
            rsc_ipv4=self.rsc4,
            rsc_ipv6=self.rsc6,
            reserved=0,
            encapsulated_gre_flags=0,
            encapsulated_gre_max_header=0,
        ).pack()[:size]

    @classmethod
    def unpack(cls, data: bytes) -> "Offloads":
        """From an `NdisOffload` of any revision; what an older revision does not have is off.

        Raises:
            RemoteProtocolError: shorter than revision 1.
        """
        if len(data) >= OFFLOAD_SIZES[1]:
            data = data.ljust(NdisOffload.SIZE, b"\0")
        o = NdisOffload.unpack(data)
        return cls(
            ChecksumOffload.from_flags(o.ipv4_transmit, o.ipv6_transmit),
            ChecksumOffload.from_flags(o.ipv4_receive, o.ipv6_receive),
            bool(o.lso_v2_ipv4_encapsulation),
            bool(o.lso_v2_ipv6_encapsulation),
            bool(o.rsc_ipv4),
            bool(o.rsc_ipv6),
        )

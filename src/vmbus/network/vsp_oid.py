"""The host's answers to OID requests: what an adapter says of itself and what a guest may set.

Every request gets a status; nothing here raises for what a guest sends.
"""

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from vmbus.errors import RemoteProtocolError
from vmbus.network import oid as ndis
from vmbus.network.oid import (
    CONFIG_PARAMETER_STRING,
    ENCAPSULATION_8023,
    HASH_KEY_SIZE,
    OFFLOAD_PARAMETERS_MIN_SIZE,
    OFFLOAD_SIZES,
    VENDOR_ID,
    ConfigParameterInfo,
    HashTypes,
    LinkState,
    MacOptions,
    NdisObjectHeader,
    NdisObjectType,
    OffloadEncapsulation,
    OffloadParameters,
    Offloads,
    Oid,
    PacketFilter,
    ReceiveScaleCapabilities,
    ReceiveScaleParameters,
    RssFlags,
)
from vmbus.network.rndis import NdisStatus
from vmbus.network.rss import RssState, Toeplitz
from vmbus.network.wire import DEFAULT_FRAME, ETHERNET_HEADER, MAX_FRAME, Version

__all__ = ["AdapterConfig", "AdapterState", "AdapterStatistics", "OidServer"]

Counts = tuple[int, int, int, int, int, int]
_PROMISCUOUS: Final = int(PacketFilter.PROMISCUOUS)
_DIRECTED: Final = int(PacketFilter.DIRECTED)
_BROADCAST: Final = int(PacketFilter.BROADCAST)
_ALL_MULTICAST: Final = int(PacketFilter.ALL_MULTICAST)
_MULTICAST: Final = int(PacketFilter.MULTICAST)
MAX_MULTICAST: Final = 64
MAX_NAME: Final = 255
CHECKSUM_KEYWORDS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "*IPChecksumOffloadIPv4": "ipv4_header",
        "*TCPChecksumOffloadIPv4": "tcp4",
        "*TCPChecksumOffloadIPv6": "tcp6",
        "*UDPChecksumOffloadIPv4": "udp4",
        "*UDPChecksumOffloadIPv6": "udp6",
    }
)
SWITCH_KEYWORDS: Final[Mapping[str, str]] = MappingProxyType({"*LsoV2IPv4": "lso4", "*LsoV2IPv6": "lso6"})
"""NDIS's names of offloads, with which Windows passes on the settings of an adapter's properties (OpenVMM)."""
SUPPORTED_HASHES: Final = (
    HashTypes.TOEPLITZ
    | HashTypes.IPV4
    | HashTypes.TCP_IPV4
    | HashTypes.IPV6
    | HashTypes.TCP_IPV6
    | HashTypes.UDP_IPV4
    | HashTypes.UDP_IPV6
)


@dataclass(slots=True)
class AdapterConfig:
    """What the parent gives an adapter.

    Attributes:
        mac: permanent address, 6 bytes.
        versions: NVSP versions that are offered.
        max_frame: largest frame (MTU and 14) that a guest may ask for.
        link_speed: in bit/s, as reported.
        max_queues: channels, the primary one included.
        offloads: what is offered.
        friendly_name: Linux shows it as the interface's alias unless it is "Network Adapter".
        allow_mac_change: the guest may take another address (Hyper-V: MAC address spoofing).
        table_entries: entries of the RSS indirection table.

    Raises:
        ValueError: `mac` is no address of one station, or `max_queues` is not in 1 to 64.
    """

    mac: bytes
    versions: frozenset[int] = frozenset(Version)
    max_frame: int = MAX_FRAME
    link_speed: int = 10_000_000_000
    max_queues: int = 1
    offloads: Offloads = field(default_factory=Offloads.everything)
    friendly_name: str = "Network Adapter"
    allow_mac_change: bool = False
    table_entries: int = 128

    def __post_init__(self) -> None:
        if len(self.mac) != 6 or self.mac[0] & 1 or not any(self.mac):
            raise ValueError(f"{self.mac.hex(':')} is no unicast MAC address")
        if not 1 <= self.max_queues <= 64:
            raise ValueError(f"{self.max_queues} queues are not in 1 to 64 (VRSS_CHANNEL_MAX of Linux)")


@dataclass(slots=True)
class AdapterStatistics:
    """What an adapter counts, seen from the guest: `sent` left it, `received` came to it."""

    sent_directed: int = 0
    sent_multicast: int = 0
    sent_broadcast: int = 0
    sent_directed_bytes: int = 0
    sent_multicast_bytes: int = 0
    sent_broadcast_bytes: int = 0
    sent_errors: int = 0
    received_directed: int = 0
    received_multicast: int = 0
    received_broadcast: int = 0
    received_directed_bytes: int = 0
    received_multicast_bytes: int = 0
    received_broadcast_bytes: int = 0
    received_no_buffer: int = 0
    received_filtered: int = 0
    violations: int = 0

    def count_sent(self, frame: bytes) -> None:
        """A frame from the guest."""
        if not frame[0] & 1:
            self.sent_directed += 1
            self.sent_directed_bytes += len(frame)
        elif frame[:6] == b"\xff" * 6:
            self.sent_broadcast += 1
            self.sent_broadcast_bytes += len(frame)
        else:
            self.sent_multicast += 1
            self.sent_multicast_bytes += len(frame)

    def count_received(self, frame: bytes) -> None:
        """A frame to the guest."""
        if not frame[0] & 1:
            self.received_directed += 1
            self.received_directed_bytes += len(frame)
        elif frame[:6] == b"\xff" * 6:
            self.received_broadcast += 1
            self.received_broadcast_bytes += len(frame)
        else:
            self.received_multicast += 1
            self.received_multicast_bytes += len(frame)

    def add_sent(self, counts: Counts) -> None:
        """Many frames from the guest: directed, multicast, broadcast, and their bytes."""
        self.sent_directed += counts[0]
        self.sent_multicast += counts[1]
        self.sent_broadcast += counts[2]
        self.sent_directed_bytes += counts[3]
        self.sent_multicast_bytes += counts[4]
        self.sent_broadcast_bytes += counts[5]

    def add_received(self, counts: Counts) -> None:
        """Many frames to the guest."""
        self.received_directed += counts[0]
        self.received_multicast += counts[1]
        self.received_broadcast += counts[2]
        self.received_directed_bytes += counts[3]
        self.received_multicast_bytes += counts[4]
        self.received_broadcast_bytes += counts[5]

    @property
    def sent(self) -> int:
        """All frames from the guest."""
        return self.sent_directed + self.sent_multicast + self.sent_broadcast

    @property
    def received(self) -> int:
        """All frames to the guest."""
        return self.received_directed + self.received_multicast + self.received_broadcast


class AdapterState:
    """What belongs to an adapter, and so outlives the guest's opening and closing of its channels.

    Everything else (versions, filter, multicast list, MTU, offloads, RSS, buffers, sub-channels, the data path) belongs
    to a connection, and starts anew with each.

    Attributes:
        mac: the guest's address: as the parent gave it, or as it let the guest change it.
        addresses: what `PacketFilter.DIRECTED` lets through. In a new connection after a change both addresses count:
            a driver that reopens its adapter goes on with the one that it set (Linux: another MTU, ``ethtool -L``),
            one that is loaded anew reads the permanent one.
        link_up: whether the cable is connected.
        link_speed: in bit/s.
        vf_serial: of the associated virtual function, or None.
        statistics: counters over all connections.
    """

    __slots__ = ("addresses", "link_speed", "link_up", "mac", "permanent_mac", "statistics", "vf_serial")

    def __init__(self, config: AdapterConfig, statistics: AdapterStatistics | None = None) -> None:
        """The adapter as it is when the guest finds it."""
        self.permanent_mac = config.mac
        self.mac = config.mac
        self.addresses = frozenset({config.mac})
        self.link_up = True
        self.link_speed = config.link_speed
        self.vf_serial: int | None = None
        self.statistics = AdapterStatistics() if statistics is None else statistics

    def connected(self) -> None:
        """A connection begins."""
        self.addresses = frozenset({self.permanent_mac, self.mac})

    def set_mac(self, mac: bytes) -> None:
        """The guest takes another address."""
        self.mac = mac
        self.addresses = frozenset({mac})


class _OidError(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


Indication = tuple[int, bytes]


class OidServer:
    """Answers queries and carries out sets.

    Attributes:
        adapter: what outlives the connection.
        frame_size: largest frame with Ethernet header.
        ndis_version: (major, minor) of the guest; chooses among revisions of NDIS objects.
        packet_filter: `PacketFilter`.
        multicast: addresses the guest wants.
        capabilities: what could be offloaded.
        offloads: what is offloaded now; nothing until the guest asks, except what it does packet by packet.
        rss: hash and table, None while RSS is off.
    """

    def __init__(self, config: AdapterConfig, adapter: AdapterState) -> None:
        """`adapter` is shown to the guest as it stands when asked."""
        self.adapter = adapter
        adapter.connected()
        self.frame_size = DEFAULT_FRAME
        self.ndis_version = (6, 0)
        self.packet_filter = PacketFilter(0)
        self.multicast: frozenset[bytes] = frozenset()
        self.capabilities = config.offloads
        self.offloads = Offloads.nothing()
        self.rss: RssState | None = None
        self._max_queues = config.max_queues
        self._table_entries = config.table_entries
        self._friendly_name = config.friendly_name
        self._allow_mac_change = config.allow_mac_change
        self._queries = self._make_queries()
        self._sets: dict[int, Callable[[bytes], list[Indication]]] = {
            Oid.GEN_CURRENT_PACKET_FILTER: self._set_filter,
            Oid.ETHERNET_MULTICAST_LIST: self._set_multicast,
            Oid.GEN_CURRENT_LOOKAHEAD: self._accept,
            Oid.GEN_NETWORK_LAYER_ADDRESSES: self._accept,
            Oid.GEN_LINK_PARAMETERS: self._accept,
            Oid.GEN_PROTOCOL_OPTIONS: self._accept,
            Oid.GEN_RNDIS_CONFIG_PARAMETER: self._set_parameter,
            Oid.GEN_RECEIVE_SCALE_PARAMETERS: self._set_rss,
            Oid.TCP_OFFLOAD_PARAMETERS: self._set_offloads,
            Oid.OFFLOAD_ENCAPSULATION: self._set_encapsulation,
        }

    @property
    def link_up(self) -> bool:
        """Whether the cable is connected."""
        return self.adapter.link_up

    def reset(self) -> None:
        """Forget what a guest has to set again after RNDIS RESET or HALT."""
        self.packet_filter = PacketFilter(0)
        self.multicast = frozenset()

    def accepts(self, address: bytes) -> bool:
        """Whether the packet filter lets a frame with this destination address through."""
        wanted = int(self.packet_filter)
        if wanted & _PROMISCUOUS:
            return True
        if not address[0] & 1:
            return bool(wanted & _DIRECTED) and address in self.adapter.addresses
        if address == b"\xff" * 6:
            return bool(wanted & _BROADCAST)
        if wanted & _ALL_MULTICAST:
            return True
        return bool(wanted & _MULTICAST) and address in self.multicast

    def query(self, oid: int, data: bytes) -> tuple[int, bytes]:
        """The NDIS status and the answer to a query with input `data`."""
        handler = self._queries.get(oid)
        if handler is None:
            return NdisStatus.NOT_SUPPORTED, b""
        try:
            return NdisStatus.SUCCESS, handler(data)
        except _OidError as error:
            return error.status, b""

    def set(self, oid: int, data: bytes) -> tuple[int, list[Indication]]:
        """The NDIS status of a set, and (status, content) of indications that follow."""
        handler = self._sets.get(oid)
        if handler is None:
            return NdisStatus.NOT_SUPPORTED, []
        try:
            return NdisStatus.SUCCESS, handler(data)
        except _OidError as error:
            return error.status, []
        except RemoteProtocolError:
            return NdisStatus.INVALID_LENGTH, []

    def _make_queries(self) -> dict[int, Callable[[bytes], bytes]]:
        def u32(value: Callable[[], int]) -> Callable[[bytes], bytes]:
            return lambda _: (value() & 0xFFFFFFFF).to_bytes(4, "little")

        def u64(value: Callable[[], int]) -> Callable[[bytes], bytes]:
            # NDIS lets statistics be 4 or 8 bytes; who brings a buffer of 4 has no room for more.
            return lambda data: value().to_bytes(8, "little")[: 4 if len(data) == 4 else 8]

        def constant(value: int) -> Callable[[bytes], bytes]:
            return u32(lambda: value)

        def payload() -> int:
            return self.frame_size - ETHERNET_HEADER

        def frame() -> int:
            return self.frame_size

        adapter, s = self.adapter, self.adapter.statistics
        options = (
            MacOptions.COPY_LOOKAHEAD_DATA
            | MacOptions.TRANSFERS_NOT_PEND
            | MacOptions.NO_LOOPBACK
            | MacOptions.PRIORITY_8021P
            | MacOptions.VLAN_8021Q
        )
        return {
            Oid.GEN_SUPPORTED_LIST: self._supported,
            Oid.GEN_HARDWARE_STATUS: constant(0),
            Oid.GEN_MEDIA_SUPPORTED: constant(0),
            Oid.GEN_MEDIA_IN_USE: constant(0),
            Oid.GEN_MAXIMUM_LOOKAHEAD: u32(payload),
            Oid.GEN_CURRENT_LOOKAHEAD: u32(payload),
            Oid.GEN_MAXIMUM_FRAME_SIZE: u32(payload),
            Oid.GEN_MAXIMUM_TOTAL_SIZE: u32(frame),
            Oid.GEN_TRANSMIT_BLOCK_SIZE: u32(frame),
            Oid.GEN_RECEIVE_BLOCK_SIZE: u32(frame),
            Oid.GEN_LINK_SPEED: u32(lambda: min(adapter.link_speed // 100, 0xFFFFFFFF)),
            Oid.GEN_TRANSMIT_BUFFER_SPACE: constant(256 << 10),
            Oid.GEN_RECEIVE_BUFFER_SPACE: constant(256 << 10),
            Oid.GEN_VENDOR_ID: constant(VENDOR_ID),
            Oid.GEN_VENDOR_DESCRIPTION: lambda _: b"vmbus virtual network adapter\0",
            Oid.GEN_VENDOR_DRIVER_VERSION: constant(0x0100),
            Oid.GEN_DRIVER_VERSION: lambda _: b"\x00\x01",
            Oid.GEN_CURRENT_PACKET_FILTER: u32(lambda: self.packet_filter),
            Oid.GEN_MAC_OPTIONS: constant(options),
            Oid.GEN_MEDIA_CONNECT_STATUS: u32(lambda: 0 if adapter.link_up else 1),
            Oid.GEN_MAXIMUM_SEND_PACKETS: constant(0xFFFFFFFF),
            Oid.GEN_FRIENDLY_NAME: lambda _: self._friendly_name.encode("utf-16-le")[:510].ljust(512, b"\0"),
            Oid.GEN_MAX_LINK_SPEED: lambda _: struct.pack("<QQ", adapter.link_speed, adapter.link_speed),
            Oid.GEN_LINK_STATE: self._link_state,
            Oid.GEN_RECEIVE_SCALE_CAPABILITIES: self._rss_capabilities,
            Oid.ETHERNET_PERMANENT_ADDRESS: lambda _: adapter.permanent_mac,
            Oid.ETHERNET_CURRENT_ADDRESS: lambda _: adapter.mac,
            Oid.ETHERNET_MULTICAST_LIST: lambda _: b"".join(sorted(self.multicast)),
            Oid.ETHERNET_MAXIMUM_LIST_SIZE: constant(MAX_MULTICAST),
            Oid.ETHERNET_RCV_ERROR_ALIGNMENT: constant(0),
            Oid.ETHERNET_XMIT_ONE_COLLISION: constant(0),
            Oid.ETHERNET_XMIT_MORE_COLLISIONS: constant(0),
            Oid.OFFLOAD_ENCAPSULATION: self._encapsulation,
            Oid.TCP_OFFLOAD_HARDWARE_CAPABILITIES: lambda d: self.capabilities.pack(self._revision(d)),
            Oid.TCP_OFFLOAD_CURRENT_CONFIG: lambda d: self.offloads.pack(self._revision(d)),
            Oid.GEN_XMIT_OK: u64(lambda: s.sent),
            Oid.GEN_RCV_OK: u64(lambda: s.received),
            Oid.GEN_XMIT_ERROR: u64(lambda: s.sent_errors),
            Oid.GEN_RCV_ERROR: u64(lambda: 0),
            Oid.GEN_RCV_NO_BUFFER: u64(lambda: s.received_no_buffer),
            Oid.GEN_RCV_DISCARDS: u64(lambda: s.received_no_buffer),
            Oid.GEN_XMIT_DISCARDS: u64(lambda: s.sent_errors),
            Oid.GEN_DIRECTED_FRAMES_XMIT: u64(lambda: s.sent_directed),
            Oid.GEN_DIRECTED_BYTES_XMIT: u64(lambda: s.sent_directed_bytes),
            Oid.GEN_MULTICAST_FRAMES_XMIT: u64(lambda: s.sent_multicast),
            Oid.GEN_MULTICAST_BYTES_XMIT: u64(lambda: s.sent_multicast_bytes),
            Oid.GEN_BROADCAST_FRAMES_XMIT: u64(lambda: s.sent_broadcast),
            Oid.GEN_BROADCAST_BYTES_XMIT: u64(lambda: s.sent_broadcast_bytes),
            Oid.GEN_DIRECTED_FRAMES_RCV: u64(lambda: s.received_directed),
            Oid.GEN_DIRECTED_BYTES_RCV: u64(lambda: s.received_directed_bytes),
            Oid.GEN_MULTICAST_FRAMES_RCV: u64(lambda: s.received_multicast),
            Oid.GEN_MULTICAST_BYTES_RCV: u64(lambda: s.received_multicast_bytes),
            Oid.GEN_BROADCAST_FRAMES_RCV: u64(lambda: s.received_broadcast),
            Oid.GEN_BROADCAST_BYTES_RCV: u64(lambda: s.received_broadcast_bytes),
            Oid.GEN_BYTES_XMIT: u64(
                lambda: s.sent_directed_bytes + s.sent_multicast_bytes + s.sent_broadcast_bytes
            ),
            Oid.GEN_BYTES_RCV: u64(
                lambda: s.received_directed_bytes + s.received_multicast_bytes + s.received_broadcast_bytes
            ),
        }

    def _supported(self, _: bytes) -> bytes:
        return b"".join(int(oid).to_bytes(4, "little") for oid in sorted({*self._queries, *self._sets}))

    def _revision(self, data: bytes) -> int:
        """The revision of `NdisOffload` that the guest understands: what it asks with, else by NDIS version."""
        if len(data) >= NdisObjectHeader.SIZE and data[0] == NdisObjectType.OFFLOAD:
            return min(max(data[1], 1), max(OFFLOAD_SIZES))
        if self.ndis_version >= (6, 30):
            return 3
        return 2 if self.ndis_version >= (6, 1) else 1

    def _link_state(self, _: bytes) -> bytes:
        header = NdisObjectHeader(NdisObjectType.DEFAULT, 1, LinkState.SIZE)
        connected = 1 if self.link_up else 2  # MediaConnectStateConnected, …Disconnected
        speed = self.adapter.link_speed
        return LinkState(header, connected, 2, 0, speed, speed, 0, 0).pack()

    def _rss_capabilities(self, _: bytes) -> bytes:
        header = NdisObjectHeader(NdisObjectType.RSS_CAPABILITIES, 2, ReceiveScaleCapabilities.SIZE)
        flags = (
            ndis.RSS_CAPABILITY_TCP_IPV4
            | ndis.RSS_CAPABILITY_TCP_IPV6
            | ndis.RSS_CAPABILITY_UDP_IPV4
            | ndis.RSS_CAPABILITY_UDP_IPV6
            | HashTypes.TOEPLITZ
        )
        return ReceiveScaleCapabilities(header, flags, 1, self._max_queues, self._table_entries).pack()

    def _encapsulation(self, _: bytes) -> bytes:
        header = NdisObjectHeader(NdisObjectType.OFFLOAD_ENCAPSULATION, 1, OffloadEncapsulation.SIZE)
        kind, size = ENCAPSULATION_8023, ETHERNET_HEADER
        return OffloadEncapsulation(header, 1, kind, size, 1, kind, size).pack()

    def _accept(self, data: bytes) -> list[Indication]:
        """Settings without any effect on a virtual adapter."""
        del data
        return []

    def _set_filter(self, data: bytes) -> list[Indication]:
        if len(data) < 4:
            raise _OidError(NdisStatus.INVALID_LENGTH)
        self.packet_filter = PacketFilter(int.from_bytes(data[:4], "little") & 0x2F)
        return []

    def _set_multicast(self, data: bytes) -> list[Indication]:
        if len(data) % 6:
            raise _OidError(NdisStatus.INVALID_LENGTH)
        if len(data) // 6 > MAX_MULTICAST:
            raise _OidError(NdisStatus.MULTICAST_FULL)
        addresses = frozenset(data[at : at + 6] for at in range(0, len(data), 6))
        if not all(address[0] & 1 for address in addresses):
            raise _OidError(NdisStatus.INVALID_DATA)
        self.multicast = addresses
        return []

    def _set_parameter(self, data: bytes) -> list[Indication]:
        info = ConfigParameterInfo.unpack(data)
        name = _text(data, info.name_offset, info.name_length)
        if info.type != CONFIG_PARAMETER_STRING:
            return []
        value = _text(data, info.value_offset, info.value_length)
        if name == "NetworkAddress":
            if not self._allow_mac_change:
                raise _OidError(NdisStatus.NOT_SUPPORTED)
            try:
                mac = bytes.fromhex(value)
            except ValueError:
                raise _OidError(NdisStatus.INVALID_DATA) from None
            if len(mac) != 6 or mac[0] & 1 or not any(mac):
                raise _OidError(NdisStatus.INVALID_DATA)
            self.adapter.set_mac(mac)
        elif name in CHECKSUM_KEYWORDS or name in SWITCH_KEYWORDS:
            self._set_keyword(name, value)
        return []

    def _set_keyword(self, name: str, value: str) -> None:
        """An offload by its keyword: 0 off, else bit 0 is transmit and bit 1 receive, or the whole of it."""
        if value[:1] not in tuple("0123456789"):
            raise _OidError(NdisStatus.INVALID_DATA)
        number, new, able = int(value[:1]), self.offloads.copy(), self.capabilities
        if name in SWITCH_KEYWORDS:
            field_name = SWITCH_KEYWORDS[name]
            setattr(new, field_name, number != 0 and getattr(able, field_name))
        else:
            field_name = CHECKSUM_KEYWORDS[name]
            setattr(new.transmit, field_name, bool(number & 1) and getattr(able.transmit, field_name))
            setattr(new.receive, field_name, bool(number & 2) and getattr(able.receive, field_name))
        self.offloads = new

    def _set_rss(self, data: bytes) -> list[Indication]:
        # Linux and DPDK give the size of the structure in the header, others that of the whole; it is not looked at.
        # NDIS 6.0's structure is shorter: 28 bytes, without processor masks.
        p = ReceiveScaleParameters.unpack(data.ljust(ReceiveScaleParameters.SIZE, b"\0"))
        if p.flags & RssFlags.DISABLE_RSS or not p.hash_information & 0xFF:
            self.rss = None
            return []
        if p.hash_information & 0xFF != HashTypes.TOEPLITZ:
            raise _OidError(NdisStatus.NOT_SUPPORTED)
        before = self.rss
        if p.flags & RssFlags.HASH_INFO_UNCHANGED and before is not None:
            types = before.hash_types
        else:
            types = HashTypes(p.hash_information & SUPPORTED_HASHES)
        if p.flags & RssFlags.KEY_UNCHANGED and before is not None:
            toeplitz = before.toeplitz
        else:
            if p.hash_secret_key_size != HASH_KEY_SIZE:
                raise _OidError(NdisStatus.INVALID_DATA)
            toeplitz = Toeplitz(_part(data, p.hash_secret_key_offset, HASH_KEY_SIZE))
        if p.flags & RssFlags.TABLE_UNCHANGED and before is not None:
            table = before.table
        else:
            size = p.indirection_table_size
            if size == 0 or size % 4:
                raise _OidError(NdisStatus.INVALID_DATA)
            # DPDK sends 128 entries whatever was offered; as with OpenVMM, those that were offered count.
            size = min(size, 4 * self._table_entries)
            table = struct.unpack(f"<{size // 4}I", _part(data, p.indirection_table_offset, size))
            if any(queue >= self._max_queues for queue in table):
                raise _OidError(NdisStatus.INVALID_DATA)
        self.rss = RssState(types, table, toeplitz)
        return []

    def _set_offloads(self, data: bytes) -> list[Indication]:
        if len(data) < OFFLOAD_PARAMETERS_MIN_SIZE:
            raise _OidError(NdisStatus.INVALID_LENGTH)
        header = NdisObjectHeader.unpack(data)
        if (
            header.type != NdisObjectType.DEFAULT
            or header.revision < 1
            or not OFFLOAD_PARAMETERS_MIN_SIZE <= header.size <= len(data)
        ):
            raise _OidError(NdisStatus.INVALID_DATA)
        p = OffloadParameters.unpack(data[: header.size].ljust(OffloadParameters.SIZE, b"\0"))
        if p.lso_v1 == 2:
            raise _OidError(NdisStatus.NOT_SUPPORTED)
        new, able = self.offloads.copy(), self.capabilities
        for name, value in (
            ("ipv4_header", p.ipv4_checksum),
            ("tcp4", p.tcp4_checksum),
            ("udp4", p.udp4_checksum),
            ("tcp6", p.tcp6_checksum),
            ("udp6", p.udp6_checksum),
        ):
            if value > 4:
                raise _OidError(NdisStatus.INVALID_DATA)
            if value:  # 1 off, 2 transmit, 3 receive, 4 both
                setattr(new.transmit, name, value in (2, 4) and getattr(able.transmit, name))
                setattr(new.receive, name, value in (3, 4) and getattr(able.receive, name))
        for name, value in (
            ("lso4", p.lso_v2_ipv4),
            ("lso6", p.lso_v2_ipv6),
            ("rsc4", p.rsc_ipv4),
            ("rsc6", p.rsc_ipv6),
        ):
            if value > 2:
                raise _OidError(NdisStatus.INVALID_DATA)
            if value:
                setattr(new, name, value == 2 and getattr(able, name))
        self.offloads = new
        return [(NdisStatus.TASK_OFFLOAD_CURRENT_CONFIG, new.pack(self._revision(b"")))]

    def _set_encapsulation(self, data: bytes) -> list[Indication]:
        e = OffloadEncapsulation.unpack(data)
        if e.header.type != NdisObjectType.OFFLOAD_ENCAPSULATION:
            raise _OidError(NdisStatus.INVALID_DATA)
        for enabled, kind, size in (
            (e.ipv4_enabled, e.ipv4_encapsulation_type, e.ipv4_header_size),
            (e.ipv6_enabled, e.ipv6_encapsulation_type, e.ipv6_header_size),
        ):
            if enabled == 1 and (kind, size) != (ENCAPSULATION_8023, ETHERNET_HEADER):
                raise _OidError(NdisStatus.NOT_SUPPORTED)
        return []


def _part(data: bytes, offset: int, length: int) -> bytes:
    if offset > len(data) or length > len(data) - offset:
        raise _OidError(NdisStatus.INVALID_DATA)
    return data[offset : offset + length]


def _text(data: bytes, offset: int, length: int) -> str:
    if length > 2 * MAX_NAME:
        raise _OidError(NdisStatus.INVALID_DATA)
    try:
        return _part(data, offset, length).decode("utf-16-le").rstrip("\0")
    except UnicodeDecodeError:
        raise _OidError(NdisStatus.INVALID_DATA) from None

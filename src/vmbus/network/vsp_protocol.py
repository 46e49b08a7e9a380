"""The host's end of NVSP and RNDIS as a state machine without I/O.

`HostProtocol` takes NVSP messages and RNDIS control messages and answers with actions; `vmbus.network.vsp`
carries them out on a channel. Rings, memory, switch ports and time are not known here.

A message that breaks the protocol raises `RemoteProtocolError` and changes nothing; `HostProtocol.refusal` then
gives the completion, if any, that tells the guest so. No message ends the protocol: a guest that breaks it
hurts itself only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from vmbus.errors import RemoteProtocolError
from vmbus.network import rndis, wire
from vmbus.network.rndis import NdisStatus, RndisType
from vmbus.network.vsp_oid import AdapterConfig, AdapterState, OidServer
from vmbus.network.wire import (
    DEFAULT_FRAME,
    MAX_MDL_CHAIN,
    SEND_SECTION_SIZE,
    SEND_TABLE_ENTRIES,
    Capabilities,
    DataPath,
    MessageType,
    NvspStatus,
    Sender,
    SubchannelOperation,
    Version,
    pack_message,
    receive_section_size,
    unpack_message,
)
from vmbus.wire import Structure

__all__ = [
    "SWITCH_DATA_PATH_ID",
    "VF_ASSOCIATION_ID",
    "Action",
    "AdapterConfig",
    "BuffersRevoked",
    "Complete",
    "DataPathSwitched",
    "FilterChanged",
    "HostProtocol",
    "HostState",
    "InBand",
    "OfferSubchannels",
    "ReceiveBufferGranted",
    "RndisControl",
    "RndisState",
    "SendBufferGranted",
]

CONTROL_SECTIONS: Final = 16
"""Receive sections kept for control messages, so that data cannot starve them (as OpenVMM does)."""
MIN_RECEIVE_SECTIONS: Final = CONTROL_SECTIONS + 2
PACKETS_PER_MESSAGE: Final = 8
"""`InitializeComplete.max_packets_per_message` of Hyper-V and OpenVMM."""
PACKET_ALIGNMENT_FACTOR: Final = 3
VF_ASSOCIATION_ID: Final = 1 << 63
SWITCH_DATA_PATH_ID: Final = 1 << 63 | 1
"""Transaction ids of `SEND_VF_ASSOCIATION` and of our own `SWITCH_DATA_PATH` (as OpenVMM's), out of the way of those
of received packets."""


class HostState(IntEnum):
    """Progress of a channel; each state allows the messages of the next."""

    CREATED = 0
    NEGOTIATED = 1
    CONFIGURED = 2
    """The NDIS version is known."""
    READY = 3
    """There is a receive buffer: RNDIS messages may flow."""
    REVOKED = 4
    """A buffer was revoked: nothing but closing the channel follows."""


class RndisState(IntEnum):
    """State of the RNDIS device inside."""

    UNINITIALIZED = 0
    INITIALIZED = 1
    HALTED = 2


class Action:
    """Something that the protocol wants done; the order counts."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Complete(Action):
    """Complete the guest's packet with this payload (nothing, if it did not ask for a completion)."""

    payload: bytes


@dataclass(frozen=True, slots=True)
class InBand(Action):
    """Send this message of our own.

    With a transaction id its completion is asked for. Linux completes no in-band message, Windows does, and nothing
    waits for it.
    """

    payload: bytes
    transaction_id: int | None = None


@dataclass(frozen=True, slots=True)
class RndisControl(Action):
    """Send this RNDIS message through the receive buffer."""

    message: bytes


@dataclass(frozen=True, slots=True)
class ReceiveBufferGranted(Action):
    """Map the guest's receive buffer; sections lie one after the other from its start."""

    gpadl_id: int
    set_id: int
    section_size: int
    section_count: int


@dataclass(frozen=True, slots=True)
class SendBufferGranted(Action):
    """Map the guest's send buffer."""

    gpadl_id: int
    section_size: int
    section_count: int


@dataclass(frozen=True, slots=True)
class BuffersRevoked(Action):
    """Stop using a buffer, now."""

    receive: bool


@dataclass(frozen=True, slots=True)
class OfferSubchannels(Action):
    """Offer sub-channels 1 to `count` to the guest."""

    count: int


@dataclass(frozen=True, slots=True)
class FilterChanged(Action):
    """The guest wants other frames from now on; what waits and is not wanted any more must not follow."""


@dataclass(frozen=True, slots=True)
class DataPathSwitched(Action):
    """The guest uses the VF (True) or this adapter (False) from now on."""

    to_vf: bool


class HostProtocol:
    """State of one adapter's control protocol.

    Attributes:
        config: what the parent gives.
        state: progress of NVSP.
        version: agreed on, 0 before.
        ndis_version: (major, minor) that the guest follows.
        frame_size: largest frame, Ethernet header included.
        capabilities: what the guest said it can.
        rndis_state: progress of RNDIS.
        subchannels: granted so far.
        adapter: what outlives this connection: address, link, virtual function, statistics.
        data_path: what the guest uses.
        oids: answers OID requests and holds what they set.
    """

    def __init__(self, config: AdapterConfig, adapter: AdapterState | None = None) -> None:
        """A new connection of `adapter`; of one that no guest has seen if that is None."""
        self.config = config
        self.adapter = AdapterState(config) if adapter is None else adapter
        self.state = HostState.CREATED
        self.version = 0
        self.ndis_version = (6, 0)
        self.frame_size = DEFAULT_FRAME
        self.capabilities = Capabilities(0)
        self.rndis_state = RndisState.UNINITIALIZED
        self.subchannels = 0
        self.data_path = DataPath.SYNTHETIC
        self.oids = OidServer(config, self.adapter)
        self._configured = False
        self._receive_buffer: int | None = None
        self._send_buffer: int | None = None
        self._vf_announced: int | None = None

    @property
    def can_receive(self) -> bool:
        """Whether the guest may be given frames now."""
        return (
            self.state == HostState.READY
            and self.rndis_state == RndisState.INITIALIZED
            and self.oids.packet_filter != 0
            and self.oids.link_up
        )

    @property
    def rsc(self) -> tuple[bool, bool]:
        """Whether TCP over IPv4 and IPv6 may be coalesced for this guest now."""
        able = self.version >= Version.V6_1 and bool(self.capabilities & Capabilities.RSC)
        return able and self.oids.offloads.rsc4, able and self.oids.offloads.rsc6

    def receive_nvsp(self, payload: bytes, buffer_size: Callable[[int], int]) -> list[Action]:
        """Take an NVSP message other than `SEND_RNDIS_PACKET` and the completions of our own.

        Args:
            payload: of the packet.
            buffer_size: gives the size in bytes of a GPADL usable as a buffer, or raises RemoteProtocolError.

        Raises:
            RemoteProtocolError: malformed, unknown, or not allowed now; nothing changed.
        """
        message_type, body = unpack_message(payload, self.version, Sender.GUEST)
        if self.state == HostState.REVOKED and message_type not in (
            MessageType.REVOKE_RECEIVE_BUFFER,
            MessageType.REVOKE_SEND_BUFFER,
        ):
            raise RemoteProtocolError(f"NVSP message {message_type} after a buffer was revoked")
        match body:
            case wire.Init():
                return self._init(body)
            case wire.SendNdisConfig():
                return self._ndis_config(body)
            case wire.SendNdisVersion():
                self._expect(HostState.NEGOTIATED, message_type)
                self.ndis_version = body.ndis_major_version, body.ndis_minor_version
                self.oids.ndis_version = self.ndis_version
                self.state = HostState.CONFIGURED
                return [Complete(b"")]
            case wire.SendReceiveBuffer():
                return self._grant_receive_buffer(body, buffer_size)
            case wire.SendSendBuffer():
                return self._grant_send_buffer(body, buffer_size)
            case wire.RevokeReceiveBuffer():
                return self._revoke(receive=True)
            case wire.RevokeSendBuffer():
                return self._revoke(receive=False)
            case wire.SwitchDataPath():
                return self._switch_data_path(body)
            case wire.SubchannelRequest():
                return self._subchannels(body)
            case wire.OidQueryEx():
                answer = wire.OidQueryExComplete(NdisStatus.NOT_SUPPORTED, 0)
                return [Complete(self._pack(MessageType.OID_QUERY_EX_COMPLETE, answer))]
            case wire.PdApiRequest():
                refused = wire.PdApiComplete(body.operation, NdisStatus.NOT_SUPPORTED, b"")
                return [Complete(self._pack(MessageType.PD_API, refused))]
            case _:
                raise RemoteProtocolError(f"NVSP message {message_type} where none was expected")

    def refusal(self, payload: bytes) -> bytes:
        """The completion for a message that `receive_nvsp` refused: a failure where its kind has a status."""
        kind = int.from_bytes(payload[:4], "little")
        section = wire.ReceiveBufferSection(0, 0, 0, 0)
        failure = NvspStatus.FAILURE
        match kind:
            case MessageType.INIT:
                answer = wire.InitComplete(0xFFFFFFFF, MAX_MDL_CHAIN, failure)
                return self._pack(MessageType.INIT_COMPLETE, answer)
            case MessageType.SEND_RECEIVE_BUFFER:
                refused = wire.SendReceiveBufferComplete(failure, 0, section)
                return self._pack(MessageType.SEND_RECEIVE_BUFFER_COMPLETE, refused)
            case MessageType.SEND_SEND_BUFFER:
                return self._pack(
                    MessageType.SEND_SEND_BUFFER_COMPLETE, wire.SendSendBufferComplete(failure, 0)
                )
            case MessageType.SUB_CHANNEL:
                return self._pack(MessageType.SUB_CHANNEL, wire.SubchannelComplete(failure, 0))
            case MessageType.SEND_RNDIS_PACKET:
                return self.rndis_completion(failure)
            case _:
                return b""

    def rndis_completion(self, status: int) -> bytes:
        """The completion of a `SEND_RNDIS_PACKET`."""
        return self._pack(MessageType.SEND_RNDIS_PACKET_COMPLETE, wire.SendRndisPacketComplete(status))

    def rndis_packet(self, channel_type: int) -> bytes:
        """The NVSP message beside transfer pages."""
        body = wire.SendRndisPacket(channel_type, wire.NO_SECTION, 0)
        return self._pack(MessageType.SEND_RNDIS_PACKET, body)

    def receive_rndis(self, message: bytes) -> list[Action]:
        """Take an RNDIS control message (a copy of what the guest sent).

        Raises:
            RemoteProtocolError: malformed, unknown, or not allowed now; nothing changed.
        """
        message_type, body, data = rndis.unpack_control(message)
        if message_type == RndisType.INITIALIZE:
            assert isinstance(body, rndis.InitializeRequest)
            return self._initialize(body)
        # Before INITIALIZE, too, requests are answered, as by OpenVMM, but nothing is told and no frame comes.
        if self.rndis_state == RndisState.HALTED and message_type != RndisType.HALT:
            raise RemoteProtocolError(f"RNDIS message 0x{message_type:x} after HALT")
        match body:
            case rndis.QueryRequest():
                status, answer = self.oids.query(body.oid, data)
                done = rndis.QueryComplete(body.request_id, status, 0, 0)
                return [RndisControl(rndis.pack_control(RndisType.QUERY_COMPLETE, done, answer))]
            case rndis.SetRequest():
                status, indications = self.oids.set(body.oid, data)
                complete = rndis.SetComplete(body.request_id, status)
                return [
                    FilterChanged(),
                    RndisControl(rndis.pack_control(RndisType.SET_COMPLETE, complete)),
                    *(self._indication(kind, content) for kind, content in indications),
                ]
            case rndis.KeepaliveRequest() if message_type == RndisType.KEEPALIVE:
                alive = rndis.KeepaliveComplete(body.request_id, NdisStatus.SUCCESS)
                return [RndisControl(rndis.pack_control(RndisType.KEEPALIVE_COMPLETE, alive))]
            case rndis.ResetRequest():
                self.oids.reset()
                reset = rndis.ResetComplete(NdisStatus.SUCCESS, 1)
                return [
                    FilterChanged(),
                    RndisControl(rndis.pack_control(RndisType.RESET_COMPLETE, reset)),
                ]
            case rndis.HaltRequest():
                self.rndis_state = RndisState.HALTED
                self.oids.reset()
                return [FilterChanged()]
            case rndis.KeepaliveComplete():
                return []
            case _:
                raise RemoteProtocolError(f"RNDIS message 0x{message_type:x} from a guest")

    def set_link(self, up: bool) -> list[Action]:
        """Connect or disconnect the cable; tells an initialized guest."""
        changed = up != self.adapter.link_up
        self.adapter.link_up = up
        if not changed or self.rndis_state != RndisState.INITIALIZED:
            return []
        return [self._indication(NdisStatus.MEDIA_CONNECT if up else NdisStatus.MEDIA_DISCONNECT)]

    def set_link_speed(self, bits_per_second: int) -> list[Action]:
        """Change the reported speed; guests that said `Capabilities.TEAMING` are told."""
        self.adapter.link_speed = bits_per_second
        if (
            self.rndis_state != RndisState.INITIALIZED
            or self.version < Version.V5
            or not self.capabilities & Capabilities.TEAMING
        ):
            return []
        units = min(bits_per_second // 100, 0xFFFFFFFF)
        return [self._indication(NdisStatus.LINK_SPEED_CHANGE, units.to_bytes(4, "little"))]

    def network_changed(self) -> list[Action]:
        """Tell the guest to renew its addresses, as after a live migration to another network."""
        if self.rndis_state != RndisState.INITIALIZED:
            return []
        return [self._indication(NdisStatus.NETWORK_CHANGE)]

    def associate_vf(self, serial: int | None) -> list[Action]:
        """A virtual function with this serial number came (or, None, went).

        A guest that used it hears first that its data path is this adapter again (as from OpenVMM).
        """
        self.adapter.vf_serial = serial
        actions: list[Action] = []
        if serial is None and self.data_path == DataPath.VF:
            self.data_path = DataPath.SYNTHETIC
            body = wire.SwitchDataPath(DataPath.SYNTHETIC)
            message = self._pack(MessageType.SWITCH_DATA_PATH, body)
            actions = [InBand(message, SWITCH_DATA_PATH_ID), DataPathSwitched(False)]
        return actions + self._announce_vf()

    def _announce_vf(self) -> list[Action]:
        if (
            self.rndis_state != RndisState.INITIALIZED
            or self.version < Version.V4
            or not self.capabilities & Capabilities.SRIOV
            or self.adapter.vf_serial == self._vf_announced
        ):
            return []
        there = self.adapter.vf_serial is not None
        serial = self.adapter.vf_serial if self.adapter.vf_serial is not None else self._vf_announced
        self._vf_announced = self.adapter.vf_serial
        body = wire.SendVfAssociation(int(there), serial or 0)
        return [InBand(self._pack(MessageType.SEND_VF_ASSOCIATION, body), VF_ASSOCIATION_ID)]

    def close(self) -> list[Action]:
        """The channel is closed, and with it a virtual function that the guest used through it: it is off that now."""
        if self.data_path != DataPath.VF:
            return []
        self.data_path = DataPath.SYNTHETIC
        return [DataPathSwitched(False)]

    def send_table(self, channels: int) -> list[Action]:
        """Tell the guest over which of `channels` open channels to spread what it sends (NVSP 5 and later)."""
        if self.version < Version.V5 or self.state != HostState.READY or channels < 1:
            return []
        entries = b"".join((i % channels).to_bytes(4, "little") for i in range(SEND_TABLE_ENTRIES))
        body = wire.SendIndirectionTable(SEND_TABLE_ENTRIES, 4 + wire.SendIndirectionTable.SIZE)
        return [InBand(pack_message(MessageType.SEND_INDIRECTION_TABLE, body, self.version, entries))]

    def _pack(self, message_type: int, body: Structure) -> bytes:
        return pack_message(message_type, body, self.version)

    def _expect(self, state: HostState, message_type: int) -> None:
        if self.state != state:
            name = MessageType(message_type).name
            raise RemoteProtocolError(f"NVSP {name} in state {self.state.name}, not {state.name}")

    def _indication(self, status: int, data: bytes = b"") -> RndisControl:
        body = rndis.IndicateStatus(status, 0, 0)
        return RndisControl(rndis.pack_control(RndisType.INDICATE_STATUS, body, data))

    def _init(self, body: wire.Init) -> list[Action]:
        self._expect(HostState.CREATED, MessageType.INIT)
        version = body.protocol_version
        accepted = version in self.config.versions and version in Version.__members__.values()
        if accepted:
            self.version = version
            self.state = HostState.NEGOTIATED
        answer = wire.InitComplete(
            Version.V1 if accepted and version == Version.V1 else 0xFFFFFFFF,
            MAX_MDL_CHAIN,
            NvspStatus.SUCCESS if accepted else NvspStatus.NONE,
        )
        return [Complete(self._pack(MessageType.INIT_COMPLETE, answer))]

    def _ndis_config(self, body: wire.SendNdisConfig) -> list[Action]:
        # DPDK sends the NDIS version first, Linux the configuration first.
        if self.state not in (HostState.NEGOTIATED, HostState.CONFIGURED) or self._configured:
            raise RemoteProtocolError(f"NVSP SEND_NDIS_CONFIG in state {self.state.name}, or a second one")
        self._configured = True
        if DEFAULT_FRAME <= body.mtu <= self.config.max_frame:
            self.frame_size = body.mtu
        self.oids.frame_size = self.frame_size
        self.capabilities = Capabilities(body.capabilities & 0xFF)
        return [Complete(b"")]

    def _grant_receive_buffer(self, body: wire.SendReceiveBuffer, size: Callable[[int], int]) -> list[Action]:
        self._expect(HostState.CONFIGURED, MessageType.SEND_RECEIVE_BUFFER)
        section = receive_section_size(self.frame_size)
        count = size(body.gpadl_id) // section
        if count < MIN_RECEIVE_SECTIONS:
            raise RemoteProtocolError(f"receive buffer for {count} sections of {section} bytes is too small")
        self._receive_buffer = body.id
        self.state = HostState.READY
        answer = wire.SendReceiveBufferComplete(
            NvspStatus.SUCCESS, 1, wire.ReceiveBufferSection(0, section, count, section * count)
        )
        return [
            ReceiveBufferGranted(body.gpadl_id, body.id, section, count),
            Complete(self._pack(MessageType.SEND_RECEIVE_BUFFER_COMPLETE, answer)),
        ]

    def _grant_send_buffer(self, body: wire.SendSendBuffer, size: Callable[[int], int]) -> list[Action]:
        if self.state not in (HostState.CONFIGURED, HostState.READY) or self._send_buffer is not None:
            raise RemoteProtocolError(f"NVSP SEND_SEND_BUFFER in state {self.state.name}, or a second one")
        # Sections have one size. Of a buffer that is smaller, or not a multiple of it, what there is can be used.
        count = size(body.gpadl_id) // SEND_SECTION_SIZE
        self._send_buffer = body.id
        answer = wire.SendSendBufferComplete(NvspStatus.SUCCESS, SEND_SECTION_SIZE)
        return [
            SendBufferGranted(body.gpadl_id, SEND_SECTION_SIZE, count),
            Complete(self._pack(MessageType.SEND_SEND_BUFFER_COMPLETE, answer)),
        ]

    def _revoke(self, *, receive: bool) -> list[Action]:
        known = self._receive_buffer if receive else self._send_buffer
        if known is None:
            raise RemoteProtocolError("revoking a buffer that there is not")
        if receive:
            self._receive_buffer = None
        else:
            self._send_buffer = None
        self.state = HostState.REVOKED
        return [BuffersRevoked(receive), Complete(b"")]

    def _switch_data_path(self, body: wire.SwitchDataPath) -> list[Action]:
        if body.active_data_path not in (DataPath.SYNTHETIC, DataPath.VF):
            raise RemoteProtocolError(f"data path {body.active_data_path}")
        to_vf = body.active_data_path == DataPath.VF
        if to_vf and self.adapter.vf_serial is None:
            raise RemoteProtocolError("data path switched to a VF that there is not")
        changed = body.active_data_path != self.data_path
        self.data_path = DataPath(body.active_data_path)
        return [*([DataPathSwitched(to_vf)] if changed else []), Complete(b"")]

    def _subchannels(self, body: wire.SubchannelRequest) -> list[Action]:
        self._expect(HostState.READY, MessageType.SUB_CHANNEL)
        count = body.num_sub_channels
        if body.operation != SubchannelOperation.ALLOCATE or not 0 < count < self.config.max_queues:
            raise RemoteProtocolError(f"sub-channel operation {body.operation} for {count} channels")
        # Asked again, it gets what is missing: DPDK asks at each configuration, and waits for that many new ones.
        missing = max(0, count - self.subchannels)
        self.subchannels += missing
        answer = wire.SubchannelComplete(NvspStatus.SUCCESS, missing)
        done = Complete(self._pack(MessageType.SUB_CHANNEL, answer))
        return [done, OfferSubchannels(self.subchannels)] if missing else [done]

    def _initialize(self, body: rndis.InitializeRequest) -> list[Action]:
        if self.rndis_state == RndisState.INITIALIZED:
            raise RemoteProtocolError("RNDIS INITIALIZE twice")
        good = body.major_version == rndis.MAJOR_VERSION
        if good:
            self.rndis_state = RndisState.INITIALIZED
            self._vf_announced = None
        answer = rndis.InitializeComplete(
            request_id=body.request_id,
            status=NdisStatus.SUCCESS if good else NdisStatus.BAD_VERSION,
            major_version=rndis.MAJOR_VERSION,
            minor_version=rndis.MINOR_VERSION,
            device_flags=1,  # connectionless
            medium=0,  # 802.3
            max_packets_per_message=PACKETS_PER_MESSAGE,
            max_transfer_size=rndis.MAX_TRANSFER_SIZE,
            packet_alignment_factor=PACKET_ALIGNMENT_FACTOR,
            af_list_offset=0,
            af_list_size=0,
        )
        done = RndisControl(rndis.pack_control(RndisType.INITIALIZE_COMPLETE, answer))
        return [done, *self._announce_vf()]

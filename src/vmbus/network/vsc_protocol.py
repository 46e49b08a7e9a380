"""The guest's end of NVSP and RNDIS as a state machine without I/O.

What has to happen in order (bringing the adapter up, asking for an OID) is written as *scripts*: generators that
yield a `Step` and get its answer back. `GuestProtocol` runs any number of them; the caller sends what is in
`outbox` and hands in what the host sent. `vmbus.network.vsc` does that on a channel.

The host may be hostile: every answer is checked before it is used, and what nobody waits for is counted.
"""

import struct
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeAlias, TypeVar

from vmbus.errors import DeviceError, LocalProtocolError, RemoteProtocolError
from vmbus.network import rndis, wire
from vmbus.network.oid import (
    HASH_KEY_SIZE,
    OFFLOAD_SIZES,
    RSS_CAPABILITIES_MIN_SIZE,
    HashTypes,
    NdisObjectHeader,
    NdisObjectType,
    OffloadParameters,
    Offloads,
    Oid,
    PacketFilter,
    ReceiveScaleCapabilities,
    ReceiveScaleParameters,
)
from vmbus.network.rndis import NdisStatus, RndisType
from vmbus.network.wire import (
    ETHERNET_HEADER,
    NO_SECTION,
    RECEIVE_BUFFER_ID,
    SEND_BUFFER_ID,
    SEND_TABLE_ENTRIES,
    Capabilities,
    DataPath,
    MessageType,
    NvspStatus,
    Sender,
    SubchannelOperation,
    Version,
    pack_message,
    unpack_message,
)
from vmbus.wire import Structure

__all__ = ["Buffers", "GuestConfig", "GuestProtocol", "NvspStep", "RndisStep", "Script", "Step", "Task"]

MIN_SECTION: Final = 68
"""Smallest section a client can do anything with: the minimum MTU of IPv4, as in Linux's driver."""
MAX_ALIGNMENT_FACTOR: Final = 8
MAX_TABLE: Final = 256
PADDED_TABLE_AT: Final = 28
"""Where some hosts up to NVSP 6 really put the send table: behind the longest message, not where they say (Linux)."""
RECEIVE_FILTER: Final = PacketFilter.DIRECTED | PacketFilter.ALL_MULTICAST | PacketFilter.BROADCAST

T = TypeVar("T")


@dataclass(slots=True)
class NvspStep:
    """Send an NVSP message; the answer is the completion's payload, empty if none is asked for."""

    payload: bytes
    wants_answer: bool = True


@dataclass(slots=True)
class RndisStep:
    """Send an RNDIS control message; the answer is the message with the same request id."""

    message: bytes
    request_id: int


Step: TypeAlias = NvspStep | RndisStep
Script: TypeAlias = Generator[Step, bytes, T]


class Task(Generic[T]):
    """A running script.

    Attributes:
        done: it ended.
        error: what it ended with, if it failed.
    """

    def __init__(self, script: Script[T]) -> None:
        self._script = script
        self._result: T | None = None
        self.done = False
        self.error: Exception | None = None

    @property
    def result(self) -> T:
        """What the script returned; raises what it raised."""
        if self.error is not None:
            raise self.error
        return self._result  # type: ignore[return-value]

    def advance(self, answer: bytes | None) -> Step | None:
        """Go on with the answer to the last step; the next step, None at the end."""
        try:
            return next(self._script) if answer is None else self._script.send(answer)
        except StopIteration as stop:
            self._result = stop.value
        except (RemoteProtocolError, DeviceError) as error:
            self.error = error
        self.done = True
        return None


@dataclass(slots=True)
class Buffers:
    """The GPADLs that the guest made for its buffers; sizes in bytes. A send buffer of 0 bytes is not offered."""

    receive_gpadl: int
    receive_size: int
    send_gpadl: int = 0
    send_size: int = 0


@dataclass(slots=True)
class GuestConfig:
    """How a guest wants its adapter.

    Attributes:
        versions: NVSP versions to try, best first.
        mtu: IP packets of up to this size.
        capabilities: what the guest says it can; cut down to what a version knows.
        offloads: what to ask for, as far as the host can.
        queues: channels to use, if the host allows more than one.
        ndis_version: None for what Linux says: 6.1 up to NVSP 4, 6.30 from NVSP 5 on.
    """

    versions: Sequence[int] = tuple(sorted(Version, reverse=True))
    mtu: int = 1500
    capabilities: Capabilities = Capabilities.IEEE_8021Q
    offloads: Offloads = field(default_factory=Offloads.nothing)
    queues: int = 1
    ndis_version: tuple[int, int] | None = None


class GuestProtocol:
    """State of one adapter as the guest sees it.

    Attributes:
        config: what was asked for.
        version: agreed on, 0 before.
        mac: permanent address.
        mtu: the smaller of what was asked for and what the host allows.
        link_up: last heard.
        link_speed: in bit/s, 0 if unknown.
        friendly_name: of the adapter, if the host tells.
        offloads: what is in use.
        receive_section: (size, count) of the receive buffer's sections.
        send_section: (size, count) of the send buffer's sections.
        packets_per_message: most packet messages in one RNDIS transfer.
        alignment: bytes to align packet messages to.
        max_queues: what the host could do.
        subchannels: how many the host will offer.
        send_table: channel numbers, by hash.
        vf_serial: of the virtual function the host announced, or None.
        network_changes: how often the host said that the network changed.
        violations: messages that broke the protocol or that nobody waited for.
        outbox: (task key, step) to be sent, oldest first; the caller removes what it sent.
    """

    def __init__(self, config: GuestConfig) -> None:
        self.config = config
        self.version = 0
        self.mac = bytes(6)
        self.mtu = config.mtu
        self.link_up = False
        self.link_speed = 0
        self.friendly_name = ""
        self.offloads = Offloads.nothing()
        self.receive_section = (0, 0)
        self.send_section = (0, 0)
        self.packets_per_message = 1
        self.alignment = 1
        self.max_queues = 1
        self.table_entries = 0
        self.subchannels = 0
        self.send_table: tuple[int, ...] = (0,) * SEND_TABLE_ENTRIES
        self.vf_serial: int | None = None
        self.network_changes = 0
        self.violations = 0
        self.outbox: list[tuple[int, Step]] = []
        self._request_id = 0
        self._task_id = 0
        self._nvsp: dict[int, Task[Any]] = {}
        self._rndis: dict[int, Task[Any]] = {}

    # ---- running scripts

    def run(self, script: Script[T]) -> Task[T]:
        """Start a script; what it has to send is in `outbox` afterwards."""
        task = Task(script)
        self._advance(task, None)
        return task

    def abandon(self, task: Task[Any]) -> None:
        """Forget a script that nobody waits for any more; a late answer counts as a violation."""
        self.outbox = [(key, step) for key, step in self.outbox if self._nvsp.get(key) is not task]
        for waiting in (self._nvsp, self._rndis):
            for key in [key for key, other in waiting.items() if other is task]:
                del waiting[key]

    def _advance(self, task: Task[Any], answer: bytes | None) -> None:
        step = task.advance(answer)
        while isinstance(step, NvspStep) and not step.wants_answer:
            self.outbox.append((0, step))
            step = task.advance(b"")
        if isinstance(step, NvspStep):
            self._task_id += 1
            self._nvsp[self._task_id] = task
            self.outbox.append((self._task_id, step))
        elif isinstance(step, RndisStep):
            self._rndis[step.request_id] = task
            self.outbox.append((0, step))

    def receive_completion(self, key: int, payload: bytes) -> None:
        """The host completed the NVSP message with this task key."""
        task = self._nvsp.pop(key, None)
        if task is None:
            self.violations += 1
        else:
            self._advance(task, payload)

    def receive_nvsp(self, payload: bytes) -> None:
        """Take an in-band message of the host.

        Raises:
            RemoteProtocolError: malformed, or nothing that a host sends on its own.
        """
        message_type, body = unpack_message(payload, self.version, Sender.HOST)
        match body:
            case wire.SendVfAssociation():
                self.vf_serial = body.serial_number if body.allocated else None
            case wire.SendIndirectionTable():
                size = 4 * SEND_TABLE_ENTRIES
                offset = body.offset
                if self.version <= Version.V6 and len(payload) >= PADDED_TABLE_AT + size:
                    offset = PADDED_TABLE_AT
                if body.count != SEND_TABLE_ENTRIES or offset > len(payload) - size:
                    raise RemoteProtocolError(f"send table of {body.count} entries at {offset}")
                self.send_table = struct.unpack_from(f"<{SEND_TABLE_ENTRIES}I", payload, offset)
            case wire.SwitchDataPath() if body.active_data_path == DataPath.SYNTHETIC:
                pass
            case _:
                raise RemoteProtocolError(f"NVSP message {message_type} from a host without being asked")

    def receive_rndis(self, message: bytes) -> None:
        """Take an RNDIS control message of the host (a copy of what it wrote).

        Raises:
            RemoteProtocolError: malformed, or nothing that a host sends.
        """
        message_type, body, data = rndis.unpack_control(message)
        match body:
            case rndis.IndicateStatus():
                self._indicated(body.status, data)
            case rndis.KeepaliveRequest() if message_type == RndisType.KEEPALIVE:
                answer = rndis.KeepaliveComplete(body.request_id, NdisStatus.SUCCESS)
                packed = rndis.pack_control(RndisType.KEEPALIVE_COMPLETE, answer)
                self.outbox.append((0, RndisStep(packed, 0)))
            case _:
                # A reset has no request id; there is one at a time, waiting under 0.
                key = getattr(body, "request_id", 0)
                if message_type < RndisType.INITIALIZE_COMPLETE or key not in self._rndis:
                    raise RemoteProtocolError(f"RNDIS message 0x{message_type:x} that nobody waits for")
                self._advance(self._rndis.pop(key), message)

    def _indicated(self, status: int, data: bytes) -> None:
        if status in (NdisStatus.MEDIA_CONNECT, NdisStatus.MEDIA_DISCONNECT):
            self.link_up = status == NdisStatus.MEDIA_CONNECT
        elif status == NdisStatus.NETWORK_CHANGE:
            self.network_changes += 1
        elif status == NdisStatus.LINK_SPEED_CHANGE:
            if len(data) < 4:
                raise RemoteProtocolError("link speed change without speed")
            self.link_speed = int.from_bytes(data[:4], "little") * 100
        elif status == NdisStatus.TASK_OFFLOAD_CURRENT_CONFIG:
            self.offloads = Offloads.unpack(data)

    def rndis_packet(self, channel_type: int, section: int = NO_SECTION, size: int = 0) -> bytes:
        """The NVSP message that says where an RNDIS message is."""
        return self._pack(MessageType.SEND_RNDIS_PACKET, wire.SendRndisPacket(channel_type, section, size))

    @property
    def receive_completion_payload(self) -> bytes:
        """The completion of a packet of the host's."""
        body = wire.SendRndisPacketComplete(NvspStatus.SUCCESS)
        return int(MessageType.SEND_RNDIS_PACKET_COMPLETE).to_bytes(4, "little") + body.pack()

    def _pack(self, message_type: MessageType, body: Structure) -> bytes:
        if wire.MESSAGES[message_type].since > self.version:
            raise LocalProtocolError(f"NVSP {message_type.name} is unknown in version 0x{self.version:x}")
        return pack_message(message_type, body, self.version)

    # ---- scripts

    def bring_up(self, buffers: Buffers) -> Script[None]:
        """Negotiate, hand over the buffers, start RNDIS, ask for what a driver needs, open the filter."""
        yield from self._negotiate()
        yield from self._hand_over(buffers)
        yield from self._initialize()
        yield from self._discover()
        yield from self._choose_offloads()
        if self.version >= Version.V5:
            yield from self._discover_queues()
        yield from self.set_filter(RECEIVE_FILTER)

    def _negotiate(self) -> Script[None]:
        for version in self.config.versions:
            # Messages are as long as the version asked for says: Linux always sends the longest.
            init = pack_message(MessageType.INIT, wire.Init(version, version), Version.V6_1)
            answer = yield from self._ask(init, MessageType.INIT_COMPLETE, wire.InitComplete)
            if answer.status == NvspStatus.SUCCESS:
                self.version = version
                break
        else:
            raise DeviceError("the host accepts none of our NVSP versions")
        if self.version >= Version.V2:
            wanted = self.config.capabilities
            if self.version < Version.V5:
                wanted &= ~(Capabilities.SRIOV | Capabilities.TEAMING)
            if self.version < Version.V6_1:
                wanted &= ~Capabilities.RSC
            config = wire.SendNdisConfig(self.config.mtu + ETHERNET_HEADER, 0, wanted)
            yield NvspStep(self._pack(MessageType.SEND_NDIS_CONFIG, config), False)
        elif self.mtu > 1500:
            self.mtu = 1500
        major, minor = self.config.ndis_version or ((6, 1) if self.version < Version.V5 else (6, 30))
        yield NvspStep(self._pack(MessageType.SEND_NDIS_VERSION, wire.SendNdisVersion(major, minor)), False)

    def _hand_over(self, buffers: Buffers) -> Script[None]:
        request = wire.SendReceiveBuffer(buffers.receive_gpadl, RECEIVE_BUFFER_ID, 0)
        payload = self._pack(MessageType.SEND_RECEIVE_BUFFER, request)
        granted = yield from self._ask(
            payload, MessageType.SEND_RECEIVE_BUFFER_COMPLETE, wire.SendReceiveBufferComplete
        )
        section = granted.section
        if granted.status != NvspStatus.SUCCESS:
            raise DeviceError(f"the host refused our receive buffer with status {granted.status}")
        if (
            granted.num_sections != 1
            or section.offset != 0
            or section.sub_allocation_size < MIN_SECTION
            or section.num_sub_allocations == 0
            or section.sub_allocation_size * section.num_sub_allocations > buffers.receive_size
        ):
            raise RemoteProtocolError(f"impossible division of the receive buffer: {granted}")
        self.receive_section = section.sub_allocation_size, section.num_sub_allocations
        if buffers.send_size:
            message = wire.SendSendBuffer(buffers.send_gpadl, SEND_BUFFER_ID, 0)
            sent = yield from self._ask(
                self._pack(MessageType.SEND_SEND_BUFFER, message),
                MessageType.SEND_SEND_BUFFER_COMPLETE,
                wire.SendSendBufferComplete,
            )
            if sent.status != NvspStatus.SUCCESS:
                raise DeviceError(f"the host refused our send buffer with status {sent.status}")
            if not MIN_SECTION <= sent.section_size <= buffers.send_size:
                raise RemoteProtocolError(f"impossible section size {sent.section_size} of the send buffer")
            self.send_section = sent.section_size, buffers.send_size // sent.section_size

    def _initialize(self) -> Script[None]:
        request_id = self._next_request()
        request = rndis.InitializeRequest(request_id, rndis.MAJOR_VERSION, rndis.MINOR_VERSION, 0x4000)
        message = rndis.pack_control(RndisType.INITIALIZE, request)
        body, _ = yield from self._exchange(RndisType.INITIALIZE_COMPLETE, message, request_id)
        assert isinstance(body, rndis.InitializeComplete)
        if body.status != NdisStatus.SUCCESS:
            raise DeviceError(f"the host refused RNDIS with status 0x{body.status:x}")
        if body.packet_alignment_factor > MAX_ALIGNMENT_FACTOR:
            raise RemoteProtocolError(f"RNDIS alignment factor {body.packet_alignment_factor}")
        self.packets_per_message = max(1, min(body.max_packets_per_message, 64))
        self.alignment = 1 << body.packet_alignment_factor

    def _discover(self) -> Script[None]:
        # Only the address is indispensable; hosts differ in what else they know, and Linux asks as hopefully.
        mtu = yield from self._optional(Oid.GEN_MAXIMUM_FRAME_SIZE, self.mtu)
        if mtu < MIN_SECTION:
            raise RemoteProtocolError(f"host's MTU of {mtu}")
        self.mtu = min(self.mtu, mtu)
        self.mac = yield from self.query(Oid.ETHERNET_PERMANENT_ADDRESS, size=6)
        disconnected = yield from self._optional(Oid.GEN_MEDIA_CONNECT_STATUS, 0)
        self.link_up = not disconnected
        speed = yield from self._optional(Oid.GEN_LINK_SPEED, 0)
        self.link_speed = speed * 100
        try:
            name = yield from self.query(Oid.GEN_FRIENDLY_NAME)
        except DeviceError:
            return
        self.friendly_name = name[:512].decode("utf-16-le", "replace").split("\0")[0]

    def _optional(self, oid: int, default: int) -> Script[int]:
        """The number that is the answer to an OID; the default if the host does not know it."""
        try:
            answer = yield from self.query(oid, size=4)
        except DeviceError:
            return default
        return int.from_bytes(answer, "little")

    def _choose_offloads(self) -> Script[None]:
        if self.version >= Version.V5:
            revision = 3
        else:
            revision = 2 if self.version >= Version.V4 else 1
        header = NdisObjectHeader(NdisObjectType.OFFLOAD, revision, OFFLOAD_SIZES[revision])
        data = header.pack().ljust(OFFLOAD_SIZES[revision], b"\0")
        try:
            answer = yield from self.query(Oid.TCP_OFFLOAD_HARDWARE_CAPABILITIES, data)
        except DeviceError:
            return  # a host without offloads, such as one of NDIS 5
        found = NdisObjectHeader.unpack(answer)
        if found.type != NdisObjectType.OFFLOAD or not OFFLOAD_SIZES[1] <= found.size <= len(answer):
            raise RemoteProtocolError(f"offload capabilities: {found} in {len(answer)} bytes")
        able = Offloads.unpack(answer[: min(found.size, OFFLOAD_SIZES[3])])
        wanted = self.config.offloads
        chosen = Offloads.nothing()
        for direction in ("transmit", "receive"):
            mine, theirs = getattr(wanted, direction), getattr(able, direction)
            for name in ("ipv4_header", "tcp4", "udp4", "tcp6", "udp6"):
                setattr(getattr(chosen, direction), name, getattr(mine, name) and getattr(theirs, name))
        for name in ("lso4", "lso6", "rsc4", "rsc6"):
            setattr(chosen, name, getattr(wanted, name) and getattr(able, name))
        yield from self.set_offloads(chosen)

    def set_offloads(self, wanted: Offloads) -> Script[None]:
        """Ask the host to do these offloads and no others."""

        def both(name: str) -> int:
            # 1 off, 2 transmit only, 3 receive only, 4 both
            return 1 + bool(getattr(wanted.transmit, name)) + 2 * bool(getattr(wanted.receive, name))

        long = self.version >= Version.V5
        size = OffloadParameters.SIZE if long else 22
        parameters = OffloadParameters(
            header=NdisObjectHeader(NdisObjectType.DEFAULT, 3, size),
            ipv4_checksum=both("ipv4_header"),
            tcp4_checksum=both("tcp4"),
            udp4_checksum=both("udp4") if long else 0,
            tcp6_checksum=both("tcp6"),
            udp6_checksum=both("udp6") if long else 0,
            lso_v1=0,
            ipsec_v1=0,
            lso_v2_ipv4=1 + wanted.lso4,
            lso_v2_ipv6=1 + wanted.lso6,
            tcp_connection_ipv4=0,
            tcp_connection_ipv6=0,
            reserved0=0,
            flags=0,
            ipsec_v2=0,
            ipsec_v2_ipv4=0,
            rsc_ipv4=1 + wanted.rsc4,
            rsc_ipv6=1 + wanted.rsc6,
            encapsulated_offload=0,
            encapsulation_types=0,
            reserved1=0,
        )
        yield from self.set(Oid.TCP_OFFLOAD_PARAMETERS, parameters.pack()[:size])
        self.offloads = wanted

    def _discover_queues(self) -> Script[None]:
        header = NdisObjectHeader(NdisObjectType.RSS_CAPABILITIES, 2, ReceiveScaleCapabilities.SIZE)
        request = header.pack().ljust(ReceiveScaleCapabilities.SIZE, b"\0")
        try:
            answer = yield from self.query(Oid.GEN_RECEIVE_SCALE_CAPABILITIES, request)
        except DeviceError:
            return  # one queue
        if len(answer) >= RSS_CAPABILITIES_MIN_SIZE:
            answer = answer.ljust(ReceiveScaleCapabilities.SIZE, b"\0")
        found = ReceiveScaleCapabilities.unpack(answer)
        self.max_queues = max(1, min(found.number_of_receive_queues, 64))
        entries = found.number_of_indirection_table_entries
        self.table_entries = entries if 0 < entries <= MAX_TABLE else 128

    def open_subchannels(self, count: int) -> Script[int]:
        """Ask for sub-channels; how many more the host will offer: none before NVSP 5, or if it has done so."""
        if self.version < Version.V5:
            return 0
        request = wire.SubchannelRequest(SubchannelOperation.ALLOCATE, count)
        payload = self._pack(MessageType.SUB_CHANNEL, request)
        answer = yield from self._ask(payload, MessageType.SUB_CHANNEL, wire.SubchannelComplete)
        if answer.status != NvspStatus.SUCCESS:
            raise DeviceError(f"the host refused {count} sub-channels with status {answer.status}")
        if answer.num_sub_channels > count:
            raise RemoteProtocolError(f"{answer.num_sub_channels} sub-channels when {count} were asked for")
        self.subchannels += answer.num_sub_channels
        return int(answer.num_sub_channels)

    def set_rss(self, table: Sequence[int], key: bytes, types: HashTypes, flags: int = 0) -> Script[None]:
        """Set hash types, key and indirection table."""
        header = NdisObjectHeader(NdisObjectType.RSS_PARAMETERS, 2, ReceiveScaleParameters.SIZE)
        start = ReceiveScaleParameters.SIZE
        parameters = ReceiveScaleParameters(
            header=header,
            flags=flags,
            base_cpu_number=0,
            hash_information=types | HashTypes.TOEPLITZ,
            indirection_table_size=4 * len(table),
            reserved0=0,
            indirection_table_offset=start,
            hash_secret_key_size=HASH_KEY_SIZE,
            reserved1=0,
            hash_secret_key_offset=start + 4 * len(table),
            processor_masks_offset=0,
            number_of_processor_masks=0,
            processor_masks_entry_size=0,
        )
        data = parameters.pack() + struct.pack(f"<{len(table)}I", *table) + key
        yield from self.set(Oid.GEN_RECEIVE_SCALE_PARAMETERS, data)

    def set_filter(self, wanted: int) -> Script[None]:
        """Choose which frames are received (`PacketFilter`)."""
        yield from self.set(Oid.GEN_CURRENT_PACKET_FILTER, int(wanted).to_bytes(4, "little"))

    def query(self, oid: int, data: bytes = b"", *, size: int | None = None) -> Script[bytes]:
        """Query an OID; with `size` the answer must have exactly so many bytes.

        Raises:
            DeviceError: the host answers with a status other than success.
        """
        request_id = self._next_request()
        message = rndis.pack_control(RndisType.QUERY, rndis.QueryRequest(request_id, oid, 0, 0, 0), data)
        body, answer = yield from self._exchange(RndisType.QUERY_COMPLETE, message, request_id)
        assert isinstance(body, rndis.QueryComplete)
        if body.status != NdisStatus.SUCCESS:
            raise DeviceError(f"OID 0x{oid:x}: status 0x{body.status:x}")
        if size is not None and len(answer) != size:
            raise RemoteProtocolError(f"OID 0x{oid:x}: {len(answer)} bytes, not {size}")
        return answer

    def set(self, oid: int, data: bytes) -> Script[None]:
        """Set an OID.

        Raises:
            DeviceError: the host answers with a status other than success.
        """
        request_id = self._next_request()
        message = rndis.pack_control(RndisType.SET, rndis.SetRequest(request_id, oid, 0, 0, 0), data)
        body, _ = yield from self._exchange(RndisType.SET_COMPLETE, message, request_id)
        assert isinstance(body, rndis.SetComplete)
        if body.status != NdisStatus.SUCCESS:
            raise DeviceError(f"setting OID 0x{oid:x}: status 0x{body.status:x}")

    def keepalive(self) -> Script[None]:
        """Ask whether the host is there."""
        request_id = self._next_request()
        message = rndis.pack_control(RndisType.KEEPALIVE, rndis.KeepaliveRequest(request_id))
        yield from self._exchange(RndisType.KEEPALIVE_COMPLETE, message, request_id)

    def reset(self) -> Script[bool]:
        """Reset RNDIS; whether filter and multicast list have to be set again."""
        message = rndis.pack_control(RndisType.RESET, rndis.ResetRequest(0))
        body, _ = yield from self._exchange(RndisType.RESET_COMPLETE, message, 0)
        assert isinstance(body, rndis.ResetComplete)
        return bool(body.addressing_reset)

    def switch_data_path(self, to_vf: bool) -> Script[None]:
        """Use the virtual function, or this adapter again."""
        body = wire.SwitchDataPath(DataPath.VF if to_vf else DataPath.SYNTHETIC)
        yield NvspStep(self._pack(MessageType.SWITCH_DATA_PATH, body))

    def shut_down(self, *, send_buffer: bool) -> list[Step]:
        """Halt RNDIS and revoke the buffers: steps without answers."""
        halt = rndis.pack_control(RndisType.HALT, rndis.HaltRequest(self._next_request()))
        receive = self._pack(
            MessageType.REVOKE_RECEIVE_BUFFER, wire.RevokeReceiveBuffer(RECEIVE_BUFFER_ID, 0)
        )
        steps: list[Step] = [RndisStep(halt, 0), NvspStep(receive, False)]
        if send_buffer:
            send = self._pack(MessageType.REVOKE_SEND_BUFFER, wire.RevokeSendBuffer(SEND_BUFFER_ID, 0))
            steps.append(NvspStep(send, False))
        return steps

    def _next_request(self) -> int:
        self._request_id = self._request_id + 1 & 0xFFFFFFFF or 1
        return self._request_id

    def _ask(self, payload: bytes, expected: int, structure: type[T]) -> Script[T]:
        """Send an NVSP request and parse its completion."""
        answer = yield NvspStep(payload)
        # An answer to INIT comes before there is a version, so that the newest counts.
        message_type, body = unpack_message(answer, self.version or Version.V6_1, Sender.HOST)
        if message_type != expected or not isinstance(body, structure):
            raise RemoteProtocolError(f"NVSP completion of type {message_type}, not {expected}")
        return body

    def _exchange(self, expected: int, message: bytes, request_id: int) -> Script[tuple[Structure, bytes]]:
        """Send an RNDIS request and parse its answer."""
        answer = yield RndisStep(message, request_id)
        message_type, body, data = rndis.unpack_control(answer)
        if message_type != expected:
            raise RemoteProtocolError(f"RNDIS answer 0x{message_type:x}, not 0x{expected:x}")
        return body, data

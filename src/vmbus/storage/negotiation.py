"""How the two ends of a storage channel come to terms: one transition table, a state machine for each end.

    guest                                  host
      BEGIN_INITIALIZATION             →
      QUERY_PROTOCOL_VERSION 6.2       →   REVISION_MISMATCH if unknown; the guest tries its next version
      QUERY_PROPERTIES                 →   most bytes of a request, most sub-channels
      END_INITIALIZATION               →
      CREATE_SUB_CHANNELS (5.1 on)     →   the host offers them

Linux asks for sub-channels after END_INITIALIZATION, OpenVMM's own client before it; both are right.
Nothing here touches a ring: messages go in and come out as bytes.
"""

from collections.abc import Callable, Sequence
from enum import Enum, auto

from vmbus.errors import LocalProtocolError, RemoteProtocolError
from vmbus.storage.wire import (
    MAX_TRANSFER,
    ChannelFlags,
    ChannelProperties,
    NtStatus,
    Operation,
    PacketFlags,
    PacketHeader,
    ProtocolVersion,
    SubChannelCount,
    Version,
    VersionRules,
    rules,
)
from vmbus.wire import Buffer

__all__ = ["TRANSITIONS", "GuestNegotiation", "HostNegotiation", "State"]


class State(Enum):
    """Where the negotiation stands; both ends go through the same states."""

    BEGIN = auto()
    VERSION = auto()
    PROPERTIES = auto()
    END = auto()
    READY = auto()


TRANSITIONS: dict[tuple[State, int], State] = {
    (State.BEGIN, Operation.BEGIN_INITIALIZATION): State.VERSION,
    (State.VERSION, Operation.QUERY_PROTOCOL_VERSION): State.PROPERTIES,
    (State.PROPERTIES, Operation.QUERY_PROPERTIES): State.END,
    (State.END, Operation.CREATE_SUB_CHANNELS): State.END,
    (State.END, Operation.END_INITIALIZATION): State.READY,
    (State.READY, Operation.CREATE_SUB_CHANNELS): State.READY,
}
"""(state, operation that succeeded) → next state. A pair that is not listed is answered INVALID_DEVICE_STATE."""


class HostNegotiation:
    """The host's end.

    Args:
        max_sub_channels: how many the guest may ask for.
        max_transfer: bytes of one request.
        create: called with the number of sub-channels that the guest wants.
        versions: which versions are accepted.
    """

    def __init__(
        self,
        *,
        max_sub_channels: int = 0,
        max_transfer: int = MAX_TRANSFER,
        create: Callable[[int], None] | None = None,
        versions: Sequence[int] = tuple(Version),
    ) -> None:
        self.state = State.BEGIN
        self.rules: VersionRules | None = None
        self._max_sub_channels = max_sub_channels if create is not None else 0
        self._max_transfer = max_transfer
        self._create = create
        self._versions = frozenset(versions)

    def receive(self, operation: int, payload: Buffer) -> tuple[NtStatus, bytes]:
        """Answer one initialization packet; returns the completion's status and payload."""
        following = TRANSITIONS.get((self.state, operation))
        if following is None:
            return NtStatus.INVALID_DEVICE_STATE, b""
        status, body = NtStatus.SUCCESS, b""
        try:
            if operation == Operation.QUERY_PROTOCOL_VERSION:
                status, body = self._query_version(ProtocolVersion.unpack(payload))
            elif operation == Operation.QUERY_PROPERTIES:
                body = self._properties()
            elif operation == Operation.CREATE_SUB_CHANNELS:
                status = self._create_sub_channels(SubChannelCount.unpack(payload).count)
        except RemoteProtocolError:  # too short to hold what it must hold
            return NtStatus.INVALID_PARAMETER, b""
        if status == NtStatus.SUCCESS:
            self.state = following
        return status, body

    def _query_version(self, wanted: ProtocolVersion) -> tuple[NtStatus, bytes]:
        answer = ProtocolVersion(wanted.major_minor).pack()
        found = rules(wanted.major_minor)
        if found is None or wanted.major_minor not in self._versions:
            return NtStatus.REVISION_MISMATCH, answer
        self.rules = found
        return NtStatus.SUCCESS, answer

    def _properties(self) -> bytes:
        assert self.rules is not None
        multi = self.rules.multi_channel
        return ChannelProperties(
            max_sub_channel_count=self._max_sub_channels if multi else 0,
            flags=ChannelFlags.SUPPORTS_MULTI_CHANNEL if multi else 0,
            max_transfer_bytes=self._max_transfer,
        ).pack()

    def _create_sub_channels(self, count: int) -> NtStatus:
        if self.rules is None or not self.rules.multi_channel:
            return NtStatus.INVALID_DEVICE_STATE
        if count > self._max_sub_channels:
            return NtStatus.INVALID_PARAMETER
        if count and self._create is not None:  # old FreeBSD asks for none where there are none
            self._create(count)
        return NtStatus.SUCCESS


class GuestNegotiation:
    """The guest's end: `request` gives the packet to send, `receive` takes its completion, until `done`.

    Args:
        versions: in order of preference.
        sub_channels: how many to ask for, if the host has them.
    """

    def __init__(
        self,
        versions: Sequence[int] = tuple(sorted(Version, reverse=True)),
        *,
        sub_channels: int = 0,
    ) -> None:
        self.state = State.BEGIN
        self.rules: VersionRules | None = None
        self.properties = ChannelProperties()
        self.sub_channels = 0
        """Sub-channels that the host agreed to offer."""
        self._versions = list(versions)
        self._wanted = sub_channels
        self.question = b""
        """The last `request`."""
        self._pending: Operation | None = None

    @property
    def done(self) -> bool:
        """Whether requests may be sent: the protocol is ready and sub-channels, if wanted, are granted."""
        return self.state is State.READY and not self._ask_sub_channels

    @property
    def asked(self) -> bool:
        """Whether the last `request` has not been answered."""
        return self._pending is not None

    @property
    def _ask_sub_channels(self) -> int:
        if self.state is not State.READY or not self.properties.flags & ChannelFlags.SUPPORTS_MULTI_CHANNEL:
            return 0
        return min(self._wanted, self.properties.max_sub_channel_count) - self.sub_channels

    def request(self) -> bytes:
        """The next packet to send, with a request for completion.

        Raises:
            LocalProtocolError: nothing is left to ask, or a completion is outstanding.
            RemoteProtocolError: the host accepts none of our versions.
        """
        if self._pending is not None:
            raise LocalProtocolError("the last request has not been completed")
        if self.state is State.BEGIN:
            pending, body = Operation.BEGIN_INITIALIZATION, b""
        elif self.state is State.VERSION:
            if not self._versions:
                raise RemoteProtocolError("the host accepts none of our storage protocol versions")
            pending = Operation.QUERY_PROTOCOL_VERSION
            body = ProtocolVersion(self._versions[0]).pack()
        elif self.state is State.PROPERTIES:
            pending, body = Operation.QUERY_PROPERTIES, b""
        elif self.state is State.END:
            pending, body = Operation.END_INITIALIZATION, b""
        elif self._ask_sub_channels > 0:
            pending = Operation.CREATE_SUB_CHANNELS
            body = SubChannelCount(self._ask_sub_channels).pack()
        else:
            raise LocalProtocolError("the negotiation is complete")
        header = PacketHeader(pending, PacketFlags.REQUEST_COMPLETION)
        # The largest packet of any version: before the version is known no other size is right for both.
        packet = (header.pack() + body).ljust(PacketHeader.SIZE + 52, b"\0")
        self.question, self._pending = packet, pending
        return packet

    def receive(self, packet: Buffer) -> None:
        """Take the completion of the last `request`.

        Raises:
            RemoteProtocolError: it is not one, or the host refuses.
        """
        pending = self._pending
        if pending is None:
            raise RemoteProtocolError("a completion that nobody waits for")
        header = PacketHeader.unpack(packet)
        if header.operation != Operation.COMPLETE_IO:
            raise RemoteProtocolError(f"operation {header.operation} instead of a completion")
        body = bytes(packet[PacketHeader.SIZE :])
        if pending is Operation.QUERY_PROTOCOL_VERSION and header.status != NtStatus.SUCCESS:
            self._versions, self._pending = self._versions[1:], None
            return
        if header.status != NtStatus.SUCCESS:
            raise RemoteProtocolError(f"{pending.name} failed with status 0x{header.status:08x}")
        if pending is Operation.QUERY_PROTOCOL_VERSION:
            self.rules = rules(self._versions[0])
            if self.rules is None:
                raise LocalProtocolError(f"0x{self._versions[0]:04x} is not a storage protocol version")
        elif pending is Operation.QUERY_PROPERTIES:
            self.properties = ChannelProperties.unpack(body)
            if self.properties.max_transfer_bytes < 4096:
                raise RemoteProtocolError(f"requests of {self.properties.max_transfer_bytes} bytes at most")
        elif pending is Operation.CREATE_SUB_CHANNELS:
            self.sub_channels += self._ask_sub_channels
        self.state, self._pending = TRANSITIONS[self.state, pending], None

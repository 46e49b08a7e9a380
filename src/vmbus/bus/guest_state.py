"""What the guest's end of the control plane knows: the connection, its channels and their GPADLs.

`vmbus.bus.guest` holds what changes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Final
from uuid import UUID

from vmbus.bus import actions as act
from vmbus.bus import wire
from vmbus.bus.codec import encode
from vmbus.bus.offer import Offer
from vmbus.bus.transitions import (
    CHANNEL,
    CONNECTION,
    RESERVED_STATES,
    ChannelState,
    GpadlState,
    LinkState,
    step,
)
from vmbus.bus.versions import SUPPORTED_FEATURES, FeatureFlags, Version
from vmbus.bus.wire import MessageType
from vmbus.errors import LocalProtocolError, RemoteProtocolError

__all__ = ["NO_GUID", "GuestChannel", "GuestState"]

FIRST_GPADL_ID: Final = 0xE1E10
"""Where Linux's driver starts to count too; any number will do."""
NO_GUID: Final = UUID(int=0)

_WINDS_UP: Final = (MessageType.GPADL_TEARDOWN, MessageType.REL_ID_RELEASED)
"""What a guest does with a channel that was rescinded."""


@dataclass(slots=True, eq=False)
class GuestChannel:
    """What the guest knows of one offer.

    Attributes:
        offer: the offer, with the ids that the host gave.
        state: as messages tell.
        ring_gpadl: what it was (or is to be) opened over.
        target_vp: the VP that the host interrupts for it.
        gpadls: every GPADL made for it, by id.
        connection_id: what to signal to ring the host.
        event_flag: the flag by which the host rings.
        unanswered: requests about the channel (not its GPADLs) that the host still owes an answer.
        foreign: a reserved channel of a connection that is over.
    """

    offer: Offer
    state: ChannelState = ChannelState.OFFERED
    ring_gpadl: int = 0
    open_id: int = 0
    target_vp: int = 0
    gpadls: dict[int, GpadlState] = field(default_factory=dict)
    connection_id: int = 0
    event_flag: int = 0
    unanswered: int = 0
    foreign: bool = False


class GuestState:
    """State and small helpers of `vmbus.bus.guest.GuestMachine`; see there for the arguments."""

    def __init__(
        self,
        versions: Sequence[int] = tuple(sorted(Version, reverse=True)),
        *,
        features: int = SUPPORTED_FEATURES,
        client_id: UUID = NO_GUID,
        message_vp: int = 0,
        interrupt_page: int = 0,
        monitor_pages: act.MonitorPages | None = None,
    ) -> None:
        if not versions:
            raise ValueError("a guest must speak at least one version")
        self._versions = tuple(versions)
        self._asked_features = features & SUPPORTED_FEATURES
        self._client_id = client_id
        self._message_vp = message_vp
        self._interrupt_page = interrupt_page
        self._monitor_pages = monitor_pages
        self._wanted_pages: act.MonitorPages | None = monitor_pages
        self._state = LinkState.IDLE
        self._trying = 0
        self._contacts = 0
        self._version = 0
        self._features = FeatureFlags.NONE
        self._connection_id = wire.MESSAGE_CONNECTION_ID
        self._channels: dict[int, GuestChannel] = {}
        self._keys: set[tuple[UUID, UUID, int]] = set()
        self._gpadls: dict[int, int] = {}
        self._gpadl_ids = count(FIRST_GPADL_ID)
        self._open_ids = count(1)
        self._paused = False

    # -- what is so ------------------------------------------------------------------------------------------

    @property
    def state(self) -> LinkState:
        """The connection's state."""
        return self._state

    @property
    def version(self) -> int:
        """The version agreed on, 0 if none."""
        return self._version

    @property
    def features(self) -> FeatureFlags:
        """The feature flags that hold."""
        return self._features

    @property
    def paused(self) -> bool:
        """Whether the host has been asked to send nothing."""
        return self._paused

    @property
    def monitor_pages(self) -> act.MonitorPages | None:
        """The monitor pages in use."""
        return self._monitor_pages

    @property
    def channels(self) -> dict[int, GuestChannel]:
        """Every channel of which the host may still speak, by id."""
        return dict(self._channels)

    def channel(self, channel_id: int) -> GuestChannel | None:
        """The channel of that id, if the host may still speak of it."""
        return self._channels.get(channel_id)

    def has_gpadl(self, gpadl_id: int) -> bool:
        """Whether the id is in use."""
        return gpadl_id in self._gpadls

    @property
    def gpadls(self) -> dict[int, int]:
        """The channel of every GPADL id that is in use."""
        return dict(self._gpadls)

    # -- small things ----------------------------------------------------------------------------------------

    def _post(self, message: wire.Message) -> list[act.GuestEvent]:
        return [act.Post(self._connection_id, encode(message))]

    def _need(self, feature: FeatureFlags) -> None:
        if not self._features & feature:
            raise LocalProtocolError(f"the host did not grant {feature.name}")

    def _may_post(self) -> None:
        if self._version == 0 or self._state is LinkState.UNLOADING:
            raise LocalProtocolError("there is no connection")
        if self._paused:
            raise LocalProtocolError("the connection is paused")

    def _step_link(
        self, message: MessageType, error: type[Exception] = LocalProtocolError, *, ok: bool = True
    ) -> LinkState:
        if (
            error is LocalProtocolError
            and self._paused
            and message not in (MessageType.RESUME, MessageType.UNLOAD)
        ):
            raise LocalProtocolError("the connection is paused")
        return step(CONNECTION, self._state, message, error, "the connection", ok=ok)

    def _step_channel(
        self,
        channel: GuestChannel,
        message: MessageType,
        error: type[Exception] = LocalProtocolError,
        *,
        ok: bool = True,
    ) -> ChannelState:
        if (
            error is LocalProtocolError
            and channel.state is ChannelState.RESCINDED
            and message not in _WINDS_UP
        ):
            # The table has what may cross a rescind; who knows of it does not start anything new.
            raise LocalProtocolError(f"channel {channel.offer.channel_id} was rescinded")
        return step(CHANNEL, channel.state, message, error, f"channel {channel.offer.channel_id}", ok=ok)

    def _channel(self, channel_id: int) -> GuestChannel:
        try:
            return self._channels[channel_id]
        except KeyError:
            raise LocalProtocolError(f"there is no channel {channel_id}") from None

    def _named(self, channel_id: int) -> GuestChannel:
        try:
            return self._channels[channel_id]
        except KeyError:
            raise RemoteProtocolError(
                f"a message about channel {channel_id}, which was not offered"
            ) from None

    def _answered(self, channel: GuestChannel) -> None:
        if channel.unanswered == 0:
            raise RemoteProtocolError(f"an answer about channel {channel.offer.channel_id} to no question")
        channel.unanswered -= 1

    def _set_gpadl(self, channel: GuestChannel, gpadl_id: int, state: GpadlState) -> None:
        if state is GpadlState.ABSENT:
            del channel.gpadls[gpadl_id]
            del self._gpadls[gpadl_id]
        else:
            channel.gpadls[gpadl_id] = state

    def _drop(self, channel: GuestChannel) -> None:
        for gpadl_id in channel.gpadls:
            del self._gpadls[gpadl_id]
        channel.gpadls.clear()
        del self._channels[channel.offer.channel_id]
        self._keys.discard(channel.offer.key)
        channel.state = ChannelState.ABSENT

    def _end_reserved(self, channel: GuestChannel) -> None:
        """A reserved channel is one no longer; without a connection there is nothing that it could be instead."""
        if channel.foreign and self._version == 0:
            self._drop(channel)
        channel.foreign = False

    def _forget(self) -> None:
        """No connection any more, and no channels but reserved ones."""
        for channel in list(self._channels.values()):
            if channel.state in RESERVED_STATES:
                channel.foreign = True
                for gpadl_id in [n for n in channel.gpadls if n != channel.ring_gpadl]:
                    self._set_gpadl(channel, gpadl_id, GpadlState.ABSENT)
            else:
                self._drop(channel)
        self._state, self._version, self._features = LinkState.IDLE, 0, FeatureFlags.NONE
        self._connection_id = wire.MESSAGE_CONNECTION_ID
        self._monitor_pages = None
        self._paused = False

    def check(self) -> None:
        """Check the machine's invariants; tests call it after every step.

        Raises:
            AssertionError: one does not hold.
        """
        for channel_id, channel in self._channels.items():
            assert channel.offer.channel_id == channel_id
            assert channel.state is not ChannelState.ABSENT
            for gpadl_id, state in channel.gpadls.items():
                assert self._gpadls[gpadl_id] == channel_id
                assert state is not GpadlState.ABSENT
            if channel.state in (ChannelState.OPENING, ChannelState.OPEN, *RESERVED_STATES):
                assert channel.gpadls[channel.ring_gpadl] is GpadlState.CREATED, (
                    "an open channel has its ring"
                )
        assert sum(len(c.gpadls) for c in self._channels.values()) == len(self._gpadls)
        assert len(self._keys) == len(self._channels)
        assert {c.offer.key for c in self._channels.values()} == self._keys
        connected = self._state not in (LinkState.IDLE, LinkState.CONTACTING)
        assert connected == (self._version != 0)

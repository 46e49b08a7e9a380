"""Control messages to bytes and back: the table of who may send which structure in which version.

`MESSAGES` is that one table: sender, structure variants, minimum version and feature flags of every message.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NamedTuple

from vmbus.bus.versions import DISCONNECTED, FeatureFlags, Version
from vmbus.bus.wire import (
    HEADER_SIZE,
    MAX_MESSAGE_SIZE,
    AllOffersDelivered,
    CloseChannel,
    CloseReservedChannel,
    CloseReservedResponse,
    GpadlBody,
    GpadlCreated,
    GpadlHeader,
    GpadlTeardown,
    GpadlTorndown,
    Header,
    InitiateContact,
    InitiateContact2,
    Message,
    MessageType,
    ModifyChannel,
    ModifyChannelResponse,
    ModifyConnection,
    ModifyConnectionResponse,
    OfferChannel,
    OpenChannel,
    OpenChannel2,
    OpenChannelResult,
    OpenReservedChannel,
    Pause,
    PauseResponse,
    RelIdReleased,
    RequestOffers,
    RescindChannelOffer,
    Resume,
    TlConnectRequest,
    TlConnectRequest2,
    TlConnectResult,
    Unload,
    UnloadComplete,
    VersionResponse,
    VersionResponse2,
    VersionResponse3,
)
from vmbus.errors import RemoteProtocolError

__all__ = ["MESSAGES", "Parsed", "Sender", "Variant", "encode", "message_name", "message_number", "parse"]


class Sender(IntEnum):
    """Which end sends a message."""

    GUEST = 0
    HOST = 1


@dataclass(frozen=True)
class Variant:
    """One structure of a message: when it is the right one.

    Attributes:
        structure: the structure behind the header.
        sender: the end that sends it.
        min_version: the first version with it; `DISCONNECTED` if it is taken before a version is agreed on.
        features: at least one of these must have been granted; none named, none needed.
        by_size: the message may also be one of the next, shorter variants: match only if it is long enough.
        tail: page numbers may follow.
    """

    structure: type[Message]
    sender: Sender
    min_version: int
    features: FeatureFlags = FeatureFlags.NONE
    by_size: bool = False
    tail: bool = False


_SIGNAL_PARAMETERS = (
    FeatureFlags.GUEST_SPECIFIED_SIGNAL_PARAMETERS | FeatureFlags.CHANNEL_INTERRUPT_REDIRECTION
)

_TABLE: tuple[Variant, ...] = (  # of one message the longest first
    Variant(OfferChannel, Sender.HOST, Version.V0_13),
    Variant(RescindChannelOffer, Sender.HOST, Version.V0_13),
    Variant(RequestOffers, Sender.GUEST, Version.V0_13),
    Variant(AllOffersDelivered, Sender.HOST, Version.V0_13),
    Variant(OpenChannel2, Sender.GUEST, Version.V6_0, _SIGNAL_PARAMETERS),
    Variant(OpenChannel, Sender.GUEST, Version.V0_13),
    Variant(OpenChannelResult, Sender.HOST, Version.V0_13),
    Variant(CloseChannel, Sender.GUEST, Version.V0_13),
    Variant(GpadlHeader, Sender.GUEST, Version.V0_13, tail=True),
    Variant(GpadlBody, Sender.GUEST, Version.V0_13, tail=True),
    Variant(GpadlCreated, Sender.HOST, Version.V0_13),
    Variant(GpadlTeardown, Sender.GUEST, Version.V0_13),
    Variant(GpadlTorndown, Sender.HOST, Version.V0_13),
    Variant(RelIdReleased, Sender.GUEST, Version.V0_13),
    Variant(InitiateContact2, Sender.GUEST, DISCONNECTED, by_size=True),
    Variant(InitiateContact, Sender.GUEST, DISCONNECTED),
    Variant(VersionResponse3, Sender.HOST, DISCONNECTED, by_size=True),
    Variant(VersionResponse2, Sender.HOST, DISCONNECTED, by_size=True),
    Variant(VersionResponse, Sender.HOST, DISCONNECTED),
    Variant(Unload, Sender.GUEST, Version.V0_13),
    Variant(UnloadComplete, Sender.HOST, Version.V0_13),
    Variant(OpenReservedChannel, Sender.GUEST, Version.V4_0),
    Variant(CloseReservedChannel, Sender.GUEST, DISCONNECTED),
    Variant(CloseReservedResponse, Sender.HOST, DISCONNECTED),
    Variant(TlConnectRequest2, Sender.GUEST, Version.V5_2, by_size=True),
    Variant(TlConnectRequest, Sender.GUEST, Version.V4_0),
    Variant(ModifyChannel, Sender.GUEST, Version.V4_1),
    Variant(TlConnectResult, Sender.HOST, Version.V4_1),
    Variant(ModifyChannelResponse, Sender.HOST, Version.V5_3),
    Variant(ModifyConnection, Sender.GUEST, Version.V6_0, FeatureFlags.MODIFY_CONNECTION),
    Variant(ModifyConnectionResponse, Sender.HOST, Version.V6_0, FeatureFlags.MODIFY_CONNECTION),
    Variant(Pause, Sender.GUEST, Version.V6_0, FeatureFlags.PAUSE_RESUME),
    Variant(PauseResponse, Sender.HOST, Version.V6_0, FeatureFlags.PAUSE_RESUME),
    Variant(Resume, Sender.GUEST, Version.V6_0, FeatureFlags.PAUSE_RESUME),
)

MESSAGES: Final[dict[MessageType, tuple[Variant, ...]]] = {
    kind: tuple(v for v in _TABLE if v.structure.TYPE is kind) for kind in MessageType
}
"""The table of messages."""


class Parsed(NamedTuple):
    """A message and the page-number bytes behind it (empty except for GPADLs)."""

    message: Message
    tail: bytes


def encode(message: Message, tail: bytes = b"") -> bytes:
    """The payload of the hypervisor message that carries `message`.

    Raises:
        ValueError: more than `MAX_MESSAGE_SIZE` bytes.
    """
    payload = Header(message.TYPE).pack() + message.pack() + tail
    if len(payload) > MAX_MESSAGE_SIZE:
        raise ValueError(f"{message.TYPE.name} of {len(payload)} bytes does not fit into a message")
    return payload


def message_number(payload: bytes) -> int:
    """The number that says what kind of message this is.

    Raises:
        RemoteProtocolError: it is too short to have one.
    """
    return Header.unpack(payload).message_type


def message_name(number: int) -> str:
    """The name of a control message, or its number where it has none."""
    try:
        return MessageType(number).name
    except ValueError:
        return f"control message {number}"


def parse(
    payload: bytes, sender: Sender, version: int = DISCONNECTED, features: int = FeatureFlags.NONE
) -> Parsed:
    """Parse what `sender` posted on a connection of that version (`DISCONNECTED`: none yet).

    Bytes behind a structure without a tail are ignored, as every host and guest does: newer peers append
    fields.

    Raises:
        RemoteProtocolError: truncated, oversized, unknown, sent by the wrong end, or not a message of this
            version.
    """
    if len(payload) > MAX_MESSAGE_SIZE:
        raise RemoteProtocolError(f"a control message of {len(payload)} bytes")
    number = message_number(payload)
    have = len(payload) - HEADER_SIZE
    for variant in MESSAGES.get(number, ()):  # type: ignore[call-overload]  # any int may be looked up
        if variant.sender is not sender or variant.min_version > version:
            continue
        if variant.features and not variant.features & features:
            continue
        size = variant.structure.SIZE
        if variant.by_size and have < size:
            continue
        message = variant.structure.unpack(payload, HEADER_SIZE)
        return Parsed(message, payload[HEADER_SIZE + size :] if variant.tail else b"")
    when = f"in version {version >> 16}.{version & 0xFFFF}" if version else "without a connection"
    raise RemoteProtocolError(
        f"{message_name(number)} of {have} bytes is nothing that a {sender.name.lower()} sends {when}"
    )

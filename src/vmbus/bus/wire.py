"""VMBus control messages: their bytes, and who may send which in what version.

Every message travels as the payload (at most 240 bytes) of a hypervisor message of type 1: an eight-byte
header (message type, padding), then the structure declared here, then, for GPADLs only, page numbers.

Names are OpenVMM's; Linux's (`include/linux/hyperv.h`) stand in the docstrings where they differ.
Which of them may be sent when is said once, in `vmbus.bus.codec`.
"""

from enum import IntEnum, IntFlag
from typing import Annotated, ClassVar, Final

from vmbus.wire import I32, U8, U16, U32, U64, Fixed, Guid, Structure, wire

__all__ = [
    "EVENT_CONNECTION_ID",
    "GPADL_BODY_VALUES",
    "GPADL_HEADER_VALUES",
    "HEADER_SIZE",
    "MAX_MESSAGE_SIZE",
    "MESSAGE_CONNECTION_ID",
    "MESSAGE_CONNECTION_ID_V5",
    "MONITOR_CONNECTION_ID",
    "VMBUS_MESSAGE_TYPE",
    "VMBUS_SINT",
    "VP_INDEX_DISABLE_INTERRUPT",
    "AllOffersDelivered",
    "CloseChannel",
    "CloseReservedChannel",
    "CloseReservedResponse",
    "ConnectionState",
    "GpadlBody",
    "GpadlCreated",
    "GpadlHeader",
    "GpadlTeardown",
    "GpadlTorndown",
    "Header",
    "InitiateContact",
    "InitiateContact2",
    "Message",
    "MessageType",
    "ModifyChannel",
    "ModifyChannelResponse",
    "ModifyConnection",
    "ModifyConnectionResponse",
    "OfferChannel",
    "OfferFlags",
    "OpenChannel",
    "OpenChannel2",
    "OpenChannelResult",
    "OpenReservedChannel",
    "Pause",
    "PauseResponse",
    "RelIdReleased",
    "RequestOffers",
    "RescindChannelOffer",
    "Resume",
    "Status",
    "TlConnectRequest",
    "TlConnectRequest2",
    "TlConnectResult",
    "Unload",
    "UnloadComplete",
    "VersionResponse",
    "VersionResponse2",
    "VersionResponse3",
]

VMBUS_SINT: Final = 2
"""The SINT on which a guest receives VMBus messages and event flags (Linux: VMBUS_MESSAGE_SINT)."""
VMBUS_MESSAGE_TYPE: Final = 1
"""The hypervisor message type of every VMBus message, in both directions."""
MESSAGE_CONNECTION_ID: Final = 1
"""Guest-to-host messages before version 5.0 (Linux: VMBUS_MESSAGE_CONNECTION_ID)."""
EVENT_CONNECTION_ID: Final = 2
"""Guest-to-host event before 2.4, when a page of bits says which channels rang (Linux:
VMBUS_EVENT_CONNECTION_ID)."""
MONITOR_CONNECTION_ID: Final = 3
"""Monitored notifications (Linux: VMBUS_MONITOR_CONNECTION_ID)."""
MESSAGE_CONNECTION_ID_V5: Final = 4
"""INITIATE_CONTACT from version 5.0 on (Linux: VMBUS_MESSAGE_CONNECTION_ID_4)."""
MAX_MESSAGE_SIZE: Final = 240
"""Bytes of a hypervisor message's payload (TLFS 11.2: HV_MESSAGE_PAYLOAD_BYTE_COUNT)."""
VP_INDEX_DISABLE_INTERRUPT: Final = 0xFFFF_FFFF
"""A target VP that asks for no interrupts at all for the channel (OpenVMM)."""


class MessageType(IntEnum):
    """Number of a control message (Linux: enum vmbus_channel_message_type)."""

    OFFER_CHANNEL = 1
    RESCIND_CHANNEL_OFFER = 2
    REQUEST_OFFERS = 3
    ALL_OFFERS_DELIVERED = 4
    OPEN_CHANNEL = 5
    OPEN_CHANNEL_RESULT = 6
    CLOSE_CHANNEL = 7
    GPADL_HEADER = 8
    GPADL_BODY = 9
    GPADL_CREATED = 10
    GPADL_TEARDOWN = 11
    GPADL_TORNDOWN = 12
    REL_ID_RELEASED = 13
    INITIATE_CONTACT = 14
    VERSION_RESPONSE = 15
    UNLOAD = 16
    UNLOAD_COMPLETE = 17
    OPEN_RESERVED_CHANNEL = 18
    CLOSE_RESERVED_CHANNEL = 19
    CLOSE_RESERVED_RESPONSE = 20
    TL_CONNECT_REQUEST = 21
    MODIFY_CHANNEL = 22
    TL_CONNECT_REQUEST_RESULT = 23
    MODIFY_CHANNEL_RESPONSE = 24
    MODIFY_CONNECTION = 25
    MODIFY_CONNECTION_RESPONSE = 26
    PAUSE = 27
    PAUSE_RESPONSE = 28
    RESUME = 29


class Status(IntEnum):
    """The NT status values that answers carry (signed in GPADL_CREATED and the modify responses)."""

    SUCCESS = 0
    UNSUCCESSFUL = 0xC000_0001
    INVALID_PARAMETER = 0xC000_000D
    CONNECTION_REFUSED = 0xC000_0236
    HOST_FAILURE = 0x8000_FFFF
    """What OpenVMM answers to a request that it cannot carry out (E_UNEXPECTED)."""

    @property
    def signed(self) -> int:
        """The value as a 32-bit signed field holds it."""
        return int(self) - (1 << 32) if self & 0x8000_0000 else int(self)


class ConnectionState(IntEnum):
    """`VersionResponse.connection_state`."""

    SUCCESSFUL = 0
    FAILED_LOW_RESOURCES = 1
    FAILED_UNKNOWN_FAILURE = 2


class OfferFlags(IntFlag):
    """`OfferChannel.flags` (Linux: VMBUS_CHANNEL_…)."""

    NONE = 0
    ENUMERATE_DEVICE_INTERFACE = 0x0001
    CONFIDENTIAL_RING_BUFFER = 0x0002
    CONFIDENTIAL_EXTERNAL_MEMORY = 0x0004
    REQUIRE_PINNED_EXTERNAL_MEMORY = 0x0008
    NAMED_PIPE_MODE = 0x0010
    LOOPBACK_OFFER = 0x0100
    PARENT_OFFER = 0x0200
    REQUEST_MONITORED_NOTIFICATION = 0x0400
    TLNPI_PROVIDER = 0x2000


@wire(size=8)
class Header(Structure):
    """Starts every control message."""

    message_type: U32
    padding: U32 = 0


HEADER_SIZE: Final = Header.SIZE


class Message(Structure):
    """Base of all control messages: what follows the header."""

    __slots__ = ()
    TYPE: ClassVar[MessageType]


UserDefined = Annotated[bytes, Fixed(120)]
"""Free bytes of a device, in offers and open requests (Linux: MAX_USER_DEFINED_BYTES)."""


@wire(size=188, offsets={"flags": 48, "user_defined": 52, "subchannel_index": 172, "channel_id": 176})
class OfferChannel(Message):
    """The host has a channel (Linux: vmbus_channel_offer_channel, 196 bytes with its header)."""

    TYPE = MessageType.OFFER_CHANNEL
    interface_id: Guid
    instance_id: Guid
    reserved: Annotated[bytes, Fixed(16)]
    flags: U16
    """`OfferFlags`."""
    mmio_megabytes: U16
    user_defined: UserDefined
    subchannel_index: U16
    """0 for a device's primary channel; always 0 before version 2.4."""
    mmio_megabytes_optional: U16
    channel_id: U32
    """Linux: child_relid."""
    monitor_id: U8
    """Bit of the monitor pages: trigger group × 32 + bit of the group."""
    monitor_allocated: U8
    is_dedicated: U16
    """1 if the channel rings the host through a connection of its own (from version 1.1 on)."""
    connection_id: U32


@wire(size=4)
class RescindChannelOffer(Message):
    """The host takes an offer back; the guest closes the channel and releases the id."""

    TYPE = MessageType.RESCIND_CHANNEL_OFFER
    channel_id: U32


@wire(size=0)
class RequestOffers(Message):
    """The guest wants the offers of now and of later."""

    TYPE = MessageType.REQUEST_OFFERS


@wire(size=0)
class AllOffersDelivered(Message):
    """The offers that existed at REQUEST_OFFERS have been sent."""

    TYPE = MessageType.ALL_OFFERS_DELIVERED


@wire(size=140, offsets={"user_data": 20})
class OpenChannel(Message):
    """The guest opens a channel over a ring GPADL (Linux: vmbus_channel_open_channel)."""

    TYPE = MessageType.OPEN_CHANNEL
    channel_id: U32
    open_id: U32
    """Echoed in the result."""
    ring_buffer_gpadl_id: U32
    target_vp: U32
    """The VP to interrupt, or `VP_INDEX_DISABLE_INTERRUPT`."""
    downstream_ring_buffer_page_offset: U32
    """Index of the host-to-guest ring's control page within the GPADL."""
    user_data: UserDefined


@wire(size=148, offsets={"connection_id": 140, "event_flag": 144})
class OpenChannel2(Message):
    """OPEN_CHANNEL with `FeatureFlags.GUEST_SPECIFIED_SIGNAL_PARAMETERS` or interrupt redirection."""

    TYPE = MessageType.OPEN_CHANNEL
    channel_id: U32
    open_id: U32
    ring_buffer_gpadl_id: U32
    target_vp: U32
    downstream_ring_buffer_page_offset: U32
    user_data: UserDefined
    connection_id: U32
    event_flag: U16
    flags: U16
    """Bit 0: redirect the interrupt."""


@wire(size=12)
class OpenChannelResult(Message):
    """The host's answer to OPEN_CHANNEL."""

    TYPE = MessageType.OPEN_CHANNEL_RESULT
    channel_id: U32
    open_id: U32
    status: U32


@wire(size=4)
class CloseChannel(Message):
    """The guest closes a channel; there is no answer."""

    TYPE = MessageType.CLOSE_CHANNEL
    channel_id: U32


@wire(size=12)
class GpadlHeader(Message):
    """The guest describes memory to the host; up to `GPADL_HEADER_VALUES` 64-bit values follow.

    The values are `count` GPA ranges: a length (lower half) and byte offset (upper half), then page numbers.
    """

    TYPE = MessageType.GPADL_HEADER
    channel_id: U32
    gpadl_id: U32
    """Chosen by the guest (Linux: gpadl handle)."""
    length: U16
    """Bytes of all ranges together, in this message and the bodies (Linux: range_buflen)."""
    count: U16
    """Number of ranges (Linux: rangecount)."""


@wire(size=8)
class GpadlBody(Message):
    """More values of the GPADL; up to `GPADL_BODY_VALUES` follow."""

    TYPE = MessageType.GPADL_BODY
    message_number: U32
    """Linux counts its bodies here; hosts do not look at it."""
    gpadl_id: U32


GPADL_HEADER_VALUES: Final = (MAX_MESSAGE_SIZE - HEADER_SIZE - GpadlHeader.SIZE) // 8
"""64-bit values that fit behind a GPADL_HEADER: 27, the first of which is a range's header."""
GPADL_BODY_VALUES: Final = (MAX_MESSAGE_SIZE - HEADER_SIZE - GpadlBody.SIZE) // 8
"""64-bit values that fit behind a GPADL_BODY: 28."""


@wire(size=12)
class GpadlCreated(Message):
    """The host has the whole GPADL, or refuses it."""

    TYPE = MessageType.GPADL_CREATED
    channel_id: U32
    gpadl_id: U32
    status: I32


@wire(size=8)
class GpadlTeardown(Message):
    """The guest wants its memory back."""

    TYPE = MessageType.GPADL_TEARDOWN
    channel_id: U32
    gpadl_id: U32


@wire(size=4)
class GpadlTorndown(Message):
    """The host no longer reaches that memory."""

    TYPE = MessageType.GPADL_TORNDOWN
    gpadl_id: U32


@wire(size=4)
class RelIdReleased(Message):
    """The guest is done with a rescinded channel: its id may be used again."""

    TYPE = MessageType.REL_ID_RELEASED
    channel_id: U32


@wire(size=32, offsets={"interrupt_page_or_target_info": 8, "parent_to_child_monitor_page_gpa": 16})
class InitiateContact(Message):
    """The guest asks for a version (Linux: vmbus_channel_initiate_contact)."""

    TYPE = MessageType.INITIATE_CONTACT
    version_requested: U32
    target_message_vp: U32
    """The VP that receives the host's messages."""
    interrupt_page_or_target_info: U64
    """Before 5.0 the GPA of the shared interrupt page (the guest's half is its second 2 KiB; hosts from 2.4
    on do not use it); from 5.0 on the SINT (bits 0–7), the VTL (8–15) and the feature flags asked for
    (32–63)."""
    parent_to_child_monitor_page_gpa: U64
    child_to_parent_monitor_page_gpa: U64


@wire(size=48, offsets={"client_id": 32})
class InitiateContact2(Message):
    """INITIATE_CONTACT with `FeatureFlags.CLIENT_ID`."""

    TYPE = MessageType.INITIATE_CONTACT
    version_requested: U32
    target_message_vp: U32
    interrupt_page_or_target_info: U64
    parent_to_child_monitor_page_gpa: U64
    child_to_parent_monitor_page_gpa: U64
    client_id: Guid


@wire(size=8)
class VersionResponse(Message):
    """The host takes the version or does not (Linux: vmbus_channel_version_response)."""

    TYPE = MessageType.VERSION_RESPONSE
    version_supported: U8
    connection_state: U8
    """`ConnectionState`."""
    padding: U16
    selected_version_or_connection_id: U32
    """From 5.0 on the connection for the guest's further messages (Linux: msg_conn_id), before it the
    version."""


@wire(size=12)
class VersionResponse2(Message):
    """VERSION_RESPONSE of a granted version 6.0 or later."""

    TYPE = MessageType.VERSION_RESPONSE
    version_supported: U8
    connection_state: U8
    padding: U16
    selected_version_or_connection_id: U32
    supported_features: U32


@wire(size=32, offsets={"parent_to_child_monitor_page_gpa": 16})
class VersionResponse3(Message):
    """VERSION_RESPONSE with `FeatureFlags.SERVER_SPECIFIED_MONITOR_PAGES`."""

    TYPE = MessageType.VERSION_RESPONSE
    version_supported: U8
    connection_state: U8
    padding: U16
    selected_version_or_connection_id: U32
    supported_features: U32
    padding2: U32
    parent_to_child_monitor_page_gpa: U64
    child_to_parent_monitor_page_gpa: U64


@wire(size=0)
class Unload(Message):
    """The guest ends the connection: every channel closes, every GPADL goes."""

    TYPE = MessageType.UNLOAD


@wire(size=0)
class UnloadComplete(Message):
    """Nothing of the guest's memory is in use any more."""

    TYPE = MessageType.UNLOAD_COMPLETE


@wire(size=20)
class OpenReservedChannel(Message):
    """Open a channel that outlives UNLOAD (crash dumps)."""

    TYPE = MessageType.OPEN_RESERVED_CHANNEL
    channel_id: U32
    target_vp: U32
    target_sint: U32
    ring_buffer_gpadl_id: U32
    downstream_ring_buffer_page_offset: U32


@wire(size=12)
class CloseReservedChannel(Message):
    """Close a reserved channel; taken in any state of the connection."""

    TYPE = MessageType.CLOSE_RESERVED_CHANNEL
    channel_id: U32
    target_vp: U32
    target_sint: U32


@wire(size=4)
class CloseReservedResponse(Message):
    """The reserved channel is closed."""

    TYPE = MessageType.CLOSE_RESERVED_RESPONSE
    channel_id: U32


@wire(size=32)
class TlConnectRequest(Message):
    """hv_sock: connect to a service of the host (Linux: vmbus_channel_tl_connect_request)."""

    TYPE = MessageType.TL_CONNECT_REQUEST
    endpoint_id: Guid
    service_id: Guid


@wire(size=48)
class TlConnectRequest2(Message):
    """TL_CONNECT_REQUEST from version 5.2 on; some guests go on sending the short form."""

    TYPE = MessageType.TL_CONNECT_REQUEST
    endpoint_id: Guid
    service_id: Guid
    silo_id: Guid


@wire(size=36)
class TlConnectResult(Message):
    """hv_sock: how the connection attempt ended. A successful one is (also) an offer."""

    TYPE = MessageType.TL_CONNECT_REQUEST_RESULT
    endpoint_id: Guid
    service_id: Guid
    status: I32


@wire(size=8)
class ModifyChannel(Message):
    """Interrupt another VP from now on."""

    TYPE = MessageType.MODIFY_CHANNEL
    channel_id: U32
    target_vp: U32


@wire(size=8)
class ModifyChannelResponse(Message):
    """The old VP gets no more interrupts of the channel."""

    TYPE = MessageType.MODIFY_CHANNEL_RESPONSE
    channel_id: U32
    status: I32


@wire(size=16)
class ModifyConnection(Message):
    """Use other monitor pages, or none (both 0)."""

    TYPE = MessageType.MODIFY_CONNECTION
    parent_to_child_monitor_page_gpa: U64
    child_to_parent_monitor_page_gpa: U64


@wire(size=1)
class ModifyConnectionResponse(Message):
    """Whether the monitor pages were changed."""

    TYPE = MessageType.MODIFY_CONNECTION_RESPONSE
    connection_state: U8


@wire(size=0)
class Pause(Message):
    """Send nothing more until RESUME."""

    TYPE = MessageType.PAUSE


@wire(size=0)
class PauseResponse(Message):
    """The last message before RESUME."""

    TYPE = MessageType.PAUSE_RESPONSE


@wire(size=0)
class Resume(Message):
    """Control messages may flow again."""

    TYPE = MessageType.RESUME

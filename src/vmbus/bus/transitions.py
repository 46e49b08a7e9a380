"""The one transition table of the control plane: what each message does to a connection, a channel and a
GPADL.

Both ends step the same tables, the sender when it sends and the receiver when it receives, so that they agree
on the state whenever no message is under way. A pair that has no entry is a mistake of whoever sends it.
"""

from collections.abc import Mapping
from enum import Enum
from typing import Final, TypeVar

from vmbus.bus.wire import MessageType as M

__all__ = [
    "CHANNEL",
    "CONNECTION",
    "GPADL",
    "RESERVED_STATES",
    "ChannelState",
    "GpadlState",
    "LinkState",
    "Table",
    "allowed",
    "step",
]


class LinkState(Enum):
    """A connection between a guest and its host."""

    IDLE = "idle"
    """No version agreed on."""
    CONTACTING = "contacting"
    """INITIATE_CONTACT is unanswered."""
    CONNECTED = "connected"
    """A version holds; no offers asked for."""
    ENUMERATING = "enumerating"
    """Offers asked for, ALL_OFFERS_DELIVERED not sent yet."""
    READY = "ready"
    """The first offers are known; later ones come as they are made."""
    UNLOADING = "unloading"
    """UNLOAD is unanswered."""


class ChannelState(Enum):
    """A channel id, as far as messages tell."""

    ABSENT = "absent"
    """Not offered, or released by the guest: the id may be given again."""
    OFFERED = "offered"
    """Offered and closed."""
    OPENING = "opening"
    """OPEN_CHANNEL is unanswered."""
    OPEN = "open"
    OPENING_RESERVED = "opening reserved"
    """OPEN_RESERVED_CHANNEL is unanswered."""
    RESERVED = "reserved"
    """Open as a reserved channel, which outlives the connection."""
    CLOSING_RESERVED = "closing reserved"
    RESCINDED = "rescinded"
    """Taken back by the host, not released by the guest; what it still sends about it crossed the rescind."""


RESERVED_STATES: Final = frozenset(
    {ChannelState.OPENING_RESERVED, ChannelState.RESERVED, ChannelState.CLOSING_RESERVED}
)
"""A channel in these outlives its connection."""


class GpadlState(Enum):
    """A GPADL id."""

    ABSENT = "absent"
    BUILDING = "building"
    """The host has not got all page numbers, or has not answered yet."""
    CREATED = "created"
    TEARING_DOWN = "tearing down"
    """GPADL_TEARDOWN is unanswered."""


S = TypeVar("S", bound=Enum)

Table = Mapping[tuple[S, M], tuple[S, S]]
"""(state, message) → (next state if it is or says success, next state if it says failure)."""


def _same(state: S) -> tuple[S, S]:
    return state, state


_L, _C, _G = LinkState, ChannelState, GpadlState

CONNECTION: Final[Table[LinkState]] = {
    # A guest may contact again at any time: kexec and crash kernels never unload what ran before them.
    **{(state, M.INITIATE_CONTACT): _same(_L.CONTACTING) for state in _L},
    (_L.CONTACTING, M.VERSION_RESPONSE): (_L.CONNECTED, _L.IDLE),
    (_L.CONNECTED, M.REQUEST_OFFERS): _same(_L.ENUMERATING),
    (_L.ENUMERATING, M.ALL_OFFERS_DELIVERED): _same(_L.READY),
    **{(state, M.UNLOAD): _same(_L.UNLOADING) for state in (_L.CONNECTED, _L.ENUMERATING, _L.READY)},
    (_L.UNLOADING, M.UNLOAD_COMPLETE): _same(_L.IDLE),
    **{
        (state, message): _same(state)
        for state in (_L.CONNECTED, _L.ENUMERATING, _L.READY)
        for message in (
            M.MODIFY_CONNECTION,
            M.MODIFY_CONNECTION_RESPONSE,
            M.PAUSE,
            M.PAUSE_RESPONSE,
            M.RESUME,
        )
    },
    **{(state, M.OFFER_CHANNEL): _same(state) for state in (_L.ENUMERATING, _L.READY)},
    # A connection to a service may be asked for before the offers are; its channel is offered with them.
    **{
        (state, message): _same(state)
        for state in (_L.CONNECTED, _L.ENUMERATING, _L.READY)
        for message in (M.TL_CONNECT_REQUEST, M.TL_CONNECT_REQUEST_RESULT)
    },
}

CHANNEL: Final[Table[ChannelState]] = {
    (_C.ABSENT, M.OFFER_CHANNEL): _same(_C.OFFERED),
    (_C.OFFERED, M.OPEN_CHANNEL): _same(_C.OPENING),
    (_C.OPENING, M.OPEN_CHANNEL_RESULT): (_C.OPEN, _C.OFFERED),
    (_C.OPEN, M.CLOSE_CHANNEL): _same(_C.OFFERED),
    (_C.OPEN, M.MODIFY_CHANNEL): _same(_C.OPEN),
    (_C.OPEN, M.MODIFY_CHANNEL_RESPONSE): _same(_C.OPEN),
    (_C.OFFERED, M.OPEN_RESERVED_CHANNEL): _same(_C.OPENING_RESERVED),
    (_C.OPENING_RESERVED, M.OPEN_CHANNEL_RESULT): (_C.RESERVED, _C.OFFERED),
    (_C.RESERVED, M.CLOSE_RESERVED_CHANNEL): _same(_C.CLOSING_RESERVED),
    (_C.CLOSING_RESERVED, M.CLOSE_RESERVED_RESPONSE): _same(_C.OFFERED),
    # A guest that has no use for an offer may give the id back without having been asked to.
    (_C.OFFERED, M.REL_ID_RELEASED): _same(_C.ABSENT),
    (_C.RESCINDED, M.REL_ID_RELEASED): _same(_C.ABSENT),
    **{
        (state, M.RESCIND_CHANNEL_OFFER): _same(_C.RESCINDED)
        for state in (
            _C.OFFERED,
            _C.OPENING,
            _C.OPEN,
            _C.OPENING_RESERVED,
            _C.RESERVED,
            _C.CLOSING_RESERVED,
        )
    },
    # GPADLs may be made for and taken from a channel in any of these states.
    **{
        (state, message): _same(state)
        for state in (_C.OFFERED, _C.OPENING, _C.OPEN, _C.RESCINDED)
        for message in (M.GPADL_HEADER, M.GPADL_BODY, M.GPADL_CREATED, M.GPADL_TEARDOWN, M.GPADL_TORNDOWN)
    },
    # These crossed the rescind on their way.
    **{
        (_C.RESCINDED, message): _same(_C.RESCINDED)
        for message in (
            M.OPEN_CHANNEL,
            M.OPEN_CHANNEL_RESULT,
            M.CLOSE_CHANNEL,
            M.MODIFY_CHANNEL,
            M.MODIFY_CHANNEL_RESPONSE,
            M.OPEN_RESERVED_CHANNEL,
            M.CLOSE_RESERVED_CHANNEL,
            M.CLOSE_RESERVED_RESPONSE,
        )
    },
}

GPADL: Final[Table[GpadlState]] = {
    (_G.ABSENT, M.GPADL_HEADER): _same(_G.BUILDING),
    (_G.BUILDING, M.GPADL_BODY): _same(_G.BUILDING),
    (_G.BUILDING, M.GPADL_CREATED): (_G.CREATED, _G.ABSENT),
    (_G.CREATED, M.GPADL_TEARDOWN): _same(_G.TEARING_DOWN),
    (_G.TEARING_DOWN, M.GPADL_TORNDOWN): _same(_G.ABSENT),
}


def allowed(table: Table[S], state: S, message: M) -> bool:
    """Whether `message` may be sent in `state`."""
    return (state, message) in table


def step(
    table: Table[S], state: S, message: M, error: type[Exception], what: str = "", *, ok: bool = True
) -> S:
    """The state after `message`.

    Args:
        table: `CONNECTION`, `CHANNEL` or `GPADL`.
        state: the state now.
        message: what is sent or was received.
        error: what to raise if the table has no such step: `RemoteProtocolError` if the peer sent it,
            `LocalProtocolError` if our caller wants to.
        what: what the state is of, for the error's text.
        ok: whether an answer says success.
    """
    try:
        succeeded, failed = table[state, message]
    except KeyError:
        raise error(f"{message.name} while {what or type(state).__name__} is {state.value}") from None
    return succeeded if ok else failed

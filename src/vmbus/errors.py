"""Every error that the package raises on purpose, in one tree under `VmbusError`.

Compiled code that runs without the GIL returns negative codes; the thin Python classes around it raise
these at the edge. Whatever a message quotes from a guest, an image or a server goes through `printable`.
"""

from typing import Any

__all__ = [
    "DeviceError",
    "EngineError",
    "GuestMemoryError",
    "HypercallError",
    "LocalProtocolError",
    "ProtocolError",
    "RemoteProtocolError",
    "RingCorrupt",
    "RingEmpty",
    "RingError",
    "RingFull",
    "VmbusError",
    "printable",
]


def printable(text: str, limit: int = 256) -> str:
    """Text of somebody who is not trusted, as a message may show it on a terminal or in a log.

    Control characters, line ends, marks that change the direction of writing, and whatever else shows no glyph of
    its own become escapes as in a Python literal (``\\x1b``, ``\\u202e``), so that the text stays on its line and
    cannot command a terminal. Of a long text the beginning and the end are kept.

    Args:
        text: any string, also one with lone surrogates.
        limit: characters of it that are shown at most; the escapes of one character count as one.
    """
    if len(text) > limit:
        tail = limit // 3
        text = f"{text[: limit - tail]}…{text[len(text) - tail :]}"
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text
    )


class VmbusError(Exception):
    """Base of all errors of this package. All of them can be pickled, so they cross process boundaries."""

    def __reduce__(self) -> tuple[Any, ...]:
        # By default an error is made again by calling its class with the message, which fails, or makes another
        # error, where the class makes its message from other arguments.
        return _again, (type(self), self.args), self.__dict__


def _again(kind: type[VmbusError], args: tuple[Any, ...]) -> VmbusError:
    return kind.__new__(kind, *args)


class ProtocolError(VmbusError):
    """A rule of a VMBus protocol was broken."""


class LocalProtocolError(ProtocolError):
    """Our own caller asked for something the protocol forbids now; the state is unchanged."""


class RemoteProtocolError(ProtocolError):
    """The peer broke the protocol: a malformed, unknown or out-of-order message."""


class RingError(VmbusError):
    """Base of the ring buffer's errors."""


class RingFull(RingError):
    """The packet does not fit now: the reader has not freed enough space yet."""


class RingEmpty(RingError):
    """There is no complete packet to read now."""


class RingCorrupt(RingError):
    """The peer left the ring in a state that no correct peer can produce; close the channel."""


class GuestMemoryError(VmbusError):
    """A guest physical range is outside the partition or mapped without the access asked for."""


class HypercallError(VmbusError):
    """A hypercall ended with a status other than HV_STATUS_SUCCESS.

    Attributes:
        status: the HV_STATUS value (TLFS appendix B).
    """

    def __init__(self, status: int, message: str = "") -> None:
        name = getattr(
            status, "name", ""
        )  # a member of `vmbus.hypervisor.tlfs.Status` knows what it is called
        status_name = f"HV_STATUS_{name} (0x{status:04x})" if name else f"HV_STATUS 0x{status:04x}"
        super().__init__(message or f"hypercall failed with {status_name}")
        self.status = status


class DeviceError(VmbusError):
    """A device or its backend cannot do what was asked (bad image, failing disk, missing LUN)."""


class EngineError(VmbusError):
    """The engine that executes a guest cannot go on (unknown instruction, engine not usable)."""

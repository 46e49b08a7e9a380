"""Every error that the package raises on purpose, in one tree under `VmbusError`.

Compiled code that runs without the GIL returns negative codes; the thin Python classes around it raise
these at the edge.
"""

from typing import Any

__all__ = [
    "BudgetExceeded",
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
]


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
        super().__init__(message or f"hypercall failed with HV_STATUS 0x{status:04x}")
        self.status = status


class BudgetExceeded(VmbusError):
    """A guest asked for more of its host than its budget, or the process, has for it; nothing was taken.

    It costs the guest what it asked for (a channel, a GPADL, a hypercall's success), and others nothing.
    """


class DeviceError(VmbusError):
    """A device or its backend cannot do what was asked (bad image, failing disk, missing LUN)."""


class EngineError(VmbusError):
    """The engine that executes a guest cannot go on (unknown instruction, engine not usable)."""

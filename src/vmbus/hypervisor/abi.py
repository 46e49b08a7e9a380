"""The hypercall interface: control word, calling forms, and how a call is declared (TLFS chapter 4)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

from vmbus.hypervisor.tlfs import CallCode

if TYPE_CHECKING:
    from vmbus.hypervisor.vp import VirtualProcessor

__all__ = ["Call", "RepCall", "RepStep", "control"]

FAST: Final = 1 << 16
VARIABLE_SHIFT: Final = 17
REP_COUNT_SHIFT: Final = 32
REP_START_SHIFT: Final = 48
RESERVED: Final = 0xF000_F000_F800_0000
"""Bits of the control word that must be zero: 31:27, 47:44, 63:60 (TLFS, hypercall interface)."""

SimpleHandler: TypeAlias = "Callable[[VirtualProcessor, bytes], bytes | None]"
"""``handler(vp, input) -> output``; raises `HypercallError`."""
RepStep: TypeAlias = "Callable[[int, bytes], bytes | None]"
"""``step(index, element) -> output element``; raises `HypercallError` to stop there."""
RepHandler: TypeAlias = "Callable[[VirtualProcessor, bytes], RepStep]"
"""``handler(vp, header) -> step``; what the step function then does for each element."""


@dataclass(frozen=True, slots=True)
class Call:
    """A simple hypercall.

    Attributes:
        code: its call code.
        handler: what it does.
        input_size: bytes of its fixed input.
        output_size: bytes of its output.
        privilege: what the caller must hold, else HV_STATUS_ACCESS_DENIED.
        variable: whether a variable-sized header may follow the fixed input.
    """

    code: CallCode
    handler: SimpleHandler
    input_size: int
    output_size: int = 0
    privilege: int = 0
    variable: bool = False


@dataclass(frozen=True, slots=True)
class RepCall:
    """A rep hypercall: a header, then elements that are worked off one by one and can stop in between.

    Attributes:
        code: its call code.
        handler: validates the header and gives the step function.
        header_size: bytes of the fixed header.
        element_size: bytes of one input element, 0 if there is none.
        output_element_size: bytes of one output element, 0 if there is none.
        privilege: what the caller must hold, else HV_STATUS_ACCESS_DENIED.
        variable: whether a variable-sized header may follow the fixed one.
    """

    code: CallCode
    handler: RepHandler
    header_size: int
    element_size: int = 0
    output_element_size: int = 0
    privilege: int = 0
    variable: bool = False


def control(
    code: int, *, fast: bool = False, variable: int = 0, rep_count: int = 0, rep_start: int = 0
) -> int:
    """A hypercall control word; `variable` is the size of the variable header in 8-byte units."""
    return (
        code
        | (FAST if fast else 0)
        | variable << VARIABLE_SHIFT
        | rep_count << REP_COUNT_SHIFT
        | rep_start << REP_START_SHIFT
    )

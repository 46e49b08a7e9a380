"""Taking a hypercall apart, checking it, and calling what it names (TLFS, hypercall interface).

All checks are on copies: input is copied out of the guest's page once, before anything looks at it.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from vmbus.errors import BudgetExceeded, GuestMemoryError, HypercallError
from vmbus.hypervisor import calls_ipc, calls_partition, calls_vp
from vmbus.hypervisor.abi import (
    FAST,
    REP_COUNT_SHIFT,
    REP_START_SHIFT,
    RESERVED,
    VARIABLE_SHIFT,
    Call,
    RepCall,
)
from vmbus.hypervisor.faults import UndefinedOpcodeFault
from vmbus.hypervisor.personality import XMM_INPUT_AVAILABLE, XMM_OUTPUT_AVAILABLE
from vmbus.hypervisor.tlfs import HV_PAGE_SIZE, XMM_INPUT_SIZE, CallCode, Status
from vmbus.trace.names import hypercall_name

if TYPE_CHECKING:
    from vmbus.hypervisor.vp import VirtualProcessor

__all__ = ["CALLS", "dispatch"]

CALLS: Final[dict[int, Call | RepCall]] = {
    int(call.code): replace(call, privilege=int(call.privilege))
    for call in (*calls_ipc.CALLS, *calls_partition.CALLS, *calls_vp.CALLS)
}
"""Every implemented hypercall by code."""

_REGISTER_PAIR: Final = 16
_FAST_SIGNAL: Final = CallCode.SIGNAL_EVENT | FAST


_NO_ROOM: Final = (BudgetExceeded, OSError, MemoryError)
"""What means that the host, or the caller's budget, has no room for what a hypercall asks."""


def _no_room(vp: "VirtualProcessor", error: Exception) -> Status:
    """An event about the caller, which learns that there is no memory; the host and its other guests go on."""
    vp.partition.provider_failed(error)
    return Status.INSUFFICIENT_MEMORY


def dispatch(vp: "VirtualProcessor", control: int, input: int, output: int, xmm: bytes) -> int:
    """Perform one hypercall of `vp`; the 64-bit result (`VirtualProcessor.hypercall` documents the arguments)."""
    try:
        if control == _FAST_SIGNAL:  # by far the most frequent one
            calls_ipc.signal_event(vp, input & 0xFFFF_FFFF, input >> 32 & 0xFFFF, input >> 48)
            return 0
        call = CALLS.get(control & 0xFFFF)
        if call is None:
            return Status.INVALID_HYPERCALL_CODE
        if control & RESERVED:
            return Status.INVALID_HYPERCALL_INPUT
        if call.privilege & ~vp.partition.privileges:
            return Status.ACCESS_DENIED
        if isinstance(call, RepCall):
            return _rep(vp, call, control, input, output, xmm)
        return _simple(vp, call, control, input, output, xmm)
    except HypercallError as error:
        return error.status
    except _NO_ROOM as error:
        return _no_room(vp, error)


def _simple(vp: "VirtualProcessor", call: Call, control: int, input: int, output: int, xmm: bytes) -> int:
    variable = control >> VARIABLE_SHIFT & 0x3FF
    if control >> REP_COUNT_SHIFT or (variable and not call.variable):
        return Status.INVALID_HYPERCALL_INPUT
    size = call.input_size + 8 * variable
    data = _input(vp, control, input, output, xmm, size, call.output_size)
    result = call.handler(vp, data)
    if result:
        _output(vp, control, output, size, 0, result)
    return Status.SUCCESS


def _rep(vp: "VirtualProcessor", call: RepCall, control: int, input: int, output: int, xmm: bytes) -> int:
    variable = control >> VARIABLE_SHIFT & 0x3FF
    count = control >> REP_COUNT_SHIFT & 0xFFF
    start = control >> REP_START_SHIFT & 0xFFF
    if start >= count or (variable and not call.variable):
        return Status.INVALID_HYPERCALL_INPUT
    header = call.header_size + 8 * variable
    size = header + count * call.element_size
    data = _input(vp, control, input, output, xmm, size, count * call.output_element_size)
    status, done, results = Status.SUCCESS, start, []
    try:
        step = call.handler(vp, data[:header])
        width = call.element_size
        for done in range(start, count):
            element = data[header + done * width : header + (done + 1) * width]
            results.append(step(done, element))
        done = count
    except HypercallError as error:
        status = Status(error.status)
    except _NO_ROOM as error:
        status = _no_room(vp, error)
    if call.output_element_size and results:
        produced = b"".join(result or bytes(call.output_element_size) for result in results)
        _output(vp, control, output, size, start * call.output_element_size, produced)
    return status | done << REP_COUNT_SHIFT


def _input(
    vp: "VirtualProcessor", control: int, input: int, output: int, xmm: bytes, size: int, output_size: int
) -> bytes:
    """Copy the input, and make sure before anything happens that the output will have a place.

    Raises:
        HypercallError: INVALID_HYPERCALL_INPUT if the parameters do not fit into registers, INVALID_ALIGNMENT
            if a parameter list is not 8-byte aligned, crosses a page, or lies where the partition has no such
            memory (TLFS, hypercall interface).
        UndefinedOpcodeFault: the parameters need XMM registers, which CPUID does not offer this partition
            (TLFS, extended fast hypercalls).
    """
    if control & FAST:
        features = vp.partition.personality.features
        if _pairs(size) + output_size > _REGISTER_PAIR + XMM_INPUT_SIZE:
            raise HypercallError(Status.INVALID_HYPERCALL_INPUT)
        if (size > _REGISTER_PAIR and not features & XMM_INPUT_AVAILABLE) or (
            output_size and not features & XMM_OUTPUT_AVAILABLE
        ):
            raise UndefinedOpcodeFault(
                f"{hypercall_name(control & 0xFFFF)} with XMM registers, which this partition does not have"
            )
        vp.fast_output = b""
        registers = (input & 0xFFFF_FFFF_FFFF_FFFF | output << 64).to_bytes(_REGISTER_PAIR, "little") + xmm
        return registers.ljust(size, b"\0")[:size]
    if output_size:
        if output & 7 or (output & 0xFFF) + output_size > HV_PAGE_SIZE:
            raise HypercallError(Status.INVALID_ALIGNMENT)
        try:
            # The output page is written before the call is made: it must not fail after its effects took place.
            vp.partition.memory.write(output, vp.partition.memory.read(output, output_size))
        except (GuestMemoryError, OverflowError):
            raise HypercallError(Status.INVALID_ALIGNMENT) from None
    if not size:
        return b""
    if input & 7 or (input & 0xFFF) + size > HV_PAGE_SIZE:
        raise HypercallError(Status.INVALID_ALIGNMENT)
    try:
        return vp.partition.memory.read(input, size)
    except (GuestMemoryError, OverflowError):
        raise HypercallError(Status.INVALID_ALIGNMENT) from None


def _pairs(size: int) -> int:
    """`size` rounded up to whole register pairs."""
    return -(-size // _REGISTER_PAIR) * _REGISTER_PAIR


def _output(
    vp: "VirtualProcessor", control: int, output: int, input_size: int, offset: int, data: bytes
) -> None:
    if control & FAST:
        vp.fast_output = bytes(offset) + data
        return
    try:
        vp.partition.memory.write(output + offset, data)
    except GuestMemoryError:  # another processor of the parent unmapped it during the call
        raise HypercallError(Status.INVALID_ALIGNMENT) from None

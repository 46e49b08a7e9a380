"""The local APIC of one virtual processor: interrupt requests, priorities, IPIs and the local timer.

Registers and behaviour are those of the xAPIC at 0xFEE00000 and, once the guest has switched to it, the x2APIC at MSRs
0x800-0x83F (Intel SDM volume 3, chapter 11), as far as an unmodified guest kernel uses them; Hyper-V's EOI, ICR and
TPR MSRs (TLFS, virtual interrupts) are shortcuts to the same state in either mode. The model holds no lock but one for
its timer: its virtual processor calls it under its own.
"""

import threading
from collections.abc import Callable
from enum import IntEnum
from functools import partial
from typing import Final, NamedTuple

from vmbus.hypervisor.clock import Clock, Timer

__all__ = [
    "APIC_BASE",
    "APIC_SIZE",
    "NMI_VECTOR",
    "ApicMode",
    "DeliveryMode",
    "Ipi",
    "LocalApic",
    "Register",
    "x2apic_id",
]

APIC_BASE: Final = 0xFEE0_0000
APIC_SIZE: Final = 0x1000
FIRST_VALID_VECTOR: Final = 16
"""Vectors 0-15 are illegal in fixed delivery (SDM 11.5.2)."""
NMI_VECTOR: Final = 2
"""The vector of non-maskable interrupts (SDM 6.3.1)."""
MIN_TIMER_PERIOD: Final = 10_000
"""Shortest period of the local timer, in ns: a guest must not be able to occupy its host with ticks."""

_LVT: Final = (0x320, 0x330, 0x340, 0x350, 0x360, 0x370)
"""Offsets of the local vector table: timer, thermal, performance, LINT0, LINT1, error (SDM 11.5.1)."""
_DIVISORS: Final = (2, 4, 8, 16, 32, 64, 128, 1)
_MASKED: Final = 1 << 16


class Register(IntEnum):
    """Offsets of the xAPIC's registers (SDM table 11-1)."""

    ID = 0x20
    VERSION = 0x30
    TPR = 0x80
    PPR = 0xA0
    EOI = 0xB0
    LDR = 0xD0
    DFR = 0xE0
    SPURIOUS = 0xF0
    ISR = 0x100
    TMR = 0x180
    IRR = 0x200
    ESR = 0x280
    ICR_LOW = 0x300
    ICR_HIGH = 0x310
    LVT_TIMER = 0x320
    LVT_THERMAL = 0x330
    LVT_PERFMON = 0x340
    LVT_LINT0 = 0x350
    LVT_LINT1 = 0x360
    LVT_ERROR = 0x370
    INITIAL_COUNT = 0x380
    CURRENT_COUNT = 0x390
    DIVIDE = 0x3E0


class ApicMode(IntEnum):
    """Bits 11 (enabled) and 10 (x2APIC) of IA32_APIC_BASE (SDM 11.12.1)."""

    DISABLED = 0
    XAPIC = 2
    X2APIC = 3


class DeliveryMode(IntEnum):
    """Delivery modes of the ICR and of MSIs (SDM 11.6.1)."""

    FIXED = 0
    LOWEST_PRIORITY = 1
    SMI = 2
    NMI = 4
    INIT = 5
    STARTUP = 6
    EXTINT = 7


class TimerMode(IntEnum):
    """LVT timer bits 18:17 (SDM 11.5.4)."""

    ONE_SHOT = 0
    PERIODIC = 1
    TSC_DEADLINE = 2


class Ipi(NamedTuple):
    """An interprocessor interrupt as the ICR described it.

    Attributes:
        mode: `DeliveryMode`.
        vector: the vector, or the start-up page of a STARTUP.
        shorthand: 0 destination field, 1 self, 2 all, 3 all but self.
        logical: the destination is a logical one (`LocalApic.matches`).
        destination: destination field; 8 bits, in x2APIC mode 32.
    """

    mode: int
    vector: int
    shorthand: int
    logical: bool
    destination: int


def x2apic_id(apic_id: int) -> int:
    """The logical x2APIC id: cluster in the high half, one bit of 16 in the low (SDM 11.12.10.2)."""
    return (apic_id >> 4) << 16 | 1 << (apic_id & 15)


class LocalApic:
    """One local APIC; 256-bit IRR, ISR and TMR are plain integers.

    Args:
        apic_id: the initial APIC id.
        clock: what the local timer runs on.
        tsc_frequency: Hz of the guest's TSC (for the TSC-deadline mode).
        timer_frequency: Hz of the local timer's input clock (HV_X64_MSR_APIC_FREQUENCY).
        raise_interrupt: called, outside any lock, when the local timer fires: ``raise_interrupt(vector)``.
        send_ipi: called when the guest writes the ICR.
    """

    def __init__(
        self,
        apic_id: int,
        clock: Clock,
        tsc_frequency: int,
        timer_frequency: int,
        raise_interrupt: Callable[[int], object],
        send_ipi: Callable[[Ipi], None],
    ) -> None:
        self.apic_id = apic_id
        self.irr = 0
        self.isr = 0
        self.tmr = 0
        self.tpr = 0
        """Task priority register (8 bits)."""
        self._auto_eoi = 0
        self._clock = clock
        self._tsc_frequency = tsc_frequency
        self._timer_frequency = timer_frequency
        self._raise = raise_interrupt
        self._send_ipi = send_ipi
        self._timer: Timer | None = None
        self._armed = 0  # counts how often the timer was started or stopped
        self._timer_lock = threading.RLock()  # timers fire in whatever thread keeps the time
        self.closed = False
        """Its processor is gone: the local timer is not armed any more."""
        self._timer_start = 0
        self._deadline = 0
        self._tsc_offset = 0
        self._enabled = True
        self.mode = ApicMode.XAPIC
        self.external: int | None = None
        """The vector of an external interrupt (ExtINT) that its parent has asserted and nobody has taken."""
        self.external_acknowledged = False
        """An external interrupt was taken and its parent has not cleared it (HvCallClearVirtualInterrupt)."""
        self._registers: dict[int, int] = {}
        self.reset()

    def reset(self) -> None:
        """The state that firmware leaves behind: software-enabled xAPIC, LVTs masked, nothing pending."""
        self.irr = self.isr = self.tmr = self._auto_eoi = 0
        self.tpr = 0
        self.external, self.external_acknowledged = None, False
        self.mode = ApicMode.XAPIC
        self._enabled = True  # SPURIOUS bit 8
        self._registers = {
            Register.LDR: 0,
            Register.DFR: 0xFFFF_FFFF,
            Register.SPURIOUS: 0x1FF,
            Register.ESR: 0,
            Register.ICR_LOW: 0,
            Register.ICR_HIGH: 0,
            Register.LVT_TIMER: _MASKED,
            Register.LVT_THERMAL: _MASKED,
            Register.LVT_PERFMON: _MASKED,
            Register.LVT_LINT0: _MASKED,
            Register.LVT_LINT1: _MASKED,
            Register.LVT_ERROR: _MASKED,
            Register.INITIAL_COUNT: 0,
            Register.DIVIDE: 0,
        }
        self._stop_timer()

    # Interrupts

    @property
    def enabled(self) -> bool:
        """Whether it takes fixed interrupts: enabled in IA32_APIC_BASE and by software (SPURIOUS bit 8)."""
        return self._enabled

    def request(self, vector: int, auto_eoi: bool = False, level: bool = False) -> bool:
        """Set `vector` in the IRR; False if the APIC is software-disabled or the vector illegal."""
        if not FIRST_VALID_VECTOR <= vector <= 255 or not self._enabled:
            return False
        bit = 1 << vector
        self.irr |= bit
        self.tmr = self.tmr | bit if level else self.tmr & ~bit
        self._auto_eoi = self._auto_eoi | bit if auto_eoi else self._auto_eoi & ~bit
        return True

    @property
    def deliverable(self) -> bool:
        """Whether an interrupt of a high enough priority, or an external one, waits."""
        irr = self.irr
        if irr and (irr.bit_length() - 1) >> 4 > self.processor_priority >> 4:
            return True
        return self.external is not None

    @property
    def processor_priority(self) -> int:
        """PPR: the higher of the task priority and the class of what is in service (SDM 11.8.3.1)."""
        tpr = self.tpr
        isr = self.isr
        if isr:
            in_service = (isr.bit_length() - 1) & 0xF0
            if in_service > tpr & 0xF0:
                return in_service
        return tpr

    def accept(self) -> int | None:
        """Take the highest deliverable vector into service, as an INTA cycle does; None if there is none.

        An external interrupt goes first; it has no priority, is not in service, and takes no EOI (SDM 11.8.1).
        """
        if self.external is not None:
            vector, self.external = self.external, None
            self.external_acknowledged = True
            return vector
        irr = self.irr
        if not irr:
            return None
        vector = irr.bit_length() - 1
        if vector >> 4 <= self.processor_priority >> 4:
            return None
        bit = 1 << vector
        self.irr = irr & ~bit
        if not self._auto_eoi & bit:
            self.isr |= bit
        return vector

    def eoi(self) -> int | None:
        """End the highest interrupt in service; its vector, None if none was."""
        isr = self.isr
        if not isr:
            return None
        vector = isr.bit_length() - 1
        self.isr = isr & ~(1 << vector)
        return vector

    def matches(self, destination: int, logical: bool) -> bool:
        """Whether an interrupt to `destination` means this APIC (SDM 11.6.2, 11.12.9: flat, cluster, x2APIC)."""
        if self.mode == ApicMode.X2APIC:
            if not logical:
                return destination in (
                    self.apic_id,
                    0xFF,
                    0xFFFF_FFFF,
                )  # the short broadcast: from xAPIC senders
            own = x2apic_id(self.apic_id)
            return destination >> 16 == own >> 16 and bool(destination & own & 0xFFFF)
        if not logical:
            return destination in (self.apic_id, 0xFF)
        ldr = self._registers[Register.LDR] >> 24
        if self._registers[Register.DFR] >> 28 == 0xF:
            return bool(ldr & destination)
        return ldr >> 4 == destination >> 4 and bool(ldr & destination & 0xF)

    # Registers

    @property
    def icr(self) -> int:
        """The 64-bit interrupt command register."""
        return self._registers[Register.ICR_LOW] | self._registers[Register.ICR_HIGH] << 32

    def write_icr(self, value: int) -> None:
        """Send an IPI: both halves of the ICR at once (HV_X64_MSR_ICR, and the x2APIC's)."""
        wide = self.mode == ApicMode.X2APIC
        self._registers[Register.ICR_HIGH] = value >> 32 & (0xFFFF_FFFF if wide else 0xFF00_0000)
        self._write_icr_low(value & 0xFFFF_FFFF)

    def _write_icr_low(self, value: int) -> None:
        self._registers[Register.ICR_LOW] = value & ~0x1000
        high = self._registers[Register.ICR_HIGH]
        self._send_ipi(
            Ipi(
                value >> 8 & 7,
                value & 0xFF,
                value >> 18 & 3,
                bool(value & 0x800),
                high if self.mode == ApicMode.X2APIC else high >> 24,
            )
        )

    def switch(self, mode: int) -> bool:
        """Change to the `ApicMode` that a write of IA32_APIC_BASE asks for; False for a change that #GPs (SDM 11.12.5).

        The local APIC forgets everything when it is disabled; from x2APIC mode no other way leads back.
        """
        if mode == self.mode:
            return True
        if mode not in (ApicMode.DISABLED, ApicMode.XAPIC, ApicMode.X2APIC):
            return False
        if (self.mode, mode) in ((ApicMode.X2APIC, ApicMode.XAPIC), (ApicMode.DISABLED, ApicMode.X2APIC)):
            return False
        if mode == ApicMode.DISABLED:
            self.reset()
            self._enabled = False
        elif self.mode == ApicMode.DISABLED:
            self.reset()
        self.mode = ApicMode(mode)
        return True

    def read(self, offset: int) -> int:
        """Read the 32-bit register at `offset` (a multiple of 16); reserved ones read as zero."""
        if Register.ISR <= offset < Register.ESR:
            word = offset >> 4 & 7
            bank = (self.isr, self.tmr, self.irr)[(offset - Register.ISR) >> 7]
            return bank >> 32 * word & 0xFFFF_FFFF
        if offset == Register.CURRENT_COUNT:
            return self.current_count()
        if offset == Register.ID:
            return self.apic_id if self.mode == ApicMode.X2APIC else self.apic_id << 24
        if offset == Register.VERSION:
            return 0x0005_0014
        if offset == Register.TPR:
            return self.tpr
        if offset == Register.PPR:
            return self.processor_priority
        if offset == Register.LDR and self.mode == ApicMode.X2APIC:
            return x2apic_id(self.apic_id)
        return self._registers.get(offset, 0)

    def write(self, offset: int, value: int) -> int | None:
        """Write the register at `offset`; writes to read-only or reserved ones are ignored.

        Returns:
            The vector that ended, if this was an EOI.
        """
        value &= 0xFFFF_FFFF
        if offset == Register.EOI:
            return self.eoi()
        if offset == Register.ICR_LOW:
            self._write_icr_low(value)
        elif offset == Register.TPR:
            self.tpr = value & 0xFF
        elif offset == Register.ESR:
            self._registers[offset] = 0
        elif offset == Register.LVT_TIMER:
            # Between one-shot and periodic the count goes on; the deadline is another timer (SDM 11.5.4, 11.5.4.1).
            before = self._registers[offset] >> 17 & 3
            if value >> 17 & 3 != before and TimerMode.TSC_DEADLINE in (value >> 17 & 3, before):
                self._deadline = 0
                self._stop_timer()
            self._registers[offset] = value & 0x0007_00FF | (0 if self._enabled else _MASKED)
        elif offset == Register.INITIAL_COUNT:
            self._registers[offset] = value
            self._start_timer()
        elif offset == Register.DIVIDE:
            self._registers[offset] = value & 0xB
        elif offset == Register.LDR:
            self._registers[offset] = value & 0xFF00_0000
        elif offset == Register.DFR:
            self._registers[offset] = value | 0x0FFF_FFFF
        elif offset == Register.ICR_HIGH:
            self._registers[offset] = value & 0xFF00_0000
        elif offset in self._registers:
            self._registers[offset] = value & 0x0001_F7FF
            if offset == Register.SPURIOUS:
                self._enabled = bool(value & 0x100)
            if not self._enabled:
                # While it is disabled by software the whole local vector table is masked (SDM 11.4.7.2).
                for entry in _LVT:
                    self._registers[entry] |= _MASKED
        return None

    # The local timer

    @property
    def tsc_deadline(self) -> int:
        """IA32_TSC_DEADLINE: the armed deadline in TSC ticks, 0 when disarmed or not in that mode."""
        return self._deadline

    @tsc_deadline.setter
    def tsc_deadline(self, value: int) -> None:
        if self._registers[Register.LVT_TIMER] >> 17 & 3 != TimerMode.TSC_DEADLINE:
            return
        with self._timer_lock:
            self._stop_timer()
            self._deadline = value
            if value:
                # Round up: the guest's handler must find that its deadline has passed.
                due = -((self._tsc_offset - value) * 1_000_000_000 // self._tsc_frequency)
                self._arm(max(due, self._clock.now() + 1))

    @property
    def tsc_offset(self) -> int:
        """What is added to the clock's ticks to give this processor's TSC."""
        return self._tsc_offset

    @tsc_offset.setter
    def tsc_offset(self, value: int) -> None:
        self._tsc_offset = value
        if self._deadline:
            self.tsc_deadline = self._deadline

    def current_count(self) -> int:
        """What is left of the initial count, 0 when the timer does not run."""
        if self._timer is None or self._registers[Register.LVT_TIMER] >> 17 & 3 == TimerMode.TSC_DEADLINE:
            return 0
        elapsed = (self._clock.now() - self._timer_start) * self._timer_frequency // 1_000_000_000
        elapsed //= self._divisor()
        initial = self._registers[Register.INITIAL_COUNT]
        if self._registers[Register.LVT_TIMER] >> 17 & 3 == TimerMode.PERIODIC:
            return initial - elapsed % initial
        return max(0, initial - elapsed)

    def _divisor(self) -> int:
        divide = self._registers[Register.DIVIDE]
        return _DIVISORS[divide & 3 | divide >> 1 & 4]

    def _period(self) -> int:
        ticks = self._registers[Register.INITIAL_COUNT] * self._divisor()
        return -(-ticks * 1_000_000_000 // self._timer_frequency)

    def _arm(self, due: int) -> None:
        if not self.closed:
            self._armed += 1
            self._timer = self._clock.schedule(due, partial(self._fire, self._armed))

    def _stop_timer(self) -> None:
        with self._timer_lock:
            self._armed += 1
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def _start_timer(self) -> None:
        with self._timer_lock:
            self._stop_timer()
            mode = self._registers[Register.LVT_TIMER] >> 17 & 3
            if mode == TimerMode.TSC_DEADLINE or not self._registers[Register.INITIAL_COUNT]:
                return
            self._timer_start = self._clock.now()
            self._arm(self._timer_start + max(self._period(), 1))

    def _fire(self, armed: int) -> None:
        with self._timer_lock:
            if armed != self._armed:
                return  # stopped, or started anew, since the clock took it out to fire
            lvt = self._registers[Register.LVT_TIMER]
            self._timer = None
            self._deadline = 0
            if lvt >> 17 & 3 == TimerMode.PERIODIC and self._registers[Register.INITIAL_COUNT]:
                self._timer_start = self._clock.now()
                self._arm(self._timer_start + max(self._period(), MIN_TIMER_PERIOD))
        if not lvt & _MASKED:
            self._raise(lvt & 0xFF)

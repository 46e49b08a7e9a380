"""How a run of a guest ended."""

from dataclasses import dataclass
from enum import Enum
from typing import Final

from vmbus.engine.unicorn import Stop
from vmbus.hypervisor import CrashReport

__all__ = ["OUTCOMES", "RESUMABLE", "Outcome", "Result"]


class Outcome(Enum):
    """How a run ended."""

    MATCHED = "the awaited output came"
    POWER_OFF = "the guest turned the machine off"
    REBOOT = "the guest restarted the machine"
    PANIC = "the guest's kernel panicked"
    TRIPLE_FAULT = "the guest's processor shut down (triple fault)"
    HALTED = "the guest halted with interrupts disabled"
    IDLE = "the guest waits for an interrupt that nothing will raise"
    VIRTUAL_TIME = "the virtual time limit was reached"
    WALL_TIME = "the wall-clock time limit was reached"
    STOPPED = "stopped by request"
    SUSPENDED = "its parent suspended the processor"


OUTCOMES: Final = {
    Stop.TRIPLE_FAULT: Outcome.TRIPLE_FAULT,
    Stop.HALTED: Outcome.HALTED,
    Stop.IDLE: Outcome.IDLE,
    Stop.VIRTUAL_TIME: Outcome.VIRTUAL_TIME,
    Stop.WALL_TIME: Outcome.WALL_TIME,
    Stop.REQUESTED: Outcome.STOPPED,
    Stop.SUSPENDED: Outcome.SUSPENDED,
}
"""What it means for the guest that the engine stopped, where nobody has said more."""
RESUMABLE: Final = (
    Outcome.MATCHED,
    Outcome.STOPPED,
    Outcome.SUSPENDED,
    Outcome.VIRTUAL_TIME,
    Outcome.WALL_TIME,
    Outcome.IDLE,
)
"""Outcomes after which the same guest can be run on."""


@dataclass(frozen=True, slots=True)
class Result:
    """What `Machine.run` came to.

    Attributes:
        outcome: how it ended.
        virtual_seconds: the guest's time at that moment.
        wall_seconds: host time that this run took.
        cpu_seconds: processor time of this process that this run took.
        crash: what the guest reported to the hypervisor when it crashed last, if it did. A report is no end: a
            crash kernel may have gone on after it.
        reboots: how often the guest restarted the machine in this run (`Machine` with ``reboot=True``).
    """

    outcome: Outcome
    virtual_seconds: float
    wall_seconds: float
    cpu_seconds: float
    crash: CrashReport | None = None
    reboots: int = 0

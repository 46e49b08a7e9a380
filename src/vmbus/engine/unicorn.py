"""The engine that runs unmodified kernels: virtual processors on the Unicorn library.

`vmbus.core.cpu_unicorn` executes instructions and delivers events; this module gives it the time and says when to stop.
Every exit is answered by the `VirtualProcessor` itself, on the thread that calls `run`: providers behind a
doorbell hypercall have done their work when the guest's instruction ends. With a `VirtualClock` a run therefore
repeats exactly: nothing in it depends on the host's time.

Several processors take turns, on one thread and one clock: each executes until it halts, until its slice of time is
over, or until an interrupt wakes another that has halted.
"""

import importlib.util
import time
from collections.abc import Callable, Sequence
from enum import Enum
from functools import partial
from pathlib import Path

from vmbus.core import cpu_unicorn
from vmbus.engine.pace import Pace
from vmbus.errors import EngineError
from vmbus.hypervisor import GuestFault, VirtualClock, VirtualProcessor
from vmbus.hypervisor.apic import DeliveryMode, Ipi

__all__ = ["Stop", "UnicornEngine", "find_library"]

FOREVER = (1 << 64) - 1
POLL_TICKS = 20_000_000
"""How often, in virtual ns, the host's own business is looked at: tens of milliseconds of host time."""
POLL_EXITS = 2000
"""The same in exits: a guest that polls a device takes far more host time than its own."""
LONGEST_WITHOUT_POLL = 0.25
"""The same in seconds of host time, for a guest whose code takes far more of it than of its own. More often would bring
a slow guest more frames from its networks than it has room for."""
SLICE = 100_000
"""Ticks that a processor executes while others could, too."""
TSC_FREQUENCY = 1_000_000_000
"""Hz; a tick of the engine is a nanosecond."""


class Stop(Enum):
    """Why `UnicornEngine.run` returned."""

    REQUESTED = "stopped by request"
    TRIPLE_FAULT = "triple fault"
    HALTED = "halted with interrupts disabled"
    IDLE = "waits for an interrupt that nothing will raise"
    VIRTUAL_TIME = "virtual time limit reached"
    WALL_TIME = "wall-clock time limit reached"
    SUSPENDED = "suspended by its parent"


def find_library() -> Path:
    """The shared library inside the installed ``unicorn`` package, without importing that package.

    Raises:
        EngineError: the package is not installed, or holds no library.
    """
    spec = importlib.util.find_spec("unicorn")
    places = spec.submodule_search_locations if spec is not None else None
    for place in places or ():
        for library in sorted(Path(place, "lib").glob("libunicorn.so*")):
            return library
    raise EngineError("running a real kernel needs the unicorn package: pip install 'vmbus[guest]'")


class _State(Enum):
    """What a processor would do if it had the engine."""

    WAITS = "for a STARTUP IPI"
    RUNS = "execute"
    HALTED = "wait for an interrupt"
    PARKED = "wait for an NMI: halted with interrupts disabled"


class UnicornEngine:
    """Runs the code of a partition's virtual processors until something stops it.

    Args:
        vps: all processors of one partition; its hypervisor must have a `VirtualClock` and a TSC of 1 GHz. The
            first one is the boot processor, the others wait for INIT and STARTUP.
        translation_cache: bytes for translated code; it is filled only as far as needed.

    Raises:
        EngineError: there is no usable Unicorn library, or the clock does not fit.

    Attributes:
        cpu: the compiled processor, which executes all of them.
        vp: the one that executes now.
        idle: called with the ns until the next timer (None if none is set) while the guest waits for an
            interrupt; returns True to be called again (something came from outside, or may still come), False to
            go on to that timer. Without it idle time is skipped.
        paced: whether the guest's clock goes with the host's while it waits, now (see `vmbus.engine.pace`): asked
            before each call of `idle`, whose ns are the host's then. Without it the clock stands still meanwhile.
        pace: how the two clocks go together.
        poll: called now and then while the guest runs, for the host's own business.
    """

    def __init__(self, vps: Sequence[VirtualProcessor], *, translation_cache: int = 256 << 20) -> None:
        vp = vps[0]
        hypervisor = vp.partition.hypervisor
        if not isinstance(hypervisor.clock, VirtualClock) or hypervisor.tsc_frequency != TSC_FREQUENCY:
            raise EngineError("the Unicorn engine needs a VirtualClock and a TSC of 1 GHz: it makes the time")
        cpu_unicorn.load(str(find_library()))
        self.vps = tuple(vps)
        self.vp = vp
        self._current = 0
        self._states = [_State.RUNS] + [_State.WAITS] * (len(vps) - 1)
        self._slice_end = 0
        self.idle: Callable[[int | None], bool] | None = None
        self.paced: Callable[[], bool] | None = None
        self.pace = Pace()
        self.poll: Callable[[], None] | None = None
        self._clock = hypervisor.clock
        self._stop = Stop.REQUESTED
        self._stopping = False
        self._limit = FOREVER
        self._next_poll = 0
        self._polled = 0.0
        self._due = 0
        self._revision = -1
        self._exits = 0
        self._wall_limit = float("inf")
        self.cpu = cpu_unicorn.Cpu(
            vp.partition.memory,
            self.vps,
            fault=GuestFault,
            before=self._before,
            after=self._after,
            after_port=self._after_port,
            on_event=self._event,
            on_look=self._look,
            on_halt=self._halt,
            translation_cache=translation_cache,
        )
        for index, each in enumerate(self.vps):
            each.on_interrupt = partial(self._interrupt, index)
            each.on_startup = partial(self._startup, index)
        vp.partition.on_suspension = self._suspension

    def run(self, *, virtual_limit: int | None = None, wall_limit: float | None = None) -> Stop:
        """Execute the guest.

        Args:
            virtual_limit: the guest's time, in ns since the clock was made, at which to stop.
            wall_limit: `time.monotonic` value at which to stop.

        Returns:
            Why it stopped; `run` may be called again after `REQUESTED`, `SUSPENDED` and the limits.

        Raises:
            EngineError: the engine cannot go on.
            Exception: what a device, a provider or a callback raised.
        """
        if any(vp.suspended for vp in self.vps):
            return Stop.SUSPENDED
        self._limit = FOREVER if virtual_limit is None else virtual_limit
        self._wall_limit = float("inf") if wall_limit is None else wall_limit
        self._stop = Stop.REQUESTED
        self._stopping = False
        self._next_poll = self.cpu.ticks
        self.pace.start(self.cpu.ticks)
        self._after()
        if self._states[self._current] in (_State.HALTED, _State.PARKED):  # it waited when it was stopped
            self._rest()
            if self._stopping:
                return self._stop
        reason = self.cpu.run()
        self._clock.advance_to(self.cpu.ticks)
        if reason == cpu_unicorn.STOP_TRIPLE_FAULT:
            return Stop.TRIPLE_FAULT
        return self._stop

    def stop(self, why: Stop = Stop.REQUESTED) -> None:
        """Make `run` return `why`; for calls from inside it (devices, callbacks)."""
        self._stop = why
        self._stopping = True
        self.cpu.stop()

    def close(self) -> None:
        """Give back the library's memory; the counts stay readable."""
        for vp in self.vps:
            vp.on_interrupt = vp.on_startup = None
        self.vp.partition.on_suspension = None
        self.cpu.close()

    def _before(self, ticks: int) -> None:
        self._exits += 1
        if self._exits >= POLL_EXITS:
            self._exits = 0
            self._next_poll = ticks
            self.cpu.next_event = 0
        if ticks >= self._due:
            self._clock.advance_to(ticks)
        else:
            self._clock.move_to(ticks)

    def _after_port(self) -> None:
        """As `_after`, for exits by the thousand that rarely change anything: what a port did may have set a timer."""
        if self._clock.revision != self._revision:
            self._after()

    # Several processors

    def _awake(self, index: int) -> bool:
        """Whether processor `index` has something to execute."""
        state = self._states[index]
        if state is _State.HALTED:
            return self.vps[index].interrupt_pending or self.vps[index].nmi_pending
        return state is _State.RUNS or (state is _State.PARKED and self.vps[index].nmi_pending)

    def _next(self) -> int | None:
        """Whose turn it is after the current processor's; None if no other has anything to do."""
        count = len(self.vps)
        for step in range(1, count):
            index = (self._current + step) % count
            if self._awake(index):
                return index
        return None

    def _turn(self, index: int) -> None:
        """Processor `index` executes from now on."""
        self._current = index
        self._states[index] = _State.RUNS
        self._slice_end = self.cpu.ticks + SLICE
        if self.vps[index] is not self.vp:
            self.vp = self.vps[index]
            self.cpu.switch(index)

    def _wake(self, index: int) -> None:
        """Processor `index` may have something to do at last: it gets its turn at once."""
        if index != self._current and self._awake(index):
            self._slice_end = 0
            self._revision = -1
            self.cpu.next_event = 0

    def _startup(self, index: int, ipi: Ipi) -> None:
        """INIT and STARTUP (SDM volume 3, section 8.4): the first STARTUP after an INIT counts."""
        if index == self._current:
            return  # a processor that resets itself is left alone
        if ipi.mode == DeliveryMode.INIT:
            self._states[index] = _State.WAITS
        elif self._states[index] is _State.WAITS:
            self.cpu.start(index, ipi.vector)
            self._states[index] = _State.RUNS
            self._wake(index)

    def _interrupt(self, index: int) -> None:
        if index == self._current:
            self.cpu.nmi = self.vp.nmi_pending
            self.cpu.interrupt = True
        elif self._states[index] is not _State.RUNS:
            self._wake(index)

    def _suspension(self, vp: VirtualProcessor) -> None:
        if vp.suspended:
            self.stop(Stop.SUSPENDED)

    def _after(self) -> None:
        """Tell the processor what an exit may have changed: timers, pending interrupts, the TSC's offset."""
        cpu, vp = self.cpu, self.vp
        due = self._clock.next_deadline()
        self._revision = self._clock.revision
        self._due = FOREVER if due is None else due
        event = min(self._next_poll, self._limit, self._due)
        if len(self.vps) > 1 and self._slice_end < event and self._next() is not None:
            event = self._slice_end
        cpu.next_event = event
        cpu.nmi = vp.nmi_pending
        cpu.interrupt = vp.interrupt_pending
        cpu.tsc_offset = vp.tsc_offset

    def _event(self, ticks: int) -> None:
        self._clock.advance_to(ticks)
        if ticks >= self._next_poll:
            self._next_poll = ticks + POLL_TICKS
            self._polled = time.monotonic()
            if self.poll is not None:
                self.poll()
            if time.monotonic() >= self._wall_limit:
                self.stop(Stop.WALL_TIME)
        if ticks >= self._limit:
            self.stop(Stop.VIRTUAL_TIME)
        if len(self.vps) > 1 and ticks >= self._slice_end:
            other = self._next()
            self._turn(self._current if other is None else other)
        self._after()

    def _look(self, ticks: int) -> None:
        """The host's time has moved on, however little the guest's has."""
        now = time.monotonic()
        if now >= self._wall_limit or now - self._polled >= LONGEST_WITHOUT_POLL:
            self._next_poll = ticks
            self._event(ticks)

    def _halt(self, ticks: int, interruptible: bool) -> None:
        self.vp.account.exits["halt"] += 1
        self._clock.advance_to(ticks)
        self._states[self._current] = _State.HALTED if interruptible else _State.PARKED
        if not any(self._awake(i) or s is _State.HALTED for i, s in enumerate(self._states)):
            self.stop(Stop.HALTED)
        self._rest()

    def _rest(self) -> None:
        """Let time pass until a processor has something to execute, or the run ends."""
        clock = self._clock
        while not (self._stopping or self._any_awake()):
            due = clock.next_deadline(idle=True)
            if self._wait_outside(due):
                if time.monotonic() >= self._wall_limit:
                    self.stop(Stop.WALL_TIME)
                elif clock.now() >= self._limit:
                    self.stop(Stop.VIRTUAL_TIME)
                continue
            if due is None:
                self.stop(Stop.IDLE)
            elif due >= self._limit:
                clock.skip_to(self._limit)
                self.stop(Stop.VIRTUAL_TIME)
            elif time.monotonic() >= self._wall_limit:
                self.stop(Stop.WALL_TIME)
            else:
                clock.skip_to(due)
        self.cpu.advance_to(clock.now())
        if self._awake(self._current):
            self._turn(self._current)
        elif (other := self._next()) is not None:
            self._turn(other)
        self._after()

    def _any_awake(self) -> bool:
        return self._awake(self._current) or self._next() is not None

    def _wait_outside(self, due: int | None) -> bool:
        """Wait for the outside world until the timer that is `due`; whether to look again instead of going on to it."""
        if self.idle is None:
            return False
        if self.poll is not None:
            self.poll()
        if self._any_awake():  # the host's own business has woken the guest
            return True
        now = self._clock.now()
        if self.paced is None or not self.paced():
            return self.idle(None if due is None else due - now)
        end = self._limit if due is None else min(due, self._limit)
        wait = self.pace.wait(now, None if due is None else end)
        left = (self._wall_limit - time.monotonic()) * 1e9
        cut = wait is not None and wait > left
        again = self.idle(max(0, int(left)) if cut else wait)
        self._clock.advance_to(self.pace.reached(end))
        return again or cut or self._clock.now() >= self._limit

"""Where the work of the bus runs: in the caller's thread in a repeatable order, in threads, or in processes.

Providers, clients and both ends of the control plane are the same in all three: they make a `Task` for each
thing that can be rung, ring it, and wait for conditions. A hosting decides when and where a rung task runs, never
twice at the same time, and a task that is rung again before it starts runs once: a task is a doorbell.
"""

import logging
import random
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from itertools import count
from typing import TYPE_CHECKING, Final

from vmbus.bus.progress import Progress
from vmbus.core.dispatch import Doorbell
from vmbus.hypervisor import VirtualClock
from vmbus.trace.guest_log import GuestLog, new_scope

if TYPE_CHECKING:
    from vmbus.hypervisor import Clock, Hypervisor

__all__ = ["Hosting", "Inline", "Processes", "Task", "Threads", "hosting_of"]

guest_log = GuestLog(logging.getLogger(__name__))

DEFAULT_SPIN: Final = 20e-6
"""Seconds that a worker polls before it sleeps: about what an eventfd wake-up across processors costs."""


class Task:
    """Something that runs whenever it was rung.

    Attributes:
        name: for traces and logs.
        work: what to run.
        queued: it was rung and has not started since.
        running: it runs now.
        closed: rings do nothing any more.
    """

    __slots__ = ("closed", "home", "name", "queued", "running", "work")

    def __init__(self, name: str, work: Callable[[], None]) -> None:
        self.name = name
        self.work = work
        self.queued = False
        self.running = False
        self.closed = False
        self.home: _Worker | None = None


_NOTHING: Final = nullcontext()


class Hosting(ABC):
    """Runs tasks; see the module."""

    kind: str = ""

    @abstractmethod
    def task(self, name: str, work: Callable[[], None]) -> Task:
        """Make a task."""

    @abstractmethod
    def ring(self, task: Task) -> None:
        """Have the task run, soon."""

    @abstractmethod
    def wait_for(self, condition: Callable[[], bool], timeout: float = 10.0) -> bool:
        """Let tasks run until `condition` holds.

        Args:
            condition: cheap and free of side effects; it may be called from several places.
            timeout: seconds of real time; a hosting on a virtual clock gives up when nothing is left to happen.

        Returns:
            whether it holds.
        """

    def held(self) -> AbstractContextManager[None]:
        """Within this, an inline hosting runs nothing by itself: the caller is in the middle of something."""
        return _NOTHING

    @abstractmethod
    def progressed(self) -> None:
        """Something that waiters may wait for happened outside of the tasks."""

    @abstractmethod
    def keep_time(self, clock: "Clock") -> None:
        """See to it that the timers of `clock` fire while nobody waits; needed where time passes by itself."""

    def drop(self, task: Task) -> None:
        """Run the task never again (a run under way ends by itself)."""
        task.closed = True

    @property
    @abstractmethod
    def is_closed(self) -> bool:
        """Whether it runs nothing any more."""

    @abstractmethod
    def close(self) -> None:
        """Stop; tasks that wait are dropped, with all that they hold on to."""


class _Held:
    """The context in which an inline hosting waits."""

    __slots__ = ("_hosting",)

    def __init__(self, hosting: "Inline") -> None:
        self._hosting = hosting

    def __enter__(self) -> None:
        self._hosting.hold()

    def __exit__(self, *exception: object) -> None:
        self._hosting.let_go()


class Inline(Hosting):
    """Everything in the caller's thread: a ring runs the task before it returns, unless tasks run already.

    Where several tasks wait, a seeded choice picks the next, so that a run repeats exactly with its seed and goes
    another way with another. On a `VirtualClock`, time moves on when somebody waits and nothing is ready.

    Args:
        seed: of the choices.
        eager: run rung tasks at once; else only in `run` and `wait_for`, which leaves more to choose from.
    """

    kind = "inline"

    def __init__(self, seed: int = 0, *, eager: bool = True) -> None:
        self._random = random.Random(seed)
        self._eager = eager
        self._ready: list[Task] = []
        self._depth = 0
        self._held = _Held(self)
        self.clock: Clock | None = None

    def progressed(self) -> None:
        """Nothing to do: whoever waits is the only thread."""

    def keep_time(self, clock: "Clock") -> None:
        """Nothing to do: in the only thread, time passes when somebody waits."""

    def task(self, name: str, work: Callable[[], None]) -> Task:
        """Make a task."""
        return Task(name, work)

    def ring(self, task: Task) -> None:
        """Run the task now or, if tasks run already, after them."""
        if task.queued or task.closed:
            return
        task.queued = True
        self._ready.append(task)
        if self._eager and self._depth == 0:
            self.run()

    def held(self) -> AbstractContextManager[None]:
        """Queue rings until the outermost of these ends."""
        return self._held

    def hold(self) -> None:
        """Enter a `held`; on every doorbell's path, so that it is no generator."""
        self._depth += 1

    def let_go(self) -> None:
        """Leave a `held`."""
        self._depth -= 1
        if self._eager and self._depth == 0 and self._ready:
            self.run()

    @property
    def is_closed(self) -> bool:
        """Never: it has nothing of its own that could end."""
        return False

    def close(self) -> None:
        """Drop what waits."""
        for task in self._ready:
            task.queued = False
        self._ready.clear()

    def run(self, limit: int | None = None) -> int:
        """Run what is ready, and what gets ready meanwhile, at most `limit` tasks; how many ran."""
        ran = 0
        self._depth += 1
        try:
            while (limit is None or ran < limit) and self._step():
                ran += 1
        finally:
            self._depth -= 1
        return ran

    def _step(self) -> bool:
        """Run one ready task; False if there is none. A task that runs (we are inside of it) is not entered again."""
        ready = self._ready
        if not ready:
            return False
        if len(ready) == 1:
            task = ready[0]
            if task.running:
                return False
            ready.clear()
        else:
            free = [task for task in ready if not task.running]
            if not free:
                return False
            task = free[self._random.randrange(len(free))] if len(free) > 1 else free[0]
            ready.remove(task)
        task.queued = False
        if not task.closed:
            task.running = True
            try:
                task.work()
            finally:
                task.running = False
        return True

    def wait_for(self, condition: Callable[[], bool], timeout: float = 10.0) -> bool:
        """Run tasks, and timers of a virtual clock when no task is ready, until `condition` holds or nothing is
        left."""
        end = time.monotonic() + timeout
        self._depth += 1
        try:
            while not condition():
                if not self._step() and not self._pass_time(end):
                    return condition()
            return True
        finally:
            self._depth -= 1

    def _pass_time(self, end: float) -> bool:
        """Let time pass up to the next timer; False if there is none before the wait ends."""
        if self.clock is None:
            return False
        if isinstance(self.clock, VirtualClock):
            return self.clock.advance_to_next()
        due = self.clock.next_deadline()
        left = end - time.monotonic()
        if due is None or left <= 0:
            return False
        time.sleep(min(max(0, due - self.clock.now()) / 1e9, left))
        self.clock.run_due()
        return True


class _Worker(threading.Thread):
    """One thread with a queue and a doorbell."""

    def __init__(self, name: str, spin: float, progressed: Callable[[], None]) -> None:
        super().__init__(name=name, daemon=True)
        self.queue: deque[Task] = deque()
        self.doorbell = Doorbell()
        self.stopping = False
        self._log_scope = new_scope()
        self._spin = spin
        self._progressed = progressed

    def run(self) -> None:
        """Serve the queue until told to stop."""
        while not self.stopping:
            if not self.serve_one():
                self.doorbell.wait(1.0, self._spin)

    def forget(self) -> None:
        """Drop what waits: a task holds on to its bus, and that to a whole hypervisor."""
        while self.queue:
            with suppress(IndexError):
                self.queue.popleft().queued = False

    def serve_one(self) -> bool:
        """Run the first task that does not run already (further down this very stack)."""
        for _ in range(len(self.queue)):
            try:
                task = self.queue.popleft()
            except IndexError:
                return False
            if task.running:
                self.queue.append(task)
                continue
            task.queued = False  # before the work: a ring from now on must run it again
            if not task.closed:
                task.running = True
                try:
                    task.work()
                except Exception:
                    guest_log.exception(task.name, "its task failed", scope=self._log_scope)
                finally:
                    task.running = False
                self._progressed()
            return True
        return False


class _Timekeeper(threading.Thread):
    """Fires the timers of a clock whose time passes by itself."""

    IDLE = 0.002
    """Seconds between looks while no timer is set, or the next one is far off (an earlier one may be set)."""

    def __init__(self, clock: "Clock") -> None:
        super().__init__(name="vmbus-time", daemon=True)
        self.stopping = False
        self._clock = clock

    def run(self) -> None:
        """Sleep until the next timer is due, fire it, again."""
        clock = self._clock
        while not self.stopping:
            due = clock.next_deadline()
            pause = self.IDLE if due is None else min(max(0, due - clock.now()) / 1e9, self.IDLE)
            time.sleep(pause)
            try:
                clock.run_due()
            except Exception:
                guest_log.exception("the clock", "a timer failed")


class Threads(Hosting):
    """Tasks run in worker threads, each always in the same one, so that nothing that one task does needs a lock.

    Args:
        workers: how many threads.
        spin: seconds that an idle worker polls before it sleeps on its eventfd (with the GIL released).
    """

    kind = "threads"

    def __init__(self, workers: int = 2, spin: float = DEFAULT_SPIN) -> None:
        if workers < 1:
            raise ValueError("at least one worker")
        self._progress = Progress()
        self._workers = [_Worker(f"vmbus-{n}", spin, self.progressed) for n in range(workers)]
        self._homes = count()
        self._closed = False
        self._timekeeper: _Timekeeper | None = None
        for worker in self._workers:
            worker.start()

    @property
    def spins_paid(self) -> int:
        """Waits of workers that ended while they still polled."""
        return sum(w.doorbell.spins_paid for w in self._workers)

    @property
    def sleeps(self) -> int:
        """Waits of workers that went to sleep."""
        return sum(w.doorbell.sleeps for w in self._workers)

    def keep_time(self, clock: "Clock") -> None:
        """Start the thread that fires the clock's timers, if there is none yet. A virtual clock is moved by others."""
        if self._timekeeper is None and not isinstance(clock, VirtualClock) and not self._closed:
            self._timekeeper = _Timekeeper(clock)
            self._timekeeper.start()

    def task(self, name: str, work: Callable[[], None]) -> Task:
        """Make a task, at home with the worker whose turn it is."""
        task = Task(name, work)
        task.home = self._workers[next(self._homes) % len(self._workers)]
        return task

    def ring(self, task: Task) -> None:
        """Queue the task for its worker and wake that."""
        home = task.home
        if task.queued or task.closed or home is None or self._closed:
            return
        # Two threads may both see it not queued: it then runs twice, which a doorbell allows.
        task.queued = True
        home.queue.append(task)
        try:
            home.doorbell.ring()
        except OSError:
            if not self._closed:  # else the worker has just ended, and its eventfd is closed
                raise
        if self.is_closed:
            home.forget()  # nobody comes for it any more

    def progressed(self) -> None:
        """Have waiters look at their conditions again."""
        self._progress.notify()

    def wait_for(self, condition: Callable[[], bool], timeout: float = 10.0) -> bool:
        """Wait until `condition` holds; a worker that waits serves its other tasks meanwhile."""
        me = threading.current_thread()
        if isinstance(me, _Worker) and me in self._workers:
            end = time.monotonic() + timeout
            while not condition():
                if time.monotonic() > end:
                    return False
                if not me.serve_one():
                    me.doorbell.wait(0.01)
            return True
        return self._progress.wait_for(condition, timeout)

    @property
    def is_closed(self) -> bool:
        """Whether the workers have been stopped."""
        return self._closed

    def close(self) -> None:
        """Stop the workers and wait for them; their eventfds are closed, and what waits for them is dropped."""
        if self._closed:
            return
        self._closed = True
        if self._timekeeper is not None:
            self._timekeeper.stopping = True
            if self._timekeeper is not threading.current_thread():
                self._timekeeper.join()
        for worker in self._workers:
            worker.stopping = True
            worker.doorbell.ring()
        for worker in self._workers:
            if worker is not threading.current_thread():
                worker.join()
            worker.doorbell.close()
            worker.forget()


class Processes(Threads):
    """As `Threads` for the parent; children that are started by `start_guest` are processes of their own.

    Such a child has its memory, a hypercall socket and eventfds, and nothing else of its parent's.
    """

    kind = "processes"


_HOSTINGS_LOCK: Final = threading.Lock()


def hosting_of(hypervisor: "Hypervisor", hosting: "Hosting | str | None" = None) -> Hosting:
    """The hosting of a hypervisor instance: the one given or named for the first time, inline by default.

    One that is made here, because it was named, is closed with the instance's root partition; one that was given is
    its owner's to close.

    Args:
        hypervisor: all buses of one instance share one hosting.
        hosting: ``"inline"``, ``"threads"``, ``"processes"``, a `Hosting`, or None for what is there already.
            One that was closed, which runs nothing any more, is not there.

    Raises:
        ValueError: no such hosting, or the instance has another one.
    """
    with _HOSTINGS_LOCK:
        return _hosting_of(hypervisor, hosting)


def _hosting_of(hypervisor: "Hypervisor", hosting: "Hosting | str | None") -> Hosting:
    known = hypervisor.hosting
    present = known if isinstance(known, Hosting) and not known.is_closed else None
    made = False
    if isinstance(hosting, str):
        if present is not None and present.kind == hosting:
            return present
        kinds: dict[str, Callable[[], Hosting]] = {
            "inline": Inline,
            "threads": Threads,
            "processes": Processes,
        }
        if hosting not in kinds:
            raise ValueError(f"no hosting {hosting!r}; there are {', '.join(kinds)}")
        if present is not None:
            raise ValueError(f"the hypervisor's buses are hosted {present.kind} already")
        hosting, made = kinds[hosting](), True
    if hosting is None:
        hosting = present or Inline()
    if present is not None and present is not hosting:
        raise ValueError(f"the hypervisor's buses are hosted {present.kind} already")
    if isinstance(hosting, Inline):
        hosting.clock = hypervisor.clock
    hypervisor.hosting = hosting
    if made:
        hypervisor.on_closed.append(lambda: _close_with(hypervisor, hosting))
    return hosting


def _close_with(hypervisor: "Hypervisor", hosting: Hosting) -> None:
    hosting.close()
    if hypervisor.hosting is hosting:
        hypervisor.hosting = None

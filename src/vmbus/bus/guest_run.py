"""Running a model guest in whatever way its bus is hosted: as a task, in a thread, or in a process of its own.

A guest program is a generator function of a `VmbusGuest`, named ``"module:function"`` so that another process can
find it too. Where it yields, an inline hosting may let others go on; what it returns is the run's result
(plain values, as JSON has them).
"""

import importlib
import json
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import suppress
from typing import Any, Final, TypeAlias

from vmbus.bus.hosting import Hosting, Inline, Task, Threads
from vmbus.bus.pages import PageAllocator
from vmbus.bus.vmbus_guest import VmbusGuest
from vmbus.bus.vmbus_host import VmbusHost
from vmbus.core.memory import PAGE_SIZE
from vmbus.errors import DeviceError, VmbusError
from vmbus.hypervisor import ChildProcess, RemotePartition

__all__ = ["GuestRun", "Program", "process_main", "start_guest"]

Program: TypeAlias = Callable[..., Generator[None, None, Any]]

RESULT_PAGES: Final = 4
"""A process leaves its result in the last pages of its memory, which its page allocator does not give away."""
LENGTH_SIZE: Final = 4


class GuestRun:
    """A guest program under way.

    Attributes:
        done: it has ended, by itself or because it was killed.
        killed: it was killed.
        result: what it returned.
        error: what it raised.
    """

    def __init__(self, host: VmbusHost) -> None:
        self._host = host
        self.done = False
        self.killed = False
        self.result: Any = None
        self.error: BaseException | None = None

    def join(self, timeout: float = 60.0) -> Any:
        """Wait until the program has ended; its result (None if it was killed).

        Raises:
            DeviceError: it raised, or did not end in time.
        """
        if not self._host.hosting.wait_for(lambda: self.done, timeout):
            raise DeviceError(f"the guest {self._host.child.name} did not end")
        self._finish()
        if self.error is not None:
            raise DeviceError(f"the guest {self._host.child.name} failed: {self.error!r}") from self.error
        return self.result

    def kill(self) -> None:
        """End the guest without a word: its bus is closed under it, as when its process is killed."""

    def _finish(self) -> None:
        """Wait for what runs the program to be gone."""


class _Local(GuestRun):
    """The program's generator, run in this process."""

    def __init__(self, host: VmbusHost, program: Program, arguments: Mapping[str, Any]) -> None:
        super().__init__(host)
        self.guest = VmbusGuest(host.child.vps[0], hosting=host.hosting)
        self._steps = program(self.guest, **arguments)

    def step(self) -> bool:
        """Run up to the next yield; False when there is none."""
        try:
            next(self._steps)
        except StopIteration as end:
            self.result = end.value
        except VmbusError as error:
            if not self.killed:
                self.error = error
        except Exception as error:
            self.error = error
        else:
            if not self.killed:
                return True
            self._steps.close()
        try:
            self.guest.abandon()
        finally:
            self.done = True  # whatever happens: somebody waits for it
        return False

    def kill(self) -> None:
        self.killed = self.guest.killed = True
        self._host.reset()
        self._host.hosting.progressed()


class _Inline(_Local):
    def __init__(
        self, host: VmbusHost, hosting: Inline, program: Program, arguments: Mapping[str, Any]
    ) -> None:
        super().__init__(host, program, arguments)
        self._hosting = hosting
        self._task: Task = hosting.task(f"guest {host.child.name}", self._run)
        with hosting.held():  # do not run away with the first one while others are still being started
            hosting.ring(self._task)

    def _run(self) -> None:
        if self.step():
            self._hosting.ring(self._task)


class _Thread(_Local):
    def __init__(self, host: VmbusHost, program: Program, arguments: Mapping[str, Any]) -> None:
        super().__init__(host, program, arguments)
        self._thread = threading.Thread(target=self._run, name=f"guest {host.child.name}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while self.step():
            pass
        self._host.hosting.progressed()

    def _finish(self) -> None:
        self._thread.join()


class _Process(GuestRun):
    def __init__(self, host: VmbusHost, target: str, arguments: Mapping[str, Any]) -> None:
        super().__init__(host)
        self._process = ChildProcess(
            host.child,
            "vmbus.bus.guest_run:process_main",
            {"program": target, "arguments": dict(arguments)},
            on_stopped=self._stopped,
        )

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def _stopped(self, status: int) -> None:
        if status == 0:
            memory = self._host.child.memory
            with suppress(VmbusError, ValueError):
                at = memory.size - RESULT_PAGES * PAGE_SIZE
                length = int.from_bytes(memory.read(at, LENGTH_SIZE), "little")
                self.result = json.loads(memory.read(at + LENGTH_SIZE, length))
        elif not self.killed:
            self.error = DeviceError(f"its process ended with status {status}")
        self.done = True
        self._host.hosting.progressed()

    def kill(self) -> None:
        self.killed = True
        self._process.kill(10)

    def _finish(self) -> None:
        self._process.wait(10)


def find_program(target: str) -> Program:
    """The generator function that ``"module:function"`` names."""
    module, _, name = target.partition(":")
    program: Program = getattr(importlib.import_module(module), name)
    return program


def start_guest(host: VmbusHost, target: str, arguments: Mapping[str, Any] | None = None) -> GuestRun:
    """Start a guest program in the host's child, the way the host's bus is hosted.

    Args:
        host: the bus; its child runs nothing else.
        target: ``"module:function"`` of a generator function, called with a `VmbusGuest` and the arguments.
        arguments: plain values, as JSON has them.
    """
    hosting: Hosting = host.hosting
    if hosting.kind == "processes":
        return _Process(host, target, arguments or {})
    program = find_program(target)
    if isinstance(hosting, Inline):
        return _Inline(host, hosting, program, arguments or {})
    return _Thread(host, program, arguments or {})


def process_main(partition: RemotePartition, program: str, arguments: dict[str, Any]) -> None:
    """Run a guest program in a process of its own: what `start_guest` starts there."""
    memory = partition.memory
    first = PageAllocator.above(memory, 1 << 20).allocate(1)[0]
    pages = PageAllocator(first, memory.size // PAGE_SIZE - RESULT_PAGES)
    hosting = Threads(workers=1)
    guest = VmbusGuest(partition.vps, memory, hosting=hosting, pages=pages)
    steps = find_program(program)(guest, **arguments)
    result = None
    try:
        while True:
            next(steps)
    except StopIteration as end:
        result = end.value
    text = json.dumps(result).encode()
    if len(text) > RESULT_PAGES * PAGE_SIZE - LENGTH_SIZE:
        raise ValueError(f"a result of {len(text)} bytes")
    memory.write(memory.size - RESULT_PAGES * PAGE_SIZE, len(text).to_bytes(LENGTH_SIZE, "little") + text)
    guest.abandon()
    hosting.close()

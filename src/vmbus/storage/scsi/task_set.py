"""The task set of a logical unit: every command that it has and has not ended, of all initiators (SAM-5 chapter 8).

A command is *dormant* from its arrival until it is begun (it waits for a worker thread, say), then *enabled* until it
ends. Task management ends commands of other initiators, too: a dormant one is never begun, an enabled one is waited
for, because what it has asked of the backend cannot be taken back. Only then may whoever aborted them go on.
"""

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from threading import get_ident

from vmbus.errors import DeviceError
from vmbus.storage.scsi.task import Task

__all__ = ["TaskAborted", "TaskSet", "TaskSetBusy"]

MAX_WAIT = 30.0
"""Seconds that task management waits for commands that are in the backend; half of what initiators usually allow."""


class TaskAborted(DeviceError):
    """The command was aborted by task management before it was begun, or while it ran."""


class TaskSetBusy(DeviceError):
    """Commands that have to end do not. Those that did are aborted, nothing else has changed; one has to ask again."""


class TaskSet:
    """Commands of one unit.

    `begin` and `end` are on the path of every command, so they take no lock. They rely on the order of their steps,
    each atomic under the GIL: a command enters the set before it looks for the bar, and `aborting` raises the bar
    before it looks into the set. So at least one of the two sees the other.

    Attributes:
        max_wait: seconds that `aborting` waits for enabled commands.
    """

    def __init__(self) -> None:
        self.max_wait = MAX_WAIT
        self._lock = (
            threading.Lock()
        )  # taken by itself: what `Condition.__enter__` took, a signal handler could lose
        self._condition = threading.Condition(self._lock)
        self._tasks: dict[Task, int] = {}  # to the thread that carries it out, 0: dormant
        self._barred: Callable[[Hashable], bool] | None = None

    def __len__(self) -> int:
        return len(self._tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(list(self._tasks))

    def admit(self, task: Task) -> None:
        """A command has arrived; it will be begun later, or just end."""
        self._tasks.setdefault(task, 0)

    def begin(self, task: Task) -> None:
        """A command, admitted or not, is carried out from now on by this thread, until `end`.

        Raises:
            TaskAborted: it may not.
        """
        self._tasks[task] = get_ident()
        barred = self._barred
        if task.aborted or (barred is not None and barred(task.nexus)):
            self.end(task)
            raise TaskAborted("aborted before it was begun")

    def end(self, task: Task) -> None:
        """A command has ended, or will not be begun any more; again is harmless."""
        self._tasks.pop(task, None)
        if self._barred is not None:
            with self._lock:
                self._condition.notify_all()

    @contextmanager
    def aborting(
        self,
        whom: Callable[[Hashable], bool],
        but: Task | None = None,
        spare: Callable[[Task], bool] = lambda _: False,
    ) -> Iterator[list[Task]]:
        """Abort the commands of some initiators; inside of the context none of them runs, and none is begun.

        One caller at a time. The callbacks of the aborted commands (`Task.on_abort`) are the caller's to call, when it
        holds nothing that they may need.

        Args:
            whom: tells whether a nexus is one of those.
            but: the command that asks for it.
            spare: tells whether an enabled command may go on, and end as if nothing had happened.

        Yields:
            the aborted commands.

        Raises:
            TaskSetBusy: an enabled one does not end within `max_wait` seconds, or is carried out by this very thread,
                beneath us, and cannot end before we do.
        """
        here = get_ident()
        self._barred = whom
        try:
            chosen = [
                (task, thread)
                for task, thread in list(self._tasks.items())
                if task is not but and whom(task.nexus) and not (thread and spare(task))
            ]
            if any(thread == here for _, thread in chosen):
                raise TaskSetBusy("a command that has to end is carried out by this thread")
            for task, _ in chosen:
                task.aborted = True
            with self._lock:
                ended = self._condition.wait_for(
                    lambda: not any(self._tasks.get(task) for task, _ in chosen), self.max_wait
                )
            if not ended:
                raise TaskSetBusy(f"commands have not ended within {self.max_wait} s")
            yield [task for task, _ in chosen]
        finally:
            self._barred = None

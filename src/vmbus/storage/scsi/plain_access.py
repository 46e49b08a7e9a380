"""The reads and writes that compiled code has taken apart already, on a disk that is served by Python."""

from collections.abc import Hashable

from vmbus.core.blockio import Request, Requests
from vmbus.storage.scsi.block import BlockAccess
from vmbus.storage.scsi.codes import Opcode
from vmbus.storage.scsi.task import BytesBuffer, Task
from vmbus.storage.scsi.task_set import TaskSet

__all__ = ["PlainAccess"]

_READ, _WRITE = bytes([Opcode.READ_16]), bytes([Opcode.WRITE_16])


class PlainAccess:
    """The plain reads and writes of one initiator: commands of the unit's task set like all others.

    Any exception means that the request has to be carried out as a `Task`, which finds out what to say.

    Args:
        block: the disk.
        tasks: its unit's task set.
        nexus: who sends them, one at a time.
    """

    def __init__(self, block: BlockAccess, tasks: TaskSet, nexus: Hashable) -> None:
        self._disk = block.disk
        self._gate = block.gate
        self._tasks = tasks
        self._task = Task(_READ, BytesBuffer(), nexus)

    def serve(self, request: Request) -> None:
        """One of them."""
        task = self._task
        write = request.write
        task.cdb = _WRITE if write else _READ
        self._tasks.begin(task)
        try:
            if write:
                with self._gate.shared():
                    self._disk.write(request.offset, request.fetch())
            else:
                request.store(self._disk.read(request.offset, request.length))
        finally:
            self._tasks.end(task)
            task.aborted = False  # what was done is done: it ended before whoever aborted it went on

    def serve_batch(self, requests: Requests) -> int:
        """Several; returns how many went well, from the first on."""
        serve = self._disk.serve_batch
        if serve is None:
            return 0
        task = self._task
        task.cdb = _WRITE if requests.write else _READ
        self._tasks.begin(task)
        try:
            if not requests.write:
                return serve(requests)
            with self._gate.shared():
                return serve(requests)
        finally:
            self._tasks.end(task)
            task.aborted = False

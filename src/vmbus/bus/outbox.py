"""The host's control messages to one guest, in order: those that its SynIC has no room for wait."""

import logging
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Final, TypeAlias
from weakref import WeakKeyDictionary

from vmbus.bus.actions import Send
from vmbus.bus.codec import message_number
from vmbus.bus.hosting import Hosting
from vmbus.bus.wire import VMBUS_MESSAGE_TYPE
from vmbus.errors import HypercallError
from vmbus.hypervisor import Hypervisor, Partition
from vmbus.hypervisor.clock import Timer
from vmbus.hypervisor.synic import Synic
from vmbus.hypervisor.tlfs import Status
from vmbus.trace.guest_log import GuestLog

__all__ = ["Outbox"]

log = logging.getLogger(__name__)
guest_log = GuestLog(log)

_Told: TypeAlias = Callable[[int], None]

RETRY: Final = 1_000_000
"""Nanoseconds after which a message is tried again that the host had no memory for."""


class Outbox:
    """What waits is charged to the guest's budget (`Budget.backlog`).

    Args:
        hypervisor: the instance.
        child: the guest's partition.
        lock: the bus's; held by whoever calls, and taken when the guest has made room.
        hosting: sees to it that time passes, should the host lack something now.
        is_read: whether the guest is connected and has named that processor and SINT for its messages.
        on_room: called after the guest has taken messages, or has enabled its SynIC or a page of it.
    """

    def __init__(
        self,
        hypervisor: Hypervisor,
        child: Partition,
        lock: AbstractContextManager[bool],
        hosting: Hosting,
        *,
        is_read: Callable[[int, int], bool],
        on_room: Callable[[], None],
    ) -> None:
        self._hypervisor = hypervisor
        self._child = child
        self._lock = lock
        self._hosting = hosting
        self._retry: Timer | None = None
        self._is_read = is_read
        self._on_room = on_room
        self._waiting: deque[Send] = deque()
        self._watched: WeakKeyDictionary[Synic, tuple[_Told, _Told | None]] = WeakKeyDictionary()
        """What tells us of room, and who was told before us and has to be told as well."""

    def send(self, message: Send) -> None:
        """Post a message, or keep it until there is room.

        Raises:
            BudgetExceeded: too many wait; the guest does not read its messages.
        """
        if self._waiting or not self._post(message):
            self._child.meter.backlog.charge()
            self._waiting.append(message)
            self.watch(message.vp)  # those before it may be for another processor
            self._flush()  # all may have been read in between

    def clear(self, keep: frozenset[int] = frozenset()) -> None:
        """Drop what waits, but messages of the types in `keep`."""
        before = len(self._waiting)
        self._waiting = deque(each for each in self._waiting if message_number(each.payload) in keep)
        self._child.meter.backlog.release(before - len(self._waiting))
        if self._retry is not None and not self._waiting:
            self._retry.cancel()
            self._retry = None

    def _post(self, message: Send) -> bool:
        """Give a message to the hypervisor; False if it has no room."""
        try:
            self._hypervisor.post_message(
                self._child, message.vp, message.sint, VMBUS_MESSAGE_TYPE, 0, message.payload
            )
        except HypercallError as error:
            if error.status == Status.INSUFFICIENT_BUFFERS:
                return False
            if error.status == Status.INVALID_SYNIC_STATE and self._is_read(message.vp, message.sint):
                return False  # it has disabled its message page or the SynIC, and waits with it
            # Who is not connected, or named another processor, may be gone for good.
            log.debug("%s cannot be sent a message: %s", self._child.name, error)
        except (OSError, MemoryError) as error:
            guest_log.warning(
                self._child.name, "a message has to wait: %s", error, scope=self._hypervisor.log_scope
            )
            if self._retry is None:
                clock = self._hypervisor.clock
                self._hosting.keep_time(clock)
                self._retry = clock.schedule(clock.now() + RETRY, self._try_again)
            return False
        return True

    def watch(self, vp: int) -> None:
        """Have what waits tried again when that processor's guest has taken messages, or enabled what it had not."""
        try:
            synic = self._child.vp(vp).synic
        except HypercallError:
            return  # deleted just now: `_post` drops what was meant for it
        if synic in self._watched:
            return
        previous = synic.slot_free

        def freed(sint: int) -> None:
            if previous is not None:
                previous(sint)
            if self._waiting:
                with self._lock:
                    self._flush()
            self._on_room()

        self._watched[synic] = freed, previous
        synic.slot_free = freed

    def close(self) -> None:
        """Drop what waits, and let go of the processors: they live longer than their guest's bus may."""
        self.clear()
        for synic, (freed, previous) in list(self._watched.items()):
            if synic.slot_free is freed:
                synic.slot_free = previous
        self._watched.clear()

    def _try_again(self) -> None:
        with self._lock:
            self._retry = None
            self._flush()

    def _flush(self) -> None:
        while self._waiting and self._post(self._waiting[0]):
            self._waiting.popleft()
            self._child.meter.backlog.release()

"""The synthetic interrupt controller of one virtual processor (TLFS, SynIC).

Sixteen synthetic interrupt sources (SINTs); each has a message slot in the SIM page and 2048 event flags in the SIEF
page, both placed by the guest. A message for a full slot waits in a bounded queue; the slot's
message-pending flag tells the guest to write EOM, which brings the next one.
"""

import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Final, TypeAlias

from vmbus.core.dispatch import EventFlags, MessageSlot
from vmbus.core.memory import GuestMemory
from vmbus.errors import HypercallError
from vmbus.hypervisor.faults import GeneralProtectionFault
from vmbus.hypervisor.overlay import OverlayPage
from vmbus.hypervisor.tlfs import (
    EVENT_FLAGS_PER_SINT,
    FIRST_VALID_SINT_VECTOR,
    MESSAGE_PAYLOAD_SIZE,
    SINT_COUNT,
    Status,
)

if TYPE_CHECKING:
    from vmbus.hypervisor.ports import Port

__all__ = ["MESSAGE_QUEUE_LIMIT", "PORT_BUFFERS", "Synic"]

MESSAGE_QUEUE_LIMIT: Final = 1024
"""Messages of the hypervisor and of providers that may wait for one SINT; beyond, HV_STATUS_INSUFFICIENT_BUFFERS."""
PORT_BUFFERS: Final = 64
"""Messages of one port that may wait. Each port has buffers of its own, so that no sender can fill up another's way."""

SINT_MASKED: Final = 1 << 16
SINT_AUTO_EOI: Final = 1 << 17
SINT_POLLING: Final = 1 << 18

QueuedMessage: TypeAlias = "tuple[int, int, bytes, Port | None]"
"""Type, sender, payload, and the port that it came through (None: from the hypervisor or a provider)."""


class Synic:
    """One SynIC. Thread-safe: messages and events come from other processors' and providers' threads.

    Args:
        memory: the partition's memory, where the guest places the SIM and SIEF pages.
        request_interrupt: ``request_interrupt(vector, auto_eoi)``, called without the SynIC's lock held; False if the
            local APIC takes none now, because it is disabled.
        map_lock: `Hypervisor.map_lock`; taken before the SynIC's own.
    """

    def __init__(
        self,
        memory: GuestMemory,
        request_interrupt: Callable[[int, bool], bool],
        map_lock: AbstractContextManager[object],
    ) -> None:
        self._memory = memory
        self._map_lock = map_lock
        self._request = request_interrupt
        self._lock = threading.RLock()
        self._sint = [SINT_MASKED] * SINT_COUNT
        self._queues: list[deque[QueuedMessage]] = [deque() for _ in range(SINT_COUNT)]
        self._unported = [0] * SINT_COUNT  # how many of them did not come through a port
        self._queued = 0  # bit n: messages wait for SINT n
        self._refused = 0  # bit n: `try_post` has refused a message for SINT n since it last took one
        self._unraised = 0  # bit n: something arrived while SINT n was masked, or the local APIC disabled
        self._scontrol = 1
        self._siefp = 0
        self._simp = 0
        self._sief_page = OverlayPage(memory)
        self._sim_page = OverlayPage(memory)
        self._slots: list[MessageSlot] | None = None
        self._flags: list[EventFlags] | None = None
        self.slot_free: Callable[[int], None] | None = None
        """Called, without a lock held, when what was refused may be taken now: with a SINT, or with -1 for any of them.
        The guest has freed a slot, or has enabled the SynIC or one of its pages."""

    def reset(self) -> None:
        """Back to the state at power-on: pages removed, queues dropped, all SINTs masked."""
        with self._map_lock, self._lock:
            self._sim_page.remove()
            self._sief_page.remove()
            self._slots = self._flags = None
            self._simp = self._siefp = 0
            self._sim_page = OverlayPage(self._memory)
            self._sief_page = OverlayPage(self._memory)
            self._sint = [SINT_MASKED] * SINT_COUNT
            for queue in self._queues:
                for _, _, _, port in queue:
                    if port is not None:
                        port.waiting -= 1
                queue.clear()
            self._unported = [0] * SINT_COUNT
            self._queued = self._refused = self._unraised = 0
            self._scontrol = 1

    # Registers

    @property
    def scontrol(self) -> int:
        """SCONTROL; bit 0 enables the SynIC. Set at reset, as Hyper-V and OpenVMM do."""
        return self._scontrol

    @scontrol.setter
    def scontrol(self, value: int) -> None:
        with self._lock:
            self._scontrol = value
        if value & 1:
            self.end_of_message()

    @property
    def simp(self) -> int:
        """SIMP: bit 0 enables, bits 63:12 are the page number of the message page."""
        return self._simp

    @simp.setter
    def simp(self, value: int) -> None:
        with self._map_lock, self._lock:
            self._sim_page.place(value)
            self._simp = value
            self._slots = None
            gpa = self._sim_page.gpa
            if gpa is not None:
                self._slots = [MessageSlot(self._memory, gpa, n) for n in range(SINT_COUNT)]
        if gpa is not None:
            self.end_of_message()

    @property
    def siefp(self) -> int:
        """SIEFP: bit 0 enables, bits 63:12 are the page number of the event flags page."""
        return self._siefp

    @siefp.setter
    def siefp(self, value: int) -> None:
        with self._map_lock, self._lock:
            self._sief_page.place(value)
            self._siefp = value
            gpa = self._sief_page.gpa
            self._flags = None
            if gpa is not None:
                self._flags = [EventFlags(self._memory, gpa, n) for n in range(SINT_COUNT)]
        if gpa is not None:
            self._tell(-1)

    def occupies(self, gpa: int) -> bool:
        """Whether the message or event flags page is placed at page address `gpa`."""
        return gpa in (self._sim_page.gpa, self._sief_page.gpa)

    def evict(self, gpa: int, length: int) -> None:
        """What is mapped at `gpa` changes: pages of the SynIC there are disabled, as if by the guest.

        Called with the map lock held.
        """
        with self._lock:
            for page in (self._sim_page, self._sief_page):
                if page.gpa is not None and gpa <= page.gpa < gpa + length:
                    page.remove()
                    if page is self._sim_page:
                        self._slots = None
                        self._simp &= ~1
                    else:
                        self._flags = None
                        self._siefp &= ~1

    def sint(self, index: int) -> int:
        """The SINT register: vector, bit 16 masked, bit 17 auto-EOI, bit 18 polling."""
        return self._sint[index]

    def set_sint(self, index: int, value: int) -> None:
        """Write a SINT register; unmasking raises what arrived while it was masked.

        Raises:
            GeneralProtectionFault: an unmasked SINT with one of the illegal vectors 0-15.
        """
        if not value & SINT_MASKED and value & 0xFF < FIRST_VALID_SINT_VECTOR:
            raise GeneralProtectionFault(f"SINT{index} vector {value & 0xFF} is below 16")
        with self._lock:
            self._sint[index] = value
            raise_now = not value & SINT_MASKED and self._unraised >> index & 1
            if raise_now:
                self._unraised &= ~(1 << index)
        if raise_now:
            self._interrupt(index, value)
        if (self._queued | self._refused) >> index & 1:
            self._flush_sint(index)
            self._tell(index)

    # What arrives

    def post_message(
        self, sint: int, message_type: int, sender: int, payload: bytes, port: "Port | None" = None
    ) -> None:
        """Deliver a message to the slot of `sint`, or queue it while the slot is occupied.

        Args:
            sint: the SINT.
            message_type: not 0.
            sender: what the header says: the port's id.
            payload: at most 240 bytes.
            port: the port that it came through, whose buffers it takes while it waits.

        Raises:
            HypercallError: INVALID_PARAMETER for a SINT above 15, a payload above 240 bytes or type 0,
                INVALID_SYNIC_STATE if the guest has disabled the SynIC or its message page,
                INSUFFICIENT_BUFFERS if `PORT_BUFFERS` messages of the port, or `MESSAGE_QUEUE_LIMIT` of others,
                wait already.
        """
        if not 0 <= sint < SINT_COUNT or len(payload) > MESSAGE_PAYLOAD_SIZE or not message_type:
            raise HypercallError(Status.INVALID_PARAMETER)
        with self._lock:
            if self._slots is None or not self._scontrol & 1:
                raise HypercallError(Status.INVALID_SYNIC_STATE)
            queue = self._queues[sint]
            if queue or not self._post(sint, message_type, sender, payload):
                if port is not None:
                    if port.deleted:  # just now: what waited in it has been dropped already
                        raise HypercallError(Status.INVALID_PORT_ID)
                    if port.waiting >= PORT_BUFFERS:
                        raise HypercallError(Status.INSUFFICIENT_BUFFERS)
                    port.waiting += 1
                elif self._unported[sint] >= MESSAGE_QUEUE_LIMIT:
                    raise HypercallError(Status.INSUFFICIENT_BUFFERS)
                else:
                    self._unported[sint] += 1
                queue.append((message_type, sender, payload, port))
                self._queued |= 1 << sint
                return
            register = self._note(sint)
        if register is not None:
            self._interrupt(sint, register)

    def try_post(self, sint: int, message_type: int, sender: int, payload: bytes) -> bool:
        """Deliver a message only if nothing is ahead of it and its slot is free (synthetic timers); whether it was."""
        with self._lock:
            if (
                self._slots is None
                or not self._scontrol & 1
                or self._queues[sint]
                or not self._post(sint, message_type, sender, payload)
            ):
                self._refused |= 1 << sint
                return False
            self._refused &= ~(1 << sint)
            register = self._note(sint)
        if register is not None:
            self._interrupt(sint, register)
        return True

    def signal_event(self, sint: int, flag: int) -> bool:
        """Set an event flag and raise the SINT's interrupt if it was clear; whether it was.

        Raises:
            HypercallError: INVALID_PARAMETER for a SINT above 15 or a flag above 2047,
                INVALID_SYNIC_STATE if the guest has disabled the SynIC or its event flags page.
        """
        if not 0 <= sint < SINT_COUNT or not 0 <= flag < EVENT_FLAGS_PER_SINT:
            raise HypercallError(Status.INVALID_PARAMETER)
        with self._lock:
            if self._flags is None or not self._scontrol & 1:
                raise HypercallError(Status.INVALID_SYNIC_STATE)
            if not self._flags[sint].set(flag):
                return False
            register = self._note(sint)
        if register is not None:
            self._interrupt(sint, register)
        return True

    # What the guest ends, and what it lets in again

    def end_of_message(self) -> None:
        """The guest wrote EOM: bring queued messages into slots that it has freed."""
        self.flush()
        self._tell(-1)

    def end_of_interrupt(self, vector: int) -> None:
        """The guest ended `vector`: an EOI also makes the hypervisor look at what waits (TLFS, SynIC)."""
        waiting = self._queued | self._refused
        if waiting:
            for index in range(SINT_COUNT):
                if waiting >> index & 1 and self._sint[index] & 0xFF == vector:
                    self._flush_sint(index)
                    # The last message of a queue leaves no message-pending flag behind: who waits after it has to
                    # try, so that the flag is set.
                    self._tell(index)

    def apic_enabled(self) -> None:
        """The guest has enabled its local APIC: raise what that refused before."""
        if self._unraised:
            for index in range(SINT_COUNT):
                with self._lock:
                    register = self._sint[index]
                    due = self._unraised >> index & 1 and not register & SINT_MASKED
                    if due:
                        self._unraised &= ~(1 << index)
                if due:
                    self._interrupt(index, register)

    def flush(self) -> None:
        """Bring queued messages into free slots."""
        if self._queued:
            for index in range(SINT_COUNT):
                if self._queued >> index & 1:
                    self._flush_sint(index)

    @property
    def queued_messages(self) -> int:
        """How many messages wait, over all SINTs."""
        return sum(map(len, self._queues))

    def drop(self, port: "Port") -> None:
        """The port is deleted: its messages that wait are lost (HvCallDeletePort); one in its slot stays there."""
        with self._lock:
            for sint, queue in enumerate(self._queues):
                kept = [message for message in queue if message[3] is not port]
                port.waiting -= len(queue) - len(kept)
                queue.clear()
                queue.extend(kept)
                if not kept:
                    self._queued &= ~(1 << sint)

    def _flush_sint(self, sint: int) -> None:
        register = None
        with self._lock:
            queue = self._queues[sint]
            if not queue or self._slots is None or not self._scontrol & 1:
                return
            while queue and self._post(sint, *queue[0][:3]):
                # The next round, when messages remain, fails and so sets message-pending in the slot just filled.
                port = queue.popleft()[3]
                if port is not None:
                    port.waiting -= 1
                else:
                    self._unported[sint] -= 1
                register = self._note(sint)
            if not queue:
                self._queued &= ~(1 << sint)
        if register is not None:
            self._interrupt(sint, register)

    def _tell(self, sint: int) -> None:
        if self.slot_free is not None:
            self.slot_free(sint)

    def _post(self, sint: int, message_type: int, sender: int, payload: bytes) -> bool:
        assert self._slots is not None
        return self._slots[sint].post(message_type, sender, payload)

    def _note(self, sint: int) -> int | None:
        """With the lock held: the SINT's register if an interrupt is due now, else remember that one is."""
        register = self._sint[sint]
        if register & SINT_MASKED:
            self._unraised |= 1 << sint
            return None
        return register

    def _interrupt(self, sint: int, register: int) -> None:
        if register & SINT_POLLING:
            return
        vector, auto_eoi = register & 0xFF, bool(register & SINT_AUTO_EOI)
        if self._request(vector, auto_eoi):
            return
        with self._lock:
            self._unraised |= 1 << sint
        if self._request(vector, auto_eoi):  # the APIC was enabled meanwhile, by another thread
            with self._lock:
                self._unraised &= ~(1 << sint)

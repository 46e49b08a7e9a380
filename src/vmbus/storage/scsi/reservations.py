"""Persistent reservations: who may use a unit that several initiators share (SPC-4 5.13, 6.15, 6.16)."""

import struct
import threading
from collections.abc import Callable, Collection, Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import IntEnum

from vmbus.storage.scsi.cdb import allocation_length
from vmbus.storage.scsi.codes import AdditionalSense, Opcode, SenseKey, ServiceIn16
from vmbus.storage.scsi.sense import (
    CheckCondition,
    ReservationConflict,
    invalid_field,
    invalid_parameter,
    parameter_list_length_error,
)
from vmbus.storage.scsi.task import Task

__all__ = ["Reservations"]

MAX_REGISTRATIONS = 64
"""Registrations a unit holds; each nexus has at most one, so only a peer gone wild meets this."""

_PARAMETERS = 24


class ReservationType(IntEnum):
    """SPC-4 table 57."""

    WRITE_EXCLUSIVE = 1
    EXCLUSIVE_ACCESS = 3
    WRITE_EXCLUSIVE_REGISTRANTS = 5
    EXCLUSIVE_ACCESS_REGISTRANTS = 6
    WRITE_EXCLUSIVE_ALL = 7
    EXCLUSIVE_ACCESS_ALL = 8


_ALL = (ReservationType.WRITE_EXCLUSIVE_ALL, ReservationType.EXCLUSIVE_ACCESS_ALL)
_REGISTRANTS = (
    ReservationType.WRITE_EXCLUSIVE_REGISTRANTS,
    ReservationType.EXCLUSIVE_ACCESS_REGISTRANTS,
    *_ALL,
)
_WRITE_ONLY = (
    ReservationType.WRITE_EXCLUSIVE,
    ReservationType.WRITE_EXCLUSIVE_REGISTRANTS,
    ReservationType.WRITE_EXCLUSIVE_ALL,
)
_TYPE_MASK = sum(1 << (8 + kind if kind < 8 else kind - 8) for kind in ReservationType)


class _In(IntEnum):
    READ_KEYS = 0
    READ_RESERVATION = 1
    REPORT_CAPABILITIES = 2
    READ_FULL_STATUS = 3


class _Out(IntEnum):
    REGISTER = 0
    RESERVE = 1
    RELEASE = 2
    CLEAR = 3
    PREEMPT = 4
    PREEMPT_AND_ABORT = 5
    REGISTER_AND_IGNORE_EXISTING_KEY = 6


_ALWAYS_ALLOWED = {
    Opcode.TEST_UNIT_READY,
    Opcode.REQUEST_SENSE,
    Opcode.INQUIRY,
    Opcode.REPORT_LUNS,
    Opcode.READ_CAPACITY_10,
    Opcode.PERSISTENT_RESERVE_IN,
    Opcode.PERSISTENT_RESERVE_OUT,  # has its own rules, by registration
    Opcode.RESERVE_6,  # so have these
    Opcode.RELEASE_6,
}
_READS = {
    Opcode.READ_6,
    Opcode.READ_10,
    Opcode.READ_12,
    Opcode.READ_16,
    Opcode.VERIFY_10,
    Opcode.VERIFY_12,
    Opcode.VERIFY_16,
    Opcode.PRE_FETCH_10,
    Opcode.PRE_FETCH_16,
    Opcode.READ_DEFECT_DATA_10,
    Opcode.READ_DEFECT_DATA_12,
    Opcode.SERVICE_ACTION_IN_16,
    Opcode.MODE_SENSE_6,
    Opcode.MODE_SENSE_10,
    Opcode.MAINTENANCE_IN,
}
"""Allowed to all by the reservations that only exclude writes."""

_WITH_RESERVE = (
    Opcode.INQUIRY,
    Opcode.REQUEST_SENSE,
    Opcode.REPORT_LUNS,
    Opcode.RELEASE_6,
    Opcode.READ_CAPACITY_10,
)
"""Allowed to all while another initiator has the unit by RESERVE (6) (SPC-2 table 10, SBC-2 table 5)."""


def _always_allowed(cdb: bytes) -> bool:
    """Whether no persistent reservation forbids a command (SPC-4 table 66, SBC-3 table 13)."""
    opcode = cdb[0]
    if opcode == Opcode.START_STOP_UNIT:
        return bool(cdb[4] & 0x01) and not cdb[4] & 0xF0  # START, and no power condition
    if opcode == Opcode.PREVENT_ALLOW_MEDIUM_REMOVAL:
        return not cdb[4] & 0x03
    if opcode == Opcode.SERVICE_ACTION_IN_16:
        return cdb[1] & 0x1F == ServiceIn16.READ_CAPACITY_16
    return opcode in _ALWAYS_ALLOWED


@dataclass(slots=True)
class _Reservation:
    kind: ReservationType
    holder: Hashable  # the nexus that reserved; with the "all registrants" kinds, whoever did it first


class Reservations:
    """The registrations and the reservation of one unit.

    They last as long as the unit does (no activate-persist-through-power-loss).

    Args:
        notify: called with a nexus and the unit attention it has to get.
    """

    def __init__(self, notify: Callable[[Hashable, AdditionalSense], None]) -> None:
        self._lock = threading.Lock()
        self._notify = notify
        self._keys: dict[Hashable, int] = {}
        self._held: _Reservation | None = None
        self._reserved: Hashable = None  # by RESERVE (6)
        self._generation = 0

    @property
    def active(self) -> bool:
        """Whether a reservation restricts anyone."""
        return self._held is not None or self._reserved is not None

    def check(self, task: Task) -> None:
        """Refuse a command that the reservation forbids to its initiator.

        Raises:
            ReservationConflict: another one holds the unit.
        """
        cdb, nexus = task.cdb, task.nexus
        opcode = cdb[0]
        reserved = self._reserved
        if reserved is not None and reserved != nexus and opcode != Opcode.RESERVE_6:
            allowed = opcode in _WITH_RESERVE or (
                opcode
                in (Opcode.START_STOP_UNIT, Opcode.PREVENT_ALLOW_MEDIUM_REMOVAL, Opcode.SERVICE_ACTION_IN_16)
                and _always_allowed(cdb)
            )
            if not allowed:
                raise ReservationConflict("another initiator has reserved the unit")
        held = self._held
        if held is None or _always_allowed(cdb) or self._may_use(held, nexus):
            return
        if opcode in _READS and held.kind in _WRITE_ONLY:
            return
        raise ReservationConflict(f"{held.kind.name} is held by another initiator")

    def reserve(self, task: Task) -> None:
        """RESERVE (6): the whole unit for one initiator, until it releases it, a reset, or the loss of the initiator.

        Raises:
            CheckCondition: part of the unit, or for a third party.
            ReservationConflict: another one has it, or there are registrations (SPC-4 5.13.3 with CRH 0).
        """
        self._only_whole(task)
        with self._lock:
            if self._keys or self._reserved not in (None, task.nexus):
                raise ReservationConflict("the unit is reserved already")
            self._reserved = task.nexus

    def release(self, task: Task) -> None:
        """RELEASE (6): of no effect for whoever has not reserved.

        Raises:
            CheckCondition: part of the unit, or for a third party.
            ReservationConflict: there are registrations.
        """
        self._only_whole(task)
        with self._lock:
            if self._keys:
                raise ReservationConflict("initiators are registered")
            if self._reserved == task.nexus:
                self._reserved = None

    @staticmethod
    def _only_whole(task: Task) -> None:
        if task.cdb[1] & 0x10:
            raise invalid_field(1, 4)
        if task.cdb[1] & 0x01:
            raise invalid_field(1, 0)

    def lose(self, nexus: Hashable) -> None:
        """An initiator is gone: its RESERVE (6) is, its registration stays."""
        if self._reserved == nexus:
            self._reserved = None

    def reset(self) -> None:
        """A reset ends RESERVE (6); persistent reservations stay."""
        self._reserved = None

    def _may_use(self, held: _Reservation, nexus: Hashable) -> bool:
        return held.holder == nexus or (held.kind in _REGISTRANTS and nexus in self._keys)

    def _not_reserved(self) -> None:
        if self._reserved is not None:
            raise ReservationConflict

    def report(self, task: Task) -> int:
        """Answer PERSISTENT RESERVE IN.

        Raises:
            ReservationConflict: the unit is reserved by RESERVE (6).
        """
        self._not_reserved()
        action = task.cdb[1] & 0x1F
        with self._lock:
            head = struct.pack(">I", self._generation)
            if action == _In.READ_KEYS:
                body = b"".join(struct.pack(">Q", key) for key in self._keys.values())
            elif action == _In.READ_RESERVATION:
                body = self._reservation_descriptor()
            elif action == _In.REPORT_CAPABILITIES:
                # TMV; allowed commands as the standard's table; types: all six
                data = struct.pack(">HBBH2x", 8, 0x00, 0x80, _TYPE_MASK)
                return task.reply(data, allocation_length(task.cdb))
            elif action == _In.READ_FULL_STATUS:
                body = b"".join(self._full_status(nexus, key) for nexus, key in self._keys.items())
            else:
                raise invalid_field(1, 4)
        return task.reply(head + struct.pack(">I", len(body)) + body, allocation_length(task.cdb))

    def _reservation_descriptor(self) -> bytes:
        if self._held is None:
            return b""
        key = 0 if self._held.kind in _ALL else self._keys.get(self._held.holder, 0)
        return struct.pack(">Q5xBxx", key, self._held.kind)

    def _full_status(self, nexus: Hashable, key: int) -> bytes:
        holds = self._held is not None and (self._held.holder == nexus or self._held.kind in _ALL)
        kind = self._held.kind if holds and self._held is not None else 0
        name = str(nexus).encode()[:200]
        name += bytes(-len(name) % 4 or 4)
        # A transport id of the iSCSI name form (5h): VMBus has none of its own (SPC-4 7.6.4).
        transport = struct.pack(">BxH", 0x05, len(name)) + name
        return struct.pack(">Q4xBB4xHI", key, int(holds), kind, 1, len(transport)) + transport

    def change(
        self, task: Task, abort: Callable[[Collection[Hashable]], AbstractContextManager[None]]
    ) -> None:
        """Carry out PERSISTENT RESERVE OUT, one at a time.

        Args:
            task: the command.
            abort: gives a context in which no other command of these initiators runs, nor will be begun.

        Raises:
            CheckCondition: a malformed request.
            ReservationConflict: the nexus is not registered, its key is wrong, or another nexus holds the unit; or
                anybody holds it by RESERVE (6): the two ways exclude each other (SPC-2 5.5.1).
        """
        self._not_reserved()
        cdb = task.cdb
        action, scope, kind = cdb[1] & 0x1F, cdb[2] >> 4, cdb[2] & 0xF
        if action not in list(_Out):
            raise invalid_field(1, 4)
        if allocation_length(cdb) != _PARAMETERS:
            raise parameter_list_length_error()
        parameters = task.parameters(_PARAMETERS, 5)
        key, new_key = struct.unpack_from(">QQ", parameters)
        if parameters[20] & 0x08:
            raise invalid_parameter(20, 3)  # SPEC_I_PT
        if parameters[20] & 0x04:
            raise invalid_parameter(20, 2)  # ALL_TG_PT
        if parameters[20] & 0x01:
            raise invalid_parameter(20, 0)  # APTPL
        if action in (_Out.RESERVE, _Out.RELEASE, _Out.PREEMPT, _Out.PREEMPT_AND_ABORT):
            if scope:
                raise invalid_field(2, 7)
            if kind not in list(ReservationType):
                raise invalid_field(2, 3)
        nexus = task.nexus
        with self._lock:
            if action == _Out.REGISTER:
                if self._keys.get(nexus, 0) != key:
                    raise ReservationConflict("the key is not the registered one")
                self._register(nexus, new_key)
                return
            if action == _Out.REGISTER_AND_IGNORE_EXISTING_KEY:
                self._register(nexus, new_key)
                return
            if nexus not in self._keys or self._keys[nexus] != key:
                raise ReservationConflict("not registered with this key")
            if action == _Out.RESERVE:
                self._reserve(nexus, ReservationType(kind))
            elif action == _Out.RELEASE:
                self._release(nexus, ReservationType(kind))
            elif action == _Out.CLEAR:
                others = [other for other in self._keys if other != nexus]
                self._keys.clear()
                self._held = None
                self._generation += 1
                self._tell(others, AdditionalSense.RESERVATIONS_PREEMPTED)
            else:
                victims = self._victims(nexus, new_key)
                if action == _Out.PREEMPT:
                    self._preempt(nexus, ReservationType(kind), new_key, victims)
        if action == _Out.PREEMPT_AND_ABORT:
            # Without the lock: the commands waited for may need it, and nobody else changes anything meanwhile.
            whose = {*victims, nexus} if new_key == key else set(victims)
            with abort(whose), self._lock:
                self._preempt(nexus, ReservationType(kind), new_key, victims)

    def _register(self, nexus: Hashable, key: int) -> None:
        if key:
            if nexus not in self._keys and len(self._keys) >= MAX_REGISTRATIONS:
                raise CheckCondition.of(
                    SenseKey.ILLEGAL_REQUEST, AdditionalSense.INSUFFICIENT_REGISTRATION_RESOURCES
                )
            self._keys[nexus] = key
        else:
            self._unregister(nexus)
        self._generation += 1

    def _unregister(self, nexus: Hashable) -> None:
        self._keys.pop(nexus, None)
        held = self._held
        if held is None:
            return
        if held.kind in _ALL:
            if not self._keys:
                self._held = None
            elif held.holder == nexus:
                held.holder = next(iter(self._keys))
        elif held.holder == nexus:
            self._held = None
            if held.kind in _REGISTRANTS:
                self._tell(list(self._keys), AdditionalSense.RESERVATIONS_RELEASED)

    def _reserve(self, nexus: Hashable, kind: ReservationType) -> None:
        held = self._held
        if held is None:
            self._held = _Reservation(kind, nexus)
        elif held.kind != kind or not (held.holder == nexus or held.kind in _ALL):
            raise ReservationConflict("the unit is reserved already")

    def _release(self, nexus: Hashable, kind: ReservationType) -> None:
        held = self._held
        if held is None or not (held.holder == nexus or held.kind in _ALL):
            return  # not a holder: nothing happens, and that is no error (SPC-4 5.13.11.2)
        if held.kind != kind:
            additional = AdditionalSense.INVALID_RELEASE_OF_PERSISTENT_RESERVATION
            raise CheckCondition.of(SenseKey.ILLEGAL_REQUEST, additional)
        self._held = None
        if kind in _REGISTRANTS:
            self._tell([o for o in self._keys if o != nexus], AdditionalSense.RESERVATIONS_RELEASED)

    def _victims(self, nexus: Hashable, victim: int) -> list[Hashable]:
        """Whose registrations go when the key `victim` is preempted."""
        held = self._held
        if held is not None and held.kind in _ALL and victim == 0:
            return [other for other in self._keys if other != nexus]
        if victim == 0:
            raise invalid_parameter(8)
        victims = [other for other, key in self._keys.items() if key == victim and other != nexus]
        if not victims and not self._holds(victim):
            raise ReservationConflict("no initiator is registered with the key to preempt")
        return victims

    def _holds(self, victim: int) -> bool:
        """Whether preempting the key `victim` takes the reservation."""
        held = self._held
        if held is None:
            return False
        if held.kind in _ALL:
            return victim == 0
        return self._keys.get(held.holder) == victim

    def _preempt(self, nexus: Hashable, kind: ReservationType, victim: int, victims: list[Hashable]) -> None:
        held = self._held
        released = self._holds(victim)
        for other in victims:
            del self._keys[other]
        if released:
            self._held = _Reservation(kind, nexus)
        elif held is not None and held.holder not in self._keys:
            held.holder = nexus  # of the "all registrants" kinds every registered nexus is a holder
        self._generation += 1
        self._tell(victims, AdditionalSense.REGISTRATIONS_PREEMPTED)
        if released and held is not None and held.kind != kind and held.kind in _REGISTRANTS:
            others = [o for o in self._keys if o != nexus]
            self._tell(others, AdditionalSense.RESERVATIONS_RELEASED)

    def _tell(self, whom: list[Hashable], what: AdditionalSense) -> None:
        for nexus in whom:
            self._notify(nexus, what)

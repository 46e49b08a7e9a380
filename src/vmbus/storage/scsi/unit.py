"""Logical units: what answers the SCSI commands sent to one address of a controller."""

import logging
import struct
import threading
from collections.abc import Callable, Collection, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import get_ident
from uuid import UUID

from vmbus.errors import GuestMemoryError, LocalProtocolError
from vmbus.storage.disk import Disk
from vmbus.storage.scsi import cdb as commands
from vmbus.storage.scsi import mode
from vmbus.storage.scsi.block import BlockAccess
from vmbus.storage.scsi.cdb import Command, allocation_length
from vmbus.storage.scsi.codes import (
    AdditionalSense,
    DeviceType,
    MaintenanceIn,
    Opcode,
    Sanitize,
    ScsiStatus,
    SenseKey,
    ServiceIn16,
)
from vmbus.storage.scsi.defects import read_defect_data
from vmbus.storage.scsi.inquiry import Identity, Limits, disk_pages, inquiry
from vmbus.storage.scsi.plain_access import PlainAccess
from vmbus.storage.scsi.reservations import Reservations
from vmbus.storage.scsi.sense import CheckCondition, ReservationConflict, Sense, invalid_field
from vmbus.storage.scsi.task import Outcome, Task
from vmbus.storage.scsi.task_set import TaskAborted, TaskSet, TaskSetBusy
from vmbus.trace.guest_log import GuestLog, new_scope

__all__ = ["DiskUnit", "LogicalUnit"]

guest_log = GuestLog(logging.getLogger(__name__))

_MAX_ATTENTIONS = 16
_NO_ATTENTION = (Opcode.INQUIRY, Opcode.REPORT_LUNS, Opcode.REQUEST_SENSE)
"""Commands that are carried out although a unit attention is pending (SAM-5 5.14)."""

_ONLY_READ = frozenset(
    bytes([opcode])
    for opcode in (
        Opcode.READ_6,
        Opcode.READ_10,
        Opcode.READ_12,
        Opcode.READ_16,
        Opcode.VERIFY_10,
        Opcode.VERIFY_12,
        Opcode.VERIFY_16,
    )
)
"""Operation codes of commands that leave no trace, of those that may take long."""
_NEED_MEDIUM = (Opcode.TEST_UNIT_READY, Opcode.READ_CAPACITY_10, Opcode.SERVICE_ACTION_IN_16)
"""Commands that fail without a medium, beside those that access it."""

_WHILE_SANITIZING = (Opcode.INQUIRY, Opcode.REQUEST_SENSE, Opcode.REPORT_LUNS, Opcode.SANITIZE)

_SANITIZING = CheckCondition.of(SenseKey.NOT_READY, AdditionalSense.NOT_READY_SANITIZE_IN_PROGRESS)
_INTERNAL = CheckCondition.of(SenseKey.HARDWARE_ERROR, AdditionalSense.INTERNAL_TARGET_FAILURE).sense


class LogicalUnit:
    """Base of all units: finds the command, keeps unit attentions, turns failures into sense data.

    A unit may be served to several initiators at once and from several threads at once.

    Args:
        identity: the unit's names.
        table: the commands it knows.

    Attributes:
        plain: reads and writes need nothing but the disk: no unit attention is pending, nothing is
            reserved or protected. Compiled code may then serve them.
        faults: commands that ended with HARDWARE ERROR by a fault of this package; the first is logged.
    """

    device_type: int = DeviceType.DISK

    def __init__(self, identity: Identity, table: tuple[Command, ...]) -> None:
        self.identity = identity
        self.plain = False
        self.faults = 0
        self._log_scope = new_scope()
        self.watchers: list[Callable[[], None]] = []
        """Called when `plain` or the capacity may have changed."""
        self.tasks = TaskSet()
        """The commands that it has, of all initiators."""
        self._management = threading.Lock()
        self._manager = 0  # the thread that has it
        self._managing = False
        self._ended: list[Task] = []  # by the task management that is under way
        self._managers: frozenset[int] = frozenset()  # commands that may end those of others
        self._table = table
        self._lock = threading.Lock()
        self._attentions: dict[Hashable, list[AdditionalSense]] = {}
        self._retained: dict[Hashable, bytes] = {}
        self._nexuses: set[Hashable] = set()
        self._handlers: dict[int, Callable[[Task], int]] = {
            Opcode.REQUEST_SENSE: self._request_sense,
            Opcode.SEND_DIAGNOSTIC: self._send_diagnostic,
            Opcode.MAINTENANCE_IN: self._maintenance_in,
            Opcode.REPORT_LUNS: self._report_luns,
        }

    def attach(self, nexus: Hashable) -> None:
        """An initiator can reach the unit from now on; it gets unit attentions."""
        with self._lock:
            self._nexuses.add(nexus)

    def detach(self, nexus: Hashable) -> None:
        """The initiator is gone for good; what was pending for it is dropped."""
        self.lose(nexus)
        with self._lock:
            self._nexuses.discard(nexus)
            self._attentions.pop(nexus, None)
        self.changed()

    def lose(self, nexus: Hashable) -> None:
        """The initiator has closed its connection and may come back (an I_T nexus loss, SAM-5 6.3.4).

        What it has to be told waits for it, and registrations last; what it held by being there ends.
        """
        self._retained.pop(nexus, None)

    def retain(self, nexus: Hashable, sense: bytes) -> None:
        """Keep sense data that its initiator did not want with the status, until it asks or sends another command."""
        self._retained[nexus] = sense

    def attention(self, what: AdditionalSense, nexus: Hashable = None, *, but: Hashable = None) -> None:
        """Let `nexus`, or every initiator except `but`, get a unit attention; whoever is gone for good gets none."""
        with self._lock:
            for each in self._nexuses if nexus is None else self._nexuses & {nexus}:
                queue = self._attentions.setdefault(each, [])
                if each != but and what not in queue and len(queue) < _MAX_ATTENTIONS:
                    queue.append(what)
        self.changed()

    def reset(self, what: AdditionalSense = AdditionalSense.DEVICE_RESET_OCCURRED) -> None:
        """A logical unit or bus reset: all commands of all initiators end, settings go back to their defaults.

        On return no command that came before will change anything, whoever sent it (SAM-5 6.3.3). Reads that are under
        way end as usual: every request gets its completion, so its initiator knows how long its buffer is in use, and a
        reset is what initiators try when a read hangs.

        Raises:
            TaskSetBusy: a command does not end; nothing was reset, but others may have been aborted.
        """
        with self._managed(), self._aborting(lambda _: True, spare=lambda task: task.cdb[:1] in _ONLY_READ):
            self._restore_defaults()
            with self._lock:
                self._attentions.clear()  # a reset outranks whatever was to be told before (SAM-5 table 49)
                self._retained.clear()
            self.attention(what)

    def _restore_defaults(self) -> None:
        """What a reset does to the settings of this kind of unit."""

    @contextmanager
    def _managed(self) -> Iterator[None]:
        """Around task management, one at a time; afterwards tells whose commands ended before they were begun.

        Raises:
            TaskSetBusy: another one is under way, and does not end in time, or is carried out by this thread.
        """
        if self._manager == get_ident() or not self._management.acquire(timeout=self.tasks.max_wait):
            raise TaskSetBusy("other task management of the unit is under way")
        try:
            self._manager = get_ident()
            yield
        finally:
            ended, self._ended = self._ended, []
            self._manager = 0
            self._management.release()
        for task in ended:
            if task.on_abort is not None:
                task.on_abort()

    @contextmanager
    def _aborting(
        self,
        whom: Callable[[Hashable], bool],
        but: Task | None = None,
        spare: Callable[[Task], bool] = lambda _: False,
    ) -> Iterator[list[Task]]:
        """`TaskSet.aborting` within `_managed`, with the short cut of compiled code closed."""
        self._managing = True
        self.changed()  # on return compiled code has ended what it had begun
        try:
            with self.tasks.aborting(whom, but, spare) as ended:
                self._ended += ended
                yield ended
        finally:
            self._managing = False
            self.changed()

    def changed(self) -> None:
        """Work out `plain` again and tell the watchers."""
        for watcher in self.watchers:
            watcher()

    def attention_pending(self) -> bool:
        """Whether any initiator has a unit attention to get."""
        return any(self._attentions.values())

    def execute(self, task: Task) -> Outcome:
        """Carry out one command. Never raises: every failure is an outcome."""
        if task.cdb[0] not in self._managers:
            return self._execute(task)
        self.tasks.admit(task)
        try:
            with self._managed():  # while it waits here it is dormant, and another one may abort it
                return self._execute(task)
        except TaskSetBusy:
            self.tasks.end(task)
            return Outcome(ScsiStatus.BUSY)

    def _execute(self, task: Task) -> Outcome:
        try:
            self.tasks.begin(task)
            try:
                moved = self._dispatch(task)
            finally:
                self.tasks.end(task)
            return Outcome(ScsiStatus.TASK_ABORTED) if task.aborted else Outcome(ScsiStatus.GOOD, moved)
        except TaskAborted:
            return Outcome(ScsiStatus.TASK_ABORTED)
        except TaskSetBusy:
            return Outcome(ScsiStatus.BUSY)
        except CheckCondition as condition:
            return self._check(condition.sense, condition.overrun)
        except ReservationConflict:
            return Outcome(ScsiStatus.RESERVATION_CONFLICT)
        except GuestMemoryError:
            return self._check(invalid_field(0).sense)
        except Exception:  # a fault of ours must cost the guest this command, not the whole disk
            self.faults += 1
            guest_log.exception("SCSI unit", "command %s failed", task.cdb.hex(), scope=self._log_scope)
            return self._check(_INTERNAL)

    def _check(self, sense: Sense, overrun: bool = False) -> Outcome:
        packed = sense.pack(descriptor=self._descriptor_sense())
        return Outcome(ScsiStatus.CHECK_CONDITION, 0, packed, overrun)

    def _dispatch(self, task: Task) -> int:
        cdb = task.cdb
        command, known = commands.find(self._table, cdb)
        if command is None:
            if known:
                raise invalid_field(1, 4)
            raise CheckCondition.of(SenseKey.ILLEGAL_REQUEST, AdditionalSense.INVALID_OPERATION_CODE)
        if cdb[len(command.usage) - 1] & 0x04:
            raise invalid_field(len(command.usage) - 1, 2)  # NACA: not supported (SAM-5 5.2)
        if self._retained and cdb[0] != Opcode.REQUEST_SENSE:
            self._retained.pop(task.nexus, None)
        if self._attentions and cdb[0] not in _NO_ATTENTION:
            self._raise_attention(task.nexus)
        return self._run(task)

    def _run(self, task: Task) -> int:
        return self._handlers[task.cdb[0]](task)

    def _raise_attention(self, nexus: Hashable) -> None:
        with self._lock:
            queue = self._attentions.get(nexus)
            what = queue.pop(0) if queue else None
        if what is not None:
            self.changed()
            raise CheckCondition.of(SenseKey.UNIT_ATTENTION, what)

    def _descriptor_sense(self) -> bool:
        return False

    def _request_sense(self, task: Task) -> int:
        retained = self._retained.pop(task.nexus, None)
        if retained is not None:
            data = Sense.unpack(retained).pack(descriptor=bool(task.cdb[1] & 1))
            return task.reply(data, allocation_length(task.cdb))
        with self._lock:
            queue = self._attentions.get(task.nexus)
            what = queue.pop(0) if queue else None
        if what is not None:
            self.changed()
        sense = Sense(SenseKey.NO_SENSE, AdditionalSense.NONE)
        if what is not None:
            sense = Sense(SenseKey.UNIT_ATTENTION, what)
        return task.reply(sense.pack(descriptor=bool(task.cdb[1] & 1)), allocation_length(task.cdb))

    def _report_luns(self, task: Task) -> int:
        """The only unit that this one knows of: itself. A controller that has several answers in its place."""
        if task.cdb[2] > 2:
            raise invalid_field(2)
        body = b"" if task.cdb[2] == 1 else bytes(8)
        return task.reply(struct.pack(">I4x", len(body)) + body, allocation_length(task.cdb))

    def _send_diagnostic(self, task: Task) -> int:
        """The default self-test, which a virtual unit passes (SPC-4 6.41); mandatory for disks (SBC-3 table 10)."""
        if task.cdb[1] & 0xE0:
            raise invalid_field(1, 7)  # none of the longer tests
        if allocation_length(task.cdb):
            raise invalid_field(3)  # no diagnostic pages
        return 0

    def _maintenance_in(self, task: Task) -> int:
        cdb = task.cdb
        allocation = allocation_length(cdb)
        if cdb[1] & 0x1F == MaintenanceIn.REPORT_SUPPORTED_TASK_MANAGEMENT_FUNCTIONS:
            # LOGICAL UNIT RESET; with REPD the long form, which tells of no timeouts
            extended = bytes([0x08, 0, 0, 12]).ljust(16, b"\0")
            return task.reply(extended if cdb[2] & 0x80 else bytes([0x08, 0, 0, 0]), allocation)
        option, timeouts = cdb[2] & 7, bool(cdb[2] & 0x80)
        if option == 0:
            body = b"".join(self._command_descriptor(each, timeouts) for each in self._table)
            return task.reply(struct.pack(">I", len(body)) + body, allocation)
        if option > 3:
            raise invalid_field(2, 2)
        opcode, action = cdb[3], int.from_bytes(cdb[4:6], "big")
        same = [each for each in self._table if each.opcode == opcode]
        has_actions = any(each.service_action is not None for each in same)
        if (option == 1 and has_actions) or (option == 2 and same and not has_actions):
            raise invalid_field(2, 2)
        found = next((e for e in same if e.service_action is None or e.service_action == action), None)
        if found is None:
            return task.reply(bytes([0, 0x01, 0, 0]), allocation)  # SUPPORT 1: not supported
        flags = 0x03 | (0x80 if timeouts else 0)
        body = struct.pack(">BBH", 0, flags, len(found.usage)) + found.usage + self._timeouts(timeouts)
        return task.reply(body, allocation)

    def _command_descriptor(self, command: Command, timeouts: bool) -> bytes:
        action = command.service_action
        flags = (0x02 if timeouts else 0) | (0x01 if action is not None else 0)
        head = struct.pack(">BxHxBH", command.opcode, action or 0, flags, len(command.usage))
        return head + self._timeouts(timeouts)

    @staticmethod
    def _timeouts(wanted: bool) -> bytes:
        return struct.pack(">H10x", 0x0A) if wanted else b""  # no timeout is recommended


class DiskUnit(LogicalUnit):
    """A hard disk.

    Args:
        disk: the backend; it is not closed by the unit.
        serial: names the unit when the disk has no `Disk.identifier`.
        limits: what one command may ask for.
        identity: all names at once, instead of those made from `serial`.
        removable: the medium can be ejected and loaded again, by the guest and by the host.

    Attributes:
        ejected: the medium is out.
    """

    def __init__(
        self,
        disk: Disk,
        serial: UUID,
        *,
        limits: Limits | None = None,
        identity: Identity | None = None,
        removable: bool = False,
    ) -> None:
        super().__init__(identity or Identity(disk.identifier or serial), commands.BLOCK_COMMANDS)
        self.disk = disk
        self.limits = limits or Limits()
        self.block = block = BlockAccess(disk, self.limits)
        block.on_exclusive = self.changed
        self._managers = frozenset([Opcode.PERSISTENT_RESERVE_OUT, Opcode.SANITIZE])
        self.removable = removable
        self.ejected = False
        self._locks: set[Hashable] = set()
        self._sanitizing = False
        self.modes = mode.disk_mode_pages(disk.sector_size)
        self.reservations = Reservations(lambda nexus, what: self.attention(what, nexus))
        self._pages = disk_pages(disk, self.identity, self.limits, unmap=self._thin)
        self._stopped = False
        self._sector_count = disk.sector_count
        self._handlers |= {
            Opcode.TEST_UNIT_READY: lambda _: 0,
            Opcode.INQUIRY: self._inquiry,
            Opcode.MODE_SENSE_6: self._mode_sense,
            Opcode.MODE_SENSE_10: self._mode_sense,
            Opcode.MODE_SELECT_6: self._mode_select,
            Opcode.MODE_SELECT_10: self._mode_select,
            Opcode.START_STOP_UNIT: self._start_stop,
            Opcode.PREVENT_ALLOW_MEDIUM_REMOVAL: self._prevent_allow,
            Opcode.READ_CAPACITY_10: self._read_capacity_10,
            Opcode.SERVICE_ACTION_IN_16: self._service_action_in,
            Opcode.PERSISTENT_RESERVE_IN: self.reservations.report,
            Opcode.PERSISTENT_RESERVE_OUT: self._persistent_reserve_out,
            Opcode.RESERVE_6: self._reserve,
            Opcode.RELEASE_6: self._release,
        }
        self._media: dict[int, Callable[[Task], int]] = {
            Opcode.SYNCHRONIZE_CACHE_10: block.synchronize_cache,
            Opcode.SYNCHRONIZE_CACHE_16: block.synchronize_cache,
        }
        for group in ("6", "10", "12", "16"):
            self._media[Opcode[f"READ_{group}"]] = block.read
            self._media[Opcode[f"WRITE_{group}"]] = block.write
            if group != "6":
                self._media[Opcode[f"VERIFY_{group}"]] = block.verify
                self._media[Opcode[f"WRITE_AND_VERIFY_{group}"]] = block.write_and_verify
        self._media |= {
            Opcode.COMPARE_AND_WRITE: block.compare_and_write,
            Opcode.WRITE_SAME_10: block.write_same,
            Opcode.WRITE_SAME_16: block.write_same,
            Opcode.UNMAP: block.unmap,
            Opcode.ORWRITE_16: block.or_write,
            Opcode.WRITE_ATOMIC_16: block.write_atomic,
            Opcode.PRE_FETCH_10: block.prefetch,
            Opcode.PRE_FETCH_16: block.prefetch,
            Opcode.READ_DEFECT_DATA_10: read_defect_data,
            Opcode.READ_DEFECT_DATA_12: read_defect_data,
            Opcode.SANITIZE: self._sanitize,
        }
        self._writes = set(self._media) - {
            opcode
            for opcode, handler in self._media.items()
            if handler
            in (block.read, block.verify, block.synchronize_cache, block.prefetch, read_defect_data)
        }
        self._handlers |= self._media
        if not self._thin:
            self._table = commands.without_unmap(self._table)
        self.changed()

    def execute(self, task: Task) -> Outcome:
        """See `LogicalUnit.execute`; what would wait for a SANITIZE to end is told of it at once."""
        if self._sanitizing and task.cdb[0] in self._managers:
            return self._check(_SANITIZING.sense)
        return super().execute(task)

    def plain_access(self, nexus: Hashable) -> PlainAccess:
        """What carries out the reads and writes of an initiator that compiled code has taken apart already."""
        return PlainAccess(self.block, self.tasks, nexus)

    @property
    def _thin(self) -> bool:
        return self.disk.unmap_granularity > 0

    def refresh(self) -> None:
        """Notice a changed capacity: every initiator gets CAPACITY DATA HAS CHANGED."""
        count = self.disk.sector_count
        if count != self._sector_count:
            self._sector_count = count
            self.attention(AdditionalSense.CAPACITY_DATA_CHANGED)

    def _restore_defaults(self) -> None:
        """Mode pages go back to their defaults and the medium runs; persistent reservations stay."""
        self.modes.restore()
        self._stopped = False
        self._locks.clear()
        self.reservations.reset()
        self._apply_modes()

    def changed(self) -> None:
        """Work out `plain` again and tell the watchers."""
        self.plain = not (
            self._managing
            or self._stopped
            or self.ejected
            or self._sanitizing
            or self.block.exclusive
            or not self.block.write_cache
            or self.reservations.active
            or self.modes.pages[mode.CONTROL].bit(mode.SWP)
            or self.attention_pending()
        )
        super().changed()

    def _run(self, task: Task) -> int:
        opcode = task.cdb[0]
        if self.disk.sector_count != self._sector_count and opcode != Opcode.INQUIRY:
            self.refresh()
            if opcode not in (Opcode.REPORT_LUNS, Opcode.REQUEST_SENSE):
                self._raise_attention(task.nexus)
        if self.reservations.active:
            self.reservations.check(task)
        if self._sanitizing and opcode not in _WHILE_SANITIZING:
            raise _SANITIZING
        if self.ejected and (opcode in self._media or opcode in _NEED_MEDIUM):
            raise CheckCondition.of(SenseKey.NOT_READY, AdditionalSense.MEDIUM_NOT_PRESENT)
        if self._stopped and (opcode in self._media or opcode == Opcode.TEST_UNIT_READY):
            additional = AdditionalSense.NOT_READY_INITIALIZING_COMMAND_REQUIRED
            raise CheckCondition.of(SenseKey.NOT_READY, additional)
        if opcode in self._writes and self.modes.pages[mode.CONTROL].bit(mode.SWP):
            raise CheckCondition.of(SenseKey.DATA_PROTECT, AdditionalSense.SOFTWARE_WRITE_PROTECTED)
        return self._handlers[opcode](task)

    def _descriptor_sense(self) -> bool:
        return self.modes.pages[mode.CONTROL].bit(mode.D_SENSE)

    def _inquiry(self, task: Task) -> int:
        return inquiry(task, self.identity, self.device_type, self._pages, removable=self.removable)

    def _mode_sense(self, task: Task) -> int:
        protected = self.disk.read_only or self.modes.pages[mode.CONTROL].bit(mode.SWP)
        device_specific = 0x10 | (0x80 if protected else 0)  # DPOFUA, WP
        return self.modes.sense(task, device_specific=device_specific, block_count=self.disk.sector_count)

    def _mode_select(self, task: Task) -> int:
        with self._lock:
            changed = self.modes.select(task)
        if changed:
            if self.block.write_cache and not self.modes.pages[mode.CACHING].bit(mode.WCE):
                self.block.flush(task)  # what was acknowledged with the cache on must be durable, too
            self._apply_modes()
            self.attention(AdditionalSense.MODE_PARAMETERS_CHANGED, but=task.nexus)
        return allocation_length(task.cdb)

    def _apply_modes(self) -> None:
        self.block.write_cache = self.modes.pages[mode.CACHING].bit(mode.WCE)
        self.changed()

    def _start_stop(self, task: Task) -> int:
        action = task.cdb[4]
        if action & 0xF0:
            return 0  # a power condition: the disk is as ready in every one of them
        start, moves = bool(action & 1), bool(action & 0x02)
        if moves and not self.removable:
            raise invalid_field(4, 1)  # LOEJ: nothing to load or eject
        if not start:
            if moves and self._locks:
                raise CheckCondition.of(SenseKey.ILLEGAL_REQUEST, AdditionalSense.MEDIUM_REMOVAL_PREVENTED)
            if not action & 0x04 and not self.ejected:  # NO_FLUSH
                self.block.flush(task)
        if moves:
            self._move_medium(out=not start, but=task.nexus)
        self._stopped = not start
        self.changed()
        return 0

    def eject(self) -> None:
        """Take the medium out from the host's side, even if a guest has locked it.

        Raises:
            LocalProtocolError: the disk is not removable.
        """
        if not self.removable:
            raise LocalProtocolError("the disk is not removable")
        self._move_medium(out=True)

    def insert(self) -> None:
        """Put the medium in again."""
        self._move_medium(out=False)
        self._stopped = False
        self.changed()

    def _move_medium(self, *, out: bool, but: Hashable = None) -> None:
        loaded = self.ejected and not out
        self.ejected = out
        self.changed()
        if loaded:
            self.attention(AdditionalSense.MEDIUM_MAY_HAVE_CHANGED, but=but)

    def _prevent_allow(self, task: Task) -> int:
        if not self.removable:
            return 0  # nothing can be removed from a hard disk, so preventing it is always granted
        if task.cdb[4] & 0x01:
            self._locks.add(task.nexus)
        else:
            self._locks.discard(task.nexus)
        return 0

    def lose(self, nexus: Hashable) -> None:
        """See `LogicalUnit.lose`; its lock of the medium ends, and its RESERVE (6)."""
        self._locks.discard(nexus)
        self.reservations.lose(nexus)
        super().lose(nexus)
        self.changed()

    def _reserve(self, task: Task) -> int:
        self.reservations.reserve(task)
        self.changed()
        return 0

    def _release(self, task: Task) -> int:
        self.reservations.release(task)
        self.changed()
        return 0

    def _sanitize(self, task: Task) -> int:
        """SANITIZE: other commands end first, and find the unit not ready meanwhile; IMMED waits all the same."""
        action = task.cdb[1] & 0x1F
        if action == Sanitize.EXIT_FAILURE_MODE:
            return 0  # no failed operation leaves a mode behind
        # First, as a wrong command must not end those of others.
        carry_out = self.block.overwrite(task) if action == Sanitize.OVERWRITE else self.block.erase(task)
        with self._aborting(lambda _: True, but=task):
            self._sanitizing = True
        try:
            return carry_out()
        finally:
            self._sanitizing = False
            self.changed()

    def _read_capacity_10(self, task: Task) -> int:
        last = min(self.disk.sector_count - 1, 0xFFFFFFFF)
        return task.reply(struct.pack(">II", last, self.disk.sector_size), 8)

    def _service_action_in(self, task: Task) -> int:
        if task.cdb[1] & 0x1F == ServiceIn16.GET_LBA_STATUS:
            return self.block.get_lba_status(task)
        disk = self.disk
        exponent = (disk.physical_sector_size // disk.sector_size).bit_length() - 1
        thin = 0xC000 if self._thin else 0  # LBPME, LBPRZ
        data = struct.pack(">QIBBH16x", disk.sector_count - 1, disk.sector_size, 0, exponent, thin)
        return task.reply(data, allocation_length(task.cdb))

    def _persistent_reserve_out(self, task: Task) -> int:
        self.reservations.change(task, partial(self._abort_for, task))
        self.changed()
        return allocation_length(task.cdb)

    @contextmanager
    def _abort_for(self, task: Task, nexuses: Collection[Hashable]) -> Iterator[None]:
        """End the other commands of these initiators before `task` goes on (SPC-4 5.13.11.5)."""
        with self._aborting(nexuses.__contains__, but=task) as ended:
            yield
            # Every request has its completion here, so initiators see the TASK ABORTED status whatever TAS says; with
            # TAS 0 they are told in the standard's way, too (SAM-5 5.3.3).
            if not self.modes.pages[mode.CONTROL].bit(mode.TAS):
                for nexus in {each.nexus for each in ended} - {task.nexus}:
                    self.attention(AdditionalSense.COMMANDS_CLEARED_BY_ANOTHER_INITIATOR, nexus)

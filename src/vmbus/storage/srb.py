"""SCSI requests as Windows' storage stack sees them: how a command comes to the target, and how its outcome is told."""

from vmbus.core.ring import Packet
from vmbus.storage.scsi.cdb import BLOCK_TRANSFERS, block_fields
from vmbus.storage.scsi.codes import AdditionalSense, ScsiStatus, SenseKey
from vmbus.storage.scsi.sense import Sense, invalid_field, sense_key
from vmbus.storage.scsi.task import Outcome
from vmbus.storage.wire import (
    CDB_SIZE,
    MAX_REQUEST_SIZE,
    MIN_REQUEST_SIZE,
    NtStatus,
    PacketHeader,
    ScsiRequest,
    SrbStatus,
)

__all__ = ["NO_UNIT", "completion_size", "nt_status", "srb_status", "too_long", "without_lun"]

_LUN_IN_CDB = 0xE0

NO_UNIT = Outcome(
    ScsiStatus.CHECK_CONDITION,
    sense=Sense(SenseKey.ILLEGAL_REQUEST, AdditionalSense.LOGICAL_UNIT_NOT_SUPPORTED).pack(),
)
"""Of a command for an address where no unit is."""

_NT_STATUS = {
    SrbStatus.SUCCESS: NtStatus.SUCCESS,
    SrbStatus.BUSY: NtStatus.DEVICE_BUSY,
    SrbStatus.ABORTED: NtStatus.CANCELLED,
    SrbStatus.DATA_OVERRUN: NtStatus.BUFFER_OVERFLOW,
    SrbStatus.INVALID_LUN: NtStatus.DEVICE_DOES_NOT_EXIST,
}


def completion_size(packet: Packet) -> int:
    """Bytes of the payload area of a packet's completion: the request's own, within what versions have."""
    return min(max(len(packet.payload) - PacketHeader.SIZE, MIN_REQUEST_SIZE), MAX_REQUEST_SIZE)


def too_long(scsi: ScsiRequest) -> bytes:
    """The sense data for more data than one request may have, with the command's own field if it counts blocks."""
    cdb = without_lun(scsi.payload[:CDB_SIZE].ljust(CDB_SIZE, b"\0"), scsi.lun)
    blocks = cdb[0] in BLOCK_TRANSFERS and not cdb[1] & _LUN_IN_CDB
    return invalid_field(block_fields(cdb).count_field if blocks else 0).sense.pack()


def without_lun(cdb: bytes, lun: int) -> bytes:
    """The command without the logical unit number that initiators of SCSI-2 repeat in the high bits of byte 1.

    Later standards put protection information there, which no unit has. EDK II and OpenBSD (until it has seen the
    INQUIRY data) still repeat it; EDK II takes the high bits of the number, others the low ones.
    """
    if cdb[1] & _LUN_IN_CDB and cdb[1] & _LUN_IN_CDB in (lun & _LUN_IN_CDB, lun << 5 & _LUN_IN_CDB):
        return cdb[:1] + bytes([cdb[1] & ~_LUN_IN_CDB]) + cdb[2:]
    return cdb


def srb_status(outcome: Outcome) -> SrbStatus:
    """The storage stack's view of how a command ended, as OpenVMM gives it."""
    if outcome.status == ScsiStatus.GOOD:
        return SrbStatus.SUCCESS
    if outcome is NO_UNIT:
        return SrbStatus.INVALID_LUN
    if outcome.overrun:
        return SrbStatus.DATA_OVERRUN
    if outcome.status == ScsiStatus.BUSY:
        return SrbStatus.BUSY
    if outcome.status == ScsiStatus.TASK_ABORTED:
        return SrbStatus.ABORTED
    if outcome.status == ScsiStatus.CHECK_CONDITION and sense_key(outcome.sense) == SenseKey.ILLEGAL_REQUEST:
        return SrbStatus.INVALID_REQUEST
    return SrbStatus.ERROR


def nt_status(status: SrbStatus) -> NtStatus:
    """The packet's status that goes with a request's."""
    return _NT_STATUS.get(status, NtStatus.IO_DEVICE_ERROR)

"""Command descriptor blocks: which commands there are, which of their bits are looked at, and their common fields."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from vmbus.storage.scsi.codes import MaintenanceIn, Opcode, Sanitize, ServiceIn16
from vmbus.storage.scsi.sense import invalid_field

__all__ = [
    "BLOCK_COMMANDS",
    "BLOCK_TRANSFERS",
    "CDROM_COMMANDS",
    "BlockFields",
    "Command",
    "allocation_length",
    "block_fields",
]

SERVICE_ACTION_MASK = 0x1F


@dataclass(frozen=True, slots=True)
class Command:
    """A command that a unit knows.

    Attributes:
        opcode: `Opcode`.
        service_action: the action where one operation code stands for several commands, else None.
        usage: the CDB usage map of REPORT SUPPORTED OPERATION CODES (SPC-4 6.29.3): a 1 for each bit that
            is evaluated; byte 0 is the operation code. Its length is the command's length.
    """

    opcode: int
    service_action: int | None
    usage: bytes


def _command(opcode: Opcode, usage: str, service_action: int | None = None) -> Command:
    bits = bytearray([opcode]) + bytes.fromhex(usage)
    if service_action is not None:
        bits[1] = bits[1] & ~SERVICE_ACTION_MASK | service_action
    return Command(opcode, service_action, bytes(bits))


_PRIMARY = (
    _command(Opcode.TEST_UNIT_READY, "00000000 04"),
    _command(Opcode.REQUEST_SENSE, "010000ff 04"),
    _command(Opcode.INQUIRY, "01ffffff 04"),
    _command(Opcode.MODE_SELECT_6, "110000ff 04"),
    _command(Opcode.MODE_SENSE_6, "08ffffff 04"),
    _command(Opcode.START_STOP_UNIT, "010000f3 04"),
    _command(Opcode.SEND_DIAGNOSTIC, "f400ffff 04"),
    _command(Opcode.PREVENT_ALLOW_MEDIUM_REMOVAL, "00000003 04"),
    _command(Opcode.MODE_SELECT_10, "11000000 0000ffff 04"),
    _command(Opcode.MODE_SENSE_10, "18ffff00 0000ffff 04"),
    _command(Opcode.REPORT_LUNS, "00ff0000 00ffffff ff0004"),
    _command(
        Opcode.MAINTENANCE_IN,
        "1f87ffff ffffffff ff0004",
        MaintenanceIn.REPORT_SUPPORTED_OPERATION_CODES,
    ),
    _command(
        Opcode.MAINTENANCE_IN,
        "1f800000 00ffffff ff0004",
        MaintenanceIn.REPORT_SUPPORTED_TASK_MANAGEMENT_FUNCTIONS,
    ),
)

_RESERVATIONS = tuple(
    _command(Opcode.PERSISTENT_RESERVE_IN, "1f000000 0000ffff 04", a) for a in range(4)
) + tuple(_command(Opcode.PERSISTENT_RESERVE_OUT, "1fff0000 ffffffff 04", a) for a in range(7))

_LEGACY_RESERVATIONS = (
    _command(Opcode.RESERVE_6, "11000000 04"),
    _command(Opcode.RELEASE_6, "11000000 04"),
)

_READS_10_12 = (
    _command(Opcode.READ_CAPACITY_10, "00000000 00000000 04"),
    _command(Opcode.READ_10, "18ffffff ff00ffff 04"),
    _command(Opcode.READ_12, "18ffffff ffffffff ff0004"),
)

BLOCK_COMMANDS: tuple[Command, ...] = (
    *_PRIMARY,
    *_RESERVATIONS,
    *_LEGACY_RESERVATIONS,
    *_READS_10_12,
    _command(Opcode.READ_6, "1fffffff 04"),
    _command(Opcode.WRITE_6, "1fffffff 04"),
    _command(Opcode.WRITE_10, "18ffffff ff00ffff 04"),
    _command(Opcode.WRITE_AND_VERIFY_10, "12ffffff ff00ffff 04"),
    _command(Opcode.VERIFY_10, "16ffffff ff00ffff 04"),
    _command(Opcode.PRE_FETCH_10, "02ffffff ff00ffff 04"),
    _command(Opcode.SYNCHRONIZE_CACHE_10, "02ffffff ff00ffff 04"),
    _command(Opcode.READ_DEFECT_DATA_10, "001f0000 0000ffff 04"),
    _command(Opcode.WRITE_SAME_10, "08ffffff ff00ffff 04"),
    _command(Opcode.UNMAP, "00000000 0000ffff 04"),
    _command(Opcode.SANITIZE, "ff000000 0000ffff 04", Sanitize.OVERWRITE),
    _command(Opcode.SANITIZE, "ff000000 0000ffff 04", Sanitize.BLOCK_ERASE),
    _command(Opcode.SANITIZE, "ff000000 0000ffff 04", Sanitize.EXIT_FAILURE_MODE),
    _command(Opcode.WRITE_12, "18ffffff ffffffff ff0004"),
    _command(Opcode.WRITE_AND_VERIFY_12, "12ffffff ffffffff ff0004"),
    _command(Opcode.VERIFY_12, "16ffffff ffffffff ff0004"),
    _command(Opcode.READ_DEFECT_DATA_12, "1fffffff ffffffff ff0004"),
    _command(Opcode.READ_16, "18ffffff ffffffff ffffffff ff0004"),
    _command(Opcode.COMPARE_AND_WRITE, "18ffffff ffffffff ff000000 ff0004"),
    _command(Opcode.WRITE_16, "18ffffff ffffffff ffffffff ff0004"),
    _command(Opcode.ORWRITE_16, "18ffffff ffffffff ffffffff ff0004"),
    _command(Opcode.PRE_FETCH_16, "02ffffff ffffffff ffffffff ff0004"),
    _command(Opcode.WRITE_ATOMIC_16, "18ffffff ffffffff ffffffff ff0004"),
    _command(Opcode.WRITE_AND_VERIFY_16, "12ffffff ffffffff ffffffff ff0004"),
    _command(Opcode.VERIFY_16, "16ffffff ffffffff ffffffff ff0004"),
    _command(Opcode.SYNCHRONIZE_CACHE_16, "02ffffff ffffffff ffffffff ff0004"),
    _command(Opcode.WRITE_SAME_16, "09ffffff ffffffff ffffffff ff0004"),
    _command(Opcode.SERVICE_ACTION_IN_16, "1f000000 00000000 00ffffff ff0004", ServiceIn16.READ_CAPACITY_16),
    _command(Opcode.SERVICE_ACTION_IN_16, "1fffffff ffffffff ffffffff ff0004", ServiceIn16.GET_LBA_STATUS),
)
"""What a disk knows."""

CDROM_COMMANDS: tuple[Command, ...] = (
    *_PRIMARY,
    *_READS_10_12,
    _command(Opcode.READ_TOC, "020f0000 0000ffff 04"),
    _command(Opcode.GET_CONFIGURATION, "03ffff00 0000ffff 04"),
    _command(Opcode.GET_EVENT_STATUS_NOTIFICATION, "010000ff 0000ffff 04"),
    _command(Opcode.READ_DISC_INFORMATION, "07000000 0000ffff 04"),
    _command(Opcode.READ_TRACK_INFORMATION, "03ffffff ff00ffff 04"),
    _command(Opcode.READ_DISC_STRUCTURE, "0f000000 00ffffff ff0004"),
    _command(Opcode.READ_CD_MSF, "1e00ffff ffffffff fe0704"),
    _command(Opcode.READ_CD, "1effffff ffffffff fe0704"),
    _command(Opcode.MECHANISM_STATUS, "00000000 000000ff ff0004"),
)
"""What a CD-ROM drive knows."""


BLOCK_TRANSFERS = frozenset(
    opcode
    for opcode in Opcode
    if opcode.name.startswith(
        ("READ_6", "READ_1", "WRITE_6", "WRITE_1", "WRITE_AND", "WRITE_ATOMIC", "ORWRITE")
    )
)
"""Operation codes of commands that move as many blocks as they name."""


def without_unmap(commands: Iterable[Command]) -> tuple[Command, ...]:
    """What is left of commands on a unit that is not thinly provisioned: no UNMAP, nor that bit of WRITE SAME."""
    left = []
    for command in commands:
        if command.opcode in (Opcode.WRITE_SAME_10, Opcode.WRITE_SAME_16):
            usage = bytes([command.usage[0], command.usage[1] & ~0x08]) + command.usage[2:]
            left.append(Command(command.opcode, command.service_action, usage))
        elif command.opcode != Opcode.UNMAP:
            left.append(command)
    return tuple(left)


def find(commands: Iterable[Command], cdb: bytes) -> tuple[Command | None, bool]:
    """The command that `cdb` is, and whether at least its operation code is known."""
    known = False
    for command in commands:
        if command.opcode == cdb[0]:
            known = True
            if command.service_action is None or command.service_action == cdb[1] & SERVICE_ACTION_MASK:
                return command, True
    return None, known


class BlockFields(NamedTuple):
    """The fields that commands on a range of blocks share.

    Attributes:
        lba: first logical block address.
        blocks: how many of them.
        flags: byte 1: protection (bits 7–5), DPO (4), FUA (3), BYTCHK (2–1) … as the command defines.
        count_field: the byte where their number begins, for sense data.
    """

    lba: int
    blocks: int
    flags: int
    count_field: int

    @property
    def fua(self) -> bool:
        """Force unit access."""
        return bool(self.flags & 0x08)


def block_fields(cdb: bytes) -> BlockFields:
    """Take apart a command on blocks by the group of its operation code (SPC-4 4.2.5.1).

    Raises:
        CheckCondition: protection information is asked for; no unit has any (SBC-3 4.22).
    """
    group = cdb[0] >> 5
    if group == 0:
        return BlockFields((cdb[1] & 0x1F) << 16 | cdb[2] << 8 | cdb[3], cdb[4] or 256, 0, 4)
    if cdb[1] & 0xE0:
        raise invalid_field(1, 7)
    if cdb[0] == Opcode.WRITE_ATOMIC_16:
        return BlockFields(int.from_bytes(cdb[2:10], "big"), int.from_bytes(cdb[12:14], "big"), cdb[1], 12)
    if cdb[0] == Opcode.COMPARE_AND_WRITE:
        return BlockFields(int.from_bytes(cdb[2:10], "big"), cdb[13], cdb[1], 13)
    if group == 4:
        return BlockFields(int.from_bytes(cdb[2:10], "big"), int.from_bytes(cdb[10:14], "big"), cdb[1], 10)
    if group == 5:
        return BlockFields(int.from_bytes(cdb[2:6], "big"), int.from_bytes(cdb[6:10], "big"), cdb[1], 6)
    return BlockFields(int.from_bytes(cdb[2:6], "big"), int.from_bytes(cdb[7:9], "big"), cdb[1], 7)


_LENGTH_FIELDS = {
    Opcode.REQUEST_SENSE: (4, 5),
    Opcode.INQUIRY: (3, 5),
    Opcode.MODE_SELECT_6: (4, 5),
    Opcode.MODE_SENSE_6: (4, 5),
    Opcode.SEND_DIAGNOSTIC: (3, 5),
    Opcode.UNMAP: (7, 9),
    Opcode.MODE_SELECT_10: (7, 9),
    Opcode.MODE_SENSE_10: (7, 9),
    Opcode.READ_TOC: (7, 9),
    Opcode.GET_CONFIGURATION: (7, 9),
    Opcode.GET_EVENT_STATUS_NOTIFICATION: (7, 9),
    Opcode.READ_DISC_INFORMATION: (7, 9),
    Opcode.READ_TRACK_INFORMATION: (7, 9),
    Opcode.PERSISTENT_RESERVE_IN: (7, 9),
    Opcode.PERSISTENT_RESERVE_OUT: (5, 9),
    Opcode.SERVICE_ACTION_IN_16: (10, 14),
    Opcode.READ_DEFECT_DATA_10: (7, 9),
    Opcode.READ_DEFECT_DATA_12: (6, 10),
    Opcode.SANITIZE: (7, 9),
    Opcode.READ_DISC_STRUCTURE: (8, 10),
    Opcode.REPORT_LUNS: (6, 10),
    Opcode.MAINTENANCE_IN: (6, 10),
    Opcode.MECHANISM_STATUS: (8, 10),
}


def allocation_length(cdb: bytes) -> int:
    """The allocation length or parameter list length of a command that has one."""
    start, end = _LENGTH_FIELDS[Opcode(cdb[0])]
    return int.from_bytes(cdb[start:end], "big")

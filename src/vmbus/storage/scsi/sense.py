"""Sense data: what is said about a command that did not end with GOOD (SPC-4 4.5)."""

import errno
import struct
from dataclasses import dataclass

from vmbus.errors import DeviceError, RemoteProtocolError
from vmbus.storage.disk import DiskError
from vmbus.storage.scsi.codes import AdditionalSense, SenseKey

__all__ = [
    "CheckCondition",
    "ReservationConflict",
    "Sense",
    "disk_failure",
    "invalid_field",
    "invalid_parameter",
    "parameter_list_length_error",
    "sense_key",
]

_FIXED = 0x70
_DESCRIPTOR = 0x72
_VALID = 0x80
_FIXED_SIZE = 18


@dataclass(frozen=True, slots=True)
class Sense:
    """One exception.

    Attributes:
        key: `SenseKey`.
        additional: `AdditionalSense`: code and qualifier.
        information: a block address or byte offset, as the command defines; None if there is none.
        field: (byte, bit) of the wrong field, bit None for the whole byte; only for illegal requests.
        in_parameters: `field` counts in the parameter list, not in the command.
    """

    key: int
    additional: int
    information: int | None = None
    field: tuple[int, int | None] | None = None
    in_parameters: bool = False

    def pack(self, *, descriptor: bool = False) -> bytes:
        """The sense data in fixed (18 bytes) or in descriptor format (at most 28 bytes)."""
        specific = self._field_pointer()
        if descriptor:
            parts = b""
            if self.information is not None:
                parts += struct.pack(">BBBxQ", 0x00, 0x0A, _VALID, self.information)
            if specific:
                parts += struct.pack(">BBxx3sx", 0x02, 0x06, specific)
            head = (_DESCRIPTOR, self.key, self.additional >> 8, self.additional & 0xFF, len(parts))
            return struct.pack(">BBBB3xB", *head) + parts
        # A value of more than 32 bits does not fit the fixed format and is then declared not valid.
        fits = self.information is not None and self.information < 1 << 32
        return struct.pack(
            ">BxBIB4xBBx3s",
            _FIXED | (_VALID if fits else 0),
            self.key,
            self.information if fits and self.information is not None else 0,
            _FIXED_SIZE - 8,
            self.additional >> 8,
            self.additional & 0xFF,
            specific or bytes(3),
        )

    def _field_pointer(self) -> bytes:
        if self.field is None:
            return b""
        byte, bit = self.field
        flags = 0x80 | (0 if self.in_parameters else 0x40) | (0 if bit is None else 0x08 | bit)
        return struct.pack(">BH", flags, byte)

    @classmethod
    def unpack(cls, data: bytes) -> "Sense":
        """Parse sense data of either format; cut-off data gives what is there.

        Raises:
            RemoteProtocolError: too short to hold a sense key, or of an unknown format.
        """
        format_ = data[0] & 0x7F if data else 0
        if format_ in (0x70, 0x71) and len(data) >= 3:
            full = data.ljust(_FIXED_SIZE, b"\0")
            information = int.from_bytes(full[3:7], "big") if full[0] & _VALID else None
            return cls(full[2] & 0xF, full[12] << 8 | full[13], information, *_parse_pointer(full[15:18]))
        if format_ in (0x72, 0x73) and len(data) >= 4:
            information, pointer = None, bytes(3)
            rest = data[8 : 8 + (data[7] if len(data) > 7 else 0)]
            while len(rest) >= 2:
                part, rest = rest[: rest[1] + 2], rest[rest[1] + 2 :]
                if part[0] == 0x00 and len(part) == 12 and part[2] & _VALID:
                    information = int.from_bytes(part[4:12], "big")
                elif part[0] == 0x02 and len(part) == 8:
                    pointer = part[4:7]
            return cls(data[1] & 0xF, data[2] << 8 | data[3], information, *_parse_pointer(pointer))
        raise RemoteProtocolError(f"{len(data)} bytes of sense data in format 0x{format_:02x}")

    def __str__(self) -> str:
        key = SenseKey(self.key).name if self.key in list(SenseKey) else f"key {self.key:X}h"
        code = f"{self.additional >> 8:02X}h/{self.additional & 0xFF:02X}h"
        if self.additional in list(AdditionalSense):
            code += f" {AdditionalSense(self.additional).name}"
        return f"{key}, {code}"


def _parse_pointer(specific: bytes) -> tuple[tuple[int, int | None] | None, bool]:
    flags, byte = struct.unpack(">BH", specific)
    if not flags & 0x80:
        return None, False
    return (byte, flags & 7 if flags & 0x08 else None), not flags & 0x40


class CheckCondition(DeviceError):
    """The command ends with CHECK CONDITION.

    Attributes:
        sense: why.
        overrun: the command wanted to move more data than the initiator gave room for.
    """

    def __init__(self, sense: Sense, *, overrun: bool = False) -> None:
        super().__init__(str(sense))
        self.sense = sense
        self.overrun = overrun

    @classmethod
    def of(
        cls, key: SenseKey, additional: AdditionalSense, information: int | None = None
    ) -> "CheckCondition":
        """With the given sense key and code."""
        return cls(Sense(key, additional, information))


class ReservationConflict(DeviceError):
    """The command ends with RESERVATION CONFLICT: another initiator has reserved the unit."""


def invalid_field(byte: int, bit: int | None = None, *, overrun: bool = False) -> CheckCondition:
    """ILLEGAL REQUEST, INVALID FIELD IN CDB, pointing at the field."""
    sense = Sense(SenseKey.ILLEGAL_REQUEST, AdditionalSense.INVALID_FIELD_IN_CDB, None, (byte, bit))
    return CheckCondition(sense, overrun=overrun)


def invalid_parameter(byte: int, bit: int | None = None) -> CheckCondition:
    """ILLEGAL REQUEST, INVALID FIELD IN PARAMETER LIST, pointing at the field."""
    additional = AdditionalSense.INVALID_FIELD_IN_PARAMETER_LIST
    return CheckCondition(Sense(SenseKey.ILLEGAL_REQUEST, additional, None, (byte, bit), True))


def parameter_list_length_error() -> CheckCondition:
    """ILLEGAL REQUEST, PARAMETER LIST LENGTH ERROR."""
    return CheckCondition.of(SenseKey.ILLEGAL_REQUEST, AdditionalSense.PARAMETER_LIST_LENGTH_ERROR)


_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OUT_OF_REACH = (
    errno.ECONNRESET,
    errno.EPIPE,
    errno.ENOTCONN,
    errno.ETIMEDOUT,
    errno.ENODEV,
    errno.ESHUTDOWN,
)


def disk_failure(error: DiskError, *, writing: bool, lba: int) -> CheckCondition:
    """The sense data for a backend's failure, by its error number.

    No space left is DATA PROTECT, SPACE ALLOCATION FAILED WRITE PROTECT (SBC-3 4.7.3.4: what a thinly provisioned
    unit says when it is full), so that guests neither retry for ever nor suspect the medium.
    """
    if error.errno in _OUT_OF_SPACE:
        return CheckCondition.of(SenseKey.DATA_PROTECT, AdditionalSense.SPACE_ALLOCATION_FAILED)
    if error.errno == errno.EROFS:
        return CheckCondition.of(SenseKey.DATA_PROTECT, AdditionalSense.WRITE_PROTECTED)
    if error.errno in _OUT_OF_REACH:
        additional = AdditionalSense.LOGICAL_UNIT_COMMUNICATION_FAILURE
        return CheckCondition.of(SenseKey.HARDWARE_ERROR, additional)
    if writing:
        return CheckCondition.of(SenseKey.MEDIUM_ERROR, AdditionalSense.WRITE_ERROR, lba)
    return CheckCondition.of(SenseKey.MEDIUM_ERROR, AdditionalSense.UNRECOVERED_READ_ERROR, lba)


def sense_key(sense: bytes) -> int:
    """The sense key in packed sense data of either format."""
    return sense[1 if sense[0] & 0x02 else 2] & 0xF if len(sense) > 2 else SenseKey.NO_SENSE

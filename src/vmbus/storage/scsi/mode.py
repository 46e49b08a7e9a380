"""MODE SENSE and MODE SELECT: the settings of a unit (SPC-4 6.9 ff. and 7.5, SBC-3 6.4)."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from vmbus.storage.scsi.cdb import allocation_length
from vmbus.storage.scsi.codes import AdditionalSense, Opcode, SenseKey
from vmbus.storage.scsi.sense import (
    CheckCondition,
    invalid_field,
    invalid_parameter,
    parameter_list_length_error,
)
from vmbus.storage.scsi.task import Task

__all__ = ["ModePage", "ModePages", "cdrom_mode_pages", "disk_mode_pages"]

_ALL_PAGES = 0x3F
_ALL_SUBPAGES = 0xFF
_CHANGEABLE, _DEFAULT, _SAVED = 1, 2, 3

CACHING = 0x08
WCE = (2, 0x04)
"""Write cache enable, in the caching page: byte and mask. Off, every write is durable before its status."""

CONTROL = 0x0A
D_SENSE = (2, 0x04)
"""Descriptor format sense data, in the control page."""
SWP = (4, 0x08)
"""Software write protect, in the control page."""
TAS = (5, 0x40)
"""Task aborted status, in the control page: how initiators learn that another one ended their commands."""


@dataclass
class ModePage:
    """One mode page.

    Attributes:
        code: page code, 0 to 3Eh.
        current: the page's bytes after its two-byte header.
        changeable: a 1 for each bit that MODE SELECT may change.
        default: `current` after power-on.
    """

    code: int
    current: bytearray
    changeable: bytes
    default: bytes

    @classmethod
    def make(cls, code: int, values: str, changeable: Sequence[tuple[int, int]] = ()) -> "ModePage":
        """From hexadecimal values; `changeable` names (byte, mask) counted from the page's header."""
        current = bytearray.fromhex(values)
        mask = bytearray(len(current))
        for byte, bits in changeable:
            mask[byte - 2] |= bits
        return cls(code, current, bytes(mask), bytes(current))

    def bit(self, field: tuple[int, int]) -> bool:
        """Whether a flag, given as byte (counted from the header) and mask, is set."""
        return bool(self.current[field[0] - 2] & field[1])

    def pack(self, control: int) -> bytes:
        """Header and bytes: the current, changeable or default values."""
        body = {_CHANGEABLE: self.changeable, _DEFAULT: self.default}.get(control, bytes(self.current))
        return bytes([self.code, len(body)]) + body


class ModePages:
    """All mode pages of one unit.

    Args:
        pages: the pages, in any order.
        block_size: bytes of a block, for the block descriptor; 0 for units that give none (CD-ROMs).
    """

    def __init__(self, pages: Sequence[ModePage], block_size: int) -> None:
        self.pages = {page.code: page for page in sorted(pages, key=lambda page: page.code)}
        self._block_size = block_size

    def restore(self) -> None:
        """Let every page have its default values again."""
        for page in self.pages.values():
            page.current[:] = page.default

    def sense(self, task: Task, *, device_specific: int, block_count: int, medium_type: int = 0) -> int:
        """Answer MODE SENSE (6) or (10); returns the bytes moved.

        Raises:
            CheckCondition: an unknown page, or saved values, which there are none of.
        """
        cdb = task.cdb
        ten = cdb[0] == Opcode.MODE_SENSE_10
        control, code, subpage = cdb[2] >> 6, cdb[2] & 0x3F, cdb[3]
        if control == _SAVED:
            raise CheckCondition.of(SenseKey.ILLEGAL_REQUEST, AdditionalSense.SAVING_PARAMETERS_NOT_SUPPORTED)
        if code == _ALL_PAGES and subpage in (0, _ALL_SUBPAGES):
            chosen = list(self.pages.values())
        elif code in self.pages and subpage in (0, _ALL_SUBPAGES):
            chosen = [self.pages[code]]
        else:
            raise invalid_field(3 if code in self.pages or code == _ALL_PAGES else 2)
        long_lba = ten and bool(cdb[1] & 0x10)
        descriptor = b""
        if self._block_size and not cdb[1] & 0x08:
            if long_lba:
                descriptor = struct.pack(">Q4xI", block_count, self._block_size)
            else:
                descriptor = struct.pack(">II", min(block_count, 0xFFFFFFFF), self._block_size)
        body = descriptor + b"".join(page.pack(control) for page in chosen)
        if ten:
            head = struct.pack(
                ">HBBBxH", len(body) + 6, medium_type, device_specific, int(long_lba), len(descriptor)
            )
        else:
            head = struct.pack(">BBBB", len(body) + 3, medium_type, device_specific, len(descriptor))
        return task.reply(head + body, allocation_length(cdb))

    def select(self, task: Task) -> bool:
        """Carry out MODE SELECT (6) or (10), wholly or not at all; returns whether a value changed.

        Raises:
            CheckCondition: wrong lengths, unknown pages, or a change of what cannot be changed.
        """
        cdb = task.cdb
        ten = cdb[0] == Opcode.MODE_SELECT_10
        length = allocation_length(cdb)
        if cdb[1] & 0x01:
            raise invalid_field(1, 0)  # nothing can be saved
        if not length:
            return False
        if not cdb[1] & 0x10:
            raise invalid_field(1, 4)  # pages in the vendor's own format
        data = task.parameters(length, 7 if ten else 4)
        at = self._skip_header(data, ten)
        wanted: dict[int, bytes] = {}
        while at < length:
            if at + 2 > length:
                raise parameter_list_length_error()
            page = self.pages.get(data[at] & 0x3F)
            if page is None or data[at] & 0x40:  # unknown, or with a subpage
                raise invalid_parameter(at)
            if data[at + 1] != len(page.current):
                raise invalid_parameter(at + 1)
            body = data[at + 2 : at + 2 + len(page.current)]
            if len(body) < len(page.current):
                raise parameter_list_length_error()
            for index, (new, old, mask) in enumerate(zip(body, page.current, page.changeable, strict=True)):
                if (new ^ old) & ~mask:
                    raise invalid_parameter(at + 2 + index)
            wanted[page.code] = body
            at += 2 + len(body)
        changed = any(self.pages[code].current != body for code, body in wanted.items())
        for code, body in wanted.items():
            self.pages[code].current[:] = body
        return changed

    def _skip_header(self, data: bytes, ten: bool) -> int:
        """The offset of the first page; the block descriptor may only confirm the block size."""
        head = 8 if ten else 4
        if len(data) < head:
            raise parameter_list_length_error()
        size = int.from_bytes(data[6:8], "big") if ten else data[3]
        if head + size > len(data):
            raise parameter_list_length_error()
        if not size:
            return head
        long_lba = ten and bool(data[4] & 1)
        if size != (16 if long_lba else 8):
            raise invalid_parameter(6 if ten else 3)
        block_size = int.from_bytes(data[head + size - (4 if long_lba else 3) : head + size], "big")
        if block_size != self._block_size:
            raise invalid_parameter(head + size - 3)
        return head + size


def disk_mode_pages(block_size: int) -> ModePages:
    """A disk's pages: error recovery, caching, control and informational exceptions."""
    return ModePages(
        [
            ModePage.make(0x01, "c000 0000 0000 0000 0000"),  # AWRE, ARRE
            ModePage.make(CACHING, "0400 0000 0000 0000 0000 0000 0000 0000 0000", [WCE]),
            # GLTSD; commands may be reordered without restriction; no limit of busy time
            ModePage.make(CONTROL, "0210 0000 0000 ffff 0000", [D_SENSE, SWP, TAS]),
            ModePage.make(0x1C, "0800 0000 0000 0000 0000"),  # DEXCPT
        ],
        block_size,
    )


def cdrom_mode_pages() -> ModePages:
    """A CD-ROM drive's pages: error recovery, power condition, capabilities (MMC-6 annex)."""
    return ModePages(
        [
            ModePage.make(0x01, "0000 0000 0000 0000 0000"),
            ModePage.make(0x1A, "0000 0000 0000 0000 0000"),
            # reads CD-R, CD-RW and DVD-ROM; tray that can lock and eject; 7056 kB/s; 1 MiB buffer
            ModePage.make(0x2A, "0b00 0000 2900 1b90 0000 0400 1b90 0000 0000"),
        ],
        0,
    )

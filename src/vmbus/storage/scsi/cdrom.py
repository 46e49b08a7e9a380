"""A CD-ROM drive for ISO images: the commands of MMC-6 that guests use to read discs."""

import struct
from collections.abc import Hashable
from uuid import UUID

from vmbus.storage.disk import Disk, DiskError
from vmbus.storage.scsi import cdb as commands
from vmbus.storage.scsi import mode
from vmbus.storage.scsi.cdb import allocation_length, block_fields
from vmbus.storage.scsi.codes import AdditionalSense, DeviceType, Opcode, SenseKey
from vmbus.storage.scsi.inquiry import Identity, cdrom_pages, inquiry
from vmbus.storage.scsi.raw_sector import RAW_BLOCK, USER_BLOCK, from_msf, raw_sector
from vmbus.storage.scsi.sense import CheckCondition, disk_failure, invalid_field
from vmbus.storage.scsi.task import Task
from vmbus.storage.scsi.unit import LogicalUnit

__all__ = ["CdromUnit"]

BLOCK = 2048
"""Bytes of a block of data discs (MMC-6 4.2.2)."""

_LARGEST_CD = 99 * 60 * 75
"""Blocks that minutes, seconds and frames can name; larger images are presented as a DVD."""

_PROFILE_CD_ROM = 0x0008
_PROFILE_DVD_ROM = 0x0010
_LEAD_OUT = 0xAA
_DATA_TRACK = 0x14  # ADR 1, control 4: a data track, no copying
_LEAD_IN_FRAMES = 150
_MEDIA_CLASS = 4
_CHUNK = 1 << 20

_DVD_FIRST_SECTOR = 0x30000
_MODE_1 = (0, 2)
"""Expected sector types that mode 1 is: any, and itself."""
_USER = slice(16, 16 + USER_BLOCK)
_RAW_PARTS = (
    (0x80, slice(0, 12)),
    (0x20, slice(12, 16)),
    (0x10, _USER),
    (0x08, slice(16 + USER_BLOCK, RAW_BLOCK)),
)
"""What bits of the main channel selection give of a sector: synchronization, header, user data, EDC and ECC."""

_EVENT_NONE, _EVENT_NEW_MEDIA, _EVENT_REMOVED = 0, 2, 3


class CdromUnit(LogicalUnit):
    """A drive, with or without a disc in it.

    Args:
        disc: an ISO image as a disk of 2048- or 512-byte sectors, or None; it is only read.
        serial: names the drive.
        identity: all names at once, instead of those made from `serial`.
    """

    device_type = DeviceType.CD_ROM

    def __init__(self, disc: Disk | None, serial: UUID, *, identity: Identity | None = None) -> None:
        names = identity or Identity(serial, product="Virtual DVD-ROM")
        super().__init__(names, commands.CDROM_COMMANDS)
        self.disc = disc
        self.tray_open = False
        self.modes = mode.cdrom_mode_pages()
        self._locks: set[object] = set()
        self._event = _EVENT_NONE
        self._pages = cdrom_pages(names)
        self._handlers |= {
            Opcode.TEST_UNIT_READY: self._test_unit_ready,
            Opcode.INQUIRY: lambda task: inquiry(
                task, self.identity, self.device_type, self._pages, removable=True
            ),
            Opcode.MODE_SENSE_6: self._mode_sense,
            Opcode.MODE_SENSE_10: self._mode_sense,
            Opcode.MODE_SELECT_6: self._mode_select,
            Opcode.MODE_SELECT_10: self._mode_select,
            Opcode.START_STOP_UNIT: self._start_stop,
            Opcode.PREVENT_ALLOW_MEDIUM_REMOVAL: self._prevent_allow,
            Opcode.READ_CAPACITY_10: self._read_capacity,
            Opcode.READ_10: self._read,
            Opcode.READ_12: self._read,
            Opcode.READ_TOC: self._read_toc,
            Opcode.GET_CONFIGURATION: self._get_configuration,
            Opcode.GET_EVENT_STATUS_NOTIFICATION: self._get_event_status,
            Opcode.READ_DISC_INFORMATION: self._read_disc_information,
            Opcode.READ_TRACK_INFORMATION: self._read_track_information,
            Opcode.MECHANISM_STATUS: self._mechanism_status,
            Opcode.READ_CD: self._read_cd,
            Opcode.READ_CD_MSF: self._read_cd,
            Opcode.READ_DISC_STRUCTURE: self._read_disc_structure,
        }

    def insert(self, disc: Disk) -> Disk | None:
        """Put a disc in and close the tray; returns the disc that was in, which is not closed."""
        previous, self.disc = self.disc, disc
        self.tray_open = False
        self._event = _EVENT_NEW_MEDIA
        self.attention(AdditionalSense.MEDIUM_MAY_HAVE_CHANGED)
        return previous

    def eject(self) -> Disk | None:
        """Take the disc out from the host's side, even if a guest has locked the tray."""
        previous, self.disc = self.disc, None
        self.tray_open = True
        self._event = _EVENT_REMOVED
        return previous

    def _restore_defaults(self) -> None:
        """Mode pages go back to their defaults, and nobody's lock of the tray lasts (MMC-6 6.20.3, SPC-4 6.13)."""
        self.modes.restore()
        self._locks.clear()

    def lose(self, nexus: Hashable) -> None:
        """See `LogicalUnit.lose`; its lock of the tray ends."""
        self._locks.discard(nexus)
        super().lose(nexus)

    def _medium(self) -> tuple[Disk, int]:
        """The disc and its blocks.

        Raises:
            CheckCondition: NOT READY, with the tray's position.
        """
        disc = self.disc
        if disc is None or self.tray_open:
            where = AdditionalSense.MEDIUM_NOT_PRESENT_TRAY_CLOSED
            if self.tray_open:
                where = AdditionalSense.MEDIUM_NOT_PRESENT_TRAY_OPEN
            raise CheckCondition.of(SenseKey.NOT_READY, where)
        return disc, disc.size // BLOCK

    def _test_unit_ready(self, task: Task) -> int:
        del task
        self._medium()
        return 0

    def _read(self, task: Task) -> int:
        fields = block_fields(task.cdb)
        disc, blocks = self._medium()
        if fields.lba >= blocks or fields.lba + fields.blocks > blocks:
            raise CheckCondition.of(SenseKey.ILLEGAL_REQUEST, AdditionalSense.LBA_OUT_OF_RANGE)
        length = fields.blocks * BLOCK
        if length > task.data.length:
            raise invalid_field(fields.count_field, overrun=True)
        for done in range(0, length, _CHUNK):
            try:
                part = disc.read(fields.lba * BLOCK + done, min(_CHUNK, length - done))
            except DiskError as error:
                raise disk_failure(error, writing=False, lba=fields.lba + done // BLOCK) from error
            task.data.store(done, part)
            task.account.backend_calls += 1
            task.account.bytes_copied += len(part)
        return length

    def _read_cd(self, task: Task) -> int:
        """READ CD and READ CD MSF: user data, or more of the sectors of mode 1 that the disc has (MMC-6 6.18)."""
        cdb = task.cdb
        disc, blocks = self._medium()
        if cdb[0] == Opcode.READ_CD:
            lba, count, count_field = int.from_bytes(cdb[2:6], "big"), int.from_bytes(cdb[6:9], "big"), 6
        else:
            lba, count_field = from_msf(*cdb[3:6]), 6
            count = from_msf(*cdb[6:9]) - lba
            if lba < 0 or count < 0:
                raise invalid_field(3 if lba < 0 else 6)
        wanted = cdb[9]
        if wanted & 0x06:
            raise invalid_field(9, 2)  # no error flags
        if cdb[10] & 0x07:
            raise invalid_field(10, 2)  # no sub-channels
        if cdb[1] >> 2 & 7 not in _MODE_1 or self._profile() != _PROFILE_CD_ROM:
            raise CheckCondition.of(SenseKey.ILLEGAL_REQUEST, AdditionalSense.ILLEGAL_MODE_FOR_THIS_TRACK)
        if lba >= blocks or lba + count > blocks:
            raise CheckCondition.of(SenseKey.ILLEGAL_REQUEST, AdditionalSense.LBA_OUT_OF_RANGE)
        parts = [place for bit, place in _RAW_PARTS if wanted & bit]
        size = sum(place.stop - place.start for place in parts)
        if count * size > task.data.length:
            raise invalid_field(count_field, overrun=True)
        for index in range(count if size else 0):
            try:
                user = disc.read((lba + index) * BLOCK, BLOCK)
            except DiskError as error:
                raise disk_failure(error, writing=False, lba=lba + index) from error
            if parts != [_USER]:
                sector = raw_sector(lba + index, user)
                user = b"".join(sector[place] for place in parts)
            task.data.store(index * size, user)
            task.account.backend_calls += 1
            task.account.bytes_copied += size
        return count * size

    def _read_disc_structure(self, task: Task) -> int:
        """READ DISC STRUCTURE: what a DVD's lead-in says of a read-only disc of one layer (MMC-6 6.22)."""
        cdb = task.cdb
        _, blocks = self._medium()
        if cdb[1] & 0x0F:
            raise invalid_field(1, 3)  # not the structures of a DVD
        structures = {0x00: 2048, 0x01: 4, 0x04: 2048}
        form = cdb[7]
        if form == 0xFF:
            body = b"".join(
                struct.pack(">BBH", number, 0x40, size + 4) for number, size in structures.items()
            )
        elif self._profile() != _PROFILE_DVD_ROM:
            additional = AdditionalSense.CANNOT_READ_MEDIUM_INCOMPATIBLE_FORMAT
            raise CheckCondition.of(SenseKey.ILLEGAL_REQUEST, additional)
        elif form not in structures:
            raise invalid_field(7)
        elif cdb[6]:
            raise invalid_field(6)  # there is one layer
        else:
            body = bytes(structures[form])
            if form == 0x00:
                # DVD-ROM of book version 1, 120 mm, one embossed layer; where its data begin and end
                first = _DVD_FIRST_SECTOR
                body = struct.pack(">BBBBIII", 0x01, 0x0F, 0x01, 0x00, first, first + blocks - 1, 0).ljust(
                    2048, b"\0"
                )
        return task.reply(struct.pack(">Hxx", len(body) + 2) + body, allocation_length(cdb))

    def _read_capacity(self, task: Task) -> int:
        _, blocks = self._medium()
        return task.reply(struct.pack(">II", blocks - 1, BLOCK), 8)

    def _mode_sense(self, task: Task) -> int:
        return self.modes.sense(task, device_specific=0, block_count=0)

    def _mode_select(self, task: Task) -> int:
        self.modes.select(task)
        return allocation_length(task.cdb)

    def _start_stop(self, task: Task) -> int:
        action = task.cdb[4]
        if action & 0xF0:
            return 0  # a power condition
        if action & 0x02:  # LOEJ
            if not action & 0x01 and self._locks:
                raise CheckCondition.of(SenseKey.ILLEGAL_REQUEST, AdditionalSense.MEDIUM_REMOVAL_PREVENTED)
            opens = not action & 0x01
            if opens != self.tray_open:
                self.tray_open = opens
                self._event = _EVENT_REMOVED if opens else _EVENT_NEW_MEDIA
                if not opens and self.disc is not None:
                    self.attention(AdditionalSense.MEDIUM_MAY_HAVE_CHANGED, but=task.nexus)
        return 0

    def _prevent_allow(self, task: Task) -> int:
        if task.cdb[4] & 0x01:
            self._locks.add(task.nexus)
        else:
            self._locks.discard(task.nexus)
        return 0

    def _read_toc(self, task: Task) -> int:
        _, blocks = self._medium()
        msf = bool(task.cdb[1] & 0x02)
        # Old drivers give the format in the two high bits of the control byte (SFF-8020).
        form = task.cdb[2] & 0x0F or task.cdb[9] >> 6
        if form == 1:  # sessions: there is one
            body = bytes([1, 1, 0, _DATA_TRACK, 1, 0]) + self._address(0, msf)
        elif form == 0:
            first = task.cdb[6]
            if first > 1 and first != _LEAD_OUT:
                raise invalid_field(6)
            body = bytes([1, 1])
            if first <= 1:
                body += bytes([0, _DATA_TRACK, 1, 0]) + self._address(0, msf)
            body += bytes([0, _DATA_TRACK, _LEAD_OUT, 0]) + self._address(blocks, msf)
        else:
            raise invalid_field(2, 3)
        return task.reply(struct.pack(">H", len(body)) + body, allocation_length(task.cdb))

    @staticmethod
    def _address(lba: int, msf: bool) -> bytes:
        if not msf:
            return struct.pack(">I", lba)
        frames = min(lba + _LEAD_IN_FRAMES, 255 * 60 * 75 + 59 * 75 + 74)
        return bytes([0, frames // (60 * 75), frames // 75 % 60, frames % 75])

    def _profile(self) -> int:
        disc = self.disc
        if disc is None or self.tray_open:
            return 0
        return _PROFILE_DVD_ROM if disc.size // BLOCK > _LARGEST_CD else _PROFILE_CD_ROM

    def _features(self) -> list[tuple[int, int, bool, bytes]]:
        """(number, version, current, data) of each feature, MMC-6 5.3."""
        current = self._profile()
        profiles = b"".join(
            struct.pack(">HBx", profile, profile == current)
            for profile in (_PROFILE_DVD_ROM, _PROFILE_CD_ROM)
        )
        return [
            (0x0000, 0, True, profiles),
            (0x0001, 2, True, struct.pack(">IB3x", 1, 0)),  # core: SCSI family
            (0x0002, 1, True, bytes([0x02, 0, 0, 0])),  # morphing: events of operational change
            (0x0003, 1, True, bytes([0x29, 0, 0, 0])),  # removable: tray, ejects, locks
            (0x0010, 0, bool(current), struct.pack(">IHxx", BLOCK, 1)),  # random readable
            (0x001E, 2, current == _PROFILE_CD_ROM, bytes(4)),
            (0x001F, 0, current == _PROFILE_DVD_ROM, bytes(4)),
        ]

    def _get_configuration(self, task: Task) -> int:
        request, start = task.cdb[1] & 3, int.from_bytes(task.cdb[2:4], "big")
        if request == 3:
            raise invalid_field(1, 1)
        body = b""
        for number, version, current, data in self._features():
            wanted = number == start if request == 2 else number >= start and (current or request == 0)
            if wanted:
                persistent = number <= 3
                flags = version << 2 | persistent << 1 | current
                body += struct.pack(">HBB", number, flags, len(data)) + data
        head = struct.pack(">IxxH", len(body) + 4, self._profile())
        return task.reply(head + body, allocation_length(task.cdb))

    def _get_event_status(self, task: Task) -> int:
        if not task.cdb[1] & 0x01:
            raise invalid_field(1, 0)  # asynchronous notification
        if not task.cdb[4] & 1 << _MEDIA_CLASS:
            return task.reply(bytes([0, 2, 0x80, 1 << _MEDIA_CLASS]), allocation_length(task.cdb))
        event, self._event = self._event, _EVENT_NONE
        status = (0x02 if self.disc is not None else 0) | (0x01 if self.tray_open else 0)
        data = bytes([0, 6, _MEDIA_CLASS, 1 << _MEDIA_CLASS, event, status, 0, 0])
        return task.reply(data, allocation_length(task.cdb))

    def _read_disc_information(self, task: Task) -> int:
        self._medium()
        if task.cdb[1] & 7:
            raise invalid_field(1, 2)
        data = bytearray(34)
        data[0:2] = struct.pack(">H", 32)
        data[2] = 0x0E  # complete disc, complete last session
        data[3] = data[4] = data[5] = data[6] = 1  # one session with one track
        data[7] = 0x20  # unrestricted use
        data[16:24] = b"\xff" * 8  # no next session, no lead-out to be written
        return task.reply(data, allocation_length(task.cdb))

    def _read_track_information(self, task: Task) -> int:
        _, blocks = self._medium()
        kind, number = task.cdb[1] & 3, int.from_bytes(task.cdb[2:6], "big")
        if kind == 3 or (kind in (1, 2) and number != 1) or (kind == 0 and number >= blocks):
            raise invalid_field(2)
        data = struct.pack(">HBBBBBBIIIII", 34, 1, 1, 0, 0x04, 0x01, 0, 0, 0, 0, 0, blocks).ljust(36, b"\0")
        return task.reply(data, allocation_length(task.cdb))

    def _mechanism_status(self, task: Task) -> int:
        return task.reply(
            bytes([0, 0x10 if self.tray_open else 0, 0, 0, 0, 0, 0, 0]), allocation_length(task.cdb)
        )

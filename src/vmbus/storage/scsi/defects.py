"""READ DEFECT DATA: a virtual medium has no defects (SBC-3 5.19, 5.20)."""

import struct

from vmbus.storage.scsi.cdb import allocation_length
from vmbus.storage.scsi.codes import Opcode
from vmbus.storage.scsi.task import Task

__all__ = ["read_defect_data"]


def read_defect_data(task: Task) -> int:
    """Answer READ DEFECT DATA (10) or (12): the lists that were asked for, empty, in the format asked for."""
    cdb = task.cdb
    if cdb[0] == Opcode.READ_DEFECT_DATA_10:
        lists = cdb[2] & 0x1F  # primary, grown, format
        data = struct.pack(">BBH", 0, lists, 0)
    else:
        lists = cdb[1] & 0x1F
        data = struct.pack(">BBHI", 0, lists, 0, 0)
    return task.reply(data, allocation_length(cdb))

"""The SCSI target: logical units that carry out commands on disks, independent of any transport."""

from vmbus.storage.scsi.cdrom import CdromUnit
from vmbus.storage.scsi.inquiry import Identity, Limits
from vmbus.storage.scsi.sense import Sense
from vmbus.storage.scsi.task import BytesBuffer, DataBuffer, Outcome, Task
from vmbus.storage.scsi.unit import DiskUnit, LogicalUnit

__all__ = [
    "BytesBuffer",
    "CdromUnit",
    "DataBuffer",
    "DiskUnit",
    "Identity",
    "Limits",
    "LogicalUnit",
    "Outcome",
    "Sense",
    "Task",
]

"""Enlightened storage: the SCSI controller on VMBus, at both ends, and the disks behind it."""

from vmbus.storage.disk import Disk, DiskError, MemoryDisk, RawDisk
from vmbus.storage.guest_disk import StorageDisk
from vmbus.storage.scsi import CdromUnit, DiskUnit, LogicalUnit
from vmbus.storage.vsc import CommandError, StorageVsc
from vmbus.storage.vsp import StorageVsp

__all__ = [
    "CdromUnit",
    "CommandError",
    "Disk",
    "DiskError",
    "DiskUnit",
    "LogicalUnit",
    "MemoryDisk",
    "RawDisk",
    "StorageDisk",
    "StorageVsc",
    "StorageVsp",
]

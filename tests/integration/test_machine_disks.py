"""Disks that come and go while a machine is there: their budget, and the locks of their images."""

from pathlib import Path
from typing import Any

import pytest
from reference.engine import need_engine
from reference.tiny_guest import tiny_guest

from vmbus import Budget
from vmbus.errors import LocalProtocolError
from vmbus.machine.guest import Machine
from vmbus.storage.disk import MemoryDisk, RawDisk
from vmbus.storage.images import open_disk
from vmbus.storage.scsi import BytesBuffer, Sense, Task
from vmbus.storage.scsi.codes import AdditionalSense, ScsiStatus

need_engine()

MIB = 1 << 20


def machine(**options: Any) -> Machine:
    return Machine(tiny_guest("_start: hlt"), memory=16 * MIB, **options)


def written(machine: Machine, lun: int, blocks: int) -> Sense | None:
    """What a write to the unit comes to, after the unit attentions."""
    assert machine.storage is not None
    unit = machine.storage.units[0, lun]
    for _ in range(4):
        cdb = bytes([0x2A, 0, 0, 0, 0, 0, 0, 0, blocks]).ljust(16, b"\0")
        outcome = unit.execute(Task(cdb, BytesBuffer(b"w" * (blocks * 512)), "test"))
        if outcome.status == ScsiStatus.GOOD:
            return None
    return Sense.unpack(outcome.sense)


def test_a_disk_that_comes_later_counts_as_those_of_the_start() -> None:
    with (
        MemoryDisk(MIB) as first,
        MemoryDisk(MIB) as later,
        machine(disks=[first], budget=Budget(disk_growth=8192)) as made,
    ):
        made.add_disk(later, 1)
        for lun in (0, 1):
            assert written(made, lun, 8) is None
        for lun in (0, 1):
            sense = written(made, lun, 64)
            assert sense is not None
            assert sense.additional == AdditionalSense.SPACE_ALLOCATION_FAILED


@pytest.mark.parametrize("budget", [None, Budget(disk_growth=MIB)])
def test_an_image_is_locked_as_long_as_it_is_in_the_machine(tmp_path: Path, budget: Budget | None) -> None:
    path = tmp_path / "root.img"
    RawDisk.create(path, MIB).close()
    with machine(budget=budget) as made:
        made.add_disk(path, 0)
        assert written(made, 0, 1) is None
        made.remove_disk(0)
        with open_disk(path) as disk:
            assert disk.read(0, 512) == b"w" * 512
        made.add_disk(path, 1)  # and back, in another place
        with MemoryDisk(MIB) as own:
            made.add_disk(own, 2)
            made.remove_disk(2)
            assert own.read(0, 512) == bytes(512), "it is its owner's to close"


def test_an_image_that_found_no_place_is_not_locked(tmp_path: Path) -> None:
    path = tmp_path / "root.img"
    RawDisk.create(path, MIB).close()
    with MemoryDisk(MIB) as first, machine(disks=[first]) as made:
        with pytest.raises(LocalProtocolError, match="is taken"):
            made.add_disk(path, 0)
        open_disk(path).close()

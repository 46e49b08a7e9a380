"""Whatever takes a number of bytes says so when it gets something else."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from reference.tiny_guest import elf

from vmbus import MemoryDisk, ModelMachine
from vmbus.core.memory import GuestMemory
from vmbus.hypervisor import Hypervisor
from vmbus.machine.comparison import compare
from vmbus.machine.guest import Machine
from vmbus.machine.packages import make_root_disk
from vmbus.sizes import byte_count
from vmbus.storage.disk import RawDisk
from vmbus.storage.images import create_vhd, create_vhdx


def child(size: object, folder: Path) -> object:
    hypervisor = Hypervisor()
    return hypervisor.create_child(hypervisor.create_root(), memory_size=size)  # type: ignore[arg-type]


TAKERS: dict[str, Callable[[object, Path], object]] = {
    "machine": lambda size, folder: Machine(elf(b"\xf4"), memory=size),  # type: ignore[arg-type]
    "model machine": lambda size, folder: ModelMachine(memory_size=size),  # type: ignore[arg-type]
    "root": lambda size, folder: Hypervisor().create_root(memory_size=size),  # type: ignore[arg-type]
    "child": child,
    "guest memory": lambda size, folder: GuestMemory(size),  # type: ignore[arg-type]
    "memory disk": lambda size, folder: MemoryDisk(size),  # type: ignore[arg-type]
    "raw disk": lambda size, folder: RawDisk.create(folder / "raw", size),  # type: ignore[arg-type]
    "vhd": lambda size, folder: create_vhd(folder / "vhd", size),  # type: ignore[arg-type]
    "vhdx": lambda size, folder: create_vhdx(folder / "vhdx", size),  # type: ignore[arg-type]
    "blocks of a vhdx": lambda size, folder: create_vhdx(folder / "b", 4 << 20, block_size=size),  # type: ignore[arg-type]
    "comparison": lambda size, folder: compare(size=size),  # type: ignore[arg-type]
    "blocks": lambda size, folder: compare(size=65536, block=size),  # type: ignore[arg-type]
    "root disk": lambda size, folder: make_root_disk(folder / "root", size, b""),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("size", ["512M", 5e8, None, b"4096", [4096]])
@pytest.mark.parametrize("take", TAKERS.values(), ids=TAKERS.keys())
def test_what_is_no_number_of_bytes(
    take: Callable[[object, Path], object], size: object, tmp_path: Path
) -> None:
    with pytest.raises(TypeError, match="a number of bytes, such as 512 << 20, and not"):
        take(size, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_integers_of_other_kinds() -> None:
    assert byte_count(np.int64(4096), "it") == 4096
    assert GuestMemory(np.int64(1 << 20)).size == 1 << 20  # type: ignore[arg-type]
    with pytest.raises(TypeError) as refused:
        byte_count("x" * 100_000, "it")
    assert len(str(refused.value)) < 200

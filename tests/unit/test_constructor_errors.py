"""Whatever can be made wrongly says so with the errors that its docstring promises, and no others.

For each public name that can be called there are arguments that are not possible. A new one has to be added here, or
named among those that take anything.
"""

import fcntl
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

import vmbus
from vmbus import (
    Budget,
    DeviceError,
    GuestMemory,
    HypercallError,
    Hypervisor,
    LocalProtocolError,
    MemoryDisk,
    RingCorrupt,
    VmbusHost,
    Window,
)
from vmbus.machine.linux import BootError
from vmbus.storage.disk import DiskError

HUGE = 1 << 70
ONE, TWO = UUID(int=1), UUID(int=2)
MAC = bytes.fromhex("020000000001")
ANYTHING = {
    *("Account", "Comparison", "GuestConfig", "HostClock", "Ledger", "Result", "Switch", "VirtualClock"),
    *("Channel", "Disk", "Outcome", "Partition", "VirtualProcessor"),  # made by others, or abstract
    *("NetworkAdapter", "RedirectDisk"),  # what they are given was checked when it was made
}
"""Names without arguments that could be refused."""


class Case:
    """Arguments that are not possible, and what they end in."""

    def __init__(self, name: str, error: type[BaseException], *arguments: Any, **more: Any) -> None:
        self.name, self.error, self.arguments, self.more = name, error, arguments, more

    def __repr__(self) -> str:
        shown = [f"{a!r:.24}" for a in self.arguments] + [f"{n}={v!r:.24}" for n, v in self.more.items()]
        return f"{self.name}({', '.join(shown)})"


class Made:
    """An argument that is made when the case runs."""

    def __init__(self, what: str, make: Callable[["World"], Any]) -> None:
        self.what, self.make = what, make

    def __repr__(self) -> str:
        return self.what


class World:
    """What constructors need around them."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self.path, self.stack = path, stack
        self.hypervisor = stack.enter_context(Hypervisor())
        self.root = self.hypervisor.create_root()
        self.memory = stack.enter_context(GuestMemory(1 << 20))
        self.made: list[int] = []

    def child(self) -> Any:
        return self.hypervisor.create_child(self.root, memory_size=1 << 20)

    def with_bus(self) -> Any:
        child = self.child()
        VmbusHost(self.hypervisor, child)
        return child

    def deleted(self) -> Any:
        child = self.child()
        child.destroy()
        return child

    def loop(self) -> Any:
        return vmbus.loopback(self.memory)[0]

    def client(self) -> Any:
        return vmbus.StorageVsc(self.loop(), [1, 2])

    def file(self, name: str, content: bytes = b"") -> str:
        path = self.path / name
        path.write_bytes(content)
        return str(path)

    def keep(self, fd: int) -> int:
        self.stack.callback(os.close, fd)
        return fd

    def memfd(self, size: int = 1 << 16, *, seals: int = fcntl.F_SEAL_SHRINK, writable: bool = True) -> int:
        fd = self.keep(os.memfd_create("memory", os.MFD_ALLOW_SEALING))
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        return fd if writable else self.keep(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY))

    def pipe(self) -> int:
        read, write = os.pipe()
        self.keep(write)
        return self.keep(read)

    def closed_descriptor(self) -> int:
        fd = os.dup(0)
        os.close(fd)
        return fd

    def window(self, *, index: int = 0, mirrored: bool = True) -> Window:
        window = Window.from_fd(self.memfd(), [0, 1], mirrored=mirrored)
        window.view()[0:4] = index.to_bytes(4, "little")
        return window

    def closed_window(self) -> Window:
        window = self.window()
        window.close()
        return window

    def closed_memory(self) -> GuestMemory:
        memory = GuestMemory(4096)
        memory.close()
        return memory


FILES = [
    Made("closed", World.closed_descriptor),
    Made("pipe", World.pipe),
    Made("file", lambda world: world.keep(os.open(world.file("f", bytes(8192)), os.O_RDWR))),
    Made("folder", lambda world: world.keep(os.open(world.path, os.O_RDONLY))),
    Made("device", lambda world: world.keep(os.open("/dev/null", os.O_RDWR))),
    Made("small", lambda world: world.memfd(4096)),
    Made("not sealed", lambda world: world.memfd(seals=0)),
    Made("read-only", lambda world: world.memfd(writable=False)),
    Made("sealed against writing", lambda world: world.memfd(seals=fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE)),
    *(-2, HUGE, 1 << 31),
]
"""Descriptors that no guest memory can be made of."""
FOLDER = Made("a folder", lambda world: str(world.path))
MISSING = Made("missing", lambda world: str(world.path / "missing"))
NEW = Made("new", lambda world: str(world.path / "new"))
THERE = Made("there", lambda world: world.file("there", bytes(4096)))
ODD = Made("odd", lambda world: world.file("odd", bytes(777)))
EMPTY = Made("empty", lambda world: world.file("empty"))
HYPERVISOR = Made("hypervisor", lambda world: world.hypervisor)
PROCESSOR = Made("processor", lambda world: world.child().vps[0])
MEMORY = Made("memory", lambda world: world.memory)
CHANNEL = Made("channel", World.loop)
UNIT = Made("disk", lambda world: world.stack.enter_context(MemoryDisk(512)))

CASES = [
    *(Case("GuestMemory", ValueError, size) for size in (0, -1, 5, 4095, 1 << 46, HUGE)),
    *(Case("GuestMemory", TypeError, size) for size in ("4096", None)),
    *(Case("GuestMemory", ValueError, 8192, fd=fd) for fd in FILES),
    *(Case("GpaRanges", ValueError, ranges) for ranges in (
        [], [(0, 0, [])], [(-1, 0, [])], [(1 << 32, 0, [1])], [(1, 4096, [1])], [(1, -1, [1])], [(1, 0, [1, 2])],
        [(1, 0, [-1])], [(1, 0, [HUGE])], [(1, 0)],
    )),
    *(Case("GpaRanges", TypeError, ranges) for ranges in (None, [5], [(1, 0, None)], [(1, 0, ["a"])], [(1, 0, [.5])])),
    *(Case("GpaRanges.parse", RingCorrupt, data, count) for data, count in (
        (b"", 0), (b"", 1), (bytes(16), 1), (bytes(16), -1), (bytes(16), HUGE),
    )),
    *(Case("GpaRanges.contiguous", ValueError, gpa, length) for gpa, length in (
        (0, 0), (-1, 1), (0, -1), (HUGE, 1), (0, HUGE), (0, 1 << 32),
    )),
    Case("Window", TypeError),
    *(Case("Window.allocate", ValueError, pages) for pages in (0, -1, 1 << 30, HUGE)),
    *(Case("Window.from_fd", ValueError, Made("memfd", World.memfd), pages) for pages in ([], [1], [0, -1], [0, HUGE])),
    *(Case("Window.from_fd", ValueError, fd, [0, 1]) for fd in (-1, HUGE)),
    *(Case("Window.from_fd", OSError, fd, [0, 1]) for fd in (FILES[0], FILES[7])),
    *(Case(end, ValueError, window) for end in ("RingWriter", "RingReader") for window in (
        Made("not mirrored", lambda world: world.window(mirrored=False)), Made("closed", World.closed_window),
        Window.__new__(Window),
    )),
    *(Case(end, RingCorrupt, Made("bad", lambda world: world.window(index=5))) for end in ("RingWriter", "RingReader")),
    *(Case(end, TypeError, None) for end in ("RingWriter", "RingReader")),
    *(Case("Dispatcher", ValueError, flags) for flags in (0, -1, (1 << 20) + 1, HUGE)),
    *(Case("Doorbell", ValueError, fd) for fd in (-2, 1 << 31, HUGE)),
    Case("Packet", TypeError),
    *(Case("Sandbox", ValueError, **{name: 0}) for name in ("data", "descriptors", "threads")),
    Case("ChildProcess", LocalProtocolError, Made("deleted", World.deleted), "module:guest"),
    *(Case("Budget", ValueError, **{name: -1}) for name in Budget.__dataclass_fields__),
    *(Case("Hypervisor", ValueError, **{name: value})
      for name in ("tsc_frequency", "apic_frequency") for value in (0, -1, HUGE)),
    *(Case("Hypervisor.create_root", LocalProtocolError, vps=vps) for vps in (0, -1, HUGE)),
    *(Case("Hypervisor.create_root", ValueError, memory_size=size) for size in (0, 5, HUGE)),
    *(Case("Hypervisor.create_child", LocalProtocolError, **more) for more in (
        {"vps": 0}, {"vps": -1}, {"vps": HUGE}, {"privileges": -1}, {"privileges": HUGE},
        {"memory": Made("closed", World.closed_memory)},
    )),
    *(Case("Hypervisor.create_child", ValueError, memory_size=size) for size in (0, -1, 5, HUGE)),
    *(Case("MemoryDisk", DiskError, **more) for more in (
        {"size": 0}, {"size": -512}, {"size": 5}, {"size": 1 << 62}, {"size": HUGE}, {"size": 512, "sector_size": 0},
        {"size": 512, "sector_size": 3}, {"size": 512, "sector_size": -1}, {"size": 512, "content": bytes(513)},
        {"size": 4096, "physical_sector_size": 5}, {"size": 4096, "sector_size": 4096, "physical_sector_size": 512},
    )),
    *(Case("RawDisk", DiskError, path) for path in (MISSING, FOLDER, ODD, EMPTY, "/dev/null", "", "x" * 5000)),
    *(Case("RawDisk", DiskError, THERE, **more) for more in (
        {"sector_size": 7}, {"sector_size": -512}, {"physical_sector_size": 3},
    )),
    *(Case("RawDisk.create", DiskError, NEW, size) for size in (0, 5, -512, HUGE)),
    *(Case("RawDisk.create", DiskError, path, 512) for path in (THERE, FOLDER, "a\0b")),
    *(Case("RawDisk.create", DiskError, NEW, 512, sector_size=size) for size in (0, 5, -1)),
    *(Case("open_disk", DiskError, path) for path in (
        MISSING, FOLDER, ODD, "", "nbd://", "nbd:somewhere", "nbd+unix:///?socket=/nowhere", "nbd://localhost:99999/",
    )),
    *(Case("open_disk", DiskError, THERE, format=name) for name in ("qcow2", "vhd", "vhdx")),
    *(Case(create, DiskError, NEW, **more) for create in ("create_vhd", "create_vhdx") for more in (
        {"size": 0}, {"size": -1}, {"size": 5}, {"size": HUGE}, {"size": 1 << 20, "variant": "best"},
        {"size": 1 << 20, "variant": "differencing"}, {"size": 1 << 20, "parent": MISSING},
        {"size": 1 << 20, "block_size": 3}, {"size": 1 << 20, "block_size": -1}, {"size": 1 << 20, "block_size": HUGE},
    )),
    *(Case(create, DiskError, path, 1 << 20) for create in ("create_vhd", "create_vhdx") for path in (
        THERE, "a\0b", Made("nowhere", lambda world: str(world.path / "no" / "where")),
    )),
    *(Case("create_vhdx", DiskError, NEW, 1 << 20, **more) for more in (
        {"sector_size": 3}, {"physical_sector_size": 3}, {"log_size": 0}, {"log_size": 5}, {"log_size": HUGE},
    )),
    *(Case("compare", DeviceError, **more) for more in (
        {"block": 0}, {"block": -1}, {"block": 7}, {"depth": 0}, {"depth": -1}, {"size": 0}, {"size": 5},
        {"image": MISSING},
    )),
    *(Case("Offer", ValueError, ONE, TWO, **more) for more in (
        {"user_defined": bytes(121)}, {"subchannel_index": -1}, {"subchannel_index": HUGE}, {"mmio_megabytes": -1},
        {"mmio_megabytes": HUGE}, {"flags": -1}, {"flags": HUGE},
    )),
    *(Case("loopback", ValueError, MEMORY, **{name: pages})
      for name in ("outgoing_pages", "incoming_pages") for pages in (0, -1, HUGE)),
    *(Case("StorageVsp", LocalProtocolError, {address: UNIT}) for address in ((256, 0), (-1, 0), (0, 256), (0, -1))),
    *(Case("StorageVsp", TypeError, {(0, 0): thing}) for thing in ("disk.img", 5, None)),
    Case("StorageVsp", ValueError, workers=-1),
    Case("StorageVsc", LocalProtocolError, CHANNEL, []),
    Case("StorageDisk", LocalProtocolError, Made("not connected", World.client)),
    *(Case("AdapterConfig", ValueError, mac) for mac in (b"", bytes(6), b"\xff" * 6, MAC + b"\0", MAC[:5])),
    *(Case("AdapterConfig", ValueError, MAC, max_queues=queues) for queues in (0, -1, 65, HUGE)),
    *(Case("NetworkVsc", LocalProtocolError, CHANNEL, pages) for pages in ([], [1], range(8))),
    Case("VmbusHost", HypercallError, HYPERVISOR, Made("has one", World.with_bus)),
    Case("VmbusHost", ValueError, HYPERVISOR, Made("child", World.child), hosting="clouds"),
    Case("VmbusGuest", ValueError, PROCESSOR, versions=()),
    *(Case("VmbusGuest", TypeError, processors) for processors in ([], None)),
    *(Case("ModelMachine", LocalProtocolError, memory_size=size) for size in (0, -1, 4096, (8 << 20) + 1, HUGE)),
    Case("ModelMachine", LocalProtocolError, personality="beos"),
    *(Case("Machine", BootError, kernel) for kernel in (b"", bytes(4096))),
    *(Case("Machine", OSError, kernel) for kernel in (MISSING, FOLDER)),
    *(Case("Machine", TypeError, bytes(4096), **{name: "one"}) for name in ("disks", "cdroms", "networks")),
]  # fmt: skip


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with ExitStack() as stack:
        yield World(tmp_path, stack)


def made(argument: Any, world: World) -> Any:
    if isinstance(argument, Made):
        return argument.make(world)
    if isinstance(argument, dict):
        return {key: made(value, world) for key, value in argument.items()}
    return argument


def called(case: Case, world: World) -> Callable[..., object]:
    name, _, method = case.name.partition(".")
    thing = getattr(vmbus, name)
    if name == "Hypervisor" and method == "create_child":
        return lambda **more: world.hypervisor.create_child(world.root, **{"memory_size": 4096, **more})
    if name == "Hypervisor" and method:
        return getattr(Hypervisor(), method)  # type: ignore[no-any-return]
    return getattr(thing, method) if method else thing


def promised(name: str) -> str:
    """What the docstring of a public name says of errors: in its own, or in that of its constructor."""
    thing: Any = vmbus
    for part in name.split("."):
        thing = getattr(thing, part)
    texts = [inspect.getdoc(thing) or "", inspect.getdoc(getattr(thing, "__init__", None)) or ""]
    return "\n".join(text.partition("Raises:")[2].partition("\n\n")[0] for text in texts)


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_what_is_not_possible_ends_in_the_promised_error(case: Case, world: World) -> None:
    make = called(case, world)
    arguments = [made(argument, world) for argument in case.arguments]
    more = {name: made(argument, world) for name, argument in case.more.items()}
    with pytest.raises(case.error) as raised:
        make(*arguments, **more)
    assert str(raised.value), "it says why"
    if not isinstance(raised.value, TypeError):  # of the wrong kind altogether: Python's own rule
        names = {kind.__name__ for kind in type(raised.value).__mro__} - {"VmbusError", "Exception", "object"}
        text = promised(case.name)
        assert any(name in text for name in names), (
            f"{case.name} does not promise {type(raised.value).__name__}"
        )


def test_every_public_name_that_can_be_called_is_tried() -> None:
    tried = {case.name.partition(".")[0] for case in CASES}
    callables = {
        name
        for name in vmbus.__all__
        if callable(thing := getattr(vmbus, name))
        and not (isinstance(thing, type) and issubclass(thing, BaseException))
    }
    assert tried | ANYTHING == callables
    assert not tried & ANYTHING


def test_a_refused_descriptor_is_left_alone(world: World) -> None:
    """What the caller opened stays open, and what was tried leaks nothing."""
    before = len(os.listdir("/proc/self/fd"))
    fd = world.memfd(4096)
    for _ in range(3):
        with pytest.raises(ValueError, match="too small"):
            GuestMemory(8192, fd=fd)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    os.fstat(fd)

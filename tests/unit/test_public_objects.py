"""What a user meets at a prompt: what objects show, what closes, what may be copied or sent to another process."""

import copy
import inspect
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

import vmbus
from vmbus import (
    Account,
    DeviceError,
    GpaRanges,
    GuestMemory,
    GuestMemoryError,
    HypercallError,
    LocalProtocolError,
    MemoryDisk,
    ModelMachine,
    RawDisk,
    VmbusError,
    create_vhdx,
    open_disk,
)
from vmbus.core.dispatch import Dispatcher, Doorbell, EventFlags, MessageSlot
from vmbus.core.memory import Window
from vmbus.core.ring import RingReader, RingWriter
from vmbus.core.x86 import Cpu
from vmbus.hypervisor.faults import PageFault
from vmbus.storage.disk import DiskError
from vmbus.storage.scsi.codes import SenseKey
from vmbus.storage.scsi.sense import CheckCondition, invalid_field
from vmbus.storage.vsc import CommandError

MAC = bytes.fromhex("02aabbccdd01")


@pytest.fixture
def objects(tmp_path: Path) -> Iterator[dict[str, object]]:
    """One of everything that a user holds in an experiment, by its class name."""
    with ExitStack() as stack:
        memory = stack.enter_context(GuestMemory(1 << 20))
        window = Window.allocate(4)
        machine = stack.enter_context(ModelMachine())
        disk = stack.enter_context(MemoryDisk(1 << 20))
        image = stack.enter_context(create_vhdx(tmp_path / "image.vhdx", 1 << 20))
        raw = stack.enter_context(RawDisk.create(tmp_path / "raw.img", 4096))
        switch = vmbus.Switch(name="lan")
        port = switch.connect("model")
        nic = machine.add_network(port, MAC)
        seen = machine.add_enlightened_disk(disk)
        made: list[object] = [
            *(memory, window, RingWriter(window), RingReader(window), GpaRanges.contiguous(4096, 100)),
            *(stack.enter_context(Doorbell()), Dispatcher(8)),
            *(machine, machine.hypervisor, machine.root, machine.root.vps[0], machine.hypervisor.clock),
            *(machine.host, machine.guest, machine.host.channels[0], machine.guest.offers[0]),
            *(disk, image, raw, seen, seen.vsc, machine.add_emulated_disk(raw), vmbus.StorageVsp()),
            machine.add_emulated_network(switch.connect("old"), MAC),
            *(switch, port, nic, machine.ledger, machine.ledger.total(), machine.child.personality),
            *(vmbus.VirtualClock(), vmbus.NetworkAdapter(machine.host, switch.connect("b"), _config())),
        ]
        yield {type(thing).__name__: thing for thing in made}


def _config() -> vmbus.AdapterConfig:
    return vmbus.AdapterConfig(MAC)


def test_what_is_shown_names_the_object_and_fits_on_a_screen(objects: dict[str, object]) -> None:
    for name, thing in objects.items():
        shown = repr(thing)
        assert name in shown
        assert " at 0x" not in shown, shown  # an address of the interpreter tells nobody anything
        assert len(shown) < 500, shown
        assert "\\x00\\x00" not in shown


def test_what_is_shown_follows_the_state(objects: dict[str, object]) -> None:
    writer, reader, memory = (objects[name] for name in ("RingWriter", "RingReader", "GuestMemory"))
    assert isinstance(writer, RingWriter)
    assert isinstance(reader, RingReader)
    writer.send(b"")
    reader.recv()
    assert "1 packets, 1 doorbells" in repr(writer)
    assert "1 packets" in repr(reader)
    assert repr(memory) == "<GuestMemory of 0x100000 bytes>"
    assert repr(objects["ModelMachine"]) == "<ModelMachine of 'linux'>"
    assert "version 5.3" in repr(objects["VmbusHost"])
    assert "2 channels open" in repr(objects["VmbusGuest"])
    assert repr(objects["VirtualClock"]) == "<VirtualClock at 0 ns>"
    assert repr(Account(packets_sent=3)) == "Account(packets_sent=3)"


def test_an_offer_shows_the_bytes_that_are_not_padding() -> None:
    offer = vmbus.Offer(UUID(int=1), UUID(int=2), b"pipe".ljust(120, b"\0"))
    assert "user_defined=b'pipe'" in repr(offer)


def test_whatever_can_be_closed_is_a_context_manager(objects: dict[str, object]) -> None:
    closing = {
        name for name, thing in objects.items() if hasattr(thing, "close") or hasattr(thing, "shutdown")
    }
    assert closing >= {
        "GuestMemory",
        "Window",
        "Hypervisor",
        "VmbusHost",
        "VmbusGuest",
        "Channel",
        "StorageVsp",
    }
    for name in closing:
        assert isinstance(objects[name], AbstractContextManager), name


def test_leaving_a_context_closes() -> None:
    with GuestMemory(4096) as memory:
        memory.write(0, b"x")
    with pytest.raises(GuestMemoryError):
        memory.read(0, 1)
    with Window.allocate(1) as window:
        window.view()[0] = 1
    assert repr(window) == "<Window, closed>"
    with Doorbell() as doorbell:
        descriptor = doorbell.fd
        os.fstat(descriptor)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(descriptor)
    with vmbus.Hypervisor() as hypervisor:
        child = hypervisor.create_child(hypervisor.create_root(), memory_size=1 << 20)
    assert "DELETED" in repr(child)
    hypervisor.close()  # once more: harmless


def test_signatures_of_compiled_classes_and_methods() -> None:
    made = (
        GuestMemory,
        GpaRanges,
        RingWriter,
        RingReader,
        Doorbell,
        Dispatcher,
        EventFlags,
        MessageSlot,
        Cpu,
    )
    for kind in made:
        assert inspect.signature(kind).parameters
        assert "\n--\n" not in (kind.__doc__ or "")
        for name, method in vars(kind).items():
            if not name.startswith("_") and callable(method):
                inspect.signature(method)
                assert inspect.getdoc(method), f"{kind.__name__}.{name}"
    assert str(inspect.signature(GuestMemory)) == "(size, *, mapped=True, fd=-1)"


def test_every_public_method_and_property_has_a_docstring() -> None:
    missing = [
        f"{kind}.{name}"
        for kind in vmbus.__all__
        if inspect.isclass(getattr(vmbus, kind))
        for name, member in inspect.getmembers(getattr(vmbus, kind))
        if not name.startswith("_") and (callable(member) or isinstance(member, property))
        if not inspect.getdoc(member)
    ]
    assert missing == []


ERRORS = [
    *(kind("why") for kind in vars(vmbus.errors).values() if isinstance(kind, type) and kind is not HypercallError
      if issubclass(kind, VmbusError)),
    HypercallError(5),
    HypercallError(5, "in words"),
    PageFault(0x1000, 2),
    DiskError("full", 28),
    CommandError(b"\x28", 4, 2, invalid_field(2).sense),
    invalid_field(2, 3, overrun=True),
]  # fmt: skip


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_errors_survive_a_process_boundary(error: VmbusError) -> None:
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert vars(again) == vars(error)
        assert again.args == error.args


def test_the_sense_data_of_an_error_survives_too() -> None:
    again = pickle.loads(pickle.dumps(invalid_field(2)))
    assert isinstance(again, CheckCondition)
    assert again.sense.key == SenseKey.ILLEGAL_REQUEST


def test_objects_that_own_memory_are_not_copied_by_accident(objects: dict[str, object]) -> None:
    for name in ("GuestMemory", "Window", "RingWriter", "RingReader", "Dispatcher"):
        with pytest.raises(TypeError, match="pickle"):
            pickle.dumps(objects[name])
        with pytest.raises(TypeError, match="pickle"):
            copy.copy(objects[name])


def test_a_closed_machine_says_so() -> None:
    disk, lan = MemoryDisk(4096), vmbus.Switch()
    machine = ModelMachine()
    old, nic = machine.add_emulated_disk(disk), machine.add_emulated_network(lan.connect("c"), MAC)
    machine.close()
    machine.close()
    assert repr(machine) == "<ModelMachine of 'linux', closed>"
    for use in (
        lambda: machine.add_disk(disk),
        lambda: machine.add_emulated_disk(disk),
        lambda: machine.add_network(lan.connect("a"), MAC),
        lambda: machine.add_emulated_network(lan.connect("b"), MAC),
        lambda: machine.host,
        lambda: machine.guest,
        lambda: old.read(0, 512),
        lambda: nic.send(bytes(60)),
    ):
        with pytest.raises(LocalProtocolError, match="the machine is closed"):
            use()


def test_a_personality_by_name() -> None:
    with ModelMachine(personality="dos") as machine:
        assert machine.child.personality is vmbus.PERSONALITIES["dos"]
    with pytest.raises(LocalProtocolError, match="'beos': one of server-2008, vista"):
        ModelMachine(personality="beos")


def test_a_path_is_no_disk() -> None:
    with pytest.raises(TypeError, match="open images with open_disk"):
        vmbus.StorageVsp({(0, 0): "root.img"})  # type: ignore[dict-item]


def test_a_format_that_does_not_exist(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(512))
    with pytest.raises(DeviceError, match=r"image: 'qcow2' is no format; say 'raw', 'vhd' or 'vhdx'"):
        open_disk(image, format="qcow2")  # type: ignore[arg-type]


def test_a_closed_disk_says_so() -> None:
    with MemoryDisk(4096) as disk:
        pass
    with pytest.raises(DeviceError, match="the disk is closed"):
        disk.read(0, 512)


def test_a_memory_disk_that_there_is_no_room_for_closes_its_descriptor_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[int] = []
    closed: list[int] = []
    create, close = os.memfd_create, os.close

    def memfd(*arguments: Any) -> int:
        made.append(create(*arguments))
        closed.clear()  # what garbage of other tests closed before may have had the same number
        return made[-1]

    monkeypatch.setattr(os, "memfd_create", memfd)
    monkeypatch.setattr(os, "close", lambda fd: (closed.append(fd), close(fd)))
    with pytest.raises(DeviceError, match="no memory disk of"):
        MemoryDisk(1 << 62)
    assert closed.count(made[0]) == 1


def test_nothing_is_said_at_exit_about_what_was_left_open(tmp_path: Path) -> None:
    """A script that ends in the middle: no tracebacks from destructors, no crash."""
    script = """
import vmbus
machine = vmbus.ModelMachine()
disk = vmbus.MemoryDisk(1 << 20)
seen = machine.add_disk(disk)
seen.write(0, bytes(512))
window = vmbus.Window.allocate(4)
writer, reader = vmbus.RingWriter(window), vmbus.RingReader(window)
writer.send(b"x" * 8)
packets = reader.packets()
view = next(packets)
bell, dispatcher, raw = vmbus.Doorbell(), vmbus.Dispatcher(4), vmbus.RawDisk.create("raw.img", 512)
nic = machine.add_network(vmbus.Switch().connect("a"), bytes.fromhex("020000000001"))
image = vmbus.create_vhdx("image.vhdx", 1 << 20)
image.write(0, bytes(512))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_fork_shares_rings_and_guest_memory(objects: dict[str, object]) -> None:
    """As documented for memfds: what the child process writes there, the parent reads."""
    memory = objects["GuestMemory"]
    writer, reader = objects["RingWriter"], objects["RingReader"]
    assert isinstance(memory, GuestMemory)
    assert isinstance(writer, RingWriter)
    assert isinstance(reader, RingReader)
    child = os.fork()
    if child == 0:
        memory.write(0, b"from the child")
        writer.send(b"a packet")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert memory.read(0, 14) == b"from the child"
    assert reader.recv() == b"a packet"

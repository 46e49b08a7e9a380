"""The shipped machine code is what its source assembles to."""

import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

from vmbus.core import x86
from vmbus.core.memory import GuestMemory
from vmbus.emulated import guest
from vmbus.emulated.guest import ata_pio, tulip_io
from vmbus.wire import Structure


class Assembled(NamedTuple):
    code: bytes
    text: dict[str, int]
    absolute: dict[str, int]


def assemble(source: str, folder: Path) -> Assembled:
    if shutil.which("as") is None or shutil.which("objcopy") is None:
        pytest.skip("needs GNU as and objcopy (binutils)")
    at = Path(guest.__file__).with_name(f"{source}.S")
    subprocess.run(["as", "--64", "-o", folder / "code.o", at], check=True)
    subprocess.run(
        ["objcopy", "-O", "binary", "-j", ".text", folder / "code.o", folder / "code.bin"], check=True
    )
    table = subprocess.run(["nm", folder / "code.o"], check=True, capture_output=True, text=True).stdout
    symbols = [line.split() for line in table.splitlines()]
    text = {name: int(value, 16) for value, kind, name in symbols if kind in "tT"}
    absolute = {name: int(value, 16) for value, kind, name in symbols if kind in "aA"}
    return Assembled((folder / "code.bin").read_bytes(), text, absolute)


@pytest.mark.parametrize("module", [ata_pio, tulip_io], ids=lambda module: module.__name__.rpartition(".")[2])
def test_the_shipped_bytes_are_the_assembled_source(module: ModuleType, tmp_path: Path) -> None:
    made = assemble(module.__name__.rpartition(".")[2], tmp_path)
    assert made.code == module.CODE
    for name in module.__all__:
        if name != "CODE":
            assert made.text[name.lower()] == getattr(module, name)


@pytest.mark.parametrize(
    ("source", "structure", "size", "names"),
    [
        (
            "ata_pio",
            guest.Request,
            "REQUEST",
            ["buffer", "lba", "sectors", "operation", "flags", "block", "result"],
        ),
        (
            "tulip_io",
            guest.Nic,
            "",
            [
                "registers",
                "ports",
                "entries",
                "tx_ring",
                "rx_ring",
                "tx_head",
                "rx_head",
                "status",
                "interrupts",
                "result",
                "dropped",
            ],
        ),
        ("tulip_io", guest.FrameBuffer, "FRAME", ["buffer", "length"]),
    ],
)
def test_sources_and_host_agree_on_structures(
    source: str, structure: type[Structure], size: str, names: list[str], tmp_path: Path
) -> None:
    absolute = assemble(source, tmp_path).absolute
    for name in names:
        assert absolute[name.upper()] == structure.OFFSETS[name]
    if size:
        assert absolute[size] == structure.SIZE


def test_the_source_and_the_host_agree_on_the_requests(tmp_path: Path) -> None:
    absolute = assemble("ata_pio", tmp_path).absolute
    for operation in guest.Operation:
        assert absolute[operation.name] == operation
    for flag in guest.Flag:
        assert absolute[str(flag.name)] == flag
    for name in ("TIMEOUT", "FAILED", "BAD_REQUEST"):
        assert absolute[name] == getattr(guest, name)


def test_an_unknown_operation_is_refused_by_the_driver() -> None:
    memory = GuestMemory(1 << 16)
    memory.write(0x1000, ata_pio.CODE)
    request = guest.Request(buffer=0, lba=0, sectors=1, operation=99, flags=0, block=1, result=0, reserved=0)
    memory.write(0x4000, request.pack() * 2)
    cpu = x86.Cpu(memory)
    cpu.rip = 0x1000 + ata_pio.START
    for register, value in ((7, 0x4000), (6, 2), (4, 0x3000)):
        cpu.set_register(register, value)
    assert cpu.run() == x86.HALT
    for at in (0x4000, 0x4000 + guest.Request.SIZE):
        assert guest.Request.unpack(memory.read(at, guest.Request.SIZE)).result == guest.BAD_REQUEST


def test_the_interrupt_table_has_a_gate_for_every_external_vector() -> None:
    table = guest.interrupt_table(0x12345000, 0x10, {0x40: 0x20})
    assert len(table) == 4096
    assert not any(table[: 32 * 16])
    gates = [table[16 * n : 16 * n + 16] for n in range(32, 256)]
    targets = [int.from_bytes(gate[:2] + gate[6:12], "little") for gate in gates]
    assert targets == [0x12345020 if n == 0x40 else 0x12345010 for n in range(32, 256)]
    assert all(gate[5] == 0x8E for gate in gates)

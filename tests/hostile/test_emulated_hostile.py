"""Guest code that is mostly I/O instructions, with random values, against all emulated devices at once."""

import random
from contextlib import suppress

import pytest
from reference.seeds import chosen_seed

from vmbus.emulated.ide import PRIMARY_PORT
from vmbus.emulated.ports import attach_ide, attach_pci, attach_tulip, attach_uart
from vmbus.engine import Halt, Limit
from vmbus.engine.x86 import X86Engine
from vmbus.errors import EngineError
from vmbus.hypervisor import Hypervisor
from vmbus.storage.disk import MemoryDisk

RAM = 1 << 20
CODE, DATA, STACK = 0x1000, 0x8000, 0x7000
SECTORS = 200
PORTS = [
    *range(PRIMARY_PORT, PRIMARY_PORT + 8),
    0x3F6,
    *range(0x3F8, 0x400),
    0xCF8,
    0xCFC,
    0xC000,
    0xC008,
    0xC020,
]
COMMANDS = [0x20, 0x24, 0x29, 0x30, 0x34, 0x39, 0xC4, 0xC5, 0xC6, 0xEC, 0xEF, 0x90, 0x91, 0xE7, 0x40, 0xF8]


def program(rng: random.Random) -> bytes:
    """Some hundred accesses, each with its own port, value and pointers, then HLT."""
    code = bytearray()
    for _ in range(rng.randrange(50, 300)):
        port = rng.choice(PORTS)
        value = rng.choice(
            (
                rng.getrandbits(32),
                rng.randrange(16),
                rng.choice(COMMANDS),
                0x80000000 | rng.randrange(64) * 4 | 10 << 11,
            )
        )
        if rng.random() < 0.3:
            port, value = PRIMARY_PORT + 7, rng.choice(COMMANDS)
        code += (
            b"\xba" + port.to_bytes(4, "little") + b"\xb8" + value.to_bytes(4, "little")
        )  # mov edx; mov eax
        code += b"\xb9" + rng.choice((0, 1, 256, 2000)).to_bytes(4, "little")  # mov ecx
        pointer = rng.choice((DATA, DATA, RAM - 100, RAM + 100, CODE)) if rng.random() < 0.3 else DATA
        code += (
            b"\xbe" + pointer.to_bytes(4, "little") + b"\xbf" + pointer.to_bytes(4, "little")
        )  # mov esi; mov edi
        prefix = rng.choice((b"", b"\x66"))
        code += prefix + rng.choice(
            (b"\xec", b"\xed", b"\xee", b"\xef", b"\xee", b"\xef", b"\xf3\x6c", b"\xf3\x6d")
        )
        if rng.random() < 0.3:
            code += rng.choice((b"\xf3\x66\x6d", b"\xf3\x66\x6f", b"\xf3\x6e", b"\x6d", b"\x6f"))
    return bytes(code) + b"\xf4"


@pytest.mark.parametrize("bits", [64, 32])
def test_random_device_accesses_harm_nobody(bits: int) -> None:
    seed = chosen_seed()
    print(f"seed {seed}")  # shown on failure
    rng = random.Random(seed)
    for _ in range(3):
        hv = Hypervisor()
        hv.create_root(name="root")
        child = hv.create_child(hv.root, "c0", memory_size=RAM)
        disk = MemoryDisk(SECTORS * 512)
        attach_ide(child, disk)
        output: list[bytes] = []
        uart = attach_uart(child, output.append)
        sent: list[bytes] = []
        tulip, function = attach_tulip(child, attach_pci(child), b"\x00\x15\x5d\x00\x00\x01", sent.append)
        function.config_write(0x10, 4, 0xC000)
        function.config_write(0x04, 2, 7)
        child.memory.write(0, rng.randbytes(0x1000))
        child.memory.write(DATA, rng.randbytes(0x4000))
        for _ in range(4):
            engine = X86Engine(child.vps[0], bits=bits, string_elements=rng.choice((1, 100, 1024)))
            child.memory.write(CODE, program(rng))
            engine.cpu.rip = CODE
            engine.cpu.set_register(4, STACK)
            uart.receive(rng.randbytes(rng.randrange(40)))
            tulip.receive(rng.randbytes(rng.randrange(14, 1518)))
            with suppress(EngineError):  # the guest's own fault: its data overwrote its code
                assert isinstance(engine.execute(20_000), Halt | Limit)
        assert disk.sector_count == SECTORS
        assert len(disk.read(0, SECTORS * 512)) == SECTORS * 512
        assert all(14 <= len(frame) <= 1518 for frame in sent)
        assert child.account.exits["io_port"] > 100

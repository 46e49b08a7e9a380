"""How machine code leaves the interpreter, and how it goes on."""

import threading
import time

import pytest

from vmbus.core import x86
from vmbus.core.memory import READ, GuestMemory
from vmbus.errors import EngineError, LocalProtocolError

RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
RAM = 0x10000
CODE = 0x1000
STACK = 0x8000
DATA = 0x4000
OUTSIDE = 0x100000
INT_GATE, TRAP_GATE = 0x8E, 0x8F


def machine(code: str, bits: int = 64, **options: int) -> x86.Cpu:
    memory = GuestMemory(RAM)
    memory.write(CODE, bytes.fromhex(code))
    cpu = x86.Cpu(memory, bits=bits, **options)
    cpu.rip = CODE
    cpu.set_register(RSP, STACK)
    return cpu


def gate(cpu: x86.Cpu, vector: int, handler: int, kind: int = INT_GATE) -> None:
    """Put a handler into the IDT at 0x2000."""
    low = (handler & 0xFFFF) | 0x10 << 16 | kind << 40 | (handler >> 16 & 0xFFFF) << 48
    size = 16 if cpu.bits == 64 else 8
    cpu.memory.write(0x2000 + vector * size, low.to_bytes(8, "little") + bytes(size - 8))
    cpu.idt = (0x2000, 256 * size - 1)


@pytest.mark.parametrize(
    ("code", "port", "size", "write", "value"),
    [
        ("e4 71", 0x71, 1, False, 0),
        ("66 e5 71", 0x71, 2, False, 0),
        ("ed", 0x1F0, 4, False, 0),
        ("e6 71", 0x71, 1, True, 0x88),
        ("66 ef", 0x1F0, 2, True, 0x7788),
        ("48 ef", 0x1F0, 4, True, 0x55667788),
    ],
)
def test_port_instructions(code: str, port: int, size: int, write: bool, value: int) -> None:
    cpu = machine(code)
    cpu.set_register(RAX, 0x1122334455667788)
    cpu.set_register(RDX, 0x1F0)
    assert cpu.run() == x86.IO
    assert (cpu.port, cpu.size, cpu.write, cpu.value, cpu.count) == (port, size, write, value, 1)
    assert (cpu.instructions, cpu.rip) == (0, CODE)
    with pytest.raises(LocalProtocolError):
        cpu.run()
    cpu.complete(0xAABBCCDDEE)
    assert (cpu.instructions, cpu.rip) == (1, CODE + len(bytes.fromhex(code)))
    kept = {1: 0x11223344556677EE, 2: 0x112233445566DDEE, 4: 0xBBCCDDEE}
    assert cpu.register(RAX) == (0x1122334455667788 if write else kept[size])


def test_rep_insw_is_one_exit_for_all_elements() -> None:
    cpu = machine("f3 66 6d f4")
    cpu.set_register(RCX, 256)
    cpu.set_register(RDI, DATA)
    cpu.set_register(RDX, 0x1F0)
    assert cpu.run() == x86.IO
    assert (cpu.port, cpu.size, cpu.count, cpu.string, cpu.write) == (0x1F0, 2, 256, True, False)
    with pytest.raises(LocalProtocolError):
        cpu.complete_string(b"short")
    data = bytes(range(256)) * 2
    cpu.complete_string(data)
    assert cpu.memory.read(DATA, 512) == data
    assert (cpu.register(RCX), cpu.register(RDI), cpu.instructions) == (0, DATA + 512, 1)
    assert cpu.run() == x86.HALT
    assert cpu.instructions == 2


def test_rep_outs_gives_its_data_and_respects_the_direction() -> None:
    cpu = machine("fd f3 6f f4")
    cpu.memory.write(DATA, bytes(range(16)))
    cpu.set_register(RCX, 3)
    cpu.set_register(RSI, DATA + 8)
    assert cpu.run() == x86.IO
    assert cpu.string_data() == bytes([8, 9, 10, 11, 4, 5, 6, 7, 0, 1, 2, 3])
    cpu.complete()
    assert (cpu.register(RCX), cpu.register(RSI)) == (0, DATA - 4)
    assert cpu.run() == x86.HALT
    assert cpu.instructions == 3


@pytest.mark.parametrize(("most", "exits"), [(1, 10), (4, 3), (1024, 1)])
def test_string_elements_bounds_an_exit(most: int, exits: int) -> None:
    cpu = machine("f3 6c f4", string_elements=most)
    cpu.set_register(RCX, 10)
    cpu.set_register(RDI, DATA)
    seen = 0
    while cpu.run() == x86.IO:
        cpu.complete_string(bytes([seen]) * cpu.count)
        seen += 1
    assert seen == exits
    assert cpu.instructions == 2
    assert cpu.register(RDI) == DATA + 10


def test_rep_with_a_count_of_zero_does_nothing() -> None:
    cpu = machine("f3 66 6d f4")
    assert cpu.run() == x86.HALT
    assert cpu.instructions == 2


def test_string_io_stops_where_ram_ends_and_goes_on_as_mmio() -> None:
    cpu = machine("f3 6d f4")  # rep insd
    cpu.set_register(RCX, 3)
    cpu.set_register(RDI, RAM - 4)
    assert cpu.run() == x86.IO
    assert (cpu.count, cpu.string) == (1, True)
    cpu.complete_string(b"abcd")
    for element in range(2):
        assert cpu.run() == x86.IO
        assert (cpu.count, cpu.string) == (1, False)
        cpu.complete(0x11111111 * (element + 1))
        assert cpu.run() == x86.MMIO
        assert (cpu.address, cpu.size, cpu.write) == (RAM + 4 * element, 4, True)
        assert cpu.value == 0x11111111 * (element + 1)
        cpu.complete()
    assert cpu.run() == x86.HALT
    assert cpu.instructions == 2


def test_load_and_store_outside_of_ram() -> None:
    cpu = machine("8b 03 89 43 04 f4")
    cpu.set_register(RBX, OUTSIDE)
    assert cpu.run() == x86.MMIO
    assert (cpu.address, cpu.size, cpu.write) == (OUTSIDE, 4, False)
    cpu.complete(0xCAFE0001)
    assert cpu.run() == x86.MMIO
    assert cpu.register(RAX) == 0xCAFE0001
    assert (cpu.address, cpu.size, cpu.write, cpu.value) == (OUTSIDE + 4, 4, True, 0xCAFE0001)
    cpu.complete()
    assert cpu.run() == x86.HALT
    assert cpu.instructions == 3


def test_read_modify_write_of_a_device_is_one_read_and_one_write() -> None:
    cpu = machine("f9 83 13 05 f4")  # stc; adc dword [rbx], 5
    cpu.set_register(RBX, OUTSIDE)
    assert cpu.run() == x86.MMIO
    assert not cpu.write
    cpu.complete(10)
    assert cpu.run() == x86.MMIO
    assert (cpu.write, cpu.value) == (True, 16)
    cpu.complete()
    assert cpu.run() == x86.HALT
    assert cpu.rflags & 1 == 0
    assert cpu.instructions == 3


def test_movs_from_device_to_device() -> None:
    cpu = machine("f3 48 a5 f4")
    cpu.set_register(RSI, OUTSIDE)
    cpu.set_register(RDI, OUTSIDE + 0x1000)
    cpu.set_register(RCX, 2)
    seen = []
    while cpu.run() == x86.MMIO:
        seen.append((cpu.address - OUTSIDE, cpu.write, cpu.value))
        cpu.complete(0 if cpu.write else 100 + len(seen))
    assert seen == [(0, False, 0), (0x1000, True, 101), (8, False, 0), (0x1008, True, 103)]


def test_an_access_across_the_end_of_ram_is_split() -> None:
    cpu = machine("48 8b 03 48 89 03 f4")
    cpu.memory.write(RAM - 3, b"\x01\x02\x03")
    cpu.set_register(RBX, RAM - 3)
    pieces = []
    while cpu.run() == x86.MMIO:
        pieces.append((cpu.address - RAM, cpu.size, cpu.write, cpu.value))
        cpu.complete({0: 0x07060504, 4: 0x08}[cpu.address - RAM])
    assert pieces == [(0, 4, False, 0), (4, 1, False, 0), (0, 4, True, 0x07060504), (4, 1, True, 0x08)]
    assert cpu.register(RAX) == 0x0807060504030201


def test_page_rights_make_exits() -> None:
    cpu = machine("89 03 f4")
    cpu.set_register(RBX, DATA)
    cpu.memory.protect(DATA, 0x1000, READ)
    assert cpu.run() == x86.MMIO
    assert (cpu.address, cpu.write) == (DATA, True)
    cpu.complete()
    cpu.memory.protect(CODE, 0x1000, READ)
    with pytest.raises(EngineError, match="outside of executable memory"):
        cpu.run()


def test_msr_cpuid_and_hypercall_exits() -> None:
    cpu = machine("0f 32 0f 30 0f a2 0f 01 c1 0f 01 d9 f4")
    cpu.set_register(RCX, 0x40000000)
    assert cpu.run() == x86.RDMSR
    cpu.complete(0x1122334455667788)
    assert (cpu.register(RAX), cpu.register(RDX)) == (0x55667788, 0x11223344)
    assert cpu.run() == x86.WRMSR
    cpu.complete()
    assert cpu.run() == x86.CPUID
    with pytest.raises(LocalProtocolError):
        cpu.complete(1)
    cpu.complete_cpuid(1, 2, 3, 4)
    assert [cpu.register(n) for n in (RAX, RBX, RCX, RDX)] == [1, 2, 3, 4]
    assert cpu.run() == x86.HYPERCALL
    cpu.complete(0x1_0000_0002)
    assert cpu.register(RAX) == 0x1_0000_0002
    assert cpu.run() == x86.HYPERCALL
    cpu.complete()
    assert cpu.run() == x86.HALT
    assert cpu.instructions == 6


def test_an_exit_ends_with_a_fault_of_the_guest() -> None:
    cpu = machine("0f 32 f4")
    gate(cpu, 13, 0x3000)
    cpu.memory.write(0x3000, bytes.fromhex("58 f4"))  # pop the error code
    assert cpu.run() == x86.RDMSR
    cpu.fault(13, 0)
    assert cpu.run() == x86.HALT
    assert cpu.instructions == 2
    frame = cpu.memory.view(STACK - 40, 40).cast("Q").tolist()
    assert frame[0] == CODE
    assert frame[3] == STACK


@pytest.mark.parametrize("bits", [64, 32])
def test_interrupts_wait_for_sti_and_its_shadow_and_return(bits: int) -> None:
    cpu = machine("90 fb 90 90 f4", bits)
    gate(cpu, 0x30, 0x3000)
    cpu.memory.write(0x3000, bytes.fromhex("40 cf" if bits == 32 else "ff c0 48 cf"))
    cpu.set_register(RAX, 0)
    assert not cpu.inject(0x30)
    cpu.window = True
    assert cpu.run() == x86.WINDOW
    assert cpu.rip == CODE + 3  # one instruction behind STI
    assert cpu.inject(0x30)
    assert not cpu.interruptible  # an interrupt gate
    cpu.window = False
    assert cpu.run() == x86.HALT
    assert cpu.register(RAX) == 1
    assert cpu.register(RSP) == STACK
    assert cpu.rflags & 0x200
    assert cpu.instructions == 7


@pytest.mark.parametrize("bits", [64, 32])
def test_software_interrupts_and_divide_errors_use_the_idt(bits: int) -> None:
    cpu = machine("cd 80 f7 f1 f4", bits)
    gate(cpu, 0x80, 0x3000, TRAP_GATE)
    gate(cpu, 0, 0x3100)
    cpu.memory.write(0x3000, bytes.fromhex("cf" if bits == 32 else "48 cf"))
    cpu.memory.write(0x3100, bytes.fromhex("41 cf" if bits == 32 else "ff c1 48 cf"))  # fix the divisor
    cpu.set_register(RAX, 7)
    assert cpu.run() == x86.HALT
    assert (cpu.register(RAX), cpu.register(RDX)) == (7, 0)
    assert cpu.instructions == 2 + 2 + 1 + 1


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("0f ff 12", "unknown or unsupported instruction at 0x1000: 0f ff 12"),
        ("d9 c0", "unknown or unsupported instruction at 0x1000: d9 c0"),
        ("0f 20 c0", "unknown or unsupported instruction"),
        ("0f 0b", "#UD at 0x1000, and the guest has no gate for it: 0f 0b"),
        ("f0 01 c0", "#UD at 0x1000"),
        ("31 c9 f7 f1", "#DE at 0x1002"),
    ],
)
def test_what_cannot_be_executed_is_said_with_bytes_and_address(code: str, said: str) -> None:
    cpu = machine(code)
    with pytest.raises(EngineError) as caught:
        cpu.run(10)
    assert said in str(caught.value)


def test_code_outside_of_ram_is_an_error() -> None:
    cpu = machine("90")
    cpu.memory.write(RAM - 2, bytes.fromhex("48 b8"))  # the immediate is missing
    cpu.rip = RAM - 2
    with pytest.raises(EngineError, match="after 2 bytes: 48 b8"):
        cpu.run()
    cpu.rip = OUTSIDE
    with pytest.raises(EngineError, match="at 0x100000 is outside"):
        cpu.run()


def test_the_limit_is_exact_and_stops_endless_loops() -> None:
    cpu = machine("eb fe")
    assert cpu.run(12345) == x86.LIMIT
    assert cpu.instructions == 12345
    cpu = machine("f3 aa f4")
    cpu.set_register(RCX, 1000)
    cpu.set_register(RDI, DATA)
    assert cpu.run(300) == x86.LIMIT
    assert (cpu.register(RCX), cpu.register(RDI), cpu.instructions) == (700, DATA + 300, 0)
    assert cpu.run() == x86.HALT
    assert cpu.instructions == 2


def test_code_that_changes_is_decoded_again() -> None:
    cpu = machine("b0 01 c6 05 f8 ff ff ff 02 eb f5")  # mov al,1; mov byte [rip-8],2 (the operand); jmp start
    assert cpu.run(4) == x86.LIMIT
    assert cpu.register(RAX) == 2
    cpu.memory.write(CODE, b"\xb0\x55")  # and from outside
    cpu.rip = CODE
    cpu.run(1)
    assert cpu.register(RAX) == 0x55


def test_memory_stays_while_a_processor_uses_it() -> None:
    cpu = machine("90 f4")
    with pytest.raises(BufferError):
        cpu.memory.close()
    assert cpu.run() == x86.HALT


def test_a_processor_runs_in_one_thread_at_a_time() -> None:
    cpu = machine("80 3c 25 00 40 00 00 00 74 f6 f4")  # until the byte at 0x4000 is not 0
    worker = threading.Thread(target=cpu.run)
    worker.start()
    while not cpu.instructions:
        time.sleep(0.001)
    with pytest.raises(LocalProtocolError):
        cpu.run()
    cpu.memory.write(0x4000, b"\1")
    worker.join(30)
    assert not worker.is_alive()
    assert cpu.run(0) == x86.LIMIT

"""Random bytes as guest code: whatever they are, the interpreter returns, and the guest's memory is all it touches."""

import random
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.seeds import chosen_seed

from vmbus.core import x86
from vmbus.core.memory import READ, GuestMemory
from vmbus.errors import EngineError, GuestMemoryError

RAM = 0x8000
STEPS = 3000


def answer(cpu: x86.Cpu, reason: int, rng: random.Random) -> None:
    """Complete any exit, sometimes with a fault."""
    if reason == x86.CPUID:
        cpu.complete_cpuid(*(rng.getrandbits(32) for _ in range(4)))
    elif reason == x86.IO and cpu.string and not cpu.write:
        cpu.complete_string(rng.randbytes(cpu.size * cpu.count))
    else:
        if reason == x86.IO and cpu.string:
            assert len(cpu.string_data()) == cpu.size * cpu.count
        cpu.complete(rng.getrandbits(64))


def execute(cpu: x86.Cpu, rng: random.Random, rounds: int) -> None:
    for _ in range(rounds):
        before = cpu.instructions
        try:
            reason = cpu.run(STEPS)
        except EngineError:
            return
        assert cpu.instructions - before <= STEPS
        if reason == x86.HALT:
            with suppress(EngineError):  # no gate
                cpu.inject(rng.randrange(256))
        elif reason not in (x86.LIMIT, x86.WINDOW):
            answer(cpu, reason, rng)


@pytest.mark.parametrize("bits", [64, 32])
def test_random_bytes_never_crash_or_hang(bits: int) -> None:
    seed = chosen_seed()
    print(f"seed {seed}")  # shown on failure
    rng = random.Random(seed)
    for _ in range(1500):
        memory = GuestMemory(RAM)
        memory.write(0, rng.randbytes(RAM))
        cpu = x86.Cpu(memory, bits=bits, string_elements=rng.choice((1, 7, 1024)))
        for number in range(bits // 8 if bits == 64 else 8):
            cpu.set_register(number, rng.getrandbits(rng.choice((8, 15, 16, 32, 64))) & (1 << bits) - 1)
        cpu.fs_base = rng.getrandbits(64)
        cpu.idt = (rng.randrange(RAM), rng.choice((0, 0xFFF)))
        cpu.window = rng.random() < 0.2
        cpu.rip = rng.randrange(RAM)
        execute(cpu, rng, 20)


@settings(max_examples=300, deadline=None)
@given(
    code=st.binary(min_size=1, max_size=16), at=st.sampled_from([0x1000, 0x1FF8, 0x1FFF, RAM - 16, RAM - 1])
)
def test_any_instruction_at_any_edge_is_executed_or_refused(code: bytes, at: int) -> None:
    for bits in (32, 64):
        memory = GuestMemory(RAM)
        code = code[: RAM - at]
        memory.write(at, code)
        memory.write(0x3000, b"\xaa" * 16)
        cpu = x86.Cpu(memory, bits=bits)
        cpu.rip = at
        for number in range(8):
            cpu.set_register(number, RAM - 2 if number != 4 else 0x4000)
        execute(cpu, random.Random(1), 3)


def test_memory_that_shrinks_under_a_pending_exit_is_an_error_not_a_fault() -> None:
    memory = GuestMemory(RAM)
    memory.write(0x1000, bytes.fromhex("f3 66 6d f4"))
    cpu = x86.Cpu(memory)
    cpu.rip = 0x1000
    cpu.set_register(1, 100)
    cpu.set_register(7, 0x2000)
    assert cpu.run() == x86.IO
    memory.protect(0x2000, 0x1000, READ)
    with pytest.raises(GuestMemoryError):
        cpu.complete_string(bytes(200))

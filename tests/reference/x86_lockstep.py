"""Executes the same instructions in `vmbus.core.x86` and in Unicorn (QEMU's TCG) and compares all state after each."""

import random
from typing import Any

import unicorn
from reference.x86_programs import ARITHMETIC, CODE, DF, MEMORY, Instruction, Programs, interesting
from unicorn import x86_const

from vmbus.core import x86
from vmbus.core.memory import GuestMemory
from vmbus.errors import EngineError

NAMES = {
    64: ["RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", *(f"R{n}" for n in range(8, 16))],
    32: ["EAX", "ECX", "EDX", "EBX", "ESP", "EBP", "ESI", "EDI"],
}


class Lockstep:
    """Two processors in the same state.

    Attributes:
        executed: instructions that both executed.
        refused: instructions that both could not finish (a fault, or an access outside of RAM).
    """

    def __init__(self, rng: random.Random, bits: int) -> None:
        self.rng = rng
        self.bits = bits
        self.names = NAMES[bits]
        self.ids = [getattr(x86_const, f"UC_X86_REG_{name}") for name in self.names]
        self.ip = x86_const.UC_X86_REG_RIP if bits == 64 else x86_const.UC_X86_REG_EIP
        self.memory = GuestMemory(MEMORY)
        self.memory.write(0, rng.randbytes(MEMORY))
        self.executed = 0
        self.refused = 0
        self._start([interesting(rng, bits) for _ in self.names], 2)

    def _start(self, registers: list[int], flags: int) -> None:
        """Make both processors anew: neither goes on after a fault that nobody handles."""
        mode = unicorn.UC_MODE_64 if self.bits == 64 else unicorn.UC_MODE_32
        self.theirs: Any = unicorn.Uc(unicorn.UC_ARCH_X86, mode)
        self.theirs.mem_map(0, MEMORY)
        self.theirs.mem_write(0, self.memory.read(0, MEMORY))
        self.ours = x86.Cpu(self.memory, bits=self.bits)
        for number, value in enumerate(registers):
            self.set_register(number, value)
        self.set_flags(flags)

    def set_register(self, number: int, value: int) -> None:
        value &= (1 << self.bits) - 1
        self.ours.set_register(number, value)
        self.theirs.reg_write(self.ids[number], value)

    def set_flags(self, flags: int) -> None:
        self.ours.rflags = flags
        self.theirs.reg_write(x86_const.UC_X86_REG_EFLAGS, flags)

    def step(self, instruction: Instruction) -> None:
        """Execute one instruction in both.

        Raises:
            AssertionError: they differ in a register, a defined flag, memory, or whether it can be executed.
        """
        at = CODE + self.rng.randrange(0x800)
        for number, value in instruction.registers.items():
            self.set_register(number, value)
        if self.rng.random() < 0.1:
            self.set_flags(self.rng.getrandbits(12) & (ARITHMETIC | DF) | 2)
        before = [self.ours.register(n) for n in range(len(self.names))]
        flags = self.ours.rflags
        self.memory.write(at, instruction.code)
        self.theirs.mem_write(at, instruction.code)
        said = f"{instruction.code.hex(' ')} at {at:#x} with " + " ".join(
            f"{name}={value:#x}" for name, value in zip(self.names, before, strict=True)
        )
        ours, theirs = self._run_ours(at), self._run_theirs(at, instruction)
        if instruction.flows and theirs and "FETCH" in theirs and self.ours.rip > MEMORY - 16:
            ours = "went to where there is no code"
        assert bool(ours) == bool(theirs), f"ours: {ours or 'done'}, theirs: {theirs or 'done'}: {said}"
        if ours:
            self.refused += 1
            self.memory.write(0, bytes(self.theirs.mem_read(0, MEMORY)))
            self._start(before, flags)
            return
        self.executed += 1
        self._compare(instruction, f"{said} flags={flags:#x}")

    def _run_ours(self, at: int) -> str:
        self.ours.rip = at
        before = self.ours.instructions
        try:
            while self.ours.instructions == before:  # a repeated instruction takes several steps
                if self.ours.run(1) == x86.MMIO:
                    return "access outside of RAM"
        except EngineError as error:
            return str(error)
        return ""

    def _run_theirs(self, at: int, instruction: Instruction) -> str:
        # translations remember where an earlier run was to stop
        self.theirs.ctl_remove_cache(0, MEMORY)
        try:
            if instruction.flows:
                # `count` alone is not exact for branches: stop as well where ours went
                self.theirs.emu_start(at, self.ours.rip if self.ours.rip != at else 0, count=1)
            else:
                self.theirs.emu_start(at, at + len(instruction.code))
        except unicorn.UcError as error:
            return f"{error} UC_ERR_FETCH" if error.errno == unicorn.UC_ERR_FETCH_UNMAPPED else str(error)
        return ""

    def _compare(self, instruction: Instruction, said: str) -> None:
        for number, name in enumerate(self.names):
            ours, theirs = self.ours.register(number), self.theirs.reg_read(self.ids[number])
            assert ours == theirs, f"{name} {ours:#x}, should be {theirs:#x}: {said}"
        ours, theirs = self.ours.rflags, self.theirs.reg_read(x86_const.UC_X86_REG_EFLAGS)
        differ = (ours ^ theirs) & (ARITHMETIC | DF) & ~instruction.undefined
        assert not differ, f"flags {ours:#x}, should be {theirs:#x}, wrong are {differ:#x}: {said}"
        assert self.ours.rip == self.theirs.reg_read(self.ip), f"RIP {self.ours.rip:#x}: {said}"
        ours_memory, theirs_memory = self.memory.read(0, MEMORY), bytes(self.theirs.mem_read(0, MEMORY))
        if ours_memory != theirs_memory:
            at = next(n for n in range(MEMORY) if ours_memory[n] != theirs_memory[n])
            shown = ours_memory[at : at + 16].hex(), theirs_memory[at : at + 16].hex()
            raise AssertionError(f"memory at {at:#x} {shown[0]}, should be {shown[1]}: {said}")
        self.set_flags(ours)  # where a flag is undefined both may be right: go on with one


def run(seed: int, bits: int, count: int) -> Lockstep:
    """Execute `count` random instructions from `seed`."""
    rng = random.Random(seed)
    pair = Lockstep(rng, bits)
    programs = Programs(rng, bits)
    for _ in range(count):
        pair.step(programs.draw())
    return pair

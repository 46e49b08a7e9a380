"""Executes the same instructions in `vmbus.core.x86` and on the host's own processor, and compares all state.

The host executes them in a process of its own at the guest's addresses (`SOURCE`), so that an instruction that
faults ends in a signal handler there.
"""

import mmap
import os
import random
import signal
import struct
import subprocess
from pathlib import Path

from reference.x86_programs import ARITHMETIC, CODE, DF, MEMORY, Instruction, Programs, interesting

from vmbus.core import x86
from vmbus.core.memory import GuestMemory
from vmbus.errors import EngineError

ORIGIN = 0x100000
NAMES = ["RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", *(f"R{n}" for n in range(8, 16))]
STATE = struct.Struct("<18Q")
RESULT = struct.Struct("<19Q")
RIP, RFLAGS, SIGNAL = 16, 17, 18
INTERRUPTS_ENABLED = 0x202
INT3 = b"\xcc"
SOURCE = """
/*
 * Maps the file given as descriptor argv[1] at the address argv[2], length argv[3]; the page at argv[4] alone is
 * executable. Reads a state from standard input
 * (16 general registers in encoding order, RIP, RFLAGS: 18 64-bit words), runs until a signal, usually the INT3
 * behind the instruction, and writes the state that the signal found and the signal's number.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

static const int ORDER[18] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI, REG_R8, REG_R9,
                              REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15, REG_RIP, REG_EFL};
static volatile int loading;
static uint64_t state[19];
static gregset_t ours;

static void handler(int number, siginfo_t *info, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    (void)info;
    if (loading) {
        loading = 0;
        memcpy(ours, registers, sizeof ours);
        for (int i = 0; i < 18; i++) registers[ORDER[i]] = state[i];
        return;
    }
    for (int i = 0; i < 18; i++) state[i] = registers[ORDER[i]];
    state[18] = number;
    memcpy(registers, ours, sizeof ours);
}

int main(int argc, char **argv) {
    static char stack[65536];
    stack_t alternate = {.ss_sp = stack, .ss_size = sizeof stack};
    struct sigaction action = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER};
    if (argc != 5) return 2;
    void *at = (void *)strtoul(argv[2], 0, 0);
    if (mmap(at, strtoul(argv[3], 0, 0), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED_NOREPLACE, atoi(argv[1]),
             0) != at ||
        mprotect((void *)strtoul(argv[4], 0, 0), 4096, PROT_READ | PROT_WRITE | PROT_EXEC))
        return 3;
    sigaltstack(&alternate, 0);
    for (int n = 0; n < 5; n++) sigaction((int[]){SIGTRAP, SIGSEGV, SIGBUS, SIGFPE, SIGILL}[n], &action, 0);
    sigaction(SIGUSR1, &action, 0);
    while (read(0, state, 144) == 144) {
        loading = 1;
        alarm(20);          /* an instruction that never ends, ends this process */
        raise(SIGUSR1);
        if (write(1, state, 152) != 152) return 4;
    }
    return 0;
}
"""


class Native:
    """A process on the host's processor, and an interpreter with the same state.

    Attributes:
        executed: instructions that both executed.
        refused: instructions that faulted in both.
    """

    def __init__(self, rng: random.Random, folder: Path) -> None:
        self.rng = rng
        program = folder / "x86_native"
        subprocess.run(["gcc", "-O1", "-x", "c", "-o", program, "-"], input=SOURCE, text=True, check=True)
        fd = os.memfd_create("native")
        os.ftruncate(fd, MEMORY)
        self.theirs = mmap.mmap(fd, MEMORY)
        command = [program, str(fd), hex(ORIGIN), hex(MEMORY), hex(ORIGIN + CODE)]
        # no environment: a sanitizer preloaded there would take the faults that the program is to report
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[fd], env={}
        )
        os.close(fd)
        self.memory = GuestMemory(ORIGIN + MEMORY)
        self.ours = x86.Cpu(self.memory)
        image = rng.randbytes(MEMORY)
        self.theirs[:] = image
        self.memory.write(ORIGIN, image)
        self.registers = [interesting(rng, 64) for _ in NAMES]
        self.flags = INTERRUPTS_ENABLED
        self.executed = self.refused = 0

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()
        self.theirs.close()

    def step(self, instruction: Instruction) -> None:
        """Execute one instruction in both.

        Raises:
            AssertionError: they differ.
        """
        at = ORIGIN + CODE + self.rng.randrange(0x800)
        for number, value in instruction.registers.items():
            self.registers[number] = value & (1 << 64) - 1
        if self.rng.random() < 0.1:
            self.flags = self.rng.getrandbits(12) & (ARITHMETIC | DF) | INTERRUPTS_ENABLED
        before = list(self.registers)
        code = instruction.code + INT3
        # everything that a branch can reach in one step is INT3
        page = INT3 * 0x1000
        for where, data in ((ORIGIN + CODE, page), (at, code)):
            self.theirs[where - ORIGIN : where - ORIGIN + len(data)] = data
            self.memory.write(where, data)
        said = f"{instruction.code.hex(' ')} at {at:#x} flags={self.flags:#x} with " + " ".join(
            f"{name}={value:#x}" for name, value in zip(NAMES, before, strict=True)
        )
        refused = self._run_ours(at)
        if instruction.flows and (
            not 0 <= self.ours.rip - ORIGIN - CODE < len(page)
            or 0 <= self.ours.rip - at < len(instruction.code)
        ):
            self._resynchronise(before)  # to where there is no INT3, or into itself, perhaps for ever
            return
        theirs = self._run_theirs(at)
        gone = theirs[SIGNAL] != signal.SIGTRAP
        assert bool(refused) == gone, f"ours: {refused or 'done'}, signal {theirs[SIGNAL]}: {said}"
        if refused:
            self.refused += 1
            self._resynchronise(before)
            return
        self.executed += 1
        self._compare(instruction, theirs, said)

    def _run_ours(self, at: int) -> str:
        for number, value in enumerate(self.registers):
            self.ours.set_register(number, value)
        self.ours.rflags = self.flags
        self.ours.rip = at
        before = self.ours.instructions
        try:
            while self.ours.instructions == before:
                if self.ours.run(1) == x86.MMIO:
                    return "access outside of RAM"
        except EngineError as error:
            return str(error)
        return ""

    def _run_theirs(self, at: int) -> tuple[int, ...]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(STATE.pack(*self.registers, at, self.flags))
        self.process.stdin.flush()
        return RESULT.unpack(self.process.stdout.read(RESULT.size))

    def _resynchronise(self, registers: list[int]) -> None:
        self.ours = x86.Cpu(self.memory)  # without the exit that nobody completes
        self.memory.write(ORIGIN, self.theirs[:])
        self.registers = registers

    def _compare(self, instruction: Instruction, theirs: tuple[int, ...], said: str) -> None:
        ours = self.ours.registers
        for number, name in enumerate(NAMES):
            assert ours[number] == theirs[number], f"{name} {ours[number]:#x}, is {theirs[number]:#x}: {said}"
        differ = (self.ours.rflags ^ theirs[RFLAGS]) & (ARITHMETIC | DF) & ~instruction.undefined
        assert not differ, f"flags {self.ours.rflags:#x}, are {theirs[RFLAGS]:#x}: {said}"
        assert self.ours.rip == theirs[RIP] - len(INT3), (
            f"RIP {self.ours.rip:#x}, is {theirs[RIP] - 1:#x}: {said}"
        )
        ours_memory, theirs_memory = self.memory.read(ORIGIN, MEMORY), self.theirs[:]
        if ours_memory != theirs_memory:
            at = next(n for n in range(MEMORY) if ours_memory[n] != theirs_memory[n])
            shown = ours_memory[at : at + 16].hex(), theirs_memory[at : at + 16].hex()
            raise AssertionError(f"memory at {ORIGIN + at:#x} {shown[0]}, is {shown[1]}: {said}")
        self.registers = ours
        self.flags = self.ours.rflags & (ARITHMETIC | DF) | INTERRUPTS_ENABLED


def run(seed: int, count: int, folder: Path) -> Native:
    """Execute `count` random instructions from `seed`."""
    rng = random.Random(seed)
    pair = Native(rng, folder)
    programs = Programs(rng, 64, ORIGIN, faithful=True)
    try:
        for _ in range(count):
            pair.step(programs.draw())
    finally:
        pair.close()
    return pair

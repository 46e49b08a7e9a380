"""A guest that executes a list of encodings, one after the other, and notes which exception each ends with.

The guest's kernel copies 16 bytes to a page of its user, enters it with known registers, and gets back by an exception:
that of the encoding, or of the breakpoints that fill the rest of the page. In user mode, encodings cannot harm the
kernel; in kernel mode some do.

Run as a program it does so for all encodings of one mode, for a process of its own: `opcode_sweep.py MODE OUTPUT`.
"""

import itertools
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

from reference.tiny_guest import tiny_guest

from vmbus.machine.guest import Machine

MODES = {"user64": (0x43, 0x4B), "user32": (0x53, 0x4B), "user16": (0x5B, 0x63), "kernel64": (0x10, 0x18)}
"""Code and data selector by mode."""
ENDED = 0xFE
"""In the place of a vector: the machine ended (HLT, triple fault, power-off)."""
NOT_REACHED = 0xFF
BREAKPOINT = 3
CANARY = b"\x90"
GROUP = 32

RECORD = 16
MEMORY = 64 << 20
TABLES, GDT, TSS, USER, CODE = 0x20_0000, 0x21_0000, 0x21_1000, 0x4_0000, 0x4_0800
RECORDS, RESULTS = 0x100_0000, 0x300_0000
NEXT, LAST, SELECTORS, ENTRY = 0x22_0000, 0x22_0008, 0x22_0010, 0x22_0020

KERNEL = f"""
_start:
    movabs ${TABLES}, %rax; mov %rax, %cr3
    lgdt gdt_pointer(%rip)
    mov $0x30, %ax; ltr %ax
    mov $0x18, %ax; mov %ax, %ss
    mov %cr4, %rax; or $0x600, %rax; mov %rax, %cr4         # SSE
    lea first_stub(%rip), %rsi; mov $0xd000, %rdi; mov $256, %ecx
1:  mov %si, (%rdi); movw $0x10, 2(%rdi); movw $0xee01, 4(%rdi)     # DPL 3, IST 1
    mov %rsi, %rax; shr $16, %rax; mov %ax, 6(%rdi); shr $16, %rax; mov %eax, 8(%rdi); movl $0, 12(%rdi)
    add $16, %rdi; add $16, %rsi; dec %ecx; jnz 1b
    load_idt
    jmp next

    .balign 16
first_stub:
    .set vector, 0
    .rept 256
    .balign 16
    push $vector
    jmp ended
    .set vector, vector + 1
    .endr

ended:
    cld; fninit
    pop %rdx
    mov {NEXT}, %rcx
    mov %dl, {RESULTS}(%rcx)
    inc %rcx
    mov %rcx, {NEXT}
next:
    mov {NEXT}, %rcx
    cmp {LAST}, %rcx
    jb 1f
    power_off
1:  shl $4, %rcx
    mov {RECORDS}(%rcx), %rax; mov %rax, {CODE}
    mov {RECORDS} + 8(%rcx), %rax; mov %rax, {CODE} + 8
    movzwl {SELECTORS} + 2, %eax; mov %ax, %ds; mov %ax, %es
    push %rax; push $({USER} + 0x2800); push $2
    movzwl {SELECTORS}, %eax; push %rax
    push {ENTRY}
    mov $({USER} + 0x1100), %eax; mov $({USER} + 0x1200), %ebx; mov $1, %ecx; mov $({USER} + 0x1300), %edx
    mov $({USER} + 0x1400), %esi; mov $({USER} + 0x1500), %edi; mov $({USER} + 0x1600), %ebp
    mov $({USER} + 0x1700), %r8d; mov %r8, %r9; mov %r8, %r10; mov %r8, %r11; mov %r8, %r12; mov %r8, %r13
    mov %r8, %r14; mov %r8, %r15
    iretq
gdt_pointer: .word 0x7f
    .quad {GDT}
"""


def sweep(encodings: list[bytes], mode: str) -> bytes:
    """The vector with which each encoding ended, 3 (a breakpoint) if it was executed, or `ENDED`.

    Some encodings in kernel mode do the kernel harm without ending it, to its descriptors for instance. That shows at
    the next `CANARY`, and all since the last one are done again, one by one.
    """
    kernel = tiny_guest(KERNEL)
    groups = [encodings[n : n + GROUP] for n in range(0, len(encodings), GROUP)]
    results = bytearray()
    done = 0
    while done < len(groups):
        found = _execute(kernel, [each for group in groups[done:] for each in (*group, CANARY)], mode)
        for group in groups[done:]:
            ends, found = found[: len(group) + 1], found[len(group) + 1 :]
            done += 1
            if ENDED in ends or NOT_REACHED in ends or ends[-1] != BREAKPOINT:
                results += b"".join(_execute(kernel, [each], mode) for each in group)
                break
            results += ends[:-1]
    return bytes(results)


def _execute(kernel: bytes, encodings: list[bytes], mode: str) -> bytes:
    """The same in one machine: what is behind an encoding that ends it is not reached."""
    code, data = MODES[mode]
    with Machine(kernel, memory=MEMORY) as machine:
        memory = machine.partition.memory
        _prepare(memory.write)
        memory.write(RECORDS, b"".join(each.ljust(RECORD, b"\xcc") for each in encodings))
        memory.write(RESULTS, bytes([NOT_REACHED]) * len(encodings))
        entry = CODE - USER if mode == "user16" else CODE
        memory.write(NEXT, struct.pack("<QQHH12xQ", 0, len(encodings), code, data, entry))
        machine.run(virtual_seconds=1e-3 + len(encodings) * 1e-5)
        found = bytearray(memory.read(RESULTS, len(encodings)))
    if NOT_REACHED in found:
        found[found.index(NOT_REACHED)] = ENDED
    return bytes(found)


def _prepare(write: object) -> None:
    """Page tables that give the user four pages, descriptors, and breakpoints all over the user's pages."""
    assert callable(write)
    present, user, large = 3, 4, 0x80
    write(TABLES, struct.pack("<Q", TABLES + 0x1000 | present | user))
    write(TABLES + 0x1000, struct.pack("<Q", TABLES + 0x2000 | present | user))
    directory = [TABLES + 0x3000 | present | user] + [
        n << 21 | present | large for n in range(1, MEMORY >> 21)
    ]
    write(TABLES + 0x2000, struct.pack(f"<{len(directory)}Q", *directory))
    pages = [n << 12 | present | (user if USER <= n << 12 < USER + 0x4000 else 0) for n in range(512)]
    pages[USER >> 12] &= ~2  # the code; the kernel writes it all the same
    write(TABLES + 0x3000, struct.pack("<512Q", *pages))
    descriptors = {
        0x10: 0x00AF9A00_0000FFFF, 0x18: 0x00CF9200_0000FFFF, 0x40: 0x00AFFA00_0000FFFF, 0x48: 0x00CFF200_0000FFFF,
        0x50: 0x00CFFA00_0000FFFF, 0x58: 0x0000FA04_0000FFFF, 0x60: 0x0000F204_0000FFFF,
        0x30: 0x00008900_00000067 | (TSS & 0xFFFFFF) << 16,
    }  # fmt: skip
    for selector, descriptor in descriptors.items():
        write(GDT + selector, struct.pack("<Q", descriptor))
    write(TSS, struct.pack("<IQQQQQ", 0, 0xF000, 0, 0, 0, 0xE800))  # RSP0 and IST1
    write(USER, b"\xcc" * 0x4000)


OPCODES = [
    *(
        [n]
        for n in range(256)
        if n not in {0x0F, 0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3}
    ),
    *([0x0F, n] for n in range(256) if n not in {0x38, 0x3A}),
    *([0x0F, 0x38, n] for n in range(256)),
    *([0x0F, 0x3A, n] for n in range(256)),
]
PREFIXES = [[], [0x66], [0xF2], [0xF3], [0xF0], [0xF0, 0x66], [0xF2, 0xF0], [0xF0, 0xF3], [0x67]]
REX_PREFIXES = [[0x48], [0x4F], [0xF0, 0x48], [0xF0, 0x41], [0x66, 0xF0, 0x4C], [0xF2, 0x48], [0xF3, 0x48]]


def encodings(mode: str) -> Iterator[bytes]:
    """All opcodes of one to three bytes, with every prefix, every ModRM.reg, with memory and two registers.

    And all software interrupts. In the constants behind, and in SIB, are breakpoints. VEX and EVEX are among the
    one-byte opcodes. Kernel mode, where the same is translated but for privileged instructions, has fewer prefixes,
    because it takes longer.
    """
    modrms = [register << 3 | operand for register in range(8) for operand in (0x03, 0x04, 0xC0, 0xC3)]
    prefixes = PREFIXES + REX_PREFIXES if mode == "user64" else PREFIXES
    if mode == "kernel64":
        prefixes = [[], [0x66], [0xF0], [0x48], [0xF0, 0x48]]
    for prefix, opcode, modrm in itertools.product(prefixes, OPCODES, modrms):
        if not (mode.endswith("64") and len(opcode) == 1 and 0x40 <= opcode[0] < 0x50):
            yield bytes([*prefix, *opcode, modrm])
    yield from (bytes([0xCD, number]) for number in range(ENDED))  # the others are no results


def main() -> None:
    """Write the results of all encodings of a mode."""
    mode, output = sys.argv[1:]
    Path(output).write_bytes(sweep(list(encodings(mode)), mode))


if __name__ == "__main__":
    main()

"""Tiny 64-bit guests in assembly language: an ELF "kernel" of a few instructions.

They start at 1 MiB in long mode, the first 4 GiB mapped onto themselves, interrupts off, as a Linux kernel would.
"""

import os
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

import pytest

LOAD_ADDRESS = 0x10_0000

PRELUDE = """
    .set UART, 0x3f8
    .macro putc                     # prints AL
        push %rdx
        mov $UART, %dx
        out %al, %dx
        pop %rdx
    .endm
    .macro print char
        push %rax
        mov $\\char, %al
        putc
        pop %rax
    .endm
    .macro power_off
        mov $0x600, %dx
        mov $0x34, %al
        out %al, %dx
        hlt
    .endm
    .macro gate vector, handler, ist=0, dpl=0     # builds an interrupt gate in the IDT at 0xd000
        lea \\handler(%rip), %rax
        mov $(0xd000 + 16 * \\vector), %rdi
        mov %ax, (%rdi)
        movw $0x10, 2(%rdi)
        movb $\\ist, 4(%rdi)
        movb $(0x8e | \\dpl << 5), 5(%rdi)
        shr $16, %rax
        mov %ax, 6(%rdi)
        shr $16, %rax
        mov %eax, 8(%rdi)
        movl $0, 12(%rdi)
    .endm
    .macro load_idt
        lidt idt_pointer(%rip)
    .endm
    .macro load_tss                 # a task state segment at 0xc000: RSP0 and IST1 are 0xf000 and 0xe800
        movq $0xf000, 0xc004
        movq $0xe800, 0xc024
        movw $0x67, 0x1030
        movw $0xc000, 0x1032
        movw $0x8900, 0x1034
        movw $0, 0x1036
        movq $0, 0x1038
        mov $0x30, %ax
        ltr %ax
    .endm
    .text
    .globl _start
    jmp _start
idt_pointer:
    .word 0xfff
    .quad 0xd000
"""


def assemble(source: str) -> bytes:
    """The machine code of `source` in GNU syntax; it starts at `_start`."""
    if shutil.which("as") is None or shutil.which("ld") is None:
        if os.environ.get("CI"):
            pytest.fail("CI needs an assembler (binutils)")
        pytest.skip("no assembler (binutils)")
    with tempfile.TemporaryDirectory() as folder:
        text, objects, binary = (Path(folder, name) for name in ("guest.s", "guest.o", "guest.bin"))
        text.write_text(PRELUDE + source + "\n")
        subprocess.run(["as", "--64", "-o", objects, text], check=True)
        subprocess.run(
            ["ld", "-Ttext", hex(LOAD_ADDRESS), "--oformat", "binary", "-e", "0", "-o", binary, objects],
            check=True,
        )
        return binary.read_bytes()


def elf(code: bytes, *, entry: int = LOAD_ADDRESS) -> bytes:
    """An ELF64 executable with one segment."""
    header = struct.pack(
        "<4sBBBB8xHHIQQQIHHHHHH",
        b"\x7fELF", 2, 1, 1, 0, 2, 62, 1, entry, 64, 0, 0, 64, 56, 1, 0, 0, 0,
    )  # fmt: skip
    segment = struct.pack("<IIQQQQQQ", 1, 7, 0x78, LOAD_ADDRESS, LOAD_ADDRESS, len(code), len(code), 0x1000)
    return header + segment + code


def tiny_guest(source: str) -> bytes:
    """A kernel file made of `source`."""
    return elf(assemble(source))

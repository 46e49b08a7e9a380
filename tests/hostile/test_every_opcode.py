"""No instruction ends the host's process, and a LOCK prefix is #UD wherever the architecture does not allow it."""

import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from reference.engine import need_engine
from reference.opcode_sweep import BREAKPOINT, ENDED, MODES, encodings, sweep
from reference.tiny_guest import tiny_guest

from vmbus.errors import EngineError
from vmbus.machine.guest import Machine, Outcome

need_engine()

INVALID_OPCODE = 6
PAGE_FAULT = 14
LEGACY_PREFIXES = {0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3}
LOCKABLE = {
    **{(n,): range(8) for base in range(0x00, 0x38, 8) for n in (base, base + 1)},
    **{(n,): range(7) for n in (0x80, 0x81, 0x82, 0x83)},
    **{(n,): range(8) for n in (0x86, 0x87)},
    **{(n,): (2, 3) for n in (0xF6, 0xF7)},
    **{(n,): (0, 1) for n in (0xFE, 0xFF)},
    **{(0x0F, n): range(8) for n in (0xAB, 0xB3, 0xBB, 0xB0, 0xB1, 0xC0, 0xC1)},
    (0x0F, 0xBA): (5, 6, 7),
    (0x0F, 0xC7): (1,),
}
"""SDM volume 2, LOCK: ADD, ADC, AND, BTC, BTR, BTS, CMPXCHG(8B, 16B), DEC, INC, NEG, NOT, OR, SBB, SUB, XOR, XADD,
XCHG, with a memory operand; which values of ModRM.reg mean one of them."""


def lock_is_allowed(encoding: bytes, mode: str) -> bool | None:
    """None if there is no LOCK prefix."""
    rest = list(encoding)
    locked = False
    while rest[0] in LEGACY_PREFIXES or (mode.endswith("64") and rest[0] & 0xF0 == 0x40):
        locked |= rest.pop(0) == 0xF0
    if not locked:
        return None
    length = 2 if rest[0] == 0x0F else 1
    opcode, modrm = tuple(rest[:length]), rest[length]
    if mode.endswith("64") and opcode == (0x82,):
        return False
    return opcode in LOCKABLE and modrm < 0xC0 and modrm >> 3 & 7 in LOCKABLE[opcode]


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_every_opcode_with_every_prefix(mode: str, tmp_path: Path) -> None:
    output = tmp_path / "results"
    tests = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", "from reference.opcode_sweep import main; main()", mode, str(output)],
        cwd=tests, env={"PYTHONPATH": f"{tests}:{':'.join(sys.path)}", "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"ended by {done.returncode}: {done.stderr[-2000:]}"
    results = output.read_bytes()
    tried = list(encodings(mode))
    assert len(results) == len(tried) > 150_000
    ended = [each.hex() for each, result in zip(tried, results, strict=True) if result == ENDED]
    assert not ended or mode.startswith("kernel"), ended
    for encoding, result in zip(tried, results, strict=True):
        allowed = lock_is_allowed(encoding, mode)
        if allowed is not None:
            assert (result == INVALID_OPCODE) is not allowed, (encoding.hex(), result)
    # The sweep means something: thousands are executed, and a breakpoint follows those.
    assert results.count(BREAKPOINT) > 30_000


@pytest.mark.parametrize("mode", ["user64", "user32", "user16"])
def test_bytes_at_random(mode: str) -> None:
    random = Random(mode)
    tried = []
    for _ in range(3_000):
        code = bytearray(random.randbytes(15))
        if random.random() < 0.5:
            code[random.randrange(4)] = random.choice(
                (0x0F, 0x66, 0xC4, 0xC5, 0xCD, 0xD9, 0xDD, 0xF0, 0xF2, 0xF3)
            )
        tried.append(bytes(code))
    results = sweep(tried, mode)
    assert len(results) == len(tried)
    assert {INVALID_OPCODE, PAGE_FAULT, BREAKPOINT} < set(results)


@pytest.mark.parametrize("mode", MODES)
def test_every_software_interrupt_comes_to_its_handler(mode: str) -> None:
    assert list(sweep([bytes([0xCD, number]) for number in range(ENDED)], mode)) == list(range(ENDED))


def test_a_software_interrupt_that_a_user_may_not_raise() -> None:
    # The gates of this kernel are its own: INT 6 in user mode is #GP, with RIP at the instruction.
    source = """
        mov %cr3, %rdi; mov $0x3000, %ecx
    1:  testb $1, (%rdi); jz 2f; orb $4, (%rdi)
    2:  add $8, %rdi; dec %ecx; jnz 1b
        mov $0x300000, %edi; mov $512, %ecx
    3:  orb $4, (%rdi); add $8, %rdi; dec %ecx; jnz 3b
        mov %cr3, %rax; mov %rax, %cr3
        gate 13, protected
        load_tss
        mov $0x1000, %esi; mov $0xb000, %edi; mov $64, %ecx; rep movsb
        movabs $0x00affa000000ffff, %rax; mov %rax, 0xb040
        movabs $0x00cff2000000ffff, %rax; mov %rax, 0xb048
        movw $0x4f, 0xa000; movq $0xb000, 0xa002; lgdt 0xa000
        push $0x4b; push $0xf000; push $2; push $0x43; lea bad(%rip), %rax; push %rax; iretq
    bad: int $6
        print 'x'; power_off
    protected: lea bad(%rip), %rax; cmp %rax, 8(%rsp); jne 4f
        mov (%rsp), %al; add $'0', %al; putc
    4:
    """
    assert said(source) == chr(ord("0") + 6 * 8 + 2)


def locked(mode: str, before: bytes) -> list[bytes]:
    """Every locked encoding of the sweep that is not allowed and has a bit instruction's opcode, behind `before`."""
    opcodes = (0xA3, 0xAB, 0xB3, 0xBB, 0xBA)
    return [
        before + each
        for each in encodings(mode)
        if lock_is_allowed(each, mode) is False and each[-3] == 0x0F and each[-2] in opcodes
    ]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("before", [b"", b"\x90", b"\x8a\x03"], ids=["first", "second", "after a load"])
def test_locked_bit_instructions_on_registers(mode: str, before: bytes) -> None:
    tried = locked(mode, before)
    assert len(tried) > 100
    results = sweep(tried, mode)
    assert set(results) == {INVALID_OPCODE}


LOCK_BTS = ".byte 0xf0, 0x0f, 0xba, 0xe8, 0x00"


def said(source: str, invalid: str = "print 'U'; power_off") -> str:
    """What a guest prints whose handler of #UD is `invalid`. The page table of its first 2 MiB is at 0x300000."""
    kernel = tiny_guest(
        f"""
    _start: gate 6, invalid
        gate 14, missing
        load_idt
        mov $0x300000, %edi; mov $3, %eax
    1:  mov %rax, (%rdi); add $8, %rdi; add $0x1000, %rax; cmp $0x200003, %rax; jb 1b
        movq $0x300003, 0x4000; mov %cr3, %rax; mov %rax, %cr3
        {source}
        power_off
    invalid: {invalid}
    missing: print 'P'; power_off
        """
    )
    with Machine(kernel, memory=16 << 20) as machine:
        result = machine.run(virtual_seconds=1)
        assert result.outcome is Outcome.POWER_OFF, (result, machine.engine.cpu.describe())
        return machine.console.text


def test_the_exception_points_at_the_prefix() -> None:
    source = f"mov 0x9000, %al; bad: {LOCK_BTS}; print 'x'"
    assert said(source, "lea bad(%rip), %rax; cmp %rax, (%rsp); jne 1f; print '='; 1: power_off") == "="


def test_what_precedes_in_the_block_is_done_once() -> None:
    assert said(f"incb 0x9000; mov 0x9000, %al; add $'0', %al; putc; incb 0x9000; {LOCK_BTS}") == "1U"


def moved_to(address: int, before: str) -> str:
    """Code that copies a refused instruction to `address`, does `before`, and jumps there."""
    return f"""
        lea 1f(%rip), %rsi; mov ${address}, %edi; mov $16, %ecx; rep movsb
        {before}
        mov ${address}, %eax; jmp *%rax
    1:  {LOCK_BTS}
    """


def test_on_the_first_byte_of_a_page_behind_one_that_is_not_mapped() -> None:
    assert said(moved_to(0x51000, "movq $0, 0x300280; invlpg 0x50000")) == "U"


@pytest.mark.parametrize("split", range(1, 4))
def test_across_two_pages(split: int) -> None:
    address = 0x51000 - split
    assert said(moved_to(address, "")) == "U"
    assert said(moved_to(address, "movq $0, 0x300288; invlpg 0x51000")) == "P"


def test_a_tlb_that_is_out_of_date_hides_nothing() -> None:
    # The page table leads to other code already, but the processor has not been told. The second call fills its TLB.
    before = """
        mov $0xf4, %al; mov $0x51000, %edi; mov $16, %ecx; rep stosb
        mov $0x50008, %ebx; call *%rbx; call *%rbx
        movq $0x51003, 0x300280
    """
    assert said(moved_to(0x50000, before) + "; nop; nop; nop; ret") == "U"


def test_code_that_repairs_itself() -> None:
    # Refused, then made a NOP by the handler and executed, then broken again.
    source = f"""
        xor %ebx, %ebx
    again: print 'r'
    bad: {LOCK_BTS}
        print 'x'
        movb $0xf0, bad(%rip)
        jmp again
    """
    handler = "inc %ebx; print 'U'; movb $0x90, bad(%rip); cmp $3, %ebx; je 1f; iretq; 1: power_off"
    assert said(source, handler) == "rUxrUxrU"


def test_a_jump_behind_the_prefix() -> None:
    assert said(f"xor %eax, %eax; jmp 1f + 1; 1: {LOCK_BTS}; add $'0', %al; putc") == "1"


# Where the library sees no way on


CALL_GATE_WITHOUT_TASK = """
_start: sub $0x100, %rsp
    mov $0x1000, %esi; mov $0xb000, %edi; mov $32, %ecx; rep movsb      # GDT: code and data of the kernel …
    lea target(%rip), %rax
    mov %ax, 0xb040; movw $0x10, 0xb042; movw $0xec00, 0xb044           # … a call gate for the user, and its segments
    shr $16, %rax; mov %ax, 0xb046; shr $16, %rax; mov %eax, 0xb048; movl $0, 0xb04c
    movabs $0x00affa000000ffff, %rax; mov %rax, 0xb050
    movabs $0x00cff2000000ffff, %rax; mov %rax, 0xb058
    movw $0x5f, 0xa000; movq $0xb000, 0xa002; lgdt 0xa000
    xor %eax, %eax; ltr %ax                                             # no task state segment
    mov %cr3, %rdi; mov $0x3000, %ecx
1:  testb $1, (%rdi); jz 2f; orb $4, (%rdi)
2:  add $8, %rdi; dec %ecx; jnz 1b
    mov %cr3, %rax; mov %rax, %cr3
    push $0x5b; push $0xf000; push $2; push $0x53; lea user(%rip), %rax; push %rax; iretq
user: lcall *pointer(%rip)
pointer: .long 0
    .word 0x43
target: hlt
"""


def test_a_library_that_gives_up_ends_its_run_only() -> None:
    with (
        Machine(tiny_guest("_start: print 'a'; print 'b'; power_off"), memory=16 << 20) as neighbour,
        Machine(tiny_guest(CALL_GATE_WITHOUT_TASK), memory=16 << 20) as machine,
    ):
        assert neighbour.run(until="a").outcome is Outcome.MATCHED
        for _ in range(2):
            with pytest.raises(EngineError, match="gave up"):
                machine.run(virtual_seconds=1)
        assert neighbour.run().outcome is Outcome.POWER_OFF
        assert neighbour.console.text == "ab"

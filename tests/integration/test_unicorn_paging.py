"""What the Unicorn engine's TLB lets through: every kind of page and access, against the rules of the SDM."""

import itertools
from typing import NamedTuple

import pytest
from reference.tiny_guest import tiny_guest

from vmbus.engine.unicorn import find_library
from vmbus.errors import EngineError
from vmbus.machine.guest import Machine, Outcome

try:
    find_library()
except EngineError as error:
    pytest.skip(str(error), allow_module_level=True)

MEMORY = 16 << 20
PAGE = 0x40_0000
"""Guest physical address of the page that is tried; it holds RET instructions."""
ENTRY = 0x21000
"""Where its page table entry lies: the first of the table for the virtual addresses from 64 GiB on."""
PRESENT, WRITABLE, USER, ACCESSED, DIRTY = 1, 2, 4, 0x20, 0x40
NO_EXECUTE = 1 << 63
LOAD, STORE, FETCH = range(3)
NO_FAULT = 0xFFFF

GUEST = """
    .set NEXT, 0x510                              # a port of the test: the next case is at 0x8200
    _start:
        gate 14, fault
        gate 0x80, done, dpl=3
        load_idt
        load_tss
        mov $0xc0000080, %ecx; rdmsr; or $0x800, %eax; wrmsr           # EFER.NXE
        movabs $0x00cff3000000ffff, %rax; mov %rax, 0x1020             # user segments
        movabs $0x00affb000000ffff, %rax; mov %rax, 0x1028
        orq $4, 0x2000
        movq $0x20007, 0x3200; movq $0x21007, 0x20000                  # 64 GiB: a page table, its entry is the test's
        movq $0x22007, 0x3400; movq $0x87, 0x22000                     # 128 GiB: the first 2 MiB for the user
        movabs $0x1000000000, %rbx
    next:
        xor %eax, %eax; mov $NEXT, %dx; out %al, %dx
        mov %cr0, %rax; and $~0x10000, %rax; or 0x8210, %rax; mov %rax, %cr0
        mov %cr4, %rax; and $~0x100000, %rax; or 0x8218, %rax; mov %rax, %cr4
        mov %cr3, %rax; mov %rax, %cr3
        movq $0xffff, 0x8220                      # no fault
        mov %rsp, %rbp
        mov 0x8200, %ecx                          # the access
        cmpl $0, 0x8208; jne user
        call try
        jmp next
    user:
        movabs $0x2000000000, %rsi
        pushq $0x23; lea 0xa000(%rsi), %rax; push %rax; pushq $2
        pushq $0x2b; lea at_user(%rsi), %rax; push %rax
        iretq
    at_user:
        call try
        int $0x80
    done:
        mov %rbp, %rsp
        jmp next
    try:
        cmp $1, %ecx; je store; ja fetch
        mov (%rbx), %al; ret
    store: movb $0xc3, (%rbx); ret
    fetch: call *%rbx; ret
    fault:
        pop %rax; mov %rax, 0x8220
        mov %rbp, %rsp
        jmp next
"""


class Case(NamedTuple):
    entry: int
    access: int
    user: bool
    write_protect: bool
    smep: bool

    def expected(self) -> tuple[int, int]:
        """The error code of the page fault, and the entry afterwards."""
        fault = self._fault()
        if fault != NO_FAULT:
            return fault, self.entry
        return NO_FAULT, self.entry | ACCESSED | (DIRTY if self.access == STORE else 0)

    def _fault(self) -> int:
        code = (self.access == STORE) << 1 | self.user << 2 | (self.access == FETCH) << 4
        if not self.entry & PRESENT:
            return code
        refused = self.user and not self.entry & USER
        if self.access == STORE and not self.entry & WRITABLE:
            refused |= self.user or self.write_protect
        if self.access == FETCH:
            refused |= bool(self.entry & NO_EXECUTE) or (
                self.smep and not self.user and bool(self.entry & USER)
            )
        return code | 1 if refused else NO_FAULT


CASES = [
    Case(PAGE | present | writable | user_page | bits | no_execute, access, user, write_protect, smep)
    for present, writable, user_page, bits, no_execute, access, user, write_protect, smep in itertools.product(
        (0, PRESENT),
        (0, WRITABLE),
        (0, USER),
        (0, ACCESSED, ACCESSED | DIRTY),
        (0, NO_EXECUTE),
        (LOAD, STORE, FETCH),
        (False, True),
        (False, True),
        (False, True),
    )
]


class Cases:
    """The port behind which the cases come from and the results go to."""

    def __init__(self, machine: Machine, cases: list[Case]) -> None:
        self.memory = machine.partition.memory
        self.stop = machine.engine.stop
        self.cases = iter(cases)
        self.case: Case | None = None
        self.wrong: list[tuple[Case, tuple[int, int]]] = []

    def io_read(self, port: int, size: int) -> int:
        return 0

    def io_write(self, port: int, size: int, value: int) -> None:
        if self.case is not None:
            result = self.number(0x8220), self.number(ENTRY)
            if result != self.case.expected():
                self.wrong.append((self.case, result))
        self.case = next(self.cases, None)
        if self.case is None:
            self.stop()
            return
        case = self.case
        for address, number in (
            (ENTRY, case.entry),
            (0x8200, case.access),
            (0x8208, case.user),
            (0x8210, case.write_protect << 16),
            (0x8218, case.smep << 20),
        ):
            self.memory.write(address, number.to_bytes(8, "little"))

    def number(self, address: int) -> int:
        return int.from_bytes(self.memory.read(address, 8), "little")


@pytest.mark.parametrize("coded", [False, True], ids=["fresh page", "page with translated code"])
def test_every_kind_of_page_and_access(coded: bool) -> None:
    cases = CASES
    if coded:  # a page stays one with code once something on it has run
        cases = [Case(PAGE | PRESENT, FETCH, False, False, False), *CASES]
    else:
        cases = [case for case in CASES if case.access != FETCH or case.expected()[0] != NO_FAULT]
    with Machine(tiny_guest(GUEST), memory=MEMORY) as machine:
        machine.partition.memory.write(PAGE, b"\xc3" * 4096)
        device = Cases(machine, cases)
        machine.partition.devices.add_ports(0x510, 1, device)
        result = machine.run(virtual_seconds=1)
        assert result.outcome is Outcome.STOPPED, (result, machine.engine.cpu.describe())
        assert device.case is None
        assert not device.wrong, device.wrong[0]


ALIAS = """
    _start:
        mov $0xc0000080, %ecx; rdmsr; or $0x800, %eax; wrmsr           # EFER.NXE
        movq $0x20003, 0x3200; movq $0x21003, 0x20000                  # 64 GiB: a no-execute alias of 0x400000
        movabs $0x8000000000400003, %rax; or $FLAGS, %rax; mov %rax, 0x21000
        mov %cr3, %rax; mov %rax, %cr3
        movabs $0x1000000000, %r8
        mov $0x400000, %ebx
"""


def test_store_behind_a_load_through_the_same_entry_is_seen_by_translated_code() -> None:
    # The guest has not stored to the page before code on it runs: the host has put it there.
    source = (
        ALIAS.replace("FLAGS", hex(ACCESSED | DIRTY))
        + """
        mov 0x800(%r8), %eax                                           # the alias is in the TLB
        call *%rbx; putc
        movb $'B', 1(%r8)
        call *%rbx; putc
        power_off
    """
    )
    with Machine(tiny_guest(source), memory=MEMORY) as machine:
        machine.partition.memory.write(PAGE, b"\xb0A\xc3")  # mov $'A', %al; ret
        assert machine.run(virtual_seconds=1).outcome is Outcome.POWER_OFF
        assert machine.console.text == "AB"


def test_store_behind_a_load_marks_the_page_dirty() -> None:
    source = (
        ALIAS.replace("FLAGS", "0")
        + """
        movb $1, (%rbx)                                                # a store through another mapping
        mov (%r8), %al
        movb $2, (%r8)
        power_off
    """
    )
    with Machine(tiny_guest(source), memory=MEMORY) as machine:
        assert machine.run(virtual_seconds=1).outcome is Outcome.POWER_OFF
        entry = int.from_bytes(machine.partition.memory.read(ENTRY, 8), "little")
        assert entry & (ACCESSED | DIRTY) == ACCESSED | DIRTY


def test_stores_and_code_take_turns_on_one_page() -> None:
    # 0x200000 is mapped once, writable and executable; the code that runs there also stores to its own page.
    source = """
    _start: mov $0x200000, %rbx
        movl $0xc3c0fe, 0x100(%rbx)                       # inc %al; ret
        lea 0x100(%rbx), %rsi
        mov $1000, %ecx
        xor %eax, %eax; xor %r8d, %r8d
    1:  incb 0x800(%rbx)                                  # data beside the code
        mov %cl, %dl; and $1, %dl; shl $3, %dl; add $0xc0, %dl
        mov %dl, 0x101(%rbx)                              # inc %al or dec %al
        call *%rsi
        add %al, %r8b
        dec %ecx; jnz 1b
        mov 0x800(%rbx), %cl
        cmp $(1000 & 255), %cl; jne 2f
        mov %r8b, %al; shr $4, %al; add $'A', %al; putc
        mov %r8b, %al; and $15, %al; add $'A', %al; putc
    2:  power_off
    """
    total = value = 0
    for count in range(1000, 0, -1):
        value += -1 if count & 1 else 1
        total += value
    total &= 0xFF
    with Machine(tiny_guest(source), memory=MEMORY) as machine:
        assert machine.run(virtual_seconds=1).outcome is Outcome.POWER_OFF
        assert machine.console.text == chr(65 + (total >> 4)) + chr(65 + (total & 15))

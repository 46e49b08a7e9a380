"""The Unicorn engine on guests of a few instructions: every exit, every way to end, and hostile ones."""

import time

import pytest
from reference.engine import need_engine
from reference.tiny_guest import tiny_guest

from vmbus.errors import EngineError, LocalProtocolError
from vmbus.machine.guest import Machine, Outcome
from vmbus.machine.linux import BootError

need_engine()

MEMORY = 16 << 20


def run(source: str, *, outcome: Outcome = Outcome.POWER_OFF, **limits: float) -> Machine:
    """Run a tiny guest to the outcome that it must have."""
    limits.setdefault("virtual_seconds", 5.0)
    with Machine(tiny_guest(source), memory=MEMORY) as machine:
        result = machine.run(**limits)
        assert result.outcome is outcome, (result, machine.engine.cpu.describe())
        return machine


def said(source: str, **options: object) -> str:
    return run(source, **options).console.text  # type: ignore[arg-type]


# Ways to end


def test_power_off_and_reboot_are_told_apart() -> None:
    assert said("_start: print 'h'; print 'i'; power_off") == "hi"
    run("_start: mov $0x604, %dx; mov $1, %al; out %al, %dx; hlt", outcome=Outcome.REBOOT)


def test_an_ended_guest_does_not_run_again() -> None:
    with Machine(tiny_guest("_start: power_off"), memory=MEMORY) as machine:
        machine.run()
        with pytest.raises(LocalProtocolError, match="ended"):
            machine.run()


def test_halt_with_interrupts_off() -> None:
    run("_start: cli; hlt", outcome=Outcome.HALTED)


def test_halt_without_any_timer() -> None:
    run("_start: sti; hlt; jmp _start", outcome=Outcome.IDLE)


def test_triple_fault() -> None:
    run("_start: ud2", outcome=Outcome.TRIPLE_FAULT)


def test_loop_with_interrupts_off_stops_right_before_the_virtual_limit() -> None:
    machine = run("_start: cli; 1: jmp 1b", outcome=Outcome.VIRTUAL_TIME, virtual_seconds=0.1)
    assert 0.099999 < machine.virtual_seconds <= 0.1
    again = run("_start: cli; 1: jmp 1b", outcome=Outcome.VIRTUAL_TIME, virtual_seconds=0.1)
    assert machine.counts == again.counts


def test_loop_reaches_the_wall_clock_limit() -> None:
    began = time.monotonic()
    run("_start: 1: jmp 1b", outcome=Outcome.WALL_TIME, wall_seconds=0.5, virtual_seconds=1e6)
    assert time.monotonic() - began >= 0.5


def test_a_stopped_guest_goes_on_where_it_was() -> None:
    source = "_start: print 'a'; mov $100000, %rcx; 1: loop 1b; print 'b'; print 'c'; power_off"
    with (
        Machine(tiny_guest(source), memory=MEMORY) as stopped,
        Machine(tiny_guest(source), memory=MEMORY) as whole,
    ):
        assert stopped.run(until="a").outcome is Outcome.MATCHED
        assert stopped.run(virtual_seconds=5e-5).outcome is Outcome.VIRTUAL_TIME
        assert stopped.console.text == "a"
        assert stopped.run(until="b").outcome is Outcome.MATCHED
        assert stopped.run().outcome is Outcome.POWER_OFF
        assert whole.run().outcome is Outcome.POWER_OFF
        assert stopped.console.output == whole.console.output == b"abc"
        assert stopped.counts == whole.counts


def test_a_suspended_processor_does_not_run() -> None:
    source = "_start: print 'a'; mov $100000, %rcx; 1: loop 1b; print 'b'; power_off"
    with Machine(tiny_guest(source), memory=MEMORY) as machine:
        vp = machine.partition.vps[0]
        clock = machine.hypervisor.clock
        clock.schedule(50_000, lambda: vp.suspend(True))
        assert machine.run().outcome is Outcome.SUSPENDED
        assert machine.console.text == "a"
        ticks = machine.counts["ticks"]
        assert machine.run().outcome is Outcome.SUSPENDED
        assert machine.counts["ticks"] == ticks
        vp.suspend(False)
        assert machine.run().outcome is Outcome.POWER_OFF
        assert machine.console.text == "ab"


@pytest.mark.parametrize(
    "instruction",
    ["out %al, $0x80", "in $0x80, %al", "rdmsr", "int $0x80", "ud2", "movb $1, (%rbx)", "cpuid", "rdtsc"],
)
def test_a_stopped_guest_does_the_rest_of_its_block_once(instruction: str) -> None:
    # A stop at the first print takes effect before, at or behind the instruction, all in the same block.
    source = f"""
    _start: gate 6, skip
        gate 13, skip_with_code
        gate 14, skip_with_code
        gate 0x80, handled
        load_idt
        movabs $0x500000000000, %rbx; mov $0x12345, %ecx; xor %r9d, %r9d
        print 'a'
        {instruction}
    next: inc %r9d
        print 'b'
        lea '0'(%r9), %eax; putc
        power_off
    skip_with_code: pop %rax
    skip: lea next(%rip), %rax; mov %rax, (%rsp)
    handled: add $0x10, %r9d
        iretq
    """
    with (
        Machine(tiny_guest(source), memory=MEMORY) as stopped,
        Machine(tiny_guest(source), memory=MEMORY) as whole,
    ):
        assert stopped.run(until="a", virtual_seconds=1).outcome is Outcome.MATCHED
        assert stopped.run(until="b", virtual_seconds=1).outcome is Outcome.MATCHED
        assert stopped.run(virtual_seconds=1).outcome is Outcome.POWER_OFF
        assert whole.run(virtual_seconds=1).outcome is Outcome.POWER_OFF
        assert stopped.console.output == whole.console.output
        assert whole.console.text in ("ab1", "abA")
        assert stopped.counts == whole.counts
        assert stopped.partition.account.exits == whole.partition.account.exits


# Exits


def test_an_nmi_comes_with_interrupts_off_and_masks_others_until_iret() -> None:
    source = """
    _start: gate 2, nmi
        load_idt
        cli
        print 's'
    1:  jmp 1b
    nmi: print '<'
        mov $1000, %rcx; 2: loop 2b
        print '>'
        iretq
    """
    with Machine(tiny_guest(source), memory=MEMORY) as machine:
        vp = machine.partition.vps[0]
        assert machine.run(until="s").outcome is Outcome.MATCHED
        vp.request_nmi()
        assert machine.run(until="<").outcome is Outcome.MATCHED
        vp.request_nmi()  # while the first is handled: comes behind it, once
        vp.request_nmi()
        machine.run(virtual_seconds=0.01)
        assert machine.console.text == "s<><>"
        assert vp.account.interrupts[2] == 2
        vp.request_nmi()
        machine.run(virtual_seconds=0.01)
        assert machine.console.text == "s<><><>"


def test_an_nmi_wakes_a_processor_that_halted_with_interrupts_off() -> None:
    source = """
    _start: gate 2, nmi
        load_idt
        sti
        hlt
        print 'w'
        power_off
    nmi: print 'n'
        iretq
    """
    with Machine(tiny_guest(source), memory=MEMORY) as machine:
        machine.hypervisor.clock.schedule(1_000_000, machine.partition.vps[0].request_nmi)
        assert machine.run().outcome is Outcome.POWER_OFF
        assert machine.console.text == "nw"


def test_cpuid_shows_the_hypervisor() -> None:
    source = """
    _start: mov $0x40000000, %eax; cpuid
        mov %ebx, 0x8000; mov %ecx, 0x8004; mov %edx, 0x8008
        mov $0x8000, %esi; mov $12, %ecx; mov $UART, %dx; cld; rep outsb
        power_off
    """
    machine = run(source)
    assert machine.console.text == "Microsoft Hv"
    assert machine.partition.account.exits["cpuid"] == 1
    assert machine.partition.account.exits["io_port"] == 12 + 1


def test_msr_that_is_not_there_raises_general_protection() -> None:
    source = """
    _start: gate 13, bad
        load_idt
        mov $0x12345, %ecx; rdmsr
        print 'n'
    bad: pop %rax; add $'0', %al; putc            # the error code is 0
        pop %rax; lea _start(%rip), %rbx; sub %rbx, %rax; jb 1f; print 'r'   # RIP is that of RDMSR
    1:  power_off
    """
    assert said(source) == "0r"


def test_deadline_timer_interrupts_a_halted_processor() -> None:
    source = """
    _start: gate 0x40, tick
        load_idt
        mov $0xfee00000, %ebx
        movl $0x1ff, 0xf0(%rbx)                   # enable the local APIC
        movl $0x40040, 0x320(%rbx)                # TSC deadline, vector 0x40
        rdtsc; add $1000000, %eax
        mov $0x6e0, %ecx; wrmsr
        sti
    1:  hlt
        jmp 1b
    tick: movl $0, 0xb0(%rbx)                     # end of interrupt
        print 'T'
        power_off
    """
    machine = run(source)
    assert machine.console.text == "T"
    assert 0.001 <= machine.virtual_seconds < 0.0011
    assert machine.partition.account.interrupts[0x40] == 1


def test_interrupt_waits_for_the_instruction_behind_sti() -> None:
    source = """
    _start: gate 0x40, tick
        load_idt
        mov $0xfee00000, %ebx
        movl $0x1ff, 0xf0(%rbx)
        movl $0x44040, 0x300(%rbx)                # an interrupt to ourselves: pends while IF is clear
        xor %r8d, %r8d
        sti
        mov $1, %r8d
        jmp 1f
    1:  print 'n'
        power_off
    tick: lea (%r8), %eax; add $'0', %al; putc
        power_off
    """
    assert said(source) == "1"


def test_hypercall_page_and_calls() -> None:
    source = """
    _start: gate 6, undefined
        load_idt
        xor %ecx, %ecx; inc %ecx
        vmcall                                    # hypercalls are not enabled yet: #UD
    on: mov $0x40000000, %ecx; mov $0x8100, %edx; mov $1, %eax; wrmsr
        mov $0x40000001, %ecx; xor %edx, %edx; mov $0x200001, %eax; wrmsr
        mov $0x1005d, %ecx; mov $77, %edx; xor %r8, %r8     # fast HvSignalEvent, connection 77: there is none
        mov $0x200000, %rax; call *%rax
        cmp $18, %ax; jne 1f                      # HV_STATUS_INVALID_CONNECTION_ID
        print 'c'
    1:  power_off
    undefined: print 'u'; lea on(%rip), %rax; mov %rax, (%rsp); iretq
    """
    machine = run(source)
    assert machine.console.text == "uc"
    assert machine.partition.account.hypercalls[0x5D] == 1


USER = """
    _start: gate 0x80, allowed, dpl=3
        gate 13, bad
        gate 14, fault
        load_idt
        load_tss
        orq $4, 0x2000; orq $4, 0x3000; orq $4, 0x4000      # user pages
        movabs $0x00cff3000000ffff, %rax; mov %rax, 0x1020
        movabs $0x00affb000000ffff, %rax; mov %rax, 0x1028
        mov %cr3, %rax; mov %rax, %cr3
        mov $0xc0000080, %ecx; rdmsr; or $1, %eax; wrmsr                   # EFER.SCE
        mov $0xc0000081, %ecx; xor %eax, %eax; mov $0x00180010, %edx; wrmsr   # STAR
        mov $0xc0000082, %ecx; lea system(%rip), %rax; xor %edx, %edx; wrmsr  # LSTAR
        mov $0xc0000084, %ecx; mov $0x200, %eax; xor %edx, %edx; wrmsr        # FMASK: IF
        pushq $0x23; pushq $0xa000; pushq $0x203; pushq $0x2b
        lea user(%rip), %rax; push %rax
        iretq
    user:
        stc
        .byte 0x48; syscall                       # with a prefix: RCX must still be behind it
        jnc no
        int $0x80
        int $0x41                                 # its gate is for the kernel only
    no: hlt
    system:
        lea user(%rip), %rax; sub %rax, %rcx; push %rcx
        add $'0', %cl; mov %cl, %al; putc
        pop %rcx; lea user(%rip), %rax; add %rax, %rcx
        sysretq
    allowed: mov 8(%rsp), %al; cmp $0x2b, %al; jne 1f; print 'a'
    1:  iretq
    bad: pop %rbx; cmp $0x20a, %ebx; jne 2f; print 'g'
        mov (%rsp), %rax; mov (%rax), %al; cmp $0xcd, %al; jne 2f; print 'p'  # RIP is that of INT
    2:  mov $0x5000000000, %rax
        mov %rax, %rax; movb $0, (%rax)
    fault: pop %rbx; add $'0', %bl; mov %bl, %al; putc                        # 2: a write, not present
        mov %cr2, %rax; mov $0x5000000000, %rbx; cmp %rax, %rbx; jne 3f; print 'c'
    3:  power_off
"""


def test_user_mode_system_calls_and_software_interrupts() -> None:
    machine = run(USER)
    assert machine.console.text == "4agp2c"
    assert machine.counts["syscalls"] == 1


def test_exception_that_cannot_be_delivered_becomes_a_double_fault() -> None:
    source = """
    _start: gate 6, undefined
        gate 8, double, ist=1
        load_idt
        load_tss
        mov $0x500000000000, %rsp                 # not mapped
        ud2
    undefined: hlt
    double: print 'D'
        pop %rax; add $'0', %al; putc
        power_off
    """
    assert said(source) == "D0"


# Code that changes


CODE = """
    .macro put_function where, char               # mov $char, %al; ret
        movl $(0xc300b0 | \\char << 8), \\where
    .endm
"""


def test_code_that_the_host_overwrites_is_translated_again() -> None:
    class Rewriter:
        def io_read(self, port: int, size: int) -> int:
            return 0

        def io_write(self, port: int, size: int, value: int) -> None:
            machine.partition.memory.write(0x200000, bytes([0xB0, value, 0xC3]))

    source = (
        CODE
        + """
    _start: put_function 0x200000, 'A'
        mov $0x200000, %rbx
        mov $3, %r9d
    1:  call *%rbx; putc
        mov $'X', %al; mov $0x510, %dx; out %al, %dx
        call *%rbx; putc
        mov $'Y', %al; mov $0x510, %dx; out %al, %dx
        dec %r9d; jnz 1b
        power_off
    """
    )
    with Machine(tiny_guest(source), memory=MEMORY) as machine:
        machine.partition.devices.add_ports(0x510, 1, Rewriter())
        assert machine.run(virtual_seconds=1).outcome is Outcome.POWER_OFF
        assert machine.console.text == "AXYXYX"
        assert machine.counts["pages_forgotten"] > 0


def test_code_that_the_guest_overwrites_through_another_mapping_is_translated_again() -> None:
    # The alias is not executable, so the library lets stores to it be fast: the first one goes to another part of
    # the page, the second one to the code.
    source = (
        CODE
        + """
    _start:
        mov $0xc0000080, %ecx; rdmsr; or $0x800, %eax; wrmsr           # EFER.NXE
        movq $0x8003, 0x3020                                           # 0x100200000 is 0x200000, no-execute
        movabs $0x8000000000200083, %rax; mov %rax, 0x8008
        mov %cr3, %rax; mov %rax, %cr3
        movabs $0x100200000, %r8
        mov $0x200000, %rbx
        movl $0, 0x800(%r8)                                            # the alias is in the TLB now, and fast
        put_function (%r8), 'A'
        call *%rbx; putc
        movl $1, 0x800(%r8)
        put_function (%r8), 'B'
        call *%rbx; putc
        movl $2, 0x800(%r8)
        put_function (%r8), 'C'
        call *%rbx; putc
        power_off
    """
    )
    assert said(source) == "ABC"


# Hostile guests


def test_garbage_in_its_own_synic_pages_harms_nobody() -> None:
    source = """
    _start:
        mov $0x40000000, %ecx; mov $0x8100, %edx; mov $1, %eax; wrmsr
        mov $0x40000001, %ecx; xor %edx, %edx; mov $0x200001, %eax; wrmsr
        mov $0x40000083, %ecx; mov $0x300001, %eax; wrmsr              # message page
        mov $0x40000082, %ecx; mov $0x400001, %eax; wrmsr              # event flag page
        mov $0x40000092, %ecx; mov $0x40, %eax; wrmsr                  # SINT2
        mov $0x40000080, %ecx; mov $1, %eax; wrmsr
        mov $100, %r9d
    1:  mov $0x300000, %edi; mov $0x2000, %ecx; mov %r9b, %al; rep stosb
        mov $0x400000, %edi; mov $0x1000, %ecx; mov $0xff, %al; rep stosb
        mov $0x5c, %ecx; mov $0x300000, %edx; xor %r8, %r8             # HvPostMessage of garbage
        mov $0x200000, %rax; call *%rax
        mov $0x40000084, %ecx; xor %eax, %eax; xor %edx, %edx; wrmsr   # end of message
        dec %r9d; jnz 1b
        print 'k'
        power_off
    """
    assert said(source) == "k"


@pytest.mark.parametrize("address", ["0xfffffffffffffff8", "0xe0000000", "0xfee00000", "0xfeb00000"])
def test_accesses_to_device_addresses_and_beyond(address: str) -> None:
    source = f"""
    _start: gate 14, fault
        load_idt
        movabs ${address}, %rbx
        mov (%rbx), %rax; mov %rax, (%rbx)
        print 'm'
        power_off
    fault: print 'f'
        power_off
    """
    assert said(source) in ("m", "f")


@pytest.mark.parametrize(
    "instruction",
    [
        "vmrun",
        "vmload",
        "vmsave",
        "stgi",
        "clgi",
        "skinit",
        "invlpga %rax, %ecx",
        "mwait",
        "monitor",
        "rsm",
        "rdpmc",
    ],
)
def test_instructions_that_this_processor_does_not_have(instruction: str) -> None:
    """The library's own processor has some of them; with VMRUN a guest could take its intercepts away."""
    source = f"""
    _start: gate 6, undefined
        gate 13, protection
        load_idt
        mov $0xc0000080, %ecx; rdmsr; or $0x1000, %eax; wrmsr          # EFER.SVME, if it sticks
        mov $0x300000, %eax; xor %ecx, %ecx; xor %edx, %edx
    at: {instruction}
        print 'n'
        power_off
    undefined: lea at(%rip), %rax; cmp %rax, (%rsp); jne 1f
        print 'u'
    1:  power_off
    protection: print 'g'
        power_off
    """
    assert said(source) in ("u", "g")


def test_control_block_is_out_of_reach() -> None:
    source = """
    _start: gate 14, fault
        load_idt
        movq $0x8003, 0x3020
        movabs $0x20000000083, %rax; mov %rax, 0x8000                  # 0x100000000 is 2**41
        mov %cr3, %rax; mov %rax, %cr3
        movabs $0x100000000, %rbx
        mov 0x48(%rbx), %rax
        print 'r'
        power_off
    fault: pop %rax; and $8, %al; add $'0', %al; putc                   # a reserved bit
        power_off
    """
    assert said(source) == "8"


def test_jump_into_device_memory_ends_the_run_with_an_error() -> None:
    with Machine(tiny_guest("_start: mov $0xe0000000, %rax; jmp *%rax"), memory=MEMORY) as machine:
        try:
            result = machine.run(virtual_seconds=1, wall_seconds=30)
        except EngineError:
            return
        assert result.outcome is Outcome.TRIPLE_FAULT


def test_an_exception_of_a_device_reaches_the_caller() -> None:
    class Broken:
        def io_read(self, port: int, size: int) -> int:
            raise RuntimeError("the device broke")

        def io_write(self, port: int, size: int, value: int) -> None:
            raise RuntimeError("the device broke")

    with Machine(tiny_guest("_start: mov $0x510, %dx; in %dx, %al; power_off"), memory=MEMORY) as machine:
        machine.partition.devices.add_ports(0x510, 1, Broken())
        with pytest.raises(RuntimeError, match="the device broke"):
            machine.run(virtual_seconds=1)


# Several processors

APPLICATION_PROCESSOR = """
    .macro ipi low
        mov $0xfee00000, %edi
        movl $0x01000000, 0x310(%rdi)             # to APIC id 1
        movl $\\low, 0x300(%rdi)
    .endm
    .macro start_other                            # its code, which is at `other`, is copied to 0x8000
        lea other(%rip), %rsi; mov $0x8000, %edi; mov $(other_end - other), %ecx; rep movsb
        ipi 0x4500                                # INIT
        ipi 0x4608                                # STARTUP at page 8
        ipi 0x4608                                # the second one does not count
    .endm
"""


def run_two(source: str, *, outcome: Outcome = Outcome.POWER_OFF, **limits: float) -> Machine:
    """Run a tiny guest on two processors."""
    limits.setdefault("virtual_seconds", 1.0)
    with Machine(tiny_guest(APPLICATION_PROCESSOR + source), memory=MEMORY, processors=2) as machine:
        result = machine.run(**limits)
        assert result.outcome is outcome, (result, machine.console.text, machine.engine.cpu.describe())
        return machine


REAL_MODE = """
    .code16
    other:
        mov %cs, %ax; mov %ax, %ds
        mov $0x3f8, %dx
        mov $'r', %al; out %al, %dx
        movl $0, %ecx
    1:  incl %ecx                                 # its own registers, while the other one executes, too
        cmpl $300000, %ecx; jne 1b
        movl $0x1234, 0x800                       # 0x8800
"""
PARK = """
        cli
    2:  hlt
        jmp 2b
    other_end:
    .code64
"""


def test_a_second_processor_starts_in_real_mode_and_both_take_turns() -> None:
    source = """
    _start: start_other
        print 'b'
        mov $0x5678, %rbx
    1:  inc %rbx
        cmpl $0x1234, 0x8800; jne 1b
        print 'd'
        power_off
    """
    machine = run_two(source + REAL_MODE + PARK)
    assert machine.console.text == "brd"
    assert machine.counts["switches"] > 10, "neither waits for the other to end"
    again = run_two(source + REAL_MODE + PARK)
    assert again.counts == machine.counts


def test_a_halted_processor_is_woken_by_the_other_one() -> None:
    source = """
    _start: gate 0x40, woken
        load_idt
        mov $0xfee00000, %ebx
        movl $0x1ff, 0xf0(%rbx)
        start_other
        sti
    1:  hlt
        jmp 1b
    woken: print 'w'
        movl $0, 0xb0(%rbx)
        power_off
    """
    other = """
    .code16
    other:
        mov $0x3f8, %dx; mov $'o', %al; out %al, %dx
        lgdtl %cs:descriptors - other
        mov %cr0, %eax; or $1, %eax; mov %eax, %cr0       # protected mode, for 32-bit addresses
        ljmpl $8, $0x8000 + protected - other
    .code32
    protected:
        mov $16, %ax; mov %ax, %ds
        movl $0x1ff, 0xfee000f0
        movl $0, 0xfee00310
        movl $0x4040, 0xfee00300                          # vector 0x40 to APIC id 0
        mov $0x3f8, %edx; mov $'s', %al; out %al, %dx
    1:  jmp 1b
        .balign 8
    table: .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff
    descriptors: .word 23
        .long 0x8000 + table - other
    other_end:
    .code64
    """
    machine = run_two(source + other)
    assert machine.console.text in ("ow", "osw")
    assert machine.partition.account.interrupts[0x40] == 1


def test_processors_that_are_all_parked_have_halted() -> None:
    run_two("_start: start_other; cli; 1: hlt; jmp 1b" + REAL_MODE + PARK, outcome=Outcome.HALTED)


def test_triple_fault_of_a_second_processor() -> None:
    run_two(
        "_start: start_other; 1: jmp 1b\n.code16\nother: ud2\nother_end:\n.code64",
        outcome=Outcome.TRIPLE_FAULT,
    )


def test_limits_hold_for_two_that_loop() -> None:
    source = "_start: start_other; 1: jmp 1b\n.code16\nother: cli; 1: jmp 1b\nother_end:\n.code64"
    machine = run_two(source, outcome=Outcome.VIRTUAL_TIME, virtual_seconds=0.05)
    assert 0.04999 < machine.virtual_seconds <= 0.05
    run_two(source, outcome=Outcome.WALL_TIME, virtual_seconds=1e6, wall_seconds=0.3)


def test_init_stops_a_processor_until_it_is_started_again() -> None:
    source = """
    _start: start_other
    1:  cmpl $5, 0x8800; jb 1b
        ipi 0x4500
        mov 0x8800, %ebx
        mov $1000000, %ecx
    2:  loop 2b
        cmp %ebx, 0x8800; jne 9f                  # it does not count any more
        print 's'
        ipi 0x4608
        movl $0, 0x8800
    3:  cmpl $5, 0x8800; jb 3b
        print 'a'
    9:  power_off
    .code16
    other: mov %cs, %ax; mov %ax, %ds
    1:  incl 0x800; jmp 1b
    other_end:
    .code64
    """
    assert run_two(source).console.text == "sa"


@pytest.mark.parametrize("count", [0, 17, -1])
def test_number_of_processors(count: int) -> None:
    with pytest.raises(BootError, match="1 to 16 processors"):
        Machine(tiny_guest("_start: hlt"), memory=MEMORY, processors=count)

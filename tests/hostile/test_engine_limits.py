"""Guests that keep the engine busy, and out of its way to look at limits: each limit holds, and memory stays bounded.

What a guest's bytes cost the host differs by a factor of a thousand. So no test here asks how long something took,
but what had a chance to happen meanwhile.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from reference.engine import need_engine
from reference.tiny_guest import tiny_guest

from vmbus.engine.unicorn import LONGEST_WITHOUT_POLL
from vmbus.machine.guest import Machine, Outcome

need_engine()

MEMORY = 32 << 20
SLOW_GUESTS = {
    "a store into the next instruction": "1: movb $0x90, 2f(%rip); 2: nop; jmp 1b",
    "a store into its own block": "1: xorb $0, 1b(%rip); jmp 1b",
    "a store into its own page": "lea 1f(%rip), %rsi; 1: mov %al, 64(%rsi); jmp 1b",
    "a store into a page full of code": """
        lea 3f(%rip), %rsi
    1:  mov $200, %ecx; mov %rsi, %rdx
    2:  call *%rdx; add $8, %rdx; dec %ecx; jnz 2b
        mov %al, 1592(%rsi); jmp 1b
        .balign 4096
    3:  .rept 200; .balign 8; ret; .endr
    """,
    "exits that take the host long": "1: in $0x71, %al; cpuid; jmp 1b",
    "an empty TLB for each access": "1: mov %cr3, %rax; mov %rax, %cr3; mov 0x9000, %al; jmp 1b",
    "exceptions": "gate 6, 2f; load_idt; 1: ud2; 2: iretq",
}


@pytest.mark.parametrize("name", SLOW_GUESTS)
def test_the_host_has_its_turn_however_slow_the_guest_is(name: str) -> None:
    turns = 0

    def poll() -> None:
        nonlocal turns
        turns += 1
        if turns == 2:
            machine.stop()

    with Machine(tiny_guest(f"_start: {SLOW_GUESTS[name]}"), memory=MEMORY) as machine:
        # Far less than the time of a guest after which its host is looked after in any case: 20 ms.
        result = machine.run(virtual_seconds=0.019, poll=poll)
    # A fast host may have been through with it before its turn was due.
    assert (result.outcome, turns) == (Outcome.STOPPED, 2) or result.cpu_seconds < 3 * LONGEST_WITHOUT_POLL


@pytest.mark.parametrize("interruptible", [False, True])
def test_exceptions_that_never_come_to_an_instruction_end_at_the_limit(interruptible: bool) -> None:
    # The handler of page faults cannot be fetched, and has a stack of its own, which therefore never runs out.
    kind = "movb $0x8f, 0xd0e5" if interruptible else ""
    source = f"""
    _start: load_tss
        gate 14, missing, ist=1
        {kind}
        movl $0x5000, 0xd0e8                        # bits 63:32 of the handler's address
        load_idt
        movabs $0x500000000000, %rax; jmp *%rax
    missing: hlt
    """
    for _ in range(2):
        with Machine(tiny_guest(source), memory=MEMORY) as machine:
            result = machine.run(virtual_seconds=0.001)
            assert result.outcome is Outcome.VIRTUAL_TIME, (result, machine.engine.cpu.describe())
            assert machine.counts["exceptions"] > 1000
            assert machine.virtual_seconds <= 0.00101
    with Machine(tiny_guest(source), memory=MEMORY) as machine:
        assert machine.run(wall_seconds=0.1).outcome is Outcome.WALL_TIME


def test_the_clock_of_the_guest_does_not_depend_on_that_of_the_host() -> None:
    source = (
        "_start: mov $3000, %ecx; 1: movb $0x90, 2f(%rip); 2: nop; in $0x71, %al; loop 1b; rdtsc; power_off"
    )
    counts = []
    for _ in range(3):
        with Machine(tiny_guest(source), memory=MEMORY) as machine:
            assert machine.run(virtual_seconds=1, poll=lambda: None).outcome is Outcome.POWER_OFF
            counts.append((machine.counts, machine.virtual_seconds))
    assert counts[0] == counts[1] == counts[2]


MEASURED = """
import sys
from pathlib import Path
from reference.tiny_guest import tiny_guest
from vmbus.engine.unicorn import LONGEST_WITHOUT_POLL
from vmbus.machine.guest import Machine

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20

source, seconds = sys.argv[1], float(sys.argv[2])
with Machine(tiny_guest(source), memory=64 << 20) as machine:
    machine.run(virtual_seconds=1e-6)
    before = resident()
    outcome = machine.run(virtual_seconds=seconds).outcome.name
    print(outcome, machine.console.text or "-", resident() - before)
"""


def growth(source: str, seconds: float) -> tuple[str, str, int]:
    """Outcome, console and how many MiB a run added to a process of its own."""
    tests = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, source, str(seconds)],
        cwd=tests, env={"PYTHONPATH": f"{tests}:{':'.join(sys.path)}", "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    outcome, text, grown = done.stdout.split()
    return outcome, text, int(grown)


@pytest.mark.slow
def test_translated_code_stays_within_its_cache() -> None:
    outcome, _, grown = growth("_start: 1: xorb $0, 1b(%rip); jmp 1b", 0.02)
    assert outcome == "VIRTUAL_TIME"
    assert grown < 256 + 160  # the cache, and what the library notes of each translation in it


@pytest.mark.slow
def test_code_at_ever_new_addresses_does_not_add_up() -> None:
    # 2.4 million blocks of one instruction, each called once.
    source = """
    _start: mov $0x1000000, %edi; mov $0xc3, %al; mov $0x2000000, %ecx; rep stosb
        mov $0x1000000, %ebx
    1:  call *%rbx
        add $14, %ebx; cmp $0x3000000, %ebx; jb 1b
        print 'k'; power_off
    """
    outcome, text, grown = growth(source, 10.0)
    assert (outcome, text) == ("POWER_OFF", "k")
    assert grown < 256 + 160 + 64  # and the guest's own memory, most of which it has filled

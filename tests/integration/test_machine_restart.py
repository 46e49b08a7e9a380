"""What ends a run and what does not: crash reports, crash kernels, restarts from inside and from outside."""

import math
import os
import threading
import time
from pathlib import Path

import pytest
from reference.engine import need_engine
from reference.tiny_guest import elf, tiny_guest

from vmbus.errors import LocalProtocolError
from vmbus.hypervisor.tlfs import Privilege
from vmbus.machine.guest import Machine, Outcome
from vmbus.machine.linux import BootError
from vmbus.storage.disk import MemoryDisk

need_engine()

MEMORY = 16 << 20
IDENTIFY = "mov $0x40000000, %ecx; mov $0x81000000, %edx; xor %eax, %eax; wrmsr;"
FORGET = "mov $0x40000000, %ecx; xor %edx, %edx; xor %eax, %eax; wrmsr;"
REPORT = "mov $0x40000105, %ecx; mov $0x80000000, %edx; xor %eax, %eax; wrmsr;"
RESET = "mov $0x604, %dx; mov $1, %al; out %al, %dx; hlt;"
RESET_MSR = "mov $0x40000003, %ecx; xor %edx, %edx; mov $1, %eax; wrmsr; hlt;"
SPIN = "mov $10000000, %rcx; 1: dec %ecx; jnz 1b;"  # 40 ms of the guest's time
SAY = "lea text(%rip), %rsi; 2: lodsb; test %al, %al; jz 3f; putc; jmp 2b; 3:"


def saying(text: str, then: str) -> str:
    return f'_start: {SAY} {then}\ntext: .asciz "{text}"'


def run(source: str, *, seconds: float = 60.0, **options: object) -> tuple[Machine, Outcome]:
    with Machine(tiny_guest(source), memory=MEMORY, **options) as machine:  # type: ignore[arg-type]
        machine.partition.privileges |= Privilege.ACCESS_RESET_MSR
        return machine, machine.run(virtual_seconds=seconds).outcome


# The report is an event


@pytest.mark.parametrize(
    ("end", "outcome"),
    [
        ("power_off", Outcome.POWER_OFF),
        (RESET, Outcome.REBOOT),
        (RESET_MSR, Outcome.REBOOT),
        ("cli; hlt", Outcome.PANIC),
        ("ud2", Outcome.PANIC),
        ("jmp .", Outcome.PANIC),
    ],
)
def test_a_guest_that_reported_its_crash_goes_on_to_its_end(end: str, outcome: Outcome) -> None:
    source = f"_start: {IDENTIFY} {REPORT} {SPIN} print 'K'; {REPORT} {SPIN} print 'L'; {end}"
    machine, ended = run(source, panic_seconds=0.05)
    assert machine.console.text == "KL"
    assert ended is outcome
    assert machine.crash is not None


def test_without_a_crash_kernel_a_time_ends_the_run() -> None:
    for wait in ("jmp .", "sti; 9: hlt; jmp 9b"):
        machine, outcome = run(f"_start: {IDENTIFY} {REPORT} {wait}", panic_seconds=0.05)
        assert outcome is Outcome.PANIC
        assert 0.05 <= machine.virtual_seconds < 0.06
        machine, outcome = run(f"_start: {IDENTIFY} {REPORT} {wait}", panic_seconds=None, seconds=0.2)
        assert outcome in (Outcome.VIRTUAL_TIME, Outcome.IDLE)


def test_limits_that_are_never_reached() -> None:
    machine, outcome = run(f"_start: {IDENTIFY} {REPORT} cli; hlt", panic_seconds=math.inf, seconds=math.inf)
    assert outcome is Outcome.PANIC
    assert machine.crash is not None


def test_a_crash_kernel_has_all_the_time_that_it_needs() -> None:
    source = f"_start: {IDENTIFY} {REPORT} {FORGET} {IDENTIFY} {SPIN} cli; hlt"
    machine, outcome = run(source, panic_seconds=0.01)
    assert outcome is Outcome.HALTED, "the second kernel's own end"
    assert machine.crash is not None
    assert machine.virtual_seconds > 0.04


def test_the_last_line_of_a_panic_ends_the_run_at_once() -> None:
    machine, outcome = run(
        saying("Kernel panic - not syncing: x\\n---[ end Kernel panic - not syncing: x ]---", "jmp .")
    )
    assert outcome is Outcome.PANIC
    assert machine.virtual_seconds < 0.1


@pytest.mark.parametrize("enlightenments", [True, False])
def test_a_kernel_that_restarts_because_it_panicked_has_panicked(enlightenments: bool) -> None:
    source = saying("[ 1.0] Kernel panic - not syncing: why", RESET)
    assert run(source, enlightenments=enlightenments)[1] is Outcome.PANIC
    assert run(saying("Restarting system", RESET), enlightenments=enlightenments)[1] is Outcome.REBOOT


@pytest.mark.parametrize(
    "text",
    [
        "---[ end Kernel panic - not syncing: x ]---",  # of an earlier boot, as a log has it
        "grep 'Kernel panic - not syncing' log",
        "log: [ 1.0] Kernel panic - not syncing: why\\n> ---[ end Kernel panic - not syncing: why ]---",
    ],
)
def test_somebody_who_reads_of_a_panic_has_none(text: str) -> None:
    assert run(saying(text, RESET))[1] is Outcome.REBOOT


def test_a_panic_by_threads_and_processors() -> None:
    source = saying("[    1.234567][   T1][    C0] Kernel panic - not syncing: why", RESET)
    assert run(source)[1] is Outcome.PANIC


# Restarts

COUNTER = """
    _start: mov $0x70, %dx; mov $0x40, %al; out %al, %dx     # a byte of the battery-backed memory counts the starts
        inc %dx; in %dx, %al; inc %al; out %al, %dx
        mov %al, %bl; lea '0'(%rbx), %eax; putc
        mov 0x300000, %al; add $'a', %al; putc               # memory is as at the start
        movb $1, 0x300000
        mov %cr2, %rax; add $'A', %al; putc                  # and so is the processor
        mov $5, %eax; mov %rax, %cr2
        cmp $3, %bl; je 5f
        {reset}
    5:  power_off
"""


@pytest.mark.parametrize("reset", [RESET, RESET_MSR])
@pytest.mark.parametrize("processors", [1, 2])
def test_a_guest_starts_again_as_often_as_it_wants(reset: str, processors: int) -> None:
    source = COUNTER.format(reset=IDENTIFY + reset)
    runs = []
    for _ in range(2):
        with Machine(tiny_guest(source), memory=MEMORY, processors=processors, reboot=True) as machine:
            machine.partition.privileges |= Privilege.ACCESS_RESET_MSR
            result = machine.run(virtual_seconds=5.0)
            assert (result.outcome, result.reboots) == (Outcome.POWER_OFF, 2)
            assert machine.console.text == "1aA2aA3aA"
            runs.append((result.virtual_seconds, machine.counts, machine.ledger.to_dict()))
    assert runs[0] == runs[1], "runs with restarts repeat, too"
    assert runs[0][2]["linux"]["exits"]["wrmsr"] == (2 if reset is RESET else 4), "counts go on"


def test_what_is_awaited_and_the_limits_go_on_over_restarts() -> None:
    with Machine(tiny_guest(COUNTER.format(reset=RESET)), memory=MEMORY, reboot=True) as machine:
        assert machine.run(until="2a").outcome is Outcome.MATCHED
        assert machine.run(until="3aA").outcome is Outcome.MATCHED
        assert machine.run().outcome is Outcome.POWER_OFF
    with Machine(tiny_guest(f"_start: {SPIN} {RESET}"), memory=MEMORY, reboot=True) as machine:
        assert machine.run(virtual_seconds=0.1).outcome is Outcome.VIRTUAL_TIME
        assert machine.virtual_seconds == pytest.approx(0.1)
        began = time.monotonic()
        assert machine.run(wall_seconds=0.3).outcome is Outcome.WALL_TIME
        assert time.monotonic() - began >= 0.3


def test_restarting_from_outside() -> None:
    with Machine(tiny_guest("_start: print 'x'; jmp ."), memory=MEMORY) as machine:
        for _ in range(2):
            assert machine.run(virtual_seconds=0.01).outcome is Outcome.VIRTUAL_TIME
            machine.restart()
        assert machine.console.text == "xx"
    with Machine(tiny_guest("_start: print 'x'; power_off"), memory=MEMORY) as machine:
        machine.run()
        with pytest.raises(LocalProtocolError, match="ended"):
            machine.run()
        machine.restart()  # the button turns it on again
        assert machine.run().outcome is Outcome.POWER_OFF
        assert machine.console.text == "xx"
        machine.console.echo = lambda data: machine.restart()
        machine.restart()
        with pytest.raises(LocalProtocolError, match="runs"):
            machine.run()
    with pytest.raises(LocalProtocolError, match="closed"):
        machine.restart()


def test_without_enlightenments_the_devices_start_again_too() -> None:
    reads = "mov $0xcf8, %dx; mov $0x80003804, %eax; out %eax, %dx; mov $0xcfc, %dx; in %dx, %ax; add $'0', %al; putc"
    enable = "mov $5, %al; out %al, %dx"
    source = f"_start: {reads}; mov $0xcfc, %dx; {enable}; {reads}; cmpb $0, 0x300000; {RESET}"
    machine = Machine(
        tiny_guest(source),
        memory=MEMORY,
        enlightenments=False,
        disks=[MemoryDisk(1 << 20)],
        networks=["none"],
    )
    with machine:
        for _ in range(3):
            assert machine.run(virtual_seconds=1.0).outcome is Outcome.REBOOT
            machine.restart()
        assert machine.console.text == "05" * 3, "the command register of the disk controller"


def test_restarts_do_not_pile_up() -> None:
    def used() -> tuple[int, int]:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages, len(os.listdir("/proc/self/fd"))

    with Machine(tiny_guest(f"_start: {RESET}"), memory=MEMORY) as machine:
        for _ in range(3):
            machine.run()
            machine.restart()
        pages, descriptors = used()
        for _ in range(12):
            machine.run()
            machine.restart()
        more_pages, more_descriptors = used()
    assert more_descriptors == descriptors
    assert (more_pages - pages) * 4096 < 24 << 20


@pytest.mark.parametrize(
    "wrong",
    [
        {"memory": 0},
        {"memory": 4095},
        {"memory": 1 << 46},
        {"panic_seconds": -1.0},
        {"panic_seconds": math.nan},
    ],
    ids=str,
)
def test_what_no_machine_can_have(wrong: dict[str, float]) -> None:
    with pytest.raises(BootError):
        Machine(tiny_guest("_start: hlt"), **({"memory": MEMORY} | wrong))  # type: ignore[arg-type]


def test_a_kernel_from_a_pipe_is_read_once_and_starts_again(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(elf(b"\xf4")))
    writer.start()
    with Machine(pipe, memory=MEMORY) as machine:
        writer.join()
        for _ in range(2):
            assert machine.run(virtual_seconds=1).outcome is Outcome.HALTED
            machine.restart()

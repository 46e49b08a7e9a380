"""A machine's time: the date that its guest finds, the pace of an idle one, and waits that nothing can end."""

import socket
from datetime import UTC, datetime, timedelta, timezone

import pytest
from reference.engine import need_engine
from reference.tiny_guest import tiny_guest

from vmbus.engine.pace import Pace
from vmbus.machine.guest import Machine, Outcome
from vmbus.machine.linux import BootError
from vmbus.network.uplink import StreamUplink

need_engine()

MEMORY = 16 << 20
READ_CLOCK = """
    _start:
        mov $0x70, %dx; mov $0x0b, %al; out %al, %dx; inc %dx; mov $0x06, %al; out %al, %dx    # binary, 24 hours
        lea registers(%rip), %rsi
    1:  lodsb; cmp $0xff, %al; je 2f
        mov $0x70, %dx; out %al, %dx; inc %dx; in %dx, %al; add $0x20, %al; putc; jmp 1b
    2:  print '|'
        hlt
    registers: .byte 0x32, 9, 8, 7, 4, 2, 0, 0xff
"""
DEADLINE_LOOP = """
    _start: gate 0x40, tick
        load_idt
        mov $0xfee00000, %rbx
        movl $0x1ff, 0xf0(%rbx)
        movl $0x40040, 0x320(%rbx)              # the APIC's timer by TSC deadline
        mov ${rounds}, %r12; movabs ${ticks}, %r13
    1:  rdtsc; shl $32, %rdx; or %rdx, %rax
        add %r13, %rax; mov %rax, %rdx; shr $32, %rdx; mov $0x6e0, %ecx; wrmsr
        sti; hlt; cli
        dec %r12; jnz 1b
        power_off
    tick: movl $0, 0xb0(%rbx); iretq
"""


def shown(machine: Machine) -> datetime:
    """The time that the guest reads from its clock."""
    assert machine.run(until="|").outcome is Outcome.MATCHED
    century, year, *rest = (byte - 0x20 for byte in machine.console.output[-8:-1])
    return datetime(century * 100 + year, *rest, tzinfo=UTC)  # type: ignore[arg-type]


def test_the_clock_shows_the_hosts_time_or_a_fixed_one() -> None:
    code = tiny_guest(READ_CLOCK)
    with Machine(code, memory=MEMORY) as machine:
        assert shown(machine) == datetime(2024, 1, 1, tzinfo=UTC)
        machine.restart()
        assert shown(machine) == datetime(2024, 1, 1, tzinfo=UTC)
    with Machine(code, memory=MEMORY, clock="host") as machine:
        assert abs(shown(machine) - datetime.now(UTC)) < timedelta(seconds=60)
    for date in (datetime(2031, 5, 6, 7, 8, 9), datetime.fromisoformat("2031-05-06T09:08:09+02:00")):
        with Machine(code, memory=MEMORY, clock=date) as machine:
            assert shown(machine) == datetime(2031, 5, 6, 7, 8, 9, tzinfo=UTC)
    with pytest.raises(BootError, match="'fixed', 'host' or a date"):
        Machine(code, memory=MEMORY, clock="noon")


@pytest.fixture
def uplink():
    """An uplink whose other side is silent, and that side."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        yield StreamUplink(ours), theirs


@pytest.mark.parametrize("late", [0, 3_000_000])
def test_an_idle_guest_keeps_the_hosts_time(late: int) -> None:
    """Each round takes 2 ms of the host's time beside the wait, and the host wakes it late: 5 of each 10 ms."""
    rounds, period = 200, 10_000_000
    host = 0

    def spend(time: int) -> None:
        nonlocal host
        host += time

    def idle(until_timer: int | None) -> bool:
        assert until_timer is not None
        spend(until_timer + late if until_timer else 0)
        return False

    with Machine(tiny_guest(DEADLINE_LOOP.format(rounds=rounds, ticks=period)), memory=MEMORY) as machine:
        machine.engine.pace = Pace(lambda: host)
        result = machine.run(idle=idle, poll=lambda: spend(2_000_000), paced=True)
        assert result.outcome is Outcome.POWER_OFF
        assert result.virtual_seconds == pytest.approx(rounds * period / 1e9, rel=0.001)
        assert host / 1e9 == pytest.approx(result.virtual_seconds, rel=0.01)


def test_what_ends_a_wait_leaves_the_guest_with_the_hosts_time() -> None:
    """Something comes every 0.1 s: each time the guest has so much less to wait, not all of it again."""
    host = 0

    def idle(until_timer: int | None) -> bool:
        nonlocal host
        assert until_timer is not None
        host += min(until_timer, 100_000_000)
        assert host < 10_000_000_000
        return until_timer > 100_000_000

    with Machine(tiny_guest(DEADLINE_LOOP.format(rounds=1, ticks=2_000_000_000)), memory=MEMORY) as machine:
        machine.engine.pace = Pace(lambda: host)
        assert machine.run(idle=idle, paced=True).outcome is Outcome.POWER_OFF
    assert host / 1e9 == pytest.approx(2.0, rel=0.001)


def test_a_long_wait_is_not_skipped_with_a_network(uplink) -> None:
    source = DEADLINE_LOOP.format(rounds=1, ticks=2_300_000_000)
    with Machine(tiny_guest(source), memory=MEMORY) as machine:
        machine.network.add(uplink[0])
        result = machine.run(wall_seconds=60)
        assert result.outcome is Outcome.POWER_OFF
        assert result.wall_seconds >= 2.29
    longer = DEADLINE_LOOP.format(rounds=100, ticks=2_300_000_000)
    with Machine(tiny_guest(longer), memory=MEMORY) as machine:
        assert machine.run().wall_seconds < 115, "without one it is"


def test_limits_hold_while_a_guest_with_a_network_waits(uplink) -> None:
    source = DEADLINE_LOOP.format(rounds=1, ticks=600_000_000_000)
    with Machine(tiny_guest(source), memory=MEMORY) as machine:
        machine.network.add(uplink[0])
        result = machine.run(wall_seconds=0.3)
        assert result.outcome is Outcome.WALL_TIME
        assert 0.29 <= result.wall_seconds < 30
        result = machine.run(virtual_seconds=0.2, wall_seconds=60)
        assert result.outcome is Outcome.VIRTUAL_TIME
        assert result.wall_seconds >= 0.19


def test_a_limit_does_not_end_a_guests_wait() -> None:
    source = DEADLINE_LOOP.format(rounds=1, ticks=50_000_000).replace("power_off", "print 'x'; power_off")
    with Machine(tiny_guest(source), memory=MEMORY) as machine:
        for _ in range(3):
            assert machine.run(virtual_seconds=0.01).outcome is Outcome.VIRTUAL_TIME
            assert machine.console.text == ""
        assert machine.run(until="x").outcome is Outcome.MATCHED
        assert machine.virtual_seconds >= 0.05


@pytest.mark.parametrize("enlightenments", [True, False])
def test_a_guest_that_nothing_can_wake_is_idle_also_with_a_network(uplink, enlightenments: bool) -> None:
    """No driver of its listens: whatever comes from outside is dropped without an interrupt."""
    with Machine(
        tiny_guest("_start: sti; hlt; jmp _start"), memory=MEMORY, enlightenments=enlightenments
    ) as machine:
        machine.network.add(uplink[0])
        uplink[1].sendall((60).to_bytes(4, "big") + b"\xff" * 6 + bytes(54))
        result = machine.run(wall_seconds=60)
        assert result.outcome is Outcome.IDLE
        assert result.wall_seconds < 30
        result = machine.run(wall_seconds=60, virtual_seconds=50)
        assert result.outcome is Outcome.IDLE


def test_a_date_that_is_none_in_utc() -> None:
    early = datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=14)))
    with pytest.raises(BootError, match="in UTC this is no date"):
        Machine(tiny_guest("_start: hlt"), memory=MEMORY, clock=early)

"""An unmodified Linux kernel on its virtual processor: x2APIC, NMIs, and being suspended by its parent."""

import pytest

from vmbus.hypervisor.apic import ApicMode
from vmbus.hypervisor.tlfs import Msr
from vmbus.machine.guest import Outcome

pytestmark = [pytest.mark.guest, pytest.mark.slow]


def test_linux_switches_to_the_x2apic(boot, shell) -> None:
    machine = boot()
    run = shell(machine)
    assert "Switched APIC routing to physical x2apic" in run("dmesg")
    vp = machine.partition.vps[0]
    assert vp.apic.mode == ApicMode.X2APIC
    assert vp.rdmsr(Msr.IA32_APIC_BASE) & 0xFFF == 0xD00
    before = machine.partition.account.exits["mmio"]
    assert "LOC" in run("sleep 0.2; cat /proc/interrupts")
    assert machine.partition.account.exits["mmio"] == before, "nothing goes through the xAPIC page"


def test_linux_takes_an_nmi(boot, shell) -> None:
    machine = boot()
    run = shell(machine)
    counted = "awk '/NMI:/ {print $2}' /proc/interrupts"
    before = int(run(counted))
    for _ in range(3):
        machine.partition.vps[0].request_nmi()
        machine.run(virtual_seconds=0.05)
    assert int(run(counted)) == before + 3
    assert "trying to continue" in run("dmesg")  # nobody in there expects them


def test_linux_does_not_notice_that_it_was_suspended(boot, shell) -> None:
    machine = boot()
    run = shell(machine)
    vp, clock = machine.partition.vps[0], machine.hypervisor.clock
    machine.console.send("for i in 1 2 3 4 5 6 7 8; do echo tick$i; sleep 0.1; done\n")
    clock.schedule(clock.now() + 400_000_000, lambda: vp.suspend(True))
    assert machine.run(virtual_seconds=5).outcome is Outcome.SUSPENDED
    said = machine.console.text.count("tick")
    assert machine.run(virtual_seconds=5).outcome is Outcome.SUSPENDED
    assert machine.console.text.count("tick") == said
    vp.suspend(False)
    assert machine.run(until="tick8", virtual_seconds=5).outcome is Outcome.MATCHED
    assert "up" in run("uptime")

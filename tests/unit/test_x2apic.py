"""The local APIC in x2APIC mode: its MSRs, the ways between the modes, addressing by 32-bit ids, and NMIs."""

import pytest

from vmbus.hypervisor import GeneralProtectionFault, Hypervisor, VirtualClock
from vmbus.hypervisor.apic import APIC_BASE, NMI_VECTOR, ApicMode, Register
from vmbus.hypervisor.personality import LINUX, SERVER_2008, WINDOWS_2000
from vmbus.hypervisor.tlfs import Msr
from vmbus.hypervisor.x2apic import READERS, WRITERS, msr_of

XAPIC, X2APIC = APIC_BASE | 0x800, APIC_BASE | 0xC00
ICR, SELF_IPI = 0x830, 0x83F
VPS = 18


def processors(personality=LINUX, count=VPS):
    hv = Hypervisor(clock=VirtualClock())
    return hv.create_child(hv.create_root(), memory_size=1 << 20, vps=count, personality=personality).vps


@pytest.fixture
def vps():
    """Eighteen processors, more than one cluster, all in x2APIC mode."""
    child = processors()
    for vp in child:
        vp.wrmsr(Msr.IA32_APIC_BASE, X2APIC | (0x100 if vp.index == 0 else 0))
    yield child
    child[0].partition.hypervisor.root.destroy()


def receivers(vps):
    """Who takes an interrupt; it is ended at once."""
    found = []
    for vp in vps:
        if vp.pop_interrupt() is not None:
            found.append(vp.index)
            vp.wrmsr(msr_of(Register.EOI), 0)
    return found


def test_only_processors_of_that_time_have_one():
    for personality in (SERVER_2008, WINDOWS_2000):
        vp = processors(personality, 1)[0]
        assert not vp.cpuid(1)[2] >> 21 & 1
        assert vp.cpuid(0xB) == (0, 0, 0, 0)
        with pytest.raises(GeneralProtectionFault):
            vp.wrmsr(Msr.IA32_APIC_BASE, X2APIC)
    assert processors(LINUX, 1)[0].cpuid(1)[2] >> 21 & 1


def test_the_topology_leaf_tells_the_id(vps):
    assert [vp.cpuid(0xB, 0)[3] for vp in vps] == list(range(VPS))
    assert vps[5].cpuid(0xB, 0) == (0, 1, 1 << 8, 5)
    assert vps[5].cpuid(0xB, 1) == (5, VPS, 2 << 8 | 1, 5)
    assert vps[5].cpuid(0xB, 2) == (0, 0, 2, 5)


def test_the_registers_are_the_xapics():
    vp = processors(count=1)[0]
    vp.mmio_write(APIC_BASE + Register.TPR, 4, 0x40)
    vp.mmio_write(APIC_BASE + Register.LVT_TIMER, 4, 0x1_00EE)
    for index in (*READERS, *WRITERS):
        with pytest.raises(GeneralProtectionFault):  # they do not exist before the switch
            vp.rdmsr(index)
        with pytest.raises(GeneralProtectionFault):
            vp.wrmsr(index, 0)
    vp.wrmsr(Msr.IA32_APIC_BASE, X2APIC)
    assert vp.rdmsr(Msr.IA32_APIC_BASE) == X2APIC | 0x100
    assert vp.rdmsr(msr_of(Register.TPR)) == vp.rdmsr(Msr.TPR) == 0x40
    assert vp.rdmsr(msr_of(Register.LVT_TIMER)) == 0x1_00EE
    assert vp.rdmsr(msr_of(Register.VERSION)) & 0xFF == 0x14
    assert all(isinstance(vp.rdmsr(index), int) for index in READERS)
    vp.mmio_write(APIC_BASE + Register.TPR, 4, 0x80)  # the page is gone: this is unmapped memory
    assert vp.rdmsr(msr_of(Register.TPR)) == 0x40
    assert vp.mmio_read(APIC_BASE + Register.TPR, 4) != 0x40
    assert {0x80E, 0x831} & {*READERS, *WRITERS} == set()  # no DFR, no upper half of the ICR


@pytest.mark.parametrize(
    ("index", "value"),
    [
        (msr_of(Register.TPR), 0x100),
        (msr_of(Register.EOI), 1),
        (msr_of(Register.SPURIOUS), 1 << 16),
        (msr_of(Register.ESR), 1),
        (msr_of(Register.LVT_TIMER), 1 << 32),
        (msr_of(Register.DIVIDE), 4),
        (ICR, 1 << 13),
        (SELF_IPI, 0x100),
        (msr_of(Register.ID), 0),
        (msr_of(Register.LDR), 0),
        (msr_of(Register.PPR), 0),
        (msr_of(Register.IRR), 0),
        (msr_of(Register.CURRENT_COUNT), 0),
    ],
    ids=hex,
)
def test_reserved_bits_and_read_only_registers_fault(vps, index, value):
    with pytest.raises(GeneralProtectionFault):
        vps[0].wrmsr(index, value)


def test_ways_between_the_modes():
    vp = processors(count=1)[0]
    with pytest.raises(GeneralProtectionFault):
        vp.wrmsr(Msr.IA32_APIC_BASE, APIC_BASE | 0x400)  # x2APIC without being enabled
    vp.wrmsr(Msr.IA32_APIC_BASE, X2APIC)
    vp.request_interrupt(0x50)
    with pytest.raises(GeneralProtectionFault):
        vp.wrmsr(Msr.IA32_APIC_BASE, XAPIC)  # not back, but through disabled
    vp.wrmsr(Msr.IA32_APIC_BASE, APIC_BASE)
    assert vp.rdmsr(Msr.IA32_APIC_BASE) == APIC_BASE | 0x100
    assert vp.pop_interrupt() is None
    vp.request_interrupt(0x51)  # nobody takes it
    with pytest.raises(GeneralProtectionFault):
        vp.wrmsr(Msr.IA32_APIC_BASE, X2APIC)
    vp.wrmsr(Msr.IA32_APIC_BASE, XAPIC)
    assert vp.pop_interrupt() is None
    vp.request_interrupt(0x52)
    assert vp.pop_interrupt() == 0x52
    vp.reset()
    assert vp.apic.mode is ApicMode.XAPIC


def test_cpuid_has_no_local_apic_while_it_is_disabled():
    one, other = processors(count=2)
    for base, present in ((XAPIC & ~0x800, 0), (XAPIC, 1), (X2APIC, 1)):
        one.wrmsr(Msr.IA32_APIC_BASE, base | 0x100)
        assert one.cpuid(1)[3] >> 9 & 1 == present
        assert other.cpuid(1)[3] >> 9 & 1, "each has its own"
    one.partition.hypervisor.root.destroy()


def test_physical_destinations_have_32_bits(vps):
    vps[0].wrmsr(ICR, 17 << 32 | 0x61)
    assert receivers(vps) == [17]
    assert vps[0].rdmsr(ICR) == 17 << 32 | 0x61
    vps[0].wrmsr(ICR, 0xFFFF_FFFF << 32 | 0x62)
    assert receivers(vps) == list(range(VPS))
    vps[0].wrmsr(ICR, 0x1_0001 << 32 | 0x63)
    assert receivers(vps) == []


def test_logical_destinations_are_clusters_of_sixteen(vps):
    assert [vp.rdmsr(msr_of(Register.LDR)) for vp in (vps[0], vps[15], vps[16], vps[17])] == [
        1, 1 << 15, 1 << 16 | 1, 1 << 16 | 2,
    ]  # fmt: skip
    vps[3].wrmsr(ICR, 0x0001_0003 << 32 | 0x861)
    assert receivers(vps) == [16, 17]
    vps[3].wrmsr(ICR, 0x0000_8002 << 32 | 0x861)
    assert receivers(vps) == [1, 15]


def test_self_ipi_and_eoi(vps):
    vp = vps[4]
    vp.wrmsr(SELF_IPI, 0x71)
    vp.wrmsr(SELF_IPI, 0x0F)  # an illegal vector reaches nobody
    assert vp.rdmsr(msr_of(Register.IRR + 0x30)) == 1 << 17
    assert vp.pop_interrupt() == 0x71
    assert vp.rdmsr(msr_of(Register.ISR + 0x30)) == 1 << 17
    vp.wrmsr(msr_of(Register.EOI), 0)
    assert vp.rdmsr(msr_of(Register.ISR + 0x30)) == 0


def test_the_timer_runs_over_msrs():
    vp = processors(count=1)[0]
    clock = vp.partition.hypervisor.clock
    vp.wrmsr(Msr.IA32_APIC_BASE, X2APIC)
    vp.wrmsr(msr_of(Register.DIVIDE), 0xB)
    vp.wrmsr(msr_of(Register.LVT_TIMER), 0xEC)
    vp.wrmsr(msr_of(Register.INITIAL_COUNT), 200_000)  # a millisecond of 200 MHz
    clock.advance(500_000)
    assert vp.rdmsr(msr_of(Register.CURRENT_COUNT)) == 100_000
    assert vp.pop_interrupt() is None
    clock.advance(500_000)
    assert vp.pop_interrupt() == 0xEC


# NMIs


def test_an_nmi_comes_whatever_is_masked(vps):
    vp, taken = vps[1], []

    def handle(vector):
        taken.append(vector)
        if vector == NMI_VECTOR and len(taken) < 4:
            vps[0].wrmsr(ICR, 1 << 32 | 0x400)  # one in the middle of it waits for its end
            assert taken[-1] == NMI_VECTOR

    vp.interrupt_handler = handle
    vp.interrupts_enabled = False
    vp.wrmsr(msr_of(Register.TPR), 0xFF)
    vps[0].wrmsr(ICR, 1 << 32 | 0x61)
    vps[0].wrmsr(ICR, 1 << 32 | 0x400)
    assert taken == [NMI_VECTOR] * 4
    assert vp.account.interrupts[NMI_VECTOR] == 4
    assert not vp.nmi_pending
    assert vp.rdmsr(msr_of(Register.ISR)) == 0  # nothing to end


def test_nmis_of_an_engine_wait_one_at_most(vps):
    woken = []
    vps[2].on_interrupt = lambda: woken.append(vps[2].nmi_pending)
    vps[0].wrmsr(ICR, 0x000C_0400)  # all but self
    vps[0].wrmsr(ICR, 2 << 32 | 0x400)
    assert woken == [True, True]
    assert vps[2].pop_interrupt() is None
    assert [vps[2].take_nmi(), vps[2].take_nmi()] == [True, False]
    assert not vps[0].nmi_pending
    assert all(vp.nmi_pending for vp in vps[3:])
    vps[3].reset()
    assert not vps[3].nmi_pending

"""The local APIC: priorities, in-service, IPIs, logical destinations."""

import random
import struct

import pytest
from reference.raw_guest import RawGuest

from vmbus.hypervisor import GeneralProtectionFault, Hypervisor, VirtualClock
from vmbus.hypervisor.abi import control
from vmbus.hypervisor.apic import APIC_BASE, DeliveryMode
from vmbus.hypervisor.tlfs import CallCode, Msr, Status

ID, VERSION, TPR, PPR, EOI, LDR, DFR, SPURIOUS = 0x20, 0x30, 0x80, 0xA0, 0xB0, 0xD0, 0xE0, 0xF0
ISR, IRR, ICR_LOW, ICR_HIGH = 0x100, 0x200, 0x300, 0x310


@pytest.fixture
def vps():
    hv = Hypervisor(clock=VirtualClock())
    child = hv.create_child(hv.create_root(), "smp", memory_size=1 << 20, vps=4)
    yield child.vps
    hv.root.destroy()


def write(vp, offset, value):
    vp.mmio_write(APIC_BASE + offset, 4, value)


def read(vp, offset):
    return vp.mmio_read(APIC_BASE + offset, 4)


def pending(vps):
    return [vp.pop_interrupt() for vp in vps]


def test_identity(vps):
    assert [read(vp, ID) >> 24 for vp in vps] == [0, 1, 2, 3]
    assert read(vps[0], VERSION) & 0xFF == 0x14
    assert [vp.rdmsr(Msr.IA32_APIC_BASE) for vp in vps[:2]] == [APIC_BASE | 0x900, APIC_BASE | 0x800]
    assert [vp.cpuid(1)[1] >> 24 for vp in vps] == [0, 1, 2, 3]
    vps[0].wrmsr(Msr.IA32_APIC_BASE, APIC_BASE | 0x900)
    for bad in (0xFED0_0900, APIC_BASE | 0x500, APIC_BASE | 0x901, APIC_BASE | 1 << 40 | 0x900):
        with pytest.raises(GeneralProtectionFault):
            vps[0].wrmsr(Msr.IA32_APIC_BASE, bad)


def test_nesting_by_priority_class(vps):
    vp = vps[0]
    vp.request_interrupt(0x51)
    vp.request_interrupt(0x5F)
    assert vp.pop_interrupt() == 0x5F
    assert read(vp, ISR + 0x20) == 1 << 31
    assert read(vp, IRR + 0x20) == 1 << 17
    assert read(vp, PPR) == 0x50
    assert vp.pop_interrupt() is None  # the same class
    vp.request_interrupt(0x60)
    assert vp.pop_interrupt() == 0x60
    write(vp, EOI, 0)
    assert vp.pop_interrupt() is None
    write(vp, EOI, 0)
    assert vp.pop_interrupt() == 0x51
    write(vp, EOI, 0)
    write(vp, EOI, 0)  # nothing in service: ignored
    assert vp.apic.isr == vp.apic.irr == 0


def test_random_sequences_against_sets(vps):
    """The rule of the manual, said with sets: the highest request, if its class is above task and service."""
    vp = vps[0]
    requested, serviced, tpr = set(), set(), 0
    generator = random.Random(20)
    for _ in range(3000):
        step = generator.randrange(4)
        if step == 0:
            vector = generator.randrange(256)
            vp.request_interrupt(vector)
            if vector >= 16:
                requested.add(vector)
        elif step == 1:
            floor = max([tpr >> 4, *(v >> 4 for v in serviced)])
            best = max(requested, default=0)
            expected = best if best >> 4 > floor else None
            assert vp.pop_interrupt() == expected
            if expected is not None:
                requested.discard(expected)
                serviced.add(expected)
        elif step == 2 and serviced:
            write(vp, EOI, 0)
            serviced.discard(max(serviced))
        elif step == 3 and generator.random() < 0.2:
            tpr = generator.randrange(256)
            write(vp, TPR, tpr)
        assert vp.apic.irr == sum(1 << v for v in requested)
        assert vp.apic.isr == sum(1 << v for v in serviced)


def test_software_disabled(vps):
    write(vps[0], SPURIOUS, 0xFF)
    vps[0].request_interrupt(0x40)
    assert vps[0].pop_interrupt() is None
    write(vps[0], SPURIOUS, 0x1FF)
    vps[0].request_interrupt(0x40)
    assert vps[0].pop_interrupt() == 0x40


def test_shorthands(vps):
    write(vps[1], ICR_LOW, 0x40 | 1 << 18)
    assert pending(vps) == [None, 0x40, None, None]
    write(vps[2], ICR_LOW, 0x50 | 2 << 18)
    assert pending(vps) == [0x50] * 4
    write(vps[3], ICR_LOW, 0x60 | 3 << 18)
    assert pending(vps) == [0x60, 0x60, 0x60, None]


def test_physical_and_logical_destinations(vps):
    write(vps[0], ICR_HIGH, 2 << 24)
    write(vps[0], ICR_LOW, 0x40)
    assert pending(vps) == [None, None, 0x40, None]
    for n, vp in enumerate(vps):
        write(vp, LDR, 1 << 24 + n)
    write(vps[0], ICR_HIGH, 0b1010 << 24)
    write(vps[0], ICR_LOW, 0x50 | 1 << 11)
    assert pending(vps) == [None, 0x50, None, 0x50]
    for n, vp in enumerate(vps):  # cluster model: two clusters of two
        write(vp, DFR, 0)
        write(vp, LDR, ((n // 2) << 4 | 1 << n % 2) << 24)
    write(vps[0], ICR_HIGH, 0x12 << 24)
    write(vps[0], ICR_LOW, 0x60 | 1 << 11)
    assert pending(vps) == [None, None, None, 0x60]
    vps[0].wrmsr(Msr.ICR, 1 << 56 | 0x70)  # both halves in one MSR
    assert pending(vps) == [None, 0x70, None, None]
    assert vps[0].rdmsr(Msr.ICR) == 1 << 56 | 0x70


def test_starting_other_processors(vps):
    started = []
    vps[1].on_startup = started.append
    write(vps[0], ICR_HIGH, 1 << 24)
    write(vps[0], ICR_LOW, DeliveryMode.INIT << 8)
    write(vps[0], ICR_LOW, DeliveryMode.STARTUP << 8 | 0x9A)
    assert [(ipi.mode, ipi.vector) for ipi in started] == [
        (DeliveryMode.INIT, 0),
        (DeliveryMode.STARTUP, 0x9A),
    ]


def test_cluster_ipi_hypercall(vps):
    guest = RawGuest(vps[0], sints=())
    assert (
        guest.fast(CallCode.SEND_SYNTHETIC_CLUSTER_IPI, struct.pack("<IIQ", 0x80, 0, 0b1101))[0]
        == Status.SUCCESS
    )
    assert pending(vps) == [0x80, None, 0x80, 0x80]
    bad = guest.fast(CallCode.SEND_SYNTHETIC_CLUSTER_IPI, struct.pack("<IIQ", 0x0F, 0, 1))[0]
    assert bad == Status.INVALID_PARAMETER


def test_cluster_ipi_to_a_sparse_set(vps):
    """The processor set is a variable-sized header: as many banks as its mask has bits."""
    guest = RawGuest(vps[0], sints=())
    code = CallCode.SEND_SYNTHETIC_CLUSTER_IPI_EX

    def send(banks, *, format=0, mask=1):
        data = struct.pack("<IIQQ", 0x80, 0, format, mask) + b"".join(
            bank.to_bytes(8, "little") for bank in banks
        )
        return guest.raw(control(code, variable=len(banks)), data)[0]

    assert send([0b0110]) == Status.SUCCESS
    assert pending(vps) == [None, 0x80, 0x80, None]
    for vp in vps[1:3]:
        vp.wrmsr(Msr.EOI, 0)
    assert send([0b1001, 0xFFFF], mask=0b101) == Status.SUCCESS
    assert pending(vps) == [0x80, None, None, 0x80]
    for vp in vps:
        vp.wrmsr(Msr.EOI, 0)
    assert send([], format=1, mask=0) == Status.SUCCESS
    assert pending(vps) == [0x80] * 4
    assert send([1], mask=0b11) == Status.INVALID_PARAMETER
    assert send([1], format=2) == Status.INVALID_PARAMETER
    assert guest.raw(control(code, variable=0x3FF), b"")[0] == Status.INVALID_ALIGNMENT
    assert (
        guest.raw(control(CallCode.SEND_SYNTHETIC_CLUSTER_IPI, variable=1), b"")[0]
        == Status.INVALID_HYPERCALL_INPUT
    )


def test_tlb_flushes_reach_the_engine(vps):
    guest = RawGuest(vps[0], sints=())
    flushed = []
    vps[0].partition.on_tlb_flush = flushed.append
    assert (
        guest.call(CallCode.FLUSH_VIRTUAL_ADDRESS_SPACE, struct.pack("<QQQ", 0, 0, 0b0101))[0]
        == Status.SUCCESS
    )
    assert guest.call(CallCode.FLUSH_VIRTUAL_ADDRESS_SPACE, struct.pack("<QQQ", 0, 1, 0))[0] == Status.SUCCESS
    pages = [struct.pack("<Q", n << 12) for n in range(5)]
    header = struct.pack("<QQQ", 0, 0, 0b1000)
    assert guest.rep(CallCode.FLUSH_VIRTUAL_ADDRESS_LIST, header, pages)[:2] == (Status.SUCCESS, 5)
    sparse = struct.pack("<QQQQQ", 0, 0, 0, 1, 0b0011)
    word = control(CallCode.FLUSH_VIRTUAL_ADDRESS_SPACE_EX, variable=1)
    assert guest.raw(word, sparse)[0] == Status.SUCCESS
    word = control(CallCode.FLUSH_VIRTUAL_ADDRESS_LIST_EX, variable=1, rep_count=2)
    assert guest.raw(word, sparse + pages[0] + pages[1])[0] == Status.SUCCESS | 2 << 32
    assert flushed == [0b0101, 0b1111, 0b1000, 0b0011, 0b0011]
    assert (
        guest.call(CallCode.FLUSH_VIRTUAL_ADDRESS_SPACE, struct.pack("<QQQ", 0, 0x10, 0))[0]
        == Status.INVALID_PARAMETER
    )

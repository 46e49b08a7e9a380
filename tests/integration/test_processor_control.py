"""What a parent does to its child's processors by hypercall: starts, suspends, interrupts; and ports' properties."""

import struct
from uuid import UUID

import pytest
from reference.raw_guest import RawGuest

from vmbus.bus import Offer, VmbusGuest, VmbusHost
from vmbus.bus.hosting import Threads
from vmbus.hypervisor import HostClock, Hypervisor, VpSuspended
from vmbus.hypervisor.apic import DeliveryMode
from vmbus.hypervisor.personality import ROOT_PRIVILEGES
from vmbus.hypervisor.tlfs import (
    ANY_VP,
    PARTITION_ID_SELF,
    CallCode,
    MessageType,
    Msr,
    PartitionProperty,
    PortProperty,
    PortType,
    Privilege,
    RegisterName,
    Status,
)
from vmbus.hypervisor.wire import (
    ApicEoiMessage,
    AssertVirtualInterrupt,
    ConnectPort,
    CreatePort,
    GetPortProperty,
    InitialVpContext,
    PartitionReference,
    PortReference,
    SegmentRegister,
    SetVpRegister,
    StartVirtualProcessor,
    TableRegister,
    VpReference,
)

LEVEL, LOGICAL = 1 << 32, 1 << 33


@pytest.fixture
def child(hv):
    return hv.create_child(hv.root, "guest", memory_size=4 << 20, vps=3, privileges=ROOT_PRIVILEGES)


def interrupt(root, child, mode, vector=0, destination=0, flags=0):
    call = AssertVirtualInterrupt(child.id, mode | flags, destination, vector, 0, 0, 0)
    return root.call(CallCode.ASSERT_VIRTUAL_INTERRUPT, call.pack())[0]


def clear(root, child):
    return root.call(CallCode.CLEAR_VIRTUAL_INTERRUPT, PartitionReference(child.id).pack())[0]


def set_register(root, child, name, value, vp=0):
    header = VpReference(child.id, vp, 0, b"").pack()
    return root.rep(CallCode.SET_VP_REGISTERS, header, [SetVpRegister(name, 0, 0, value, 0).pack()])[0]


def suspend(root, child, value, vp=0):
    assert set_register(root, child, RegisterName.EXPLICIT_SUSPEND, value, vp) == Status.SUCCESS


# Interrupts


@pytest.mark.parametrize(
    ("mode", "vector", "destination", "flags"),
    [
        (DeliveryMode.FIXED, 15, 0, 0),
        (DeliveryMode.FIXED, 256, 0, 0),
        (DeliveryMode.FIXED, 0x40, 1 << 32, 0),
        (DeliveryMode.FIXED, 0x40, 0, 1 << 34),
        (DeliveryMode.SMI, 0, 0, 0),
        (3, 0x40, 0, 0),
        (8, 0x40, 0, 0),
        (DeliveryMode.NMI, 2, 0, 0),
        (DeliveryMode.NMI, 0, 0, LEVEL),
        (DeliveryMode.INIT, 1, 0, 0),
        (DeliveryMode.EXTINT, 0x40, 1, 0),
        (DeliveryMode.EXTINT, 0x40, 0, LOGICAL),
    ],
)
def test_interrupts_that_cannot_be_asserted(root, child, mode, vector, destination, flags):
    assert interrupt(root, child, mode, vector, destination, flags) == Status.INVALID_PARAMETER
    assert not any(vp.interrupt_pending or vp.nmi_pending for vp in child.vps)


def test_an_nmi_from_the_parent(root, child):
    assert interrupt(root, child, DeliveryMode.NMI, destination=1) == Status.SUCCESS
    assert [vp.take_nmi() for vp in child.vps] == [False, True, False]
    assert interrupt(root, child, DeliveryMode.NMI, destination=0xFF) == Status.SUCCESS
    assert [vp.take_nmi() for vp in child.vps] == [True] * 3


def test_external_interrupts_come_one_at_a_time(root, child):
    """HvCallClearVirtualInterrupt: a second one only after the first was acknowledged and cleared."""
    boot = child.vps[0]
    assert clear(root, child) == Status.NOT_ACKNOWLEDGED
    assert interrupt(root, child, DeliveryMode.EXTINT, 0x08) == Status.SUCCESS
    assert clear(root, child) == Status.NOT_ACKNOWLEDGED  # asserted only
    assert interrupt(root, child, DeliveryMode.EXTINT, 0x09) == Status.SUCCESS  # takes its place
    boot.wrmsr(Msr.TPR, 0xFF)  # the priority does not hold it back
    assert [vp.interrupt_pending for vp in child.vps] == [True, False, False]
    assert [boot.pop_interrupt(), boot.pop_interrupt()] == [0x09, None]
    assert boot.apic.isr == 0  # nothing to end
    assert interrupt(root, child, DeliveryMode.EXTINT, 0x0A) == Status.ACKNOWLEDGED
    assert (
        root.fast(CallCode.CLEAR_VIRTUAL_INTERRUPT, PartitionReference(child.id).pack())[0] == Status.SUCCESS
    )
    assert clear(root, child) == Status.NOT_ACKNOWLEDGED
    assert interrupt(root, child, DeliveryMode.EXTINT, 0x0A) == Status.SUCCESS
    assert boot.pop_interrupt() == 0x0A


def test_the_end_of_a_level_triggered_interrupt_is_told_to_the_parent(root, child):
    vp = child.vps[1]
    assert interrupt(root, child, DeliveryMode.FIXED, 0x51, 1, LEVEL) == Status.SUCCESS
    assert interrupt(root, child, DeliveryMode.FIXED, 0x61, 1) == Status.SUCCESS
    for vector in (0x61, 0x51):
        assert vp.pop_interrupt() == vector
        assert root.take_message(0) is None
        vp.wrmsr(Msr.EOI, 0)
    kind, sender, payload = root.take_message(0)
    assert (kind, sender) == (MessageType.X64_APIC_EOI, child.id)
    assert ApicEoiMessage.unpack(payload) == ApicEoiMessage(1, 0x51)
    assert root.take_message(0) is None
    assert interrupt(root, child, DeliveryMode.FIXED, 0x51, 1) == Status.SUCCESS  # edge-triggered this time
    assert vp.pop_interrupt() == 0x51
    vp.wrmsr(Msr.EOI, 0)
    assert root.take_message(0) is None


def test_finalized_partitions_take_none(root, child):
    child.finalize()
    for mode in (DeliveryMode.FIXED, DeliveryMode.EXTINT):
        assert interrupt(root, child, mode, 0x40) == Status.INVALID_PARTITION_STATE
    assert clear(root, child) == Status.INVALID_PARTITION_STATE


# Starting


def context(**changes):
    flat = SegmentRegister(0, 0xFFFF_FFFF, 0x10, 0xC093)
    code = SegmentRegister(0, 0xFFFF_FFFF, 0x08, 0xA09B)
    table = TableRegister(b"", 0xFFF, 0x7000)
    values = {
        "rip": 0x10_0000, "rsp": 0x9000, "rflags": 0, "cs": code, "ds": flat, "es": flat, "fs": flat, "gs": flat,
        "ss": flat, "tr": flat, "ldtr": flat, "idtr": table, "gdtr": table, "efer": 0xD01, "cr0": 0x8000_0011,
        "cr3": 0x2000, "cr4": 0x20, "pat": 0x0007_0406_0007_0406,
    }  # fmt: skip
    return InitialVpContext(**(values | changes))


def start(caller, partition_id, index, with_context=None, reserved=0, vtl=0):
    call = StartVirtualProcessor(partition_id, index, vtl, reserved, 0, with_context or context())
    return caller.call(CallCode.START_VIRTUAL_PROCESSOR, call.pack())[0]


@pytest.mark.parametrize("by", ["itself", "its parent"])
def test_a_processor_starts_with_the_registers_given(root, child, by):
    caller, name = (RawGuest(child.vps[0]), PARTITION_ID_SELF) if by == "itself" else (root, child.id)
    vp = child.vps[1]
    started = []
    vp.on_start = lambda: started.append(vp.register_file.get(RegisterName.RIP, 0))
    assert not vp.started
    assert start(caller, name, 1) == Status.SUCCESS
    assert started == [0x10_0000]
    get = vp.register_file.get
    assert [get(n, 0) for n in (RegisterName.RSP, RegisterName.CR3, RegisterName.EFER)] == [
        0x9000,
        0x2000,
        0xD01,
    ]
    assert get(RegisterName.CS, 0) == int.from_bytes(context().cs.pack(), "little")
    assert get(RegisterName.GDTR, 0) >> 48 & 0xFFFF == 0xFFF
    assert get(RegisterName.GDTR, 0) >> 64 == 0x7000
    assert get(RegisterName.RFLAGS, 0) == 2
    assert start(caller, name, 1) == Status.INVALID_VP_STATE
    assert start(caller, name, 0) == Status.INVALID_VP_STATE  # the boot processor runs anyway
    assert start(caller, name, 3) == Status.INVALID_VP_INDEX
    assert started == [0x10_0000]


@pytest.mark.parametrize(
    "changes", [{"cr0": 1 << 32}, {"efer": 2}, {"cr3": 1 << 40}, {"pat": 2}], ids=lambda c: next(iter(c))
)
def test_registers_that_no_processor_can_have(root, child, changes):
    assert start(root, child.id, 1, context(**changes)) == Status.INVALID_REGISTER_VALUE
    assert not child.vps[1].started
    assert RegisterName.RIP not in child.vps[1].registers


def test_starts_that_are_refused(hv, root, child):
    assert start(root, child.id, 1, reserved=1) == Status.INVALID_PARAMETER
    assert start(root, child.id, 1, vtl=1) == Status.INVALID_PARAMETER
    lacking = hv.create_child(
        hv.root, "lacks", memory_size=1 << 20, vps=2,
        privileges=int(ROOT_PRIVILEGES) & ~Privilege.START_VIRTUAL_PROCESSOR,
    )  # fmt: skip
    assert start(RawGuest(lacking.vps[0]), PARTITION_ID_SELF, 1) == Status.ACCESS_DENIED
    child.finalize()
    assert start(root, child.id, 1) == Status.INVALID_VP_INDEX


def test_init_and_startup_ipis_start_a_processor_too(root, child):
    vp, seen = child.vps[2], []
    vp.on_startup = seen.append
    for mode, page in ((DeliveryMode.INIT, 0), (DeliveryMode.STARTUP, 0x9F)):
        child.vps[0].wrmsr(Msr.ICR, 2 << 56 | mode << 8 | page)
    assert [(ipi.mode, ipi.vector) for ipi in seen] == [(DeliveryMode.INIT, 0), (DeliveryMode.STARTUP, 0x9F)]
    assert start(root, child.id, 2) == Status.INVALID_VP_STATE
    assert interrupt(root, child, DeliveryMode.INIT, destination=2) == Status.SUCCESS
    assert start(root, child.id, 2) == Status.SUCCESS
    child.reset()
    assert [each.started for each in child.vps] == [True, False, False]


# Suspension


def test_a_suspended_processor_makes_no_exit_and_takes_no_interrupt(root, child):
    guest = RawGuest(child.vps[0])
    vp, other = child.vps[:2]
    suspend(root, child, 1)
    before = child.account.to_dict()
    exits = [
        lambda: guest.post(1, 1, b""), lambda: guest.signal(1), lambda: vp.rdmsr(Msr.VP_INDEX),
        lambda: vp.wrmsr(Msr.TPR, 0), lambda: vp.cpuid(1), lambda: vp.io_read(0x80, 1),
        lambda: vp.io_write(0x80, 1, 0), lambda: vp.io_read_string(0x80, 2, 4),
        lambda: vp.io_write_string(0x80, 2, b"abcd"), lambda: vp.mmio_read(0xFEE0_0020, 4),
        lambda: vp.mmio_write(0xFEE0_0080, 4, 0),
    ]  # fmt: skip
    for attempt in exits:
        with pytest.raises(VpSuspended):
            attempt()
    assert child.account.to_dict() == before
    assert other.rdmsr(Msr.VP_INDEX) == 1  # the others run
    vp.request_interrupt(0x50)
    vp.request_nmi()
    assert not vp.interrupt_pending
    assert vp.pop_interrupt() is None
    assert not vp.take_nmi()
    woken = []
    vp.on_interrupt = lambda: woken.append(vp.interrupt_pending)
    suspend(root, child, 0)
    assert woken == [True]
    assert vp.pop_interrupt() == 0x50
    assert vp.take_nmi()
    assert vp.rdmsr(Msr.VP_INDEX) == 0


def test_the_partitions_property_suspends_all(root, child):
    def put(value):
        call = struct.pack("<QIIQ", child.id, PartitionProperty.SUSPEND, 0, value)
        assert root.call(CallCode.SET_PARTITION_PROPERTY, call)[0] == Status.SUCCESS

    suspend(root, child, 1, vp=1)
    put(1)
    assert all(vp.suspended for vp in child.vps)
    assert child.add_vp().suspended
    put(0)
    assert [vp.suspended for vp in child.vps] == [False, True, False, False]  # its own is its own
    suspend(root, child, 0, vp=1)
    assert not any(vp.suspended for vp in child.vps)
    assert root.call(
        CallCode.SET_PARTITION_PROPERTY, struct.pack("<QIIQ", child.id, PartitionProperty.SUSPEND, 0, 2)
    )[0] == (Status.PROPERTY_VALUE_OUT_OF_RANGE)


def test_a_model_guests_handler_runs_when_it_is_resumed(child):
    vp, taken = child.vps[0], []
    vp.interrupt_handler = lambda vector: (taken.append(vector), vp.wrmsr(Msr.EOI, 0))
    vp.suspend(True)
    for vector in (0x41, 0x52):
        vp.request_interrupt(vector)
    assert taken == []
    vp.suspend(False)
    assert taken == [0x52, 0x41]

    def suspend_within(vector):
        taken.append(vector)
        vp.suspend(True)
        vp.wrmsr(Msr.EOI, 0)  # a handler that has begun is finished

    vp.interrupt_handler = suspend_within
    vp.request_interrupt(0x63)
    vp.request_interrupt(0x64)
    assert taken[2:] == [0x63]
    vp.suspend(False)
    assert taken[2:] == [0x63, 0x64]


ECHO = Offer(UUID(int=7), UUID(int=8))


def serve_echo(channel):
    channel.serve(lambda packets: [channel.send(packet.payload) for packet in packets])


def test_a_guest_with_a_bus_stands_still_and_goes_on_inline(hv):
    child = hv.create_child(hv.root, "bus", memory_size=4 << 20)
    host = VmbusHost(hv, child)
    offered = host.offer(ECHO, serve_echo)
    guest = VmbusGuest(child.vps[0])
    guest.connect()
    channel = guest.open(guest.offers[0], 1, 1)
    got = []
    channel.serve(lambda packets: got.extend(packet.payload for packet in packets))
    child.suspend(True)
    with pytest.raises(VpSuspended):
        channel.send(b"request?")
    offered.channel.send(b"unasked!")
    assert got == []
    child.suspend(False)
    assert got == [b"unasked!"]
    channel.signal()  # the exit that did not take place is made again; the request is in the ring already
    assert channel.wait(lambda: len(got) == 2)
    assert got == [b"unasked!", b"request?"]
    guest.close()


def test_a_guest_with_a_bus_stands_still_and_goes_on_in_threads():
    hv = Hypervisor(clock=HostClock())
    child = hv.create_child(hv.create_root(), "bus", memory_size=4 << 20)
    hosting = Threads(workers=2)
    host = VmbusHost(hv, child, hosting=hosting)
    host.offer(ECHO, serve_echo)
    guest = VmbusGuest(child.vps[0], hosting=hosting)
    guest.connect()
    channel = guest.open(guest.offers[0], 4, 4)
    got = []
    channel.serve(lambda packets: got.extend(packet.payload for packet in packets))
    try:
        for round_ in range(50):
            channel.send(round_.to_bytes(8, "little"))
            child.suspend(True)
            later = hosting.task("resume", lambda: child.suspend(False))
            if round_ % 2:
                hosting.ring(later)
                channel.send(b"\xff" * 8)  # waits in its exit until the processor runs again
            else:
                child.suspend(False)
                channel.send(b"\xff" * 8)
            assert channel.wait(lambda n=round_: len(got) == 2 * n + 2)
        assert got[0::2] == [n.to_bytes(8, "little") for n in range(50)]
    finally:
        child.suspend(False)
        guest.close()
        hosting.close()
        hv.root.destroy()


# Ports


def test_the_messages_of_a_deleted_port_are_lost_and_no_others(hv, root, child):
    guest = RawGuest(child.vps[0])
    for number in (1, 2):
        port = CreatePort(PARTITION_ID_SELF, number, 0, 0, 0, child.id, PortType.MESSAGE, 0, 2, 0, 0)
        assert root.call(CallCode.CREATE_PORT, port.pack())[0] == Status.SUCCESS
        link = ConnectPort(
            PARTITION_ID_SELF, number, 0, 0, 0, hv.root.id, number, 0, PortType.MESSAGE, 0, b"", 0
        )
        assert guest.call(CallCode.CONNECT_PORT, link.pack())[0] == Status.SUCCESS
    for text in (b"in the slot", b"waits", b"waits, too"):
        assert guest.post(1, 1, text) == Status.SUCCESS
    assert guest.post(2, 1, b"of another port") == Status.SUCCESS
    assert hv.root.vps[0].synic.queued_messages == 3
    assert root.call(CallCode.DELETE_PORT, PortReference(PARTITION_ID_SELF, 1, 0).pack())[0] == Status.SUCCESS
    assert guest.post(1, 1, b"late") == Status.INVALID_PORT_ID
    assert [root.take_message(2) for _ in range(3)] == [
        (1, 1, b"in the slot"),
        (1, 2, b"of another port"),
        None,
    ]
    assert hv.root.vps[0].synic.queued_messages == 0
    assert guest.post(2, 1, b"next") == Status.SUCCESS
    assert root.take_message(2) == (1, 2, b"next")


@pytest.mark.parametrize("sint", [0, 16])
def test_ports_have_a_sint_of_their_own(root, child, sint):
    for kind, high in ((PortType.MESSAGE, 0), (PortType.EVENT, 1 << 16)):
        port = CreatePort(PARTITION_ID_SELF, 1, 0, 0, 0, child.id, kind, 0, sint, high, 0)
        assert root.call(CallCode.CREATE_PORT, port.pack())[0] == Status.INVALID_PARAMETER


def test_port_properties(hv, root, child):
    guest = RawGuest(child.vps[0])

    def make(number, kind, vp, low=None):
        low = 2 | vp << 32 if low is None else low
        high = 1 << 16 if kind == PortType.EVENT else 0
        call = CreatePort(PARTITION_ID_SELF, number, 0, 0, 0, child.id, kind, 0, low, high, 0)
        assert root.call(CallCode.CREATE_PORT, call.pack())[0] == Status.SUCCESS

    def get(caller, partition_id, port, code, reserved=0):
        call = GetPortProperty(partition_id, port, reserved, code, 0)
        status, out = caller.call(CallCode.GET_PORT_PROPERTY, call.pack(), 8)
        return (status, int.from_bytes(out, "little")) if status == Status.SUCCESS else status

    make(1, PortType.MESSAGE, 0)
    make(2, PortType.EVENT, ANY_VP)
    make(3, PortType.MONITOR, 0, low=0x9000)
    assert get(root, PARTITION_ID_SELF, 1, PortProperty.POST_COUNT) == (Status.SUCCESS, 0)
    link = ConnectPort(PARTITION_ID_SELF, 5, 0, 0, 0, hv.root.id, 1, 0, PortType.MESSAGE, 0, b"", 0)
    assert guest.call(CallCode.CONNECT_PORT, link.pack())[0] == Status.SUCCESS
    for _ in range(3):
        assert guest.post(5, 1, b"counted") == Status.SUCCESS
    assert guest.post(5, 0, b"refused") == Status.INVALID_PARAMETER
    assert get(root, PARTITION_ID_SELF, 1, PortProperty.POST_COUNT) == (Status.SUCCESS, 3)
    assert get(root, hv.root.id, 2, PortProperty.TARGET_VP) == (Status.SUCCESS, ANY_VP)
    assert get(root, hv.root.id, 2, PortProperty.PREFERRED_TARGET_VP) == (Status.SUCCESS, 0)
    assert get(root, hv.root.id, 3, PortProperty.MONITOR_ADDRESS) == (Status.SUCCESS, 0x9000)
    assert get(root, hv.root.id, 1, PortProperty.MONITOR_ADDRESS) == Status.UNKNOWN_PROPERTY
    assert get(root, hv.root.id, 1, 0x77) == Status.UNKNOWN_PROPERTY
    assert get(root, hv.root.id, 9, PortProperty.POST_COUNT) == Status.INVALID_PORT_ID
    assert get(root, hv.root.id, 1, PortProperty.POST_COUNT, reserved=1) == Status.INVALID_PARAMETER
    assert get(root, child.id, 1, PortProperty.POST_COUNT) == Status.INVALID_PORT_ID
    assert (
        get(guest, hv.root.id, 1, PortProperty.POST_COUNT) == Status.ACCESS_DENIED
    )  # nobody asks about his parent's
    child.finalize()
    assert get(root, child.id, 1, PortProperty.POST_COUNT) == Status.INVALID_PARTITION_STATE

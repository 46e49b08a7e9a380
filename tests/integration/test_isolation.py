"""Every reach out of a partition that must fail, and the documented status that it fails with."""

import struct

import pytest
from reference.raw_guest import INPUT, OS_ID, OUTPUT, RawGuest

from vmbus.core.memory import READ, WRITE
from vmbus.errors import GuestMemoryError, HypercallError, RemoteProtocolError
from vmbus.hypervisor import GeneralProtectionFault, VpSuspended
from vmbus.hypervisor.abi import RepCall, control
from vmbus.hypervisor.hypercalls import CALLS
from vmbus.hypervisor.personality import ROOT_PRIVILEGES
from vmbus.hypervisor.synic import PORT_BUFFERS
from vmbus.hypervisor.tlfs import (
    PARTITION_ID_SELF,
    CallCode,
    InterceptType,
    MapFlags,
    Msr,
    PartitionProperty,
    PortProperty,
    PortType,
    Privilege,
    RegisterName,
    Status,
)
from vmbus.hypervisor.wire import (
    AssertVirtualInterrupt,
    ConnectPort,
    CreatePort,
    CreateVp,
    GetPortProperty,
    InstallIntercept,
    MapGpaPages,
    NextChild,
    PartitionPropertyInput,
    PartitionReference,
    PortReference,
    ReadGpa,
    SetPartitionPropertyInput,
    SetVpRegister,
    TranslateVirtualAddress,
    VpReference,
    WriteGpa,
)

PRIVILEGED = sorted(code for code, call in CALLS.items() if call.privilege)


@pytest.fixture
def family(hv):
    """Two siblings with every privilege there is, and a child of the first: what holds for them holds for all."""
    first = hv.create_child(hv.root, "first", memory_size=1 << 20, privileges=ROOT_PRIVILEGES)
    second = hv.create_child(hv.root, "second", memory_size=1 << 20, privileges=ROOT_PRIVILEGES)
    nephew = hv.create_child(second, "nephew", memory_size=1 << 20)
    return RawGuest(first.vps[0]), RawGuest(second.vps[0]), RawGuest(nephew.vps[0])


def _make(guest, code, data):
    """The status of a call, simple or rep, with the given header or input."""
    call = CALLS[code]
    if isinstance(call, RepCall):
        elements = [bytes(call.element_size)] if call.element_size else []
        return guest.rep(code, data, elements, count=1, output=call.output_element_size)[0]
    return guest.call(code, data.ljust(call.input_size, b"\0"), call.output_size)[0]


# Privileges


@pytest.mark.parametrize("code", PRIVILEGED, ids=lambda code: CallCode(code).name)
def test_a_call_without_its_privilege(hv, code):
    lacking = int(ROOT_PRIVILEGES) & ~CALLS[code].privilege
    guest = RawGuest(hv.create_child(hv.root, "lacking", memory_size=1 << 20, privileges=lacking).vps[0])
    assert _make(guest, code, b"") == Status.ACCESS_DENIED
    assert _make(guest, code, b"\xff" * 8) == Status.ACCESS_DENIED


def test_fast_events_without_the_privilege(hv):
    lacking = int(ROOT_PRIVILEGES) & ~Privilege.SIGNAL_EVENTS
    guest = RawGuest(hv.create_child(hv.root, "mute", memory_size=1 << 20, privileges=lacking).vps[0])
    hv.create_event_port(guest.vp.partition, 1, lambda flag: pytest.fail("signalled"))
    assert guest.signal(1) == Status.ACCESS_DENIED


def test_an_ordinary_child_manages_nobody(guest):
    management = [code for code in PRIVILEGED if code not in (CallCode.POST_MESSAGE, CallCode.SIGNAL_EVENT)]
    assert len(management) > 15
    for code in management:
        assert _make(guest, code, b"") == Status.ACCESS_DENIED, CallCode(code).name


def test_own_registers_take_a_privilege(hv):
    lacking = int(ROOT_PRIVILEGES) & ~(Privilege.ACCESS_VP_REGISTERS | Privilege.CREATE_PARTITIONS)
    guest = RawGuest(hv.create_child(hv.root, "plain", memory_size=1 << 20, privileges=lacking).vps[0])
    header = VpReference(PARTITION_ID_SELF, 0, 0, b"").pack()
    name = RegisterName.RIP.to_bytes(4, "little")
    assert guest.rep(CallCode.GET_VP_REGISTERS, header, [name], output=16)[0] == Status.ACCESS_DENIED
    element = SetVpRegister(RegisterName.RIP, 0, 0, 0, 0).pack()
    assert guest.rep(CallCode.SET_VP_REGISTERS, header, [element])[0] == Status.ACCESS_DENIED
    walk = TranslateVirtualAddress(PARTITION_ID_SELF, 0, 0, 1, 0).pack()
    assert guest.call(CallCode.TRANSLATE_VIRTUAL_ADDRESS, walk, 16)[0] == Status.ACCESS_DENIED


@pytest.mark.parametrize(
    ("privilege", "msr"),
    [
        (Privilege.ACCESS_SYNIC_MSRS, Msr.SIMP),
        (Privilege.ACCESS_SYNIC_MSRS, Msr.SINT0 + 5),
        (Privilege.ACCESS_SYNTHETIC_TIMER_MSRS, Msr.STIMER0_CONFIG),
        (Privilege.ACCESS_HYPERCALL_MSRS, Msr.HYPERCALL),
        (Privilege.ACCESS_VP_INDEX, Msr.VP_INDEX),
        (Privilege.ACCESS_PARTITION_REFERENCE_COUNTER, Msr.TIME_REF_COUNT),
        (Privilege.ACCESS_PARTITION_REFERENCE_TSC, Msr.REFERENCE_TSC),
        (Privilege.ACCESS_APIC_MSRS, Msr.TPR),
        (Privilege.ACCESS_FREQUENCY_MSRS, Msr.TSC_FREQUENCY),
        (Privilege.ACCESS_VP_RUNTIME_MSR, Msr.VP_RUNTIME),
        (Privilege.ACCESS_RESET_MSR, Msr.RESET),
        (Privilege.ACCESS_GUEST_IDLE_MSR, Msr.GUEST_IDLE),
    ],
)
def test_an_msr_without_its_privilege_does_not_exist(hv, privilege, msr):
    has = hv.create_child(hv.root, "has", memory_size=1 << 20, privileges=ROOT_PRIVILEGES).vps[0]
    has.rdmsr(msr)
    lacks = hv.create_child(
        hv.root, "lacks", memory_size=1 << 20, privileges=int(ROOT_PRIVILEGES) & ~privilege
    ).vps[0]
    with pytest.raises(GeneralProtectionFault):
        lacks.rdmsr(msr)
    with pytest.raises(GeneralProtectionFault):
        lacks.wrmsr(msr, 0)


# Naming other partitions


def _naming(partition_id, page=0):
    """Every call that names a partition, with otherwise good parameters."""
    yield CallCode.INITIALIZE_PARTITION, PartitionReference(partition_id).pack()
    yield CallCode.FINALIZE_PARTITION, PartitionReference(partition_id).pack()
    yield CallCode.DELETE_PARTITION, PartitionReference(partition_id).pack()
    yield (
        CallCode.GET_PARTITION_PROPERTY,
        PartitionPropertyInput(partition_id, PartitionProperty.PRIVILEGE_FLAGS, 0).pack(),
    )
    yield (
        CallCode.SET_PARTITION_PROPERTY,
        SetPartitionPropertyInput(partition_id, PartitionProperty.PRIVILEGE_FLAGS, 0, 0).pack(),
    )
    yield CallCode.GET_NEXT_CHILD_PARTITION, NextChild(partition_id, 0).pack()
    yield CallCode.DEPOSIT_MEMORY, PartitionReference(partition_id).pack()
    yield CallCode.WITHDRAW_MEMORY, struct.pack("<QQ", partition_id, 0)
    yield CallCode.GET_MEMORY_BALANCE, struct.pack("<QQ", partition_id, 0)
    yield CallCode.MAP_GPA_PAGES, MapGpaPages(partition_id, 0, MapFlags.READABLE, 0).pack()
    yield CallCode.UNMAP_GPA_PAGES, MapGpaPages(partition_id, 0, 0, 0).pack()
    yield (
        CallCode.INSTALL_INTERCEPT,
        InstallIntercept(partition_id, 1, InterceptType.X64_IO_PORT, 0x60).pack(),
    )
    yield CallCode.CREATE_VP, CreateVp(partition_id, 1, b"", 0, 0, 0, 0).pack()
    yield CallCode.DELETE_VP, VpReference(partition_id, 0, 0, b"").pack()
    yield CallCode.GET_VP_REGISTERS, VpReference(partition_id, 0, 0, b"").pack()
    yield CallCode.SET_VP_REGISTERS, VpReference(partition_id, 0, 0, b"").pack()
    yield CallCode.TRANSLATE_VIRTUAL_ADDRESS, TranslateVirtualAddress(partition_id, 0, 0, 1, 0).pack()
    yield CallCode.READ_GPA, ReadGpa(partition_id, 0, 8, 0, 0).pack()
    yield CallCode.WRITE_GPA, WriteGpa(partition_id, 0, 8, 0, 0, b"").pack()
    yield CallCode.ASSERT_VIRTUAL_INTERRUPT, AssertVirtualInterrupt(partition_id, 0, 0, 0x40, 0, 0, 0).pack()
    yield (
        CallCode.CREATE_PORT,
        CreatePort(partition_id, 5, 0, 0, 0, PARTITION_ID_SELF, PortType.MESSAGE, 0, 2, 0, 0).pack(),
    )
    yield CallCode.CLEAR_VIRTUAL_INTERRUPT, PartitionReference(partition_id).pack()
    yield CallCode.START_VIRTUAL_PROCESSOR, struct.pack("<QI", partition_id, 0)
    yield CallCode.GET_PORT_PROPERTY, GetPortProperty(partition_id, 1, 0, PortProperty.POST_COUNT, 0).pack()
    yield CallCode.DELETE_PORT, PortReference(partition_id, 1, 0).pack()
    yield (
        CallCode.CONNECT_PORT,
        ConnectPort(partition_id, 5, 0, 0, 0, PARTITION_ID_SELF, 1, 0, PortType.MESSAGE, 0, b"", 0).pack(),
    )
    yield CallCode.DISCONNECT_PORT, PortReference(partition_id, 1, 0).pack()
    yield CallCode.GET_VP_INDEX_FROM_APIC_ID, struct.pack("<QQ", partition_id, 0)


def test_every_call_that_names_a_partition_is_covered():
    unnamed = {
        CallCode.CREATE_PARTITION, CallCode.GET_PARTITION_ID, CallCode.POST_MESSAGE, CallCode.SIGNAL_EVENT,
        CallCode.SEND_SYNTHETIC_CLUSTER_IPI, CallCode.FLUSH_VIRTUAL_ADDRESS_SPACE,
        CallCode.SEND_SYNTHETIC_CLUSTER_IPI_EX, CallCode.FLUSH_VIRTUAL_ADDRESS_SPACE_EX,
        CallCode.FLUSH_VIRTUAL_ADDRESS_LIST_EX,
        CallCode.FLUSH_VIRTUAL_ADDRESS_LIST, CallCode.NOTIFY_LONG_SPIN_WAIT, CallCode.EXT_QUERY_CAPABILITIES,
    }  # fmt: skip
    assert {code for code, _ in _naming(0)} == set(CALLS) - unnamed


@pytest.mark.parametrize("whom", ["sibling", "nephew", "nobody"])
def test_partitions_elsewhere_in_the_tree_do_not_exist(family, whom):
    guest, sibling, nephew = family
    ids = {"sibling": sibling.vp.partition.id, "nephew": nephew.vp.partition.id, "nobody": 0xBAD}
    for code, data in _naming(ids[whom]):
        assert _make(guest, code, data) == Status.INVALID_PARTITION_ID, code.name


def test_a_child_cannot_touch_its_parent(hv, family):
    guest = family[0]
    root = hv.root
    RawGuest(root.vps[0])
    before = (root.memory.read(0, 0x8000), root.privileges, len(root.vps), dict(root.ports), root.state)
    for code, data in _naming(root.id):
        assert _make(guest, code, data) == Status.ACCESS_DENIED, code.name
    assert before == (
        root.memory.read(0, 0x8000),
        root.privileges,
        len(root.vps),
        dict(root.ports),
        root.state,
    )
    assert root.vps[0].pop_interrupt() is None


def test_a_partition_is_not_its_own_child(family):
    guest = family[0]
    own = {  # what a partition may do to itself
        CallCode.GET_PARTITION_PROPERTY, CallCode.GET_NEXT_CHILD_PARTITION, CallCode.DEPOSIT_MEMORY,
        CallCode.WITHDRAW_MEMORY, CallCode.GET_MEMORY_BALANCE, CallCode.GET_VP_REGISTERS,
        CallCode.SET_VP_REGISTERS, CallCode.TRANSLATE_VIRTUAL_ADDRESS, CallCode.CREATE_PORT,
        CallCode.DELETE_PORT, CallCode.CONNECT_PORT, CallCode.DISCONNECT_PORT,
        CallCode.GET_VP_INDEX_FROM_APIC_ID, CallCode.GET_PORT_PROPERTY, CallCode.START_VIRTUAL_PROCESSOR,
    }  # fmt: skip
    for code, data in _naming(PARTITION_ID_SELF):
        if code not in own:
            assert _make(guest, code, data) == Status.ACCESS_DENIED, code.name


# Ports and connections


def test_connections_of_another_partition_cannot_be_named(hv, family):
    guest, sibling, _ = family
    got = []
    hv.create_message_port(sibling.vp.partition, 0x10, lambda *message: got.append(message))
    hv.create_event_port(sibling.vp.partition, 0x11, got.append)
    assert guest.post(0x10, 1, b"forged") == Status.INVALID_CONNECTION_ID
    assert guest.signal(0x11) == Status.INVALID_CONNECTION_ID
    assert got == []
    assert sibling.post(0x10, 1, b"own") == Status.SUCCESS
    assert sibling.signal(0x11) == Status.SUCCESS
    assert got == [(0, 1, b"own"), 0]


def test_a_port_for_one_partition_admits_no_other(hv, root, family):
    guest, sibling, _ = family
    theirs = CreatePort(PARTITION_ID_SELF, 8, 0, 0, 0, sibling.vp.partition.id, PortType.MESSAGE, 0, 2, 0, 0)
    assert root.call(CallCode.CREATE_PORT, theirs.pack())[0] == Status.SUCCESS
    link = ConnectPort(PARTITION_ID_SELF, 5, 0, 0, 0, hv.root.id, 8, 0, PortType.MESSAGE, 0, b"", 0).pack()
    assert guest.call(CallCode.CONNECT_PORT, link)[0] == Status.ACCESS_DENIED
    assert sibling.call(CallCode.CONNECT_PORT, link)[0] == Status.SUCCESS
    assert guest.post(5, 1, b"forged") == Status.INVALID_CONNECTION_ID
    assert sibling.post(5, 1, b"own") == Status.SUCCESS
    assert root.take_message(2) == (1, 8, b"own")


def test_a_message_port_takes_no_events_and_the_reverse(hv, guest):
    hv.create_message_port(guest.vp.partition, 1, lambda *message: pytest.fail("delivered"))
    hv.create_event_port(guest.vp.partition, 2, lambda flag: pytest.fail("delivered"))
    assert guest.signal(1) == Status.INVALID_PORT_ID
    assert guest.post(2, 1, b"") == Status.INVALID_PORT_ID


def test_a_flood_through_one_port_leaves_the_others_their_way(hv, root, family):
    """Two children send to the same SINT of their parent, which takes nothing: one floods, the other is heard."""
    guest, sibling, _ = family
    for number, sender in ((1, guest), (2, sibling)):
        partition_id = sender.vp.partition.id
        port = CreatePort(PARTITION_ID_SELF, number, 0, 0, 0, partition_id, PortType.MESSAGE, 0, 2, 0, 0)
        assert root.call(CallCode.CREATE_PORT, port.pack())[0] == Status.SUCCESS
        link = ConnectPort(PARTITION_ID_SELF, 5, 0, 0, 0, hv.root.id, number, 0, PortType.MESSAGE, 0, b"", 0)
        assert sender.call(CallCode.CONNECT_PORT, link.pack())[0] == Status.SUCCESS
    flood = [guest.post(5, 1, b"flood") for _ in range(3 * PORT_BUFFERS)]
    assert flood == [Status.SUCCESS] * (PORT_BUFFERS + 1) + [Status.INSUFFICIENT_BUFFERS] * (
        2 * PORT_BUFFERS - 1
    )
    assert sibling.post(5, 1, b"heard") == Status.SUCCESS
    hv.post_message(hv.root, 0, 2, 1, 0, b"the hypervisor")
    taken = []
    while (message := root.take_message(2)) is not None:
        taken.append(message)
    assert taken == [(1, 1, b"flood")] * (PORT_BUFFERS + 1) + [(1, 2, b"heard"), (1, 0, b"the hypervisor")]
    assert guest.post(5, 1, b"again") == Status.SUCCESS
    assert all(port.waiting == 0 for port in hv.root.ports.values())


def test_nobody_speaks_with_the_hypervisors_voice(hv, guest):
    hv.create_message_port(guest.vp.partition, 1, lambda *message: pytest.fail("delivered"))
    for message_type in (0, 0x8000_0010, 0xFFFF_FFFF):
        assert guest.post(1, message_type, b"") == Status.INVALID_PARAMETER


# Memory


@pytest.mark.parametrize("gpa", [1 << 20, (1 << 20) - 8, 1 << 39, (1 << 64) - 4096, 0xFEE0_0000])
def test_parameter_pages_outside_of_the_partition(hv, guest, gpa):
    hv.create_message_port(guest.vp.partition, 1, lambda *message: pytest.fail("delivered"))
    vp = guest.vp
    vp.partition.privileges |= Privilege.ACCESS_PARTITION_ID
    assert vp.hypercall(CallCode.POST_MESSAGE, gpa, 0) == Status.INVALID_ALIGNMENT
    page = gpa & ~0xFFF if gpa != (1 << 20) - 8 else 1 << 20
    assert vp.hypercall(CallCode.GET_PARTITION_ID, 0, page) == Status.INVALID_ALIGNMENT


def test_parameters_that_are_unaligned_or_cross_a_page(hv, guest):
    hv.create_message_port(guest.vp.partition, 1, lambda *message: pytest.fail("delivered"))
    for gpa in (INPUT + 4, INPUT + 1, INPUT + 4096 - 128):
        assert guest.vp.hypercall(CallCode.POST_MESSAGE, gpa, 0) == Status.INVALID_ALIGNMENT


def test_output_goes_to_writable_pages_only(hv, guest):
    guest.vp.partition.privileges |= Privilege.ACCESS_PARTITION_ID
    guest.memory.protect(OUTPUT, 4096, READ)
    assert guest.vp.hypercall(CallCode.GET_PARTITION_ID, 0, OUTPUT) == Status.INVALID_ALIGNMENT
    assert guest.memory.read(OUTPUT, 8) == bytes(8)
    guest.memory.protect(INPUT, 4096, 0)
    hv.create_message_port(guest.vp.partition, 1, lambda *message: pytest.fail("delivered"))
    assert guest.vp.hypercall(CallCode.POST_MESSAGE, INPUT, 0) == Status.INVALID_ALIGNMENT


@pytest.mark.parametrize(
    "msr",
    [Msr.HYPERCALL, Msr.SIMP, Msr.SIEFP, Msr.VP_ASSIST_PAGE, Msr.REFERENCE_TSC],
    ids=lambda msr: msr.name,
)
def test_hypervisor_pages_outside_of_the_partition(hv, msr):
    child = hv.create_child(hv.root, "reaching", memory_size=1 << 20)
    vp = child.vps[0]
    vp.wrmsr(Msr.GUEST_OS_ID, OS_ID)
    child.memory.protect(0x9000, 4096, READ)
    for gpa in (1 << 20, 1 << 39, (1 << 64) - 4096, 0x9000):
        with pytest.raises(GeneralProtectionFault):
            vp.wrmsr(msr, gpa | 1)
        assert vp.rdmsr(msr) & 1 == 0
    vp.wrmsr(msr, 0xA000 | 1)
    assert vp.rdmsr(msr) == 0xA001


def test_rights_are_never_more_than_the_givers(hv, family):
    guest, _, _ = family
    partition = guest.vp.partition
    child = hv.create_child(partition, "grandchild", memory_size=1 << 20)
    guest.memory.protect(0x8000, 4096, READ)

    def share(flags, page=8):
        header = MapGpaPages(child.id, 0x40, flags, 0).pack()
        return guest.rep(CallCode.MAP_GPA_PAGES, header, [page.to_bytes(8, "little")])[0]

    assert share(MapFlags.READABLE | MapFlags.WRITABLE) == Status.ACCESS_DENIED
    assert share(MapFlags.READABLE | MapFlags.USER_EXECUTABLE) == Status.ACCESS_DENIED
    assert share(MapFlags.WRITABLE) == Status.INVALID_PARAMETER
    assert share(MapFlags.READABLE) == Status.SUCCESS
    with pytest.raises(GuestMemoryError):
        child.memory.write(0x4_0000, b"x")
    guest.memory.unmap(0x8000, 4096)
    assert share(MapFlags.READABLE) == Status.ACCESS_DENIED
    assert share(MapFlags.READABLE, page=1 << 40) == Status.INVALID_PARAMETER


def test_privileges_are_never_more_than_the_givers(hv):
    middle = hv.create_child(
        hv.root,
        "middle",
        memory_size=1 << 20,
        privileges=Privilege.CREATE_PARTITIONS
        | Privilege.ACCESS_HYPERCALL_MSRS
        | Privilege.ACCESS_SYNIC_MSRS,
    )
    guest = RawGuest(middle.vps[0])
    child = hv.create_child(middle, "below", memory_size=1 << 20)

    def grant(value):
        call = SetPartitionPropertyInput(child.id, PartitionProperty.PRIVILEGE_FLAGS, 0, value)
        return guest.call(CallCode.SET_PARTITION_PROPERTY, call.pack())[0]

    before = child.privileges
    assert grant(Privilege.POST_MESSAGES) == Status.ACCESS_DENIED
    assert child.privileges == before
    assert grant(Privilege.ACCESS_SYNIC_MSRS) == Status.SUCCESS
    assert child.privileges == Privilege.ACCESS_SYNIC_MSRS


def test_a_page_that_was_taken_back_is_gone_for_the_hypervisor_too(hv, root):
    """A SIM page must not keep writing into what its parent maps there afterwards."""
    child = hv.create_child(hv.root, "evicted", memory_size=1 << 20)
    guest = RawGuest(child.vps[0])
    assert child.memory.access(guest.base + 0x4000) & WRITE
    root.memory.write(0x10_0000, b"the root's own")
    header = MapGpaPages(child.id, 4, MapFlags.READABLE, 0).pack()
    assert root.rep(CallCode.MAP_GPA_PAGES, header, [(0x100).to_bytes(8, "little")])[0] == Status.SUCCESS
    with pytest.raises(HypercallError, match="0x0018"):  # INVALID_SYNIC_STATE
        hv.post_message(child, 0, 2, 1, 0, b"overwritten?" * 20)
    assert root.memory.read(0x10_0000, 16) == b"the root's own\0\0"


# Trouble stays at home


def test_a_providers_refusal_is_an_event_about_the_child(hv, guest):
    events = []
    guest.vp.partition.on_event = events.append

    def refuse(*message):
        raise RemoteProtocolError("nonsense")

    hv.create_message_port(guest.vp.partition, 1, refuse)
    hv.create_event_port(guest.vp.partition, 2, refuse)
    assert guest.post(1, 1, b"nonsense") == Status.SUCCESS
    assert guest.signal(2) == Status.SUCCESS
    assert [event.kind for event in events] == ["provider-error"] * 2
    assert all(isinstance(event.detail, RemoteProtocolError) for event in events)
    assert guest.vp.partition.provider_errors == 2


def test_a_crash_is_an_event_about_the_child(hv, guest):
    events = []
    guest.vp.partition.on_event = events.append
    guest.memory.write(0x8000, b"kernel panic")
    for index, value in enumerate((0xDEAD, 2, 3, 0x8000, 12)):
        guest.vp.wrmsr(Msr.CRASH_P0 + index, value)
    guest.vp.wrmsr(Msr.CRASH_CTL, 3 << 62)
    assert [event.kind for event in events] == ["crash"]
    assert events[0].detail == ((0xDEAD, 2, 3, 0x8000, 12), b"kernel panic")
    guest.vp.wrmsr(Msr.CRASH_P0 + 3, 1 << 60)
    guest.vp.wrmsr(Msr.CRASH_CTL, 3 << 62)
    assert events[1].detail.message == b""


def test_a_destroyed_partition_answers_nothing(hv, guest):
    partition = guest.vp.partition
    hv.create_message_port(partition, 1, lambda *message: pytest.fail("delivered"))
    partition.destroy()
    with pytest.raises(VpSuspended):
        guest.vp.hypercall(control(CallCode.SIGNAL_EVENT, fast=True), 1, 0)
    with pytest.raises(HypercallError, match="0x000e"):  # INVALID_VP_INDEX
        hv.post_message(partition, 0, 2, 1, 0, b"")

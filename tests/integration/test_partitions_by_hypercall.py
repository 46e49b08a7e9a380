"""A parent that builds, runs and tears down a child with nothing but hypercalls."""

import gc
import struct

import pytest
from reference.descriptors import open_descriptors
from reference.raw_guest import HYPERCALL_GPA, OUTPUT, RawGuest

from vmbus.errors import GuestMemoryError
from vmbus.hypervisor import GeneralProtectionFault, VpSuspended
from vmbus.hypervisor.abi import control
from vmbus.hypervisor.tlfs import (
    PARTITION_ID_SELF,
    CallCode,
    InterceptType,
    MapFlags,
    MessageType,
    Msr,
    PartitionProperty,
    PartitionState,
    PortType,
    Privilege,
    RegisterName,
    Status,
    TranslateFlags,
    TranslateResult,
)
from vmbus.hypervisor.translate import Access
from vmbus.hypervisor.wire import (
    ConnectPort,
    CpuidInterceptMessage,
    CreatePartition,
    CreatePort,
    CreateVp,
    InstallIntercept,
    IoPortInterceptMessage,
    MapGpaPages,
    MemoryBalance,
    MsrInterceptMessage,
    PartitionReference,
    PortReference,
    SetVpRegister,
    TranslateVirtualAddress,
    TranslateVirtualAddressOutput,
    VpReference,
)

RWX = MapFlags.READABLE | MapFlags.WRITABLE | MapFlags.KERNEL_EXECUTABLE
POOL = 0x10_0000  # where the root keeps pages to deposit
GUEST_RAM = 0x20_0000  # where the root keeps the child's pages


def q(*values):
    return struct.pack(f"<{len(values)}Q", *values)


def create(root):
    status, out = root.call(CallCode.CREATE_PARTITION, CreatePartition(0, 0, 0, 0, b"", 0, 0).pack(), 8)
    assert status == Status.SUCCESS
    return int.from_bytes(out, "little")


def deposit(root, child_id, first, count):
    pages = [q((POOL >> 12) + n) for n in range(first, first + count)]
    return root.rep(CallCode.DEPOSIT_MEMORY, q(child_id), pages)[:2]


def running(root, *, pages=16):
    """A child made by hypercall, with one processor and `pages` pages of the root's memory."""
    child_id = create(root)
    assert deposit(root, child_id, 0, 6) == (Status.SUCCESS, 6)
    assert root.call(CallCode.INITIALIZE_PARTITION, q(child_id))[0] == Status.SUCCESS
    header = MapGpaPages(child_id, 0, RWX, 0).pack()
    sources = [q((GUEST_RAM >> 12) + n) for n in range(pages)]
    assert root.rep(CallCode.MAP_GPA_PAGES, header, sources)[:2] == (Status.SUCCESS, pages)
    assert root.call(CallCode.CREATE_VP, CreateVp(child_id, 0, b"", 0, 0, 0, 0).pack())[0] == Status.SUCCESS
    return root.vp.partition.hypervisor.partitions[child_id]


def balance(root, child_id):
    status, out = root.call(CallCode.GET_MEMORY_BALANCE, q(child_id, 0), 16)
    assert status == Status.SUCCESS
    found = MemoryBalance.unpack(out)
    return found.pages_available, found.pages_in_use


def set_registers(root, child, *pairs):
    elements = [SetVpRegister(name, 0, 0, value & (1 << 64) - 1, value >> 64).pack() for name, value in pairs]
    header = VpReference(child.id, 0, 0, b"").pack()
    return root.rep(CallCode.SET_VP_REGISTERS, header, elements)[:2]


def get_registers(root, child, *names):
    header = VpReference(child.id, 0, 0, b"").pack()
    elements = [name.to_bytes(4, "little") for name in names]
    status, done, out = root.rep(CallCode.GET_VP_REGISTERS, header, elements, output=16 * len(names))
    return status, [int.from_bytes(out[16 * n : 16 * n + 16], "little") for n in range(done)]


def test_from_creation_to_deletion(hv, root):
    child_id = create(root)
    child = hv.partitions[child_id]
    assert child.state is PartitionState.CREATED
    # Nothing can be done with it before it is initialised, and that takes memory.
    assert root.call(CallCode.CREATE_VP, CreateVp(child_id, 0, b"", 0, 0, 0, 0).pack())[0] == (
        Status.INVALID_PARTITION_STATE
    )
    assert root.call(CallCode.INITIALIZE_PARTITION, q(child_id))[0] == Status.INSUFFICIENT_MEMORY
    assert deposit(root, child_id, 0, 7) == (Status.SUCCESS, 7)
    with pytest.raises(GuestMemoryError):
        root.memory.read(POOL, 1)  # deposited pages are out of the depositor's reach
    assert root.call(CallCode.INITIALIZE_PARTITION, q(child_id))[0] == Status.SUCCESS
    assert root.call(CallCode.INITIALIZE_PARTITION, q(child_id))[0] == Status.INVALID_PARTITION_STATE
    assert root.call(CallCode.CREATE_VP, CreateVp(child_id, 0, b"", 0, 0, 0, 0).pack())[0] == Status.SUCCESS
    assert root.call(CallCode.CREATE_VP, CreateVp(child_id, 1, b"", 0, 0, 0, 0).pack())[0] == (
        Status.INSUFFICIENT_MEMORY
    )
    assert balance(root, child_id) == (1, 6)
    assert root.rep(CallCode.WITHDRAW_MEMORY, q(child_id, 0), [], count=3, output=24)[:2] == (
        Status.NO_RESOURCES,
        1,
    )
    assert root.call(CallCode.DELETE_PARTITION, q(child_id))[0] == Status.INVALID_PARTITION_STATE
    assert root.call(CallCode.FINALIZE_PARTITION, q(child_id))[0] == Status.SUCCESS
    assert child.vps == []
    assert root.call(CallCode.DELETE_PARTITION, q(child_id))[0] == Status.SUCCESS
    assert root.call(CallCode.FINALIZE_PARTITION, q(child_id))[0] == Status.INVALID_PARTITION_ID
    for n in range(7):
        assert root.memory.read(POOL + 4096 * n, 1) == b"\0"  # everything came back


def test_children_are_enumerated_in_order(hv, root):
    made = [create(root) for _ in range(3)]
    assert made == sorted(made)
    seen, previous = [], 0
    while True:
        status, out = root.call(CallCode.GET_NEXT_CHILD_PARTITION, q(PARTITION_ID_SELF, previous), 8)
        assert status == Status.SUCCESS
        previous = int.from_bytes(out, "little")
        if not previous:
            break
        seen.append(previous)
    assert seen == made
    assert root.call(CallCode.GET_PARTITION_ID, b"", 8) == (Status.SUCCESS, q(hv.root.id))


def test_nested_children_share_the_grandparents_page(hv, root):
    child = running(root)
    child.privileges |= Privilege.CREATE_PARTITIONS | Privilege.ACCESS_MEMORY_POOL
    inner = RawGuest(child.vps[0])
    grandchild_id = create(inner)
    grandchild = hv.partitions[grandchild_id]
    assert grandchild.parent is child
    header = MapGpaPages(grandchild_id, 8, MapFlags.READABLE, 0).pack()
    assert inner.rep(CallCode.MAP_GPA_PAGES, header, [q(10)])[:2] == (Status.SUCCESS, 1)
    root.memory.write(GUEST_RAM + 10 * 4096, b"one page, three partitions")
    assert grandchild.memory.read(8 * 4096, 26) == b"one page, three partitions"
    with pytest.raises(GuestMemoryError):
        grandchild.memory.write(8 * 4096, b"x")
    # The root sees its child only: the grandchild is not its to name.
    assert root.call(CallCode.FINALIZE_PARTITION, q(grandchild_id))[0] == Status.INVALID_PARTITION_ID
    child.destroy()
    assert grandchild_id not in hv.partitions


def test_both_translations_through_three_partitions(hv, root):
    """Guest virtual to guest physical by the guest's tables, on to system physical by its ancestors' maps."""
    child = running(root)
    child.privileges |= Privilege.CREATE_PARTITIONS
    grandchild = hv.create_child(child, "grandchild", memory_size=1 << 20)
    header = MapGpaPages(grandchild.id, 8, MapFlags.READABLE, 0).pack()
    assert RawGuest(child.vps[0]).rep(CallCode.MAP_GPA_PAGES, header, [q(10)])[:2] == (Status.SUCCESS, 1)
    for at, entry in ((0x1000, 0x2007), (0x2000, 0x3007), (0x3000, 0x4007), (0x4000 + 7 * 8, 0x8000 | 7)):
        grandchild.memory.write(at, q(entry))
    vp = grandchild.vps[0]
    vp.registers |= {RegisterName.CR0: 1 << 31 | 1, RegisterName.CR3: 0x1000, RegisterName.CR4: 0x20}
    vp.registers[RegisterName.EFER] = 0xD00
    assert vp.translate(0x7123) == 0x8123
    assert vp.translate_to_system(0x7123) == root.memory.backing(GUEST_RAM + 10 * 4096 + 0x123)
    with pytest.raises(GuestMemoryError):
        vp.translate(0x7123, Access(write=True))  # its own tables allow that, its parent's map does not


def test_mapping_and_unmapping_while_it_runs(hv, root):
    child = running(root)
    RawGuest(child.vps[0])
    root.memory.write(GUEST_RAM, b"shared")
    assert child.memory.read(0, 6) == b"shared"
    assert child.vps[0].rdmsr(Msr.SIMP) & 1
    unmap = MapGpaPages(child.id, 0, 0, 0).pack()
    status, done, _ = root.rep(CallCode.UNMAP_GPA_PAGES, unmap, [], count=16)
    assert (status, done) == (Status.SUCCESS, 16)
    with pytest.raises(GuestMemoryError):
        child.memory.read(0, 1)
    # The guest's hypervisor pages went with the memory that they lay in; nothing of them is in the root's page.
    assert child.vps[0].rdmsr(Msr.SIMP) & 1 == 0
    assert root.memory.read(GUEST_RAM + HYPERCALL_GPA, 4) == bytes(4)
    beyond = MapGpaPages(child.id, child.memory.size >> 12, RWX, 0).pack()
    assert root.rep(CallCode.MAP_GPA_PAGES, beyond, [q(GUEST_RAM >> 12)])[:2] == (Status.INVALID_PARAMETER, 0)


def test_rep_calls_stop_at_the_element_that_fails_and_resume_from_any(root):
    child = running(root)
    header = MapGpaPages(child.id, 0x20, RWX, 0).pack()
    good, bad = q(GUEST_RAM >> 12), q(0xFFFF_FFFF)
    assert root.rep(CallCode.MAP_GPA_PAGES, header, [good, good, bad, good])[:2] == (
        Status.INVALID_PARAMETER,
        2,
    )
    assert root.rep(CallCode.MAP_GPA_PAGES, header, [bad, bad, good, good], start=2)[:2] == (
        Status.SUCCESS,
        4,
    )
    assert child.memory.access(0x22_000)
    assert not child.memory.access(0x24_000)


def test_registers(root):
    child = running(root)
    xmm = 0x0123456789ABCDEF_FEDCBA9876543210
    assert set_registers(root, child, (RegisterName.RIP, 0x1234), (RegisterName.XMM0, xmm)) == (
        Status.SUCCESS,
        2,
    )
    names = (RegisterName.RIP, RegisterName.XMM0, RegisterName.RFLAGS, RegisterName.VP_INDEX)
    assert get_registers(root, child, *names) == (Status.SUCCESS, [0x1234, xmm, 2, 0])
    assert get_registers(root, child, RegisterName.RIP, 0xDEAD) == (Status.INVALID_PARAMETER, [0x1234])
    assert set_registers(root, child, (RegisterName.RAX, 1 << 64)) == (Status.INVALID_REGISTER_VALUE, 0)
    assert set_registers(root, child, (RegisterName.CR8, 9)) == (Status.SUCCESS, 1)
    assert child.vps[0].rdmsr(Msr.TPR) == 0x90
    header = VpReference(child.id, 7, 0, b"").pack()
    element = RegisterName.RIP.to_bytes(4, "little")
    assert root.rep(CallCode.GET_VP_REGISTERS, header, [element], output=16)[:2] == (
        Status.INVALID_VP_INDEX,
        0,
    )


def test_registers_in_registers(root):
    """The fast form: input in RDX, R8 and XMM, output in the XMM registers that follow."""
    child = running(root)
    set_registers(root, child, (RegisterName.RAX, 0xABCD), (RegisterName.RBX, 0x1234))
    header = VpReference(child.id, 0, 0, b"").pack()
    names = struct.pack("<II", RegisterName.RAX, RegisterName.RBX)
    rax, out = root.fast(CallCode.GET_VP_REGISTERS, header + names, rep_count=2)
    assert rax == Status.SUCCESS | 2 << 32
    assert [int.from_bytes(out[n : n + 16], "little") for n in (0, 16)] == [0xABCD, 0x1234]
    # Six registers of output do not fit behind the input.
    names = struct.pack("<6I", *[RegisterName.RAX] * 6)
    assert (
        root.fast(CallCode.GET_VP_REGISTERS, header + names, rep_count=6)[0] == Status.INVALID_HYPERCALL_INPUT
    )


def test_translate_virtual_address(root):
    child = running(root)
    for at, entry in ((0x6000, 0x7007), (0x7000, 0x8007), (0x8000, 0x9007), (0x9000 + 5 * 8, 0x3000 | 5)):
        child.memory.write(at, q(entry))

    def translate(page, flags):
        data = TranslateVirtualAddress(child.id, 0, 0, flags, page).pack()
        status, out = root.call(CallCode.TRANSLATE_VIRTUAL_ADDRESS, data, 16)
        assert status == Status.SUCCESS
        found = TranslateVirtualAddressOutput.unpack(out)
        return found.result_code, found.gpa_page

    registers = (
        (RegisterName.CR0, 1 << 31 | 1 << 16 | 1),
        (RegisterName.CR3, 0x6000),
        (RegisterName.CR4, 0x20),
    )
    assert set_registers(root, child, *registers, (RegisterName.EFER, 0xD00)) == (Status.SUCCESS, 4)
    read = TranslateFlags.VALIDATE_READ
    assert translate(5, read) == (TranslateResult.SUCCESS, 3)
    assert translate(6, read)[0] == TranslateResult.PAGE_NOT_PRESENT
    assert translate(5, read | TranslateFlags.VALIDATE_WRITE)[0] == TranslateResult.PRIVILEGE_VIOLATION
    root.rep(CallCode.UNMAP_GPA_PAGES, MapGpaPages(child.id, 3, 0, 0).pack(), [], count=1)
    assert translate(5, read) == (TranslateResult.GPA_UNMAPPED, 3)


def test_reading_and_writing_a_childs_memory(root):
    child = running(root)
    write = struct.pack("<QIIQQ16s", child.id, 0, 5, 0x5FF8, 0, b"bytes")
    assert root.call(CallCode.WRITE_GPA, write, 8) == (Status.SUCCESS, q(TranslateResult.SUCCESS))
    read = struct.pack("<QIIQQ", child.id, 0, 5, 0x5FF8, 0)
    assert root.call(CallCode.READ_GPA, read, 24) == (Status.SUCCESS, q(0) + b"bytes".ljust(16, b"\0"))
    nowhere = struct.pack("<QIIQQ", child.id, 0, 5, 0x5_0000, 0)
    assert root.call(CallCode.READ_GPA, nowhere, 24)[1][:8] == q(TranslateResult.GPA_UNMAPPED)
    crossing = struct.pack("<QIIQQ", child.id, 0, 16, 0x5FF8, 0)
    assert root.call(CallCode.READ_GPA, crossing, 24)[0] == Status.INVALID_PARAMETER


def test_ports_between_parent_and_child(hv, root):
    child = running(root)
    child.privileges |= Privilege.CREATE_PORT
    inner = RawGuest(child.vps[0])
    port = CreatePort(PARTITION_ID_SELF, 9, 0, 0, 0, child.id, PortType.MESSAGE, 0, 2, 0, 0)
    assert root.call(CallCode.CREATE_PORT, port.pack())[0] == Status.SUCCESS
    assert root.call(CallCode.CREATE_PORT, port.pack())[0] == Status.INVALID_PORT_ID
    link = ConnectPort(child.id, 0x77, 0, 0, 0, PARTITION_ID_SELF, 9, 0, PortType.MESSAGE, 0, b"", 0)
    assert root.call(CallCode.CONNECT_PORT, link.pack())[0] == Status.SUCCESS
    assert inner.post(0x77, 5, b"up") == Status.SUCCESS
    assert root.take_message(2) == (5, 9, b"up")
    assert root.take_interrupts() == [0xF3]
    # And down, as events: flags 100-109 of SINT2.
    down = CreatePort(PARTITION_ID_SELF, 3, 0, 0, 0, hv.root.id, PortType.EVENT, 0, 2, 100 | 10 << 16, 0)
    assert inner.call(CallCode.CREATE_PORT, down.pack())[0] == Status.SUCCESS
    link = ConnectPort(PARTITION_ID_SELF, 0x78, 0, 0, 0, child.id, 3, 0, PortType.EVENT, 0, b"", 0)
    assert root.call(CallCode.CONNECT_PORT, link.pack())[0] == Status.SUCCESS
    assert root.signal(0x78, 4) == Status.SUCCESS
    assert root.signal(0x78, 10) == Status.INVALID_PARAMETER
    assert inner.take_flags(2) == [104]
    assert root.call(CallCode.DELETE_PORT, PortReference(PARTITION_ID_SELF, 9, 0).pack())[0] == Status.SUCCESS
    assert inner.post(0x77, 5, b"up") == Status.INVALID_PORT_ID
    gone = PortReference(child.id, 0x77, 0).pack()
    assert root.call(CallCode.DISCONNECT_PORT, gone)[0] == Status.SUCCESS
    assert inner.post(0x77, 5, b"up") == Status.INVALID_CONNECTION_ID


def test_intercepts_answered_in_place(root):
    """The parent's message handler emulates the access before the child's processor goes on."""
    child = running(root)
    install = InstallIntercept(child.id, 3, InterceptType.X64_IO_PORT, 0x1F7).pack()
    assert root.call(CallCode.INSTALL_INTERCEPT, install)[0] == Status.SUCCESS
    seen = []

    def handler(vector):
        kind, sender, payload = root.take_message(0)
        assert (kind, sender) == (MessageType.X64_IO_PORT_INTERCEPT, child.id)
        message = IoPortInterceptMessage.unpack(payload)
        seen.append((message.header.access_type, message.port_number, message.access_info, message.rax))
        answer = (RegisterName.RAX, 0x50), (RegisterName.INTERCEPT_SUSPEND, 0)
        assert set_registers(root, child, *answer) == (Status.SUCCESS, 2)
        root.vp.wrmsr(Msr.EOI, 0)

    root.vp.interrupt_handler = handler
    vp = child.vps[0]
    vp.io_write(0x1F7, 1, 0x20)
    assert vp.io_read(0x1F7, 1) == 0x50
    assert vp.io_read(0x1F6, 1) == 0xFF  # not intercepted, no device
    assert vp.io_read_string(0x1F7, 1, 2) == b"\x50\x50"  # nor does a string instruction go around it
    vp.io_write_string(0x1F7, 1, b"\x20")
    written, read = (1, 0x1F7, 1, 0x20), (0, 0x1F7, 1, 0x50)
    assert seen == [written, read, read, read, written]


def intercept(root, child, kind, access, parameter):
    data = InstallIntercept(child.id, access, kind, parameter).pack()
    return root.call(CallCode.INSTALL_INTERCEPT, data)[0]


def test_msr_and_cpuid_intercepts(root):
    child = running(root)
    vp = child.vps[0]
    plain = vp.cpuid(0x4000_0002)
    assert intercept(root, child, InterceptType.X64_CPUID, 4, 0x4000_0002) == Status.SUCCESS
    assert intercept(root, child, InterceptType.X64_MSR, 3, 0) == Status.SUCCESS
    seen = []

    def handler(vector):
        kind, _, payload = root.take_message(0)
        if kind == MessageType.X64_CPUID_INTERCEPT:
            message = CpuidInterceptMessage.unpack(payload)
            defaults = message.default_rax, message.default_rbx, message.default_rcx, message.default_rdx
            seen.append((message.rax, message.rcx, defaults))
            registers = (
                (RegisterName.RAX, 1),
                (RegisterName.RBX, 2),
                (RegisterName.RCX, 3),
                (RegisterName.RDX, 4),
            )
        else:
            message = MsrInterceptMessage.unpack(payload)
            seen.append((message.header.access_type, message.msr_number, message.rdx << 32 | message.rax))
            registers = (RegisterName.RAX, 0x89AB_CDEF), (RegisterName.RDX, 0x0123_4567)
        assert (
            set_registers(root, child, *registers, (RegisterName.INTERCEPT_SUSPEND, 0))[0] == Status.SUCCESS
        )
        root.vp.wrmsr(Msr.EOI, 0)

    root.vp.interrupt_handler = handler
    assert vp.cpuid(0x4000_0002, 9) == (1, 2, 3, 4)
    assert vp.rdmsr(0x1234) == 0x0123_4567_89AB_CDEF  # an MSR that nobody else answers
    vp.wrmsr(0x1234, 0xAAAA_BBBB_CCCC_DDDD)
    assert vp.rdmsr(Msr.VP_INDEX) == 0  # the hypervisor's own are not asked about
    assert seen == [
        (0x4000_0002, 9, plain),
        (0, 0x1234, 0),
        (1, 0x1234, 0xAAAA_BBBB_CCCC_DDDD),
    ]
    assert intercept(root, child, InterceptType.X64_CPUID, 0, 0x4000_0002) == Status.SUCCESS
    assert intercept(root, child, InterceptType.X64_MSR, 0, 0) == Status.SUCCESS
    assert vp.cpuid(0x4000_0002, 9) == plain
    with pytest.raises(GeneralProtectionFault):
        vp.rdmsr(0x1234)


def test_intercepts_that_do_not_exist(root):
    child = running(root)
    for kind, access, parameter in (
        (InterceptType.X64_IO_PORT, 1, 0x10000),
        (InterceptType.X64_IO_PORT, 4, 0x60),
        (InterceptType.X64_CPUID, 1, 0),
        (InterceptType.X64_MSR_INDEX, 1, 1 << 32),
        (InterceptType.EXCEPTION, 4, 14),
        (0x77, 1, 0),
    ):
        assert intercept(root, child, kind, access, parameter) == Status.INVALID_PARAMETER


def test_an_unanswered_intercept_suspends_the_processor(root):
    child = running(root)
    install = InstallIntercept(child.id, 1, InterceptType.X64_MSR_INDEX, 0xC001_0015).pack()
    assert root.call(CallCode.INSTALL_INTERCEPT, install)[0] == Status.SUCCESS
    vp = child.vps[0]
    with pytest.raises(VpSuspended):
        vp.rdmsr(0xC001_0015)
    kind, _, payload = root.take_message(0)
    assert kind == MessageType.X64_MSR_INTERCEPT
    assert MsrInterceptMessage.unpack(payload).msr_number == 0xC001_0015
    assert get_registers(root, child, RegisterName.INTERCEPT_SUSPEND) == (Status.SUCCESS, [1])
    with pytest.raises(VpSuspended):
        vp.rdmsr(0xC001_0015)
    assert root.take_message(0) is None  # asked once


def test_control_word_rules(root):
    code = CallCode.GET_PARTITION_ID
    wrong = [
        control(code) | 1 << 27,
        control(code) | 1 << 44,
        control(code) | 1 << 63,
        control(code, rep_count=1),
        control(code, variable=1),
        control(CallCode.MAP_GPA_PAGES),
        control(CallCode.MAP_GPA_PAGES, rep_count=2, rep_start=2),
        control(CallCode.CREATE_PARTITION, fast=True) | 1 << 17,
    ]
    for word in wrong:
        assert root.vp.hypercall(word, 0, OUTPUT) == Status.INVALID_HYPERCALL_INPUT, hex(word)
    for unknown in (0, 0x3F, 0x7FFF, 0xFFFF):
        assert root.vp.hypercall(control(unknown), 0, 0) == Status.INVALID_HYPERCALL_CODE


def test_properties(root, hv):
    child = running(root)

    def get(code):
        status, out = root.call(CallCode.GET_PARTITION_PROPERTY, struct.pack("<QII", child.id, code, 0), 8)
        return status, int.from_bytes(out, "little")

    def put(code, value):
        return root.call(CallCode.SET_PARTITION_PROPERTY, struct.pack("<QIIQ", child.id, code, 0, value))[0]

    assert get(PartitionProperty.CPU_WEIGHT) == (Status.SUCCESS, 100)
    assert put(PartitionProperty.CPU_WEIGHT, 500) == Status.SUCCESS
    assert get(PartitionProperty.CPU_WEIGHT) == (Status.SUCCESS, 500)
    assert put(PartitionProperty.CPU_WEIGHT, 0) == Status.PROPERTY_VALUE_OUT_OF_RANGE
    assert put(PartitionProperty.GUEST_OS_ID, 1) == Status.OPERATION_DENIED
    assert put(0x1234, 1) == get(0x1234)[0] == Status.UNKNOWN_PROPERTY
    assert put(PartitionProperty.PRIVILEGE_FLAGS, Privilege.ACCESS_HYPERCALL_MSRS) == Status.SUCCESS
    assert get(PartitionProperty.PRIVILEGE_FLAGS) == (Status.SUCCESS, Privilege.ACCESS_HYPERCALL_MSRS)
    assert put(PartitionProperty.PRIVILEGE_FLAGS, 1 << 63) == Status.PROPERTY_VALUE_OUT_OF_RANGE
    hv.clock.advance(12_345_600)
    assert get(PartitionProperty.REFERENCE_TIME) == (Status.SUCCESS, 123_456)


def test_a_thousand_rounds_leave_nothing_behind(hv, root):
    gc.collect()  # what earlier tests left for the collector to close is not counted
    before = open_descriptors()
    for _ in range(1000):
        child_id = create(root)
        assert deposit(root, child_id, 0, 2) == (Status.SUCCESS, 2)
        assert root.call(CallCode.INITIALIZE_PARTITION, q(child_id))[0] == Status.SUCCESS
        port = CreatePort(PARTITION_ID_SELF, 9, 0, 0, 0, child_id, PortType.MESSAGE, 0, 2, 0, 0)
        assert root.call(CallCode.CREATE_PORT, port.pack())[0] == Status.SUCCESS
        assert (
            root.call(CallCode.FINALIZE_PARTITION, PartitionReference(child_id).pack())[0] == Status.SUCCESS
        )
        assert root.call(CallCode.DELETE_PARTITION, PartitionReference(child_id).pack())[0] == Status.SUCCESS
    assert set(hv.partitions) == {hv.root.id}
    assert hv.root.ports == {}
    assert hv.root.children == {}
    gc.collect()
    assert open_descriptors() == before

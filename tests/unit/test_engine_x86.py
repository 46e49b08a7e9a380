"""The x86 engine against a virtual processor, and the plain engine protocol."""

import pytest

from vmbus.engine import (
    Cpuid,
    Engine,
    Halt,
    Hypercall,
    InterruptWindow,
    IoPort,
    Limit,
    Mmio,
    Rdmsr,
    Wrmsr,
    serve,
)
from vmbus.engine.x86 import X86Engine
from vmbus.errors import EngineError
from vmbus.hypervisor import Hypervisor, Partition, VpSuspended
from vmbus.hypervisor.tlfs import Msr

RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
CODE, STACK, IDT, HANDLER = 0x1000, 0x8000, 0x2000, 0x3000
VECTOR = 0x3E


class Recorder:
    """A device that answers with what it has been asked."""

    def __init__(self) -> None:
        self.seen: list[tuple[object, ...]] = []

    def io_read(self, port: int, size: int) -> int:
        self.seen.append(("in", port, size))
        return len(self.seen)

    def io_write(self, port: int, size: int, value: int) -> None:
        self.seen.append(("out", port, size, value))

    def mmio_read(self, offset: int, size: int) -> int:
        self.seen.append(("load", offset, size))
        return 0x1234

    def mmio_write(self, offset: int, size: int, value: int) -> None:
        self.seen.append(("store", offset, size, value))


@pytest.fixture
def child() -> Partition:
    hv = Hypervisor()
    hv.create_root(name="root")
    return hv.create_child(hv.root, name="c0", memory_size=1 << 20, vps=1)


def start(child: Partition, code: str, **options: int) -> X86Engine:
    engine = X86Engine(child.vps[0], **options)
    child.memory.write(CODE, bytes.fromhex(code))
    engine.cpu.rip = CODE
    engine.cpu.set_register(RSP, STACK)
    return engine


def handle(engine: X86Engine, vector: int, code: str) -> None:
    gate = (HANDLER & 0xFFFF) | 0x10 << 16 | 0x8E << 40
    engine.vp.partition.memory.write(IDT + 16 * vector, gate.to_bytes(16, "little"))
    engine.vp.partition.memory.write(HANDLER, bytes.fromhex(code))
    engine.cpu.idt = (IDT, 0xFFF)


def test_exits_reach_devices_and_are_counted(child: Partition) -> None:
    device = Recorder()
    child.devices.add_ports(0x70, 2, device)
    child.devices.add_mmio(0x10000000, 0x1000, device)
    engine = start(child, "e4 71 66 e7 70 8b 0c 25 08 00 00 10 88 0c 25 09 00 00 10 f4")
    assert engine.execute() == Halt(False)
    assert device.seen == [
        ("in", 0x71, 1),
        ("out", 0x70, 2, 1),
        ("load", 8, 4),
        ("store", 9, 1, 0x34),
    ]
    account = child.account
    assert account.exits == {"io_port": 2, "mmio": 2, "halt": 1}
    assert account.instructions == 5


@pytest.mark.parametrize(("elements", "exits"), [(1024, 1), (1, 20)])
def test_a_string_instruction_counts_as_the_intercepts_it_makes(
    child: Partition, elements: int, exits: int
) -> None:
    device = Recorder()
    child.devices.add_ports(0x70, 1, device)
    engine = start(child, "f3 66 6d f4", string_elements=elements)
    engine.cpu.set_register(RCX, 20)
    engine.cpu.set_register(RDX, 0x70)
    engine.cpu.set_register(RDI, 0x4000)
    engine.execute()
    assert child.memory.view(0x4000, 40).cast("H").tolist() == list(range(1, 21))
    assert child.account.exits["io_port"] == exits
    assert child.account.instructions == 2


def test_cpuid_and_msrs_are_those_of_the_processor(child: Partition) -> None:
    engine = start(child, "b8 00 00 00 40 0f a2 f4")
    engine.execute()
    vendor = b"".join(engine.cpu.register(r).to_bytes(4, "little") for r in (RBX, RCX, RDX))
    assert vendor == b"Microsoft Hv"
    engine = start(child, "b9 02 00 00 40 0f 32 f4")  # HV_X64_MSR_VP_INDEX
    engine.execute()
    assert engine.cpu.register(RAX) == 0
    assert child.account.exits["rdmsr"] == 1


def test_faults_of_the_processor_reach_the_guest(child: Partition) -> None:
    engine = start(child, "b9 ff ff ff 7f 0f 32 f4")
    with pytest.raises(EngineError, match="#GP at 0x1005"):
        engine.execute()
    engine = start(child, "b9 ff ff ff 7f 0f 32 f4")
    handle(engine, 13, "f4")
    assert engine.execute() == Halt(False)
    assert engine.cpu.rip == HANDLER + 1
    engine = start(child, "0f 01 c1 f4")  # hypercalls are not enabled yet
    handle(engine, 6, "90 f4")
    engine.execute()
    assert engine.cpu.rip == HANDLER + 2


def test_interrupts_wake_a_halted_guest(child: Partition) -> None:
    engine = start(child, "fb f4 fa f4")
    handle(engine, VECTOR, "c7 04 25 b0 00 e0 fe 00 00 00 00 ff c0 48 cf")  # EOI; inc eax; iretq
    assert engine.execute() == Halt(True)
    child.vps[0].request_interrupt(VECTOR)
    assert engine.execute() == Halt(False)
    assert engine.cpu.register(RAX) == 1
    assert child.account.interrupts[VECTOR] == 1
    assert child.account.exits == {"halt": 2, "mmio": 1}


def test_an_interrupt_raised_by_an_exit_comes_when_the_guest_allows_it(child: Partition) -> None:
    class Raiser(Recorder):
        def io_write(self, port: int, size: int, value: int) -> None:
            child.vps[0].request_interrupt(VECTOR)

    child.devices.add_ports(0x70, 1, Raiser())
    engine = start(child, "e6 70 ff c3 fb 90 fa f4")  # out; inc ebx; sti; nop; cli; hlt
    handle(engine, VECTOR, "89 d9 c7 04 25 b0 00 e0 fe 00 00 00 00 48 cf")  # mov ecx, ebx; EOI; iretq
    assert engine.execute() == Halt(False)
    assert engine.cpu.register(RCX) == 1


def test_an_nmi_comes_with_interrupts_off_and_masks_others_until_iret(child: Partition) -> None:
    vp = child.vps[0]
    written: list[int] = []

    class Raiser(Recorder):
        def io_write(self, port: int, size: int, value: int) -> None:
            written.append(value)
            if value == 1:
                vp.request_nmi()

    child.devices.add_ports(0x80, 1, Raiser())
    # cli; out 1, which raises an NMI; out 4; hlt. The handler: in its first round out 1, too; out 2; out 3; iretq
    engine = start(child, "fa b0 01 e6 80 b0 04 e6 80 f4")
    code = (
        "50 ff 04 25 00 90 00 00 83 3c 25 00 90 00 00 01 75 04 b0 01 e6 80 b0 02 e6 80 b0 03 e6 80 58 48 cf"
    )
    handle(engine, 2, code)
    assert engine.execute() == Halt(interruptible=False)
    assert written == [1, 1, 2, 3, 2, 3, 4]
    assert vp.account.interrupts[2] == 2
    assert not vp.nmi_pending


def test_a_suspended_processor_goes_on_where_it_was(child: Partition) -> None:
    vp = child.vps[0]
    device = Recorder()
    child.devices.add_ports(0x80, 1, device)
    engine = start(child, "e480 e680 e480 e680 f4")  # IN, OUT, IN, OUT, HLT
    answer = device.io_read

    def suspend_at_first(port: int, size: int) -> int:
        vp.suspend(len(device.seen) == 0)
        return answer(port, size)

    device.io_read = suspend_at_first  # type: ignore[method-assign]
    with pytest.raises(VpSuspended):
        engine.execute()
    assert device.seen == [("in", 0x80, 1)]
    with pytest.raises(VpSuspended):
        engine.execute()
    vp.suspend(False)
    assert engine.execute() == Halt(interruptible=False)
    assert device.seen == [("in", 0x80, 1), ("out", 0x80, 1, 1), ("in", 0x80, 1), ("out", 0x80, 1, 3)]


def test_the_limit_ends_endless_code(child: Partition) -> None:
    engine = start(child, "eb fe")
    assert engine.execute(3_000_000) == Limit(3_000_000)
    assert child.account.instructions == 3_000_000


@pytest.mark.parametrize(
    "code",
    ["f3 6c", "f3 6e", "f3 aa", "f3 a4"],
    ids=["rep insb", "rep outsb", "rep stosb where no memory is", "rep movsb where no memory is"],
)
def test_the_limit_ends_an_endless_instruction(child: Partition, code: str) -> None:
    child.devices.add_ports(0x80, 1, Recorder())
    engine = start(child, code, string_elements=1)
    for register, value in ((RCX, 2**64 - 1), (RDX, 0x80), (RDI, 0x8000_0000), (RSI, 0x9000_0000)):
        engine.cpu.set_register(register, value)
    assert isinstance(engine.execute(1000), Limit)
    exits = child.account.exits
    assert 900 <= exits["io_port"] + exits["mmio"] <= 1000
    assert engine.cpu.rip == CODE
    assert engine.cpu.register(RCX) > 2**63
    engine.execute(1000)  # it goes on where it was
    assert exits["io_port"] + exits["mmio"] >= 1900


def test_the_plain_engine_names_its_exits(child: Partition) -> None:
    engine = start(
        child,
        "e6 70 66 e5 70 f3 6e a1 00 00 00 00 01 00 00 00 0f 32 0f 30 0f a2 0f 01 d9 fb 90 f4",
        string_elements=4,
    )
    plain: Engine = engine
    assert plain.run() == IoPort(0x70, 1, True, 0)
    plain.complete()
    assert plain.run() == IoPort(0x70, 2, False)
    plain.complete(0x0203)
    engine.cpu.set_register(RCX, 3)
    engine.cpu.set_register(RSI, CODE)
    assert plain.run() == IoPort(0, 1, True, 0, 3, b"\xe6\x70\x66", True)
    plain.complete()
    assert plain.run() == Mmio(1 << 32, 4, False)
    plain.complete(5)
    assert plain.run() == Rdmsr(0)
    plain.complete(7)
    assert plain.run() == Wrmsr(0, 7)
    plain.complete()
    assert plain.run() == Cpuid(7, 0)
    plain.complete((1, 2, 3, 4))
    assert plain.run() == Hypercall(3, 4, 0)
    plain.complete(9)
    assert not plain.inject(VECTOR)
    assert plain.run() == InterruptWindow()
    assert plain.run() == Halt(True)
    assert plain.instructions == 11
    assert plain.run(0) == Limit(0)


def test_hypercalls_of_protected_mode(child: Partition) -> None:
    """Their parameters come in register pairs, EDX:EAX, EBX:ECX and EDI:ESI; the result goes to EDX:EAX."""
    engine = start(child, "0f 01 c1 f4", bits=32)
    for register, value in ((RAX, 1), (RDX, 2), (RCX, 3), (RBX, 4), (RSI, 5), (RDI, 6)):
        engine.cpu.set_register(register, value)
    assert engine.run() == Hypercall(2 << 32 | 1, 4 << 32 | 3, 6 << 32 | 5)
    engine.complete(0x0000_0003_0000_0005)
    assert (engine.cpu.register(RDX), engine.cpu.register(RAX)) == (3, 5)
    assert engine.run() == Halt(False)
    vp = child.vps[0]
    vp.wrmsr(Msr.GUEST_OS_ID, 1)
    vp.wrmsr(Msr.HYPERCALL, 0x9000 | 1)
    rung = []
    child.hypervisor.create_event_port(child, 0x2001, rung.append)
    # What a 32-bit driver does to signal an event: a call into the hypercall page.
    engine = start(child, "b8 5d 00 01 00 31 d2 b9 01 20 00 00 31 db bf 00 90 00 00 ff d7 f4", bits=32)
    engine.execute()
    assert rung == [0]
    assert (engine.cpu.register(RDX), engine.cpu.register(RAX)) == (0, 0)


def test_serve_answers_with_the_processor(child: Partition) -> None:
    device = Recorder()
    child.devices.add_ports(0x70, 2, device)
    engine = start(child, "e4 71 e6 70 f3 6c f3 6e b9 02 00 00 40 0f 32 0f a2 f4")
    engine.cpu.set_register(RCX, 2)
    engine.cpu.set_register(RDX, 0x70)
    engine.cpu.set_register(RDI, 0x4000)
    while serve(engine, child.vps[0], exit := engine.run()):
        pass
    assert exit == Halt(False)
    assert [seen[0] for seen in device.seen] == ["in", "out", "in", "in"]
    assert child.account.exits == {"io_port": 3, "rdmsr": 1, "cpuid": 1}

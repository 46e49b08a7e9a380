"""Every hypercall in both forms: twins make the same calls, through pages and in registers, with the same answers."""

import random

import pytest
from reference.raw_guest import INPUT, OUTPUT, RawGuest

from vmbus.hypervisor import Hypervisor, VirtualClock
from vmbus.hypervisor.abi import RepCall, control
from vmbus.hypervisor.faults import UndefinedOpcodeFault
from vmbus.hypervisor.hypercalls import CALLS
from vmbus.hypervisor.personality import SERVER_2008_R2
from vmbus.hypervisor.tlfs import PARTITION_ID_SELF, CallCode, RegisterName, Status

REGISTERS = 16 + 96
"""Bytes that the general-purpose and the XMM registers carry, input and output together."""
STEPS = 4000
BASE = 0x8_0000
"""Where the callers' own pages lie: behind those that the calls below give away."""


class Twin:
    """A root with two children, and all the privileges."""

    def __init__(self):
        self.hv = Hypervisor(clock=VirtualClock())
        root = self.hv.create_root(memory_size=1 << 20)
        self.guest = RawGuest(root.vps[0], base=BASE)
        for name in ("one", "two"):
            child = self.hv.create_child(root, name, memory_size=1 << 18, vps=2)
            RawGuest(child.vps[0])
        self.hv.create_message_port(root, 1, lambda *message: None)
        self.hv.create_event_port(root, 2, lambda flag: None)

    def make(self, fast, word, data, size):
        """(RAX, output) of a call; what lies in memory is the same in both forms."""
        memory, vp = self.guest.memory, self.guest.vp
        memory.write(BASE + INPUT, data.ljust(256, b"\0"))
        memory.write(BASE + OUTPUT, bytes(256))
        if not fast:
            result = vp.hypercall(word, BASE + INPUT, BASE + OUTPUT)
            output = memory.read(BASE + OUTPUT, size) if size else b""
            memory.write(BASE + OUTPUT, bytes(256))
            return result, output
        vp.fast_output = b""
        data = data.ljust(REGISTERS, b"\0")
        first, second = int.from_bytes(data[:8], "little"), int.from_bytes(data[8:16], "little")
        result = vp.hypercall(word | 1 << 16, first, second, data[16:])
        return result, vp.fast_output.ljust(size, b"\0")

    def shape(self):
        return [
            (
                p.id, p.state, p.privileges, len(p.vps), sorted(p.ports), sorted(p.connections), p.pool.available,
                p.properties, [(vp.apic.irr, vp.suspended, vp.started, dict(vp.registers)) for vp in p.vps],
            )
            for p in self.hv.partitions.values()
        ]  # fmt: skip


def sizes(call, count):
    """Input and output bytes of a call."""
    if isinstance(call, RepCall):
        return call.header_size + count * call.element_size, count * call.output_element_size
    return call.input_size, call.output_size


def fits(call, count):
    into, out = sizes(call, count)
    return -(-into // 16) * 16 + out <= REGISTERS if out else into <= REGISTERS


def an_input(rng, ids, size):
    """Mostly a partition first; then small numbers, register names, page numbers, noise."""
    if rng.random() < 0.2:
        return bytes(size)
    words = [rng.choice([PARTITION_ID_SELF, *ids])]
    while len(words) * 8 < size:
        words.append(
            rng.choice(
                [
                    0,
                    0,
                    0,
                    1,
                    2,
                    rng.randrange(64),
                    rng.choice(list(RegisterName)),
                    rng.randrange(64) << 32,
                    rng.getrandbits(64),
                    rng.choice(ids),
                ]
            )
        )
    return b"".join(word.to_bytes(8, "little") for word in words)[:size]


@pytest.mark.parametrize("seed", range(3))
def test_both_forms_answer_alike(seed):
    rng = random.Random(seed)
    slow, fast = Twin(), Twin()
    used, succeeded = set(), set()
    for _ in range(STEPS):
        code = rng.choice(sorted(CALLS))
        call = CALLS[code]
        count = rng.choice((1, 1, 2, 3)) if isinstance(call, RepCall) else 0
        if not fits(call, count):
            continue
        into, out = sizes(call, count)
        data = an_input(rng, sorted(slow.hv.partitions), into)
        word = control(code, rep_count=count)
        one, other = slow.make(False, word, data, out), fast.make(True, word, data, out)
        assert one == other, (CallCode(code).name, data.hex(), one, other)
        used.add(code)
        if one[0] & 0xFFFF == Status.SUCCESS:
            succeeded.add(code)
        for twin in (slow, fast):  # a root that suspended itself has nobody to resume it
            for vp in twin.hv.root.vps:
                vp.suspend(False)
    assert slow.shape() == fast.shape()
    assert used == {code for code, call in CALLS.items() if fits(call, 1 if isinstance(call, RepCall) else 0)}
    assert len(succeeded) > len(used) // 2, [CallCode(code).name for code in sorted(used - succeeded)]


def test_xmm_registers_that_cpuid_does_not_offer():
    hv = Hypervisor(clock=VirtualClock())
    vp = RawGuest(
        hv.create_child(hv.create_root(), "old", memory_size=1 << 20, personality=SERVER_2008_R2).vps[0]
    ).vp
    flush = control(CallCode.FLUSH_VIRTUAL_ADDRESS_SPACE, fast=True)
    with pytest.raises(UndefinedOpcodeFault):
        vp.hypercall(flush, 0, 1, bytes(96))
    with pytest.raises(UndefinedOpcodeFault):  # output in registers
        vp.hypercall(
            control(CallCode.GET_VP_INDEX_FROM_APIC_ID, fast=True, rep_count=1), PARTITION_ID_SELF, 0
        )
    # What fits into the two general registers needs nothing.
    assert vp.hypercall(control(CallCode.SEND_SYNTHETIC_CLUSTER_IPI, fast=True), 0x40, 1) == Status.SUCCESS
    hv.root.destroy()


def test_calls_that_do_not_fit_into_registers_are_refused_there():
    twin = Twin()
    large = [code for code, call in CALLS.items() if not fits(call, 1 if isinstance(call, RepCall) else 0)]
    assert CallCode.POST_MESSAGE in large
    assert CallCode.START_VIRTUAL_PROCESSOR in large
    for code in large:
        assert twin.make(True, control(code), bytes(REGISTERS), 0)[0] == Status.INVALID_HYPERCALL_INPUT
    for code, call in CALLS.items():
        if isinstance(call, RepCall):  # too many elements for the registers
            word = control(code, rep_count=200)
            into, out = sizes(call, 200)
            if into > REGISTERS or out > REGISTERS:
                assert twin.make(True, word, bytes(REGISTERS), 0)[0] == Status.INVALID_HYPERCALL_INPUT

"""A guest that does to its processor whatever it likes: nothing leaves its partition, nothing grows, nothing raises.

Seeded; a failure prints the seed to repeat it with ``VMBUS_SEED=… pytest …``.
"""

import contextlib
import random

import pytest
from reference.raw_guest import RawGuest
from reference.seeds import chosen_seed

from vmbus.core.memory import GuestMemory
from vmbus.errors import HypercallError, RemoteProtocolError
from vmbus.hypervisor import (
    GeneralProtectionFault,
    Hypervisor,
    UndefinedOpcodeFault,
    VirtualClock,
    VpSuspended,
)
from vmbus.hypervisor.abi import RepCall, control
from vmbus.hypervisor.hypercalls import CALLS
from vmbus.hypervisor.msrs import MSR_WRITE
from vmbus.hypervisor.personality import ROOT_PRIVILEGES
from vmbus.hypervisor.synic import MESSAGE_QUEUE_LIMIT
from vmbus.hypervisor.tlfs import PARTITION_ID_SELF, Msr, Status

SEED = chosen_seed()
STATUSES = set(map(int, Status))
SIZE = 1 << 18


class Victims:
    """A root, an innocent sibling with known memory, and the attacker."""

    def __init__(self, privileges):
        self.clock = VirtualClock()
        self.hv = Hypervisor(clock=self.clock)
        root = self.hv.create_root(memory_size=SIZE)
        self.root, self.sibling = RawGuest(root.vps[0]), None
        self.sibling = RawGuest(self.hv.create_child(root, "sibling", memory_size=SIZE).vps[0])
        self.attacker = RawGuest(
            self.hv.create_child(root, "attacker", memory_size=SIZE, vps=2, privileges=privileges).vps[0]
        )
        if privileges:
            self.hv.create_child(self.attacker.vp.partition, "below", memory_size=SIZE)
        self.spare = GuestMemory(1 << 14)
        self.messages = 0
        self.statuses = set()
        self.hv.create_message_port(self.sibling.vp.partition, 1, lambda *message: None)
        self.hv.create_message_port(self.attacker.vp.partition, 1, self.take)
        self.hv.create_event_port(self.attacker.vp.partition, 2, self.take)
        self.before = [self.shape(guest) for guest in (self.root, self.sibling)]

    def take(self, *message):
        self.messages += 1
        if self.messages % 3 == 0:
            raise RemoteProtocolError("refused")
        if self.messages % 7 == 0:
            raise HypercallError(Status.INSUFFICIENT_BUFFERS)

    @staticmethod
    def shape(guest):
        partition = guest.vp.partition
        return (
            partition.memory.read(0, SIZE),
            partition.privileges,
            partition.state,
            len(partition.vps),
            sorted(partition.ports),
            sorted(partition.connections),
            guest.vp.apic.irr,
            guest.vp.synic.queued_messages,
            dict(partition.intercepts.ports),
        )

    def check(self):
        assert [self.shape(guest) for guest in (self.root, self.sibling)] == self.before
        vp = self.attacker.vp
        assert vp.synic.queued_messages <= 16 * MESSAGE_QUEUE_LIMIT
        assert len(self.hv.partitions) <= 1024


def random_value(generator):
    choice = generator.randrange(8)
    if choice == 0:
        return generator.randrange(16)
    if choice == 1:
        return 1 << generator.randrange(64)
    if choice == 2:
        return (1 << 64) - 1 - generator.randrange(16)
    if choice == 3:
        return generator.randrange(SIZE + 8192) | generator.randrange(2)
    if choice == 4:
        return generator.randrange(SIZE >> 12) << 12 | 1
    if choice == 5:
        return PARTITION_ID_SELF
    return generator.getrandbits(generator.choice((8, 16, 32, 64)))


def random_input(generator, size):
    data = b""
    while len(data) < size:
        data += random_value(generator).to_bytes(8, "little")[: generator.choice((2, 4, 8, 8))]
    return data[:size]


def one_hypercall(generator, victims):
    attacker = victims.attacker
    code = generator.choice(list(CALLS)) if generator.random() < 0.95 else generator.getrandbits(16)
    call = CALLS.get(code)
    word = control(code, fast=generator.random() < 0.3)
    if isinstance(call, RepCall) or generator.random() < 0.05:
        count = generator.choice((1, 2, 3, 17, 100, 4095))
        word |= count << 32 | (generator.randrange(count) if generator.random() < 0.2 else 0) << 48
    if generator.random() < 0.05:
        word ^= 1 << generator.randrange(64)
    first, second = attacker.base + 0x2000, attacker.base + 0x3000
    if generator.random() < 0.3:
        first, second = random_value(generator), random_value(generator)
    if attacker.memory.access(0x2000) & 2:
        data = random_input(generator, 512)
        if (
            generator.random() < 0.7
        ):  # most calls begin with a partition, and those that exist are the interesting ones
            named = generator.choice([PARTITION_ID_SELF, *victims.hv.partitions])
            data = named.to_bytes(8, "little") + generator.randrange(4).to_bytes(8, "little") + data[16:]
        attacker.memory.write(0x2000, data)
    try:
        result = attacker.vp.hypercall(word, first, second, random_input(generator, 96))
    except UndefinedOpcodeFault:
        return  # the hypercall page is gone
    except GeneralProtectionFault as fault:
        raise AssertionError("no other exception may come out of a hypercall") from fault
    assert result & 0xFFFF in STATUSES
    victims.statuses.add(result & 0xFFFF)
    assert not result & ~0xFFF_0000_FFFF


def one_msr(generator, victims):
    vp = generator.choice(victims.attacker.vp.partition.vps)
    index = generator.choice(list(MSR_WRITE)) if generator.random() < 0.95 else generator.getrandbits(32)
    if index in (Msr.GUEST_OS_ID, Msr.HYPERCALL) and generator.random() < 0.9:
        return  # these mostly take the hypercall page away, and with it the interesting part
    if generator.random() < 0.7:
        vp.wrmsr(index, random_value(generator))
    else:
        vp.rdmsr(index)


def one_apic_access(generator, victims):
    vp = generator.choice(victims.attacker.vp.partition.vps)
    gpa = 0xFEE0_0000 + generator.randrange(0x1000)
    if generator.random() < 0.7:
        vp.mmio_write(gpa, 4, random_value(generator) & 0xFFFF_FFFF)
    else:
        vp.mmio_read(gpa, 4)


def one_io(generator, victims):
    vp = victims.attacker.vp
    port, size = generator.randrange(0x10000), generator.choice((1, 2, 4))
    vp.io_write(port, size, random_value(generator) & (1 << 8 * size) - 1)
    assert vp.io_read(port, size) == (1 << 8 * size) - 1
    vp.cpuid(random_value(generator) & 0xFFFF_FFFF, 0)


@pytest.mark.parametrize("privileges", [None, ROOT_PRIVILEGES], ids=["ordinary", "all-privileges"])
@pytest.mark.parametrize("round_number", range(3))
def test_whatever_a_guest_does(privileges, round_number):
    seed = SEED + round_number
    print(f"VMBUS_SEED={SEED}")
    generator = random.Random(seed)
    victims = Victims(privileges)
    attacker = victims.attacker.vp
    actions = (one_hypercall, one_hypercall, one_hypercall, one_msr, one_apic_access, one_io)
    for step in range(2500):
        # an MSR or a value that it does not take, or it has suspended itself
        with contextlib.suppress(GeneralProtectionFault, VpSuspended):
            generator.choice(actions)(generator, victims)
        if step % 50 == 0:
            for vp in attacker.partition.vps:
                vp.suspend(False)
            if not attacker.partition.hypercalls_enabled:
                attacker.partition.hypercall_msr = 0
                attacker.wrmsr(Msr.GUEST_OS_ID, 1)
                memory = attacker.partition.memory  # the guest may have given its own pages away
                page = next(gpa for gpa in range(0x1000, memory.size, 0x1000) if memory.access(gpa) & 3 == 3)
                attacker.partition.set_hypercall_page(page | 1)
            for page in (0x2000, 0x3000):
                if attacker.partition.memory.access(page) & 3 != 3:  # deposited: its parent lends it another
                    attacker.partition.release_pages(page, 0x1000)
                    attacker.partition.memory.map(page, victims.spare, page, 0x1000, 7)
            attacker.pop_interrupt()
            assert victims.clock.advance(generator.randrange(2_000_000)) < 10_000
        if step % 500 == 0:
            victims.check()
    victims.check()
    # The fuzz is worth its time only if it gets past the first check.
    assert len(victims.statuses) >= (10 if privileges else 7), victims.statuses
    assert Status.SUCCESS in victims.statuses
    assert victims.sibling.post(1, 1, b"still here") == Status.SUCCESS
    victims.hv.root.destroy()


def test_messages_and_timers_flood_a_guest_that_never_reads():
    victims = Victims(None)
    child = victims.attacker.vp.partition
    refused = 0
    for _ in range(5 * MESSAGE_QUEUE_LIMIT):
        try:
            victims.hv.post_message(child, 0, 2, 1, 0, bytes(240))
        except HypercallError:
            refused += 1
    assert refused == 4 * MESSAGE_QUEUE_LIMIT - 1
    for n in range(4):
        child.vps[0].wrmsr(Msr.STIMER0_COUNT + 2 * n, 1)
        child.vps[0].wrmsr(Msr.STIMER0_CONFIG + 2 * n, 3 | 2 << 16)
    victims.clock.advance(1_000_000_000)
    assert child.vps[0].synic.queued_messages == MESSAGE_QUEUE_LIMIT
    victims.hv.root.destroy()

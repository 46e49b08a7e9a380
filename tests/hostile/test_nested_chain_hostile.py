"""An attacker in the middle of a chain: its parent takes and changes what it has, its children have children.

Everybody acts at random, with processors that were deleted long ago, too. An oracle that knows nothing but which
calls succeeded says who reaches which page with which access, who holds which privilege, port and connection.

Seeded; a failure prints the seed to repeat it with ``VMBUS_SEED=… pytest …``; ``VMBUS_ROUNDS`` asks for more seeds.
"""

import os
import random
import struct

import pytest
from reference.partition_oracle import Entry, Node
from reference.seeds import chosen_seed

from vmbus.core.memory import EXECUTE, READ, WRITE
from vmbus.errors import GuestMemoryError
from vmbus.hypervisor import (
    GeneralProtectionFault,
    Hypervisor,
    UndefinedOpcodeFault,
    VirtualClock,
    VpSuspended,
)
from vmbus.hypervisor.abi import control
from vmbus.hypervisor.personality import ROOT_PRIVILEGES
from vmbus.hypervisor.tlfs import (
    PARTITION_ID_SELF,
    CallCode,
    MapFlags,
    Msr,
    PartitionProperty,
    PortType,
    Privilege,
    RegisterName,
    Status,
)
from vmbus.hypervisor.wire import ConnectPort, CreatePartition, CreatePort, CreateVp, MapGpaPages, VpReference

SEED = chosen_seed()
ROUNDS = int(os.environ.get("VMBUS_ROUNDS", "6"))
STEPS = 600
STATUSES = set(map(int, Status))
PAGE = 4096
PAGES = 64
ALL = READ | WRITE | EXECUTE
RIGHTS = {
    0: 0,
    MapFlags.READABLE: READ,
    MapFlags.READABLE | MapFlags.WRITABLE: READ | WRITE,
    MapFlags.READABLE | MapFlags.WRITABLE | MapFlags.KERNEL_EXECUTABLE: ALL,
}
MOST_PARTITIONS = 14
MOST_ROOT_PAGES = range(16, PAGES)  # what the root lends; below are its own
GONE = 999  # a partition id that nobody has


def q(*values):
    return struct.pack(f"<{len(values)}Q", *values)


class Chain:
    """Root, a bystander, the middle, and whatever they make of that."""

    def __init__(self, generator):
        self.random = generator
        self.clock = VirtualClock()
        self.hv = Hypervisor(clock=self.clock)
        self.root = self.hv.create_root(memory_size=PAGES * PAGE)
        self.oracle = Node(self.root.id, None, int(ROOT_PRIVILEGES), active=True)
        self.own(self.root, self.oracle)
        for name in ("bystander", "middle"):
            child = self.hv.create_child(
                self.root, name, memory_size=PAGES * PAGE, privileges=ROOT_PRIVILEGES, vps=2
            )
            self.own(child, Node(child.id, self.oracle, int(ROOT_PRIVILEGES), active=True))
        self.bystander = self.hv.partitions[2]
        self.bystander.memory.write(0, generator.randbytes(PAGES * PAGE))
        self.ghosts = []
        self.statuses = set()
        self.succeeded = set()
        self.written = set()  # what anybody but the root could write since the last look
        for node in self.nodes():
            self.enable(self.hv.partitions[node.id].vps[0])
        self.look()
        self.still = self.shape()

    @staticmethod
    def own(partition, node):
        for gpa in range(0, PAGES * PAGE, PAGE):
            node.pages[gpa] = Entry(ALL, partition.memory.backing(gpa))

    def nodes(self):
        return list(self.oracle.everybody())

    def node(self, identifier):
        return next((node for node in self.nodes() if node.id == identifier), None)

    # The invariants

    def shape(self):
        partition = self.bystander
        return (
            partition.memory.read(0, PAGES * PAGE),
            partition.privileges,
            partition.state,
            partition.suspended,
            [vp.apic.irr for vp in partition.vps],
            [vp.synic.queued_messages for vp in partition.vps],
            sorted(partition.ports),
            sorted(partition.connections),
        )

    def look(self):
        self.contents = {gpa: self.root.memory.read(gpa, PAGE) for gpa in self.lendable()}
        self.written = self.writable()

    def lendable(self):
        return [page * PAGE for page in MOST_ROOT_PAGES if self.oracle.access(page * PAGE) & READ]

    def writable(self):
        return {
            node.holds(gpa).backing
            for node in self.nodes()
            if node is not self.oracle
            for gpa in list(node.pages)
            if node.access(gpa) & WRITE
        }

    def check(self):
        assert {node.id for node in self.nodes()} == set(self.hv.partitions)
        for node in self.nodes():
            partition = self.hv.partitions[node.id]
            for gpa in range(0, PAGES * PAGE, PAGE):
                assert partition.memory.access(gpa) == node.access(gpa), (node.id, hex(gpa))
                if node.access(gpa):
                    assert partition.memory.backing(gpa) == node.holds(gpa).backing, (node.id, hex(gpa))
                else:
                    with pytest.raises(GuestMemoryError):
                        partition.memory.read(gpa, 1)
            assert partition.privileges == node.privileges
            if node.parent is not None:
                assert not partition.privileges & ~self.hv.partitions[node.parent.id].privileges
            assert set(partition.ports) == set(node.ports)
            assert set(partition.connections) == set(node.connections)
        assert self.shape() == self.still
        for gpa, before in self.contents.items():
            entry = self.oracle.holds(gpa)
            if self.oracle.access(gpa) & READ and entry.backing not in self.written:
                assert self.root.memory.read(gpa, PAGE) == before, f"root's page {gpa:#x} was written"
        self.look()

    # What is done

    def enable(self, vp):
        memory = vp.partition.memory
        pages = [gpa for gpa in range(0x1000, PAGES * PAGE, PAGE) if memory.access(gpa) & 3 == 3]
        if vp.partition is self.root or vp.partition.name == "bystander":
            pages = pages[:3]
        if not pages:
            return
        pick = self.random.choice
        for register, value in (
            (Msr.GUEST_OS_ID, 1),
            (Msr.HYPERCALL, pick(pages) | 1),
            (Msr.SIMP, pick(pages) | 1),
            (Msr.SIEFP, pick(pages) | 1),
            (Msr.SINT0, 0x50),
            (Msr.SINT0 + 2, 0x51),
        ):
            self.write_msr(vp, register, value)

    def write_msr(self, vp, register, value):
        try:
            vp.wrmsr(register, value)
        except (GeneralProtectionFault, VpSuspended):
            return

    def call(self, vp, code, data, *, reps=None):
        """A hypercall in registers: (status, reps done, output)."""
        data = data.ljust(16, b"\0")
        assert len(data) <= 112
        first, second = struct.unpack_from("<QQ", data)
        word = control(code, fast=True, rep_count=reps or 0)
        try:
            result = vp.hypercall(word, first, second, data[16:].ljust(96, b"\0"))
        except (UndefinedOpcodeFault, VpSuspended):
            return None, 0, b""
        assert not vp.deleted, "a hypercall of a processor that is gone"
        status = result & 0xFFFF
        assert status in STATUSES
        self.statuses.add(status)
        if status == Status.SUCCESS:
            self.succeeded.add(code)
        return status, result >> 32 & 0xFFF, vp.fast_output

    def actor(self):
        """A processor that acts: of the middle in half of the cases; sometimes one that is gone."""
        if self.ghosts and self.random.random() < 0.05:
            return self.random.choice(self.ghosts)
        nodes = [node for node in self.nodes() if node.id != self.bystander.id]
        middle = [node for node in nodes if node.parent is self.oracle]
        node = self.random.choice(middle if middle and self.random.random() < 0.4 else nodes)
        vps = self.hv.partitions[node.id].vps
        return self.random.choice(vps) if vps else self.root.vps[0]

    def target(self, actor):
        """Mostly a child, now and then anybody."""
        node = self.node(actor.partition.id)
        if node is not None and node.children and self.random.random() < 0.9:
            children = [i for i in node.children if i != self.bystander.id]
            if children:
                return self.random.choice(children)
        if actor.partition is self.root:  # what the root does to the bystander is the root's affair
            return GONE
        return self.random.choice([GONE, PARTITION_ID_SELF, *self.hv.partitions])

    def page(self, actor):
        first = MOST_ROOT_PAGES.start if actor.partition is self.root else 0
        return (
            self.random.randrange(first, PAGES)
            if self.random.random() < 0.97
            else self.random.getrandbits(52)
        )

    def lost(self, *vps):
        self.ghosts = (self.ghosts + list(vps))[-20:]

    def step(self):
        actor = self.actor()
        self.random.choice(ACTIONS)(self, actor)


def create(chain, actor):
    if len(chain.hv.partitions) >= MOST_PARTITIONS:
        return
    status, _, out = chain.call(
        actor, CallCode.CREATE_PARTITION, CreatePartition(0, 0, 0, 0, b"", 0, 0).pack()
    )
    if status == Status.SUCCESS:
        child = chain.hv.partitions[int.from_bytes(out[-8:], "little")]
        Node(child.id, chain.node(actor.partition.id), child.privileges, active=False)
        assert not child.privileges & ~actor.partition.privileges


def build(chain, actor):
    """A child with everything that it needs, so that it can act too."""
    before = set(chain.hv.partitions)
    create(chain, actor)
    made = set(chain.hv.partitions) - before
    if not made:
        return
    identifier = made.pop()
    node, me = chain.node(identifier), chain.node(actor.partition.id)
    for _ in range(8):
        deposit(chain, actor, identifier)
    initialize(chain, actor, identifier)
    add_vp(chain, actor, identifier)
    give_privileges(chain, actor, identifier, me.privileges)
    for at in range(8):
        have = [gpa for gpa in me.pages if me.access(gpa) == ALL and gpa >= MOST_ROOT_PAGES.start * PAGE]
        if have:
            map_pages(chain, actor, identifier, at, [chain.random.choice(have) // PAGE], 7)
    vps = chain.hv.partitions[node.id].vps
    if vps:
        chain.enable(vps[0])


def initialize(chain, actor, target=None):
    target = chain.target(actor) if target is None else target
    if chain.call(actor, CallCode.INITIALIZE_PARTITION, q(target))[0] == Status.SUCCESS:
        chain.node(target).active = True


def finalize(chain, actor):
    target = chain.target(actor)
    partition = chain.hv.partitions.get(target)
    vps = list(partition.vps) if partition is not None else []
    if chain.call(actor, CallCode.FINALIZE_PARTITION, q(target))[0] == Status.SUCCESS:
        chain.node(target).finalize()
        chain.lost(*vps)


def delete(chain, actor):
    target = chain.target(actor)
    if chain.call(actor, CallCode.DELETE_PARTITION, q(target))[0] == Status.SUCCESS:
        chain.node(target).delete()


def destroy(chain, actor):
    """By the program, at any time; the middle itself seldom."""
    victims = [node for node in chain.nodes() if node.parent is not None and node.id != chain.bystander.id]
    if victims and chain.random.random() < 0.15:
        victim = chain.random.choice(victims)
        partition = chain.hv.partitions[victim.id]
        chain.lost(*partition.vps)
        partition.destroy()
        victim.delete()


def map_pages(chain, actor, target=None, base=None, sources=None, flags=None):
    target = chain.target(actor) if target is None else target
    base = chain.page(actor) if base is None else base
    if sources is None:
        sources = [chain.page(actor) for _ in range(chain.random.choice((1, 1, 2, 5)))]
    flags = chain.random.choice([*RIGHTS, 15, 2]) if flags is None else flags
    header = MapGpaPages(target, base, flags, 0).pack()
    me, node = chain.node(actor.partition.id), chain.node(target)
    _, done, _ = chain.call(
        actor, CallCode.MAP_GPA_PAGES, header + b"".join(q(s) for s in sources), reps=len(sources)
    )
    rights = RIGHTS.get(flags, ALL if flags in (7, 15) else 0)
    for number in range(done):
        me.lend(node, (base + number) * PAGE, sources[number] * PAGE, rights)
        if rights & WRITE:
            chain.written.add(node.holds((base + number) * PAGE).backing)


def unmap(chain, actor):
    target, base, count = chain.target(actor), chain.page(actor), chain.random.choice((1, 1, 2, 5))
    node = chain.node(target)
    header = MapGpaPages(target, base, 0, 0).pack()
    _, done, _ = chain.call(actor, CallCode.UNMAP_GPA_PAGES, header, reps=count)
    for number in range(done):
        node.pages.pop((base + number) * PAGE, None)


def self_or(chain, actor, target):
    return chain.node(actor.partition.id if target == PARTITION_ID_SELF else target)


def deposit(chain, actor, target=None):
    target = chain.target(actor) if target is None else target
    pages = [chain.page(actor) for _ in range(chain.random.choice((1, 1, 3)))]
    _, done, _ = chain.call(
        actor, CallCode.DEPOSIT_MEMORY, q(target) + b"".join(q(p) for p in pages), reps=len(pages)
    )
    for page in pages[:done]:
        chain.node(actor.partition.id).deposit(self_or(chain, actor, target), page * PAGE)


def withdraw(chain, actor):
    target = chain.target(actor)
    _, done, out = chain.call(actor, CallCode.WITHDRAW_MEMORY, q(target, 0), reps=2)
    for number in range(done):
        page = int.from_bytes(out[8 * number :][:8], "little")
        me = chain.node(actor.partition.id)
        me.withdraw(self_or(chain, actor, target), page * PAGE)
        if me.access(page * PAGE):  # what the hypervisor had comes back empty
            chain.written.add(me.holds(page * PAGE).backing)


def give_privileges(chain, actor, target=None, value=None):
    target = chain.target(actor) if target is None else target
    if value is None:
        bits = [int(p) for p in Privilege]
        value = int(ROOT_PRIVILEGES) & ~chain.random.choice(bits) & ~chain.random.choice(bits)
        if chain.random.random() < 0.5:
            value &= actor.partition.privileges
    data = q(target) + struct.pack("<IIQ", PartitionProperty.PRIVILEGE_FLAGS, 0, value)
    if chain.call(actor, CallCode.SET_PARTITION_PROPERTY, data)[0] == Status.SUCCESS:
        node = chain.node(target)
        taken = node.privileges & ~value
        node.privileges = value
        for below in node.everybody():
            below.privileges &= ~taken


def suspend(chain, actor):
    data = q(chain.target(actor)) + struct.pack(
        "<IIQ", PartitionProperty.SUSPEND, 0, chain.random.randrange(2)
    )
    chain.call(actor, CallCode.SET_PARTITION_PROPERTY, data)


def add_vp(chain, actor, target=None):
    target = chain.target(actor) if target is None else target
    partition = chain.hv.partitions.get(target)
    index = len(partition.vps) if partition is not None else 0
    if index < 3:
        chain.call(actor, CallCode.CREATE_VP, CreateVp(target, index, b"", 0, 0, 0, 0).pack())


def delete_vp(chain, actor):
    target = chain.target(actor)
    partition = chain.hv.partitions.get(target)
    vps = list(partition.vps) if partition is not None else []
    data = VpReference(target, len(vps) - 1 & 0xFFFF_FFFF, 0, b"").pack()
    if chain.call(actor, CallCode.DELETE_VP, data)[0] == Status.SUCCESS:
        chain.lost(vps[-1])


def registers(chain, actor):
    name = chain.random.choice(list(RegisterName))
    header = VpReference(chain.target(actor), chain.random.randrange(2), 0, b"").pack()
    if name in (RegisterName.EXPLICIT_SUSPEND, RegisterName.INTERCEPT_SUSPEND):
        value = chain.random.randrange(2)
    else:
        value = chain.random.choice((0, 1, chain.random.getrandbits(64), chain.page(actor) * PAGE | 1))
    if chain.random.random() < 0.5:
        chain.call(actor, CallCode.GET_VP_REGISTERS, header + int(name).to_bytes(4, "little"), reps=1)
    else:
        element = struct.pack("<IIQQQ", name, 0, 0, value & (1 << 64) - 1, 0)
        chain.call(actor, CallCode.SET_VP_REGISTERS, header + element, reps=1)


def peer(chain, actor):
    return chain.random.choice([chain.target(actor), chain.target(actor), actor.partition.id])


def create_port(chain, actor):
    owner, sender = peer(chain, actor), peer(chain, actor)
    number, kind = chain.random.randrange(1, 6), chain.random.choice(list(PortType))
    if kind == PortType.MONITOR:
        low, high = chain.page(actor) * PAGE & (1 << 64) - 1, 0
    else:
        low, high = chain.random.randrange(1, 16) | chain.random.randrange(3) << 32, 16 << 16
    data = CreatePort(owner, number, 0, 0, 0, sender, kind, 0, low, high, 0).pack()
    if chain.call(actor, CallCode.CREATE_PORT, data)[0] == Status.SUCCESS:
        node = self_or(chain, actor, owner)
        node.ports[number] = {"for": self_or(chain, actor, sender), "kind": kind, "owner": node}


def delete_port(chain, actor):
    owner, number = peer(chain, actor), chain.random.randrange(1, 6)
    if chain.call(actor, CallCode.DELETE_PORT, q(owner, number))[0] == Status.SUCCESS:
        del self_or(chain, actor, owner).ports[number]


def connect_port(chain, actor):
    sender, owner = peer(chain, actor), peer(chain, actor)
    number, port, kind = (
        chain.random.randrange(1, 9),
        chain.random.randrange(1, 6),
        chain.random.choice((1, 2)),
    )
    data = connect_input(sender, number, owner, port, kind)
    if chain.call(actor, CallCode.CONNECT_PORT, data)[0] == Status.SUCCESS:
        node, found = self_or(chain, actor, sender), self_or(chain, actor, owner).ports[port]
        assert found["for"] is node, "connected to a port that is for another"
        node.connections[number] = found


def connect_input(sender, number, owner, port, kind):
    fields = {
        "connection_partition_id": sender,
        "connection_id": number,
        "port_partition_id": owner,
        "port_id": port,
        "port_type": kind,
    }
    blank = ConnectPort.unpack(bytes(ConnectPort.SIZE))
    for name, value in fields.items():
        setattr(blank, name, value)
    return blank.pack()


def disconnect_port(chain, actor):
    sender, number = peer(chain, actor), chain.random.randrange(1, 9)
    if chain.call(actor, CallCode.DISCONNECT_PORT, q(sender, number))[0] == Status.SUCCESS:
        del self_or(chain, actor, sender).connections[number]


def send(chain, actor):
    number = chain.random.randrange(1, 9)
    status, _, _ = chain.call(actor, CallCode.SIGNAL_EVENT, q(number | chain.random.randrange(16) << 32))
    reached(chain, actor, number, status)
    # Messages do not fit into registers: they come from a page of the sender's.
    memory = actor.partition.memory
    at = chain.random.randrange(PAGES) * PAGE
    if memory.access(at) & 3 != 3 or actor.partition in (chain.root, chain.bystander):
        return
    memory.write(at, struct.pack("<IIII", number, 0, 1, 40) + bytes(240))
    try:
        status = actor.hypercall(control(CallCode.POST_MESSAGE), at, 0)
    except (UndefinedOpcodeFault, VpSuspended):
        return
    chain.statuses.add(status)
    reached(chain, actor, number, status)


def reached(chain, actor, number, status):
    if status == Status.SUCCESS:
        node = chain.node(actor.partition.id)
        port = node.connections[number]
        assert port in port["owner"].ports.values(), "reached a port that is gone"
        assert port["for"] is node


def touch_msr(chain, actor):
    if actor.partition is chain.root:
        return
    register = chain.random.choice(
        (Msr.SIMP, Msr.SIEFP, Msr.HYPERCALL, Msr.REFERENCE_TSC, Msr.VP_ASSIST_PAGE, Msr.EOM, Msr.EOI)
    )
    value = chain.page(actor) * PAGE & (1 << 64) - 1 | chain.random.randrange(2)
    if register == Msr.HYPERCALL:
        value &= ~2
    chain.write_msr(actor, register, value)
    timer = chain.random.randrange(4)
    chain.write_msr(actor, Msr.STIMER0_COUNT + 2 * timer, chain.random.randrange(1, 100_000))
    direct = chain.random.randrange(2)
    sint = chain.random.randrange(1, 16)
    chain.write_msr(actor, Msr.STIMER0_CONFIG + 2 * timer, 3 | direct << 12 | 0x60 << 4 * direct | sint << 16)
    try:
        actor.rdmsr(chain.random.choice((Msr.SIMP, Msr.TPR, Msr.TIME_REF_COUNT, Msr.IA32_TSC)))
        actor.mmio_write(0xFEE0_0000 + 16 * chain.random.randrange(256), 4, chain.random.getrandbits(32))
        actor.io_write(0x80, 1, 0)
        actor.cpuid(1, 0)
    except (GeneralProtectionFault, VpSuspended):
        return
    assert not actor.deleted


def revive(chain, actor):
    """Somebody has to be able to act: processors run again, and have pages for what they need."""
    for node in chain.nodes():
        partition = chain.hv.partitions[node.id]
        if partition is chain.bystander:
            continue
        if chain.random.random() < 0.3:
            partition.suspend(False)
            for vp in partition.vps:
                vp.suspend(False)
        if partition.vps and not partition.hypercalls_enabled:
            chain.enable(partition.vps[0])


def time_passes(chain, actor):
    chain.clock.advance(chain.random.randrange(3_000_000))


ACTIONS = [
    create, build, build, initialize, finalize, delete, destroy,
    *[map_pages] * 6, *[unmap] * 3, *[deposit] * 3, *[withdraw] * 2,
    give_privileges, suspend, add_vp, delete_vp, registers, registers,
    *[create_port] * 3, delete_port, *[connect_port] * 3, disconnect_port, *[send] * 3,
    *[touch_msr] * 4, revive, revive, time_passes,
]  # fmt: skip


def run(seed):
    chain = Chain(random.Random(seed))
    for step in range(STEPS):
        chain.step()
        if step % 10 == 0:
            chain.check()
    chain.check()
    for node in list(chain.oracle.children.values()):
        if node.id != chain.bystander.id:
            chain.hv.partitions[node.id].destroy()
            node.delete()
            chain.check()
    assert not chain.root.loans.lent
    assert chain.clock.next_deadline() is None, "a timer of somebody who is gone"
    chain.root.destroy()
    assert not chain.hv.partitions
    return chain


@pytest.mark.parametrize("number", range(ROUNDS))
def test_whatever_happens_above_and_below(number):
    print(f"VMBUS_SEED={SEED + number} VMBUS_ROUNDS=1")
    chain = run(SEED + number)
    # The fuzz is worth its time only if most of it takes place.
    assert len(chain.statuses) >= 6, chain.statuses
    assert {CallCode.MAP_GPA_PAGES, CallCode.UNMAP_GPA_PAGES, CallCode.DEPOSIT_MEMORY} <= chain.succeeded

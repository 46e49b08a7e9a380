"""Two guests on one disk: what one node's task management does to the commands of the other (SAM-5, SPC-4 5.13.11.5).

The backend holds writes of A until the test lets them go; whatever B is told must be true of the medium.
"""

import struct
import threading
from collections.abc import Callable, Iterator
from uuid import UUID

import pytest
from reference.eventually import eventually

from vmbus.bus.channel import loopback
from vmbus.core.memory import GuestMemory
from vmbus.errors import DeviceError
from vmbus.storage.disk import Buffer, Disk, DiskError, MemoryDisk
from vmbus.storage.redirect import RedirectDisk
from vmbus.storage.scsi import BytesBuffer, CdromUnit, DiskUnit, Sense, Task
from vmbus.storage.scsi.codes import AdditionalSense, ScsiStatus, SenseKey
from vmbus.storage.vsc import CommandResult, StorageVsc
from vmbus.storage.vsp import StorageVsp
from vmbus.storage.wire import SrbStatus

KEY_A, KEY_B = 0xAAAA, 0xBBBB
REGISTER, RESERVE, RELEASE, CLEAR, PREEMPT, PREEMPT_AND_ABORT, IGNORE = range(7)
WRITE_EXCLUSIVE, REGISTRANTS_ONLY = 1, 5
SECTOR = 512


class Held(Disk):
    """A disk in Python whose writes of "A" wait for `gate`."""

    def __init__(self, inner: Disk) -> None:
        self.inner = inner
        self.sector_size, self.sector_count = inner.sector_size, inner.sector_count
        self.physical_sector_size, self.read_only = inner.physical_sector_size, False
        self.entered, self.gate = threading.Event(), threading.Event()
        self.writes: list[bytes] = []

    def read(self, offset: int, length: int) -> bytes:
        return self.inner.read(offset, length)

    def write(self, offset: int, data: Buffer) -> None:
        if bytes(data[:1]) == b"A":
            self.entered.set()
            if not self.gate.wait(30):
                raise DiskError("the test never opened the gate")
        self.writes.append(bytes(data[:1]))
        self.inner.write(offset, data)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.inner.close()


class Nodes:
    """Two guests, each with a controller of its own, on one unit."""

    def __init__(self, disk: Disk, workers: int) -> None:
        self.disk = disk
        self.providers: list[StorageVsp] = []
        self.clients: list[StorageVsc] = []
        unit: Disk | DiskUnit = disk
        for number in (1, 2):
            guest, host = loopback(GuestMemory(8 << 20), 16, 16)
            provider = StorageVsp(workers=workers, instance_id=UUID(int=number))
            unit = provider.add_disk((0, 0), unit)  # type: ignore[assignment]
            provider.open(host)
            client = StorageVsc(guest, range(512), timeout=30)
            client.connect()
            self.providers.append(provider)
            self.clients.append(client)
        assert isinstance(unit, DiskUnit)
        self.unit = unit
        self.a, self.b = self.clients

    def reserve_out(
        self, who: StorageVsc, action: int, key: int, new: int = 0, kind: int = 5
    ) -> CommandResult:
        cdb = struct.pack(">BBBxxIx", 0x5F, action, kind, 24)
        return who.execute(0, 0, cdb, data_out=struct.pack(">QQ8x", key, new))

    def register(self) -> None:
        assert self.reserve_out(self.a, REGISTER, 0, KEY_A).good
        assert self.reserve_out(self.b, REGISTER, 0, KEY_B).good

    def attentions(self, who: StorageVsc) -> list[int]:
        """The unit attentions that wait for a node; they are taken."""
        found: list[int] = []
        while not (result := who.execute(0, 0, bytes(6))).good:
            assert result.sense is not None
            assert result.sense.key == SenseKey.UNIT_ATTENTION
            found.append(result.sense.additional)
        return found

    def close(self) -> None:
        for provider in self.providers:
            provider.shutdown()


@pytest.fixture
def started() -> Iterator[Callable[[Callable[[], object]], threading.Thread]]:
    threads: list[threading.Thread] = []

    def start(what: Callable[[], object]) -> threading.Thread:
        thread = threading.Thread(target=what, daemon=True)
        thread.start()
        threads.append(thread)
        return thread

    yield start
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


Start = Callable[[Callable[[], object]], threading.Thread]


def write_of(client: StorageVsc, letter: bytes, results: list[CommandResult], lba: int = 0) -> None:
    cdb = struct.pack(">BxIxHx", 0x2A, lba, 1)
    results.append(client.execute(0, 0, cdb, data_out=letter * SECTOR))


def fence(nodes: Nodes, what: str) -> CommandResult | None:
    if what == "preempt and abort":
        return nodes.reserve_out(nodes.b, PREEMPT_AND_ABORT, KEY_B, KEY_A)
    assert what == "reset"
    nodes.b.reset()
    return None


@pytest.mark.parametrize("what", ["preempt and abort", "reset"])
@pytest.mark.parametrize("reserved", [True, False], ids=["reserved", "registered only"])
@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_of_the_other_node_lands_after_it_was_fenced(
    started: Start, workers: int, reserved: bool, what: str
) -> None:
    """Not reserved and without workers, the write of A goes the way of compiled code."""
    held = Held(MemoryDisk(1 << 20))
    nodes = Nodes(held, workers)
    nodes.register()
    if reserved:
        assert nodes.reserve_out(nodes.a, RESERVE, KEY_A).good
    written: list[CommandResult] = []
    started(lambda: write_of(nodes.a, b"A", written))
    assert held.entered.wait(30)
    fenced: list[object] = []
    started(lambda: fenced.append(fence(nodes, what)))
    assert not eventually(lambda: fenced, 0.2), "B was told that A is fenced while A's write is under way"
    held.gate.set()
    assert eventually(lambda: fenced and written)
    if what == "preempt and abort":
        result = fenced[0]
        assert isinstance(result, CommandResult)
        assert result.good
    nodes.attentions(nodes.b)
    nodes.b.disk().write(0, b"B" * SECTOR)
    assert held.inner.read(0, 1 * SECTOR) == b"B" * SECTOR
    if written[0].good:  # it was over before B was told, and went the short way
        assert held.writes == [b"A", b"B"]
        assert workers == 0
        assert not reserved
    else:
        assert written[0].srb_status == SrbStatus.ABORTED
    nodes.close()


@pytest.mark.parametrize("what", ["preempt and abort", "reset"])
def test_queued_commands_of_the_other_node_are_never_begun(started: Start, what: str) -> None:
    """One worker of A is busy; what waits for it ends at once, although that worker stays busy elsewhere."""
    held = Held(MemoryDisk(1 << 20))
    nodes = Nodes(MemoryDisk(1 << 20), 1)
    busy = nodes.providers[0].add_disk((0, 1), held)
    nodes.register()
    elsewhere: list[CommandResult] = []
    cdb = struct.pack(">BxIxHx", 0x2A, 0, 1)
    second = threading.Thread(
        target=lambda: elsewhere.append(nodes.a.execute(0, 1, cdb, data_out=b"A" * SECTOR)), daemon=True
    )
    # The client sends one command at a time, so the queued one is handed to the unit as its provider would.
    second.start()
    assert held.entered.wait(30)
    nexus = nodes.providers[0].offer.instance_id
    queued = Task(cdb.ljust(16, b"\0"), BytesBuffer(b"A" * SECTOR), nexus)
    told = threading.Event()
    queued.on_abort = told.set
    nodes.unit.tasks.admit(queued)
    result = fence(nodes, what)
    assert result is None or result.good
    assert told.is_set()
    assert nodes.unit.execute(queued).status == ScsiStatus.TASK_ABORTED
    nodes.attentions(nodes.b)
    assert nodes.b.disk().read(0, SECTOR) == bytes(SECTOR)
    held.gate.set()
    second.join(30)
    assert elsewhere[0].good, "a command of another unit has nothing to do with it"
    assert len(busy.tasks) == len(nodes.unit.tasks) == 0
    nodes.close()


@pytest.mark.parametrize("tas", [0, 1])
def test_the_fenced_node_learns_how_its_commands_ended(started: Start, tas: int) -> None:
    held = Held(MemoryDisk(1 << 20))
    nodes = Nodes(held, 2)
    if tas:
        page = bytes.fromhex("0a0a 0210 0040 0000 ffff 0000")
        nodes.b.check(0, 0, bytes([0x15, 0x10, 0, 0, 16]), data_out=bytes(4) + page)
        assert nodes.attentions(nodes.a) == [AdditionalSense.MODE_PARAMETERS_CHANGED]
    nodes.register()
    written: list[CommandResult] = []
    started(lambda: write_of(nodes.a, b"A", written))
    assert held.entered.wait(30)
    fenced: list[object] = []
    started(lambda: fenced.append(fence(nodes, "preempt and abort")))
    assert eventually(lambda: any(task.aborted for task in nodes.unit.tasks))
    held.gate.set()
    assert eventually(lambda: fenced and written)
    assert (written[0].srb_status, written[0].scsi_status) == (SrbStatus.ABORTED, ScsiStatus.TASK_ABORTED)
    wanted = [AdditionalSense.REGISTRATIONS_PREEMPTED]
    if not tas:
        wanted.append(AdditionalSense.COMMANDS_CLEARED_BY_ANOTHER_INITIATOR)
    assert nodes.attentions(nodes.a) == wanted
    assert nodes.attentions(nodes.b) == []
    nodes.close()


def test_a_reset_is_told_to_both_nodes() -> None:
    nodes = Nodes(MemoryDisk(1 << 20), 0)
    nodes.b.reset()
    assert nodes.attentions(nodes.a) == [AdditionalSense.BUS_RESET_OCCURRED]
    assert nodes.attentions(nodes.b) == [AdditionalSense.BUS_RESET_OCCURRED]
    nodes.close()


@pytest.mark.parametrize("action", [PREEMPT, CLEAR])
def test_without_abort_commands_go_on(started: Start, action: int) -> None:
    """PREEMPT and CLEAR end registrations, not commands (SPC-4 5.13.11.4 and 5.13.11.6)."""
    held = Held(MemoryDisk(1 << 20))
    nodes = Nodes(held, 2)
    nodes.register()
    assert nodes.reserve_out(nodes.a, RESERVE, KEY_A).good
    written: list[CommandResult] = []
    started(lambda: write_of(nodes.a, b"A", written))
    assert held.entered.wait(30)
    assert nodes.reserve_out(nodes.b, action, KEY_B, KEY_A).good
    held.gate.set()
    assert eventually(lambda: written)
    assert written[0].good
    told = {PREEMPT: "REGISTRATIONS_PREEMPTED", CLEAR: "RESERVATIONS_PREEMPTED"}[action]
    assert nodes.attentions(nodes.a) == [AdditionalSense[told]]
    nodes.close()


def test_two_nodes_that_fence_each_other_do_not_wait_for_each_other(started: Start) -> None:
    for _ in range(20):
        nodes = Nodes(MemoryDisk(1 << 20), 1)
        nodes.register()
        ends: dict[int, CommandResult] = {}
        both = threading.Barrier(2)

        def strike(who: int, nodes: Nodes = nodes, ends: dict[int, CommandResult] = ends) -> None:
            key, other = ((KEY_A, KEY_B), (KEY_B, KEY_A))[who]
            both.wait(30)  # noqa: B023
            ends[who] = nodes.reserve_out(nodes.clients[who], PREEMPT_AND_ABORT, key, other)

        threads = [started(lambda who=who: strike(who)) for who in (0, 1)]  # type: ignore[misc]
        for thread in threads:
            thread.join(30)
        assert sorted(ends) == [0, 1], "they wait for each other"
        assert sum(result.good for result in ends.values()) == 1
        nodes.close()


def test_a_command_beneath_the_one_that_fences_makes_it_busy() -> None:
    """On one thread: B's command is carried out while A's write waits in its backend. Waiting would be for ever."""

    class Nested(Held):
        then: Callable[[], object] | None = None

        def write(self, offset: int, data: Buffer) -> None:
            then, self.then = self.then, None
            if then is not None:
                then()
            self.inner.write(offset, data)

    disk = Nested(MemoryDisk(1 << 20))
    unit = DiskUnit(disk, UUID(int=7))
    for nexus in "ab":
        unit.attach(nexus)

    def out(nexus: str, action: int, key: int, new: int) -> int:
        cdb = struct.pack(">BBBxxIx", 0x5F, action, 5, 24).ljust(16, b"\0")
        return unit.execute(Task(cdb, BytesBuffer(struct.pack(">QQ8x", key, new)), nexus)).status

    assert out("a", REGISTER, 0, KEY_A) == out("b", REGISTER, 0, KEY_B) == ScsiStatus.GOOD
    ends: list[int] = []
    disk.then = lambda: ends.append(out("b", PREEMPT_AND_ABORT, KEY_B, KEY_A))
    write = Task(struct.pack(">BxIxH7x", 0x2A, 0, 1), BytesBuffer(b"A" * SECTOR), "a")
    assert unit.execute(write).status == ScsiStatus.GOOD
    assert ends == [ScsiStatus.BUSY]
    assert unit.plain, "nothing changed"
    assert out("b", PREEMPT_AND_ABORT, KEY_B, KEY_A) == ScsiStatus.GOOD


@pytest.mark.parametrize("outer", ["WRITE", "COMPARE AND WRITE"])
def test_a_command_beneath_one_that_it_would_have_to_wait_for_is_busy(outer: str) -> None:
    """On one thread: B's COMPARE AND WRITE comes while A's command waits in its backend."""

    class Nested(Held):
        then: Callable[[], object] | None = None

        def write(self, offset: int, data: Buffer) -> None:
            then, self.then = self.then, None
            if then is not None:
                then()
            self.inner.write(offset, data)

    disk = Nested(MemoryDisk(1 << 20))
    unit = DiskUnit(disk, UUID(int=7))
    compare_and_write = struct.pack(">BBQ3xBxx", 0x89, 0, 8, 1), bytes(SECTOR) + b"A" * SECTOR
    commands = {
        "WRITE": (struct.pack(">BxIxHx", 0x2A, 0, 1), b"A" * SECTOR),
        "COMPARE AND WRITE": compare_and_write,
    }
    for nexus in "ab":
        unit.attach(nexus)

    def run(nexus: str, cdb: bytes, data: bytes) -> int:
        return unit.execute(Task(cdb.ljust(16, b"\0"), BytesBuffer(data), nexus)).status

    ends: list[int] = []
    disk.then = lambda: ends.append(run("b", *compare_and_write))
    assert run("a", *commands[outer]) == ScsiStatus.GOOD
    assert ends == [ScsiStatus.BUSY]
    if outer == "WRITE":
        assert run("b", *compare_and_write) == ScsiStatus.GOOD, "nothing is left behind"


def test_task_management_beneath_task_management_makes_it_busy() -> None:
    """On one thread: the backend of a unit that is being sanitized leads to a reset of the same unit."""

    class Nested(Held):
        ends: list[object]

        def write(self, offset: int, data: Buffer) -> None:
            if not offset:
                out = struct.pack(">BBBxxIx", 0x5F, REGISTER, 0, 24).ljust(16, b"\0")
                self.ends.append(unit.execute(Task(out, BytesBuffer(bytes(24)), "b")).status)
                with pytest.raises(DeviceError):
                    unit.reset()
            self.inner.write(offset, data)

    disk = Nested(MemoryDisk(1 << 20))
    disk.ends = []
    unit = DiskUnit(disk, UUID(int=7))
    sanitize = Task(struct.pack(">BB5xHx6x", 0x48, 1, 5), BytesBuffer(b"\1\0\0\1\x55"), "a")
    assert unit.execute(sanitize).status == ScsiStatus.GOOD
    assert disk.ends == [ScsiStatus.CHECK_CONDITION], "SANITIZE IN PROGRESS"
    unit.reset()


def test_a_backend_that_hangs_makes_it_busy_and_leaves_all_as_it_was(started: Start) -> None:
    held = Held(MemoryDisk(1 << 20))
    nodes = Nodes(held, 2)
    nodes.register()
    nodes.unit.tasks.max_wait = 0.05
    written: list[CommandResult] = []
    started(lambda: write_of(nodes.a, b"A", written))
    assert held.entered.wait(30)
    result = nodes.reserve_out(nodes.b, PREEMPT_AND_ABORT, KEY_B, KEY_A)
    assert result.scsi_status == ScsiStatus.BUSY
    with pytest.raises(DeviceError):
        nodes.b.reset()
    held.gate.set()
    assert eventually(lambda: written)
    assert nodes.reserve_out(nodes.b, PREEMPT_AND_ABORT, KEY_B, KEY_A).good
    nodes.close()


def test_a_write_that_is_on_its_way_through_another_partition_is_waited_for(started: Start) -> None:
    held = Held(MemoryDisk(1 << 20))
    guest, host = loopback(GuestMemory(8 << 20), 16, 16)
    behind = StorageVsp({(0, 0): held}, workers=1)
    behind.open(host)
    middle = StorageVsc(guest, range(256), timeout=30)
    middle.connect()
    nodes = Nodes(RedirectDisk(middle.disk(), range(256, 512)), 0)
    nodes.register()
    written: list[CommandResult] = []
    started(lambda: write_of(nodes.a, b"A", written))
    assert held.entered.wait(30)
    fenced: list[object] = []
    started(lambda: fenced.append(fence(nodes, "preempt and abort")))
    assert not eventually(lambda: fenced, 0.2)
    held.gate.set()
    assert eventually(lambda: fenced and written)
    nodes.b.disk().write(0, b"B" * SECTOR)
    assert held.inner.read(0, SECTOR) == b"B" * SECTOR
    nodes.close()
    behind.shutdown()


def test_a_reset_unlocks_the_tray() -> None:
    drive = CdromUnit(MemoryDisk(1 << 20, sector_size=2048), UUID(int=3))
    for nexus in "ab":
        drive.attach(nexus)

    def run(nexus: str, *cdb: int) -> tuple[int, Sense | None]:
        outcome = drive.execute(Task(bytes(cdb).ljust(16, b"\0"), BytesBuffer(), nexus))
        return outcome.status, Sense.unpack(outcome.sense) if outcome.sense else None

    assert run("a", 0x1E, 0, 0, 0, 1)[0] == ScsiStatus.GOOD
    status, sense = run("b", 0x1B, 0, 0, 0, 2)
    assert status == ScsiStatus.CHECK_CONDITION
    assert sense is not None
    assert sense.additional == AdditionalSense.MEDIUM_REMOVAL_PREVENTED
    drive.reset()
    for nexus in "ab":
        assert run(nexus, 0)[1] == Sense(SenseKey.UNIT_ATTENTION, AdditionalSense.DEVICE_RESET_OCCURRED)
    assert run("b", 0x1B, 0, 0, 0, 2)[0] == ScsiStatus.GOOD
    assert drive.tray_open


LONG = {
    "VERIFY": (struct.pack(">BBQIxx", 0x8F, 0, 0, 1 << 24), b""),
    "VERIFY with one block": (struct.pack(">BBQIxx", 0x8F, 6, 0, 1 << 24), bytes(SECTOR)),
    "WRITE SAME": (struct.pack(">BBQIxx", 0x93, 0, 0, 1 << 17), b"s" * SECTOR),
    "UNMAP": (
        struct.pack(">B6xHx", 0x42, 8 + 16 * 64),
        struct.pack(">HH4x", 6 + 16 * 64, 16 * 64)
        + b"".join(struct.pack(">QI4x", number, 1) for number in range(64)),
    ),
    "UNMAP of one long range": (
        struct.pack(">B6xHx", 0x42, 24),
        struct.pack(">HH4xQI4x", 22, 16, 0, 1 << 20),
    ),
}


@pytest.mark.parametrize("name", LONG)
def test_a_long_command_of_the_fenced_node_ends_soon(name: str) -> None:
    """A node that is to be fenced must not keep the other waiting by asking for a lot."""

    class Long(Disk):
        def __init__(self) -> None:
            self.sector_size = self.physical_sector_size = SECTOR
            self.sector_count, self.read_only, self.unmap_granularity = 1 << 30, False, 4096
            self.steps = self.longest = 0
            self.fencing = threading.Thread(target=fence_off)

        def step(self) -> None:
            self.steps += 1
            if self.steps == 1:
                self.fencing.start()
                assert eventually(lambda: any(task.aborted for task in unit.tasks))

        def read(self, offset: int, length: int) -> bytes:
            self.step()
            return bytes(length)

        def write(self, offset: int, data: Buffer) -> None:
            self.step()

        def unmap(self, offset: int, length: int) -> None:
            self.longest = max(self.longest, length)
            self.step()

        def flush(self) -> None:
            pass

        def close(self) -> None:
            pass

    def run(nexus: str, cdb: bytes, data: bytes) -> int:
        return unit.execute(Task(cdb.ljust(16, b"\0"), BytesBuffer(data), nexus)).status

    def out(nexus: str, action: int, key: int, new: int) -> int:
        return run(nexus, struct.pack(">BBBxxIx", 0x5F, action, 5, 24), struct.pack(">QQ8x", key, new))

    def fence_off() -> None:
        ended.append(out("b", PREEMPT_AND_ABORT, KEY_B, KEY_A))

    ended: list[int] = []
    disk = Long()
    unit = DiskUnit(disk, UUID(int=1))
    for nexus, key in (("a", KEY_A), ("b", KEY_B)):
        unit.attach(nexus)
        assert out(nexus, REGISTER, 0, key) == ScsiStatus.GOOD
    assert run("a", *LONG[name]) == ScsiStatus.TASK_ABORTED
    disk.fencing.join(30)
    assert ended == [ScsiStatus.GOOD]
    assert disk.steps == 1
    assert disk.longest <= 64 << 20, "where there are no holes, that many zeros are written at once"


def test_who_comes_during_a_sanitize_need_not_wait_for_it() -> None:
    """It cannot be aborted and may take hours: NOT READY, SANITIZE IN PROGRESS, as for all others (SBC-4 4.11.3)."""
    with MemoryDisk(1 << 20) as memory:
        held = Held(memory)
        unit = DiskUnit(held, UUID(int=1))
        statuses: list[Sense] = []

        def run(nexus: str, cdb: bytes, data: bytes) -> None:
            outcome = unit.execute(Task(cdb.ljust(16, b"\0"), BytesBuffer(data), nexus))
            if outcome.sense:
                statuses.append(Sense.unpack(outcome.sense))

        overwriting = threading.Thread(
            target=run, args=("a", struct.pack(">BB5xHx", 0x48, 1, 5), b"\1\0\0\1A"), daemon=True
        )
        overwriting.start()
        assert held.entered.wait(30)
        run("b", struct.pack(">BBBxxIx", 0x5F, REGISTER, 0, 24), struct.pack(">QQ8x", 0, KEY_B))
        run("b", struct.pack(">BB8x", 0x48, 2), b"")
        held.gate.set()
        overwriting.join(30)
        assert [(sense.key, sense.additional) for sense in statuses] == [
            (SenseKey.NOT_READY, AdditionalSense.NOT_READY_SANITIZE_IN_PROGRESS)
        ] * 2
        assert memory.read(0, 1 << 20) == b"A" * (1 << 20)


@pytest.mark.parametrize("opcode", [0x9C, 0x8A])
def test_an_atomic_write_that_is_aborted_is_all_there_or_not_at_all(opcode: int) -> None:
    class Parts(Disk):
        def __init__(self) -> None:
            self.sector_size = self.physical_sector_size = 4096
            self.sector_count, self.read_only = 1 << 10, False
            self.written = 0
            self.fencing = threading.Thread(target=lambda: ended.append(unit.reset()))

        def read(self, offset: int, length: int) -> bytes:
            return bytes(length)

        def write(self, offset: int, data: Buffer) -> None:
            self.written += len(data)
            if not self.fencing.ident:
                self.fencing.start()
                assert eventually(lambda: any(task.aborted for task in unit.tasks))

        def flush(self) -> None:
            pass

        def close(self) -> None:
            pass

    ended: list[None] = []
    disk = Parts()
    unit = DiskUnit(disk, UUID(int=1))
    size = 4 << 20
    count = struct.pack(
        ">xxHxx" if opcode == 0x9C else ">Ixx", size // 4096
    )  # of WRITE ATOMIC (16), of WRITE (16)
    outcome = unit.execute(Task(bytes([opcode]) + bytes(9) + count, BytesBuffer(b"x" * size), "a"))
    assert outcome.status == ScsiStatus.TASK_ABORTED
    disk.fencing.join(30)
    assert ended == [None]
    assert disk.written == (size if opcode == 0x9C else 1 << 20)

"""A machine that runs an unmodified Linux kernel as a child partition.

with Machine("vmlinuz", initrd="initramfs", disks=["root.img"], append="console=ttyS0") as m:
    m.run(until="login:")
    m.console.send("root\\n")
    print(m.run(until="# "), m.ledger.to_dict())

The kernel sees a Hyper-V child partition with 1 to 16 processors: SynIC, synthetic timers and VMBus from
the hypervisor and bus rooms, its disks and networks behind the providers, ACPI, a serial port and a real-time clock. It
is executed by the engine in `vmbus.engine.unicorn` on a virtual clock: the same inputs give the same run.
"""

import logging
import math
import mmap
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from types import TracebackType
from typing import Final, Self, TypeAlias
from uuid import UUID, uuid5

from vmbus.bus import Offered, Version, VmbusHost
from vmbus.emulated.ioapic import IoApic
from vmbus.emulated.pci import PciBus, host_bridge
from vmbus.emulated.piix import MOST_DISKS, PiixIde
from vmbus.emulated.rtc import CENTURY, EPOCH, RTC_PORT, RealTimeClock
from vmbus.emulated.uart import COM1_IRQ, COM1_PORT, Uart16550
from vmbus.engine.unicorn import Stop, UnicornEngine
from vmbus.errors import DeviceError, LocalProtocolError
from vmbus.hypervisor import Budget, CrashReport, Hypervisor, Partition, PartitionEvent, VirtualClock
from vmbus.hypervisor.personality import DIRECT_TIMERS_AVAILABLE, LINUX, Personality
from vmbus.machine.acpi import POWER_PORTS, SLEEP_CONTROL_PORT, PowerAction, PowerPorts, build_tables
from vmbus.machine.console import Console, Pattern
from vmbus.machine.crash import PANIC_SECONDS, CrashWatch
from vmbus.machine.kernel_payload import unpack_kernel
from vmbus.machine.linux import (
    ACPI_ADDRESS,
    MOST_MEMORY,
    BootError,
    Kernel,
    KernelError,
    SizeError,
    load_linux,
    parse_kernel,
)
from vmbus.machine.network import GuestNetwork
from vmbus.machine.nic import TulipAdapter
from vmbus.machine.outcome import OUTCOMES, RESUMABLE, Outcome, Result
from vmbus.machine.smbios import load_smbios
from vmbus.network.switch import Port
from vmbus.sizes import byte_count
from vmbus.storage.disk import Disk
from vmbus.storage.growth import LimitedDisk, limited
from vmbus.storage.images import ImageDisk, open_disk
from vmbus.storage.scsi import CdromUnit, DiskUnit, LogicalUnit
from vmbus.storage.vsp import Address, StorageVsp
from vmbus.trace.ledger import Ledger

__all__ = ["PLAIN_PC", "RESUMABLE", "Machine", "Outcome", "Result"]

log = logging.getLogger(__name__)

DEFAULT_MEMORY: Final = 512 << 20
IDE_SLOT: Final = 7
IDE_LINE: Final = 16
"""The emulated disk controller's place on the PCI bus, and its line of the I/O APIC (behind the ISA lines)."""
NIC_BACKLOG: Final = 1024
"""Frames that wait for an emulated adapter's descriptors: the host sends in batches longer than a driver's ring."""
NIC_LINES: Final = {10: 17, 11: 18, 12: 19, 13: 20}
"""The interrupt line of each PCI slot for an emulated network adapter."""
MOST_PROCESSORS: Final = 16
PROCESSORS_PER_CHANNEL: Final = 4
"""So many share a channel of the storage controller, as on Hyper-V: one to four have the first channel only."""
STORAGE_INSTANCE: Final = UUID("6c2ab6f0-4f0e-4f4e-9d5e-0f2b1f7a5c01")
"""The controller's instance: fixed, because serial numbers of disks come from it and runs have to repeat."""
SECOND: Final = 1_000_000_000
MOST_KERNEL_FILE: Final = 1 << 30
"""Bytes of a kernel's file, most of which may be debugging information that is not loaded."""

MESSAGE_TIMERS: Final = replace(LINUX, features=LINUX.features & ~DIRECT_TIMERS_AVAILABLE)
"""Linux whose synthetic timers expire with a message, as of Hyper-V before direct mode."""
PLAIN_PC: Final = Personality("plain-pc", privileges=type(LINUX.privileges)(0), hypervisor_present=False)
"""A machine that shows no hypervisor: its guest uses none of the enlightenments."""


Medium: TypeAlias = str | os.PathLike[str] | Disk | LogicalUnit
"""What can be attached: an image's path or URI, an open disk, or a unit that is ready."""


class Machine:
    """One hypervisor instance with a root partition and a Linux child.

    Args:
        kernel: a bzImage or an ELF kernel: a path, or the file's bytes.
        initrd: an initial RAM disk or initramfs: a path or bytes.
        disks: what the storage controller has, as LUN 0, 1, …: images that `vmbus.storage.images.open_disk` takes, or
            open `Disk` objects, which stay open afterwards, or units.
        cdroms: ISO images in CD-ROM drives, as the LUNs behind those of the disks: paths, NBD URIs or open disks; they
            are only read.
        networks: a network adapter each, as `vmbus.machine.network.parse_network` takes it.
        append: the kernel's command line.
        memory: bytes of RAM.
        processors: virtual processors; they take turns on one thread. The storage controller has a channel for each
            four of them.
        enlightenments: show the guest a hypervisor and a VMBus. Without, it sees a plain PC, with its disks on an
            emulated IDE controller.
        direct_timers: offer direct mode, in which a synthetic timer interrupts without a message. Linux uses it, and
            then cannot unload `hv_vmbus`: it gives up the timer without one to replace it, and waits for ever.
        unpack: ``"host"`` unpacks a bzImage here, ``"guest"`` lets it unpack itself, ``"auto"`` does it here
            when that is possible.
        name: of the child partition, in the ledger.
        versions: the VMBus versions that the host speaks; all of them if None.
        reboot: a guest that restarts the machine starts again within the same run, as on a real one. Otherwise the run
            ends as `REBOOT`, and `restart` goes on.
        clock: what the real-time clock shows: ``"fixed"``, the beginning of 2024 at the start, so that runs repeat;
            ``"host"``, the host's time; or a date and time at the start (UTC if it has no time zone).
        panic_seconds: the guest's time that it has after a crash report, until its run ends as `PANIC`, to start a
            crash kernel or to restart; None for ever. A kernel that says on the serial console that it will do nothing
            more ends at once.
        budget: what the guest may make the host spend; `Budget`'s defaults if None.

    Raises:
        BootError: the kernel or the sizes do not fit together, or a number or a time is none that a machine can have.
        DeviceError: a disk or a network cannot be opened.
        EngineError: there is no engine to run it.
        OSError: a file cannot be read.
        TypeError: `disks`, `cdroms` or `networks` is one thing instead of a list, `memory` is no integer, or `clock` is
            no time.

    Attributes:
        hypervisor, partition, engine, console, bus, storage, network: the parts; the engine is another one after a
            restart.
    """

    def __init__(
        self,
        kernel: str | os.PathLike[str] | bytes,
        *,
        initrd: str | os.PathLike[str] | bytes | None = None,
        disks: Sequence[Medium] = (),
        cdroms: Sequence[str | os.PathLike[str] | Disk] = (),
        networks: Sequence[str] = (),
        append: str = "console=ttyS0",
        memory: int = DEFAULT_MEMORY,
        processors: int = 1,
        enlightenments: bool = True,
        direct_timers: bool = False,
        unpack: str = "auto",
        name: str = "linux",
        versions: frozenset[int] | None = None,
        reboot: bool = False,
        clock: str | datetime = "fixed",
        panic_seconds: float | None = PANIC_SECONDS,
        budget: Budget | None = None,
    ) -> None:
        self._opened: list[Disk] = []
        self._nic_slots: list[int] = []
        self._outcome: Outcome | None = None
        self._ended: Outcome | None = None
        self._running = self._closed = False
        self._reboot = reboot
        self._reset_asked = self._matched = False
        self._counted: Counter[str] = Counter()
        for what, given in (("disks", disks), ("cdroms", cdroms), ("networks", networks)):
            if isinstance(given, str | bytes | os.PathLike):
                raise TypeError(f"{what} is a list, also of one: {what}=[{given!r}]")
        memory = byte_count(memory, "memory")
        if memory % 4096 or memory <= 0:
            raise BootError(f"{memory} bytes of memory are not whole pages")
        if memory > MOST_MEMORY:
            raise SizeError(
                f"{memory >> 20} MiB of memory are too much: up to {MOST_MEMORY >> 20} MiB are supported"
            )
        if panic_seconds is not None and not panic_seconds >= 0:
            raise BootError(f"{panic_seconds} s after a crash report: must be 0 or more")
        # Kept for restarts as it is in the file: unpacked it is several times as large.
        self._kernel = _contents(kernel, max(memory, MOST_KERNEL_FILE))
        image = _parse(self._kernel, "" if isinstance(kernel, bytes) else os.fspath(kernel), unpack, memory)
        self._unpack = unpack
        self._initrd = b"" if initrd is None else _contents(initrd, max(memory, 0))
        self._command_line = append
        if not 0 < processors <= MOST_PROCESSORS:
            raise BootError(f"a machine has 1 to {MOST_PROCESSORS} processors, not {processors}")
        if cdroms and not enlightenments:
            raise BootError("CD-ROM drives need the enlightenments: the emulated controller takes disks only")
        try:
            opened = [self._open(disk) for disk in disks]
            opened += [self._drive(iso, lun) for lun, iso in enumerate(cdroms, len(opened))]
            self._clock = VirtualClock()
            self.hypervisor = Hypervisor(clock=self._clock)
            self._rtc = _real_time_clock(clock, self._clock)
            self._crash = CrashWatch(self._clock, panic_seconds, lambda: self._end(Outcome.PANIC))
            root = self.hypervisor.create_root()
            self.partition: Partition = self.hypervisor.create_child(
                root,
                name,
                memory_size=memory,
                vps=processors,
                personality=PLAIN_PC if not enlightenments else LINUX if direct_timers else MESSAGE_TIMERS,
                budget=budget,
            )
            opened = [limited(disk, self.partition.meter.disk_growth) for disk in opened]
            self.partition.on_event = self._on_event
            self.partition.on_identity = lambda identity: self._crash.new_kernel()
            self.engine = UnicornEngine(self.partition.vps)
            self._add_devices()
            self.bus: VmbusHost | None = None
            self.storage: StorageVsp | None = None
            self.ide: PiixIde | None = None
            if enlightenments:
                spoken = frozenset(Version) if versions is None else versions
                self.bus = VmbusHost(self.hypervisor, self.partition, versions=spoken)
                self._add_storage(opened)
            else:
                self._pci = PciBus(self.partition.devices)
                self._pci.add(0, host_bridge())
                if opened:
                    self._add_ide(opened)
            self.network = GuestNetwork(self.bus, None if enlightenments else self._plug_nic)
            self._load(image)
            for description in networks:
                self.network.add(description)
        except BaseException:
            if hasattr(self, "network"):
                self.network.close()
            self._close_disks()
            raise

    # Assembly

    def _load(self, image: Kernel) -> None:
        """Put the kernel into memory, and the boot processor where it begins."""
        enlightened = self.bus is not None
        entry = load_linux(
            self.partition.memory,
            image,
            command_line=self._command_line,
            initrd=self._initrd,
            acpi=build_tables(
                ACPI_ADDRESS,
                processors=len(self.partition.vps),
                com1=(COM1_PORT, COM1_IRQ),
                rtc=(RTC_PORT, CENTURY),
                vmbus=(0xF800_0000, 0x0400_0000) if enlightened else None,
                io_apic=True,
                pci=None if enlightened else {IDE_SLOT: IDE_LINE, **NIC_LINES},
            ),
        )
        if enlightened:
            load_smbios(self.partition.memory, self.partition.name)
        self.engine.cpu.enter_long_mode(
            entry.rip, entry.rsi, entry.rsp, entry.cr3, entry.gdt, entry.code, entry.data
        )

    def _open(self, disk: Medium) -> Disk | LogicalUnit:
        if isinstance(disk, Disk | LogicalUnit):
            return disk
        opened = open_disk(disk)
        self._opened.append(opened)
        return opened

    def _drive(self, iso: str | os.PathLike[str] | Disk, lun: int) -> CdromUnit:
        if isinstance(iso, Disk):
            disc = iso
        else:
            disc = open_disk(iso, read_only=True, parents="deny")
            self._opened.append(disc)
        if isinstance(disc, ImageDisk):
            raise DeviceError(f"{disc.path}: a {disc.format} image is no disc: CD-ROM drives take ISO images")
        return CdromUnit(disc, uuid5(STORAGE_INSTANCE, f"drive {lun}"))

    def _add_devices(self) -> None:
        devices = self.partition.devices
        account = self.hypervisor.ledger.account(self.partition.name, "uart")
        self._io_apic = IoApic(self.partition)
        self._uart = Uart16550(
            self._on_output, lambda level: self._io_apic.set_line(COM1_IRQ, level), account
        )
        self.console = Console(self._uart.receive)
        devices.add_ports(COM1_PORT, 8, self._uart)
        devices.add_ports(RTC_PORT, 2, self._rtc)
        devices.add_ports(SLEEP_CONTROL_PORT, POWER_PORTS, PowerPorts(self._on_power))

    def _add_storage(self, disks: Sequence[Disk | LogicalUnit]) -> None:
        self.storage = StorageVsp(
            {(0, lun): disk for lun, disk in enumerate(disks)},
            instance_id=STORAGE_INSTANCE,
            max_sub_channels=-(-len(self.partition.vps) // PROCESSORS_PER_CHANNEL) - 1,
        )
        self.offer(self.storage, "storage")

    def _add_ide(self, disks: Sequence[Disk | LogicalUnit]) -> None:
        media = [disk for disk in disks if isinstance(disk, Disk)]
        if len(media) != len(disks) or len(media) > MOST_DISKS:
            raise BootError(
                f"without enlightenments there is one IDE controller, for up to {MOST_DISKS} disks"
            )
        account = self.hypervisor.ledger.account(self.partition.name, "ide")
        self.ide = PiixIde(media, lambda level: self._io_apic.set_line(IDE_LINE, level), account)
        self._pci.add(IDE_SLOT, self.ide.function)

    def _plug_nic(self, port: Port, mac: bytes) -> TulipAdapter:
        if self.engine.cpu.ticks:
            raise DeviceError("an emulated adapter is there when the machine starts, or not at all")
        free = [slot for slot in NIC_LINES if slot not in self._nic_slots]
        if not free:
            raise DeviceError(f"without enlightenments there are up to {len(NIC_LINES)} network adapters")
        self._nic_slots.append(free[0])
        line = NIC_LINES[free[0]]
        return TulipAdapter(
            self.partition,
            self._pci,
            port,
            mac,
            slot=free[0],
            interrupt=lambda level: self._io_apic.set_line(line, level),
            backlog=NIC_BACKLOG,
        )

    def offer(self, provider: StorageVsp, name: str) -> Offered:
        """Offer a provider's device to the guest, and its sub-channels when the guest asks for them.

        Raises:
            LocalProtocolError: the machine has no VMBus.
        """
        if self.bus is None:
            raise LocalProtocolError("a machine without enlightenments has no VMBus")
        return provider.offer_on(self.bus, name=name)

    def add_disk(self, disk: Medium, lun: int) -> None:
        """Attach a disk while the guest runs.

        Raises:
            LocalProtocolError: the machine is closed or has no storage controller, or the LUN is taken.
            DeviceError: the image cannot be opened.
        """
        controller = self._controller()
        known = len(self._opened)
        try:
            medium = limited(self._open(disk), self.partition.meter.disk_growth)
            controller.add_disk(_address(lun), medium)
        except BaseException:
            while len(self._opened) > known:  # an image that is in no machine must not stay locked
                self._opened.pop().close()
            raise

    def remove_disk(self, lun: int) -> None:
        """Detach a disk while the guest runs; one that this machine opened is flushed and closed.

        Raises:
            LocalProtocolError: there is none.
            DeviceError: what the guest wrote could not be made durable; it is detached and closed all the same.
        """
        unit = self._controller().remove_disk(_address(lun))
        disk = unit.disk if isinstance(unit, DiskUnit) else None
        if isinstance(disk, LimitedDisk):
            disk = disk.disk
        if disk in self._opened:
            self._opened.remove(disk)
            _flush_and_close(disk)

    def _check_open(self) -> None:
        if self._closed:
            raise LocalProtocolError("the machine is closed")

    def _controller(self) -> StorageVsp:
        self._check_open()
        if self.storage is None:
            raise LocalProtocolError("a machine without enlightenments has no storage controller")
        return self.storage

    # Running

    def __repr__(self) -> str:
        state = self._ended.value if self._ended is not None else f"{self.virtual_seconds:.3f} s of its time"
        state += ", closed" if self._closed else ""
        return f"<Machine {self.partition.name!r}: {state}>"

    @property
    def ledger(self) -> Ledger:
        """What was counted."""
        return self.hypervisor.ledger

    @property
    def counts(self) -> dict[str, int]:
        """What the engine counted: blocks, virtual time, exceptions, interrupts, system calls."""
        counts = Counter(self.engine.cpu.counts)
        counts.update(self._counted)
        return {"ticks": self.engine.cpu.ticks, **counts}

    @property
    def crash(self) -> CrashReport | None:
        """What the guest reported when it crashed last."""
        return self._crash.report

    @property
    def virtual_seconds(self) -> float:
        """The guest's time since it was started."""
        return self.engine.cpu.ticks / SECOND

    def run(
        self,
        until: Pattern | None = None,
        *,
        virtual_seconds: float | None = None,
        wall_seconds: float | None = None,
        idle: Callable[[int | None], bool] | None = None,
        poll: Callable[[], None] | None = None,
        paced: bool = False,
    ) -> Result:
        """Run the guest until it ends, says something, or reaches a limit.

        Args:
            until: stop as soon as this appears in its output (a compiled pattern of bytes is a regular
                expression). Output that an earlier run matched does not count again. A guest that never says it and
                has timers - every Linux has - goes on for ever, in skipped time: give a limit as well.
            virtual_seconds: stop after so much of the guest's time.
            wall_seconds: stop after so much host time.
            idle, poll: see `UnicornEngine`. The machine's networks are polled in any case; without `idle`, a guest
                with a network to the outside waits in real time, and idle time of others is skipped. The run ends as
                `IDLE` when the guest waits without a timer and no driver of its listens on such a network.
            paced: hold its clock to the host's while it waits (`vmbus.engine.pace`) also without such a network.

        Raises:
            LocalProtocolError: the guest has ended already, or the machine is closed.
            EngineError: the engine cannot go on.
        """
        if self._ended is not None:
            raise LocalProtocolError(f"this guest has ended: {self._ended.value}")
        self._check_open()
        self._outcome = None
        self._matched = False
        wall, cpu = time.monotonic(), time.process_time()
        if until is not None:
            self.console.expect(until, self._on_match)
            if self.console.search():
                self.console.forget()
                return self._result(Outcome.MATCHED, wall, cpu)
        limit = None
        if virtual_seconds is not None and virtual_seconds < math.inf:
            limit = self.engine.cpu.ticks + int(virtual_seconds * SECOND)
        deadline = None if wall_seconds is None else wall + wall_seconds
        reboots = 0
        self._running = True
        try:
            while True:
                self.engine.idle = self._idle if idle is None else idle
                self.engine.paced = lambda: paced or self.network.is_live
                self.engine.poll = lambda: self._poll(poll)
                outcome = self._outcome_of(self.engine.run(virtual_limit=limit, wall_limit=deadline))
                if not (self._reboot and self._reset_asked):
                    break
                reboots += 1
                self._start_again()
                if self._matched:
                    outcome = Outcome.MATCHED
                    break
        finally:
            self._running = False
            self.console.forget()
        if outcome not in RESUMABLE:
            self._ended = outcome
        return self._result(outcome, wall, cpu, reboots)

    def _outcome_of(self, stop: Stop) -> Outcome:
        outcome = self._outcome if self._outcome is not None else OUTCOMES[stop]
        if self._crash.crashed and outcome in (Outcome.HALTED, Outcome.TRIPLE_FAULT):
            return Outcome.PANIC  # how some kernels end after they have reported it
        return outcome

    def _result(self, outcome: Outcome, wall: float, cpu: float, reboots: int = 0) -> Result:
        wall, cpu = time.monotonic() - wall, time.process_time() - cpu
        return Result(outcome, self.virtual_seconds, wall, cpu, self.crash, reboots)

    def restart(self) -> None:
        """Start the guest again from its kernel, whatever it was doing, as the button on a machine does.

        Memory and processors are as at the start. Disks, networks, counts, the console's transcript, the ledger and the
        clocks go on; the VMBus is there, with its connection gone.

        Raises:
            LocalProtocolError: it runs, or the machine is closed.
        """
        self._check_open()
        if self._running:
            raise LocalProtocolError("the guest runs: stop it before you start it again")
        self._start_again()

    def _start_again(self) -> None:
        if self.bus is not None:
            self.bus.reset()
        else:
            self._pci.reset()
            if self.ide is not None:
                self.ide.reset()
        self.network.reset()
        self._uart.reset()
        self.partition.reset()
        self._io_apic.reset()
        self._counted.update(self.engine.cpu.counts)
        self.engine.close()
        memory = self.partition.memory
        with mmap.mmap(memory.fd, memory.size) as pages:
            pages.madvise(mmap.MADV_REMOVE)  # gives the pages back: what is read there is zero again
        self.engine = UnicornEngine(self.partition.vps)
        self.engine.cpu.advance_to(self.hypervisor.clock.now())
        self._crash.new_kernel()
        self._load(_unpacked(self._kernel, self._unpack, self.partition.memory.size))
        self._outcome = self._ended = None
        self._reset_asked = False

    def _poll(self, more: Callable[[], None] | None) -> None:
        self.network.poll()
        if more is not None:
            more()

    def _idle(self, until_timer: int | None) -> bool:
        if until_timer is None and not self.network.is_listening:
            return False  # no frame could wake it
        return self.network.idle(until_timer)

    @property
    def takes_input(self) -> bool:
        """Whether what is typed interrupts the guest, so that it may wake it."""
        return self._uart.is_listening

    def stop(self) -> None:
        """Make `run` return; for calls from inside it."""
        self._end(Outcome.STOPPED)

    def _on_match(self) -> None:
        self._matched = True
        self._end(Outcome.MATCHED)

    def _on_reset(self) -> None:
        self._reset_asked = True
        self._end(Outcome.PANIC if self._crash.panicked else Outcome.REBOOT)

    def _end(self, outcome: Outcome) -> None:
        if self._outcome is None or self._outcome in RESUMABLE:
            self._outcome = outcome
        self.engine.stop()

    def _on_output(self, data: bytes) -> None:
        self.console.feed(data)
        self._crash.read(data)

    def _on_power(self, action: PowerAction) -> None:
        if action is PowerAction.POWER_OFF:
            self._end(Outcome.POWER_OFF)
        else:
            self._on_reset()

    def _on_event(self, event: PartitionEvent) -> None:
        if event.kind == "crash":
            self._crash.take_report(event.detail)
        elif event.kind == "reset":
            self._on_reset()

    # End of life

    def close(self) -> None:
        """Tear the guest down and free its memory; disks that this machine opened are flushed and closed.

        The console's transcript, the counts and the ledger stay.
        """
        self._closed = True
        self.network.close()
        if self.storage is not None:
            self.storage.shutdown()
        if self.bus is not None:
            self.bus.close()
        self._close_disks()
        self.engine.close()
        if self.hypervisor.root is not None:
            with suppress(BufferError):  # somebody still looks at the guest's memory
                self.hypervisor.root.destroy()

    def _close_disks(self) -> None:
        while self._opened:
            _flush_and_close(self._opened.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _flush_and_close(disk: Disk) -> None:
    try:
        disk.flush()
    finally:
        disk.close()


def _address(lun: int) -> Address:
    return (0, lun)


def _real_time_clock(wanted: str | datetime, clock: VirtualClock) -> RealTimeClock:
    if wanted == "host":
        return RealTimeClock(time.time_ns, EPOCH)
    if wanted == "fixed":
        return RealTimeClock(clock.now)
    if isinstance(wanted, str):
        raise BootError(f"a clock is 'fixed', 'host' or a date and time, not {wanted!r}")
    if not isinstance(wanted, datetime):
        raise TypeError(f"a clock is 'fixed', 'host' or a date and time, not {wanted!r}")
    try:
        return RealTimeClock(clock.now, wanted if wanted.tzinfo else wanted.replace(tzinfo=UTC))
    except OverflowError as error:
        raise BootError(f"{wanted}: in UTC this is no date") from error


def _contents(source: str | os.PathLike[str] | bytes, most: int) -> bytes:
    """A file's bytes, up to `most`; it may be a pipe, or a device that never ends."""
    if isinstance(source, bytes):
        return source
    with open(source, "rb") as file:
        if os.fstat(file.fileno()).st_size <= most and len(contents := file.read(most + 1)) <= most:
            return contents
    raise SizeError(f"{os.fspath(source)} has more than {most >> 20} MiB")


def _parse(image: bytes, name: str, unpack: str, memory: int) -> Kernel:
    """The kernel in a file's bytes; errors name the file, if it is one."""
    if unpack not in ("auto", "host", "guest"):
        raise BootError(f"a kernel is unpacked by 'host', 'guest' or 'auto', not by {unpack!r}")
    try:
        return _unpacked(image, unpack, memory)
    except BootError as error:
        if not name:
            raise
        raise type(error)(f"{name}: {error}") from error


def _unpacked(image: bytes, unpack: str, memory: int) -> Kernel:
    kernel = parse_kernel(image)
    if not kernel.compressed or unpack == "guest":
        return kernel
    try:
        return parse_kernel(unpack_kernel(image, memory))
    except KernelError:
        raise  # the kernel could not do it either
    except BootError:
        if unpack == "host":
            raise
        log.info("the kernel unpacks itself", exc_info=True)
        return kernel

"""A guest's network interface on emulated hardware: a DEC 21140, its driver partly machine code.

`TulipNic` sends and receives frames like the enlightened client does. It finds and sets up the adapter through
intercepted configuration, port and memory accesses of the virtual processor; the data path, and the interrupt
handler, are machine code that the x86 engine executes in the child's memory.
"""

import struct
from collections.abc import Sequence

from vmbus.emulated.guest import FrameBuffer, Nic, interrupt_table, tulip_io
from vmbus.emulated.pci import CONFIG_ADDRESS, CONFIG_DATA, ConfigOffset, PciCommand
from vmbus.emulated.tulip import DEVICE_ID, MOST_FRAME, SETUP_SIZE, VENDOR_ID, Csr, Descriptor, Mode, Status
from vmbus.engine import Halt
from vmbus.engine.x86 import X86Engine
from vmbus.errors import DeviceError, LocalProtocolError
from vmbus.hypervisor import VirtualProcessor

__all__ = ["TulipNic"]

RSP, RDX, RSI, RDI = 4, 2, 6, 7
PAGE = 4096
ENTRIES = 64
"""Descriptors of each ring."""
BUFFER_SIZE = 2048
BATCH = 64
"""Frames that one entry into the guest handles."""
CONFIG_ENABLE = 0x80000000
REGISTERS_AT = 0xFEB00000
"""Where the driver puts the registers in memory: below the I/O APIC, where firmware places devices."""
PORTS_AT = 0xC000
RESET = 1
FULL_DUPLEX = 0x200
BROADCAST = b"\xff" * 6
STEPS = 1 << 28


class TulipNic:
    """The DEC 21140 of a partition, driven from its virtual processor.

    The driver owns 4 pages for code, stack, IDT and its state, one for both rings, one for frame lists, and 128
    buffers of 2 KiB, from `base` on.

    Args:
        vp: the virtual processor that executes the driver.
        base: guest physical address of the driver's memory, page-aligned, below 4 GB.
        ports: reach the registers through ports instead of memory.
        line: the interrupt line that the adapter's INTA# is routed to.

    Attributes:
        mac: the address in the adapter's serial ROM.
        mtu: bytes of the longest payload.
        engine: the engine that executes the driver.

    Raises:
        DeviceError: there is no such adapter on PCI bus 0.
        LocalProtocolError: `base` does not fit.
    """

    mtu = 1500

    def __init__(
        self, vp: VirtualProcessor, *, base: int = 0x200000, ports: bool = False, line: int = 11
    ) -> None:
        if base % PAGE or base + 7 * PAGE + 2 * BATCH * BUFFER_SIZE > 1 << 32:
            raise LocalProtocolError("the driver wants whole pages below 4 GB")
        self._vp = vp
        self._memory = vp.partition.memory
        self._ports = ports
        self._code, self._stack, self._idt, self._state = (
            base,
            base + 2 * PAGE,
            base + 2 * PAGE,
            base + 3 * PAGE,
        )
        self._tx_ring, self._rx_ring, self._list = base + 4 * PAGE, base + 4 * PAGE + 2048, base + 5 * PAGE
        self._receive_buffers = base + 6 * PAGE
        self._frames = self._receive_buffers + ENTRIES * BUFFER_SIZE
        self._registers = self._find()
        self.mac = self._read_address()
        self.engine = X86Engine(vp)
        vector = vp.partition.devices.irq_base + line
        self._memory.write(base, tulip_io.CODE)
        self._memory.write(self._idt, interrupt_table(base, tulip_io.SPURIOUS, {vector: tulip_io.ISR}))
        self.engine.cpu.idt = (self._idt, PAGE - 1)
        self._start()

    def __repr__(self) -> str:
        return f"<TulipNic {self.mac.hex(':')}>"

    # frames

    def send(self, frame: bytes) -> bool:
        """Send a frame without check sequence; False if the ring is full."""
        return self.send_batch([frame]) == 1

    def send_batch(self, frames: Sequence[bytes]) -> int:
        """Send frames in order; returns how many the adapter took.

        Raises:
            DeviceError: the adapter or its driver does not work any more.
            LocalProtocolError: a frame is longer than the adapter sends.
        """
        done = 0
        while done < len(frames):
            part = frames[done : done + BATCH]
            entries = bytearray()
            for number, frame in enumerate(part):
                if not 14 <= len(frame) <= MOST_FRAME:
                    raise LocalProtocolError(f"a frame has 14 to {MOST_FRAME} bytes, not {len(frame)}")
                at = self._frames + number * BUFFER_SIZE
                self._memory.write(at, frame)
                entries += FrameBuffer(buffer=at, length=len(frame), reserved=0).pack()
            self._memory.write(self._list, entries)
            taken = self._run(tulip_io.SEND, len(part))
            done += taken
            if taken < len(part):
                break
        return done

    def receive(self, limit: int = BATCH) -> list[bytes]:
        """Frames that have arrived, without check sequence, at most `limit`.

        Raises:
            DeviceError: the adapter or its driver does not work any more.
        """
        frames: list[bytes] = []
        while len(frames) < limit:
            want = min(limit - len(frames), BATCH)
            places = [self._frames + number * BUFFER_SIZE for number in range(want)]
            self._memory.write(
                self._list, b"".join(FrameBuffer(buffer=at, length=0, reserved=0).pack() for at in places)
            )
            count = self._run(tulip_io.RECEIVE, want)
            entries = self._memory.read(self._list, count * FrameBuffer.SIZE)
            for number in range(count):
                entry = FrameBuffer.unpack(entries, number * FrameBuffer.SIZE)
                frames.append(self._memory.read(entry.buffer, entry.length))
            if count < want:
                break
        return frames

    @property
    def state(self) -> Nic:
        """The driver's state as it is in guest memory."""
        return Nic.unpack(self._memory.read(self._state, Nic.SIZE))

    # set-up

    def _config_read(self, slot: int, offset: int, size: int) -> int:
        self._vp.io_write(CONFIG_ADDRESS, 4, CONFIG_ENABLE | slot << 11 | offset & ~3)
        return self._vp.io_read(CONFIG_DATA + (offset & 3), size)

    def _config_write(self, slot: int, offset: int, size: int, value: int) -> None:
        self._vp.io_write(CONFIG_ADDRESS, 4, CONFIG_ENABLE | slot << 11 | offset & ~3)
        self._vp.io_write(CONFIG_DATA + (offset & 3), size, value)

    def _find(self) -> int:
        """Find the adapter, give its registers an address, and let it access memory."""
        for slot in range(32):
            if self._config_read(slot, ConfigOffset.VENDOR_ID, 4) != DEVICE_ID << 16 | VENDOR_ID:
                continue
            at = PORTS_AT if self._ports else REGISTERS_AT
            self._config_write(slot, ConfigOffset.BAR0 + (0 if self._ports else 4), 4, at)
            space = PciCommand.IO if self._ports else PciCommand.MEMORY
            self._config_write(slot, ConfigOffset.COMMAND, 2, space | PciCommand.BUS_MASTER)
            return at
        raise DeviceError("there is no DEC 21140 on PCI bus 0")

    def _read(self, csr: int) -> int:
        if self._ports:
            return self._vp.io_read(self._registers + 8 * csr, 4)
        return self._vp.mmio_read(self._registers + 8 * csr, 4)

    def _write(self, csr: int, value: int) -> None:
        if self._ports:
            self._vp.io_write(self._registers + 8 * csr, 4, value)
        else:
            self._vp.mmio_write(self._registers + 8 * csr, 4, value)

    def _read_address(self) -> bytes:
        """Words 10 to 12 of the serial ROM (`vmbus.emulated.srom`), bit by bit."""
        select, clock, data = 0x4801, 0x2, 0x4
        words = []
        for address in range(10, 13):
            self._write(Csr.SERIAL_ROM, 0x4800)
            for bit in f"110{address:06b}":
                line = select | (data if bit == "1" else 0)
                self._write(Csr.SERIAL_ROM, line)
                self._write(Csr.SERIAL_ROM, line | clock)
            word = 0
            for _ in range(16):
                self._write(Csr.SERIAL_ROM, select)
                self._write(Csr.SERIAL_ROM, select | clock)
                word = word << 1 | (self._read(Csr.SERIAL_ROM) >> 3 & 1)
            words.append(word)
        self._write(Csr.SERIAL_ROM, 0)
        return struct.pack("<3H", *words)

    def _start(self) -> None:
        """Rings, address filter, interrupts."""
        memory = self._memory
        self._write(Csr.BUS_MODE, RESET)
        receive = bytearray()
        for number in range(ENTRIES):
            control = BUFFER_SIZE - 4 | (Descriptor.END_OF_RING if number == ENTRIES - 1 else 0)
            receive += struct.pack(
                "<4I", Descriptor.OWN, control, self._receive_buffers + number * BUFFER_SIZE, 0
            )
        memory.write(self._rx_ring, receive)
        memory.write(self._tx_ring, bytes(16 * ENTRIES))
        # the first descriptor carries the setup frame: this station, and everybody
        addresses = self.mac + BROADCAST * 15
        setup = b"".join(addresses[i : i + 2] + bytes(2) for i in range(0, len(addresses), 2))
        memory.write(self._frames, setup)
        memory.write(
            self._tx_ring,
            struct.pack("<4I", Descriptor.OWN, Descriptor.TX_SETUP | SETUP_SIZE, self._frames, 0),
        )
        state = Nic(
            registers=self._registers,
            ports=int(self._ports),
            entries=ENTRIES,
            tx_ring=self._tx_ring,
            rx_ring=self._rx_ring,
            tx_head=1,
            rx_head=0,
            status=0,
            interrupts=0,
            result=0,
            dropped=0,
            reserved=0,
        )
        memory.write(self._state, state.pack())
        self._write(Csr.RECEIVE_LIST, self._rx_ring)
        self._write(Csr.TRANSMIT_LIST, self._tx_ring)
        wanted = Status.TRANSMITTED | Status.RECEIVED | Status.RECEIVE_NO_BUFFER | Status.BUS_ERROR
        self._write(Csr.OPERATION_MODE, Mode.TRANSMIT | Mode.RECEIVE | FULL_DUPLEX)
        self._write(Csr.STATUS, 0x1FFFF)
        self._write(Csr.INTERRUPT_ENABLE, wanted | Status.NORMAL | Status.ABNORMAL)

    def _run(self, entry: int, count: int) -> int:
        """Execute one entry of the driver; returns the frames that it handled."""
        cpu = self.engine.cpu
        cpu.rip = self._code + entry
        cpu.set_register(RDI, self._state)
        cpu.set_register(RSI, self._list)
        cpu.set_register(RDX, count)
        cpu.set_register(RSP, self._stack)
        cpu.rflags = 0x002
        exit = self.engine.execute(STEPS)
        if exit != Halt(interruptible=False):
            raise DeviceError(f"the network driver did not finish: {exit} at {cpu.rip:#x}")
        state = self.state
        if state.status & Status.BUS_ERROR:
            raise DeviceError("the network adapter reports a bus error")
        return state.result

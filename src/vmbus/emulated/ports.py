"""Where emulated devices sit in a partition: PC port numbers, interrupt lines, accounts."""

from collections.abc import Callable

from vmbus.emulated.ata import Backend
from vmbus.emulated.ide import PRIMARY_CONTROL, PRIMARY_IRQ, PRIMARY_PORT, IdeChannel
from vmbus.emulated.pci import Bar, PciBus, PciCommand, PciFunction, host_bridge
from vmbus.emulated.srom import TULIP_SUBSYSTEM
from vmbus.emulated.tulip import DEVICE_ID, REGISTERS_SIZE, VENDOR_ID, Tulip
from vmbus.emulated.uart import COM1_IRQ, COM1_PORT, Uart16550
from vmbus.hypervisor import Partition

__all__ = [
    "TULIP_IRQ",
    "TULIP_SLOT",
    "attach_ide",
    "attach_pci",
    "attach_tulip",
    "attach_uart",
    "detach_ide",
    "line",
]

TULIP_SLOT = 10
"""PCI slot of the legacy network adapter in a generation 1 machine."""
TULIP_IRQ = 11


def line(partition: Partition, number: int) -> Callable[[bool], None]:
    """What drives interrupt line `number` of a partition, as the `interrupt` of a device."""
    devices = partition.devices

    def drive(level: bool) -> None:
        if level:
            devices.raise_irq(number)
        else:
            devices.lower_irq(number)

    return drive


def attach_ide(partition: Partition, master: Backend, slave: Backend | None = None) -> IdeChannel:
    """Give a partition the primary IDE channel; it counts in the account ``"ide"``.

    Raises:
        DeviceError: a medium does not fit an ATA disk.
        ValueError: the ports are taken.
    """
    account = partition.hypervisor.ledger.account(partition.name, "ide")
    channel = IdeChannel(master, slave, interrupt=line(partition, PRIMARY_IRQ), account=account)
    partition.devices.add_ports(PRIMARY_PORT, 8, channel)
    partition.devices.add_ports(PRIMARY_CONTROL, 1, channel)
    return channel


def detach_ide(partition: Partition) -> None:
    """Take the primary IDE channel away again."""
    partition.devices.remove_ports(PRIMARY_PORT, 8)
    partition.devices.remove_ports(PRIMARY_CONTROL, 1)


def attach_uart(partition: Partition, output: Callable[[bytes], None]) -> Uart16550:
    """Give a partition its first serial port; it counts in the account ``"uart"``.

    Raises:
        ValueError: the ports are taken.
    """
    account = partition.hypervisor.ledger.account(partition.name, "uart")
    uart = Uart16550(output, line(partition, COM1_IRQ), account)
    partition.devices.add_ports(COM1_PORT, 8, uart)
    return uart


def attach_pci(partition: Partition) -> PciBus:
    """Give a partition PCI bus 0 with a host bridge.

    Raises:
        ValueError: the ports are taken.
    """
    bus = PciBus(partition.devices)
    bus.add(0, host_bridge())
    return bus


def attach_tulip(
    partition: Partition,
    bus: PciBus,
    address: bytes,
    transmit: Callable[[bytes], None],
    *,
    slot: int = TULIP_SLOT,
    irq: int = TULIP_IRQ,
    interrupt: Callable[[bool], None] | None = None,
) -> tuple[Tulip, PciFunction]:
    """Plug a DEC 21140 into a partition; it counts in the account ``"tulip"``.

    Args:
        partition: the guest.
        bus: its PCI bus.
        address: six bytes, the Ethernet address of one station.
        transmit: called with each frame that the guest sends.
        slot: PCI slot.
        irq: the interrupt line that INTA# is routed to.
        interrupt: called with INTA#'s new level instead, where something else routes it.

    Raises:
        LocalProtocolError: the slot is taken, or that is no address.
    """
    account = partition.hypervisor.ledger.account(partition.name, "tulip")
    tulip = Tulip(
        partition.memory, address, transmit, interrupt=interrupt or line(partition, irq), account=account
    )
    function = PciFunction(
        VENDOR_ID,
        DEVICE_ID,
        0x020000,  # an Ethernet controller
        revision=0x20,  # 21140A
        subsystem=TULIP_SUBSYSTEM,
        bars=(Bar(REGISTERS_SIZE, io=True), Bar(REGISTERS_SIZE, io=False)),
        registers=tulip,
        interrupt_pin=1,
    )
    tulip.bus_master = False

    def command(value: int) -> None:
        tulip.bus_master = bool(value & PciCommand.BUS_MASTER)

    function.on_command = command
    bus.add(slot, function)
    return tulip, function

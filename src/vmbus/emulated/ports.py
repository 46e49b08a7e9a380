"""Where emulated devices sit in a partition: PC port numbers, interrupt lines, accounts."""

from collections.abc import Callable

from vmbus.emulated.ata import Backend
from vmbus.emulated.ide import PRIMARY_CONTROL, PRIMARY_IRQ, PRIMARY_PORT, IdeChannel
from vmbus.emulated.uart import COM1_IRQ, COM1_PORT, Uart16550
from vmbus.hypervisor import Partition

__all__ = ["attach_ide", "attach_uart", "detach_ide", "line"]


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

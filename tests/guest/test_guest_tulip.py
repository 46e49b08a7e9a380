"""Debian's own tulip driver on the emulated DEC 21140: the network of a Linux that sees a plain PC.

The cloud kernel of the other tests has no such driver, so the distribution's general kernel is prepared beside it.
"""

import hashlib
import os
import random
from collections.abc import Callable
from typing import Any

import pytest

from vmbus.errors import DeviceError
from vmbus.machine.guest import Machine
from vmbus.machine.linux import BootError
from vmbus.machine.packages import Guest, prepare_guest

pytestmark = [pytest.mark.guest, pytest.mark.slow]

KERNEL = "linux-image-amd64"
SIZE = 2_000_000


@pytest.fixture(scope="session")
def pc(guest: Guest) -> Guest:
    """The general kernel, in a cache of its own beside the other's."""
    folder = guest.kernel.parent
    try:
        return prepare_guest(folder.with_name(folder.name + "-pc"), package=KERNEL)
    except BootError as error:
        if os.environ.get("CI"):
            pytest.fail(f"CI has to run the guest tests: {error}")
        pytest.skip(str(error))


def test_linux_without_enlightenments_has_a_network(
    pc: Guest, shell: Any, serve: Any, needs: Callable[[str], str]
) -> None:
    """Address by DHCP and a file by TCP, through port accesses, DMA and a level-triggered interrupt line."""
    needs("passt")
    data = random.Random(1).randbytes(SIZE)
    with Machine(
        pc.kernel,
        initrd=pc.initramfs,
        append="console=ttyS0 quiet ip=dhcp panic=-1",
        enlightenments=False,
        networks=["passt,loopback=on"],
    ) as machine:
        run = shell(machine)
        assert "eth0: 10.0.2.15/24, router 10.0.2.2" in machine.console.text
        assert "Digital DS21140 Tulip" in run("dmesg")
        assert "00:15:5d:00:00:01" in run("ip link show eth0")
        run("sleep 6")  # the driver looks after its link every few seconds
        assert run("cat /sys/class/net/eth0/carrier") == "1\n"
        assert "hyperv" not in run("cat /proc/modules; ls /sys/bus").lower()
        with serve("127.0.0.1", data) as server:
            run(f"wget -q -O /f http://10.0.2.2:{server.port}/f")
        assert hashlib.sha256(data).hexdigest() in run("sha256sum /f")
        assert "IO-APIC  17-fasteoi   eth0" in run("grep eth0 /proc/interrupts")
        account = machine.ledger.account("linux", "tulip")
        assert account.bytes_copied > SIZE
        assert account.packets_received > SIZE // 1460
        assert not machine.partition.account.hypercalls
        assert machine.network.interfaces[0].device.dropped < 10, "the ring is refilled from the host's queue"
        with pytest.raises(DeviceError, match="when the machine starts"):
            machine.network.add("none")
        machine.network.interfaces[0].device.set_link(False)
        run(
            "n=0; until [ $(cat /sys/class/net/eth0/carrier) = 0 ]; do n=$((n+1)); [ $n = 90 ] && exit 1; sleep 1; done"
        )
        machine.network.interfaces[0].device.set_link(True)
        run("rmmod tulip; insmod /lib/modules/tulip.ko; ip link set eth0 up")
        run("udhcpc -i eth0 -n -q -t 5 -T 2 -s /etc/udhcpc.script")

"""An unmodified Linux hv_vmbus against VmbusHost: what its storage driver alone does not reach."""

import hashlib
import time
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest

from vmbus.storage.disk import MemoryDisk, RawDisk
from vmbus.storage.vsp import StorageVsp

pytestmark = [pytest.mark.guest, pytest.mark.slow]

LATENCY = 500_000
WAIT = "for i in 1 2 3 4 5 6 7 8 9; do test {test} /dev/sda && break; sleep 0.3; done; test {test} /dev/sda"


def a_disk(tmp_path: Path) -> tuple[Path, str]:
    image = tmp_path / "disk.img"
    image.write_bytes(b"".join(n.to_bytes(8, "little") * 64 for n in range(4096)))
    return image, hashlib.sha256(image.read_bytes()).hexdigest()


def test_linux_rings_by_monitored_notification(boot, shell, tmp_path: Path) -> None:
    image, digest = a_disk(tmp_path)
    machine = boot()
    run = shell(machine)
    provider = StorageVsp({(0, 0): RawDisk(image)}, instance_id=UUID(int=0x1234))
    provider.offer = replace(provider.offer, monitor_latency=LATENCY)
    machine.offer(provider, "monitored")
    run(WAIT.format(test="-b"))
    bus = machine.bus
    known = next(c for c in bus.machine.channels.values() if c.offer.key == provider.offer.key)
    assert known.monitor_id is not None
    signals = machine.partition.account.hypercalls[0x5D]
    before = bus.monitor.notifications
    assert digest in run("sha256sum /dev/sda")
    assert bus.monitor.notifications > before
    assert machine.partition.account.hypercalls[0x5D] == signals, "not one HvSignalEvent"
    # Linux shows what the host wrote into the monitor page.
    folder = "/sys/bus/vmbus/devices/00000000-0000-0000-0000-000000001234"
    assert str(LATENCY // 100) in run(f"cat {folder}/client_monitor_latency").split()
    assert str(0x2000 | known.channel_id) in run(f"cat {folder}/client_monitor_conn_id").split()


def test_linux_gives_up_a_rescinded_disk_and_takes_it_again(boot, shell, tmp_path: Path) -> None:
    image, digest = a_disk(tmp_path)
    machine = boot()
    run = shell(machine)
    provider = StorageVsp({(0, 0): RawDisk(image)}, instance_id=UUID(int=0x1234))
    for _ in range(2):
        offered = machine.offer(provider, "comes and goes")
        run(WAIT.format(test="-b"))
        assert digest in run("sha256sum /dev/sda")
        # sd would flush the write cache of the disk that is gone, and storvsc never gives such a request up.
        run("for c in /sys/class/scsi_disk/*/cache_type; do echo temporary write through > $c; done")
        offered.rescind()
        assert offered.channel is None
        run(WAIT.format(test="! -e"))
        started = time.monotonic()
        while offered.is_present and time.monotonic() - started < 60:
            run("sleep 0.1")
        assert not offered.is_present, "Linux released the channel id"
    assert machine.bus.violations == 0
    machine.bus.machine.check()


def test_what_a_guest_uses_of_its_budget_is_what_the_page_says(boot, shell) -> None:
    page = (Path(__file__).parents[2] / "docs" / "budgets.md").read_text()
    machine = boot(processors=2, networks=["none", "none"], disks=[MemoryDisk(64 << 20)])
    run = shell(machine)
    run("ip link set eth0 up; ip link set eth1 up; sleep 1")
    meter = machine.partition.meter
    assert f"a disk and two adapters, {meter.mappings.used} in all" in page
    assert f"the guest above has {meter.gpadls.used} |" in page
    assert f"the guest above has {meter.gpadl_pages.used:,} |" in page

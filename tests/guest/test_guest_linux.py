"""Debian's stock kernel as a child partition: its own drivers against our bus and storage provider."""

import hashlib
import re
import subprocess
from pathlib import Path

import pytest

from vmbus.bus.versions import Version
from vmbus.machine.guest import Outcome
from vmbus.machine.packages import Guest, make_root_disk

pytestmark = [pytest.mark.guest, pytest.mark.slow]

WRITER = b"""#!/bin/busybox sh
dd if=/dev/urandom of=/file bs=1M count=64 2>/dev/null && sync && sha256sum /file
"""


def test_root_file_system_on_the_storage_provider(guest: Guest, boot, shell, tmp_path: Path) -> None:
    image = tmp_path / "root.img"
    make_root_disk(image, 192 << 20, guest.busybox.read_bytes(), files={"bin/writer": WRITER})
    machine = boot(disks=[image], append="console=ttyS0 panic=-1 root=/dev/sda")
    run = shell(machine)
    log = machine.console.text
    assert "Hypervisor detected: Microsoft Hyper-V" in log
    assert "hv_vmbus: Vmbus version:5.3" in log
    assert "hv_vmbus: registering driver hv_storvsc" in log
    assert re.search(r"scsi 0:0:0:0: Direct-Access +Msft +Virtual Disk", log)
    assert re.search(r"^/dev/sda / ext4 rw", run("grep ' / ' /proc/mounts"), re.MULTILINE)
    checksum = re.search(r"([0-9a-f]{64})  /file", run("writer"))
    assert checksum
    run.power_off()
    machine.close()
    check = subprocess.run(["e2fsck", "-fn", image], capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stdout + check.stderr
    content = subprocess.run(["debugfs", "-R", "cat /file", image], capture_output=True, check=True).stdout
    assert len(content) == 64 << 20
    assert hashlib.sha256(content).hexdigest() == checksum[1]
    storage = machine.ledger.account("root", "linux/storage")
    assert storage.packets_received > 100
    assert storage.doorbells_sent > 0
    assert machine.partition.account.hypercalls[0x5D] > 0


def test_block_sizes_and_whole_disk_with_direct_io(boot, shell, image: Path) -> None:
    before = image.read_bytes()
    run = shell(boot(disks=[image]))
    assert hashlib.sha256(before).hexdigest() in run("sha256sum /dev/sda")
    sizes = [512 << n for n in range(12)]  # to 1 MiB
    for size in sizes:
        count = min(500, (4 << 20) // size)
        part = hashlib.sha256(before[: count * size]).hexdigest()
        command = f"dd if=/dev/sda bs={size} count={count} iflag=direct 2>/dev/null | sha256sum"
        assert part in run(command), f"block size {size}"
    expected = bytearray(before)
    for index, size in enumerate(sizes, 1):
        seek = index % 6 + 1
        run(f"dd if=/dev/zero of=/dev/sda bs={size} seek={seek} count=1 oflag=direct")
        expected[seek * size : (seek + 1) * size] = bytes(size)
    run("sync")
    assert image.read_bytes() == expected


def test_driver_unloads_and_loads_again(boot, shell, image: Path) -> None:
    machine = boot(disks=[image])
    run = shell(machine)
    assert machine.bus.channels
    run("rmmod hv_storvsc")
    assert not machine.bus.channels
    run("test ! -e /dev/sda")
    run("insmod /lib/modules/hv_storvsc.ko; sleep 1")
    assert hashlib.sha256(image.read_bytes()).hexdigest() in run("sha256sum /dev/sda")


@pytest.mark.parametrize("processors", [1, 2])
def test_the_bus_driver_unloads_and_loads_again(boot, shell, image: Path, processors: int) -> None:
    # Its clock event device goes with it: Linux falls back to the local APIC's timer, if that looks like one for it.
    machine = boot(disks=[image], processors=processors)
    run = shell(machine)
    device = "cat /sys/devices/system/clockevents/clockevent0/current_device"
    assert "Hyper-V clockevent" in run(device)
    for _ in range(3):
        run("for m in hv_netvsc hv_storvsc hv_utils hv_vmbus; do rmmod $m || exit; done")
        assert not machine.bus.channels
        run("test ! -e /sys/bus/vmbus")
        assert re.search(r"^lapic", run(device), re.MULTILINE)
        run("sleep 0.5; uptime")
        run(
            "for m in hv_vmbus hv_storvsc hv_utils hv_netvsc; do insmod /lib/modules/$m.ko || exit; done; sleep 1"
        )
        assert hashlib.sha256(image.read_bytes()).hexdigest() in run("sha256sum /dev/sda")


def test_timers_in_direct_mode(boot, shell) -> None:
    run = shell(boot(direct_timers=True))
    before, after = (
        int(re.search(r"HVS: +(\d+)", run("sleep 0.2; cat /proc/interrupts"))[1]) for _ in range(2)
    )
    assert after > before
    assert "Hyper-V stimer0" in run("cat /proc/interrupts")


def test_linux_sees_what_the_machine_says_that_it_is(boot, shell) -> None:
    machine = boot(processors=2)
    run = shell(machine)
    log = run("dmesg")
    assert "DMI: Microsoft Corporation Virtual Machine/Virtual Machine, BIOS Hyper-V UEFI Release v4.1" in log
    assert "SMBIOS 3.1.0 present" in log
    field = "cat /sys/class/dmi/id/"
    for name in ("sys_vendor", "board_vendor", "chassis_vendor", "bios_vendor"):
        assert "Microsoft Corporation" in run(field + name)
    assert re.search(r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", run(field + "product_uuid"), re.MULTILINE)
    assert re.search(r"^(\d{4}-){6}\d\d\s", run(field + "product_serial"), re.MULTILINE)
    flags = re.search(r"^flags\s*: (.*)$", run("cat /proc/cpuinfo"), re.MULTILINE)
    assert flags
    shown = set(flags[1].split())
    assert {"pni", "ssse3", "cx16", "sse4_1", "sse4_2", "popcnt", "lahf_lm"} <= shown, "x86-64-v2"
    assert {"movbe", "aes", "pclmulqdq", "bmi1", "bmi2", "abm", "constant_tsc", "nonstop_tsc"} <= shown
    assert not shown & {"arat", "tsc_deadline_timer"}
    cache = "cat /sys/devices/system/cpu/cpu0/cache/index"
    assert "32K" in run(f"{cache}0/size")
    assert "16384K" in run(f"{cache}3/size")
    assert "0-1" in run(f"{cache}3/shared_cpu_list")


def test_a_lun_comes_and_goes(boot, shell, image: Path, tmp_path: Path) -> None:
    machine = boot(disks=[image])
    run = shell(machine)
    run("test -b /dev/sda && test ! -e /dev/sdb")
    second = tmp_path / "second.img"
    second.write_bytes(bytes(range(256)) * 4096)
    machine.add_disk(second, 1)
    run("for i in 1 2 3 4 5 6 7 8 9; do test -b /dev/sdb && break; sleep 0.5; done; test -b /dev/sdb")
    assert hashlib.sha256(second.read_bytes()).hexdigest() in run("sha256sum /dev/sdb")
    machine.remove_disk(1)
    run("for i in 1 2 3 4 5 6 7 8 9; do test -b /dev/sdb || break; sleep 0.5; done; test ! -e /dev/sdb")
    run("test -b /dev/sda")


def test_kernel_that_unpacks_itself(boot, shell) -> None:
    run = shell(boot(unpack="guest"))
    assert "Linux" in run("uname -a")


@pytest.mark.parametrize("version", [Version.V2_4, Version.V4_0, Version.V5_3])
def test_older_bus_versions(boot, shell, image: Path, version: Version) -> None:
    machine = boot(disks=[image], versions=frozenset({version}))
    run = shell(machine)
    assert machine.bus.version == version
    assert hashlib.sha256(image.read_bytes()).hexdigest() in run("sha256sum /dev/sda")


def test_without_enlightenments(boot, shell) -> None:
    machine = boot(enlightenments=False, append="console=ttyS0 panic=-1")
    run = shell(machine)
    assert "Hypervisor detected" not in machine.console.text
    assert machine.partition.account.hypercalls.total() == 0
    run("test ! -e /sys/bus/vmbus/devices/6c2ab6f0-4f0e-4f4e-9d5e-0f2b1f7a5c01")


def test_panic_is_told_apart_and_reports_through_the_crash_registers(boot, shell) -> None:
    machine = boot()
    shell(machine)
    machine.console.send("echo c > /proc/sysrq-trigger\n")
    result = machine.run(wall_seconds=300)
    assert result.outcome is Outcome.PANIC
    assert result.crash is not None


def test_reboot_is_told_apart(boot, shell) -> None:
    machine = boot()
    shell(machine)
    machine.console.send("reboot -f\n")
    assert machine.run(wall_seconds=300).outcome is Outcome.REBOOT


def test_missing_root_disk_ends_at_a_shell_not_in_a_hang(boot, shell) -> None:
    machine = boot(append="console=ttyS0 quiet root=/dev/sdz")
    shell(machine)
    assert "cannot mount /dev/sdz" in machine.console.text

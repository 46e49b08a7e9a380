"""One kernel after another in the same machine: kexec, a crash kernel, hibernation, restarts."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vmbus.machine.guest import Machine, Outcome
from vmbus.machine.packages import Guest, make_root_disk

pytestmark = [pytest.mark.guest, pytest.mark.slow]

MIB = 1 << 20
WALL_LIMIT = 300.0
PLAIN = "console=ttyS0 quiet panic=-1"
SOURCE = Path(__file__).parent / "programs" / "load_kernel.c"
ENVIRONMENT = {**os.environ, "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="module")
def system(guest: Guest, needs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root disk with a label that holds a kernel, an initramfs and a program that loads them."""
    folder = tmp_path_factory.mktemp("system")
    program, image = folder / "load_kernel", folder / "root.img"
    subprocess.run(
        [needs("gcc"), "-static", "-Os", "-s", "-Wall", "-Werror", "-o", program, SOURCE], check=True
    )
    files = {
        "boot/vmlinuz": guest.kernel.read_bytes(),
        "boot/initramfs": guest.initramfs.read_bytes(),
        "sbin/load_kernel": program.read_bytes(),
    }
    make_root_disk(image, 96 * MIB, guest.busybox.read_bytes(), files=files)
    subprocess.run([needs("e2label"), image, "system"], check=True)
    return image


@pytest.fixture
def root(system: Path, tmp_path: Path) -> Path:
    """A copy of it to write to."""
    copy = tmp_path / "root.img"
    subprocess.run(["cp", "--sparse=always", system, copy], check=True)
    return copy


@pytest.fixture
def then(shell):
    """The shell of the kernel that starts after a command."""

    def follow(machine: Machine, command: str):
        machine.console.send(command + "\n")
        result = machine.run(until="built-in shell", wall_seconds=WALL_LIMIT)
        assert result.outcome is Outcome.MATCHED, machine.console.text[-2000:]
        return shell(machine)

    return follow


def test_the_root_disk_is_found_by_label_and_by_uuid(boot, shell, root: Path, image: Path) -> None:
    said = subprocess.run(["dumpe2fs", "-h", root], capture_output=True, text=True, check=True).stdout
    uuid = re.search(r"Filesystem UUID:\s+(\S+)", said)
    assert uuid
    for name in ("LABEL=system", f"UUID={uuid[1]}"):
        machine = boot(disks=[image, root], append=f"{PLAIN} root={name}")
        run = shell(machine)
        run("grep -E '^/dev/sd[ab] / ext4 rw' /proc/mounts")
        run("test -s /boot/vmlinuz")
        run.power_off()
        machine.close()  # the next one has the same disks


def test_a_label_that_nobody_has_ends_at_a_shell(boot, shell) -> None:
    machine = boot(append=f"{PLAIN} root=LABEL=nowhere")
    shell(machine)
    assert "cannot mount LABEL=nowhere" in machine.console.text


def test_kexec_starts_another_kernel(boot, shell, then, root: Path) -> None:
    machine = boot(disks=[root], append=f"{PLAIN} root=LABEL=system", processors=2)
    run = shell(machine)
    run(f"load_kernel /boot/vmlinuz /boot/initramfs '{PLAIN} root=LABEL=system second=1'")
    assert run("cat /sys/kernel/kexec_loaded").strip() == "1"
    run = then(machine, "load_kernel -e")
    assert "second=1" in run("cat /proc/cmdline")
    assert run("nproc").strip() == "2"
    run("grep '^/dev/sda / ext4 rw' /proc/mounts && sha256sum /boot/vmlinuz")
    assert machine.bus.violations == 0
    machine.bus.machine.check()
    run.power_off()


@pytest.mark.parametrize("processors", [1, 2])
def test_a_crash_kernel_starts_after_the_report_sees_the_memory_and_reboots(
    boot, shell, then, root: Path, processors: int
) -> None:
    machine = boot(
        disks=[root],
        networks=["none"],
        append=f"{PLAIN} root=LABEL=system crashkernel=160M",
        memory=640 * MIB,
        processors=processors,
        reboot=True,
    )
    run = shell(machine)
    run(
        f"load_kernel -p /boot/vmlinuz /boot/initramfs '{PLAIN} nr_cpus=1 reset_devices crash=1 root=LABEL=system'"
    )
    assert run("cat /sys/kernel/kexec_crash_loaded").strip() == "1"
    run("ip link set eth0 up")
    run = then(machine, "echo c >/proc/sysrq-trigger")
    assert machine.crash is not None, "it was reported before the crash kernel started"
    assert "crash=1" in run("cat /proc/cmdline")
    assert run("head -c 4 /proc/vmcore | od -An -c").split() == ["177", "E", "L", "F"]
    assert int(run("stat -c %s /proc/vmcore")) > 256 * MIB
    run("dd if=/proc/vmcore bs=1M count=32 2>/dev/null | sha256sum >/dump && sync && test -s /dump")
    run("ip link set eth0 up")
    run = then(machine, "reboot -f")
    said = run("cat /proc/cmdline; test -s /dump && echo dumped")
    assert "crashkernel=160M" in said
    assert "dumped" in said
    run.power_off()
    assert machine.bus.violations == 0


def test_a_reboot_out_of_a_crash_kernel_is_a_reboot(boot, shell, then, root: Path) -> None:
    machine = boot(disks=[root], append=f"{PLAIN} root=LABEL=system crashkernel=160M", memory=640 * MIB)
    run = shell(machine)
    run(f"load_kernel -p /boot/vmlinuz /boot/initramfs '{PLAIN} nr_cpus=1 reset_devices'")
    then(machine, "echo c >/proc/sysrq-trigger")
    machine.console.send("reboot -f\n")
    result = machine.run(wall_seconds=WALL_LIMIT)
    assert result.outcome is Outcome.REBOOT
    assert result.crash is not None


def test_a_kernel_that_panics_and_restarts_has_panicked(boot, shell, then) -> None:
    machine = boot(reboot=True)
    shell(machine)
    then(machine, "echo c >/proc/sysrq-trigger")  # as on a real machine, with panic=-1
    assert machine.crash is not None
    machine = boot()
    shell(machine)
    machine.console.send("echo c >/proc/sysrq-trigger\n")
    assert machine.run(wall_seconds=WALL_LIMIT).outcome is Outcome.PANIC
    machine.restart()
    shell(machine).power_off()


@pytest.mark.parametrize("enlightenments", [True, False])
def test_linux_restarts_with_its_disks_and_its_network(
    boot, shell, then, image: Path, enlightenments: bool
) -> None:
    digest = hashlib.sha256(image.read_bytes()).hexdigest()
    machine = boot(
        disks=[image],
        networks=["none"],
        enlightenments=enlightenments,
        reboot=True,
        append="console=ttyS0 panic=-1",
    )
    run = shell(machine)
    for _ in range(2):
        assert digest in run("sha256sum /dev/sda")
        if enlightenments:
            run("ip link set eth0 up")
        run = then(machine, "reboot -f")
    assert digest in run("sha256sum /dev/sda")
    assert machine.console.text.count("Linux version") == 3
    run.power_off()


# Hibernation, in a process for each half, as a user has it

HALF = """
import sys
from vmbus.machine.guest import Machine, Outcome
kernel, initrd, disk, swap, command_line, *conversation = sys.argv[1:]
with Machine(kernel, initrd=initrd, disks=[disk, swap], append=command_line, memory=192 << 20) as machine:
    for line in conversation:
        assert machine.run(until="# ", wall_seconds=300).outcome is Outcome.MATCHED, machine.console.text[-3000:]
        machine.console.send(line + "\\n")
    result = machine.run(wall_seconds=300)
    print(machine.console.text)
    print("ENDED", result.outcome.name, machine.bus.violations)
"""


def half(guest: Guest, disk: Path, swap: Path, command_line: str, *conversation: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", HALF, guest.kernel, guest.initramfs, disk, swap, command_line, *conversation],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_a_hibernated_guest_goes_on_in_a_new_process(guest: Guest, root: Path, tmp_path: Path, needs) -> None:
    swap = tmp_path / "swap.img"
    swap.write_bytes(b"")
    os.truncate(swap, 256 * MIB)
    subprocess.run([needs("mkswap"), "-q", "-L", "sleep", swap], check=True)
    line = f"{PLAIN} root=LABEL=system"
    first = half(
        *(guest, root, swap, f"{line} resume=LABEL=sleep"),
        "mount -t tmpfs none /tmp; cat /proc/sys/kernel/random/uuid | tee /tmp/memory",
        "swapon $(findfs LABEL=sleep) && echo disk >/sys/power/state; echo AWAKE $(cat /tmp/memory); poweroff -f",
    )
    assert "ENDED POWER_OFF 0" in first
    assert "AWAKE" not in first.replace("echo AWAKE", "")
    (kept,) = set(re.findall(r"^[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}$", first, re.M))
    second = half(guest, root, swap, f"{line} resume=LABEL=sleep")
    assert f"AWAKE {kept}" in second, second
    assert "ENDED POWER_OFF 0" in second
    third = half(guest, root, swap, f"{line} resume=LABEL=sleep noresume", "poweroff -f")
    assert "AWAKE" not in third

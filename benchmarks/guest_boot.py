"""Boots one Linux kernel and initramfs under `vmbus` and under QEMU's TCG, in turn, and compares processor time.

    python benchmarks/guest_boot.py [--rounds 3] [--limit 2.5]

Both boot the distribution's cloud kernel (see `vmbus guest prepare`) with the same initramfs, which loads the hv_*
modules, prints a line and turns the machine off. What is compared is user plus system time of the whole process
from the kernel's file to power-off; the smallest of all rounds counts. Ours is run twice: with the kernel unpacked as
users get it ("auto", by the host), and with the kernel unpacking itself ("guest"), as it does under QEMU. The exit
status is 1 if the first is above the limit.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from vmbus.machine.packages import Guest, prepare_guest

MARK = "USER-SPACE-REACHED"
RUN_AT_BOOT = f"#!/bin/busybox sh\necho {MARK}; cat /proc/uptime; poweroff -f\n"
COMMAND_LINE = "console=ttyS0 panic=-1"
TIMEOUT = 600


def processor_time(command: list[str]) -> tuple[float, str]:
    """Run `command`; its user and system time in seconds, and what it printed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if MARK not in done.stdout:
        sys.exit(f"{command[0]} did not reach user space:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def with_poweroff(guest: Guest, folder: Path) -> Path:
    """The prepared initramfs and, in a second archive behind it, what to run."""
    from vmbus.machine.initramfs import cpio

    path = folder / "initramfs.cpio"
    path.write_bytes(guest.initramfs.read_bytes() + cpio([("run-at-boot", 0o100755, RUN_AT_BOOT.encode())]))
    return path


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=2.5, help="times QEMU's processor time (default: 2.5)")
    parser.add_argument("--cache", type=Path, default=os.environ.get("VMBUS_GUEST_CACHE"))
    args = parser.parse_args()
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        sys.exit("qemu-system-x86_64 is not installed: there is nothing to compare with")
    guest = prepare_guest(args.cache and Path(args.cache))
    with tempfile.TemporaryDirectory() as folder:
        initramfs = with_poweroff(guest, Path(folder))
        ours = [
            sys.executable, "-c", "import sys; from vmbus.cli import main; sys.exit(main(sys.argv[1:]))", "boot",
            "--kernel", str(guest.kernel), "--initrd", str(initramfs), "--append", "panic=-1", "--unpack",
        ]  # fmt: skip
        commands = {
            "qemu-system-x86_64 (TCG)": [
                qemu, "-accel", "tcg,thread=single", "-m", "512", "-nographic", "-no-reboot", "-nodefaults",
                "-serial", "stdio", "-kernel", str(guest.kernel), "-initrd", str(initramfs),
                "-append", COMMAND_LINE,
            ],
            "vmbus boot --unpack auto": [*ours, "auto"],
            "vmbus boot --unpack guest": [*ours, "guest"],
        }  # fmt: skip
        best: dict[str, float] = {}
        for number in range(args.rounds):
            for name, command in commands.items():
                seconds, _ = processor_time(command)
                best[name] = min(seconds, best.get(name, seconds))
                print(f"round {number + 1}: {name:28} {seconds:7.2f} s", flush=True)
    peer = best["qemu-system-x86_64 (TCG)"]
    version = subprocess.run(
        [qemu, "--version"], capture_output=True, text=True, check=True
    ).stdout.splitlines()[0]
    print(f"\nkernel {guest.version}; {version}; smallest of {args.rounds} rounds, processor time:")
    for name, seconds in best.items():
        print(f"  {name:28} {seconds:7.2f} s  {seconds / peer:5.2f} x")
    ratio = best["vmbus boot --unpack auto"] / peer
    print(f"limit {args.limit} x: {'kept' if ratio <= args.limit else 'MISSED'}")
    return 0 if ratio <= args.limit else 1


if __name__ == "__main__":
    sys.exit(main())

"""Boots one Linux kernel and initramfs under `vmbus` and under QEMU's TCG, in turn, and compares processor time.

    python benchmarks/guest_boot.py [--rounds 3] [--limit 1.5] [--limit-alike 2.5]

Both boot the distribution's cloud kernel (see `vmbus guest prepare`) with the same initramfs, which loads the hv_*
modules, prints a line and turns the machine off. What is compared is user plus system time of the whole process
from the kernel's file to power-off; the smallest of all rounds counts (the first round compiles Python's modules, as
an installation does). Ours is run as users get it, the kernel unpacked by the host ("auto"), and like for like, the
kernel unpacking itself ("guest"), as it does under QEMU; and both once more with "mitigations=off", because a
kernel does not work around the same flaws on every processor. What it says about that is printed. The exit status is 1
if one of the limits is not kept.
"""

import argparse
import os
import re
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
PEER = "qemu-system-x86_64 (TCG)"
AUTO = "vmbus boot --unpack auto"
ALIKE = "vmbus boot --unpack guest"
OFF = "mitigations=off"


def processor_time(command: list[str], environment: dict[str, str]) -> tuple[float, str]:
    """Run `command`; its user and system time in seconds, and what it printed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=TIMEOUT,
        check=False,
        env=environment,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if MARK not in done.stdout:
        sys.exit(f"{command[0]} did not reach user space:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def workarounds(output: str) -> str:
    """What the kernel says about the flaws of its processor."""
    found = re.findall(r"\] (.*(?:Mitigation|isolation|Vulnerable|attempted).*)", output)
    return "; ".join(line.strip() for line in found) or "none"


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
    parser.add_argument("--limit", type=float, default=1.5, help="times QEMU's processor time (default: 1.5)")
    parser.add_argument(
        "--limit-alike", type=float, default=2.5, help="the same, like for like (default: 2.5)"
    )
    parser.add_argument("--cache", type=Path, default=os.environ.get("VMBUS_GUEST_CACHE"))
    args = parser.parse_args()
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        sys.exit("qemu-system-x86_64 is not installed: there is nothing to compare with")
    guest = prepare_guest(args.cache and Path(args.cache))
    with tempfile.TemporaryDirectory() as folder:
        initramfs = with_poweroff(guest, Path(folder))
        kernel = ["-kernel", str(guest.kernel), "-initrd", str(initramfs)]
        theirs = [
            qemu, "-accel", "tcg,thread=single", "-m", "512", "-nographic", "-no-reboot", "-nodefaults",
            "-serial", "stdio", *kernel, "-append",
        ]  # fmt: skip
        ours = [
            sys.executable, "-c", "import sys; from vmbus.cli import main; sys.exit(main(sys.argv[1:]))", "boot",
            "--kernel", str(guest.kernel), "--initrd", str(initramfs), "--unpack",
        ]  # fmt: skip
        commands = {
            PEER: [*theirs, COMMAND_LINE],
            AUTO: [*ours, "auto", "--append", "panic=-1"],
            ALIKE: [*ours, "guest", "--append", "panic=-1"],
            f"{PEER}, {OFF}": [*theirs, f"{COMMAND_LINE} {OFF}"],
            f"{ALIKE}, {OFF}": [*ours, "guest", "--append", f"panic=-1 {OFF}"],
        }
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(Path(folder, "python"))}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        best: dict[str, float] = {}
        said: dict[str, str] = {}
        for number in range(args.rounds):
            for name, command in commands.items():
                seconds, output = processor_time(command, environment)
                best[name] = min(seconds, best.get(name, seconds))
                said[name] = workarounds(output)
                print(f"round {number + 1}: {name:42} {seconds:7.2f} s", flush=True)
    version = subprocess.run(
        [qemu, "--version"], capture_output=True, text=True, check=True
    ).stdout.splitlines()[0]
    print(f"\nkernel {guest.version}; {version}; smallest of {args.rounds} rounds, processor time:")
    for name, seconds in best.items():
        peer = best[f"{PEER}, {OFF}" if OFF in name else PEER]
        print(f"  {name:42} {seconds:7.2f} s  {seconds / peer:5.2f} x")
    for text in dict.fromkeys(said.values()):
        print("worked around:", text)
        print("\n".join(f"  under {name}" for name in said if said[name] == text))
    kept = True
    for name, limit in ((AUTO, args.limit), (ALIKE, args.limit_alike)):
        ratio = best[name] / best[PEER]
        kept &= ratio <= limit
        print(f"{name}: {ratio:.2f} x, limit {limit} x: {'kept' if ratio <= limit else 'MISSED'}")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())

"""`vmbus boot` as a user runs it, with the distribution's kernel: the ledger, repeatable runs, and wrong input."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vmbus.machine.packages import Guest

pytestmark = [pytest.mark.guest, pytest.mark.slow]

KIB = 1 << 10
WORK = "dd if=/dev/urandom of=/dev/sda bs=64k count=8; sync; poweroff -f"


def vmbus_boot(*arguments: object) -> tuple[int, bytes, str, float]:
    """Exit status, output, messages and seconds of one `vmbus boot`."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "vmbus", "boot", "--timeout", "300", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        timeout=400,
    )
    return done.returncode, done.stdout, done.stderr.decode(), time.monotonic() - began


def test_the_ledger_is_printed_and_two_runs_are_identical(guest: Guest, tmp_path: Path) -> None:
    runs = []
    for index in range(2):
        image, report = tmp_path / f"{index}.img", tmp_path / f"{index}.json"
        image.write_bytes(bytes(4 << 20))
        status, output, messages, elapsed = vmbus_boot(
            *("--kernel", guest.kernel, "--initrd", guest.initramfs, "--disk", image),
            *("--until", "# ", "--send", WORK, "--ledger", "--json", report),
        )
        assert status == 0, messages
        values = json.loads(report.read_text())
        # Both legs, before --send and after it, are in the times. Half is what starting Python may cost.
        assert elapsed / 2 < values.pop("wall_seconds") < elapsed
        assert values.pop("cpu_seconds") > 1
        runs.append((output, values, image.read_bytes()))
    assert runs[0][0] == runs[1][0], "console and printed ledger"
    assert runs[0][1:] == runs[1][1:], "counts, ledger and disk"
    output, values, disk = runs[0]
    assert values["outcome"] == "POWER_OFF"
    assert any(disk[: 512 * KIB])
    assert not any(disk[512 * KIB :])
    guest_account, host_account = values["ledger"]["linux"], values["ledger"]["root/linux/storage"]
    for exit_reason in ("io_port", "rdmsr", "wrmsr", "cpuid", "hypercall", "halt", "mmio"):
        assert guest_account["exits"][exit_reason] > 0
        assert f"exits {exit_reason}".encode() in output
    assert guest_account["hypercalls"]
    assert guest_account["interrupts"]
    assert host_account["doorbells_sent"] > 0
    assert host_account["packets_received"] > 0
    for row in (b"hypercalls", b"interrupts", b"doorbells_sent", b"blocks"):
        assert row in output


@pytest.mark.parametrize("length", [100, 0x1000, 100_000, -100_000])
def test_truncated_kernel(guest: Guest, tmp_path: Path, length: int) -> None:
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(guest.kernel.read_bytes()[:length])
    status, _, messages, _ = vmbus_boot("--kernel", kernel, "--quiet")
    assert status == 3
    (line,) = messages.splitlines()
    assert "truncated" in line or "not a Linux kernel" in line


def test_damaged_kernel(guest: Guest, tmp_path: Path) -> None:
    data = bytearray(guest.kernel.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 4096] = bytes(4096)
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(data)
    status, _, messages, _ = vmbus_boot("--kernel", kernel, "--quiet")
    assert status == 3, messages
    assert len(messages.splitlines()) == 1
    assert "damaged" in messages


def test_initrd_larger_than_memory(guest: Guest, tmp_path: Path) -> None:
    initrd = tmp_path / "initrd"
    initrd.write_bytes(bytes(65 << 20))
    status, _, messages, _ = vmbus_boot(
        "--kernel", guest.kernel, "--initrd", initrd, "--memory", "96M", "--quiet"
    )
    assert status == 4
    (line,) = messages.splitlines()
    assert "does not fit into 96 MiB" in line

"""`vmbus boot` and `vmbus guest` from the command line: endings, exit statuses, and what users get wrong."""

import gzip
import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import termios
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from reference.engine import need_engine
from reference.nbd_servers import qemu_nbd
from reference.tiny_guest import elf, tiny_guest

from vmbus.cli import main
from vmbus.cli.boot import EXIT_STATUS, START_STATUS
from vmbus.machine.guest import Machine, Outcome
from vmbus.network.pcapng import PcapngReader
from vmbus.storage.disk import Disk
from vmbus.storage.images import create_vhd, create_vhdx, open_disk

need_engine()

POWER_OFF = "print 'h'; print 'i'; power_off"


@pytest.fixture
def kernel(tmp_path: Path):
    def write(source: str) -> Path:
        path = tmp_path / "kernel"
        path.write_bytes(tiny_guest(f"_start: {source}"))
        return path

    return write


def boot(*arguments: object) -> int:
    return main(["boot", *(str(a) for a in arguments), "--memory", "16M"])


def _fill(argument: str, places: dict[str, Path]) -> str:
    for word, path in places.items():
        argument = argument.replace(word, str(path))
    return argument


def test_every_ending_has_its_own_exit_status() -> None:
    assert set(EXIT_STATUS) == set(Outcome)
    failures = [status for outcome, status in EXIT_STATUS.items() if status]
    assert len(failures) == len(set(failures))
    starts = [status for _, status, _ in START_STATUS]
    assert len(starts) == len(set(starts))
    assert not {2, *starts} & set(failures)


@pytest.mark.parametrize(
    ("source", "status"),
    [
        (POWER_OFF, 0),
        ("mov $0x604, %dx; mov $1, %al; out %al, %dx; hlt", 10),
        ("ud2", 12),
        ("cli; hlt", 13),
        ("sti; 1: hlt; jmp 1b", 14),
    ],
)
def test_endings(kernel, source: str, status: int) -> None:
    assert boot("--kernel", kernel(source), "--timeout", 30, "--no-reboot") == status


COUNT_STARTS = """
    mov $0x70, %dx; mov $0x40, %al; out %al, %dx; inc %dx; in %dx, %al; inc %al; out %al, %dx
    mov %al, %bl; add $'0', %al; putc
    cmp $3, %bl; je 1f
    mov $0x604, %dx; mov $1, %al; out %al, %dx; hlt
1:  power_off
"""


def test_a_reboot_reboots(kernel, tmp_path: Path, capfd) -> None:
    report = tmp_path / "report.json"
    assert boot("--kernel", kernel(COUNT_STARTS), "--timeout", 30, "--json", report) == 0
    assert json.loads(report.read_text())["reboots"] == 2
    said = capfd.readouterr()
    assert "123" in said.out
    assert "it restarted the machine 2 times" in said.err
    assert boot("--kernel", kernel(COUNT_STARTS), "--timeout", 30, "--until", "2") == 0
    assert boot("--kernel", kernel(COUNT_STARTS), "--timeout", 30, "--no-reboot") == 10


def test_a_crash_report_and_no_crash_kernel(kernel) -> None:
    crash = "mov $0x40000105, %ecx; mov $0x80000000, %edx; xor %eax, %eax; wrmsr"
    began = "mov $0x40000000, %ecx; mov $0x81000000, %edx; xor %eax, %eax; wrmsr"
    path = kernel(f"{began}; {crash}; mov $3000000, %ecx; 1: loop 1b; print 'K'; sti; 2: hlt; jmp 2b")
    assert boot("--kernel", path, "--timeout", 60, "--panic-timeout", 0.05, "--until", "K") == 0
    assert boot("--kernel", path, "--timeout", 60, "--panic-timeout", 0.05) == 11
    assert boot("--kernel", path, "--timeout", 60) == 11


SHOW_YEAR = """
    mov $0x70, %dx; mov $0x0b, %al; out %al, %dx; inc %dx; mov $0x06, %al; out %al, %dx
    mov $0x70, %dx; mov $9, %al; out %al, %dx; inc %dx; in %dx, %al; add $0x20, %al; putc; power_off
"""


def test_the_clock(kernel, capfdbinary) -> None:
    path = kernel(SHOW_YEAR)
    this_year = datetime.now(UTC).year % 100
    for arguments, year in (
        ((), 24),
        (("--clock", "fixed", "--net", "none"), 24),
        (("--clock", "host"), this_year),
        (("--clock", "2031-05-06"), 31),
    ):
        assert boot("--kernel", path, "--timeout", 30, *arguments) == 0
        assert bytes([year + 0x20]) in capfdbinary.readouterr().out
    assert boot("--kernel", path, "--clock", "noon") == 2
    assert b"--clock noon: neither fixed nor host nor a date" in capfdbinary.readouterr().err


def test_the_clock_is_the_hosts_with_a_network_to_the_outside(kernel, tmp_path: Path, capfdbinary) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(str(tmp_path / "socket"))
        server.listen()
        assert boot("--kernel", kernel(SHOW_YEAR), "--timeout", 30, "--net", f"stream:{tmp_path}/socket") == 0
    assert bytes([datetime.now(UTC).year % 100 + 0x20]) in capfdbinary.readouterr().out


def test_limits(kernel) -> None:
    path = kernel("cli; 1: jmp 1b")
    assert boot("--kernel", path, "--virtual-timeout", 0.01) == 15
    assert boot("--kernel", path, "--timeout", 0.3) == 16


def test_until_and_send(kernel, capfdbinary) -> None:
    echo = """
        print '?'
    1:  mov $UART + 5, %dx; in %dx, %al; test $1, %al; jz 1b
        mov $UART, %dx; in %dx, %al; cmp $10, %al; je 2f
        putc; jmp 1b
    2:  power_off
    """
    path = kernel(echo)
    assert boot("--kernel", path, "--until", "?", "--timeout", 30) == 0
    assert boot("--kernel", path, "--until", "?", "--send", "typed", "--timeout", 30) == 0
    assert b"?typed" in capfdbinary.readouterr().out
    assert boot("--kernel", path, "--send", "typed") == 2


def test_report_in_json_and_as_a_table(kernel, tmp_path: Path, capsys) -> None:
    report = tmp_path / "report.json"
    assert boot("--kernel", kernel(POWER_OFF), "--json", report, "--ledger") == 0
    values = json.loads(report.read_text())
    assert values["outcome"] == "POWER_OFF"
    assert values["ledger"]["linux"]["exits"]["io_port"] == 3
    assert values["counts"]["blocks"] > 0
    assert "io_port" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("contents", "arguments", "status", "message"),
    [
        (b"not a kernel at all", (), 3, "DIRECTORY/kernel: not a Linux kernel"),
        (b"", (), 3, "not a Linux kernel"),
        (elf(b"\xf4" * 64)[:-8], (), 3, "truncated"),
        (elf(b"\xf4"), ("--initrd", "INITRD"), 4, "does not fit"),
        (elf(b"\xf4"), ("--append", "x" * 3000), 4, "command line"),
        (elf(b"\xf4"), ("--disk", "/nowhere/disk.img"), 5, "No such file"),
        (elf(b"\xf4"), ("--disk", "DIRECTORY"), 5, "DIRECTORY"),
        (elf(b"\xf4"), ("--disk", "DISK,format=vhdx"), 5, "expected a vhdx image"),
        (elf(b"\xf4"), ("--disk", "DISK", "--disk", "DISK"), 5, "in use"),
        (elf(b"\xf4"), ("--disk", "PACKED"), 5, "a gzip-compressed file"),
        (elf(b"\xf4"), ("--cdrom", "PACKED"), 5, "a gzip-compressed file"),
        (elf(b"\xf4"), ("--cdrom", "VHD"), 5, "a vhd image is no disc"),
        (elf(b"\xf4"), ("--disk", "nbd+unix:///?socket=DIRECTORY/none"), 5, "DIRECTORY/none"),
        (elf(b"\xf4"), ("--cdrom", "/nowhere/disc.iso"), 5, "No such file"),
        (elf(b"\xf4"), ("--initrd", "/nowhere/initrd"), 5, "No such file"),
        (elf(b"\xf4"), ("--processors", "17"), 2, "1 to 16 processors"),
        (elf(b"\xf4"), ("--no-enlightenments", "--cdrom", "DISK"), 2, "CD-ROM"),
        (elf(b"\xf4"), ("--no-enlightenments", "--net", "none,mtu=9000"), 5, "one queue, no offloads"),
        (elf(b"\xf4"), ("--no-enlightenments", *["--net", "none"] * 5), 5, "up to 4 network adapters"),
        (elf(b"\xf4"), ("--net", "wire"), 5, "give tap, tap:NAME"),
        (elf(b"\xf4"), ("--net", "none,mtu=80"), 5, "mtu=80: not in 576 to 9000"),
        (elf(b"\xf4"), ("--net", "none,pcap=DIRECTORY"), 2, "Is a directory"),
        (elf(b"\xf4"), ("--net", "stream:DIRECTORY/nobody"), 5, "stream uplink"),
        (elf(b"\xf4"), ("--pcap", "DISK"), 2, "--pcap needs --net"),
        (elf(b"\xf4"), ("--json", "DIRECTORY"), 2, "DIRECTORY: Is a directory"),
        (elf(b"\xf4"), ("--json", "DIRECTORY/nowhere/x"), 2, "DIRECTORY/nowhere/x: No such file"),
    ],
)
def test_bad_input_is_one_line_and_a_status_of_its_own(
    tmp_path: Path, capsys, contents: bytes, arguments: tuple[str, ...], status: int, message: str
) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(contents)
    (tmp_path / "initrd").write_bytes(bytes(16 << 20))
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    (tmp_path / "packed").write_bytes(gzip.compress(bytes(1 << 20)))
    create_vhd(tmp_path / "vhd", 1 << 20).close()
    places = {"INITRD": tmp_path / "initrd", "DIRECTORY": tmp_path, "DISK": tmp_path / "disk"}
    places |= {"PACKED": tmp_path / "packed", "VHD": tmp_path / "vhd"}
    assert boot("--kernel", kernel, "--quiet", *(_fill(a, places) for a in arguments)) == status
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert message.replace("DIRECTORY", str(tmp_path)) in lines[0]
    assert (tmp_path / "disk").read_bytes() == bytes(1 << 20)


def test_disks_and_what_is_said_of_them(
    kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """The guest gets what was typed, and a raw disk whatever its guest wrote into it."""
    seen: list[list[tuple[str, int, bool]]] = []
    init = Machine.__init__

    def noted(machine: Machine, *arguments: Any, disks: list[Disk], **options: Any) -> None:
        seen.append([(type(disk).__name__, disk.size, disk.read_only) for disk in disks])
        init(machine, *arguments, disks=disks, **options)

    monkeypatch.setattr(Machine, "__init__", noted)
    image, fixed = tmp_path / "a,b.vhdx", tmp_path / "fixed.vhd"
    create_vhdx(image, 8 << 20).close()
    create_vhd(fixed, 4 << 20, variant="fixed").close()
    size = image.stat().st_size
    arguments = ["--kernel", kernel(POWER_OFF), "--quiet"]
    assert boot(*arguments, "--disk", image) == 0
    assert boot(*arguments, "--disk", f"{image},format=raw,read-only", "--disk", f"{fixed},read-only") == 0
    assert seen == [
        [("Vhdx", 8 << 20, False)],
        [("RawDisk", size, True), ("FixedVhd", 4 << 20, True)],
    ]
    for disk in (image, fixed):
        open_disk(disk).close()  # given back when the machine ended
    with pytest.raises(SystemExit, match="2"):
        boot(*arguments, "--disk", f"{image},format=qcow2")
    assert "format= is one of raw, vhd, vhdx" in capsys.readouterr().err


def test_a_disk_of_an_nbd_server(kernel, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    with qemu_nbd(tmp_path, tmp_path / "disk", "-f", "raw") as uri:
        assert boot("--kernel", kernel(POWER_OFF), "--disk", uri, "--cdrom", f"{uri},read-only") == 0


@pytest.mark.parametrize("option", ["--timeout", "--virtual-timeout"])
@pytest.mark.parametrize("value", ["-1", "nan", "inf", "soon"])
def test_times_that_are_none(kernel, capsys, option: str, value: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        boot("--kernel", kernel(POWER_OFF), f"{option}={value}")
    assert f"argument {option}: '{value}' is not a number of seconds" in capsys.readouterr().err


def test_the_ledger_in_a_narrow_terminal(kernel, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    assert boot("--kernel", kernel(POWER_OFF), "--ledger", "--quiet") == 0
    shown = capsys.readouterr().out
    (row,) = [line for line in shown.splitlines() if "io_port" in line]
    assert row.split()[-2] == "3"
    assert "…" not in shown


def test_networks(kernel, tmp_path: Path, capsys) -> None:
    path, capture = kernel(POWER_OFF), tmp_path / "second.pcapng"
    options = ("--net", "none", "--net", f"none,mac=02-00-00-00-00-07,mtu=1400,pcap={capture}")
    assert boot("--kernel", path, "--timeout", 30, *options, "--pcap", tmp_path / "first.pcapng") == 0
    said = capsys.readouterr().err
    assert "network adapter 00:15:5d:00:00:01 on nothing" in said
    assert "network adapter 02:00:00:00:00:07 on nothing" in said
    for name in ("first", "second"):
        with PcapngReader(tmp_path / f"{name}.pcapng") as reader:
            assert list(reader) == []


def test_without_a_kernel_it_says_what_to_do(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert boot() == 2
    assert "vmbus guest prepare" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_the_terminal_as_it_was(kernel, number: signal.Signals) -> None:
    parent, child = pty.openpty()
    before = termios.tcgetattr(child)
    command = [sys.executable, "-m", "vmbus", "boot", "--kernel", str(kernel("print '>'; cli; 1: jmp 1b"))]
    process = subprocess.Popen([*command, "--memory", "16M"], stdin=child, stdout=child, stderr=child)
    try:
        seen = b""
        while b">" not in seen:
            seen += os.read(parent, 4096)
        assert termios.tcgetattr(child) != before
        process.send_signal(number)
        assert process.wait(60) == 128 + number
        assert termios.tcgetattr(child) == before
    finally:
        process.kill()
        process.wait()
        os.close(parent)
        os.close(child)


def test_words_that_are_no_utf_8(kernel, capfdbinary) -> None:
    """What the shell passes reaches the guest, and is found in its output, byte by byte."""
    path = kernel("mov $0xFF, %al; mov $UART, %dx; out %al, %dx; cli; hlt")
    word = os.fsdecode(b"\xff")
    assert boot("--kernel", path, "--append", word, "--until", word) == 0
    assert capfdbinary.readouterr().out.startswith(b"\xff")


def test_console_in_a_terminal_and_its_escape_key(kernel) -> None:
    """A real terminal: raw mode, keys reach the guest, Ctrl-] leaves, the terminal is as before."""
    path = kernel(
        """
        print '>'
    1:  mov $UART + 5, %dx; in %dx, %al; test $1, %al; jz 1b
        mov $UART, %dx; in %dx, %al; add $1, %al; putc; jmp 1b
        """
    )
    parent, child = pty.openpty()
    command = [sys.executable, "-c", "import sys; from vmbus.cli import main; sys.exit(main(sys.argv[1:]))"]
    arguments = ["boot", "--kernel", str(path), "--memory", "16M", "--timeout", "60"]
    before = subprocess.run(["stty", "-a"], stdin=child, capture_output=True, check=True).stdout
    process = subprocess.Popen([*command, *arguments], stdin=child, stdout=child, stderr=child)
    seen = b""

    def wait_for(text: bytes) -> None:
        nonlocal seen
        end = time.monotonic() + 60
        while text not in seen and time.monotonic() < end:
            if select.select([parent], [], [], 0.1)[0]:
                seen += os.read(parent, 4096)
        assert text in seen, seen

    try:
        wait_for(b">")
        os.write(parent, b"ab\x03")  # Ctrl-C is a key like any other
        wait_for(b"bc\x04")
        os.write(parent, b"\x1d")
        assert process.wait(60) == EXIT_STATUS[Outcome.STOPPED]
        after = subprocess.run(["stty", "-a"], stdin=child, capture_output=True, check=True).stdout
        assert after == before
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(parent)
        os.close(child)


def test_a_guest_that_no_key_can_wake_is_idle_also_in_a_terminal(kernel) -> None:
    parent, child = pty.openpty()
    command = [sys.executable, "-m", "vmbus", "boot", "--memory", "16M", "--timeout", "60"]
    try:
        done = subprocess.run(
            [*command, "--kernel", str(kernel("sti; 1: hlt; jmp 1b"))],
            stdin=child,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        )
    finally:
        os.close(parent)
        os.close(child)
    assert done.returncode == EXIT_STATUS[Outcome.IDLE]

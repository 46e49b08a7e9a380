"""What the command prints: to the right place, worth reading, and nothing that a terminal obeys."""

import json
import logging
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from reference.disk_model import library
from reference.engine import need_engine
from reference.tiny_guest import elf, tiny_guest

from vmbus.cli import main
from vmbus.storage.images import create_vhdx

need_engine()

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp.\u200b\x1b[31mtype your password:\r\x08\x7f"
"""Everything that a terminal would obey or that hides text: titles, clearing, C1, bidi, backspaces."""
COMMANDS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069]")


def run(*arguments: object, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vmbus", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=120,
        check=False,
    )


def wrmsr(msr: int, value: int) -> bytes:
    return (
        b"\x48\xb9"
        + struct.pack("<Q", msr)
        + b"\x48\xb8"
        + struct.pack("<Q", value & 0xFFFF_FFFF)
        + b"\x48\xba"
        + struct.pack("<Q", value >> 32)
        + b"\x0f\x30"
    )


def crashing_kernel(message: bytes) -> bytes:
    """A guest that reports a crash with a message of its own, and halts."""
    code = wrmsr(0x40000000, 0x8100 << 48) + wrmsr(0x40000103, 0x100800) + wrmsr(0x40000104, len(message))
    code += wrmsr(0x40000105, 3 << 62) + b"\xfb\xf4\xeb\xfc"
    return elf(code.ljust(0x800, b"\x90") + message)


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    path = tmp_path / "kernel"
    path.write_bytes(tiny_guest("_start: power_off"))
    return path


class TestTerminalSafety:
    """No sequence of a guest's, an image's or a file's reaches the terminal through our own messages."""

    def check(self, done: subprocess.CompletedProcess[str], *words: str) -> None:
        for stream in (done.stdout, done.stderr):
            assert not COMMANDS.search(stream), ascii(stream)
        for word in words:
            assert word in done.stderr, done.stderr

    def test_a_guests_crash_message(self, tmp_path: Path) -> None:
        path = tmp_path / "kernel"
        path.write_bytes(crashing_kernel(EVIL.encode()))
        for options in ((), ("-vv",)):
            limits = ("--memory", "32M", "--virtual-timeout", "90", "--timeout", "60")
            done = run(*options, "boot", "--kernel", path, *limits)
            self.check(done, "it reported: ", "type your password:", r"\x1b]0;owned\x07")

    def test_a_guests_bytes_in_a_crash_message(self, tmp_path: Path) -> None:
        path = tmp_path / "kernel"
        path.write_bytes(crashing_kernel(bytes(range(1, 256)).replace(b"\n", b"")))
        self.check(run("boot", "--kernel", path, "--memory", "32M", "--virtual-timeout", "90"))

    def test_the_parent_that_an_image_names(self, tmp_path: Path, kernel: Path) -> None:
        base, child = tmp_path / "b.vhdx", tmp_path / "c.vhdx"
        create_vhdx(base, 4 << 20).close()
        create_vhdx(child, parent=base).close()
        content = child.read_bytes()
        for name in (".\\b.vhdx", str(base)):
            evil = (EVIL + "x" * 100)[: len(name)]
            content = content.replace(name.encode("utf-16-le"), evil.encode("utf-16-le"))
        child.write_bytes(content)
        done = run("boot", "--kernel", kernel, "--memory", "16M", "--disk", child)
        assert done.returncode == 5
        self.check(done)

    @pytest.mark.parametrize(
        "arguments",
        [
            ("boot", "--kernel"),
            ("boot", "--initrd"),
            ("boot", "--disk"),
            ("boot", "--cdrom"),
            ("boot", "--net"),
            ("boot", "--json"),
            ("boot", "--pcap"),
            ("compare", "--disk"),
            ("compare", "--json"),
            ("compare", "--plot"),
            ("guest", "prepare", "--cache"),
        ],
    )
    def test_names_of_files(self, arguments: tuple[str, ...], kernel: Path, tmp_path: Path, capsys) -> None:
        if "--plot" in arguments:
            library("matplotlib")
        # Where nothing can be made: below a file.
        nowhere = tmp_path / "file"
        nowhere.touch()
        more = ["--kernel", kernel] if arguments[0] == "boot" and "--kernel" not in arguments else []
        more += ["--net", "none"] if "--pcap" in arguments else []
        more += ["--package", "no-such-package"] if "prepare" in arguments else []
        status = main([*arguments, f"{nowhere}/{EVIL}", *map(str, more)])
        assert status != 0
        said = capsys.readouterr()
        self.check(subprocess.CompletedProcess((), status, said.out, said.err), "vmbus: ")

    def test_names_that_work(self, tmp_path: Path) -> None:
        name = "disk [red]x[b]\x1b[31m.img"
        (tmp_path / name).write_bytes(bytes(65536))
        done = run("compare", "--disk", tmp_path / name, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        self.check(done)
        assert r"[red]x[b]\x1b[31m.img" in re.sub(r"\s", "", done.stdout)

    def test_the_ledger(self, kernel: Path) -> None:
        self.check(run("boot", "--kernel", kernel, "--memory", "16M", "--ledger"))

    def test_log_lines_and_tracebacks(self, capsys: pytest.CaptureFixture[str]) -> None:
        program = (
            "import logging, vmbus.cli\n"
            "from vmbus.cli import compare\n"
            "def run(args):\n"
            "    try:\n"
            f"        raise ValueError({EVIL!r})\n"
            "    except ValueError:\n"
            f"        logging.getLogger('vmbus').exception({EVIL!r})\n"
            "    return 0\n"
            "compare.run = run\n"
            "vmbus.cli.main(['compare'])\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
        )
        self.check(done, "Traceback", r"\x1b]0;owned\x07")
        assert done.stderr.count("\n") > 3


class TestResultsOnStandardOutput:
    def test_boot(self, kernel: Path, tmp_path: Path) -> None:
        done = run("boot", "--kernel", kernel, "--memory", "16M", "--quiet", "--json", "-", folder=tmp_path)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["outcome"] == "POWER_OFF"
        assert not (tmp_path / "-").exists()

    def test_boot_with_the_console(self, tmp_path: Path) -> None:
        path = tmp_path / "kernel"
        path.write_bytes(tiny_guest("_start: print 'h'; print 'i'; power_off"))
        done = run("boot", "--kernel", path, "--memory", "16M", "--json", "-", folder=tmp_path)
        console, _, report = done.stdout.partition("\n")
        assert console == "hi"
        assert json.loads(report)["outcome"] == "POWER_OFF"

    def test_compare(self, tmp_path: Path) -> None:
        done = run("compare", "--size", "64K", "--json", "-", folder=tmp_path)
        assert json.loads(done.stdout)["correct"] is True
        assert not (tmp_path / "-").exists()

    @pytest.mark.parametrize(
        "arguments",
        [
            ("boot", "--net", "none", "--pcap", "-"),
            ("boot", "--net", "none,pcap=-"),
            ("compare", "--size", "64K", "--plot", "-.png"),
        ],
    )
    def test_what_is_no_text_goes_to_files(
        self, arguments: tuple[str, ...], kernel: Path, tmp_path: Path
    ) -> None:
        if "--plot" in arguments:
            library("matplotlib")
            arguments = (*arguments[:-1], "-")
        more = ["--kernel", kernel] if arguments[0] == "boot" else []
        done = run(*arguments, *more, folder=tmp_path)
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].startswith("vmbus: ")
        assert os.listdir(tmp_path) == ["kernel"]


@pytest.mark.parametrize("name", ["x.xyz", "x", "x.", ".png"])
def test_a_picture_that_cannot_be_drawn_is_said_before_the_work(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    library("matplotlib")
    monkeypatch.setattr("vmbus.cli.compare.compare", lambda *_, **__: pytest.fail("the work has begun"))
    assert main(["compare", "--plot", str(tmp_path / name)]) == 2
    assert "names no picture format; there are" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--kernel", "--initrd", "--disk", "--cdrom"])
def test_whatever_file_is_missing_has_one_exit_status(
    option: str, kernel: Path, tmp_path: Path, capsys
) -> None:
    missing = tmp_path / "no folder" / "file"
    arguments = [] if option == "--kernel" else ["--kernel", str(kernel)]
    assert main(["boot", *arguments, option, str(missing), "--memory", "16M"]) == 5
    last = capsys.readouterr().err.splitlines()[-1]
    assert str(missing) in last
    assert "No such file or directory" in last


def test_verbose_says_what_happens(kernel: Path) -> None:
    more, most = (
        run(*options, "boot", "--kernel", kernel, "--memory", "16M", "--quiet").stderr
        for options in (("-v",), ("-vv",))
    )
    assert "INFO vmbus.machine.linux: a kernel that is unpacked, entered at" in more
    assert "INFO vmbus.bus.vmbus_host: linux is offered storage" in more
    assert "DEBUG" not in more
    assert "DEBUG vmbus.machine.linux: its command line: console=ttyS0" in most
    assert "DEBUG vmbus.hypervisor.hypervisor: <Partition 2 'linux'" in most


def test_verbose_follows_a_bus(caplog: pytest.LogCaptureFixture) -> None:
    """Connections, offers, opens and closes at info, control messages by name at debug."""
    from vmbus import MemoryDisk, ModelMachine

    caplog.set_level(logging.DEBUG, logger="vmbus")
    with ModelMachine() as machine:
        machine.add_enlightened_disk(MemoryDisk(1 << 20))
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    steps = ["speaks VMBus", "is offered", "opened channel", "is closed"]
    assert all(any(step in line for line in said) for step in steps), said
    messages = {record.getMessage() for record in caplog.records if record.levelno == logging.DEBUG}
    assert "child says INITIATE_CONTACT" in messages
    assert "child is told VERSION_RESPONSE" in messages

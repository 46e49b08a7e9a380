"""`vmbus compare`: one disk read and written both ways."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from reference.disk_model import library, qemu_img
from reference.nbd_servers import qemu_nbd

from vmbus import cli
from vmbus.errors import DeviceError, LocalProtocolError
from vmbus.machine.comparison import PATHS, compare
from vmbus.machine.model import ModelMachine
from vmbus.storage.disk import MemoryDisk
from vmbus.storage.images import create_vhd, create_vhdx, open_disk


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(1).randbytes(96 * 1024 + 512))  # the last operation is a short one
    return path


@pytest.fixture
def ext4(tmp_path: Path) -> Path:
    tool = shutil.which("mke2fs") or shutil.which("mke2fs", path="/usr/sbin:/sbin")
    assert tool or not os.environ.get("CI"), "install e2fsprogs"
    if tool is None:
        pytest.skip("mke2fs is not installed")
    content = tmp_path / "content"
    content.mkdir()
    for number in range(20):
        (content / f"file{number}").write_bytes(random.Random(number).randbytes(3000 * number))
    path = tmp_path / "ext4.img"
    command = [tool, "-q", "-t", "ext4", "-d", str(content), str(path), "1M"]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_both_paths_read_an_ext4_image_right(ext4: Path) -> None:
    before = sha256(ext4)
    result = compare(ext4)
    assert result.correct
    assert result.expected["reads"] == before
    assert {result.phases["reads"][path].sha256 for path in PATHS} == {before}
    assert sha256(ext4) == before  # not changed unless asked for
    sectors = ext4.stat().st_size // 512
    emulated = result.phases["reads"]["emulated"].counts
    assert emulated.exits["io_port"] > 2 * sectors  # status and data of each sector go through intercepts
    assert emulated.instructions > 0
    assert emulated.packets_sent == 0
    enlightened = result.phases["reads"]["enlightened"].counts
    assert enlightened.exits["io_port"] == 0
    assert enlightened.packets_sent >= 2 * result.phases["reads"]["enlightened"].operations
    assert enlightened.doorbells_sent < enlightened.packets_sent  # one signal a batch


def test_counts_repeat_exactly(image: Path) -> None:
    first, second = (compare(image, seed=5) for _ in range(2))
    for phase in first.phases:
        for path in PATHS:
            assert first.phases[phase][path].counts == second.phases[phase][path].counts
            assert first.phases[phase][path].sha256 == second.phases[phase][path].sha256


@pytest.mark.parametrize(("block", "depth"), [(512, 1), (4096, 32), (65536, 3), (1 << 20, 2)])
def test_blocks_and_depths(image: Path, block: int, depth: int) -> None:
    assert compare(image, block=block, depth=depth).correct


def test_write_changes_the_image_and_only_the_chosen_blocks(image: Path) -> None:
    before = image.read_bytes()
    result = compare(image, write=True, seed=3)
    assert result.correct
    after = image.read_bytes()
    changed = [i for i in range(0, len(after), 4096) if after[i : i + 4096] != before[i : i + 4096]]
    assert len(changed) == result.phases["writes"]["emulated"].operations == 6


IMAGES = {
    "dynamic.vhd": lambda path: create_vhd(path, 9 << 20),
    "fixed.vhd": lambda path: create_vhd(path, 9 << 20, variant="fixed"),
    "dynamic.vhdx": lambda path: create_vhdx(path, 9 << 20, block_size=1 << 20),
}


@pytest.mark.parametrize("name", IMAGES)
def test_the_disk_in_an_image_is_compared_not_the_image(name: str, tmp_path: Path) -> None:
    path, before, after = tmp_path / name, tmp_path / "before", tmp_path / "after"
    noise = random.Random(2).randbytes(3 << 20)
    with IMAGES[name](path) as disk:
        disk.write(2 << 20, noise)
    before.write_bytes(path.read_bytes())
    expected = bytes(2 << 20) + noise + bytes(4 << 20)

    result = compare(path, block=65536)
    assert result.correct
    assert result.size == 9 << 20
    assert result.expected["reads"] == hashlib.sha256(expected).hexdigest()
    assert path.read_bytes() == before.read_bytes()  # read-only, and nothing of it written

    assert compare(path, block=65536, write=True, seed=3).correct
    with open_disk(path, read_only=True) as disk:
        content = disk.read(0, disk.size)
    changed = [
        at for at in range(0, len(content), 65536) if content[at : at + 65536] != expected[at : at + 65536]
    ]
    assert len(changed) == (9 << 20) // 65536 // 4
    qemu_format = "vhdx" if name.endswith("vhdx") else "vpc"
    qemu_img("convert", "-f", qemu_format, "-O", "raw", path, after)
    assert after.read_bytes() == content
    if qemu_format == "vhdx":
        qemu_img("check", "-f", "vhdx", path)


def test_an_open_disk_stays_open() -> None:
    with MemoryDisk(1 << 20, content=random.Random(3).randbytes(1 << 20)) as disk:
        before = disk.read(0, 1 << 20)
        assert compare(disk).correct
        assert disk.read(0, 1 << 20) == before
        assert compare(disk, write=True).correct
        assert disk.read(0, 1 << 20) != before
    with MemoryDisk(1 << 20, read_only=True) as disk, pytest.raises(DeviceError, match="read-only"):
        compare(disk, write=True)
    with MemoryDisk(1 << 20, sector_size=4096) as disk, pytest.raises(DeviceError, match="sectors of 512"):
        compare(disk)


def test_disks_on_the_command_line(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Formats by content, options behind commas, and names with commas in them."""
    monkeypatch.chdir(tmp_path)
    create_vhdx("my,disk.vhdx", 4 << 20).close()
    before = image.read_bytes()
    json_out = ["--block", "64K", "--json", "-"]

    def command(*arguments: str) -> dict[str, Any]:
        capsys.readouterr()
        assert cli.main(["compare", *arguments, *json_out]) == 0
        return json.loads(capsys.readouterr().out)

    def refused(*arguments: str) -> str:
        capsys.readouterr()
        assert cli.main(["compare", *arguments]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        return err

    assert command("--disk", "my,disk.vhdx")["size"] == 4 << 20
    assert command("--disk", "my,,disk.vhdx,format=vhdx,read-only")["size"] == 4 << 20
    assert command("--disk", "my,disk.vhdx,format=raw")["size"] == os.path.getsize("my,disk.vhdx")
    assert command("--disk", str(image), "--write")["correct"]
    assert image.read_bytes() != before
    assert "expected a vhd image, found a vhdx image" in refused("--disk", "my,disk.vhdx,format=vhd")
    assert "read-only at once" in refused("--disk", "my,disk.vhdx,read-only", "--write")
    qemu_img("create", "-q", "-f", "qcow2", "foreign", "1M")
    assert "a QCOW2 image" in refused("--disk", "foreign", "--write")
    with open_disk(image):
        assert "in use" in refused("--disk", str(image))
    for wrong in ("my,disk.vhdx,format=qcow2", "my,disk.vhdx,readonly"):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["compare", "--disk", wrong])
        assert "argument --disk" in capsys.readouterr().err


def test_a_disk_of_an_nbd_server(image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image.write_bytes(random.Random(1).randbytes(1 << 20))
    with qemu_nbd(tmp_path, image, "-f", "raw") as uri:
        assert uri.startswith("nbd+unix:///")
        assert cli.main(["compare", "--disk", uri, "--json", "-"]) == 0
        data = json.loads(capsys.readouterr().out)
        assert data["expected"]["reads"] == sha256(image)
        assert cli.main(["compare", "--disk", f"{uri},read-only", "--write"]) == 2
        capsys.readouterr()
        before = image.read_bytes()
        assert cli.main(["compare", "--disk", uri, "--write", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["correct"]
    assert image.read_bytes() != before


def test_command_prints_a_table_and_writes_json_and_a_picture(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    library("matplotlib")
    figures, picture = tmp_path / "out.json", tmp_path / "out.png"
    assert cli.main(["compare", "--disk", str(image), "--json", str(figures), "--plot", str(picture)]) == 0
    shown = capsys.readouterr().out
    for word in ("exits to the hypervisor", "doorbells suppressed", "times as long", "the same"):
        assert word in shown
    assert "DIFFERENT" not in shown
    data = json.loads(figures.read_text())
    assert data["correct"] is True
    assert data["phases"]["reads"]["emulated"]["per_operation"]["exits"] > 0
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def bad_image(kind: str, folder: Path) -> Path:
    path = folder / kind
    if kind == "empty":
        path.touch()
    elif kind == "odd":
        path.write_bytes(bytes(1000))
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    return path


@pytest.mark.parametrize("kind", ["missing", "empty", "odd", "folder", "fifo"])
def test_a_bad_image_is_one_clear_sentence(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = bad_image(kind, tmp_path)
    assert cli.main(["compare", "--disk", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("vmbus: ")
    assert err.count("\n") == 1
    assert str(path) in err


@pytest.mark.parametrize(
    "arguments", [["--block", "100"], ["--block", "0"], ["--depth", "0"], ["--write"], ["--size", "0"]]
)
def test_arguments_that_make_no_sense(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_as_a_program(image: Path) -> None:
    run = [sys.executable, "-m", "vmbus", "compare", "--disk", str(image), "--json", "-"]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["correct"] is True
    missing = subprocess.run([*run[:-3], "/does/not/exist"], capture_output=True, text=True, check=False)
    assert missing.returncode == 2
    assert (
        missing.stderr.strip() == "vmbus: /does/not/exist: cannot open the image: No such file or directory"
    )


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "80"} | options.pop("env", {})
    command = [sys.executable, "-m", "vmbus", "compare", *map(str, arguments)]
    defaults: dict[str, Any] = {"stdout": subprocess.PIPE}
    options = defaults | options
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, env=environment, **options)


def test_a_disk_smaller_than_a_block(capsys: pytest.CaptureFixture[str]) -> None:
    """One short read and no write: the figures are of what was done, not of whole blocks."""
    assert cli.main(["compare", "--size", "1536"]) == 0
    shown = capsys.readouterr().out
    assert "1 read " in shown
    assert "write" not in shown
    exits = compare(size=1536).phases["reads"]["emulated"].counts.exits.total()
    assert f"it exits {exits / 3:.4g} times for each sector read" in " ".join(shown.split())


@pytest.mark.parametrize("columns", [10, 30, 50, 70])
def test_a_narrow_terminal_loses_words_not_figures(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = compare(size=64 << 10)
    monkeypatch.setattr("vmbus.cli.compare.compare", lambda *_, **__: result)

    def figures(width: int) -> list[list[str]]:
        monkeypatch.setenv("COLUMNS", str(width))
        assert cli.main(["compare"]) == 0
        table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
        cells = [[cell.strip() for cell in line.split("│")[2:5]] for line in table]
        return [row for row in cells if any(row)]

    wide = figures(200)
    assert len(wide) == 26
    assert figures(columns) == wide


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_a_result_that_cannot_be_written_is_said_before_the_work(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if option == "--plot":
        library("matplotlib")
    monkeypatch.setattr("vmbus.cli.compare.compare", lambda *_, **__: pytest.fail("it has begun"))
    for place in (tmp_path, tmp_path / "nowhere" / "out.png"):
        assert cli.main(["compare", option, str(place)]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"vmbus: {place}: ")
        assert said.count("\n") == 1


def test_what_is_there_stays_until_there_is_a_result(tmp_path: Path) -> None:
    kept, made = tmp_path / "kept.json", tmp_path / "made.json"
    kept.write_text("before")
    for place in (kept, made):
        assert cli.main(["compare", "--disk", "/does/not/exist", "--json", str(place)]) == 2
    assert kept.read_text() == "before"
    assert not made.exists()


def test_a_reader_that_goes_away_is_no_failure() -> None:
    for arguments in ((), ("--json", "-")):
        for _ in range(2):
            reading, writing = os.pipe()
            os.close(reading)
            done = run("--size", "64K", *arguments, stdout=writing)
            os.close(writing)
            assert (done.returncode, done.stderr) == (0, "")


def test_a_full_disk_is_one_sentence() -> None:
    for arguments in ((), ("--json", "-"), ("--json", "/dev/full")):
        with open("/dev/full", "w") as full:
            done = run(
                "--size", "64K", *arguments, stdout=subprocess.PIPE if "/dev/full" in arguments else full
            )
        assert done.returncode == 2
        assert done.stderr in (
            "vmbus: No space left on device\n",
            "vmbus: /dev/full: No space left on device\n",
        )
        assert ("/dev/full" in done.stderr) == ("/dev/full" in arguments)


def test_a_locale_without_utf_8() -> None:
    done = run("--size", "64K", env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "time, ?s" in done.stdout
    assert done.stdout.isascii()


def test_results_into_a_pipe(tmp_path: Path) -> None:
    """`--json >(command)`: a pipe is opened once, or its reader would see an end too early."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    command = [sys.executable, "-m", "vmbus", "compare", "--size", "64K", "--json", str(pipe)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        data = json.loads(pipe.read_text())
        assert process.wait(120) == 0
    assert data["correct"] is True


def test_interrupted_it_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    """Ctrl-C at whatever moment; its image is in a folder of its own, which goes too."""
    program = (  # a shell that starts this suite in the background has SIGINT ignored, and its children inherit that
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from vmbus.cli import main; sys.exit(main(['compare', '--size', '256M']))"
    )
    command = [sys.executable, "-c", program]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        while not list(tmp_path.glob("*/disk.img")) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (130, b"", b"vmbus: interrupted\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("depth", "doorbells"), [(16, 16), (64, 4), (256, 1)])
def test_the_depth_that_is_told_was_in_force(depth: int, doorbells: int) -> None:
    """256 reads, a signal for each queue full of them."""
    result = compare(size=1 << 20, depth=depth)
    reads = result.phases["reads"]["enlightened"]
    assert (result.depth, reads.operations) == (depth, 256)
    assert reads.counts.doorbells_sent == doorbells  # the guest polls for its completions
    assert reads.counts.packets_sent == 2 * 256


def test_a_depth_that_cannot_be_in_force_is_refused() -> None:
    with pytest.raises(DeviceError, match="at most 1024 MiB"):
        compare(size=1 << 20, depth=1 << 19)
    with ModelMachine() as machine, MemoryDisk(1 << 20) as disk:
        with pytest.raises(LocalProtocolError, match="half of the guest's memory"):
            machine.add_enlightened_disk(disk, depth=4096, request_size=64 << 10)
        with pytest.raises(LocalProtocolError, match="at least one"):
            machine.add_enlightened_disk(disk, depth=0)


def test_large_blocks_may_be_deep_too() -> None:
    result = compare(size=32 << 20, block=256 << 10, depth=128)
    assert result.correct
    assert result.phases["reads"]["enlightened"].counts.doorbells_sent == 1

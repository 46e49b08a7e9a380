"""`vmbus compare`: one disk read and written both ways."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vmbus import cli
from vmbus.machine.comparison import PATHS, compare


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


def test_command_prints_a_table_and_writes_json_and_a_picture(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
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

"""What a flush promised is there after a kill and after a power cut, and the image is whole."""

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from reference.disk_model import fast_folder, qemu_img
from reference.sector_history import PARENT, History, perform, steps
from reference.seeds import chosen_seed
from reference.vhd_writer import write_vhd

from vmbus.storage.images import create_vhd, create_vhdx, open_disk
from vmbus.storage.images.hostfile import HostFile

MIB = 1 << 20
tmp_path = pytest.fixture(fast_folder, name="tmp_path")
SIZE = 6 * MIB + 1024
SECTORS = SIZE // 512
WRITER = Path(__file__).parent.parent / "reference" / "killed_writer.py"


def make_vhdx(path: Path, parent: Path | None) -> None:
    create_vhdx(path, SIZE, block_size=MIB, parent=parent).close()


def make_vhd(path: Path, parent: Path | None) -> None:
    create_vhd(path, SIZE, block_size=256 << 10, parent=parent).close()


def make_vhd_of_others(path: Path, parent: Path | None) -> None:
    """Every block is in the file, and no sector of it was ever written; what is in their places must never show."""
    assert parent is None
    blocks = dict.fromkeys(range(-(-SIZE // (256 << 10))), (b"", b"garbage!" * (32 << 10)))
    write_vhd(path, SIZE, 256 << 10, blocks)


KINDS: dict[str, tuple[Callable[[Path, Path | None], None], bool, int]] = {
    "vhdx-dynamic": (make_vhdx, False, 2048),
    "vhdx-differencing": (make_vhdx, True, 2048),
    "vhd-dynamic": (make_vhd, False, 512),
    "vhd-differencing": (make_vhd, True, 512),
    "vhd-bitmap": (make_vhd_of_others, False, 512),
}


def make(kind: str, folder: Path) -> Path:
    maker, differencing, _ = KINDS[kind]
    path, parent = folder / f"image.{kind.split('-', maxsplit=1)[0]}", None
    if differencing:
        parent = folder / "parent"
        maker(parent, None)
        with open_disk(parent) as disk:
            perform(disk, PARENT, ("write", 0, SECTORS))
    maker(path, parent)
    return path


def first_state(kind: str) -> History:
    return History(PARENT if kind.endswith("differencing") else 0)


def judge(kind: str, image: Path, history: History) -> None:
    """Our view read-only, QEMU's after its own replay, and our view for writing agree, and nothing was lost."""
    before = image.read_bytes()
    with open_disk(image, read_only=True) as disk:
        history.check(disk, SECTORS)
        whole = disk.read(0, SIZE)
    assert image.read_bytes() == before
    if not kind.endswith(("differencing", "bitmap")):  # QEMU knows neither parents nor sectors nobody wrote
        copy, raw = image.with_name("copy"), image.with_name("raw")
        shutil.copy(image, copy)
        raw.write_bytes(whole)
        qemu_format = "vhdx" if kind.startswith("vhdx") else "vpc"
        if qemu_format == "vhdx":
            qemu_img("check", "-f", "vhdx", "-r", "all", copy)
            qemu_img("check", "-f", "vhdx", copy)
        qemu_img("compare", "-f", qemu_format, "-F", "raw", copy, raw)
    with open_disk(image) as disk:
        assert disk.read(0, SIZE) == whole
        disk.write(0, whole[:512])
        disk.flush()
    with open_disk(image, read_only=True) as disk:
        assert disk.read(0, SIZE) == whole


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_a_killed_writer_loses_nothing_that_was_flushed(kind: str, seed: int, tmp_path: Path) -> None:
    image, log = make(kind, tmp_path), tmp_path / "log"
    block = KINDS[kind][2]
    history, version = first_state(kind), 0
    rnd = random.Random(seed)
    work = steps(seed, SECTORS, block)
    done: list[Any] = []
    arguments = [sys.executable, str(WRITER), str(image), str(log), str(seed), str(SECTORS), str(block)]
    child = subprocess.Popen(arguments, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    wanted = rnd.randrange(20, 400)
    while (not log.exists() or log.read_bytes().count(b"end") < wanted) and time.monotonic() < deadline:
        assert child.poll() is None, child.communicate()[1].decode()
        time.sleep(0.002 * rnd.random())
    child.kill()
    child.communicate()
    for line in log.read_text().split():
        if line == "begin":
            version += 1
            done.append(next(work))
            history.begin(version, done[-1])
        else:
            history.end(done[-1])
    assert version >= wanted
    judge(kind, image, history)


class Recorder:
    """What an image asked of its file since it was opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, int, Any]] = []
        for name in ("write", "set_size", "zero", "sync"):
            monkeypatch.setattr(HostFile, name, self._recording(name, getattr(HostFile, name)))

    def _recording(self, name: str, original: Any) -> Any:
        def call(host: HostFile, *arguments: Any) -> None:
            original(host, *arguments)
            first = arguments[0] if arguments else 0
            second = arguments[1] if len(arguments) > 1 else None
            self.calls.append((name, first, bytes(second) if name == "write" else second))

        return call


def surviving(calls: list[tuple[str, int, Any]], rnd: random.Random) -> list[tuple[str, int, Any]]:
    """The calls that reached the medium: all before the last sync; of the others all but one, or any; some torn."""
    synced = max((i + 1 for i, call in enumerate(calls) if call[0] == "sync"), default=0)
    kept, rest = list(calls[:synced]), calls[synced:]
    chance = rnd.choice([0.0, 0.3, 0.7, 1.0])
    missing = rnd.randrange(len(rest)) if rest and rnd.random() < 0.5 else None
    for index, (name, first, second) in enumerate(rest):
        if index == missing or (missing is None and rnd.random() > chance):
            continue
        if name == "write" and rnd.random() < 0.2:
            pieces = [(name, first + at, second[at : at + 512]) for at in range(0, len(second), 512)]
            kept += [piece for piece in pieces if rnd.random() < 0.7]
        else:
            kept.append((name, first, second))
    return kept


def replay(image: Path, calls: list[tuple[str, int, Any]]) -> None:
    with open(image, "r+b") as file:
        for name, first, second in calls:
            if name == "write":
                os.pwrite(file.fileno(), second, first)
            elif name == "set_size":
                os.ftruncate(file.fileno(), first)
            elif name == "zero":
                end = min(first + second, os.fstat(file.fileno()).st_size)
                os.pwrite(file.fileno(), bytes(max(0, end - first)), first)


@pytest.mark.parametrize("cuts", [2, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_power_cut_loses_nothing_that_was_flushed(
    kind: str, cuts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = chosen_seed()
    rnd = random.Random(seed)
    print(f"seed {seed}")
    image = make(kind, tmp_path)
    start = tmp_path / "start"
    work = list(islice(steps(seed, SECTORS, KINDS[kind][2]), 120))
    shutil.copy(image, start)
    with monkeypatch.context() as patch:
        recorder = Recorder(patch)
        disk = open_disk(image)
        spans = []
        for version, step in enumerate(work, 1):
            begun = len(recorder.calls)
            perform(disk, version, step)
            spans.append((begun, len(recorder.calls)))
        disk.close()
        calls = recorder.calls
    syncs = [index for index, call in enumerate(calls) if call[0] == "sync"]
    for _ in range(cuts):
        # Just before a sync the most is at stake.
        cut = rnd.choice(syncs) if rnd.random() < 0.6 else rnd.randrange(len(calls) + 1)
        history = first_state(kind)
        for version, (step, (begun, ended)) in enumerate(zip(work, spans, strict=True), 1):
            if begun > cut:
                break
            history.begin(version, step)
            if ended <= cut:
                history.end(step)
        shutil.copy(start, image)
        replay(image, surviving(calls[:cut], rnd))
        judge(kind, image, history)

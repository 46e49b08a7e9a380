"""What was acknowledged with a flush survives the death of the process at any point.

A child process runs guest and host, writes numbered blocks and tells of each acknowledged flush; the parent kills
it without warning and compares the image with what it was told.
"""

import os
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from reference.seeds import chosen_seed

from vmbus.storage.disk import Disk, RawDisk
from vmbus.storage.images import create_vhd, create_vhdx, open_disk

BLOCK = 4096
BLOCKS = 512

CHILD = """
import random, struct, sys
from vmbus.bus.channel import loopback
from vmbus.core.memory import GuestMemory
from vmbus.storage.images import open_disk
from vmbus.storage.vsc import StorageVsc
from vmbus.storage.vsp import StorageVsp

path, seed, blocks, block, workers, kind = sys.argv[1], *map(int, sys.argv[2:6]), sys.argv[6]
numbers = random.Random(seed)
guest, host = loopback(GuestMemory(4 << 20), 16, 16)
vsp = StorageVsp({(0, 0): open_disk(path, format=kind)}, workers=workers)
vsp.open(host)
vsc = StorageVsc(guest, range(512))
vsc.connect()
disk = vsc.disk()

def content(number, at):
    return struct.pack("<QQ", number, at) * (block // 16)

number = 0
while True:
    written = []
    for _ in range(numbers.randrange(1, 6)):
        number += 1
        places = numbers.sample(range(blocks), numbers.choice([1, 1, 4]))
        if len(places) == 1 and numbers.random() < 0.3:
            disk.write(places[0] * block, content(number, places[0]), fua=True)
            print("F", number, *places, flush=True)
            continue
        if len(places) == 1:
            disk.write(places[0] * block, content(number, places[0]))
        else:
            disk.write_batch([at * block for at in places], [content(number, at) for at in places])
        written.append((number, places))
    disk.flush()
    for done, places in written:
        print("F", done, *places)
    sys.stdout.flush()
"""


def make(kind: str, path: Path) -> None:
    size = BLOCKS * BLOCK
    if kind == "raw":
        RawDisk.create(path, size).close()
    elif kind == "vhd":
        create_vhd(path, size).close()
    else:
        create_vhdx(path, size).close()


def check(disk: Disk, durable: dict[int, int]) -> None:
    for at in range(BLOCKS):
        data = disk.read(at * BLOCK, BLOCK)
        number, place = struct.unpack_from("<QQ", data)
        wanted = durable.get(at, 0)
        # Later writes that were not flushed may be there too, wholly: a 4 KiB block is written at once.
        assert number >= wanted, f"block {at}: write {wanted} was acknowledged as durable, {number} is there"
        if number:
            assert data == struct.pack("<QQ", number, place) * (BLOCK // 16)
            assert place == at


@pytest.mark.parametrize(
    ("kind", "workers"),
    [("raw", 0), ("vhdx", 2)]
    + [
        pytest.param(kind, workers, marks=pytest.mark.slow)
        for kind in ("raw", "vhd", "vhdx")
        for workers in (0, 2)
    ],
)
def test_flushed_writes_survive_a_kill(tmp_path: Path, kind: str, workers: int) -> None:
    seed = chosen_seed()
    print(f"seed {seed}")
    numbers = random.Random(seed)
    path = tmp_path / f"disk.{kind}"
    make(kind, path)
    log = tmp_path / "log"
    with log.open("w+b") as output:
        arguments = [str(path), str(seed), str(BLOCKS), str(BLOCK), str(workers), kind]
        child = subprocess.Popen([sys.executable, "-c", CHILD, *arguments], stdout=output, env=os.environ)
        deadline = time.monotonic() + 20
        while log.stat().st_size < 200 and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert child.poll() is None, "the child ended by itself"
        time.sleep(numbers.random() * 0.3)
        child.send_signal(signal.SIGKILL)
        child.wait()
        output.seek(0)
        lines = output.read().decode().split("\n")[:-1]  # the last line may be cut off
    durable: dict[int, int] = {}
    for line in lines:
        number, *places = map(int, line.split()[1:])
        for place in places:
            durable[place] = max(number, durable.get(place, 0))
    assert durable
    with open_disk(path, format=kind) as disk:  # type: ignore[arg-type]
        check(disk, durable)

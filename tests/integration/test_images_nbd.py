"""The NBD client against the servers people use."""

import os
import random
import shutil
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from reference.disk_model import apply, check_extents, pattern, qemu_img, tool
from reference.nbd_servers import nbdkit, qemu_nbd, serving, wait_for

from vmbus.errors import DeviceError
from vmbus.storage.disk import DiskError
from vmbus.storage.images import NbdDisk, create_vhdx, open_disk
from vmbus.trace.ledger import Account

MIB = 1 << 20
SIZE = 8 * MIB
KINDS = ["write"] * 6 + ["read"] * 3 + ["unmap", "zeros", "flush", "extents"]


def exercise(uri: str, model: bytearray, rounds: int = 120) -> None:
    seed = int(os.environ.get("VMBUS_SEED", "5"))
    print(f"seed {seed}")
    rnd = random.Random(seed)
    with open_disk(uri) as disk:
        sectors = disk.sector_count
        assert disk.size == len(model)
        for _ in range(rounds):
            first = rnd.randrange(sectors)
            count = min(rnd.choice([1, 2, 8, 700, 3000]), sectors - first)
            apply(disk, model, (rnd.choice(KINDS), first, count, rnd.randrange(1, 256)))
        assert disk.read(0, disk.size) == model
        check_extents(disk, model, 0, disk.size)
        disk.write_through(0, pattern(9, 0, disk.sector_size))
        model[: disk.sector_size] = pattern(9, 0, disk.sector_size)


@pytest.mark.parametrize("image_format", ["raw", "qcow2", "vhdx"])
def test_qemu_nbd(image_format: str, tmp_path: Path) -> None:
    image, raw = tmp_path / f"image.{image_format}", tmp_path / "model"
    qemu_img("create", "-f", image_format, image, str(SIZE))
    model = bytearray(SIZE)
    with qemu_nbd(tmp_path, image, "-f", image_format, "--discard=unmap", "--detect-zeroes=unmap") as uri:
        exercise(uri, model)
        with open_disk(uri, read_only=True) as disk:
            assert disk.read(0, SIZE) == model
    raw.write_bytes(model)
    qemu_img("compare", "-f", image_format, "-F", "raw", image, raw)


def test_qemu_nbd_over_tcp(tmp_path: Path) -> None:
    image = tmp_path / "image.raw"
    image.write_bytes(bytes(SIZE))
    for port in range(20000 + os.getpid() % 10000, 40000, 7):
        with serving(
            tool("qemu-nbd"), "-b", "127.0.0.1", "-p", str(port), "-t", "-f", "raw", image
        ) as server:
            while server.poll() is None:
                try:
                    disk = open_disk(f"nbd://127.0.0.1:{port}")
                except DiskError:
                    time.sleep(0.02)
                    continue
                disk.write(512, pattern(1, 1, 1024))
                assert disk.read(0, 2048) == bytes(512) + pattern(1, 1, 1024) + bytes(512)
                disk.close()
                return
    pytest.fail("no free port")


def test_holes_stay_holes_and_read_only_stays_read_only(tmp_path: Path) -> None:
    ours, image = tmp_path / "image.vhdx", tmp_path / "image.qcow2"
    with create_vhdx(ours, SIZE, block_size=MIB) as local:
        local.write(3 * MIB, pattern(1, 0, MIB))
        local.write(5 * MIB, pattern(2, 0, MIB))
        expected = [tuple(extent) for extent in local.extents(0, SIZE)]
    qemu_img("convert", "-f", "vhdx", "-O", "qcow2", ours, image)  # QEMU tells holes of qcow2, not of VHDX
    with qemu_nbd(tmp_path, image, "-f", "qcow2", "-r") as uri:
        with pytest.raises(DiskError, match="read-only"):
            open_disk(uri)
        with open_disk(uri, read_only=True) as disk:
            assert [tuple(extent) for extent in disk.extents(0, SIZE)] == expected
            with pytest.raises(DiskError, match="read-only"):
                disk.write(0, bytes(512))


@pytest.mark.parametrize(
    "filters", [[], ["--filter=blocksize-policy"], ["--no-sr"], ["--filter=nozero"]], ids=" ".join
)
def test_nbdkit(filters: list[str], tmp_path: Path) -> None:
    arguments = [*filters, "memory", f"size={SIZE}"]
    if "--filter=blocksize-policy" in filters:
        arguments += ["blocksize-minimum=4096", "blocksize-preferred=64K", "blocksize-maximum=512K"]
        arguments += ["blocksize-error-policy=error"]
    if "--filter=nozero" in filters:
        arguments += ["zeromode=none"]
    with nbdkit(tmp_path, *arguments) as uri:
        exercise(uri, bytearray(SIZE), 60)


def test_nbdkit_with_a_size_that_is_not_whole_sectors(tmp_path: Path) -> None:
    with nbdkit(tmp_path, "memory", "size=1000000") as uri, open_disk(uri) as disk:
        assert disk.size == 999936
        check_extents(disk, bytes(disk.size), 0, disk.size)


def test_errors_of_the_servers_disk_are_errors_of_ours(tmp_path: Path) -> None:
    flag = tmp_path / "fail"
    with (
        nbdkit(
            tmp_path,
            "--filter=error",
            "memory",
            f"size={SIZE}",
            "error=ENOSPC",
            "error-rate=100%",
            f"error-file={flag}",
        ) as uri,
        open_disk(uri) as disk,
    ):
        disk.write(0, pattern(1, 0, 4096))
        flag.touch()
        with pytest.raises(DiskError, match="write at byte 4096 failed") as caught:
            disk.write(4096, bytes(4096))
        assert caught.value.errno == 28
        with pytest.raises(DiskError, match="read at byte 0 failed"):
            disk.read(0, 4096)
        flag.unlink()
        assert disk.read(0, 4096) == pattern(1, 0, 4096)


def test_threads_share_the_connection(tmp_path: Path) -> None:
    """With a server that takes a second for each read, sixteen threads do not take sixteen."""
    account = Account()
    with (
        nbdkit(tmp_path, "--filter=delay", "memory", f"size={SIZE}", "rdelay=1") as uri,
        open_disk(uri, account=account) as disk,
    ):
        for at in range(16):
            disk.write(at * 4096, pattern(at, 0, 4096))
        began, calls = time.monotonic(), account.backend_calls
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(lambda at: disk.read(at * 4096, 4096), range(16)))
        elapsed = time.monotonic() - began
        assert found == [pattern(at, 0, 4096) for at in range(16)]
        assert account.backend_calls - calls == 16
        assert elapsed < 10


def test_a_server_that_dies_ends_all_requests(tmp_path: Path) -> None:
    path = tmp_path / "dying.sock"
    command = [tool("nbdkit"), "-f", "-U", str(path), "--filter=delay", "memory", "size=1M", "rdelay=30"]
    with serving(*command) as server:
        wait_for(path, server)
        disk = open_disk(f"nbd+unix:///?socket={path}")
        errors: list[str] = []

        def read() -> None:
            try:
                disk.read(0, 4096)
            except DeviceError as error:
                errors.append(str(error))

        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.2)
        server.kill()
        for thread in threads:
            thread.join(10)
        assert len(errors) == 4
        with pytest.raises(DiskError, match="connection"):
            disk.write(0, bytes(512))
        disk.close()


def test_a_silent_server_is_given_up(tmp_path: Path) -> None:
    path = tmp_path / "slow.sock"
    with serving(
        tool("nbdkit"), "-f", "-U", path, "--filter=delay", "memory", "size=1M", "rdelay=60"
    ) as server:
        wait_for(path, server)
        disk = NbdDisk(f"nbd+unix:///?socket={path}", timeout=0.3)
        began = time.monotonic()
        with pytest.raises(DiskError, match="does not answer"):
            disk.read(0, 512)
        assert time.monotonic() - began < 30, "it waited for the answer"
        disk.close()


@pytest.mark.parametrize(
    ("uri", "sentence"),
    [
        ("nbd+unix:///?socket=/nonexistent/socket", "cannot connect"),
        ("nbd://127.0.0.1:1/", "cannot connect"),
        ("nbd:///x", "expected nbd://"),
        ("nbd+unix:///x", "expected nbd://"),
        ("nbd://host:port/x", "host or port is not valid"),
    ],
)
def test_what_cannot_be_reached(uri: str, sentence: str) -> None:
    with pytest.raises(DiskError, match=sentence):
        open_disk(uri)


def test_an_unknown_export_and_the_old_handshake(tmp_path: Path) -> None:
    image = tmp_path / "image.raw"
    image.write_bytes(bytes(MIB))
    with qemu_nbd(tmp_path, image, "-f", "raw") as uri, pytest.raises(DiskError, match="no such export"):
        open_disk(uri.replace("/data", "/other"))
    with nbdkit(tmp_path, "-o", "memory", "size=1M") as uri, pytest.raises(DiskError, match="old handshake"):
        open_disk(uri)


def test_tls_is_refused_in_words(tmp_path: Path) -> None:
    if (
        shutil.which("certtool") is None
        and "tls=no"
        in subprocess.run(
            [tool("nbdkit"), "--dump-config"], capture_output=True, text=True, check=True
        ).stdout
    ):
        pytest.skip("this nbdkit has no TLS")
    keys = tmp_path / "keys.psk"
    keys.write_text("user:" + "00" * 32 + "\n")
    keys.chmod(0o600)
    with (
        nbdkit(tmp_path, "--tls=require", f"--tls-psk={keys}", "memory", "size=1M") as uri,
        pytest.raises(DiskError, match="TLS"),
    ):
        open_disk(uri)

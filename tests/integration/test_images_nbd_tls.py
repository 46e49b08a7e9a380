"""The NBD client over TLS, against the servers people use, with certificates that are right and wrong."""

import os
import random
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from reference.certificates import make_certificates
from reference.disk_model import pattern, tool
from reference.nbd_servers import free_port, nbdkit, qemu_nbd, serving, wait_for, wait_for_port

from vmbus.storage.disk import Disk, DiskError
from vmbus.storage.images import open_disk

MIB = 1 << 20
SIZE = 8 * MIB


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates of one authority."""
    return make_certificates(tmp_path_factory.mktemp("pki") / "good")


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates of another authority."""
    return make_certificates(tmp_path_factory.mktemp("pki") / "strangers")


@contextmanager
def tls_nbdkit(folder: Path, pki: Path, *options: str) -> Iterator[str]:
    """An nbdkit that speaks nothing but TLS; a URI without a folder of certificates."""
    with nbdkit(
        folder, "--tls=require", f"--tls-certificates={pki}", *options, "memory", f"size={SIZE}"
    ) as uri:
        yield uri.replace("nbd+unix:", "nbds+unix:")


def exercise(disk: Disk) -> None:
    rnd = random.Random(int(os.environ.get("VMBUS_SEED", "5")))
    model = bytearray(SIZE)
    for _ in range(40):
        at = rnd.randrange(disk.sector_count)
        count = min(rnd.choice([1, 8, 3000]), disk.sector_count - at)
        data = pattern(rnd.randrange(1, 256), at, count * 512)
        disk.write(at * 512, data)
        model[at * 512 : at * 512 + len(data)] = data
        disk.flush()
    assert disk.read(0, SIZE) == model


def test_nbdkit(pki: Path, tmp_path: Path) -> None:
    with (
        tls_nbdkit(tmp_path, pki) as uri,
        open_disk(f"{uri}&tls-certificates={pki}&tls-hostname=localhost") as disk,
    ):
        exercise(disk)


def test_qemu_nbd_that_asks_who_we_are(pki: Path, strangers: Path, tmp_path: Path) -> None:
    image = tmp_path / "image.raw"
    image.write_bytes(bytes(SIZE))
    credentials = f"tls-creds-x509,id=tls0,endpoint=server,dir={pki},verify-peer=yes"
    with qemu_nbd(tmp_path, image, "-f", "raw", "--object", credentials, "--tls-creds", "tls0") as uri:
        uri = uri.replace("nbd+unix:", "nbds+unix:")
        with open_disk(f"{uri}&tls-certificates={pki}") as disk:
            exercise(disk)
        nobody = tmp_path / "nobody"
        nobody.mkdir()
        shutil.copy(pki / "ca-cert.pem", nobody)
        for name in ("client-cert.pem", "client-key.pem"):
            shutil.copy(strangers / name, nobody)
        with pytest.raises(DiskError, match=r"TLS failed: .*(certificate|ca|alert)|handshake failed"):
            open_disk(f"{uri}&tls-certificates={nobody}")


def test_the_servers_name_over_tcp(pki: Path, tmp_path: Path) -> None:
    elsewhere = make_certificates(tmp_path / "elsewhere", names="DNS:elsewhere.example")
    for folder, query, sentence in [
        (pki, "", None),
        (elsewhere, "", "certificate is refused: .*[Hh]ostname mismatch"),
        (elsewhere, "&tls-hostname=elsewhere.example", None),
        (elsewhere, "&tls-verify-peer=0", None),
    ]:
        port = free_port()
        command = [tool("nbdkit"), "-f", "-i", "127.0.0.1", "-p", str(port), "--tls=require"]
        with serving(*command, f"--tls-certificates={folder}", "memory", f"size={SIZE}") as server:
            uri = f"nbds://localhost:{port}/?tls-certificates={folder}{query}"
            wait_for_port(port, server)
            if sentence is None:
                with open_disk(uri) as disk:
                    assert disk.read(0, 4096) == bytes(4096)
            else:
                with pytest.raises(DiskError, match=sentence):
                    open_disk(uri)


def test_a_certificate_of_an_unknown_authority_is_refused(pki: Path, strangers: Path, tmp_path: Path) -> None:
    with tls_nbdkit(tmp_path, pki) as uri:
        for query in ("", f"&tls-certificates={strangers}"):  # nor does the host know it
            with pytest.raises(
                DiskError, match=r"the server's certificate is refused: .*(issuer|self.signed)"
            ):
                open_disk(uri + query)
        with open_disk(f"{uri}&tls-verify-peer=0") as disk:
            assert disk.read(0, 4096) == bytes(4096)


def test_without_tls_at_one_end(pki: Path, tmp_path: Path) -> None:
    """Never does a connection that was to be encrypted go on in the clear."""
    with tls_nbdkit(tmp_path, pki) as uri, pytest.raises(DiskError, match=r"wants TLS \(nbds://"):
        open_disk(uri.replace("nbds+unix:", "nbd+unix:"))
    with (
        nbdkit(tmp_path, "memory", f"size={SIZE}") as uri,
        pytest.raises(DiskError, match="refuses to encrypt the connection"),
    ):
        open_disk(uri.replace("nbd+unix:", "nbds+unix:"))


def test_certificates_that_cannot_be_read(pki: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    with tls_nbdkit(tmp_path, pki) as uri:
        with pytest.raises(DiskError, match=r"ca-cert\.pem: No such file"):
            open_disk(f"{uri}&tls-certificates={broken}")
        (broken / "ca-cert.pem").touch()
        with pytest.raises(DiskError, match=r"ca-cert\.pem: the file is empty"):
            open_disk(f"{uri}&tls-certificates={broken}")
        (broken / "ca-cert.pem").write_text("nothing")
        with pytest.raises(DiskError, match="TLS failed"):
            open_disk(f"{uri}&tls-certificates={broken}")
        shutil.copy(pki / "ca-cert.pem", broken)
        shutil.copy(pki / "client-cert.pem", broken)
        with pytest.raises(DiskError, match=r"client-key\.pem: No such file"):
            open_disk(f"{uri}&tls-certificates={broken}")
        with pytest.raises(DiskError, match="host name is not valid"):
            open_disk(f"{uri}&tls-certificates={pki}&tls-hostname=.x")


def test_threads_send_and_receive_at_once(pki: Path, tmp_path: Path) -> None:
    with tls_nbdkit(tmp_path, pki) as uri, open_disk(f"{uri}&tls-certificates={pki}") as disk:

        def work(number: int) -> None:
            base = number * MIB
            for turn in range(8):
                data = pattern(number + turn, number, 256 << 10)
                disk.write(base, data)
                assert disk.read(base, len(data)) == data

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))


def test_a_server_that_dies_ends_all_requests(pki: Path, tmp_path: Path) -> None:
    path = tmp_path / "dying"
    path.mkdir()
    command = [tool("nbdkit"), "-f", "-U", str(path / "s"), "--tls=require", f"--tls-certificates={pki}"]
    with serving(*command, "--filter=delay", "memory", "size=1M", "rdelay=30") as server:
        wait_for(path / "s", server)
        disk = open_disk(f"nbds+unix:///?socket={path / 's'}&tls-certificates={pki}")
        errors: list[DiskError] = []

        def read() -> None:
            try:
                disk.read(0, 4096)
            except DiskError as error:
                errors.append(error)

        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        server.kill()
        for thread in threads:
            thread.join(20)
        assert len(errors) == 4
        disk.close()
        disk.close()

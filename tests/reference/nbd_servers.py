"""The NBD servers that people use, as programs beside the tests."""

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reference.disk_model import tool


def free_port() -> int:
    """A TCP port that nobody had just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def serving(*command: str | os.PathLike[str]) -> Iterator[subprocess.Popen[bytes]]:
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        yield server
    finally:
        server.kill()
        server.communicate()


def wait_for(path: Path, server: subprocess.Popen[bytes]) -> None:
    """Until a server listens at a Unix socket."""
    _wait(socket.AF_UNIX, os.fspath(path), server)


def wait_for_port(port: int, server: subprocess.Popen[bytes]) -> None:
    """Until a server listens at a TCP port of this host."""
    _wait(socket.AF_INET, ("127.0.0.1", port), server)


def _wait(family: int, address: str | tuple[str, int], server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            with socket.socket(family) as probe:
                probe.connect(address)
                return
        except OSError:  # no socket yet, or nobody listens to it yet
            assert server.poll() is None, server.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.01)


@contextmanager
def qemu_nbd(folder: Path, image: Path, *options: str) -> Iterator[str]:
    path = folder / "nbd.sock"
    path.unlink(missing_ok=True)
    with serving(tool("qemu-nbd"), "-k", path, "-x", "data", "-t", "-e", "4", *options, image) as server:
        wait_for(path, server)
        yield f"nbd+unix:///data?socket={path}"


@contextmanager
def nbdkit(folder: Path, *arguments: str) -> Iterator[str]:
    path = folder / "nbdkit.sock"
    path.unlink(missing_ok=True)
    with serving(tool("nbdkit"), "-f", "-U", path, *arguments) as server:
        wait_for(path, server)
        yield f"nbd+unix:///?socket={path}"

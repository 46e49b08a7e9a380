"""Guests for the tests: the prepared kernel, root disks, and a shell on a machine's console.

On a developer's machine without apt or the unicorn package these tests skip; in CI (the environment variable CI
is set) a missing kernel or engine is a failure.
"""

import hashlib
import os
import re
import shutil
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from vmbus.engine.unicorn import find_library
from vmbus.errors import EngineError
from vmbus.machine.guest import Machine, Outcome
from vmbus.machine.linux import BootError
from vmbus.machine.packages import Guest, prepare_guest

QUIET = "console=ttyS0 quiet panic=-1"
WALL_LIMIT = 300.0


def _unavailable(reason: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(f"CI has to run the guest tests: {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def guest() -> Guest:
    """The distribution's kernel and our initramfs.

    VMBUS_GUEST_PACKAGE names another kernel package, VMBUS_GUEST_CACHE another cache folder: use both together.
    """
    cache, package = os.environ.get("VMBUS_GUEST_CACHE"), os.environ.get("VMBUS_GUEST_PACKAGE")
    try:
        find_library()
        return prepare_guest(Path(cache) if cache else None, package=package)
    except (BootError, EngineError) as error:
        _unavailable(str(error))
        raise


class Shell:
    """A busybox shell on the console.

    Attributes:
        poll: called while commands run, for what a test has to do beside the guest.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.poll: Callable[[], None] | None = None
        result = machine.run(until="# ", wall_seconds=WALL_LIMIT)
        assert result.outcome is Outcome.MATCHED, machine.console.text[-2000:]

    def __call__(self, command: str, *, check: bool = True) -> str:
        """What `command` prints; its exit status must be 0 if `check`."""
        console = self.machine.console
        start = len(console.output)
        # The line editor echoes the command, wrapped anyhow: the quotes keep the marks out of the echo.
        console.send(f"echo BE''GIN; ({command}) 2>&1; echo EN''D=$?.\n")
        result = self.machine.run(until=re.compile(rb"END=(\d+)\."), wall_seconds=WALL_LIMIT, poll=self.poll)
        text = console.output[start:].decode(errors="replace").replace("\r\n", "\n")
        assert result.outcome is Outcome.MATCHED, f"{command}: {result.outcome}\n{text[-2000:]}"
        printed, _, status = text.partition("BEGIN\n")[2].rpartition("END=")
        if check:
            assert status.split(".")[0] == "0", printed
        return printed

    def power_off(self) -> None:
        self.machine.console.send("sync; poweroff -f\n")
        result = self.machine.run(wall_seconds=WALL_LIMIT)
        assert result.outcome is Outcome.POWER_OFF, self.machine.console.text[-2000:]


@pytest.fixture
def boot(guest: Guest):
    """Start machines with the prepared guest; they are closed afterwards."""
    machines: list[Machine] = []

    def start(**options: object) -> Machine:
        settings: dict[str, object] = {"initrd": guest.initramfs, "append": QUIET, **options}
        machine = Machine(guest.kernel, **settings)  # type: ignore[arg-type]
        machines.append(machine)
        return machine

    yield start
    for machine in machines:
        machine.close()


@pytest.fixture(scope="session")
def shell():
    return Shell


@pytest.fixture(scope="session")
def needs():
    """Give the path of a host's program that a test cannot do without."""

    def find(program: str) -> str:
        path = shutil.which(program)
        if path is None:
            _unavailable(f"there is no {program}")
        assert path is not None
        return path

    return find


@pytest.fixture(scope="session")
def fetch():
    """A function that gets the guest's file /f from its web server: how many bytes came, and their SHA-256."""
    return _fetch


def _fetch(machine: Machine, address: tuple[str, int]) -> tuple[int, str]:
    digest, received = hashlib.sha256(), 0
    finished, done = socket.socketpair()

    def get() -> None:
        nonlocal received
        with done, socket.create_connection(address, timeout=WALL_LIMIT) as connection:
            connection.sendall(b"GET /f HTTP/1.0\r\n\r\n")
            head = b""
            while b"\r\n\r\n" not in head:
                head += connection.recv(1 << 16)
            part = head.partition(b"\r\n\r\n")[2]
            while part or (part := connection.recv(1 << 20)):
                digest.update(part)
                received += len(part)
                part = b""

    thread = threading.Thread(target=get, daemon=True)
    thread.start()
    with finished:
        result = machine.run(
            wall_seconds=WALL_LIMIT,
            idle=lambda until_timer: machine.network.idle(until_timer, [finished.fileno()]),
            poll=lambda: None if thread.is_alive() else machine.stop(),
        )
    assert result.outcome is Outcome.STOPPED
    return received, digest.hexdigest()


class Server(threading.Thread):
    """Gives `data` to everyone who asks the host by HTTP."""

    def __init__(self, address: str, data: bytes) -> None:
        super().__init__(daemon=True)
        self._data = b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % len(data) + data
        self._server = socket.create_server((address, 0))
        self.port = self._server.getsockname()[1]
        self.start()

    def run(self) -> None:
        with suppress(OSError):  # closed
            while True:
                with self._server.accept()[0] as connection:
                    connection.settimeout(WALL_LIMIT)
                    request = b""
                    while b"\r\n\r\n" not in request:
                        request += connection.recv(4096)
                    connection.sendall(self._data)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self.join(WALL_LIMIT)


@pytest.fixture(scope="session")
def serve():
    return Server


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A small disk of known, incompressible contents."""
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(1 << 16) * 128)
    return path

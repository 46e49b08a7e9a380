"""What a hostile guest in a process of its own can reach: its partition, what it imports from, and nothing else."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from reference.confined_guests import SPACE
from reference.eventually import eventually
from reference.process_guests import REPORT

from vmbus.hypervisor import ChildProcess, HostClock, Hypervisor, Sandbox
from vmbus.hypervisor.sandbox import _outermost
from vmbus.hypervisor.tlfs import PartitionState

GUESTS = "reference.confined_guests"
NAMESPACES = {"users", "processes", "network", "ipc", "files"}
BOUNDS = {"limits", "privileges"}
FILTERED = importlib.util.find_spec("pyseccomp") is not None or bool(os.environ.get("VMBUS_ALL_EXTRAS"))

probe = subprocess.run(["unshare", "-Urpfn", "true"], capture_output=True, check=False)
namespaces = pytest.mark.skipif(probe.returncode != 0, reason="this kernel gives nobody namespaces")


@pytest.fixture
def hv():
    hypervisor = Hypervisor(clock=HostClock())
    hypervisor.create_root()
    yield hypervisor
    hypervisor.root.destroy()


@pytest.fixture
def child(hv):
    return hv.create_child(hv.root, "c", memory_size=1 << 20)


def reported(child, name, *, sandbox, **arguments):
    process = ChildProcess(child, f"{GUESTS}:{name}", arguments, sandbox=sandbox)
    assert process.wait(60) == 0, process.output.decode()
    return json.loads(child.memory.read(REPORT, SPACE).rstrip(b"\0"))


def number(child, at):
    return int.from_bytes(child.memory.read(REPORT + at, 8), "little")


def stands_still(child, at):
    """Whether nobody counts there any more; who does counts every 5 ms."""
    before = number(child, at)
    time.sleep(0.2)
    return number(child, at) == before


@namespaces
def test_all_of_it_is_in_force_where_the_kernel_allows_it(child):
    process = ChildProcess(child, "reference.process_guests:leave", {"status": 0})
    assert process.confinement == NAMESPACES | BOUNDS | ({"system calls"} if FILTERED else set())
    assert process.wait(60) == 0


@namespaces
def test_it_reaches_nothing_beyond_its_partition(child, tmp_path, monkeypatch):
    monkeypatch.setenv("A_SECRET", "of the parent's")
    secret, shown = tmp_path / "secret", tmp_path / "shown"
    secret.write_text("secret")
    shown.write_text("shown")
    files = [str(secret), str(shown), "/etc/passwd", "/etc/shadow", os.__file__]
    sandbox = Sandbox(readable=(str(shown),), environment={"MODE": "test"}, filter_calls=False)
    found = reported(child, "reaches", sandbox=sandbox, files=files)
    assert found["id"] == [1000, 1000, 1000]
    assert found["parent's id"] == 1
    assert found["processes"] in ([1, 2], [])  # a container may refuse a /proc
    assert found["interfaces"] == ["lo"]
    assert "A_SECRET" not in found["variables"]
    assert "HOME" not in found["variables"]
    assert "MODE" in found["variables"]
    assert found["readable"] == [str(shown), os.__file__]
    assert set(found["writes"]) <= {"OSError", "FileNotFoundError", "PermissionError"}
    assert set(found["capabilities"]) == {"0" * 16}
    assert found["privileges to gain"] == "1"
    assert found["user namespace"] == -1
    assert found["traces process 1"] == -1
    assert found["its own state"] is True or found["processes"] == []
    assert found["core size"] == 0


@pytest.mark.skipif(not FILTERED, reason="needs the sandbox extra")
def test_it_starts_nothing_where_system_calls_are_filtered(child):
    found = reported(child, "starts_something", sandbox=Sandbox())
    assert found == ["PermissionError", "PermissionError", "PermissionError", None]


@namespaces
@pytest.mark.skipif(not FILTERED, reason="needs the sandbox extra")
def test_it_gets_no_memory_that_no_limit_counts_and_reaches_nobody(child):
    assert reported(child, "takes_what_no_limit_counts", sandbox=Sandbox()) == {
        "anonymous": "PermissionError",
        "System V": -1,
        "a device": "FileNotFoundError",
        "tkill": -1,
        "owner": "PermissionError",
        "owner, high half": -1,
        "owner of a socket": "PermissionError",
        "group of a socket": "PermissionError",
        "limits": "PermissionError",
        "own limits": 0,
    }


@namespaces
@pytest.mark.parametrize("stay", [True, False], ids=["killed", "ends itself"])
def test_what_it_leaves_behind_ends_with_it(child, stay):
    sandbox = Sandbox(filter_calls=False)
    process = ChildProcess(child, f"{GUESTS}:leaves_an_orphan", {"stay": stay}, sandbox=sandbox)
    assert eventually(lambda: number(child, 8) > 0 or process.wait(0.01) is not None)
    if stay:
        process.kill(30)
    assert process.wait(30) == (-9 if stay else 0)
    assert eventually(lambda: stands_still(child, 0))


@pytest.mark.parametrize("stay", [True, False], ids=["killed", "ends itself"])
def test_what_it_leaves_behind_is_served_no_more(child, stay):
    """Without a sandbox the orphan lives, with the socket in its hands; the end is noticed, and nobody answers it."""
    process = ChildProcess(child, f"{GUESTS}:leaves_an_orphan", {"stay": stay}, sandbox=None)
    assert eventually(lambda: number(child, 16) > 0)
    orphan = number(child, 16)
    try:
        if stay:
            process.kill(30)
        assert process.wait(30) == (-9 if stay else 0)
        assert eventually(lambda: stands_still(child, 8))
        child.destroy()
        assert child.state is PartitionState.DELETED
    finally:
        with contextlib.suppress(ProcessLookupError):  # its next request ended it
            os.kill(orphan, signal.SIGKILL)


@namespaces
def test_who_waits_for_it_cannot_be_stopped(child):
    process = ChildProcess(child, f"{GUESTS}:stops_who_waits_for_it", sandbox=Sandbox(filter_calls=False))
    assert eventually(lambda: child.memory.read(REPORT, 4) == b"done")
    process.kill(30)
    assert process.wait(30) == -9


def test_memory_and_descriptors_are_bounded(child):
    sandbox = Sandbox(data=256 << 20, descriptors=100)
    memory, descriptors = reported(child, "takes", sandbox=sandbox, size=512 << 20)
    assert memory == "refused" or "ASAN_OPTIONS" in os.environ  # sanitizers have mapped more than any limit
    assert 50 < descriptors < 100
    memory, descriptors = reported(child, "takes", sandbox=Sandbox(), size=64 << 20)
    assert memory == "taken"
    assert 4000 < descriptors < 4096


@pytest.mark.parametrize("sandbox", [Sandbox(), None], ids=["confined", "not confined"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGABRT, signal.SIGTERM, signal.SIGINT])
def test_it_ends_as_the_guest_ended(child, how, sandbox):
    process = ChildProcess(child, f"{GUESTS}:ends", {"number": how}, sandbox=sandbox)
    assert process.wait(60) == -how


def parent(code):
    """Another parent, in a process of its own."""
    prelude = """
        import os, signal, sys, time
        from vmbus.hypervisor import ChildProcess, HostClock, Hypervisor, Sandbox, child_main
        hv = Hypervisor(clock=HostClock())
        child = hv.create_child(hv.create_root(), "c", memory_size=1 << 20)
    """
    paths = os.pathsep.join(path for path in sys.path if path)
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(prelude) + textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )


@namespaces
def test_it_does_not_kill_its_parent():
    process = parent("""
        print(ChildProcess(child, "reference.confined_guests:kills_its_parent").wait(60) is not None)
    """)
    assert process.communicate(timeout=60)[0].splitlines()[-1] == "True"
    assert process.returncode == 0


@pytest.mark.parametrize("sandbox", ["Sandbox()", "None"])
def test_it_ends_with_its_parent(sandbox):
    process = parent(f"""
        child = ChildProcess(child, "reference.process_guests:ticker", sandbox={sandbox})
        print(child.pid, flush=True)
        time.sleep(60)
    """)
    guest = Path(f"/proc/{int(process.stdout.readline())}")
    assert guest.exists()
    process.kill()
    process.communicate(timeout=60)
    assert eventually(lambda: not guest.exists())


@namespaces
def test_where_there_are_no_namespaces_it_is_said():
    """A parent whose own user namespace may have no others in it."""
    process = parent("""
        child_main.enter_namespaces()
        if first := os.fork():
            sys.exit(os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]))
        process = ChildProcess(child, "reference.confined_guests:starts_something")
        print(*sorted(process.confinement), sep=",")
        print(process.wait(60))
        try:
            ChildProcess(child, "reference.confined_guests:starts_something", sandbox=Sandbox(required=True))
        except OSError as error:
            print(str(error).splitlines()[-1])
    """)
    said = process.communicate(timeout=60)[0].splitlines()
    assert said[-3:-1] == [",".join(sorted(BOUNDS | ({"system calls"} if FILTERED else set()))), "0"], said
    assert "namespaces of its own" in said[-1]


def test_the_root_of_the_file_system_on_the_path_hides_nothing_else() -> None:
    """As with a working directory of "/", which is where a container's program often runs."""
    assert _outermost(["/", "/usr/lib", "/usr"]) == sorted({"/usr", os.path.realpath("/usr")})

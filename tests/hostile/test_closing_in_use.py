"""Memory, windows and descriptors that are closed by one thread while compiled code uses them in another."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from reference.eventually import eventually

from vmbus.core.dispatch import Dispatcher, Doorbell
from vmbus.core.memory import Window
from vmbus.core.ring import RingReader

ROUNDS = 20
TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize("how", ["the other memory", "the guest's memory", "a file", "one request"])
def test_a_guest_memory_is_not_closed_under_a_copy(how: str) -> None:
    """In a process of its own, which a wild pointer would end."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    command = [sys.executable, "-m", "reference.closing_memory", how, str(ROUNDS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    closed, busy, _ = (int(number) for number in done.stdout.split())
    assert closed + busy == ROUNDS
    assert busy, "no round in which the memory was in use"


ALLOWANCE = """
from vmbus.core.memory import READ, WRITE, GuestMemory
class Allowance:
    act = None
    def adjust(self, count):  # where the real one waits for its lock, other threads run
        act, self.act = self.act, None
        if act is not None:
            act()
memory, other = GuestMemory(1 << 20), GuestMemory(1 << 20)
memory.map_allowance = allowance = Allowance()
memory.unmap(0x4000, 0x1000)
"""
AT_CLOSING = """
views = []
def look():
    try:
        views.append(memoryview(memory))
    except Exception as error:
        print(type(error).__name__)
allowance.act = look
memory.close()
print([view[0x8000] for view in views])
"""
AT_MAPPING = """
other.write(0x2000, b"there")
allowance.act = other.close
memory.map(0x9000, other, 0x2000, 0x1000, READ | WRITE)
assert other.size == 0
strangers = [GuestMemory(1 << 20) for _ in range(8)]  # one of them gets the number of the descriptor
with memory.window([9], mirrored=False).view() as view:
    print(bytes(view[:5]))
"""


@pytest.mark.parametrize(
    ("code", "printed"),
    [(AT_CLOSING, "GuestMemoryError\n[]\n"), (AT_MAPPING, "b'there'\n")],
    ids=["closing", "mapping"],
)
def test_what_other_threads_do_while_a_memory_settles_its_account(code: str, printed: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ALLOWANCE + code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, printed), done.stderr


@pytest.mark.parametrize("what", ["a doorbell", "a ring's doorbell", "a dispatcher"])
def test_a_doorbell_that_is_closed_under_those_who_wait(what: str) -> None:
    """They wake up, and its descriptor is not given away before: they would read from whatever file gets it."""
    window = Window.allocate(1)
    reader = RingReader(window)
    dispatcher = Dispatcher(4)
    doorbell = dispatcher.doorbell if what == "a dispatcher" else Doorbell()
    ended = []

    def wait() -> None:
        if what == "a dispatcher":
            dispatcher.wait(60)
        else:
            doorbell.wait(60, reader=reader if what == "a ring's doorbell" else None)
        ended.append(1)

    # A ring's reader goes on waiting for a packet: on a doorbell that is closed, that is an error.
    threads = [threading.Thread(target=_quiet, args=(wait, ended), daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert eventually(lambda: doorbell.sleeps == 3)
    descriptor = doorbell.fd
    doorbell.close()
    assert doorbell.fd == -1
    assert eventually(lambda: len(ended) == 3), "somebody sleeps on"
    for thread in threads:
        thread.join()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def _quiet(wait, ended) -> None:  # type: ignore[no-untyped-def]
    try:
        wait()
    except OSError:
        ended.append(1)

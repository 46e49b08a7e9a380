"""Ctrl-C ends every wait and every run, also those in compiled code without the GIL."""

import subprocess
import sys

import pytest

PRELUDE = """
import os, signal, threading
from array import array
from vmbus.bus.channel import loopback
from vmbus.core import x86
from vmbus.core.blockio import BlockClient, BlockServer, run_without_gil
from vmbus.core.dispatch import Dispatcher, Doorbell
from vmbus.core.memory import GuestMemory, Window
from vmbus.core.ring import RingReader
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored
def lost_request():
    m = GuestMemory(1 << 20)
    g, h = loopback(m, 4, 4)
    s = BlockServer(h.incoming, h.outgoing, m)
    s.enable(0, 0, 512, 100, True, mapping=bytearray(51200))
    c = BlockClient(g.outgoing, g.incoming, m, 0, 0, 512, 64)
    c.begin(array("Q", [0]), array("Q", [5]), 512, 1, False, 1)
    c.step()
    h.incoming.recv()
    run_without_gil(c, s)
def jump_to_itself(*limit):
    m = GuestMemory(65536)
    m.write(0x1000, bytes.fromhex("ebfe"))
    c = x86.Cpu(m)
    c.rip = 0x1000
    try:
        c.run(*limit)
    except KeyboardInterrupt:
        assert c.rip == 0x1000 and c.run(10) == x86.LIMIT, "it can go on"
        raise
def after_a_moment():
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    after_a_moment()
    {wait}
    print("it ended by itself")
except KeyboardInterrupt:
    print("interrupted")
"""

WAITS = {
    "doorbell": "Doorbell().wait()",
    "doorbell, spinning": "Doorbell().wait(None, 1e6)",
    "ring, spinning": "Doorbell().wait(None, 1e6, RingReader(Window.allocate(4)))",
    "dispatcher": "Dispatcher().wait()",
    "dispatcher, spinning": "Dispatcher().wait(None, 1e6)",
    "interpreter": "jump_to_itself()",
    "interpreter with a limit": "jump_to_itself(1 << 62)",
    "a batch that never ends": "lost_request()",
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS.keys())
def test_it_ends(wait: str) -> None:
    code = PRELUDE.replace("{wait}", wait)
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stdout) == (0, "interrupted\n"), ended.stderr

"""Guests that try what their sandbox should not let them: each a function of its partition, run in its process."""

import ctypes
import fcntl
import json
import mmap
import os
import resource
import signal
import socket
import struct
import sys
import time
from pathlib import Path

from reference.process_guests import REPORT

from vmbus.hypervisor.tlfs import Msr

SPACE = 16_384
"""Bytes of a report."""


def report(partition, found):
    partition.memory.write(REPORT, json.dumps(found).encode().ljust(SPACE, b"\0"))


def outcome(attempt):
    """What an attempt gave: its value, or the name of its error."""
    try:
        return attempt()
    except OSError as error:
        return type(error).__name__


def bytes_of(path):
    with open(path, "rb") as file:
        return len(file.read())


def made_in(folder):
    fd = os.open(f"{folder}/made", os.O_CREAT | os.O_WRONLY)
    os.close(fd)


def reaches(partition, files):
    """What it can reach beyond its partition."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    found = {
        "id": [os.getuid(), os.geteuid(), os.getgid()],
        "parent's id": os.getppid(),
        "processes": outcome(lambda: sorted(int(name) for name in os.listdir("/proc") if name.isdigit())),
        "interfaces": [name for _, name in socket.if_nameindex()],
        "variables": sorted(os.environ),
        "readable": [path for path in files if isinstance(outcome(lambda path=path: bytes_of(path)), int)],
        "writes": [outcome(lambda path=path: made_in(path)) for path in ("/", "/tmp", "/usr", "/proc")],
        "capabilities": [status[name].strip() for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")],
        "privileges to gain": status["NoNewPrivs"].strip(),
        "user namespace": ctypes.CDLL(None).unshare(0x1000_0000),
        "traces process 1": ctypes.CDLL(None).ptrace(0x4206, 1, None, None),  # PTRACE_SEIZE
        "its own state": outcome(lambda: bytes_of("/proc/self/maps") > 0),
        "core size": resource.getrlimit(resource.RLIMIT_CORE)[1],
    }
    report(partition, found)


def starts_something(partition):
    """Whether it can start a process, a program, or open a socket."""
    report(
        partition,
        [
            outcome(lambda: os.fork() or os._exit(0)),
            outcome(lambda: os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", ""])),
            outcome(lambda: socket.socket().fileno()),
            outcome(lambda: os.kill(os.getpid(), 0)),
        ],
    )


def takes_what_no_limit_counts(partition):
    """Whether it gets memory that is not private, and reaches others (here: process 1) by ways beside kill()."""
    libc = ctypes.CDLL(None, use_errno=True)
    own = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    own[:] = bytes(4096)
    reading, _ = os.pipe()
    report(
        partition,
        {
            "anonymous": outcome(lambda: len(mmap.mmap(-1, 4096))),
            "System V": libc.shmget(0, 4096, 0o1600),
            "a device": outcome(lambda: os.close(os.open("/dev/zero", os.O_RDWR))),
            "tkill": libc.syscall(200, 1, 0),
            "owner": outcome(lambda: fcntl.fcntl(reading, fcntl.F_SETOWN, 1)),
            "owner, high half": libc.syscall(72, reading, ctypes.c_long(fcntl.F_SETOWN | 1 << 32), 1),
            "owner of a socket": outcome(
                lambda: fcntl.ioctl(socket.socketpair()[0], 0x8901, struct.pack("i", 1))
            ),
            "group of a socket": outcome(
                lambda: fcntl.ioctl(socket.socketpair()[0], 0x8902, struct.pack("i", 1))
            ),
            "limits": outcome(lambda: resource.prlimit(1, resource.RLIMIT_CPU)),
            "own limits": resource.getrlimit(resource.RLIMIT_CORE)[1],
        },
    )


def leaves_an_orphan(partition, stay):
    """Leave a process behind that is in no group of its, outlives it, and asks its parent's hypervisor on and on."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)  # PR_SET_PDEATHSIG: none
            for count in range(1, 4000):
                partition.memory.write(REPORT, count.to_bytes(8, "little"))
                partition.vps[0].rdmsr(Msr.TIME_REF_COUNT)
                partition.memory.write(REPORT + 8, count.to_bytes(8, "little"))
                partition.memory.write(REPORT + 16, os.getpid().to_bytes(8, "little"))
                time.sleep(0.005)
        os._exit(0)
    while partition.memory.read(REPORT, 1) == b"\0":
        time.sleep(0.01)
    time.sleep(3600 if stay else 0)


def kills_its_parent(partition):
    os.kill(os.getppid(), signal.SIGKILL)


def stops_who_waits_for_it(partition):
    """Send every signal that there is to process 1 of its namespace, and stay."""
    for number in range(1, 32):
        outcome(lambda number=number: os.kill(1, number))
    partition.memory.write(REPORT, b"done")
    time.sleep(3600)


def takes(partition, size):
    """Take memory, then descriptors, until there are no more; how many there were."""
    try:
        kept = bytearray(size)
        kept[::4096] = bytes(len(kept[::4096]))
        memory = "taken"
    except MemoryError:
        memory = "refused"
    taken = []
    try:
        while True:
            taken.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        count = len(taken)
        for fd in taken:
            os.close(fd)
    report(partition, [memory, count])


def ends(partition, number):
    """End by a signal."""
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)

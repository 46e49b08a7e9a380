"""What runs in a child's process, from its first instruction on: it confines itself, then runs the guest.

This file is run as a script, and imports nothing but the standard library until the process is confined: a process
with threads, as NumPy may start them, cannot get a user namespace.

Where namespaces are to be had there are three processes. The first one, which the parent started, stays outside,
holds nothing, and ends as the guest ends. The second is process 1 of the new process namespace: the kernel kills
everything in it when that one ends, so nothing that the guest starts outlives the guest. The third runs the guest.
"""

import ctypes
import errno
import importlib
import json
import os
import resource
import signal
import socket
import struct
import sys
from contextlib import suppress
from types import ModuleType
from typing import Any, NoReturn

# Linux's <linux/sched.h>, <linux/prctl.h>, <sys/mount.h>, <linux/mount.h>, <linux/capability.h>
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x0002_0000, 0x0400_0000, 0x0800_0000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x1000_0000, 0x2000_0000, 0x4000_0000
CLONE_THREAD = 0x0001_0000
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 1, 4, 24, 38, 47
PR_CAP_AMBIENT_CLEAR_ALL = 4
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 1 << 12, 1 << 14, 1 << 18
MNT_DETACH = 2
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = 1, 2
SYS_MOUNT_SETATTR = 442  # on every processor, as all calls since Linux 5.1
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
CAPABILITY_VERSION_3 = 0x2008_0522
LAST_CAPABILITY = 63
F_SETOWN, F_SETOWN_EX = 8, 15
FIOSETOWN, SIOCSPGRP = 0x8901, 0x8902

INSIDE_ID = 1000
"""The user and group that the process sees itself as. It is nobody's outside: it stands for its parent's user."""

DENIED = (
    # other processes, and other programs
    *(
        "fork",
        "vfork",
        "execve",
        "execveat",
        "ptrace",
        "process_vm_readv",
        "process_vm_writev",
        "process_madvise",
    ),
    *("kcmp", "pidfd_open", "pidfd_getfd", "pidfd_send_signal", "rt_sigqueueinfo", "rt_tgsigqueueinfo"),
    # other networks, and the rest of the kernel
    *("socket", "connect", "bind", "listen", "accept", "accept4", "bpf", "perf_event_open", "userfaultfd"),
    *("io_uring_setup", "io_uring_enter", "io_uring_register", "keyctl", "add_key", "request_key"),
    *(
        "unshare",
        "setns",
        "mount",
        "umount2",
        "pivot_root",
        "chroot",
        "fsopen",
        "fsmount",
        "move_mount",
        "open_tree",
    ),
    *(
        "mount_setattr",
        "open_by_handle_at",
        "name_to_handle_at",
        "init_module",
        "finit_module",
        "delete_module",
    ),
    *(
        "kexec_load",
        "kexec_file_load",
        "reboot",
        "swapon",
        "swapoff",
        "syslog",
        "acct",
        "quotactl",
        "personality",
    ),
    *(
        "settimeofday",
        "clock_settime",
        "adjtimex",
        "clock_adjtime",
        "sethostname",
        "setdomainname",
        "iopl",
        "ioperm",
    ),
    # memory that no limit counts
    *("shmget", "shmat", "memfd_secret"),
)
"""System calls that fail with EPERM where libseccomp is at hand: no guest needs them."""

SHARED_MEMORY = 0x21
"""MAP_SHARED and MAP_ANONYMOUS of mmap: memory that RLIMIT_DATA does not count."""

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    """Raise the error of a call into the C library."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def prctl(option: int, value: int) -> None:
    """prctl(2) with one argument."""
    check(libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0), f"prctl {option}")


def enter_namespaces() -> None:
    """Leave the parent's users, mounts, network, System V objects and host name; children leave its processes, too.

    Raises:
        OSError: the kernel, or its settings, do not allow it.
    """
    user, group = os.geteuid(), os.getegid()
    kinds = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    check(libc.unshare(kinds), "unshare")
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{INSIDE_ID} {user} 1"),
        ("gid_map", f"{INSIDE_ID} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)
    with suppress(OSError), open("/proc/sys/user/max_user_namespaces", "w", encoding="ascii") as file:
        file.write("0")  # a namespace inside would have privileges again


def mount(source: str, target: str, kind: str | None = None, flags: int = 0, data: str | None = None) -> None:
    """mount(2)."""
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    result = libc.mount(*encoded[:3], ctypes.c_ulong(flags), encoded[3])
    check(result, f"mount of {target}")


def enter_root(readable: list[str]) -> None:
    """Make a root of nothing but `readable`, read-only, and of this namespace's processes, and leave the old one.

    Raises:
        OSError: the kernel does not allow it.
    """
    here, new = os.getcwd(), "/proc"  # the one folder that is there everywhere and that nobody wants to read
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", new, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path in readable:
        attach(path, new + path)
    os.mkdir(new + "/proc")
    with suppress(OSError):  # in a container that masks parts of its own there is none
        mount("proc", new + "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, "subset=pid")
    attributes = struct.pack("4Q", MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
    result = libc.syscall(
        SYS_MOUNT_SETATTR, AT_FDCWD, new.encode(), AT_RECURSIVE, attributes, len(attributes)
    )
    check(result, "mount_setattr")
    os.chdir(new)
    check(libc.pivot_root(b".", b"."), "pivot_root")
    check(libc.umount2(b".", MNT_DETACH), "umount of the old root")
    os.chdir(here if os.path.isdir(here) else "/")


def attach(path: str, target: str) -> None:
    """Show a file or folder of the old root in the new one."""
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        with open(target, "xb"):
            pass
    mount(path, target, None, MS_BIND | MS_REC)


def drop_privileges() -> None:
    """Give up the capabilities that a new user namespace comes with, and what could bring them back."""
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    for capability in range(LAST_CAPABILITY + 1):
        libc.prctl(PR_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0)
    check(libc.capset(struct.pack("Ii", CAPABILITY_VERSION_3, 0), bytes(24)), "capset")


def data_size() -> int:
    """Bytes of private memory that this process has; 0 where there is no /proc."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[5]) * resource.getpagesize()
    except OSError:
        return 0


def limit(task: dict[str, Any]) -> None:
    """Bound what the process can use."""
    bounds = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_RTPRIO: 0,
        resource.RLIMIT_NOFILE: task["descriptors"],
        resource.RLIMIT_NPROC: task["threads"],
    }
    if data_size() < task["data"]:  # a sanitizer has terabytes already: with the limit it would get no more
        bounds[resource.RLIMIT_DATA] = task["data"]
    for what, most in bounds.items():
        hard = resource.getrlimit(what)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))


def load_filter(seccomp: ModuleType) -> None:
    """Refuse the system calls that no guest needs.

    Raises:
        OSError: the kernel does not allow it.
    """
    calls = seccomp.SyscallFilter(seccomp.ALLOW)
    refused = seccomp.ERRNO(errno.EPERM)
    for name in DENIED:
        with suppress(OSError):  # not on this processor, or newer than the library
            calls.add_rule(refused, name)
    calls.add_rule(refused, "clone", seccomp.Arg(0, seccomp.MASKED_EQ, CLONE_THREAD, 0))
    calls.add_rule(
        seccomp.ERRNO(errno.ENOSYS), "clone3"
    )  # its flags lie in memory; libraries then take clone
    for name in ("kill", "tgkill", "tkill"):
        calls.add_rule(refused, name, seccomp.Arg(0, seccomp.NE, os.getpid()))
    calls.add_rule(refused, "prlimit64", seccomp.Arg(0, seccomp.NE, 0))
    # With F_SETSIG, any signal to any process of the same user; the kernel looks at the low half of the number only.
    for call, commands in (("fcntl", (F_SETOWN, F_SETOWN_EX)), ("ioctl", (FIOSETOWN, SIOCSPGRP))):
        for command in commands:
            calls.add_rule(refused, call, seccomp.Arg(1, seccomp.MASKED_EQ, 0xFFFF_FFFF, command))
    calls.add_rule(refused, "mmap", seccomp.Arg(3, seccomp.MASKED_EQ, SHARED_MEMORY, SHARED_MEMORY))
    calls.load()


def find_seccomp() -> ModuleType | None:
    """Python's interface to libseccomp, if both are installed."""
    try:
        return importlib.import_module("pyseccomp")
    except (ImportError, RuntimeError):
        return None


def end_with_parent() -> None:
    """Have the kernel end this process when the thread ends that started it. After every change of credentials."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def stand_in_for(first: int, end: int) -> NoReturn:
    """Outside the namespaces: end as the guest ends, which `first`, process 1 of theirs, reports through `end`."""
    os.waitpid(first, 0)
    report = os.read(end, 4)
    status = int.from_bytes(report, "little") if report else signal.SIGKILL
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status))


def reap(guest: int, end: int) -> NoReturn:
    """As process 1: wait for the guest, report how it ended, and take everything that it left behind along."""
    while True:
        process, status = os.wait()
        if process == guest:
            os.write(end, status.to_bytes(4, "little"))
            os._exit(0)


def forget(keep: int) -> None:
    """Close everything but one descriptor: nothing of the guest's is held open by who waits for it."""
    os.closerange(0, keep)
    os.closerange(keep + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def namespaces_are_to_be_had() -> bool:
    """Try it in a process of its own: an attempt that fails half-way cannot be taken back."""
    trial = os.fork()
    if trial == 0:
        try:
            enter_namespaces()
        except OSError:
            os._exit(1)
        os._exit(0)
    return os.waitpid(trial, 0)[1] == 0


def confine(task: dict[str, Any]) -> list[str]:
    """Carry out a `vmbus.hypervisor.sandbox.Sandbox` as far as the kernel allows it.

    Returns in the process that is to run the guest; with namespaces that is the third of three.

    Returns:
        What is in force.

    Raises:
        OSError: namespaces are required and not to be had.
    """
    done = []
    seccomp = find_seccomp() if task["filter_calls"] else None
    if namespaces_are_to_be_had():
        enter_namespaces()
        end_with_parent()
        done += ["users", "processes", "network", "ipc"]
        there, here = os.pipe()
        first = os.fork()
        if first:
            forget(there)
            stand_in_for(first, there)
        end_with_parent()
        os.close(there)
        try:
            enter_root(task["readable"])
            done.append("files")
        except OSError:
            if task["required"]:
                raise
        prctl(
            PR_SET_DUMPABLE, 0
        )  # the guest has the same user: it must not trace process 1, from the first moment on
        guest = os.fork()
        if guest:
            forget(here)
            drop_privileges()
            end_with_parent()
            reap(guest, here)
        prctl(PR_SET_DUMPABLE, 1)
        os.close(here)
    elif task["required"]:
        raise PermissionError("this kernel, or its settings, do not give a process namespaces of its own")
    limit(task)
    drop_privileges()
    done += ["limits", "privileges"]
    if seccomp is not None:
        with suppress(OSError):
            load_filter(seccomp)
            done.append("system calls")
    return done


def main(argument: str) -> None:
    """Run what a `vmbus.hypervisor.process.ChildProcess` describes (JSON)."""
    task = json.loads(argument)
    sys.path[:] = task["path"]
    end_with_parent()
    if os.getppid() != task["parent"]:
        return  # it ended before
    confinement = confine(task["sandbox"]) if task["sandbox"] else []
    end_with_parent()
    with socket.socket(fileno=task["control"]) as control:
        control.send(json.dumps(confinement).encode())  # the kernel adds which process this is
        if not control.recv(1):
            return  # it gave up
    from vmbus.hypervisor.remote import RemotePartition

    memory_fd, memory_size = task["memory"]
    partition = RemotePartition(memory_fd, memory_size, task["socket"], task["lines"], task["spin"])
    module, _, name = task["target"].partition(":")
    getattr(importlib.import_module(module), name)(partition, **task["arguments"])


if __name__ == "__main__":
    main(sys.argv[1])

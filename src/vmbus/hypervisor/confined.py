"""An operating system process that confines itself before it runs what is not trusted, as its parent sees it."""

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from vmbus.errors import printable
from vmbus.hypervisor.sandbox import Sandbox, import_path

__all__ = ["ConfinedProcess", "printed"]

_PROGRAM: Final = Path(__file__).with_name("child_main.py")
_CREDENTIALS: Final = struct.Struct("3i")
"""A ``struct ucred``: process, user, group."""
_MAX_HELLO: Final = 4096
_LAST_WORDS: Final = 5.0
"""Seconds within which whoever waits for a killed guest has reported its end."""


class ConfinedProcess:
    """Starts `vmbus.hypervisor.child_main`, which runs nobody's code before `go`.

    The kernel ends it with the thread that makes this object (PR_SET_PDEATHSIG). It has a session of its own, so
    neither the terminal's signals nor the terminal.

    Args:
        sandbox: its bounds; None for none.
        module: the module that the guest's code is in.
        task: what `child_main` needs to know beside that, ready for JSON.
        descriptors: what it gets of this process's descriptors.

    Attributes:
        pid: the process that runs the guest; with namespaces it is a grandchild of this process.
        pidfd: a descriptor of it, readable when it has ended.
        confinement: what of the sandbox is in force.
        output: the descriptor, non-blocking, of what it prints.

    Raises:
        OSError: it cannot be started, or not be confined as the sandbox requires it.
    """

    def __init__(
        self, sandbox: Sandbox | None, module: str, task: Mapping[str, Any], descriptors: Sequence[int]
    ) -> None:
        self._control, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with control:
            self._control.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            words = {
                **task,
                "parent": os.getpid(),
                "path": import_path(),
                "sandbox": sandbox and sandbox.task(module),
                "control": control.fileno(),
            }
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-B", str(_PROGRAM), json.dumps(words)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    bufsize=0,
                    env=dict(os.environ) if sandbox is None else sandbox.variables(),
                    pass_fds=[*descriptors, control.fileno()],
                    start_new_session=True,
                )
            except BaseException:
                self._control.close()
                raise
        assert self._process.stdout is not None
        self.output = self._process.stdout.fileno()
        self.pid = self.pidfd = -1
        try:
            self._meet()
        except BaseException:
            self.end()
            self.close()
            raise
        os.set_blocking(self.output, False)

    def _meet(self) -> None:
        """Wait until it has confined itself, and learn which process it is."""
        data, ancillary, _, _ = self._control.recvmsg(_MAX_HELLO, socket.CMSG_SPACE(_CREDENTIALS.size))
        for level, kind, payload in ancillary:
            if data and (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
                self.pid = _CREDENTIALS.unpack(payload[: _CREDENTIALS.size])[0]
                self.pidfd = os.pidfd_open(self.pid)  # it lives: it waits for our word
                self.confinement = frozenset(json.loads(data))
                return
        said = printed(self._process.communicate()[0]).strip()
        raise OSError(f"a child's process did not start: {said or 'it ended without a word'}")

    def go(self) -> None:
        """Let it run the guest."""
        with contextlib.suppress(OSError):  # it has ended
            self._control.send(b"!")
        self._control.close()

    def signal(self, number: int) -> None:
        """Send a signal to the process that runs the guest; nothing happens when that has ended."""
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(self.pidfd, number)

    def end(self) -> int:
        """End it, if it still runs, and everything that it has started, as far as the kernel lets us know of that.

        Returns:
            Its exit status, negative for a signal.
        """
        if self.pidfd >= 0:
            self.signal(signal.SIGKILL)
        else:
            self._process.kill()
        if (
            self.pid == self._process.pid
        ):  # no namespace ends what it started: its group does, as far as that stayed in
            with contextlib.suppress(OSError):
                os.killpg(
                    self.pid, signal.SIGKILL
                )  # before its end is taken note of: then the number is free
        try:
            status = self._process.wait(_LAST_WORDS)
        except (
            subprocess.TimeoutExpired
        ):  # process 1 of its namespace does not report the end: all of that goes
            self._process.kill()
            status = self._process.wait()
        return status

    def close(self) -> None:
        """Close what is left of our descriptors."""
        self._control.close()
        assert self._process.stdout is not None
        self._process.stdout.close()
        pidfd, self.pidfd = self.pidfd, -1
        if (
            pidfd >= 0
        ):  # nobody signals by this number any more: it is another file's soon, another child's perhaps
            os.close(pidfd)


def printed(output: bytes) -> str:
    """What a child printed, for a log: nothing commands a terminal, and no line looks like one of the log's own."""
    lines = output.decode("utf-8", "backslashreplace").rstrip("\n").split("\n")
    return "\n  | ".join(printable(line, limit=1000) for line in lines)

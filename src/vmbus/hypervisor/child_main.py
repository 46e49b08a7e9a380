"""What runs in a child process: finds its descriptors, then calls the guest that it was told to run."""

import ctypes
import importlib
import json
import signal
import sys

from vmbus.hypervisor.remote import RemotePartition

PR_SET_PDEATHSIG = 1


def main(argument: str) -> None:
    """Run what a `vmbus.hypervisor.process.ChildProcess` describes (JSON): target, arguments, descriptors, spin."""
    # A guest does not outlive its hypervisor.
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    task = json.loads(argument)
    memory_fd, memory_size = task["memory"]
    partition = RemotePartition(memory_fd, memory_size, task["socket"], task["lines"], task["spin"])
    module, _, name = task["target"].partition(":")
    getattr(importlib.import_module(module), name)(partition, **task["arguments"])


if __name__ == "__main__":
    main(sys.argv[1])

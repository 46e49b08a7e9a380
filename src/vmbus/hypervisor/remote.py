"""The child's end of a partition that runs in an operating system process of its own.

The process has the partition's memory (a memfd), a hypercall socket, and eventfds; nothing of its parent's.
`RemoteProcessor` has the methods of `VirtualProcessor`, so drivers and engines run over either.
"""

import array
import os
import socket
import threading
from collections.abc import Callable
from time import perf_counter
from typing import Final

from vmbus.core.memory import GuestMemory
from vmbus.errors import EngineError
from vmbus.hypervisor.faults import GeneralProtectionFault, GuestFault, UndefinedOpcodeFault, VpSuspended
from vmbus.hypervisor.remote_wire import MAX_DATAGRAM, POSTED, Answer, Operation, Reply, Request
from vmbus.hypervisor.tlfs import CallCode, Msr

__all__ = ["RemotePartition", "RemoteProcessor"]

_FAST_SIGNAL: Final = CallCode.SIGNAL_EVENT | 1 << 16
_POSTED_MSRS: Final = frozenset({int(Msr.EOI), int(Msr.EOM)})
"""Writes that give no result and come with every interrupt: not waited for once the first one has succeeded."""
STALL_POLL: Final = 0.1
"""Seconds after which a suspended processor asks again, should the word that it may run have been lost."""
_RING: Final = (1).to_bytes(8, "little")
_FAULTS: Final[dict[int, type[GuestFault]]] = {
    fault.vector: fault for fault in (UndefinedOpcodeFault, GeneralProtectionFault)
}


class RemoteProcessor:
    """One processor of a `RemotePartition`; `VirtualProcessor` documents the methods.

    Attributes:
        index: its VP index.
        on_interrupt: called, in a thread of this processor's, when an interrupt may wait in `pop_interrupt`.
    """

    def __init__(self, partition: "RemotePartition", index: int, line: socket.socket) -> None:
        self.index = index
        self.fast_output = b""
        self.on_interrupt: Callable[[], None] | None = None
        self._partition = partition
        self._line = line
        self._maybe_pending = True
        self._posted: set[int] = set()
        self._resumed = threading.Event()
        self._doorbells: dict[int, int] = {}
        self._waiter = threading.Thread(target=self._wait, name=f"vp{index}-interrupts", daemon=True)
        self._waiter.start()

    def _wait(self) -> None:
        while self._line.recv(64):
            self._maybe_pending = True
            self._resumed.set()
            wake = self.on_interrupt
            if wake is not None:
                wake()

    def hypercall(self, control: int, input: int, output: int, xmm: bytes = b"") -> int:
        """A hypercall; events to a connection that has taken one before go through its eventfd instead."""
        if control == _FAST_SIGNAL:
            bell = self._doorbells.get(input)
            if bell is not None:
                os.write(bell, _RING)
                return 0
        request = Request(Operation.HYPERCALL, 0, self.index, len(xmm), control, input, output, xmm, 0)
        reply, register_output, descriptor = self._ask_until(request)
        self.fast_output = register_output
        if descriptor >= 0:
            self._doorbells[input] = descriptor
        return reply.a

    def rdmsr(self, index: int) -> int:
        """RDMSR."""
        return self._ask(Operation.RDMSR, index).a

    def wrmsr(self, index: int, value: int) -> None:
        """WRMSR."""
        if index in self._posted:
            self._partition.post(Request(Operation.WRMSR, POSTED, self.index, 0, index, value, 0, b"", 0))
            return
        self._ask(Operation.WRMSR, index, value)
        if index in _POSTED_MSRS:
            self._posted.add(index)

    def cpuid(self, leaf: int, subleaf: int = 0) -> tuple[int, int, int, int]:
        """CPUID."""
        reply = self._ask(Operation.CPUID, leaf, subleaf)
        return reply.a, reply.b, reply.c, reply.d

    def io_read(self, port: int, size: int) -> int:
        """IN."""
        return self._ask(Operation.IO_READ, port, size=size).a

    def io_write(self, port: int, size: int, value: int) -> None:
        """OUT."""
        self._ask(Operation.IO_WRITE, port, value, size=size)

    def io_read_string(self, port: int, size: int, count: int) -> bytes:
        """INS, one request for each element."""
        return b"".join(self.io_read(port, size).to_bytes(size, "little") for _ in range(count))

    def io_write_string(self, port: int, size: int, data: bytes) -> None:
        """OUTS, one request for each element."""
        for at in range(0, len(data), size):
            self.io_write(port, size, int.from_bytes(data[at : at + size], "little"))

    def mmio_read(self, gpa: int, size: int) -> int:
        """A load from a device."""
        return self._ask(Operation.MMIO_READ, gpa, size=size).a

    def mmio_write(self, gpa: int, size: int, value: int) -> None:
        """A store to a device."""
        self._ask(Operation.MMIO_WRITE, gpa, value, size=size)

    def pop_interrupt(self) -> int | None:
        """The next interrupt; asks the parent only if one may wait."""
        if not self._maybe_pending:
            return None
        self._maybe_pending = False  # before asking: a wake-up during the answer must not be forgotten
        reply = self._ask(Operation.POP_INTERRUPT)
        if reply.more:
            self._maybe_pending = True
        return reply.a or None

    def _ask(self, operation: Operation, a: int = 0, b: int = 0, *, size: int = 0) -> Reply:
        return self._ask_until(Request(operation, 0, self.index, size, a, b, 0, b"", 0))[0]

    def _ask_until(self, request: Request) -> tuple[Reply, bytes, int]:
        """Make a request again for as long as this processor is suspended by its parent."""
        while True:
            self._resumed.clear()  # before asking: a wake-up during the answer must not be forgotten
            answered = self._partition.ask(request)
            if answered[0].answer != Answer.STALLED:
                return answered
            self._resumed.wait(STALL_POLL)


class RemotePartition:
    """A child partition as its own process sees it.

    Attributes:
        memory: the guest's memory.
        vps: its processors.
    """

    def __init__(
        self, memory_fd: int, memory_size: int, hypercalls_fd: int, line_fds: list[int], spin: float = 0.0
    ) -> None:
        self.memory = GuestMemory(memory_size, fd=memory_fd)
        os.close(memory_fd)
        self._socket = socket.socket(fileno=hypercalls_fd)
        self._lock = threading.Lock()
        self._spin = spin
        self.vps = [RemoteProcessor(self, n, socket.socket(fileno=fd)) for n, fd in enumerate(line_fds)]

    def ask(self, request: Request) -> tuple[Reply, bytes, int]:
        """Make a request and wait for its answer: (reply, register output, descriptor that came along or -1).

        Raises:
            GuestFault: the request ends with an exception of the guest.
            VpSuspended: the processor is suspended in an intercept.
            EngineError: the parent is gone.
        """
        with self._lock:
            try:
                self._socket.send(request.pack())
                data, ancillary = self._receive()
            except OSError as error:
                raise EngineError(f"the parent is gone: {error}") from None
        if not data:
            raise EngineError("the parent is gone")
        descriptor = -1
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                descriptor = array.array("i", payload[:4])[0]
        reply = Reply.unpack(data)
        if reply.answer == Answer.FAULT:
            raise _FAULTS.get(reply.a, GeneralProtectionFault)(
                f"request {request.operation} of vp{request.vp_index}"
            )
        if reply.answer == Answer.SUSPENDED:
            raise VpSuspended(f"vp{request.vp_index} waits for its parent")
        return reply, data[Reply.SIZE : Reply.SIZE + reply.output_size], descriptor

    def _receive(self) -> tuple[bytes, list[tuple[int, int, bytes]]]:
        """The answer: polled for as long as waking up would cost, then waited for."""
        receive, space, end = self._socket.recvmsg, socket.CMSG_SPACE(4), perf_counter() + self._spin
        while perf_counter() < end:
            try:
                return receive(MAX_DATAGRAM, space, socket.MSG_DONTWAIT)[:2]
            except BlockingIOError:
                continue
        return receive(MAX_DATAGRAM, space)[:2]

    def post(self, request: Request) -> None:
        """Make a request that has no answer.

        Raises:
            EngineError: the parent is gone.
        """
        try:
            with self._lock:
                self._socket.send(request.pack())
        except OSError as error:
            raise EngineError(f"the parent is gone: {error}") from None

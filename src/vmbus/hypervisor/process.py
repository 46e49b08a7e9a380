"""A child partition in an operating system process of its own: isolation by the operating system.

The process gets its partition's memory, a socket for everything that exits to the hypervisor, and one line for
each processor's interrupts; later an eventfd for each connection that it signals. One thread of the parent serves all
of that. Nothing that the child does to a descriptor that it shares can make this thread wait for it: replies and
interrupts are sent without blocking, and eventfds are watched edge-triggered and never read.
"""

import array
import contextlib
import logging
import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Mapping
from functools import partial
from queue import SimpleQueue
from time import perf_counter
from typing import Any, Final

from vmbus.errors import BudgetExceeded, HypercallError, LocalProtocolError, RemoteProtocolError, VmbusError
from vmbus.hypervisor.abi import FAST
from vmbus.hypervisor.calls_ipc import signal_event
from vmbus.hypervisor.confined import ConfinedProcess, printed
from vmbus.hypervisor.faults import GuestFault, VpStalled, VpSuspended
from vmbus.hypervisor.partition import Partition
from vmbus.hypervisor.remote_wire import MAX_DATAGRAM, POSTED, Answer, Operation, Reply, Request
from vmbus.hypervisor.sandbox import Sandbox
from vmbus.hypervisor.tlfs import CallCode, PartitionState, Status
from vmbus.hypervisor.vp import VirtualProcessor

__all__ = ["ChildProcess"]

log = logging.getLogger(__name__)

STOP_TIMEOUT: Final = 5.0
"""Seconds that tearing a partition down waits for its process's thread (which a provider may be holding up)."""
MAX_DOORBELLS: Final = 2048
"""Connections of one child that get an eventfd; events to further ones go through the socket."""
MAX_OUTPUT: Final = 16_384
"""Bytes of what a child prints that are kept."""
OUTPUT_READ: Final = 4096
"""Bytes of it that are read at once."""
LAST_READS: Final = 32
MAX_HELD: Final = 64
"""Posted requests of suspended processors that are kept; what has no answer is an EOI or EOM, one an interrupt."""
MAX_AT_ONCE: Final = 4096
"""Requests that are answered before anything else of the process is looked at, its end included."""
_DEFAULT_SANDBOX: Final = Sandbox()
_FAST_SIGNAL: Final = CallCode.SIGNAL_EVENT | FAST
_MASK64: Final = 0xFFFF_FFFF_FFFF_FFFF
_PORT_SIZES: Final = frozenset({1, 2, 4})
_MMIO_SIZES: Final = frozenset({1, 2, 4, 8})


class ChildProcess:
    """Runs a guest for `partition` in another process.

    When the process ends, however it ends, the partition is reset - its channels close - and its parent is told
    with the events ``"reset"`` and ``"stopped"`` (detail: the exit status, negative for a signal).

    Args:
        partition: a child with all its memory in its own memfd, not running anywhere else.
        target: what the process calls, ``"module:function"``: ``function(partition, **arguments)`` with a
            `vmbus.hypervisor.remote.RemotePartition`.
        arguments: JSON-ready keyword arguments.
        on_stopped: called once, from the serving thread, with the exit status.
        spin: seconds that each side polls for the other's datagram before it sleeps. It pays where both have a
            processor to themselves (20 µs is what a wake-up across processors costs), and costs a lot where not.
        sandbox: what the process may reach and use; None: all that this one may, with its environment.

    Raises:
        LocalProtocolError: the partition is not running, or has no memory of its own.
        OSError: the process cannot be started, or not be confined as `sandbox` requires it.
    """

    def __init__(
        self,
        partition: Partition,
        target: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        on_stopped: Callable[[int], None] | None = None,
        spin: float = 0.0,
        sandbox: Sandbox | None = _DEFAULT_SANDBOX,
    ) -> None:
        if (
            partition.state is not PartitionState.ACTIVE
            or partition.memory.fd < 0
            or partition.loans.borrowed  # the process would see its own page there, not its parent's
        ):
            raise LocalProtocolError(f"{partition!r} cannot run in a process of its own")
        self.partition = partition
        self.on_stopped = on_stopped
        self.violations = 0
        """Datagrams that were no requests."""
        self._doorbells: dict[tuple[int, int, int], int] = {}
        self._bells: dict[int, tuple[VirtualProcessor, int, int]] = {}
        self._stopping = False
        self._held: list[Request] = []
        self._spin = spin
        self._output = bytearray()
        self._status: int | None = None
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        lines = [socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in partition.vps]
        self._socket = ours
        self._lines = [mine for mine, _ in lines]
        line_fds = [other.fileno() for _, other in lines]
        task = {
            "target": target,
            "arguments": dict(arguments or {}),
            "memory": [partition.memory.fd, partition.memory.size],
            "socket": theirs.fileno(),
            "lines": line_fds,
            "spin": spin,
        }
        self._poll = select.epoll()
        launched: SimpleQueue[BaseException | None] = SimpleQueue()
        self._server = threading.Thread(
            target=self._run,
            args=(sandbox, task, [partition.memory.fd, theirs.fileno(), *line_fds], launched),
            name=f"{partition.name}-hypercalls",
            daemon=True,
        )
        self._server.start()
        try:
            failure = launched.get()
        except BaseException:  # from outside, as Ctrl-C: nobody gets the object, so nothing of it stays
            if launched.get() is None:
                self.kill(STOP_TIMEOUT)
            raise
        finally:
            theirs.close()
            for _, other in lines:
                other.close()
        if failure is not None:
            self._server.join()
            raise failure

    @property
    def pid(self) -> int:
        """The id of the process that runs the guest."""
        return self._process.pid

    @property
    def confinement(self) -> frozenset[str]:
        """What of its sandbox the kernel has put in force.

        Of namespaces of its own: ``"users"``, ``"processes"`` (what it starts ends with it), ``"network"``, ``"ipc"``,
        ``"files"`` (it sees what it imports from, read-only); of bounds: ``"limits"``, ``"privileges"`` (none, nor any
        to be gained), ``"system calls"`` (filtered; with the ``sandbox`` extra).
        """
        return self._process.confinement

    @property
    def output(self) -> bytes:
        """The end of what the process has printed, at most `MAX_OUTPUT` bytes of it (both streams)."""
        return bytes(self._output[-MAX_OUTPUT:])

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait until the process has ended and everything of it is cleaned up.

        Returns:
            The exit status, negative for a signal; None after `timeout` seconds.
        """
        if threading.current_thread() is not self._server:
            self._server.join(timeout)
            if self._server.is_alive():
                return None
        return self._status

    def kill(self, timeout: float | None = None) -> None:
        """End the process at once (SIGKILL) and wait, at most `timeout` seconds, until all of it is cleaned up."""
        self._stopping = True
        self._process.signal(signal.SIGKILL)
        self.wait(timeout)

    # The serving thread

    def _run(
        self,
        sandbox: Sandbox | None,
        task: Mapping[str, Any],
        descriptors: list[int],
        launched: "SimpleQueue[BaseException | None]",
    ) -> None:
        # Started from here, because it is ended with the thread that starts it, which for any other thread could be
        # long before this process ends.
        partition = self.partition
        process = None
        try:
            process = self._process = ConfinedProcess(
                sandbox, task["target"].partition(":")[0], task, descriptors
            )
            for descriptor in (self._socket.fileno(), process.pidfd, process.output):
                self._poll.register(descriptor, select.EPOLLIN)
            for vp, line in zip(partition.vps, self._lines, strict=False):
                vp.on_interrupt = partial(_interrupt, line)
            partition.stop = partial(self.kill, STOP_TIMEOUT)
            partition.on_suspension = self._suspension
            if partition.suspended:
                process.signal(signal.SIGSTOP)
            process.go()
        except BaseException as error:
            if process is not None:
                process.end()
            self._let_go()
            launched.put(error)
            return
        launched.put(None)
        self._serve()

    def _serve(self) -> None:
        try:
            while self._serve_round():
                pass
        except (OSError, RemoteProtocolError) as error:
            if not self._stopping:
                log.warning("%s: its process broke the connection: %s", self.partition.name, error)
        except Exception:
            # A defect of a provider or device model: this child is lost, the others are not.
            log.exception("%s: serving its process failed", self.partition.name)
        finally:
            self._ended()

    def _serve_round(self) -> bool:
        requests = ended = False
        for fd, _ in self._poll.poll():
            bell = self._bells.get(fd)
            if fd == self._process.output:
                self._take_output()
            elif fd == self._process.pidfd:
                ended = True  # whoever else holds its socket: nobody but the guest is served
            elif bell is None:
                requests = True  # after the bells: what was rung before a request is heard before it
            if bell is None:
                continue
            vp, connection_id, flag = bell
            if vp.suspended:  # heard when it runs again: the eventfd is never read
                continue
            vp.account.exits["doorbell"] += 1
            with contextlib.suppress(HypercallError):  # the connection is gone; the guest was told so
                signal_event(vp, connection_id, flag, 0)
        return (not requests or self._serve_requests()) and not ended

    def _take_output(self) -> bool:
        """Read once from what the process prints, and keep the end; whether there was something."""
        try:
            data = os.read(self._process.output, OUTPUT_READ)
        except BlockingIOError:
            return False
        if not data:  # it has closed both streams
            self._poll.unregister(self._process.output)
            return False
        self._output += data
        if len(self._output) > 2 * MAX_OUTPUT:
            del self._output[:-MAX_OUTPUT]
        return True

    def _serve_requests(self) -> bool:
        """Answer requests until none comes for `spin` seconds, or many came; False when the process has hung up."""
        receive, end = self._socket.recv, 0.0
        for _ in range(MAX_AT_ONCE):
            try:
                data = receive(MAX_DATAGRAM + 1, socket.MSG_DONTWAIT)
            except BlockingIOError:
                if perf_counter() >= end:
                    return True
                continue
            if not data:
                return False
            self._answer(data)
            end = perf_counter() + self._spin
        return True

    def _answer(self, data: bytes) -> None:
        if len(data) != Request.SIZE:
            self.violations += 1
            raise RemoteProtocolError(f"a request of {len(data)} bytes")
        request = Request.unpack(data)
        if self._held:
            self._perform_held()
        output, descriptor = b"", -1
        try:
            if request.vp_index >= len(self._lines):
                raise RemoteProtocolError(f"a request of processor {request.vp_index}")
            vp = self._processor(request)
            if vp.suspended and request.flags & POSTED:
                self._hold(request)
                return
            reply = self._perform(vp, request)
            if request.operation == Operation.HYPERCALL and request.a & FAST:
                if request.a != _FAST_SIGNAL:
                    output = vp.fast_output
                elif reply.a == Status.SUCCESS:
                    descriptor = self._doorbell(vp, request.b)
        except GuestFault as fault:
            reply = Reply(Answer.FAULT, 0, 0, 0, fault.vector, 0, 0, 0)
        except VpStalled:
            reply = Reply(Answer.STALLED, 0, 0, 0, 0, 0, 0, 0)
        except VpSuspended:
            reply = Reply(Answer.SUSPENDED, 0, 0, 0, 0, 0, 0, 0)
        except RemoteProtocolError:
            self.violations += 1
            raise
        except VmbusError as error:
            # A device model refused the access: for the guest that is a device which answers nothing.
            self.partition.provider_failed(error)
            reply = Reply(Answer.DONE, 0, 0, 0, _MASK64, 0, 0, 0)
        if request.flags & POSTED:
            return
        reply.output_size = len(output)
        self._send(reply.pack() + output, descriptor)

    def _processor(self, request: Request) -> VirtualProcessor:
        """Whose request it is.

        Raises:
            VpStalled: its parent has deleted that processor.
        """
        try:
            return self.partition.vp(request.vp_index)
        except HypercallError:
            raise VpStalled(f"processor {request.vp_index} is gone") from None

    def _hold(self, request: Request) -> None:
        """Keep what a suspended processor posted just before it was suspended."""
        if len(self._held) >= MAX_HELD:
            raise RemoteProtocolError(f"{MAX_HELD} requests of suspended processors")
        self._held.append(request)

    def _perform_held(self) -> None:
        held, self._held = self._held, []
        for request in held:
            try:
                vp = self._processor(request)
                if vp.suspended:
                    self._held.append(request)
                else:
                    self._perform(vp, request)
            except (GuestFault, VpSuspended):
                continue
            except RemoteProtocolError:
                self.violations += 1
                raise
            except VmbusError as error:
                self.partition.provider_failed(error)

    def _suspension(self, vp: VirtualProcessor) -> None:
        """A processor was suspended or resumed: with the last one, the operating system stops the whole process."""
        if all(each.suspended for each in self.partition.vps):
            self._process.signal(signal.SIGSTOP)
            return
        self._process.signal(signal.SIGCONT)
        if vp.suspended or vp.index >= len(self._lines):  # one that was added when the process ran already
            return
        for fd, (owner, _, _) in list(self._bells.items()):
            if owner is vp:  # what it rang meanwhile comes now: modifying looks at the eventfd again
                with contextlib.suppress(OSError, ValueError):  # the process is ending
                    self._poll.modify(fd, select.EPOLLIN | select.EPOLLET)
        _interrupt(self._lines[vp.index])

    def _send(self, datagram: bytes, descriptor: int) -> None:
        ancillary = []
        if descriptor >= 0:
            ancillary.append((socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor])))
        try:
            self._socket.sendmsg([datagram], ancillary, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            raise RemoteProtocolError("it asks and does not read the answers") from None

    def _perform(self, vp: VirtualProcessor, request: Request) -> Reply:
        a, b, size = request.a, request.b, request.size
        if request.operation == Operation.HYPERCALL:
            return _done(vp.hypercall(a, b, request.c, request.xmm[: min(size, 96)]))
        if request.operation == Operation.RDMSR:
            return _done(vp.rdmsr(a))
        if request.operation == Operation.WRMSR:
            vp.wrmsr(a, b)
            return _done(0)
        if request.operation == Operation.CPUID:
            return Reply(Answer.DONE, 0, 0, 0, *vp.cpuid(a, b))
        if request.operation == Operation.POP_INTERRUPT:
            vector = vp.pop_interrupt()
            return Reply(Answer.DONE, vp.interrupt_pending, 0, 0, vector or 0, 0, 0, 0)
        if size not in (_PORT_SIZES if request.operation <= Operation.IO_WRITE else _MMIO_SIZES):
            raise RemoteProtocolError(f"operation {request.operation} of {size} bytes")
        value = b & (1 << 8 * size) - 1
        if request.operation == Operation.IO_READ:
            return _done(vp.io_read(a & 0xFFFF, size))
        if request.operation == Operation.IO_WRITE:
            vp.io_write(a & 0xFFFF, size, value)
            return _done(0)
        if request.operation == Operation.MMIO_READ:
            return _done(vp.mmio_read(a, size))
        if request.operation == Operation.MMIO_WRITE:
            vp.mmio_write(a, size, value)
            return _done(0)
        raise RemoteProtocolError(f"operation {request.operation}")

    def _doorbell(self, vp: VirtualProcessor, signal_input: int) -> int:
        """The eventfd for events with this input, made when the first one has succeeded; -1 for none."""
        connection_id, flag = signal_input & 0xFFFF_FFFF, signal_input >> 32 & 0xFFFF
        key = (vp.index, connection_id, flag)
        fd = self._doorbells.get(key)
        if fd is None:
            if len(self._doorbells) >= MAX_DOORBELLS:
                return -1
            descriptors = self.partition.meter.descriptors
            try:
                descriptors.charge()
            except BudgetExceeded:
                return -1  # the socket serves as well
            try:
                fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            except OSError:
                descriptors.release()
                return -1
            self._doorbells[key] = fd
            self._bells[fd] = (vp, connection_id, flag)
            self._poll.register(fd, select.EPOLLIN | select.EPOLLET)
        return fd

    def _ended(self) -> None:
        status = self._status = (
            self._process.end()
        )  # it may have closed its socket, or broken the protocol, and live
        with contextlib.suppress(OSError, ValueError):
            for _ in range(LAST_READS):  # a process that it left behind must not keep us here by printing on
                if not self._take_output():
                    break
        if status > 0 and self._output:
            log.warning(
                "%s: its process ended with status %d: %s",
                self.partition.name,
                status,
                printed(self.output),
            )
        self._let_go()
        with contextlib.ExitStack() as rest:  # each of them, whatever an earlier one raises
            if self.on_stopped is not None:
                rest.callback(self.on_stopped, status)
            if self.partition.state is PartitionState.ACTIVE:
                self.partition.reset()
                rest.callback(self.partition.notify, "stopped", status)
                rest.callback(self.partition.notify, "reset", 0)

    def _let_go(self) -> None:
        """The partition has no process any more."""
        partition = self.partition
        for vp in partition.vps:
            vp.on_interrupt = None
        partition.stop = partition.on_suspension = None
        self._close()

    def _close(self) -> None:
        self._socket.close()
        for line in self._lines:
            line.close()
        process = getattr(self, "_process", None)
        if process is not None:
            process.close()
        for fd in self._bells:
            os.close(fd)
        self.partition.meter.descriptors.release(len(self._bells))
        self._bells.clear()
        self._doorbells.clear()
        self._poll.close()


def _done(value: int) -> Reply:
    return Reply(Answer.DONE, 0, 0, 0, value & _MASK64, 0, 0, 0)


def _interrupt(line: socket.socket) -> None:
    # A full line means that a wake-up is on its way already; a broken one that the process is ending.
    with contextlib.suppress(OSError):
        line.send(b"!", socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

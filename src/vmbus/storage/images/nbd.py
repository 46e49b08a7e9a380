"""A disk that an NBD server has: `qemu-nbd`, `nbdkit`, or any other, over a Unix socket or TCP."""

import errno
import logging
import threading
from collections.abc import Iterator, Sequence

from vmbus.errors import DeviceError, RemoteProtocolError, printable
from vmbus.storage.disk import Buffer, Disk, DiskError, Extent
from vmbus.storage.images.nbd_link import LEAST_RATE, Link, connect, reason
from vmbus.storage.images.nbd_protocol import NbdClient, Reply, describe
from vmbus.storage.images.nbd_uri import TlsOptions, parse_uri
from vmbus.storage.images.nbd_wire import Command, CommandFlags, StatusFlags, TransmissionFlags
from vmbus.trace.ledger import Account

__all__ = ["NbdDisk"]

_log = logging.getLogger(__name__)

_PART = 1 << 20
"""Larger reads and writes are split into requests of this size."""
_WINDOW = 16 * _PART
"""Bytes of one read or write that are in flight, and copied, at a time."""
_MAX_STATUS_REQUESTS = 1 << 16
_LONGEST_LIMIT = 86400
_OVERTAKEN = 10
"""Time limits that a request may be overtaken by later ones."""
_ZERO_PART = 1 << 30

_Part = tuple[Command, int, int, bytes, int]
"""A request: command, offset, length, data, flags."""


class NbdDisk(Disk):
    """A disk served by an NBD server.

    Requests from several threads are in flight together on the one connection. When the connection fails or the
    server uses up its time, this and every later request ends with an error. The server is given up

    * when it is silent for `timeout` seconds: it neither sends anything nor takes anything of what is sent to it. A
      server behind a slow link is not silent.
    * when it finishes no request and for `timeout` seconds more is slower than 4096 bytes a second: n bytes take at
      most `timeout` + n / 4096 seconds, however they are spread;
    * when connecting and the handshake take more than four times `timeout`;
    * when it answers later requests and lets one wait for more than ten times `timeout` and the time that everything
      in flight takes at 4096 bytes a second.

    Args:
        uri: ``nbd://host[:port]/[export]`` or ``nbd+unix:///[export]?socket=path``; with TLS ``nbds://`` and
            ``nbds+unix://``, which take the parameters ``tls-certificates`` (a folder with ``ca-cert.pem``,
            ``client-cert.pem`` and ``client-key.pem``), ``tls-hostname`` and ``tls-verify-peer``.
        read_only: never send a request that changes the disk.
        timeout: seconds to wait for the server, see above; at most a day.
        account: counts requests as backend calls.

    Raises:
        DiskError: no server there, it refuses, it breaks the protocol, or its export cannot be a disk; or an argument
            is not possible.
    """

    def __init__(
        self, uri: str, *, read_only: bool = False, timeout: float = 30.0, account: Account | None = None
    ) -> None:
        address = parse_uri(uri)
        self.name = printable(uri)
        if not 0 < timeout <= _LONGEST_LIMIT:
            raise DiskError(f"{self.name}: a time limit of {timeout} s is not possible", errno.EINVAL)
        self.account = Account() if account is None else account
        self._timeout = timeout
        self._protocol = NbdClient(address.export, tls=address.tls is not None)
        self._send_lock = threading.Lock()
        self._state = threading.Condition()
        self._someone_reads = False
        self._in_flight = 0  # bytes of all requests that were submitted and not answered
        self._broken: DiskError | None = None
        try:
            self._link = Link(connect(address.endpoint, timeout), timeout)
        except OSError as error:
            raise self._lost(f"cannot connect: {reason(error)}") from error
        try:
            self._handshake(address.tls)
            self._become_a_disk(read_only)
        except BaseException:
            self._link.close()
            raise

    def _handshake(self, tls: TlsOptions | None) -> None:
        try:
            while not self._protocol.ready:
                self._send()
                self._protocol.feed(self._link.receive(self._protocol.needs))
                self._link.answered()
                if self._protocol.wants_tls and tls is not None:
                    self._protocol.wants_tls = False
                    self._link.start_tls(tls)
            self._link.shaken()
        except OSError as error:
            raise self._lost(f"the handshake failed: {reason(error)}") from error
        except RemoteProtocolError as error:
            raise self._lost(str(error)) from error
        except DeviceError as error:
            raise DiskError(f"{self.name}: {error}", errno.ENODEV) from error

    def _become_a_disk(self, read_only: bool) -> None:
        export = self._protocol.export
        if export.flags & TransmissionFlags.READ_ONLY and not read_only:
            raise DiskError(f"{self.name}: the export is read-only, open it so", errno.EROFS)
        self.sector_size = max(512, export.minimum_block)
        if self.sector_size not in (512, 4096):
            raise DiskError(f"{self.name}: blocks of at least {export.minimum_block} bytes are not supported")
        self.physical_sector_size = max(self.sector_size, 4096 if export.preferred_block >= 4096 else 512)
        self.sector_count = export.size // self.sector_size
        if not self.sector_count:
            raise DiskError(f"{self.name}: the export has {export.size} bytes, not even one sector")
        if export.size % self.sector_size:
            _log.warning("%s: the last %d bytes are no sector", self.name, export.size % self.sector_size)
        self.read_only = read_only
        can_unmap = self._can(TransmissionFlags.SEND_WRITE_ZEROES)
        self.unmap_granularity = max(4096, self.sector_size) if can_unmap else 0

    def _can(self, flag: TransmissionFlags) -> bool:
        return bool(self._protocol.export.flags & flag)

    # The connection.

    def _send(self) -> None:
        data, self._protocol.outgoing = self._protocol.outgoing, bytearray()
        if data:
            self._link.send(data)

    def _lost(self, why: str) -> DiskError:
        return DiskError(f"{self.name}: {why}", errno.ENOTCONN)

    def _transact(self, parts: Sequence[_Part]) -> list[Reply]:
        """Send requests and wait for all their replies.

        Raises:
            DiskError: the connection is broken, or the server failed one of them.
        """
        protocol, link = self._protocol, self._link
        size = sum(length if command == Command.READ else len(data) for command, _, length, data, _ in parts)
        with self._send_lock:
            if self._broken is not None:
                raise self._broken
            self.account.backend_calls += len(parts)
            with self._state:
                if not self._in_flight:
                    link.answered()  # nothing was asked for before this
                self._in_flight += size + 1
                starved = link.waited + _OVERTAKEN * self._timeout + self._in_flight / LEAST_RATE
            cookies = [protocol.submit(*part) for part in parts]
            try:
                self._send()
            except OSError as error:
                self._break(self._lost(f"the connection failed: {reason(error)}"))
            except BaseException:  # nobody knows how much of it went out
                self._break(self._lost("a request was interrupted while it was sent"))
                raise
        with self._state:
            try:
                while self._broken is None and not all(protocol.is_done(cookie) for cookie in cookies):
                    if link.waited > starved:
                        self._broken = self._lost("the server answers other requests, but not this one")
                        self._state.notify_all()
                    elif self._someone_reads:
                        self._state.wait()
                    else:
                        self._read_once()
            finally:
                self._in_flight -= size + 1
            if self._broken is not None:
                raise self._broken
            replies = [protocol.take(cookie) for cookie in cookies]
        for reply in replies:
            if reply.error:
                what = Command(reply.command).name.lower().replace("_", " ")
                raise DiskError(
                    f"{self.name}: {what} at byte {reply.offset} failed: {describe(reply)}", reply.error
                )
        return replies

    def _read_once(self) -> None:
        """Read the next piece for whoever it is for. Called with `_state` held, which is free while waiting."""
        self._someone_reads = True
        needs = self._protocol.needs
        self._state.release()
        failure, data = None, b""
        try:
            data = self._link.receive(needs)
        except TimeoutError as error:
            failure = self._lost(reason(error))
        except OSError as error:
            failure = self._lost(f"the connection failed: {reason(error)}")
        except BaseException:  # nobody knows how much of a reply was read
            self._broken = self._broken or self._lost("a request was interrupted while it waited")
            raise
        finally:
            self._state.acquire()
            self._someone_reads = False
            self._state.notify_all()
        try:
            if failure is None and self._protocol.feed(data):
                self._link.answered()
        except RemoteProtocolError as error:
            failure = self._lost(str(error))
        if failure is not None:
            self._broken = self._broken or failure

    def _break(self, failure: DiskError) -> None:
        with self._state:
            self._broken = self._broken or failure
            self._state.notify_all()

    # The disk.

    def _parts(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """The requests of a range: offset, offset in the range, length."""
        part = max(self.sector_size, min(_PART, self._protocol.export.maximum_block))
        part -= part % self.sector_size
        for at in range(0, length, part):
            yield offset + at, at, min(part, length - at)

    def read(self, offset: int, length: int) -> bytes:
        """See `Disk.read`."""
        self.check(offset, length)
        pieces: list[bytes | bytearray] = []
        for start in range(offset, offset + length, _WINDOW):
            parts = self._parts(start, min(_WINDOW, offset + length - start))
            pieces += [
                reply.data for reply in self._transact([(Command.READ, at, n, b"", 0) for at, _, n in parts])
            ]
        return bytes(pieces[0]) if len(pieces) == 1 else b"".join(pieces)

    def write(self, offset: int, data: Buffer) -> None:
        """See `Disk.write`."""
        self._write(offset, data, 0)

    def write_through(self, offset: int, data: Buffer) -> None:
        """See `Disk.write_through`."""
        if self._can(TransmissionFlags.SEND_FUA):
            self._write(offset, data, CommandFlags.FUA)
        else:
            super().write_through(offset, data)

    def _write(self, offset: int, data: Buffer, flags: int) -> None:
        view = memoryview(data).cast("B")
        self.check(offset, len(view), writing=True)
        for start in range(0, len(view), _WINDOW):
            rest = view[start : start + _WINDOW]
            self._transact(
                [
                    (Command.WRITE, at, part, bytes(rest[inside : inside + part]), flags)
                    for at, inside, part in self._parts(offset + start, len(rest))
                ]
            )

    def flush(self) -> None:
        """See `Disk.flush`; a server without the flush command has nothing to flush."""
        if not self.read_only and self._can(TransmissionFlags.SEND_FLUSH):
            self._transact([(Command.FLUSH, 0, 0, b"", 0)])

    def unmap(self, offset: int, length: int) -> None:
        """See `Disk.unmap`; asks for zeros that may be holes, since a trim would not promise zeros."""
        self._zero(offset, length, 0)

    def write_zeros(self, offset: int, length: int) -> None:
        """See `Disk.write_zeros`."""
        self._zero(offset, length, CommandFlags.NO_HOLE)

    def _zero(self, offset: int, length: int, flags: int) -> None:
        self.check(offset, length, writing=True)
        if not self._can(TransmissionFlags.SEND_WRITE_ZEROES):
            super().write_zeros(offset, length)
            return
        for at in range(offset, offset + length, _ZERO_PART):
            part = min(_ZERO_PART, offset + length - at)
            self._transact([(Command.WRITE_ZEROES, at, part, b"", flags)])

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """See `Disk.extents`; a hole is what the server calls one and reads as zeros."""
        self.check(offset, length)
        last = Extent(offset, 0, True)
        for length_here, flags in self._status(offset, length):
            here = Extent(
                last.offset + last.length, length_here, flags != StatusFlags.HOLE | StatusFlags.ZERO
            )
            if here.allocated == last.allocated:
                last = Extent(last.offset, last.length + here.length, last.allocated)
            else:
                if last.length:
                    yield last
                last = here
        if last.length:
            yield last

    def _status(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Block status of the whole range, in whole sectors: (length, flags)."""
        if self._protocol.export.allocation_context is None:
            yield length, 0
            return
        end, sector = offset + length, self.sector_size
        for _ in range(_MAX_STATUS_REQUESTS):
            if offset == end:
                return
            part = min(_ZERO_PART, end - offset)
            (reply,) = self._transact([(Command.BLOCK_STATUS, offset, part, b"", 0)])
            at = begun = offset
            for length_here, flags in reply.status:
                at += length_here
                hole = flags == StatusFlags.HOLE | StatusFlags.ZERO
                stop = min(at - at % sector if hole else at + -at % sector, end)
                if stop > offset:
                    yield stop - offset, flags
                    offset = stop
            if offset == begun:  # less than a sector was told
                yield sector, 0
                offset += sector
        if offset < end:
            yield end - offset, 0  # a server that tells so little at a time could be asked for ever

    def close(self) -> None:
        """Say goodbye and close the connection. Closing twice is allowed."""
        with self._send_lock:
            if self._broken is None:
                self._protocol.disconnect()
                try:
                    self._send()
                except OSError:
                    _log.debug("%s: the connection was gone before it was closed", self.name)
        self._break(self._lost("the disk is closed"))
        self._link.close()

"""A connection to an NBD server: exact reads and whole writes, plain or encrypted, with limits on the server's time.

The limits are about the server alone. Silence is one; the other is to be slower than any disk: whoever sends a byte now
and then is never silent, and never ready either.
"""

import contextlib
import errno
import fcntl
import math
import select
import socket
import ssl
import struct
import termios
import threading
import time

from vmbus.errors import printable
from vmbus.storage.disk import Buffer
from vmbus.storage.images.nbd_uri import TlsOptions

__all__ = ["LEAST_RATE", "Link", "Patience", "connect", "reason"]

LEAST_RATE = 4096
"""Bytes a second: a server that gives or takes less for longer than the time limit is given up."""
_HANDSHAKE_LIMITS = 4
"""Time limits that everything before the first request may take together."""
_AHEAD = 16 << 10
"""Bytes that are received at once, if they are there, though less was asked for."""
_RECORDS = 256 << 10
"""Bytes that are encrypted, or read to be decrypted, at once."""
_MOST_OVERHEAD = 1 << 20
"""Encrypted bytes after which something must have been said."""


class Patience:
    """How long a server may still be waited for.

    It begins with the time limit. Waiting uses it up; what the server gives or takes earns some back, a second for
    `LEAST_RATE` bytes, but never more than the limit. So silence ends after the limit, a server that is slow but keeps
    the rate has all the time that it needs, and of one that does not, n bytes take at most the limit and
    n / `LEAST_RATE` seconds.

    Args:
        limit: seconds.

    Attributes:
        left: seconds that are left.
        silent: nothing was given or taken since it began.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self.left = limit
        self.silent = True

    def spend(self, seconds: float) -> None:
        """That much was waited."""
        self.left -= seconds

    def earn(self, count: int) -> None:
        """The server gave or took `count` bytes."""
        if count > 0:
            self.silent = False
            self.left = min(self._limit, max(self.left, 0.0) + count / LEAST_RATE)

    def refill(self) -> None:
        """The server did what was asked for: the limit begins anew."""
        self.left = self._limit
        self.silent = True


def connect(endpoint: tuple[str, int] | str, limit: float) -> socket.socket:
    """Connect to a server.

    Args:
        endpoint: a (host, port) pair or a Unix socket's path.
        limit: seconds for each of the host's addresses; for all of them together, four times as much.

    Raises:
        OSError: nobody answers there.
    """
    if isinstance(endpoint, str):
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.settimeout(limit)
            connection.connect(endpoint)
        except FileNotFoundError as error:
            connection.close()
            raise OSError(errno.ENOENT, f"there is no socket {printable(endpoint)}") from error
        except BaseException:
            connection.close()
            raise
        return connection
    ends = time.monotonic() + _HANDSHAKE_LIMITS * limit
    failure: OSError = TimeoutError(errno.ETIMEDOUT, "no address answers in time")
    try:
        addresses = socket.getaddrinfo(*endpoint, type=socket.SOCK_STREAM)
    except UnicodeError as error:  # of the encoding of international names
        raise OSError(errno.EINVAL, "the host's name is not valid") from error
    for family, kind, protocol, _, address in addresses:
        left = min(limit, ends - time.monotonic())
        if left <= 0:
            break
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(left)
            connection.connect(address)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            connection.close()
            failure = error
        except BaseException:
            connection.close()
            raise
        else:
            return connection
    raise failure


class Link:
    """A connection. One thread may send while another receives.

    Args:
        connection: a connected socket, which belongs to the link from now on.
        limit: seconds of the server's silence, see `Patience`.

    Attributes:
        waited: seconds that were spent waiting for something to receive.
    """

    def __init__(self, connection: socket.socket, limit: float) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._limit = limit
        self._patience = Patience(limit)
        self._handshake_left: float | None = _HANDSHAKE_LIMITS * limit
        self._readable, self._writable = select.poll(), select.poll()
        self._readable.register(connection, select.POLLIN)
        self._writable.register(connection, select.POLLOUT)
        self._ahead = memoryview(bytearray(_AHEAD))  # what came with something else and was not asked for yet
        self._start = self._stop = 0
        self._tls: ssl.SSLObject | None = None
        self._tls_lock = threading.Lock()
        self._raw = memoryview(b"")
        self._overhead = 0
        self._closed = False
        self._encrypted, self._to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.waited = 0.0

    # What uses the time limits up.

    def answered(self) -> None:
        """The server finished something that it was asked for; its time begins anew."""
        self._patience.refill()

    def shaken(self) -> None:
        """The handshake is over, and with it the limit of all its time."""
        self._handshake_left = None
        self._patience.refill()

    def _queued(self) -> int:
        """Bytes that the server has not taken from the host yet."""
        if self._socket.fileno() < 0:
            raise OSError(errno.EBADF, "the connection was closed")
        number: int = struct.unpack("i", fcntl.ioctl(self._socket, termios.TIOCOUTQ, bytes(4)))[0]
        return number

    def _wait(self, ready: select.poll, patience: Patience, silence: str) -> float:
        """Wait for the socket, and return the seconds.

        Raises:
            TimeoutError: the server used up its time; `silence` is the sentence if it did nothing at all.
        """
        waited, queued = 0.0, 0
        while True:
            limit = patience.left
            if limit <= 0:
                slow = f"the server stopped, or is slower than {LEAST_RATE} bytes a second"
                raise TimeoutError(errno.ETIMEDOUT, silence if patience.silent else slow)
            if self._handshake_left is not None:
                limit = min(limit, self._handshake_left)
                if limit <= 0:
                    raise TimeoutError(
                        errno.ETIMEDOUT, "the server does not come to the end of the handshake"
                    )
            limit = min(limit, self._limit / 8)
            began = time.monotonic()
            found = ready.poll(math.ceil(limit * 1000))
            passed = min(time.monotonic() - began, limit)  # not the time in which this process did not run
            waited += passed
            patience.spend(passed)
            if self._handshake_left is not None:
                self._handshake_left -= passed
            if found:
                return waited
            # A server behind a slow link that takes what is on the way to it is not silent.
            before, queued = queued, self._queued()
            patience.earn(before - queued)

    # Bytes as they are on the wire.

    def _send_raw(self, data: Buffer) -> None:
        rest, patience = memoryview(data), Patience(self._limit)
        while rest:
            try:
                done = self._socket.send(rest)
            except BlockingIOError:
                self._wait(self._writable, patience, "the server takes nothing")
                continue
            patience.earn(done)
            rest = rest[done:]

    def _receive_raw(self, out: memoryview) -> int:
        """As many bytes as there are, at least one."""
        while True:
            try:
                done = self._socket.recv_into(out)
            except BlockingIOError:
                self.waited += self._wait(self._readable, self._patience, "the server does not answer")
                continue
            if not done:
                raise ConnectionResetError(errno.ECONNRESET, "the server closed the connection")
            self._patience.earn(done)
            return done

    # Bytes as both ends mean them.

    def send(self, data: Buffer) -> None:
        """Send all of it.

        Raises:
            OSError: the connection failed; `TimeoutError` if the server does not take it.
        """
        if self._tls is None:
            self._send_raw(data)
            return
        view = memoryview(data)
        for start in range(0, len(view), _RECORDS):
            with self._tls_lock:
                self._tls.write(view[start : start + _RECORDS])
                raw = self._to_send.read()
            try:
                self._send_raw(raw)
            except ConnectionError:
                self._hear_last_words()
                raise

    def receive(self, length: int) -> bytes:
        """Exactly `length` bytes.

        Raises:
            OSError: the connection failed or ended before; `TimeoutError` if the server used up its time.
        """
        receive = self._receive_raw if self._tls is None else self._receive_tls
        ahead, start = self._ahead, self._start
        have = self._stop - start
        if have < length <= _AHEAD:
            ahead[:have], start = bytes(ahead[start : self._stop]), 0
            while have < length:
                have += receive(ahead[have:])
        if have >= length:
            self._start, self._stop = start + length, start + have
            return bytes(ahead[start : start + length])
        out = bytearray(length)
        view, self._start, self._stop = memoryview(out), 0, 0
        view[:have] = ahead[start : start + have]
        while have < length:
            have += receive(view[have:])
        return bytes(out)

    # TLS: the library only transforms bytes here, so that one thread may wait to send and another to receive.

    def start_tls(self, options: TlsOptions) -> None:
        """Encrypt everything from here on.

        Raises:
            OSError: the server is not who it has to be, or does not speak TLS (`ssl.SSLError`); a certificate of ours
                cannot be read; the connection failed.
        """
        if self._start != self._stop:  # somebody on the way put it behind the server's consent
            raise ConnectionAbortedError(
                errno.ECONNABORTED, "the server sent data in the clear where TLS begins"
            )
        context = _context(options)
        self._raw = memoryview(bytearray(_RECORDS))
        try:
            tls = context.wrap_bio(self._encrypted, self._to_send, server_hostname=options.hostname or None)
        except ValueError as error:
            raise OSError(errno.EINVAL, f"the host name is not valid: {error}") from error
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self._send_raw(self._to_send.read())
                self._feed_tls()
            except ssl.SSLError:
                self._say_last_words()  # the alert that tells the server why
                raise
        self._send_raw(self._to_send.read())
        self._tls = tls

    def _feed_tls(self) -> None:
        raw = self._raw
        count = self._receive_raw(raw)
        self._overhead += count
        if (
            self._overhead > _MOST_OVERHEAD
        ):  # tickets and keys without an end would keep the reader busy for ever
            raise ConnectionAbortedError(errno.ECONNABORTED, "the server sends TLS records without any data")
        with self._tls_lock:
            self._encrypted.write(raw[:count])

    def _receive_tls(self, out: memoryview) -> int:
        assert self._tls is not None
        while True:
            try:
                with self._tls_lock:
                    data = self._tls.read(len(out))
            except ssl.SSLWantReadError:
                self._feed_tls()
                continue
            if not data:
                raise ConnectionResetError(errno.ECONNRESET, "the server closed the connection")
            self._overhead = 0
            out[: len(data)] = data
            return len(data)

    def _say_last_words(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.send(self._to_send.read())

    def _hear_last_words(self) -> None:
        """The server ended the connection: raise the reason that it gave, if it did.

        Raises:
            ssl.SSLError: the reason.
        """
        raw = bytearray(_RECORDS)
        try:
            count = self._socket.recv_into(raw)
        except OSError:
            return
        with self._tls_lock, contextlib.suppress(ssl.SSLWantReadError):
            self._encrypted.write(memoryview(raw)[:count])
            assert self._tls is not None
            self._tls.read(1)

    def close(self) -> None:
        """Close the connection, also under another thread that waits for it. Closing twice is allowed."""
        if self._closed:
            return
        self._closed = True
        if self._tls is not None:
            with (
                self._tls_lock,
                contextlib.suppress(OSError),
            ):  # it would wait for the server's goodbye: nobody does
                self._tls.unwrap()
            self._say_last_words()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # ends the waiting of others
        self._socket.close()


def _context(options: TlsOptions) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.check_hostname = options.verify and bool(options.hostname)
    context.verify_mode = ssl.CERT_REQUIRED if options.verify else ssl.CERT_NONE
    folder = options.certificates
    if folder is None:
        context.load_default_certs()
        return context
    if options.verify:
        authority = folder / "ca-cert.pem"
        text = authority.read_bytes().decode("ascii", "replace")
        if not text:  # a bare ValueError of the library's
            raise OSError(errno.EINVAL, "the file is empty", str(authority))
        context.load_verify_locations(cadata=text)
    certificate, key = folder / "client-cert.pem", folder / "client-key.pem"
    if certificate.exists():
        key.open("rb").close()  # an error of this names the file
        context.load_cert_chain(certificate, key, password=lambda: "")  # never ask on the terminal
    return context


def reason(error: OSError) -> str:
    """What went wrong on a connection, in words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the server's certificate is refused: {printable(error.verify_message)}"
    if isinstance(error, ssl.SSLError):
        return f"TLS failed: {printable((error.reason or error.strerror or str(error)).lower().replace('_', ' '))}"
    where = f"{error.filename}: " if error.filename is not None else ""
    return f"{where}{error.strerror or error}"

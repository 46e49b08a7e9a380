"""Where a switch ends: Linux TAP interfaces, stream sockets that speak QEMU's framing, and a loopback.

An `Uplink` moves whole Ethernet frames and never blocks. `attach` joins one to a port of a switch.
"""

import contextlib
import errno
import fcntl
import os
import socket
import struct
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import Final, Self

from vmbus.errors import DeviceError
from vmbus.network.switch import Mirror, Port, PortKind, Switch
from vmbus.trace.ledger import Account

__all__ = ["LoopbackUplink", "StreamUplink", "TapUplink", "Uplink", "UplinkPort", "attach"]

TUNSETIFF: Final = 0x400454CA
IFF_TAP: Final = 0x0002
IFF_NO_PI: Final = 0x1000
SIOCGIFFLAGS: Final = 0x8913
SIOCSIFFLAGS: Final = 0x8914
SIOCSIFMTU: Final = 0x8922
IFF_UP: Final = 0x1
SO_SNDBUFFORCE: Final = 32
SO_RCVBUFFORCE: Final = 33
INTERFACE_NAME_SIZE: Final = 16
SOCKET_BUFFER: Final = 8 << 20
"""Bytes that each direction of a stream may hold. A peer that finds no room drops, and sends most of a download again:
with the kernel's default of 208 KiB, passt moved three frames for each that was needed."""
MAX_FRAME: Final = 65550
"""Longest frame on an uplink: Linux's 65535 bytes of MTU and an Ethernet header with a tag, rounded up."""


class Uplink(ABC):
    """A source and sink of Ethernet frames.

    Attributes:
        dropped: frames that could not be sent because the other side does not read, or is gone, or must not get them.
        account: where they are counted too, if not None.
    """

    dropped: int = 0
    account: Account | None = None

    def lose(self, frames: int = 1, reason: str = "uplink takes no more") -> None:
        """Count frames that could not be sent."""
        self.dropped += frames
        if self.account is not None:
            self.account.dropped[reason] += frames

    @abstractmethod
    def fileno(self) -> int:
        """The descriptor that becomes readable when frames come in, -1 if there is none."""

    @abstractmethod
    def send(self, frames: Sequence[bytes]) -> None:
        """Send frames; what cannot be sent now is counted in `dropped`."""

    @abstractmethod
    def receive(self, limit: int = 64) -> list[bytes]:
        """Up to `limit` frames that are there now.

        Raises:
            DeviceError: the other side is gone or broke the framing.
        """

    @abstractmethod
    def close(self) -> None:
        """Release the descriptor; a second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class LoopbackUplink(Uplink):
    """An uplink that is a cable to itself or to a peer: what is sent comes back, or comes out of the peer."""

    def __init__(self, peer: "LoopbackUplink | None" = None, capacity: int = 4096) -> None:
        """`capacity` is the number of frames on the way."""
        self._queue: deque[bytes] = deque()
        self._capacity = capacity
        self._peer: LoopbackUplink = self
        if peer is not None:
            self._peer, peer._peer = peer, self

    @classmethod
    def pair(cls) -> "tuple[LoopbackUplink, LoopbackUplink]":
        """Two ends of a cable."""
        first = cls()
        return first, cls(first)

    def fileno(self) -> int:
        """There is no descriptor."""
        return -1

    def send(self, frames: Sequence[bytes]) -> None:
        """Queue frames at the peer."""
        for frame in frames:
            if len(self._peer._queue) >= self._capacity:
                self.lose()
            else:
                self._peer._queue.append(frame)

    def receive(self, limit: int = 64) -> list[bytes]:
        """Take frames from the queue."""
        return [self._queue.popleft() for _ in range(min(limit, len(self._queue)))]

    def close(self) -> None:
        """Forget what is on the way."""
        self._queue.clear()


class TapUplink(Uplink):
    """A Linux TAP interface; the kernel's network stack is the other side.

    Making an interface needs ``CAP_NET_ADMIN``; opening one that was made for this user does not.
    """

    def __init__(self, name: str = "", *, mtu: int | None = None, up: bool = False) -> None:
        """Open the interface `name`, or a new one that the kernel names if it is empty (``vmbus%d``).

        Raises:
            DeviceError: no permission, or no such interface.
        """
        wanted = (name or "vmbus%d").encode()
        if len(wanted) >= INTERFACE_NAME_SIZE:
            raise DeviceError(f"interface name {name!r} is longer than {INTERFACE_NAME_SIZE - 1} bytes")
        self._fd = -1
        try:
            self._fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            request = struct.pack("16sH22x", wanted, IFF_TAP | IFF_NO_PI)
            answer = fcntl.ioctl(self._fd, TUNSETIFF, request)
            self.name = answer[:INTERFACE_NAME_SIZE].rstrip(b"\0").decode()
            if mtu is not None or up:
                self._configure(mtu, up)
        except OSError as error:
            self.close()
            raise DeviceError(f"TAP interface {name or 'vmbus%d'}: {error}") from error

    def _configure(self, mtu: int | None, up: bool) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            name = self.name.encode()
            if mtu is not None:
                fcntl.ioctl(control, SIOCSIFMTU, struct.pack("16si20x", name, mtu))
            if up:
                answer = fcntl.ioctl(control, SIOCGIFFLAGS, struct.pack("16sH22x", name, 0))
                (flags,) = struct.unpack_from("H", answer, 16)
                fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH22x", name, flags | IFF_UP))

    def fileno(self) -> int:
        """The TAP's descriptor."""
        return self._fd

    def send(self, frames: Sequence[bytes]) -> None:
        """One write a frame. A frame the kernel refuses (interface down, queue full) is dropped."""
        for frame in frames:
            try:
                os.write(self._fd, frame)
            except OSError:
                self.lose()

    def receive(self, limit: int = 64) -> list[bytes]:
        """Frames that the kernel sent to the interface."""
        frames: list[bytes] = []
        while len(frames) < limit:
            try:
                frames.append(os.read(self._fd, MAX_FRAME))
            except BlockingIOError:
                break
            except OSError as error:
                if frames:
                    break
                if error.errno == errno.EIO:  # the interface is down: nothing can come
                    return []
                raise DeviceError(f"TAP interface {self.name}: {error}") from error
        return frames

    def close(self) -> None:
        """Close; an interface that was made here disappears."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def enlarge(connection: socket.socket) -> tuple[int, int]:
    """Let a socket hold `SOCKET_BUFFER` bytes each way, or as many as this process may.

    Without ``CAP_NET_ADMIN`` in the first user namespace the limits are ``net.core.wmem_max`` and
    ``net.core.rmem_max``, usually 208 KiB.

    Returns:
        what was got for sending and receiving, in the kernel's own terms: it doubles what it is asked for (socket(7)).
    """
    for forced, plain in ((SO_SNDBUFFORCE, socket.SO_SNDBUF), (SO_RCVBUFFORCE, socket.SO_RCVBUF)):
        try:
            connection.setsockopt(socket.SOL_SOCKET, forced, SOCKET_BUFFER)
        except OSError:
            connection.setsockopt(socket.SOL_SOCKET, plain, SOCKET_BUFFER)
    return (
        connection.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF),
        connection.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF),
    )


class StreamUplink(Uplink):
    """A stream socket with QEMU's framing: a 32-bit big-endian length before every frame.

    ``passt`` serves it, as do QEMU's ``-netdev stream`` and ``-netdev socket``, so that a guest gets to the
    internet without any privilege.
    """

    def __init__(self, connection: socket.socket, *, max_pending: int = 4 << 20) -> None:
        """Take over a connected stream socket; at most `max_pending` bytes wait for a slow other side.

        The socket's own buffers stay as they are: see `enlarge`.
        """
        connection.setblocking(False)
        self._socket = connection
        self._max_pending = max_pending
        self._incoming = bytearray()
        self._outgoing: deque[memoryview] = deque()
        self._pending = 0
        self._lock = threading.Lock()

    @classmethod
    def connect(cls, path: str) -> "StreamUplink":
        """Connect to a UNIX socket, for instance the one that ``passt --socket PATH`` makes.

        Raises:
            DeviceError: nobody listens there.
        """
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(path)
        except OSError as error:
            connection.close()
            raise DeviceError(f"stream uplink {path}: {error}") from error
        enlarge(connection)
        return cls(connection)

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._socket.fileno()

    @property
    def pending(self) -> int:
        """Bytes that wait for the other side to read; call `flush` when the socket is writable."""
        return self._pending

    def send(self, frames: Sequence[bytes]) -> None:
        """Queue and send as much as the socket takes; a frame is sent whole or not at all."""
        with self._lock:
            for frame in frames:
                if self._pending + len(frame) + 4 > self._max_pending or len(frame) > MAX_FRAME:
                    self.lose()
                    continue
                data = len(frame).to_bytes(4, "big") + frame
                self._outgoing.append(memoryview(data))
                self._pending += len(data)
            self._flush()

    def flush(self) -> None:
        """Send what waits, as far as the socket takes it."""
        with self._lock:
            self._flush()

    def _flush(self) -> None:
        while self._outgoing:
            parts = [self._outgoing[i] for i in range(min(len(self._outgoing), 64))]
            try:
                sent = self._socket.sendmsg(parts, [], socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return
            except OSError:
                self.lose(len(self._outgoing))
                self._outgoing.clear()
                self._pending = 0
                return
            self._pending -= sent
            while sent:
                head = self._outgoing[0]
                if sent < len(head):
                    self._outgoing[0] = head[sent:]
                    break
                sent -= len(head)
                self._outgoing.popleft()

    def receive(self, limit: int = 64) -> list[bytes]:
        """Complete frames that have come in."""
        frames: list[bytes] = []
        while True:
            self._split(frames, limit)
            if len(frames) >= limit:
                return frames
            try:
                data = self._socket.recv(1 << 18)
            except BlockingIOError:
                return frames
            except OSError as error:
                raise DeviceError(f"stream uplink: {error}") from error
            if not data:
                if frames:
                    return frames
                raise DeviceError("stream uplink: the other side closed the connection")
            self._incoming += data

    def _split(self, frames: list[bytes], limit: int) -> None:
        at, data = 0, self._incoming
        while len(frames) < limit and len(data) - at >= 4:
            length = int.from_bytes(data[at : at + 4], "big")
            if length > MAX_FRAME:
                raise DeviceError(f"stream uplink: frame of {length} bytes")
            if len(data) - at - 4 < length:
                break
            frames.append(bytes(data[at + 4 : at + 4 + length]))
            at += 4 + length
        del data[:at]

    def close(self) -> None:
        """Close the socket."""
        with contextlib.suppress(OSError):
            self._socket.close()


class UplinkPort:
    """An uplink joined to a port of a switch.

    Attributes:
        uplink: the uplink; not closed with the port.
        port: its port; VLANs, counters and so on are there.
    """

    def __init__(self, port: Port, uplink: Uplink) -> None:
        """From now on frames that leave through `port` go to `uplink`."""
        self.port = port
        self.uplink = uplink
        port.receiver = uplink.send

    @property
    def room(self) -> int | None:
        """How many frames somebody on the switch takes now without dropping any; None if one takes any number.

        The roomiest port counts: one that takes nothing must not keep frames from the others.
        """
        switch, rooms = self.port.switch, []
        for port in switch.ports:
            if port is self.port or port.mirror is Mirror.DESTINATION:
                continue
            if port.room is None:
                return None
            rooms.append(port.room())
        return max(rooms, default=None)

    def poll(self, limit: int = 256) -> int:
        """Bring up to `limit` frames from the uplink into the switch; how many came.

        What nobody has room for stays in the uplink, where its sender sees that it has to wait.

        Raises:
            DeviceError: the uplink is gone.
        """
        came = 0
        while came < limit:
            room = self.room
            wanted = limit - came if room is None else min(room, limit - came)
            frames = self.uplink.receive(wanted) if wanted > 0 else []
            if frames:
                self.port.send(frames)
            came += len(frames)
            if len(frames) < wanted or not frames:
                break
        return came

    def close(self) -> None:
        """Disconnect the port and close the uplink."""
        self.port.disconnect()
        self.uplink.close()


def attach(
    switch: Switch, uplink: Uplink, name: str = "uplink", kind: PortKind = PortKind.UPLINK
) -> UplinkPort:
    """Connect an uplink to a switch: as the external switch's uplink, or as the parent's own port (`HOST`)."""
    return UplinkPort(switch.connect(name, kind), uplink)

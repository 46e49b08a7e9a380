"""The client's half of the NBD protocol without any I/O: bytes in, bytes out, results by cookie.

The server is not trusted: sizes are bounded before anything is allocated, every reply must belong to a request,
and what it says must fit that request.
"""

import errno
import logging
import os
import struct
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

from vmbus.errors import DeviceError, LocalProtocolError, RemoteProtocolError, printable
from vmbus.storage.images.nbd_wire import (
    CLIENT_FLAGS,
    NBD_MAGIC,
    OLDSTYLE_MAGIC,
    OPTION_MAGIC,
    OPTION_REPLY_MAGIC,
    REQUEST_MAGIC,
    SIMPLE_MAGIC,
    STRUCTURED_MAGIC,
    BlockSizeInfo,
    BlockStatusEntry,
    ChunkFlags,
    ChunkType,
    Command,
    ExportInfo,
    Greeting,
    HandshakeFlags,
    InfoType,
    OptionHeader,
    OptionReply,
    OptionReplyHeader,
    OptionType,
    Request,
    SimpleReply,
    StructuredReply,
)

__all__ = ["Export", "NbdClient", "Reply", "describe"]

_log = logging.getLogger(__name__)

ALLOCATION = b"base:allocation"
DEFAULT_MAXIMUM = 32 << 20
"""Bytes of the largest request where the server says nothing, as the protocol recommends."""
_MAX_OPTION_REPLY = 64 << 10
_MAX_STATUS_REPLY = 8 << 20
_MAX_ERROR_REPLY = 64 << 10  # of all error chunks of one reply
_MAX_ANSWERS = 16

Steps = Generator[int, bytes, None]
"""Part of the protocol: yields how many bytes it needs next, is sent exactly these."""

_REFUSALS = {
    OptionReply.ERR_UNKNOWN: "there is no such export",
    OptionReply.ERR_TLS_REQD: "it wants TLS (nbds:// or nbds+unix://)",
    OptionReply.ERR_POLICY: "its policy forbids it",
    OptionReply.ERR_SHUTDOWN: "it is shutting down",
    OptionReply.ERR_BLOCK_SIZE_REQD: "it wants block sizes that were not agreed on",
}


@dataclass
class Export:
    """What the server offers.

    Attributes:
        size: bytes.
        flags: `TransmissionFlags`.
        minimum_block: requests are multiples of this, bytes.
        preferred_block: requests best are multiples of this, bytes.
        maximum_block: bytes of the largest read or write.
        allocation_context: the id under which block status comes, None if the server does not know it.
    """

    size: int = -1
    flags: int = 0
    minimum_block: int = 1
    preferred_block: int = 4096
    maximum_block: int = DEFAULT_MAXIMUM
    allocation_context: int | None = None
    structured: bool = False


@dataclass
class Reply:
    """What became of a request.

    Attributes:
        error: the server's error number (Linux values), 0 if all went well.
        message: the server's own words, if it had any.
        data: of a read.
        status: of a block status request: (length, `StatusFlags`) from its offset on.
    """

    command: int
    offset: int
    length: int
    error: int = 0
    message: str = ""
    data: bytearray = field(default_factory=bytearray)
    status: list[tuple[int, int]] = field(default_factory=list)
    done: bool = False
    covered: list[tuple[int, int]] = field(default_factory=list)
    missing: int = 0
    error_bytes: int = 0


class NbdClient:
    """One connection.

    Send what is in `outgoing`, read exactly `needs` bytes, `feed` them, and look at what changed.

    Args:
        name: the export; the empty name is the server's default.
        tls: encrypt the connection, or give it up.

    Attributes:
        outgoing: bytes to be sent; take them away.
        needs: how many bytes have to be fed next.
        wants_tls: everything from here on, `outgoing` first of all, has to be encrypted; take the mark away.
        ready: the handshake is over, requests may be submitted.
        export: what the server offers, complete when `ready`.
    """

    def __init__(self, name: str, *, tls: bool = False) -> None:
        self.outgoing = bytearray()
        self.wants_tls = False
        self._tls = tls
        self.ready = False
        self.export = Export()
        self._name = name.encode()
        if len(self._name) > 4096:
            raise LocalProtocolError("the name of an NBD export has at most 4096 bytes")
        self._replies: dict[int, Reply] = {}
        self._next_cookie = 1
        self._completed = 0
        self._steps = self._run()
        self.needs = next(self._steps)

    def feed(self, data: bytes) -> bool:
        """Take the next `needs` bytes from the server.

        Returns:
            Whether they completed the reply to a request.

        Raises:
            RemoteProtocolError: the server broke the protocol; the connection is of no use any more.
            DeviceError: the server refuses the export.
        """
        if len(data) != self.needs:
            raise LocalProtocolError(f"{len(data)} bytes fed, {self.needs} needed")
        before = self._completed
        self.needs = self._steps.send(data)
        return self._completed > before

    def submit(self, command: Command, offset: int, length: int, data: bytes = b"", flags: int = 0) -> int:
        """Queue a request in `outgoing` and return its cookie.

        Raises:
            LocalProtocolError: before the handshake is over.
        """
        if not self.ready:
            raise LocalProtocolError("NBD requests come after the handshake")
        cookie = self._next_cookie
        self._next_cookie += 1
        reply = Reply(command, offset, length, missing=length)
        self._replies[cookie] = reply
        self.outgoing += Request(REQUEST_MAGIC, flags, command, cookie, offset, length).pack() + data
        return cookie

    def disconnect(self) -> None:
        """Queue the polite end of the connection; there is no answer to it."""
        if self.ready:
            self.outgoing += Request(REQUEST_MAGIC, 0, Command.DISCONNECT, 0, 0, 0).pack()
        else:
            self.outgoing += self._option(OptionType.ABORT, b"")

    def is_done(self, cookie: int) -> bool:
        """Whether the reply to a request is complete."""
        return self._replies[cookie].done

    def take(self, cookie: int) -> Reply:
        """The complete reply to a request; forgets the request."""
        return self._replies.pop(cookie)

    # Handshake.

    def _run(self) -> Steps:
        yield from self._handshake()
        self.ready = True
        while True:
            yield from self._reply()

    @staticmethod
    def _option(option: OptionType, data: bytes) -> bytes:
        return OptionHeader(OPTION_MAGIC, option, len(data)).pack() + data

    def _handshake(self) -> Steps:
        greeting = Greeting.unpack((yield Greeting.SIZE))
        if greeting.magic != NBD_MAGIC or greeting.option_magic != OPTION_MAGIC:
            if greeting.option_magic == OLDSTYLE_MAGIC:
                raise RemoteProtocolError("the NBD server speaks the old handshake, which is not supported")
            raise RemoteProtocolError("the server does not speak NBD")
        if not greeting.flags & HandshakeFlags.FIXED_NEWSTYLE:
            raise RemoteProtocolError("the NBD server does not know the fixed newstyle handshake")
        no_zeroes = greeting.flags & HandshakeFlags.NO_ZEROES
        flags = CLIENT_FLAGS if no_zeroes else HandshakeFlags.FIXED_NEWSTYLE
        self.outgoing += struct.pack(">I", flags)
        if self._tls:
            yield from self._encrypt()
        yield from self._negotiate_structured_replies()
        name = struct.pack(">I", len(self._name)) + self._name
        self.outgoing += self._option(OptionType.GO, name + struct.pack(">HH", 1, InfoType.BLOCK_SIZE))
        refused = yield from self._answers(OptionType.GO, self._take_info)
        if refused == OptionReply.ERR_UNSUP:
            # The option from before 2017: no answer but the export's size, or the end of the connection.
            self.outgoing += self._option(OptionType.EXPORT_NAME, self._name)
            info = ExportInfo.unpack((yield ExportInfo.SIZE))
            if not no_zeroes:
                yield 124
            self.export.size, self.export.flags = info.size, info.flags
        elif refused:
            raise DeviceError(
                f"the NBD server refuses the export {self._name.decode()!r}: {_reason(refused)}"
            )
        export = self.export
        if not 0 <= export.size < 1 << 63:
            raise RemoteProtocolError("the NBD server did not say how large the export is")

    def _encrypt(self) -> Generator[int, bytes, None]:
        """Before anything is said: what was said in the clear would have to be said again."""
        self.outgoing += self._option(OptionType.START_TLS, b"")
        refused = yield from self._answers(OptionType.START_TLS, None)
        if refused:
            reason = "it has no TLS" if refused == OptionReply.ERR_UNSUP else _reason(refused)
            raise DeviceError(f"the NBD server refuses to encrypt the connection: {reason}")
        self.wants_tls = True

    def _negotiate_structured_replies(self) -> Generator[int, bytes, None]:
        self.outgoing += self._option(OptionType.STRUCTURED_REPLY, b"")
        refused = yield from self._answers(OptionType.STRUCTURED_REPLY, None)
        if refused:
            return
        self.export.structured = True
        query = struct.pack(">I", len(self._name)) + self._name
        query += struct.pack(">II", 1, len(ALLOCATION)) + ALLOCATION
        self.outgoing += self._option(OptionType.SET_META_CONTEXT, query)
        yield from self._answers(OptionType.SET_META_CONTEXT, self._take_context)

    def _answers(
        self, option: OptionType, take: Callable[[int, bytes], None] | None
    ) -> Generator[int, bytes, int]:
        """All answers to an option: 0, or the type of the error that ended them."""
        for _ in range(_MAX_ANSWERS):
            reply = OptionReplyHeader.unpack((yield OptionReplyHeader.SIZE))
            if reply.magic != OPTION_REPLY_MAGIC or reply.option != option:
                raise RemoteProtocolError("the NBD server's answer is to another option")
            if reply.length > _MAX_OPTION_REPLY:
                raise RemoteProtocolError(f"an NBD option's answer of {reply.length} bytes is absurd")
            data = (yield reply.length) if reply.length else b""
            if reply.type == OptionReply.ACK:
                return 0
            if reply.type >= OptionReply.ERROR:
                return reply.type
            if take is not None:
                take(reply.type, data)
        raise RemoteProtocolError("the NBD server answers an option without an end")

    def _take_info(self, reply_type: int, data: bytes) -> None:
        if reply_type != OptionReply.INFO or len(data) < 2:
            return
        (kind,) = struct.unpack_from(">H", data)
        if kind == InfoType.EXPORT:
            info = ExportInfo.unpack(data, 2)
            self.export.size, self.export.flags = info.size, info.flags
        elif kind == InfoType.BLOCK_SIZE:
            sizes = BlockSizeInfo.unpack(data, 2)
            minimum, maximum = sizes.minimum, sizes.maximum
            if not minimum or minimum & (minimum - 1) or minimum > 65536 or maximum < minimum:
                raise RemoteProtocolError(f"NBD block sizes from {minimum} to {maximum} are not possible")
            self.export.minimum_block, self.export.preferred_block = minimum, sizes.preferred
            self.export.maximum_block = min(maximum, DEFAULT_MAXIMUM)

    def _take_context(self, reply_type: int, data: bytes) -> None:
        if reply_type == OptionReply.META_CONTEXT and data[4:] == ALLOCATION:
            (self.export.allocation_context,) = struct.unpack_from(">I", data)

    # Transmission.

    def _reply(self) -> Steps:
        (magic,) = struct.unpack(">I", (yield 4))
        if magic == SIMPLE_MAGIC:
            simple = SimpleReply.unpack((yield SimpleReply.SIZE))
            reply = self._pending(simple.cookie)
            if self.export.structured and reply.command == Command.READ and not simple.error:
                raise RemoteProtocolError("the NBD server answers a read without structure")
            reply.error = _error(simple.error)
            if reply.command == Command.READ and not simple.error:
                reply.data = bytearray((yield reply.length))
            reply.done = True
            self._completed += 1
        elif magic == STRUCTURED_MAGIC and self.export.structured:
            yield from self._chunk()
        else:
            raise RemoteProtocolError(f"an NBD reply begins with 0x{magic:08x}")

    def _pending(self, cookie: int) -> Reply:
        reply = self._replies.get(cookie)
        if reply is None or reply.done:
            raise RemoteProtocolError(f"the NBD server answers request {cookie}, which is not pending")
        return reply

    def _chunk(self) -> Steps:
        chunk = StructuredReply.unpack((yield StructuredReply.SIZE))
        reply = self._pending(chunk.cookie)
        if chunk.type & ChunkType.ERROR_BIT:
            if not 6 <= chunk.length <= _MAX_ERROR_REPLY:
                raise RemoteProtocolError(f"an NBD error of {chunk.length} bytes is not possible")
            reply.error_bytes += chunk.length
            if reply.error_bytes > _MAX_ERROR_REPLY:
                raise RemoteProtocolError("the NBD server reports errors without an end")
            data = yield chunk.length
            error, length = struct.unpack_from(">IH", data)
            reply.error = reply.error or _error(error or errno.EIO)
            reply.message = data[6 : 6 + length].decode("utf-8", "replace")
        elif chunk.type == ChunkType.NONE:
            if chunk.length or not chunk.flags & ChunkFlags.DONE:
                raise RemoteProtocolError("an NBD chunk of no type has content")
        elif reply.command == Command.READ:
            yield from self._read_chunk(reply, chunk)
        elif reply.command == Command.BLOCK_STATUS and chunk.type == ChunkType.BLOCK_STATUS:
            yield from self._status_chunk(reply, chunk)
        else:
            raise RemoteProtocolError(f"NBD chunk type {chunk.type} does not answer command {reply.command}")
        if chunk.flags & ChunkFlags.DONE:
            self._complete(reply)

    def _read_chunk(self, reply: Reply, chunk: StructuredReply) -> Steps:
        if len(reply.data) != reply.length:
            reply.data = bytearray(reply.length)
        if chunk.type == ChunkType.OFFSET_HOLE and chunk.length == 12:
            offset, length = struct.unpack(">QI", (yield 12))
            self._cover(reply, offset, length)
        elif chunk.type == ChunkType.OFFSET_DATA and 8 < chunk.length <= reply.length + 8:
            (offset,) = struct.unpack(">Q", (yield 8))
            length = chunk.length - 8
            self._cover(reply, offset, length)
            at = offset - reply.offset
            reply.data[at : at + length] = yield length
        else:
            raise RemoteProtocolError(f"an NBD read is answered by {chunk.length} bytes of type {chunk.type}")

    @staticmethod
    def _cover(reply: Reply, offset: int, length: int) -> None:
        """Note a stretch of a read's data; together they are never more than was asked for."""
        inside = reply.offset <= offset and offset + length <= reply.offset + reply.length
        if not inside or not 0 < length <= reply.missing:
            raise RemoteProtocolError("the NBD server sends data that were not asked for")
        reply.missing -= length
        reply.covered.append((offset, length))

    def _status_chunk(self, reply: Reply, chunk: StructuredReply) -> Steps:
        body = chunk.length - 4
        if body < 8 or body % 8 or body > _MAX_STATUS_REPLY:
            raise RemoteProtocolError(f"an NBD block status of {chunk.length} bytes is not possible")
        (context,) = struct.unpack(">I", (yield 4))
        data = yield body
        if context != self.export.allocation_context or reply.status:
            raise RemoteProtocolError("the NBD server sends a block status that was not asked for")
        for at in range(0, body, BlockStatusEntry.SIZE):
            entry = BlockStatusEntry.unpack(data, at)
            if not entry.length:
                raise RemoteProtocolError("an NBD block status covers nothing")
            reply.status.append((entry.length, entry.flags))

    def _complete(self, reply: Reply) -> None:
        reply.done = True
        self._completed += 1
        if reply.error:
            return
        if reply.command == Command.READ:
            at = reply.offset
            for offset, length in sorted(reply.covered):
                if offset != at:
                    break
                at += length
            if at != reply.offset + reply.length or reply.missing:
                raise RemoteProtocolError("the NBD server's data leave a gap or overlap")
            reply.covered.clear()
        elif reply.command == Command.BLOCK_STATUS and not reply.status:
            raise RemoteProtocolError("an NBD block status was not sent")


def _reason(refused: int) -> str:
    """Why an option was refused, in words."""
    return _REFUSALS[OptionReply(refused)] if refused in _REFUSALS else f"error 0x{refused:x}"


def _error(number: int) -> int:
    """An error number as this host knows it."""
    return number if number in errno.errorcode or not number else errno.EIO


def describe(reply: Reply) -> str:
    """The error of a reply in words."""
    return printable(reply.message, 200) or os.strerror(reply.error)

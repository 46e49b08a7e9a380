"""The structures of the Network Block Device protocol (the NBD project's doc/proto.md). All are big-endian."""

from enum import IntEnum

from vmbus.wire import U16, U32, U64, Structure, wire

__all__ = [
    "CLIENT_FLAGS",
    "NBD_MAGIC",
    "OLDSTYLE_MAGIC",
    "OPTION_MAGIC",
    "OPTION_REPLY_MAGIC",
    "REQUEST_MAGIC",
    "SIMPLE_MAGIC",
    "STRUCTURED_MAGIC",
    "BlockSizeInfo",
    "BlockStatusEntry",
    "ChunkFlags",
    "ChunkType",
    "Command",
    "CommandFlags",
    "ExportInfo",
    "Greeting",
    "HandshakeFlags",
    "InfoType",
    "OptionHeader",
    "OptionReply",
    "OptionReplyHeader",
    "OptionType",
    "Request",
    "SimpleReply",
    "StatusFlags",
    "StructuredReply",
    "TransmissionFlags",
]

NBD_MAGIC = 0x4E42444D41474943
OPTION_MAGIC = 0x49484156454F5054
OLDSTYLE_MAGIC = 0x00420281861253
OPTION_REPLY_MAGIC = 0x0003E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_MAGIC = 0x67446698
STRUCTURED_MAGIC = 0x668E33EF
CLIENT_FLAGS = 3
"""The client's half of `HandshakeFlags`, both set."""


class HandshakeFlags(IntEnum):
    """Bits of the server's greeting."""

    FIXED_NEWSTYLE = 1
    NO_ZEROES = 2


class OptionType(IntEnum):
    """What a client asks for before the transmission."""

    EXPORT_NAME = 1
    ABORT = 2
    START_TLS = 5
    GO = 7
    STRUCTURED_REPLY = 8
    SET_META_CONTEXT = 10


class OptionReply(IntEnum):
    """Types of answers to options; those from `ERROR` on refuse."""

    ACK = 1
    INFO = 3
    META_CONTEXT = 4
    ERROR = 1 << 31
    ERR_UNSUP = (1 << 31) + 1
    ERR_POLICY = (1 << 31) + 2
    ERR_TLS_REQD = (1 << 31) + 5
    ERR_UNKNOWN = (1 << 31) + 6
    ERR_SHUTDOWN = (1 << 31) + 7
    ERR_BLOCK_SIZE_REQD = (1 << 31) + 8


class InfoType(IntEnum):
    """Kinds of information in the answer to `OptionType.GO`."""

    EXPORT = 0
    BLOCK_SIZE = 3


class TransmissionFlags(IntEnum):
    """What an export can do."""

    HAS_FLAGS = 1
    READ_ONLY = 2
    SEND_FLUSH = 4
    SEND_FUA = 8
    SEND_TRIM = 32
    SEND_WRITE_ZEROES = 64


class Command(IntEnum):
    """Requests of the transmission phase."""

    READ = 0
    WRITE = 1
    DISCONNECT = 2
    FLUSH = 3
    TRIM = 4
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CommandFlags(IntEnum):
    """Bits of a request."""

    FUA = 1
    NO_HOLE = 2


class ChunkFlags(IntEnum):
    """Bits of a structured reply's chunk."""

    DONE = 1


class ChunkType(IntEnum):
    """Types of chunks; those with bit 15 are errors."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    ERROR_BIT = 1 << 15


class StatusFlags(IntEnum):
    """Bits of the ``base:allocation`` context."""

    HOLE = 1
    ZERO = 2


@wire(size=18, byte_order=">")
class Greeting(Structure):
    """What a newstyle server says first."""

    magic: U64
    option_magic: U64
    flags: U16


@wire(size=16, byte_order=">")
class OptionHeader(Structure):
    """An option; `length` bytes follow."""

    magic: U64
    option: U32
    length: U32


@wire(size=20, byte_order=">")
class OptionReplyHeader(Structure):
    """An answer to an option; `length` bytes follow."""

    magic: U64
    option: U32
    type: U32
    length: U32


@wire(size=10, byte_order=">")
class ExportInfo(Structure):
    """Size in bytes and `TransmissionFlags` of an export."""

    size: U64
    flags: U16


@wire(size=12, byte_order=">")
class BlockSizeInfo(Structure):
    """An export's constraints on requests, bytes."""

    minimum: U32
    preferred: U32
    maximum: U32


@wire(size=28, byte_order=">")
class Request(Structure):
    """A request; a write's data follow."""

    magic: U32
    flags: U16
    command: U16
    cookie: U64
    offset: U64
    length: U32


@wire(size=12, byte_order=">")
class SimpleReply(Structure):
    """What follows the magic number of a simple reply; a read's data follow."""

    error: U32
    cookie: U64


@wire(size=16, byte_order=">")
class StructuredReply(Structure):
    """What follows the magic number of a structured reply's chunk; `length` bytes follow."""

    flags: U16
    type: U16
    cookie: U64
    length: U32


@wire(size=8, byte_order=">")
class BlockStatusEntry(Structure):
    """A stretch of bytes with one state."""

    length: U32
    flags: U32

"""How a binary structure is declared: once, with its widths in the annotations.

    @wire(size=16)
    class PacketDescriptor(Structure):
        type: U16
        data_offset8: U16
        length8: U16
        flags: U16
        transaction_id: U64

gives a slotted dataclass with `pack()`, `unpack(buffer, offset)`, `SIZE` and `OFFSETS`. Fields of integers
stay plain `int`, so that unknown values of an enumeration parse; compare them with `IntEnum` members.
Other wire structures nest as fields. VMBus is little-endian; the few formats that are not (VHD, NBD) say
``@wire(size=…, byte_order=">")``.
"""

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from types import MappingProxyType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    Self,
    TypeAlias,
    TypeVar,
    cast,
    dataclass_transform,
    get_type_hints,
)
from uuid import UUID

from vmbus.errors import LocalProtocolError, RemoteProtocolError

__all__ = ["I32", "I64", "U8", "U16", "U32", "U64", "Fixed", "Guid", "Structure", "wire"]

Buffer: TypeAlias = bytes | bytearray | memoryview


@dataclass(frozen=True)
class Format:
    """The `struct` format character of an integer field."""

    code: str


@dataclass(frozen=True)
class Fixed:
    """A field of exactly `size` raw bytes: ``Annotated[bytes, Fixed(240)]``; shorter values are zero-padded."""

    size: int


U8: TypeAlias = Annotated[int, Format("B")]
U16: TypeAlias = Annotated[int, Format("H")]
U32: TypeAlias = Annotated[int, Format("I")]
U64: TypeAlias = Annotated[int, Format("Q")]
I32: TypeAlias = Annotated[int, Format("i")]
I64: TypeAlias = Annotated[int, Format("q")]
Guid: TypeAlias = UUID
"""A GUID field, 16 bytes in Microsoft's mixed-endian order (`UUID.bytes_le`); `UUID.bytes` if big-endian."""

T = TypeVar("T", bound="Structure")


class Structure:
    """Base of all wire structures; `wire` fills in the class variables."""

    __slots__ = ()
    SIZE: ClassVar[int]
    OFFSETS: ClassVar[Mapping[str, int]]
    _struct: ClassVar[struct.Struct]
    _convert: ClassVar[tuple[tuple[int, int, Any], ...]]
    _fixed: ClassVar[tuple[tuple[str, int], ...]]
    _integers: ClassVar[Callable[[Any], Sequence[int]] | None]

    def pack(self) -> bytes:
        """The structure's `SIZE` bytes.

        Raises:
            LocalProtocolError: a field's value does not fit its width.
        """
        try:
            # Structures of integers alone, the most, need no look at each field.
            integers = type(self)._integers
            return self._struct.pack(*(integers(self) if integers is not None else self._values()))
        except struct.error as error:
            raise LocalProtocolError(f"{self!r} cannot be packed: {error}") from None

    def _values(self) -> list[Any]:
        values: list[Any] = []
        for name, size in self._fixed:  # `struct` would cut it silently
            if len(getattr(self, name)) > size:
                raise LocalProtocolError(f"{type(self).__name__}.{name} is longer than its {size} bytes")
        for name in self.OFFSETS:
            value = getattr(self, name)
            if isinstance(value, Structure):
                values += value._values()
            else:
                values.append(self._guid_bytes(value) if isinstance(value, UUID) else value)
        return values

    @classmethod
    def _guid_bytes(cls, value: UUID) -> bytes:
        return value.bytes if cls._struct.format[0] == ">" else value.bytes_le

    @classmethod
    def unpack(cls, buffer: Buffer, offset: int = 0) -> Self:
        """Parse `SIZE` bytes at `offset`.

        Raises:
            RemoteProtocolError: the buffer is too short.
        """
        try:
            if offset < 0:  # `struct` would count it from the buffer's end
                raise RemoteProtocolError(f"{cls.__name__} at the negative offset {offset}")
            values = cls._struct.unpack_from(buffer, offset)
        except struct.error:
            have = max(0, len(buffer) - offset)
            raise RemoteProtocolError(f"truncated {cls.__name__}: {have} of {cls.SIZE} bytes") from None
        return cls._build(values)

    @classmethod
    def _build(cls, values: Sequence[Any]) -> Self:
        if not cls._convert:
            return cls(*values)
        result = list(values)
        for index, count, convert in cls._convert:  # from the last field to the first: indices stay valid
            result[index : index + count] = [convert(result[index : index + count])]
        return cls(*result)


def _guid(values: list[bytes]) -> UUID:
    return UUID(bytes_le=values[0])


def _guid_big_endian(values: list[bytes]) -> UUID:
    return UUID(bytes=values[0])


@dataclass_transform()
def wire(
    *, size: int, offsets: Mapping[str, int] | None = None, byte_order: Literal["<", ">"] = "<"
) -> Callable[[type[T]], type[T]]:
    """Declare a `Structure` of `size` bytes; `offsets` asserts the places of chosen fields at import.

    Args:
        size: the structure's size in bytes.
        offsets: byte offsets of chosen fields.
        byte_order: ``"<"`` for little-endian fields, ``">"`` for big-endian ones; nested structures must agree.

    Raises:
        TypeError: the declared fields do not give that size or those offsets.
    """

    def decorate(cls: type[T]) -> type[T]:
        hints = get_type_hints(cls, include_extras=True)
        made = dataclass(slots=True)(cls)
        code: str = byte_order
        places: dict[str, int] = {}
        convert: list[tuple[int, int, Any]] = []
        index = 0
        for field in fields(cast(Any, made)):  # the type checker does not see the decorator's effect
            places[field.name] = struct.calcsize(code)
            part, count, converter = _layout(hints[field.name], byte_order, f"{cls.__name__}.{field.name}")
            code += part
            if converter is not None:
                convert.append((index, count, converter))
            index += count
        made._struct = struct.Struct(code)
        made._convert = tuple(reversed(convert))
        made._fixed = tuple(
            (field.name, mark.size)
            for field in fields(cast(Any, made))
            for mark in getattr(hints[field.name], "__metadata__", ())
            if isinstance(mark, Fixed)
        )
        made._integers = attrgetter(*places) if len(places) > 1 and not convert and not made._fixed else None
        made.SIZE = made._struct.size
        made.OFFSETS = MappingProxyType(places)
        wrong = {
            name: (places.get(name), at) for name, at in (offsets or {}).items() if places.get(name) != at
        }
        if size != made.SIZE or wrong:
            raise TypeError(
                f"{cls.__name__}: size {made.SIZE}, declared {size}; (is, declared) offsets {wrong}"
            )
        return made

    return decorate


def _layout(hint: Any, order: str, where: str) -> tuple[str, int, Any]:
    """The `struct` format of one field, how many values it unpacks to, and what turns those into the field."""
    if hint is UUID:
        return "16s", 1, _guid if order == "<" else _guid_big_endian
    if isinstance(hint, type) and issubclass(hint, Structure):
        if hint._struct.format[0] != order:
            raise TypeError(f"{where}: {hint.__name__} has the other byte order")
        return hint._struct.format[1:], len(hint._struct.unpack(bytes(hint.SIZE))), hint._build
    for mark in getattr(hint, "__metadata__", ()):
        if isinstance(mark, Format):
            return mark.code, 1, None
        if isinstance(mark, Fixed):
            return f"{mark.size}s", 1, None
    raise TypeError(f"{where}: {hint!r} has no width; use U8…U64, Guid, Fixed or a wire structure")

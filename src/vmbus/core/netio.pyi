from collections.abc import Sequence
from typing import Any, Final, Self, final

from typing_extensions import disjoint_base

from vmbus.core.memory import Buffer, Window
from vmbus.core.ring import RingReader, RingWriter

DONE: Final[int]
SLOW: Final[int]
FULL: Final[int]
NO_SECTION: Final[int]

@disjoint_base
class _Sections:
    section_size: int
    count: int
    def __new__(cls, window: Window, section_size: int, count: int) -> Self: ...
    @property
    def available(self) -> int: ...
    def close(self) -> None: ...
    def take(self) -> int: ...
    def give(self, section: int) -> None: ...
    def write(self, section: int, data: Buffer, offset: int = 0) -> int: ...

@final
class ReceivePool(_Sections):
    def commit(self, sections: list[int], queue: int) -> int: ...
    def release(self, transaction_id: int, queue: int) -> bool: ...
    def drop(self, queue: int) -> int: ...
    def in_flight(self) -> dict[int, tuple[int, ...]]: ...

@final
class SendPool(_Sections): ...

@final
class HostQueue:
    frame_limit: int
    reserve: int
    violations: int
    filtered: int
    bytes_copied: int
    def __new__(
        cls,
        reader: RingReader,
        writer: RingWriter,
        pool: ReceivePool,
        queue: int,
        set_id: int,
        completion: bytes,
        packet: bytes,
    ) -> Self: ...
    def use_send_buffer(self, window: Window | None, section_size: int, count: int) -> None: ...
    def take_sent(self) -> tuple[int, int, int, int, int, int]: ...
    def take_received(self) -> tuple[int, int, int, int, int, int]: ...
    def drain(self, frames: list[bytes], limit: int) -> tuple[int, int, bool]: ...
    def deliver(
        self, frames: list[bytes], first: int, mac: int, packet_filter: int
    ) -> tuple[int, int, bool]: ...

@final
class GuestQueue:
    sent_frames: int
    sent_bytes: int
    failed_frames: int
    bytes_copied: int
    def __new__(
        cls,
        reader: RingReader,
        writer: RingWriter,
        pool: SendPool,
        receive: Window,
        section_size: int,
        section_count: int,
        set_id: int,
        message_size: int,
        packets_per_message: int,
        alignment: int,
    ) -> Self: ...
    def close(self) -> None: ...
    def send(self, frames: Sequence[Any], first: int) -> tuple[int, int, bool]: ...
    def drain(self, frames: list[bytes], limit: int) -> tuple[int, int, bool]: ...
    def complete(self, transaction_id: int, payload: bytes) -> bool: ...

from array import array
from collections.abc import Callable
from mmap import mmap
from typing import Any, final

from numpy.typing import NDArray

from vmbus.core.memory import Buffer, GuestMemory
from vmbus.core.ring import RingReader, RingWriter

EMPTY: int
MORE: int
DEFERRED: int
FULL: int
RING: int
DONE: int
STRAY: int
PROGRESS: int

@final
class Request:
    @property
    def write(self) -> bool: ...
    @property
    def offset(self) -> int: ...
    @property
    def length(self) -> int: ...
    def transfer(self, fd: int) -> None: ...
    def fetch(self) -> bytes: ...
    def store(self, data: Buffer) -> None: ...

@final
class Requests:
    def __len__(self) -> int: ...
    @property
    def write(self) -> bool: ...
    @property
    def length(self) -> int: ...
    @property
    def offsets(self) -> array[int]: ...
    def transfer(
        self, memory: GuestMemory, pfns: array[int] | NDArray[Any], first: int = 0, count: int = -1
    ) -> None: ...
    def transfer_file(self, fd: int, file_offsets: array[int] | NDArray[Any], count: int = -1) -> int: ...

@final
class BlockServer:
    signal: bool
    @property
    def packets(self) -> int: ...
    @property
    def bytes_copied(self) -> int: ...
    @property
    def backend_calls(self) -> int: ...
    def __new__(
        cls, incoming: RingReader, outgoing: RingWriter, memory: GuestMemory, path: int = -1
    ) -> BlockServer: ...
    def enable(
        self,
        target: int,
        lun: int,
        sector_size: int,
        sectors: int,
        writable: bool,
        *,
        fd: int = -1,
        mapping: memoryview | None = None,
        present: bytearray | mmap | None = None,
        handler: Callable[[Request], object] | None = None,
        batch: Callable[[Requests], int] | None = None,
        most: int = 0,
    ) -> bool: ...
    def disable(self, target: int, lun: int) -> None: ...
    def serve(self, limit: int = 64) -> int: ...

@final
class BlockClient:
    @property
    def sent(self) -> int: ...
    @property
    def received(self) -> int: ...
    @property
    def stale(self) -> int: ...
    def __new__(
        cls,
        outgoing: RingWriter,
        incoming: RingReader,
        memory: GuestMemory,
        target: int,
        lun: int,
        sector_size: int,
        packet_size: int,
    ) -> BlockClient: ...
    def begin(
        self,
        offsets: array[int] | NDArray[Any],
        pfns: array[int] | NDArray[Any],
        length: int,
        first_id: int,
        write: bool,
        depth: int,
    ) -> None: ...
    def step(self) -> int: ...
    def failures(self) -> list[int]: ...
    def results(self) -> list[bytes]: ...
    @property
    def busy(self) -> bool: ...
    def pending(self) -> list[int]: ...
    def abandon(self) -> None: ...

def run_without_gil(client: BlockClient, server: BlockServer) -> int: ...
def layout() -> dict[str, int]: ...

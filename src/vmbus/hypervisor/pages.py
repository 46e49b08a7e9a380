"""Message slots and event flags in the SIM and SIEF pages, through plain guest memory accesses."""

from vmbus.core.memory import GuestMemory
from vmbus.hypervisor.tlfs import MESSAGE_SIZE

__all__ = ["EventFlags", "MessageSlot"]


class MessageSlot:
    """The 256-byte slot of one SINT in a SIM page (TLFS 11.8.4): the hypervisor's side of it."""

    __slots__ = ("_gpa", "_memory")

    def __init__(self, memory: GuestMemory, page_gpa: int, sint: int) -> None:
        self._memory = memory
        self._gpa = page_gpa + sint * MESSAGE_SIZE

    def post(self, message_type: int, sender: int, payload: bytes) -> bool:
        """Put a message into the slot; when it is occupied, set its message-pending flag and return False."""
        memory, gpa = self._memory, self._gpa
        if memory.read(gpa, 4) != b"\0\0\0\0":
            memory.write(gpa + 5, b"\x01")
            if memory.read(gpa, 4) != b"\0\0\0\0":
                return False
        memory.write(gpa + 4, bytes((len(payload), 0, 0, 0)) + sender.to_bytes(8, "little") + payload)
        memory.write(gpa, message_type.to_bytes(4, "little"))
        return True


class EventFlags:
    """The 2048 event flags of one SINT in a SIEF page (TLFS 11.8.5): the hypervisor's side of them."""

    __slots__ = ("_gpa", "_memory")

    def __init__(self, memory: GuestMemory, page_gpa: int, sint: int) -> None:
        self._memory = memory
        self._gpa = page_gpa + sint * MESSAGE_SIZE

    def set(self, flag: int) -> bool:
        """Set one flag; whether it was clear before."""
        at, bit = self._gpa + flag // 8, 1 << flag % 8
        old = self._memory.read(at, 1)[0]
        if old & bit:
            return False
        self._memory.write(at, bytes((old | bit,)))
        return True

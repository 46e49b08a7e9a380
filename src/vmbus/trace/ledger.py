"""The ledger: exact counts of what the I/O paths did, per partition and per device.

Devices and providers hold an `Account` and add to its plain attributes; a report is made from a
snapshot, or from the difference of two.
"""

from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any

from vmbus.trace.names import hypercall_name

__all__ = ["Account", "Ledger"]


@dataclass(slots=True)
class Account:
    """What one device of one partition did. All values are counts, `bytes_copied` is in bytes.

    Attributes:
        exits: exits from the guest to the hypervisor, by reason (``"io_port"``, ``"mmio"``, ``"hypercall"`` …).
        instructions: guest instructions retired by an engine.
        hypercalls: by call code (TLFS appendix A); reports have the call's name instead, ``"HvCallSignalEvent"``.
        interrupts: interrupts delivered to the guest, by vector.
        doorbells_sent: signals sent to the peer of a channel.
        doorbells_suppressed: publishes and releases for which no signal was needed.
        hypercalls_saved: doorbells rung by a bit in the monitor page, where a hypercall would have been needed.
        packets_sent: packets written to rings.
        packets_received: packets read from rings.
        bytes_copied: payload bytes moved by a processor, that is not by the backend itself.
        backend_calls: calls into the physical backend (``preadv``, ``pwritev``, ``fsync`` …).
        dropped: frames that a network device lost, by reason; what a guest does not want (its packet filter) is none.
    """

    exits: Counter[str] = field(default_factory=Counter)
    instructions: int = 0
    hypercalls: Counter[int] = field(default_factory=Counter)
    interrupts: Counter[int] = field(default_factory=Counter)
    doorbells_sent: int = 0
    doorbells_suppressed: int = 0
    hypercalls_saved: int = 0
    packets_sent: int = 0
    packets_received: int = 0
    bytes_copied: int = 0
    backend_calls: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def __repr__(self) -> str:
        """Only what is not zero."""
        counts = [
            f"{f.name}={_shown(f.name, getattr(self, f.name))}" for f in fields(self) if getattr(self, f.name)
        ]
        return f"Account({', '.join(counts)})"

    def copy(self) -> "Account":
        """An independent snapshot."""
        return self + Account()

    def __add__(self, other: "Account") -> "Account":
        result = Account()
        for f in fields(Account):
            setattr(result, f.name, getattr(self, f.name) + getattr(other, f.name))
        return result

    def __sub__(self, earlier: "Account") -> "Account":
        """What was added since the snapshot `earlier`."""
        result = Account()
        for f in fields(Account):
            setattr(result, f.name, getattr(self, f.name) - getattr(earlier, f.name))
        return result

    def to_dict(self) -> dict[str, Any]:
        """Plain, JSON-ready values; counters become mappings from the key's text to the count."""
        result: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Counter):
                value = {_key(f.name, k): n for k, n in sorted(value.items(), key=lambda item: str(item[0]))}
            result[f.name] = value
        return result


def _shown(field: str, value: Any) -> str:
    if not isinstance(value, Counter):
        return str(value)
    return f"{{{', '.join(f'{_key(field, key)}: {count}' for key, count in value.items())}}}"


def _key(field: str, key: int | str) -> str:
    if isinstance(key, str):
        return key
    return hypercall_name(key) if field == "hypercalls" else f"0x{key:x}"


class Ledger:
    """All accounts of one hypervisor instance, by partition name and device name."""

    def __init__(self) -> None:
        self._accounts: dict[tuple[str, str], Account] = {}

    def __repr__(self) -> str:
        return f"<Ledger of {len(self._accounts)} accounts: {', '.join(map(repr, self.to_dict()))}>"

    def account(self, partition: str, device: str = "") -> Account:
        """The account of one device, made on first use; device ``""`` is the partition's processors."""
        return self._accounts.setdefault((partition, device), Account())

    def accounts(self) -> dict[tuple[str, str], Account]:
        """All accounts by (partition, device)."""
        return dict(self._accounts)

    def total(self, partition: str | None = None) -> Account:
        """The sum over all devices of one partition, or of all partitions."""
        chosen = [a for (p, _), a in self._accounts.items() if partition is None or p == partition]
        return sum(chosen, Account())

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain values by ``"partition/device"``."""
        return {f"{p}/{d}" if d else p: a.to_dict() for (p, d), a in self._accounts.items()}

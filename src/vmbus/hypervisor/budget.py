"""What one partition's guest may make its host spend: limits, and the accounts that are charged.

A hostile guest cannot leave its partition, but it can ask for more than a host has: rings of scattered pages, each of
which is a mapping of the process, descriptors, page lists, messages that it never reads, partitions of its own. All
partitions of a process share these, so each has a `Budget`. Whoever takes something on a guest's behalf charges the
guest's `Meter` first; what goes beyond the budget is refused with `BudgetExceeded`, which costs the one who asked and
nobody else.

Mappings and descriptors are limited for the whole process by the operating system. There a partition is also refused
what would leave too little for the others: every partition is sure of a small part, and what goes beyond it comes
out of a pool (`ProcessPool`) that never takes all.
"""

import resource
import threading
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

from vmbus.errors import BudgetExceeded

__all__ = ["Allowance", "Budget", "Meter", "ProcessPool"]

_LOCK: Final = threading.RLock()
"""Of every account: charges are rare. Reentrant, since a window may be given back in the middle of anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Limits of what one partition's guest may make its host spend; None is no limit.

    The partitions that a guest makes by hypercall spend its budget.

    Attributes:
        mappings: memory mappings of the process (``vm.max_map_count``): a ring costs one for each run of adjacent
            pages, twice for the data area that is mapped in a row with itself, and two for its guard pages. A channel
            with rings of contiguous pages, as Linux and Windows allocate them, costs 8; a network buffer of 16 MiB
            that was put together from single pages, the worst that Linux' ``vzalloc`` can do, 4098. Debian with a disk
            and two network adapters takes 131 in all.
        descriptors: descriptors that the guest makes the process open: the doorbells of a child process, one for each
            channel that it rings. Beyond it, rings go through the child's socket.
        gpadls: GPADLs at once. A ring and a buffer for each of a few hundred channels fit.
        gpadl_pages: page numbers of GPADLs that the host keeps, 8 bytes each: enough to describe 8 GiB, where a
            guest with 8 network adapters and 64 storage channels describes 0.3.
        backlog: messages that wait in the host because the guest does not read them; all offers that there can be fit.
            Beyond it, the connection is reset.
        host_memory: bytes of the host's own memory that hypercalls make it allocate for partitions, ports,
            connections and pages lent to children; a partition costs 5 MiB
            (`vmbus.hypervisor.hypervisor.PARTITION_COST`). Guests without the privilege to create partitions use none.
        disk_growth: bytes by which the guest's disks may grow in the host (image blocks, holes of raw files, pages
            of memory disks) beyond what is allocated when they are attached; None: up to the disks' sizes.

    Raises:
        ValueError: a limit is negative, or no whole number.
    """

    mappings: int | None = 16_384
    descriptors: int | None = 512
    gpadls: int | None = 4096
    gpadl_pages: int | None = 1 << 21
    backlog: int | None = 8192
    host_memory: int | None = 256 << 20
    disk_growth: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            limit = getattr(self, field.name)
            if limit is not None and (not isinstance(limit, int) or limit < 0):
                raise ValueError(f"a budget's {field.name} is a number from 0 up or None, not {limit!r}")

    @classmethod
    def unlimited(cls) -> "Budget":
        """No limit at all: for a guest that is trusted, and for the root partition."""
        return cls(**{field.name: None for field in fields(cls)})


class ProcessPool:
    """A resource that the operating system limits for the process as a whole.

    Args:
        capacity: how much partitions may use together, asked at each charge.
        assured: how much each partition can have whatever the others have taken, as long as there are no more than
            a quarter of the capacity has room for.

    Attributes:
        beyond: what partitions use together beyond their assured parts: at most three quarters of the capacity.
    """

    def __init__(self, capacity: Callable[[], int], assured: int) -> None:
        self.capacity = capacity
        self.assured = assured
        self.beyond = 0

    def excess(self, used: int) -> int:
        """How much of `used` the pool has to give."""
        return max(0, used - self.assured)

    def has(self, more: int, capacity: int) -> bool:
        """Whether `more` of a `capacity` can be given."""
        return more <= 0 or self.beyond + more <= capacity * 3 // 4


_MAPPINGS_LEFT: Final = 8192
"""Mappings of a process that are not its guests': libraries, thread stacks, allocators, engines."""
_DESCRIPTORS_LEFT: Final = 256
"""Descriptors of a process that are not its guests'."""
_UNKNOWN_MAP_COUNT: Final = 65_530
"""The kernel's default of ``vm.max_map_count``."""


def _mappings() -> int:
    try:
        most = int(Path("/proc/sys/vm/max_map_count").read_text())
    except (OSError, ValueError):  # a container may hide it
        most = _UNKNOWN_MAP_COUNT
    return max(0, most - _MAPPINGS_LEFT)


def _descriptors() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = soft if soft != resource.RLIM_INFINITY else 1 << 30
    return max(most // 4, most - _DESCRIPTORS_LEFT)


_POOLS: Final = {
    "mappings": ProcessPool(_mappings, 512),
    "descriptors": ProcessPool(_descriptors, 16),
}


class Allowance:
    """The account of one partition for one resource. Its methods may be called from any thread.

    Attributes:
        resource: the field of `Budget` that limits it.
        limit: the most that may be used at once, or None.
        used: what is used now.
        most: the most that was ever used.
        refused: how often something was refused.
    """

    __slots__ = ("_pool", "limit", "most", "owner", "refused", "resource", "used")

    def __init__(
        self, resource: str, limit: int | None, owner: str = "", pool: ProcessPool | None = None
    ) -> None:
        self.resource = resource
        self.owner = owner
        self.limit = limit
        self.used = 0
        self.most = 0
        self.refused = 0
        # What is not limited is the program's own doing, and takes nothing from the guests' pool.
        self._pool = pool if limit is not None else None

    def __repr__(self) -> str:
        limit = "no limit" if self.limit is None else f"limit {self.limit:,}"
        return f"<Allowance of {self.used:,} {self.resource} ({limit}), {self.refused} times refused>"

    def charge(self, amount: int = 1) -> None:
        """Use `amount` more.

        Raises:
            BudgetExceeded: that is more than the budget, or than what the process can spare; nothing was charged.
        """
        pool = self._pool
        capacity = 0 if pool is None else pool.capacity()
        with _LOCK:
            wanted = self.used + amount
            if self.limit is not None and wanted > self.limit:
                self._refuse(amount, f"of at most {self.limit:,}")
            if pool is not None and not pool.has(pool.excess(wanted) - pool.excess(self.used), capacity):
                self._refuse(amount, "and the process has no more to spare")
            self._change(amount)

    def release(self, amount: int = 1) -> None:
        """Use `amount` less."""
        self.adjust(-amount)

    def adjust(self, amount: int) -> None:
        """Use `amount` more or less, where it has happened already and cannot be refused.

        What takes memory away from a partition must never fail, even if it costs mappings. It goes beyond the limit
        then, and the next charge is refused.
        """
        with _LOCK:
            self._change(amount)

    def _refuse(self, amount: int, why: str) -> None:
        self.refused += 1
        who = f"{self.owner} asks" if self.owner else "a guest asks"
        what = self.resource.replace("_", " ")
        raise BudgetExceeded(f"{who} its host for {amount:,} {what} beside the {self.used:,} it has, {why}")

    def _change(self, amount: int) -> None:
        # The garbage collector may find a window inside of any call here, and give back what it took: on this thread,
        # through the lock. So nothing is called between the reading of a number and its writing.
        before = self.used
        self.used = used = before + amount
        self.most = max(self.most, used)
        if self._pool is not None:
            more = self._pool.excess(used) - self._pool.excess(before)
            self._pool.beyond += more
            # What takes of the process is not forgotten with whoever charged it: a window that outlives its partition
            # gives back what it took, also when the garbage collector finds both at once.
            (_KEPT.add if self.used else _KEPT.discard)(self)


_KEPT: Final[set[Allowance]] = set()
"""Accounts of which a process-wide resource is in use."""


class Meter:
    """The accounts of one partition: an `Allowance` for each field of `Budget`.

    Args:
        budget: the limits.
        owner: whose they are, for messages.
    """

    __slots__ = (
        "backlog",
        "budget",
        "descriptors",
        "disk_growth",
        "gpadl_pages",
        "gpadls",
        "host_memory",
        "mappings",
    )

    def __init__(self, budget: Budget, owner: str = "") -> None:
        def allowance(resource: str) -> Allowance:
            return Allowance(resource, getattr(budget, resource), owner, _POOLS.get(resource))

        self.budget = budget
        self.mappings = allowance("mappings")
        self.descriptors = allowance("descriptors")
        self.gpadls = allowance("gpadls")
        self.gpadl_pages = allowance("gpadl_pages")
        self.backlog = allowance("backlog")
        self.host_memory = allowance("host_memory")
        self.disk_growth = allowance("disk_growth")

    def __repr__(self) -> str:
        used = ", ".join(
            f"{field.name} {getattr(self, field.name).used:,}"
            for field in fields(self.budget)
            if getattr(self, field.name).used
        )
        return f"<Meter: {used or 'nothing used'}>"

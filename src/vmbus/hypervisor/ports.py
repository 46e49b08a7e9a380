"""Ports and connections: how one partition reaches another (TLFS chapter 11).

A port belongs to the partition that receives; a connection belongs to the one that sends and names a port.
Identifiers are per partition: nobody can name another partition's connection or port.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from vmbus.hypervisor.tlfs import PortType

if TYPE_CHECKING:
    from vmbus.hypervisor.partition import Partition

__all__ = ["Connection", "EventHandler", "MessageHandler", "Port"]

MessageHandler: TypeAlias = Callable[[int, int, bytes], None]
"""``handler(vp_index, message_type, payload)``: the index is the sending processor's."""
EventHandler: TypeAlias = Callable[[int], None]
"""``handler(flag)``."""


@dataclass(slots=True, eq=False)
class Port:
    """A receiver.

    Attributes:
        owner: the partition that receives.
        port_id: its 24-bit identifier there; 0 for ports of providers in this process.
        kind: `PortType`.
        target_vp: the processor whose SynIC receives; ``ANY_VP`` is served by the first one.
        target_sint: the SINT there.
        base_flag: the first event flag (event ports).
        flag_count: how many event flags the sender may name (event ports).
        connection_partition: the only partition that may connect.
        on_message: a provider in this process that takes the messages instead of a SynIC.
        on_event: a provider in this process that takes the events instead of a SynIC.
        monitor_gpa: the monitor page in the owner's memory (monitor ports).
        waiting: messages through this port that wait for their slot.
        posts: messages that have been posted to it since it was made.
        deleted: the port is gone; connections to it stay until their owner disconnects them.
        connections: the connections to it.
        cost: bytes of host memory that its owner's guest was charged for it; 0 for a provider's own.
    """

    owner: "Partition"
    port_id: int
    kind: PortType
    target_vp: int
    target_sint: int
    connection_partition: "Partition"
    base_flag: int = 0
    flag_count: int = 1
    on_message: MessageHandler | None = None
    on_event: EventHandler | None = None
    monitor_gpa: int = 0
    waiting: int = 0
    posts: int = 0
    deleted: bool = False
    cost: int = 0
    connections: "set[Connection]" = field(default_factory=set)


@dataclass(slots=True, eq=False)
class Connection:
    """A sender's name for a port; `cost` as the port's."""

    connection_id: int
    port: Port
    cost: int = 0

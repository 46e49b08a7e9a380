"""An offer: what a device says of a channel before anybody opens it."""

from dataclasses import dataclass, replace
from uuid import UUID

from vmbus.bus.wire import OfferChannel, OfferFlags

__all__ = ["Offer"]

USER_DEFINED_SIZE = 120
NO_MONITOR = 0xFF
"""`OfferChannel.monitor_id` of a channel without one: some guests look at nothing else (DPDK; hosts: OpenVMM)."""


@dataclass(frozen=True, slots=True)
class Offer:
    """One channel of a device, as its provider offers it.

    Attributes:
        interface_id: the kind of device (Linux: if_type); guests choose their driver by it.
        instance_id: this device; its sub-channels carry the same pair of ids.
        user_defined: up to 120 bytes for the device's own protocol (for pipes the first four name the pipe
            mode).
        flags: `OfferFlags`.
        mmio_megabytes: MMIO space that the guest's driver will need, in MiB.
        subchannel_index: 0 for the primary channel.
        monitor_latency: if not None, the guest may ring by monitored notification, and waits at most about
            this long, in nanoseconds.
        channel_id: the relid that the host gave (set in offers that a guest received; Linux: child_relid).
        connection_id: what the guest signals to ring the host.
        is_dedicated: the channel has a connection of its own; else the shared interrupt page says who rang.
        monitor_id: the channel's bit in the monitor pages, or None.

    Raises:
        ValueError: `user_defined` is too long, or a number does not fit its field.
    """

    interface_id: UUID
    instance_id: UUID
    user_defined: bytes = b""
    flags: int = OfferFlags.NONE
    mmio_megabytes: int = 0
    subchannel_index: int = 0
    monitor_latency: int | None = None
    channel_id: int = 0
    connection_id: int = 0
    is_dedicated: bool = True
    monitor_id: int | None = None

    def __post_init__(self) -> None:
        if len(self.user_defined) > USER_DEFINED_SIZE:
            raise ValueError(f"user_defined holds {USER_DEFINED_SIZE} bytes, not {len(self.user_defined)}")
        for name in ("flags", "mmio_megabytes", "subchannel_index"):
            if not 0 <= getattr(self, name) <= 0xFFFF:
                raise ValueError(f"{name} is a 16-bit number, not {getattr(self, name)}")

    def __repr__(self) -> str:
        data = self.user_defined.rstrip(b"\0")
        part = f" sub-channel {self.subchannel_index}" if self.subchannel_index else ""
        return (
            f"<Offer channel_id={self.channel_id}{part} interface_id={self.interface_id} "
            f"instance_id={self.instance_id}{f' user_defined={data!r}' if data else ''}>"
        )

    @property
    def key(self) -> tuple[UUID, UUID, int]:
        """What no two offers of one partition share."""
        return self.interface_id, self.instance_id, self.subchannel_index

    @property
    def is_subchannel(self) -> bool:
        """Whether this belongs to another, primary channel."""
        return self.subchannel_index != 0

    def subchannel(self, index: int) -> "Offer":
        """The offer of this device's sub-channel `index` (from 1 on)."""
        return replace(self, subchannel_index=index, channel_id=0, connection_id=0, monitor_id=None)

    def to_message(self) -> OfferChannel:
        """The OFFER_CHANNEL that announces it."""
        return OfferChannel(
            interface_id=self.interface_id,
            instance_id=self.instance_id,
            reserved=bytes(16),
            flags=self.flags,
            mmio_megabytes=self.mmio_megabytes,
            user_defined=self.user_defined.ljust(USER_DEFINED_SIZE, b"\0"),
            subchannel_index=self.subchannel_index,
            mmio_megabytes_optional=0,
            channel_id=self.channel_id,
            monitor_id=NO_MONITOR if self.monitor_id is None else self.monitor_id,
            monitor_allocated=int(self.monitor_id is not None),
            is_dedicated=int(self.is_dedicated),
            connection_id=self.connection_id,
        )

    @classmethod
    def from_message(cls, message: OfferChannel) -> "Offer":
        """What a guest learns from an OFFER_CHANNEL; `user_defined` keeps all of its 120 bytes."""
        return cls(
            interface_id=message.interface_id,
            instance_id=message.instance_id,
            user_defined=message.user_defined,
            flags=message.flags,
            mmio_megabytes=message.mmio_megabytes,
            subchannel_index=message.subchannel_index,
            channel_id=message.channel_id,
            connection_id=message.connection_id,
            is_dedicated=bool(message.is_dedicated & 1),
            monitor_id=message.monitor_id if message.monitor_allocated & 1 else None,
        )

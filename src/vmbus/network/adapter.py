"""A network adapter on a child's VMBus: what outlives the guest's opening and closing of its channels."""

from collections.abc import Callable
from uuid import UUID, uuid4

from vmbus.bus import Channel, Offer, Offered, VmbusHost
from vmbus.errors import RemoteProtocolError
from vmbus.network.switch import Port
from vmbus.network.vsp import NetworkVsp
from vmbus.network.vsp_oid import AdapterConfig, AdapterStatistics
from vmbus.network.wire import INTERFACE_ID

__all__ = ["NetworkAdapter"]


class NetworkAdapter:
    """Offers an adapter to a guest, serves it whenever the guest opens it, and offers its sub-channels.

    Attributes:
        config: the adapter.
        port: its port on the virtual switch.
        statistics: counters over all openings.
        vsp: the provider of the open channel, None while it is closed.
        on_data_path: called with True when the guest switches to its virtual function, False for back.
    """

    def __init__(
        self,
        host: VmbusHost,
        port: Port,
        config: AdapterConfig,
        *,
        instance_id: UUID | None = None,
        name: str = "",
        monitor_latency: int | None = None,
    ) -> None:
        """Offer the adapter.

        Args:
            host: the guest's bus, in the parent.
            port: a port of a switch.
            config: the adapter.
            instance_id: Linux derives the device's name in sysfs from it; random if not given.
            name: for the ledger.
            monitor_latency: let the guest ring by monitored notification, which may take this many nanoseconds
                (Hyper-V's adapters: 100 000); somebody must then poll the hypervisor's clock.
        """
        self.config = config
        self.port = port
        self.statistics = AdapterStatistics()
        self.vsp: NetworkVsp | None = None
        self.on_data_path: Callable[[bool], None] | None = None
        self._host = host
        self._name = name or f"net-{port.name}"
        self._link_up = True
        self._link_speed = config.link_speed
        self._vf: int | None = None
        self._subchannels: list[Offered] = []
        self._wanted = 0
        # Sub-channels are offered by a task of its own: nothing may be asked of the bus from inside of serving a
        # channel, because the bus may just be closing that channel and wait for its service to end.
        self._offerer = host.hosting.task(f"{self._name} sub-channels", self._offer_wanted)
        self._offer = Offer(INTERFACE_ID, instance_id or uuid4(), monitor_latency=monitor_latency)
        self._offered = host.offer(self._offer, self._open, self._close, name=self._name)

    def __repr__(self) -> str:
        use = "in use" if self.vsp is not None else "not opened"
        return f"<NetworkAdapter {self.config.mac.hex(':')} on {self.port!r}: {use}>"

    @property
    def link_up(self) -> bool:
        """Whether the cable is connected."""
        return self._link_up

    @property
    def is_listening(self) -> bool:
        """Whether the guest takes frames: its driver has opened the adapter and set a packet filter."""
        return self._link_up and self.vsp is not None and self.vsp.protocol.can_receive

    def set_link(self, up: bool) -> None:
        """Connect or disconnect the cable."""
        self._link_up = up
        if self.vsp is not None:
            self.vsp.set_link(up)

    def set_link_speed(self, bits_per_second: int) -> None:
        """Change the reported speed."""
        self._link_speed = bits_per_second
        if self.vsp is not None:
            self.vsp.set_link_speed(bits_per_second)

    def network_changed(self) -> None:
        """Make the guest renew its addresses."""
        if self.vsp is not None:
            self.vsp.network_changed()

    def associate_vf(self, serial: int | None) -> None:
        """Announce a virtual function, or with None its removal."""
        self._vf = serial
        if self.vsp is not None:
            self.vsp.associate_vf(serial)

    def remove(self) -> None:
        """Unplug the adapter: rescind its channels and leave the switch."""
        self._offered.rescind()
        self.port.disconnect()

    def _open(self, channel: Channel) -> None:
        vsp = NetworkVsp(
            channel,
            self.port,
            self.config,
            offer_subchannels=self._offer_subchannels,
            statistics=self.statistics,
        )
        vsp.protocol.set_link(self._link_up)
        vsp.protocol.oids.link_speed = self._link_speed
        vsp.protocol.vf_serial = self._vf
        vsp.on_data_path = self._data_path
        self.vsp = vsp

    def _close(self, channel: Channel) -> None:
        del channel
        self.vsp = None
        # The guest closes its sub-channels with the primary one; they are offered anew next time.
        self._wanted = 0
        self._host.hosting.ring(self._offerer)

    def _data_path(self, to_vf: bool) -> None:
        if self.on_data_path is not None:
            self.on_data_path(to_vf)

    def _offer_subchannels(self, count: int) -> None:
        self._wanted = count
        self._host.hosting.ring(self._offerer)

    def _offer_wanted(self) -> None:
        subchannels = self._subchannels
        while len(subchannels) < self._wanted:
            index = len(subchannels) + 1
            subchannels.append(
                self._host.offer(
                    self._offer.subchannel(index), self._opener(index), name=f"{self._name}.{index}"
                )
            )
        while len(subchannels) > self._wanted:  # the primary channel closed meanwhile
            offered = subchannels.pop()
            if offered.is_present:
                offered.rescind()

    def _opener(self, index: int) -> Callable[[Channel], None]:
        def opened(channel: Channel) -> None:
            if self.vsp is None:
                raise RemoteProtocolError("sub-channel opened after the primary channel closed")
            self.vsp.add_subchannel(index, channel)

        return opened

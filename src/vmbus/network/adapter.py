"""A network adapter on a child's VMBus: what outlives the guest's opening and closing of its channels."""

from collections.abc import Callable
from functools import partial
from uuid import UUID, uuid4

from vmbus.bus import Channel, Offer, Offered, VmbusHost
from vmbus.errors import RemoteProtocolError
from vmbus.network.switch import Port
from vmbus.network.vsp import NetworkVsp
from vmbus.network.vsp_delivery import MAX_BACKLOG
from vmbus.network.vsp_oid import AdapterConfig, AdapterState, AdapterStatistics
from vmbus.network.wire import INTERFACE_ID

__all__ = ["NetworkAdapter"]


class _Connection:
    """A guest's opening of the primary channel; sub-channels belong to one."""


class NetworkAdapter:
    """Offers an adapter to a guest, serves it whenever the guest opens it, and offers its sub-channels.

    Attributes:
        config: the adapter.
        port: its port on the virtual switch.
        state: what outlives a connection.
        account: where it counts in the ledger, with what the switch drops of its frames.
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
        self.state = AdapterState(config)
        self.vsp: NetworkVsp | None = None
        self.on_data_path: Callable[[bool], None] | None = None
        self._host = host
        self._name = name or f"net-{port.name}"
        # How many sub-channels the present connection wants, and what is offered, each with the connection that it
        # was offered for: only the task below changes the latter.
        self._wanted: tuple[_Connection | None, int] = (None, 0)
        self._subchannels: list[tuple[_Connection, Offered]] = []
        # Sub-channels are offered by a task of its own: nothing may be asked of the bus from inside of serving a
        # channel, because the bus may just be closing that channel and wait for its service to end.
        self._offerer = host.hosting.task(f"{self._name} sub-channels", self._offer_wanted)
        self._offer = Offer(INTERFACE_ID, instance_id or uuid4(), monitor_latency=monitor_latency)
        self._offered = host.offer(self._offer, self._open, self._close, name=self._name)
        self.account = port.account = self._offered.account
        port.room = lambda: self.room

    def __repr__(self) -> str:
        use = "in use" if self.vsp is not None else "not opened"
        return f"<NetworkAdapter {self.config.mac.hex(':')} on {self.port!r}: {use}>"

    @property
    def statistics(self) -> AdapterStatistics:
        """Counters over all connections."""
        return self.state.statistics

    @property
    def link_up(self) -> bool:
        """Whether the cable is connected."""
        return self.state.link_up

    @property
    def room(self) -> int:
        """How many frames the adapter takes now without dropping any; see `Delivery.room`."""
        vsp = self.vsp
        return MAX_BACKLOG if vsp is None else vsp.room

    @property
    def is_listening(self) -> bool:
        """Whether the guest takes frames: its driver has opened the adapter and set a packet filter."""
        vsp = self.vsp  # once: another thread may be closing its channel
        return self.link_up and vsp is not None and vsp.protocol.can_receive

    def set_link(self, up: bool) -> None:
        """Connect or disconnect the cable."""
        vsp = self.vsp
        if vsp is not None:
            vsp.set_link(up)
        self.state.link_up = up

    def set_link_speed(self, bits_per_second: int) -> None:
        """Change the reported speed."""
        vsp = self.vsp
        if vsp is not None:
            vsp.set_link_speed(bits_per_second)
        self.state.link_speed = bits_per_second

    def network_changed(self) -> None:
        """Make the guest renew its addresses."""
        vsp = self.vsp
        if vsp is not None:
            vsp.network_changed()

    def associate_vf(self, serial: int | None) -> None:
        """Announce a virtual function, or with None its removal."""
        vsp = self.vsp
        if vsp is not None:
            vsp.associate_vf(serial)
        self.state.vf_serial = serial

    def remove(self) -> None:
        """Unplug the adapter: rescind its channels and leave the switch."""
        self._offered.rescind()
        self.port.disconnect()

    def _open(self, channel: Channel) -> None:
        connection = _Connection()
        self._wanted = connection, 0  # first: the guest may have asked for some already
        self.vsp = NetworkVsp(
            channel,
            self.port,
            self.config,
            offer_subchannels=partial(self._offer_subchannels, connection),
            adapter=self.state,
        )
        self.vsp.on_data_path = self._data_path

    def _close(self, channel: Channel) -> None:
        del channel
        self.vsp = None
        # The guest closes its sub-channels with the primary one; they are offered anew next time.
        self._wanted = None, 0
        self._host.hosting.ring(self._offerer)

    def _data_path(self, to_vf: bool) -> None:
        if self.on_data_path is not None:
            self.on_data_path(to_vf)

    def _offer_subchannels(self, connection: _Connection, count: int) -> None:
        if self._wanted[0] is connection:
            self._wanted = connection, count
            self._host.hosting.ring(self._offerer)

    def _offer_wanted(self) -> None:
        """Offer what the present connection wants; those of an earlier one go first, even if it wants as many."""
        subchannels = self._subchannels
        while True:
            connection, count = self._wanted
            if subchannels and subchannels[-1][0] is not connection:
                _, offered = subchannels.pop()
                if offered.is_present:
                    offered.rescind()
            elif connection is not None and len(subchannels) < count:
                index = len(subchannels) + 1
                offer, opened = (
                    self._offer.subchannel(index),
                    partial(self._open_subchannel, connection, index),
                )
                offered = self._host.offer(offer, opened, name=f"{self._name}.{index}")
                subchannels.append((connection, offered))
            else:
                return

    def _open_subchannel(self, connection: _Connection, index: int, channel: Channel) -> None:
        if self._wanted[0] is not connection or self.vsp is None:
            raise RemoteProtocolError("sub-channel of a connection that the guest has closed")
        self.vsp.add_subchannel(index, channel)

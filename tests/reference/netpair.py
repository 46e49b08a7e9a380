"""Model guests with network adapters on one switch, over directly joined channels."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

from vmbus.bus.channel import Channel, loopback
from vmbus.core.memory import GuestMemory
from vmbus.network.switch import Port, Switch
from vmbus.network.vsc import NetworkVsc, default_page_count
from vmbus.network.vsc_protocol import GuestConfig
from vmbus.network.vsp import NetworkVsp
from vmbus.network.vsp_oid import AdapterConfig

FIRST_PAGE = 64


def mac(number: int) -> bytes:
    return b"\x00\x15\x5d\0\0" + bytes([number])


@dataclass
class Guest:
    """One guest: its memory, both ends of its channel, the provider and, once started, the client."""

    memory: GuestMemory
    guest_end: Channel
    host_end: Channel
    port: Port
    vsp: NetworkVsp
    granted: list[int] = field(default_factory=list)
    client: NetworkVsc | None = None

    @property
    def nic(self) -> NetworkVsc:
        assert self.client is not None
        return self.client

    def start(
        self, config: GuestConfig | None = None, *, page_count: int = 0, timeout: float = 0.5
    ) -> NetworkVsc:
        config = config or GuestConfig()
        amount = page_count or default_page_count(config.mtu)
        pages = range(FIRST_PAGE, FIRST_PAGE + amount)
        self.client = NetworkVsc(self.guest_end, list(pages), config, timeout=timeout)
        return self.client

    def open_subchannels(self, amount: int) -> None:
        """What the bus does when the guest asks for sub-channels and opens them."""
        offered = self.nic.request_subchannels(amount)
        for index in range(1, offered + 1):
            guest_end, host_end = loopback(self.memory, 16, 16)
            self.vsp.add_subchannel(index, host_end)
            self.nic.add_subchannel(index, guest_end)


_numbers = count(1)


def make_guest(
    switch: Switch, number: int, *, pages: int = 16, memory_size: int = 16 << 20, **config: object
) -> Guest:
    memory = GuestMemory(memory_size)
    guest_end, host_end = loopback(memory, pages, pages)
    port = switch.connect(f"guest{number}-{next(_numbers)}")
    granted: list[int] = []
    adapter = AdapterConfig(mac(number), **config)  # type: ignore[arg-type]
    vsp = NetworkVsp(host_end, port, adapter, offer_subchannels=granted.append)
    return Guest(memory, guest_end, host_end, port, vsp, granted)


def make_pair(
    config: GuestConfig | None = None, second: GuestConfig | None = None, **adapter: object
) -> tuple[Switch, Guest, Guest]:
    switch = Switch()
    guests = [make_guest(switch, number, **adapter) for number in (1, 2)]  # type: ignore[arg-type]
    guests[0].start(config)
    guests[1].start(second or config)
    return switch, guests[0], guests[1]


def frame(destination: bytes, source: bytes, payload: bytes = b"payload" * 8, kind: int = 0x88B5) -> bytes:
    return destination + source + kind.to_bytes(2, "big") + payload


def receive_all(nic: NetworkVsc) -> list[bytes]:
    frames: list[bytes] = []
    while batch := nic.receive(64):
        frames += batch
    return frames


def send_all(nic: NetworkVsc, frames: Sequence[bytes]) -> None:
    assert nic.send_batch(frames) == len(frames)

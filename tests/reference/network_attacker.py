"""A guest or a host of a network channel that writes whatever it likes, beside honest neighbours on the same switch."""

from reference.netpair import Guest, frame, mac, make_guest, make_pair, receive_all, send_all

from vmbus.bus.channel import Channel
from vmbus.core.memory import GpaRanges
from vmbus.core.ring import COMPLETION, COMPLETION_REQUESTED, IN_BAND
from vmbus.network import rndis, wire
from vmbus.network.oid import Offloads
from vmbus.network.rndis import Frame
from vmbus.network.switch import Switch
from vmbus.network.vsc_protocol import GuestConfig
from vmbus.network.vsp import MAX_CONTROL_BACKLOG
from vmbus.network.vsp_delivery import MAX_BACKLOG
from vmbus.network.wire import Capabilities, MessageType, Version, pack_message

PAGE = 4096


class Raw:
    """A peer that writes what it likes to a channel that an honest client or provider brought up."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        channel.on_signal = None
        self.answers: dict[int, bytes] = {}
        self.next_id = 1 << 40

    def send(
        self, payload: bytes, *, kind: int = IN_BAND, flags: int = COMPLETION_REQUESTED, tid: int = 0
    ) -> int:
        self.next_id += 1
        tid = tid or self.next_id
        if self.channel.outgoing.send(payload, tid, kind, flags):
            self.channel.signal()
        return tid

    def drain(self) -> None:
        while self.channel.is_open and (packets := self.channel.incoming.recv_packets(64)):
            for packet in packets:
                if packet.type == COMPLETION:
                    self.answers[packet.transaction_id] = packet.payload
            if self.channel.incoming.take_signal():
                self.channel.signal()

    def ask(self, payload: bytes) -> bytes:
        tid = self.send(payload)
        self.drain()
        return self.answers.pop(tid)

    def rndis(self, section: int, size: int, channel_type: int = 0) -> int:
        """The status of an RNDIS packet in the send buffer."""
        body = wire.SendRndisPacket(channel_type, section, size)
        answer = self.ask(pack_message(MessageType.SEND_RNDIS_PACKET, body, Version.V6_1))
        assert answer[:4] == b"\x6c\0\0\0"
        return int.from_bytes(answer[4:8], "little")

    def gpa(self, memory_size_page: int, parts: list[tuple[int, int, list[int]]]) -> int:
        """The status of an RNDIS packet in GPA ranges."""
        del memory_size_page
        self.next_id += 1
        payload = pack_message(
            MessageType.SEND_RNDIS_PACKET, wire.SendRndisPacket(0, wire.NO_SECTION, 0), Version.V6_1
        )
        if self.channel.outgoing.send_gpa_direct(payload, GpaRanges(parts), self.next_id):
            self.channel.signal()
        self.drain()
        return int.from_bytes(self.answers.pop(self.next_id)[4:8], "little")


def everything() -> GuestConfig:
    capabilities = Capabilities.IEEE_8021Q | Capabilities.SRIOV | Capabilities.RSC
    return GuestConfig(offloads=Offloads.everything(), capabilities=capabilities)


def seized(*, plain: bool = False, **adapter: object) -> tuple[Raw, Guest, Guest, Guest]:
    """A hostile guest, itself, and two honest neighbours; with `plain` frames reach it by the compiled path."""
    switch, bad, good = make_pair(GuestConfig() if plain else everything(), **adapter)
    third = make_guest(switch, 3)
    third.start()
    return Raw(bad.guest_end), bad, good, third


def neighbours_are_well(good: Guest, third: Guest) -> None:
    """Frames pass between the two, once the switch has heard from both: it believes any source address."""
    send_all(third.nic, [frame(mac(2), mac(3))])
    receive_all(good.nic)
    receive_all(third.nic)
    frames = [frame(mac(3), mac(2), bytes([n]) * 100) for n in range(20)]
    send_all(good.nic, frames)
    assert receive_all(third.nic) == frames


def provider_is_consistent(guest: Guest) -> None:
    vsp = guest.vsp
    if vsp._receive is not None:
        held = [section for part in vsp._receive.in_flight().values() for section in part]
        assert len(set(held)) == len(held) == vsp._receive.count - vsp._receive.available
    for queue in vsp._queues.values():
        assert len(queue.backlog) <= MAX_BACKLOG
        assert len(queue.completions) <= 128
    assert len(vsp._control) <= MAX_CONTROL_BACKLOG


def write(guest: Guest, section: int, data: bytes) -> None:
    start = section * guest.nic.protocol.send_section[0]
    guest.nic._send.view[start : start + len(data)] = data


GOOD = rndis.pack_packet(Frame(frame(mac(2), mac(1))))


class RawHost(Raw):
    """The host's end of a channel whose client is honest."""

    def receive_ranges(
        self, ranges: list[tuple[int, int]], *, set_id: int = 0xCAFE, payload: bytes | None = None
    ) -> None:
        self.next_id += 1
        body = pack_message(
            MessageType.SEND_RNDIS_PACKET, wire.SendRndisPacket(0, wire.NO_SECTION, 0), 0x60001
        )
        if self.channel.outgoing.send_transfer_pages(
            body if payload is None else payload, set_id, ranges, self.next_id
        ):
            self.channel.signal()


def seized_host() -> tuple[RawHost, Guest]:
    guest = make_guest(Switch(), 1)
    guest.start(everything())
    return RawHost(guest.host_end), guest


def put(guest: Guest, at: int, data: bytes) -> None:
    guest.nic._receive.view[at : at + len(data)] = data


def fragment(flags: int, data: bytes) -> bytes:
    return rndis.pack_packet(Frame(data, packet_id=1 | flags << 8 | 5 << 16))

"""What drivers other than Linux's do, message by message and by hand: firmware, iPXE, the BSDs.

Each differs from ``hv_vmbus`` in something that a host has to bear: which connection it goes on using, how it rings,
what it sends at full length, what it waits for, and that it polls.
"""

import struct
from collections.abc import Iterator
from uuid import UUID

import pytest
from reference.raw_guest import RawGuest
from reference.ring import ReferenceRing

from vmbus.bus import Channel, Inline, Offer, Version, VmbusHost, wire
from vmbus.bus.codec import Sender, encode, parse
from vmbus.bus.versions import FeatureFlags
from vmbus.hypervisor import Hypervisor, VirtualClock
from vmbus.hypervisor.tlfs import CallCode, Msr

SINT = 2
INTERRUPT_PAGE, MONITOR_IN, MONITOR_OUT, RING = 0x8000, 0x9000, 0xA000, 0x10_0000
RING_PAGES = 34
"""Both rings: 17 pages each, of which 16 hold data; more page numbers than one message takes."""
KIND = UUID("f8615163-df3e-46c5-913f-f2d2f965ed0e")


class Driver:
    """A guest's driver that polls its message slot and its rings."""

    def __init__(self, host: VmbusHost) -> None:
        self.guest = RawGuest(host.child.vps[0])
        self.memory = self.guest.memory
        for page in (INTERRUPT_PAGE, MONITOR_IN, MONITOR_OUT):
            self.memory.write(page, bytes(4096))
        self.version = 0
        self.offers: list[wire.OfferChannel] = []

    def say(self, message: wire.Message, tail: bytes = b"", *, connection: int = 1) -> None:
        assert self.guest.post(connection, 1, encode(message, tail)) == 0

    def hear(self) -> tuple[wire.Message, int]:
        """The next message and its length, waiting for nothing."""
        self.guest.vp.wrmsr(Msr.EOM, 0)
        taken = self.guest.take_message(SINT)
        assert taken is not None, "the host says nothing"
        assert taken[0] == 1
        return parse(taken[2], Sender.HOST, self.version or Version.V6_0, 0xFF).message, len(taken[2])

    def contact(self, version: int, info: int, client: bytes = b"") -> wire.Message:
        self.version = 0
        self.say(wire.InitiateContact(version, 0, info, MONITOR_IN, MONITOR_OUT), client)
        answer, _ = self.hear()
        assert isinstance(answer, wire.VersionResponse | wire.VersionResponse2)
        assert (answer.version_supported, answer.connection_state) == (1, 0)
        self.version = version
        return answer

    def enumerate(self) -> wire.OfferChannel:
        self.say(wire.RequestOffers())
        self.offers = []
        while isinstance(message := self.hear()[0], wire.OfferChannel):
            self.offers.append(message)
        assert isinstance(message, wire.AllOffersDelivered)
        return self.offers[0]

    def open(
        self, offer: wire.OfferChannel, gpadl_id: int, *, padded: bool = False
    ) -> tuple[ReferenceRing, ReferenceRing]:
        """Describe the rings and open the channel: (outgoing, incoming)."""
        self.memory.write(RING, bytes(RING_PAGES * 4096))
        pages = struct.pack(
            f"<II{RING_PAGES}Q", RING_PAGES * 4096, 0, *(RING // 4096 + n for n in range(RING_PAGES))
        )
        first, rest = pages[:216], pages[216:]
        self.say(wire.GpadlHeader(offer.channel_id, gpadl_id, len(pages), 1), first)
        assert self.guest.take_message(SINT) is None
        self.say(wire.GpadlBody(0, gpadl_id), rest.ljust(224, b"\0") if padded else rest)
        assert self.hear() == (wire.GpadlCreated(offer.channel_id, gpadl_id, 0), 20)
        self.say(wire.OpenChannel(offer.channel_id, 0xC0FFEE, gpadl_id, 0, RING_PAGES // 2, bytes(120)))
        assert self.hear() == (wire.OpenChannelResult(offer.channel_id, 0xC0FFEE, 0), 20)
        half = RING_PAGES // 2 * 4096
        view = self.memory.window(tuple(RING // 4096 + n for n in range(RING_PAGES)), mirrored=False).view()
        return ReferenceRing(view[:half]), ReferenceRing(view[half:])  # type: ignore[arg-type]

    def close(self, offer: wire.OfferChannel, gpadl_id: int) -> None:
        self.say(wire.CloseChannel(offer.channel_id))
        self.say(wire.GpadlTeardown(offer.channel_id, gpadl_id))
        assert self.hear() == (wire.GpadlTorndown(gpadl_id), 12)

    def unload(self) -> None:
        self.say(wire.Unload())
        assert self.hear() == (wire.UnloadComplete(), 8)
        self.version = 0

    def signal(self, connection_id: int) -> int:
        """HvSignalEvent with its input in memory."""
        return self.guest.call(CallCode.SIGNAL_EVENT, struct.pack("<IHH", connection_id, 0, 0))[0]


def ping(out: ReferenceRing, back: ReferenceRing, ring: object, number: int) -> None:
    """One request in band, rung for, and its completion."""
    assert callable(ring)
    assert out.write(6, 1, number, b"", bytes([number]) * 24)
    assert out.publish(), "an idle host wants to be rung"
    ring()
    assert back.read() == (11, 0, number, b"", bytes([number]) * 24)
    back.release()


@pytest.fixture
def host() -> Iterator[VmbusHost]:
    hv = Hypervisor(clock=VirtualClock())
    root = hv.create_root()
    child = hv.create_child(root, memory_size=16 << 20)
    bus = VmbusHost(hv, child, hosting=Inline())

    def complete(channel: Channel) -> None:
        channel.serve(lambda packets: [channel.send(p.payload, p.transaction_id, 11) for p in packets])

    bus.offer(Offer(KIND, UUID(int=1), monitor_latency=100_000), complete)
    yield bus
    child.destroy()
    root.destroy()


def test_ipxe(host: VmbusHost) -> None:
    """It sees that the host knows 3.0, unloads, speaks the oldest version instead, and unloads from that, too."""
    driver = Driver(host)
    answer = driver.contact(Version.V3_0, INTERRUPT_PAGE)
    assert answer == wire.VersionResponse(1, 0, 0, Version.V3_0)
    driver.unload()
    assert driver.contact(Version.V0_13, INTERRUPT_PAGE) == wire.VersionResponse(1, 0, 0, Version.V0_13)
    offer = driver.enumerate()
    assert (offer.monitor_allocated, offer.monitor_id) == (1, 0)
    out, back = driver.open(offer, 0x18AE_0001)

    def by_bit_and_event() -> None:
        bit = INTERRUPT_PAGE + 2048 + offer.channel_id // 8
        driver.memory.write(bit, bytes([driver.memory.read(bit, 1)[0] | 1 << offer.channel_id % 8]))
        assert driver.signal(wire.EVENT_CONNECTION_ID) == 0

    def by_monitor() -> None:
        driver.memory.write(MONITOR_OUT + 8, struct.pack("<I", 1))
        host.hypervisor.clock.advance(1_000_000)  # type: ignore[attr-defined]

    for number, ring in enumerate((by_bit_and_event, by_monitor) * 2, 1):
        ping(out, back, ring, number)
    driver.close(offer, 0x18AE_0001)
    driver.unload()
    assert host.violations == 0


def test_the_firmware_of_a_generation_2_machine(host: VmbusHost) -> None:
    """It speaks 6.0 with a client id, all of it on connection 1, and sends page numbers in messages of full length."""
    driver = Driver(host)
    asked = FeatureFlags.CLIENT_ID << 32
    client = UUID("3a3a9c7b-7f0e-4d1c-9b8c-2f5f2f6b6d11")
    answer = driver.contact(
        Version.V6_0, asked, client.bytes_le
    )  # SINT 0 and VTL 0: nobody looks at them here
    assert isinstance(answer, wire.VersionResponse2)
    assert answer.supported_features == FeatureFlags.CLIENT_ID
    assert host.machine.client_id == client
    offer = driver.enumerate()
    out, back = driver.open(offer, 1, padded=True)
    for number in range(1, 4):
        ping(out, back, lambda: driver.guest.signal(offer.connection_id), number)
    driver.close(offer, 1)
    out, back = driver.open(offer, 1, padded=True)  # ids from a table of its own: the same one again
    ping(out, back, lambda: driver.guest.signal(offer.connection_id), 9)
    driver.unload()  # its channels are open when it starts the operating system
    assert not host.channels
    assert host.violations == 0
    assert isinstance(driver.contact(Version.V5_3, 0), wire.VersionResponse), (
        "which comes up with a version of its own"
    )
    driver.enumerate()


@pytest.mark.parametrize("version", [Version.V1_1, Version.V2_4, Version.V3_0])
def test_the_bsds(host: VmbusHost, version: Version) -> None:
    """HvSignalEvent with its input in memory; the host's flags are where each version has them."""
    driver = Driver(host)
    driver.contact(version, INTERRUPT_PAGE)
    offer = driver.enumerate()
    assert offer.is_dedicated == 1
    out, back = driver.open(offer, 0xE1E10)
    driver.guest.take_flags(SINT)
    driver.guest.take_interrupts()
    for number in range(1, 4):
        ping(out, back, lambda: driver.signal(offer.connection_id), number)
        assert driver.guest.take_interrupts()
        flags = driver.guest.take_flags(SINT)
        if version < Version.V2_4:
            assert flags == [0]
            shared = int.from_bytes(driver.memory.read(INTERRUPT_PAGE, 2048), "little")
            flags = [n for n in range(2048) if shared >> n & 1]
            driver.memory.write(INTERRUPT_PAGE, bytes(2048))
        assert flags == [offer.channel_id]
    driver.close(offer, 0xE1E10)
    driver.unload()
    assert host.violations == 0


def test_ids_given_back_after_the_unload(host: VmbusHost, caplog: pytest.LogCaptureFixture) -> None:
    """Linux unloads first, then takes its devices apart and releases each id: nothing that anybody has to hear of."""
    driver = Driver(host)
    driver.contact(Version.V5_2, 2)
    offer = driver.enumerate()
    driver.unload()
    driver.say(wire.RelIdReleased(offer.channel_id))
    driver.say(wire.RelIdReleased(offer.channel_id))
    assert host.violations == 0
    assert caplog.records == []
    driver.contact(Version.V5_2, 2)
    assert driver.enumerate() == offer


def test_what_a_message_was_is_said_by_its_name(host: VmbusHost) -> None:
    events = []
    host.child.on_event = events.append
    driver = Driver(host)
    for message in (wire.CloseChannel(1), wire.RelIdReleased(9), wire.GpadlTeardown(1, 5)):
        driver.say(message)
    driver.contact(Version.V4_0, 2)
    driver.say(wire.ModifyChannel(1, 0))
    errors = [str(event.detail) for event in events if event.kind == "provider-error"]
    assert len(errors) == 3
    assert "CLOSE_CHANNEL" in errors[0]
    assert "without a connection" in errors[0]
    assert "GPADL_TEARDOWN" in errors[1]
    assert "MODIFY_CHANNEL" in errors[2]
    assert "4.0" in errors[2]

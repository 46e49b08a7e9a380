"""A guest that sends what no guest should: a defined answer or that channel closed, nothing else harmed.

The first part is one test for each bug that real hosts had; the second goes through the issue's list of bad input;
the last throws seeded noise at a whole bus.
"""

import random
import struct
from collections.abc import Callable
from uuid import UUID

import pytest
from reference.bus_pair import PAGES, Pair, an_offer, ranges_of

from vmbus.bus import Channel, Inline, Offer, Version, VmbusGuest, VmbusHost, wire
from vmbus.bus import actions as act
from vmbus.bus.codec import MESSAGES, Sender, encode, parse
from vmbus.bus.host import HostMachine
from vmbus.bus.transitions import ChannelState
from vmbus.errors import LocalProtocolError, RemoteProtocolError, VmbusError
from vmbus.hypervisor import Hypervisor, VirtualClock

KIND = UUID("ba6163d9-04a1-4d29-b605-72e2ffb1dc7f")


def connected(version: int = Version.V5_3, **host: object) -> Pair:
    pair = Pair(host=HostMachine(PAGES, 4, **host))  # type: ignore[arg-type]
    for number in range(3):
        pair.offer(an_offer(number))
    pair.connect(version)
    return pair


def say(pair: Pair, message: wire.Message, tail: bytes = b"") -> list[wire.Message]:
    """Send a message past the guest's machine; the host's answers."""
    before = len(pair.to_guest)
    pair.obey(pair.host.receive(encode(message, tail)))
    payloads = [send.payload for send in list(pair.to_guest)[before:]]
    pair.to_guest.clear()
    return [parse(payload, Sender.HOST, Version.V6_0, 0xFF).message for payload in payloads]


def refused(pair: Pair, message: wire.Message, tail: bytes = b"") -> None:
    with pytest.raises(RemoteProtocolError):
        pair.host.receive(encode(message, tail))
    pair.check()


# -- bugs that real hosts had -----------------------------------------------------------------------------


def test_bug_gpa_range_with_byte_offset_of_a_page_or_more_unchecked() -> None:
    pair = connected()
    for offset in (4096, 4097, 0x8000_0000, 0xFFFF_FFFF):
        data = struct.pack("<IIQQ", 4096, offset, 16, 17)
        (answer,) = say(pair, wire.GpadlHeader(1, 7, len(data), 1), data)
        assert isinstance(answer, wire.GpadlCreated)
        assert answer.status == wire.Status.UNSUCCESSFUL.signed
    assert not pair.host.gpadls


def test_bug_event_flag_2048_or_more_panics() -> None:
    pair = connected(Version.V6_0)
    pair.gpadl(1)
    pair.run()
    gpadl_id = next(iter(pair.host.gpadls))
    for flag in (0, 2048, 0xFFFF):
        message = wire.OpenChannel2(1, 5, gpadl_id, 0, 4, bytes(120), 0x7000, flag, 0)
        assert say(pair, message) == [wire.OpenChannelResult(1, 5, wire.Status.UNSUCCESSFUL)]
    assert not pair.opened


def test_bug_interrupts_before_the_open_result_are_lost() -> None:
    """The guest rings between the host's opening the device and its answer; the host rings before its answer."""
    hv = Hypervisor(clock=VirtualClock())
    child = hv.create_child(hv.create_root(), memory_size=8 << 20)
    host = VmbusHost(hv, child)
    rung: list[str] = []

    def on_open(channel: Channel) -> None:
        channel.outgoing.send(b"early...")
        channel.signal()
        # What a guest on another processor does: the event connection is there already.
        assert child.vps[0].hypercall(0x1005D, 0x2001, 0) == 0
        channel.on_signal = lambda: rung.append("host")

    host.offer(Offer(KIND, UUID(int=1)), on_open)
    guest = VmbusGuest(child.vps[0])
    guest.connect()
    channel = guest.open(guest.offers[0])
    channel.on_signal = lambda: rung.append("guest")
    assert sorted(rung) == ["guest", "host"]
    assert channel.incoming.recv() == b"early..."
    guest.close()


def test_bug_gpadl_fails_on_a_revoked_channel() -> None:
    pair = connected()
    data = ranges_of(100)
    assert say(pair, wire.GpadlHeader(1, 7, len(data), 1), data[:216]) == []
    offer_id = pair.host.channel(1).offer_id  # type: ignore[union-attr]
    pair.rescind(offer_id)
    answers: list[wire.Message] = []
    for at in range(216, len(data), 224):
        answers += say(pair, wire.GpadlBody(0, 7), data[at : at + 224])
    assert answers == [wire.GpadlCreated(1, 7, 0)]
    assert say(pair, wire.GpadlHeader(1, 8, 16, 1), ranges_of(1)) == [wire.GpadlCreated(1, 8, 0)]
    assert not pair.mapped, "nobody uses it"
    assert say(pair, wire.GpadlTeardown(1, 7)) == [wire.GpadlTorndown(7)]
    assert say(pair, wire.RelIdReleased(1)) == []
    assert not pair.host.gpadls


def test_a_rescind_that_comes_while_another_answer_is_awaited_closes_at_once() -> None:
    """Its callbacks wait, but nobody may write into a ring whose pages are free again."""
    hv = Hypervisor(clock=VirtualClock())
    child = hv.create_child(hv.create_root(), memory_size=8 << 20)
    hosting = Inline(eager=False)
    host = VmbusHost(hv, child, hosting=hosting)
    doomed, _ = (host.offer(an_offer(number)) for number in (1, 2))
    guest = VmbusGuest(child.vps[0], hosting=hosting)
    guest.connect()
    first, second = guest.offers
    channel = guest.open(first, 1, 1)
    pages = guest.pages.in_use
    ended: list[int] = []
    channel.on_closed = lambda: ended.append(1)
    interrupt = guest._ports[0].task
    assert interrupt is not None
    interrupt.running = True  # the interrupt handler is held up: whoever awaits an answer takes the messages
    doomed.rescind()
    guest.open(second, 1, 1)
    assert guest.pages.in_use == pages, "the first ring's pages are the second's"
    assert not channel.is_open
    with pytest.raises(LocalProtocolError):
        channel.send(b"into whose ring?")
    assert ended == []
    interrupt.running = False
    hosting.run()
    assert ended == [1]
    guest.close()


def test_bug_primary_rescinded_before_its_sub_channels() -> None:
    pair = Pair()
    offers = [pair.offer(an_offer(1, index)) for index in (0, 1, 2)]
    pair.offer(an_offer(4, 1))
    pair.connect(Version.V5_3)
    keys = {n: c.offer.subchannel_index for n, c in pair.guest.channels.items()}
    pair.rescind(offers[0])
    gone = [keys[e.channel_id] for e in pair.run() if isinstance(e, act.ChannelRescinded)]
    assert sorted(gone[:2]) == [1, 2]
    assert gone[2:] == [0], "the primary last, and no other device's"


@pytest.mark.parametrize("pages", [1, 3])
def test_bug_guests_that_set_pending_send_size_to_ring_size_minus_one(pages: int) -> None:
    """Never satisfiable by one byte: a host that waits for exactly that much never rings, and the guest hangs."""
    hv = Hypervisor(clock=VirtualClock())
    child = hv.create_child(hv.create_root(), memory_size=8 << 20)
    got: list[int] = []

    def on_open(channel: Channel) -> None:
        channel.serve(lambda packets: got.extend(p.transaction_id for p in packets))

    host = VmbusHost(hv, child)
    host.offer(Offer(KIND, UUID(int=1)), on_open)
    guest = VmbusGuest(child.vps[0])
    guest.connect()
    channel = guest.open(guest.offers[0], pages, pages)
    rung: list[int] = []
    channel.on_signal = lambda: rung.append(1)
    size = pages * 4096
    with channel.outgoing.window.view() as control:
        struct.pack_into("<I", control, 12, size - 1)
        channel.notify(channel.outgoing.send(b"x" * 64, 1))
        assert got == [1]
        assert len(rung) == 1, "an empty ring is as much as there can be: ring"
        struct.pack_into("<I", control, 12, 0)
    guest.close()


# -- the list of bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [Version.V0_13, Version.V5_3, Version.V6_0])
def test_truncated_and_oversized(version: int) -> None:
    pair = connected(version)
    for variant in (
        v for vs in MESSAGES.values() for v in vs if v.sender is Sender.GUEST and v.structure.SIZE
    ):
        payload = encode(variant.structure.unpack(bytes(variant.structure.SIZE)))
        try:
            whole = parse(payload, Sender.GUEST, version, pair.host.features).message
        except RemoteProtocolError:
            continue  # not one of this version
        if type(whole) is not variant.structure or variant.by_size:
            continue
        for length in (0, 3, 7, len(payload) - 1):
            with pytest.raises(RemoteProtocolError):
                pair.host.receive(payload[:length])
            pair.check()
    with pytest.raises(RemoteProtocolError):
        pair.host.receive(bytes(241))


def test_out_of_order_and_duplicate() -> None:
    fresh = Pair()
    for message in (wire.RequestOffers(), wire.Unload(), wire.CloseChannel(1), wire.Resume()):
        refused(fresh, message)
    pair = connected(Version.V6_0)
    for message in (
        wire.RequestOffers(),
        wire.Resume(),
        wire.CloseChannel(1),
        wire.CloseChannel(99),
        wire.RelIdReleased(99),
        wire.GpadlBody(0, 5),
        wire.GpadlTeardown(1, 5),
        wire.GpadlTeardown(99, 5),
        wire.OpenReservedChannel(1, 0, 16, 5, 4),
        wire.OpenReservedChannel(1, 9, 2, 5, 4),
    ):
        refused(pair, message)
    assert say(pair, wire.OpenReservedChannel(1, 0, 2, 5, 4)) == [
        wire.OpenChannelResult(1, 0, wire.Status.UNSUCCESSFUL)
    ], "there is no such GPADL"
    ring = pair.open(1)
    refused(pair, wire.OpenChannel2(1, 9, ring, 0, 4, bytes(120), 0x2001, 1, 0))
    refused(pair, wire.RelIdReleased(1))
    pair.post(pair.guest.close(1))
    pair.run()
    refused(pair, wire.CloseChannel(1))
    pair.check_agreement()


def test_gpadl_bodies_that_never_come() -> None:
    pair = connected()
    data = ranges_of(100)
    for gpadl_id in range(1, 6000):
        pair.host.receive(encode(wire.GpadlHeader(1, gpadl_id, 0xFFF8, 1), data[:216]))
    held = pair.host.gpadls
    assert sum(g.length for g in held.values()) <= 16 << 20
    assert len(held) <= 4096
    assert say(pair, wire.GpadlHeader(2, 9999, 0xFFF8, 1), data[:216]) == [
        wire.GpadlCreated(2, 9999, wire.Status.UNSUCCESSFUL.signed)
    ], "refused, not fatal"
    pair.to_guest.clear()
    pair.post(pair.guest.connect([Version.V5_3]))
    pair.run()
    assert not pair.host.gpadls, "a new connection starts with none"


def test_gpadl_bodies_that_overlap_or_exceed() -> None:
    pair = connected()
    data = ranges_of(30)
    say(pair, wire.GpadlHeader(1, 7, len(data), 1), data[:216])
    assert say(pair, wire.GpadlHeader(2, 7, 16, 1), ranges_of(1)) == [
        wire.GpadlCreated(2, 7, wire.Status.UNSUCCESSFUL.signed)
    ], "the id is in use"
    # More values than announced: some guests always send full messages; the announced ones count.
    assert say(pair, wire.GpadlBody(0, 7), data[216:] + b"\xff" * 180) == [wire.GpadlCreated(1, 7, 0)]
    assert next(iter(pair.mapped.values())).data == data
    refused(pair, wire.GpadlBody(0, 7), data[216:])
    # Fewer: ranges that do not fit into what was announced.
    for count, length in ((2, 16), (1, 8), (0, 16), (0xFFFF, 16), (1, 0)):
        (answer,) = say(pair, wire.GpadlHeader(1, 20, length, count), ranges_of(1))
        assert isinstance(answer, wire.GpadlCreated)
        assert answer.status
    say(pair, wire.GpadlHeader(1, 21, 0xFFF8, 1), data[:216])
    assert say(pair, wire.GpadlBody(0, 21), b"") == [
        wire.GpadlCreated(1, 21, wire.Status.UNSUCCESSFUL.signed)
    ]
    assert list(pair.host.gpadls) == [7]


@pytest.mark.parametrize("held", [False, True])
def test_gpadl_torn_down_while_its_channel_is_open(held: bool) -> None:
    pair = connected()
    ring = pair.gpadl(1)
    pair.run()
    if held:
        pair.accept_open = None
    pair.post(pair.guest.open(1, ring, 4))
    pair.run()
    assert pair.opened
    answers = say(pair, wire.GpadlTeardown(1, ring))
    assert answers[-1] == wire.GpadlTorndown(ring)
    assert not pair.opened, "the device let go before the guest was told"
    assert not pair.mapped
    assert pair.host.channel(1).state is ChannelState.OFFERED  # type: ignore[union-attr]
    if held:
        assert isinstance(answers[0], wire.OpenChannelResult)
        pair.complete_held(0, True)
        assert not pair.to_guest, "a late completion is nobody's answer"
    assert pair.host.channel(2) is not None


def test_open_of_a_rescinded_channel() -> None:
    pair = connected()
    ring = pair.gpadl(1)
    pair.run()
    pair.rescind(pair.host.channel(1).offer_id)  # type: ignore[union-attr]
    pair.to_guest.clear()
    message = wire.OpenChannel(1, 3, ring, 0, 4, bytes(120))
    assert say(pair, message) == [wire.OpenChannelResult(1, 3, wire.Status.UNSUCCESSFUL)]
    assert say(pair, wire.CloseChannel(1)) == []
    assert say(pair, wire.ModifyChannel(1, 0)) == [
        wire.ModifyChannelResponse(1, wire.Status.UNSUCCESSFUL.signed)
    ]
    say(pair, wire.RelIdReleased(1))
    refused(pair, wire.RelIdReleased(1))
    assert say(pair, message) == [wire.OpenChannelResult(1, 3, wire.Status.UNSUCCESSFUL)]
    assert not pair.opened


def test_open_over_what_is_no_ring() -> None:
    pair = connected()
    bad = {
        1: ranges_of(8)[:4] + struct.pack("<I", 8) + ranges_of(8)[8:],  # not from a page's start
        2: ranges_of(3),  # too short for two rings
        3: struct.pack("<IIQIIQ", 4096, 0, 16, 4096, 0, 17),  # two ranges
    }
    data = struct.pack("<II8Q", 7 * 4096 + 8, 8, *range(8))
    assert say(pair, wire.GpadlHeader(1, 1, len(data), 1), data) == [wire.GpadlCreated(1, 1, 0)]
    assert say(pair, wire.GpadlHeader(1, 2, len(bad[2]), 1), bad[2]) == [wire.GpadlCreated(1, 2, 0)]
    assert say(pair, wire.GpadlHeader(1, 3, len(bad[3]), 2), bad[3]) == [wire.GpadlCreated(1, 3, 0)]
    assert say(pair, wire.GpadlHeader(2, 4, len(ranges_of(8)), 1), ranges_of(8)) == [
        wire.GpadlCreated(2, 4, 0)
    ]
    opens = [(1, 1, 4, 0), (1, 2, 2, 0), (1, 3, 1, 0), (1, 4, 4, 0), (1, 99, 4, 0), (99, 4, 4, 0)]
    opens += [(2, 4, page, 0) for page in (0, 1, 7, 8, 0xFFFF_FFFF)] + [(2, 4, 4, 4)]
    for channel_id, gpadl_id, page, vp in opens:
        message = wire.OpenChannel(channel_id, 1, gpadl_id, vp, page, bytes(120))
        assert say(pair, message) == [wire.OpenChannelResult(channel_id, 1, wire.Status.UNSUCCESSFUL)]
    assert not pair.opened
    assert say(pair, wire.OpenChannel(2, 1, 4, 3, 4, bytes(120))) == [wire.OpenChannelResult(2, 1, 0)]


def test_two_channels_with_one_connection_id() -> None:
    pair = connected(Version.V6_0)
    for channel_id, gpadl_id in ((1, 1), (2, 2)):
        say(pair, wire.GpadlHeader(channel_id, gpadl_id, len(ranges_of(8)), 1), ranges_of(8))

    def open_(channel_id: int, connection_id: int) -> int:
        fields = channel_id, 1, channel_id, 0, 4, bytes(120), connection_id, channel_id, 0
        (answer,) = say(pair, wire.OpenChannel2(*fields))
        assert isinstance(answer, wire.OpenChannelResult)
        return answer.status

    assert all(open_(1, n) for n in (0, 1, 2, 3, 4, 15)), "the bus's own connections"
    assert open_(1, 0x5000) == 0
    assert open_(2, 0x5000) != 0
    assert open_(2, 0x5001) == 0


def test_contact_with_pages_that_are_none() -> None:
    pair = Pair()
    for pages in (
        (0x4000, 0),
        (0, 0x4000),
        (0x4001, 0x5000),
        (0x4000, PAGES << 12),
        ((1 << 64) - 4096, 0x4000),
    ):
        for version, answer in (
            (Version.V5_3, wire.VersionResponse(1, 2, 0, 4)),
            (Version.V1_1, wire.VersionResponse(0, 0, 0, 0)),
        ):
            assert say(pair, wire.InitiateContact(version, 0, 2, *pages)) == [answer]
            assert pair.host.version == 0
    assert say(pair, wire.InitiateContact(Version.V1_1, 0, 0x3001, 0, 0)) == [
        wire.VersionResponse(0, 0, 0, 0)
    ]
    assert say(pair, wire.InitiateContact(0x7777, 0, 2, 0, 0)) == [wire.VersionResponse(0, 0, 0, 0)]
    for message in (
        wire.InitiateContact(Version.V5_3, 0, 16, 0, 0),
        wire.InitiateContact(Version.V5_3, 4, 2, 0, 0),
        wire.InitiateContact(Version.V6_0, 0, 2 | 8 << 32, 0, 0),
    ):
        refused(pair, message)


def test_another_sint_or_vtl_is_refused_and_disturbs_nobody() -> None:
    pair = connected()
    pair.open(1)
    for target in (3, 0x102):
        assert say(pair, wire.InitiateContact(Version.V5_3, 0, target, 0, 0)) == [
            wire.VersionResponse(0, 0, 0, 0)
        ]
    assert pair.opened
    assert pair.host.version == Version.V5_3


def test_everything_while_paused() -> None:
    pair = connected(Version.V6_0)
    pair.post(pair.guest.pause())
    pair.run()
    for message in (wire.Pause(), wire.CloseChannel(1), wire.RequestOffers(), wire.RelIdReleased(1)):
        refused(pair, message)
    for number in range(100, 200):
        pair.offer(an_offer(number))
    assert not pair.to_guest
    assert len(say(pair, wire.Resume())) == 100


# -- over a hypervisor --------------------------------------------------------------------------------------


class Bus:
    """A bus with two echoing channels, of which the first is attacked."""

    def __init__(self, seed: int = 0) -> None:
        self.hv = Hypervisor(clock=VirtualClock())
        self.root = self.hv.create_root()
        self.child = self.hv.create_child(self.root, memory_size=8 << 20)
        self.host = VmbusHost(self.hv, self.child, hosting=Inline(seed))
        for number in (1, 2):
            self.host.offer(Offer(KIND, UUID(int=number)), self.echo)
        self.guest = VmbusGuest(self.child.vps[0])
        self.guest.connect()

    @staticmethod
    def echo(channel: Channel) -> None:
        def answer(packets: list) -> None:
            for packet in packets:
                channel.send(packet.payload, packet.transaction_id)

        channel.serve(answer)

    def works(self, channel: Channel) -> bool:
        got: list[bytes] = []
        channel.serve(lambda packets: got.extend(p.payload for p in packets))
        channel.send(b"still ok")
        return channel.wait(lambda: got == [b"still ok"])


def test_a_corrupt_ring_costs_its_channel_only() -> None:
    bus = Bus()
    attacked, other = (bus.guest.open(offer) for offer in bus.guest.offers)
    with attacked.outgoing.window.view() as control:
        struct.pack_into("<I", control, 0, 0xDEAD_BEE8)
    attacked.signal()
    assert bus.hv.root is bus.root
    assert not attacked.is_open, "rescinded"
    assert [o.instance_id.int for o in bus.guest.offers] == [2]
    assert bus.works(other)
    bus.guest.close()


@pytest.mark.parametrize("size", [8, 16, 20])
@pytest.mark.parametrize("kind", [7, 9])
def test_bug_gpa_direct_or_transfer_page_header_shorter_than_24_bytes(kind: int, size: int) -> None:
    bus = Bus()
    attacked, other = (bus.guest.open(offer) for offer in bus.guest.offers)
    with attacked.outgoing.window.view() as view:
        struct.pack_into("<HHHHQ", view, 4096, kind, size // 8, size // 8, 1, 5)
        struct.pack_into("<I", view, 0, (size & ~7) + 8)
    attacked.signal()
    assert not attacked.is_open
    assert bus.works(other)
    bus.guest.close()


def test_a_flood_of_messages_to_a_full_slot() -> None:
    """A guest that asks and never reads its answers: bounded, and only its own connection is reset."""
    bus = Bus()
    vp = bus.child.vps[0]
    vp.on_interrupt = None  # it stops listening
    page = bus.guest.pages.allocate(1)[0] << 12
    payload = encode(wire.GpadlHeader(1, 7, 16, 9), ranges_of(1))  # refused each time, with an answer
    bus.child.memory.write(page, struct.pack("<IIII", 4, 0, 1, len(payload)) + payload)
    statuses = {vp.hypercall(0x5C, page, 0) for _ in range(12_000)}
    assert statuses == {0}
    assert vp.synic.queued_messages <= 1024
    assert bus.child.meter.backlog.most <= 8192
    assert bus.host.version == 0, "its connection was reset"
    bus.guest.abandon()
    again = VmbusGuest(vp)
    again.connect()
    assert bus.works(again.open(again.offers[1]))
    again.close()


def noise(rng: random.Random, guest: VmbusGuest) -> bytes:
    variants = [v for vs in MESSAGES.values() for v in vs if v.sender is Sender.GUEST]
    structure = rng.choice(variants).structure
    raw = bytearray(rng.randbytes(structure.SIZE))
    small = [0, 1, 2, 3, 4, 7, 2047, 2048, 0xE1E10, 0xE1E11, *guest.machine.gpadls, 1 << 31]
    for at in range(0, structure.SIZE - 3, 4):
        if rng.random() < 0.8:
            struct.pack_into("<I", raw, at, rng.choice(small))
    payload = encode(structure.unpack(bytes(raw)))
    if structure in (wire.GpadlHeader, wire.GpadlBody):
        payload += ranges_of(rng.randrange(1, 20), rng.choice([0, 300, 2047, 1 << 40]))
    payload = payload[:240]
    return payload[: rng.randrange(len(payload) + 1)] if rng.random() < 0.1 else payload


@pytest.mark.parametrize("seed", range(6))
def test_seeded_noise_on_a_whole_bus(seed: int, record_property: Callable[[str, object], None]) -> None:
    record_property("seed", seed)
    print(f"seed {seed}")
    rng = random.Random(seed)
    bus = Bus(seed)
    other_child = bus.hv.create_child(bus.root, memory_size=8 << 20)
    other_host = VmbusHost(bus.hv, other_child)
    other_host.offer(Offer(KIND, UUID(int=9)), Bus.echo)
    other = VmbusGuest(other_child.vps[0])
    other.connect()
    channel = other.open(other.offers[0])
    vp = bus.child.vps[0]
    page = bus.guest.pages.allocate(1)[0] << 12
    for step in range(600):
        payload = noise(rng, bus.guest)
        connection = rng.choice([1, 4, 4, 4, 2, 0x2001, 99])
        header = struct.pack("<IIII", connection, 0, rng.choice([1, 1, 1, 1, 2, 0x1000]), len(payload))
        bus.child.memory.write(page, header + payload.ljust(240, b"\0"))
        vp.hypercall(0x5C, page, 0)
        vp.hypercall(0x1005D, rng.choice([2, 0x2001, 0x2002, 5]) | rng.choice([0, 1, 2048, 0xFFFF]) << 32, 0)
        bus.host.machine.check()
        if step % 100 == 0:
            assert bus.works(channel)
            for offered in list(bus.host.offered.values())[:1]:
                offered.rescind()
                bus.host.offer(offered.offer, Bus.echo)
    assert bus.host.violations > 0
    bus.guest.abandon()
    bus.host.reset()
    assert bus.host.channels == []
    again = VmbusGuest(vp)
    again.connect()
    for offer in again.offers:
        assert bus.works(again.open(offer))
    again.close()
    other.close()


def test_a_provider_that_fails_is_not_the_guests_to_exploit() -> None:
    """A provider that raises while it opens refuses the open, and leaves nothing behind."""
    hv = Hypervisor(clock=VirtualClock())
    child = hv.create_child(hv.create_root(), memory_size=8 << 20)
    host = VmbusHost(hv, child)

    def on_open(channel: Channel) -> None:
        raise VmbusError("broken")

    host.offer(Offer(KIND, UUID(int=1)), on_open)
    guest = VmbusGuest(child.vps[0])
    guest.connect()
    connections = set(child.connections)
    for _ in range(20):
        with pytest.raises(RemoteProtocolError):
            guest.open(guest.offers[0])
    assert set(child.connections) == connections
    assert not host.machine.gpadls
    guest.close()


def test_one_child_cannot_name_what_is_anothers() -> None:
    """Channels, GPADLs and connections of one partition mean nothing, or something else, in another."""
    bus = Bus()
    victim = bus.guest.open(bus.guest.offers[0])
    gpadl_id = victim.create_gpadl(bus.guest.pages.allocate(2))
    stranger = bus.hv.create_child(bus.root, memory_size=8 << 20)
    host = VmbusHost(bus.hv, stranger)
    guest = VmbusGuest(stranger.vps[0])
    guest.connect()
    vp = stranger.vps[0]
    page = guest.pages.allocate(1)[0] << 12

    def post(message: wire.Message, connection_id: int = 4) -> int:
        payload = encode(message)
        stranger.memory.write(page, struct.pack("<IIII", connection_id, 0, 1, len(payload)) + payload)
        return vp.hypercall(0x5C, page, 0)

    known = bus.host.machine.check, dict(bus.host.machine.gpadls), bus.host.machine.version
    messages = [
        wire.CloseChannel(victim.channel_id),
        wire.GpadlTeardown(victim.channel_id, gpadl_id),
        wire.RelIdReleased(victim.channel_id),
        wire.GpadlBody(0, gpadl_id),
    ]
    for violations, message in enumerate(messages, 1):
        assert post(message) == 0
        assert host.violations == violations
    assert vp.hypercall(0x1005D, 0x2000 | victim.channel_id, 0) == 0x12, "HV_STATUS_INVALID_CONNECTION_ID"
    assert post(wire.Unload(), 0x2000 | victim.channel_id) == 0x12
    assert known[1:] == (dict(bus.host.machine.gpadls), bus.host.machine.version)
    assert victim.is_open
    assert bus.works(victim)
    # The same numbers, used rightly, are the stranger's own.
    host.offer(Offer(KIND, UUID(int=1)), Bus.echo)
    own = guest.open(guest.offers[0])
    assert own.channel_id == victim.channel_id
    assert bus.works(own)
    assert bus.works(victim)
    guest.close()
    bus.guest.close()

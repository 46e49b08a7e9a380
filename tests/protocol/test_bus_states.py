"""Hypothesis over (state, message): two honest ends with messages crossing, and each end against a hostile peer."""

import contextlib
import os
from uuid import UUID

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from reference.bus_pair import MONITOR_PAGES, PAGES, Pair, an_offer, ranges_of

from vmbus.bus import actions as act
from vmbus.bus import wire
from vmbus.bus.codec import MESSAGES, Sender, encode
from vmbus.bus.guest import GuestMachine
from vmbus.bus.host import HostMachine
from vmbus.bus.transitions import ChannelState, LinkState
from vmbus.bus.versions import FeatureFlags, Version
from vmbus.errors import LocalProtocolError, RemoteProtocolError

VERSIONS = st.sampled_from(Version)
SETTINGS = settings(
    max_examples=int(os.environ.get("VMBUS_EXAMPLES", "40")),
    stateful_step_count=50,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


class Crossing(RuleBasedStateMachine):
    """Two honest ends; every message may be delayed, so that any two may cross. Nobody may be offended by it."""

    @initialize(version=VERSIONS)
    def start(self, version: int) -> None:
        self.pair = Pair()
        self.numbers = 0
        for number in range(2):
            self.pair.offer(an_offer(100 + number, monitor_latency=1000 if number else None))
        self.pair.connect(version)

    def some_channel(self, data: st.DataObject, *states: ChannelState) -> int | None:
        chosen = [n for n, c in self.pair.guest.channels.items() if not states or c.state in states]
        return data.draw(st.sampled_from(sorted(chosen))) if chosen else None

    @rule(data=st.data())
    def deliver_to_host(self, data: st.DataObject) -> None:
        for _ in range(data.draw(st.integers(1, 4))):
            self.pair.step_host()

    @rule(data=st.data())
    def deliver_to_guest(self, data: st.DataObject) -> None:
        for _ in range(data.draw(st.integers(1, 4))):
            self.pair.step_guest()

    @rule()
    def deliver_all(self) -> None:
        self.pair.run()
        self.pair.check_agreement()

    @rule(open_=st.sampled_from([True, False, None]), gpadl=st.sampled_from([True, True, False, None]))
    def device_behaves(self, open_: bool | None, gpadl: bool | None) -> None:
        self.pair.accept_open, self.pair.accept_gpadl = open_, gpadl

    @precondition(lambda self: self.pair.held)
    @rule(data=st.data(), ok=st.booleans())
    def device_answers_late(self, data: st.DataObject, ok: bool) -> None:
        self.pair.complete_held(data.draw(st.integers(0, len(self.pair.held) - 1)), ok)

    @rule(number=st.integers(0, 5), sub=st.integers(0, 2), monitored=st.booleans())
    def offer(self, number: int, sub: int, monitored: bool) -> None:
        try:
            self.pair.offer(an_offer(number, sub, monitor_latency=1000 if monitored else None))
        except LocalProtocolError:
            assert any(c.offer.key == an_offer(number, sub).key for c in self.pair.host.channels.values())

    @rule(data=st.data())
    def rescind(self, data: st.DataObject) -> None:
        ids = sorted(self.pair.host.channels)
        if ids:
            self.pair.rescind(data.draw(st.sampled_from(ids)))

    @rule(version=VERSIONS)
    def reconnect(self, version: int) -> None:
        self.pair.post(self.pair.guest.connect([version]))

    @precondition(lambda self: self.pair.guest.state is LinkState.CONNECTED)
    @rule()
    def request_offers(self) -> None:
        self.attempt(self.pair.guest.request_offers)

    @rule(data=st.data(), what=st.sampled_from(["gpadl", "open", "close", "teardown", "modify", "release"]))
    def use_a_channel(self, data: st.DataObject, what: str) -> None:
        guest = self.pair.guest
        channel_id = self.some_channel(data)
        if channel_id is None:
            return
        gpadls = sorted(guest.channels[channel_id].gpadls)
        gpadl_id = data.draw(st.sampled_from(gpadls)) if gpadls else 0
        pages = data.draw(st.sampled_from([4, 8, 60]))
        if what == "gpadl":
            self.attempt(lambda: guest.create_gpadl(channel_id, ranges_of(pages))[1])
        elif what == "open":
            self.attempt(lambda: guest.open(channel_id, gpadl_id, 2))
        elif what == "close":
            self.attempt(lambda: guest.close(channel_id))
        elif what == "teardown":
            self.attempt(lambda: guest.teardown_gpadl(channel_id, gpadl_id))
        elif what == "modify":
            self.attempt(lambda: guest.modify_channel(channel_id, data.draw(st.integers(0, 3))))
        else:
            self.attempt(lambda: guest.release(channel_id))

    @rule(data=st.data(), close=st.booleans())
    def use_a_reserved_channel(self, data: st.DataObject, close: bool) -> None:
        guest = self.pair.guest
        if close:
            channel_id = self.some_channel(data, ChannelState.RESERVED)
            if channel_id is not None:
                self.attempt(lambda: guest.close_reserved(channel_id))
            return
        channel_id = self.some_channel(data, ChannelState.OFFERED)
        if channel_id is not None and (gpadls := sorted(guest.channels[channel_id].gpadls)):
            self.attempt(lambda: guest.open_reserved(channel_id, data.draw(st.sampled_from(gpadls)), 2))

    @rule(what=st.sampled_from(["unload", "pause", "resume", "tl", "pages", "no pages"]))
    def use_the_connection(self, what: str) -> None:
        guest = self.pair.guest
        calls = {
            "unload": guest.unload,
            "pause": guest.pause,
            "resume": guest.resume,
            "tl": lambda: guest.tl_connect(UUID(int=1), UUID(int=2)),
            "pages": lambda: guest.modify_connection(MONITOR_PAGES),
            "no pages": lambda: guest.modify_connection(None),
        }
        self.attempt(calls[what])

    def attempt(self, call: object) -> None:
        """Misuse is refused without a change; whatever is allowed must please the host."""
        try:
            events = call()  # type: ignore[operator]
        except LocalProtocolError:
            self.pair.check()
        else:
            self.pair.post(events)

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "pair"):
            self.pair.check()

    def teardown(self) -> None:
        if not hasattr(self, "pair"):
            return
        pair = self.pair
        while pair.held:
            pair.complete_held(0, True)
        pair.accept_open = pair.accept_gpadl = True
        pair.run()
        while pair.held:
            pair.complete_held(0, True)
        pair.run()
        pair.obey(pair.host.reset())
        assert not pair.opened
        assert not pair.mapped
        assert not pair.host.gpadls
        fresh = Pair(host=pair.host)
        events = fresh.connect(Version.V5_3)
        assert act.Connected(Version.V5_3, FeatureFlags.NONE) in events
        fresh.check_agreement()


Crossing.TestCase.settings = SETTINGS
TestCrossing = Crossing.TestCase

NUMBERS = st.sampled_from(
    [0, 1, 2, 3, 4, 5, 7, 0x10, 0xE1E10, 0xE1E11, 2047, 2048, 0x2001, 0xFFFF, 0xFFFF_FFFF]
)
GUIDS = ("interface_id", "instance_id", "client_id", "endpoint_id", "service_id", "silo_id")
PAGE_ADDRESSES = st.sampled_from([0, 0x1000, 0x4000, 0x5000, 0x5001, PAGES << 12, (1 << 64) - 1])


@st.composite
def hostile_messages(draw: st.DrawFn, sender: Sender) -> bytes:
    """Any structure with small or odd numbers in its fields, perhaps cut short or with something behind it."""
    variants = [v for vs in MESSAGES.values() for v in vs if v.sender is sender]
    structure = draw(st.sampled_from(variants)).structure
    values: dict[str, object] = {}
    for name in structure.OFFSETS:
        if name.endswith("page_gpa"):
            values[name] = draw(PAGE_ADDRESSES)
        elif name == "interrupt_page_or_target_info":
            values[name] = draw(st.sampled_from([0, 2, 3, 0x102, 0x3000, 2 | 0xFF << 32, 2 | 8 << 32, 16]))
        elif name == "version_requested":
            values[name] = draw(VERSIONS | NUMBERS)
        elif name in GUIDS:
            values[name] = draw(st.sampled_from([UUID(int=n) for n in range(3)]))
        else:
            values[name] = draw(NUMBERS)
    raw = bytearray(structure.SIZE)
    for name, at in structure.OFFSETS.items():
        value = values[name]
        end = min([o for o in structure.OFFSETS.values() if o > at], default=structure.SIZE)
        if isinstance(value, UUID):
            raw[at : at + 16] = value.bytes_le
        elif end - at <= 8:
            raw[at:end] = (int(value) & ((1 << 8 * (end - at)) - 1)).to_bytes(end - at, "little")  # type: ignore[call-overload]
    payload = encode(structure.unpack(bytes(raw)))
    if structure in (wire.GpadlHeader, wire.GpadlBody):
        payload += draw(
            st.sampled_from([b"", ranges_of(1), ranges_of(2), ranges_of(4), bytes(8), b"\xff" * 16])
        )
    return payload[: draw(st.just(len(payload)) | st.integers(0, len(payload)))]


class HostileGuest(RuleBasedStateMachine):
    """The host against anything: only `RemoteProtocolError` comes out, and its invariants hold."""

    @initialize(version=VERSIONS)
    def start(self, version: int) -> None:
        self.pair = Pair(host=HostMachine(PAGES, 2))
        for number in range(3):
            self.pair.offer(an_offer(number, monitor_latency=1000))
        self.pair.offer(an_offer(0, 1))
        self.send(encode(wire.InitiateContact(version, 0, 2, 0x4000, 0x5000)))
        self.send(encode(wire.RequestOffers()))

    def send(self, payload: bytes) -> None:
        try:
            actions = self.pair.host.receive(payload, 4)
        except RemoteProtocolError:
            self.pair.host.check()
            return
        self.pair.obey(actions)
        self.pair.to_guest.clear()

    @rule(payload=hostile_messages(Sender.GUEST))
    def send_anything(self, payload: bytes) -> None:
        self.send(payload)

    @rule(payload=st.binary(max_size=250))
    def send_noise(self, payload: bytes) -> None:
        self.send(payload)

    @rule(channel_id=st.integers(1, 5), gpadl_id=st.integers(1, 3), pages=st.sampled_from([1, 4, 30]))
    def send_a_good_gpadl(self, channel_id: int, gpadl_id: int, pages: int) -> None:
        data = ranges_of(pages)
        self.send(encode(wire.GpadlHeader(channel_id, gpadl_id, len(data), 1), data[:216]))
        if len(data) > 216:
            self.send(encode(wire.GpadlBody(0, gpadl_id), data[216:440]))

    @rule(
        channel_id=st.integers(1, 5), gpadl_id=st.integers(1, 3), vp=st.sampled_from([0, 1, 2, 0xFFFF_FFFF])
    )
    def send_a_good_open(self, channel_id: int, gpadl_id: int, vp: int) -> None:
        fields = channel_id, 9, gpadl_id, vp, 2, bytes(120)
        self.send(encode(wire.OpenChannel(*fields)))
        self.send(encode(wire.OpenChannel2(*fields, 0x3000 + channel_id, 40 + channel_id, 0)))

    @rule(open_=st.sampled_from([True, False, None]), gpadl=st.sampled_from([True, True, None]))
    def device_behaves(self, open_: bool | None, gpadl: bool | None) -> None:
        self.pair.accept_open, self.pair.accept_gpadl = open_, gpadl

    @precondition(lambda self: self.pair.held)
    @rule(data=st.data(), ok=st.booleans())
    def device_answers_late(self, data: st.DataObject, ok: bool) -> None:
        self.pair.complete_held(data.draw(st.integers(0, len(self.pair.held) - 1)), ok)
        self.pair.to_guest.clear()

    @rule(data=st.data())
    def rescind_and_offer_again(self, data: st.DataObject) -> None:
        ids = sorted(self.pair.host.channels)
        if ids:
            offer_id = data.draw(st.sampled_from(ids))
            offer = self.pair.host.channels[offer_id].offer
            self.pair.rescind(offer_id)
            if all(c.offer.key != offer.key or c.successor is None for c in self.pair.host.channels.values()):
                self.pair.offer(offer)
        self.pair.to_guest.clear()

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "pair"):
            self.pair.host.check()

    def teardown(self) -> None:
        if hasattr(self, "pair"):
            self.pair.obey(self.pair.host.reset())
            assert not self.pair.opened
            assert not self.pair.mapped
            fresh = Pair(host=self.pair.host)
            fresh.connect(Version.V5_3)
            for channel_id in list(fresh.guest.channels):
                fresh.open(channel_id)
            assert all(c.state is ChannelState.OPEN for c in fresh.guest.channels.values())
            fresh.check_agreement()


HostileGuest.TestCase.settings = SETTINGS
TestHostileGuest = HostileGuest.TestCase


class HostileHost(RuleBasedStateMachine):
    """The guest against anything: only `RemoteProtocolError` comes out, its invariants hold, its memory is bounded."""

    @initialize(version=VERSIONS)
    def start(self, version: int) -> None:
        self.guest = GuestMachine([version, Version.V4_0], monitor_pages=MONITOR_PAGES)
        self.guest.connect()

    def receive(self, payload: bytes) -> None:
        with contextlib.suppress(RemoteProtocolError):
            self.guest.receive(payload)

    @rule(payload=hostile_messages(Sender.HOST))
    def receive_anything(self, payload: bytes) -> None:
        self.receive(payload)

    @rule(payload=st.binary(max_size=250))
    def receive_noise(self, payload: bytes) -> None:
        self.receive(payload)

    @rule()
    def be_accepted(self) -> None:
        self.receive(encode(wire.VersionResponse(1, 0, 0, 4)))
        self.receive(encode(wire.VersionResponse2(1, 0, 0, 4, self.guest.features)))

    @rule(number=st.integers(1, 5), channel_id=st.integers(1, 5))
    def be_offered(self, number: int, channel_id: int) -> None:
        message = an_offer(number).to_message()
        message.channel_id = channel_id
        self.receive(encode(message))

    @rule(
        channel_id=st.integers(1, 5),
        what=st.sampled_from(["gpadl", "open", "close", "release", "unload", "offers"]),
    )
    def go_on(self, channel_id: int, what: str) -> None:
        guest = self.guest
        gpadls = [g for g, n in guest.gpadls.items() if n == channel_id]
        calls = {
            "gpadl": lambda: guest.create_gpadl(channel_id, ranges_of(4)),
            "open": lambda: guest.open(channel_id, gpadls[0] if gpadls else 0, 2),
            "close": lambda: guest.close(channel_id),
            "release": lambda: guest.release(channel_id),
            "unload": guest.unload,
            "offers": guest.request_offers,
        }
        with contextlib.suppress(LocalProtocolError):
            calls[what]()

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "guest"):
            self.guest.check()
            assert len(self.guest.channels) <= 2047


HostileHost.TestCase.settings = SETTINGS
TestHostileHost = HostileHost.TestCase

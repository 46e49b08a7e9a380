"""Host and guest machine back to back: every message, every version."""

from collections import Counter
from uuid import UUID

import pytest
from reference.bus_pair import INTERRUPT_PAGE, MONITOR_PAGES, PAGES, Pair, an_offer, ranges_of, type_of

from vmbus.bus import actions as act
from vmbus.bus import wire
from vmbus.bus.codec import MESSAGES, encode
from vmbus.bus.guest import GuestMachine
from vmbus.bus.host import HostMachine
from vmbus.bus.offer import Offer
from vmbus.bus.transitions import ChannelState, LinkState
from vmbus.bus.versions import SUPPORTED_FEATURES, FeatureFlags, Version, version_name
from vmbus.bus.wire import MessageType
from vmbus.errors import LocalProtocolError, RemoteProtocolError

CLIENT = UUID(int=0xC11E)
ALL_VERSIONS = pytest.mark.parametrize("version", Version, ids=version_name)


def kinds(events: list[act.GuestEvent]) -> list[type]:
    return [type(event) for event in events]


def of_kind(events: list[act.GuestEvent], kind: type) -> list[act.GuestEvent]:
    return [event for event in events if type(event) is kind]


def full_run(version: int) -> Pair:
    """Everything that a version has, once."""
    guest = GuestMachine(interrupt_page=INTERRUPT_PAGE, monitor_pages=MONITOR_PAGES, client_id=CLIENT)
    pair = Pair(guest=guest)
    first = pair.offer(an_offer(1, monitor_latency=100_000))
    pair.offer(an_offer(1, 1))
    pair.offer(an_offer(2))
    events = pair.connect(version)
    assert of_kind(events, act.Connected) == [act.Connected(version, pair.host.features)]
    primary, sub = (
        next((n for n, c in guest.channels.items() if c.offer.key == an_offer(1, i).key), 0) for i in (0, 1)
    )
    assert bool(sub) == (version >= Version.V2_4), "sub-channels came with 2.4"
    channel = guest.channels[primary]
    assert channel.offer.is_dedicated == (version >= Version.V1_1)
    assert channel.offer.monitor_id == 0
    assert pair.host.interrupt_page == (INTERRUPT_PAGE if version < Version.V2_4 else None)

    big = pair.gpadl(primary, 200)  # a header and seven bodies
    assert of_kind(pair.run(), act.GpadlAnswered) == [act.GpadlAnswered(primary, big, 0)]
    ring = pair.open(primary)
    assert channel.state is ChannelState.OPEN
    if sub:
        pair.open(sub)
    if version >= Version.V4_1:
        pair.post(guest.modify_channel(primary, 3))
        assert kinds(pair.run()) == [act.ChannelRetargeted] * (version >= Version.V5_3)
        assert act.Retarget(first, 3) in pair.actions
    else:
        with pytest.raises(LocalProtocolError):
            guest.modify_channel(primary, 3)
    third = next(n for n, c in guest.channels.items() if c.offer.key == an_offer(2).key)
    if version >= Version.V4_0:
        pair.post(guest.tl_connect(UUID(int=5), UUID(int=6), UUID(int=7)))
        pair.run()
        silo = UUID(int=7 if version >= Version.V5_2 else 0)
        assert act.TlConnect(UUID(int=5), UUID(int=6), silo) in pair.actions
        pair.obey(pair.host.refuse_tl_connect(UUID(int=5), UUID(int=6)))
        assert kinds(pair.run()) == [act.TlConnectAnswered] * (version >= Version.V4_1)
        reserved = pair.gpadl(third)
        pair.run()
        pair.post(guest.open_reserved(third, reserved, 4))
        pair.run()
        assert guest.channels[third].state is ChannelState.RESERVED
        pair.post(guest.close_reserved(third))
        assert pair.run() == [act.ReservedClosed(third)]
    pair.post(guest.close(primary))
    for gpadl_id in (ring, big):
        pair.post(guest.teardown_gpadl(primary, gpadl_id))
    assert pair.run() == [act.GpadlGone(ring), act.GpadlGone(big)]
    if version >= Version.V6_0:
        pair.post(guest.modify_connection(act.MonitorPages(0x6000, 0x7000)))
        assert pair.run() == [act.MonitorPagesAnswered(True)]
        assert pair.host.monitor_pages == act.MonitorPages(0x6000, 0x7000)
        pair.post(guest.pause())
        assert pair.run() == [act.Paused()]
        late = pair.offer(an_offer(9))
        assert pair.run() == [], "paused"
        pair.post(guest.resume())
        assert kinds(pair.run()) == [act.OfferSeen]
        pair.rescind(late)
    pair.rescind(first)
    gone = [e.channel_id for e in pair.run() if isinstance(e, act.ChannelRescinded)]
    for channel_id in gone:
        pair.post(guest.release(channel_id))
    pair.run()
    pair.check_agreement()
    pair.post(guest.unload())
    assert kinds(pair.run()) == [act.Unloaded]
    assert pair.guest.state is LinkState.IDLE
    assert not pair.opened
    assert not pair.mapped
    assert not pair.host.gpadls
    return pair


@ALL_VERSIONS
def test_each_version_does_all_it_has(version: Version) -> None:
    pair = full_run(version)
    sent = {kind for kind, times in pair.seen.items() if times}
    for kind, variants in MESSAGES.items():
        exists = any(v.min_version <= version for v in variants)
        needed = exists and kind is not MessageType.CLOSE_RESERVED_RESPONSE
        if kind in (MessageType.CLOSE_RESERVED_CHANNEL, MessageType.CLOSE_RESERVED_RESPONSE):
            needed = version >= Version.V4_0
        assert (kind in sent) == needed, kind.name


def test_every_message_was_sent() -> None:
    total: Counter[MessageType] = Counter()
    for version in Version:
        total += full_run(version).seen
    assert sorted(total) == sorted(MessageType)


@ALL_VERSIONS
def test_contact_goes_to_the_right_connection(version: Version) -> None:
    guest = GuestMachine([version])
    host = HostMachine(PAGES, message_connection_id=77)
    (post,) = guest.connect()
    assert isinstance(post, act.Post)
    assert post.connection_id == (4 if version >= Version.V5_0 else 1)
    answer = host.receive(post.payload, post.connection_id)[-1]
    assert isinstance(answer, act.Send)
    guest.receive(answer.payload)
    (request,) = guest.request_offers()
    assert isinstance(request, act.Post)
    assert request.connection_id == (77 if version >= Version.V5_0 else 1)


@ALL_VERSIONS
def test_guest_falls_back_to_what_the_host_speaks(version: Version) -> None:
    host = HostMachine(PAGES, versions=frozenset(v for v in Version if v <= version))
    pair = Pair(host=host)
    events = pair.connect()
    assert of_kind(events, act.Connected) == [act.Connected(version, pair.guest.features)]
    assert pair.seen[MessageType.INITIATE_CONTACT] == len([v for v in Version if v >= version])


def test_guest_gives_up_when_nothing_is_common() -> None:
    pair = Pair(host=HostMachine(PAGES, versions=frozenset([Version.V0_13])))
    (event,) = pair.connect(Version.V5_3, Version.V4_0)
    assert isinstance(event, act.ConnectionRefused)
    assert "5.3, 4.0" in event.reason
    assert pair.guest.state is LinkState.IDLE


def test_old_host_has_no_connection_4() -> None:
    guest = GuestMachine([Version.V5_3, Version.V5_0, Version.V4_0])
    (post,) = guest.connect()
    for expected in (4, 1):
        (post,) = guest.contact_failed()
        assert isinstance(post, act.Post)
        assert post.connection_id == expected
    (refused,) = guest.contact_failed()
    assert isinstance(refused, act.ConnectionRefused)
    with pytest.raises(LocalProtocolError):
        guest.contact_failed()


@ALL_VERSIONS
def test_reconnect_with_another_version(version: Version) -> None:
    pair = Pair()
    pair.offer(an_offer(1))
    for other in Version:
        pair.connect(version)
        pair.open(1)
        assert len(pair.opened) == 1
        pair.connect(other)  # as a crash kernel does: without UNLOAD
        assert not pair.opened
        assert not pair.mapped
        assert pair.host.version == other
        assert list(pair.guest.channels) == [1]
        pair.check_agreement()


def test_features_are_those_of_both() -> None:
    asked = FeatureFlags.CLIENT_ID | FeatureFlags.PAUSE_RESUME
    pair = Pair(
        host=HostMachine(PAGES, features=FeatureFlags.CLIENT_ID | FeatureFlags.MODIFY_CONNECTION),
        guest=GuestMachine(features=asked, client_id=CLIENT),
    )
    pair.connect(Version.V6_0)
    assert pair.host.features == pair.guest.features == FeatureFlags.CLIENT_ID
    assert pair.host.client_id == CLIENT
    with pytest.raises(LocalProtocolError, match="PAUSE"):
        pair.guest.pause()
    pair.connect(Version.V5_3)
    assert pair.host.features == FeatureFlags.NONE
    assert pair.host.client_id == UUID(int=0)


def test_guest_chooses_its_signal_parameters() -> None:
    pair = Pair()
    offer_id = pair.offer(an_offer(1))
    pair.connect(Version.V6_0)
    assert pair.guest.features == SUPPORTED_FEATURES
    ring = pair.gpadl(1)
    pair.run()
    pair.post(pair.guest.open(1, ring, 4, connection_id=0x7000, event_flag=2000))
    pair.run()
    request = pair.opened[offer_id].request
    assert (request.connection_id, request.event_flag) == (0x7000, 2000)
    pair.connect(Version.V5_3)
    ring = pair.gpadl(1)
    pair.run()
    with pytest.raises(LocalProtocolError, match="choose"):
        pair.guest.open(1, ring, 4, event_flag=2000)


def test_default_connection_and_flag() -> None:
    pair = Pair()
    offer_id = pair.offer(an_offer(1))
    pair.connect(Version.V5_3)
    pair.open(1)
    request = pair.opened[offer_id].request
    assert (request.connection_id, request.event_flag) == (0x2001, 1)


@pytest.mark.parametrize(("version", "expected"), [(Version.V2_4, 0), (Version.V3_0, 3), (Version.V5_3, 3)])
def test_messages_go_to_the_vp_asked_for(version: Version, expected: int) -> None:
    pair = Pair(guest=GuestMachine(message_vp=3))
    pair.connect(version)
    assert {a.vp for a in pair.actions if isinstance(a, act.Send)} == {expected}
    assert {a.sint for a in pair.actions if isinstance(a, act.Send)} == {2}


def test_interrupts_can_be_disabled() -> None:
    pair = Pair()
    offer_id = pair.offer(an_offer(1))
    pair.connect(Version.V5_3)
    ring = pair.gpadl(1)
    pair.run()
    pair.post(pair.guest.open(1, ring, 4, target_vp=wire.VP_INDEX_DISABLE_INTERRUPT))
    pair.run()
    assert pair.opened[offer_id].request.target_vp is None
    pair.post(pair.guest.modify_channel(1, 0))
    (answer,) = pair.run()
    assert isinstance(answer, act.ChannelRetargeted)
    assert answer.status != 0


def test_reserved_channel_outlives_unload_and_reconnect() -> None:
    pair = Pair()
    first = pair.offer(an_offer(1))
    pair.connect(Version.V5_3)
    gpadl_id = pair.gpadl(1)
    pair.run()
    pair.post(pair.guest.open_reserved(1, gpadl_id, 4))
    pair.run()
    pair.post(pair.guest.unload())
    pair.run()
    assert list(pair.opened) == [first]
    assert len(pair.mapped) == 1
    pair.post(pair.guest.close_reserved(1))
    assert pair.run() == [act.ReservedClosed(1)]
    assert not pair.opened
    assert not pair.mapped
    pair.connect(Version.V4_0)
    assert list(pair.guest.channels) == [1], "offered again"
    pair.check_agreement()


@pytest.mark.parametrize("version", [Version.V4_0, Version.V6_0])
def test_a_reserved_channel_that_is_closed_through_a_later_connection(version: Version) -> None:
    """Its guest still knows it and what belongs to it; it opens it again or gives it back as any other."""
    pair = Pair()
    first, second = pair.offer(an_offer(1)), pair.offer(an_offer(2))
    pair.connect(Version.V5_3)
    ids = {c.offer.key: n for n, c in pair.guest.channels.items()}
    mine, other = ids[an_offer(1).key], ids[an_offer(2).key]
    ring, spare = pair.gpadl(mine), pair.gpadl(mine)
    pair.run()
    pair.post(pair.guest.open_reserved(mine, ring, 4))
    pair.run()
    pair.connect(version)
    assert sorted(pair.guest.channels) == sorted(ids.values())
    assert not pair.guest.has_gpadl(spare), "only the ring outlives the connection"
    pair.check_agreement()
    pair.post(pair.guest.close_reserved(mine))
    assert pair.run() == [act.ReservedClosed(mine)]
    pair.check_agreement()
    pair.post(pair.guest.open_reserved(mine, ring, 4))
    assert pair.run() == [act.OpenAnswered(mine, 0)]
    pair.post(pair.guest.close_reserved(mine))
    pair.run()
    pair.post(pair.guest.teardown_gpadl(mine, ring))
    assert pair.run() == [act.GpadlGone(ring)]
    pair.post(pair.guest.release(mine))
    assert pair.run() == [], "given back, it is offered with the next connection"
    assert list(pair.guest.channels) == [other]
    pair.connect(version)
    assert len(pair.guest.channels) == 2
    assert {first, second} == set(pair.host.channels)
    pair.check_agreement()


def test_the_answer_to_a_reserved_open_goes_to_its_own_vp_and_sint() -> None:
    pair = Pair()
    pair.offer(an_offer(1))
    pair.connect(Version.V5_3)
    gpadl_id = pair.gpadl(1)
    pair.run()
    actions = pair.host.receive(encode(wire.OpenReservedChannel(1, 3, 5, gpadl_id, 4)))
    (opened,) = (a for a in actions if isinstance(a, act.OpenDevice))
    expected = wire.OpenChannelResult(1, 0, wire.Status.SUCCESS)
    assert pair.host.complete_open(opened.serial, True) == [act.Send(encode(expected), 3, 5)]
    assert pair.host.channels[1].state is ChannelState.RESERVED


def test_a_reserved_open_that_the_device_refuses() -> None:
    pair = Pair(accept_open=False)
    pair.offer(an_offer(1))
    pair.connect(Version.V5_3)
    gpadl_id = pair.gpadl(1)
    pair.run()
    pair.post(pair.guest.open_reserved(1, gpadl_id, 4))
    assert pair.run() == [act.OpenAnswered(1, wire.Status.UNSUCCESSFUL)]
    assert pair.guest.channels[1].state is ChannelState.OFFERED
    pair.check_agreement()
    pair.accept_open = True
    pair.post(pair.guest.open(1, gpadl_id, 4))  # as an ordinary channel then
    assert pair.run() == [act.OpenAnswered(1, 0)]
    pair.post(pair.guest.close(1))
    pair.post(pair.guest.teardown_gpadl(1, gpadl_id))
    assert pair.run() == [act.GpadlGone(gpadl_id)]
    pair.check_agreement()


@pytest.mark.parametrize("ok", [True, False])
@pytest.mark.parametrize("reconnect", [True, False])
def test_a_reserved_open_that_is_answered_after_its_connection(ok: bool, reconnect: bool) -> None:
    pair = Pair(accept_open=None)
    first = pair.offer(an_offer(1))
    pair.connect(Version.V5_3)
    gpadl_id = pair.gpadl(1)
    pair.run()
    pair.post(pair.guest.open_reserved(1, gpadl_id, 4))
    pair.run()
    with pytest.raises(LocalProtocolError):
        pair.guest.close_reserved(1)
    pair.post(pair.guest.unload())
    pair.run()
    if reconnect:
        pair.connect(Version.V6_0)
    assert list(pair.opened) == [first], "not closed by the end of its connection"
    pair.complete_held(0, ok)
    status = 0 if ok else wire.Status.UNSUCCESSFUL
    assert pair.run() == [act.OpenAnswered(1, status)]
    refused = ChannelState.OFFERED if reconnect else ChannelState.ABSENT
    assert pair.host.channels[first].state is (ChannelState.RESERVED if ok else refused)
    assert bool(pair.opened) == ok
    assert bool(pair.mapped) == (ok or reconnect), "a guest that is connected may tear its memory down itself"
    pair.check_agreement()


def test_a_reserved_channel_that_is_rescinded_while_it_opens() -> None:
    pair = Pair(accept_open=None)
    first = pair.offer(an_offer(1))
    pair.connect(Version.V5_3)
    gpadl_id = pair.gpadl(1)
    pair.run()
    pair.post(pair.guest.open_reserved(1, gpadl_id, 4))
    pair.run()
    pair.rescind(first)
    assert kinds(pair.run()) == [act.OpenAnswered, act.ChannelRescinded]
    pair.complete_held(0, True)
    pair.post(pair.guest.teardown_gpadl(1, gpadl_id))
    pair.run()
    pair.post(pair.guest.release(1))
    assert pair.run() == []
    assert pair.host.channels == {}
    pair.check_agreement()


def test_a_reserved_open_that_crosses_its_rescind_is_answered() -> None:
    pair = Pair()
    first = pair.offer(an_offer(1))
    pair.connect(Version.V5_3)
    gpadl_id = pair.gpadl(1)
    pair.run()
    pair.post(pair.guest.open_reserved(1, gpadl_id, 4))
    pair.rescind(first)
    assert kinds(pair.run()) == [act.ChannelRescinded, act.OpenAnswered]
    pair.post(pair.guest.teardown_gpadl(1, gpadl_id))
    pair.run()
    pair.post(pair.guest.release(1))
    pair.run()
    pair.check_agreement()


def test_a_service_may_be_asked_for_before_the_offers() -> None:
    pair = Pair()
    pair.offer(an_offer(1))
    pair.post(pair.guest.connect([Version.V5_3]))
    pair.run()
    pair.post(pair.guest.tl_connect(UUID(int=5), UUID(int=6)))
    pair.post(pair.guest.tl_connect(UUID(int=7), UUID(int=8)))
    pair.run()
    assert [a.endpoint_id for a in pair.actions if isinstance(a, act.TlConnect)] == [UUID(int=5), UUID(int=7)]
    pair.obey(pair.host.refuse_tl_connect(UUID(int=5), UUID(int=6)))
    assert kinds(pair.run()) == [act.TlConnectAnswered]
    pair.offer(Offer(UUID(int=8), UUID(int=7)))
    assert pair.run() == [], "the guest has not asked for offers"
    pair.post(pair.guest.request_offers())
    assert kinds(pair.run()) == [act.OfferSeen, act.OfferSeen, act.AllOffersSeen]


def test_offers_say_nothing_of_what_was_not_agreed_on() -> None:
    flags = wire.OfferFlags.NAMED_PIPE_MODE | wire.OfferFlags.PARENT_OFFER
    secret = wire.OfferFlags.CONFIDENTIAL_RING_BUFFER | wire.OfferFlags.CONFIDENTIAL_EXTERNAL_MEMORY
    pinned = wire.OfferFlags.REQUIRE_PINNED_EXTERNAL_MEMORY
    pair = Pair()
    pair.offer(an_offer(1, flags=flags | secret | pinned))
    pair.connect(Version.V6_0)
    assert pair.guest.channels[1].offer.flags == flags


def test_a_channel_without_a_monitor_says_so_in_its_monitor_id_too() -> None:
    pair = Pair()
    for number, latency in ((1, None), (2, 100_000)):
        pair.offer(an_offer(number, monitor_latency=latency))
    pair.connect(Version.V5_3)
    sent = [a.payload for a in pair.actions if isinstance(a, act.Send)]
    offers = [wire.OfferChannel.unpack(p, 8) for p in sent if type_of(p) is MessageType.OFFER_CHANNEL]
    assert [(o.monitor_allocated, o.monitor_id) for o in offers] == [(0, 0xFF), (1, 0)]


def test_reset_closes_reserved_channels_too() -> None:
    pair = Pair()
    pair.offer(an_offer(1))
    pair.connect(Version.V5_3)
    gpadl_id = pair.gpadl(1)
    pair.run()
    pair.post(pair.guest.open_reserved(1, gpadl_id, 4))
    pair.run()
    pair.obey(pair.host.reset())
    assert not pair.opened
    assert not pair.mapped
    assert pair.host.state is LinkState.IDLE
    assert pair.host.channels[1].state is ChannelState.ABSENT


def test_offer_again_waits_for_the_release() -> None:
    pair = Pair()
    old = pair.offer(an_offer(1))
    pair.connect(Version.V5_3)
    pair.rescind(old)
    new = pair.offer(an_offer(1))
    assert kinds(pair.run()) == [act.ChannelRescinded], "not offered while the guest still knows the old one"
    with pytest.raises(LocalProtocolError, match="already"):
        pair.host.offer(an_offer(1))
    pair.post(pair.guest.release(1))
    assert kinds(pair.run()) == [act.OfferSeen]
    assert act.OfferGone(old) in pair.actions
    assert pair.host.channel(1) is pair.host.channels[new]
    pair.check_agreement()


def test_offer_again_taken_back_before_it_was_announced() -> None:
    pair = Pair()
    old = pair.offer(an_offer(1))
    pair.connect(Version.V5_3)
    pair.rescind(old)
    new = pair.offer(an_offer(1))
    pair.rescind(new)
    pair.run()
    pair.post(pair.guest.release(1))
    assert pair.run() == []
    assert pair.host.channels == {}


def test_relids_are_used_again_only_after_release() -> None:
    pair = Pair()
    ids = [pair.offer(an_offer(n)) for n in range(3)]
    pair.connect(Version.V5_3)
    pair.rescind(ids[0])
    pair.run()
    pair.offer(an_offer(10))
    pair.run()
    assert sorted(pair.guest.channels) == [1, 2, 3, 4]
    gone = next(n for n, c in pair.guest.channels.items() if c.state is ChannelState.RESCINDED)
    pair.post(pair.guest.release(gone))
    pair.run()
    pair.offer(an_offer(11))
    pair.run()
    assert pair.guest.channels[gone].offer.key == an_offer(11).key


def test_2047_channels_and_no_more() -> None:
    pair = Pair()
    for n in range(2047):
        pair.host.offer(an_offer(n))
    with pytest.raises(LocalProtocolError, match="2047"):
        pair.host.offer(an_offer(5000))
    pair.post(pair.guest.connect([Version.V5_3]))
    pair.run()
    actions = pair.host.receive(encode(wire.RequestOffers()))
    assert len(actions) == 2048
    assert sorted(c.channel_id for c in pair.host.channels.values()) == list(range(1, 2048))


def test_monitor_ids_are_shared_out_and_come_back() -> None:
    pair = Pair()
    ids = [pair.offer(an_offer(n, monitor_latency=1000)) for n in range(130)]
    pair.connect(Version.V5_3)
    given = [c.offer.monitor_id for c in pair.guest.channels.values()]
    assert sorted(n for n in given if n is not None) == list(range(128))
    assert given.count(None) == 2
    for offer_id in ids:
        pair.rescind(offer_id)
    pair.run()
    for channel_id in list(pair.guest.channels):
        pair.post(pair.guest.release(channel_id))
    pair.run()
    pair.offer(an_offer(500, monitor_latency=1000))
    pair.run()
    assert [c.offer.monitor_id for c in pair.guest.channels.values()] == [0]


def test_no_monitor_ids_without_pages() -> None:
    pair = Pair(guest=GuestMachine())
    pair.offer(an_offer(1, monitor_latency=1000))
    pair.connect(Version.V5_3)
    assert pair.guest.channels[1].offer.monitor_id is None


def test_monitor_pages_stay_while_a_monitored_channel_is_open() -> None:
    pair = Pair()
    pair.offer(an_offer(1, monitor_latency=1000))
    pair.connect(Version.V6_0)
    pair.open(1)
    pair.post(pair.guest.modify_connection(None))
    assert pair.run() == [act.MonitorPagesAnswered(False)]
    assert pair.guest.monitor_pages == pair.host.monitor_pages == MONITOR_PAGES


def test_monitor_pages_move_beside_channels_that_are_not_rung_through_them() -> None:
    pair = Pair()
    pair.offer(an_offer(1, monitor_latency=1000))
    pair.offer(an_offer(2, monitor_latency=1000))
    pair.connect(Version.V6_0)
    ring = pair.gpadl(1)
    pair.run()
    pair.post(pair.guest.open(1, ring, 4, target_vp=wire.VP_INDEX_DISABLE_INTERRUPT))
    pair.run()
    assert pair.host.channel(1).state is ChannelState.OPEN  # type: ignore[union-attr]
    other = act.MonitorPages(0x6000, 0x7000)
    pair.post(pair.guest.modify_connection(other))
    assert pair.run() == [act.MonitorPagesAnswered(True)]
    assert pair.host.monitor_pages == other
    pair.open(2)
    pair.post(pair.guest.modify_connection(MONITOR_PAGES))
    assert pair.run() == [act.MonitorPagesAnswered(False)]
    pair.post(pair.guest.modify_connection(other))  # nothing changes for anybody
    assert pair.run() == [act.MonitorPagesAnswered(True)]


def test_local_misuse_changes_nothing() -> None:
    pair = Pair()
    pair.offer(an_offer(1))
    guest = pair.guest
    for call in (guest.request_offers, guest.unload, guest.resume, lambda: guest.close(1)):
        with pytest.raises(LocalProtocolError):
            call()
    pair.connect(Version.V5_3)
    ring = pair.gpadl(1)
    with pytest.raises(LocalProtocolError, match="owes"):
        guest.release(1)
    pair.run()
    for misuse in (
        guest.request_offers,
        lambda: guest.close(1),
        lambda: guest.open(1, ring + 1, 4),
        lambda: guest.open(2, ring, 4),
        lambda: guest.open(1, ring, 4, user_data=bytes(121)),
        lambda: guest.teardown_gpadl(1, ring + 1),
        lambda: guest.create_gpadl(1, ranges_of(8190 + 1)),
    ):
        with pytest.raises(LocalProtocolError):
            misuse()
        pair.check()
    pair.post(guest.open(1, ring, 4))
    for misuse in (lambda: guest.teardown_gpadl(1, ring), lambda: guest.release(1)):
        with pytest.raises(LocalProtocolError):
            misuse()
    pair.run()
    assert guest.channels[1].state is ChannelState.OPEN
    pair.check_agreement()


def test_largest_gpadl() -> None:
    pair = Pair()
    pair.offer(an_offer(1))
    pair.connect(Version.V5_3)
    gpadl_id = pair.gpadl(1, 8190)
    assert pair.run() == [act.GpadlAnswered(1, gpadl_id, 0)]
    (mapped,) = pair.mapped.values()
    assert mapped.data == ranges_of(8190)


def test_guest_refuses_what_no_host_may_say() -> None:
    pair = Pair()
    pair.offer(an_offer(1))
    pair.connect(Version.V5_3)
    offer = pair.guest.channels[1].offer
    second = offer.to_message()
    second.channel_id = 2
    outside = an_offer(7).to_message()
    outside.channel_id = 2048
    for message in (
        offer.to_message(),
        second,
        outside,
        wire.AllOffersDelivered(),
        wire.OpenChannelResult(1, 0, 0),
        wire.OpenChannelResult(9, 1, 0),
        wire.GpadlCreated(1, 5, 0),
        wire.GpadlTorndown(5),
        wire.UnloadComplete(),
        wire.CloseReservedResponse(1),
        wire.ModifyChannelResponse(1, 0),
        wire.VersionResponse(1, 0, 0, 4),
        wire.PauseResponse(),
    ):
        with pytest.raises(RemoteProtocolError):
            pair.guest.receive(encode(message))
        pair.check()
    pair.check_agreement()

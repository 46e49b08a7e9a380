"""The bytes of the control messages, against the sizes that Linux's and OpenVMM's structures have."""

import contextlib
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmbus.bus import wire
from vmbus.bus.codec import MESSAGES, Sender, Variant, encode, parse
from vmbus.bus.offer import Offer
from vmbus.bus.versions import DISCONNECTED, FeatureFlags, Version, features_of, version_name
from vmbus.bus.wire import MessageType
from vmbus.errors import RemoteProtocolError

ALL_FEATURES = FeatureFlags(0xFF)
VARIANTS = [variant for variants in MESSAGES.values() for variant in variants]

# sizeof() of Linux's packed structures (include/linux/hyperv.h), header included, without flexible parts
LINUX_SIZES = {
    wire.OfferChannel: 196,
    wire.RescindChannelOffer: 12,
    wire.OpenChannel: 148,
    wire.OpenChannelResult: 20,
    wire.CloseChannel: 12,
    wire.GpadlHeader: 20,
    wire.GpadlBody: 16,
    wire.GpadlCreated: 20,
    wire.GpadlTeardown: 16,
    wire.GpadlTorndown: 12,
    wire.RelIdReleased: 12,
    wire.InitiateContact: 40,
    wire.VersionResponse: 16,
    wire.ModifyChannel: 16,
    wire.ModifyChannelResponse: 16,
    wire.TlConnectRequest: 40,
    wire.Unload: 8,
}


@pytest.mark.parametrize("structure", LINUX_SIZES, ids=lambda s: s.__name__)
def test_sizes_are_those_of_linux(structure: type[wire.Message]) -> None:
    assert LINUX_SIZES[structure] == wire.HEADER_SIZE + structure.SIZE


def test_every_message_has_a_variant_and_one_sender() -> None:
    assert sorted(MESSAGES) == list(MessageType)
    for kind, variants in MESSAGES.items():
        assert variants, kind
        assert len({v.sender for v in variants}) == 1
        sizes = [v.structure.SIZE for v in variants]
        assert sizes == sorted(sizes, reverse=True), "the longest variant is tried first"


def test_gpadl_capacity_is_that_of_linux() -> None:
    # vmbus creates bodies of (240 - 16) / 8 pages, headers of (240 - 20 - 8) / 8 pages behind a range header
    assert wire.GPADL_HEADER_VALUES - 1 == 26
    assert wire.GPADL_BODY_VALUES == 28


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.structure.__name__)
def test_each_variant_comes_back(variant: Variant) -> None:
    raw = bytes((7 * i + 1) & 0xFF for i in range(variant.structure.SIZE))
    message = variant.structure.unpack(raw)
    version = variant.min_version
    features = variant.features or FeatureFlags.NONE
    tail = bytes(range(16)) if variant.tail else b""
    back = parse(encode(message, tail), variant.sender, version, features)
    assert type(back.message) is variant.structure
    assert back.message == message
    assert back.tail == tail


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.structure.__name__)
def test_each_variant_keeps_its_conditions(variant: Variant) -> None:
    payload = encode(variant.structure.unpack(bytes(variant.structure.SIZE)))
    other = Sender.HOST if variant.sender is Sender.GUEST else Sender.GUEST
    with pytest.raises(RemoteProtocolError):
        parse(payload, other, Version.V6_0, ALL_FEATURES)
    older = [v for v in (DISCONNECTED, *Version) if v < variant.min_version]
    for version in older:
        with contextlib.suppress(RemoteProtocolError):
            assert (
                type(parse(payload, variant.sender, version, ALL_FEATURES).message) is not variant.structure
            )
    if variant.features:
        try:
            parsed = parse(payload, variant.sender, Version.V6_0, ALL_FEATURES & ~variant.features)
            assert type(parsed.message) is not variant.structure
        except RemoteProtocolError:
            pass


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.structure.__name__)
def test_truncated(variant: Variant) -> None:
    payload = encode(variant.structure.unpack(bytes(variant.structure.SIZE)))
    for length in range(len(payload)):
        try:
            parsed = parse(payload[:length], variant.sender, variant.min_version, variant.features)
        except RemoteProtocolError:
            continue
        assert variant.by_size, "only a message with a shorter form may be cut"
        assert type(parsed.message) is not variant.structure


def test_oversized_and_unknown() -> None:
    with pytest.raises(RemoteProtocolError, match="241 bytes"):
        parse(bytes(241), Sender.GUEST)
    for number in (0, 30, 99, 0xFFFF_FFFF):
        with pytest.raises(RemoteProtocolError, match=str(number)):
            parse(wire.Header(number).pack(), Sender.GUEST, Version.V6_0, ALL_FEATURES)
    with pytest.raises(ValueError, match="does not fit"):
        encode(wire.GpadlBody(0, 1), bytes(225))


@given(st.binary(max_size=260), st.sampled_from(Sender), st.sampled_from([0, *Version]), st.integers(0, 0xFF))
def test_any_bytes_parse_or_are_refused(payload: bytes, sender: Sender, version: int, features: int) -> None:
    try:
        parsed = parse(payload, sender, version, features)
    except RemoteProtocolError:
        return
    rebuilt = encode(parsed.message, parsed.tail)
    assert payload[8 : len(rebuilt)] == rebuilt[8:]


def test_features_need_version_6() -> None:
    for version in Version:
        expected = FeatureFlags.CLIENT_ID if version >= Version.V6_0 else FeatureFlags.NONE
        assert features_of(version, FeatureFlags.CLIENT_ID | FeatureFlags.GPA_PINNING) == expected
    assert " ".join(map(version_name, Version)) == "0.13 1.1 2.4 3.0 4.0 4.1 5.0 5.1 5.2 5.3 6.0"


def test_offer_comes_back() -> None:
    offer = Offer(UUID(int=1), UUID(int=2), b"x" * 120, 0x10, 8, 3, None, 7, 0x2007, True, 37)
    assert Offer.from_message(offer.to_message()) == offer
    assert offer.subchannel(4).key == (UUID(int=1), UUID(int=2), 4)
    with pytest.raises(ValueError, match="120"):
        Offer(UUID(int=1), UUID(int=2), b"x" * 121)
    with pytest.raises(ValueError, match="mmio"):
        Offer(UUID(int=1), UUID(int=2), mmio_megabytes=1 << 16)


def test_status_signed() -> None:
    assert wire.Status.UNSUCCESSFUL.signed == -0x3FFFFFFF
    assert wire.Status.SUCCESS.signed == 0

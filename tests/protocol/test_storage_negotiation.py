"""The storage negotiation, both state machines back to back, without any ring."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmbus.errors import LocalProtocolError, RemoteProtocolError
from vmbus.storage.negotiation import TRANSITIONS, GuestNegotiation, HostNegotiation, State
from vmbus.storage.wire import (
    ChannelProperties,
    NtStatus,
    Operation,
    PacketHeader,
    ProtocolVersion,
    ScsiRequest,
    Version,
    parse_scsi_request,
    rules,
)


def answer(host: HostNegotiation, packet: bytes) -> bytes:
    header = PacketHeader.unpack(packet)
    status, body = host.receive(header.operation, packet[PacketHeader.SIZE :])
    return PacketHeader(Operation.COMPLETE_IO, 0, status).pack() + body.ljust(52, b"\0")


def negotiate(guest: GuestNegotiation, host: HostNegotiation) -> None:
    for _ in range(20):
        if guest.done:
            return
        guest.receive(answer(host, guest.request()))
    raise AssertionError("no end")


@pytest.mark.parametrize("version", list(Version))
def test_each_version_can_be_agreed_upon(version: Version) -> None:
    created: list[int] = []
    guest = GuestNegotiation([version], sub_channels=5)
    host = HostNegotiation(max_sub_channels=3, max_transfer=1 << 20, create=created.append)
    negotiate(guest, host)
    assert guest.rules is host.rules is rules(version)
    assert host.state is State.READY
    assert guest.properties.max_transfer_bytes == 1 << 20
    multi = version >= Version.WIN8
    assert created == ([3] if multi else [])
    assert guest.sub_channels == (3 if multi else 0)


@pytest.mark.parametrize("oldest_host", list(Version))
def test_the_guest_goes_down_to_what_the_host_knows(oldest_host: Version) -> None:
    host = HostNegotiation(versions=[oldest_host])
    guest = GuestNegotiation()
    negotiate(guest, host)
    assert guest.rules is not None
    assert guest.rules.version == oldest_host


def test_no_common_version_is_an_error_at_the_guest_and_leaves_the_host_waiting() -> None:
    host = HostNegotiation(versions=[Version.WIN6])
    guest = GuestNegotiation([Version.THRESHOLD])
    guest.receive(answer(host, guest.request()))
    guest.receive(answer(host, guest.request()))
    with pytest.raises(RemoteProtocolError, match="none of our"):
        guest.request()
    assert host.state is State.VERSION


@pytest.mark.parametrize("version", [0, 0x0100, 0x0601, 0x0603, 0xFFFF])
def test_an_unknown_version_is_a_revision_mismatch(version: int) -> None:
    host = HostNegotiation()
    host.receive(Operation.BEGIN_INITIALIZATION, b"")
    status, body = host.receive(Operation.QUERY_PROTOCOL_VERSION, ProtocolVersion(version).pack())
    assert status == NtStatus.REVISION_MISMATCH
    assert ProtocolVersion.unpack(body).major_minor == version
    assert host.rules is None


@pytest.mark.parametrize(("state", "operation"), list(itertools.product(State, Operation)))
def test_the_table_decides_what_is_answered(state: State, operation: Operation) -> None:
    host = HostNegotiation(max_sub_channels=1, create=lambda count: None)
    host.state = state
    host.rules = rules(Version.THRESHOLD)
    payload = {
        Operation.QUERY_PROTOCOL_VERSION: ProtocolVersion(Version.THRESHOLD).pack(),
        Operation.CREATE_SUB_CHANNELS: b"\1\0",
    }.get(operation, b"")
    status, _ = host.receive(operation, payload)
    if (state, operation) in TRANSITIONS:
        assert status == NtStatus.SUCCESS
        assert host.state is TRANSITIONS[state, operation]
    else:
        assert status == NtStatus.INVALID_DEVICE_STATE
        assert host.state is state


@given(st.lists(st.tuples(st.integers(0, 20), st.binary(max_size=60)), max_size=30))
def test_nothing_a_guest_sends_breaks_the_host(packets: list[tuple[int, bytes]]) -> None:
    host = HostNegotiation(max_sub_channels=2, create=lambda count: None)
    for operation, payload in packets:
        before = host.state
        status, body = host.receive(operation, payload)
        assert len(body) <= 52
        if status != NtStatus.SUCCESS:
            assert host.state is before
        else:
            assert host.state is TRANSITIONS[before, operation]


@given(st.lists(st.binary(max_size=70), max_size=12))
def test_a_hostile_host_gets_an_error_never_a_crash(completions: list[bytes]) -> None:
    guest = GuestNegotiation(sub_channels=4)
    try:
        for completion in completions:
            if guest.done:
                break
            guest.request()
            guest.receive(completion)
    except RemoteProtocolError:
        assert not guest.done


def test_more_sub_channels_than_offered_are_refused() -> None:
    created: list[int] = []
    host = HostNegotiation(max_sub_channels=2, create=created.append)
    negotiate(GuestNegotiation(), host)
    assert host.receive(Operation.CREATE_SUB_CHANNELS, b"\3\0")[0] == NtStatus.INVALID_PARAMETER
    assert host.receive(Operation.CREATE_SUB_CHANNELS, b"\1")[0] == NtStatus.INVALID_PARAMETER
    assert host.receive(Operation.CREATE_SUB_CHANNELS, b"\2\0")[0] == NtStatus.SUCCESS
    assert created == [2]


def test_a_single_channel_version_offers_none() -> None:
    host = HostNegotiation(max_sub_channels=2, create=lambda count: None)
    host.receive(Operation.BEGIN_INITIALIZATION, b"")
    host.receive(Operation.QUERY_PROTOCOL_VERSION, ProtocolVersion(Version.WIN7).pack())
    properties = ChannelProperties.unpack(host.receive(Operation.QUERY_PROPERTIES, b"")[1])
    assert (properties.flags, properties.max_sub_channel_count) == (0, 0)
    assert host.receive(Operation.CREATE_SUB_CHANNELS, b"\1\0")[0] == NtStatus.INVALID_DEVICE_STATE


def test_misuse_of_the_guest_end_changes_nothing() -> None:
    guest = GuestNegotiation()
    guest.request()
    with pytest.raises(LocalProtocolError):
        guest.request()
    assert guest.state is State.BEGIN


@pytest.mark.parametrize("size", [36, 52, 56])
def test_requests_of_old_and_new_size_parse(size: int) -> None:
    request = ScsiRequest(target_id=1, lun=2, payload=b"\x28" * 20, srb_flags=0x40).pack()
    packet = PacketHeader(Operation.EXECUTE_SRB).pack() + request.ljust(56, b"\xee")[:size]
    parsed = parse_scsi_request(packet)
    assert (parsed.target_id, parsed.lun, parsed.payload) == (1, 2, b"\x28" * 20)
    assert parsed.srb_flags == (0x40 if size >= 52 else 0)


def test_a_request_without_room_for_a_command_is_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="35 of 36"):
        parse_scsi_request(bytes(12 + 35))

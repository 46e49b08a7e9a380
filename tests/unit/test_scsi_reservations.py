"""Persistent reservations between three initiators (SPC-4 5.13)."""

import struct
from collections.abc import Iterator
from uuid import UUID

import pytest

from vmbus.storage.disk import MemoryDisk
from vmbus.storage.scsi import BytesBuffer, DiskUnit, Sense, Task
from vmbus.storage.scsi.codes import AdditionalSense, ScsiStatus, SenseKey

A, B, C = "a", "b", "c"
OBSERVER = "o"  # gets no unit attentions
KEYS = {A: 0xA0A0, B: 0xB0B0, C: 0xC0C0}
REGISTER, RESERVE, RELEASE, CLEAR, PREEMPT, ABORT, IGNORE = range(7)
WE, EA, WERO, EARO, WEAR, EAAR = 1, 3, 5, 6, 7, 8


@pytest.fixture
def unit() -> Iterator[DiskUnit]:
    with MemoryDisk(1 << 20) as disk:
        made = DiskUnit(disk, UUID(int=1))
        for nexus in KEYS:
            made.attach(nexus)
        yield made


def execute(
    unit: DiskUnit, nexus: str, cdb: bytes, data: bytes | int = 512
) -> tuple[int, Sense | None, bytes]:
    buffer = BytesBuffer(data)
    outcome = unit.execute(Task(cdb.ljust(16, b"\0"), buffer, nexus))
    sense = Sense.unpack(outcome.sense) if outcome.sense else None
    return outcome.status, sense, bytes(buffer.content[: outcome.transferred])


def out(unit: DiskUnit, nexus: str, action: int, key: int, new: int = 0, kind: int = 0) -> int:
    data = struct.pack(">QQ8x", key, new)
    return execute(unit, nexus, struct.pack(">BBBxxIx", 0x5F, action, kind, 24), data)[0]


def keys(unit: DiskUnit) -> tuple[int, list[int]]:
    data = execute(unit, OBSERVER, bytes([0x5E, 0, 0, 0, 0, 0, 0, 2, 0]))[2]
    generation, length = struct.unpack(">II", data[:8])
    return generation, [int.from_bytes(data[at : at + 8], "big") for at in range(8, 8 + length, 8)]


def held(unit: DiskUnit) -> tuple[int, int] | None:
    data = execute(unit, OBSERVER, bytes([0x5E, 1, 0, 0, 0, 0, 0, 2, 0]))[2]
    if int.from_bytes(data[4:8], "big") == 0:
        return None
    return int.from_bytes(data[8:16], "big"), data[21]


def register(unit: DiskUnit, *who: str) -> None:
    for nexus in who:
        assert out(unit, nexus, REGISTER, 0, KEYS[nexus]) == ScsiStatus.GOOD


def may(unit: DiskUnit, nexus: str) -> tuple[bool, bool]:
    """Whether the nexus may read and write."""
    read = execute(unit, nexus, bytes([0x28, 0, 0, 0, 0, 0, 0, 0, 1]))[0]
    write = execute(unit, nexus, bytes([0x2A, 0, 0, 0, 0, 0, 0, 0, 1]))[0]
    assert {read, write} <= {ScsiStatus.GOOD, ScsiStatus.RESERVATION_CONFLICT}
    return read == ScsiStatus.GOOD, write == ScsiStatus.GOOD


@pytest.mark.parametrize(
    ("kind", "registered", "stranger"),
    [
        (WE, (True, False), (True, False)),
        (EA, (False, False), (False, False)),
        (WERO, (True, True), (True, False)),
        (EARO, (True, True), (False, False)),
        (WEAR, (True, True), (True, False)),
        (EAAR, (True, True), (False, False)),
    ],
)
def test_who_may_do_what(
    unit: DiskUnit, kind: int, registered: tuple[bool, bool], stranger: tuple[bool, bool]
) -> None:
    register(unit, A, B)
    assert out(unit, A, RESERVE, KEYS[A], kind=kind) == ScsiStatus.GOOD
    assert held(unit) == (0 if kind in (WEAR, EAAR) else KEYS[A], kind)
    assert not unit.plain
    assert may(unit, A) == (True, True)
    assert may(unit, B) == registered
    assert may(unit, C) == stranger
    for harmless in (bytes([0x00]), bytes([0x12, 0, 0, 0, 36]), bytes([0x25])):
        assert execute(unit, C, harmless)[0] == ScsiStatus.GOOD
    assert out(unit, A, RELEASE, KEYS[A], kind=kind) == ScsiStatus.GOOD
    assert held(unit) is None
    if kind in (WE, EA):
        assert unit.plain
    else:
        _, sense, _ = execute(unit, B, bytes([0x00]))
        assert sense == Sense(SenseKey.UNIT_ATTENTION, AdditionalSense.RESERVATIONS_RELEASED)
    assert may(unit, C) == (True, True)


def test_registration(unit: DiskUnit) -> None:
    assert keys(unit) == (0, [])
    assert out(unit, A, REGISTER, 5, 6) == ScsiStatus.RESERVATION_CONFLICT  # not registered yet
    register(unit, A, B)
    assert keys(unit) == (2, [KEYS[A], KEYS[B]])
    assert out(unit, A, REGISTER, KEYS[A], 0x1234) == ScsiStatus.GOOD
    assert out(unit, A, REGISTER, KEYS[A], 0x5678) == ScsiStatus.RESERVATION_CONFLICT
    assert out(unit, B, IGNORE, 99, 0x9999) == ScsiStatus.GOOD
    assert keys(unit) == (4, [0x1234, 0x9999])
    assert out(unit, B, REGISTER, 0x9999, 0) == ScsiStatus.GOOD
    assert keys(unit)[1] == [0x1234]


def test_only_the_registered_may_reserve_and_only_once(unit: DiskUnit) -> None:
    assert out(unit, A, RESERVE, 0, kind=WE) == ScsiStatus.RESERVATION_CONFLICT
    register(unit, A, B)
    assert out(unit, A, RESERVE, KEYS[B], kind=WE) == ScsiStatus.RESERVATION_CONFLICT
    assert out(unit, A, RESERVE, KEYS[A], kind=WE) == ScsiStatus.GOOD
    assert out(unit, A, RESERVE, KEYS[A], kind=WE) == ScsiStatus.GOOD
    assert out(unit, A, RESERVE, KEYS[A], kind=EA) == ScsiStatus.RESERVATION_CONFLICT
    assert out(unit, B, RESERVE, KEYS[B], kind=WE) == ScsiStatus.RESERVATION_CONFLICT
    assert out(unit, B, RELEASE, KEYS[B], kind=WE) == ScsiStatus.GOOD  # not the holder: nothing happens
    assert held(unit) == (KEYS[A], WE)
    status, sense, _ = execute(
        unit, A, struct.pack(">BBBxxIx", 0x5F, RELEASE, EA, 24), struct.pack(">QQ8x", KEYS[A], 0)
    )
    assert status == ScsiStatus.CHECK_CONDITION
    assert sense is not None
    assert sense.additional == AdditionalSense.INVALID_RELEASE_OF_PERSISTENT_RESERVATION


def test_unregistering_the_holder_releases(unit: DiskUnit) -> None:
    register(unit, A, B)
    out(unit, A, RESERVE, KEYS[A], kind=WERO)
    assert out(unit, A, REGISTER, KEYS[A], 0) == ScsiStatus.GOOD
    assert held(unit) is None
    _, sense, _ = execute(unit, B, bytes([0x00]))
    assert sense == Sense(SenseKey.UNIT_ATTENTION, AdditionalSense.RESERVATIONS_RELEASED)


def test_with_all_registrants_the_last_one_releases(unit: DiskUnit) -> None:
    register(unit, A, B)
    out(unit, A, RESERVE, KEYS[A], kind=EAAR)
    out(unit, A, REGISTER, KEYS[A], 0)
    assert held(unit) == (0, EAAR)
    assert may(unit, A) == (False, False)
    assert may(unit, B) == (True, True)
    out(unit, B, REGISTER, KEYS[B], 0)
    assert held(unit) is None


@pytest.mark.parametrize("action", [PREEMPT, ABORT])
def test_preempting_takes_over(unit: DiskUnit, action: int) -> None:
    register(unit, A, B, C)
    out(unit, A, RESERVE, KEYS[A], kind=EA)
    assert may(unit, B) == (False, False)
    assert out(unit, B, action, KEYS[B], KEYS[A], EA) == ScsiStatus.GOOD
    assert held(unit) == (KEYS[B], EA)
    assert keys(unit)[1] == [KEYS[B], KEYS[C]]
    _, sense, _ = execute(unit, A, bytes([0x28, 0, 0, 0, 0, 0, 0, 0, 1]))
    assert sense == Sense(SenseKey.UNIT_ATTENTION, AdditionalSense.REGISTRATIONS_PREEMPTED)
    assert may(unit, A) == (False, False)
    assert out(unit, B, action, KEYS[B], 0xDEAD, EA) == ScsiStatus.RESERVATION_CONFLICT


def test_preempting_all_registrants(unit: DiskUnit) -> None:
    register(unit, A, B, C)
    out(unit, A, RESERVE, KEYS[A], kind=WEAR)
    assert out(unit, C, PREEMPT, KEYS[C], KEYS[A], WE) == ScsiStatus.GOOD  # only the registration goes
    assert held(unit) == (0, WEAR)
    assert out(unit, C, PREEMPT, KEYS[C], 0, WE) == ScsiStatus.GOOD
    assert held(unit) == (KEYS[C], WE)
    assert keys(unit)[1] == [KEYS[C]]


def test_clear(unit: DiskUnit) -> None:
    register(unit, A, B)
    out(unit, A, RESERVE, KEYS[A], kind=EA)
    assert out(unit, B, CLEAR, KEYS[B]) == ScsiStatus.GOOD
    assert (held(unit), keys(unit)[1]) == (None, [])
    _, sense, _ = execute(unit, A, bytes([0x00]))
    assert sense == Sense(SenseKey.UNIT_ATTENTION, AdditionalSense.RESERVATIONS_PREEMPTED)


def test_capabilities_and_full_status(unit: DiskUnit) -> None:
    capabilities = execute(unit, A, bytes([0x5E, 2, 0, 0, 0, 0, 0, 0, 64]))[2]
    assert capabilities == bytes([0, 8, 0, 0x80, 0xEA, 0x01, 0, 0])
    register(unit, A, B)
    out(unit, A, RESERVE, KEYS[A], kind=WE)
    data = execute(unit, A, bytes([0x5E, 3, 0, 0, 0, 0, 0, 2, 0]))[2]
    rest, found = data[8:], []
    while rest:
        key, holds, kind, more = struct.unpack(">Q4xBB4x2xI", rest[:24])
        assert more % 4 == 0
        found.append((key, holds & 1, kind))
        rest = rest[24 + more :]
    assert found == [(KEYS[A], 1, WE), (KEYS[B], 0, 0)]


@pytest.mark.parametrize(
    ("cdb", "data", "additional"),
    [
        (struct.pack(">BBBxxIx", 0x5F, 0, 0, 23), bytes(24), AdditionalSense.PARAMETER_LIST_LENGTH_ERROR),
        (struct.pack(">BBBxxIx", 0x5F, 0, 0, 24), bytes(20), AdditionalSense.INVALID_FIELD_IN_CDB),
        (struct.pack(">BBBxxIx", 0x5F, 7, 0, 24), bytes(24), AdditionalSense.INVALID_FIELD_IN_CDB),
        (struct.pack(">BBBxxIx", 0x5F, RESERVE, 0x11, 24), bytes(24), AdditionalSense.INVALID_FIELD_IN_CDB),
        (struct.pack(">BBBxxIx", 0x5F, RESERVE, 2, 24), bytes(24), AdditionalSense.INVALID_FIELD_IN_CDB),
        (
            struct.pack(">BBBxxIx", 0x5F, 0, 0, 24),
            bytes(20) + b"\1" + bytes(3),
            AdditionalSense.INVALID_FIELD_IN_PARAMETER_LIST,
        ),
        (struct.pack(">BB", 0x5E, 4), bytes(24), AdditionalSense.INVALID_FIELD_IN_CDB),
    ],
)
def test_malformed_requests(unit: DiskUnit, cdb: bytes, data: bytes, additional: int) -> None:
    status, sense, _ = execute(unit, A, cdb, data)
    assert status == ScsiStatus.CHECK_CONDITION
    assert sense is not None
    assert sense.additional == additional


def test_a_guest_that_leaves_keeps_its_reservation(unit: DiskUnit) -> None:
    register(unit, A)
    out(unit, A, RESERVE, KEYS[A], kind=EA)
    unit.detach(A)
    unit.reset()
    for nexus in (B, C):
        execute(unit, nexus, bytes([0x00]))
        assert may(unit, nexus) == (False, False)
        for kind in (WE, EA):
            assert out(unit, nexus, RESERVE, 0, kind=kind) == ScsiStatus.RESERVATION_CONFLICT


def test_whoever_is_gone_for_good_is_told_nothing(unit: DiskUnit) -> None:
    """Its registration stays, and may be preempted; but nobody is left to take a unit attention, which would keep the
    unit from the compiled path for ever."""
    register(unit, A, B)
    assert out(unit, A, RESERVE, KEYS[A], kind=WERO) == ScsiStatus.GOOD
    unit.detach(B)
    assert out(unit, A, PREEMPT, KEYS[A], KEYS[B], kind=WERO) == ScsiStatus.GOOD
    assert out(unit, A, CLEAR, KEYS[A]) == ScsiStatus.GOOD
    assert not unit.attention_pending()
    assert unit.plain


def test_reserve_6_and_persistent_reservations_exclude_each_other(unit: DiskUnit) -> None:
    """SPC-2 5.5.1: not even its holder gets around a reservation by RESERVE (6)."""
    assert execute(unit, A, bytes([0x16]))[0] == ScsiStatus.GOOD
    for nexus in (A, B):
        assert out(unit, nexus, REGISTER, 0, KEYS[nexus]) == ScsiStatus.RESERVATION_CONFLICT
        assert (
            execute(unit, nexus, bytes([0x5E, 0, 0, 0, 0, 0, 0, 2, 0]))[0] == ScsiStatus.RESERVATION_CONFLICT
        )
    assert execute(unit, A, bytes([0x17]))[0] == ScsiStatus.GOOD
    register(unit, A, B)
    assert execute(unit, A, bytes([0x16]))[0] == ScsiStatus.RESERVATION_CONFLICT

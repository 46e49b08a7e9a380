"""The virtual switch: kinds, learning, VLANs, guards, mirroring, and its counters."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmbus.errors import LocalProtocolError
from vmbus.network.switch import (
    BROADCAST,
    Access,
    MacTable,
    Mirror,
    Port,
    PortKind,
    Switch,
    SwitchKind,
    Trunk,
    strip_tag,
    tag_frame,
)


def mac(number: int) -> bytes:
    return b"\x02\0\0\0" + number.to_bytes(2, "big")


def frame(destination: bytes, source: bytes, payload: bytes = b"payload") -> bytes:
    return destination + source + b"\x88\xb5" + payload


class Sink(list[bytes]):
    """Collects what leaves through a port, and how many calls it came in."""

    calls = 0

    def __call__(self, frames: list[bytes]) -> None:
        self.calls += 1
        self += frames


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def switch(clock: Clock) -> Switch:
    return Switch(SwitchKind.EXTERNAL, clock=clock)


def add(switch: Switch, name: str, **options: object) -> tuple[Port, Sink]:
    sink = Sink()
    return switch.connect(name, receiver=sink, **options), sink  # type: ignore[arg-type]


def test_unknown_is_flooded_and_known_is_not(switch: Switch) -> None:
    (a, out_a), (b, out_b), (_, out_c) = add(switch, "a"), add(switch, "b"), add(switch, "c")
    a.send([frame(mac(2), mac(1))])
    assert (len(out_a), len(out_b), len(out_c)) == (0, 1, 1)
    b.send([frame(mac(1), mac(2))])
    a.send([frame(mac(2), mac(1))] * 3)
    assert (len(out_a), len(out_b), len(out_c)) == (1, 4, 1)
    assert out_b.calls == 2  # three frames in one delivery
    a.send([frame(BROADCAST, mac(1)), frame(b"\x33\x33\0\0\0\1", mac(1))])
    assert (len(out_b), len(out_c)) == (6, 3)
    assert (a.counters.received_broadcast, a.counters.received_multicast) == (1, 1)
    assert a.counters.received_frames == 6
    assert b.counters.sent_frames == 6
    assert a.counters.to_dict()["received_bytes"] == 6 * 21


def test_an_address_moves_with_its_owner(switch: Switch) -> None:
    (a, out_a), (b, out_b), (c, _) = add(switch, "a"), add(switch, "b"), add(switch, "c")
    a.send([frame(BROADCAST, mac(1))])
    b.send([frame(BROADCAST, mac(1))])
    out_a.clear()
    out_b.clear()
    c.send([frame(mac(1), mac(3))])
    assert (len(out_a), len(out_b)) == (0, 1)


def test_addresses_age(switch: Switch, clock: Clock) -> None:
    (a, _), (b, _), (_, out_c) = add(switch, "a"), add(switch, "b"), add(switch, "c")
    b.send([frame(BROADCAST, mac(2))])
    out_c.clear()
    clock.now += 299
    a.send([frame(mac(2), mac(1))])
    assert out_c == []
    clock.now += 2
    a.send([frame(mac(2), mac(1))])
    assert len(out_c) == 1
    assert [entry[1] for entry in switch.table.entries()] == [mac(1)]
    clock.now += 1000
    a.send([frame(mac(9), mac(7))])  # ageing cleans up what nobody asks for
    assert [entry[1] for entry in switch.table.entries()] == [mac(7)]


def test_a_flood_of_addresses_stays_bounded_and_hurts_nobody(clock: Clock) -> None:
    switch = Switch(clock=clock, table=MacTable(capacity=100, per_port=50))
    (a, _), (b, _), (c, out_c) = add(switch, "a"), add(switch, "b"), add(switch, "c")
    a.send([frame(BROADCAST, mac(n)) for n in range(1, 1000)])
    assert len(switch.table) == 50
    b.send([frame(BROADCAST, mac(2000))])
    out_c.clear()
    c.send([frame(mac(2000), mac(3000))])
    a.send([frame(mac(2000), mac(1))])
    assert out_c == []
    assert len(switch.table) == 52
    b.send([frame(BROADCAST, mac(n)) for n in range(1, 1000)])  # takes over what was learned on a
    assert len(switch.table) <= 100
    switch.disconnect(b)
    switch.disconnect(a)
    assert len(switch.table) == 1


def test_a_frame_never_comes_back(switch: Switch) -> None:
    a, out_a = add(switch, "a")
    a.send([frame(mac(1), mac(1)), frame(BROADCAST, mac(1))])
    assert out_a == []
    assert a.counters.dropped_no_target == 2


@pytest.mark.parametrize(
    ("bad", "counter"),
    [
        (b"\0" * 13, "dropped_malformed"),
        (frame(mac(2), BROADCAST), "dropped_malformed"),
        (frame(mac(2), bytes(6)), "dropped_malformed"),
        (frame(mac(2), mac(1), bytes(9300)), "dropped_malformed"),
        (frame(bytes.fromhex("0180c2000000"), mac(1)), "dropped_reserved"),
        (frame(bytes.fromhex("0180c200000e"), mac(1)), "dropped_reserved"),
        (tag_frame(frame(mac(2), mac(1)), 5), "dropped_vlan"),
    ],
)
def test_bad_frames_are_dropped_and_counted(switch: Switch, bad: bytes, counter: str) -> None:
    (a, _), (_, out_b) = add(switch, "a"), add(switch, "b")
    a.send([bad])
    assert out_b == []
    assert getattr(a.counters, counter) == 1


def test_longer_frames_than_a_port_takes_do_not_reach_it(switch: Switch) -> None:
    (a, _), (_, out_b) = add(switch, "a"), add(switch, "b", max_frame=1514)
    a.send([frame(mac(2), mac(1), bytes(1501)), frame(mac(2), mac(1), bytes(1500))])
    assert [len(f) for f in out_b] == [1514]


def test_spoof_guard(switch: Switch) -> None:
    (a, _), (_, out_b) = add(switch, "a", addresses=[mac(1)]), add(switch, "b")
    a.send([frame(BROADCAST, mac(9)), frame(BROADCAST, mac(1))])
    assert [f[6:12] for f in out_b] == [mac(1)]
    assert a.counters.dropped_spoofed == 1
    assert [entry[1] for entry in switch.table.entries()] == [mac(1)]


def test_vlans_keep_apart(switch: Switch) -> None:
    a10, out_a10 = add(switch, "a10", vlan=Access(10))
    _, out_b10 = add(switch, "b10", vlan=Access(10))
    a20, out_a20 = add(switch, "a20", vlan=Access(20))
    trunk, out_trunk = add(switch, "trunk", vlan=Trunk(frozenset({10, 20}), native=30))
    a30, out_a30 = add(switch, "a30", vlan=Access(30))
    a10.send([frame(BROADCAST, mac(1))])
    assert (len(out_b10), len(out_a20), len(out_trunk), len(out_a30)) == (1, 0, 1, 0)
    assert out_b10[0] == frame(BROADCAST, mac(1))
    assert out_trunk[0] == tag_frame(frame(BROADCAST, mac(1)), 10)
    # The same address in two VLANs is two stations.
    a20.send([frame(BROADCAST, mac(1))])
    out_trunk.clear()
    trunk.send([tag_frame(frame(mac(1), mac(5)), 10), tag_frame(frame(mac(1), mac(5)), 0xA000 | 20)])
    assert [len(out_a10), len(out_a20)] == [1, 1]
    assert out_a20[0] == frame(mac(1), mac(5))
    trunk.send([frame(BROADCAST, mac(5)), tag_frame(frame(BROADCAST, mac(5)), 40)])
    assert out_a30 == [frame(BROADCAST, mac(5))]
    assert trunk.counters.dropped_vlan == 1
    a30.send([frame(mac(5), mac(30))])
    assert out_trunk == [frame(mac(5), mac(30))]
    a10.send([tag_frame(frame(BROADCAST, mac(1)), 20)])
    assert a10.counters.dropped_vlan == 1
    a10.send([tag_frame(frame(BROADCAST, mac(1)), 0xE000)])  # a priority tag
    assert out_trunk[-1] == tag_frame(frame(BROADCAST, mac(1)), 0xE000 | 10)


def test_mirroring(switch: Switch) -> None:
    (a, _), (b, _) = add(switch, "a", mirror=Mirror.SOURCE), add(switch, "b")
    _, out_m = add(switch, "m", mirror=Mirror.DESTINATION)
    c, out_c = add(switch, "c")
    a.send([frame(mac(2), mac(1))])
    b.send([frame(mac(1), mac(2))])
    assert len(out_m) == 2
    c.send([frame(mac(2), mac(3))])  # passes no source port
    assert len(out_m) == 2
    c.send([frame(BROADCAST, mac(3))])  # reaches a
    assert len(out_m) == 3
    assert len(out_c) == 1
    switch.set_mirror(a, Mirror.NONE)
    a.send([frame(mac(2), mac(1))])
    assert len(out_m) == 3


def test_kinds_of_switches() -> None:
    private, internal = Switch(), Switch(SwitchKind.INTERNAL)
    external = Switch(SwitchKind.EXTERNAL)
    for kind in (PortKind.HOST, PortKind.UPLINK):
        with pytest.raises(LocalProtocolError):
            private.connect("x", kind)
    internal.connect("host", PortKind.HOST)
    with pytest.raises(LocalProtocolError, match="no uplink"):
        internal.connect("x", PortKind.UPLINK)
    external.connect("up", PortKind.UPLINK)
    with pytest.raises(LocalProtocolError, match="one uplink"):
        external.connect("up2", PortKind.UPLINK)
    with pytest.raises(LocalProtocolError, match="already"):
        external.connect("up")
    small = Switch(max_ports=1)
    small.connect("a")
    with pytest.raises(LocalProtocolError, match="no more"):
        small.connect("b")


def test_a_disconnected_port_is_silent(switch: Switch) -> None:
    (a, out_a), (b, _) = add(switch, "a"), add(switch, "b")
    a.send([frame(BROADCAST, mac(1))])
    a.disconnect()
    a.disconnect()
    a.send([frame(BROADCAST, mac(1))])
    b.send([frame(mac(1), mac(2))])
    assert out_a == []
    assert a.counters.received_frames == 1
    assert [port.name for port in switch.ports] == ["b"]
    again, out_again = add(switch, "a")
    b.send([frame(mac(1), mac(2))])
    assert len(out_again) == 1
    assert again.counters.sent_frames == 1


def test_receivers_may_send_and_threads_may_meet(switch: Switch) -> None:
    (a, _), (c, _) = add(switch, "a"), add(switch, "c")
    b = switch.connect("b")
    b.receiver = lambda frames: b.send([frame(f[6:12], mac(2)) for f in frames])
    done = []

    def work(port: Port, number: int) -> None:
        for _ in range(300):
            port.send([frame(mac(2), mac(number))])
        done.append(number)

    threads = [threading.Thread(target=work, args=(p, n)) for p, n in ((a, 1), (c, 3))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(done) == [1, 3]
    assert a.counters.sent_frames + c.counters.sent_frames >= 600


@pytest.mark.parametrize("bad", [-1, 4095])
def test_vlan_ids_are_checked(bad: int) -> None:
    with pytest.raises(ValueError, match="VLAN"):
        Access(bad)
    with pytest.raises(ValueError, match="VLAN"):
        Trunk(frozenset({bad}))


@given(st.binary(min_size=14, max_size=40), st.integers(0, 0xFFFF))
def test_tags_go_on_and_off(data: bytes, tci: int) -> None:
    assert strip_tag(tag_frame(data, tci)) == (data, tci)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5), st.integers(0, 5)), max_size=60))
def test_every_frame_reaches_exactly_who_should_have_it(sends: list[tuple[int, int, int]]) -> None:
    """Against the obvious model of a learning bridge."""
    switch = Switch()
    ports = [add(switch, name) for name in "abc"]
    where: dict[int, int] = {}
    for number, (port, source, destination) in enumerate(sends):
        payload = number.to_bytes(2, "big")
        ports[port][0].send([frame(mac(destination + 1), mac(source + 1), payload)])
        where[source] = port
        target = where.get(destination)
        expected = [n for n in range(3) if n != port and (target is None or n == target)]
        got = [n for n, (_, sink) in enumerate(ports) if any(f[14:] == payload for f in sink)]
        assert got == expected

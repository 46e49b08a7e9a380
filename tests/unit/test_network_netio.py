"""The compiled hot path of the network against the Python path and the obvious table of addresses."""

import random
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import mac_table, packets
from reference.netpair import Guest, frame, mac, make_pair, receive_all

from vmbus.core import netio
from vmbus.core.memory import Window
from vmbus.core.netswitch import MacTable
from vmbus.core.ring import COMPLETION, IN_BAND, RingReader, RingWriter
from vmbus.errors import RingCorrupt
from vmbus.network import rndis, wire
from vmbus.network.oid import PacketFilter
from vmbus.network.rndis import Frame, LargeSend
from vmbus.network.switch import BROADCAST, Switch, tag_frame
from vmbus.network.vsp import NetworkVsp
from vmbus.network.wire import MessageType

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["learn", "learn", "learn", "find", "age", "forget", "wait"]),
        st.integers(0, 3),
        st.integers(1, 30),
        st.integers(0, 1),
    ),
    max_size=120,
)


@given(STEPS)
def test_table_of_addresses_is_the_obvious_one(steps: list[tuple[str, int, int, int]]) -> None:
    ours, oracle = MacTable(capacity=20, per_port=8), mac_table.MacTable(capacity=20, per_port=8)
    now = 0.0
    for what, port, number, vlan in steps:
        address = number.to_bytes(6, "big")
        if what == "learn":
            assert ours.learn(vlan, address, port, now) == oracle.learn(vlan, address, port, now)
        elif what == "find":
            expected = oracle.find(vlan, address, now)
            assert ours.find(vlan, address, now) == (-1 if expected is None else expected)
        elif what == "age":
            assert ours.age(now) == oracle.age(now)
        elif what == "forget":
            ours.forget(port)
            oracle.forget(port)
        now += 140.0 if what == "wait" else 1.0
        assert sorted(ours.entries()) == sorted(oracle.entries())
        assert len(ours) == len(oracle)


def test_table_refuses_nonsense() -> None:
    table = MacTable()
    assert not table.learn(0, bytes(6), 1, 0.0)
    assert not table.learn(0, mac(1), 4096, 0.0)
    assert not table.learn(0, mac(1), -1, 0.0)
    for bad in (b"", bytes(5), bytes(7)):
        with pytest.raises(ValueError, match="address"):
            table.find(0, bad, 0.0)
    with pytest.raises(ValueError, match="port"):
        table.set_port(4096, 0, 0)
    with pytest.raises(ValueError, match="addresses"):
        MacTable(capacity=0)
    assert table.plan([frame(mac(1), mac(2))], 0, 4096, 0, None, 0.0, {}) == (0, 0)
    assert table.plan([bytearray(64)], 0, 0, 0, None, 0.0, {}) == (0, 0)  # type: ignore[list-item]


class SlowSwitch(Switch):
    """Everything in Python."""

    def _forward_plain(self, source: Any, frames: Any, at: int, now: float, outgoing: Any) -> int:
        return at


def without_plain(guest: Guest, host: bool, client: bool) -> None:
    guest.vsp.use_compiled_path = not host
    guest.nic.use_compiled_path = not client


def traffic(rng: random.Random, round_: int) -> list[Any]:
    """Frames of every kind, mostly plain ones."""
    result: list[Any] = []
    for _ in range(rng.randrange(1, 50)):
        to = rng.choice([mac(2)] * 8 + [BROADCAST, mac(9), b"\x33\x33\0\0\0\1", b"\x01\x80\xc2\0\0\1"])
        data = frame(to, mac(1), rng.randbytes(rng.choice([1, 46, 200, 1400, 1500])))
        kind = rng.random()
        if kind < 0.1:
            data = tag_frame(data, rng.choice((0, 0, 5)))
        elif kind < 0.15:
            large = packets.tcp_frame("10.0.0.1", "10.0.0.2", rng.randbytes(4000), checksum=0)
            result.append(Frame(to + large[6:], large_send=LargeSend(1000, 34).pack()))
            continue
        elif kind < 0.2:
            data = data[:6] + mac(1 + round_ % 3) + data[12:]
        result.append(data)
    return result


@pytest.mark.parametrize("slow", [(True, False, False), (False, True, False), (False, False, True)])
@given(seed=st.integers(0, 2**32))
@settings(max_examples=8, deadline=None)
def test_compiled_path_is_the_python_path(slow: tuple[bool, bool, bool], seed: int) -> None:
    outcome = []
    for plain in (False, True):
        rng = random.Random(seed)
        switch, a, b = make_pair()
        if plain is False:
            if slow[0]:
                switch._forward_plain = lambda s, f, at, n, o: at  # type: ignore[method-assign]
            for guest in (a, b):
                without_plain(guest, host=slow[1], client=slow[2])
        got: list[bytes] = []
        accepted = 0
        for round_ in range(6):
            if round_ == 4:
                b.nic.set_filter(PacketFilter.PROMISCUOUS)
            accepted += a.nic.send_batch(traffic(rng, round_))
            got += receive_all(b.nic)
        outcome.append(
            (
                accepted,
                got,
                asdict(a.vsp.statistics),
                asdict(b.vsp.statistics),
                a.port.counters.to_dict(),
                b.port.counters.to_dict(),
                a.nic.sent_frames,
                a.nic.sent_bytes,
                a.nic.failed_frames,
            )
        )
    assert outcome[0] == outcome[1]


def rings() -> tuple[RingWriter, RingReader, RingWriter, RingReader]:
    up, down = Window.allocate(4), Window.allocate(4)
    return RingWriter(up), RingReader(up), RingWriter(down), RingReader(down)


def host_queue(
    count: int = 8,
) -> tuple[netio.HostQueue, netio.ReceivePool, RingWriter, RingReader, memoryview]:
    to_host, reader, writer, from_host = rings()
    pool = netio.ReceivePool(Window.allocate(8), 2048, count)
    queue = netio.HostQueue(reader, writer, pool, 3, 0xCAFE, bytes(32), bytes(32))
    buffer = Window.allocate(8)
    queue.use_send_buffer(buffer, 4096, 8)
    return queue, pool, to_host, from_host, buffer.view()


def packet_of(section: int, size: int) -> bytes:
    return wire.pack_message(MessageType.SEND_RNDIS_PACKET, wire.SendRndisPacket(0, section, size))


@given(st.lists(st.tuples(st.integers(0, 10), st.integers(0, 0xFFFFFFFF)), max_size=3), st.integers(0, 4200))
@settings(max_examples=300, deadline=None)
def test_host_parses_what_the_python_parser_parses(damage: list[tuple[int, int]], cut: int) -> None:
    """Whatever the header says: the compiled parser either gives the same frames or leaves it to Python."""
    queue, _, to_host, _, view = host_queue()
    message = bytearray(
        rndis.pack_packet(Frame(bytes(range(60)))) + rndis.pack_packet(Frame(bytes(100)), alignment=8)
    )
    for word, value in damage:
        message[word * 4 : word * 4 + 4] = value.to_bytes(4, "little")
    size = min(cut, len(message)) if cut % 2 else len(message)
    view[: len(message)] = bytes(message)
    to_host.send(packet_of(0, size), 7, IN_BAND, 1)
    frames: list[bytes] = []
    taken, reason, _ = queue.drain(frames, 10)
    assert reason == (netio.DONE if taken else netio.SLOW)
    if taken:
        assert frames == [f.data for f in rndis.unpack_packets(bytes(message[:size]), 32)]
    else:
        assert frames == []


def test_host_leaves_what_is_not_plain() -> None:
    for payload, kind in (
        (packet_of(8, 100), IN_BAND),
        (packet_of(0, 4097), IN_BAND),
        (packet_of(0, 0), IN_BAND),
        (b"\x6b\0\0\0", IN_BAND),
        (bytes(32), IN_BAND),
        (packet_of(0, 100), 9),
    ):
        queue, _, to_host, from_host, view = host_queue()
        message = rndis.pack_packet(Frame(bytes(60)))
        view[: len(message)] = message
        to_host.send(packet_of(0, len(message)), 1, IN_BAND, 1)
        if kind == IN_BAND:
            to_host.send(payload, 2, kind, 1)
            frames: list[bytes] = []
            assert queue.drain(frames, 10)[:2] == (1, netio.SLOW)
            assert frames == [bytes(60)]
            assert [p.transaction_id for p in from_host.recv_packets(9)] == [1]


def test_receive_pool_knows_its_packets() -> None:
    pool = netio.ReceivePool(Window.allocate(8), 2048, 10)
    sections = [pool.take() for _ in range(4)]
    first, second = pool.commit(sections[:3], 0), pool.commit(sections[3:], 1)
    assert pool.in_flight() == {first: tuple(sections[:3]), second: tuple(sections[3:])}
    assert not pool.release(first, 1)
    assert not pool.release(sections[1], 0)
    assert (first, second) == (sections[0], sections[3])
    assert not pool.release(10, 0)
    assert not pool.release(1 << 32 | first, 0)
    assert not pool.release(2**64 - 1, 0)
    assert pool.release(first, 0)
    assert not pool.release(first, 0)
    assert pool.available == 9
    assert pool.drop(1) == 1
    assert pool.available == 10
    for bad in ([], [10], [sections[0]]):
        with pytest.raises(ValueError, match="section"):
            pool.commit(bad, 0)
    pool.give(5)
    pool.give(77)
    assert pool.available == 10
    with pytest.raises(ValueError, match="fit"):
        pool.write(0, bytes(2049))
    with pytest.raises(ValueError, match="fit"):
        pool.write(10, b"")
    assert pool.write(3, b"abc", 5) == 3 * 2048 + 5
    assert sorted(pool.take() for _ in range(10)) == list(range(10))
    assert pool.take() == -1
    pool.close()
    pool.close()
    pool.give(1)
    assert pool.available == 0
    with pytest.raises(ValueError, match="fit"):
        pool.write(0, b"")
    with pytest.raises(ValueError, match="do not fit"):
        netio.SendPool(Window.allocate(1), 4096, 9)


def test_delivery_stops_where_it_must() -> None:
    queue, pool, _, from_host, _ = host_queue(count=8)
    to = int.from_bytes(mac(2), "big")
    plain, tagged = frame(mac(2), mac(1)), tag_frame(frame(mac(2), mac(1)), 5)
    assert queue.deliver([plain, tagged, plain], 0, to, 1)[:2] == (1, netio.SLOW)
    assert queue.deliver([plain, tagged, plain], 2, to, 1)[:2] == (3, netio.DONE)
    assert queue.deliver([frame(mac(3), mac(1)), frame(BROADCAST, mac(1))], 0, to, 1)[:2] == (2, netio.DONE)
    assert queue.filtered == 2
    assert queue.deliver([plain] * 9, 0, to, 1)[:2] == (6, netio.NO_SECTION)
    got = from_host.recv_packets(9)
    assert [len(p.transfer_ranges) for p in got] == [1, 1, 6]
    assert {p.transfer_set_id for p in got} == {0xCAFE}
    assert pool.available == 0
    assert queue.take_received() == (8, 0, 0, 8 * len(plain), 0, 0)
    assert queue.take_received() == (0,) * 6
    pool.close()
    assert queue.deliver([plain], 0, to, 1)[:2] == (0, netio.SLOW)


def test_a_full_ring_gives_sections_back() -> None:
    queue, pool, _, from_host, _ = host_queue(count=8)
    filler = RingWriter(from_host.window)
    while filler.free_bytes > 100:
        filler.send(bytes(32))
    full, _, _, reader, _ = host_queue()
    del reader
    blocked = netio.HostQueue(rings()[1], filler, pool, 0, 1, bytes(32), bytes(64))
    plain = frame(mac(2), mac(1))
    assert blocked.deliver([plain] * 4, 0, 0, 32)[:2] == (0, netio.FULL)
    assert pool.available == 8
    assert blocked.take_received() == (0,) * 6
    del queue, full


def test_corrupt_rings_are_errors() -> None:
    queue, _, to_host, from_host, _ = host_queue()
    view = to_host.window.view()
    view[0:4] = (12345).to_bytes(4, "little")
    with pytest.raises(RingCorrupt):
        queue.drain([], 10)
    down = from_host.window.view()
    down[4:8] = (3).to_bytes(4, "little")
    pool = netio.ReceivePool(Window.allocate(8), 2048, 8)
    other = netio.HostQueue(rings()[1], RingWriter(Window.allocate(1)), pool, 0, 1, bytes(32), bytes(32))
    assert other.deliver([], 0, 0, 32) == (0, netio.DONE, False)
    view.release()
    down.release()


def test_completions_are_matched_by_the_guest() -> None:
    to_host, _, from_host, reader = rings()
    pool = netio.SendPool(Window.allocate(8), 4096, 8)
    guest = netio.GuestQueue(reader, to_host, pool, Window.allocate(8), 2048, 8, 0xCAFE, 32, 8, 8)
    assert guest.send([frame(mac(2), mac(1))] * 3, 0)[:2] == (3, netio.DONE)
    assert pool.available == 7
    answer = b"\x6c\0\0\0\1\0\0\0"
    for tid in (0, 1, 1 << 32 | 5, 2**64 - 1):
        from_host.send(answer, tid, COMPLETION)
        assert guest.drain([], 5)[:2] == (0, netio.SLOW)
        reader.recv()
    sent = RingReader(to_host.window).recv_packets(5)[0].transaction_id
    from_host.send(answer, sent, COMPLETION)
    assert guest.drain([], 5)[:2] == (1, netio.DONE)
    assert (guest.sent_frames, guest.failed_frames, pool.available) == (3, 0, 8)
    guest.close()
    guest.close()
    for bad in ((15, 8, 8), (65, 8, 8), (32, 0, 8), (32, 8, 3), (32, 8, 0)):
        with pytest.raises(ValueError, match="impossible"):
            netio.GuestQueue(reader, to_host, pool, Window.allocate(8), 2048, 8, 1, *bad)


def test_the_switch_sorts_as_the_slow_switch_does() -> None:
    rng = random.Random(5)
    for _ in range(20):
        seed = rng.getrandbits(32)
        outcomes = [play(kind(), random.Random(seed)) for kind in (Switch, SlowSwitch)]
        assert outcomes[0] == outcomes[1]


def play(switch: Switch, rng: random.Random) -> list[Any]:
    sinks: list[list[bytes]] = [[] for _ in range(4)]
    ports = [
        switch.connect(str(n), receiver=sinks[n].extend, addresses=[mac(1)] if n == 0 else None)
        for n in range(4)
    ]
    ports[3].max_frame = 100
    for _ in range(30):
        port = rng.choice(ports)
        batch = []
        for _ in range(rng.randrange(1, 10)):
            data = frame(rng.choice([mac(n) for n in range(1, 6)] + [BROADCAST]), mac(rng.randrange(1, 6)))
            batch.append(data + bytes(rng.choice((0, 60))))
        port.send(batch)
    return [*sinks, *(port.counters.to_dict() for port in ports)]


def test_a_vsp_has_the_compiled_path_once_it_can() -> None:
    _, a, _ = make_pair()
    assert isinstance(a.vsp, NetworkVsp)
    assert a.vsp._queues[0].plain is not None
    assert a.nic._plain is not None

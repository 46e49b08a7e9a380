"""The message sequences of drivers other than Linux's, and what OpenVMM's own tests expect of a provider."""

import struct

import pytest
from reference import packets
from reference.netpair import frame, mac, make_guest, receive_all, send_all
from reference.network_drivers import (
    DPDK,
    FREEBSD,
    HALT,
    KEEPALIVE,
    OPENBSD,
    OPENVMM,
    PAGE,
    RECEIVE_PAGE,
    UEFI,
    Driver,
    Rules,
    make_driver,
    packet,
)

from vmbus.bus.channel import loopback
from vmbus.core.ring import COMPLETION_REQUESTED
from vmbus.network import rndis
from vmbus.network.offload import check
from vmbus.network.switch import BROADCAST, Switch

NEWEST = (0x60001, 0x60000, 0x50000, 0x40000, 0x30002, 2)
UNTIL_5 = (0x50000, 0x40000, 0x30002, 2)
SUCCESS, FAILURE = 1, 2
CHECKSUM, LARGE_SEND, VLAN, HASH_VALUE, HASH_INFO = 0, 2, 6, 8, 9
FILTER, PERMANENT, CURRENT, LINK, SPEED, MTU = 0x1010E, 0x1010101, 0x1010102, 0x10114, 0x10107, 0x10106
RSS_CAPABILITIES, RSS, OFFLOADS, CAPABLE = 0x10203, 0x10204, 0xFC01020C, 0xFC01020D


def pair(rules: Rules, **config: object) -> tuple[Driver, object]:
    """A driver, and an honest guest of this package on the same switch."""
    switch = Switch()
    driver = make_driver(rules, switch, **config)
    other = make_guest(switch, 2)
    other.start()
    return driver, other.nic


def offload_capabilities(driver: Driver, revision: int, size: int) -> bytes:
    answer = driver.query(CAPABLE, struct.pack("<BBH", 0xA7, revision, size).ljust(size, b"\0"))
    kind, found, length = struct.unpack_from("<BBH", answer)
    assert (kind, found >= 1, 112 <= length <= len(answer) <= 156) == (0xA7, True, True)
    return answer


def offload_parameters(revision: int, size: int, *values: int) -> bytes:
    return (struct.pack("<BBH", 0x80, revision, size) + bytes(values)).ljust(size, b"\0")


def rss_parameters(size: int, flags: int, table: list[int], *, key_first: bool = False) -> bytes:
    entries, key = struct.pack(f"<{len(table)}I", *table), bytes(range(40))
    where = (40 + 40, 40) if key_first else (40, 40 + len(entries))
    head = struct.pack(
        "<BBHHHIHHIHHIIII",
        0x89,
        2,
        size,
        flags,
        0,
        0x701,
        len(entries),
        0,
        where[0],
        40,
        0,
        where[1],
        0,
        0,
        0,
    )
    return head + (key + entries if key_first else entries + key)


def tcp(size: int = 100, *, v6: bool = False, to: int = 2, checksum: int | None = 0) -> bytes:
    """A TCP segment to another guest, without its checksum."""
    addresses = ("fe80::1", "fe80::2") if v6 else ("10.0.0.1", "10.0.0.2")
    made = packets.tcp_frame(*addresses, bytes(size), checksum=checksum)
    return mac(to) + mac(3 - to) + made[12:]


def test_dpdk() -> None:
    driver, other = pair(DPDK, max_queues=4, table_entries=64)
    assert driver.negotiate(NEWEST) == 0x60001
    driver.configure(1514, 0x8 | 0x4, (6, 30))
    driver.hand_over()
    _, _, _, _, _, _, most, size, align = driver.initialize()
    assert most > 1
    assert size > driver.send_section
    assert driver.set(FILTER, bytes(4)) == 0
    assert driver.query(MTU) == struct.pack("<I", 1500)
    assert driver.query(PERMANENT) == mac(1)
    assert driver.query(LINK) == bytes(4)
    assert driver.query(SPEED) == struct.pack("<I", 100_000_000)
    able = struct.unpack_from("<39I", offload_capabilities(driver, 3, 156))
    assert (able[2] & 0x155, able[4] & 0x155, able[6] & 0x55, able[8] & 0x55) == (0x155, 0x155, 0x55, 0x55)
    assert driver.set(OFFLOADS, offload_parameters(3, 28, 3, 3, 3, 3, 3, 0, 0, 2, 2)) == 0
    # RSS: a query with the structure itself, then one request for sub-channels, off, and on with 128 entries.
    asked = struct.pack("<BBH", 0x88, 2, 18).ljust(18, b"\0")
    kind, revision, length, flags, _, queues, entries = struct.unpack(
        "<BBHIIIH", driver.query(RSS_CAPABILITIES, asked)
    )
    assert (kind, revision, length, queues, entries) == (0x88, 2, 18, 4, 64)
    assert flags & 0x301 == 0x301
    answer = driver.nvsp(133, 1, 3)
    assert answer is not None
    assert struct.unpack_from("<3I", answer) == (133, SUCCESS, 3)
    for index in range(1, 4):
        _, host_end = loopback(driver.guest.memory, 16, 16)
        driver.guest.vsp.add_subchannel(index, host_end)
    driver.poll()
    assert [note[0][:4] for note in driver.notes] == [b"\x86\0\0\0"]
    table = [n % 4 for n in range(128)]
    assert driver.set(RSS, rss_parameters(40, 0x10, table)) == 0
    assert driver.set(RSS, rss_parameters(40, 0, table)) == 0
    assert driver.set(FILTER, struct.pack("<I", 0xB)) == 0
    # Small frames one behind the other in a section, aligned to what the host said; each has a hash value.
    frames = [frame(mac(2), mac(1), bytes([n]) * (33 + n)) for n in range(4)]
    messages = [packet(data, (HASH_VALUE, 0), pad=1 << align) for data in frames[:3]]
    assert driver.in_section(1, b"".join([*messages, packet(frames[3], (HASH_VALUE, 0))])) == SUCCESS
    assert receive_all(other) == frames
    # A large one: headers in one page, data in others. TCP over IPv4, checksums by flags that say where TCP starts.
    data = tcp(1200)
    message = packet(data, (HASH_VALUE, 0), (VLAN, 0), (CHECKSUM, 1 | 4 | 16 | 34 << 16))
    cut = len(message) - len(data)
    assert driver.transfer([message[:cut], message[cut : cut + 500], message[cut + 500 :]]) == SUCCESS
    (got,) = receive_all(other)
    assert check(got) == rndis.ReceiveChecksum.IP_SUCCEEDED | rndis.ReceiveChecksum.TCP_SUCCEEDED
    message = packet(tcp(4000), (HASH_VALUE, 0), (LARGE_SEND, 1460 | 34 << 20 | 1 << 30))
    assert driver.transfer([message[:60], message[60:]]) == SUCCESS
    assert [len(part) for part in receive_all(other)] == [1514, 1514, 1134]
    # Frames to it: nothing may have an id that its array of packets does not have.
    seen = len(driver.messages)
    send_all(other, [frame(mac(1), mac(2), bytes([n]) * 60) for n in range(40)])
    driver.poll()
    assert len(driver.messages) == seen + 40
    assert driver.guest.vsp.statistics.violations == 0
    # It takes its buffers back first and halts RNDIS then, on a channel that it closes next.
    driver.revoke()
    driver.rid += 1
    assert driver.transfer([struct.pack("<3I", HALT, 12, driver.rid)], channel=1) == SUCCESS
    assert driver.transfer([packet(bytes(60))]) == FAILURE
    assert driver.guest.vsp.statistics.violations == 1
    driver.channel.close()
    assert not driver.guest.vsp.is_open


@pytest.mark.parametrize("version", NEWEST, ids=hex)
def test_dpdk_configures_its_port_again(version: int) -> None:
    """`rte_eth_dev_configure` with 2, 2 and 4 queues: offloads, sub-channels, RSS off and on, filter at the start."""
    driver, other = pair(DPDK, max_queues=4, versions=frozenset({version}))
    assert driver.negotiate(NEWEST) == version
    if version > 2:
        driver.configure(1514, 0xC if version >= 0x50000 else 8, (6, 30) if version >= 0x50000 else (6, 1))
    else:
        assert driver.nvsp(100, 6, 1, wanted=False) is None
    driver.hand_over()
    driver.initialize()
    known: list[int] = []
    for queues in (2, 2, 4):
        assert driver.set(FILTER, bytes(4)) == 0
        size = 28 if version >= 0x50000 else 22
        assert driver.set(OFFLOADS, offload_parameters(3 if size == 28 else 2, size, 3, 3, 0, 3)) == 0
        if version >= 0x50000:
            answer = driver.nvsp(133, 1, queues - 1)
            assert answer is not None
            assert len(answer) >= 40, "hn_nvs_execute refuses a shorter one"
            kind, status, more = struct.unpack_from("<3I", answer)
            assert (kind, status) == (133, SUCCESS)
            # It then waits for so many channels that it has not seen before.
            for index in range(len(known) + 1, len(known) + more + 1):
                _, host_end = loopback(driver.guest.memory, 16, 16)
                driver.guest.vsp.add_subchannel(index, host_end)
                known.append(index)
            assert known == list(range(1, queues))
            table = [n % queues for n in range(128)]
            assert driver.set(RSS, rss_parameters(40, 0x10, table)) == 0
            assert driver.set(RSS, rss_parameters(40, 0, table)) == 0
        assert driver.set(FILTER, struct.pack("<I", 0xB)) == 0
        sent = [frame(mac(2), mac(1), bytes([n]) * 60) for n in range(3)]
        assert driver.in_section(1, b"".join(packet(f, (HASH_VALUE, queues), pad=8) for f in sent)) == SUCCESS
        assert receive_all(other) == sent
        send_all(other, [frame(mac(1), mac(2), bytes([queues]) * 60)])
        driver.poll()
        assert driver.messages[-1].data.endswith(bytes([queues]) * 60)
    assert driver.guest.vsp.statistics.violations == 0


def test_ids_of_packets_in_flight_are_numbers_of_sections() -> None:
    """DPDK indexes an array of as many packets as there are sections with the transaction id."""
    for plain in (True, False):
        driver, other = pair(DPDK)
        driver.guest.vsp.use_compiled_path = plain
        driver.negotiate(NEWEST)
        driver.configure(1514, 8, (6, 30))
        driver.hand_over()
        driver.initialize()
        assert driver.set(FILTER, struct.pack("<I", 0xB)) == 0
        driver.acknowledge = False
        for _ in range(30):
            send_all(other, [frame(BROADCAST, mac(2))] * 3)
            driver.poll()
        ids = {message.transaction_id for message in driver.messages if message.channel == 0}
        assert len(ids) >= 30
        assert max(ids) < driver.sections
        for tid in ids:
            driver.complete(tid)
        assert driver.guest.vsp._receive is not None
        assert driver.guest.vsp._receive.available == driver.sections
        assert driver.guest.vsp.statistics.violations == 0


def test_freebsd() -> None:
    driver, other = pair(FREEBSD, max_queues=2)
    assert driver.negotiate(UNTIL_5) == 0x50000
    driver.configure(1500, 0x8, (6, 30))  # its MTU without the Ethernet header
    driver.hand_over()
    assert driver.section_size >= 1514 + 44
    driver.initialize()
    offload_capabilities(driver, 3, 156)
    assert driver.set(OFFLOADS, offload_parameters(3, 28, 4, 4, 4, 4, 4, 0, 0, 2, 0)) == 0
    assert driver.messages[-1].words(1)[0] == 0x40020006
    asked = struct.pack("<BBH", 0x88, 2, 18).ljust(18, b"\0")
    assert len(driver.query(RSS_CAPABILITIES, asked)) == 18
    assert struct.unpack_from("<3I", driver.nvsp(133, 1, 1) or b"") == (133, SUCCESS, 1)
    sub, host_end = loopback(driver.guest.memory, 16, 16)
    driver.guest.vsp.add_subchannel(1, host_end)
    assert driver.set(RSS, rss_parameters(40 + 512 + 40, 0, [n % 2 for n in range(128)])) == 0
    assert driver.set(FILTER, bytes(4)) == 0
    assert driver.query(PERMANENT) == mac(1)
    assert driver.query(LINK) == bytes(4)
    assert driver.set(FILTER, struct.pack("<I", 0xD)) == 0
    # LSO without the place of the TCP header, checksums without it too.
    assert driver.transfer([packet(tcp(3000), (HASH_VALUE, 1), (LARGE_SEND, 1460 | 1 << 30))]) == SUCCESS
    assert len(receive_all(other)) == 3
    assert driver.transfer([packet(tcp(), (HASH_VALUE, 1), (CHECKSUM, 1 | 4 | 16))]) == SUCCESS
    (got,) = receive_all(other)
    assert check(got) == rndis.ReceiveChecksum.IP_SUCCEEDED | rndis.ReceiveChecksum.TCP_SUCCEEDED
    # Towards it: the hash counts only with the information which hash it is.
    send_all(other, [tcp(50, to=1, checksum=None)])
    driver.poll()
    arrived = [m for m in driver.messages if m.kind == 1]
    if not arrived:
        taken = sub.incoming.recv_packets(9)
        assert len(taken) == 1
        length, offset = taken[0].transfer_ranges[0]
        data = driver.guest.memory.read(RECEIVE_PAGE * PAGE + offset, length)
    else:
        data = arrived[0].data
    found = information(data)
    assert found[CHECKSUM] & 0x28 == 0x28
    assert HASH_VALUE in found
    assert found[HASH_INFO] & 0x201 == 0x201
    driver.control(HALT, answered=False)
    driver.revoke()


def information(message: bytes) -> dict[int, int]:
    """The per-packet information of a packet message, walked as FreeBSD and DPDK do."""
    at, left = struct.unpack_from("<2I", message, 28)
    found = {}
    at += 8
    while left:
        size, kind, offset = struct.unpack_from("<3I", message, at)
        assert size <= left
        assert size % 4 == 0
        assert offset <= size
        found[kind] = struct.unpack_from("<I", message, at + offset)[0]
        at, left = at + size, left - size
    return found


def test_openbsd() -> None:
    driver, other = pair(OPENBSD)
    assert driver.negotiate(UNTIL_5) == 0x50000
    driver.configure(9 * 1024, 0x8, (6, 30))
    driver.hand_over()
    driver.initialize()
    assert driver.set(OFFLOADS, offload_parameters(3, 28, 4, 4, 4, 4, 4)) == 0
    assert driver.query(PERMANENT) == mac(1)
    assert driver.query(LINK) == bytes(4)
    assert driver.set(FILTER, struct.pack("<I", 0xD)) == 0
    # All checksum requests say IPv4, also those for TCP over IPv6.
    for data in (tcp(), tcp(70, v6=True)):
        message = packet(data, (VLAN, 0), (CHECKSUM, 1 | 4))
        cut = len(message) - len(data)
        assert driver.transfer([message[:cut], message[cut:]]) == SUCCESS
        (got,) = receive_all(other)
        assert check(got) & rndis.ReceiveChecksum.TCP_SUCCEEDED
    assert driver.set(FILTER, bytes(4)) == 0
    driver.control(HALT, answered=False)
    assert driver.nvsp(103, 0xCAFE, wanted=False) is None


def test_uefi() -> None:
    driver, other = pair(UEFI)
    assert driver.negotiate([0x50000]) == 0x50000
    driver.configure(1514, 0, (6, 0))
    driver.hand_over()
    driver.initialize(1514)
    for _ in range(2):
        assert driver.query(CURRENT) == mac(1)
    assert driver.set(FILTER, struct.pack("<I", 0x9)) == 0
    # Data goes over channel type 2; behind a whole RNDIS_MESSAGE, and the last word of the header is not set.
    data = frame(BROADCAST, mac(1))
    message = bytearray(packet(data, offset=44)[:52].ljust(52, b"\xaa") + data)
    struct.pack_into("<I", message, 4, len(message))
    struct.pack_into("<I", message, 40, 0xAFAFAFAF)
    assert driver.in_section(3, bytes(message), channel=2) == SUCCESS
    assert receive_all(other) == [data]
    send_all(other, [frame(mac(1), mac(2))])
    driver.poll()
    assert driver.messages[-1].data.endswith(frame(mac(1), mac(2)))
    driver.channel.close()


# ---- what OpenVMM's tests of its provider expect


def started(**config: object) -> Driver:
    driver = make_driver(OPENVMM, **config)
    assert driver.negotiate([0x50000]) == 0x50000
    driver.configure(1514, 0x4, (6, 30))
    driver.hand_over()
    return driver


def test_a_send_buffer_of_a_page_is_granted() -> None:
    driver = started()
    assert driver.send_section == 6144
    driver.initialize(0)
    # What fits it can be sent from it, the rest cannot.
    good = packet(frame(mac(2), mac(1)))
    assert driver.in_section(0, good) == SUCCESS
    assert driver.nvsp(107, 0, 0, 4097) is not None


@pytest.mark.parametrize("version", [0x50000, 0x60001])
def test_a_virtual_function_is_announced_with_a_completion_wanted(version: int) -> None:
    for completed in (True, False):
        driver = make_driver(OPENVMM)
        driver.guest.vsp.associate_vf(123)
        driver.negotiate([version])
        driver.configure(1514, 0x4, (6, 30))
        driver.hand_over()
        driver.initialize(0)
        ((payload, flags, tid),) = driver.notes
        assert struct.unpack_from("<3I", payload) == (128, 1, 123)
        assert len(payload) % 8 == 0
        assert flags & COMPLETION_REQUESTED
        if completed:
            driver.complete(tid, b"")
        paths: list[bool] = []
        driver.guest.vsp.on_data_path = paths.append
        for path in (1, 0):
            assert driver.nvsp(129, path) == b""
        assert paths == [True, False]
        driver.guest.vsp.associate_vf(None)
        driver.poll()
        assert struct.unpack_from("<3I", driver.notes[-1][0]) == (128, 0, 123)
        assert len(driver.notes) == 2
        assert driver.guest.vsp.statistics.violations == 0


def test_a_virtual_function_that_goes_while_it_is_used() -> None:
    driver = make_driver(OPENVMM)
    driver.guest.vsp.associate_vf(123)
    driver.negotiate([0x60001])
    driver.configure(1514, 0x4, (6, 30))
    driver.hand_over()
    driver.initialize(0)
    paths: list[bool] = []
    driver.guest.vsp.on_data_path = paths.append
    assert driver.nvsp(129, 1) == b""
    driver.complete(driver.notes.pop()[2], b"")
    driver.guest.vsp.associate_vf(None)
    driver.poll()
    back, gone = driver.notes
    assert struct.unpack_from("<2I", back[0]) == (129, 0)
    assert struct.unpack_from("<3I", gone[0]) == (128, 0, 123)
    assert back[1] & gone[1] & COMPLETION_REQUESTED
    for _, _, tid in (back, gone):
        driver.complete(tid, b"")
    assert driver.nvsp(129, 0) == b""
    assert paths == [True, False]
    assert driver.guest.vsp.statistics.violations == 0
    driver.complete(back[2], b"")  # nothing is waited for any more
    assert driver.guest.vsp.statistics.violations == 1


def test_packets_that_are_wrong_complete_with_failure() -> None:
    driver = started()
    driver.initialize(0)
    for at in (7777, 8888):
        assert driver.transfer([struct.pack("<11I", 1, 44, at, *[0] * 8)]) == FAILURE
    assert driver.transfer([packet(bytes(60))]) == SUCCESS


def test_data_may_stand_anywhere_in_the_message() -> None:
    """OpenVMM's tests let a frame begin inside of the header."""
    driver = started()
    driver.initialize(0)
    assert driver.transfer([packet(b"\xcc" * 60, offset=8)], channel=1) == SUCCESS
    two = packet(b"\xaa" * 20, offset=8) + packet(b"\xbb" * 20, offset=8)
    assert driver.transfer([two], channel=1) == SUCCESS
    empty = packet(b"\xaa" * 20, offset=8) + packet(b"", offset=8) + b"\xbb" * 20
    assert driver.transfer([empty], channel=1) == FAILURE


def test_requests_before_initialize_are_answered() -> None:
    driver = started()
    for kind, words in ((6, (0,)), (7, (0, 0, 0)), (9, (0, 0x10102, 0, 0, 0))):
        assert driver.transfer(
            [struct.pack(f"<{2 + len(words)}I", kind, 8 + 4 * len(words), *words)], channel=1
        )
    head = struct.pack("<BBHHHIHHIHHIIIII", 0x89, 1, 88, 0, 0, 1, 4, 0, 84, 40, 0, 44, 0, 0, 0, 0)
    assert driver.set(RSS, head + bytes(40) + bytes(4)) == 0


def test_offloads_that_a_frame_has_no_use_for_are_left_out() -> None:
    driver = started()
    driver.initialize(0)
    junk = b"\xcc" * 60
    for item in (
        (LARGE_SEND, 1460 | 34 << 20),
        (CHECKSUM, 1 | 4 | 16 | 34 << 16),
        (CHECKSUM, 1 | 4 | 16),
        (CHECKSUM, 2 | 4),
        (CHECKSUM, 4),
    ):
        assert driver.transfer([packet(junk, item)]) == SUCCESS
    assert driver.guest.port.counters.received_frames == 5
    for item in ((LARGE_SEND, 1460 | 100 << 20), (CHECKSUM, 1 | 4 | 100 << 16), (CHECKSUM, 1 | 4 | 20 << 16)):
        assert driver.transfer([packet(junk, item)]) == FAILURE
    assert driver.guest.port.counters.received_frames == 5


def test_mac_options_and_rss_without_a_table() -> None:
    driver = started(max_queues=2)
    driver.initialize(0)
    assert struct.unpack("<I", driver.query(0x10113))[0] & 0x24D == 0x24D
    head = struct.pack("<BBHHHIHHIHHIIIII", 0x89, 1, 84, 0, 0, 1, 0, 0, 84, 40, 0, 44, 0, 0, 0, 0)
    assert driver.set(RSS, head + bytes(40)) == 0xC0010015
    head = struct.pack("<BBHHHIHHIHHIIIII", 0x89, 1, 88, 0, 0, 1, 4, 0, 84, 40, 0, 44, 0, 0, 0, 0)
    assert driver.set(RSS, head + bytes(40) + struct.pack("<I", 1)) == 0
    answer = driver.nvsp(133, 1, 2)
    assert answer is not None
    assert struct.unpack_from("<2I", answer) == (133, FAILURE)


def test_statistics_are_as_long_as_there_is_room() -> None:
    driver = started()
    driver.initialize(0)
    assert driver.transfer([packet(frame(mac(2), mac(1)))]) == SUCCESS
    for oid in (0x20101, 0x20202):
        assert driver.query(oid) == struct.pack("<Q", 1)
        assert driver.query(oid, bytes(8)) == struct.pack("<Q", 1)
        assert driver.query(oid, bytes(4)) == struct.pack("<I", 1)


def keyword(name: str, value: str) -> bytes:
    """A string parameter of `OID_GEN_RNDIS_CONFIG_PARAMETER`."""
    label, text = name.encode("utf-16-le"), value.encode("utf-16-le")
    return struct.pack("<5I", 20, len(label), 2, 20 + len(label), len(text)) + label + text


def test_offloads_by_keyword() -> None:
    """Windows passes the settings of an adapter's properties on like this."""
    driver = started()
    driver.initialize(0)
    names = ("*IPChecksumOffloadIPv4", "*TCPChecksumOffloadIPv4", "*TCPChecksumOffloadIPv6")
    for name in (*names, "*UDPChecksumOffloadIPv4", "*UDPChecksumOffloadIPv6", "*LsoV2IPv4", "*LsoV2IPv6"):
        assert driver.set(0x1021B, keyword(name, "3")) == 0
    now = struct.unpack_from("<28I", driver.query(0xFC01020B))
    assert (now[2], now[4], now[6], now[8]) == (0x155, 0x155, 0x55, 0x55)
    assert now[20] == now[23] == 2
    for name, value in (
        ("*TCPChecksumOffloadIPv4", "1"),
        ("*UDPChecksumOffloadIPv6", "2"),
        ("*LsoV2IPv6", "0"),
    ):
        assert driver.set(0x1021B, keyword(name, value)) == 0
    now = struct.unpack_from("<28I", driver.query(0xFC01020B))
    assert (now[2] & 0x10, now[4] & 0x10, now[6] & 0x40, now[8] & 0x40) == (0x10, 0, 0, 0x40)
    assert (now[20], now[23]) == (2, 0)
    for wrong in ("", "x", "\u0663"):
        assert driver.set(0x1021B, keyword("*LsoV2IPv4", wrong)) == 0xC0010015
    assert driver.set(0x1021B, keyword("*Unheard", "x")) == 0


def test_sixteen_keepalives_without_reading() -> None:
    driver = started()
    driver.initialize(0)
    driver.acknowledge = False
    for _ in range(16):
        driver.control(KEEPALIVE)

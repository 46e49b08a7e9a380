"""Uplinks and capture files, against sockets, real TAP interfaces, and files written by hand."""

import io
import os
import select
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference.disk_model import tool

from vmbus.errors import DeviceError
from vmbus.network.pcapng import Capture, PcapngReader, PcapngWriter
from vmbus.network.switch import Mirror, PortKind, Switch, SwitchKind
from vmbus.network.uplink import LoopbackUplink, StreamUplink, TapUplink, attach

FRAME = b"\xff" * 6 + b"\x02\0\0\0\0\1" + b"\x88\xb5" + b"hello" * 10


@pytest.fixture
def pair() -> Iterator[tuple[StreamUplink, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with StreamUplink(ours) as uplink, theirs:
        yield uplink, theirs


def test_loopback_and_cable() -> None:
    alone = LoopbackUplink(capacity=2)
    alone.send([b"a", b"b", b"c"])
    assert alone.dropped == 1
    assert alone.receive(1) == [b"a"]
    assert alone.receive() == [b"b"]
    left, right = LoopbackUplink.pair()
    left.send([b"x"])
    right.send([b"y"])
    assert (left.receive(), right.receive(), left.fileno()) == ([b"y"], [b"x"], -1)
    left.send([b"x"])
    right.close()
    assert right.receive() == []


def test_stream_framing_is_qemus(pair: tuple[StreamUplink, socket.socket]) -> None:
    uplink, peer = pair
    uplink.send([b"abc", FRAME])
    assert peer.recv(1000) == b"\0\0\0\3abc" + len(FRAME).to_bytes(4, "big") + FRAME
    peer.sendall(b"\0\0\0\5he")
    assert uplink.receive() == []
    peer.sendall(b"llo\0\0\0\1x\0\0\0\1y\0\0")
    assert uplink.receive(2) == [b"hello", b"x"]
    assert uplink.receive() == [b"y"]
    peer.sendall(b"\0\2zz")
    assert uplink.receive() == [b"zz"]
    assert uplink.fileno() >= 0


@given(st.lists(st.binary(max_size=300), max_size=20), st.integers(1, 50))
def test_stream_takes_any_cut(frames: list[bytes], piece: int) -> None:
    ours, theirs = socket.socketpair()
    with StreamUplink(ours) as uplink, theirs:
        data = b"".join(len(f).to_bytes(4, "big") + f for f in frames)
        got: list[bytes] = []
        for at in range(0, len(data), piece):
            theirs.sendall(data[at : at + piece])
            got += uplink.receive()
        assert got == frames


def test_stream_backpressure_is_bounded_and_frames_stay_whole(
    pair: tuple[StreamUplink, socket.socket],
) -> None:
    uplink, peer = pair
    frames = [i.to_bytes(4, "big") * 300 for i in range(20_000)]
    uplink.send(frames)
    assert 0 < uplink.pending <= 4 << 20
    assert uplink.dropped > 0
    other = StreamUplink(peer)
    got: list[bytes] = []
    while uplink.pending or not got:
        got += other.receive(1000)
        uplink.flush()
    while more := other.receive(1000):
        got += more
    assert len(got) == len(frames) - uplink.dropped
    assert got == frames[: len(got)]


def test_stream_ends_are_errors(pair: tuple[StreamUplink, socket.socket]) -> None:
    uplink, peer = pair
    peer.sendall(b"\0\0\0\1a")
    peer.close()
    assert uplink.receive() == [b"a"]
    with pytest.raises(DeviceError, match="closed"):
        uplink.receive()
    uplink.send([b"b"])
    assert uplink.dropped == 1


def test_stream_refuses_impossible_lengths(pair: tuple[StreamUplink, socket.socket]) -> None:
    uplink, peer = pair
    peer.sendall(b"\xff\xff\xff\xffrubbish")
    with pytest.raises(DeviceError, match="4294967295"):
        uplink.receive()
    uplink.send([bytes(1 << 17)])
    assert uplink.dropped == 1


def test_stream_connect_says_who_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="nobody"):
        StreamUplink.connect(str(tmp_path / "nobody"))


def test_ports_of_uplinks() -> None:
    switch = Switch(SwitchKind.EXTERNAL)
    inside, outside = LoopbackUplink.pair()
    port = attach(switch, inside)
    seen: list[bytes] = []
    guest = switch.connect("guest", receiver=seen.extend)
    outside.send([FRAME])
    assert port.poll() == 1
    assert port.poll() == 0
    assert seen == [FRAME]
    reply = FRAME[6:12] + b"\x02\0\0\0\0\2" + FRAME[12:]
    guest.send([reply])
    assert outside.receive() == [reply]
    port.close()
    assert [p.name for p in switch.ports] == ["guest"]


def tap_or_skip(name: str = "", **options: object) -> TapUplink:
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        pytest.skip("no access to /dev/net/tun")
    try:
        return TapUplink(name, **options)  # type: ignore[arg-type]
    except DeviceError as error:
        pytest.skip(str(error))


def test_tap_moves_frames() -> None:
    with tap_or_skip(mtu=2000, up=True) as tap:
        index = socket.if_nametoindex(tap.name)
        assert Path(f"/sys/class/net/{tap.name}/mtu").read_text() == "2000\n"
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x88B5)) as raw:
            raw.bind((tap.name, 0x88B5))
            raw.settimeout(5)
            tap.send([FRAME])
            assert raw.recv(4000) == FRAME
            raw.send(FRAME + b"back")
            got: list[bytes] = []
            deadline = time.monotonic() + 5
            while FRAME + b"back" not in got and time.monotonic() < deadline:
                select.select([tap], [], [], 0.2)
                got += tap.receive()
            assert FRAME + b"back" in got
        assert index > 0
    with pytest.raises(OSError, match=r"no interface|No such device"):
        socket.if_nametoindex(tap.name)
    tap.close()


def test_tap_that_is_down_neither_sends_nor_breaks() -> None:
    with tap_or_skip() as tap:
        tap.send([FRAME])
        assert tap.dropped == 1
        assert tap.receive() == []


def test_tap_names_are_checked() -> None:
    with pytest.raises(DeviceError, match="longer"):
        TapUplink("a" * 16)
    if os.access("/dev/net/tun", os.R_OK | os.W_OK):
        with pytest.raises(DeviceError, match="TAP interface lo"):
            TapUplink("lo")


def test_pcapng_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "c.pcapng"
    times = iter([1_700_000_000_123_456_789, 1_700_000_001_000_000_001])
    with PcapngWriter(path, clock=lambda: next(times), interface="port a") as writer:
        writer([b"abc", FRAME])
        writer([b"defg"])
    with PcapngReader(path) as reader:
        assert list(reader) == [
            Capture(1_700_000_000_123_456_789, b"abc"),
            Capture(1_700_000_000_123_456_789, FRAME),
            Capture(1_700_000_001_000_000_001, b"defg"),
        ]


def test_pcapng_as_mirror_destination() -> None:
    file = io.BytesIO()
    switch = Switch()
    a = switch.connect("a", mirror=Mirror.SOURCE)
    switch.connect("m", mirror=Mirror.DESTINATION, receiver=PcapngWriter(file, snap_length=20))
    a.send([FRAME])
    file.seek(0)
    assert [c.frame for c in PcapngReader(file)] == [FRAME[:20]]


def test_tcpdump_reads_what_we_write(tmp_path: Path) -> None:
    tool("tcpdump")
    path = tmp_path / "c.pcapng"
    with PcapngWriter(path) as writer:
        writer([FRAME])
    out = subprocess.run(["tcpdump", "-r", str(path), "-ne"], capture_output=True, text=True, check=True)
    assert "0x88b5" in out.stdout


def block(order: str, kind: int, body: bytes) -> bytes:
    return struct.pack(order + "II", kind, len(body) + 12) + body + struct.pack(order + "I", len(body) + 12)


def test_pcapng_of_others() -> None:
    """Big-endian, microseconds, powers of two, simple packets, unknown blocks, a second section."""
    big = ">"
    section = block(big, 0x0A0D0D0A, struct.pack(">IHHq", 0x1A2B3C4D, 1, 0, -1))
    plain = block(big, 1, struct.pack(">HHI", 1, 0, 0))
    binary = block(big, 1, struct.pack(">HHIHHB3xHH", 1, 0, 0, 9, 1, 0x8A, 0, 0))
    packet = block(big, 6, struct.pack(">5I", 0, 0, 5, 3, 3) + b"abc\0")
    second = block(big, 6, struct.pack(">5I", 1, 0, 1024, 3, 3) + b"def\0")
    simple = block(big, 3, struct.pack(">I", 3) + b"ghi\0")
    unknown = block(big, 0xBAD, b"1234")
    little = block("<", 0x0A0D0D0A, struct.pack("<IHHq", 0x1A2B3C4D, 1, 0, -1))
    data = section + plain + binary + unknown + packet + second + simple + little
    assert list(PcapngReader(io.BytesIO(data))) == [
        Capture(5000, b"abc", 0),
        Capture(1_000_000_000, b"def", 1),
        Capture(0, b"ghi", 0),
    ]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [0x0A0D0D0A, 1, 3, 6, 0xBAD])
def test_blocks_of_every_short_length_are_errors_not_crashes(order: str, kind: int) -> None:
    """Each as the only block behind a section header, and in its place; with the length once and twice.

    A file takes no negative length to read, a `BytesIO` does.
    """
    good = block(order, 0x0A0D0D0A, struct.pack(order + "IHHq", 0x1A2B3C4D, 1, 0, -1))
    least = {0x0A0D0D0A: 28, 1: 20, 3: 16, 6: 32}.get(kind, 12)
    for length in (*range(least), *range(least + 1, 48), 0x7FFFFFFF, 0xFFFFFFFC, 0xFFFFFFFF):
        if least <= length < 48 and length % 4 == 0:
            continue
        words = struct.pack(order + "III", kind, length, 0x1A2B3C4D)
        for rest in (bytes(64), bytes(max(0, min(length, 64) - 16)) + words[4:8] + bytes(64)):
            for before in (b"", good):
                for opened in (io.BytesIO, lambda data: io.BufferedReader(io.BytesIO(data))):  # type: ignore[arg-type]
                    with pytest.raises(DeviceError, match="pcapng"):
                        list(PcapngReader(opened(before + words + rest)))


def test_options_by_the_million_take_no_longer_than_their_bytes() -> None:
    good = block("<", 0x0A0D0D0A, struct.pack("<IHHq", 0x1A2B3C4D, 1, 0, -1))
    interface = block("<", 1, struct.pack("<HHI", 1, 0, 0) + struct.pack("<HH", 7, 0) * 1_000_000)
    assert list(PcapngReader(io.BytesIO(good + interface))) == []


@given(st.binary(max_size=60), st.integers(0, 200))
def test_damaged_captures_are_errors_not_crashes(noise: bytes, at: int) -> None:
    file = io.BytesIO()
    PcapngWriter(file)([b"abc"])
    data = file.getvalue()
    for damaged in (noise, data[:at] + noise, data[: at % len(data)]):
        try:
            list(PcapngReader(io.BytesIO(damaged)))
        except DeviceError:
            continue


def test_passt_answers_over_the_stream_socket(tmp_path: Path) -> None:
    """ARP for the gateway that passt pretends to be: an unprivileged network without any setup."""
    tool("passt")
    path = tmp_path / "passt.socket"
    process = subprocess.Popen(
        ["passt", "--foreground", "--quiet", "--socket", str(path), "--address", "10.9.0.2",
         "--netmask", "255.255.255.0", "--gateway", "10.9.0.1",
         *(["--runas", "0"] if os.geteuid() == 0 else [])],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 30
        while not path.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.2)  # the socket exists a moment before passt listens on it
        if process.poll() is not None:
            assert process.stderr is not None
            pytest.skip(f"passt does not run here: {process.stderr.read()[-200:]}")
        with StreamUplink.connect(str(path)) as uplink:
            mine = b"\x02\0\0\0\0\1"
            request = struct.pack(
                ">6s6sHHHBBH6s4s6s4s", b"\xff" * 6, mine, 0x0806, 1, 0x800, 6, 4, 1,
                mine, bytes([10, 9, 0, 2]), bytes(6), bytes([10, 9, 0, 1]),
            )  # fmt: skip
            uplink.send([request])
            got: list[bytes] = []
            while not any(f[12:14] == b"\x08\x06" for f in got) and time.monotonic() < deadline:
                select.select([uplink], [], [], 0.2)
                got += uplink.receive()
            replies = [f for f in got if f[12:14] == b"\x08\x06"]
            assert replies
            assert replies[0][:6] == mine
            assert replies[0][28:32] == bytes([10, 9, 0, 1])
    finally:
        process.kill()
        process.communicate()


def test_host_port_of_an_internal_switch() -> None:
    switch = Switch(SwitchKind.INTERNAL)
    inside, outside = LoopbackUplink.pair()
    attach(switch, inside, "host", PortKind.HOST)
    guest = switch.connect("guest")
    guest.send([FRAME])
    assert outside.receive() == [FRAME]

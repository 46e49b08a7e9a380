"""The user-mode network: what it lets a guest reach, at which addresses, and through how large a socket."""

import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from reference.disk_model import tool

from vmbus.errors import DeviceError
from vmbus.machine.network import parse_network
from vmbus.network import passt
from vmbus.network.offload import checksum
from vmbus.network.passt import PasstUplink, is_for_the_host_itself, passt_network
from vmbus.trace.ledger import Account

MINE = bytes.fromhex("00155d000001")
SECRET = b"of a service that listens on the host's loopback only\n"


@pytest.fixture
def installed_passt() -> str:
    return tool("passt")


needs_passt = pytest.mark.usefixtures("installed_passt")


class RawGuest:
    """A guest that makes its frames by hand."""

    def __init__(self, uplink: PasstUplink, address: str, router: str) -> None:
        self.uplink = uplink
        self.address, self.router = socket.inet_aton(address), socket.inet_aton(router)
        self.router_mac = b""

    def wait_for(self, wanted: Callable[[bytes], bool], seconds: float) -> bytes | None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for frame in self.uplink.receive():
                if wanted(frame):
                    return frame
            time.sleep(0.01)
        return None

    def resolve(self) -> None:
        """Ask who the router is."""
        arp = struct.pack(">HHBBH", 1, 0x800, 6, 4, 1) + MINE + self.address + bytes(6) + self.router
        self.uplink.send([b"\xff" * 6 + MINE + b"\x08\x06" + arp])
        answer = self.wait_for(lambda f: f[12:14] == b"\x08\x06" and f[20:22] == b"\0\2", 30)
        assert answer is not None, "passt says nothing at all"
        self.router_mac = answer[22:28]

    def segment(self, port: int, sequence: int, acknowledged: int, flags: int) -> bytes:
        tcp = struct.pack(">HHIIBBHHH", 40000, port, sequence, acknowledged, 0x50, flags, 65000, 0, 0)
        pseudo = self.address + self.router + struct.pack(">BBH", 0, 6, len(tcp))
        tcp = tcp[:16] + struct.pack(">H", checksum(pseudo + tcp)) + tcp[18:]
        ip = struct.pack(">BBHHHBBH", 0x45, 0, 40, 1, 0x4000, 64, 6, 0) + self.address + self.router
        ip = ip[:10] + struct.pack(">H", checksum(ip)) + ip[12:]
        return self.router_mac + MINE + b"\x08\0" + ip + tcp

    def reads(self, port: int, seconds: float) -> bytes | None:
        """What a service at the router's address says first; None if there is nobody."""
        self.uplink.send([self.segment(port, 1000, 0, 2)])
        answer = self.wait_for(
            lambda f: f[12:14] == b"\x08\0" and f[23] == 6 and f[47] & 0x16 != 0x10, seconds
        )
        if answer is None or not answer[47] & 2:
            return None
        (sequence,) = struct.unpack(">I", answer[38:42])
        self.uplink.send([self.segment(port, 1001, sequence + 1, 16)])
        data = self.wait_for(lambda f: f[12:14] == b"\x08\0" and f[23] == 6 and len(f) > 60, seconds)
        return None if data is None else data[54:]


@pytest.fixture
def service() -> Iterator[int]:
    """A port of the host's loopback with a secret."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection, suppress(OSError):  # its client may end first
                    connection.sendall(SECRET)
                    connection.shutdown(socket.SHUT_WR)
                    connection.recv(1)

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


@needs_passt
@pytest.mark.slow
@pytest.mark.parametrize("allowed", [False, True])
def test_the_hosts_loopback_is_out_of_reach_unless_it_is_asked_for(service: int, allowed: bool) -> None:
    text = "passt,address=10.7.7.3,gateway=10.7.7.1" + ",loopback=on" * allowed
    uplink = parse_network(text).open()
    assert isinstance(uplink, PasstUplink)
    with uplink:
        assert ("host at 10.7.7.1" in uplink.name) == allowed
        guest = RawGuest(uplink, "10.7.7.3", "10.7.7.1")
        guest.resolve()
        assert guest.reads(service, 20 if allowed else 2) == (SECRET if allowed else None)


@needs_passt
@pytest.mark.slow
@pytest.mark.parametrize("destination", ["127.0.0.1", "127.5.5.5", "0.0.0.0", "10.0.2.15"])
def test_a_guest_that_asks_for_the_loopback_by_name_gets_nothing(service: int, destination: str) -> None:
    """passt opens a connection to whatever a packet names, whoever the frame was sent to."""
    with PasstUplink() as uplink:
        guest = RawGuest(uplink, "10.0.2.15", "10.0.2.2")
        guest.resolve()
        guest.router = socket.inet_aton(destination)
        assert guest.reads(service, 1) is None
        assert uplink.dropped == (destination != "10.0.2.15")


def ipv6(destination: str) -> bytes:
    header = struct.pack(">IHBB", 0x60000000, 20, 6, 64) + bytes(16)
    return MINE + MINE + b"\x86\xdd" + header + socket.inet_pton(socket.AF_INET6, destination) + bytes(20)


def ipv4(destination: str, protocol: int = 6) -> bytes:
    return (
        MINE
        + MINE
        + b"\x08\0\x45"
        + bytes(8)
        + bytes([protocol])
        + bytes(6)
        + socket.inet_aton(destination)
        + bytes(20)
    )


@pytest.mark.parametrize(
    ("frame", "is_host"),
    [
        *((ipv4(a), True) for a in ("127.0.0.1", "127.255.255.255", "0.0.0.0", "0.1.2.3")),
        *(
            (ipv4(a), False)
            for a in ("10.0.2.2", "126.255.0.1", "128.0.0.1", "192.168.0.127", "255.255.255.255")
        ),
        *(
            (ipv6(a), True)
            for a in ("::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "ff01::1")
        ),
        *((ipv6(a), False) for a in ("fe80::1", "2001:db8::1", "ff02::1", "::1:0:0:1", "64:ff9b::1")),
        (b"\xff" * 12 + b"\x08\x06" + bytes(46), False),
        *((ipv4("127.0.0.1")[:size], False) for size in range(31)),
        *((ipv6("ff01::1")[:size], False) for size in range(40)),
        (b"", False),
    ],
)
def test_which_frames_are_for_the_host_itself(frame: bytes, is_host: bool) -> None:
    assert is_for_the_host_itself(frame) == is_host


def test_only_whoever_asked_for_it_may_send_them(arguments: Callable[[str], str]) -> None:
    arguments("passt")  # from now on a program that only notes how it was called
    for loopback in (False, True):
        with PasstUplink(loopback=loopback) as uplink:
            account = uplink.account = Account()
            uplink.send([ipv4("127.0.0.1"), ipv6("::1")])
            assert account.dropped.get("host's loopback", 0) == (0 if loopback else 2)


@needs_passt
def test_the_socket_holds_what_a_fast_peer_sends() -> None:
    """8 MiB each way where the process may; else what ``net.core.wmem_max`` allows. Linux reports the double."""
    limit = int(Path("/proc/sys/net/core/wmem_max").read_text())
    with PasstUplink() as uplink:
        for sending, receiving in uplink.buffers:
            assert sending >= 2 * min(limit, 8 << 20)
            assert receiving > 0


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What passt is started with, for a description."""

    def started(text: str) -> str:
        said, program = tmp_path / "arguments", tmp_path / "fake-passt"
        program.write_text(
            f"#!{sys.executable}\nimport sys\nopen('{said}', 'w').write(' '.join(sys.argv[1:]))\n"
        )
        program.chmod(0o755)
        monkeypatch.setattr(passt, "PROGRAM", str(program))
        monkeypatch.setattr(passt, "END_LIMIT", 60)
        uplink = parse_network(text).open()
        assert uplink is not None
        uplink.close()
        return said.read_text()

    return started


def test_its_options(arguments: Callable[[str], str]) -> None:
    plain = arguments("passt")
    assert "--address 10.0.2.15 --netmask 255.255.255.0 --gateway 10.0.2.2" in plain
    assert "--no-map-gw" in plain.split()
    assert "--no-map-gw" in arguments("passt,loopback=off").split()
    assert "--no-map-gw" not in arguments("passt,loopback=on").split()
    assert "--address 192.168.9.15 --netmask 255.255.255.0 --gateway 192.168.9.1 " in arguments(
        "passt,gateway=192.168.9.1"
    )
    assert "--address 192.168.9.7 --netmask 255.255.255.0 --gateway 192.168.9.2 " in arguments(
        "passt,address=192.168.9.7"
    )


@pytest.mark.parametrize(
    ("given", "both"),
    [
        ((None, None), ("10.0.2.15", "10.0.2.2")),
        (("10.1.1.2", None), ("10.1.1.2", "10.1.1.1")),
        ((None, "10.1.1.15"), ("10.1.1.16", "10.1.1.15")),
        (("10.1.1.200", "10.1.1.254"), ("10.1.1.200", "10.1.1.254")),
    ],
)
def test_the_other_address_follows(given: tuple[str | None, str | None], both: tuple[str, str]) -> None:
    assert passt_network(*given) == both


@pytest.mark.parametrize(
    "text",
    [
        "passt,address=10.0.2.2,gateway=10.0.2.2",
        "passt,address=10.0.2.15,gateway=10.0.3.2",
        "passt,address=10.0.2.0",
        "passt,address=10.0.2.255",
        "passt,gateway=10.0.2.256",
        "passt,address=fe80::1",
        "passt,address=127.0.0.5",
        "passt,address=--help",
        "passt,loopback=maybe",
        "tap,address=10.0.2.15",
        "none,loopback=on",
    ],
)
def test_what_is_no_network(text: str) -> None:
    with pytest.raises(DeviceError):
        parse_network(text)

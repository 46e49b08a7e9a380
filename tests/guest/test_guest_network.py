"""Debian's own hv_netvsc against our network provider: through a TAP interface, and through passt's stream socket.

VMBUS_GUEST_NET_MB sets how many MiB the long transfer moves each way (100 if not set).
"""

import hashlib
import os
import random
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vmbus.errors import DeviceError
from vmbus.machine.guest import Machine, Outcome
from vmbus.machine.initramfs import cpio
from vmbus.machine.network import GuestNetwork, Interface
from vmbus.machine.packages import Guest
from vmbus.network.oid import Offloads
from vmbus.network.pcapng import PcapngReader
from vmbus.network.uplink import StreamUplink, TapUplink
from vmbus.network.wire import Version

pytestmark = [pytest.mark.guest, pytest.mark.slow]

HOST, GUEST = "10.77.0.1", "10.77.0.2"
WALL_LIMIT = 900.0
LONG = int(os.environ.get("VMBUS_GUEST_NET_MB", "100")) << 20


class Networked:
    """A booted guest with one adapter, and a shell on its console."""

    def __init__(self, machine: Machine, network: GuestNetwork, interface: Interface) -> None:
        self.machine = machine
        self.network = network
        self.interface = interface
        result = machine.run(until="# ", wall_seconds=WALL_LIMIT, idle=network.idle, poll=network.poll)
        assert result.outcome is Outcome.MATCHED, machine.console.text[-2000:]

    def __call__(self, command: str, *, check: bool = True) -> str:
        """What `command` prints in the guest; its exit status must be 0 if `check`."""
        console = self.machine.console
        start = len(console.output)
        console.send(f"echo BE''GIN; ({command}) 2>&1; echo EN''D=$?.\n")
        result = self.machine.run(
            until=re.compile(rb"END=(\d+)\."),
            wall_seconds=WALL_LIMIT,
            idle=self.network.idle,
            poll=self.network.poll,
        )
        text = console.output[start:].decode(errors="replace").replace("\r\n", "\n")
        assert result.outcome is Outcome.MATCHED, f"{command}: {result.outcome}\n{text[-2000:]}"
        printed, _, status = text.partition("BEGIN\n")[2].rpartition("END=")
        if check:
            assert status.split(".")[0] == "0", printed
        return printed

    def configure(self, mtu: int = 1500) -> None:
        self(f"ip link set eth0 mtu {mtu}; ip link set eth0 up; ip addr replace {GUEST}/24 dev eth0")

    @property
    def protocol(self):
        vsp = self.interface.adapter.vsp
        assert vsp is not None
        return vsp.protocol


class Peer(threading.Thread):
    """The host's end of one TCP connection: sends `data` and takes what comes until the guest closes."""

    def __init__(self, data: bytes = b"") -> None:
        super().__init__(daemon=True)
        self._server = socket.create_server((HOST, 0))
        self._server.settimeout(WALL_LIMIT)
        self.port = self._server.getsockname()[1]
        self.data = data
        self.checksum = hashlib.sha256()
        self.received = 0
        self.start()

    def run(self) -> None:
        with self._server, self._server.accept()[0] as connection:
            connection.settimeout(WALL_LIMIT)
            connection.sendall(self.data)
            if self.data:
                connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(1 << 20):
                self.checksum.update(part)
                self.received += len(part)


@pytest.fixture
def tap() -> Iterator[TapUplink]:
    try:
        uplink = TapUplink(up=True)
    except DeviceError as error:
        if os.environ.get("CI"):
            pytest.fail(f"CI has to run the network tests: {error}")
        pytest.skip(str(error))
    with uplink:
        subprocess.run(["ip", "addr", "add", f"{HOST}/24", "dev", uplink.name], check=True)
        yield uplink


@pytest.fixture
def connect(boot, guest: Guest) -> Iterator[Callable[..., Networked]]:
    """Boot the guest with an adapter on an uplink."""
    networks: list[GuestNetwork] = []

    def start(uplink: object, *, files: bytes = b"", **options: object) -> Networked:
        # The kernel unpacks one archive after the other.
        machine = boot(initrd=guest.initramfs.read_bytes() + files) if files else boot()
        network = GuestNetwork(machine.bus)
        networks.append(network)
        interface = network.add(uplink, **options)  # type: ignore[arg-type]
        return Networked(machine, network, interface)

    yield start
    for network in networks:
        network.close()


def exchange(run: Networked, size: int) -> None:
    """`size` bytes each way over TCP, equal by hash at both ends."""
    data = random.Random(size).randbytes(size)
    wanted = hashlib.sha256(data).hexdigest()
    down, up = Peer(data), Peer()
    run(f"nc {HOST} {down.port} </dev/null >/f")
    run(f"nc {HOST} {up.port} </f")
    assert wanted in run("sha256sum /f; rm /f")
    up.join(30)
    assert up.received == size
    assert up.checksum.hexdigest() == wanted


def call_guest(text: bytes) -> None:
    """Connect to the guest's port 7 as soon as it listens, and send it a line."""
    deadline = time.monotonic() + WALL_LIMIT
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((GUEST, 7), timeout=10) as connection:
                connection.sendall(text)
                return
        except OSError:
            time.sleep(0.2)


def counters(run: Networked) -> dict[str, int]:
    """The guest's own errors and retransmissions."""
    names, values = [line.split() for line in run("grep Tcp: /proc/net/snmp").splitlines()[:2]]
    return {name: int(value) for name, value in zip(names[1:], values[1:], strict=True)}


def test_linux_comes_up_and_pings(connect, tap: TapUplink, tmp_path: Path) -> None:
    run = connect(tap, capture=tmp_path / "c.pcapng")
    assert (run.protocol.version, run.protocol.ndis_version) == (Version.V6_1, (6, 30))
    run.configure()
    assert "00:15:5d:00:00:01" in run("ip link show eth0")
    assert "3 packets received" in run(f"ping -c 3 {HOST}")
    caller = threading.Thread(target=call_guest, args=(b"hello from outside",), daemon=True)
    caller.start()
    assert "hello from outside" in run("nc -l -p 7 </dev/null")
    caller.join(30)
    assert run.interface.adapter.statistics.violations == 0
    run.network.close()
    with PcapngReader(tmp_path / "c.pcapng") as reader:
        frames = [capture.frame for capture in reader]
    assert sum(f[12:14] == b"\x08\x00" and f[23] == 1 for f in frames) >= 6


@pytest.mark.parametrize("mtu", [1500, 9000])
@pytest.mark.parametrize("offloads", [Offloads.everything(), Offloads.nothing()], ids=["offloads", "none"])
def test_tcp_both_ways(connect, tap: TapUplink, offloads: Offloads, mtu: int) -> None:
    subprocess.run(["ip", "link", "set", tap.name, "mtu", str(mtu)], check=True)
    run = connect(tap, offloads=offloads)
    run.configure(mtu)
    assert run.protocol.frame_size == mtu + 14
    assert run.protocol.oids.offloads.lso4 == offloads.lso4
    exchange(run, 6 << 20)
    tcp = counters(run)
    assert tcp["InErrs"] == tcp["InCsumErrors"] == 0
    statistics = run.interface.adapter.statistics
    assert statistics.violations == statistics.sent_errors == statistics.received_no_buffer == 0


def test_a_long_transfer(connect, tap: TapUplink) -> None:
    run = connect(tap)
    run.configure()
    exchange(run, LONG)
    assert counters(run)["InErrs"] == 0
    assert run.interface.adapter.statistics.violations == 0


def test_link_down_and_up(connect, tap: TapUplink) -> None:
    run = connect(tap)
    run.configure()
    run(f"ping -c 1 {HOST}")
    run.interface.adapter.set_link(False)
    run(
        "for n in 1 2 3 4 5 6 7 8 9; do [ $(cat /sys/class/net/eth0/carrier) = 0 ] && exit 0; sleep 1; done; exit 1"
    )
    assert "1 packets received" not in run(f"ping -c 1 -W 2 {HOST}", check=False)
    run.interface.adapter.set_link(True)
    run(
        "for n in 1 2 3 4 5 6 7 8 9; do [ $(cat /sys/class/net/eth0/carrier) = 1 ] && exit 0; sleep 1; done; exit 1"
    )
    run(f"ping -c 1 -W 5 {HOST} || ping -c 2 -W 5 {HOST}")


def test_module_unload_and_load(connect, tap: TapUplink) -> None:
    run = connect(tap)
    for _ in range(2):
        run.configure()
        run(f"ping -c 1 {HOST}")
        run("rmmod hv_netvsc")
        assert run.interface.adapter.vsp is None
        run("insmod /lib/modules/hv_netvsc.ko; sleep 1")
        assert run.interface.adapter.vsp is not None
    run.configure()
    run(f"ping -c 1 {HOST}")
    assert run.interface.adapter.statistics.violations == 0


def test_every_nvsp_version(connect, tap: TapUplink) -> None:
    """Linux asks for the newest version first and takes what the host has, down to that of Server 2008."""
    run = connect(tap)
    for version in sorted(Version):
        run("rmmod hv_netvsc")
        run.interface.adapter.config.versions = frozenset({version})
        run("insmod /lib/modules/hv_netvsc.ko; sleep 1")
        assert run.protocol.version == version
        run.configure()
        run(f"ping -c 2 {HOST}")
        exchange(run, 512 << 10)
    statistics = run.interface.adapter.statistics
    assert statistics.violations == statistics.sent_errors == 0


def test_virtual_function_and_network_change(connect, tap: TapUplink) -> None:
    run = connect(tap)
    run.configure()
    run.interface.adapter.associate_vf(7)
    assert "VF slot 7 added" in run("sleep 1; dmesg")
    run.interface.adapter.associate_vf(None)
    assert "VF slot 7 removed" in run("sleep 1; dmesg")
    run.interface.adapter.network_changed()
    run(f"sleep 3; ping -c 2 -W 5 {HOST}")


def test_unplugged(connect, tap: TapUplink) -> None:
    run = connect(tap)
    run.configure()
    run(f"ping -c 1 {HOST}")
    run.interface.adapter.remove()
    run("for n in 1 2 3 4 5 6 7 8 9; do [ -e /sys/class/net/eth0 ] || exit 0; sleep 1; done; exit 1")


def archive_of(program: str) -> bytes:
    """An initramfs with a program of this system and its libraries."""
    path = shutil.which(program)
    assert path is not None
    linked = subprocess.run(["ldd", path], capture_output=True, text=True, check=True).stdout
    libraries = re.findall(r"(/\S+) \(0x", linked)
    folders = sorted({str(parent)[1:] for library in libraries for parent in Path(library).parents} - {""})
    entries = [(folder, 0o040755, b"") for folder in folders]
    entries += [(library[1:], 0o100755, Path(library).read_bytes()) for library in libraries]
    return cpio([*entries, (f"bin/{program}", 0o100755, Path(path).read_bytes())])


@pytest.mark.skipif(shutil.which("ethtool") is None, reason="no ethtool to put into the guest")
def test_ethtool(connect, tap: TapUplink) -> None:
    run = connect(tap, files=archive_of("ethtool"))
    run.configure()
    assert "driver: hv_netvsc" in run("ethtool -i eth0")
    run(f"ping -c 3 {HOST}")
    statistics = run("ethtool -S eth0")
    sent = re.search(r"tx_queue_0_packets: (\d+)", statistics)
    assert sent
    assert int(sent[1]) >= 3
    assert re.search(r"tx_send_full: 0\n", statistics)
    features = run("ethtool -k eth0")
    for feature in ("tcp-segmentation-offload: on", "rx-checksumming: on", "tx-checksumming: on"):
        assert feature in features
    assert re.search(r"Speed: 10000Mb/s", run("ethtool eth0"))
    run.interface.adapter.set_link_speed(1_000_000_000)
    assert re.search(r"Speed: 1000Mb/s", run("sleep 1; ethtool eth0"))
    peer = Peer()
    run("ethtool -K eth0 tso off gso off tx off rx off")
    run(f"dd if=/dev/urandom of=/f bs=1k count=512 2>/dev/null; nc {HOST} {peer.port} </f")
    peer.join(30)
    assert peer.checksum.hexdigest() in run("sha256sum /f")
    run("ethtool -K eth0 tx on tso on gso on rx on lro on")
    peer = Peer()
    run(f"nc {HOST} {peer.port} </f")
    peer.join(30)
    assert peer.checksum.hexdigest() in run("sha256sum /f")
    assert run.interface.adapter.statistics.violations == 0


@pytest.mark.skipif(shutil.which("passt") is None, reason="no passt")
def test_through_passt(connect, tmp_path: Path) -> None:
    """DHCP and TCP through passt: no privilege, no interface on the host."""
    tmp_path.chmod(0o755)
    path = tmp_path / "socket"
    data = random.Random(3).randbytes(2 << 20)
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    received = hashlib.sha256()

    def serve() -> None:
        with server:
            for _ in range(2):
                with server.accept()[0] as connection:
                    connection.settimeout(WALL_LIMIT)
                    if connection.recv(1) == b"d":
                        connection.sendall(data)
                    else:
                        while part := connection.recv(1 << 20):
                            received.update(part)

    threading.Thread(target=serve, daemon=True).start()
    root = ["--runas", "0"] if os.geteuid() == 0 else []
    process = subprocess.Popen(
        ["passt", "--foreground", "--quiet", "--socket", str(path), "--address", GUEST, "--netmask", "255.255.255.0",
         "--gateway", HOST, *root],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 30
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)
        with StreamUplink.connect(str(path)) as uplink:
            run = connect(uplink)
            run.configure()
            run(f"ip route add default via {HOST}")
            # passt maps its gateway's address to the host's loopback.
            run(f"(printf d; sleep 5) | nc {HOST} {port} >/f")
            assert hashlib.sha256(data).hexdigest() in run("sha256sum /f")
            run(f"(printf u; cat /f) | nc {HOST} {port}")
            time.sleep(0.5)
            assert received.hexdigest() == hashlib.sha256(data).hexdigest()
    finally:
        process.kill()
        process.wait()

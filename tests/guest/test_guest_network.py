"""Debian's own hv_netvsc against our network provider, through a TAP interface of the host.

One guest serves all tests here: what a test changes of the adapter reaches Linux by unloading its driver and loading it
again. VMBUS_GUEST_NET_MB sets how many MB the long transfers move each way (100 if not set).
"""

import hashlib
import os
import random
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vmbus.errors import DeviceError
from vmbus.hypervisor.personality import WINDOWS_2000
from vmbus.machine.guest import Machine
from vmbus.machine.initramfs import cpio
from vmbus.machine.model import ModelMachine
from vmbus.machine.packages import Guest
from vmbus.machine.tulip_guest import TulipNic
from vmbus.network.offload import checksum
from vmbus.network.oid import Offloads
from vmbus.network.uplink import TapUplink
from vmbus.network.vsp_protocol import HostProtocol
from vmbus.network.wire import Version

pytestmark = [pytest.mark.guest, pytest.mark.slow]

HOST, GUEST = "10.77.0.1", "10.77.0.2"
LONG = int(os.environ.get("VMBUS_GUEST_NET_MB", "100")) * 1_000_000
EVERY_VERSION = frozenset(Version)


class Lan:
    """A booted guest with one adapter on a TAP interface, and a shell on its console."""

    def __init__(self, machine: Machine, run: Any, tap: TapUplink, server: Any) -> None:
        self.machine = machine
        self.run = run
        self.tap = tap
        self.server = server
        (self.interface,) = machine.network.interfaces
        self.adapter = self.interface.adapter
        self.mtu = 0
        run("httpd -p 80 -h /")

    def set_up(
        self,
        *,
        versions: frozenset[int] = EVERY_VERSION,
        offloads: Offloads | None = None,
        queues: int = 1,
        mtu: int = 1500,
        fresh: bool = False,
    ) -> None:
        """Bring the interface up, with the driver loaded anew if the adapter is to be another one."""
        config = self.adapter.config
        offloads = offloads or Offloads.everything()
        if fresh or (config.versions, config.offloads, config.max_queues) != (versions, offloads, queues):
            self.unload()
            config.versions, config.offloads, config.max_queues = versions, offloads, queues
            self.load()
        if mtu != self.mtu:
            subprocess.run(["ip", "link", "set", self.tap.name, "mtu", str(mtu)], check=True)
            self.mtu = mtu
        self.run(f"ip link set eth0 mtu {mtu} up; ip addr replace {GUEST}/24 dev eth0")

    def unload(self) -> None:
        self.run("rmmod hv_netvsc")
        assert self.adapter.vsp is None

    def load(self) -> None:
        self.run("insmod /lib/modules/hv_netvsc.ko")
        self.wait("[ -e /sys/class/net/eth0 ]")

    def wait(self, condition: str) -> None:
        self.run(f"n=0; until {condition}; do n=$((n+1)); [ $n = 100 ] && exit 1; sleep 0.1; done")

    def ping(self, address: str = HOST) -> None:
        assert "1 packets received" in self.run(f"ping -c 1 -W 5 {address}")

    def download(self, size: int) -> str:
        """Take `size` bytes from the host into /f; the hash that they must have, and have."""
        data = random.Random(size).randbytes(size)
        wanted = hashlib.sha256(data).hexdigest()
        with self.server(HOST, data) as server:
            self.run(f"wget -q -O /f http://{HOST}:{server.port}/f")
        assert wanted in self.run("sha256sum /f")
        return wanted

    @property
    def protocol(self) -> HostProtocol:
        vsp = self.adapter.vsp
        assert vsp is not None
        return vsp.protocol

    def counters(self) -> dict[str, int]:
        """The guest's own view of its TCP."""
        names, values = [line.split() for line in self.run("grep Tcp: /proc/net/snmp").splitlines()[:2]]
        return {name: int(value) for name, value in zip(names[1:], values[1:], strict=True)}


def archive_of(path: str) -> bytes:
    """An initramfs with a program of this system and its libraries."""
    linked = subprocess.run(["ldd", path], capture_output=True, text=True, check=True).stdout
    libraries = re.findall(r"(/\S+) \(0x", linked)
    folders = sorted({str(parent)[1:] for library in libraries for parent in Path(library).parents} - {""})
    entries = [(folder, 0o040755, b"") for folder in folders]
    entries += [(library[1:], 0o100755, Path(library).read_bytes()) for library in libraries]
    return cpio([*entries, (f"bin/{Path(path).name}", 0o100755, Path(path).read_bytes())])


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def booted(
    guest: Guest, tap: TapUplink, shell: Any, serve: Any, needs: Callable[[str], str]
) -> Iterator[Lan]:
    # The kernel unpacks one archive after the other.
    initramfs = guest.initramfs.read_bytes() + archive_of(needs("ethtool"))
    with Machine(guest.kernel, initrd=initramfs, append="console=ttyS0 quiet panic=-1") as machine:
        machine.network.add(tap)
        yield Lan(machine, shell(machine), tap, serve)


@pytest.fixture
def lan(booted: Lan) -> Iterator[Lan]:
    """The guest with its interface up and nothing out of the ordinary, now and in the end."""
    statistics = booted.adapter.statistics
    booted.set_up()
    before = statistics.violations, statistics.sent_errors
    errors = booted.counters()
    yield booted
    assert (statistics.violations, statistics.sent_errors) == before
    after = booted.counters()
    assert (after["InErrs"], after["InCsumErrors"]) == (errors["InErrs"], errors["InCsumErrors"])


def call_guest(text: bytes) -> None:
    """Connect to the guest's port 7 as soon as it listens, and send it a line."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((GUEST, 7), timeout=10) as connection:
                connection.sendall(text)
                return
        except OSError:
            time.sleep(0.2)


def test_linux_comes_up_and_pings(lan: Lan) -> None:
    assert (lan.protocol.version, lan.protocol.ndis_version) == (Version.V6_1, (6, 30))
    assert "00:15:5d:00:00:01" in lan.run("ip link show eth0")
    assert "3 packets received" in lan.run(f"ping -c 3 -i 0.2 {HOST}")
    caller = threading.Thread(target=call_guest, args=(b"hello from outside",), daemon=True)
    caller.start()
    assert "hello from outside" in lan.run("nc -l -p 7 </dev/null")
    caller.join(30)


@pytest.mark.parametrize("mtu", [1500, 9000])
@pytest.mark.parametrize("offloads", [Offloads.everything(), Offloads.nothing()], ids=["offloads", "none"])
def test_a_long_transfer_both_ways(lan: Lan, fetch: Any, offloads: Offloads, mtu: int) -> None:
    lan.set_up(offloads=offloads, mtu=mtu)
    assert lan.protocol.frame_size == mtu + 14
    active = lan.protocol.oids.offloads
    assert (active.lso4, active.transmit.tcp4, active.receive.tcp4) == (offloads.lso4,) * 3
    features = lan.run("ethtool -k eth0")
    for feature in ("tcp-segmentation-offload", "tx-checksumming"):
        assert f"{feature}: {'on' if offloads.lso4 else 'off'}" in features
    statistics = lan.adapter.statistics
    without_room = statistics.received_no_buffer
    wanted = lan.download(LONG)
    assert fetch(lan.machine, (GUEST, 80)) == (LONG, wanted)
    assert statistics.received_no_buffer == without_room
    lan.run("rm /f")


def test_link_down_and_up(lan: Lan) -> None:
    lan.ping()
    lan.adapter.set_link(False)
    lan.wait("[ $(cat /sys/class/net/eth0/carrier) = 0 ]")
    assert "0 packets received" in lan.run(f"ping -c 1 -W 1 {HOST}", check=False)
    lan.adapter.set_link(True)
    lan.wait("[ $(cat /sys/class/net/eth0/carrier) = 1 ]")
    lan.run(f"ping -c 1 -W 2 {HOST} || ping -c 2 -W 5 {HOST}")


def test_module_unload_and_load(lan: Lan) -> None:
    for _ in range(3):
        lan.ping()
        lan.set_up(fresh=True)
    lan.ping()


@pytest.mark.parametrize("version", sorted(Version), ids=lambda version: version.name)
def test_every_nvsp_version(lan: Lan, fetch: Any, version: Version) -> None:
    """Linux asks for the newest version first and takes what the host has, down to that of Server 2008."""
    lan.set_up(versions=frozenset({version}))
    assert lan.protocol.version == version
    lan.ping()
    wanted = lan.download(1 << 20)
    assert fetch(lan.machine, (GUEST, 80)) == (1 << 20, wanted)


def test_one_processor_has_one_channel(lan: Lan) -> None:
    """Linux asks what the adapter could have, and uses no more channels than it has processors."""
    lan.set_up(queues=4)
    assert re.search(r"Combined:\s+1\n.*Combined:\s+1\n", lan.run("ethtool -l eth0"), re.S)
    assert lan.protocol.subchannels == 0
    lan.ping()


def test_virtual_function_and_network_change(lan: Lan) -> None:
    lan.adapter.associate_vf(7)
    lan.wait("dmesg | grep 'VF slot 7 added'")
    lan.adapter.associate_vf(None)
    lan.wait("dmesg | grep 'VF slot 7 removed'")
    lan.ping()
    lan.adapter.network_changed()  # Linux takes the link down and up, for its address clients to see
    lan.run(f"sleep 1; ping -c 1 -W 3 {HOST} || ping -c 2 -W 5 {HOST}")


def test_plugged_and_unplugged(lan: Lan) -> None:
    lan.run("ip link set eth0 down")
    second = lan.machine.network.add(lan.interface.switch, mac=bytes.fromhex("00155d0000ff"))
    lan.wait("[ -e /sys/class/net/eth1 ]")
    lan.run("ip link set eth1 up; ip addr add 10.77.0.3/24 dev eth1")
    lan.ping()
    lan.machine.network.remove(second)
    lan.wait("[ ! -e /sys/class/net/eth1 ]")
    lan.set_up()
    lan.ping()


class Responder:
    """A model guest without enlightenments that answers ARP and pings, through its emulated adapter."""

    def __init__(self, nic: TulipNic, address: str) -> None:
        self.nic = nic
        self.address = socket.inet_aton(address)
        self.echoes = 0

    def poll(self) -> None:
        for frame in self.nic.receive():
            reply = None
            if frame[12:14] == b"\x08\x06" and frame[20:22] == b"\0\1" and frame[38:42] == self.address:
                arp = frame[14:20] + b"\0\2" + self.nic.mac + self.address + frame[22:32]
                reply = frame[6:12] + self.nic.mac + b"\x08\x06" + arp
            elif frame[12:14] == b"\x08\x00" and frame[23] == 1 and frame[30:35] == self.address + b"\x08":
                length = int.from_bytes(frame[16:18], "big")
                echo = bytearray(b"\0\0\0\0" + frame[38 : 14 + length])
                echo[2:4] = checksum(echo).to_bytes(2, "big")
                header = frame[14:26] + self.address + frame[26:30]  # the sum does not change
                reply = frame[6:12] + self.nic.mac + b"\x08\x00" + header + bytes(echo)
                self.echoes += 1
            if reply is not None:
                assert self.nic.send(reply)


def test_linux_and_a_guest_without_enlightenments_on_one_switch(lan: Lan) -> None:
    """An unmodified hv_netvsc pings a DEC 21140 that machine code drives through intercepts."""
    with ModelMachine(memory_size=16 << 20, personality=WINDOWS_2000) as machine:
        nic = machine.add_network(lan.interface.switch.connect("old"), bytes.fromhex("00155d00beef"))
        assert isinstance(nic, TulipNic)
        responder = Responder(nic, "10.77.0.9")
        lan.run.poll = responder.poll
        try:
            assert "5 packets received" in lan.run("ping -c 5 -i 0.2 -s 1400 10.77.0.9")
        finally:
            lan.run.poll = None
        assert responder.echoes == 5
        exits = machine.ledger.total("child").exits
        assert exits["mmio"] >= 6, "each frame sent is an exit"


def test_ethtool(lan: Lan) -> None:
    assert "driver: hv_netvsc" in lan.run("ethtool -i eth0")
    lan.set_up(fresh=True)
    lan.run(f"ping -c 3 -i 0.2 {HOST}")
    statistics = lan.run("ethtool -S eth0")
    sent = re.search(r"tx_queue_0_packets: (\d+)", statistics)
    assert sent
    assert int(sent[1]) >= 3
    assert re.search(r"tx_send_full: 0\n", statistics)
    assert "Speed: 10000Mb/s" in lan.run("ethtool eth0")
    lan.adapter.set_link_speed(1_000_000_000)
    lan.wait("ethtool eth0 | grep 'Speed: 1000Mb/s'")
    lan.adapter.set_link_speed(10_000_000_000)


def test_linux_chooses_its_offloads(lan: Lan, fetch: Any) -> None:
    """What the adapter can and the guest does not want, and wants again."""
    wanted = lan.download(2_000_000)
    lan.run("ethtool -K eth0 tso off gso off tx off rx off")
    before = lan.adapter.statistics.sent_directed
    assert fetch(lan.machine, (GUEST, 80)) == (2_000_000, wanted)
    assert lan.adapter.statistics.sent_directed - before >= 2_000_000 // 1460
    # Packets are coalesced still, and now Linux verifies their checksums itself.
    assert lan.protocol.rsc == (True, True)
    assert lan.download(2_000_000) == wanted
    lan.run("ethtool -K eth0 tx on tso on gso on rx on lro on")
    assert lan.protocol.rsc == (True, True)
    assert lan.download(2_000_000) == wanted
    assert fetch(lan.machine, (GUEST, 80)) == (2_000_000, wanted)
    lan.run("ethtool -K eth0 lro off")
    assert lan.protocol.rsc == (False, False)
    assert lan.download(2_000_000) == wanted


def test_ethtool_sets_channels_table_and_key_of_an_adapter_as_it_is(
    guest: Any, shell: Any, needs: Callable[[str], str]
) -> None:
    """Nothing is said of queues: three processors have three. The address that the guest sets outlives all of it."""
    initramfs = guest.initramfs.read_bytes() + archive_of(needs("ethtool"))
    with Machine(
        guest.kernel,
        initrd=initramfs,
        append="console=ttyS0 quiet panic=-1",
        processors=3,
        networks=["none"],
    ) as machine:
        adapter = machine.network.interfaces[0].adapter
        adapter.config.allow_mac_change = True
        run = shell(machine)
        run("ip link set eth0 address 02:11:22:33:44:55 && ip link set eth0 up")
        assert re.search(r"Combined:\s+3\n.*Combined:\s+3\n", run("ethtool -l eth0"), re.S)
        for channels in (1, 3, 2):
            run(f"ethtool -L eth0 combined {channels}")
            assert re.search(rf"Current.*Combined:\s+{channels}\n", run("ethtool -l eth0"), re.S)
            assert adapter.vsp is not None
            protocol = adapter.vsp.protocol
            assert protocol.subchannels == channels - 1
            assert len(adapter.vsp._queues) == channels
            assert adapter.state.mac == bytes.fromhex("021122334455")
        run("ethtool -X eth0 equal 1")
        assert set(protocol.oids.rss.table) == {0}
        run("ethtool -X eth0 weight 1 3")
        assert set(protocol.oids.rss.table) == {0, 1}
        key = bytes(range(100, 140))
        run(f"ethtool -X eth0 hkey {key.hex(':')}")
        assert run("ethtool -x eth0").count(key.hex(":")) == 1
        assert adapter.statistics.violations == 0
        assert machine.bus.violations == 0

"""Debian's own hv_netvsc through a stream socket: passt gives it a network without any privilege or interface."""

import hashlib
import os
import random
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vmbus.cli import main
from vmbus.machine.guest import Machine
from vmbus.machine.packages import Guest
from vmbus.network.pcapng import PcapngReader

pytestmark = [pytest.mark.guest, pytest.mark.slow]

ROUTER = "10.0.2.2"
LONG = int(os.environ.get("VMBUS_GUEST_NET_MB", "100")) * 1_000_000


@pytest.fixture
def port() -> int:
    """A port of the host that nobody has."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        number: int = server.getsockname()[1]
        return number


def test_the_command_gives_the_guest_a_network(
    guest: Guest, serve: Any, needs: Callable[[str], str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """DHCP, then a web page of the host, all in one command."""
    needs("passt")
    page, capture = b"a page of the host\n" * 1000, tmp_path / "traffic.pcapng"
    with serve("127.0.0.1", page) as server:
        typed = f"ip addr show eth0; wget -q -O - http://{ROUTER}:{server.port}/ | sha256sum; poweroff -f"
        status = main(
            ["boot", "--kernel", str(guest.kernel), "--initrd", str(guest.initramfs), "--timeout", "120",
             "--net", f"passt,loopback=on,mtu=1400,pcap={capture}", "--append", "quiet ip=dhcp",
             "--until", "/ #", "--send", typed],
        )  # fmt: skip
    shown = capfd.readouterr().out
    assert status == 0, shown
    assert "eth0: 10.0.2.15/24, router 10.0.2.2" in shown
    assert re.search(r"eth0: <\S*LOWER_UP> mtu 1400 ", shown)
    assert hashlib.sha256(page).hexdigest() in shown
    with PcapngReader(capture) as reader:
        frames = [capture.frame for capture in reader]
    assert sum(b"\x63\x82\x53\x63" in frame for frame in frames) >= 4, "DHCP: discover, offer, request, ack"
    # To and from the router's port, each at most as long as the MTU.
    tcp = [frame for frame in frames if frame[12:14] == b"\x08\x00" and frame[23] == 6]
    assert {frame[6:12] == bytes.fromhex("00155d000001") for frame in tcp} == {False, True}
    assert sum(map(len, tcp)) > len(page)
    assert max(map(len, frames)) <= 1414


@pytest.fixture
def passt(needs: Callable[[str], str], tmp_path: Path, port: int) -> Iterator[tuple[Path, Any]]:
    """The socket of a passt that a user has started, with a port that leads to the guest's web server."""
    tmp_path.chmod(0o755)
    path = tmp_path / "socket"
    root = ["--runas", "0"] if os.geteuid() == 0 else []
    process = subprocess.Popen(
        [needs("passt"), "--foreground", "--quiet", "--socket", str(path), "--tcp-ports", f"{port}:80",
         "--address", "10.0.2.15", "--netmask", "255.255.255.0", "--gateway", ROUTER, *root],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 30
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)  # between bind and listen
        yield path, process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("mtu", "offloads"), [(1500, "on"), (9000, "off")])
def test_a_long_transfer_through_a_socket(
    guest: Guest,
    shell: Any,
    serve: Any,
    fetch: Any,
    passt: tuple[Path, Any],
    port: int,
    mtu: int,
    offloads: str,
) -> None:
    path, process = passt
    data = random.Random(mtu).randbytes(LONG)
    wanted = hashlib.sha256(data).hexdigest()
    with Machine(
        guest.kernel,
        initrd=guest.initramfs,
        append="console=ttyS0 quiet ip=dhcp panic=-1",
        networks=[f"stream:{path},mtu={mtu},offloads={offloads}"],
    ) as machine:
        run = shell(machine)
        adapter = machine.network.interfaces[0].adapter
        assert adapter.vsp is not None
        oids = adapter.vsp.protocol.oids
        assert oids.offloads.lso4 == oids.offloads.transmit.tcp4 == (offloads == "on")
        run(f"ip link set eth0 mtu {mtu}; httpd -p 80 -h /")
        with serve("127.0.0.1", data) as server:
            run(f"wget -q -O /f http://{ROUTER}:{server.port}/f")
        assert wanted in run("sha256sum /f")
        assert fetch(machine, ("127.0.0.1", port)) == (LONG, wanted)
        assert "InCsumErrors 0" in run(
            "grep Tcp: /proc/net/snmp | awk 'NR==1 {for (i=1; i<=NF; i++) n[i]=$i} NR==2 {for (i in n) print n[i], $i}'"
        )
        statistics = adapter.statistics
        assert statistics.violations == statistics.sent_errors == statistics.received_no_buffer == 0
        assert machine.network.interfaces[0].uplink.uplink.dropped == 0
        # When passt dies, the guest's cable is pulled, and the guest goes on.
        process.kill()
        carrier = "/sys/class/net/eth0/carrier"
        run(f"n=0; until [ $(cat {carrier}) = 0 ]; do n=$((n+1)); [ $n = 100 ] && exit 1; sleep 0.1; done")

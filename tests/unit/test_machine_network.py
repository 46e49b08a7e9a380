"""Adapters as users describe them, what they are connected to, and how the host waits for them."""

import os
import select
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmbus.bus import VmbusGuest, VmbusHost
from vmbus.emulated.ports import attach_pci
from vmbus.errors import DeviceError, LocalProtocolError
from vmbus.hypervisor import Hypervisor, VirtualClock
from vmbus.hypervisor.personality import WINDOWS_2000
from vmbus.machine.network import GuestNetwork, parse_mac, parse_network
from vmbus.machine.nic import TulipAdapter
from vmbus.machine.tulip_guest import TulipNic
from vmbus.network import passt
from vmbus.network.oid import Offloads
from vmbus.network.passt import PasstUplink
from vmbus.network.switch import Switch
from vmbus.network.uplink import LoopbackUplink, StreamUplink


@pytest.fixture
def network() -> Iterator[GuestNetwork]:
    hv = Hypervisor(clock=VirtualClock())
    root = hv.create_root()
    child = hv.create_child(root, "c0", memory_size=4 << 20)
    host = VmbusHost(hv, child)
    with GuestNetwork(host) as made:
        yield made
    host.close()
    root.destroy()


def test_a_description() -> None:
    plain = parse_network("tap")
    assert (plain.kind, plain.name, plain.mac, plain.mtu, plain.queues) == ("tap", "", None, None, None)
    full = parse_network("tap:vmbus0,mac=02:00:00:00:00:01,mtu=9000,queues=4,offloads=off,pcap=/tmp/a b")
    assert (full.kind, full.name, full.mac) == ("tap", "vmbus0", bytes.fromhex("020000000001"))
    assert (full.mtu, full.queues, full.offloads) == (9000, 4, Offloads.nothing())
    assert full.capture == Path("/tmp/a b")
    assert parse_network("none,offloads=on").offloads == Offloads.everything()
    assert parse_network("stream:/tmp/x:y").name == "/tmp/x:y"
    ports = parse_network("passt,tcp=2222:22,udp=53,tcp=80")
    assert (ports.tcp, ports.udp) == (("2222:22", "80"), ("53",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no network called ''"),
        ("bridge:br0", "give tap, tap:NAME, stream:PATH, passt or none"),
        ("stream", "no network called"),
        ("stream:", "no network called"),
        ("none:x", "no network called"),
        ("passt:x", "no network called"),
        ("none,", "no option ''"),
        ("none,mtu", "no option 'mtu'"),
        ("none,mtu=", "no option 'mtu='"),
        ("none,mtu=9001", "mtu=9001: not in 576 to 9000"),
        ("none,mtu=big", "mtu=big"),
        ("none,queues=0", "queues=0: not in 1 to 64"),
        ("none,offloads=maybe", "no option 'offloads=maybe'"),
        ("none,mac=01:00:00:00:00:01", "no unicast MAC address"),
        ("none,mac=xyz", "mac=xyz"),
        ("tap,tcp=22", "no option 'tcp=22'"),
        ("none,speed=10", "there are mac=, mtu="),
    ],
)
def test_what_describes_nothing(text: str, message: str) -> None:
    with pytest.raises(DeviceError, match=message.replace("(", r"\(")):
        parse_network(text)


def test_adapters_of_a_guest(network: GuestNetwork, tmp_path: Path) -> None:
    first = network.add()
    second = network.add("none,mtu=1400,queues=2,mac=02:00:00:00:00:09")
    assert first.adapter.config.mac == parse_mac("00-15-5D-00-00-01")
    assert first.adapter.config.offloads == Offloads.everything()
    config = second.adapter.config
    assert (config.mac.hex(), config.max_frame, config.max_queues) == ("020000000009", 1414, 2)
    third = network.add("none,mtu=1400", mtu=2000, queues=3, offloads=Offloads.nothing())
    config = third.adapter.config
    assert (config.mac.hex(), config.max_frame, config.max_queues) == ("00155d000003", 2014, 3)
    assert config.offloads == Offloads.nothing()
    network.remove(second)
    assert network.interfaces == [first, third]
    assert network.add().adapter.config.mac == parse_mac("00:15:5d:00:00:04"), "no address twice"
    with pytest.raises(ValueError, match="not in list"):
        network.remove(second)
    with pytest.raises(DeviceError, match="no place for a network adapter"):
        GuestNetwork(None).add()


@pytest.mark.parametrize(("processors", "queues"), [(1, 1), (3, 3), (16, 8)])
def test_an_adapter_has_a_queue_for_each_processor_up_to_eight(processors: int, queues: int) -> None:
    hv = Hypervisor(clock=VirtualClock())
    root = hv.create_root()
    host = VmbusHost(hv, hv.create_child(root, "c", memory_size=16 << 20, vps=processors))
    with GuestNetwork(host) as network:
        assert network.add().adapter.config.max_queues == queues
        assert network.add("none,queues=1").adapter.config.max_queues == 1
        assert network.add("none,queues=12").adapter.config.max_queues == 12
    host.close()
    root.destroy()


def test_an_adapter_can_be_rung_from_user_space() -> None:
    """uio_hv_generic, and so DPDK, takes no channel without a monitored notification; Hyper-V's wait 100 µs at most."""
    hv = Hypervisor(clock=VirtualClock())
    root = hv.create_root()
    child = hv.create_child(root, "c", memory_size=16 << 20, vps=2)
    host = VmbusHost(hv, child)
    with GuestNetwork(host) as network:
        network.add()
        guest = VmbusGuest(child.vps[0])
        guest.connect()
        (offer,) = guest.offers
        assert offer.monitor_id is not None
        guest.open(offer, 4, 4)
        assert hv.clock.next_deadline() == 100_000
    host.close()
    root.destroy()


def test_a_machine_without_enlightenments_has_emulated_adapters() -> None:
    hv = Hypervisor(clock=VirtualClock())
    root = hv.create_root()
    child = hv.create_child(root, "c0", memory_size=16 << 20, personality=WINDOWS_2000)
    bus = attach_pci(child)
    with GuestNetwork(None, lambda port, mac: TulipAdapter(child, bus, port, mac)) as network:
        sent: list[bytes] = []
        lan = Switch()
        peer = lan.connect("peer", receiver=sent.extend)
        interface = network.add(lan, mtu=1400)
        assert interface.mac == parse_mac("00:15:5d:00:00:01")
        nic = TulipNic(child.vps[0])
        assert nic.mac == interface.mac
        frame = b"\xff" * 6 + nic.mac + b"\x88\xb5" + bytes(46)
        assert nic.send(frame)
        assert sent == [frame]
        peer.send([nic.mac + bytes.fromhex("020000000001") + b"\x88\xb5" + bytes(46)])
        assert len(nic.receive()) == 1
        for wrong in ({"mtu": 9000}, {"queues": 2}, {"offloads": Offloads.everything()}):
            with pytest.raises(DeviceError, match="one queue, no offloads"):
                network.add(**wrong)  # type: ignore[arg-type]
        with pytest.raises(DeviceError, match="none of this"):
            network.remove(interface)
        ports = len(lan.ports)
        with pytest.raises(LocalProtocolError):
            network.add(lan)  # its slot is taken
        assert len(lan.ports) == ports
        assert network.interfaces == [interface]
    assert lan.ports == [peer]
    root.destroy()


def test_adapters_share_a_switch(network: GuestNetwork, tmp_path: Path) -> None:
    lan = Switch()
    one, two = network.add(lan, capture=tmp_path / "a"), network.add(lan, capture=tmp_path / "b")
    assert one.switch is two.switch is lan
    assert len(lan.ports) == 4
    network.remove(one)
    assert len(lan.ports) == 2
    network.close()
    assert lan.ports == []


def test_what_cannot_be_recorded_leaves_nothing_open(network: GuestNetwork, tmp_path: Path) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs:
        with pytest.raises(IsADirectoryError):
            network.add(StreamUplink(ours), capture=tmp_path)
        assert theirs.recv(1) == b""
    assert network.interfaces == []


def test_idle_time_is_real_only_with_the_outside(network: GuestNetwork) -> None:
    network.add()
    network.add(LoopbackUplink())
    assert not network.is_live
    assert network.idle(None) is False
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs:
        network.add(StreamUplink(ours))
        assert network.is_live
        started = time.monotonic()
        assert network.idle(50_000_000) is False, "the timer is due"
        assert time.monotonic() - started >= 0.05
        assert network.idle(None) is True, "something may still come"
        threading.Timer(0.05, theirs.sendall, [b"\0\0\0\x0e" + bytes(14)]).start()
        assert network.idle(1_900_000_000) is True, "a frame came before the timer was due"
        reader, writer = os.pipe()
        os.write(writer, b"x")
        assert network.idle(1_900_000_000, [reader]) is True
        os.close(reader)
        os.close(writer)


def test_what_waits_for_a_slow_peer_is_sent_in_idle_time(network: GuestNetwork) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    uplink = StreamUplink(ours)
    with theirs:
        network.add(uplink)
        uplink.send([bytes(1500)] * 1000)
        assert uplink.pending
        received = 0
        while received < 1504 * 1000:
            received += len(theirs.recv(1 << 20))
            network.idle(1)
        assert uplink.pending == 0


def test_an_uplink_whose_other_side_goes_pulls_the_cable(network: GuestNetwork, caplog) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    broken, kept = network.add(StreamUplink(ours)), network.add(LoopbackUplink())
    network.poll()
    assert broken.adapter.link_up
    theirs.close()
    assert network.idle(1_900_000_000) is True
    assert (broken.adapter.link_up, kept.adapter.link_up) == (False, True)
    assert "the other side closed the connection; its link is down now" in caplog.text
    assert not network.is_live
    assert [port.name for port in broken.switch.ports] == ["guest 00:15:5d:00:00:01"]
    network.poll()
    network.remove(broken)


def test_passt_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passt, "PROGRAM", "no-such-passt")
    with pytest.raises(DeviceError, match="install the package passt"):
        PasstUplink()


def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    program = tmp_path / "fake-passt"
    program.write_text("#!/bin/sh\n" + text)
    program.chmod(0o755)
    monkeypatch.setattr(passt, "PROGRAM", str(program))


def test_passt_gets_a_socket_and_its_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passt, "END_LIMIT", 60)
    reader = tmp_path / "reader.py"
    reader.write_text(
        "import socket, sys\n"
        f"open('{tmp_path}/arguments', 'w').write(' '.join(sys.argv[1:]))\n"
        f"open('{tmp_path}/frames', 'wb').write(socket.socket(fileno=int(sys.argv[4])).recv(99))\n"
    )
    fake(tmp_path, monkeypatch, f'exec {sys.executable} -I {reader} "$@"')
    uplink = parse_network("passt,mtu=9000,tcp=2222:22,udp=53").open()
    assert isinstance(uplink, PasstUplink)
    padded = bytes(12) + b"\x08\0\x45\0\0\x28" + bytes(36) + bytes(6)
    uplink.send([b"frame", padded])
    uplink.close()
    uplink.close()
    assert uplink.process.returncode == 0
    assert (tmp_path / "frames").read_bytes() == b"\0\0\0\x05frame\0\0\0\x36" + padded[:54]
    arguments = (tmp_path / "arguments").read_text()
    assert "--address 10.0.2.15 --netmask 255.255.255.0 --gateway 10.0.2.2 --mtu 9000" in arguments
    assert arguments.endswith("--tcp-ports 2222:22 --udp-ports 53")


def test_passt_that_ends_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(
        tmp_path,
        monkeypatch,
        "echo No routable interface >&2; echo Failed to send 9 bytes to syslog >&2; exit 3",
    )
    with PasstUplink() as uplink:
        select.select([uplink], [], [], 10)
        with pytest.raises(DeviceError, match="passt ended with status 3: No routable interface"):
            uplink.receive()


def test_passt_that_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passt, "END_LIMIT", 0.2)
    fake(tmp_path, monkeypatch, "exec sleep 100")
    with PasstUplink() as uplink:
        assert uplink.process.poll() is None
    assert uplink.process.returncode == -9

"""The feature tables of README.md and docs/ say what the code does, version by version."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from reference.netpair import frame, mac, make_pair, receive_all
from reference.network_attacker import everything

from vmbus.bus.channel import loopback
from vmbus.core.memory import GuestMemory
from vmbus.errors import DeviceError, LocalProtocolError
from vmbus.network import wire as network
from vmbus.network.rndis import Frame, LargeSend, TransmitChecksum
from vmbus.network.vsc_protocol import GuestConfig
from vmbus.storage import wire as storage
from vmbus.storage.disk import MemoryDisk
from vmbus.storage.vsc import StorageVsc
from vmbus.storage.vsp import StorageVsp

ROOT = Path(__file__).parents[2]
Table = dict[str, list[str]]


def tables(page: str) -> list[Table]:
    """The tables of a page: first cell of each row to the others; the head of the table is its first row."""
    made: list[Table] = []
    for block in re.findall(r"(?:^\|.*\n)+", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in block.splitlines()]
        made.append({row[0]: row[1:] for row in rows if not set("".join(row)) <= set("-: ")})
    return made


def table_with(page: str, *labels: str) -> Table:
    (found,) = [table for table in tables(page) if all(label in table for label in labels)]
    return found


def said(cell: str) -> bool:
    assert cell in ("yes", "–")
    return cell == "yes"


STORAGE_NAMES = {f"{version >> 8}.{version & 0xFF}": version for version in storage.Version}


@pytest.mark.parametrize("page", ["README.md", "docs/storage.md"])
def test_storage_by_version(page: str) -> None:
    table = table_with(page, "bytes of sense data", "sub-channels")
    assert next(iter(table.values())) == list(STORAGE_NAMES)
    for column, version in enumerate(STORAGE_NAMES.values()):
        rules = storage.rules(version)
        assert rules is not None
        assert table["bytes of a packet"][column] == str(rules.packet_size)
        assert table["bytes of sense data"][column] == str(rules.sense_size)
        told: list[bool] = []
        memory = GuestMemory(4 << 20)
        guest, host = loopback(memory, 16, 16)
        provider = StorageVsp({(0, 0): MemoryDisk(1 << 20)}, max_sub_channels=2)
        provider.open(host)
        client = StorageVsc(
            guest,
            range(64),
            versions=(version,),
            sub_channels=2,
            on_change=lambda told=told: told.append(True),
        )
        client.connect()
        assert said(table["sub-channels"][column]) == bool(client.negotiation.sub_channels)
        client.disk()
        provider.add_disk((0, 1), MemoryDisk(1 << 20))
        client.poll()
        assert said(table["notices of added and removed disks"][column]) == bool(told)
        assert client.luns() == [0, 1]
        assert client.disk(lun=1).size == 1 << 20
        client.reset()
        disk = client.disk()
        disk.write(0, b"\1" * 512, fua=True)
        disk.unmap(0, 4096)
        assert disk.read(0, 512) == bytes(512)
        provider.shutdown()


def moves_large_sends(version: int) -> bool:
    """Whether a guest that leaves checksums and segments to its host is done right by."""
    _, one, two = make_pair(GuestConfig(versions=(version,), offloads=everything().offloads))
    ip = bytearray(b"\x45\0\0\0\0\0\x40\0\x40\x06\0\0\x0a\0\0\x01\x0a\0\0\x02")
    ip[2:4] = (40 + 3000).to_bytes(2, "big")
    tcp = b"\x12\x34\0\x50\0\0\0\1\0\0\0\2\x50\x18\xff\xff\0\0\0\0"
    data = frame(mac(2), mac(1), bytes(ip) + tcp + bytes(3000), 0x800)
    checksum = TransmitChecksum(ipv4=True, tcp=True, ip_header=True, transport_offset=34).pack()
    assert one.nic.send(Frame(data, checksum=checksum, large_send=LargeSend(1000, 34).pack()))
    return [len(got) for got in receive_all(two.nic)] == [1054] * 3 or version == network.Version.V6_1


def announces_functions(version: int) -> bool:
    _, one, _ = make_pair(GuestConfig(versions=(version,), capabilities=everything().capabilities))
    one.vsp.associate_vf(7)
    one.nic.receive()
    return one.nic.protocol.vf_serial == 7


def has_sub_channels(version: int) -> bool:
    _, one, _ = make_pair(GuestConfig(versions=(version,)), max_queues=4)
    try:
        return one.nic.request_subchannels(3) == 3
    except (DeviceError, LocalProtocolError):
        return False


def coalesces(version: int) -> bool:
    wanted = everything()
    config = GuestConfig(versions=(version,), offloads=wanted.offloads, capabilities=wanted.capabilities)
    _, one, _ = make_pair(config)
    return one.vsp.protocol.rsc == (True, True)


def takes_jumbo_frames(version: int) -> bool:
    _, one, _ = make_pair(GuestConfig(versions=(version,), mtu=9000))
    return one.nic.mtu == 9000


NETWORK_ROWS: dict[str, Callable[[int], bool]] = {
    "checksum and large-send (LSOv2) offload": moves_large_sends,
    "MTU over 1500": takes_jumbo_frames,
    "MTU over 1500, VLAN beside the frame": takes_jumbo_frames,
    "virtual function announced, data path switched": announces_functions,
    "sub-channels, RSS, send table": has_sub_channels,
    "sub-channels, RSS, send table, UDP checksums": has_sub_channels,
    "coalesced packets (RSC over VMBus)": coalesces,
}


@pytest.mark.parametrize("page", ["README.md", "docs/network.md"])
def test_networking_by_version(page: str) -> None:
    table = table_with(page, "bytes of a message", "coalesced packets (RSC over VMBus)")
    numbers = [f"0x{version:x}" for version in network.Version]
    assert numbers in table.values()
    assert table["NVSP"] == ["1", "2", "4", "5", "6", "6.1"]
    checked = 0
    for column, version in enumerate(network.Version):
        assert table["bytes of a message"][column] == str(network.packet_size(version))
        for label, works in NETWORK_ROWS.items():
            if label in table:
                assert said(table[label][column]) == works(version), (label, hex(version))
                checked += 1
    assert checked >= 4 * len(network.Version)

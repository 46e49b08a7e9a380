"""What the drivers of other guests and hosts than Linux send, packet by packet, against our two ends.

The sequences are those of Microsoft's UEFI firmware for its virtual machines, of FreeBSD, OpenBSD and NetBSD, and of
Hyper-V as a host. Packets are laid out by hand.
"""

import struct
from array import array
from collections.abc import Callable, Iterator
from uuid import UUID

import pytest
from reference.storage_attacker import (
    CONTENT,
    GPA_DIRECT,
    IN_BAND,
    Attacker,
    control,
    gpa_header,
    read10,
    srb,
    status_of,
)
from reference.storage_liar import Host, completion

from vmbus.bus.channel import loopback
from vmbus.core.memory import GuestMemory
from vmbus.core.ring import Packet
from vmbus.storage.disk import Extent, MemoryDisk
from vmbus.storage.scsi import CdromUnit
from vmbus.storage.scsi.codes import AdditionalSense, SenseKey
from vmbus.storage.scsi.sense import Sense
from vmbus.storage.vsc import StorageVsc
from vmbus.storage.vsp import StorageVsp

MIB = 1 << 20
BEGIN, END, VERSION, PROPERTIES, SUB_CHANNELS = 7, 8, 9, 10, 13

Serve = Callable[..., tuple[StorageVsp, Attacker]]


@pytest.fixture
def serve() -> Iterator[Serve]:
    made: list[tuple[StorageVsp, Attacker]] = []

    def make(addresses: list[tuple[int, int]], **options: int) -> tuple[StorageVsp, Attacker]:
        guest = Attacker()
        disks = {address: MemoryDisk(MIB, content=CONTENT) for address in addresses}
        vsp = StorageVsp(disks, **options)  # type: ignore[arg-type]
        vsp.open(guest.host)
        made.append((vsp, guest))
        return vsp, guest

    yield make
    for vsp, guest in made:
        assert vsp.violations == 0
        vsp.shutdown()
        guest.guest.close()


def answered(guest: Attacker, operation: int, body: bytes = b"", *, size: int = 64, tid: int = 1) -> bytes:
    """The completion of an initialization packet: of the same size, and successful."""
    guest.answers.clear()
    guest.send(IN_BAND, control(operation, body, size), tid=tid)
    guest.collect()
    answer = guest.answers.pop(tid)
    assert len(answer) == size
    assert struct.unpack_from("<III", answer) == (1, 0, 0)
    return answer


def uefi_negotiates(guest: Attacker) -> None:
    """48 bytes, as of the oldest version, until 6.0 is agreed on; it knows no other."""
    answered(guest, BEGIN, size=48)
    answered(guest, VERSION, struct.pack("<HH", 0x0600, 0), size=48)
    properties = answered(guest, PROPERTIES)
    assert struct.unpack_from("<I", properties, 12 + 12)[0] >= 4096
    answered(guest, END)


def test_the_uefi_firmware_lists_units_with_an_allocation_length_of_zero(serve: Serve) -> None:
    _, guest = serve([(0, 0), (0, 1), (2, 5)])
    uefi_negotiates(guest)
    found = []
    for target in range(3):
        guest.memory.write(3 << 12, b"\xee" * 2048)
        answer = guest.execute(bytes([0xA0]) + bytes(11), 2048, [(2048, 0, [3])], target=target)
        assert status_of(answer) == (0, 1, 0)
        (moved,) = struct.unpack_from("<I", answer, 12 + 12)
        listed = guest.memory.read(3 << 12, moved)
        assert len(listed) == 8 + int.from_bytes(listed[:4], "big")
        found += [(target, int.from_bytes(listed[at : at + 2], "big")) for at in range(8, len(listed), 8)]
    assert found == [(0, 0), (0, 1), (2, 5)]


@pytest.mark.parametrize("allocation", [1, 4, 8, 15])
def test_a_short_list_of_units_is_cut_and_no_error(serve: Serve, allocation: int) -> None:
    _, guest = serve([(0, 3)])
    guest.negotiate()
    guest.memory.write(3 << 12, b"\xee" * 64)
    answer = guest.execute(bytes([0xA0]) + bytes(8) + bytes([allocation, 0, 0]), 64, [(64, 0, [3])])
    assert status_of(answer) == (0, 1, 0)
    whole = bytes([0, 0, 0, 8]) + bytes(5) + bytes([3]) + bytes(6)
    assert guest.memory.read(3 << 12, 64) == whole[:allocation].ljust(64, b"\xee")


READ_16 = struct.pack(">BBQIBB", 0x88, 0, 7, 1, 0, 0)


@pytest.mark.parametrize("cdb", [read10(7, 1), READ_16, struct.pack(">BBIIBB", 0xA8, 0, 7, 1, 0, 0)])
@pytest.mark.parametrize(
    ("lun", "repeated"),
    [
        pytest.param(1, 1 << 5, id="low bits"),
        pytest.param(6, 6 << 5, id="low bits of 6"),
        pytest.param(33, 33 & 0xE0, id="EDK II's high bits"),
        pytest.param(12, (12 & 7) << 5, id="low bits of 12"),
    ],
)
def test_the_unit_number_may_be_repeated_in_the_command(
    serve: Serve, cdb: bytes, lun: int, repeated: int
) -> None:
    _, guest = serve([(0, lun)])
    guest.negotiate()
    cdb = cdb[:1] + bytes([cdb[1] | repeated]) + cdb[2:]
    assert status_of(guest.execute(cdb, 512, [(512, 0, [3])], lun=lun)) == (0, 1, 0)
    assert guest.memory.read(3 << 12, 512) == CONTENT[7 * 512 : 8 * 512]


def test_other_protection_bits_are_refused_all_the_same(serve: Serve) -> None:
    _, guest = serve([(0, 0), (0, 2)])
    guest.negotiate()
    for lun, bits in ((0, 0x20), (0, 0xE0), (2, 0x20), (2, 0x60)):
        cdb = bytes([0x28, bits]) + read10(7, 1)[2:]
        answer = guest.execute(cdb, 512, [(512, 0, [3])], lun=lun)
        assert status_of(answer)[2] == 2
        sense = Sense.unpack(answer[28:48])
        assert (sense.additional, sense.field) == (AdditionalSense.INVALID_FIELD_IN_CDB, (1, 7))


def test_old_freebsd_asks_for_no_sub_channels(serve: Serve) -> None:
    """It asks for as many as there are, at most one for each processor, also where there are none."""
    _, guest = serve([(0, 0)])
    guest.negotiate()
    answered(guest, SUB_CHANNELS, struct.pack("<H", 0))
    refused = guest.ask(IN_BAND, control(SUB_CHANNELS, struct.pack("<H", 1)))
    assert struct.unpack_from("<I", refused, 8)[0] == 0xC000000D
    assert guest.works()


@pytest.mark.parametrize("version", [0x0402, 0x0602])
def test_openbsd_takes_packets_of_64_bytes_only(serve: Serve, version: int) -> None:
    """It negotiates with transaction id 0, and drops whatever is not as long as its longest packet."""
    vsp, guest = serve([(0, 0)], versions=[version])
    answered(guest, BEGIN, tid=0)
    for wanted in (0x0602, 0x0600, 0x0501, 0x0402):
        guest.send(IN_BAND, control(VERSION, struct.pack("<HH", wanted, 0)), tid=0)
        guest.collect()
        answer = guest.answers.pop(0)
        assert len(answer) == 64
        if not struct.unpack_from("<I", answer, 8)[0]:
            assert wanted == version
            break
    answered(guest, PROPERTIES, tid=0)
    answered(guest, END, tid=0)
    packet = srb(read10(7, 1), 512, size=36).ljust(64, b"\0")
    guest.send(GPA_DIRECT, packet, gpa_header([(512, 0, [3])]), tid=5 << 32)
    guest.collect()
    assert len(guest.answers[5 << 32]) == 64
    assert guest.memory.read(3 << 12, 512) == CONTENT[7 * 512 : 8 * 512]
    vsp.add_disk((0, 1), MemoryDisk(MIB))
    guest.collect()
    assert [(len(notice), notice[0]) for notice in guest.notices] == [(64, 11)]


def test_a_notice_is_as_short_as_the_packets_of_an_old_guest(serve: Serve) -> None:
    vsp, guest = serve([(0, 0)])
    answered(guest, BEGIN, size=48)
    answered(guest, VERSION, struct.pack("<HH", 0x0402, 0), size=48)
    answered(guest, PROPERTIES, size=48)
    answered(guest, END, size=48)
    vsp.add_disk((0, 1), MemoryDisk(MIB))
    guest.collect()
    assert [len(notice) for notice in guest.notices] == [48]


@pytest.mark.parametrize("version", [0x0402, 0x0602])
def test_the_bsds_hear_of_a_removed_disk(serve: Serve, version: int) -> None:
    """They look at the bus again after ENUMERATE_BUS (11), and do nothing about REMOVE_DEVICE (2)."""
    vsp, guest = serve([(0, 0), (0, 1)])
    guest.negotiate(version)
    vsp.remove_disk((0, 1))
    guest.collect()
    assert [notice[0] for notice in guest.notices] == [11]
    answer = guest.execute(bytes([0x12, 0, 0, 0, 36, 0]), 36, [(36, 0, [3])], lun=1)
    assert status_of(answer) == (0, 1, 0)
    assert guest.memory.read(3 << 12, 1) == b"\x7f"


@pytest.mark.parametrize(("version", "sense"), [(0x0200, 18), (0x0402, 18), (0x0501, 20), (0x0602, 20)])
def test_old_hosts_are_asked_for_as_much_sense_data_as_they_have_room_for(version: int, sense: int) -> None:
    """18 bytes before Windows 8, as FreeBSD, OpenBSD and Linux ask for."""
    host = Host()
    client = StorageVsc(host.guest, range(64, 320), versions=[version], timeout=0.3)
    client.connect()
    host.taken.clear()
    client.execute(0, 0, bytes(6))
    disk = client.disk()
    disk.read_batch([0, 4096], 512)
    requests = [packet.payload for packet in host.taken if packet.payload[0] == 3]
    assert len(requests) >= 5
    assert {request[12 + 9] for request in requests} == {sense}
    host.guest.close()


def test_hyper_v_says_overrun_of_an_answer_that_is_short() -> None:
    host = Host()
    host.client.connect()
    inquiry = bytes(range(36))

    def short(packet: Packet) -> list[tuple[int, bytes]]:
        host.memory.write(319 << 12, inquiry)
        return [(packet.transaction_id, completion(0x80000005, 0x12, 0, 36))]

    host.answer = short
    result = host.client.execute(0, 0, bytes([0x12, 0, 0, 0, 255, 0]), data_in=255)
    assert result.good
    assert len(result.data) == 36
    nothing = completion(0x80000005, 0x12, 0, 0)
    host.answer = lambda packet: [(packet.transaction_id, nothing)]
    assert not host.client.execute(0, 0, bytes([0x12, 0, 0, 0, 255, 0]), data_in=255).good
    assert not host.client.execute(0, 0, bytes([0x2A]) + bytes(9), data_out=bytes(512)).good
    host.guest.close()


def test_the_client_reads_units_that_know_no_commands_of_16_bytes() -> None:
    memory = GuestMemory(4 * MIB)
    guest, host = loopback(memory, 16, 16)
    disc = MemoryDisk(MIB, sector_size=2048, content=CONTENT)
    vsp = StorageVsp({(0, 1): CdromUnit(disc, UUID(int=3))})
    vsp.open(host)
    vsc = StorageVsc(guest, range(64, 320))
    vsc.connect()
    drive = vsc.disk(0, 1)
    assert (drive.sector_size, drive.size, drive.thin) == (2048, MIB, False)
    assert drive.read(0, MIB) == CONTENT
    offsets = [2048 * n for n in (5, 0, 511, 300)]
    assert drive.read_batch(offsets, 2048) == [CONTENT[at : at + 2048] for at in offsets]
    assert drive.transfer_batch(array("Q", offsets), array("Q", [1, 2, 3, 4]), 2048, write=False) == [
        0,
        1,
        2,
        3,
    ]
    vsp.shutdown()
    guest.close()


@pytest.mark.parametrize(
    "code", [AdditionalSense.INVALID_OPERATION_CODE, AdditionalSense.INVALID_FIELD_IN_CDB]
)
def test_a_host_that_does_not_know_get_lba_status(code: AdditionalSense) -> None:
    """SPC-4 wants INVALID FIELD IN CDB for an unknown service action; some hosts say INVALID OPERATION CODE."""
    host = Host()
    host.client.connect()
    disk = host.client.disk()
    disk.thin = True
    unknown = completion(0xC0000185, 0x86, 2, payload=Sense(SenseKey.ILLEGAL_REQUEST, code).pack(), sense=18)
    host.answer = lambda packet: [(packet.transaction_id, unknown)]
    assert list(disk.extents(0, 8192)) == [Extent(0, 8192, True)]
    host.guest.close()


def test_the_client_writes_to_a_host_that_knows_no_commands_of_16_bytes() -> None:
    """A host of READ CAPACITY, READ and WRITE of 10 bytes and TEST UNIT READY, and of nothing else."""
    host = Host()
    host.client.connect()
    content = bytearray(CONTENT)
    unknown = Sense(SenseKey.ILLEGAL_REQUEST, AdditionalSense.INVALID_OPERATION_CODE).pack()

    def old(packet: Packet) -> list[tuple[int, bytes]]:
        tid, cdb = packet.transaction_id, packet.payload[28:38]
        ranges = packet.ranges
        at, length = int.from_bytes(cdb[2:6], "big") * 512, int.from_bytes(cdb[7:9], "big") * 512
        if cdb[0] == 0x00:
            return [(tid, completion())]
        if cdb[0] == 0x25 and ranges is not None:
            ranges.write(host.memory, struct.pack(">II", MIB // 512 - 1, 512))
            return [(tid, completion(moved=8))]
        if cdb[0] == 0x28 and ranges is not None:
            ranges.write(host.memory, content[at : at + length])
            return [(tid, completion(moved=length))]
        if cdb[0] == 0x2A and ranges is not None:
            content[at : at + length] = ranges.read(host.memory, 0, length)
            return [(tid, completion(moved=length))]
        return [(tid, completion(0xC0000185, 0x86, 2, payload=unknown, sense=18))]

    host.answer = old
    disk = host.client.disk()
    assert disk.size == MIB
    disk.write(4096, b"one by one".ljust(1024, b"."))
    disk.write_batch([0, 512 * 2047], [b"first".ljust(512), b"last".ljust(512)])
    assert content[4096:5120] == b"one by one".ljust(1024, b".")
    assert bytes(content[:512] + content[-512:]) == b"first".ljust(512) + b"last".ljust(512)
    assert disk.read(0, MIB) == content
    assert disk.read_batch([4096, 0], 512) == [content[4096:4608], content[:512]]
    host.guest.close()

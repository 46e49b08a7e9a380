"""Fuzz target: a host that answers the storage client with anything at all."""

import random
import struct
from functools import partial

from reference.fuzz import Fuzz
from reference.mutation import mutate
from reference.storage_liar import Host

from vmbus.core.ring import Packet
from vmbus.errors import LocalProtocolError, VmbusError

MIB = 1 << 20


def a_host_that_may_answer_anything(rng: random.Random) -> None:
    host = Host()
    client = host.client
    client.timeout = 0.01
    honesty = rng.choice([0.5, 0.8, 0.95])

    def wild(packet: Packet) -> list[tuple[int, bytes]]:
        answers = []
        if packet.ranges is not None and packet.payload[28] not in (0x88, 0x8A) and rng.random() > honesty:
            last, size = (
                rng.choice([0, 1, 4095, rng.getrandbits(63)]),
                rng.choice([512, 4096, 0, 513, rng.getrandbits(32)]),
            )
            data = struct.pack(
                ">QIBBH16x", last, size, 0, rng.getrandbits(8), rng.choice([0, 0xC000, 0xFFFF])
            )
            packet.ranges.write(host.memory, mutate(rng, data)[: packet.ranges.total])
        for tid, payload in host.honest(packet):
            if rng.random() < honesty:
                answers.append((tid, payload))
                continue
            what = rng.random()
            if what < 0.15:
                continue  # never
            if what < 0.3:
                tid = rng.choice([0, tid + 1, tid - 1, tid ^ 1 << 63, rng.getrandbits(64)]) % (1 << 64)
            answers += [(tid, mutate(rng, payload))] * rng.choice([1, 1, 2])
        if rng.random() < 0.02:
            host.send(0, mutate(rng, bytes([rng.choice([2, 11])]).ljust(64, b"\0")), rng.choice([6, 6, 7, 9]))
        if rng.random() < 0.002:
            word = rng.choice([0, 8, 4096, 0xFFFFFFF8, rng.getrandbits(32)])
            view = rng.choice((host.guest.incoming, host.guest.outgoing)).window.view()
            view[rng.choice((0, 4, 8, 12)) :][:4] = word.to_bytes(4, "little")
            view.release()
        return answers

    if rng.random() < 0.2:
        host.answer = wild  # from the negotiation on
    try:
        client.connect()
        disk = client.disk()
        host.answer = wild
        size = disk.sector_size
        most = min(disk.size, 2 * MIB) // size
        for _ in range(rng.randrange(1, 50)):
            at = rng.randrange(most) * size
            choice = rng.randrange(8)
            if choice == 0:
                assert len(disk.read(at, size)) == size
            elif choice == 1:
                disk.write(at, bytes(size), fua=rng.random() < 0.5)
            elif choice == 2:
                data = disk.read_batch([size * (n % most) for n in range(20)], size)
                assert [len(each) for each in data] == [size] * 20
            elif choice == 3:
                disk.write_batch([at] * 5, [bytes(size)] * 5)
            elif choice == 4:
                extents = disk.lba_status(at, disk.size - at)
                assert extents[0].offset == at
                assert sum(extent.length for extent in extents) <= disk.size - at
            elif choice == 5:
                client.luns()
                disk.refresh()
                size = disk.sector_size
                most = min(disk.size, 2 * MIB) // size
            elif choice == 6:
                rng.choice([disk.flush, client.reset, disk.inquiry, partial(disk.unmap, 0, size)])()
            else:
                client.poll()
    except LocalProtocolError:
        assert not host.guest.is_open  # nothing that a host says may look like a mistake of our own
    except VmbusError:
        pass
    assert len(client._pending) <= 64
    assert client.stale_completions <= 2 * len(host.taken) + 64
    host.guest.close()


def test_storage_client(fuzz: Fuzz) -> None:
    fuzz.run(a_host_that_may_answer_anything, cases=12_000)

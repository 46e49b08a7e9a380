"""Guests that run in a process of their own (see test_child_process): each a function of its partition."""

import hashlib
import os
import signal
import socket
import sys
import time
from uuid import UUID

from reference.raw_guest import OS_ID, VECTOR, RawGuest

from vmbus.hypervisor.faults import GeneralProtectionFault, UndefinedOpcodeFault
from vmbus.hypervisor.tlfs import CallCode, Msr

REPORT = 0x8000
ECHO = UUID("5ec0ec00-0000-4000-8000-000000000001")


class _Vp:
    """`RawGuest` finds the memory through the processor's partition."""

    def __init__(self, partition, index=0):
        self.partition = partition
        self._vp = partition.vps[index]

    def __getattr__(self, name):
        return getattr(self._vp, name)


def exits(partition):
    """Every kind of exit once; what came of it goes into memory."""
    vp = partition.vps[0]
    found = []
    try:
        vp.hypercall(CallCode.GET_PARTITION_ID, 0, 0)
    except UndefinedOpcodeFault:
        found.append("ud")
    try:
        vp.rdmsr(0xDEAD)
    except GeneralProtectionFault:
        found.append("gp")
    vp.wrmsr(Msr.GUEST_OS_ID, OS_ID)
    found.append(f"{vp.rdmsr(Msr.GUEST_OS_ID):x}")
    found.append(vp.cpuid(0x4000_0001)[0].to_bytes(4, "little").decode())
    vp.io_write(0x80, 1, 0x5A)
    found.append(f"{vp.io_read(0x80, 1):x}")
    vp.mmio_write(0xE000_0010, 4, 77)
    found.append(f"{vp.mmio_read(0xE000_0010, 4)}")
    guest = RawGuest(_Vp(partition))
    found.append(f"post {guest.post(1, 5, b'hello')}")
    found.append(f"signals {[guest.signal(2) for _ in range(3)]}")
    found.append(f"nobody {guest.signal(3)}")
    rax, out = guest.fast(CallCode.GET_PARTITION_ID)
    found.append(f"id {rax} {int.from_bytes(out, 'little')}")
    partition.memory.write(REPORT, "|".join(found).encode().ljust(1024, b"\0"))


def descriptors(partition, signals=0):
    """What the process holds, by kind, after it has rung `signals` connections."""
    kinds = []
    if signals:
        guest = RawGuest(_Vp(partition))
        assert [guest.signal(2 + n) for n in range(signals)] == [0] * signals
    for fd in range(3, 256):
        try:
            kinds.append(os.readlink(f"/proc/self/fd/{fd}").replace("anon_inode:", "").split(":")[0])
        except OSError:
            continue
    partition.memory.write(REPORT, "|".join(sorted(kinds)).encode().ljust(1024, b"\0"))


def ring_flags(partition, flags):
    """Ring so many flags of one connection, then wait to be stopped."""
    guest = RawGuest(_Vp(partition))
    assert [guest.signal(2, flag) for flag in range(flags)] == [0] * flags
    time.sleep(60)


def interrupts(partition, count):
    """Take `count` messages through interrupts and send each one's payload back."""
    guest = RawGuest(_Vp(partition))
    vp = partition.vps[0]
    rung = []
    vp.on_interrupt = lambda: rung.append(1)
    partition.memory.write(REPORT, b"ready")
    taken = 0
    while taken < count:
        vector = vp.pop_interrupt()
        if vector is None:
            time.sleep(0.0005)
            continue
        assert vector == VECTOR
        vp.wrmsr(Msr.EOI, 0)
        while (message := guest.take_message(2)) is not None:
            taken += 1
            assert guest.post(1, 9, message[2]) == 0


def ticker(partition):
    """Count in memory, ring a connection for each count, and echo messages: something to suspend."""
    guest = RawGuest(_Vp(partition))
    count = 0
    while True:
        count += 1
        partition.memory.write(REPORT, count.to_bytes(8, "little"))
        guest.signal(2)
        if partition.vps[0].pop_interrupt() is not None:
            partition.vps[0].wrmsr(Msr.EOI, 0)
            while (message := guest.take_message(2)) is not None:
                guest.post(1, 9, message[2])
        time.sleep(0.0005)


def echo(partition, rounds, crash_after=-1):
    """Open the echo channel with a real driver and send `rounds` packets through it."""
    from vmbus.bus import VmbusGuest
    from vmbus.bus.hosting import Threads

    hosting = Threads(workers=1)
    guest = VmbusGuest(partition.vps, partition.memory, hosting=hosting)
    guest.connect()
    offer = next(o for o in guest.offers if o.interface_id == ECHO)
    channel = guest.open(offer, 4, 4)
    got = []
    channel.on_signal = lambda: got.extend(packet.payload for packet in channel.incoming.recv_packets(64))
    sent, received = hashlib.sha256(), hashlib.sha256()
    for n in range(rounds):
        if n == crash_after:
            os.kill(os.getpid(), signal.SIGKILL)
        payload = n.to_bytes(8, "little") * (1 + n % 32)
        sent.update(payload)
        channel.send(payload)
        assert channel.wait(lambda n=n: len(got) > n)
        received.update(got[n])
    assert sent.digest() == received.digest()
    partition.memory.write(REPORT, received.digest())
    channel.close()
    guest.close()
    hosting.close()


def garbage(partition, size):
    """Speak nonsense to the parent, then wait to be stopped."""
    partition._socket.send(b"\xff" * size)
    time.sleep(30)


def flood(partition):
    """Ask and never read an answer."""
    partition._socket.setblocking(False)
    from vmbus.hypervisor.remote_wire import Operation, Request

    request = Request(Operation.CPUID, 0, 0, 0, 0x4000_0000, 0, 0, b"", 0).pack()
    while True:
        try:
            partition._socket.send(request)
        except BlockingIOError:
            time.sleep(0.01)


def hang_up(partition):
    """Close the socket and live on."""
    partition._socket.shutdown(socket.SHUT_RDWR)
    time.sleep(30)


def leave(partition, status):
    sys.exit(status)


def abuse_doorbells(partition):
    """Fill and drain every descriptor that is shared with the parent, in blocking and non-blocking mode."""
    guest = RawGuest(_Vp(partition))
    assert guest.signal(2) == 0
    (bell,) = partition.vps[0]._doorbells.values()
    os.set_blocking(bell, True)
    os.write(bell, (0xFFFF_FFFF_FFFF_FFF0).to_bytes(8, "little"))
    for _ in range(1000):
        os.read(bell, 8)
        os.write(bell, (1).to_bytes(8, "little"))
    partition.memory.write(REPORT, b"done")
    time.sleep(30)


def crowd(partition, rounds, seed):
    """Open every echo channel there is and keep all of them busy; stop using one when it is taken back.

    Reports for each channel, by the number in its instance id: how many answers came (all in order and equal to what
    was sent, or the process dies of an assertion), 0xFFFF added if the channel was rescinded.
    """
    import random

    from vmbus.bus import VmbusGuest
    from vmbus.bus.hosting import Threads
    from vmbus.errors import ProtocolError

    generator = random.Random(seed)
    hosting = Threads(workers=1)
    guest = VmbusGuest(partition.vps, partition.memory, hosting=hosting)
    guest.connect()
    got, sent, channels, gone = {}, {}, {}, set()
    guest.on_rescind = lambda offer: gone.add(offer.instance_id.int & 0xFF)
    for offer in guest.offers:
        number = offer.instance_id.int & 0xFF
        try:
            channel = guest.open(offer, 2, 2)
        except ProtocolError:
            gone.add(number)
            continue
        got[number], sent[number], channels[number] = 0, 0, channel

        def take(packets, number=number):
            for packet in packets:
                assert packet.payload[:8] == got[number].to_bytes(8, "little")
                got[number] += 1

        channel.serve(take)
    partition.memory.write(REPORT, b"busy")
    while busy := [n for n in channels if n not in gone and sent[n] < rounds]:
        number = generator.choice(busy)
        channel = channels[number]
        for _ in range(generator.randrange(1, 8)):
            if sent[number] == rounds:
                break
            if sent[number] - got[number] >= 16:  # what the two pages of the way back hold
                channel.wait(lambda n=number: got[n] == sent[n] or n in gone)
            try:
                channel.send(sent[number].to_bytes(8, "little") * generator.randrange(1, 40))
            except ProtocolError:
                gone.add(number)  # closed between our look and our send
                break
            sent[number] += 1
    for number, channel in channels.items():
        assert channel.wait(lambda n=number: got[n] == sent[n] or n in gone)
    for number in range(8):
        result = got.get(number, 0) | (1 << 16 if number in gone else 0)
        partition.memory.write(REPORT + 16 + 4 * number, result.to_bytes(4, "little"))
    guest.close()
    hosting.close()


def fuzz(partition, seed, count):
    """Send `count` datagrams of the right size with anything in them, reading what comes back."""
    import random

    from vmbus.hypervisor.remote_wire import Operation, Request

    generator = random.Random(seed)
    RawGuest(_Vp(partition))
    link = partition._socket

    def value():
        return generator.choice(
            (
                generator.getrandbits(64),
                generator.getrandbits(16),
                generator.randrange(1 << 22),
                generator.choice((0x4000_0000, 0x4000_0080, 0x4000_0090, 0x4000_00B0))
                + generator.randrange(16),
                0xFEE0_0000 + generator.randrange(0x1000),
                generator.choice(list(CallCode)) | generator.choice((0, 1 << 16)),
            )
        )

    def number(width):
        return generator.randrange(1 << generator.choice((1, width)))

    for _ in range(count):
        request = Request(
            generator.choice(list(Operation)),
            number(8) & 1 if generator.random() < 0.9 else number(8),
            0 if generator.random() < 0.9995 else number(16),
            generator.choice((1, 2, 4)) if generator.random() < 0.9995 else number(32),
            value(),
            value(),
            value(),
            generator.randbytes(96),
            number(64),
        )
        link.send(request.pack())
        if not request.flags & 1:
            link.recv(4096)


def prints(partition, text, times, status):
    """Write to both streams, and end with a status."""
    for _ in range(times):
        os.write(1, text.encode())
        os.write(2, text.encode())
    os._exit(status)


def streams(partition):
    """What the first three descriptors are, and whether something can be read from any of them."""
    kinds = [os.readlink(f"/proc/self/fd/{fd}").split(":")[0] for fd in range(3)]
    for fd in range(3):
        try:
            kinds.append(f"read {len(os.read(fd, 1))}")
        except OSError:
            kinds.append("unreadable")
    partition.memory.write(REPORT, "|".join(kinds).encode().ljust(1024, b"\0"))


def second_processor(partition):
    """Two threads, one a processor, that count what their processors let them."""
    import threading

    def count(vp, at):
        done = 0
        while True:
            vp.rdmsr(Msr.TIME_REF_COUNT)
            done += 1
            partition.memory.write(REPORT + at, done.to_bytes(8, "little"))
            time.sleep(0.001)

    threading.Thread(target=count, args=(partition.vps[1], 8), daemon=True).start()
    count(partition.vps[0], 0)

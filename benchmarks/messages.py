"""Messages and events between partitions: hypercall, SynIC, interrupt, EOI, beside the host's own mechanisms.

Ours does everything that a guest and its provider see: the hypercall is checked, the flag or slot in the guest's page
is set, the interrupt goes through the local APIC, the handler takes what came and ends the interrupt.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import repeat

from benchmarks.harness import NO_TARGET, Case, Comparison, Row, Run, rows_of, timed
from vmbus.core.dispatch import EventFlags, MessageSlot
from vmbus.hypervisor import Hypervisor, Partition, VirtualClock
from vmbus.hypervisor.abi import control
from vmbus.hypervisor.tlfs import LINUX_GUEST_OS_ID, CallCode, Msr

PAYLOAD = bytes(range(64))
SINT = 2
VECTOR = 0xF3
HYPERCALL_PAGE, INPUT, SIM, SIEF = 0x1000, 0x2000, 0x3000, 0x4000
CONNECTION = 1
EOI, EOM = int(Msr.EOI), int(Msr.EOM)


@contextmanager
def guest() -> Iterator[tuple[Hypervisor, Partition]]:
    """A child whose processor is ready for messages and events."""
    hypervisor = Hypervisor(clock=VirtualClock())
    child = hypervisor.create_child(hypervisor.create_root(), "guest", memory_size=1 << 20)
    vp = child.vps[0]
    vp.wrmsr(Msr.GUEST_OS_ID, LINUX_GUEST_OS_ID)
    vp.wrmsr(Msr.HYPERCALL, HYPERCALL_PAGE | 1)
    vp.wrmsr(Msr.SIMP, SIM | 1)
    vp.wrmsr(Msr.SIEFP, SIEF | 1)
    vp.wrmsr(Msr.SINT0 + SINT, VECTOR)
    yield hypervisor, child
    hypervisor.destroy(child)


@contextmanager
def event_to_guest() -> Iterator[Run]:
    with guest() as (hypervisor, child):
        vp, flags, taken = child.vps[0], EventFlags(child.memory, SIEF, SINT), 0

        def handler(vector: int) -> None:
            nonlocal taken
            taken += len(flags.take())
            vp.wrmsr(EOI, 0)

        vp.interrupt_handler = handler

        def work(count: int) -> None:
            nonlocal taken
            taken = 0
            signal = hypervisor.signal_event
            for _ in repeat(None, count):
                signal(child, 0, SINT, 5)
            if taken != count:
                raise AssertionError(f"{count} events signalled, {taken} taken")

        yield timed(work)


@contextmanager
def event_from_guest() -> Iterator[Run]:
    with guest() as (hypervisor, child):
        taken = 0

        def provider(flag: int) -> None:
            nonlocal taken
            taken += 1

        hypervisor.create_event_port(child, CONNECTION, provider)

        def work(count: int) -> None:
            nonlocal taken
            taken = 0
            word, hypercall = control(CallCode.SIGNAL_EVENT, fast=True), child.vps[0].hypercall
            for _ in repeat(None, count):
                hypercall(word, CONNECTION, 0)
            if taken != count:
                raise AssertionError(f"{count} events signalled, {taken} taken")

        yield timed(work)


@contextmanager
def message_to_guest() -> Iterator[Run]:
    with guest() as (hypervisor, child):
        vp, slot, taken = child.vps[0], MessageSlot(child.memory, SIM, SINT), 0

        def handler(vector: int) -> None:
            nonlocal taken
            message = slot.take()
            if message is not None and message.payload == PAYLOAD:
                taken += 1
            if slot.end():
                vp.wrmsr(EOM, 0)
            vp.wrmsr(EOI, 0)

        vp.interrupt_handler = handler

        def work(count: int) -> None:
            nonlocal taken
            taken = 0
            post = hypervisor.post_message
            for _ in repeat(None, count):
                post(child, 0, SINT, 1, 0, PAYLOAD)
            if taken != count:
                raise AssertionError(f"{count} messages posted, {taken} taken")

        yield timed(work)


@contextmanager
def message_from_guest() -> Iterator[Run]:
    with guest() as (hypervisor, child):
        taken = 0

        def provider(vp_index: int, message_type: int, payload: bytes) -> None:
            nonlocal taken
            taken += payload == PAYLOAD

        hypervisor.create_message_port(child, CONNECTION, provider)
        header = b"".join(word.to_bytes(4, "little") for word in (CONNECTION, 0, 1, len(PAYLOAD)))
        child.memory.write(INPUT, header + PAYLOAD)

        def work(count: int) -> None:
            nonlocal taken
            taken = 0
            word, hypercall = int(CallCode.POST_MESSAGE), child.vps[0].hypercall
            for _ in repeat(None, count):
                hypercall(word, INPUT, 0)
            if taken != count:
                raise AssertionError(f"{count} messages posted, {taken} taken")

        yield timed(work)


@contextmanager
def bare_eventfd() -> Iterator[Run]:
    fd = os.eventfd(0, os.EFD_NONBLOCK)

    def work(count: int) -> None:
        for _ in repeat(None, count):
            os.eventfd_write(fd, 1)
            os.eventfd_read(fd)

    yield timed(work)
    os.close(fd)


@contextmanager
def bare_pipe() -> Iterator[Run]:
    receiving, sending = os.pipe()

    def work(count: int) -> None:
        for _ in repeat(None, count):
            os.write(sending, PAYLOAD)
            os.read(receiving, len(PAYLOAD))

    yield timed(work)
    os.close(receiving)
    os.close(sending)


EVENTFD = Case("eventfd write, read", bare_eventfd)
PIPE = Case("os.pipe write, read", bare_pipe)

COMPARISONS = [
    Comparison("event, host → guest", Case("signal, interrupt, EOI", event_to_guest), [(EVENTFD, NO_TARGET)]),
    Comparison("event, guest → host", Case("HvSignalEvent (fast)", event_from_guest), [(EVENTFD, NO_TARGET)]),
    Comparison(
        "64 B message, host → guest", Case("post, interrupt, EOI", message_to_guest), [(PIPE, NO_TARGET)]
    ),
    Comparison("64 B message, guest → host", Case("HvPostMessage", message_from_guest), [(PIPE, NO_TARGET)]),
]


def rows(quick: bool) -> Iterator[Row]:
    """The rows of messages and events."""
    return rows_of(COMPARISONS, quick)

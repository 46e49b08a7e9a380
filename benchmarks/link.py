"""The other process of a benchmark: how it is started, handed its descriptors, pinned and ended."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.reduction import DupFd
from time import perf_counter
from typing import Any, TypeAlias

from benchmarks.harness import Run
from vmbus.core.memory import PAGE_SIZE, Window

SPAWN = multiprocessing.get_context("spawn")
Work: TypeAlias = Callable[[int], int]
"""One side's part of `count` operations; returns how many payload bytes it saw."""
ANSWER_SECONDS = 60.0


class Descriptor:
    """A file descriptor on its way to the other process, where it arrives as a plain `int`."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __reduce__(self) -> tuple[Callable[..., int], tuple[Any]]:
        return _arrived, (DupFd(self.fd),)


def _arrived(handle: Any) -> int:
    return int(handle.detach())


class SharedWindow:
    """The pages of one ring, control page first, in a memfd that both processes map."""

    def __init__(self, data_pages: int) -> None:
        self.pages = range(data_pages + 1)
        self.fd = os.memfd_create("benchmark-ring")
        os.ftruncate(self.fd, len(self.pages) * PAGE_SIZE)

    def map(self) -> Window:
        """This process's view of it."""
        return Window.from_fd(self.fd, self.pages)

    def __reduce__(self) -> tuple[Callable[..., Window], tuple[Any, ...]]:
        return Window.from_fd, (Descriptor(self.fd), self.pages)

    def close(self) -> None:
        """Forget the descriptor; mappings stay."""
        os.close(self.fd)


def two_processors() -> str | None:
    """Why two processes that poll cannot be measured here, if so."""
    return "needs two CPUs" if len(os.sched_getaffinity(0)) < 2 else None


@contextmanager
def pinned(place: int) -> Iterator[None]:
    """Keep this process on its `place`-th CPU, so that every contestant crosses between the same two CPUs."""
    before = os.sched_getaffinity(0)
    allowed = sorted(before)
    os.sched_setaffinity(0, {allowed[place % len(allowed)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _other_process(commands: Connection, prepare: Callable[..., Work], arguments: tuple[Any, ...]) -> None:
    with pinned(1):
        work = prepare(*arguments)
        commands.send(0)
        while count := commands.recv():
            commands.send(work(count))


@contextmanager
def two_processes(
    work: Work, payload_size: int, prepare: Callable[..., Work], *arguments: Any
) -> Iterator[Run]:
    """Times `work` here against ``prepare(*arguments)`` over there, both told the same count.

    The time ends when the other process has reported that it is done, and that it saw every byte.
    """
    here, there = SPAWN.Pipe()
    process = SPAWN.Process(target=_other_process, args=(there, prepare, arguments), daemon=True)
    process.start()
    there.close()

    def answer() -> int:
        if not here.poll(ANSWER_SECONDS):
            raise TimeoutError("the other process of the benchmark does not answer")
        return int(here.recv())

    def run(count: int) -> float:
        with pinned(0):
            here.send(count)
            started = perf_counter()
            mine = work(count)
            theirs = answer()
            took = perf_counter() - started
        if mine != count * payload_size or theirs != count * payload_size:
            raise AssertionError(f"{count} × {payload_size} bytes: {mine} seen here, {theirs} over there")
        return took

    try:
        answer()
        yield run
        here.send(0)
        process.join(ANSWER_SECONDS)
    finally:
        if process.is_alive():
            process.kill()
            process.join()
        here.close()

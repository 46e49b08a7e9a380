"""What guests can write into their host's log: few lines of each kind, and nothing that a terminal obeys."""

import logging
import threading
from collections.abc import Iterator

import pytest

from vmbus.trace.guest_log import BURST, MAX_KINDS, PERIOD, GuestLog, new_scope


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.getMessage()}")


class Time:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def said() -> Iterator[list[str]]:
    handler = Lines()
    logger = logging.getLogger("test.guest_log")
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.WARNING)
    yield handler.lines
    logger.removeHandler(handler)


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def guests(said: list[str], time: Time) -> GuestLog:
    return GuestLog(logging.getLogger("test.guest_log"), time)


def test_a_line(guests: GuestLog, said: list[str]) -> None:
    guests.warning("guest", "page 0x%x of %s is %d too many", 255, "a ring", 3)
    assert said == ["WARNING guest: page 0xff of a ring is 3 too many"]


def test_a_flood_is_counted_and_the_count_is_said(guests: GuestLog, said: list[str], time: Time) -> None:
    for number in range(1000):
        guests.warning("guest", "wrong: %d", number)
    assert len(said) == BURST
    assert said[0] == "WARNING guest: wrong: 0"
    assert said[-1].endswith(f"wrong: {BURST - 1}; more like this in the next {PERIOD:g} s are only counted")
    assert guests.suppressed == 1000 - BURST
    time.now = PERIOD
    guests.warning("guest", "wrong: %d", 1000)
    guests.warning("guest", "wrong: %d", 1001)
    assert said[BURST:] == [
        f"WARNING guest: wrong: 1000 ({1000 - BURST} more like this were not logged)",
        "WARNING guest: wrong: 1001",
    ]


def test_neither_another_guest_nor_another_kind_is_silenced(guests: GuestLog, said: list[str]) -> None:
    for _ in range(100):
        guests.warning("loud", "wrong")
    said.clear()
    guests.warning("quiet", "wrong")
    guests.warning("loud", "also wrong")
    assert said == ["WARNING quiet: wrong", "WARNING loud: also wrong"]


def test_slow_guests_are_heard_every_time(guests: GuestLog, said: list[str], time: Time) -> None:
    for number in range(50):
        time.now = number * PERIOD / BURST
        guests.warning("guest", "wrong")
    assert len(said) == 50
    assert guests.suppressed == 0


def test_no_terminal_obeys_it(guests: GuestLog, said: list[str]) -> None:
    guests.warning("g\x1b[2J", "%s in %s", ValueError("\x1b]0;title\x07\nWARNING forged"), b"\x9b" * 3)
    assert said == [
        r"WARNING g\x1b[2J: \x1b]0;title\x07\nWARNING forged in b'\\x9b\\x9b\\x9b'".replace("\\\\", "\\")
    ]
    guests.warning("guest", "%s", "x" * 100_000)
    assert len(said[1]) < 1000


def test_it_remembers_a_bounded_number_of_kinds(guests: GuestLog, said: list[str]) -> None:
    for number in range(3 * MAX_KINDS):
        guests.warning(f"guest {number}", "wrong")
    assert len(said) == 3 * MAX_KINDS
    for _ in range(2 * BURST):
        guests.warning(f"guest {3 * MAX_KINDS - 1}", "wrong")
    assert len(said) == 3 * MAX_KINDS + BURST - 1


def test_an_error_with_its_traceback(guests: GuestLog, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    guests = GuestLog(logging.getLogger("vmbus.test"))
    for _ in range(2 * BURST):
        try:
            raise ZeroDivisionError("ours")
        except ZeroDivisionError:
            guests.exception("guest", "it failed")
    assert len(caplog.records) == BURST
    assert all(record.exc_info for record in caplog.records)


def test_nothing_is_counted_where_nobody_listens(guests: GuestLog, said: list[str]) -> None:
    logging.getLogger("test.guest_log").setLevel(logging.CRITICAL)
    for _ in range(100):
        guests.warning("guest", "wrong")
    assert (said, guests.suppressed) == ([], 0)


def test_threads_share_the_count(guests: GuestLog, said: list[str]) -> None:
    threads = [
        threading.Thread(target=lambda: [guests.warning("guest", "wrong") for _ in range(1000)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(said) == BURST
    assert guests.suppressed == 4000 - BURST


def test_names_are_told_apart_by_where_they_are_unique(guests: GuestLog, said: list[str]) -> None:
    first, second = new_scope(), new_scope()
    for _ in range(100):
        guests.warning("c0", "wrong", scope=first)
    said.clear()
    guests.warning("c0", "wrong", scope=second)
    assert said == ["WARNING c0: wrong"]

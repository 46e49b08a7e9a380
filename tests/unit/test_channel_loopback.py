"""Two directly joined ends whose provider rings and closes from threads of its own."""

import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from vmbus.bus.channel import loopback
from vmbus.core.memory import GuestMemory
from vmbus.errors import LocalProtocolError
from vmbus.trace.ledger import Account


class Hooked(Account):
    """Calls `hook` when the doorbell has been counted and is about to be delivered."""

    hook: Callable[[], None] | None = None

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name == "doorbells_sent" and value and self.hook is not None:
            self.hook()


@pytest.fixture
def hasty_threads() -> Iterator[None]:
    """Threads take turns as often as the interpreter lets them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_a_doorbell_rung_while_the_other_end_closes_is_lost_not_an_error() -> None:
    account = Hooked()
    guest, host = loopback(GuestMemory(1 << 20), guest_account=account)
    rang: list[bool] = []
    host.on_signal = lambda: rang.append(True)
    guest.signal()
    assert rang == [True]
    account.hook = host.close  # as another thread may, between the check and the delivery
    guest.signal()
    assert rang == [True]
    assert not guest.is_open
    with pytest.raises(LocalProtocolError, match="closed"):
        guest.signal()


def test_each_end_hears_of_the_end_once() -> None:
    guest, host = loopback(GuestMemory(1 << 20))
    heard: list[str] = []
    guest.on_closed = lambda: (heard.append("guest"), host.close())[0]
    host.on_closed = lambda: heard.append("host")
    host.close()
    guest.close()
    assert heard == ["host", "guest"]


def test_no_doorbell_of_two_threads_is_lost(hasty_threads: None) -> None:
    """Both ring at the same moment, once a round: a doorbell that is lost leaves its round unseen."""
    guest, host = loopback(GuestMemory(1 << 20))
    rounds, asked, seen, lost = 2000, [0, 0], [0, 0], []

    def look() -> None:
        seen[:] = asked

    host.on_signal = look

    def judge() -> None:
        if seen != asked:
            lost.append(list(asked))

    start, end = threading.Barrier(2), threading.Barrier(2, judge)

    def ask(me: int) -> None:
        for _ in range(rounds):
            start.wait(30)
            asked[me] += 1
            guest.signal()
            end.wait(30)

    threads = [threading.Thread(target=ask, args=(me,)) for me in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [rounds, rounds]
    assert not lost


def test_a_handler_that_fails_does_not_stop_the_doorbells() -> None:
    guest, host = loopback(GuestMemory(1 << 20))
    rang: list[bool] = []

    def fail() -> None:
        raise ValueError("on purpose")

    host.on_signal = fail
    with pytest.raises(ValueError, match="on purpose"):
        guest.signal()
    host.on_signal = lambda: rang.append(True)
    guest.signal()
    assert rang == [True]

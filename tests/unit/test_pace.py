"""A guest's clock against the host's: what it is held back for, and how it makes up for what it fell behind."""

import random

import pytest

from vmbus.engine.pace import Pace

MS = 1_000_000


class World:
    """A host's clock and a guest's that executes and waits by turns."""

    def __init__(self) -> None:
        self.host = 5_000_000_000
        self.guest = 0
        self.pace = Pace(lambda: self.host)
        self.pace.start(0)

    def execute(self, host: int, guest: int) -> None:
        self.host += host
        self.guest += guest

    def sleep(self, length: int, *, woken: int | None = None) -> int:
        """Wait for a timer of the guest's, or for a frame after `woken` ns; how long the host waited."""
        wait = self.pace.wait(self.guest, self.guest + length)
        assert wait is not None
        waited = wait if woken is None else min(wait, woken)
        self.host += waited
        before, self.guest = self.guest, self.pace.reached(self.guest + length)
        assert before <= self.guest <= before + length
        return waited

    @property
    def behind(self) -> int:
        return self.host - 5_000_000_000 - self.guest


def test_a_loop_that_sleeps_keeps_its_period() -> None:
    world = World()
    for _ in range(1000):
        world.execute(680_000, 5_000)
        world.sleep(MS)
    assert world.behind < MS
    assert world.host - 5_000_000_000 == pytest.approx(1000 * MS, rel=0.02)


def test_a_busy_host_that_wakes_it_late_does_not_slow_it_down() -> None:
    """Waits of a millisecond that take up to twenty: the next ones take nothing until the time is right again."""
    rng = random.Random(3)
    world = World()
    for _ in range(5000):
        wait = world.pace.wait(world.guest, world.guest + MS)
        assert wait is not None
        world.host += wait + (rng.randrange(20 * MS) if wait else 1000)
        world.guest = world.pace.reached(world.guest + MS)
        assert world.behind < 25 * MS
    assert world.host - 5_000_000_000 == pytest.approx(5000 * MS, rel=0.01)


def test_a_wait_that_ends_early_moves_the_guest_as_far() -> None:
    world = World()
    assert world.sleep(1000 * MS, woken=900 * MS) == 900 * MS
    assert world.guest == 900 * MS
    assert world.pace.wait(world.guest, None) is None
    world.host += 70 * MS
    assert world.pace.reached(None) == 970 * MS


def test_a_long_computation_is_made_up_for_without_haste() -> None:
    world = World()
    world.execute(5000 * MS, 2000 * MS)
    assert world.sleep(100 * MS) == 0, "a tenth of a second at once"
    assert world.sleep(300 * MS) == 200 * MS, "half as fast again, so that answers have their time"
    while world.behind > 0:
        assert world.sleep(300 * MS) >= 200 * MS
    assert world.host - 5_000_000_000 < 11_500 * MS
    assert world.sleep(300 * MS) == pytest.approx(300 * MS)


def test_what_moved_the_guest_ahead_is_not_waited_for() -> None:
    world = World()
    world.guest += 60_000 * MS  # idle time that was skipped
    assert world.sleep(10 * MS) == 10 * MS
    world.host += 3600_000 * MS  # nobody ran it for an hour
    world.pace.start(world.guest)
    assert world.sleep(10 * MS) == 10 * MS


def test_the_clocks_stay_together_whatever_happens() -> None:
    rng = random.Random(7)
    world = World()
    for _ in range(20_000):
        host = rng.randrange(4 * MS)
        world.execute(host, rng.randrange(host + 1))
        before = world.guest
        world.sleep(rng.choice((10_000, MS, 4 * MS, 50 * MS)), woken=rng.choice((None, 0, 30_000, 10 * MS)))
        assert world.guest >= before
        assert world.behind >= 0, "never ahead"
    for _ in range(100):
        world.sleep(100 * MS)
    assert world.behind == 0

"""A console's transcript: bounded however much a guest prints, and searched as if it were not."""

import random
import re

import pytest

from vmbus.machine.console import LONGEST_MATCH, Console

LIMIT = 4096


@pytest.fixture
def console() -> Console:
    return Console(lambda data: None, LIMIT)


def test_it_keeps_what_was_said_last(console: Console) -> None:
    said = bytearray()
    for number in range(5000):
        line = b"line %d\r\n" % number
        said += line
        console.feed(line)
        assert len(console.output) <= LIMIT + LIMIT // 8
        assert console.dropped + len(console.output) == len(said)
        assert said.endswith(console.output)
    assert len(console.output) >= LIMIT
    assert re.match(r"line \d+\n", console.text), "it begins with a whole line"


def test_one_line_without_end(console: Console) -> None:
    for _ in range(100):
        console.feed(bytes(10_000))
    assert console.dropped + len(console.output) == 1_000_000
    assert len(console.output) <= LIMIT + LIMIT // 8


def test_everything_is_echoed(console: Console) -> None:
    echoed = bytearray()
    console.echo = echoed.extend
    for number in range(1000):
        console.feed(b"%d\n" % number * 10)
    assert echoed == b"".join(b"%d\n" % number * 10 for number in range(1000))


@pytest.mark.parametrize("seed", range(20))
def test_a_text_is_found_across_the_bound(console: Console, seed: int) -> None:
    """Wherever the text lies, and however it is cut into pieces, it is found once."""
    generator = random.Random(seed)
    text = b"login: " + b"x" * generator.randrange(LONGEST_MATCH - 8)
    filler = [b"." * generator.randrange(3 * LIMIT) for _ in range(4)]
    stream = text.join(filler)
    hits: list[int] = []

    def hit() -> None:
        hits.append(console.dropped + len(console.output))
        console.expect(text, hit)

    console.expect(text, hit)
    at = 0
    while at < len(stream):
        size = generator.choice((1, 7, 100, 1000, 5 * LIMIT))
        console.feed(stream[at : at + size])
        at += size
    assert len(hits) == 3


def test_a_match_larger_than_the_bound_in_one_piece(console: Console) -> None:
    found: list[bool] = []
    console.expect("needle", lambda: found.append(True))
    console.feed(b"needle" + b"." * 10 * LIMIT)
    assert found == [True]


def test_what_matched_does_not_match_again(console: Console) -> None:
    console.expect("once", lambda: None)
    console.feed(b"once")
    console.feed(b"." * 3 * LIMIT)
    console.expect("once", lambda: pytest.fail("again"))
    assert not console.search()
    console.feed(b"." * 3 * LIMIT)
    assert not console.search()


def test_a_bound_that_no_search_could_work_with() -> None:
    with pytest.raises(ValueError, match="1024"):
        Console(lambda data: None, LONGEST_MATCH - 1)

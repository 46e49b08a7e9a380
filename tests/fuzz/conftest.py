"""The driver that every fuzz target gets."""

import logging
import signal
from collections.abc import Iterator

import pytest
from reference.fuzz import Fuzz, hangs


@pytest.fixture
def fuzz(request: pytest.FixtureRequest) -> Iterator[Fuzz]:
    """The driver of a target; prints its seed before and its number of cases after the run."""
    before = signal.signal(signal.SIGALRM, hangs)
    logging.disable()  # thousands of closed channels, each with a warning
    made = Fuzz()
    print(f"{request.node.name}: VMBUS_FUZZ_SEED={made.seed}")
    yield made
    print(f"{request.node.name}: {made.cases} cases")
    logging.disable(logging.NOTSET)
    signal.signal(signal.SIGALRM, before)

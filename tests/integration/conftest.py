"""A hypervisor on a virtual clock whose root makes hypercalls by hand."""

import pytest
from reference.raw_guest import RawGuest

from vmbus.hypervisor import Hypervisor, VirtualClock


@pytest.fixture
def hv():
    hypervisor = Hypervisor(clock=VirtualClock())
    hypervisor.create_root(memory_size=8 << 20)
    yield hypervisor
    if hypervisor.root is not None:
        hypervisor.root.destroy()


@pytest.fixture
def root(hv):
    return RawGuest(hv.root.vps[0])


@pytest.fixture
def guest(hv):
    """A running child with everything in place."""
    return RawGuest(hv.create_child(hv.root, "guest", memory_size=1 << 20).vps[0])

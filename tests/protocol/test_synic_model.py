"""Random sequences of posts, signals, guest reads, masks, EOIs and EOMs against the model."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from reference.raw_guest import SIEF, SIM, RawGuest
from reference.synic_model import SynicModel

from vmbus.hypervisor import Hypervisor, VirtualClock
from vmbus.hypervisor.tlfs import Msr

SINTS = st.integers(1, 3)
VECTORS = {1: 0x61, 2: 0xF3, 3: 0x65}
MASKED = 1 << 16


class SynicMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.hv = Hypervisor(clock=VirtualClock())
        child = self.hv.create_child(self.hv.create_root(memory_size=1 << 16), "c", memory_size=1 << 16)
        self.child, self.vp = child, child.vps[0]
        self.guest = RawGuest(self.vp, sints=())
        self.model = SynicModel()
        self.serial = 0

    def teardown(self):
        self.hv.root.destroy()

    @rule(sint=SINTS, masked=st.booleans())
    def write_sint(self, sint, masked):
        self.vp.wrmsr(Msr.SINT0 + sint, VECTORS[sint] | (MASKED if masked else 0))
        self.model.set_sint(sint, VECTORS[sint], masked)

    @rule(sint=SINTS, size=st.integers(0, 240))
    def post(self, sint, size):
        self.serial += 1
        payload = self.serial.to_bytes(4, "little").ljust(size, b"x")[:size]
        message = (self.serial & 0x7FFF_FFFF, 77, payload)
        self.hv.post_message(self.child, 0, sint, *message)
        assert self.model.post(sint, message)

    @rule(sint=SINTS, flag=st.integers(0, 2047))
    def signal(self, sint, flag):
        assert self.hv.signal_event(self.child, 0, sint, flag) == self.model.signal(sint, flag)

    @rule(sint=SINTS)
    def clear_slot(self, sint):
        """The guest empties the slot but writes no EOM yet."""
        self.child.memory.write(SIM + sint * 256, bytes(4))
        self.model.slot.pop(sint, None)

    @rule()
    def end_of_message(self):
        self.vp.wrmsr(Msr.EOM, 0)
        self.model.end_of_message()

    @rule(sint=SINTS)
    def take_flags(self, sint):
        assert set(self.guest.take_flags(sint)) == self.model.flags.pop(sint, set())

    @rule()
    def accept(self):
        assert self.vp.pop_interrupt() == self.model.accept()

    @rule()
    def end_of_interrupt(self):
        self.vp.wrmsr(Msr.EOI, 0)
        self.model.eoi()

    @invariant()
    def slots_match(self):
        page = self.child.memory.read(SIM, 4096)
        for sint in range(16):
            slot = page[sint * 256 : sint * 256 + 256]
            expected = self.model.slot.get(sint)
            kind = int.from_bytes(slot[:4], "little")
            if expected is None:
                assert kind == 0
                continue
            found = (kind, int.from_bytes(slot[8:16], "little"), slot[16 : 16 + slot[4]])
            assert found == expected
            # Whenever something waits behind an occupied slot, the guest can see that it must write EOM.
            if self.model.queue.get(sint):
                assert slot[5] & 1

    @invariant()
    def flags_match(self):
        page = int.from_bytes(self.child.memory.read(SIEF, 4096), "little")
        expected = sum(
            1 << (sint * 2048 + flag) for sint, flags in self.model.flags.items() for flag in flags
        )
        assert page == expected

    @invariant()
    def counts_match(self):
        assert self.vp.synic.queued_messages == sum(map(len, self.model.queue.values()))
        assert self.vp.interrupt_pending == (self.model.deliverable() is not None)


TestSynic = SynicMachine.TestCase
TestSynic.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)

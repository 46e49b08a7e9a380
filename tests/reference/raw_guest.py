"""A guest that makes hypercalls by hand, from raw bytes: what tests use instead of a driver."""

from vmbus.hypervisor.abi import control
from vmbus.hypervisor.tlfs import CallCode, Msr

OS_ID = 0x8100_0601_0000_0000
HYPERCALL_GPA, INPUT, OUTPUT, SIM, SIEF = 0x1000, 0x2000, 0x3000, 0x4000, 0x5000
VECTOR = 0xF3


class RawGuest:
    """One processor with its hypercall page, message page and event flags page in place."""

    def __init__(self, vp, *, base=0, sints=(0, 2), vector=VECTOR, enable=True):
        self.vp = vp
        self.memory = vp.partition.memory
        self.base = base
        if enable:
            vp.wrmsr(Msr.GUEST_OS_ID, OS_ID)
            vp.wrmsr(Msr.HYPERCALL, base + HYPERCALL_GPA | 1)
            vp.wrmsr(Msr.SIMP, base + SIM | 1)
            vp.wrmsr(Msr.SIEFP, base + SIEF | 1)
            for sint in sints:
                vp.wrmsr(Msr.SINT0 + sint, vector)

    def call(self, code, data=b"", output=0):
        """A simple hypercall through pages: (status, output bytes)."""
        return self.raw(control(code), data, output)

    def rep(self, code, header, elements, *, start=0, count=None, output=0):
        """A rep hypercall through pages: (status, reps done, output bytes)."""
        count = len(elements) if count is None else count
        result, out = self.raw(
            control(code, rep_count=count, rep_start=start), header + b"".join(elements), output
        )
        return result & 0xFFFF, result >> 32 & 0xFFF, out

    def raw(self, word, data, output=0):
        self.memory.write(self.base + INPUT, data)
        if output:
            self.memory.write(self.base + OUTPUT, bytes(output))
        result = self.vp.hypercall(word, self.base + INPUT, self.base + OUTPUT)
        return result, self.memory.read(self.base + OUTPUT, output) if output else b""

    def fast(self, code, data=b"", **form):
        """A fast hypercall: (RAX, bytes returned in registers)."""
        data = data.ljust(16, b"\0")
        first, second = int.from_bytes(data[:8], "little"), int.from_bytes(data[8:16], "little")
        xmm = data[16:].ljust(96, b"\0")
        return self.vp.hypercall(control(code, fast=True, **form), first, second, xmm), self.vp.fast_output

    def post(self, connection_id, message_type, payload):
        words = b"".join(n.to_bytes(4, "little") for n in (connection_id, 0, message_type, len(payload)))
        return self.call(CallCode.POST_MESSAGE, (words + payload).ljust(256, b"\0"))[0]

    def signal(self, connection_id, flag=0):
        return self.fast(CallCode.SIGNAL_EVENT, (connection_id | flag << 32).to_bytes(8, "little"))[0]

    def take_message(self, sint):
        """The message in a slot as (type, sender, payload), or None; ends it."""
        at = self.base + SIM + sint * 256
        slot = self.memory.read(at, 256)
        kind = int.from_bytes(slot[:4], "little")
        if not kind:
            return None
        self.memory.write(at, bytes(4))
        if slot[5] & 1:
            self.vp.wrmsr(Msr.EOM, 0)
        return kind, int.from_bytes(slot[8:16], "little"), slot[16 : 16 + slot[4]]

    def take_flags(self, sint):
        at = self.base + SIEF + sint * 256
        flags = int.from_bytes(self.memory.read(at, 256), "little")
        self.memory.write(at, bytes(256))
        return [n for n in range(2048) if flags >> n & 1]

    def take_interrupts(self):
        """All deliverable interrupts, each ended at once."""
        vectors = []
        while (vector := self.vp.pop_interrupt()) is not None:
            vectors.append(vector)
            self.vp.wrmsr(Msr.EOI, 0)
        return vectors

"""Random x86 instructions whose effects are defined, for comparing one interpreter with another.

Each instruction comes with the registers that must be set before it (so that its memory operands lie in the
data window most of the time) and with the flags that the architecture leaves undefined after it.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

CF, PF, AF, ZF, SF, DF, OF = 0x1, 0x4, 0x10, 0x40, 0x80, 0x400, 0x800
ARITHMETIC = CF | PF | AF | ZF | SF | OF

MEMORY = 0x10000
CODE = 0x1000
DATA = 0x4000
DATA_SIZE = 0x2000
STACK = 0x9000

RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)


@dataclass
class Instruction:
    """One instruction: its bytes, registers to set before it, and what is undefined after it."""

    code: bytes
    registers: dict[int, int] = field(default_factory=dict)
    undefined: int = 0
    flows: bool = False
    """It may go on elsewhere than behind itself."""


def interesting(rng: random.Random, bits: int) -> int:
    """A value of `bits` bits, often one at an edge."""
    kind = rng.randrange(6)
    if kind == 0:
        return rng.choice((0, 1, 2, 0x7F, 0x80, 0xFF, 0x8000, 0x7FFFFFFF, 0x80000000)) & (1 << bits) - 1
    if kind == 1:
        return (1 << bits) - 1 - rng.randrange(3)
    if kind == 2:
        return 1 << rng.randrange(bits)
    return rng.getrandbits(bits)


class Programs:
    """Draws instructions for a processor of 32 or 64 bits, whose memory begins at `origin`.

    Without `faithful` those are left out that Unicorn executes otherwise than a processor does.
    """

    def __init__(self, rng: random.Random, bits: int, origin: int = 0, *, faithful: bool = False) -> None:
        self.rng = rng
        self.faithful = faithful
        self.code = origin + CODE
        self.data = origin + DATA
        self.top = origin + STACK
        self.bits = bits
        self.long = bits == 64
        self.bases = (RBX, RBP, 12, 13, 14) if self.long else (RBX, RBP)
        self.index = 11 if self.long else RSI
        self.makers: list[Callable[[], Instruction]] = [
            self.alu, self.alu, self.alu_immediate, self.alu_accumulator, self.test, self.one_operand,
            self.increment, self.move, self.move_immediate, self.extend, self.shift, self.shift_double, self.multiply,
            self.divide, self.bit_test, self.bit_scan, self.conditional, self.exchange, self.compare_exchange,
            self.stack, self.stack_memory, self.convert, self.flags, self.lea, self.string, self.branch, self.call,
            self.loop, self.frame, self.miscellaneous, self.absolute,
        ]  # fmt: skip
        if not self.long:
            self.makers += [self.decimal, self.push_all, self.short_increment]

    def draw(self) -> Instruction:
        """The next instruction, to be placed anywhere."""
        instruction = self.rng.choice(self.makers)()
        instruction.registers.setdefault(RSP, self.top + 8 * self.rng.randrange(16))
        return instruction

    # encoding

    def size(self, byte: bool = True) -> int:
        return self.rng.choice(((1,) if byte else ()) + ((2, 4, 8) if self.long else (2, 4)))

    def register(self) -> int:
        return self.rng.randrange(16 if self.long else 8)

    def immediate(self, size: int) -> bytes:
        width = min(size, 4)
        return interesting(self.rng, 8 * width).to_bytes(width, "little")

    def encode(
        self,
        opcode: bytes,
        size: int,
        reg: int,
        tail: bytes = b"",
        *,
        memory: bool | None = None,
        rm: int | None = None,
        prefix: bytes = b"",
        widest_default: bool = False,
    ) -> Instruction:
        """ModRM form of `opcode` with a random r/m operand; `tail` is the immediate."""
        rng = self.rng
        prefixes = prefix + (b"\x66" if size == 2 else b"")
        rex = (8 if size == 8 and not widest_default else 0) | (reg >> 3) << 2
        registers: dict[int, int] = {}
        if memory is None:
            memory = rng.random() < 0.5
        if not memory:
            if rm is None:
                rm = self.register()
            rex |= rm >> 3
            operand = bytes((0xC0 | (reg & 7) << 3 | rm & 7,))
        else:
            short = rng.random() < 0.1  # the other address size
            if short:
                prefixes = b"\x67" + prefixes
            if short and not self.long:
                operand, registers = self.operand16(reg)
            else:
                operand, registers, more = self.operand(reg)
                rex |= more
        code = prefixes
        if self.long and (rex or rng.random() < 0.2):
            code += bytes((0x40 | rex,))
        return Instruction(code + opcode + operand + tail, registers)

    def operand(self, reg: int) -> tuple[bytes, dict[int, int], int]:
        """A memory operand with 32- or 64-bit addressing: its bytes, registers, REX bits."""
        rng = self.rng
        at = self.data + 0x200 + rng.randrange(DATA_SIZE - 0x400)
        reg = (reg & 7) << 3
        if rng.random() < 0.15 and not self.long:
            return bytes((reg | 5,)) + at.to_bytes(4, "little"), {}, 0
        base = rng.choice(self.bases)
        mod = rng.randrange(3)
        if base & 7 == RBP and mod == 0:
            mod = 1
        displacement = {
            0: b"",
            1: rng.randrange(-128, 128).to_bytes(1, "little", signed=True),
            2: rng.randrange(-512, 512).to_bytes(4, "little", signed=True),
        }[mod]
        if rng.random() < 0.4 or base & 7 == RSP:
            index = self.index if rng.random() < 0.8 else RSP  # RSP: none
            scale = rng.randrange(4)
            sib = scale << 6 | (index & 7) << 3 | base & 7
            registers = {base: at, self.index: rng.randrange(32)}
            return bytes((mod << 6 | reg | 4, sib)) + displacement, registers, base >> 3 | (index >> 3) << 1
        return bytes((mod << 6 | reg | base & 7,)) + displacement, {base: at}, base >> 3

    def operand16(self, reg: int) -> tuple[bytes, dict[int, int]]:
        """A memory operand with 16-bit addressing."""
        rng = self.rng
        at = self.data + 0x200 + rng.randrange(DATA_SIZE - 0x400)
        reg = (reg & 7) << 3
        rm = rng.randrange(8)
        if rm < 4:  # two registers
            first, second = (RBX, RBP)[rm >> 1], (RSI, RDI)[rm & 1]
            mod = rng.randrange(1, 3)
            registers = {first: at | rng.getrandbits(16) << 16, second: rng.randrange(64)}
        else:
            mod = rng.randrange(1 if rm == 6 else 0, 3)
            registers = {(RSI, RDI, RBP, RBX)[rm - 4]: at | rng.getrandbits(16) << 16}
        width = mod
        displacement = rng.randrange(-100, 100).to_bytes(width, "little", signed=True) if width else b""
        return bytes((mod << 6 | reg | rm,)) + displacement, registers

    def plain(self, opcode: bytes, size: int, tail: bytes = b"") -> Instruction:
        """`opcode` without ModRM."""
        return Instruction((b"\x66" if size == 2 else b"") + (b"\x48" if size == 8 else b"") + opcode + tail)

    def lock(self, instruction: Instruction, memory: bool) -> Instruction:
        if memory and self.rng.random() < 0.3:
            instruction.code = b"\xf0" + instruction.code
        return instruction

    # instructions

    def alu(self) -> Instruction:
        operation, size = self.rng.randrange(8), self.size()
        to_register = self.rng.randrange(2)
        opcode = operation << 3 | to_register << 1 | (size > 1)
        memory = self.rng.random() < 0.5
        made = self.encode(bytes((opcode,)), size, self.register(), memory=memory)
        made.undefined = AF if operation in (1, 4, 6) else 0
        return self.lock(made, memory and not to_register and operation != 7)

    def alu_immediate(self) -> Instruction:
        operation, size = self.rng.randrange(8), self.size()
        short = size > 1 and self.rng.random() < 0.5
        opcode = 0x83 if short else 0x80 | (size > 1)
        tail = self.immediate(1 if short else size)
        memory = self.rng.random() < 0.5
        made = self.encode(bytes((opcode,)), size, operation, tail, memory=memory)
        made.undefined = AF if operation in (1, 4, 6) else 0
        return self.lock(made, memory and operation != 7)

    def alu_accumulator(self) -> Instruction:
        operation, size = self.rng.randrange(8), self.size()
        made = self.plain(bytes((operation << 3 | 4 | (size > 1),)), size, self.immediate(size))
        made.undefined = AF if operation in (1, 4, 6) else 0
        return made

    def test(self) -> Instruction:
        size, kind = self.size(), self.rng.randrange(3)
        if kind == 0:
            made = self.encode(bytes((0x84 | (size > 1),)), size, self.register())
        elif kind == 1:
            made = self.plain(bytes((0xA8 | (size > 1),)), size, self.immediate(size))
        else:
            made = self.encode(bytes((0xF6 | (size > 1),)), size, 0, self.immediate(size))
        made.undefined = AF
        return made

    def one_operand(self) -> Instruction:
        size, memory, operation = self.size(), self.rng.random() < 0.5, self.rng.choice((2, 3))
        made = self.encode(bytes((0xF6 | (size > 1),)), size, operation, memory=memory)
        # Unicorn's flags of LOCK NEG are not a processor's
        return self.lock(made, memory and (operation == 2 or self.faithful))

    def increment(self) -> Instruction:
        size, memory = self.size(), self.rng.random() < 0.5
        made = self.encode(bytes((0xFE | (size > 1),)), size, self.rng.randrange(2), memory=memory)
        return self.lock(made, memory)

    def short_increment(self) -> Instruction:
        return self.plain(bytes((0x40 + self.rng.randrange(16),)), self.size(byte=False))

    def move(self) -> Instruction:
        size = self.size()
        return self.encode(bytes((0x88 | self.rng.randrange(2) << 1 | (size > 1),)), size, self.register())

    def move_immediate(self) -> Instruction:
        size, kind = self.size(), self.rng.randrange(2)
        if kind == 0:
            return self.encode(bytes((0xC6 | (size > 1),)), size, 0, self.immediate(size))
        register = self.rng.randrange(8)
        tail = interesting(self.rng, 8 * size).to_bytes(size, "little")
        return self.plain(bytes(((0xB8 if size > 1 else 0xB0) + register,)), size, tail)

    def extend(self) -> Instruction:
        if self.long and self.rng.random() < 0.2:
            return self.encode(b"\x63", self.rng.choice((4, 8)), self.register())
        return self.encode(
            bytes((0x0F, self.rng.choice((0xB6, 0xB7, 0xBE, 0xBF)))), self.size(byte=False), self.register()
        )

    def shift(self) -> Instruction:
        rng, size = self.rng, self.size()
        operation = rng.choice((0, 1, 2, 3, 4, 5, 7))
        kind = rng.randrange(3)
        count = 1 if kind == 1 else rng.randrange(256) if rng.random() < 0.3 else rng.randrange(8 * size + 1)
        opcode = bytes(((0xC0, 0xD0, 0xD2)[kind] | (size > 1),))
        made = self.encode(opcode, size, operation, bytes((count,)) if kind == 0 else b"")
        if kind == 2:
            made.registers[RCX] = rng.getrandbits(self.bits) & ~0xFF | count
        count &= 63 if size == 8 else 31
        if count:
            made.undefined = (AF if operation > 3 else 0) | (OF if count != 1 else 0)
            if operation in (4, 5) and count >= 8 * size:
                made.undefined |= CF
        return made

    def shift_double(self) -> Instruction:
        rng, size = self.rng, self.size(byte=False)
        count = rng.randrange(17 if size == 2 else 256)
        by_cl = rng.randrange(2)
        opcode = bytes((0x0F, rng.choice((0xA4, 0xAC)) | by_cl))
        made = self.encode(opcode, size, self.register(), b"" if by_cl else bytes((count,)))
        if by_cl:
            made.registers[RCX] = rng.getrandbits(self.bits) & ~0xFF | count
        count &= 63 if size == 8 else 31
        if count:
            made.undefined = AF | (OF if count != 1 else 0)
        return made

    def multiply(self) -> Instruction:
        size, kind = self.size(), self.rng.randrange(3)
        if kind == 0:
            made = self.encode(bytes((0xF6 | (size > 1),)), size, self.rng.choice((4, 5)))
        else:
            size = self.size(byte=False)
            if kind == 1:
                made = self.encode(b"\x0f\xaf", size, self.register())
            else:
                short = self.rng.randrange(2)
                made = self.encode(
                    b"\x6b" if short else b"\x69", size, self.register(), self.immediate(1 if short else size)
                )
        made.undefined = SF | ZF | AF | PF
        return made

    def divide(self) -> Instruction:
        rng, size = self.rng, self.size()
        made = self.encode(bytes((0xF6 | (size > 1),)), size, rng.choice((6, 7)))
        if rng.random() < 0.8:  # mostly without overflow
            small = rng.getrandbits(8 * size) >> rng.randrange(8 * size)
            made.registers.setdefault(RAX, small & 0x7F if size == 1 else small)
            made.registers.setdefault(RDX, rng.randrange(2) if size > 1 else interesting(rng, self.bits))
        made.undefined = ARITHMETIC
        return made

    def bit_test(self) -> Instruction:
        size, memory = self.size(byte=False), self.rng.random() < 0.5
        kind = self.rng.randrange(4)
        if self.rng.random() < 0.5:
            made = self.encode(b"\x0f\xba", size, 4 + kind, self.immediate(1), memory=memory)
        else:
            reg = RDX
            made = self.encode(bytes((0x0F, 0xA3 | kind << 3)), size, reg, memory=memory)
            if memory:
                made.registers[reg] = self.rng.randrange(-0x1000, 0x1000) & (1 << self.bits) - 1
        made.undefined = OF | SF | AF | PF
        return self.lock(made, memory and kind != 0)

    def bit_scan(self) -> Instruction:
        size = self.size(byte=False)
        memory = False
        rm = RDX
        opcode = self.rng.choice((0xBC, 0xBD))
        counting = self.rng.random() < 0.3
        if counting and self.rng.random() < 0.5:
            return self.encode(b"\x0f\xb8", size, self.register(), prefix=b"\xf3", rm=rm, memory=memory)
        prefix = b"\xf3" if counting else b""
        made = self.encode(bytes((0x0F, opcode)), size, self.register(), rm=rm, memory=memory, prefix=prefix)
        made.registers[rm] = interesting(self.rng, 8 * size) or 1  # 0 leaves the destination undefined
        made.undefined = OF | SF | AF | PF | (0 if counting else CF)
        return made

    def conditional(self) -> Instruction:
        code = self.rng.randrange(16)
        if self.rng.random() < 0.5:
            return self.encode(bytes((0x0F, 0x40 | code)), self.size(byte=False), self.register())
        return self.encode(bytes((0x0F, 0x90 | code)), 1, 0)

    def exchange(self) -> Instruction:
        size, memory = self.size(), self.rng.random() < 0.5
        if self.rng.random() < 0.3:
            size = self.size(byte=False)
            return self.plain(bytes((0x91 + self.rng.randrange(7),)), size)
        if self.rng.random() < 0.5:
            return self.encode(bytes((0x86 | (size > 1),)), size, self.register(), memory=memory)
        made = self.encode(bytes((0x0F, 0xC0 | (size > 1))), size, self.register(), memory=memory)
        return self.lock(made, memory)

    def compare_exchange(self) -> Instruction:
        size, memory = self.size(), True
        if self.rng.random() < 0.3:
            if self.long and self.rng.randrange(2):  # must be aligned, which Unicorn does not check
                at = self.data + 16 * self.rng.randrange(0x100)
                return Instruction(b"\x48\x0f\xc7\x0b", {RBX: at})
            return self.encode(b"\x0f\xc7", 4, 1, memory=True)
        if self.rng.random() < 0.5:
            made = self.encode(bytes((0x0F, 0xB0 | (size > 1))), size, self.register(), memory=memory)
            if size == 4 and not self.faithful:
                made.registers.setdefault(RAX, interesting(self.rng, 32))
            return self.lock(made, memory)
        # an equal accumulator
        made = self.encode(bytes((0x0F, 0xB0 | (size > 1))), size, RDX, memory=False, rm=RCX)
        # Unicorn clears the upper half of RAX, a processor does not
        value = interesting(self.rng, self.bits if self.faithful else 32)
        made.registers |= {RAX: value, RCX: value}
        return made

    def stack(self) -> Instruction:
        kind, register = self.rng.randrange(4), self.rng.randrange(8)
        size = self.rng.choice((2, self.bits // 8))
        prefix = b"\x66" if size == 2 else b""
        if kind == 0:
            return Instruction(prefix + bytes((0x50 + register,)))
        if kind == 1:
            return Instruction(prefix + bytes((0x58 + register,)))
        if kind == 2:
            return Instruction(prefix + b"\x6a" + self.immediate(1))
        return Instruction(prefix + b"\x68" + self.immediate(size))

    def stack_memory(self) -> Instruction:
        size = self.rng.choice((2, self.bits // 8))
        opcode, reg = self.rng.choice(((b"\xff", 6), (b"\x8f", 0)))
        return self.encode(opcode, size, reg, widest_default=True)

    def convert(self) -> Instruction:
        return self.plain(self.rng.choice((b"\x98", b"\x99")), self.size(byte=False))

    def flags(self) -> Instruction:
        kind = self.rng.randrange(4)
        if kind == 0:
            return Instruction(bytes((self.rng.choice((0xF5, 0xF8, 0xF9, 0xFC, 0xFD)),)))
        if kind == 1:
            return Instruction(self.rng.choice((b"\x9e", b"\x9f")))
        return Instruction(b"\x9c")

    def lea(self) -> Instruction:
        return self.encode(b"\x8d", self.size(byte=False), self.register(), memory=True)

    def string(self) -> Instruction:
        rng, size = self.rng, self.size()
        opcode = rng.choice((0xA4, 0xA6, 0xAA, 0xAC, 0xAE)) | (size > 1)
        prefix = rng.choice((b"", b"\xf3", b"\xf2" if opcode & 0xFE in (0xA6, 0xAE) else b"\xf3"))
        made = self.plain(bytes((opcode,)), size)
        made.code = prefix + made.code
        source = self.data + 0x800 + rng.randrange(0x800)
        target = (
            source + rng.randrange(-24, 24)
            if rng.random() < 0.5
            else self.data + 0x800 + rng.randrange(0x800)
        )
        made.registers |= {RSI: source, RDI: target, RCX: rng.choice((0, 1, rng.randrange(64), 200))}
        return made

    def branch(self) -> Instruction:
        kind = self.rng.randrange(3)
        if kind == 0:
            made = Instruction(bytes((0x70 | self.rng.randrange(16), self.rng.randrange(128))))
        elif kind == 1:
            made = Instruction(
                bytes((0x0F, 0x80 | self.rng.randrange(16))) + self.rng.randrange(0x400).to_bytes(4, "little")
            )
        else:
            made = Instruction(b"\xeb" + bytes((self.rng.randrange(128),)))
        made.flows = True
        return made

    def call(self) -> Instruction:
        kind = self.rng.randrange(4)
        if kind == 0:
            made = Instruction(b"\xe8" + self.rng.randrange(0x400).to_bytes(4, "little"))
        elif kind == 1:
            made = Instruction(self.rng.choice((b"\xc3", b"\xc2\x10\x00")))
        else:
            made = self.encode(
                b"\xff", self.bits // 8, self.rng.choice((2, 4)), memory=False, rm=RDX, widest_default=True
            )
            made.registers[RDX] = self.code + self.rng.randrange(0x400)
        made.flows = True
        return made

    def loop(self) -> Instruction:
        made = Instruction(bytes((0xE0 | self.rng.randrange(4), self.rng.randrange(128))), flows=True)
        made.registers[RCX] = self.rng.choice((0, 1, 2, interesting(self.rng, self.bits)))
        return made

    def frame(self) -> Instruction:
        if self.rng.randrange(2):
            return Instruction(b"\xc8" + self.rng.randrange(0x100).to_bytes(2, "little") + b"\x00")
        return Instruction(b"\xc9", {RBP: self.top + 8 * self.rng.randrange(16)})

    def miscellaneous(self) -> Instruction:
        kind = self.rng.randrange(4)
        if kind == 0:
            size = self.rng.choice((4, 8)) if self.long else 4
            return self.plain(bytes((0x0F, 0xC8 + self.rng.randrange(8))), size)
        if kind == 1:
            return Instruction(b"\xd7", {RBX: self.data + 0x300, RAX: interesting(self.rng, self.bits)})
        if kind == 2:
            return self.encode(b"\x0f\x1f", self.size(byte=False), 0)
        return Instruction(self.rng.choice((b"\x90", b"\xf3\x90", b"\x0f\xae\xe8", b"\x0f\xae\xf0")))

    def absolute(self) -> Instruction:
        size = self.size()
        opcode = 0xA0 | self.rng.randrange(2) << 1 | (size > 1)
        at = self.data + self.rng.randrange(DATA_SIZE - 8)
        return self.plain(bytes((opcode,)), size, at.to_bytes(self.bits // 8, "little"))

    def decimal(self) -> Instruction:
        kind = self.rng.randrange(3)
        if kind == 0:
            return Instruction(self.rng.choice((b"\x27", b"\x2f")), undefined=OF)
        if kind == 1:
            return Instruction(self.rng.choice((b"\x37", b"\x3f")), undefined=OF | SF | ZF | PF)
        base = self.rng.choice((10, 10, self.rng.randrange(1, 256)))
        return Instruction(bytes((self.rng.choice((0xD4, 0xD5)), base)), undefined=OF | AF | CF)

    def push_all(self) -> Instruction:
        return self.plain(self.rng.choice((b"\x60", b"\x61")), self.rng.choice((2, 4)))

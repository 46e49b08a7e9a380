"""Each instruction set that CPUID shows is executed, with right results; what it does not show is not claimed.

Results are compared with what Python computes, or with the vectors of a standard.
"""

import struct
from collections.abc import Callable

import pytest
from reference.engine import need_engine
from reference.tiny_guest import tiny_guest

from vmbus.hypervisor.personality import LINUX
from vmbus.machine.guest import PLAIN_PC, Machine, Outcome

need_engine()

MASK = (1 << 64) - 1
A, B = 0x0123456789ABCDEF, 0xFEDCBA9876543210
RESULTS = 0x9000


def run(source: str, size: int) -> bytes:
    """Execute `source`, which leaves its results at `RESULTS`; RAX and RBX are A and B, XMM0 and XMM1 made of them."""
    kernel = tiny_guest(
        f"""
    _start: mov %cr4, %rax; or $0x600, %rax; mov %rax, %cr4
        gate 6, missing
        load_idt
        movabs ${A}, %rax; movabs ${B}, %rbx
        mov %rax, 0x8000; mov %rbx, 0x8008; mov %rbx, 0x8010; mov %rax, 0x8018
        movdqu 0x8000, %xmm0; movdqu 0x8010, %xmm1
        {source}
        power_off
    missing: print '?'; power_off
        """
    )
    with Machine(kernel, memory=16 << 20) as machine:
        assert machine.run(virtual_seconds=1).outcome is Outcome.POWER_OFF
        assert not machine.console.text, "#UD"
        return machine.partition.memory.read(RESULTS, size)


def words(source: str, count: int = 1) -> tuple[int, ...]:
    return struct.unpack(f"<{count}Q", run(source, 8 * count))


def vector(source: str, form: str = "<16B") -> tuple[float, ...]:
    return struct.unpack(form, run(f"{source}; movdqu %xmm0, {RESULTS}", 16))


X0, X1 = struct.pack("<QQ", A, B), struct.pack("<QQ", B, A)


def floats(*values: float) -> str:
    """Put four single-precision numbers into XMM0, and their doubles into XMM1."""
    data = struct.pack("<4f4f", *values, *(2 * value for value in values))
    at = [int.from_bytes(data[n : n + 4], "little") for n in range(0, 32, 4)]
    stores = "; ".join(f"movl ${value}, {0x8100 + 4 * n}" for n, value in enumerate(at))
    return f"{stores}; movups 0x8100, %xmm0; movups 0x8110, %xmm1; "


def carryless(a: int, b: int) -> int:
    product = 0
    for n in range(64):
        if b >> n & 1:
            product ^= a << n
    return product


def crc32c(crc: int, data: bytes) -> int:
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc


def scattered(value: int, mask: int) -> int:
    result, n = 0, 0
    for bit in range(64):
        if mask >> bit & 1:
            result |= (value >> n & 1) << bit
            n += 1
    return result


def gathered(value: int, mask: int) -> int:
    result, n = 0, 0
    for bit in range(64):
        if mask >> bit & 1:
            result |= (value >> bit & 1) << n
            n += 1
    return result


def sse3() -> None:
    assert vector(floats(1, 2, 3, 4) + "haddps %xmm1, %xmm0", "<4f") == (3, 7, 6, 14)
    assert vector(floats(1, 2, 3, 4) + "addsubps %xmm1, %xmm0", "<4f") == (-1, 6, -3, 12)
    assert vector("movddup %xmm1, %xmm0", "<2Q") == (B, B)
    assert vector("lddqu 0x8010, %xmm0", "<2Q") == (B, A)
    assert words("movl $0x40700000, 0x8100; flds 0x8100; fisttpll 0x9000") == (3,)


def pclmulqdq() -> None:
    product = carryless(A, A)
    assert vector("pclmulqdq $0x10, %xmm1, %xmm0", "<2Q") == (product & MASK, product >> 64)
    product = carryless(B, B)
    assert vector("pclmulqdq $0x01, %xmm1, %xmm0", "<2Q") == (product & MASK, product >> 64)


def ssse3() -> None:
    shuffled = tuple(0 if n & 0x80 else X0[n & 15] for n in X1)
    assert vector("pshufb %xmm1, %xmm0") == shuffled
    assert vector("palignr $5, %xmm1, %xmm0") == tuple((X1 + X0)[5:21])
    assert vector("pabsb %xmm1, %xmm0") == tuple(256 - n if n > 128 else n for n in X1)
    lanes = (*struct.unpack("<4I", X0), *struct.unpack("<4I", X1))
    sums = tuple(lanes[n] + lanes[n + 1] & 0xFFFFFFFF for n in range(0, 8, 2))
    assert vector("phaddd %xmm1, %xmm0", "<4I") == sums


def cmpxchg16b() -> None:
    swap = "mov 0x8000, %rax; mov 0x8008, %rdx; mov $1, %ebx; mov $2, %ecx; lock cmpxchg16b 0x8000; sete 0x9010\n"
    copy = """
        mov 0x8000, %rax; mov %rax, 0x9000; mov 0x8008, %rax; mov %rax, 0x9008
        movzbl 0x9010, %eax; mov %rax, 0x9010
    """
    assert words(swap + copy, 3) == (1, 2, 1)
    fails = swap.replace("mov 0x8008, %rdx", "xor %edx, %edx")
    assert words(
        fails + "; mov %rax, 0x9000; mov %rdx, 0x9008; movzbl 0x9010, %eax; mov %rax, 0x9010", 3
    ) == (A, B, 0)


def sse41() -> None:
    lanes = zip(struct.unpack("<4I", X0), struct.unpack("<4I", X1), strict=True)
    assert vector("pmulld %xmm1, %xmm0", "<4I") == tuple(a * b & 0xFFFFFFFF for a, b in lanes)
    lanes = zip(struct.unpack("<4I", X0), struct.unpack("<4I", X1), strict=True)
    assert vector("pminud %xmm1, %xmm0", "<4I") == tuple(min(pair) for pair in lanes)
    assert vector(floats(1.5, 2.5, -1.5, 0.4) + "roundps $0, %xmm0, %xmm0", "<4f") == (2, 2, -2, 0)
    assert vector(floats(1, 2, 3, 4) + "dpps $0xf1, %xmm1, %xmm0", "<4f") == (60, 0, 0, 0)
    assert words("pextrq $1, %xmm0, %rax; mov %rax, 0x9000") == (B,)
    assert vector("pinsrd $2, %eax, %xmm0", "<4I")[2] == A & 0xFFFFFFFF
    assert vector("pmovzxbw %xmm1, %xmm0", "<8H") == tuple(X1[:8])
    assert words("ptest %xmm0, %xmm1; setz %al; movzbl %al, %eax; mov %rax, 0x9000") == (int(A & B == 0),)


def sse42() -> None:
    expected = crc32c(0xFFFFFFFF, struct.pack("<Q", B))
    assert words("mov $0xffffffff, %eax; crc32q %rbx, %rax; mov %rax, 0x9000") == (expected,)
    signed = struct.unpack("<2q", X0), struct.unpack("<2q", X1)
    greater = tuple(MASK if a > b else 0 for a, b in zip(*signed, strict=True))
    assert vector("pcmpgtq %xmm1, %xmm0", "<2Q") == greater
    at = X1.index(X0[0])  # equal any: where in XMM1 the first byte of a set that is XMM0 stands
    found = min(n for n, byte in enumerate(X1) if byte in X0)
    assert at >= found
    assert (
        words("mov $16, %eax; mov $16, %edx; pcmpestri $0, %xmm1, %xmm0; mov %rcx, 0x9000")[0] & 0xFFFFFFFF
        == found
    )


def movbe() -> None:
    swapped = int.from_bytes(A.to_bytes(8, "little"), "big")
    assert words("movbe 0x8000, %rcx; mov %rcx, 0x9000; movbe %rbx, 0x9008", 2) == (
        swapped,
        int.from_bytes(B.to_bytes(8, "little"), "big"),
    )


def popcnt() -> None:
    assert words("popcnt %rbx, %rcx; mov %rcx, 0x9000") == (B.bit_count(),)


def aes() -> None:
    # FIPS 197, appendix B: the state after round 1 of its example, by AESENC with the first two round keys.
    key, text = "2b7e151628aed2a6abf7158809cf4f3c", "3243f6a8885a308d313198a2e0370734"
    rounds = 10
    load = "".join(
        f"movabs ${int.from_bytes(bytes.fromhex(value)[n : n + 8], 'little')}, %rcx; mov %rcx, {0x8200 + at + n}; "
        for at, value in ((0, key), (16, text))
        for n in (0, 8)
    )
    expand = """
        pshufd $0xff, %xmm2, %xmm2; movdqa %xmm1, %xmm3
        pslldq $4, %xmm3; pxor %xmm3, %xmm1; pslldq $4, %xmm3; pxor %xmm3, %xmm1; pslldq $4, %xmm3; pxor %xmm3, %xmm1
        pxor %xmm2, %xmm1
    """
    constants = (1, 2, 4, 8, 16, 32, 64, 128, 27, 54)
    source = load + "movdqu 0x8200, %xmm1; movdqu 0x8210, %xmm0; pxor %xmm1, %xmm0\n"
    for number, constant in enumerate(constants, 1):
        last = "last" if number == rounds else ""
        source += f"aeskeygenassist ${constant}, %xmm1, %xmm2\n{expand}\naesenc{last} %xmm1, %xmm0\n"
    assert bytes(map(int, vector(source))).hex() == "3925841d02dc09fbdc118597196a0b32"
    # The inverse: one round back and forth.
    there = "movdqa %xmm0, %xmm2; pxor %xmm3, %xmm3; aesenclast %xmm3, %xmm0; aesdeclast %xmm3, %xmm0"
    assert bytes(map(int, vector(there))) == X0
    columns = "pxor %xmm3, %xmm3; aesdeclast %xmm3, %xmm0; aesenc %xmm3, %xmm0; aesimc %xmm0, %xmm0"
    assert bytes(map(int, vector(columns))) == X0


def rdrand() -> None:
    source = """
        mov $-1, %rcx; mov %rcx, %r9; mov %rcx, %r10
        stc; rdrand %rcx; setc %al; setz %ah; movzwl %ax, %eax; mov %rax, 0x9000; mov %rcx, 0x9008
        rdrand %r9d; mov %r9, 0x9010
        rdrand %r10w; mov %r10, 0x9018
        rdrand %rdx; mov %rdx, 0x9020
        xor %edx, %edx; mov $64, %esi
    1:  rdrand %rdi; or %rdi, %rdx; dec %esi; jnz 1b
        mov %rdx, 0x9028
    """
    flags, quad, double, word, other, all_bits = words(source, 6)
    assert flags == 1
    assert double < 1 << 32
    assert word >> 16 == MASK >> 16
    assert word & 0xFFFF != 0xFFFF
    assert len({quad, double, word & 0xFFFF, other}) == 4
    assert all_bits == MASK
    assert words(source, 6)[:5] == (flags, quad, double, word, other), "a run repeats"


def lahf() -> None:
    assert words("xor %eax, %eax; sub $1, %al; lahf; mov %rax, 0x9000")[0] >> 8 & 0xD5 == 0x95
    assert words("mov $0x4100, %eax; sahf; setz %cl; setc %ch; movzwl %cx, %ecx; mov %rcx, 0x9000") == (
        0x101,
    )


def lzcnt() -> None:
    assert words(
        "lzcnt %rax, %rcx; mov %rcx, 0x9000; xor %eax, %eax; lzcnt %rax, %rcx; mov %rcx, 0x9008", 2
    ) == (
        64 - A.bit_length(),
        64,
    )


def prefetchw() -> None:
    assert words(
        "prefetchw 0x8000; prefetch 0x8000; movabs $0x500000000000, %rcx; prefetchw (%rcx); mov %rax, 0x9000"
    ) == (A,)


def bmi1() -> None:
    low = A & -A
    source = """
        andn %rbx, %rax, %rcx; mov %rcx, 0x9000
        blsi %rax, %rcx; mov %rcx, 0x9008
        blsr %rax, %rcx; mov %rcx, 0x9010
        blsmsk %rax, %rcx; mov %rcx, 0x9018
        mov $0x1408, %edx; bextr %rdx, %rax, %rcx; mov %rcx, 0x9020
        tzcnt %rbx, %rcx; mov %rcx, 0x9028
    """
    assert words(source, 6) == (
        ~A & B & MASK, low, A ^ low, A ^ A - 1, A >> 8 & 0xFFFFF, (B & -B).bit_length() - 1,
    )  # fmt: skip


def bmi2() -> None:
    rotated = (A >> 13 | A << 51) & MASK
    product = A * B
    source = """
        pdep %rbx, %rax, %rcx; mov %rcx, 0x9000
        pext %rbx, %rax, %rcx; mov %rcx, 0x9008
        mov $40, %edx; bzhi %rdx, %rbx, %rcx; mov %rcx, 0x9010
        rorx $13, %rax, %rcx; mov %rcx, 0x9018
        mov $7, %edx; sarx %rdx, %rbx, %rcx; mov %rcx, 0x9020
        shlx %rdx, %rax, %rcx; mov %rcx, 0x9028
        shrx %rdx, %rbx, %rcx; mov %rcx, 0x9030
        mov %rax, %rdx; mulx %rbx, %rcx, %rsi; mov %rcx, 0x9038; mov %rsi, 0x9040
    """
    assert words(source, 9) == (
        scattered(A, B), gathered(A, B), B & (1 << 40) - 1, rotated, ((B - (1 << 64)) >> 7) & MASK,
        A << 7 & MASK, B >> 7, product & MASK, product >> 64,
    )  # fmt: skip


SHOWN: dict[tuple[int, str], dict[int, Callable[[], None]]] = {
    (1, "ECX"): {
        0: sse3, 1: pclmulqdq, 9: ssse3, 13: cmpxchg16b, 19: sse41, 20: sse42, 22: movbe, 23: popcnt, 25: aes,
        30: rdrand,
    },
    (7, "EBX"): {3: bmi1, 8: bmi2},
    (0x8000_0001, "ECX"): {0: lahf, 5: lzcnt, 8: prefetchw},
}  # fmt: skip
"""By leaf and register: the bit of each instruction set, and what tries it."""
NOT_INSTRUCTIONS = {(1, "ECX"): 1 << 21 | 1 << 24 | 1 << 31}
"""x2APIC, TSC-deadline, hypervisor."""


@pytest.mark.parametrize("check", [check for bits in SHOWN.values() for check in bits.values()])
def test_each_instruction_set_gives_right_results(check: Callable[[], None]) -> None:
    check()


WITHOUT_OSFXSR = "mov %cr4, %rcx; and $0xfffffffffffff9ff, %rcx; mov %rcx, %cr4; "


def test_integers_need_no_sse() -> None:
    """Linux 6.12 unpacks itself with SHLX while CR4.OSFXSR is clear."""
    source = """
        mov $7, %edx; shlx %rdx, %rax, %rcx; mov %rcx, 0x9000
        mov $1, %r8d; shlx %edx, %r8d, %r8d; mov %r8, 0x9008
        movbe %ax, 0x9010; movbe 0x9010, %r9w; movzwl %r9w, %r9d; mov %r9, 0x9018
    """
    shifted, one, swapped, back = words(WITHOUT_OSFXSR + source, 4)
    assert (shifted, one, back) == (A << 7 & MASK, 1 << 7, A & 0xFFFF)
    assert swapped & 0xFFFF == int.from_bytes((A & 0xFFFF).to_bytes(2, "big"), "little")


def test_sse_needs_osfxsr() -> None:
    with pytest.raises(AssertionError, match="#UD"):
        words(WITHOUT_OSFXSR + "movdqu %xmm0, 0x9000")


@pytest.mark.parametrize("instruction", ["rdseed %rax", "rdrand (%rax)", "adcx %rax, %rbx", "rdpid %rax"])
def test_what_is_not_shown_is_an_invalid_opcode(instruction: str) -> None:
    source = instruction if "(" not in instruction else ".byte 0x0f, 0xc7, 0x30"
    with pytest.raises(AssertionError, match="#UD"):
        run(source, 1)


@pytest.mark.parametrize("place", SHOWN, ids=lambda place: f"{place[0]:x} {place[1]}")
@pytest.mark.parametrize("enlightenments", [True, False])
def test_cpuid_shows_these_and_no_others(place: tuple[int, str], enlightenments: bool) -> None:
    leaf, register = place
    with Machine(tiny_guest("_start: hlt"), memory=16 << 20, enlightenments=enlightenments) as machine:
        value = machine.partition.vps[0].cpuid(leaf)[("EAX", "EBX", "ECX", "EDX").index(register)]
    shown = {bit for bit in range(32) if (value & ~NOT_INSTRUCTIONS.get(place, 0)) >> bit & 1}
    assert shown == set(SHOWN[place])


def cpuid(leaf: int, subleaf: int = 0, **options: object) -> tuple[int, int, int, int]:
    with Machine(tiny_guest("_start: hlt"), memory=16 << 20, **options) as machine:  # type: ignore[arg-type]
        return machine.partition.vps[0].cpuid(leaf, subleaf)


def test_a_machine_is_x86_64_v2() -> None:
    ecx, extended = cpuid(1)[2], cpuid(0x8000_0001)[2]
    for bit in (0, 9, 13, 19, 20, 23):  # psABI x86-64: SSE3 SSSE3 CX16 SSE4.1 SSE4.2 POPCNT, and LAHF
        assert ecx >> bit & 1
    assert extended & 1


def test_under_a_hypervisor_the_apic_timer_is_plain() -> None:
    # With an always running one, or one with deadlines, Linux does not fall back to it from the synthetic timer.
    assert cpuid(6)[0] == 0
    assert not cpuid(1)[2] >> 24 & 1
    assert cpuid(6, enlightenments=False)[0] == 4
    assert cpuid(1, enlightenments=False)[2] >> 24 & 1


def test_synthetic_timers_have_direct_mode_only_when_asked_for() -> None:
    assert not cpuid(0x4000_0003)[3] >> 19 & 1
    assert cpuid(0x4000_0003, direct_timers=True)[3] >> 19 & 1
    assert LINUX.features >> 19 & 1
    assert not PLAIN_PC.hypervisor_present


@pytest.mark.parametrize("processors", [1, 2, 6, 16])
def test_caches(processors: int) -> None:
    found = {}
    for subleaf in range(8):
        eax, ebx, ecx, _ = cpuid(4, subleaf, processors=processors)
        kind, level = eax & 31, eax >> 5 & 7
        if kind == 0:
            break
        assert kind in (1, 2, 3)
        assert eax >> 8 & 1, "self-initializing"
        size = ((ebx >> 22) + 1) * ((ebx >> 12 & 0x3FF) + 1) * ((ebx & 0xFFF) + 1) * (ecx + 1)
        found[level, kind] = size, (eax >> 14 & 0xFFF) + 1
        assert (eax >> 26) + 1 >= processors
    assert {key: size for key, (size, _) in found.items()} == {
        (1, 1): 32 << 10, (1, 2): 32 << 10, (2, 3): 1 << 20, (3, 3): 16 << 20,
    }  # fmt: skip
    assert {sharing for (level, _), (_, sharing) in found.items() if level < 3} == {1}
    assert found[3, 3][1] >= processors
    assert cpuid(4, 4) == (0, 0, 0, 0)
    assert cpuid(2)[0] & 0xFF == 1
    assert cpuid(0x8000_0007)[3] == 1 << 8  # invariant TSC

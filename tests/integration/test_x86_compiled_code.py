"""What a C compiler makes of real algorithms, executed in both modes, against Python's own results."""

import hashlib
import random
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import pytest

from vmbus.core import x86
from vmbus.core.memory import GuestMemory

SOURCE = r"""
typedef unsigned char u8; typedef unsigned u32; typedef unsigned long long u64;

static const u32 K[64] = {%(round_constants)s};
static u32 ror(u32 v, int n) { return v >> n | v << (32 - n); }

static void block(u32 *h, const u8 *p) {
    u32 w[64], v[8];
    for (int i = 0; i < 16; i++) w[i] = p[4*i] << 24 | p[4*i+1] << 16 | p[4*i+2] << 8 | p[4*i+3];
    for (int i = 16; i < 64; i++)
        w[i] = w[i-16] + (ror(w[i-15], 7) ^ ror(w[i-15], 18) ^ w[i-15] >> 3)
             + w[i-7] + (ror(w[i-2], 17) ^ ror(w[i-2], 19) ^ w[i-2] >> 10);
    for (int i = 0; i < 8; i++) v[i] = h[i];
    for (int i = 0; i < 64; i++) {
        u32 t1 = v[7] + (ror(v[4], 6) ^ ror(v[4], 11) ^ ror(v[4], 25)) + ((v[4] & v[5]) ^ (~v[4] & v[6])) + K[i] + w[i];
        u32 t2 = (ror(v[0], 2) ^ ror(v[0], 13) ^ ror(v[0], 22)) + ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]));
        for (int j = 7; j > 0; j--) v[j] = v[j-1];
        v[4] += t1; v[0] = t1 + t2;
    }
    for (int i = 0; i < 8; i++) h[i] += v[i];
}

static void sha256(u8 *out, const u8 *p, u32 n) {
    u32 h[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    u8 last[128]; u32 rest = n %% 64, size = rest < 56 ? 64 : 128;
    for (u32 i = 0; i + 64 <= n; i += 64) block(h, p + i);
    for (u32 i = 0; i < size; i++) last[i] = i < rest ? p[n - rest + i] : i == rest ? 0x80 : 0;
    for (int i = 0; i < 8; i++) last[size - 1 - i] = (u8)((u64)n * 8 >> 8 * i);
    for (u32 i = 0; i < size; i += 64) block(h, last + i);
    for (int i = 0; i < 32; i++) out[i] = h[i / 4] >> (24 - 8 * (i %% 4));
}

static u32 crc32(const u8 *p, u32 n) {
    u32 c = ~0u;
    while (n--) { c ^= *p++; for (int i = 0; i < 8; i++) c = c >> 1 ^ (c & 1 ? 0xedb88320 : 0); }
    return ~c;
}

static void sort(int *a, int low, int high) {
    while (low < high) {
        int i = low, j = high, pivot = a[(low + high) / 2];
        while (i <= j) {
            while (a[i] < pivot) i++;
            while (a[j] > pivot) j--;
            if (i <= j) { int t = a[i]; a[i++] = a[j]; a[j--] = t; }
        }
        if (j - low < high - i) { sort(a, low, j); low = i; } else { sort(a, i, high); high = j; }
    }
}

struct work { u8 digest[32]; u32 crc, count; u64 quotient, remainder, product; long long dividend, divisor;
              int values[300]; u32 length; u8 data[8192]; };

void *memset(void *p, int c, %(size)s n) { u8 *q = p; while (n--) *q++ = c; return p; }
void *memcpy(void *p, const void *s, %(size)s n) { u8 *q = p; const u8 *r = s; while (n--) *q++ = *r++; return p; }
%(divide)s

void start(void) {
    struct work *w = (struct work *)0x40000;
    sha256(w->digest, w->data, w->length);
    w->crc = crc32(w->data, w->length);
    sort(w->values, 0, w->count - 1);
    w->quotient = w->dividend / w->divisor;
    w->remainder = w->dividend %% w->divisor;
    w->product = (u64)w->dividend * (u64)w->divisor;
    for (;;) __asm__ volatile("hlt");
}
"""

DIVIDE = """
/* what libgcc does for 64-bit division on 32-bit processors, bit by bit */
static u64 udivmod(u64 a, u64 b, u64 *rest) {
    u64 q = 0, r = 0;
    for (int i = 63; i >= 0; i--) { r = r << 1 | (a >> i & 1); if (r >= b) { r -= b; q |= 1ull << i; } }
    *rest = r; return q;
}
long long __divdi3(long long a, long long b) {
    u64 r, q = udivmod(a < 0 ? -(u64)a : a, b < 0 ? -(u64)b : b, &r); return (a < 0) != (b < 0) ? -q : q; }
long long __moddi3(long long a, long long b) {
    u64 r; udivmod(a < 0 ? -(u64)a : a, b < 0 ? -(u64)b : b, &r); return a < 0 ? -r : r; }
long long __divmoddi4(long long a, long long b, long long *rest) { *rest = __moddi3(a, b); return __divdi3(a, b); }
"""
WORK, CODE, STACK = 0x40000, 0x1000, 0x80000
LAYOUT = struct.Struct("<32s2I3Q2q300iI")


def round_constants() -> str:
    """The first 32 bits of the fractional parts of the cube roots of the first 64 primes."""
    primes = [n for n in range(2, 312) if all(n % d for d in range(2, n))]
    roots = []
    for prime in primes:
        root = round((prime << 96) ** (1 / 3))
        while root**3 > prime << 96:
            root -= 1
        while (root + 1) ** 3 <= prime << 96:
            root += 1
        roots.append(root & 0xFFFFFFFF)
    return ", ".join(f"0x{root:08x}" for root in roots)


def build(folder: Path, bits: int, optimisation: str) -> tuple[bytes, int]:
    """A flat image to be loaded at `CODE`, and its entry point."""
    if shutil.which("gcc") is None or shutil.which("objcopy") is None:
        pytest.skip("needs gcc and binutils")
    values = {
        "round_constants": round_constants(),
        "size": "unsigned long" if bits == 64 else "unsigned",
        "divide": "" if bits == 64 else DIVIDE,
    }
    (folder / "code.c").write_text(SOURCE % values)
    options = [
        f"-m{bits}",
        optimisation,
        "-ffreestanding",
        "-fno-builtin",
        "-mgeneral-regs-only",
        "-fno-pic",
        "-no-pie",
    ]
    options += [
        "-fno-stack-protector",
        "-fcf-protection=none",
        "-fno-asynchronous-unwind-tables",
        "-nostdlib",
    ]
    link = [
        f"-Wl,-Ttext={CODE:#x}",
        "-Wl,-e,start",
        "-Wl,--build-id=none",
        "-Wl,-z,norelro",
        "-Wl,-N",
        "-Wl,--no-warn-rwx-segments",
    ]
    subprocess.run(["gcc", *options, *link, "-o", folder / "code.elf", folder / "code.c"], check=True)
    subprocess.run(["objcopy", "-O", "binary", folder / "code.elf", folder / "code.bin"], check=True)
    (entry,) = struct.unpack_from("<Q" if bits == 64 else "<I", (folder / "code.elf").read_bytes(), 24)
    return (folder / "code.bin").read_bytes(), entry


@pytest.mark.parametrize("bits", [64, 32])
@pytest.mark.parametrize("optimisation", ["-O0", "-O2", "-Os", "-O3"])
def test_compiled_algorithms_give_the_right_results(tmp_path: Path, bits: int, optimisation: str) -> None:
    rng = random.Random(bits)
    memory = GuestMemory(1 << 20)
    image, entry = build(tmp_path, bits, optimisation)
    memory.write(CODE, image)
    data = rng.randbytes(5000)
    values = [rng.randrange(-(1 << 31), 1 << 31) for _ in range(300)]
    dividend, divisor = -rng.getrandbits(62), rng.getrandbits(33)
    memory.write(WORK, LAYOUT.pack(b"", 0, 300, 0, 0, 0, dividend, divisor, *values, len(data)))
    memory.write(WORK + LAYOUT.size, data)
    cpu = x86.Cpu(memory, bits=bits)
    cpu.rip = entry
    cpu.set_register(4, STACK - bits // 8)
    assert cpu.run(50_000_000) == x86.HALT
    digest, crc, _, quotient, remainder, product, *rest = LAYOUT.unpack(memory.read(WORK, LAYOUT.size))
    assert digest == hashlib.sha256(data).digest()
    assert crc == zlib.crc32(data)
    assert rest[2:302] == sorted(values)
    whole = -(-dividend // divisor)
    assert quotient == whole & (1 << 64) - 1
    assert remainder == (dividend - whole * divisor) & (1 << 64) - 1
    assert product == dividend * divisor & (1 << 64) - 1

"""Small damage to bytes, as fuzzers do it."""

import random

WORDS = (0, 1, 2, 7, 8, 0xFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFF8, 0xFFFFFFFF)
"""Values at which lengths, offsets and counts go wrong."""


def mutate(rng: random.Random, data: bytes, changes: tuple[int, ...] = (0, 1, 1, 2, 5)) -> bytes:
    """A copy with a few bits, words or bytes changed, cut short, made longer, or with a part twice."""
    result = bytearray(data)
    for _ in range(rng.choice(changes)):
        if not result:
            break
        at = rng.randrange(len(result))
        what = rng.random()
        if what < 0.3:
            result[at] ^= 1 << rng.randrange(8)
        elif what < 0.4:
            result[at] = rng.getrandbits(8)
        elif what < 0.75 and len(result) >= 4:
            at = rng.randrange(len(result) - 3) & ~3
            value = rng.choice((*WORDS, len(result), rng.getrandbits(32)))
            result[at : at + 4] = value.to_bytes(4, rng.choice(("little", "little", "big")))
        elif what < 0.85:
            del result[at:]
        elif what < 0.93:
            result += rng.randbytes(rng.randrange(40))
        else:
            result[at:at] = result[at : at + rng.randrange(1, 64)]
    return bytes(result)

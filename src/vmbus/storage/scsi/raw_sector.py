"""Whole sectors of a data CD as READ CD gives them: what a disc has around the user data (ECMA-130 clauses 14 and 15).

A sector of mode 1 is 12 bytes of synchronization, the address in minutes, seconds and frames with the mode (4), user
data (2048), an error detection code (4), zeros (8) and error correction codes: P (172) and Q (104) parity.
"""

__all__ = ["RAW_BLOCK", "USER_BLOCK", "from_msf", "raw_sector", "to_msf"]

USER_BLOCK = 2048
RAW_BLOCK = 2352

_SYNC = b"\0" + b"\xff" * 10 + b"\0"
_FRAMES = 75
_LEAD_IN = 150
_EDC_POLYNOMIAL = 0xD8018001  # x^32 + x^31 + x^16 + x^15 + x^4 + x^3 + x + 1, least significant bit first


def to_msf(lba: int) -> tuple[int, int, int]:
    """Minutes, seconds and frames of a block."""
    frames = lba + _LEAD_IN
    return frames // (60 * _FRAMES), frames // _FRAMES % 60, frames % _FRAMES


def from_msf(minutes: int, seconds: int, frames: int) -> int:
    """The block at a time; negative in the lead-in."""
    return (minutes * 60 + seconds) * _FRAMES + frames - _LEAD_IN


def raw_sector(lba: int, user: bytes) -> bytes:
    """All 2352 bytes of the sector of mode 1 that carries `user` at a block below 99:59:74."""
    header = bytes((value // 10 << 4 | value % 10) for value in to_msf(lba)) + b"\1"
    sector = bytearray(_SYNC + header + user)
    sector += _detection(sector).to_bytes(4, "little") + bytes(8)
    sector += _parity(sector[12:], vectors=86, length=24, step_vector=2, step=86)
    sector += _parity(sector[12:], vectors=52, length=43, step_vector=86, step=88)
    return bytes(sector)


def _detection(data: bytes | bytearray) -> int:
    """The error detection code."""
    code = 0
    for byte in data:
        code = code >> 8 ^ _EDC[(code ^ byte) & 0xFF]
    return code


def _parity(data: bytes | bytearray, *, vectors: int, length: int, step_vector: int, step: int) -> bytes:
    """Two parity bytes for each vector of a Reed-Solomon product code over GF(2^8).

    Two vectors are interleaved, one of the low and one of the high bytes of words. All first bytes come first.
    """
    size = vectors * length
    first, second = bytearray(vectors), bytearray(vectors)
    for vector in range(vectors):
        at = (vector >> 1) * step_vector + (vector & 1)
        weighted = total = 0
        for _ in range(length):
            weighted = _TIMES_2[weighted ^ data[at]]
            total ^= data[at]
            at += step
            if at >= size:
                at -= size
        first[vector] = _OVER_3[_TIMES_2[weighted] ^ total]
        second[vector] = first[vector] ^ total
    return bytes(first + second)


def _edc_table() -> list[int]:
    table = []
    for byte in range(256):
        code = byte
        for _ in range(8):
            code = code >> 1 ^ (_EDC_POLYNOMIAL if code & 1 else 0)
        table.append(code)
    return table


def _over_3() -> list[int]:
    table = [0] * 256
    for value in range(256):
        table[value ^ _TIMES_2[value]] = value
    return table


_EDC = _edc_table()
_TIMES_2 = [value << 1 ^ (0x11D if value & 0x80 else 0) for value in range(256)]  # x^8 + x^4 + x^3 + x^2 + 1
_OVER_3 = _over_3()

"""Sizes and times as people type and read them."""

import argparse
import math
import re

__all__ = ["format_size", "seconds", "size"]

_FACTORS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def size(text: str) -> int:
    """Bytes of ``"4096"``, ``"4K"``, ``"64M"``, ``"1.5GiB"``; for argparse's ``type``.

    Raises:
        argparse.ArgumentTypeError: not such a size, or not a whole number of bytes.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 4096, 4K or 64M")
    value = float(match[1]) * _FACTORS[match[2].upper()]
    if value != int(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of bytes")
    return int(value)


def format_size(count: int) -> str:
    """`count` bytes with the largest binary unit that leaves no fraction: ``"4 KiB"``."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        factor = _FACTORS[unit[0]]
        if count and count % factor == 0:
            return f"{count // factor} {unit}"
    return f"{count} bytes"


def seconds(text: str) -> float:
    """Seconds, 0 or more; for argparse's ``type``.

    Raises:
        argparse.ArgumentTypeError: not a number, negative, or not finite.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return value

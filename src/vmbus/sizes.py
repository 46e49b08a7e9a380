"""Numbers of bytes as arguments: one check, and one way to say what is wrong with them."""

import operator
import reprlib

__all__ = ["byte_count"]


def byte_count(value: object, what: str) -> int:
    """`value` as an integer, for an argument that is a number of bytes.

    Args:
        value: what the caller passed.
        what: what it is the size of, for the error: ``"memory"``.

    Raises:
        TypeError: it is no integer; ``"512M"`` is for the command line, Python has ``512 << 20``.
    """
    try:
        return operator.index(value)  # type: ignore[arg-type]  # that is what is found out here
    except TypeError:
        raise TypeError(
            f"{what}: a number of bytes, such as 512 << 20, and not {reprlib.repr(value)}"
        ) from None

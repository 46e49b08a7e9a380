"""Seeds of tests that act at random: always the same, so that what passed passes again, unless one asks for another.

``VMBUS_SEED=NUMBER`` repeats a run, ``VMBUS_SEED=random`` takes a new one each time. Tests print theirs.
"""

import os
import random

__all__ = ["chosen_seed"]


def chosen_seed(variable: str = "VMBUS_SEED") -> int:
    """The seed that the environment variable asks for, positive; 1 without it."""
    wanted = os.environ.get(variable, "1")
    return random.SystemRandom().randrange(1, 1 << 32) if wanted == "random" else int(wanted)

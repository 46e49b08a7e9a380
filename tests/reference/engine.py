"""Whether the engine for real kernels is there: tests that need it skip without, but not where it is promised."""

import os

import pytest

from vmbus.engine.unicorn import find_library
from vmbus.errors import EngineError


def need_engine() -> None:
    """Leave out the module that calls this while it is imported, if there is no Unicorn library.

    Where all extras are promised (the environment variable VMBUS_ALL_EXTRAS is set, as in CI's main environment) a
    missing library is a failure.
    """
    try:
        find_library()
    except EngineError as error:
        if os.environ.get("VMBUS_ALL_EXTRAS"):
            raise
        pytest.skip(str(error), allow_module_level=True)

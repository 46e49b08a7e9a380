"""Whether the engine for real kernels is there: tests that need it skip without, but not in CI."""

import os

import pytest

from vmbus.engine.unicorn import find_library
from vmbus.errors import EngineError


def need_engine() -> None:
    """Leave out the module that calls this while it is imported, if there is no Unicorn library.

    In CI (the environment variable CI is set) a missing library is a failure, except in the environments that are
    made without any extra on purpose: there VMBUS_WITHOUT_EXTRAS is set.
    """
    try:
        find_library()
    except EngineError as error:
        if os.environ.get("CI") and not os.environ.get("VMBUS_WITHOUT_EXTRAS"):
            raise
        pytest.skip(str(error), allow_module_level=True)

"""Hyper-V's I/O architecture in Python, with a compiled core."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("vmbus")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

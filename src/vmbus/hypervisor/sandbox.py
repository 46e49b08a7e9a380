"""What a child's process may reach: the policy, in its parent. `vmbus.hypervisor.child_main` carries it out."""

import importlib.util
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

__all__ = ["Sandbox"]

_PASSED_ON: Final = (
    *("LANG", "LC_", "TZ", "LD_", "OPENBLAS_", "OMP_", "MKL_", "PYTHONHASHSEED", "PYTHONMALLOC"),
    *("ASAN_OPTIONS", "UBSAN_OPTIONS"),
)
"""Beginnings of the variables that the loader, the C library and the numerical libraries need; the rest stays here."""
_SYSTEM_FILES: Final = (
    *("/usr", "/lib", "/lib32", "/lib64", "/nix/store", "/gnu/store"),
    *(
        "/etc/ld.so.cache",
        "/etc/ld.so.conf",
        "/etc/ld.so.conf.d",
        "/etc/ld-musl-x86_64.path",
        "/etc/localtime",
    ),
    *("/dev/null", "/dev/urandom", "/sys/devices/system/cpu"),
)
"""What a process needs to load libraries and to run; each as far as the machine has it."""


@dataclass(frozen=True)
class Sandbox:
    """Bounds of a child's process. Each is put in force where the kernel allows it without root.

    In its namespaces the process is alone: no other processes to signal, no network, no System V objects of others,
    and of the file system only what Python imports from, read-only. What it starts ends with it. It can gain no
    privileges, has an environment of its own, and none of its parent's descriptors.
    `vmbus.hypervisor.ChildProcess.confinement` says what of that is in force; with the ``sandbox`` extra system calls
    are filtered as well.

    Attributes:
        required: refuse to start the process where it cannot have namespaces of its own.
        readable: more files and folders that it can read.
        environment: variables that it gets, beside those that its libraries need.
        data: bytes of private memory that it may have, beside the partition's. Memory that it shares with what it
            starts is not counted; with `filter_calls` it gets none.
        descriptors: files that it may have open; each connection that it signals takes one.
        threads: processes and threads that its user may have on the machine. Not counted for root.
        filter_calls: refuse system calls that no guest needs, among them those that start processes, open sockets and
            share memory, where pyseccomp and libseccomp are installed (the ``sandbox`` extra).

    Raises:
        ValueError: a bound is not positive.
    """

    required: bool = False
    readable: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    data: int = 4 << 30
    descriptors: int = 4096
    threads: int = 4096
    filter_calls: bool = True

    def __post_init__(self) -> None:
        for name in ("data", "descriptors", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"a sandbox with {name}={getattr(self, name)}")

    def variables(self) -> dict[str, str]:
        """The process's environment."""
        passed_on = {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}
        return passed_on | dict(self.environment)

    def task(self, module: str) -> dict[str, Any]:
        """What the process is told to do to itself before it runs `module`, ready for JSON."""
        return {
            "required": self.required,
            "readable": _outermost([*_SYSTEM_FILES, *_imported_from(module), *self.readable]),
            "data": self.data,
            "descriptors": self.descriptors,
            "threads": self.threads,
            "filter_calls": self.filter_calls,
        }


def import_path() -> list[str]:
    """Where this process imports from, as absolute paths."""
    return [os.path.abspath(entry) for entry in sys.path]


def _imported_from(module: str) -> list[str]:
    """Python itself, everything on its path, this package and the guest's, which an editable install has elsewhere."""
    paths = [sys.prefix, sys.base_prefix, sys.exec_prefix, *import_path()]
    paths += [entry for entry in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if entry]
    for name in (__package__.partition(".")[0], module.partition(".")[0]):
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError):
            continue
        if spec is not None:
            origin = spec.origin if spec.has_location and not spec.submodule_search_locations else None
            paths += [origin] if origin else spec.submodule_search_locations or []
    return paths


def _outermost(paths: list[str]) -> list[str]:
    """Those that exist, by either name where a link leads there, without what lies in another of them."""
    found = {Path(os.path.abspath(path)) for path in paths if os.path.exists(path)}
    found |= {path.resolve() for path in found}
    found.discard(Path("/"))  # who imports from there gets what it needs by the other paths
    return sorted(str(path) for path in found if not found.intersection(path.parents))

"""Compiles the modules in ``ext/`` into ``vmbus.core``; everything else is in ``pyproject.toml``.

``VMBUS_SANITIZE=1`` builds with AddressSanitizer and UndefinedBehaviorSanitizer, ``VMBUS_BUILD_JOBS=N`` with N
compilers side by side.
"""

import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

SANITIZE = os.environ.get("VMBUS_SANITIZE") == "1"

COMPILE_FLAGS = ["-std=gnu11", "-O3", "-fno-strict-aliasing"]
LINK_FLAGS: list[str] = []
if SANITIZE:
    SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    COMPILE_FLAGS += [*SANITIZERS, "-O1", "-g", "-fno-omit-frame-pointer"]
    LINK_FLAGS += SANITIZERS

JOBS = int(os.environ.get("VMBUS_BUILD_JOBS", "1"))

extensions = [
    Extension(
        f"vmbus.core.{source.stem}",
        [f"ext/{source.name}"],
        include_dirs=["src/vmbus/core"],
        extra_compile_args=COMPILE_FLAGS,
        extra_link_args=LINK_FLAGS,
    )
    for source in sorted(Path(__file__).parent.joinpath("ext").glob("*.pyx"))
]

if __name__ == "__main__":  # Cython's worker processes may import this file
    setup(
        ext_modules=cythonize(
            extensions,
            include_path=["src"],
            compiler_directives={
                "language_level": 3,
                "boundscheck": False,
                "wraparound": False,
                "cdivision": True,
                "initializedcheck": False,
                "embedsignature": True,
                "autotestdict": False,
                "auto_pickle": False,  # these objects own memory: pickling them is a TypeError
                "freethreading_compatible": False,
            },
            build_dir="build/cython",
            nthreads=JOBS if JOBS > 1 else 0,
        ),
        options={"build_ext": {"parallel": JOBS if JOBS > 1 else None}},
    )

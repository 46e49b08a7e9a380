"""Compiles a `.pyx` of this folder at run time, against the `.pxd` files of the installed package."""

import os
import shutil
import subprocess
import sys
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

FLAGS = "-O3 -std=gnu11 -fno-strict-aliasing"  # as the package itself is built


@cache
def compiled(name: str) -> Any:
    """The module made of ``benchmarks/<name>.pyx``.

    Raises:
        RuntimeError: it does not compile; the text is the compiler's.
    """
    with TemporaryDirectory(prefix="vmbus-benchmarks-") as folder:
        source = shutil.copy(Path(__file__).with_name(f"{name}.pyx"), folder)
        command = [sys.executable, "-m", "Cython.Build.Cythonize", "--inplace", "--force", "-3", source]
        environment = os.environ | {"CFLAGS": f"{os.environ.get('CFLAGS', '')} {FLAGS}"}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        built = next(Path(folder).glob(f"{name}.*.so"), None)
        if result.returncode or built is None:
            raise RuntimeError(f"{name}.pyx does not compile:\n{result.stdout}\n{result.stderr}")
        spec = spec_from_file_location(name, built)
        if spec is None or spec.loader is None:
            raise RuntimeError(f"{built} cannot be imported")
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

"""Checks what the wheel and the source archive contain: ``check_packages.py WHEEL SDIST``."""

import sys
import tarfile
import zipfile
from pathlib import Path

TOP = Path(__file__).parent.parent


def problems_of_wheel(names: set[str], modules: set[str]) -> list[str]:
    """What a wheel with these files lacks, or has without need."""
    found = []
    wanted = {"vmbus/py.typed", "vmbus/__init__.pxd", "vmbus/core/__init__.pxd"}
    wanted |= {path.relative_to(TOP / "src").as_posix() for path in TOP.glob("src/**/*.p[xy][di]")}
    wanted |= {path.relative_to(TOP / "src").as_posix() for path in TOP.glob("src/**/*.h")}
    found += [f"missing: {name}" for name in sorted(wanted - names)]
    for module in sorted(modules):
        stem = f"vmbus/core/{module}"
        if not any(name.startswith(f"{stem}.cpython-") and name.endswith(".so") for name in names):
            found.append(f"missing: the compiled {stem}")
        if f"{stem}.pyi" not in names:
            found.append(f"missing: {stem}.pyi")
    for name in sorted(names):
        if name.endswith((".c", ".pyx")) or name.startswith(("tests/", "ext/", "benchmarks/")):
            found.append(f"does not belong there: {name}")
    return found


def problems_of_sdist(names: set[str]) -> list[str]:
    """What a source archive with these files (top folder removed) lacks, or has without need."""
    wanted = {"LICENSE", "README.md", "CHANGELOG.md", "SECURITY.md", "pyproject.toml", "setup.py"}
    wanted |= {path.relative_to(TOP).as_posix() for path in (TOP / "tests").rglob("*.c")}
    for folder in ("ext", "src", "tests", "benchmarks"):
        wanted |= {
            path.relative_to(TOP).as_posix() for path in (TOP / folder).rglob("*.p[yx]*") if path.is_file()
        }
    wanted = {name for name in wanted if not name.endswith((".pyc", ".pyo"))}
    found = [f"missing: {name}" for name in sorted(wanted - names)]
    return found + [
        f"does not belong there: {name}"
        for name in sorted(names)
        if name.endswith(".so") or (name.endswith(".c") and not name.startswith("tests/"))
    ]


def main() -> int:
    """Report the problems of both archives; 1 when there are any."""
    wheel, sdist = sys.argv[1:]
    modules = {path.stem for path in TOP.glob("ext/*.pyx")}
    with zipfile.ZipFile(wheel) as archive:
        problems = [f"wheel: {line}" for line in problems_of_wheel(set(archive.namelist()), modules)]
    with tarfile.open(sdist) as tar:
        names = {member.name.partition("/")[2] for member in tar.getmembers() if member.isfile()}
    problems += [f"source archive: {line}" for line in problems_of_sdist(names)]
    print(
        "\n".join(problems)
        or f"the wheel and the source archive hold what they should ({len(modules)} compiled modules)"
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

"""A guest to boot, from the distribution's own packages: kernel, modules, busybox, and an initramfs of them.

Packages are downloaded with apt (they are not installed), checked against the SHA-256 that apt's signed package lists
give, and unpacked into a cache folder. A manifest there names every file with its checksum; a later run reuses
what still matches.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from vmbus.machine.initramfs import RECIPE, build_initramfs, resolve_modules
from vmbus.machine.linux import BootError, parse_kernel
from vmbus.sizes import byte_count

__all__ = [
    "ROOT_LABEL",
    "Guest",
    "default_cache",
    "describe",
    "load_guest",
    "make_root_disk",
    "prepare_guest",
]

KERNEL_PACKAGES: Final = ("linux-image-cloud-amd64", "linux-image-amd64", "linux-image-virtual")
"""Meta packages that depend on the newest kernel, best first: Debian's cloud kernel is small."""
BUSYBOX_PACKAGE: Final = "busybox-static"
MANIFEST: Final = "manifest.json"
MANIFEST_FORMAT: Final = 4
"""Counted up when the cache or the archive is laid out differently; what goes into the archive is in its `RECIPE`."""
NEEDED: Final = ("apt-get", "apt-cache", "dpkg-deb")

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Guest:
    """A prepared guest.

    Attributes:
        kernel: the kernel's file (bzImage).
        initramfs: boots into the root disk that the command line names, or into a shell.
        busybox: the static busybox, for root disks.
        version: the kernel's release.
        packages: package file names that it was made from, with their SHA-256.
        wanted: the kernel package that was asked for; None for the distribution's choice.
    """

    kernel: Path
    initramfs: Path
    busybox: Path
    version: str
    packages: Mapping[str, str]
    wanted: str | None = None

    def is_from(self, package: str | None) -> bool:
        """Whether its kernel comes from `package`, a meta package or a real one; None for any."""
        asked_for = package in (None, self.wanted)
        return asked_for or any(name.startswith(f"{package}_") for name in self.packages)


def default_cache() -> Path:
    """``vmbus/guest`` in the user's cache folder (``XDG_CACHE_HOME``)."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "vmbus" / "guest"


def load_guest(cache: Path | None = None) -> Guest | None:
    """The guest prepared in `cache`, if it is complete and every checksum holds."""
    folder = default_cache() if cache is None else cache
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if (manifest["format"], manifest["recipe"]) != (MANIFEST_FORMAT, RECIPE):
            return None
        for name, checksum in manifest["files"].items():
            if _sha256(folder / name) != checksum:
                return None
        return Guest(
            folder / "vmlinuz",
            folder / "initramfs.cpio",
            folder / "busybox",
            manifest["version"],
            manifest["packages"],
            manifest.get("wanted"),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def prepare_guest(
    cache: Path | None = None,
    *,
    package: str | None = None,
    refresh: bool = False,
    progress: Progress = lambda message: None,
) -> Guest:
    """Download and build what a guest needs, or reuse it.

    Args:
        cache: folder to keep it in; `default_cache` by default.
        package: the kernel package; by default what is in the cache, else the distribution's cloud kernel.
        refresh: do it again even if the cache is complete.
        progress: called with a line about each step.

    Raises:
        BootError: there is no apt here, a package cannot be had, or its checksum is wrong; says what to do.
    """
    folder = default_cache() if cache is None else cache
    if not refresh and (known := load_guest(folder)) is not None and known.is_from(package):
        progress(f"{folder}: complete, kernel {known.version}")
        return known
    missing = [tool for tool in NEEDED if shutil.which(tool) is None]
    if missing:
        raise BootError(
            f"preparing a guest takes packages from apt, and this system has no {', '.join(missing)}: "
            "on Debian or Ubuntu run `vmbus guest prepare`, elsewhere give `vmbus boot` a kernel and an initramfs that "
            "loads hv_vmbus and hv_storvsc"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="download-") as scratch:
        work = Path(scratch)
        progress("asking apt for the newest kernel")
        chosen = _kernel_package(package)
        files = [_download(name, work, progress) for name in (chosen, BUSYBOX_PACKAGE)]
        for file in files:
            progress(f"unpacking {file.name}")
            _run("dpkg-deb", "-x", str(file), str(work / "tree"))
        tree = work / "tree"
        kernels = sorted((tree / "boot").glob("vmlinuz-*"))
        busyboxes = [path for path in (tree / "bin/busybox", tree / "usr/bin/busybox") if path.is_file()]
        if not kernels or not busyboxes:
            raise BootError(f"{chosen} and {BUSYBOX_PACKAGE} hold no /boot/vmlinuz-* and /bin/busybox")
        version = kernels[0].name.removeprefix("vmlinuz-")
        parse_kernel(kernels[0].read_bytes())
        modules_folder = next(
            (p for p in (tree / "lib/modules", tree / "usr/lib/modules") if p.is_dir()), None
        )
        if modules_folder is None:
            raise BootError(f"{chosen} holds no kernel modules")
        progress("building the initramfs")
        busybox = busyboxes[0].read_bytes()
        archive = build_initramfs(busybox, resolve_modules(modules_folder / version))
        contents = {"vmlinuz": kernels[0].read_bytes(), "initramfs.cpio": archive, "busybox": busybox}
        packages = {file.name: _sha256(file) for file in files}
    manifest = {
        "format": MANIFEST_FORMAT,
        "recipe": RECIPE,
        "version": version,
        "packages": packages,
        "wanted": package,
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()},
    }
    (folder / MANIFEST).unlink(missing_ok=True)  # an interrupted run must not look complete
    for name, data in contents.items():
        _replace(folder / name, data)
    (folder / "busybox").chmod(0o755)
    _replace(folder / MANIFEST, json.dumps(manifest, indent=2).encode())
    guest = load_guest(folder)
    if guest is None:
        raise BootError(f"{folder}: the files written there do not read back as they were written")
    progress(f"{folder}: kernel {version}, initramfs of {len(archive) / (1 << 20):.1f} MiB")
    return guest


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".new")
    temporary.write_bytes(data)
    temporary.replace(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _run(*command: str, cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, check=True, env={**os.environ, "LC_ALL": "C"}
        )
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if line.strip()]
        reason = lines[-1] if lines else f"exit status {error.returncode}"
        raise BootError(f"{' '.join(command[:2])} failed: {reason}") from error
    return done.stdout


def _kernel_package(wanted: str | None) -> str:
    """The package that holds a kernel image: `wanted`, or what a meta package depends on."""
    for meta in (wanted,) if wanted else KERNEL_PACKAGES:
        try:
            listing = _run("apt-cache", "depends", "--no-recommends", "--no-suggests", meta)
        except BootError:
            continue
        for line in listing.splitlines():
            match = re.fullmatch(r"\s*Depends: (linux-image-\d\S*)", line)
            if match:
                return match[1]
        if re.match(r"linux-image-\d", meta):
            return meta
    what = wanted or "linux-image-cloud-amd64"
    raise BootError(f"apt knows no kernel package {what}: run `apt-get update`, or name one with --package")


def _download(package: str, folder: Path, progress: Progress) -> Path:
    progress(f"downloading {package}")
    before = set(folder.glob("*.deb"))
    _run("apt-get", "download", package, cwd=folder)
    new = set(folder.glob("*.deb")) - before
    if len(new) != 1:
        raise BootError(f"apt-get download {package} gave {len(new)} files")
    file = new.pop()
    expected = {
        line.removeprefix("SHA256: ").strip()
        for line in _run("apt-cache", "show", package).splitlines()
        if line.startswith("SHA256: ")
    }
    if _sha256(file) not in expected:
        raise BootError(
            f"{file.name}: its SHA-256 is not the one of the package list; run `apt-get update` and try again"
        )
    return file


ROOT_LABEL: Final = "root"
"""Names a root disk for ``root=LABEL=root``, whatever Linux calls it."""
ROOT_INIT: Final = """#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin:/sbin
/bin/busybox mount -t tmpfs tmp /tmp
while true; do
    setsid cttyhack sh -l
done
"""


def make_root_disk(
    path: Path, size: int, busybox: bytes, *, files: Mapping[str, bytes] | None = None, init: str = ROOT_INIT
) -> None:
    """Make an ext4 image with a busybox system and the label `ROOT_LABEL`, without being root.

    Args:
        path: the image; an existing file is not touched.
        size: bytes.
        busybox: the static program.
        files: more files, executable.
        init: the text of ``/sbin/init``.

    Raises:
        BootError: the file exists, or mke2fs (e2fsprogs) is not there or fails.
    """
    path, size = Path(path), byte_count(size, "the root disk")
    if path.exists():
        raise BootError(f"{path} exists already")
    if shutil.which("mke2fs") is None:
        raise BootError("making a root disk needs mke2fs: install the package e2fsprogs")
    with tempfile.TemporaryDirectory(prefix="vmbus-root-") as scratch:
        tree = Path(scratch)
        for name in ("bin", "sbin", "dev", "proc", "sys", "etc", "tmp", "root"):
            (tree / name).mkdir()
        contents = {"bin/busybox": busybox, "sbin/init": init.encode(), **(files or {})}
        for name, data in contents.items():
            target = tree / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
            target.chmod(0o755)
        (tree / "bin" / "sh").symlink_to("busybox")
        options = ("-q", "-t", "ext4", "-L", ROOT_LABEL, "-E", "root_owner=0:0", "-d", str(tree))
        try:
            _run("mke2fs", *options, str(path), f"{size // 1024}k")
        except BootError:
            path.unlink(missing_ok=True)
            raise


def describe(guest: Guest) -> dict[str, object]:
    """The guest as plain values, for a report."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(guest).items()}

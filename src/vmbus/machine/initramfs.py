"""An initramfs made of one static busybox, the kernel modules that a guest needs, and a small init.

The init loads the modules, asks for network addresses if the kernel's command line says ``ip=dhcp``, wakes a
hibernated system up if it names the disk where that lies (``resume=``, ``resume_offset=``, ``noresume``), then mounts
the root disk that it names and goes on there, or gives a shell on the console. Disks are named as ``/dev/sda``,
``LABEL=name`` or ``UUID=…``: Linux looks for disks in parallel, so ``sda`` is not always LUN 0. Everything is built
here: no tool of the host is run.
"""

import hashlib
import lzma
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Final

from vmbus.machine.linux import BootError

__all__ = ["MODULES", "RECIPE", "build_initramfs", "cpio", "resolve_modules"]

MODULES: Final = (
    *("hv_vmbus", "hv_storvsc", "sd_mod", "sr_mod", "hv_netvsc", "hv_utils"),
    *("ata_piix", "ext4", "isofs"),
)
"""What a guest of this package needs, with all that these depend on; those built into the kernel are left out."""

OPTIONAL_MODULES: Final = ("tulip",)
"""Drivers of emulated hardware that a distribution's small kernels leave out."""

SECTION_STRINGS: Final = 62
ELF_HEADER: Final = struct.Struct("<40xQ10xHHH")
"""Section header table offset; section header size, count and string section, of an ELF64 header."""

INIT: Final = r"""#!/bin/busybox sh
export PATH=/bin:/sbin:/usr/bin:/usr/sbin
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mkdir -p /proc /sys /newroot /dev/pts
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devpts devpts /dev/pts
while read -r module; do
    insmod "/lib/modules/$module.ko" || echo "initramfs: cannot load $module"
done </lib/modules/order
root= init=/sbin/init type=ext4 options=rw dhcp= resume= offset= noresume=
for word in $(cat /proc/cmdline); do
    case "$word" in
        root=*) root=${word#root=} ;;
        init=*) init=${word#init=} ;;
        rootfstype=*) type=${word#rootfstype=} ;;
        ro) options=ro ;;
        ip=dhcp) dhcp=yes ;;
        resume=*) resume=${word#resume=} ;;
        resume_offset=*) offset=${word#resume_offset=} ;;
        noresume) noresume=yes ;;
    esac
done
# Print the block device that $1 names, once it is there; give up after ten seconds.
await() {
    tries=0
    while [ $tries -lt 100 ]; do
        case "$1" in
            LABEL=* | UUID=*) findfs "$1" 2>/dev/null && return ;;
            *) [ -b "$1" ] && echo "$1" && return ;;
        esac
        sleep 0.1
        tries=$((tries + 1))
    done
    echo "$1"
    return 1
}
if [ -n "$dhcp" ]; then
    tries=0
    while [ ! -e /sys/class/net/eth0 ] && [ $tries -lt 50 ]; do
        sleep 0.1
        tries=$((tries + 1))
    done
    for link in /sys/class/net/eth*; do
        link=${link##*/}
        ip link set "$link" up && udhcpc -i "$link" -n -q -t 5 -T 2 -s /etc/udhcpc.script >/dev/null 2>&1 ||
            echo "initramfs: no address for $link"
    done
fi
if [ -n "$resume" ] && [ -z "$noresume" ]; then
    if swap=$(await "$resume"); then
        [ -z "$offset" ] || echo "$offset" >/sys/power/resume_offset
        # Does not come back if a system is hibernated there.
        eval "echo $(stat -L -c '$((0x%t)):$((0x%T))' "$swap")" >/sys/power/resume
    else
        echo "initramfs: there is no $resume to resume from"
    fi
fi
if [ -n "$root" ]; then
    root=$(await "$root")
    if mount -t "$type" -o "$options" "$root" /newroot; then
        mount --move /dev /newroot/dev && mount --move /proc /newroot/proc && mount --move /sys /newroot/sys
        exec switch_root /newroot "$init"
    fi
    echo "initramfs: cannot mount $root"
fi
if [ -x /run-at-boot ]; then
    /run-at-boot
fi
while true; do
    setsid cttyhack sh -l
done
"""

DHCP_SCRIPT: Final = r"""#!/bin/busybox sh
[ "$1" = bound ] || [ "$1" = renew ] || exit 0
ip addr replace "$ip/$mask" dev "$interface"
[ -z "$mtu" ] || ip link set "$interface" mtu "$mtu"
for via in $router; do
    ip route replace default via "$via" dev "$interface"
    break
done
for server in $dns; do
    echo "nameserver $server"
done >/etc/resolv.conf
echo "$interface: $ip/$mask, router $router" >/dev/console
"""
"""What busybox's DHCP client runs with the answer in its environment."""

RECIPE: Final = hashlib.sha256(
    "\0".join((INIT, DHCP_SCRIPT, *MODULES, *OPTIONAL_MODULES)).encode()
).hexdigest()
"""Changes with everything that `build_initramfs` puts into an archive by itself: old archives are built again."""


def cpio(entries: Iterable[tuple[str, int, bytes]]) -> bytes:
    """A cpio archive in the "newc" format of `entries`: (path, mode with type bits, contents).

    Owners are root, times zero: the same entries give the same bytes.
    """
    parts: list[bytes] = []

    def add(number: int, name: str, mode: int, content: bytes, device: tuple[int, int] = (0, 0)) -> None:
        encoded = name.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(encoded), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields)
        parts.append(_aligned(header + encoded))
        parts.append(_aligned(content))

    for number, (name, mode, content) in enumerate(entries, 1):
        major_minor = (5, 1) if name == "dev/console" else (0, 0)
        add(number, name, mode, content, major_minor)
    add(0, "TRAILER!!!", 0, b"")
    return b"".join(parts)


def _aligned(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def module_info(data: bytes) -> dict[str, str]:
    """The ``.modinfo`` section of a kernel module.

    Raises:
        BootError: `data` is not a module.
    """
    try:
        if data[:5] != b"\x7fELF\x02":
            raise ValueError
        table, size, count, strings = ELF_HEADER.unpack_from(data)
        sections = [struct.unpack_from("<IIQQQQ", data, table + size * n) for n in range(count)]
        names = sections[strings][4]
        for name, _, _, _, offset, length in sections:
            if data[names + name : names + name + 9] == b".modinfo\0":
                fields = data[offset : offset + length].split(b"\0")
                return dict(field.decode().split("=", 1) for field in fields if b"=" in field)
    except (ValueError, IndexError, OverflowError, struct.error):
        pass
    raise BootError("not a kernel module (no .modinfo section)")


def _read_module(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(data)
    return data


def resolve_modules(
    folder: Path, wanted: Iterable[str] = MODULES, optional: Iterable[str] = OPTIONAL_MODULES
) -> dict[str, bytes]:
    """The modules `wanted` and all that they depend on, in an order in which they can be loaded.

    Args:
        folder: ``/lib/modules/VERSION``, as a kernel package holds it.
        wanted: module names; those that are built into the kernel are left out.
        optional: the same, but they may be missing.

    Raises:
        BootError: a module is neither there nor built in.
    """
    files = {path.name.split(".ko")[0].replace("-", "_"): path for path in sorted(folder.rglob("*.ko*"))}
    builtin_list = folder / "modules.builtin"
    builtin = set()
    if builtin_list.exists():
        lines = builtin_list.read_text().split()
        builtin = {PurePosixPath(line).name.split(".ko")[0].replace("-", "_") for line in lines}
    found: dict[str, bytes] = {}

    def need(name: str) -> None:
        name = name.replace("-", "_")
        if name in found or name in builtin:
            return
        if name not in files:
            raise BootError(f"{folder}: there is no module {name}, and the kernel does not have it built in")
        data = _read_module(files[name])
        for dependency in module_info(data).get("depends", "").split(","):
            if dependency:
                need(dependency)
        found[name] = data

    for name in (*wanted, *(name for name in optional if name in files)):
        need(name)
    return found


def build_initramfs(
    busybox: bytes, modules: Mapping[str, bytes], *, files: Mapping[str, bytes] | None = None
) -> bytes:
    """The archive: busybox, `modules` in the given order, an init that loads them, and `files` (executable).

    An executable ``run-at-boot`` among the files is run when no root disk is asked for.

    Raises:
        BootError: `busybox` is not an executable.
    """
    if busybox[:4] != b"\x7fELF":
        raise BootError("busybox is not an executable file")
    folder, executable, plain, character = 0o040755, 0o100755, 0o100644, 0o020600
    entries: list[tuple[str, int, bytes]] = [
        (name, folder, b"") for name in ("bin", "dev", "etc", "lib", "lib/modules")
    ]
    entries.append(("dev/console", character, b""))
    entries.append(("bin/busybox", executable, busybox))
    entries.append(("init", executable, INIT.encode()))
    entries.append(("etc/udhcpc.script", executable, DHCP_SCRIPT.encode()))
    entries.append(("lib/modules/order", plain, "".join(f"{name}\n" for name in modules).encode()))
    entries += [(f"lib/modules/{name}.ko", plain, data) for name, data in modules.items()]
    made = {"bin", "dev", "etc", "lib", "lib/modules"}
    for name, data in (files or {}).items():
        for parent in reversed(PurePosixPath(name).parents[:-1]):
            if str(parent) not in made:
                made.add(str(parent))
                entries.append((str(parent), folder, b""))
        entries.append((name, executable, data))
    return cpio(entries)

"""Linux's own disk drivers against the storage provider: what a day of use does to disks, on every kind of image."""

import hashlib
import os
import random
import subprocess
from pathlib import Path

import pytest
from reference.iso9660 import iso_image

from vmbus.core.memory import GpaRanges
from vmbus.machine.guest import RESUMABLE, Machine, Outcome
from vmbus.machine.initramfs import cpio
from vmbus.machine.linux import BootError
from vmbus.machine.packages import Guest, make_root_disk
from vmbus.storage.images import create_vhdx

pytestmark = [pytest.mark.guest, pytest.mark.slow]

MIB = 1 << 20
NOT_ROOT = "grep -q '^/dev/sda / ' /proc/mounts && echo /dev/sdb || echo /dev/sda"
"""Prints the other one of two disks: Linux looks for them in parallel."""
EXECUTABLE, PLAIN = 0o100755, 0o100644
APPEARS = "for i in 1 2 3 4 5 6 7 8 9; do test -b {0} && break; sleep 0.5; done; test -b {0}"
GONE = "for i in 1 2 3 4 5 6 7 8 9; do test -b {0} || break; sleep 0.5; done; test ! -e {0}"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def contents(image: Path) -> bytes:
    """The disk inside an image, as qemu-img reads it."""
    raw = image.with_suffix(".converted")
    subprocess.run(["qemu-img", "convert", "-O", "raw", image, raw], check=True)
    data = raw.read_bytes()
    raw.unlink()
    return data


def checked(*command: object) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # type: ignore[arg-type]
    assert done.returncode == 0, done.stdout + done.stderr


# Mixed random I/O with verification

WORKER = b"""#!/bin/busybox sh
# Carries out one list: "w OFFSET SIZE FROM" writes SIZE bytes of /source, "r OFFSET SIZE SHA256" reads and compares.
done=0
while read -r what offset size value; do
    case $what in
        w) dd if=/source of="$2" bs="$size" count=1 iflag=skip_bytes skip="$value" oflag=direct,seek_bytes \\
            seek="$offset" conv=notrunc 2>/dev/null || echo "$1: write of $size at $offset failed" ;;
        r) found=$(dd if="$2" bs="$size" count=1 iflag=direct,skip_bytes skip="$offset" 2>/dev/null | sha256sum)
            [ "$found" = "$value  -" ] || echo "$1: $size bytes at $offset are wrong" ;;
    esac
    done=$((done + 1))
done <"$1"
echo "$1: $done"
"""


def make_plan(seed: int, begin: int, end: int, disk: bytearray, source: bytes, count: int) -> str:
    """Random reads and writes between two offsets; `disk` becomes what it is afterwards."""
    chance = random.Random(seed)
    lines = []
    for number in range(count):
        size = min(512 << chance.randrange(9), end - begin) - 512 * chance.randrange(2)
        size = max(size, 512)
        offset = begin + 512 * chance.randrange((end - begin - size) // 512 + 1)
        if number == 0 or chance.random() < 0.5:
            start = chance.randrange(len(source) - size)
            disk[offset : offset + size] = source[start : start + size]
            lines.append(f"w {offset} {size} {start}\n")
        else:
            lines.append(f"r {offset} {size} {sha256(disk[offset : offset + size])}\n")
    return "".join(lines)


def test_mixed_random_io_with_verification(boot, shell, guest: Guest, tmp_path: Path) -> None:
    """Six jobs at once, unaligned sizes from 512 bytes to 128 KiB, O_DIRECT: on a raw image and on a VHDX."""
    seed, size, jobs, count = 20240101, 12 * MIB, 3, 40
    chance = random.Random(seed)
    source = chance.randbytes(MIB)
    raw, vhdx = tmp_path / "raw.img", tmp_path / "disk.vhdx"
    models = {"/dev/sda": bytearray(chance.randbytes(size)), "/dev/sdb": bytearray(size)}
    raw.write_bytes(models["/dev/sda"])
    create_vhdx(vhdx, size, block_size=MIB).close()
    files, commands = [("worker", EXECUTABLE, WORKER), ("source", PLAIN, source)], []
    for device, model in models.items():
        for job in range(jobs):
            name = f"plan-{device[-3:]}-{job}"
            part = size // jobs
            plan = make_plan(seed + len(files), part * job, part * (job + 1), model, source, count)
            files.append((name, PLAIN, plan.encode()))
            commands.append(f"/worker /{name} {device} &")
    machine = boot(disks=[raw, vhdx], initrd=guest.initramfs.read_bytes() + cpio(files))
    run = shell(machine)
    said = run(" ".join(commands) + " wait").splitlines()
    assert sorted(said) == sorted(f"/plan-{d[-3:]}-{j}: {count}" for d in models for j in range(jobs)), seed
    for device, model in models.items():
        assert sha256(model) in run(f"sha256sum {device}"), device
    run.power_off()
    machine.close()
    assert raw.read_bytes() == models["/dev/sda"]
    checked("qemu-img", "check", vhdx)
    assert contents(vhdx) == models["/dev/sdb"]


# A root disk in a VHDX, and a second one that comes and goes


def to_vhdx(raw: Path, target: Path) -> None:
    """Copy an image block by block into a new, dynamic VHDX; what is zero stays a hole."""
    with create_vhdx(target, raw.stat().st_size) as disk, raw.open("rb") as file:
        for offset in range(0, disk.size, MIB):
            block = file.read(MIB)
            if block.count(0) != len(block):
                disk.write(offset, block)
        disk.flush()


def test_root_on_a_vhdx_and_a_second_disk_while_it_runs(boot, shell, guest: Guest, tmp_path: Path) -> None:
    raw, root, second = tmp_path / "root.img", tmp_path / "root.vhdx", tmp_path / "second.vhdx"
    make_root_disk(raw, 96 * MIB, guest.busybox.read_bytes())
    to_vhdx(raw, root)
    raw.unlink()
    create_vhdx(second, 24 * MIB).close()
    machine = boot(disks=[root], append="console=ttyS0 quiet panic=-1 root=/dev/sda")
    run = shell(machine)
    run("grep '^/dev/sda / ext4 rw' /proc/mounts")
    run("dd if=/dev/urandom of=/file bs=64k count=256 2>/dev/null; sync")
    digest = run("sha256sum </file").split()[0]
    run("for i in $(seq 200); do echo $i >/root/$i; done; rm /root/1*; sync")

    machine.add_disk(second, 1)
    run(APPEARS.format("/dev/sdb"))
    run(
        "mke2fs -q /dev/sdb && mkdir /mnt && mount -t ext4 /dev/sdb /mnt && cp /file /mnt/copy && umount /mnt"
    )
    run("mount -t ext4 /dev/sdb /mnt")
    assert digest in run("sha256sum /mnt/copy")
    run("umount /mnt")
    machine.remove_disk(1)
    run(GONE.format("/dev/sdb"))
    run.power_off()
    machine.close()

    for image, path in ((root, "/file"), (second, "/copy")):
        checked("qemu-img", "check", image)
        plain = image.with_suffix(".raw")
        plain.write_bytes(contents(image))
        checked("e2fsck", "-fn", plain)
        found = subprocess.run(["debugfs", "-R", f"cat {path}", plain], capture_output=True, check=True)
        assert sha256(found.stdout) == digest
    listing = subprocess.run(
        ["debugfs", "-R", "ls -p /root", root.with_suffix(".raw")], capture_output=True, text=True, check=True
    ).stdout
    names = {line.split("/")[5] for line in listing.splitlines() if line.startswith("/")} - {""}
    assert names == {".", ".."} | {str(n) for n in range(1, 201) if not str(n).startswith("1")}


# Discard


def allocated(path: Path) -> int:
    """Bytes of the host's disk that a file takes."""
    os.sync()
    return path.stat().st_blocks * 512


def test_discard_frees_the_hosts_blocks(boot, shell, guest: Guest, tmp_path: Path) -> None:
    root, plain = tmp_path / "root.img", tmp_path / "plain.img"
    make_root_disk(root, 96 * MIB, guest.busybox.read_bytes())
    before = random.Random(1).randbytes(16 * MIB)
    plain.write_bytes(before)
    machine = boot(disks=[root, plain], append="console=ttyS0 quiet panic=-1 root=LABEL=root")
    run = shell(machine)
    other = run(NOT_ROOT).strip()
    run("dd if=/dev/urandom of=/file bs=1M count=24 2>/dev/null; sync")
    full = allocated(root)
    run("rm /file; sync; fstrim -v /")
    assert full - allocated(root) >= 23 * MIB, "fstrim of the mounted root file system"

    full = allocated(plain)
    run(f"blkdiscard -o 4M -l 8M {other}")
    assert full - allocated(plain) >= 8 * MIB, "blkdiscard of a part of a disk"
    after = before[: 4 * MIB] + bytes(8 * MIB) + before[12 * MIB :]
    run("echo 3 >/proc/sys/vm/drop_caches")
    assert sha256(after) in run(f"sha256sum {other}")
    run.power_off()
    machine.close()
    assert plain.read_bytes() == after
    checked("e2fsck", "-fn", root)


# A CD-ROM


def test_a_disc_is_read(boot, shell, image: Path, tmp_path: Path) -> None:
    data = random.Random(2).randbytes(3 * MIB + 77)
    disc = tmp_path / "disc.iso"
    disc.write_bytes(iso_image({"README.TXT": b"a disc\n", "DATA.BIN": data}))
    before = disc.read_bytes()
    machine = boot(disks=[image], cdroms=[disc], append="console=ttyS0 panic=-1")
    run = shell(machine)
    assert "CD-ROM" in machine.console.text
    run("test -b /dev/sda && test -b /dev/sr0")
    assert str(len(before) // 512) in run("cat /sys/block/sr0/size").split()
    run("mkdir /mnt && mount -t iso9660 -o ro /dev/sr0 /mnt")
    assert run("ls /mnt").split() == ["data.bin", "readme.txt"]
    assert "a disc" in run("cat /mnt/readme.txt")
    assert sha256(data) in run("sha256sum /mnt/data.bin")
    assert sha256(before) in run("sha256sum /dev/sr0")
    run("umount /mnt")
    run("dd if=/dev/zero of=/dev/sr0 bs=2048 count=1 conv=fsync", check=False)
    run.power_off()
    machine.close()
    assert disc.read_bytes() == before, "a disc is only read"


# Hostile contents of the pages that guest and host share


@pytest.mark.parametrize("target", ["message page", "event-flag page", "monitor pages", "rings"])
def test_garbage_in_shared_pages_harms_the_guest_only(boot, shell, image: Path, target: str) -> None:
    """What a guest's memory holds is its own affair: here all of a shared page is overwritten while it runs."""
    before = image.read_bytes()
    machine: Machine = boot(disks=[image])
    shell(machine)
    chance = random.Random(target)
    pages = shared_pages(machine, target)
    assert pages
    for _ in range(3):
        for page in pages:
            machine.partition.memory.write(page << 12, chance.randbytes(4096))
        machine.console.send("dd if=/dev/sda of=/dev/null bs=64k iflag=direct count=8; echo DO''NE\n")
        result = machine.run(until="DONE", virtual_seconds=3.0, wall_seconds=60.0)
        assert result.outcome is not Outcome.WALL_TIME, "it hangs"
        if result.outcome not in RESUMABLE:
            break
    machine.bus.machine.check()
    machine.close()
    assert image.read_bytes() == before


def shared_pages(machine: Machine, target: str) -> list[int]:
    """Numbers of the guest's pages that `target` names."""
    synic, bus = machine.partition.vps[0].synic, machine.bus.machine
    assert bus.monitor_pages is not None
    match target:
        case "message page":
            return [synic.simp >> 12]
        case "event-flag page":
            return [synic.siefp >> 12]
        case "monitor pages":
            return [bus.monitor_pages.parent_to_child >> 12, bus.monitor_pages.child_to_parent >> 12]
        case _:
            ranges = [GpaRanges.parse(bytes(gpadl.data), gpadl.count) for gpadl in bus.gpadls.values()]
            return [pfn for parts in ranges for part in parts for pfn in part.pfns]


# Without enlightenments


def test_the_same_disk_with_and_without_enlightenments(boot, shell, guest: Guest, tmp_path: Path) -> None:
    """Linux's ata_piix on the emulated controller, then hv_storvsc: the same image, the same work, other exits."""
    image, second = tmp_path / "root.img", tmp_path / "second.img"
    make_root_disk(image, 48 * MIB, guest.busybox.read_bytes())
    second.write_bytes(random.Random(3).randbytes(2 * MIB))
    digest, exits, written = sha256(second.read_bytes()), [], []
    for enlightened, driver in ((False, "ata_piix"), (True, "hv_storvsc")):
        machine = boot(
            disks=[image, second],
            enlightenments=enlightened,
            append="console=ttyS0 quiet panic=-1 root=LABEL=root",
        )
        run = shell(machine)
        run("grep -E '^/dev/sd[ab] / ext4 rw' /proc/mounts")
        other = run(NOT_ROOT).strip()
        assert driver in run("cat /sys/class/scsi_host/host0/proc_name").replace("storvsc_host", "hv_storvsc")
        account = machine.partition.account
        before = account.exits.total()
        assert digest in run(f"dd if={other} bs=64k iflag=direct 2>/dev/null | sha256sum")
        exits.append(account.exits.total() - before)
        if not enlightened:
            interrupts = int(run("grep ata_piix /proc/interrupts").split()[1])
            sectors = account.exits["io_port"] // 128
            assert interrupts < sectors / 8, "READ MULTIPLE: one for sixteen sectors, not one for each"
        name = f"/file-{driver}"
        written.append(
            (name, run(f"dd if=/dev/urandom of={name} bs=64k count=32 2>/dev/null; sha256sum <{name}"))
        )
        run.power_off()
        machine.close()
    checked("e2fsck", "-fn", image)
    for name, said in written:
        found = subprocess.run(
            ["debugfs", "-R", f"cat {name}", image], capture_output=True, check=True
        ).stdout
        assert len(found) == 2 * MIB
        assert sha256(found) in said
    assert second.stat().st_size == 2 * MIB
    assert sha256(second.read_bytes()) == digest
    emulated, fast = exits
    assert emulated > 2 * MIB // 4, "every 32-bit word of data is an exit"
    assert fast < emulated / 100


def test_more_disks_than_the_emulated_controller_takes(boot, tmp_path: Path) -> None:
    images = [tmp_path / str(n) for n in range(5)]
    for path in images:
        path.write_bytes(bytes(MIB))
    with pytest.raises(BootError, match="up to 4 disks"):
        boot(enlightenments=False, disks=images)

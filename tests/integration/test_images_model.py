"""Random work on every kind of image, beside a bytearray; then other programs read what is left."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference.disk_model import (
    FAST,
    apply,
    check_extents,
    fast_folder,
    library,
    operations,
    pattern,
    qemu_img,
)
from reference.image_readers import read_vhd, read_vhdx

from vmbus.storage.images import create_vhd, create_vhdx, open_disk

MIB = 1 << 20
tmp_path = pytest.fixture(fast_folder, name="tmp_path")


def examples(number: int) -> settings:
    number = int(os.environ.get("VMBUS_EXAMPLES", str(number)))
    calm = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=number, deadline=None, suppress_health_check=calm)


KINDS = {
    "vhd-fixed": {"variant": "fixed"},
    "vhd-dynamic": {"block_size": 64 << 10},
    "vhdx-fixed-512": {"variant": "fixed", "block_size": MIB},
    "vhdx-dynamic-512": {"block_size": MIB},
    "vhdx-dynamic-4096": {"block_size": MIB, "sector_size": 4096},
}
QEMU_FORMATS = {"vhd": "vpc", "vhdx": "vhdx"}


def create(kind: str, path: Path, size: int, parent: Path | None = None) -> None:
    make: Any = create_vhdx if kind.startswith("vhdx") else create_vhd
    arguments: dict[str, Any] = dict(KINDS[kind])
    if parent is not None:
        arguments |= {"variant": "differencing", "parent": parent}
    make(path, size, **arguments).close()


def geometry(kind: str) -> tuple[int, int, int]:
    """Disk size, sector size, block size; the disk ends inside a block."""
    sector = 4096 if kind.endswith("4096") else 512
    block = int(KINDS[kind].get("block_size", MIB))
    return 3 * block + 5 * sector, sector, block


def judge(kind: str, chain: Sequence[Path], model: bytes) -> None:
    """Readers that are not ours find the same content."""
    read = read_vhdx if kind.startswith("vhdx") else read_vhd
    assert read(chain) == model
    if len(chain) > 1 or kind.endswith("4096"):
        return  # QEMU reads neither differencing images nor 4096-byte sectors
    raw = chain[0].with_suffix(".raw")
    raw.write_bytes(model)
    qemu_format = QEMU_FORMATS[chain[0].suffix[1:]]
    qemu_img("compare", "-f", qemu_format, "-F", "raw", chain[0], raw)
    if qemu_format == "vhdx":  # there is no check for vpc
        qemu_img("check", "-f", "vhdx", chain[0])


def random_work_on_one_image(kind: str, data: st.DataObject) -> None:
    size, sector, block = geometry(kind)
    with tempfile.TemporaryDirectory(dir=FAST) as folder:
        path = Path(folder, f"image.{kind.split('-', maxsplit=1)[0]}")
        create(kind, path, size)
        model = bytearray(size)
        disk = open_disk(path)
        for operation in data.draw(operations(size // sector, block // sector)):
            if operation[0] == "reopen":
                disk.close()
                disk = open_disk(path)
            apply(disk, model, operation)
        assert disk.read(0, size) == model
        check_extents(disk, model, 0, size)
        disk.close()
        judge(kind, [path], bytes(model))


def random_work_on_a_chain(kind: str, data: st.DataObject) -> None:
    size, sector, block = geometry(kind)
    with tempfile.TemporaryDirectory(dir=FAST) as folder:
        chain: list[Path] = []
        model = bytearray(size)
        for level in range(3):
            path = Path(folder, f"level{level}.{kind.split('-', maxsplit=1)[0]}")
            create(kind, path, size, chain[0] if chain else None)
            disk = open_disk(path)
            for operation in data.draw(operations(size // sector, block // sector)):
                if operation[0] == "reopen":
                    disk.close()
                    disk = open_disk(path)
                apply(disk, model, operation)
            assert disk.read(0, size) == model
            check_extents(disk, model, 0, size)
            disk.close()
            chain.insert(0, path)
            judge(kind, chain, bytes(model))


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@examples(3)
def test_an_image_is_a_disk(kind: str, data: st.DataObject) -> None:
    random_work_on_one_image(kind, data)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@examples(40)
def test_an_image_is_a_disk_for_long(kind: str, data: st.DataObject) -> None:
    random_work_on_one_image(kind, data)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@examples(1)
def test_a_chain_of_differencing_images_is_a_disk(kind: str, data: st.DataObject) -> None:
    random_work_on_a_chain(kind, data)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@examples(15)
def test_a_chain_of_differencing_images_is_a_disk_for_long(kind: str, data: st.DataObject) -> None:
    random_work_on_a_chain(kind, data)


@pytest.mark.parametrize("kind", KINDS)
def test_libvhdi_reads_our_chains(kind: str, tmp_path: Path) -> None:
    # libvhdi takes a VHD's bitmap to change at whole bytes only, and knows no zeroed blocks in differencing images.
    pyvhdi = library("pyvhdi")
    size, sector, block = geometry(kind)
    grain = 1 if kind.startswith("vhdx") else 8
    model, chain = bytearray(size), []
    for level in range(3):
        path = tmp_path / f"level{level}.{kind.split('-', maxsplit=1)[0]}"
        create(kind, path, size, path.with_stem(f"level{level - 1}") if level else None)
        with open_disk(path) as disk:
            for number, at in enumerate(range(level, size // sector // grain - 5, 37 * (level + 1))):
                apply(disk, model, ("write", at * grain, (1 + number % 5) * grain, level * 50))
            if not level:
                apply(disk, model, ("unmap", block // sector, block // sector, 0))
        image = pyvhdi.file()
        image.open(os.fspath(path))
        if chain:
            image.set_parent(chain[-1])
        chain.append(image)
        assert image.get_media_size() == size
        image.seek_offset(0, os.SEEK_SET)
        assert image.read_buffer(size) == bytes(model)
    for image in reversed(chain):
        image.close()


@pytest.mark.parametrize("subformat", ["dynamic", "fixed"])
@pytest.mark.parametrize("suffix", ["vhd", "vhdx"])
def test_images_that_qemu_made(suffix: str, subformat: str, tmp_path: Path) -> None:
    size = 24 * MIB
    raw, image = tmp_path / "start.raw", tmp_path / f"image.{suffix}"
    model = bytearray(size)
    for at in (0, 3 * MIB + 512, 11 * MIB, size - 4096):
        model[at : at + 4096] = pattern(at % 251, 0, 4096)
    raw.write_bytes(model)
    options = f"subformat={subformat}" + (",force_size=on" if suffix == "vhd" else "")
    qemu_img("convert", "-f", "raw", "-O", QEMU_FORMATS[suffix], "-o", options, raw, image)
    with open_disk(image) as disk:
        assert (disk.size, disk.sector_size) == (size, 512)
        assert disk.read(0, size) == model
        check_extents(disk, model, 0, size)
        for operation in [
            ("write", 1, 3, 7),
            ("write", 8 * 2048, 5000, 9),
            ("unmap", 6 * 2048, 9 * 2048, 0),
            ("write", 13 * 2048 - 1, 2, 11),
            ("zeros", 0, 2, 0),
        ]:
            apply(disk, model, operation)
    raw.write_bytes(model)
    qemu_img("compare", "-f", QEMU_FORMATS[suffix], "-F", "raw", image, raw)
    if suffix == "vhdx":
        qemu_img("check", image)
    again = tmp_path / "again.raw"
    qemu_img("convert", "-f", QEMU_FORMATS[suffix], "-O", "raw", image, again)
    assert again.read_bytes() == model


@pytest.mark.parametrize("suffix", ["vhd", "vhdx"])
def test_qemu_writes_into_our_images(suffix: str, tmp_path: Path) -> None:
    size = 9 * MIB
    image, raw = tmp_path / f"image.{suffix}", tmp_path / "content.raw"
    make: Any = create_vhd if suffix == "vhd" else create_vhdx
    with make(image, size, block_size=MIB * 2) as disk:
        disk.write(MIB, pattern(3, 0, MIB))
    model = bytearray(size)
    for at in range(0, size, 3 * 512 * 7):
        model[at : at + 512] = pattern(5, at // 512, 512)[: size - at]
    raw.write_bytes(model)
    qemu_img("convert", "-n", "-f", "raw", "-O", QEMU_FORMATS[suffix], raw, image)
    with open_disk(image, read_only=True) as disk:
        assert disk.read(0, size) == model

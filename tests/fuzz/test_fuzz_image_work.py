"""Fuzz target: images of an attacker who knows every checksum. What is judged is the work that they make.

Not by a clock: by lines of Python and bytes read, both bounded by the size of the files that are there.
"""

import random
from contextlib import suppress
from pathlib import Path
from uuid import UUID

import pytest
from reference.disk_model import fast_folder
from reference.disk_user import use
from reference.fuzz import Fuzz
from reference.image_builder import build_vhd, build_vhdx
from reference.work import bounded

from vmbus.storage.disk import DiskError
from vmbus.storage.images import open_disk

MIB = 1 << 20
tmp_path = pytest.fixture(fast_folder, name="tmp_path")


def judge(rng: random.Random, image: Path) -> None:
    """Refused with a sentence and unchanged, or a disk: both after work in proportion to the files."""
    for read_only in (True, False):
        before = image.read_bytes()
        total = sum(file.stat().st_size for file in image.parent.iterdir())
        disk, sentence = None, ""
        try:
            with bounded(lines=20_000 + total, read=3 * total + MIB):
                disk = open_disk(image, read_only=read_only)
        except DiskError as error:
            sentence = str(error)
        if disk is None:
            assert sentence.isprintable()
            assert 10 < len(sentence) <= 1010
            assert image.read_bytes() == before
            continue
        with disk, bounded(lines=400_000 + total, read=3 * total + 64 * MIB):
            # A request makes work in proportion to itself; a disk of 64 TiB may have as many runs as its table.
            use(rng, disk, 6, may_raise=(DiskError,))
            assert sum(extent.length for extent in disk.extents(0, disk.size)) == disk.size
        if read_only:
            assert image.read_bytes() == before


def test_vhdx(fuzz: Fuzz, tmp_path: Path) -> None:
    def case(rng: random.Random) -> None:
        for old in tmp_path.iterdir():
            old.unlink()
        parent = ""
        if rng.random() < 0.3:
            parent = rng.choice(
                ["parent", ".\\parent", "..\\parent", str(tmp_path / "parent"), "image", "/dev/null"]
            )
            (tmp_path / "parent").write_bytes(build_vhdx(rng))
        image = tmp_path / "image"
        image.write_bytes(build_vhdx(rng, parent, UUID(int=2)))
        judge(rng, image)

    fuzz.run(case, cases=600)


def test_vhd(fuzz: Fuzz, tmp_path: Path) -> None:
    def case(rng: random.Random) -> None:
        for old in tmp_path.iterdir():
            old.unlink()
        parent = ""
        if rng.random() < 0.5:
            parent = rng.choice(["parent", ".\\parent", str(tmp_path / "parent"), "image", "/dev/null"])
            (tmp_path / "parent").write_bytes(build_vhd(rng))
        image = tmp_path / "image"
        image.write_bytes(build_vhd(rng, parent, UUID(int=5)))
        judge(rng, image)

    fuzz.run(case, cases=1500)


@pytest.mark.parametrize("build", [build_vhd, build_vhdx])
def test_most_of_what_is_built_without_a_twist_is_opened(build, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Else the targets above would only try the first check."""
    opened = 0
    for seed in range(60):
        image = tmp_path / "image"
        image.write_bytes(build(random.Random(seed)))
        with suppress(DiskError):
            open_disk(image, read_only=True).close()
            opened += 1
    assert opened > 15

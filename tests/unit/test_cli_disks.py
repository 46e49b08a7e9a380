"""How disks are named on the command line."""

import argparse
from pathlib import Path

import pytest

from vmbus.cli.disks import DiskArgument, disk


@pytest.mark.parametrize(
    ("text", "argument"),
    [
        ("root.img", DiskArgument("root.img")),
        ("root.img,format=raw", DiskArgument("root.img", format="raw")),
        ("root.img,read-only", DiskArgument("root.img", read_only=True)),
        ("root.img,read-only=on", DiskArgument("root.img", read_only=True)),
        ("root.img,read-only=off", DiskArgument("root.img")),
        ("a.vhdx,format=vhdx,read-only", DiskArgument("a.vhdx", "vhdx", True)),
        ("a.vhd,read-only,parents=deny,format=vhd", DiskArgument("a.vhd", "vhd", True, "deny")),
        ("a.vhd,format=vhd,format=raw", DiskArgument("a.vhd", "raw")),
        ("a,b.img", DiskArgument("a,b.img")),
        ("a,b.img,read-only", DiskArgument("a,b.img", read_only=True)),
        ("a,format=raw,b.img", DiskArgument("a,format=raw,b.img")),
        ("a,,b.img", DiskArgument("a,b.img")),
        ("a,,read-only", DiskArgument("a,read-only")),
        ("a,,read-only,read-only", DiskArgument("a,read-only", read_only=True)),
        ("a,,,read-only", DiskArgument("a,", read_only=True)),
        ("a,,,,read-only", DiskArgument("a,,read-only")),
        (",,format=raw,format=raw", DiskArgument(",format=raw", format="raw")),
        ("/dev/disk/by-id/x,y", DiskArgument("/dev/disk/by-id/x,y")),
        ("nbd+unix:///data?socket=/run/nbd.sock", DiskArgument("nbd+unix:///data?socket=/run/nbd.sock")),
        ("nbd://host//two//slashes,read-only", DiskArgument("nbd://host//two//slashes", read_only=True)),
    ],
)
def test_places_and_options(text: str, argument: DiskArgument) -> None:
    assert disk(text) == argument


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a.img,format=qcow2", "format= is one of raw, vhd, vhdx"),
        ("a.img,format", "format= is one of raw, vhd, vhdx"),
        ("a.img,parents=some", "parents= is one of allow, same-folder, deny"),
        ("a.img,read-only=perhaps", "read-only has no value, or on or off"),
        ("a.img,readonly", "the options are format=, read-only and parents="),
        ("a.img,ro", "the options are"),
        ("", "names no image"),
        (",read-only", "names no image"),
    ],
)
def test_what_is_no_option_of_a_disk(text: str, sentence: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=sentence):
        disk(text)


def test_a_disk_is_opened_as_it_was_typed(tmp_path: Path) -> None:
    path = tmp_path / "root,read-only"
    path.write_bytes(bytes(4096))
    typed = str(path).replace(",", ",,")
    with disk(typed).open() as opened:
        assert not opened.read_only
    with disk(typed).open(read_only=True) as opened:
        assert opened.read_only
    with disk(f"{typed},read-only").open() as opened:
        assert opened.read_only

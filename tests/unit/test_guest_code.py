"""The shipped machine code is what its source assembles to."""

import shutil
import subprocess
from pathlib import Path

import pytest

from vmbus.emulated import guest
from vmbus.emulated.guest import ata_pio

SOURCE = Path(guest.__file__).with_name("ata_pio.S")


@pytest.fixture(scope="module")
def assembled(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, dict[str, int], dict[str, int]]:
    """The text section, its symbols, and the absolute symbols of the source."""
    if shutil.which("as") is None or shutil.which("objcopy") is None:
        pytest.skip("needs GNU as and objcopy (binutils)")
    at = tmp_path_factory.mktemp("as")
    subprocess.run(["as", "--64", "-o", at / "code.o", SOURCE], check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", at / "code.o", at / "code.bin"], check=True)
    table = subprocess.run(["nm", at / "code.o"], check=True, capture_output=True, text=True).stdout.split(
        "\n"
    )
    symbols = [line.split() for line in table if line]
    text = {name: int(value, 16) for value, kind, name in symbols if kind in "tT"}
    absolute = {name: int(value, 16) for value, kind, name in symbols if kind in "aA"}
    return (at / "code.bin").read_bytes(), text, absolute


def test_the_shipped_bytes_are_the_assembled_source(
    assembled: tuple[bytes, dict[str, int], dict[str, int]],
) -> None:
    code, text, _ = assembled
    assert code == ata_pio.CODE
    assert text["start"] == ata_pio.START
    assert text["isr"] == ata_pio.ISR


def test_the_source_and_the_host_agree_on_the_requests(
    assembled: tuple[bytes, dict[str, int], dict[str, int]],
) -> None:
    _, _, absolute = assembled
    assert absolute["REQUEST"] == guest.Request.SIZE
    for field in ("buffer", "lba", "sectors", "operation", "flags", "block", "result"):
        assert absolute[field.upper()] == guest.Request.OFFSETS[field]
    for operation in guest.Operation:
        assert absolute[operation.name] == operation
    for flag in guest.Flag:
        assert absolute[str(flag.name)] == flag
    for name in ("TIMEOUT", "FAILED", "BAD_REQUEST"):
        assert absolute[name] == getattr(guest, name)

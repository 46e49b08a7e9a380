"""Other people's Cython can `cimport` the ring from the installed package."""

import os
import shutil
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

import vmbus
from vmbus.core.memory import Window
from vmbus.core.ring import RingReader, RingWriter


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`cimport_user.pyx`, compiled in a folder that holds nothing of ours but that file."""
    folder = tmp_path_factory.mktemp("user")
    source = shutil.copy(Path(__file__).with_name("cimport_user.pyx"), folder)
    where_vmbus_is = str(Path(vmbus.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": where_vmbus_is, "CFLAGS": "-O1"}
    command = [sys.executable, "-m", "Cython.Build.Cythonize", "--inplace", "-3", source]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    spec = spec_from_file_location("cimport_user", next(folder.glob("cimport_user.*.so")))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_numbers_go_through_the_ring_without_the_gil(user: Any) -> None:
    count = 100_000
    total, signals, fullest = user.pump(Window.allocate(3), count)
    assert total == count * (count - 1) // 2
    # 32 bytes a packet: 16 descriptor, 8 payload, 8 trailer; 8 bytes of the three pages always stay free
    assert fullest == (3 * 4096 - 8) // 32
    assert signals == -(-count // fullest), "one signal each time the empty ring became non-empty"


def test_a_ring_of_python_objects_is_shared_with_c(user: Any) -> None:
    window = Window.allocate(1)
    writer, reader = RingWriter(window), RingReader(window)
    assert user.write_numbers(writer, 10) is True
    assert reader.recv_batch() == [number.to_bytes(8, "little") for number in range(10)]
    assert writer.packets == 10
    writer.send_batch([b"12345678"] * 7)
    assert user.count_packets(reader) == 7
    assert reader.packets_read == 17


def test_c_errors_arrive_as_codes(user: Any) -> None:
    window = Window.allocate(1)
    with pytest.raises(RuntimeError, match="-1"):
        user.write_numbers(RingWriter(window), 1000)

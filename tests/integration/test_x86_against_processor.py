"""The interpreter against the processor that this runs on: random instructions, all state compared after each."""

import platform
import shutil
from pathlib import Path

import pytest
from reference.seeds import chosen_seed
from reference.x86_native import run

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or platform.system() != "Linux" or shutil.which("gcc") is None,
    reason="executes x86-64 instructions on the host: needs Linux on such a processor, and gcc",
)


@pytest.mark.parametrize("seed", [1, 2])
def test_random_instructions_act_as_on_the_processor(seed: int, tmp_path: Path) -> None:
    pair = run(seed, 1500, tmp_path)
    assert pair.executed > 1400
    assert pair.refused > 0


@pytest.mark.slow
def test_many_random_instructions_act_as_on_the_processor(tmp_path: Path) -> None:
    seed = chosen_seed()
    print(f"seed {seed}")
    pair = run(seed, 30_000, tmp_path)
    assert pair.executed > 28_000

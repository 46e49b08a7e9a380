"""Differential tests of the interpreter: random instructions, all state compared after each of them.

Rerun a failure with ``python -c "from reference.x86_lockstep import run; run(SEED, BITS, 10**5)"`` in tests/.
"""

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("unicorn", reason="the differential tests compare with Unicorn (extra `guest`)")

from reference.seeds import chosen_seed
from reference.x86_lockstep import Lockstep, run
from reference.x86_programs import Programs


@pytest.mark.parametrize("bits", [64, 32])
@pytest.mark.parametrize("seed", [1, 2])
def test_random_instructions_act_as_in_unicorn(seed: int, bits: int) -> None:
    pair = run(seed, bits, 1500)
    assert pair.executed > 1300
    assert pair.refused > 0


@pytest.mark.slow
@pytest.mark.parametrize("bits", [64, 32])
def test_many_random_instructions_act_as_in_unicorn(bits: int) -> None:
    seed = chosen_seed()
    print(f"seed {seed}")
    pair = run(seed, bits, 20_000)
    assert pair.executed > 17_000


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rng=st.randoms(use_true_random=False), bits=st.sampled_from([64, 32]))
def test_short_programs_act_as_in_unicorn(rng: random.Random, bits: int) -> None:
    pair = Lockstep(random.Random(5), bits)
    programs = Programs(rng, bits)
    for _ in range(12):
        pair.step(programs.draw())

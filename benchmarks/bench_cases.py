"""Every contestant of every comparison as a pytest-benchmark case, grouped by comparison."""

import importlib

import pytest
from _pytest.mark import ParameterSet
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.__main__ import TOPICS
from benchmarks.harness import Case, Comparison, calibrate

OPERATIONS = 1000


def contestants() -> list[ParameterSet]:
    """One parameter set for each contestant of the topics that declare their comparisons."""
    found: list[ParameterSet] = []
    for topic in TOPICS:
        comparisons: list[Comparison] = getattr(
            importlib.import_module(f"benchmarks.{topic}"), "COMPARISONS", []
        )
        for comparison in comparisons:
            for case in comparison.cases():
                name = f"{topic}: {comparison.what}: {case.name}"
                found.append(pytest.param(comparison.what, case, id=name.encode("ascii", "replace").decode()))
    return found


@pytest.mark.parametrize(("what", "case"), contestants())
def test_case(benchmark: BenchmarkFixture, what: str, case: Case) -> None:
    reason = case.missing()
    if reason is not None:
        pytest.skip(f"{case.name}: {reason}")
    benchmark.group = f"{what} ({OPERATIONS} operations)"
    with case.open() as run:
        assert calibrate([run], 0.0001) > 0
        benchmark(run, OPERATIONS)

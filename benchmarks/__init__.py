"""Ours beside the peers, in one run: ``python -m benchmarks``, or case by case with pytest-benchmark:
``pytest benchmarks --benchmark-enable``.

Each topic is a module with ``rows(quick: bool) -> Iterable[Row]``; most declare a ``COMPARISONS`` list and leave the
measuring to `benchmarks.harness`.
"""

"""The recorded sequence in docs/storage.md is what a run gives today."""

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_sequence_diagram_is_a_real_run() -> None:
    recorded = "\n".join(runpy.run_path(str(DOCS / "diagrams" / "storage_sequence.py"))["record"]())
    assert f"```mermaid\n{recorded}\n```" in (DOCS / "storage.md").read_text(encoding="utf-8")

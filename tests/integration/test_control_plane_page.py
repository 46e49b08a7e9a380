"""The sequence diagrams of the page and of the README are those of a run made now."""

import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_diagrams_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, DOCS / "control_plane_diagram.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_diagrams_show_the_whole_run() -> None:
    page = (DOCS / "control-plane.md").read_text(encoding="utf-8")
    new, old = page.split("<!-- generated: version 1.1 -->")
    old = old.partition("<!-- end")[0]
    for name in (
        "INITIATE_CONTACT",
        "GPADL_BODY",
        "OPEN_CHANNEL_RESULT",
        "RESCIND_CHANNEL_OFFER",
        "UNLOAD_COMPLETE",
    ):
        assert name in new
        assert name in old
    assert "MODIFY_CHANNEL_RESPONSE" in new
    assert "MODIFY_CHANNEL" not in old
    assert "sub-channel 1" in new

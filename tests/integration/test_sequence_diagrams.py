"""The sequence diagrams of the pages and of README.md are those of runs made now."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/control-plane.md", "docs/storage.md", "docs/network.md")


def diagrams(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, root / "docs" / "diagrams", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_diagrams_are_up_to_date() -> None:
    done = diagrams(ROOT, "--check")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES)
def test_a_diagram_that_was_changed_by_hand_is_found_and_drawn_again(tmp_path: Path, page: str) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "README.md", tmp_path)
    changed = tmp_path / page
    before, mark, rest = changed.read_text(encoding="utf-8").partition("sequenceDiagram\n")
    assert mark
    changed.write_text(f"{before}{mark}    Note over H: drawn by hand\n{rest}", encoding="utf-8")
    done = diagrams(tmp_path, "--check")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [f"{changed.name} is out of date: run python docs/diagrams"]
    assert diagrams(tmp_path).returncode == 0
    for name in PAGES:
        assert (tmp_path / name).read_bytes() == (ROOT / name).read_bytes()


def test_the_control_planes_diagrams_show_the_whole_run() -> None:
    page = (ROOT / "docs" / "control-plane.md").read_text(encoding="utf-8")
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

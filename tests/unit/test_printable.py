"""Text of strangers in messages: nothing of it reaches a terminal as a command."""

import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmbus.cli import main
from vmbus.errors import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain words, ümlauts, 漢字 and C:\\paths\\stay", "plain words, ümlauts, 漢字 and C:\\paths\\stay"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("two\r\nlines\tand a tab", r"two\r\nlines\tand a tab"),
        ("\x9b31m, the C1 form", r"\x9b31m, the C1 form"),
        ("exe\u202egpj.", r"exe\u202egpj."),
        (
            "isolate \u2066 zero width \u200b end of line \u2028",
            r"isolate \u2066 zero width \u200b end of line \u2028",
        ),
        ("lone surrogate \ud800 and \udcff", r"lone surrogate \ud800 and \udcff"),
        ("\U000e0041 of the tags", r"\U000e0041 of the tags"),
        ("", ""),
    ],
)
def test_what_is_shown(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_a_long_text_keeps_its_beginning_and_its_end() -> None:
    shown = printable("begin" + "x" * 1_000_000 + "end", limit=30)
    assert shown.startswith("begin")
    assert shown.endswith("end")
    assert len(shown) == 31
    assert printable("x" * 30, limit=30) == "x" * 30


@given(st.text(), st.integers(3, 300))
def test_only_glyphs_are_left_and_the_length_is_bounded(text: str, limit: int) -> None:
    shown = printable(text, limit)
    assert all(unicodedata.category(char)[0] not in "CZ" or char == " " for char in shown)
    assert len(shown) <= 10 * limit + 1
    shown.encode()


def test_what_the_command_says_about_an_error_is_one_safe_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Whoever named the file: an archive, a download, an image."""
    assert main(["compare", "--disk", str(tmp_path / "\x1b]0;title\x07\u202e\nvmbus: all is well")]) == 2
    said = capsys.readouterr().err
    assert said.endswith("\n")
    assert said[:-1].isprintable()
    assert r"\x1b]0;title\x07\u202e\nvmbus" in said

"""What README.md shows is what happens."""

import os
import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def test_the_example_runs_as_it_stands(tmp_path: Path) -> None:
    ((example, shown),) = re.findall(
        r"^```python\n(.*?)^```\n.*?^```text\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL
    )
    assert len([line for line in example.splitlines() if line.strip()]) <= 15
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", example],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == shown

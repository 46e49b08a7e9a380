"""docs/budgets.md says what the code does: its example runs, its table lists every budget with its default."""

import inspect
import re
from dataclasses import fields
from pathlib import Path

from vmbus import Budget
from vmbus.hypervisor.hypervisor import PARTITION_COST

PAGE = (Path(__file__).parents[2] / "docs" / "budgets.md").read_text(encoding="utf-8")


def test_the_example_runs(capsys):
    example = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert example is not None
    scope = {}
    exec(example[1], scope)
    shown = re.search(r"# (<Allowance.*>)$", example[1], re.MULTILINE)
    assert shown is not None
    assert capsys.readouterr().out.strip() == shown[1]
    scope["hv"].close()


def test_every_budget_is_listed():
    rows = dict(re.findall(r"^\| `(\w+)` \| ([\d,]+|no limit) \|", PAGE, re.MULTILINE))
    defaults = {field.name: getattr(Budget(), field.name) for field in fields(Budget)}
    assert rows == {
        name: "no limit" if default is None else f"{default:,}" for name, default in defaults.items()
    }
    assert f"{PARTITION_COST >> 20} MiB for a partition" in PAGE
    for name in defaults:
        assert f"\n    {name}: " in (inspect.getdoc(Budget) or "")

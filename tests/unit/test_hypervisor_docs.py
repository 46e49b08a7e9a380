"""docs/hypervisor.md says what the code does: its first example runs, its tables list everything there is."""

import re
from pathlib import Path

from vmbus.hypervisor.abi import RepCall
from vmbus.hypervisor.hypercalls import CALLS
from vmbus.hypervisor.personality import PERSONALITIES

PAGE = (Path(__file__).parents[2] / "docs" / "hypervisor.md").read_text(encoding="utf-8")


def test_the_example_runs(capsys):
    example = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert example is not None
    exec(example[1], {})
    assert capsys.readouterr().out == "0 42 b'hello'\n"


def test_every_hypercall_is_listed():
    listed = {
        int(code, 16): form
        for code, form in re.findall(r"^\| (0x\w+) \| Hv\w+ \| (\w+) \|", PAGE, re.MULTILINE)
    }
    assert listed == {code: "rep" if isinstance(call, RepCall) else "simple" for code, call in CALLS.items()}


def test_every_personality_is_listed():
    rows = re.findall(r"^\| ([\w-]+) \| (yes|no) \| ([\d.-]+) \| ([\w, -]+) \|", PAGE, re.MULTILINE)
    assert {name for name, *_ in rows} == set(PERSONALITIES)
    for name, visible, version, drivers in rows:
        personality = PERSONALITIES[name]
        assert (visible == "yes") == personality.hypervisor_present
        major, minor = personality.vmbus_version >> 16, personality.vmbus_version & 0xFFFF
        assert version == (f"{major}.{minor}" if personality.vmbus_version else "-")
        assert drivers == (", ".join(sorted(personality.enlightened)) or "-")

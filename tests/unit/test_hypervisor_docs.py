"""docs/hypervisor.md says what the code does: its first example runs, its tables list everything there is."""

import re
from pathlib import Path

from vmbus.hypervisor.abi import RepCall
from vmbus.hypervisor.hypercalls import CALLS
from vmbus.hypervisor.personality import PERSONALITIES
from vmbus.trace.names import hypercall_name

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
    names = {
        int(code, 16): name for code, name in re.findall(r"^\| (0x\w+) \| (Hv\w+) \|", PAGE, re.MULTILINE)
    }
    assert names == {code: hypercall_name(code) for code in CALLS}


NVSP = {0: "-", 0x2: "1", 0x3_0002: "2", 0x4_0000: "4", 0x5_0000: "5", 0x6_0000: "6", 0x6_0001: "6.1"}


def version(number, bits):
    return f"{number >> bits}.{number & (1 << bits) - 1}" if number else "-"


def test_every_personality_is_listed():
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.partition("| personality |")[2].splitlines()[2:]
        if line.startswith("|")
    ]
    expected = [
        [
            name,
            "yes" if p.hypervisor_present else "no",
            version(p.vmbus_version, 16),
            ", ".join(sorted(p.enlightened)) or "-",
            version(p.storage_version, 8),
            NVSP[p.network_version],
            ("yes" if p.auto_eoi else "deprecated") if p.hypervisor_present else "-",
            "yes" if p.x2apic else "-",
        ]
        for name, p in PERSONALITIES.items()
    ]
    assert rows == expected

import ast
import subprocess
import sys
from pathlib import Path

import vmbus


def test_every_public_name_is_there_and_documented() -> None:
    for name in vmbus.__all__:
        assert getattr(vmbus, name).__doc__ or isinstance(getattr(vmbus, name), dict), name
    assert set(vmbus.__all__) <= set(dir(vmbus))
    assert not hasattr(vmbus, "nothing_of_this_name")


def test_what_type_checkers_see_is_what_is_there() -> None:
    tree = ast.parse(Path(vmbus.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        (alias.name, node.module)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {name for name, _ in seen} == set(vmbus.__all__)
    for name, module in seen:
        assert module is not None
        __import__(module)
        assert getattr(sys.modules[module], name) is getattr(vmbus, name)


def test_importing_the_package_imports_no_room() -> None:
    code = "import sys, vmbus; print([m for m in sys.modules if m.startswith('vmbus.')])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(vmbus.__file__).parents[1],
    )
    assert done.stdout.strip() == "[]"

"""Another process that changes a guest's memory while its host looks at it: a processor of the guest's that never
waits.

`Flipper` starts it with the guest's memfd and nothing else of ours: no lock of this interpreter's is in its way. Most
changes are taken back at once: what was valid is valid again when it is looked at a second time.
"""

import json
import select
import subprocess
import sys
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self

PAGE = 4096
AT_ONCE = 256
"""Words changed together, and changed back."""
HEADER_WORDS = 4
"""Half of the changes hit the first words of a page: of a ring's control page that is its indices."""


class Flipper:
    """The process. Within a ``with``; `attack` names the pages, `rest` stops until the next `attack`."""

    def __init__(self, fd: int, seed: int) -> None:
        command = [sys.executable, "-S", __file__, str(fd), str(seed), *sys.path]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=[fd], bufsize=1
        )
        self.changes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        self._process.wait(30)

    def attack(self, pages: Iterable[int]) -> None:
        """Change these pages from now on."""
        self._say(sorted(pages))

    def rest(self) -> None:
        """Change nothing; on return nothing is under way."""
        self._say([])

    def _say(self, pages: list[int]) -> None:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        print(json.dumps(pages), file=stdin)
        self.changes = int(stdout.readline())


def main(fd: int, seed: int) -> None:
    import mmap
    import os

    import numpy as np

    words: Any = np.frombuffer(mmap.mmap(fd, os.fstat(fd).st_size), dtype=np.uint32)
    random = np.random.default_rng(seed)
    pages: Any = np.zeros(0, dtype=np.int64)
    changes = 0
    while True:
        if select.select([sys.stdin], [], [], 0 if len(pages) else None)[0]:
            line = sys.stdin.readline()
            if not line:
                return
            pages = np.array(json.loads(line), dtype=np.int64)
            print(changes, flush=True)
        for _ in range(16 if len(pages) else 0):
            places = random.choice(pages, AT_ONCE) * (PAGE // 4)
            limits = np.where(random.random(AT_ONCE) < 0.5, HEADER_WORDS, PAGE // 4)
            places += (random.random(AT_ONCE) * limits).astype(np.int64)
            before = words[places]
            bits = np.uint32(1) << random.integers(0, 32, AT_ONCE, dtype=np.uint32)
            words[places] = before ^ bits
            if random.random() < 0.95:
                words[places] = before
            changes += AT_ONCE


if __name__ == "__main__":
    sys.path[:] = sys.argv[3:]
    main(int(sys.argv[1]), int(sys.argv[2]))

"""Closes guest memories while compiled code copies to and from them without the GIL; run as a process of its own.

``python -m reference.closing_memory HOW [ROUNDS]``: prints how often a close came through, how often it was refused
because the memory was in use, and how often the copy found the memory closed.
"""

import os
import sys
import threading
import time
from array import array
from typing import Any

from vmbus.bus.channel import loopback
from vmbus.core.blockio import BlockClient, BlockServer, Request, Requests
from vmbus.core.memory import GuestMemory
from vmbus.errors import GuestMemoryError

LENGTH = 512 << 10
PAGES = LENGTH // 4096
COUNT = 24


class Collected:
    """What a provider's handlers are given, kept beyond the end of the channel: its memory has no other user then."""

    def __init__(self, *, batch: bool) -> None:
        self.memory = GuestMemory(64 << 20)
        guest, host = loopback(self.memory, 64, 64)
        server = BlockServer(host.incoming, host.outgoing, self.memory)
        self.kept: list[Any] = []

        def one(request: Request) -> None:
            self.kept.append(request)

        def many(requests: Requests) -> int:
            self.kept.append(requests)
            return len(requests)

        server.enable(0, 0, 512, 1 << 20, True, handler=one, batch=many if batch else None)
        client = BlockClient(guest.outgoing, guest.incoming, self.memory, 0, 0, 512, 64)
        offsets = array("Q", range(0, COUNT * LENGTH, LENGTH))
        pfns = array("Q", range(256, 256 + COUNT * PAGES))
        client.begin(offsets, pfns, LENGTH, 1, True, COUNT)
        client.step()
        server.serve(64)


def main(how: str, rounds: int) -> None:
    closed = busy = refused = 0
    file = os.memfd_create("disk")
    os.ftruncate(file, COUNT * LENGTH)
    pfns = array("Q", [n % 1024 for n in range(64 * PAGES)])
    places = array("Q", range(0, COUNT * LENGTH, LENGTH))
    lasting = Collected(batch=True)
    for _ in range(rounds):
        if how == "the other memory":
            other = closing = GuestMemory(4 << 20)
            requests = lasting.kept[0]
            work = [
                lambda requests=requests, other=other: requests.transfer(other, pfns[: len(requests) * PAGES])
            ]
        else:
            collected = Collected(batch=how != "one request")
            closing = collected.memory
            other = GuestMemory(4 << 20)
            work = []
            for kept in collected.kept:
                if how == "a file":
                    work.append(lambda kept=kept: kept.transfer_file(file, places[: len(kept)]))
                elif how == "one request":
                    work.append(lambda kept=kept: kept.transfer(file))
                else:
                    work.append(
                        lambda kept=kept, other=other: kept.transfer(other, pfns[: len(kept) * PAGES])
                    )
        go = threading.Event()

        def close(memory: GuestMemory = closing, go: threading.Event = go) -> None:
            nonlocal closed, busy
            go.wait()
            time.sleep(0.0003)
            try:
                memory.close()
                closed += 1
            except BufferError:
                busy += 1

        thread = threading.Thread(target=close)
        thread.start()
        go.set()
        try:
            for step in work:
                step()
        except (GuestMemoryError, OSError):
            refused += 1
        thread.join()
    print(closed, busy, refused)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 60)

"""The guest and the host of the soak tests: numbered echoes on many channels while offers come and go.

The host checks that a channel's requests arrive in order, each once; the guest checks the same of the answers.
"""

import random
from collections.abc import Generator
from typing import Any
from uuid import UUID

from vmbus.bus import Channel, Offer, VmbusGuest, VmbusHost
from vmbus.bus.vmbus_host import Offered
from vmbus.errors import LocalProtocolError, RemoteProtocolError

WINDOW = 60
"""Requests of 32 bytes in a ring of 4 KiB: all answers fit."""
KIND = UUID("8e4d2c11-31ad-4d6b-9c6e-0f7c1e6a5b3d")


class Line:
    """One open channel at the guest: what was sent, what came back."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.sent = 0
        self.answered = 0
        self.wrong = 0
        channel.serve(self.take)

    def take(self, packets: list) -> None:
        for packet in packets:
            number = int.from_bytes(packet.payload, "little")
            if number != self.answered:
                self.wrong += 1
            self.answered = number + 1

    def send(self, count: int) -> None:
        for _ in range(min(count, WINDOW - (self.sent - self.answered))):
            self.channel.send(self.sent.to_bytes(8, "little"))
            self.sent += 1


def client(guest: VmbusGuest, seed: int, rounds: int, channels: int) -> Generator[None, None, dict[str, Any]]:
    """A guest: opens, talks, closes; `rounds` things in all, chosen by the seed."""
    rng = random.Random(seed)
    counts = dict.fromkeys(
        ("opened", "refused", "closed", "gone", "sent", "answered", "wrong", "lost", "gpadls"), 0
    )
    lines: dict[int, Line] = {}

    def settle(line: Line, *, gone: bool) -> None:
        counts["sent"] += line.sent
        counts["answered"] += line.answered
        counts["wrong"] += line.wrong
        if not gone:
            counts["lost"] += line.sent - line.answered

    guest.connect()
    baseline = guest.pages.in_use
    for _ in range(rounds):
        yield
        for key in [k for k, line in lines.items() if not line.channel.is_open]:
            settle(lines.pop(key), gone=True)
            counts["gone"] += 1
        offers = [o for o in guest.offers if o.channel_id not in lines]
        choice = rng.random()
        try:
            if offers and (choice < 0.2 or not lines):
                offer = rng.choice(offers)
                lines[offer.channel_id] = Line(guest.open(offer, 1, 1))
                counts["opened"] += 1
            elif lines and choice < 0.3:
                key = rng.choice(sorted(lines))
                line = lines[key]
                line.channel.wait(lambda line=line: line.answered == line.sent or not line.channel.is_open)
                if line.channel.is_open:
                    del lines[key]
                    line.channel.close()
                    settle(line, gone=False)
                    counts["closed"] += 1
            elif lines and choice < 0.4:
                line = lines[rng.choice(sorted(lines))]
                pfns = guest.pages.allocate(rng.randrange(1, 80))
                try:
                    line.channel.teardown_gpadl(line.channel.create_gpadl(pfns))
                    counts["gpadls"] += 1
                finally:
                    guest.pages.free(pfns)
            else:
                for key in sorted(lines):
                    lines[key].send(rng.randrange(1, 20))
        except (RemoteProtocolError, LocalProtocolError):
            counts["refused"] += 1  # a rescind was faster
    for line in lines.values():
        line.channel.wait(lambda line=line: line.answered == line.sent or not line.channel.is_open)
        gone = not line.channel.is_open
        line.channel.close()
        settle(line, gone=gone)
    lines.clear()
    guest.disconnect()
    counts["leaked_pages"] = guest.pages.in_use - baseline
    counts["violations"] = guest.violations
    return counts


class Provider:
    """The host's side of one device: echoes, and checks the order."""

    def __init__(self, host: VmbusHost, number: int, subchannel: int = 0) -> None:
        self.host = host
        self.wrong = 0
        self.opens = 0
        self.closes = 0
        self.offer = Offer(KIND, UUID(int=number), subchannel_index=subchannel)
        self.offered: Offered = self.offer_again()

    def offer_again(self) -> Offered:
        self.offered = self.host.offer(
            self.offer, self.opened, self.closed, name=f"echo{self.offer.instance_id.int}"
        )
        return self.offered

    def opened(self, channel: Channel) -> None:
        self.opens += 1
        expected = [0]

        def answer(packets: list) -> None:
            for packet in packets:
                if int.from_bytes(packet.payload, "little") != expected[0]:
                    self.wrong += 1
                expected[0] += 1
                channel.send(packet.payload)  # there is room: the guest keeps fewer than `WINDOW` under way

        channel.serve(answer)

    def closed(self, channel: Channel) -> None:
        self.closes += 1

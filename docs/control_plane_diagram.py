"""Draws the sequence diagrams of docs/control-plane.md and README.md from real runs.

    python docs/control_plane_diagram.py            # rewrite the pages' diagrams
    python docs/control_plane_diagram.py --check    # exit status 1 if they are not those of a run

The run is inline on a virtual clock, so the diagram is the same every time unless the code does something else.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

from vmbus.bus import Channel, Inline, Offer, Version, VmbusGuest, VmbusHost, wire
from vmbus.bus.codec import Sender, parse
from vmbus.bus.versions import version_name
from vmbus.core.ring import Packet
from vmbus.hypervisor import Hypervisor, VirtualClock
from vmbus.trace.events import Event, EventTrace

DOCS = Path(__file__).parent
START, END = "<!-- generated: {name} -->", "<!-- end of {name} -->"
STORAGE = UUID("ba6163d9-04a1-4d29-b605-72e2ffb1dc7f")


def describe(event: Event, version: int) -> str:
    """A message with the fields that tell something, from its bytes."""
    particulars = dict(part.split("=", 1) for part in event.text.split())
    number = wire.MessageType[particulars["type"]]
    body = b"" if particulars["bytes"] == "-" else bytes.fromhex(particulars["bytes"])
    sender = Sender.GUEST if event.source == "child" else Sender.HOST
    message, tail = parse(wire.Header(number).pack() + body, sender, Version.V5_3)
    match message:
        case wire.InitiateContact() | wire.InitiateContact2():
            text = f"version {version_name(message.version_requested)}"
        case wire.VersionResponse() | wire.VersionResponse2() | wire.VersionResponse3():
            text = "yes" if message.version_supported else "no"
            if message.version_supported and version >= Version.V5_0:
                text += f", then connection {message.selected_version_or_connection_id}"
        case wire.OfferChannel():
            kind = f"sub-channel {message.subchannel_index}" if message.subchannel_index else "primary"
            text = f"channel {message.channel_id}, {kind}, connection {message.connection_id:#x}"
        case wire.GpadlHeader():
            text = f"channel {message.channel_id}, gpadl {message.gpadl_id:#x}, {len(tail) // 8 - 1} pages"
        case wire.GpadlBody():
            text = f"gpadl {message.gpadl_id:#x}, {len(tail) // 8} more pages"
        case wire.GpadlCreated():
            text = f"gpadl {message.gpadl_id:#x}, status {message.status}"
        case wire.OpenChannel():
            text = f"channel {message.channel_id}, gpadl {message.ring_buffer_gpadl_id:#x}, VP {message.target_vp}"
        case wire.OpenChannelResult():
            text = f"channel {message.channel_id}, status {message.status}"
        case wire.ModifyChannel():
            text = f"channel {message.channel_id}, VP {message.target_vp}"
        case wire.GpadlTeardown() | wire.GpadlTorndown():
            text = f"gpadl {message.gpadl_id:#x}"
        case (
            wire.CloseChannel()
            | wire.RescindChannelOffer()
            | wire.RelIdReleased()
            | wire.ModifyChannelResponse()
        ):
            text = f"channel {message.channel_id}"
        case _:
            text = ""
    return f"{number.name} {text}".strip()


def mermaid(version: int, *, brief: bool = False) -> str:
    """A Mermaid sequence diagram of a run with that version."""
    lines = [
        "```mermaid",
        "sequenceDiagram",
        "    participant G as guest (VSC side)",
        "    participant H as host (VSP side)",
    ]
    ends = {"child": "G", "root": "H"}
    for event in run(version, brief=brief):
        source, target = ends[event.source], ends[event.target]
        particulars = dict(part.split("=", 1) for part in event.text.split())
        match event.kind:
            case "message":
                lines.append(f"    {source}->>{target}: {describe(event, version)}")
            case "doorbell":
                how = "HvSignalEvent" if source == "G" else "event flag"
                lines.append(f"    {source}-){target}: {how}, channel {particulars['channel']}")
            case "open" | "close":
                lines.append(f"    Note over H: provider {event.kind}s channel {particulars['channel']}")
            case "connect" | "unload":
                lines.append(f"    Note over H: {event.kind} {particulars.get('version', '')}".rstrip())
    return "\n".join([*lines, "```"])


def echo(channel: Channel) -> None:
    """A provider that sends every packet back."""

    def answer(packets: list[Packet]) -> None:
        for packet in packets:
            channel.send(packet.payload, packet.transaction_id)

    channel.serve(answer)


def run(version: int, *, brief: bool = False) -> list[Event]:
    """Connect, open, talk, retarget, rescind, unload (`brief`: one channel, opened, used, closed); what happened."""
    trace = EventTrace()
    hv = Hypervisor(clock=VirtualClock())
    root = hv.create_root("root")
    child = hv.create_child(root, "child", memory_size=8 << 20, vps=2)
    host = VmbusHost(hv, child, hosting=Inline(seed=1), trace=trace)
    disk = Offer(STORAGE, UUID(int=1))
    offered = host.offer(disk, echo, name="disk")
    if not brief:
        host.offer(disk.subchannel(1), echo, name="disk queue 1")
    guest = VmbusGuest(child.vps[0], versions=[version])
    guest.connect()
    channel = guest.open(guest.offers[0], *((4, 4) if brief else (16, 16)))
    answers: list[bytes] = []
    channel.serve(lambda packets: answers.extend(p.payload for p in packets))
    channel.send(b"request!")
    assert channel.wait(lambda: bool(answers))
    if not brief:
        if version >= Version.V4_1:
            guest.retarget(channel, 1)
        offered.rescind()
        assert not host.offered
    guest.close()
    return list(trace)


DIAGRAMS: dict[Path, dict[str, Callable[[], str]]] = {
    DOCS / "control-plane.md": {
        "version 5.3": lambda: mermaid(Version.V5_3),
        "version 1.1": lambda: mermaid(Version.V1_1),
    },
    DOCS.parent / "README.md": {"a channel": lambda: mermaid(Version.V5_3, brief=True)},
}


def updated(page: Path) -> str:
    """The page with the diagrams of runs made now."""
    text = page.read_text(encoding="utf-8")
    for name, draw in DIAGRAMS[page].items():
        start, end = START.format(name=name), END.format(name=name)
        before, _, rest = text.partition(start)
        _, found, after = rest.partition(end)
        if not found:
            raise SystemExit(f"{page.name} has no place for the diagram of {name}")
        text = f"{before}{start}\n{draw()}\n{end}{after}"
    return text


def main() -> int:
    """Rewrite or check the pages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only say whether the pages are up to date")
    check = parser.parse_args().check
    outdated = 0
    for page in DIAGRAMS:
        new = updated(page)
        if new != page.read_text(encoding="utf-8"):
            outdated += 1
            if check:
                print(f"{page.name} is out of date: run {Path(__file__).name}", file=sys.stderr)
            else:
                page.write_text(new, encoding="utf-8")
    return int(check and outdated > 0)


if __name__ == "__main__":
    sys.exit(main())

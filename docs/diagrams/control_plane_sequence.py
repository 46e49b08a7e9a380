"""The control plane's sequence diagrams, of docs/control-plane.md and README.md.

Every control message and doorbell between a guest and its host, from the bus's event trace. The run is inline on a
virtual clock.
"""

from collections.abc import Iterator
from uuid import UUID

from vmbus.bus import Channel, Inline, Offer, Version, VmbusGuest, VmbusHost, wire
from vmbus.bus.codec import Sender, parse
from vmbus.bus.versions import version_name
from vmbus.core.ring import Packet
from vmbus.hypervisor import Hypervisor, VirtualClock
from vmbus.trace.events import Event, EventTrace

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


def record(version: int, *, brief: bool = False) -> Iterator[str]:
    """The lines of the diagram of a run with that version."""
    yield from (
        "sequenceDiagram",
        "    participant G as guest (VSC side)",
        "    participant H as host (VSP side)",
    )
    ends = {"child": "G", "root": "H"}
    for event in run(version, brief=brief):
        source, target = ends[event.source], ends[event.target]
        particulars = dict(part.split("=", 1) for part in event.text.split())
        match event.kind:
            case "message":
                yield f"    {source}->>{target}: {describe(event, version)}"
            case "doorbell":
                how = "HvSignalEvent" if source == "G" else "event flag"
                yield f"    {source}-){target}: {how}, channel {particulars['channel']}"
            case "open" | "close":
                yield f"    Note over H: provider {event.kind}s channel {particulars['channel']}"
            case "connect" | "unload":
                yield f"    Note over H: {event.kind} {particulars.get('version', '')}".rstrip()


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
